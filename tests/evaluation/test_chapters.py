"""How chapters are used, against models whose choices are known."""

import numpy as np
import pytest
import torch

from memlib import MemoryTransformer, load_config, override
from memlib.evaluation.chapters import (
    chapter_use,
    load_entropy,
    mutual_information,
    topics_and_chapters,
)
from memlib.experiments.studies import lean
from memlib.tasks import make_task

CONFIG = load_config("topics_routed")


def model(preset="topics_routed", **changes):
    torch.manual_seed(0)
    config = override(load_config(preset), changes)
    return MemoryTransformer(config), make_task(config.task, 16)


def knowing():
    """A router that reads the topic off the words: chapter t for topic t."""
    built, task = model()
    memory = built.blocks[0].memories["chapters"]
    words = torch.arange(task.vocabulary["word"].start, task.vocabulary["word"].stop).reshape(8, -1)
    with torch.no_grad():
        built.embedding.weight.zero_()
        for topic in range(8):
            built.embedding.weight[words[topic], topic] = 1.0
        memory.router.proj.weight.zero_()
        memory.router.proj.weight[:, :8] = 20 * torch.eye(8)
        memory.router.proj.bias.zero_()
    return built, task


def test_a_router_that_reads_the_topic_tells_all_of_it():
    built, task = knowing()
    topics, chapters, loads = topics_and_chapters(built, task, examples=128)
    assert np.array_equal(topics, chapters)
    assert loads.sum() == pytest.approx(1, abs=0.2) or loads.min() > 0
    use = chapter_use(built, task)
    assert use["information"] == pytest.approx(1) and use["shuffled"] < 0.1
    assert use["in use"] == 8 and use["entropy"] > 0.98 and use["tokens read"] == 32


def test_what_counts_is_the_topic_of_the_segment_before():
    """With another topic in each segment, the choice is right for the one before and wrong for this one."""
    built, _ = knowing()
    config = override(CONFIG, {"task.topics.change": 1.0})
    task = make_task(config.task, 16)
    topics, chapters, _ = topics_and_chapters(built, task, examples=128)
    assert np.array_equal(topics, chapters)


def test_a_router_that_leans_uses_one_chapter():
    built, task = model()
    with torch.no_grad():
        built.blocks[0].memories["chapters"].router.proj.weight.zero_()
        built.blocks[0].memories["chapters"].router.proj.bias.zero_()
    lean(built)
    use = chapter_use(built, task)
    assert use["in use"] == 1 and use["information"] == use["entropy"] == 0


@pytest.mark.parametrize(("preset", "want"), [("topics_baseline", 0), ("topics_dense", 256)])
def test_models_without_chapters_say_what_they_read(preset, want):
    assert chapter_use(*model(preset)) == {"tokens read": want}


def test_two_of_eight_chapters_are_a_quarter():
    built, task = model(**{"memory.chapters.top_k_chapters": 2})
    assert chapter_use(built, task)["tokens read"] == 64


def test_mutual_information_against_known_cases():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 4, 4000)
    assert mutual_information(a, (a + 1) % 4) == pytest.approx(1)
    assert mutual_information(a, a // 2) == pytest.approx(0.5, abs=0.01)  # one bit of two
    by_chance = (4 - 1) * (8 - 1) / (2 * 4000 * np.log(4))
    assert mutual_information(a, rng.integers(0, 8, 4000)) < 3 * by_chance
    assert mutual_information(np.zeros(9, int), np.arange(9)) == 0


@pytest.mark.parametrize(
    ("loads", "want"), [([1, 1, 1, 1], 1.0), ([2, 0, 0, 0], 0.0), ([3, 3, 0, 0], 0.5), ([5], 1.0)]
)
def test_load_entropy_against_known_cases(loads, want):
    assert load_entropy(np.array(loads)) == pytest.approx(want)
