"""The runs behind the tables of README.md and docs/diary.md: comparisons of presets, and studies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from memlib.config import Config, load_config, override
from memlib.evaluation.hierarchy import read_alone, recall_in_stream
from memlib.experiments.comparison import Result, of_run
from memlib.memory.chapters.routers import ChapterRouter
from memlib.memory.hds import HdsMemory
from memlib.models import MemoryTransformer
from memlib.models.block import TransformerBlock
from memlib.training.trainer import Trainer

COMPARISONS = {
    "recall": ["recall_baseline", "recall_internal", "recall_hds", "recall_external"],
    "rewrite": ["rewrite_baseline", "rewrite_internal", "rewrite_external"],
    "passkey": ["passkey_baseline", "passkey_external"],
    "mixed": ["mixed_baseline", "mixed_internal", "mixed_external", "mixed_hybrid"],
}
# Segments to measure at, if not 4, 6 and 32.
LENGTHS = {
    "passkey": [4, 32, 66, 128],
    "mixed": [4, 16],
    "age": [2, 3, 5, 9, 17, 33, 65, 129],
    "banks": [4, 8, 16, 32, 64],
    "topics": [3, 8],
    "collapse": [3],
    "low_rank": [3],
    "horizon": [2, 3, 4],
}
RATIOS = (1.0, 0.5, 0.25, 0.125)


def compression() -> dict[str, Config]:
    """Long-term memory at each of the RATIOS, with tokens selected by learned importance or at random.

    At ratio 1 every token is written, so there is only one run.
    """
    base = load_config("recall_ltm")
    runs = {}
    for ratio in RATIOS:
        for keep in ("learned", "random") if ratio < 1 else ("learned",):
            changes = {"memory.ltm.memory_compression_ratio": ratio, "memory.ltm.keep": keep}
            runs[f"ltm_{ratio:g}_{keep}" if ratio < 1 else "ltm_1"] = override(base, changes)
    return runs


def slots() -> dict[str, Config]:
    """Long-term memory with small banks and no compression: fixed and adaptive slots."""
    base = override(load_config("recall_ltm"), {"memory.ltm.memory_compression_ratio": 1.0})
    return {
        f"ltm_{kind}_{number}": override(base, {"memory.ltm.slots": kind, "memory.ltm.num_slots": number})
        for number in (64, 32)
        for kind in ("fixed", "adaptive")
    }


def prototype() -> dict[str, Config]:
    """The ring and its store with slots for six segments of 16 tokens, and with 512 slots each."""
    small = load_config("recall_ring")
    large = {"memory.ring.short_slots": 512, "memory.ring.long_slots": 512}
    return {"recall_ring": small, "recall_ring_512": override(small, large)}


def age() -> dict[str, Config]:
    """The hierarchy of states with half-lives fixed at 2, 4, 8 and 16 segments."""
    fixed = {"decay": "fixed", "half_life_min": 2.0, "half_life_max": 16.0}
    return {"hds": override(load_config("recall_hds"), {f"memory.hds.{k}": v for k, v in fixed.items()})}


def banks() -> dict[str, Config]:
    """512 slots in one bank, at each of three half-lives, and in four banks with half-lives between them."""
    base = override(load_config("recall_hds"), {"memory.hds.decay": "fixed"})
    one = {"num_memories": 1, "num_slots": 512}
    kinds = {f"banks_1x512_half_{half:g}": one | {"half_life_max": half} for half in (4.0, 16.0, 64.0)}
    kinds["banks_4x128"] = {"num_memories": 4, "num_slots": 128}
    return {
        name: override(base, {f"memory.hds.{field}": value for field, value in fields.items()})
        for name, fields in kinds.items()
    }


def topics() -> dict[str, Config]:
    """Topics: no memory, a wider feed-forward, all tokens read, one chapter and two chapters of eight."""
    routed, plain = load_config("topics_routed"), load_config("topics_baseline")
    return {
        "topics_plain": override(plain, {"model.intermediate_dim": routed.model.intermediate_dim}),
        "topics_baseline": plain,
        "topics_dense": load_config("topics_dense"),
        "topics_routed": routed,
        "topics_routed_2": override(routed, {"memory.chapters.top_k_chapters": 2}),
    }


def collapse() -> dict[str, Config]:
    """A router that starts collapsed (`lean`), without and with the load-balance loss."""
    base = load_config("topics_routed")
    return {
        "topics_unbalanced": override(base, {"memory.chapters.use_load_balance_loss": False}),
        "topics_balanced": override(base, {"memory.chapters.load_balance_coefficient": 0.1}),
    }


def low_rank() -> dict[str, Config]:
    """`topics_routed` trained at each rank, with 32 bits and with rounding to 4 bits."""
    base = load_config("topics_routed")
    runs = {}
    for rank in (None, 16, 8, 4, 2, 1):
        kept = {} if rank is None else {"use_low_rank_memory": True, "memory_rank": rank}
        for bits in (32, 4) if rank != 1 else (32,):  # two 4-bit values share a byte
            packed = {} if bits == 32 else {"quantize_memory": True, "memory_quant_bits": bits}
            changes = {f"memory.chapters.{name}": value for name, value in (kept | packed).items()}
            runs[f"rank_{rank or 'whole'}_{bits}_bits"] = override(base, changes)
    return runs


def horizon() -> dict[str, Config]:
    """Recall over exactly 2, 3 and 4 segments with gradients through 1 … all of them.

    A write's key is that of its own token at the start; that it should be the previous one's is left to learn
    by the gradient of a question in the last segment with respect to the write in the first.
    """
    few = {"num_slots": 32, "shift_init": 0.0}
    base = override(load_config("recall_internal"), {f"memory.internal.{k}": v for k, v in few.items()})
    base = override(base, {"task.segments_min": None, "training.max_steps": 160})
    return {
        f"{length}_segments_horizon_{h}": override(base, {"task.segments": length, "training.horizon": h})
        for length in (2, 3, 4)
        for h in range(1, length + 1)
    }


@torch.no_grad()
def lean(model: MemoryTransformer) -> None:
    """Bias every router towards chapter 0, so that training starts from a collapse."""
    for module in model.modules():
        if isinstance(module, ChapterRouter):
            module.proj.bias[0] += 6.0


def measure_by_bank(trainer: Trainer, name: str, segments: Sequence[int]) -> list[Result]:
    """Recall by age with all banks, then with reads from each bank only: one row each."""
    block = cast(TransformerBlock, trainer.model.blocks[0])
    memory = cast(HdsMemory, block.memories["hds"])
    results = [of_run(trainer, name, {n: trainer.evaluate(128, segments=n).accuracy for n in segments})]
    for bank, half_life in enumerate(memory.half_lives.tolist()):
        with read_alone(memory, bank):
            alone = {n: trainer.evaluate(128, segments=n).accuracy for n in segments}
        results.append(of_run(trainer, f"{name}, only half-life {half_life:g}", alone))
    return results


def measure_in_stream(trainer: Trainer, name: str, segments: Sequence[int]) -> list[Result]:
    """Recall by age, and recall of the last of many 4-segment examples in one stream: two rows.

    In both rows, a column is the number of segments up to and including the query.
    """
    task = trainer.task_with(segments=4)
    stream = recall_in_stream(trainer.model, task, max(segments) // 4)
    last = {n: stream[n // 4 - 1] for n in segments}
    single = {n: trainer.evaluate(128, segments=n).accuracy for n in segments}
    return [of_run(trainer, name, single), of_run(trainer, f"{name}, in a stream", last)]


PREPARED = {"collapse": lean}

STUDIES = {
    "compression": compression,
    "slots": slots,
    "prototype": prototype,
    "age": age,
    "banks": banks,
    "topics": topics,
    "collapse": collapse,
    "low_rank": low_rank,
    "horizon": horizon,
}
MEASURES = {"age": measure_by_bank, "banks": measure_in_stream}


def named_comparison(name: str) -> dict[str, Config]:
    """The configurations of one of the COMPARISONS or STUDIES."""
    if name in STUDIES:
        return STUDIES[name]()
    return {preset: load_config(preset) for preset in COMPARISONS[name]}
