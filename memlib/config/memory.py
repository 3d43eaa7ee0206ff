"""Options of each memory, and options for placement, sharing and fusion.

A new memory adds one dataclass here and one field of `MemoryConfig`, with the name it is registered by.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from memlib.config.fields import ConfigError, option
from memlib.config.model import ModelConfig


class MemoryOptions:
    """Base of each memory's own options."""

    @property
    def in_attention(self) -> bool:
        """Whether the memory is read inside the layer's attention instead of being fused after it."""
        return False

    @property
    def every(self) -> int:
        """Interval n: every n-th memory layer has this memory."""
        return 1

    @property
    def carries(self) -> bool:
        """Whether reads depend on earlier segments."""
        return True

    @property
    def carries_in_training(self) -> bool:
        """The same in training, where a memory may choose by other options."""
        return self.carries

    def check(self, model: ModelConfig, path: str) -> None:
        """Raise ConfigError for combinations of this memory's options that cannot work."""


@dataclass(kw_only=True)
class InternalMemoryConfig(MemoryOptions):
    """LM2's slots: persistent state, cross-attention read, gated write.

    Source: Kang et al. 2025, arXiv 2502.06049; `write: addressed` is ours (docs/diary.md).
    """

    num_slots: int = option(64, "slots s of the memory", 1, small=8)
    slot_dim: int | None = option(None, "width of a slot; hidden_dim if null", 1, small=12)
    num_heads: int = option(
        4, "attention heads; addressed: independent groups of num_slots / num_heads slots", 1, small=2
    )
    write: Literal["addressed", "attention"] = option(
        "addressed",
        "addressed: each token writes to and reads from the slots that its key addresses; "
        "attention: as in the paper, slots attend to [slots; segment] and are read by content",
    )
    address_sharpness: float = option(4.0, "addressed: initial scale of the address scores", 0.0)
    shift_init: float = option(
        1.0,
        "addressed: initial weight of the previous token in a write's key; the current token has the rest",
        0.0,
        1.0,
    )
    input_bias: float = option(0.0, "initial bias of the input gate")
    forget_bias: float = option(1.0, "initial bias of the forget gate")
    output_gate: bool = option(True, "multiply each read by sigma(read W), as in the paper")

    def check(self, model: ModelConfig, path: str) -> None:
        width = self.slot_dim or model.hidden_dim
        if width % self.num_heads:
            raise ConfigError(f"{path}.num_heads = {self.num_heads}: must divide the slot width {width}")
        if self.num_slots % self.num_heads:
            raise ConfigError(
                f"{path}.num_slots = {self.num_slots}: must be a multiple of "
                f"{path}.num_heads = {self.num_heads}"
            )


@dataclass(kw_only=True)
class IndexConfig:
    """Search of an attached store; without a store, the state is always searched exactly."""

    kind: Literal["flat", "ivf", "ivfpq", "hnsw"] = option(
        "flat", "FAISS index; flat is exact, the others trade recall for time (see memlib retrieval)"
    )
    exact_below: int = option(65_536, "streams with fewer keys are searched exactly with torch", 0)
    ivf_lists_per_root: float = option(4.0, "ivf, ivfpq: number of lists / sqrt(number of keys)", 0.01)
    ivf_probes: int = option(32, "ivf, ivfpq: lists searched for each query", 1)
    pq_bytes: int = option(
        16, "ivfpq: maximum bytes of a stored key; the largest divisor of the key width is used", 1
    )
    hnsw_links: int = option(32, "hnsw: links per key", 2)
    hnsw_ef_construction: int = option(100, "hnsw: candidates examined when a key is added", 1)
    hnsw_ef_search: int = option(128, "hnsw: candidates examined for each query", 1)


