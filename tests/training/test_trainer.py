"""The training loop: exact resume, honest refusals, and steps that are what the config says."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from memlib.config import ConfigError, load_config, override
from memlib.tasks import Batch
from memlib.training.checkpoint import CheckpointError, flatten_optimizer, latest_checkpoint
from memlib.training.log import read_log
from memlib.training.trainer import Trainer, TrainingDiverged, load_model, load_run

TIMES = ("cpu_seconds", "tokens_per_second", "mfu")  # other in every run


def train(config, folder=None, until=None, resume=False):
    trainer = Trainer(config, folder, resume)
    trainer.train(until, progress=False)
    return trainer


def tensors(trainer):
    """Everything a run goes on from: weights, optimizer, carried memory, the generator of dropout."""
    named = dict(trainer.model.named_parameters())
    named |= flatten_optimizer(trainer.optimizer)[0]
    if trainer.carried is not None:
        named |= dict(trainer.carried.named_tensors())
    return named | {"generator": torch.get_rng_state()}


def log(folder):
    """The run's records without the time they took."""
    return [{k: v for k, v in r.items() if k not in TIMES} for r in read_log(folder)]


def same(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


CURRICULUM = [{"from_step": 0, "set": {"segments": 2}}, {"from_step": 4, "set": {"segments": 3}}]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"memory.internal.write": "attention", "memory.memory_sharing": "shared"},
        {"model.dropout": 0.2},
        {"training.gradient_accumulation_steps": 2, "training.horizon": 1},
        {"training.curriculum": CURRICULUM, "training.lr_schedule": "linear"},
        {"model.tie_embeddings": True, "memory.kinds": []},
        "text",
        "text with dropout and horizon",
    ],
    ids=["recall", "attention", "dropout", "accumulation", "curriculum", "tied", "text", "text_dropout"],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(changes, tiny, text, tmp_path):
    if isinstance(changes, str):
        changes = text | ({"model.dropout": 0.2, "training.horizon": 1} if "dropout" in changes else {})
    straight = tensors(train(tiny(changes), tmp_path / "straight"))
    train(tiny(changes), tmp_path / "broken", until=3)
    torch.manual_seed(99)
    resumed = train(tiny(changes), tmp_path / "broken", resume=True)
    same(tensors(resumed), straight)
    assert log(tmp_path / "broken") == log(tmp_path / "straight")
    assert (resumed.carried is not None) == resumed.task.continues


def test_a_run_killed_after_its_checkpoint_repeats_those_steps_once(tiny, tmp_path):
    """The log has every step once, though steps 4 and 5 were made twice."""
    straight = tensors(train(tiny(), tmp_path / "straight"))

    class Killed(BaseException):
        pass

    trainer = Trainer(tiny(), tmp_path / "killed")
    step = trainer.train_step
    trainer.train_step = lambda: step() if trainer.step < 5 else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        trainer.train(progress=False)
    assert [r["step"] for r in log(tmp_path / "killed")] == [1, 2, 3, 3, 4, 5]
    same(tensors(train(tiny(), tmp_path / "killed", resume=True)), straight)
    assert log(tmp_path / "killed") == log(tmp_path / "straight")


def test_a_finished_run_opens_from_its_folder(tiny, tmp_path):
    trained = train(tiny(), tmp_path / "run")
    opened = load_run(tmp_path / "run")
    assert opened.step == 6 and opened.config == trained.config
    assert opened.evaluate() == trained.evaluate()
    assert opened.train(progress=False) == {}
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "run.json",
        "tensorboard",
    ]
    with pytest.raises(CheckpointError, match=r"nowhere: no checkpoint here; train one with memlib train"):
        load_run(tmp_path / "nowhere")


def test_a_model_opens_without_its_data(tiny, text, tmp_path):
    trained = train(tiny(text), tmp_path / "run")
    (tmp_path / "verses.txt").unlink()
    with pytest.raises(ValueError, match="no such file or folder"):
        load_run(tmp_path / "run")
    model = load_model(tmp_path / "run")
    same(dict(model.named_parameters()), dict(trained.model.named_parameters()))
    assert not model.training
    with pytest.raises(CheckpointError, match=r"nowhere: no checkpoint here; train one with memlib train"):
        load_model(tmp_path / "nowhere")


