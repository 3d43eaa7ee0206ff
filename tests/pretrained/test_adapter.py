"""What users of transformers expect of an adapter: start, gradients, types, recording, refusals, and the way
back to the base."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

import transformers

from memlib.config import AdapterConfig, Config, ConfigError, to_dict
from memlib.lab.trace import record
from memlib.memory import MEMORIES
from memlib.models.stores import attach_stores, save_stores, stale_report
from memlib.pretrained.adapter import MemoryAdapter
from memlib.pretrained.branch import MemoryBranch
from memlib.pretrained.families import FAMILIES as KNOWN
from memlib.pretrained.fitting import resolve
from memlib.pretrained.state import MemoryCache

from ..laws.cases import SEGMENT, VOCAB
from ..laws.laws import same_state
from .bases import FAMILIES, HIDDEN, LAYERS, adapter, ids, tiny

PADDED = torch.ones(2, 9, dtype=torch.int64)
PADDED[0, :3] = 0
ADDED = {
    "memory": {},
    "lora": {"use_memory_adapter": False, "use_lora": True},
    "both": {"use_both_memory_and_lora": True},
}


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


def outputs(model, base):
    """Logits, loss, hidden states after each layer, and generated tokens, with and without padding."""
    hidden = []
    layers = [module for module in base.modules() if isinstance(module, KNOWN_LAYERS)]
    hooks = [layer.register_forward_hook(lambda _m, _i, output: hidden.append(output)) for layer in layers]
    with torch.no_grad():
        plain = model(ids(), labels=ids())
        padded = model(ids(), attention_mask=PADDED, **positions(model))
    for hook in hooks:
        hook.remove()
    assert len(hidden) == 2 * LAYERS
    found = [plain.logits, plain.loss, padded.logits, *hidden]
    options = {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    for mask in (torch.ones_like(PADDED), PADDED):
        for more in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": True}):
            torch.manual_seed(0)
            found.append(model.generate(ids(), attention_mask=mask, **options, **more))
    return found


KNOWN_LAYERS = (
    transformers.models.llama.modeling_llama.LlamaDecoderLayer,
    transformers.models.mistral.modeling_mistral.MistralDecoderLayer,
    transformers.models.qwen2.modeling_qwen2.Qwen2DecoderLayer,
    transformers.models.qwen3.modeling_qwen3.Qwen3DecoderLayer,
)


def positions(model):
    """The positions that transformers' generate gives a padded batch; an adapter has them by itself."""
    return {} if isinstance(model, MemoryAdapter) else {"position_ids": (PADDED.cumsum(1) - 1).clamp(min=0)}


def gradients(model):
    """The gradients of one step over several segments, by name."""
    model.zero_grad()
    model(ids(), labels=ids()).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------------------------------- the start


@every("what", ADDED)
@every("family", FAMILIES)
def test_a_new_adapter_is_the_base_bit_for_bit(family, what):
    base = tiny(family, torch.float32)
    before = outputs(base, base)
    model = adapter(family, base=base, stirred=False, **ADDED[what])
    assert all(torch.equal(*pair) for pair in zip(outputs(model, base), before, strict=True))
    moved = adapter(family, base=tiny(family, torch.float32), **ADDED[what])
    changed = [not torch.equal(*pair) for pair in zip(outputs(moved, moved.base), before, strict=True)]
    assert changed[:3] == [True] * 3  # logits, loss, padded logits


def test_scale_is_the_median_size_of_the_stream():
    base = tiny()
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: sizes.append(out.pow(2).mean(-1).sqrt().median()))
        for layer in base.model.layers
    ]
    with torch.no_grad():
        base(torch.linspace(0, VOCAB - 1, VOCAB - 1).long()[None])
    for hook in hooks:
        hook.remove()
    model = adapter(base=base, stirred=False)
    got = [model.branch(layer).scale.item() for layer in range(LAYERS)]
    assert got == pytest.approx([float(size) for size in sizes], rel=1e-5)
    assert adapter(scale=3.0).branch(0).scale.item() == 3.0


# ---------------------------------------------------------------------------------------------- gradients


