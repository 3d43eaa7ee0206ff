"""Fine-tuning: the loss is the assistant's, memory goes on between rows, and a killed run loses nothing."""

import json
import math
from itertools import islice

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from memlib.config import Config, ConfigError, load_config, override, preset_names
from memlib.pretrained.adapter import MemoryAdapter
from memlib.pretrained.finetune import Finetuning
from memlib.pretrained.runs import ADAPTER
from memlib.tasks import Instructions, packed
from memlib.training.checkpoint import CheckpointError, flatten_optimizer, latest_checkpoint
from memlib.training.log import read_log
from memlib.training.trainer import Trainer, TrainingDiverged

from ..laws.laws import same_state
from .bases import BYTES, byte_tokenizer, tiny

CONVERSATIONS = [
    [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "five"}],
    [
        {"role": "user", "content": "capital of France?"},
        {"role": "assistant", "content": "It is Paris."},
        {"role": "user", "content": "sure?"},
        {"role": "assistant", "content": "yes"},
    ],
]
SETTINGS = {
    "model.segment_length": 8,
    "memory.kinds": ["internal", "chapters"],
    "memory.fusion": "residual",
    "memory.memory_layer_placement": "custom",
    "memory.memory_layer_custom": [1],
    "memory.internal.num_slots": 8,
    "memory.internal.num_heads": 2,
    "memory.chapters.num_memory_tokens": 8,
    "memory.chapters.num_chapters": 4,
    "memory.chapters.top_k_chapters": 2,
    "memory.chapters.num_heads": 2,
    "adapter.base_model_name": "tiny",
    "adapter.width": 8,
    "training.training_mode": "instruction_finetuning",
    "training.batch_size": 2,
    "training.gradient_accumulation_steps": 2,
    "training.max_steps": 6,
    "training.warmup_steps": 2,
    "training.memory_lr": 0.01,
    "training.gate_lr": 0.02,
    "training.lora_lr": 0.01,
    "training.log_steps": 1,
    "training.save_steps": 3,
}
DOCUMENTS = {"training.training_mode": "pretraining", "task.documents.row_length": 16}


@pytest.fixture
def config(tmp_path):
    """A function from changes to a short run, on conversations or documents of its own."""
    talks, texts = tmp_path / "talks.jsonl", tmp_path / "texts.jsonl"
    talks.write_text("\n".join(json.dumps({"messages": messages}) for messages in CONVERSATIONS))
    texts.write_text("\n".join(json.dumps({"text": f"document {i}: " + "word " * i}) for i in range(12)))
    data = {"task.instructions.dataset": str(talks), "task.documents.dataset": str(texts)}
    return lambda changes=None: override(Config(), SETTINGS | data | (changes or {}))


def start(config, folder, resume=False, **options):
    base = tiny("llama", torch.float32, vocab=BYTES, num_hidden_layers=2, **options)
    return Finetuning(config, folder, resume, base, byte_tokenizer())


def tensors(run):
    """Everything a run goes on from: what was added, the optimizer, carried memory, the random generator."""
    named = {**run.adapter.state_dict(), **flatten_optimizer(run.optimizer)[0]}
    if run.carried is not None:
        named |= dict(run.carried.named_tensors())
    return named | {"generator": torch.get_rng_state()}


