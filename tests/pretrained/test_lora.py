"""LoRA: nothing at the start, the same as PEFT with the same weights, merged and unmerged again."""

import pytest
import torch

from memlib.nn.linear import initialise
from memlib.pretrained.lora import (
    LoRALinear,
    apply_lora_to_model,
    get_lora_parameters,
    lora_layers,
    merge_lora_weights,
    remove_lora,
    unmerge_lora_weights,
)
from memlib.pretrained.targets import is_target, pattern_matches
from tests.pretrained.bases import FAMILIES, build, copy_weights, ids, logits, stir_lora, with_peft

EVERY = (*FAMILIES, "memlib")
TARGETS = ["q_proj", "v_proj"]
OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"0.*.q_proj": 3, "v_proj": 5},
        "alpha_pattern": {r"^.*\.1\..*proj": 7, "q_proj": 2},
    },
}


def adapted(family, peer, dtype=torch.float64, targets=TARGETS, **options):
    model = build(family, peer, dtype)
    apply_lora_to_model(model, targets, 4, 8, **options)
    return stir_lora(model)


def gap(ours, theirs):
    """The largest difference of outputs and of the gradients of A and B, relative to their largest value."""
    model, (other, layers) = ours, theirs
    pairs = [(logits(model), logits(other))]
    for one in (model, other):
        one(ids()).logits.square().sum().backward()
    for name, layer in lora_layers(model).items():
        pairs.append((layer.lora_A.weight.grad, layers[name].lora_A["default"].weight.grad))
        pairs.append((layer.lora_B.weight.grad, layers[name].lora_B["default"].weight.grad))
    assert all(b.abs().max() > 0 for _, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def both(family, peer, options, targets=TARGETS):
    """A model with memlib's LoRA, and with PEFT's of the same weights."""
    ours, other = build(family, peer), build(family, peer)
    named = {"lora_alpha" if key == "alpha" else key: value for key, value in options.items()}
    layers = with_peft(other, peer, r=4, lora_alpha=8, target_modules=targets, **named)
    apply_lora_to_model(ours, targets, 4, 8, **options)
    copy_weights(layers, ours)
    return ours, (other, layers)


# ---------------------------------------------------------------------------------------------- the start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_an_adapted_model_starts_as_the_base_bit_for_bit(family, dtype, peer):
    model = build(family, peer, dtype)
    before = logits(model)
    names = apply_lora_to_model(model, TARGETS, 4, 8, dropout=0.5)
    assert torch.equal(logits(model), before) and logits(model).dtype == dtype
    assert names == list(lora_layers(model)) and len(names) >= 4


def test_a_starts_kaiming_uniform_as_in_peft_and_b_zero(peer):
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(400, 300), 100, 8)
    theirs = peer("peft").tuners.lora.Linear(
        torch.nn.Linear(400, 300), "default", peer("peft").LoraConfig(), r=100
    )
    for _ in range(2):  # as built, and after `initialise`
        ours, reference = layer.lora_A.weight, theirs.lora_A["default"].weight
        assert ours.abs().max() <= 400**-0.5 and reference.abs().max() <= 400**-0.5
        assert ours.std().item() == pytest.approx(reference.std().item(), rel=0.02)
        assert torch.equal(layer.lora_B.weight, torch.zeros(300, 100))
        torch.nn.init.ones_(layer.lora_B.weight)
        initialise(layer)


# ------------------------------------------------------------------------------------------------- PEFT


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", EVERY)
def test_outputs_and_gradients_are_those_of_peft(family, options, peer):
    assert gap(*both(family, peer, options)) < 1e-12


def test_all_linear_means_the_same_layers_as_in_peft(peer):
    assert gap(*both("llama", peer, {}, targets="all-linear")) < 1e-12


@pytest.mark.parametrize("wrong", [lambda layer: layer.alpha, lambda layer: layer.alpha / layer.rank**0.5])
def test_a_wrong_scale_differs_from_peft(wrong, peer):
    """Mutants: s = alpha, and rsLoRA's scale for plain LoRA."""
    ours, theirs = both("llama", peer, {})
    for layer in lora_layers(ours).values():
        layer.scaling = wrong(layer)
    assert gap(ours, theirs) > 1e-3


NAMES = ["q_proj", "model.layers.0.self_attn.q_proj", "model.layers.10.self_attn.q_proj", "model.xq_proj"]
KEYS = [
    "q_proj",
    "proj",
    "0.self_attn.q_proj",
    "layers.1.*q_proj",
    "^model",
    r"^model\..*",
    ".*q_proj",
    "x|q_proj",
]