@every("frozen", [True, False])
@every("what", ADDED)
def test_gradients_are_where_they_were_promised_and_nowhere_else(what, frozen):
    model = adapter(freeze_base_model=frozen, **ADDED[what]).train()
    found = gradients(model)
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("branches.") or ".lora_" in name or not frozen
    }
    assert found.keys() == expected == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(gradient.any() for gradient in found.values())
    scales = {f"branches.{layer}.scale" for layer in range(LAYERS)} if what != "lora" else set()
    assert {name for name, _ in model.added()} == expected | scales == set(model.state_dict())


@every("frozen", [True, False])
@every("what", ADDED)
def test_parameter_groups_hold_each_trained_parameter_once_at_its_rate(what, frozen):
    rates = {"memory": 2e-4, "gates": 3e-4, "lora": 5e-4, "base": 7e-6}
    fields = {"memory": "memory_lr", "gates": "gate_lr", "lora": "lora_lr", "base": "base_model_lr"}
    options = {f"training.{fields[kind]}": rate for kind, rate in rates.items()}
    model = adapter(freeze_base_model=frozen, options=options, **ADDED[what])
    names = {id(p): name for name, p in model.named_parameters()}
    got = [
        (names[id(p)], group["name"], group["lr"])
        for group in model.get_parameter_groups()
        for p in group["params"]
    ]
    assert sorted(name for name, _, _ in got) == sorted(
        n for n, p in model.named_parameters() if p.requires_grad
    )
    for name, kind, rate in got:
        expected = "lora" if ".lora_" in name else "memory" if name.startswith("branches.") else "base"
        assert rate == rates[kind] and kind in (expected, "gates" if expected == "memory" else expected)
    gates = {name for name, kind, _ in got if kind == "gates"}
    assert {f"branches.{i}.gate.weight" for i in range(LAYERS)} <= gates or what == "lora"
    torch.optim.AdamW(model.get_parameter_groups()).step()


@every("by", ["config", "base", "adapter"])
@every("frozen", [True, False])
def test_gradient_checkpointing_changes_no_gradient(frozen, by, monkeypatch):
    runs = []
    forward = MemoryBranch.forward
    monkeypatch.setattr(MemoryBranch, "forward", lambda self, *given: runs.append(1) or forward(self, *given))
    want = gradients(adapter(freeze_base_model=frozen, use_both_memory_and_lora=True).train())
    assert len(runs) == LAYERS
    options = {"training.gradient_checkpointing": by == "config"}
    model = adapter(freeze_base_model=frozen, use_both_memory_and_lora=True, options=options).train()
    if by != "config":
        (model.base if by == "base" else model).activation_checkpointing_enable()
    got = gradients(model)
    assert len(runs) == 3 * LAYERS  # forward, and again in the backward pass
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    if by == "adapter":
        model.activation_checkpointing_disable()
        gradients(model)
        assert len(runs) == 4 * LAYERS


def test_router_losses_and_the_price_of_gates_are_part_of_the_loss_in_training():
    model = adapter(kinds=("chapters",), gate_cost=0.5)
    model.eval()
    plain = model(ids(), labels=ids())
    trained = model.train()(ids(), labels=ids())
    assert trained.router_losses["gate"] > 0 and len(trained.router_losses) > 1
    extra = sum(trained.router_losses.values())
    torch.testing.assert_close(trained.loss, plain.loss + extra)
    gate = model.branch(0)
    assert 0 < float(trained.router_losses["gate"].detach()) < gate.gate_cost


# ------------------------------------------------------------------------------------------- the value types


def test_a_base_in_bf16_has_branches_and_states_in_float32():
    """External memory is left out: it selects, and a rounded key may select another pair."""
    wide = adapter(kinds=("internal",), dtype=torch.float32)
    model = adapter(kinds=("internal",), base=tiny(dtype=torch.float32).bfloat16())
    want, got = wide(ids(tokens=3 * SEGMENT)), model(ids(tokens=3 * SEGMENT))
    assert got.logits.dtype == torch.bfloat16
    types = {tensor.dtype for state in got.memory_state.memories for _, tensor in state.named_tensors()}
    assert types <= {torch.float32, torch.int64, torch.bool} and torch.float32 in types
    assert {p.dtype for p in model.branches.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in got.memory_state.window.keys} == {torch.bfloat16}
    gap = (got.logits.float() - want.logits).abs().max() / want.logits.abs().max()
    assert gap < 0.03  # the base alone: 0.023
    more = model(ids(tokens=3), memory_state=got.memory_state)
    assert torch.isfinite(more.logits).all()
    model.train()(ids(), labels=ids()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.branches.parameters())