def log(folder):
    return [{k: v for k, v in r.items() if k != "cpu_seconds"} for r in read_log(folder)]


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter.use_lora": True, "adapter.lora_dropout": 0.2},
        {"task.instructions.streaming": True, "task.instructions.block": 1},
        DOCUMENTS,
        DOCUMENTS | {"adapter.mode": "segment", "training.lr_schedule": "linear"},
        DOCUMENTS | {"task.documents.row_length": 13, "adapter.freeze_base_model": False},
        DOCUMENTS | {"task.documents.streaming": True, "task.documents.block": 5},
    ],
    ids=[
        "lora_dropout",
        "streamed_talks",
        "documents",
        "segment",
        "open_segment_base_trained",
        "streamed_texts",
    ],
)
def test_a_killed_and_resumed_run_is_the_uninterrupted_one_bit_for_bit(changes, config, tmp_path):
    """Killed in step 5, after the checkpoint of step 3: steps 4 and 5 are made twice and logged once."""
    straight = start(config(changes), tmp_path / "straight")
    straight.train(progress=False)
    expected = tensors(straight)

    class Killed(BaseException):
        pass

    run = start(config(changes), tmp_path / "killed")
    step = run.train_step
    run.train_step = lambda: step() if run.step < 5 else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        run.train(progress=False)
    assert not (tmp_path / "killed" / ADAPTER).exists()
    torch.manual_seed(99)
    resumed = start(config(changes), tmp_path / "killed", resume=True)
    assert resumed.step == 3
    resumed.train(progress=False)
    found = tensors(resumed)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert resumed.data.state_dict() == straight.data.state_dict()
    assert log(tmp_path / "killed") == log(tmp_path / "straight")
    assert (resumed.carried is not None) == ("training.training_mode" in changes)


def test_the_saved_adapter_is_the_trained_one(config, tmp_path):
    run = start(config(), tmp_path / "run")
    run.train(progress=False)
    base = tiny("llama", torch.float32, vocab=BYTES, num_hidden_layers=2)
    loaded = MemoryAdapter.from_pretrained(tmp_path / "run" / ADAPTER, base)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, run.adapter(ids).logits)
    loaded.close_memory()
    assert not torch.equal(loaded(ids).logits, run.adapter(ids).logits)


def test_a_run_is_resumed_only_on_request_and_only_as_it_was(config, tmp_path):
    start(config(), tmp_path).train(until=1, progress=False)
    with pytest.raises(FileExistsError, match=r"already holds a run \(step-0000001\): resume it"):
        start(config(), tmp_path)
    with pytest.raises(CheckpointError, match="saved with another adapter configuration"):
        start(config({"adapter.gate": "none"}), tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"task\.instructions: the saved position has batch_size = 2, not 1"):
        start(config({"training.batch_size": 1}), tmp_path, resume=True)
    more = start(config({"training.max_steps": 8, "training.memory_lr": 0.5}), tmp_path, resume=True)
    assert more.step == 1 and {
        g["initial_lr"] for g in more.optimizer.param_groups if g["name"] == "memory"
    } == {0.5}


# ---------------------------------------------------------------------------------------------- the losses


def test_the_loss_of_a_step_is_the_mean_over_the_assistants_tokens(config, tmp_path):
    """Against a loop over single conversations without padding, in values and gradients: short and long ones
    weigh by their tokens, in whichever batch they are."""
    changes = {"training.batch_size": 1, "memory.kinds": ["internal"], "training.warmup_steps": 0}
    run = start(config(changes | {"training.max_grad_norm": 0.0}), tmp_path)
    adapter = run.adapter
    with torch.no_grad():  # move the branch off its start, where it would add nothing
        for parameter in adapter.branches.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    batches = list(islice(Instructions(run.config.task.instructions, run.tokenizer, 1, 0), 2))
    total, count = 0.0, 0
    adapter.train()
    for batch in batches:
        logits = adapter(batch["input_ids"]).logits[0]
        for place, label in enumerate(batch["labels"][0].tolist()):
            if label != -100:
                total, count = total - logits[place - 1].log_softmax(-1)[label], count + 1
    text = "".join(run.tokenizer.decode(b["labels"][b["labels"] != -100]) for b in batches)
    assert sorted(text.split("<end>")) == ["", "It is Paris.", "five", "yes"] and count == 22
    (total / count).backward()
    wanted = {name: p.grad.clone() for name, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad()
    seen = {}
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.update(
            {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
        )
    )
    record = run.train_step()
    assert math.isclose(record["loss"], (total / count).item(), rel_tol=1e-5)
    assert seen.keys() == wanted.keys() and any(bool(g.any()) for g in seen.values())
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-6, rtol=1e-4)