def test_names_match_by_the_rules_of_peft(peer):
    other = peer("peft.utils.other")
    check = peer("peft.tuners.tuners_utils").check_target_module_exists
    config = peer("peft").LoraConfig
    seen = set()
    for name in NAMES:
        for key in KEYS:
            patterned = pattern_matches(key, name)
            assert patterned == (other.get_pattern_key([key], name) == key), (key, name)
            for targets in (key, [key]):
                found = is_target(name, targets)
                assert found == bool(check(config(target_modules=targets), name)), (targets, name)
                seen.add((patterned, found))
    assert {patterned for patterned, _ in seen} == {found for _, found in seen} == {True, False}


# --------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("family", EVERY)
def test_only_lora_gets_gradients_and_a_step_changes_only_lora(family, peer):
    model = adapted(family, peer, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()(ids(), labels=ids()).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name in before if ".lora_" in name}
    assert {id(p) for p in get_lora_parameters(model)} == {id(model.get_parameter(n)) for n in trained}
    torch.optim.SGD(get_lora_parameters(model), lr=1.0).step()
    assert {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])} == trained


def test_the_base_can_be_trained_too(peer):
    model = build("llama", peer)
    apply_lora_to_model(model, TARGETS, 4, 8, freeze_base=False)
    assert all(p.requires_grad for p in model.parameters())


def test_dropout_acts_on_the_update_in_training_only(peer):
    model = adapted("llama", peer, dropout=0.5)
    assert torch.equal(logits(model), logits(model))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    torch.nn.init.zeros_(get_lora_parameters(model)[1])
    layer, x = next(iter(lora_layers(model).values())), torch.randn(5, 16, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))  # with B = 0 dropout leaves the base's output alone


def test_adapters_of_half_precision_models_are_float32_and_the_layer_casts(peer):
    model = adapted("llama", peer, torch.bfloat16)
    assert {p.dtype for p in get_lora_parameters(model)} == {torch.float32}
    layer, x = next(iter(lora_layers(model).values())), torch.randn(5, 16).bfloat16()
    wide = (layer.base_layer(x).float() + x.float() @ layer.delta().T).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x), wide, rtol=2**-8, atol=0)  # one rounding may fall otherwise
    model.train()(ids(), labels=ids()).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in get_lora_parameters(model))


def test_gradient_checkpointing_changes_no_gradient(peer):
    grads = []
    for checkpointing in (False, True):
        model = adapted("llama", peer).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.gradient_checkpointing
        model(ids(), labels=ids()).loss.backward()
        grads.append([p.grad for p in get_lora_parameters(model)])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*grads, strict=True))


def test_state_dict_keys_are_the_same_when_merged(peer):
    model = adapted("llama", peer)
    keys = list(model.state_dict())
    name = "model.layers.0.self_attn.q_proj"
    assert {f"{name}.{part}.weight" for part in ("base_layer", "lora_A", "lora_B")} <= set(keys)
    merge_lora_weights(model)
    assert list(model.state_dict()) == keys


# ---------------------------------------------------------------------------------------------- merging


def weights(model):
    return {name: layer.base_layer.weight.clone() for name, layer in lora_layers(model).items()}


