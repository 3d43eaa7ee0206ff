"""The stored studies are of configurations that exist, and hold what the documents say of them."""

from pathlib import Path

import pytest

from memlib.models import MemoryTransformer
from memlib.models.info import count_parameters
from memlib.training.comparison import RATIOS, STUDIES, named_comparison, read_json

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("study", STUDIES)
def test_results_are_of_the_configurations(study):
    results, configs = read_json(RESULTS / f"{study}.json"), named_comparison(study)
    assert {r.name for r in results} == set(configs)
    for name, config in configs.items():
        runs = [r for r in results if r.name == name]
        assert {r.seed for r in runs} >= {0, 1, 2}
        for result in runs:
            assert result.parameters == count_parameters(MemoryTransformer(config))
            assert result.steps == config.training.max_steps
            assert result.cpu_seconds <= 60 or name == "recall_ring_512"


def scores(study, name, segments):
    return [r.accuracy[segments] for r in read_json(RESULTS / f"{study}.json") if r.name == name]


@pytest.mark.parametrize("segments", [4, 32])
@pytest.mark.parametrize("ratio", [ratio for ratio in RATIOS if ratio < 1])
def test_learned_importance_beats_random_drop_at_every_ratio(ratio, segments):
    """On every seed, and whole wherever all four of a segment's pairs can survive."""
    learned = scores("compression", f"ltm_{ratio:g}_learned", segments)
    assert min(learned) > 1.5 * max(scores("compression", f"ltm_{ratio:g}_random", segments))
    assert ratio * 16 < 4 or min(learned) >= 0.99


def test_the_ring_forgets_what_its_places_cannot_hold():
    """96 places are six segments; of 32 nothing is left, unless there are places for all."""
    assert min(scores("prototype", "recall_ring", 6)) >= 0.99
    assert max(scores("prototype", "recall_ring", 32)) <= 0.1
    assert min(scores("prototype", "recall_ring_512", 32)) >= 0.99


def test_adaptive_slots_lose_nothing_while_there_are_enough():
    for segments in (4, 32):
        assert min(scores("slots", "ltm_adaptive_64", segments)) >= 0.999
    assert min(scores("slots", "ltm_adaptive_32", 4)) > max(scores("slots", "ltm_fixed_32", 4))
    assert max(scores("slots", "ltm_adaptive_32", 32)) < min(scores("slots", "ltm_fixed_32", 32))


def chapters(study, name, measure):
    return [r.chapters[measure] for r in read_json(RESULTS / f"{study}.json") if r.name == name]


def test_routed_memory_keeps_the_gain_of_dense_memory_at_an_eighth_of_its_reading():
    """On every seed, and with two chapters of eight; the gain is over the same model without memory."""
    for name, part in (("topics_routed", 1 / 8), ("topics_routed_2", 1 / 4)):
        runs = (scores("topics", n, 3) for n in ("topics_plain", "topics_dense", name))
        for plain, dense, routed in zip(*runs, strict=True):
            assert dense - plain > 0.02
            assert routed - plain >= 0.95 * (dense - plain)
        (whole,) = set(chapters("topics", "topics_dense", "tokens read"))
        assert set(chapters("topics", name, "tokens read")) == {part * whole}


def test_chapters_specialise_on_topics():
    for name in ("topics_routed", "topics_routed_2"):
        assert min(chapters("topics", name, "information")) >= 0.7
        assert max(chapters("topics", name, "shuffled")) < 0.05


def test_a_feed_forward_of_equal_size_is_better_here():
    """Said in the documents; should it ever turn round, they must change."""
    assert min(scores("topics", "topics_baseline", 3)) > max(scores("topics", "topics_routed", 3))