def test_padding_counts_for_nothing(config, tmp_path):
    """Not for the loss of the gate either, which the padding's own hidden states would change."""
    run = start(config({"adapter.gate_cost": 1.0, "memory.kinds": ["internal"]}), tmp_path)
    with torch.no_grad():
        run.adapter.branch(1).gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    run.adapter.train()
    batch = next(run.data)
    assert int((batch["attention_mask"] == 0).sum()) > 8
    other = batch | {"input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 77)}
    assert run.backward(batch, 10) == pytest.approx(run.backward(other, 10), rel=1e-6)


def test_two_conversations_are_learned_and_the_base_stays(config, tmp_path):
    changes = {
        "training.max_steps": 60,
        "training.gradient_accumulation_steps": 1,
        "adapter.use_lora": True,
        "adapter.lora_targets": ["all-linear"],
        "training.lora_lr": 0.03,
        "training.memory_lr": 0.03,
    }
    run = start(config(changes), tmp_path)
    before = {name: p.clone() for name, p in run.adapter.base.named_parameters() if "lora_" not in name}
    run.train(progress=False)
    losses = [record["loss"] for record in read_log(tmp_path)]
    assert losses[0] > 4 and losses[-1] < 0.5 * losses[0]
    assert read_log(tmp_path)[-1]["accuracy"] > read_log(tmp_path)[0]["accuracy"] + 0.3
    assert all(
        torch.equal(p, before[name]) for name, p in run.adapter.base.named_parameters() if name in before
    )


def test_losses_of_memories_train_and_are_logged_apart(config, tmp_path):
    """The gate's price is paid: a gate with a high price closes, and the logged loss does not contain it."""
    changes = {"adapter.gate_cost": 100.0, "memory.kinds": ["internal"], "training.max_grad_norm": 0.0}
    dear, free = start(config(changes), tmp_path / "a"), start(config(), tmp_path / "b")
    record = dear.train_step()
    assert record["router_loss"] == pytest.approx(50.0, rel=0.2)  # 100 times a gate of a half
    assert record["loss"] == pytest.approx(free.train_step()["loss"], rel=1e-5)
    bias = dear.adapter.branch(1).gate.bias
    before = bias.clone()
    dear.train_step()
    assert bool((bias < before).all())


def test_a_loss_that_is_not_finite_stops_with_a_diagnosis(config, tmp_path):
    run = start(config({"training.save_steps": 1}), tmp_path)
    run.train(until=2, progress=False)
    with torch.no_grad():
        run.adapter.branch(1).norm.weight.fill_(math.nan)
    with pytest.raises(
        TrainingDiverged, match=r"step 2: loss nan.*weights not finite: branches\.1\.norm\.weight"
    ):
        run.train(progress=False)
    assert latest_checkpoint(tmp_path).name == "step-0000002"


# -------------------------------------------------------------------------------------------- carried memory


@pytest.mark.parametrize(("mode", "length"), [("segment", 16), ("full", 13)])
def test_the_carried_memory_is_that_of_the_rows_read_whole(mode, length, config, tmp_path):
    """With rates of zero. In the mode `segment` reading whole is one call; in the mode `full` the base starts
    anew with each row, so that whole means row after row, here with a segment that stays open in between."""
    changes = {"adapter.mode": mode, "task.documents.row_length": length}
    rates = {"training.memory_lr": 0.0, "training.gate_lr": 0.0, "training.gradient_accumulation_steps": 1}
    run = start(config(DOCUMENTS | changes | rates), tmp_path)
    batches = list(islice(packed(run.config.task.documents, run.tokenizer, 2, 0), 3))
    assert [bool(b["starts"].all()) for b in batches] == [True, False, False]
    for _ in batches:
        run.train_step()
    adapter = run.adapter
    with torch.no_grad():
        if mode == "segment":
            whole = adapter(torch.cat([b["input_ids"] for b in batches], 1), use_cache=False).memory_state
        else:
            whole = None
            for batch in batches:
                whole = adapter(batch["input_ids"], memory_state=whole, use_cache=False).memory_state
        alone = adapter(batches[-1]["input_ids"], use_cache=False).memory_state
    same_state("carried", "memory", run.carried, whole)
    assert not any(tensor.requires_grad for _, tensor in run.carried.named_tensors())
    with pytest.raises(AssertionError):
        same_state("carried", "memory", run.carried, alone)


def test_rows_that_start_anew_forget(config, tmp_path):
    """At an epoch's end every row starts elsewhere: the state is then that of its first row alone."""
    changes = DOCUMENTS | {"training.gradient_accumulation_steps": 1, "training.memory_lr": 0.0}
    run = start(config(changes | {"training.gate_lr": 0.0}), tmp_path)
    for _ in range(run.data.batches_per_epoch + 1):
        run.train_step()
    batches = list(islice(packed(run.config.task.documents, run.tokenizer, 2, 0), run.data.step))
    assert bool(batches[-1]["starts"].all())
    with torch.no_grad():
        first = run.adapter(batches[-1]["input_ids"], use_cache=False).memory_state
    same_state("carried", "memory", run.carried, first)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"training.training_mode": "facts"}, "'facts': is not trained on batches of data; use memlib train"),
        ({"training.horizon": 2}, "training.horizon = 2: is for training from scratch"),
        (
            {"training.curriculum": [{"set": {"segments": 2}}]},
            "training.curriculum = .*is for training from scratch",
        ),
        (
            DOCUMENTS | {"adapter.mode": "segment", "task.documents.row_length": 12},
            "row_length = 12: .* a multiple of model.segment_length = 8",
        ),
        ({"memory.kinds": []}, "adapter: nothing to train; name memories in memory.kinds"),
    ],
)
def test_options_that_do_not_apply_are_refused(changes, said, config, tmp_path):
    with pytest.raises(ConfigError, match=said):
        start(config(changes), tmp_path)


