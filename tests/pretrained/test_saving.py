"""An adapter's files: the same model again on a fresh base, and a clear refusal of everything else."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from memlib.config import ConfigError, to_dict
from memlib.memory import MEMORIES
from memlib.memory.chapters.quantization import pack_memory_banks
from memlib.models.stores import attach_stores
from memlib.pretrained import fitting, saving
from memlib.pretrained.adapter import MemoryAdapter
from memlib.pretrained.lora import merge_lora_weights
from memlib.pretrained.weights import WeightsError

from ..laws.cases import SEGMENT
from .bases import FAMILIES, adapter, ids, tiny

TOKENS = ids(tokens=3 * SEGMENT + 1)
CONFIG, TENSORS, CARD = "memory_config.json", "memory_model.safetensors", "README.md"
LORA = ["adapter_config.json", "adapter_model.safetensors"]
ADDED = {
    "memory": ({}, [CONFIG, TENSORS]),
    "lora": ({"use_memory_adapter": False, "use_lora": True}, [CONFIG, *LORA]),
    "both": ({"use_both_memory_and_lora": True, "lora_targets": ["all-linear"]}, [CONFIG, TENSORS, *LORA]),
    "base": ({"use_both_memory_and_lora": True, "freeze_base_model": False}, [CONFIG, TENSORS, *LORA]),
}


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


@torch.no_grad()
def said(model):
    """Logits over segment borders, and a generated text."""
    text = model.generate(TOKENS, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    return [model(TOKENS).logits, text]


def equal(one, other):
    return all(torch.equal(*pair) for pair in zip(said(one), said(other), strict=True))


def is_untouched(base):
    return all(
        torch.equal(mine, own) and name == other and mine.requires_grad == own.requires_grad
        for (name, mine), (other, own) in zip(base.named_parameters(), tiny().named_parameters(), strict=True)
    ) and not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


# --------------------------------------------------------------------------------------------- round trips


@every("what", ADDED)
@every("family", FAMILIES)
def test_a_fresh_base_with_the_files_is_the_same_bit_for_bit(family, what, tmp_path):
    settings, files = ADDED[what]
    model = adapter(family, **settings)
    if what == "base":
        with torch.no_grad():
            model.base.model.norm.weight.add_(1.0)
    assert model.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    assert sorted(os.listdir(tmp_path / "saved")) == sorted([CARD, *files])
    loaded = MemoryAdapter.from_pretrained(tmp_path / "saved", tiny(family))
    assert equal(loaded, model) and not equal(loaded, adapter(family, stirred=False))
    assert to_dict(loaded.config) == to_dict(model.config) and not loaded.training
    names = {name for name, _ in model.added()}
    assert {name for name, _ in loaded.added()} == names
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    again = loaded.save_pretrained(tmp_path / "again")
    for name in [CARD, *files]:
        assert (again / name).read_bytes() == (tmp_path / "saved" / name).read_bytes(), name


@every("kind", MEMORIES)
def test_every_memory_is_saved_each_tensor_once(kind, tmp_path):
    model = adapter(kinds=(kind,), dtype=torch.float32)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    kept = model.branches.state_dict(prefix="branches.", keep_vars=True)
    distinct = {id(tensor): tensor for tensor in kept.values()}.values()
    assert len(tensors) == len(distinct) and not any(name.startswith("base.") for name in tensors)
    values = sum(tensor.numel() for tensor in tensors.values())
    assert values == sum(tensor.numel() for tensor in distinct)
    assert equal(MemoryAdapter.from_pretrained(tmp_path, tiny(dtype=torch.float32)), model)


def test_packed_banks_are_loaded_packed(tmp_path):
    options = {"memory.chapters.quantize_memory": True, "memory.chapters.memory_quant_bits": 8}
    model = adapter(kinds=("chapters",), dtype=torch.float32, options=options)
    assert pack_memory_banks(model)
    model.save_pretrained(tmp_path)
    assert any(name.endswith(".quantized") for name in load_file(tmp_path / TENSORS))
    assert equal(MemoryAdapter.from_pretrained(tmp_path, tiny(dtype=torch.float32)), model)


def test_a_bf16_base_keeps_float32_branches(tmp_path):
    model = adapter(base=tiny().bfloat16(), use_both_memory_and_lora=True)
    loaded = MemoryAdapter.from_pretrained(model.save_pretrained(tmp_path), tiny().bfloat16())
    assert equal(loaded, model)
    assert {tensor.dtype for _, tensor in loaded.added()} == {torch.float32}


def test_peft_reads_the_lora_part(tmp_path, peer):
    model = adapter(use_lora=True, use_memory_adapter=False, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    theirs = peer("peft").PeftModel.from_pretrained(tiny(dtype=torch.float32), tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5)


def test_the_base_is_loaded_by_its_name(tmp_path, monkeypatch):
    base = tiny(dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapter(base=base, base_model_name=str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    named = []

    def load_named(config):
        named.append(config.adapter.base_model_name)
        return transformers.AutoModelForCausalLM.from_pretrained(named[0]).eval()

    monkeypatch.setattr(fitting, "load_named", load_named)
    assert equal(MemoryAdapter.from_pretrained(tmp_path / "adapter"), model)
    assert named == [str(tmp_path / "base")]


def test_saving_over_an_older_adapter_leaves_none_of_its_files(tmp_path):
    adapter(use_both_memory_and_lora=True).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / CARD).write_text("my own card")
    model = adapter("qwen3", use_lora=True, use_memory_adapter=False)
    model.save_pretrained(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([CARD, CONFIG, "tokenizer.json", *LORA])
    assert (tmp_path / CARD).read_text() == "my own card"
    assert equal(MemoryAdapter.from_pretrained(tmp_path, tiny("qwen3")), model)


def test_stores_are_not_part_of_the_files(tmp_path):
    model = adapter(kinds=("external",))
    with torch.no_grad():
        want = model(TOKENS).logits
        attach_stores(model)
        model(TOKENS)
    model.save_pretrained(tmp_path)
    loaded = MemoryAdapter.from_pretrained(tmp_path, tiny())
    assert torch.equal(loaded(TOKENS).logits, want)  # pairs in the state again


# ----------------------------------------------------------------------------------------- interrupted saves


class Killed(BaseException):
    pass


@every("what", ["memory", "both"])
def test_an_interrupted_save_leaves_the_old_the_new_or_a_refusal(what, tmp_path, monkeypatch):
    """Stop before every rename and deletion in turn."""
    old, new = adapter(use_both_memory_and_lora=True), adapter(seed=2, **ADDED[what][0])
    outcomes = []
    for steps in range(12):
        folder = old.save_pretrained(tmp_path / str(steps))
        left = [steps]

        def count(do, left=left):
            def run(*given, **options):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
                return do(*given, **options)

            return run

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", count(os.replace))
            patched.setattr(Path, "unlink", count(Path.unlink))
            try:
                new.save_pretrained(folder)
                done = True
            except Killed:
                done = False
        try:
            loaded = MemoryAdapter.from_pretrained(folder, tiny())
            outcomes.append("new" if equal(loaded, new) else "old" if equal(loaded, old) else "mixed")
        except ValueError as error:
            assert "interrupted" in str(error) or "no such file" in str(error)
            outcomes.append("refused")
        assert not done or outcomes[-1] == "new"
    assert set(outcomes) == {"old", "refused", "new"} and outcomes[0] == "old", outcomes


# ------------------------------------------------------------------------------------------------ refusals


def change(folder, **fields):
    """Change memory_config.json and give it the checksum that it then needs."""
    document = json.loads((folder / CONFIG).read_text())
    document |= fields
    del document["sha256"]
    document["sha256"] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    (folder / CONFIG).write_text(json.dumps(document))


def refused(folder, message, base=None, error=ValueError, **options):
    base = tiny() if base is None else base
    with pytest.raises(error, match=message):
        MemoryAdapter.from_pretrained(folder, base, **options)
    return base


@pytest.fixture
def saved(tmp_path):
    adapter(use_both_memory_and_lora=True, base_model_name="lab/base").save_pretrained(tmp_path)
    return tmp_path


def test_another_base_is_refused_by_its_shapes_and_by_its_configuration(saved):
    load_into = "load it into the base it was trained on, lab/base"
    refused(saved, f"hidden_size = 32, expected 16; {load_into}", tiny(hidden_size=32))
    for check in (True, False):
        refused(
            saved, f"num_layers = 2, expected 3; {load_into}", tiny(num_hidden_layers=2), check_base=check
        )
    other = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    message = r"hash [0-9a-f]{12}, expected [0-9a-f]{12} \(rope_parameters = .*500.*, expected .*10000"
    refused(saved, message, tiny(**other))
    refused(
        saved,
        rf"model_type = 'qwen2', expected 'llama'.*{load_into}, or pass check_base=False",
        tiny("qwen2"),
    )
    MemoryAdapter.from_pretrained(saved, tiny(**other), check_base=False)
    base = refused(saved, "lora_B.weight has shape .* expected", tiny(head_dim=8), check_base=False)
    assert not any(module._forward_hooks for module in base.modules())
    same = tiny(dtype=torch.float32)
    same.config.pad_token_id = same.config.eos_token_id = 5
    same.config.use_cache = False
    MemoryAdapter.from_pretrained(saved, same)


def test_damaged_files_are_refused_and_the_base_stays_as_it_was(saved):
    whole = {name: (saved / name).read_bytes() for name in (CONFIG, TENSORS, *LORA)}
    for name, data in whole.items():
        for bad in (data[:-1], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], b""):
            (saved / name).write_bytes(bad)
            where = "damaged|altered" if name == CONFIG else "SHA-256 .* damaged, or left by a save"
            assert is_untouched(refused(saved, f"{name}.*({where}).*use another copy"))
        (saved / name).unlink()
        remedy = "save_pretrained writes it last" if name == CONFIG else "use another copy"
        assert is_untouched(refused(saved, f"{name}: no such file; {remedy}"))
        (saved / name).write_bytes(data)
    assert equal(MemoryAdapter.from_pretrained(saved, tiny()), adapter(use_both_memory_and_lora=True))


def test_parts_of_two_adapters_are_refused(saved, tmp_path):
    other = adapter("llama", use_both_memory_and_lora=True, seed=2).save_pretrained(tmp_path / "other")
    for name in (TENSORS, LORA[1]):
        data = (saved / name).read_bytes()
        (saved / name).write_bytes((other / name).read_bytes())
        assert is_untouched(refused(saved, f"{name}: SHA-256"))
        (saved / name).write_bytes(data)


def test_files_that_do_not_agree_with_their_configuration_are_refused(saved):
    document = json.loads((saved / CONFIG).read_text())
    config = document["config"]
    wide = config | {"adapter": config["adapter"] | {"width": 16}}
    change(saved, config=wide)
    assert is_untouched(refused(saved, r"memory_model.safetensors: .* has shape \[.*8.*\], expected \[.*16"))
    change(saved, config=config | {"adapter": config["adapter"] | {"use_both_memory_and_lora": False}})
    assert is_untouched(refused(saved, r"adapter_model.safetensors: not for this model; .*without a place"))
    change(saved, config=config | {"colour": 1})
    assert is_untouched(refused(saved, "colour", error=ConfigError))
    change(saved, config=config, files={"../" + TENSORS: document["files"][TENSORS]})
    assert is_untouched(refused(saved, "which is not part of an adapter"))
    change(saved, files=document["files"], format="memlib adapter 2")
    assert is_untouched(refused(saved, "format 'memlib adapter 2', expected 'memlib adapter 1'; use"))


def test_a_folder_that_does_not_exist_is_refused():
    with pytest.raises(WeightsError, match="no such folder"):
        MemoryAdapter.from_pretrained("./nowhere", tiny())


def test_merged_lora_beside_a_trained_base_is_refused(tmp_path):
    model = adapter(use_lora=True, freeze_base_model=False)
    merge_lora_weights(model.base)
    with pytest.raises(ValueError, match=r"call unmerge_lora_weights\(adapter.base\) first"):
        model.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    with pytest.raises(ValueError, match="merged, but keep_merged=False"):
        model.detach()
    model(TOKENS)


# --------------------------------------------------------------------------------------- the card and the hub


def test_the_card_names_the_base_its_licence_and_what_was_added(tmp_path):
    model = adapter(use_both_memory_and_lora=True, base_model_name="lab/base")
    count = sum(tensor.numel() for _, tensor in model.added())
    text = (model.save_pretrained(tmp_path / "adapter") / CARD).read_text()
    for part in (
        'base_model: "lab/base"',
        "Its licence: not known here; see the base model.",
        "memories (internal, external) after layers 0, 1, 2, width 8, segments of 4 tokens, mode `full`",
        "LoRA, rank 16, in q_proj, v_proj",
        f"{count:,} values in all",
        "MemoryAdapter.from_pretrained(",
    ):
        assert part in text
    assert "license:" not in text and "own parameters" not in text
    tiny(dtype=torch.float32).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / CARD).write_text("---\nlicense: apache-2.0\n---\n# A base\n")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    text = (adapter(base=base, freeze_base_model=False).save_pretrained(tmp_path / "two") / CARD).read_text()
    assert "\nlicense: apache-2.0\n" in text and "Its licence: apache-2.0." in text
    assert "the base's own parameters, which were trained too" in text


def test_push_uploads_the_files_of_save_pretrained(tmp_path, monkeypatch):
    import huggingface_hub

    model, calls = adapter(use_both_memory_and_lora=True), []

    def create_repo(*given, **options):
        calls.append((given, options))

    def upload_folder(*, folder_path, **options):
        uploaded = {name: Path(folder_path, name).read_bytes() for name in os.listdir(folder_path)}
        calls.append((uploaded, options))
        return "https://hub/lab/notes"

    monkeypatch.setattr(
        huggingface_hub, "create_repo", lambda *given, **options: calls.append((given, options))
    )
    monkeypatch.setattr(huggingface_hub, "upload_folder", upload_folder)
    assert model.push_to_hub("lab/notes", private=True, token="t", revision="dev") == "https://hub/lab/notes"
    model.save_pretrained(tmp_path)
    assert calls[0] == (("lab/notes",), {"token": "t", "private": True, "exist_ok": True})
    files, options = calls[1]
    assert files == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    assert options["repo_id"] == "lab/notes" and options["revision"] == "dev" and not options["create_pr"]


def test_push_without_a_network_says_so(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    model, message = adapter(), r"push_to_hub\('lab/notes'\): .* Offline: save_pretrained\(folder\) now"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=message):
        model.push_to_hub("lab/notes", token="t")
    refused_connection = huggingface_hub.errors.HfHubHTTPError.__base__("Connection refused")

    def create_repo(*_given, **_options):
        raise refused_connection

    monkeypatch.setattr(huggingface_hub, "create_repo", create_repo)
    with pytest.raises(ConnectionError, match=message) as caught:
        model.push_to_hub("lab/notes", token="t")
    assert caught.value.__cause__ is refused_connection


def test_the_hash_is_of_what_the_layers_compute(saved):
    described = saving.describe_base(tiny())
    assert described == saving.describe_base(tiny(dtype=torch.float32))
    assert described["config_sha256"] != saving.describe_base(tiny(rms_norm_eps=1e-5))["config_sha256"]
    with safe_open(saved / TENSORS, "pt") as file:
        assert json.loads((saved / CONFIG).read_text())["shapes"] == {
            name: file.get_slice(name).get_shape() for name in sorted(file.keys())
        }