@every("kind", MEMORIES)
def test_autocast_keeps_states_in_float32(kind):
    model = adapter(kinds=(kind,), dtype=torch.float32).train()
    want = model(ids(tokens=3 * SEGMENT), labels=ids(tokens=3 * SEGMENT))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(ids(tokens=3 * SEGMENT), labels=ids(tokens=3 * SEGMENT))
    got.loss.backward()
    for state in got.memory_state.memories:
        for name, tensor in state.named_tensors():
            assert tensor.dtype in (torch.float32, torch.int64, torch.bool), name
    assert torch.isfinite(got.loss) and abs(got.loss - want.loss) < 0.2 * want.loss
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.branches.parameters())


# ------------------------------------------------------------------------------------------ the way back


def census(base):
    """Everything about a base that an adapter could leave behind."""
    return (
        {name: type(module) for name, module in base.named_modules()},
        {
            name: (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)))
            for name, m in base.named_modules()
        },
        {name: p.requires_grad for name, p in base.named_parameters()},
        {name: value.clone() for name, value in base.state_dict().items()},
    )


@every("frozen", [True, False])
@every("what", ADDED)
def test_detach_gives_the_base_back_as_it_was(what, frozen):
    base = tiny()
    base.model.layers[1].requires_grad_(False)
    before, modules = outputs(base, base), census(base)
    model = adapter(base=base, freeze_base_model=frozen, **ADDED[what])
    model(ids())
    assert census(base)[1] != modules[1]
    assert model.detach() is base
    after = census(base)
    assert after[:3] == modules[:3]
    assert after[3].keys() == modules[3].keys()
    assert all(torch.equal(after[3][name], modules[3][name]) for name in modules[3])
    assert all(torch.equal(*pair) for pair in zip(outputs(base, base), before, strict=True))
    for call in (model, model.generate, lambda _: model.detach()):
        with pytest.raises(ValueError, match="detached from its base: build a new one"):
            call(ids())
    adapter(base=base, **ADDED[what])(ids())


def test_the_base_used_directly_is_the_base_alone():
    base = tiny()
    before = outputs(base, base)
    model = adapter(base=base)
    state = model(ids()).memory_state
    assert all(torch.equal(*pair) for pair in zip(outputs(base, base), before, strict=True))
    again = model(ids())
    same_state("adapter", "state after the base ran by itself", again.memory_state, state, 0.0)
    assert not torch.equal(again.logits, before[0])


def test_a_second_adapter_on_one_base_is_refused():
    base = tiny()
    model = adapter(base=base)
    with pytest.raises(ValueError, match=r"has an adapter already: call its detach\(\) first"):
        adapter(base=base)
    model.detach()
    adapter(base=base)
    copy = deepcopy(adapter(base=tiny()))
    assert not torch.equal(copy(ids()).logits, base(ids()).logits)


# --------------------------------------------------------------------------------------------- recordings


@every("mode", ["full", "segment"])
def test_a_recording_has_layers_tokens_and_states_and_changes_nothing(mode):
    options = {"memory.memory_layer_placement": "custom", "memory.memory_layer_custom": [0, 2]}
    model = adapter(mode=mode, options=options)
    tokens = ids(tokens=3 * SEGMENT + 1)
    want = model(tokens)
    with record(model, states=True) as trace:
        state, logits = None, []
        for piece in tokens.split(SEGMENT, 1):
            output = model(piece, memory_state=state)
            state = output.memory_state
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), want.logits)
    assert np.array_equal(trace["tokens"].values, tokens.numpy())
    assert trace.layers["branch.gate"] == trace.layers["internal.reader.weight"] == [0, 2]
    assert trace["branch.gate"].sizes == {"layer": 2, "batch": 2, "token": 3 * SEGMENT + 1, "memory": 2}
    assert trace["internal.writer.input"].sizes["token"] == 3 * SEGMENT
    assert trace["internal.state.slots"].sizes["step"] == 4
    last = trace["internal.state.slots"].values[1, -1]
    slot = model.stack.slots[2][0]
    assert np.array_equal(last, output.memory_state.memories[slot].slots.detach().numpy())
    points = set(trace)
    with record(model, states=True) as empty:
        pass
    assert not set(empty) and points


