"""A pretrained model with memories after some of its layers.

    base = AutoModelForCausalLM.from_pretrained(name)           # Qwen 2.5, Qwen 3, Llama, Mistral
    adapter = MemoryAdapter(config, base)
    output = adapter(input_ids, labels=labels)                  # .loss, .logits, .memory_state
    adapter.generate(input_ids, max_new_tokens=20)              # transformers' generate

Hooks after the chosen layers hand the residual stream to that layer's `MemoryBranch`. The base runs once over
all tokens of a call; each branch walks the segments by itself. So at layer l the memories of segment j+1 are
read after layer l has written segment j: layers cannot share a state, except in the mode `segment`.

| mode | what the base attends to | laws |
| --- | --- | --- |
| full | all tokens it has seen; its cache grows with the stream | all but L6 |
| segment | the tokens of the open segment; its cache is emptied at each border | all |

What is remembered is a value, as in `MemoryTransformer`: it goes in and comes out by keyword in `forward`,
and travels in a `MemoryCache` in `generate`.

Axes: b batch, t tokens of a call, n new tokens, p tokens already in the open segment, h key-value heads, k
head width, v vocabulary, w width of the branches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from memlib.config import (
    Config,
    get_memory_bank_assignments,
    get_memory_kinds,
)
from memlib.memory import MEMORIES
from memlib.memory.base import State
from memlib.memory.layer import LayerInput
from memlib.models.checks import check_inputs, check_state
from memlib.models.stack import MemoryStack
from memlib.models.state import MemoryState
from memlib.models.transformer import Losses, mean_by_name
from memlib.nn.linear import initialise
from memlib.pretrained.branch import BranchOutput, MemoryBranch
from memlib.pretrained.families import decoder_layers
from memlib.pretrained.fitting import load_named, refuse_base, resolve, stream_sizes
from memlib.pretrained.lora import apply_lora_to_model, remove_lora
from memlib.pretrained.model_config import AdapterModelConfig
from memlib.pretrained.saved_module import SavedModule
from memlib.pretrained.state import AdapterWindow, MemoryCache

PASS = "memory_pass"  # the keyword by which a forward pass reaches the hooks


@dataclass
class AdapterOutput(CausalLMOutputWithPast):
    """transformers' output with `memory_state`, for the next call, and `router_losses` by name.

    In training `loss` holds the router losses too, since transformers' Trainer knows no other.
    """

    memory_state: MemoryState | None = None
    router_losses: dict[str, Tensor] | None = None


class Pass:
    """One forward pass of the base: what its hooks take, and what they leave, by memory layer.

    state: before the new tokens; mask, ids: [b p+n], of the open segment and the new tokens; seen: [b t],
    mask of all tokens of the base's window; has_tokens: whether each row is known to hold real tokens only.
    """

    def __init__(self, state: MemoryState, ids: Tensor, mask: Tensor, all_real: bool) -> None:
        window = cast(AdapterWindow, state.window)
        self.state = state
        self.ids, self.mask = torch.cat((window.ids, ids), 1), torch.cat((window.mask, mask), 1)
        self.seen = torch.cat((window.seen, mask), 1)
        self.has_tokens = None if all_real else self.mask.any(1)
        self.latest: list[State] = list(state.memories)
        self.hidden: dict[int, Tensor] = {}
        self.losses: Losses = []

    @property
    def positions(self) -> Tensor:
        """Rotary positions of the new tokens: [b n]. Padding takes none, as in transformers' generate."""
        new = self.ids.shape[1] - self.state.window.length
        return (self.seen.long().cumsum(1) - 1).clamp(min=0)[:, -new:]