def test_a_folder_that_holds_a_run_is_refused_without_resume(tiny, tmp_path):
    train(tiny(), tmp_path, until=1)
    with pytest.raises(FileExistsError, match=r"already holds a run \(step-0000001\): resume it"):
        Trainer(tiny(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({"model.hidden_dim": 32}, "model"),
        ({"model.segment_length": 7}, "model"),
        ({"memory.internal.output_gate": False}, "memory"),
        ({"memory.internal.num_slots": 4}, "memory"),
        ({"task.segments": 4}, "task"),
    ],
)
def test_resuming_into_another_config_is_refused_and_says_which_part(changes, group, tiny, tmp_path):
    train(tiny(), tmp_path, until=1)
    saved = (tmp_path / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=f"saved with another {group} configuration"):
        Trainer(tiny(changes), tmp_path, resume=True)
    assert (tmp_path / "config.yaml").read_text() == saved


def test_a_run_saved_before_an_option_existed_goes_on(tiny, tmp_path):
    """A version that adds a memory or an option reads what older ones saved, at the default."""
    train(tiny(), tmp_path, until=1)
    (document,) = tmp_path.glob("checkpoints/*/checkpoint.json")
    saved = json.loads(document.read_text())
    del saved["progress"]["config"]["memory"]["external"], saved["progress"]["config"]["model"]["dropout"]
    document.write_text(json.dumps(saved))
    assert Trainer(tiny(), tmp_path, resume=True).step == 1


def test_training_options_may_change_on_resume_and_do(tiny, tmp_path):
    """A run that diverged is resumed with smaller rates: they must not be the saved ones."""
    train(tiny(), tmp_path, until=3)
    changed = tiny(
        {
            "training.base_model_lr": 1e-3,
            "training.weight_decay": 0.5,
            "training.lr_schedule": "constant",
            "training.max_steps": 8,
        }
    )
    resumed = Trainer(changed, tmp_path, resume=True)
    record = resumed.train(progress=False)
    assert resumed.step == 8
    assert (record["lr_base"], record["lr_memory"], record["lr_gates"]) == pytest.approx((1e-3, 0.01, 0.02))
    decays = {g["weight_decay"] for g in resumed.optimizer.param_groups}
    assert decays == {0.0, 0.5}
    assert [r["lr_base"] for r in read_log(tmp_path) if "lr_base" in r][3:] == [1e-3] * 5


def states_passed_in(trainer):
    """A list that fills with the memory state of every call of the model."""
    seen = []

    def hear(_module, _inputs, keywords):
        seen.append(keywords.get("memory_state"))

    trainer.model.register_forward_pre_hook(hear, with_kwargs=True)
    return seen


@pytest.mark.parametrize("option", ["training.batch_size", "training.gradient_accumulation_steps"])
def test_memory_is_forgotten_where_resuming_moves_the_rows(option, tiny, text, tmp_path):
    train(tiny(text), tmp_path, until=3)
    resumed = Trainer(tiny(text | {option: 3}), tmp_path, resume=True)
    seen = states_passed_in(resumed)
    resumed.train(until=4, progress=False)
    assert seen[0] is None


def test_memory_is_forgotten_where_a_stage_moves_the_rows(tiny, text):
    """Rows of a text stand elsewhere when their pieces get another length."""
    trainer = Trainer(tiny(text | {"training.curriculum": CURRICULUM}))
    seen = states_passed_in(trainer)
    trainer.train(until=6, progress=False)
    assert [state is None for state in seen] == [True, False, False, False, True, False]