# ------------------------------------------------------------------------------------------- other families


@every("family", ["gemma2", "olmo2", "phi3", "gpt2"])
def test_a_further_family_is_one_line(family, monkeypatch):
    gpt2 = {"n_positions": 64, "num_key_value_heads": None, "head_dim": None}  # it has neither
    sizes = gpt2 if family == "gpt2" else {}
    base = tiny(family, **sizes)
    with pytest.raises(
        ValueError, match=rf"type '{family}': known are llama, .*FAMILIES\['{family}'\] = a fun"
    ):
        adapter(base=base)
    monkeypatch.setitem(
        KNOWN, family, lambda base: base.transformer.h if family == "gpt2" else base.model.layers
    )
    with torch.no_grad():
        before = base(ids()).logits
    model = adapter(base=base, stirred=False)
    assert torch.equal(model(ids()).logits, before)
    model = adapter(base=model.detach())
    whole = model(ids())
    assert (whole.logits - before).abs().max() > 0.01
    state, logits = None, []
    for piece in ids().split([3, 5, 1], 1):
        output = model(piece, memory_state=state)
        state = output.memory_state
        logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-12)
    more = model.generate(ids(), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = ids()
    for _ in range(6):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(more, tokens)


def test_a_layer_without_keys_and_values_is_refused(monkeypatch):
    monkeypatch.setitem(KNOWN, "qwen3_next", lambda base: base.model.layers)
    base = tiny()
    base.config = transformers.AutoConfig.for_model("qwen3_next", num_hidden_layers=LAYERS)
    with pytest.raises(ValueError, match="LinearAttentionLayer: a memory state carries keys and values only"):
        adapter(base=base)


# --------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory.fusion": "softmax"}, "memory.fusion = 'softmax'.*set memory.fusion: residual"),
        ({"memory.memory_block_variant": "B"}, "variant = 'B'.*set memory.memory_block_variant: A"),
        ({"memory.memory_sharing": "shared"}, "sharing = 'shared'.*per_layer or adapter.mode: segment"),
        ({"memory.memory_sharing": "every_k_layers"}, "every_k_layers.*per_layer or adapter.mode: segment"),
        ({"adapter.width": 7}, "must divide adapter.width = 7"),
        (
            {"memory.memory_layer_placement": "custom", "memory.memory_layer_custom": [LAYERS]},
            r"memory_layer_custom\[0\] = 3: layers are 0 … 2",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_with_a_remedy(options, message):
    base = tiny()
    before = census(base)
    with pytest.raises(ConfigError, match=message):
        adapter(base=base, options=options)
    assert census(base)[:3] == before[:3]


def test_a_configuration_without_a_base_is_refused():
    with pytest.raises(ConfigError, match="base_model_name = null: name a pretrained model, or call"):
        MemoryAdapter(Config(adapter=AdapterConfig()))


def test_lora_targets_that_the_base_lacks_are_refused_before_anything_changes():
    base = tiny()
    before = census(base)
    with pytest.raises(ValueError, match=r"match no layer; linear layers here: .*q_proj"):
        adapter(base=base, use_lora=True, lora_targets=["query"])
    assert census(base)[:3] == before[:3]


def test_shared_states_work_in_the_mode_segment():
    sharing = {"memory.memory_sharing": "shared"}
    model = adapter(kinds=("internal",), mode="segment", options=sharing)
    assert len(model(ids()).memory_state.memories) == 1
    assert to_dict(resolve(model.config, model.base, LAYERS)) == to_dict(model.config)


def test_inputs_that_do_not_fit_are_refused_with_a_remedy():
    model = adapter()
    output = model(ids())
    cache = MemoryCache(model.base.config)
    model(ids(), past_key_values=cache)
    segments = adapter(mode="segment")
    damaged = output.memory_state.window.keys
    cases = [
        (lambda: model(ids()[0]), r"shape \(9,\): expected \[batch, tokens\]"),
        (lambda: model(ids() + VOCAB), r"ids are 0 … 16"),
        (
            lambda: model(ids(), labels=ids()[:, :3]),
            r"labels has shape \(2, 3\): expected input_ids' \(2, 9\)",
        ),
        (lambda: model(ids(3), memory_state=output.memory_state), "2 streams, input_ids 3: pick rows"),
        (lambda: model(ids(), memory_state="state"), "is a str: expected a MemoryState"),
        (
            lambda: model(ids(), memory_state=with_keys(output.memory_state, damaged[0][:, :, 1:])),
            "window.keys.0 has 8 tokens, expected 9 after 9 tokens: the state is damaged",
        ),
        (
            lambda: segments(ids(), memory_state=output.memory_state),
            "9 tokens in the base's cache, 1 of them",
        ),
        (
            lambda: model(ids(), past_key_values=transformers.DynamicCache(config=model.base.config)),
            "is a DynamicCache, which holds no memories: pass the MemoryCache of an earlier output",
        ),
        (
            lambda: model(ids(), past_key_values=cache, memory_state=output.memory_state),
            "both hold the stream: pass one of them",
        ),
        (
            lambda: model(ids(), torch.ones(2, 9), past_key_values=cache),
            r"attention_mask has shape \(2, 9\): with past_key_values it covers .*, \(2, 18\)",
        ),
        (lambda: segments(ids(), past_key_values=MemoryCache(model.base.config)), "emptied at each border"),
        (
            lambda: segments.generate(ids()),
            r"generate: with adapter.mode = 'segment'.*memlib.inference.generate",
        ),
        (
            lambda: model.generate(ids(), memory_state=output.memory_state),
            r"9 tokens in the base's cache.*adapter.new_context\(memory_state\)",
        ),
        (lambda: model.generate(ids(3), memory_state=output.memory_state), "2 streams, input_ids 3"),
        (lambda: MemoryCache(model.base.config).memory_state, "the cache has seen no token yet"),
        (
            lambda: model.base(
                inputs_embeds=torch.zeros(2, 1, HIDDEN).double(), past_key_values=cache, use_cache=True
            ),
            "needs input_ids, not embeddings",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    model.base.activation_checkpointing_enable()
    with pytest.raises(ValueError, match=r"with its gradient checkpointing it keeps none.*use_cache=False"):
        model.train()(ids(), use_cache=True)


def with_keys(state, keys):
    """The same state with other keys in the first layer."""
    return replace(state, window=replace(state.window, keys=(keys, *state.window.keys[1:])))


# ------------------------------------------------------------------------------------------------- stores


def test_an_external_memory_with_stores_answers_as_one_in_the_state(tmp_path):
    options = {"memory.external.capacity": 64}
    plain, stored = (
        adapter(kinds=("external",), options=options),
        adapter(kinds=("external",), options=options),
    )
    stores = attach_stores(stored)
    assert len(stores) == LAYERS
    tokens = ids(tokens=4 * SEGMENT + 1)
    want, state, logits = plain(tokens).logits, None, []
    with torch.no_grad():
        for piece in tokens.split([3, 9, 5], 1):
            output = stored(piece, memory_state=state)
            state = output.memory_state
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), want, rtol=0, atol=1e-10)
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    for more in ({}, {"num_beams": 3}):
        assert torch.equal(
            stored.generate(tokens, **options, **more), plain.generate(tokens, **options, **more)
        )
    save_stores(stores, tmp_path)
    reopened = adapter(kinds=("external",), options={"memory.external.capacity": 64})
    attach_stores(reopened, tmp_path)
    with torch.no_grad():
        more = ids(tokens=6)
        torch.testing.assert_close(
            reopened(more, memory_state=state).logits, stored(more, memory_state=state).logits
        )
    assert all(report for report in stale_report(stored).values())
