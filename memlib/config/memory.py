"""Options of the memories: of each one, and of where they are, shared and fused.

A memory adds itself with one dataclass here and one field of `MemoryConfig` named as it is registered.
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
        """Whether it takes part in the layer's attention instead of being fused after it."""
        return False

    @property
    def every(self) -> int:
        """Of the memory layers, each n-th one has it."""
        return 1

    @property
    def carries(self) -> bool:
        """Whether what it says depends on what earlier segments said."""
        return True

    @property
    def carries_in_training(self) -> bool:
        """The same in training, where a memory may choose by other options."""
        return self.carries

    def check(self, model: ModelConfig, path: str) -> None:
        """Refuse combinations of this memory's options that cannot work, with a ConfigError."""


@dataclass(kw_only=True)
class InternalMemoryConfig(MemoryOptions):
    """LM2's slots: persistent state, cross-attention read, gated write (spec A2)."""

    num_slots: int = option(64, "slots s of the memory", 1, small=8)
    slot_dim: int | None = option(None, "width of a slot; hidden_dim if null", 1, small=12)
    num_heads: int = option(
        4,
        "heads of the attention; addressed: independent address books, num_slots / num_heads each",
        1,
        small=2,
    )
    write: Literal["addressed", "attention"] = option(
        "addressed",
        "addressed: each token writes to and reads from the slots its key addresses; "
        "attention: the paper's, slots attend to [slots; segment] and are read by content",
    )
    address_sharpness: float = option(4.0, "addressed: initial scale of the address scores", 0.0)
    shift_init: float = option(
        1.0,
        "addressed: a write's key starts as this part previous token, the rest current",
        0.0,
        1.0,
    )
    input_bias: float = option(0.0, "initial bias of the input gate")
    forget_bias: float = option(1.0, "initial bias of the forget gate")
    output_gate: bool = option(True, "gate what is read by sigma(read W), as the paper does")

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
    """How a store searches its keys; the state of a model that has no store is searched exactly."""

    kind: Literal["flat", "ivf", "ivfpq", "hnsw"] = option(
        "flat", "FAISS index; flat is exact, the others trade recall for time: memlib retrieval measures it"
    )
    exact_below: int = option(65_536, "with fewer keys in a stream, all are compared by torch: exact", 0)
    ivf_lists_per_root: float = option(4.0, "ivf, ivfpq: lists = this x sqrt(keys)", 0.01)
    ivf_probes: int = option(32, "ivf, ivfpq: lists looked into for a query", 1)
    pq_bytes: int = option(16, "ivfpq: bytes of a stored key (at most; a divisor of its width)", 1)
    hnsw_links: int = option(32, "hnsw: links of a key", 2)
    hnsw_ef_construction: int = option(100, "hnsw: candidates looked at for a new key's links", 1)
    hnsw_ef_search: int = option(128, "hnsw: candidates looked at for a query", 1)


@dataclass(kw_only=True)
class ExternalMemoryConfig(MemoryOptions):
    """Past tokens' key-value pairs, of which each token retrieves the nearest (spec A3)."""

    num_heads: int = option(4, "heads of the memory's attention; each searches its own keys", 1, small=2)
    capacity: int = option(4096, "tokens kept of each stream; beyond it, eviction", 1, small=6)
    top_k: int = option(32, "tokens that come back for each query and head", 1, small=3)
    retrieval_every: int = option(
        1, "of the memory layers, each n-th one has it: with 6 the 6th, 12th, …", 1, small=1
    )
    join: Literal["fusion", "heads", "joint"] = option(
        "fusion",
        "how what came back meets the window's attention. fusion: by the block's gating network; "
        "heads: two softmaxes mixed by a gate for each head (LongMem, Memorizing Transformers); "
        "joint: one softmax over both",
    )
    eviction: Literal["oldest", "least_retrieved"] = option(
        "oldest", "which token makes room for a new one at capacity"
    )
    chunk: int = option(
        1, "tokens that share one key, their mean, and come back together (LongMem: 4)", 1, small=1
    )
    shared_address: bool = option(True, "queries and keys use one projection; the papers use two")
    shift_init: float = option(
        1.0, "a key starts as this part previous token, the rest current; the papers: 0", 0.0, 1.0
    )
    sharpness: float = option(16.0, "initial scale of the cosine of query and key", 0.0)
    newest_within: float | None = option(
        None, "of hits that score within this of a query's best, only the newest counts; null: all", 0.0
    )
    gate_init: float = option(
        0.0, "heads: the gate's initial logit; joint: what is added to the hits' scores"
    )
    retrieval_gate: Literal["none", "layer", "query"] = option(
        "none",
        "the hybrid's g_retrieve: training weighs what came back by sigma(g), inference does not search "
        "where sigma(g) is small. layer: one g for the layer; query: one for each token; none: always, whole",
    )
    retrieval_gate_init: float = option(0.5, "initial g_retrieve; sigma(0.5) = 0.62")
    retrieval_threshold: float = option(0.5, "inference searches where sigma(g) is above", 0.0, 1.0)
    retrieval_weighted: bool = option(
        True, "inference weighs what came back by sigma(g), as training does; false, the document: whole"
    )
    exploration: float = option(
        0.0, "training: scale of the noise on g, under which gates learn to be open or shut", 0.0, small=0.0
    )
    retrieval_cost: float = option(
        0.0, "training adds this x mean sigma(g) to the loss: what a search must be worth", 0.0
    )
    index: IndexConfig = option(IndexConfig, "how an attached store searches")

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
                f"{path}.chunk = {self.chunk}: tokens that come back together must leave together; "
                f"set {path}.eviction: oldest or chunk: 1"
            )