def test_memory_of_a_text_goes_on_from_batch_to_batch_until_the_text_begins_anew(tiny, text):
    trainer = Trainer(tiny(text))
    seen = states_passed_in(trainer)
    trainer.train_step()
    carried = trainer.carried
    trainer.step = 1
    trainer.train_step()
    assert seen[0] is None and not carried.window.mask.requires_grad
    for (_, passed), (_, kept) in zip(seen[1].named_tensors(), carried.named_tensors(), strict=True):
        assert torch.equal(passed, kept)
    trainer.step = trainer.task.batches_per_epoch(4)
    trainer.train_step()
    fresh = trainer.model.init_state(4)
    for passed, start in zip(seen[2].memories, fresh.memories, strict=True):
        assert torch.equal(passed.slots, start.slots)


class Rows:
    """A task whose batch i of size b is rows i * b … (i + 1) * b of one fixed table."""

    continues, segments, segment_length = False, 3, 6

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(16, (8, 19), generator=generator)
        self.scored = torch.rand(8, 18, generator=generator) < 0.4

    def batch(self, size, step, seed=0, split="train"):
        rows = slice(step * size, (step + 1) * size)
        tokens = self.tokens[rows]
        return Batch(tokens[:, :-1], tokens[:, 1:], self.scored[rows], torch.ones(size, dtype=torch.bool))


def gradients(config, task):
    """The gradients and the record of the first step, in float64."""
    trainer = Trainer(config)
    trainer.model.double()
    trainer.task = task
    trainer.optimizer.zero_grad = lambda set_to_none: None
    record = trainer.train_step()
    return {name: p.grad for name, p in trainer.model.named_parameters()}, record


def test_two_batches_of_four_are_one_batch_of_eight(tiny):
    """Though the two halves score different numbers of positions."""
    task, free = Rows(), {"training.max_grad_norm": 1e9}
    assert task.scored[:4].sum() != task.scored[4:].sum()
    halves = {"training.batch_size": 4, "training.gradient_accumulation_steps": 2}
    got, record = gradients(tiny(halves | free), task)
    want, whole = gradients(tiny({"training.batch_size": 8} | free), task)
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-12, rtol=1e-9)
    for name in ("loss", "accuracy", "grad_norm"):
        assert record[name] == pytest.approx(whole[name])


def test_the_loss_is_the_mean_over_scored_positions_whatever_the_horizon(tiny):
    task = Rows()
    _, whole = gradients(tiny({"training.batch_size": 8}), task)
    for horizon in (1, 2):
        grads, record = gradients(tiny({"training.batch_size": 8, "training.horizon": horizon}), task)
        assert record["loss"] == pytest.approx(whole["loss"])
        assert record["accuracy"] == whole["accuracy"]
    batch = task.batch(8, 0)
    model = Trainer(tiny()).model.double()
    chosen = model(batch.tokens).logits[batch.scored].log_softmax(-1)
    want = -chosen.gather(1, batch.targets[batch.scored][:, None]).mean()
    assert whole["loss"] == pytest.approx(float(want.detach()))


def test_a_shorter_horizon_changes_the_gradients(tiny):
    far, _ = gradients(tiny({"training.batch_size": 8}), Rows())
    near, _ = gradients(tiny({"training.batch_size": 8, "training.horizon": 1}), Rows())
    assert not torch.allclose(far["embedding.weight"], near["embedding.weight"])


def test_gradients_are_scaled_down_to_the_limit(tiny):
    free, record = gradients(tiny({"training.max_grad_norm": 1e9}), Rows())
    clipped, clipped_record = gradients(tiny({"training.max_grad_norm": 0.1}), Rows())
    assert clipped_record["grad_norm"] == pytest.approx(record["grad_norm"]) and record["grad_norm"] > 0.1
    norm = math.sqrt(sum(float(g.square().sum()) for g in clipped.values()))
    assert norm == pytest.approx(0.1, rel=1e-4)
    unlimited, _ = gradients(tiny({"training.max_grad_norm": 0.0}), Rows())
    assert all(torch.equal(unlimited[name], free[name]) for name in free)