@dataclass(kw_only=True)
class ExternalMemoryConfig(MemoryOptions):
    """Key-value pairs of past tokens, from which each token retrieves its nearest.

    Sources: LongMem (Wang et al. 2023, arXiv 2306.07174), Memorizing Transformers (Wu et al. 2022, arXiv
    2203.08913).
    """

    num_heads: int = option(4, "heads of the memory's attention; each searches its own keys", 1, small=2)
    capacity: int = option(4096, "tokens kept per stream; further tokens evict others", 1, small=6)
    top_k: int = option(32, "tokens retrieved for each query and head", 1, small=3)
    retrieval_every: int = option(
        1, "every n-th memory layer has this memory: with 6 the 6th, 12th, …", 1, small=1
    )
    join: Literal["fusion", "heads", "joint"] = option(
        "fusion",
        "how retrieved values join the window's attention. fusion: by the block's gating network; "
        "heads: two softmaxes mixed by a gate for each head (LongMem, Memorizing Transformers); "
        "joint: one softmax over window and retrieved tokens",
    )
    eviction: Literal["oldest", "least_retrieved"] = option("oldest", "which token is evicted at capacity")
    chunk: int = option(
        1, "tokens that share one key (their mean) and are retrieved together (LongMem: 4)", 1, small=1
    )
    shared_address: bool = option(True, "use one projection for queries and keys; the papers use two")
    shift_init: float = option(
        1.0,
        "initial weight of the previous token in a key; the current token has the rest (papers: 0)",
        0.0,
        1.0,
    )
    sharpness: float = option(16.0, "initial factor of the cosine of query and key", 0.0)
    newest_within: float | None = option(
        None, "among hits within this distance of the best score, keep only the newest; null: keep all", 0.0
    )
    gate_init: float = option(
        0.0, "heads: initial logit of the gate; joint: initial bias added to the hits' scores"
    )
    retrieval_gate: Literal["none", "layer", "query"] = option(
        "none",
        "the hybrid's g_retrieve: training multiplies retrieved values by sigma(g); inference skips the "
        "search where sigma(g) is small. layer: one g per layer; query: one g per token; none: always "
        "search, no weight",
    )
    retrieval_gate_init: float = option(0.5, "initial g_retrieve; sigma(0.5) = 0.62")
    retrieval_threshold: float = option(0.5, "inference searches where sigma(g) is above this", 0.0, 1.0)
    retrieval_weighted: bool = option(
        True, "inference multiplies retrieved values by sigma(g), as training does; false: no weight"
    )
    exploration: float = option(
        0.0, "training: scale of the noise on g, which drives gates towards 0 or 1", 0.0, small=0.0
    )
    retrieval_cost: float = option(
        0.0, "training adds this x mean sigma(g) to the loss: the price of a search", 0.0
    )
    index: IndexConfig = option(IndexConfig, "search of an attached store")

    @property
    def in_attention(self) -> bool:
        return self.join != "fusion"

    @property
    def every(self) -> int:
        return self.retrieval_every

    def check(self, model: ModelConfig, path: str) -> None:
        if model.hidden_dim % self.num_heads:
            raise ConfigError(
                f"{path}.num_heads = {self.num_heads}: must divide model.hidden_dim = {model.hidden_dim}"
            )
        if self.in_attention and self.num_heads != model.num_heads:
            raise ConfigError(
                f"{path}.num_heads = {self.num_heads}: must be model.num_heads = {model.num_heads} for "
                f"{path}.join: {self.join}, which mixes head by head"
            )
        if self.capacity < model.segment_length:
            raise ConfigError(
                f"{path}.capacity = {self.capacity}: must be at least "
                f"model.segment_length = {model.segment_length}"
            )
        if self.top_k > self.capacity:
            raise ConfigError(
                f"{path}.top_k = {self.top_k}: must be at most {path}.capacity = {self.capacity}"
            )
        for name, size in (("capacity", self.capacity), ("top_k", self.top_k)):
            if size % self.chunk:
                raise ConfigError(f"{path}.chunk = {self.chunk}: must divide {path}.{name} = {size}")
        if model.segment_length % self.chunk:
            raise ConfigError(
                f"{path}.chunk = {self.chunk}: must divide model.segment_length = {model.segment_length}"
            )
        if self.chunk > 1 and self.eviction != "oldest":
            raise ConfigError(
                f"{path}.chunk = {self.chunk}: the tokens of a chunk must be evicted together; "
                f"set {path}.eviction: oldest or chunk: 1"
            )


