"""Use of chapters: how evenly they are selected, and whether each topic has its own.

Axes: b batch, s segments, n tokens of a segment, c chapters, e (example, segment) pairs; i, j values of two
discrete variables.
"""

from __future__ import annotations

import numpy as np
import torch
from einops import einsum, reduce
from torch import Tensor

from memlib.memory.chapters.memory import ChapterMemory
from memlib.models.eval_mode import eval_mode
from memlib.models.transformer import MemoryTransformer
from memlib.tasks.topics import Topics


@torch.no_grad()
def topics_and_chapters(
    model: MemoryTransformer, task: Topics, examples: int = 256, layer: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every segment but the first: the previous segment's topic and the chapter with most weight.

    -> topics [e], chapters [e], and loads [c], the total weight of each chapter, normalised to sum 1. A
    selection is made from the previous segment; the first segment has none.
    """
    tokens = task.batch(examples, 0, split="test").tokens
    seen: list[Tensor] = []
    memory = [m for m in model.modules() if isinstance(m, ChapterMemory)][layer]
    memory.weight_point.listeners.append(seen.append)
    try:
        with eval_mode(model):
            model(tokens)
    finally:
        memory.weight_point.listeners.remove(seen.append)
    weight = torch.cat(seen, 1).numpy()
    chosen = reduce(weight, "b (s n) c -> b s c", "mean", n=task.segment_length)[:, 1:]
    topics = np.array([task.topic_of(row) for row in tokens.tolist()])[:, :-1]
    loads = reduce(chosen, "b s c -> c", "sum")
    return topics.ravel(), chosen.argmax(-1).ravel(), loads / loads.sum()


def chapter_use(model: MemoryTransformer, task: Topics, seed: int = 0) -> dict[str, float]:
    """Number of memory tokens read by each token, and measures of how chapters are used.

    information: mutual information of topic and chapter / entropy of the topic; shuffled: the same with
    topics in random order; in use: chapters with at least a tenth of an even load; entropy: entropy of the
    loads / entropy of even loads.
    """
    memories = [m for m in model.modules() if isinstance(m, ChapterMemory)]
    if not memories:
        return {"tokens read": 0}
    config = memories[0].config
    if not config.use_chapters:
        return {"tokens read": config.num_memory_tokens}
    topics, chapters, loads = topics_and_chapters(model, task)
    shuffled = np.random.default_rng(seed).permutation(topics)
    return {
        "tokens read": config.num_memory_tokens // config.num_chapters * config.top_k_chapters,
        "information": round(mutual_information(topics, chapters), 4),
        "shuffled": round(mutual_information(shuffled, chapters), 4),
        "in use": int((loads >= 0.1 / len(loads)).sum()),
        "entropy": round(load_entropy(loads), 4),
    }


def load_entropy(loads: np.ndarray) -> float:
    """Normalised entropy of loads [c]: -sum_c p_c log p_c / log(chapters); 1 if even, 0 if one is used."""
    share = loads / loads.sum()
    some = share[share > 0]
    return max(0.0, float(-(some * np.log(some)).sum() / np.log(len(loads)))) if len(loads) > 1 else 1.0


def mutual_information(a: np.ndarray, b: np.ndarray) -> float:
    """I(a; b) / H(a) of two integer arrays [e]: the fraction of a's entropy known from b, 0 … 1.

    The estimate from a sample is biased: for independent arrays it is about (distinct values of a - 1)
    (distinct values of b - 1) / (2 e H(a)). Compare it with a shuffled array. It is 0 if a is constant.
    """
    joint = np.zeros((int(a.max()) + 1, int(b.max()) + 1))
    np.add.at(joint, (a, b), 1 / len(a))
    independent = einsum(joint.sum(1), joint.sum(0), "i, j -> i j")
    there = joint > 0
    alone = joint.sum(1)[joint.sum(1) > 0]
    entropy = -(alone * np.log(alone)).sum()
    return (
        float((joint[there] * np.log(joint[there] / independent[there])).sum() / entropy)
        if entropy > 0
        else 0.0
    )