@dataclass(kw_only=True)
class HdsMemoryConfig(MemoryOptions):
    """The hierarchy of levels over several banks that forget at their own pace (spec C1-C4)."""

    num_memories: int = option(8, "banks K, each with its own addresses and its own half-life", 1, small=2)
    num_slots: int = option(1024, "slots M of each bank", 1, small=8)
    mem_dim: int = option(512, "width of a slot", 1, small=6)
    address_dim: int = option(64, "width of a bank's addresses", 1, small=4)
    chunk_size: int = option(64, "tokens in a block of level 1", 1, small=3)
    num_blocks: int = option(32, "complete blocks that level 1 keeps, the newest", 1, small=2)
    half_life_min: float = option(1.0, "half-life of the fastest bank at the start, in segments", 0.0)
    half_life_max: float = option(128.0, "half-life of the slowest bank; the others lie evenly between", 0.0)
    decay: Literal["trained", "fixed"] = option(
        "trained", "trained: half-lives and the decay per token are learned; fixed: as they start"
    )
    address_sharpness: float = option(4.0, "initial scale of the address scores", 0.0)
    shift_init: float = option(
        1.0, "a write's key starts as this part previous token, the rest current", 0.0, 1.0
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
    """The LTM transformer's bank: compression gate, gated update, attention over slots (spec B1-B3)."""

    num_slots: int = option(512, "slots s of the bank", 1, small=8)
    slot_dim: int = option(64, "width of a slot: half its key, half what it says", 2, small=12)
    memory_compression_ratio: float = option(0.5, "part of a segment's tokens that survive", 0.0, 1.0)
    keep: Literal["learned", "random"] = option(
        "learned", "which survive; learned: the most important; random: by lot, the control"
    )
    attention: Literal["dense", "sparse"] = option(
        "dense", "dense: a token reads every slot; sparse: its top_k best"
    )
    top_k: int = option(16, "sparse: slots a token reads", 1, small=3)
    sharpness: float = option(4.0, "initial scale of the scores; a random key's have this deviation", 0.0)
    shift_init: float = option(
        1.0, "a token is filed under this part previous token, the rest itself", 0.0, 1.0
    )
    importance_bias: float = option(0.0, "initial bias of the importance score")
    exploration: float = option(
        1.0, "training: scale of the noise under which learned importance picks the survivors", 0.0, small=0.0
    )
    slots: Literal["fixed", "adaptive"] = option(
        "fixed",
        "fixed: a token updates the slots its key means; adaptive: one slot by content, taken when needed, "
        "reclaimed when not used",
    )
    match_threshold: float = option(
        0.7, "adaptive: cosine from which a key is a slot's own, for writing and for use", 0.0, 1.0
    )
    reclaim_after: int = option(256, "adaptive: segments without use after which a slot is free", 1, small=2)
    prune_below: float = option(0.05, "adaptive: a slot whose value is shorter is free", 0.0, 1.0)

    def check(self, model: ModelConfig, path: str) -> None:
        if self.slot_dim % 2:
            raise ConfigError(f"{path}.slot_dim = {self.slot_dim}: must be even, half key and half value")
        if not self.memory_compression_ratio:
            raise ConfigError(
                f"{path}.memory_compression_ratio = 0: nothing would survive; take the memory out of "
                "memory.kinds instead"
            )


@dataclass(kw_only=True)
class RingMemoryConfig(MemoryOptions):
    """The simplified prototype: a ring of the newest tokens, and a store evicted by last use (spec C5)."""

    short_slots: int = option(512, "places r of the ring: the newest tokens", 1, small=3)
    long_slots: int = option(512, "places l of the store: what left the ring", 1, small=4)
    slot_dim: int = option(512, "width of an item: half its key, half its value", 2, small=16)
    sharpness: float = option(4.0, "initial scale of the scores; a random key's have this deviation", 0.0)
    shift_init: float = option(
        1.0, "a token is filed under this part previous token, the rest itself", 0.0, 1.0
    )
    admit: float = option(0.5, "importance from which what leaves the ring is stored; 0: all", 0.0, 1.0)
    importance_bias: float = option(1.0, "initial bias of the importance score")
    retrieved_above: float = option(
        0.5, "weight above which a token has used a place of the store; 1: never", 0.0, 1.0
    )

    def check(self, model: ModelConfig, path: str) -> None:
        if self.slot_dim % 2:
            raise ConfigError(f"{path}.slot_dim = {self.slot_dim}: must be even, half key and half value")


@dataclass(kw_only=True)
class ChaptersMemoryConfig(MemoryOptions):
    """Learnable memory tokens, whole or in chapters chosen by a router (spec D1-D5, D7)."""

    num_memory_tokens: int = option(1024, "learnable tokens of a bank", 1, small=8)
    memory_dim: int | None = option(None, "width of a token; hidden_dim if null", 1, small=12)
    init_std: float = option(0.02, "tokens start normal with this deviation", 0.0)
    num_heads: int = option(4, "heads of the attention over the tokens", 1, small=2)
    use_flash_attention: bool = option(True, "torch's fused attention; off: the same in plain steps")
    gradient_checkpointing: bool = option(False, "compute the attention again in the backward pass")
    use_low_rank_memory: bool = option(False, "keep the tokens in fewer numbers", small=True)
    memory_rank: int = option(64, "rank r of low-rank tokens", 1, small=4)
    low_rank_mode: Literal["factorized", "reduced_dim"] = option(
        "factorized", "factorized: M = A B^T; reduced_dim: tokens of width r, attended to at that width"
    )
    use_low_rank_projections: bool = option(False, "attend at width projection_rank instead of hidden_dim")
    projection_rank: int = option(64, "inner width of low-rank projections", 1, small=6)
    use_chapters: bool = option(True, "read the chapters a router chooses; off: read all tokens")
    num_chapters: int = option(16, "chapters c; must divide num_memory_tokens", 1, small=4)
    tokens_per_chapter: int | None = option(
        None,
        "tokens of a chapter; num_memory_tokens / num_chapters if null, else it must be that",
        1,
        small=2,
    )
    top_k_chapters: int = option(4, "chapters k that are read", 1, small=2)
    routing_strategy_train: Literal["sequence"] = option(
        "sequence", "in training. sequence: by the mean of the segment before, for the whole segment"
    )
    routing_strategy_inference: Literal["sequence", "rolling", "token", "hybrid"] = option(
        "sequence",
        "in use. rolling: by the mean of the last tokens; token: by each token; hybrid: half sequence, "
        "half rolling",
    )
    routing_window_size: int = option(64, "rolling, hybrid: tokens in the mean", 1, small=6)
    use_load_balance_loss: bool = option(True, "training: even use of the chapters, as Switch has it")
    load_balance_coefficient: float = option(0.01, "what it counts", 0.0, small=0.0)
    use_auxiliary_loss: bool = option(False, "training: no chapter used too much or too little on average")
    auxiliary_loss_coefficient: float = option(0.01, "what it counts", 0.0)
    use_z_loss: bool = option(False, "training: small router logits, as ST-MoE has it")
    z_loss_coefficient: float = option(0.001, "what it counts", 0.0)
    quantize_memory: bool = option(False, "train the tokens through rounding to few bits")
    memory_quant_bits: int = option(8, "bits of a number: 8 or 4", 4, 8, small=8)
    quant_group_size: int = option(64, "numbers that share a scale, at most", 1, small=3)

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
                f"{path}.{name} = {width}: must be even to pack 4 bits two to a byte; "
                f"or set {path}.memory_quant_bits: 8"
            )

    def check_chapters(self, path: str) -> None:
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
class MemoryConfig:
    """What remembers, in which layers, shared how, and fused how."""

    kinds: list[str] = option([], "registered memories each memory layer reads; empty is the baseline")
    vanilla_mode: bool = option(False, "ignore every memory: exactly the plain transformer")
    memory_layer_placement: Literal["all", "first_k", "last_k", "every_n", "custom"] = option(
        "all", "which layers have memory"
    )
    memory_layer_k: int = option(5, "layers for first_k and last_k", 1)
    memory_layer_n: int = option(3, "distance for every_n: layers n-1, 2n-1, …", 1)
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
    wo_init_zero: bool = option(True, "residual fusion only: W_o starts at zero")
    internal: InternalMemoryConfig = option(InternalMemoryConfig, "LM2's internal memory")
    external: ExternalMemoryConfig = option(ExternalMemoryConfig, "external memory, by retrieval")
    hds: HdsMemoryConfig = option(HdsMemoryConfig, "hierarchy of levels over several decaying banks")
    ltm: LtmMemoryConfig = option(LtmMemoryConfig, "the LTM transformer's long-term memory")
    ring: RingMemoryConfig = option(RingMemoryConfig, "the prototype's ring and store")
    chapters: ChaptersMemoryConfig = option(ChaptersMemoryConfig, "learnable memory tokens, in chapters")
