"""Training on whole documents: in lanes, whose memory starts anew with each, and in buckets."""

from itertools import pairwise

import pytest
import torch

from memlib.config import ConfigError
from memlib.training.parallel.ranks import Ranks
from memlib.training.trainer import Trainer


@pytest.fixture
def documents(tmp_path):
    """A function from `task.text.documents` to changes; 30 files, each of one letter."""
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"{chr(97 + i % 26)}, " * (7 + 31 * i % 93))
    return lambda how: {
        "task.name": "text",
        "task.text.dataset": str(folder),
        "task.text.documents": how,
        "model.vocab_size": 256,
    }


def tensors(trainer):
    return dict(trainer.model.named_parameters()) | dict(
        trainer.carried.named_tensors() if trainer.carried else ()
    )


@pytest.mark.parametrize("how", ["lanes", "buckets"])
def test_training_learns_and_resumes_bit_for_bit(how, tiny, documents, tmp_path):
    config = tiny(
        documents(how) | {"training.max_steps": 40, "training.save_steps": 20, "training.horizon": 2}
    )
    straight, losses = Trainer(config, tmp_path / "straight"), []
    straight.train(progress=False, on_step=lambda step, record: losses.append(record["loss"]) or True)
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert straight.evaluate().loss < losses[0]
    Trainer(config, tmp_path / "broken").train(until=20, progress=False)
    resumed = Trainer(config, tmp_path / "broken", resume=True)
    resumed.train(progress=False)
    assert (resumed.carried is not None) == (how == "lanes")
    starts = resumed.task.batch(4, 20, config.training.seed).starts
    assert bool(starts.all()) == (how == "buckets")  # a lane goes on inside a document
    for name, tensor in tensors(straight).items():
        assert torch.equal(tensors(resumed)[name], tensor), name


def test_a_step_in_lanes_has_the_gradient_of_its_documents_alone(tiny, documents):
    """The first batch of two lanes: one pass over it, and one over each row's documents by themselves."""
    trainer = Trainer(tiny(documents("lanes") | {"task.segments": 60, "training.batch_size": 2}))
    batch, n = trainer.task.batch(2, 0), trainer.task.segment_length
    positions = int(batch.scored.sum())
    loss, _, _ = trainer.backward(batch, trainer.task, positions)
    together = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    alone = 0.0
    for row in range(2):
        borders = [*(n * batch.fresh[row].nonzero().flatten()).tolist(), batch.tokens.shape[1]]
        for first, last in pairwise(borders):
            where = slice(row, row + 1), slice(first, last)
            output = trainer.model(batch.tokens[where], batch.mask[where])
            scored = batch.scored[where]
            piece = torch.nn.functional.cross_entropy(
                output.logits[scored], batch.targets[where][scored], reduction="sum"
            )
            (piece / positions).backward()
            alone += float(piece.detach()) / positions
    assert batch.fresh.sum() > 2 and loss == pytest.approx(alone, rel=1e-5)
    for mine, p in zip(together, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)


def test_a_pipeline_refuses_documents(tiny, documents, monkeypatch):
    monkeypatch.setattr(Ranks, "size", lambda self, axis: 2 if axis == "stage" else 1)
    with pytest.raises(ConfigError, match="stages read rows without padding"):
        Trainer(tiny(documents("lanes")))