def test_the_curriculum_decides_the_task_of_each_step(tiny):
    stages = [
        {"from_step": 2, "set": {"segments": 2}},
        {"from_step": 4, "set": {"segments": 5, "recall.num_queries": 1}},
    ]
    trainer = Trainer(tiny({"training.curriculum": stages, "training.max_steps": 5}))
    lengths = []
    trainer.model.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1] // 6))
    trainer.train(progress=False)
    assert lengths == [3, 3, 2, 2, 5]
    assert trainer.task_at(3) is trainer.task_at(2) and trainer.task_at(0) is trainer.task


def test_training_stops_where_a_weight_is_no_number_and_says_which(tiny, tmp_path):
    trainer = train(tiny(), tmp_path, until=3)
    with torch.no_grad():
        trainer.model.blocks[1].mlp.up_proj.weight[0, 0] = math.nan
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(TrainingDiverged) as error:
        trainer.train(progress=False)
    message = str(error.value)
    assert "step 3: loss nan" in message
    assert "weights not finite: blocks.1.mlp.up_proj.weight" in message
    assert f"Last checkpoint: {latest_checkpoint(tmp_path)}" in message
    assert "first bad output in the forward pass: of blocks.1.mlp.up_proj" in message
    assert "smaller learning rate" in message and "max_grad_norm below 1.0" in message
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(before[n], after[n]) or "up_proj" in n for n in before)
    assert latest_checkpoint(tmp_path).name == "step-0000003"


def test_training_stops_where_a_gradient_is_no_number_and_says_which(tiny):
    trainer = Trainer(tiny())
    trainer.model.norm.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(TrainingDiverged) as error:
        trainer.train(progress=False)
    assert "all weights are finite; 1 of" in str(error.value)
    assert "first norm.weight" in str(error.value) and "checkpoint: none" in str(error.value)


class BadGradient(torch.autograd.Function):
    """The identity; its gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.nan


def test_one_bad_gradient_does_not_hide_the_good_ones(tiny):
    """Behind block 0's feed-forward all gradients are finite: clipping must not make them NaN."""
    trainer = Trainer(tiny())
    trainer.model.blocks[0].mlp.register_forward_hook(lambda mlp, given, out: BadGradient.apply(out))
    with pytest.raises(TrainingDiverged) as error:
        trainer.train(progress=False)
    assert "all weights are finite" in str(error.value) and "first bad output" not in str(error.value)
    assert "first embedding.weight, last blocks.0.mlp.down_proj.weight (" in str(error.value)


def test_a_bad_write_is_named_by_block_and_memory(tiny, monkeypatch):
    trainer = Trainer(tiny())
    memory = trainer.model.blocks[1].memories["internal"]
    write = type(memory).write

    def bad_write(self, *arguments, **options):
        state = write(self, *arguments, **options)
        return state.map(lambda part: part * math.nan) if self is memory else state

    monkeypatch.setattr(type(memory), "write", bad_write)
    message = "first bad output in the forward pass: of blocks.1.memories.internal.slots"
    with pytest.raises(TrainingDiverged, match=message):
        trainer.train(progress=False)


def test_a_vocabulary_too_small_for_the_task_is_refused(tiny):
    with pytest.raises(ConfigError, match=r"model.vocab_size = 13: task recall has 14 tokens; raise it"):
        Trainer(tiny({"model.vocab_size": 13}))


def test_a_stage_that_cannot_work_is_refused_before_the_first_step(tiny):
    stages = [{"from_step": 4, "set": {"recall.num_keys": 40}}]
    with pytest.raises(ConfigError, match=r"model.vocab_size = 16: task recall has 50 tokens"):
        Trainer(tiny({"training.curriculum": stages}))


def test_training_ends_by_steps_or_by_processor_time(tiny):
    assert train(tiny()).step == 6
    assert train(tiny({"training.max_cpu_seconds": 1e-9})).step == 1


def test_a_trainer_without_a_folder_does_not_save(tiny):
    with pytest.raises(ValueError, match="no folder"):
        Trainer(tiny()).save()


