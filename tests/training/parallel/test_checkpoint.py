"""Checkpoints of runs on several processes: any number reads them, complete, exact, checked."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from memlib.config import load_config
from memlib.models import MemoryTransformer
from memlib.training.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint
from memlib.training.log import read_log
from memlib.training.trainer import Trainer, consolidate, load_model, load_run
from tests.training.parallel.resharding import HALF, PAIRS, STEPS, config_of
from tests.training.parallel.shards import same, tensors
from tests.training.parallel.started import run_module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs of resharding.py, made once."""
    folder = tmp_path_factory.mktemp("runs")
    run_module("resharding", folder, timeout=500)
    return folder


@pytest.fixture
def sharded(runs, tmp_path):
    """A copy of a run of two processes."""
    return Path(shutil.copytree(runs / "internal" / "2", tmp_path / "run"))


def losses(run):
    return {int(r["step"]): r["loss"] for r in read_log(run) if "loss" in r}


@pytest.mark.parametrize(
    ("case", "saved", "layout"),
    [(c, *pair) for c in ("internal", "curriculum", "chapters", "lanes") for pair in PAIRS[c]],
)
def test_any_number_of_processes_continues_a_run_like_one_that_was_not_interrupted(runs, case, saved, layout):
    want, got = losses(runs / case / "1"), losses(runs / case / f"{saved}-{layout}")
    assert list(got) == list(range(HALF + 1, STEPS + 1))
    assert max(abs(got[step] - want[step]) for step in got) < 1e-5


def test_the_carried_memory_matters_to_those_losses(runs, tmp_path):
    """Without it the next loss is another: the test above would see rows that were lost or exchanged."""
    config = config_of(runs, "internal", "1")
    shutil.copytree(runs / "internal" / "2-1" / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(latest_checkpoint(tmp_path))
    want = losses(runs / "internal" / "1")[HALF + 1]
    for change in (lambda state: None, lambda state: state.rows(torch.tensor([1, 0, 2, 3]))):
        trainer = Trainer(config, tmp_path, resume=True)
        trainer.carried = change(trainer.carried)
        assert abs(trainer.train_step()["loss"] - want) > 1e-4


@pytest.mark.parametrize(
    ("case", "layout"),
    [("internal", "2"), ("internal", "2-tensor"), ("internal", "2-stages"), ("internal", "4")]
    + [("chapters", "2-experts"), ("dropout", "2"), ("async", "2"), ("lanes", "2")],
)
def test_the_same_processes_continue_bit_for_bit(runs, case, layout):
    """All tensors are equal: weights, optimizer, memory and every rank's generators."""
    straight, resumed = runs / case / layout, runs / case / f"{layout}-{layout}"
    assert same(tensors(latest_checkpoint(straight)), tensors(latest_checkpoint(resumed))) == []
    want = losses(straight)
    assert losses(resumed) == {step: want[step] for step in range(HALF + 1, STEPS + 1)}


def test_lanes_were_saved_inside_documents_of_both_processes_and_have_padding(runs):
    """So the tests above would see a lost memory, and a mask or the start of a document on a wrong row."""
    trainer = Trainer(config_of(runs, "lanes", "1"))
    batches = [trainer.task.batch(4, i, trainer.config.training.seed) for i in range(2 * STEPS)]
    assert bool((~batches[2 * HALF].starts).view(2, 2).any(1).all())
    for rows in (slice(0, 2), slice(2, 4)):
        after = [batch.rows(rows) for batch in batches[2 * HALF :]]
        assert any(bool((~batch.mask).any()) for batch in after)
        assert any(bool(batch.fresh[:, 1:].any()) for batch in after)


def test_a_save_in_the_background_is_of_its_step(runs):
    """Not of later ones: the copy is made before training goes on."""
    run = runs / "async" / "2"
    assert [p.name[-1] for p in sorted((run / "checkpoints").iterdir())] == ["1", "2", "3", "4"]
    for step in range(1, STEPS + 1):
        saved = run / "checkpoints" / f"step-{step:07d}"
        assert load_checkpoint(saved)[0]["step"] == step
        steps = {float(t) for (name, _), t in tensors(saved).items() if name.endswith(".step")}
        assert steps == {step}


@pytest.mark.parametrize("layout", ["2", "2-stages", "2-tensor", "4"])
def test_every_parameter_has_its_optimizer_state_though_some_never_had_a_gradient(runs, layout):
    run = runs / "internal" / layout
    names = {name for name, _ in tensors(latest_checkpoint(run))}
    config = load_config(run / "config.yaml")
    parameters = {name for name, _ in MemoryTransformer(config).named_parameters()}
    want = {f"optimizer.{n}.{field}" for n in parameters for field in ("step", "exp_avg", "exp_avg_sq")}
    assert {n for n in names if n.startswith("optimizer.")} == want
    assert {n for n in names if n.startswith("model.")} == {f"model.{n}" for n in parameters}


def test_nothing_is_pickled(runs):
    found = {p.suffix for p in (runs / "internal" / "4" / "checkpoints").rglob("*") if p.is_file()}
    assert found == {".safetensors", ".json"}


@pytest.mark.parametrize("layout", ["2", "4", "2-stages", "2-tensor"])
def test_one_plain_process_opens_a_run_of_several(runs, layout, tmp_path):
    run = Path(shutil.copytree(runs / "internal" / layout, tmp_path / "run"))
    saved = (run / "config.yaml").read_text()
    trainer, model = load_run(run), load_model(run)
    assert trainer.step == STEPS and (run / "config.yaml").read_text() == saved
    tokens = torch.randint(256, (2, 12))
    assert torch.equal(model(tokens).logits, trainer.model.eval()(tokens).logits)
    whole = load_model(runs / "internal" / "1")
    torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, atol=1e-4, rtol=0)


