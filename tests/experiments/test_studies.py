"""The stored studies are of configurations that exist, and support what docs/diary.md and README.md state."""

import json
from pathlib import Path
from statistics import fmean

import pytest

from memlib.experiments.comparison import read_json
from memlib.experiments.studies import RATIOS, STUDIES, named_comparison
from memlib.models import MemoryTransformer
from memlib.models.info import count_parameters

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@pytest.mark.parametrize("study", STUDIES)
def test_results_are_of_the_configurations(study):
    results, configs = read_json(RESULTS / f"{study}.json"), named_comparison(study)
    assert {r.name.partition(",")[0] for r in results} == set(configs)
    for name, config in configs.items():
        runs = [r for r in results if r.name.partition(",")[0] == name]
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


def recall_by_age(name, seed):
    rows = read_json(RESULTS / "age.json")
    (row,) = (r for r in rows if r.name == name and r.seed == seed)
    return row.accuracy


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_bank_holds_what_it_has_for_its_half_life(seed):
    """Flat up to two half-lives, at chance after nine, and slower banks later."""
    died = []
    for half_life in (2, 4, 8, 16):
        recall = recall_by_age(f"hds, only half-life {half_life}", seed)
        young = [a for age, a in recall.items() if age <= 2 * half_life]
        old = [a for age, a in recall.items() if age >= 9 * half_life]
        assert max(old, default=0) <= 1 / 16 + 0.05 and max(young) - min(young) <= 0.12
        died.append(min((age for age, a in recall.items() if a <= 1 / 16 + 0.05), default=200))
    assert died == sorted(died)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_banks_share_the_keys_out(seed):
    """What each bank knows alone, less its guesses, adds up to all: a key lives in one bank."""
    alone = [recall_by_age(f"hds, only half-life {half_life}", seed)[2] for half_life in (2, 4, 8, 16)]
    assert abs(sum((a - 1 / 16) / (15 / 16) for a in alone) - 1) <= 0.1


def of_banks(name, segments):
    """The mean of three seeds by age, and in a stream."""
    mean = [scores("banks", name + suffix, segments) for suffix in ("", ", in a stream")]
    return [sum(seeds) / len(seeds) for seeds in mean]


def test_one_bank_must_choose_between_age_and_a_stream():
    fast, middle, slow = (of_banks(f"banks_1x512_half_{half}", 64) for half in (4, 16, 64))
    assert slow[0] > middle[0] + 0.1 > fast[0] + 0.2
    assert fast[1] > middle[1] + 0.1 > slow[1] + 0.2


def test_four_banks_are_no_better_than_one_in_the_middle():
    """An expected effect that was not found; if this fails, docs/diary.md and README.md must change."""
    for segments in (16, 32, 64):
        four, middle = of_banks("banks_4x128", segments), of_banks("banks_1x512_half_16", segments)
        assert all(a < b + 0.05 for a, b in zip(four, middle, strict=True))


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
        assert min(chapters("topics", name, "information")) >= 0.6
        assert max(chapters("topics", name, "shuffled")) < 0.05


def test_a_feed_forward_of_equal_size_is_better_here():
    """Stated in docs/diary.md and README.md; if this fails, they must change."""
    assert min(scores("topics", "topics_baseline", 3)) > max(scores("topics", "topics_routed", 3))


def test_a_collapse_stays_without_the_balance_loss_and_is_cured_with_it():
    """Both begin in one chapter of eight; accuracy is better on every seed as well."""
    assert max(chapters("collapse", "topics_unbalanced", "in use")) <= 5
    assert min(chapters("collapse", "topics_balanced", "in use")) >= 7
    entropy = {n: chapters("collapse", n, "entropy") for n in ("topics_unbalanced", "topics_balanced")}
    assert max(entropy["topics_unbalanced"]) < 0.4 and min(entropy["topics_balanced"]) > 0.9
    pairs = (scores("collapse", name, 3) for name in ("topics_unbalanced", "topics_balanced"))
    assert all(cured > collapsed for collapsed, cured in zip(*pairs, strict=True))


def test_many_ranks_are_better_cut_down_and_few_better_trained():
    """Rounding costs neither anything. 16 and 8 of 32 on every seed, 2 and 1 by the mean of seeds."""
    runs = json.loads((RESULTS / "rank.json").read_text(encoding="utf-8"))

    def cut(rank):
        return [r["accuracy"] for run in runs for r in run if (r["rank"], r["bits"]) == (rank, 32)]

    def trained(rank, bits=32):
        return scores("low_rank", f"rank_{rank}_{bits}_bits", 3)

    for rank in (16, 8):
        assert all(other > own for own, other in zip(trained(rank), cut(rank), strict=True))
    for rank in (2, 1):
        assert fmean(trained(rank)) > fmean(cut(rank)) + 0.04
    for rank in ("whole", 16, 8, 4, 2):
        assert abs(fmean(trained(rank, 4)) - fmean(trained(rank))) < 0.02


def test_bytes_against_accuracy_break_between_rank_8_and_rank_4():
    """In parts of the bank's gain, on every seed: 4 bits keep it, rank 8 keeps 0.9 of it, rank 4 does not."""
    runs = json.loads((RESULTS / "rank.json").read_text(encoding="utf-8"))
    assert len(runs) >= 3
    for rows in runs:
        of = {(row["rank"], row["bits"]): row["accuracy"] for row in rows}
        nothing, whole = of[0, 32], of[None, 32]
        kept = {key: (accuracy - nothing) / (whole - nothing) for key, accuracy in of.items()}
        assert whole - nothing > 0.15
        assert min(kept[rank, 4] for rank in (16, None)) >= 0.95 and kept[8, 4] >= 0.9
        assert kept[4, 32] < 0.9 and kept[2, 32] < 0.7 and kept[1, 32] < 0.5
        size = {(row["rank"], row["bits"]): row["nbytes"] for row in rows}
        assert size[8, 4] * 14 <= size[None, 32]


def test_gradients_must_reach_from_the_question_to_the_write():
    """On every seed and task; a part that ends before the question changes nothing."""
    for length in (2, 3, 4):
        runs = [scores("horizon", f"{length}_segments_horizon_{h}", length) for h in range(1, length + 1)]
        assert all(min(runs[-1]) > max(short) + 0.07 for short in runs[:-1])
    one, three = (scores("horizon", f"4_segments_horizon_{h}", 4) for h in (1, 3))
    assert one == three