def test_a_checkpoint_holds_the_config_and_old_ones_go(tiny, tmp_path):
    train(tiny({"training.save_steps": 1, "training.keep_checkpoints": 2}), tmp_path)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-0000005", "step-0000006"]
    document = json.loads((latest_checkpoint(tmp_path) / "checkpoint.json").read_text())
    assert document["progress"]["step"] == 6
    assert document["progress"]["config"]["model"]["hidden_dim"] == 16
    assert load_config(tmp_path / "config.yaml") == load_run(tmp_path).config


def test_the_log_has_losses_rates_and_test_scores(tiny, tmp_path):
    last = Trainer(tiny(), tmp_path).train(progress=False)
    records = read_log(tmp_path)
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6] and steps[-1]["loss"] == last["loss"]
    assert {"accuracy", "grad_norm", "lr_gates", "lr_memory", "lr_base", "cpu_seconds"} <= steps[0].keys()
    assert [r["step"] for r in records if "test_accuracy" in r] == [3, 6]


def test_evaluation_draws_nothing_from_the_generators_of_training(tiny):
    trainer = Trainer(tiny({"model.dropout": 0.5}))
    state = torch.get_rng_state()
    score = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state) and trainer.model.training
    assert trainer.evaluate() == score
    assert trainer.evaluate(segments=5).positions == score.positions


def test_too_little_text_is_said_before_training(tmp_path):
    note = tmp_path / "note.txt"
    note.write_text("a short note. " * 300)
    changes = {
        "task.name": "text",
        "task.text.dataset": str(note),
        "model.vocab_size": 256,
        "training.max_steps": 1,
        "training.eval_examples": 64,
    }
    trainer = Trainer(override(load_config("recall_internal"), changes | {"task.segments_min": None}))
    trainer.train(progress=False)
    assert trainer.evaluate().positions > 0  # one row of test text is enough

    note.write_text("far too short. " * 10)
    with pytest.raises(ValueError, match="bytes of train text are too few for 32 rows"):
        Trainer(override(load_config("recall_internal"), changes | {"task.segments_min": None}))


ROUTED = {
    "memory.kinds": ["chapters"],
    "memory.chapters.num_memory_tokens": 16,
    "memory.chapters.num_chapters": 4,
    "memory.chapters.top_k_chapters": 2,
    "memory.chapters.use_auxiliary_loss": True,
    "memory.chapters.use_z_loss": True,
    "training.gradient_accumulation_steps": 2,
}


@pytest.mark.parametrize("horizon", [None, 2])
def test_router_losses_are_added_to_the_gradient_and_reported_apart(tiny, horizon):
    """By hand: cross-entropy over all answers, plus each piece's mean losses by its share of the tokens."""
    trainer = Trainer(tiny(ROUTED | {"training.horizon": horizon}))
    twin = Trainer(tiny(ROUTED | {"training.horizon": horizon}))
    twin.model.load_state_dict(trainer.model.state_dict())
    batch = trainer.task.batch(4, 0)
    positions = int(batch.scored.sum())
    loss, _, routing = trainer.backward(batch, trainer.task, positions)
    state, answers, routed = None, 0.0, 0.0
    n = trainer.config.model.segment_length
    for first, last in [(0, 3)] if horizon is None else [(0, 2), (2, 3)]:
        part = slice(n * first, n * last)
        output = twin.model(batch.tokens[:, part], memory_state=state)
        state = output.memory_state.detach()
        asked = batch.scored[:, part]
        if asked.any():
            said, wanted = output.logits[asked], batch.targets[:, part][asked]
            answers = answers + F.cross_entropy(said, wanted, reduction="sum") / positions
        routed = routed + sum(output.router_losses.values()) * (last - first) / 3 / 2
    (answers + routed).backward()
    assert loss == pytest.approx(float(answers.detach()))
    assert routing == pytest.approx(float(routed.detach())) and routing > 0
    for mine, theirs in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_the_log_has_a_router_loss_where_there_is_a_router(tiny):
    assert Trainer(tiny(ROUTED)).train_step()["router_loss"] > 0
    assert "router_loss" not in Trainer(tiny()).train_step()
