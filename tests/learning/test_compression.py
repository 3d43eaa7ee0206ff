"""What long-term memory and the ring learn, against their controls."""

import pytest

from memlib.config import load_config, override
from memlib.evaluation import evaluate
from memlib.training.trainer import Trainer

from .early import train_until_learned

CHANCE, TOLERANCE, EXAMPLES = 1 / 16, 0.03, 512
FEW = 128  # examples of 32 segments, four questions each


def trained(preset, seed=0, **changes):
    config = override(load_config(preset), {"training.seed": seed} | changes)
    return train_until_learned(Trainer(config))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learned_importance_keeps_what_will_be_asked(seed):
    """At a quarter, exactly the four values can survive of sixteen tokens; by lot, a quarter of them do."""
    changes = {"memory.ltm.memory_compression_ratio": 0.25}
    trainer = trained("recall_ltm", seed, **changes)
    assert trainer.evaluate(segments=4).accuracy >= 0.95
    assert trainer.evaluate(FEW, segments=32).accuracy >= 0.90
    alone = evaluate(trainer.model, trainer.task, EXAMPLES, memory=False).accuracy
    assert abs(alone - CHANCE) <= TOLERANCE


@pytest.mark.slow
def test_by_lot_as_much_survives_as_the_ratio_says():
    changes = {"memory.ltm.memory_compression_ratio": 0.25, "memory.ltm.keep": "random"}
    by_lot = 0.25 + 0.75 * CHANCE
    assert abs(trained("recall_ltm", **changes).evaluate(segments=4).accuracy - by_lot) <= 0.05


@pytest.mark.slow
def test_adaptive_slots_recall_when_every_token_is_written():
    changes = {
        "memory.ltm.slots": "adaptive",
        "memory.ltm.num_slots": 64,
        "memory.ltm.memory_compression_ratio": 1.0,
    }
    assert trained("recall_ltm", **changes).evaluate(FEW, segments=32).accuracy >= 0.95


@pytest.mark.slow
def test_the_ring_recalls_what_fits_and_nothing_older():
    """96 places are six segments of sixteen tokens."""
    trainer = trained("recall_ring")
    assert trainer.evaluate(segments=6).accuracy >= 0.95
    assert abs(trainer.evaluate(2 * FEW, segments=32).accuracy - CHANCE) <= TOLERANCE