def round_trip(model):
    """Merge and unmerge: changes of logits, of W after both and of W merged, in eps of the largest value."""
    before, base = logits(model), weights(model)
    merge_lora_weights(model)
    merged = logits(model)
    moved = weights(model)
    unmerge_lora_weights(model)
    after = weights(model)
    eps = torch.finfo(before.dtype).eps
    ends = (torch.maximum(base[n].abs().max(), moved[n].abs().max()) for n in base)
    size = dict(zip(base, ends, strict=True))
    return (
        float((merged - before).abs().max() / before.abs().max()) / eps,
        max(float((after[n] - base[n]).abs().max() / size[n]) / eps for n in base),
        max(float((moved[n] - base[n]).abs().max() / size[n]) / eps for n in base),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", EVERY)
def test_merged_gives_the_same_outputs_and_unmerging_restores_the_weights(family, dtype, peer):
    output, restored, moved = round_trip(adapted(family, peer, dtype, targets="all-linear"))
    assert output < 32 and restored <= 1
    assert moved > 10  # the update is larger than rounding


def test_an_unmerge_that_forgets_the_scale_is_caught(peer, monkeypatch):
    """A mutant."""

    def unmerge(layer):
        layer.base_layer.weight.data -= layer.lora_B.weight.data @ layer.lora_A.weight.data
        layer.merged = False

    monkeypatch.setattr(LoRALinear, "unmerge", unmerge)
    assert round_trip(adapted("llama", peer, torch.float32))[1] > 10


def test_merging_twice_and_unmerging_twice_is_harmless(peer):
    model = adapted("llama", peer)
    unmerge_lora_weights(model)
    base = weights(model)
    merge_lora_weights(model)
    once = weights(model)
    merge_lora_weights(model)
    assert all(torch.equal(once[n], w) for n, w in weights(model).items())
    assert all(layer.merged for layer in lora_layers(model).values())
    unmerge_lora_weights(model)
    unmerge_lora_weights(model)
    assert all(torch.allclose(base[n], w, rtol=0, atol=1e-15) for n, w in weights(model).items())


def test_a_tied_weight_is_not_merged(peer):
    model = build("llama", peer, tie_word_embeddings=True)
    apply_lora_to_model(model, ["q_proj", "lm_head"], 4, 8)
    stir_lora(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"embed_tokens.weight and lm_head.base_layer.weight are one tied"):
        merge_lora_weights(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(layer.merged for layer in lora_layers(model).values())


@pytest.mark.parametrize("merged", [False, True])
def test_code_that_reads_the_weight_sees_the_update(merged, peer):
    model = adapted("llama", peer)
    layer, x = next(iter(lora_layers(model).values())), torch.randn(5, 16, dtype=torch.float64)
    expected = layer(x)
    if merged:
        merge_lora_weights(model)
    torch.testing.assert_close(x @ layer.weight.T, expected, rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------- removing


@pytest.mark.parametrize("family", EVERY)
def test_removing_puts_the_original_modules_back(family, peer):
    model = build(family, peer)
    before, modules = logits(model), dict(model.named_modules())
    names = apply_lora_to_model(model, "all-linear", 4, 8)
    stir_lora(model)
    assert remove_lora(model) == names
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is modules[name] for name in modules)
    assert torch.equal(logits(model), before)


def test_removing_merged_layers_needs_a_word_on_the_updates(peer):
    model = adapted("llama", peer)
    with pytest.raises(ValueError, match="q_proj, v_proj: not merged"):
        remove_lora(model, keep_merged=True)
    merge_lora_weights(model)
    merged = logits(model)
    with pytest.raises(ValueError, match="q_proj, v_proj: merged"):
        remove_lora(model)
    remove_lora(model, keep_merged=True)
    assert torch.equal(logits(model), merged)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no LoRA"):
        lora_layers(model)


def test_a_layer_that_stands_in_two_places_is_adapted_once():
    shared = torch.nn.Linear(3, 3)
    model = torch.nn.ModuleDict({name: torch.nn.ModuleDict({"fc": shared}) for name in "ab"})
    assert apply_lora_to_model(model, ["fc"], 2, 4) == ["a.fc"]
    assert model["a"]["fc"] is model["b"]["fc"] and isinstance(model["a"]["fc"], LoRALinear)
    stir_lora(model)
    merge_lora_weights(model)  # one layer, not two that are tied
    remove_lora(model, keep_merged=True)
    assert model["a"]["fc"] is model["b"]["fc"] is shared


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        (["q_proj", "qproj"], {}, r"\['qproj'\] match no layer; linear layers here: down_proj, .*, v_proj\."),
        ("q_proj", {}, "'q_proj' match no layer"),
        ([], {}, r"\[\] match no layer"),
        (["self_attn"], {}, "model.layers.0.self_attn is a LlamaAttention: only nn.Linear"),
        (["q_proj"], {"rank_pattern": {"k_proj": 2}}, "pattern 'k_proj' matches none of the .* q_proj:"),
        (["q_proj"], {"rank_pattern": {"q_proj": 0}}, "rank = 0: must be an integer of at least 1"),
        (["q_proj"], {"dropout": 1.0}, "dropout = 1.0: must be at least 0 and below 1"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(targets, options, message, peer):
    model = build("llama", peer)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        apply_lora_to_model(model, targets, 4, 8, **options)
    assert dict(model.named_modules()) == modules and all(p.requires_grad for p in model.parameters())


def test_conv1d_and_gates_are_refused_by_name(peer):
    hf = peer("transformers")
    gpt2 = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=7))
    for targets in (["c_attn"], "all-linear"):
        with pytest.raises(ValueError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D"):
            apply_lora_to_model(gpt2, targets, 4, 8)
    model = build("memlib", peer)
    with pytest.raises(ValueError, match=r"blocks\.0\.fusion\.gate is a Gate"):
        apply_lora_to_model(model, ["fusion.gate"], 4, 8)
    names = apply_lora_to_model(model, "all-linear", 4, 8)
    assert any(".memories." in name for name in names) and not {"head", "blocks.0.fusion.gate"} & {*names}


def test_lora_on_lora_is_refused(peer):
    model = adapted("llama", peer)
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora_to_model(model, ["k_proj"], 4, 8)
    other = build("llama", peer)
    with_peft(other, peer, target_modules=TARGETS)
    with pytest.raises(ValueError, match="has LoRA already"):
        apply_lora_to_model(other, ["k_proj"], 4, 8)