def test_a_trainer_from_scratch_refuses_a_pretrained_base(config):
    with pytest.raises(
        ConfigError, match=r"base_model_name = 'tiny': this trains a model from scratch; use memlib"
    ):
        Trainer(config())


# ------------------------------------------------------------------------------------------------- presets

FAMILY = {"smollm2-135m-instruct": ("llama", 30), "Qwen/Qwen2.5-1.5B": ("qwen2", 28)} | {
    "meta-llama/Meta-Llama-3-8B": ("llama", 32),
    "mistralai/Mistral-7B-v0.3": ("mistral", 32),
}
PRESETS = [name for name in preset_names() if load_config(name).adapter.base_model_name is not None]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step_on_a_small_model_of_its_family(name, config, tmp_path):
    """As many layers as the named model has, so that the preset's layers exist; with its template."""
    preset = load_config(name)
    family, layers = FAMILY[preset.adapter.base_model_name]
    data = config().task
    changes = {
        "model.segment_length": 8,
        "adapter.base_dtype": "float32",
        "task.instructions.dataset": data.instructions.dataset,
        "task.documents.dataset": data.documents.dataset,
        "task.documents.row_length": 16,
        "training.batch_size": 1,
        "training.gradient_accumulation_steps": 1,
    }
    if preset.training.training_mode in ("facts", "comparison"):
        changes["training.training_mode"] = "instruction_finetuning"
    if not preset.memory.kinds:  # the comparison's own configurations are in memlib.experiments.taught_facts
        changes |= {"adapter.use_lora": True}
    base = tiny(family, torch.float32, vocab=BYTES, num_hidden_layers=layers)
    template = None if preset.task.instructions.chat_template else byte_tokenizer().chat_template
    run = Finetuning(override(preset, changes), tmp_path / "run", False, base, byte_tokenizer(template))
    assert list(run.adapter.stack.layers) == (preset.memory.memory_layer_custom or [])
    record = run.train_step()
    assert 0 < record["loss"] < 20 and record["grad_norm"] >= 0
