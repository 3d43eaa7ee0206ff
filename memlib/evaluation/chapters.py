"""What chapters are used for: how evenly, and whether each topic has its own."""

from __future__ import annotations

import numpy as np
import torch
from einops import reduce

from memlib.lab.measures import load_entropy, mutual_information
from memlib.lab.trace import record
from memlib.memory.chapters import ChapterMemory
from memlib.models.transformer import MemoryTransformer
from memlib.tasks.topics import Topics


@torch.no_grad()
def topics_and_chapters(
    model: MemoryTransformer, task: Topics, examples: int = 256, layer: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every segment but the first: what the one before was about, and the chapter that counted most.

    -> topics [e], chapters [e], and loads [c], what each chapter counted on average. A choice rests on
    the segment before; the first segment has none.
    """
    tokens = task.batch(examples, 0, split="test").tokens
    model.eval()
    with record(model) as trace:
        model(tokens)
    weight = trace["chapters.weight"].at(layer=layer).values
    chosen = reduce(weight, "b (s n) c -> b s c", "mean", n=task.segment_length)[:, 1:]
    topics = np.array([task.topic_of(row) for row in tokens.tolist()])[:, :-1]
    return topics.ravel(), chosen.argmax(-1).ravel(), reduce(chosen, "b s c -> c", "mean")


def chapter_use(model: MemoryTransformer, task: Topics, seed: int = 0) -> dict[str, float]:
    """Tokens that each token reads; and of a model with chapters how they are used.

    information: of topic and chapter, as a part of what the topic holds; shuffled: the same with the
    topics in random order; in use: chapters with at least a tenth of an even share; entropy: of the
    loads, as a part of even use.
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