@dataclass(kw_only=True)
class HdsMemoryConfig(MemoryOptions):
    """A hierarchy of four levels; the last has several banks with different decay rates.

    Source: "MM-Rec Memory Architecture", see docs/coverage.md.
    """

    num_memories: int = option(8, "banks, each with its own addresses and its own half-life", 1, small=2)
    num_slots: int = option(1024, "slots s of each bank", 1, small=8)
    mem_dim: int = option(512, "width of a slot", 1, small=6)
    address_dim: int = option(64, "width of an address", 1, small=4)
    chunk_size: int = option(64, "tokens in a block of level 1", 1, small=3)
    num_blocks: int = option(32, "newest complete blocks kept by level 1", 1, small=2)
    half_life_min: float = option(1.0, "half-life of the fastest bank at the start, in segments", 0.0)
    half_life_max: float = option(
        128.0, "initial half-life of the slowest bank; others in geometric steps", 0.0
    )
    decay: Literal["trained", "fixed"] = option(
        "trained", "trained: half-lives and the decay per token are learned; fixed: they keep their start"
    )
    address_sharpness: float = option(4.0, "initial scale of the address scores", 0.0)
    shift_init: float = option(
        1.0,
        "initial weight of the previous token in a write's key; the current token has the rest",
        0.0,
        1.0,
    )
    input_bias: float = option(0.0, "initial bias of the input gate")

    def check(self, model: ModelConfig, path: str) -> None:
        if self.half_life_min <= 0 or self.half_life_max < self.half_life_min:
            raise ConfigError(
                f"{path}.half_life_min, half_life_max = {self.half_life_min:g}, {self.half_life_max:g}: "
                "both in segments, above 0, the second not below the first"
            )


@dataclass(kw_only=True)
class LtmMemoryConfig(MemoryOptions):
    """A memory bank with a compression gate, a gated update and attention over its slots.

    Source: "LTM Transformer Architecture", see docs/coverage.md.
    """

    num_slots: int = option(512, "slots s of the bank", 1, small=8)
    slot_dim: int = option(64, "width of a slot: half key, half value", 2, small=12)
    memory_compression_ratio: float = option(0.5, "fraction of a segment's tokens that are written", 0.0, 1.0)
    keep: Literal["learned", "random"] = option(
        "learned", "which tokens are written. learned: the most important; random: a control"
    )
    attention: Literal["dense", "sparse"] = option(
        "dense",
        "dense: a token reads every slot; sparse: its top_k best. Both score every slot; sparse saves only "
        "the weighted sum",
    )
    top_k: int = option(16, "sparse: slots read by each token", 1, small=3)
    sharpness: float = option(4.0, "initial scale of the scores; a random key's have this deviation", 0.0)
    shift_init: float = option(
        1.0,
        "initial weight of the previous token in a write's key; the current token has the rest",
        0.0,
        1.0,
    )
    importance_bias: float = option(0.0, "initial bias of the importance score")
    exploration: float = option(
        1.0, "training: scale of the noise on importance when tokens are selected", 0.0, small=0.0
    )
    slots: Literal["fixed", "adaptive"] = option(
        "fixed",
        "fixed: a token updates the slots that its key attends to; adaptive: one slot selected by content, "
        "allocated when needed, reclaimed when unused",
    )
    match_threshold: float = option(
        0.7, "adaptive: minimum cosine at which a key matches a slot, for a write or a use", 0.0, 1.0
    )
    reclaim_after: int = option(256, "adaptive: segments without use after which a slot is free", 1, small=2)
    prune_below: float = option(0.05, "adaptive: norm of a value below which its slot is free", 0.0, 1.0)

    def check(self, model: ModelConfig, path: str) -> None:
        if self.slot_dim % 2:
            raise ConfigError(f"{path}.slot_dim = {self.slot_dim}: must be even, half key and half value")
        if not self.memory_compression_ratio:
            raise ConfigError(
                f"{path}.memory_compression_ratio = 0: no token would be written; set it above 0 or remove "
                "the memory from memory.kinds"
            )


@dataclass(kw_only=True)
class RingMemoryConfig(MemoryOptions):
    """A ring buffer of the newest tokens and a long-term store with LRU eviction.

    Source: the prototype of "MM-Rec Memory Architecture", see docs/coverage.md.
    """

    short_slots: int = option(512, "slots of the ring, which holds the newest tokens", 1, small=3)
    long_slots: int = option(512, "slots of the store, which holds tokens that left the ring", 1, small=4)
    slot_dim: int = option(512, "width of a slot: half key, half value", 2, small=16)
    sharpness: float = option(4.0, "initial scale of the scores; a random key's have this deviation", 0.0)
    shift_init: float = option(
        1.0,
        "initial weight of the previous token in a write's key; the current token has the rest",
        0.0,
        1.0,
    )
    admit: float = option(
        0.5, "minimum importance for a token that leaves the ring to be stored; 0: all", 0.0, 1.0
    )
    importance_bias: float = option(1.0, "initial bias of the importance score")
    retrieved_above: float = option(
        0.5, "attention weight above which a read counts as use of a store slot; 1: never", 0.0, 1.0
    )

    def check(self, model: ModelConfig, path: str) -> None:
        if self.slot_dim % 2:
            raise ConfigError(f"{path}.slot_dim = {self.slot_dim}: must be even, half key and half value")


