"""LoRA files: written and read by memlib and by PEFT, with no difference; anything else is refused."""

import json
import math
from dataclasses import fields

import pytest
import torch
from safetensors.torch import load_file, save_file

from memlib.pretrained import peft_files
from memlib.pretrained.lora import (
    apply_lora_to_model,
    get_lora_parameters,
    lora_layers,
    merge_lora_weights,
    remove_lora,
)
from memlib.pretrained.peft_files import CONFIG, TENSORS, load_lora, save_lora
from tests.pretrained.bases import FAMILIES, build, ids, logits, stir_lora, with_peft
from tests.pretrained.test_lora import OPTIONS, TARGETS

EVERY = (*FAMILIES, "memlib")


def saved(folder, peer, family="llama", **options):
    """A model with LoRA, saved."""
    model = build(family, peer, torch.float32)
    apply_lora_to_model(model, TARGETS, 4, 8, **options)
    save_lora(stir_lora(model), folder)
    return model


def change(folder, **values):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | values))


def parts(model):
    """Everything that loading could change."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return dict(model.named_modules()), state, [p.requires_grad for p in model.parameters()]


def refused(folder, message, peer, model=None):
    model = model or build("llama", peer, torch.float32)
    modules, state, trainable = parts(model)
    with pytest.raises(ValueError, match=message):
        load_lora(model, folder)
    now, after, still = parts(model)
    assert now == modules and still == trainable
    assert all(torch.equal(state[name], after[name]) for name in state)


# ------------------------------------------------------------------------------------------- both ways


@pytest.mark.parametrize("options", [*OPTIONS.values(), {"dropout": 0.25}], ids=[*OPTIONS, "dropout"])
@pytest.mark.parametrize("family", EVERY)
def test_memlib_reads_what_it_wrote(family, options, tmp_path, peer):
    model = saved(tmp_path, peer, family, **options)
    other = build(family, peer, torch.float32)
    assert load_lora(other, tmp_path) == list(lora_layers(model))
    assert torch.equal(logits(other), logits(model))
    for mine, theirs in zip(lora_layers(model).values(), lora_layers(other).values(), strict=True):
        assert mine.extra_repr() == theirs.extra_repr() and mine.dropout.p == theirs.dropout.p
    trained = [p for p in other.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in get_lora_parameters(other)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_memlib_wrote(family, options, tmp_path, peer):
    model = saved(tmp_path, peer, family, **options)
    other = peer("peft").PeftModel.from_pretrained(build(family, peer, torch.float32), tmp_path).eval()
    assert float((logits(other) - logits(model)).abs().max()) == 0.0


@pytest.mark.parametrize("targets", [TARGETS, "all-linear", r".*layers\.1.*proj"], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_memlib_reads_what_peft_wrote(family, options, targets, tmp_path, peer):
    peft = peer("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.1, init_lora_weights=False, **options
    )
    torch.manual_seed(2)
    theirs = peft.get_peft_model(build(family, peer, torch.float32), config).eval()
    theirs.save_pretrained(tmp_path)
    model = build(family, peer, torch.float32)
    base = logits(model)
    load_lora(model, tmp_path)
    assert float((logits(theirs) - logits(model)).abs().max()) == 0.0
    assert not torch.equal(logits(model), base)


def test_peft_reads_a_memory_transformer_of_memlib(tmp_path, peer):
    model = saved(tmp_path, peer, "memlib", **OPTIONS["patterns"])
    other = build("memlib", peer, torch.float32)
    with_peft(other, peer, config=peer("peft").LoraConfig.from_pretrained(tmp_path))
    tensors = load_file(tmp_path / TENSORS)
    result = peer("peft").set_peft_model_state_dict(other, tensors)
    assert not result.unexpected_keys
    assert float((logits(other) - logits(model)).abs().max()) == 0.0


def test_a_file_with_another_scale_is_caught(tmp_path, peer):
    """A mutant: the configuration says another alpha than the model that was saved."""
    model = saved(tmp_path, peer)
    change(tmp_path, lora_alpha=9)
    other = peer("peft").PeftModel.from_pretrained(build("llama", peer, torch.float32), tmp_path).eval()
    assert float((logits(other) - logits(model)).abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_files_keep_the_type_of_the_adapter(dtype, tmp_path, peer):
    model = build("llama", peer, dtype)
    apply_lora_to_model(model, TARGETS, 4, 8)
    save_lora(stir_lora(model), tmp_path)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in load_file(tmp_path / TENSORS).values()} == {wide}
    other = build("llama", peer, dtype)
    load_lora(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_a_merged_model_saves_the_same_files(tmp_path, peer):
    model = saved(tmp_path / "before", peer)
    merge_lora_weights(model)
    save_lora(model, tmp_path / "merged")
    for file in (CONFIG, TENSORS):
        assert (tmp_path / "before" / file).read_bytes() == (tmp_path / "merged" / file).read_bytes()


def test_the_two_files_are_those_of_peft(tmp_path, peer):
    model = saved(tmp_path, peer)
    assert sorted(file.name for file in tmp_path.iterdir()) == [CONFIG, TENSORS]
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["base_model_name_or_path"] == model.config._name_or_path
    assert set(config) <= {f.name for f in fields(peer("peft").LoraConfig)}
    save_lora(model, tmp_path, base_model_name="some/base")
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "some/base"


def test_trainer_of_transformers_trains_lora_which_is_saved_and_loaded(tmp_path, peer):
    hf = peer("transformers")
    peer("accelerate")
    model = build("llama", peer, torch.float32)
    apply_lora_to_model(model, TARGETS, 4, 8, dropout=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [{"input_ids": row, "labels": row} for row in ids(4)]
    arguments = hf.TrainingArguments(
        output_dir=str(tmp_path / "run"),
        use_cpu=True,
        max_steps=1,
        learning_rate=0.1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    hf.Trainer(model=model, args=arguments, train_dataset=data).train()
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    # A has no gradient in the first step, as B is zero.
    assert moved == {n for n in before if ".lora_B." in n}
    save_lora(model, tmp_path / "adapter")
    other = build("llama", peer, torch.float32)
    load_lora(other, tmp_path / "adapter")
    assert torch.equal(logits(other), logits(model.eval()))


# -------------------------------------------------------------------------------------------- refusals

CHANGED = {
    "use_dora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "layers_to_transform": 0,  # layer 0 alone: must not be taken for "off"
    "layers_pattern": "layers",
    "exclude_modules": ["k_proj"],
    "target_parameters": ["experts.gate_up_proj"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 0.1},
    "velora_config": {"scale": 1.0},
    "monteclora_config": {"kl_loss_weight": 1e-5},
    "megatron_config": {"tensor_model_parallel_size": 2},
    "ensure_weight_tying": True,
    "init_lora_weights": "pissa",
}


@pytest.mark.parametrize("field", CHANGED)
def test_options_that_would_change_the_numbers_are_refused_by_name(field, tmp_path, peer):
    saved(tmp_path, peer)
    change(tmp_path, **{field: CHANGED[field]})
    refused(tmp_path, rf"plain LoRA, not {field} = .* \(.+\); use PEFT to load it", peer)


def test_every_option_of_peft_is_read_refused_or_without_effect(peer):
    known = {f.name for f in fields(peer("peft").LoraConfig)}
    assert known == (peft_files.READ | peft_files.NO_EFFECT | CHANGED.keys())
    assert set(peft_files.REASONS) <= CHANGED.keys()
    assert not CHANGED.keys() & ((peft_files.READ | peft_files.NO_EFFECT) - {"init_lora_weights"})


def test_an_option_of_a_later_peft_is_refused_if_it_is_on(tmp_path, peer):
    saved(tmp_path, peer)
    change(tmp_path, new_option=None)
    load_lora(build("llama", peer, torch.float32), tmp_path)
    change(tmp_path, new_option=1)
    refused(tmp_path, r"not new_option = 1 \(more than plain LoRA\)", peer)


def test_targets_and_patterns_without_a_layer_are_ignored_as_in_peft(tmp_path, peer):
    model = saved(tmp_path, peer)
    change(tmp_path, target_modules=["c_attn", *TARGETS], rank_pattern={"c_attn": 2}, alpha_pattern={"c": 1})
    other = build("llama", peer, torch.float32)
    load_lora(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_a_wrong_shape_is_refused_with_tensor_found_and_expected(tmp_path, peer):
    saved(tmp_path, peer)
    change(tmp_path, r=2)
    refused(tmp_path, r"layers\.0\..*q_proj\.lora_A\.weight has shape \[4, 16\], expected \[2, 16\]", peer)
    change(tmp_path, r=4)
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    tensors = load_file(tmp_path / TENSORS)
    save_file(tensors | {key: torch.zeros(16, 4)}, tmp_path / TENSORS)
    refused(tmp_path, rf"{key} has shape \[16, 4\], expected \[8, 4\]", peer)


def test_missing_and_surplus_tensors_are_refused(tmp_path, peer):
    saved(tmp_path, peer)
    tensors = load_file(tmp_path / TENSORS)
    gone = min(tensors)
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / TENSORS)
    refused(tmp_path, rf"missing tensors: \['{gone}'\], tensors without a place: none", peer)
    save_file(tensors | {"base_model.model.lm_head.weight": torch.zeros(1)}, tmp_path / TENSORS)
    refused(tmp_path, r"without a place: \['base_model\.model\.lm_head\.weight'\]", peer)


def test_other_models_other_methods_and_damaged_files_are_refused(tmp_path, peer):
    refused(tmp_path, f"{CONFIG}: no such file", peer)
    model = saved(tmp_path, peer)
    refused(tmp_path, "has LoRA already", peer, model)
    remove_lora(model)
    refused(tmp_path, r"targets \['model\.layers\.0\..* match no layer", peer, build("memlib", peer))
    bare = build("llama", peer, torch.float32).model
    change(tmp_path, target_modules=TARGETS)
    refused(tmp_path, r"not for this model; missing tensors: \['base_model\.model\.layers\.0", peer, bare)
    for wrong in ({"peft_type": "ADALORA"}, {"target_modules": None}):
        old = (tmp_path / CONFIG).read_text()
        change(tmp_path, **wrong)
        refused(tmp_path, "not the configuration of a LoRA adapter", peer)
        (tmp_path / CONFIG).write_text(old)
    data = (tmp_path / TENSORS).read_bytes()
    (tmp_path / TENSORS).write_bytes(data[:-9])
    refused(tmp_path, "damaged adapter files", peer)
    (tmp_path / TENSORS).unlink()
    refused(tmp_path, f"{TENSORS}: no such file", peer)
    (tmp_path / CONFIG).write_text("{")
    refused(tmp_path, "damaged adapter files", peer)


def test_layers_of_different_kinds_cannot_be_saved(tmp_path, peer):
    model = saved(tmp_path, peer)
    next(iter(lora_layers(model).values())).dropout.p = 0.5
    with pytest.raises(ValueError, match=r"layers differ in \(use_rslora, dropout\)"):
        save_lora(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_interrupted_save_never_mixes_two_adapters(fails_at, tmp_path, peer, monkeypatch):
    model = saved(tmp_path, peer)
    for layer in lora_layers(model).values():
        layer.alpha = 80  # fits the old tensors, with another scale
    calls = []

    def write(path, data):
        calls.append(path)
        if len(calls) == fails_at:
            raise KeyboardInterrupt
        path.write_bytes(data)

    monkeypatch.setattr(peft_files, "write_bytes", write)
    with pytest.raises(KeyboardInterrupt):
        save_lora(model, tmp_path)
    refused(tmp_path, f"{CONFIG}: no such file", peer)


def test_the_scale_in_the_file_is_the_one_used(tmp_path, peer):
    model = saved(tmp_path, peer, use_rslora=True)
    assert {layer.scaling for layer in lora_layers(model).values()} == {8 / math.sqrt(4)}
    other = build("llama", peer, torch.float32)
    load_lora(other, tmp_path)
    assert {layer.scaling for layer in lora_layers(other).values()} == {8 / math.sqrt(4)}
