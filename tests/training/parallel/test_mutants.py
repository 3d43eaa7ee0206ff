"""Known faults of training on several processes: each is found by the comparison with one process."""

import json

import pytest
import torch

from memlib.config import ConfigError, load_config
from memlib.memory import MEMORIES
from memlib.models.stores import attach_stores
from memlib.training.parallel.ranks import Ranks, check_launch
from memlib.training.trainer import Trainer
from tests.laws.cases import BATCH, SEGMENT, VOCAB, cases
from tests.training.parallel.mutants import MUTANTS
from tests.training.parallel.started import run_module


@pytest.fixture(scope="module")
def gaps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    run_module("mutants", folder, timeout=300)
    return json.loads((folder / "gaps.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_faulty_variant_does_not_train_like_one_process(gaps, name):
    assert gaps[name] > 1e-6


def test_inputs_that_fsdp_casts_would_round_the_state(gaps):
    assert gaps["state, right"] == "['torch.float32']"
    assert gaps["state, inputs cast"] != gaps["state, right"]


ONE_OF_EACH = [next(c for c in cases() if c.name.startswith(kind)) for kind in MEMORIES]


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_no_parameter_is_a_scalar_and_no_buffer_holds_a_state(case):
    """`fully_shard` cannot divide a number, and buffers are each rank's own and in no checkpoint."""
    model = case.fresh()
    assert min(p.ndim for p in model.parameters()) >= 1
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.ones(BATCH, 3 * SEGMENT, dtype=torch.int64) * (VOCAB - 1))
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_what_accelerate_would_leave_out_in_silence_is_refused(monkeypatch):
    """Its FSDP plugin is ignored on CPU, and `accelerate launch --cpu` starts one process of two."""
    config = load_config("recall_internal")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="does not reach this loop"):
        check_launch(config, 2)
    config.parallel.distributed_strategy, config.parallel.num_gpus = "fsdp", 2
    check_launch(config, 2)
    with pytest.raises(ConfigError, match=r"the launcher started 1; use torchrun"):
        check_launch(config, 1)


def test_a_store_is_refused_where_several_processes_train(monkeypatch):
    """The place of a state in a store names a file of one process."""
    trainer = Trainer(load_config("recall_external"))
    attach_stores(trainer.model)
    monkeypatch.setattr(Ranks, "count", 2)
    with pytest.raises(ConfigError, match="2 processes train it"):
        trainer.train(progress=False)