@dataclass(kw_only=True)
class ChaptersMemoryConfig(MemoryOptions):
    """Learnable memory tokens, read whole or in chapters selected by a router.

    Source: "Implementation Plan" and "Core Package", see docs/coverage.md.
    """

    num_memory_tokens: int = option(1024, "learnable tokens of a bank", 1, small=8)
    memory_dim: int | None = option(None, "width of a token; hidden_dim if null", 1, small=12)
    init_std: float = option(0.02, "standard deviation of the initial tokens", 0.0)
    num_heads: int = option(4, "heads of the attention over the tokens", 1, small=2)
    use_flash_attention: bool = option(
        True, "use torch's fused attention; false: the same attention in separate steps"
    )
    gradient_checkpointing: bool = option(False, "recompute the attention in the backward pass")
    use_low_rank_memory: bool = option(False, "store the tokens in low-rank form", small=True)
    memory_rank: int = option(64, "rank r of low-rank tokens", 1, small=4)
    low_rank_mode: Literal["factorized", "reduced_dim"] = option(
        "factorized", "factorized: M = A B^T; reduced_dim: tokens of width r, with attention at width r"
    )
    use_low_rank_projections: bool = option(
        False, "compute attention at width projection_rank instead of hidden_dim"
    )
    projection_rank: int = option(64, "inner width of low-rank projections", 1, small=6)
    use_chapters: bool = option(True, "read only the chapters that a router selects; false: read all tokens")
    num_chapters: int = option(16, "chapters c; must divide num_memory_tokens", 1, small=4)
    tokens_per_chapter: int | None = option(
        None, "tokens of a chapter; null, or exactly num_memory_tokens / num_chapters", 1, small=2
    )
    top_k_chapters: int = option(4, "chapters selected for reading", 1, small=2)
    routing_strategy_train: Literal["sequence"] = option(
        "sequence", "in training. sequence: one selection per segment, from the mean of the segment before"
    )
    routing_strategy_inference: Literal["sequence", "rolling", "token", "hybrid"] = option(
        "sequence",
        "at inference. sequence: as in training; rolling: from the mean of the last tokens; token: from "
        "each token; hybrid: half sequence, half rolling",
    )
    routing_window_size: int = option(64, "rolling, hybrid: tokens in the mean", 1, small=6)
    use_load_balance_loss: bool = option(
        True, "training: load-balance loss of Switch Transformers, for even use of chapters"
    )
    load_balance_coefficient: float = option(0.01, "weight of the load-balance loss", 0.0, small=0.0)
    use_auxiliary_loss: bool = option(False, "training: penalise uneven mean probabilities of chapters")
    auxiliary_loss_coefficient: float = option(0.01, "weight of the auxiliary loss", 0.0)
    use_z_loss: bool = option(False, "training: z-loss of ST-MoE, for small router logits")
    z_loss_coefficient: float = option(0.001, "weight of the z-loss", 0.0)
    quantize_memory: bool = option(False, "train the tokens with rounding to memory_quant_bits")
    memory_quant_bits: int = option(8, "bits of a value: 8 or 4", 4, 8, small=8)
    quant_group_size: int = option(64, "maximum number of values that share a scale", 1, small=3)

    @property
    def carries(self) -> bool:
        return self.use_chapters and self.routing_strategy_inference != "token"

    @property
    def carries_in_training(self) -> bool:
        return self.use_chapters

    def check(self, model: ModelConfig, path: str) -> None:
        reduced = self.use_low_rank_memory and self.low_rank_mode == "reduced_dim"
        name, inner = "model.hidden_dim", model.hidden_dim
        if self.use_low_rank_projections:
            name, inner = f"{path}.projection_rank", self.projection_rank
        if reduced:
            name, inner = f"{path}.memory_rank", self.memory_rank
        if inner % self.num_heads:
            raise ConfigError(f"{path}.num_heads = {self.num_heads}: must divide {name} = {inner}")
        if self.use_chapters:
            self.check_chapters(path)
        if not self.quantize_memory:
            return
        if self.memory_quant_bits not in (8, 4):
            raise ConfigError(f"{path}.memory_quant_bits = {self.memory_quant_bits}: must be 8 or 4")
        width = self.memory_rank if self.use_low_rank_memory else self.memory_dim or model.hidden_dim
        if self.memory_quant_bits == 4 and width % 2:
            name = "memory_rank" if self.use_low_rank_memory else "memory_dim"
            raise ConfigError(
                f"{path}.{name} = {width}: must be even, because two 4-bit values share a byte; "
                f"change it or set {path}.memory_quant_bits: 8"
            )

    def check_chapters(self, path: str) -> None:
        """Raise ConfigError unless the tokens divide into chapters as configured."""
        tokens, chapters = self.num_memory_tokens, self.num_chapters
        if tokens % chapters:
            raise ConfigError(
                f"{path}.num_chapters = {chapters}: must divide {path}.num_memory_tokens = {tokens}"
            )
        if self.tokens_per_chapter not in (None, tokens // chapters):
            raise ConfigError(
                f"{path}.tokens_per_chapter = {self.tokens_per_chapter}: {tokens} tokens in {chapters} "
                f"chapters are {tokens // chapters} each; leave it null or change {path}.num_memory_tokens"
            )
        if self.top_k_chapters > chapters:
            raise ConfigError(
                f"{path}.top_k_chapters = {self.top_k_chapters}: must be at most "
                f"{path}.num_chapters = {chapters}"
            )


@dataclass(kw_only=True)
class FactsMemoryConfig(MemoryOptions):
    """Facts that are written by a call, not by the stream: subjects as keys, one learned value each.

    Source: key-value editing of Meng et al. 2022, arXiv 2202.05262 and 2210.07229, as a memory beside the
    weights; the null slot and the key over several tokens are ours (docs/diary.md).
    """

    num_facts: int = option(128, "facts that can be written", 1, small=5)
    keys_per_fact: int = option(4, "keys of a fact: the subject in several sentences", 1, small=2)
    window: int = option(5, "tokens whose mean is a key, up to and with the subject's last", 1, small=6)
    sharpness: float = option(40.0, "factor of the cosine of query and key", 0.0, small=4.0)
    threshold: float = option(0.55, "cosine at which a fact is read with weight 1/2", -1.0, 1.0, small=0.0)
    shrinkage: float = option(0.03, "added to the covariance that whitens keys, as part of its mean", 0.0)
    start: Literal["empty", "random"] = option(
        "empty", "empty: nothing is read until facts are written; random: a control, random keys and values"
    )

    @property
    def carries(self) -> bool:
        return self.start == "random" and self.window > 1


@dataclass(kw_only=True)
class MemoryConfig:
    """Which memories a model has, in which layers, and how they are shared and fused."""

    kinds: list[str] = option([], "names of the memories in each memory layer; empty: the baseline")
    vanilla_mode: bool = option(False, "build no memory: exactly the plain transformer")
    memory_layer_placement: Literal["all", "first_k", "last_k", "every_n", "custom"] = option(
        "all", "which layers have memory"
    )
    memory_layer_k: int = option(5, "layers for first_k and last_k", 1)
    memory_layer_n: int = option(3, "interval for every_n: layers n-1, 2n-1, …", 1)
    memory_layer_custom: list[int] | None = option(None, "layer indices for custom")
    memory_sharing: Literal["shared", "per_layer", "every_k_layers"] = option(
        "per_layer", "which memory layers share one state"
    )
    memory_sharing_k: int = option(2, "memory layers in a group for every_k_layers", 1)
    fusion: Literal["softmax", "residual"] = option(
        "softmax",
        "softmax: H = g0 A + g1 M1 + …, g = softmax(W_g h + b_g); residual: H = A, then x + M W_o",
    )
    memory_block_variant: Literal["A", "B"] = option(
        "A", "residual fusion only. A: attention, memory, MLP; B: attention, MLP, memory, MLP"
    )
    wo_init_zero: bool = option(True, "residual fusion only: initialise W_o with zeros")
    internal: InternalMemoryConfig = option(InternalMemoryConfig, "LM2's internal memory")
    external: ExternalMemoryConfig = option(ExternalMemoryConfig, "external memory, by retrieval")
    hds: HdsMemoryConfig = option(
        HdsMemoryConfig, "hierarchy of states: four levels, the last with several decaying banks"
    )
    ltm: LtmMemoryConfig = option(LtmMemoryConfig, "the LTM transformer's long-term memory")
    ring: RingMemoryConfig = option(RingMemoryConfig, "the prototype: a ring buffer and an LRU store")
    chapters: ChaptersMemoryConfig = option(ChaptersMemoryConfig, "learnable memory tokens in chapters")
    facts: FactsMemoryConfig = option(FactsMemoryConfig, "facts written by a call")