def test_a_consolidated_run_is_one_of_one_process(sharded, tmp_path):
    state = torch.get_rng_state()
    written = consolidate(sharded, tmp_path / "whole")
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(p.name for p in written.glob("*.safetensors")) == [
        f"{name}.safetensors" for name in ("memory", "model", "optimizer", "random")
    ]
    mine, theirs = load_run(tmp_path / "whole"), load_run(sharded)
    for (name, a), (_, b) in zip(mine.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    mine.step = theirs.step = 0  # one more step of each, of the same data
    assert mine.train_step() == theirs.train_step()
    with pytest.raises(FileExistsError, match="already holds a run"):
        consolidate(sharded, tmp_path / "whole")


def shard_of(run, rank=2):
    (file,) = latest_checkpoint(run).glob(f"shard-{rank:05d}-*.safetensors")
    return file


def test_a_damaged_file_is_refused_by_its_name(sharded):
    file = shard_of(sharded)
    content = bytearray(file.read_bytes())
    content[-3] ^= 1  # one bit of one number: only the checksum can tell
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged.*use an earlier checkpoint"):
        load_model(sharded)


def test_a_missing_file_is_refused_by_its_name(sharded):
    shard_of(sharded).unlink()
    with pytest.raises(CheckpointError, match=rf"{shard_of(sharded, 1).name[:7]}.*is missing"):
        load_model(sharded)


def test_a_model_of_other_tensors_is_refused(sharded):
    for group, field, value, reason in [
        ("model", "hidden_dim", 16, "has shape .* here"),
        ("model", "num_layers", 3, "is not stored"),
        ("model", "num_layers", 1, "the model has no blocks.1"),
    ]:
        other = load_config(sharded / "config.yaml")
        setattr(getattr(other, group), field, value)
        with pytest.raises(CheckpointError, match=reason):
            load_checkpoint(latest_checkpoint(sharded), MemoryTransformer(other))


def test_an_incomplete_checkpoint_is_ignored_and_removed_by_the_next_save(sharded):
    newest = latest_checkpoint(sharded)
    part = newest.with_name(".step-0000009.part")
    shutil.copytree(newest, part)
    (part / "checkpoint.json").unlink()
    assert latest_checkpoint(sharded) == newest
    trainer = load_run(sharded)
    trainer.step += 1
    trainer.save()
    assert not part.exists() and latest_checkpoint(sharded).name == f"step-{STEPS + 1:07d}"


def test_killed_at_random_moments_a_run_goes_on_and_ends_bit_for_bit_the_same(tmp_path):
    found = json.loads(run_module("kills", tmp_path, 20, timeout=500).splitlines()[-1])
    assert (
        found["kills"] == 20
        and found["during a save"] >= 3
        and found["tensors that differ"] == []
        and found["log is the same"]
    )