class MemoryAdapter(SavedModule):
    """Memories and LoRA in a pretrained model; only what was added is trained, saved and loaded.

    config: `adapter` says what is added, `memory` which memories in which layers, `model.segment_length`
    how long a segment is. base: a causal language model of transformers, changed in place until `detach`;
    None loads `adapter.base_model_name`. Raises ConfigError where options do not fit the base, and
    ValueError for a family that is not known (`memlib.pretrained.families`).
    """

    def __init__(self, config: Config, base: Any = None) -> None:
        super().__init__()
        if base is None:
            base = load_named(config)
        layers = decoder_layers(base)
        refuse_base(base)
        self.config = AdapterModelConfig.of(resolve(config, base, len(layers)), base.config)
        options = self.config.adapter
        self.base = base
        kinds = get_memory_kinds(self.config) if options.memory else {}
        sizes = stream_sizes(base, kinds) if options.scale is None else dict.fromkeys(kinds, options.scale)
        self.branches = nn.ModuleDict(
            {
                str(layer): MemoryBranch(
                    base.config.hidden_size,
                    options.width,
                    {kind: MEMORIES[kind](getattr(config.memory, kind), self.width) for kind in here},
                    options.gate_init if options.gate == "token" else None,
                    options.gate_cost,
                    sizes[layer],
                )
                for layer, here in kinds.items()
            }
        )
        self.stack = MemoryStack(
            {layer: self.branch(layer).memories for layer in kinds}, get_memory_bank_assignments(self.config)
        )
        initialise(self.branches).to(base.device)
        self.thawed = [parameter for parameter in base.parameters() if parameter.requires_grad]
        if options.lora:
            apply_lora_to_model(
                base,
                "all-linear" if options.lora_targets == ["all-linear"] else options.lora_targets,
                options.lora_rank,
                options.lora_alpha,
                use_rslora=options.use_rslora,
                dropout=options.lora_dropout,
                rank_pattern=options.lora_rank_pattern,
                alpha_pattern=options.lora_alpha_pattern,
                freeze_base=options.freeze_base_model,
            )
        elif options.freeze_base_model:
            base.requires_grad_(False)
        self.handles = [
            base.register_forward_pre_hook(self.begin, with_kwargs=True),
            base.register_forward_hook(self.end, with_kwargs=True),
        ]
        for layer in kinds:
            hook = partial(self.after_layer, layer)
            self.handles.append(layers[layer].register_forward_hook(hook, with_kwargs=True))

    def branch(self, layer: int) -> MemoryBranch:
        """The memories of a layer."""
        return cast(MemoryBranch, self.branches[str(layer)])

    @property
    def blocks(self) -> nn.ModuleList:
        """One module for each layer of the base, with the hook points inside."""
        branches = dict(self.branches.items())
        return nn.ModuleList(
            branches.get(str(layer), nn.Identity()) for layer in range(self.config.model.num_layers)
        )

    @property
    def segment_length(self) -> int:
        """Tokens of a segment."""
        return self.config.model.segment_length

    @property
    def width(self) -> int:
        """hidden_dim of the memories."""
        return self.config.model.hidden_dim

    @property
    def device(self) -> torch.device:
        """Where ids and states belong."""
        return self.base.device

    @property
    def wide(self) -> torch.dtype:
        """The type of the memories' states: float32, or the branches' own if that is wider."""
        first = next(self.branches.parameters(), torch.empty(0))
        return torch.promote_types(first.dtype, torch.float32)

    # -------------------------------------------------------------------------------------- the state

    def init_state(self, batch_size: int) -> MemoryState:
        """The state of streams that have seen nothing."""
        return MemoryState(self.stack.init_state(batch_size), self.init_window(batch_size))

    def init_window(self, batch_size: int) -> AdapterWindow:
        """A window without tokens."""
        config, device = self.base.config, self.device
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        none = torch.zeros(batch_size, heads, 0, width, dtype=self.base.dtype, device=device)
        hidden = torch.zeros(batch_size, 0, self.width, dtype=self.wide, device=device)
        nothing = torch.zeros(batch_size, 0, dtype=torch.bool, device=device)
        return AdapterWindow(
            keys=(none,) * self.config.model.num_layers,
            values=(none,) * self.config.model.num_layers,
            hidden=(hidden,) * len(self.stack.layers),
            mask=nothing,
            ids=nothing.long(),
            seen=nothing,
        )

    def reset(self, state: MemoryState, rows: Tensor) -> MemoryState:
        """Forget everything of some rows; rows: [b] true = forget."""
        return state.reset(rows, self.stack.init_state(state.window.mask.shape[0]))

    def new_context(self, state: MemoryState) -> MemoryState:
        """The same memories for a base that starts anew: a second document, a later conversation."""
        return replace(state, window=cast(AdapterWindow, state.window).without_cache())

    # ------------------------------------------------------------------------------------ the forward

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        memory_state: MemoryState | None = None,
        past_key_values: MemoryCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> AdapterOutput:
        """input_ids: [b t] of any length; attention_mask: [b t], 0 for padding; labels: [b t], shifted here,
        -100 ignored.

        memory_state goes on with a stream. use_cache (default: not in training) keeps the base's keys and
        values in the returned state; without them its memories go on and the base starts anew. With
        past_key_values, a `MemoryCache`, the call is one step of `generate`: the mask then covers the cached
        tokens too. logits_to_keep: logits and loss of that many last tokens only; 0: of all.

        Raises ValueError where shapes, ids or the state do not fit.
        """
        self.refuse_detached()
        if past_key_values is not None:
            return self.forward_cached(input_ids, attention_mask, labels, memory_state, past_key_values)
        self.check(input_ids, attention_mask, labels, memory_state)
        state = memory_state or self.init_state(input_ids.shape[0])
        mask = None if attention_mask is None else attention_mask.bool()
        full = self.config.adapter.mode == "full"
        keep = not self.training if use_cache is None else use_cache
        logits, start = [], 0
        losses: Losses = []
        while start < input_ids.shape[1]:
            room = input_ids.shape[1] if full else self.segment_length - state.window.length
            part = slice(start, min(start + room, input_ids.shape[1]))
            new, state, more = self.step(
                input_ids[:, part],
                None if mask is None else mask[:, part],
                state,
                keep,
                logits_to_keep if full else 0,
            )
            logits.append(new)
            losses += more
            start = part.stop
        return self.output(torch.cat(logits, 1)[:, -logits_to_keep:], labels, state, losses)

    def step(
        self, ids: Tensor, mask: Tensor | None, state: MemoryState, keep: bool, logits_to_keep: int = 0
    ) -> tuple[Tensor, MemoryState, Losses]:
        """One forward pass of the base over new tokens: logits [b n v], the state after them, and losses.

        In the mode `segment` the tokens end at most at the border of the open segment.
        """
        window = cast(AdapterWindow, state.window)
        new = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        passing = Pass(state, ids, new, mask is None and not window.seen.shape[1])
        length = window.length + ids.shape[1]
        if self.config.adapter.mode == "segment":
            keep = length < self.segment_length
        cache = MemoryCache(self.base.config, state) if keep or window.seen.shape[1] else None
        padded = passing.has_tokens is not None
        output = self.base(
            ids,
            attention_mask=passing.seen.long() if padded else None,
            position_ids=passing.positions if padded else None,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=logits_to_keep,
            **{PASS: passing},
        )
        if cache is not None and cache.get_seq_length() != passing.seen.shape[1]:
            raise ValueError(
                f"the base kept {cache.get_seq_length()} of {passing.seen.shape[1]} tokens in its cache; "
                "with its gradient checkpointing it keeps none: feed whole segments, with use_cache=False"
            )
        after = self.after(passing)
        if cache is not None and keep:
            cache.state = after
            return output.logits, cache.memory_state, passing.losses
        bare = replace(after.window, keys=window.keys, values=window.values)
        return output.logits, self.new_context(replace(after, window=bare)), passing.losses

    def after(self, passing: Pass) -> MemoryState:
        """The state after a pass, without the base's keys and values."""
        open_tokens = passing.mask.shape[1] % self.segment_length
        newest = slice(passing.mask.shape[1] - open_tokens, None)
        window = AdapterWindow(
            keys=(),
            values=(),
            hidden=tuple(passing.hidden[layer].to(self.wide) for layer in self.stack.layers),
            mask=passing.mask[:, newest],
            ids=passing.ids[:, newest],
            seen=passing.seen,
        )
        return MemoryState(tuple(passing.latest), window)

    def forward_cached(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        memory_state: MemoryState | None,
        cache: MemoryCache,
    ) -> AdapterOutput:
        """One step as `generate` makes it: the cache holds keys, values and memories."""
        if not isinstance(cache, MemoryCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}, which holds no memories: pass the MemoryCache "
                "of an earlier output, or memory_state instead"
            )
        if memory_state is not None:
            raise ValueError("memory_state and past_key_values both hold the stream: pass one of them")
        check_inputs(input_ids, None, labels, self.embedding.num_embeddings)
        self.refuse_segments("past_key_values")
        logits = self.base(
            input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
        ).logits
        return self.output(logits, labels, cache.memory_state, [], cache)

    def output(
        self,
        logits: Tensor,
        labels: Tensor | None,
        state: MemoryState,
        losses: Losses,
        cache: MemoryCache | None = None,
    ) -> AdapterOutput:
        """The output of a call, with the loss where there are labels."""
        routers = mean_by_name(losses)
        loss = None
        if labels is not None:
            kept = labels[:, -logits.shape[1] :]
            loss = self.base.loss_function(logits=logits, labels=kept, vocab_size=logits.shape[-1])
            for extra in routers.values() if self.training else ():
                loss = loss + extra
        return AdapterOutput(
            loss=loss, logits=logits, past_key_values=cache, memory_state=state, router_losses=routers
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory_state: MemoryState | None = None,
        **options: Any,
    ) -> Any:
        """transformers' `generate` with memory: sampling, beams, left-padded batches; options are its own.

        memory_state: of as many rows as input_ids, with a base that starts anew (`new_context`). With
        `return_dict_in_generate=True` the state after the last token that was read is
        `output.past_key_values.memory_state`: a row that ended early has read padding since, and after a beam
        search the rows are the beams that were running.

        Padding counts for the segments' borders: a row padded by other than whole segments is written in
        other groups of tokens than alone. With `memlib.inference.generate` no row depends on its padding,
        and each row's state ends with its own last token.
        """
        self.refuse_detached()
        self.refuse_segments("generate")
        self.check(input_ids, attention_mask, None, memory_state)
        if memory_state is not None and cast(AdapterWindow, memory_state.window).seen.shape[1]:
            raise ValueError(
                f"memory_state comes with {memory_state.window.shape[0]} tokens in the base's cache, which "
                "generate would count as part of the prompt: pass adapter.new_context(memory_state), or use "
                "memlib.inference.generate, which goes on with them"
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        cache = MemoryCache(self.base.config, memory_state)
        return self.base.generate(input_ids, attention_mask=attention_mask, past_key_values=cache, **options)

    def refuse_detached(self) -> None:
        if not self.handles:
            raise ValueError(
                "this adapter is detached from its base: build a new one with MemoryAdapter(config, base)"
            )

    def refuse_segments(self, what: str) -> None:
        if self.config.adapter.mode == "segment":
            raise ValueError(
                f"{what}: with adapter.mode = 'segment' the base's cache is emptied at each border, which "
                "transformers' generate does not know; use memlib.inference.generate, or mode full"
            )

    # -------------------------------------------------------------------------------------- the hooks

    def begin(self, base: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the base runs with a `MemoryCache`: make its pass. Without one the base runs alone."""
        cache = kwargs.get("past_key_values")
        if PASS in kwargs or not isinstance(cache, MemoryCache):
            return None
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            raise ValueError("a forward pass with memories needs input_ids, not embeddings")
        rows = ids.shape[0]
        state = cache.state or self.init_state(rows)
        if cache.state is None:
            state = replace(state, window=replace(state.window, keys=(), values=()))
        elif (have := state.window.mask.shape[0]) != rows:  # beams repeat the rows of a prompt
            index = torch.arange(have, device=self.device).repeat_interleave(rows // have)
            state = state.rows(index)
        given = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if given is None else given[:, -ids.shape[1] :]
        passing = Pass(state, ids, mask.bool(), False)
        if given is not None and given.shape != passing.seen.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(given.shape)}: with past_key_values it covers the cached "
                f"tokens and the new ones, {tuple(passing.seen.shape)}; None takes the cached tokens' own"
            )
        ours = {"attention_mask": passing.seen.long(), "position_ids": passing.positions}
        missing = {name: value for name, value in ours.items() if kwargs.get(name) is None}
        return args, {**kwargs, **missing, PASS: passing}

    def end(self, base: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """After the base: leave the new state in the cache."""
        cache = kwargs.get("past_key_values")
        if isinstance(cache, MemoryCache):
            cache.state = self.after(kwargs[PASS])

    def after_layer(self, layer: int, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After a layer: add what its memories read to the residual stream."""
        passing: Pass | None = kwargs.get(PASS)
        if passing is None:
            return output
        alone = isinstance(output, Tensor)
        residual = self.remember(layer, output if alone else output[0], passing)
        return residual if alone else (residual, *output[1:])

    def remember(self, layer: int, residual: Tensor, passing: Pass) -> Tensor:
        """Read and write the memories of a layer for the tokens of a pass; residual: [b n d]."""
        branch = self.branch(layer)
        place = list(self.stack.layers).index(layer)
        inputs = LayerInput(
            states=self.stack.at(layer, passing.state.memories),
            hidden=passing.state.window.hidden[place],
            mask=passing.mask,
            ids=passing.ids,
            latest=self.stack.at(layer, passing.latest),
            has_tokens=passing.has_tokens,
        )
        run: Any = branch
        if self.training and self.is_activation_checkpointing:
            run = partial(checkpoint, branch, use_reentrant=False)
        output: BranchOutput = run(residual, inputs, self.segment_length)
        self.stack.put(layer, passing.latest, output.states)
        passing.hidden[layer] = output.hidden
        passing.losses += output.losses
        return output.residual

    # --------------------------------------------------------------------------------------- the rest

    @property
    def generation_config(self) -> Any:
        """transformers' defaults for `generate`, which Trainer aligns with a tokenizer."""
        return self.base.generation_config

    @property
    def embedding(self) -> nn.Embedding:
        """The base's token embedding."""
        return self.base.get_input_embeddings()

    def check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        memory_state: MemoryState | None,
    ) -> None:
        """Refuse what does not fit, with the value, the limit and the remedy."""
        check_inputs(input_ids, attention_mask, labels, self.embedding.num_embeddings)
        if memory_state is not None:
            check_state(self, memory_state, input_ids.shape[0], self.wide)
            window = cast(AdapterWindow, memory_state.window)
            MemoryCache(self.base.config).check_window(window)
            if self.config.adapter.mode == "segment" and window.seen.shape[1] > window.length:
                raise ValueError(
                    f"memory_state has {window.seen.shape[1]} tokens in the base's cache, {window.length} of "
                    "them in the open segment: it is of an adapter with adapter.mode = 'full'; pass "
                    "new_context(memory_state)"
                )

    def close_memory(self) -> None:
        """Shut every memory out (law L5): from here on exactly the base."""
        for branch in self.branches.values():
            cast(MemoryBranch, branch).close()

    def get_parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with the learning rates of memory, gates, LoRA and base."""
        from memlib.training.optimizer import parameter_groups

        return parameter_groups(self, self.config.training)

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute layers and branches in the backward pass instead of saving what is inside them.

        The arguments are transformers' and count for the layers; every branch is recomputed.
        """
        self.base.activation_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def activation_checkpointing_disable(self) -> None:
        """Save activations again."""
        self.base.activation_checkpointing_disable()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers and branches are recomputed in the backward pass."""
        return self.config.training.gradient_checkpointing or self.base.is_activation_checkpointing

    def added(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what the adapter added, each once; of the base too if it is trained."""
        for name, parameter in self.named_parameters():
            if not name.startswith("base.") or "lora_" in name or not self.config.adapter.freeze_base_model:
                yield name, parameter
        kept = self.branches.state_dict(prefix="branches.")  # without buffers that every build makes anew
        yield from ((name, buffer) for name, buffer in self.named_buffers() if name in kept)

    def detach(self) -> Any:
        """Take everything out again and return the base, exactly as it was; the adapter is then unusable."""
        self.refuse_detached()
        if self.config.adapter.lora:
            remove_lora(self.base)  # first: it refuses merged layers
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for parameter in self.thawed:
            parameter.requires_grad_(True)
        return self.base
