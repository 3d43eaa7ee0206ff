"""transformers' Trainer trains, evaluates, saves and resumes an adapter; checkpoints hold what was added."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from memlib.memory import MEMORIES

from ..laws.cases import SEGMENT, VOCAB
from .bases import adapter, ids, tiny

LENGTH = 3 * SEGMENT + 1
DATA = [{"input_ids": row, "labels": row} for row in ids(16, LENGTH)]
ADDED = {
    "memory": {},
    "lora": {"use_memory_adapter": False, "use_lora": True},
    "both": {"use_both_memory_and_lora": True},
    "base": {"use_both_memory_and_lora": True, "freeze_base_model": False},
}


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


def trainer(model, folder, callbacks=(), groups=False, tokenizer=None, **options):
    settings = {
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    optimizers = (torch.optim.AdamW(model.get_parameter_groups()), None) if groups else (None, None)
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(str(folder), **settings | options),
        train_dataset=DATA[:12],
        eval_dataset=DATA[12:],
        callbacks=list(callbacks),
        optimizers=optimizers,
        processing_class=tokenizer,
    )


def new(what="both", **options):
    return adapter(dtype=torch.float32, **ADDED[what], **options)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


class Stop(transformers.TrainerCallback):
    """Stop after two steps, as if killed."""

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 2


@every("groups", [False, True])
@every("what", ADDED)
def test_a_resumed_run_is_an_uninterrupted_one(what, groups, tmp_path):
    whole = new(what)
    frozen = {name: value.clone() for name, value in whole.base.state_dict().items() if ".lora_" not in name}
    trainer(whole, tmp_path / "whole", groups=groups).train()
    assert not same(whole, new(what))
    moved = {name for name, value in frozen.items() if not torch.equal(whole.base.state_dict()[name], value)}
    assert bool(moved) == (what == "base")
    first = new(what)
    trainer(first, tmp_path / "parts", [Stop()], groups=groups).train()
    assert not same(first, whole)
    second = new(what)
    rest = trainer(second, tmp_path / "parts", groups=groups)
    rest.train(resume_from_checkpoint=True)
    assert rest.state.global_step == 4 and same(second, whole)


@every("what", ADDED)
def test_a_checkpoint_holds_what_was_added_each_tensor_once(what, tmp_path):
    model = new(what)
    trainer(model, tmp_path).train()
    file = tmp_path / "checkpoint-4" / "model.safetensors"
    tensors = load_file(file)
    assert tensors.keys() == {name for name, _ in model.added()}
    values = sum(tensor.numel() for _, tensor in model.added())
    assert file.stat().st_size < 4 * values + 200 * len(tensors) + 1000
    other = new(what, stirred=False)
    other.load_state_dict(tensors)
    assert same(other, model)
    assert torch.equal(other(ids()).logits, model.eval()(ids()).logits)
    trainer(model, tmp_path).save_model(tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == tensors.keys()


@every("kind", MEMORIES)
def test_evaluation_of_every_memory_gives_losses_and_logits_only(kind, tmp_path):
    model = adapter(kinds=(kind,), dtype=torch.float32)
    run = trainer(model, tmp_path, load_best_model_at_end=True, max_steps=2)
    run.train()
    loss = run.evaluate()["eval_loss"]
    found = run.predict(DATA[12:])
    rows = torch.stack([example["input_ids"] for example in DATA[12:]])
    with torch.no_grad():
        output = model.eval()(rows, labels=rows)
    assert loss == pytest.approx(float(output.loss), abs=1e-6)
    assert found.predictions.shape == (4, LENGTH, VOCAB)
    torch.testing.assert_close(torch.tensor(found.predictions), output.logits, rtol=0, atol=1e-5)


def test_a_tokenizer_and_tensorboard(tmp_path, monkeypatch):
    names = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(names, unk_token="w0")), eos_token="w3", pad_token="w4"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = new()
    trainer(model, tmp_path / "run", tokenizer=tokenizer, report_to=["tensorboard"]).train()
    assert (tmp_path / "run" / "checkpoint-4" / "tokenizer.json").exists()
    assert model.base.config.eos_token_id == 3 and model.base.config.pad_token_id == 4
    assert model.base.generation_config.eos_token_id == [3, 2]
    events = [file.read_bytes() for file in Path(tmp_path / "board").rglob("events.out.*")]
    assert any(b"model_config" in data and b"use_both_memory_and_lora" in data for data in events)
    assert any(b"eval/loss" in data for data in events)


def test_recomputed_activations_train_the_same(tmp_path):
    plain, recomputed = new(), new()
    trainer(plain, tmp_path / "plain").train()
    trainer(recomputed, tmp_path / "recomputed", activation_checkpointing=True).train()
    assert recomputed.is_activation_checkpointing and same(plain, recomputed)


def test_gradient_accumulation_is_one_larger_batch(tmp_path):
    large, parts = new(), new()
    trainer(large, tmp_path / "large", per_device_train_batch_size=4).train()
    trainer(parts, tmp_path / "parts", gradient_accumulation_steps=2).train()
    theirs = parts.state_dict()
    for name, value in large.state_dict().items():
        torch.testing.assert_close(theirs[name], value, rtol=0, atol=1e-3)


def test_state_dicts_are_strict_and_name_what_is_wrong():
    model = new()
    values = model.state_dict()
    other = new(stirred=False)
    assert other.load_state_dict(values).missing_keys == [] and same(other, model)
    name = next(iter(values))
    lacking = {key: value for key, value in values.items() if key != name}
    with pytest.raises(RuntimeError, match=f"missing: .*{name}.*, without a place: none; build it with"):
        other.load_state_dict(lacking)
    with pytest.raises(RuntimeError, match=r"missing: none, without a place: \['colour'\]"):
        other.load_state_dict(values | {"colour": torch.zeros(1)})
    found = other.load_state_dict(lacking | {"colour": torch.zeros(1)}, strict=False)
    assert found.missing_keys == [name] and found.unexpected_keys == ["colour"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(values | {name: torch.zeros(1, 2, 3)})
    inside = torch.nn.ModuleList([model, torch.nn.Linear(1, 1)])
    assert inside.state_dict().keys() == {f"0.{key}" for key in values} | {"1.weight", "1.bias"}
    assert not any(key.startswith("base.model") and "lora" not in key for key in values)
    assert model.state_dict(keep_vars=True)[name].requires_grad
    base = tiny(dtype=torch.float32).state_dict()
    assert all(torch.equal(model.base.state_dict()[key], base[key]) for key in base if "_proj" not in key)
