"""What version 0.1 saved still opens: the same logits, the same next steps, the same session.

The folder `version_0_1` was written by it: a run with every memory, three steps in, and a state that stops
inside a segment. Two kinds of parameters had no axis then, and states had other names.
"""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memlib.config import load_config
from memlib.inference.states import StateError, load_state
from memlib.training.checkpoint import load_checkpoint
from memlib.training.trainer import Trainer, load_model

SAVED = Path(__file__).parent / "version_0_1"


@pytest.fixture(scope="module")
def expected():
    return load_file(SAVED / "expected.safetensors")


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_the_checkpoint_gives_the_same_logits(expected):
    model = load_model(SAVED)
    first = model(expected["ids"][:, :13])
    close(first.logits, expected["first"])
    close(model(expected["ids"][:, 13:], memory_state=first.memory_state).logits, expected["rest"])


@torch.no_grad()
def test_a_saved_state_goes_on_inside_its_segment(expected):
    model = load_model(SAVED)
    state, _ = load_state(SAVED / "state.safetensors", model)
    assert state.window.length == 13 % 8
    close(model(expected["ids"][:, 13:], memory_state=state).logits, expected["rest"])


def test_a_saved_state_of_other_weights_is_refused():
    model = load_model(SAVED)
    with torch.no_grad():
        model.embedding.weight[0] += 1
    with pytest.raises(StateError, match="of another model"):
        load_state(SAVED / "state.safetensors", model)


def test_the_run_goes_on_as_it_would_have(expected, tmp_path):
    shutil.copytree(SAVED, tmp_path / "run")
    trainer = Trainer(load_config(tmp_path / "run" / "config.yaml"), tmp_path / "run", resume=True)
    losses = []
    for step in (3, 4, 5):
        trainer.step = step
        losses.append(trainer.train_step()["loss"])
    close(torch.tensor(losses, dtype=torch.float64), expected["losses"])


def test_it_was_really_written_by_the_old_version():
    """Otherwise the tests above would show nothing."""
    checkpoint = SAVED / "checkpoints" / "step-0000003"
    weights = load_file(checkpoint / "model.safetensors")
    assert any(name.endswith("sharpness") and not tensor.ndim for name, tensor in weights.items())
    assert any(name.startswith("banks.") for name in load_file(SAVED / "state.safetensors"))
    model = load_model(SAVED)
    assert all(parameter.ndim for parameter in model.parameters())
    load_checkpoint(checkpoint, model)
