"""The command line: train, resume, measure, tables, configs, and errors in one line."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from memlib.cli import main
from memlib.config import load_config, override, preset_names, save_config
from memlib.inference import GenerationConfig, Sessions
from memlib.models import MemoryTransformer
from memlib.models.info import count_parameters
from memlib.training.trainer import Trainer, load_model

ROOT = Path(__file__).parents[1]

QUICK = ["training.max_steps=2", "training.batch_size=4", "training.eval_examples=8"]


def test_train_eval_resume(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "recall_internal", *QUICK, "--seeds", "0", "1", "--out", str(out)]) == 0
    assert main(["eval", str(out), "--segments", "3", "5", "--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert [r["seed"] for r in results] == [0, 1]
    assert set(results[0]["accuracy"]) == {"3", "5"} and results[0]["steps"] == 2
    assert "| run | 0 |" in capsys.readouterr().out

    assert main(["train", "recall_internal", *QUICK, "--seeds", "0", "--out", str(out)]) == 2
    assert "resume it (--resume)" in capsys.readouterr().err
    more = [QUICK[1], QUICK[2], "training.max_steps=3"]
    assert main(["train", "recall_internal", *more, "--seeds", "0", "--out", str(out), "--resume"]) == 0
    assert "3 steps" in capsys.readouterr().out


@pytest.fixture
def notes(tmp_path, monkeypatch):
    """A run of one step on a text of its own, which is gone when the run is used."""
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "notes.txt"
    text.write_text("A pinch of salt, and a pinch of pepper. " * 100)
    small = ["model.hidden_dim=16", "model.intermediate_dim=16", "model.segment_length=8"]
    words = ["train", "text_internal", *QUICK, *small, f"task.text.dataset={text}", "--out", "notes"]
    assert main(words) == 0
    text.unlink()
    return tmp_path


def test_generate_prints_text_as_it_comes_and_carries_memory(notes, capsys):
    def said(*words):
        capsys.readouterr()
        assert main(["generate", "notes", "--tokens", "12", *words]) == 0
        return capsys.readouterr().out

    drawn = ["--temperature", "2.0", "--top-k", "40", "--top-p", "0.95"]
    assert said("--prompt", "A pinch") == said("--prompt", "A pinch", "--stream")
    assert said("--prompt", "A pinch", *drawn) == said("--prompt", "A pinch", *drawn, "--stream")
    assert said("--prompt", "A", *drawn) != said("--prompt", "A", *drawn, "--seed", "1")

    first = said("--prompt", "A pinch of ", *drawn, "--state", "ann")
    second = said("--prompt", "and a ", *drawn, "--state", "ann")
    assert said("--prompt", "and a ", *drawn) != second  # without what was said before
    model = load_model("notes")
    config = GenerationConfig(max_new_tokens=12, temperature=2.0, top_k=40, top_p=0.95)
    sessions = Sessions(model, config=config)
    sessions.load("ann", "ann")
    want = sessions.reply("ann", "more ")
    assert said("--prompt", "more ", *drawn, "--state", "ann") == want + "\n"
    assert first != second


def test_generate_streams_while_it_generates(notes, monkeypatch):
    """Of a text that never ends: the first pieces are printed before the last tokens exist."""
    printed = []
    monkeypatch.setattr("builtins.print", lambda text="", **how: printed.append((text, reads[0])))
    reads = [0]
    forward = MemoryTransformer.forward

    def counted(model, *arguments, **named):
        reads[0] += 1
        return forward(model, *arguments, **named)

    monkeypatch.setattr(MemoryTransformer, "forward", counted)
    assert main(["generate", "notes", "--prompt", "A", "--tokens", "9", "--stream"]) == 0
    assert [count for _, count in printed][:3] == [1, 2, 3]


def test_generate_speaks_a_tasks_words(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "training.max_steps=1", "--out", "run"]) == 0
    capsys.readouterr()
    assert main(["generate", "run", "--prompt", "k1 v2 . . k3 v0 ? k1", "--tokens", "3"]) == 0
    assert len(capsys.readouterr().out.split()) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("k1 v2"))
    assert main(["generate", "run", "--prompt", "-", "--tokens", "3"]) == 0
    capsys.readouterr()
    for words, said in {
        ("--prompt", "hello"): "'hello' is not in this vocabulary: it has _ ? . k0",
        ("--prompt", ""): "prompt 0 has no tokens",
        ("--prompt", "k1", "--stop", "k1 k2"): "--stop 'k1 k2': is 2 tokens",
        ("--prompt", "k1", "--tokens", "0"): "max_new_tokens = 0",
        ("--prompt", "k1", "--top-k", "3"): "set temperature above 0",
        ("--prompt", "k1", "--state", "run/config.yaml"): "incomplete or damaged state file",
    }.items():
        assert main(["generate", "run", *words]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert main(["generate", "nowhere", "--prompt", "k1"]) == 2
    assert "nowhere: no checkpoint here; train one" in capsys.readouterr().err


def test_generate_stops_where_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "training.max_steps=1", "--out", "run"]) == 0
    words = ["generate", "run", "--prompt", "k1 v2", "--tokens", "20", "--temperature", "3"]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out.split()
    stop = next(word for word in said[3:] if word[0] in "kv")
    assert main([*words, "--stop", stop]) == 0
    assert capsys.readouterr().out.split() == said[: said.index(stop)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere"], "no such file or preset; presets: adapter_comparison"),
        (["train", "recall_internal", "model.hidden=3"], "model.hidden: unknown key"),
        (["train", "recall_internal", "model"], "expected path=value"),
        (["train", "recall_internal", "model.vocab_size=9"], "task recall has 50 tokens; raise it"),
        (["eval", "nowhere"], "no checkpoint here"),
    ],
)
def test_errors_are_one_line_that_helps(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_config_commands(tmp_path, capsys):
    assert main(["config", "validate", *preset_names()]) == 0
    assert main(["config", "show", "recall_internal", "training.seed=7"]) == 0
    text = capsys.readouterr().out
    shown = yaml.safe_load(text[text.index("model:") :])
    assert shown["training"]["seed"] == 7
    assert main(["config", "docs", "--out", str(tmp_path / "config.md")]) == 0
    assert "| `memory.internal.num_slots` | an integer | `64` |" in (tmp_path / "config.md").read_text()


def test_compared_presets_have_equal_parameters():
    """The control may have at most 2 % more or fewer parameters than the model it controls for."""
    for task in ("recall", "rewrite"):
        sizes = [
            count_parameters(MemoryTransformer(load_config(f"{task}_{kind}")))
            for kind in ("baseline", "internal")
        ]
        assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[1]
        assert 100_000 <= sizes[1] <= 130_000


def test_doctor(capsys):
    assert main(["doctor", "--json"]) in (0, 1)
    assert "Python" in json.loads(capsys.readouterr().out)


LARGE = {"base_medium": 43.3e6, "design_100m": 100e6, "hds_100m": 99.6e6, "design_7b": 7e9}


# Configurations of adapters are built and trained in tests/pretrained/test_finetune.py.
SCRATCH = [name for name in preset_names() if load_config(name).adapter.base_model_name is None]


@pytest.mark.parametrize("name", SCRATCH)
def test_every_preset_takes_a_step(name):
    """Large ones take it with their shape kept and their sizes cut down."""
    changes = {"training.max_steps": 1, "training.batch_size": 2, "training.gradient_accumulation_steps": 1}
    if name in LARGE:
        changes |= {"model.hidden_dim": 64, "model.num_heads": 8, "model.intermediate_dim": 64}
        changes |= {"model.num_layers": 12, "model.segment_length": 64, "task.segments": 2}
        changes |= {"parallel.mixed_precision": "none"}  # which opens a process group
    config = override(load_config(name), changes)
    assert Trainer(config).train(progress=False)["loss"] > 0


@pytest.mark.parametrize("name", SCRATCH)
def test_a_preset_that_is_not_large_is_small(name):
    """Sizes on the meta device: no memory is taken, not even for seven billion."""
    with torch.device("meta"):
        size = count_parameters(MemoryTransformer(load_config(name)))
    assert abs(size - LARGE[name]) < 0.02 * LARGE[name] if name in LARGE else size < 6e6


def test_the_7b_design_has_eight_banks_and_sequences_of_32k():
    """8 banks of 1024 slots of 512; level 1 covers the sequence; the model without memory has 6.74B."""
    config = load_config("design_7b")
    with torch.device("meta"):
        model = MemoryTransformer(config)
        state = model.init_state(1)
    shapes = {tuple(bank.shape) for _, bank in state.memories[0].named_tensors()}
    assert len(state.memories) == 1 and (1, 8, 1024, 512) in shapes
    hds, sequence = config.memory.hds, config.task.segments * config.model.segment_length
    assert sequence == hds.chunk_size * hds.num_blocks == 32_768
    memory = sum(p.numel() for name, p in model.named_parameters() if ".memories." in name)
    layers = config.model.num_layers * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096)
    plain = layers + 2 * 32_000 * 4096 + 4096
    fusion = 4 * 2 * (4096 + 1)
    assert count_parameters(model) == plain + memory + fusion
    assert plain == 6_738_415_616 and 0.04 < memory / plain < 0.06


def test_the_100m_design_has_the_prototypes_slots_at_half_their_width():
    """A window of 512; ring and store of 512 slots, key and value 256 wide; one state for all layers."""
    config = load_config("design_100m")
    with torch.device("meta"):
        (state,) = MemoryTransformer(config).init_state(1).memories
    shapes = [tuple(tensor.shape) for _, tensor in state.named_tensors()]
    assert config.model.segment_length == 512 and shapes.count((1, 512, 256)) == 4


def test_the_vanilla_control_differs_in_nothing_else(capsys):
    assert main(["config", "diff", "base_small", "base_vanilla"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == ["model.intermediate_dim: 704 -> 832", "memory.vanilla_mode: false -> true"]
    sizes = [
        count_parameters(MemoryTransformer(load_config(name))) for name in ("base_small", "base_vanilla")
    ]
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0]


def test_config_diff(tmp_path, capsys):
    assert main(["config", "diff", "recall_internal", "recall_internal"]) == 0
    assert capsys.readouterr().out == ""
    stage = {"from_step": 5, "set": {"segments": 2}}
    changes = {"training.curriculum": [stage], "memory.internal.slot_dim": 32}
    save_config(override(load_config("recall_internal"), changes), tmp_path / "mine.yaml")
    assert main(["config", "diff", "recall_internal", str(tmp_path / "mine.yaml")]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "memory.internal.slot_dim: null -> 32",
        "training.curriculum: [] -> [{from_step: 5, set: {segments: 2}}]",
    ]
    assert main(["config", "diff", "recall_internal", "nowhere"]) == 2


def test_retrieval_prints_latency_with_recall(tmp_path, capsys):
    words = ["retrieval", "--keys", "600", "--dim", "8", "--index", "torch", "hnsw"]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("| keys | index | ms per batch | recall |") and len(said) == 4
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["index"] for r in found] == ["torch", "hnsw"] and found[0]["recall"] == 1
    assert main([*words[:-1], "tree"]) == 2
    assert "index 'tree': choose one of torch, flat" in capsys.readouterr().err


def test_stream_says_what_is_not_flat(tmp_path, capsys):
    words = ["stream", "recall_baseline", "recall_external", "model.segment_length=64", "--store", "torch"]
    size = ["--tokens", "3000", "--segments", "2", "--json", str(tmp_path / "r.json")]
    status = main([*words, *size])
    said = capsys.readouterr().out
    assert "| recall_external, torch | 3,072 | 64 |" in said and "| recall_baseline | 3,072 | 64 |" in said
    assert ("constant: memory, speed" in said) == (status == 0)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["search"] for r in found] == ["", "", "torch"] and all(r["resumed"] for r in found)
    assert main([*words, "--tokens", "3000"]) == 2
    assert "use at least" in capsys.readouterr().err
    assert main([*words[:4], "--store", "tree"]) == 2
    assert "index 'tree': choose one of torch, flat" in capsys.readouterr().err


def test_compress_prints_bytes_and_accuracy(tmp_path, capsys):
    run, target = tmp_path / "run", tmp_path / "rank.json"
    assert (
        main(["train", "topics_routed", "training.max_steps=1", "--seeds", "0", "1", "--out", str(run)]) == 0
    )
    capsys.readouterr()
    assert main(["compress", str(run), "--examples", "64", "--json", str(target)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| rank | bits | bytes | accuracy |"
    assert table[2].startswith("| 0 | 32 | 0 |") and table[-1].startswith("| whole | 32 | 32,768 |")
    runs = json.loads(target.read_text(encoding="utf-8"))
    assert len(runs) == 2 and len(table) == 2 + len(runs[0])


def test_compress_says_what_it_needs(tmp_path, capsys):
    run = tmp_path / "run"
    assert main(["train", "topics_baseline", "training.max_steps=1", "--out", str(run)]) == 0
    assert main(["compress", str(run)]) == 2
    assert "this model has 0 banks of learnable tokens" in capsys.readouterr().err


# -------------------------------------------------------------------------------------- pretrained models

ADAPTER = """
model: {segment_length: 8}
memory:
  kinds: [internal]
  fusion: residual
  memory_layer_placement: custom
  memory_layer_custom: [1]
  internal: {num_slots: 8, num_heads: 2}
task:
  instructions: {dataset: talks.jsonl}
training: {training_mode: instruction_finetuning, batch_size: 2, gradient_accumulation_steps: 1, max_steps: 3,
  warmup_steps: 0, memory_lr: 0.05, save_steps: 2}
adapter: {base_model_name: ./tiny-instruct, width: 8}
"""


@pytest.fixture
def pretrained(tmp_path, monkeypatch, peer):
    """A folder with a tiny Llama, its tokenizer, a conversation, and the configuration of an adapter."""
    peer("transformers")
    from .pretrained.bases import BYTES, byte_tokenizer, tiny

    monkeypatch.chdir(tmp_path)
    base = tiny("llama", torch.float32, vocab=BYTES, num_hidden_layers=2, eos_token_id=0)
    base.save_pretrained("tiny-instruct")
    byte_tokenizer().save_pretrained("tiny-instruct")
    talk = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "five"}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    (tmp_path / "mine.yaml").write_text(ADAPTER)
    return tmp_path


def test_an_adapter_is_trained_resumed_and_speaks(pretrained, capsys):
    assert main(["train", "mine.yaml"]) == 0
    assert "runs/mine/seed-0: 3 steps" in capsys.readouterr().out
    assert main(["train", "mine.yaml"]) == 2
    assert "already holds a run (step-0000003): resume it (--resume)" in capsys.readouterr().err
    assert main(["train", "mine.yaml", "training.max_steps=5", "--resume"]) == 0
    assert "runs/mine/seed-0: 5 steps" in capsys.readouterr().out

    def said(*words):
        assert main(["generate", *words, "--tokens", "6"]) == 0
        return capsys.readouterr().out

    names = ("runs/mine/seed-0/adapter", "runs/mine/seed-0", "runs/mine")
    assert len({said(name, "--prompt", "2 + 3?") for name in names}) == 1
    drawn = ["runs/mine", "--prompt", "2", "--temperature", "1"]
    assert said(*drawn) == said(*drawn, "--stream")


def test_chat_puts_the_prompt_into_the_template(pretrained, capsys, monkeypatch):
    """By default where the model is for conversations; --no-chat continues plain text."""
    from memlib.inference import TokenStream

    heard = []
    made = TokenStream.__init__

    def listening(stream, model, prompts, *rest):
        heard.append(prompts)
        made(stream, model, prompts, *rest)

    monkeypatch.setattr(TokenStream, "__init__", listening)
    assert main(["train", "mine.yaml", "training.max_steps=1", "--out", "run"]) == 0
    from .pretrained.bases import byte_tokenizer

    read = byte_tokenizer()
    for words, prompt in {
        (): "<user>hi<end><assistant>",
        ("--chat",): "<user>hi<end><assistant>",
        ("--no-chat",): "hi",
    }.items():
        assert main(["generate", "run", "--prompt", "hi", "--tokens", "1", *words]) == 0
        assert read.decode(heard.pop()[0]) == prompt
    state = ["--state", "ann.safetensors", "--tokens", "1"]
    for text in ("one", "two"):
        assert main(["generate", "run", "--prompt", text, *state]) == 0
    assert read.decode(heard.pop()[0]) == "<user>two<end><assistant>"
    read.chat_template = None
    read.save_pretrained("tiny-instruct")
    (pretrained / "tiny-instruct" / "chat_template.jinja").unlink(missing_ok=True)
    assert main(["generate", "run", "--prompt", "hi", "--chat", "--tokens", "1"]) == 2
    assert "--chat: the tokenizer has no chat template" in capsys.readouterr().err


def test_an_adapters_state_carries_what_was_said(pretrained, capsys):
    """Two calls with a state are one stream: the answer is that of the whole text at once."""
    assert main(["train", "mine.yaml", "--out", "run"]) == 0
    capsys.readouterr()
    first = ["generate", "run", "--no-chat", "--tokens", "3", "--state", "ann.safetensors"]
    assert main([*first, "--prompt", "once upon "]) == 0
    begun = capsys.readouterr().out.removesuffix("\n")
    assert main([*first, "--prompt", " a time"]) == 0
    second = capsys.readouterr().out
    whole = ["generate", "run", "--no-chat", "--tokens", "3", "--prompt"]
    assert main([*whole, f"once upon {begun} a time"]) == 0
    assert capsys.readouterr().out == second
    assert main(["train", "mine.yaml", "training.seed=1", "--out", "other"]) == 0
    assert main(["generate", "other", "--prompt", "a", "--state", "ann.safetensors"]) == 2
    assert "of another model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["train", "mine.yaml", "adapter.base_model_name=./nowhere"],
            "no such folder; name a folder, a model",
        ),
        (["train", "mine.yaml", "adapter.base_model_name=memlib/none"], "not in the hub's local cache"),
        (
            ["train", "mine.yaml", "task.instructions.dataset=no.jsonl"],
            "task.instructions.dataset = 'no.jsonl'",
        ),
        (["train", "mine.yaml", "memory.memory_layer_custom=[2]"], "layers are 0 … 1"),
        (["train", "mine.yaml", "training.training_mode=comparison"], "is of configurations for smollm2"),
        (["train", "tiny", "training.training_mode=facts"], "is for a pretrained base only"),
        (["table", "facts", "--seeds", "1", "2"], "rates are chosen on seed 0"),
        (["generate", "half", "--prompt", "a"], "no adapter here yet; end the run with memlib train"),
        (["generate", "nowhere", "--prompt", "a"], "nowhere: no checkpoint here"),
        (["generate", "nowhere", "--prompt", "a", "--chat"], "are for pretrained models"),
    ],
)
def test_errors_with_pretrained_models_are_one_line_that_helps(words, said, pretrained, capsys):
    (pretrained / "half").mkdir()
    (pretrained / "half" / "config.yaml").write_text(ADAPTER)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.splitlines()[-1].startswith("memlib: ")


def test_without_transformers_the_remedy_is_named(pretrained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["train", "mine.yaml"]) == 2
    assert "transformers is not installed; `make extras` installs it" in capsys.readouterr().err


def test_a_table_whose_runs_are_all_there_is_only_printed(tmp_path, capsys):
    pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")
    stored = tmp_path / "long_context.json"
    shutil.copy(ROOT / "docs/results/long_context.json", stored)
    assert main(["table", "long_context", "--seeds", "0", "--json", str(stored)]) == 0
    assert "| external | 3 | 4.51 | 11.80 |" in capsys.readouterr().out


def test_benchmarks_are_printed_and_stored(tmp_path, capsys, monkeypatch):
    from memlib.evaluation import compiled, complexity
    from memlib_kernels import bench

    one = complexity.Exponent("read", "O(m)", "time", "m", 1.0, 0.9, 0.1, [1, 2], [1.0, 2.0])
    monkeypatch.setattr(complexity, "measure_all", lambda log: [one])
    timing = bench.Timing("read", "torch", "forward", 1.0, 2.0, 2.0)
    monkeypatch.setattr(bench, "measure_all", lambda log: [timing])
    speed = compiled.Speed("read", 1, 16, 9.0, 2000.0, 5000.0, 0.0)
    monkeypatch.setattr(compiled, "measure_all", lambda log: [speed])
    for name, row in (
        ("complexity", "| 1 | 0.90 ± 0.10 |"),
        ("kernels", "| 1.00 | torch | 2.00 | 2.00 | – |"),
        ("compiled", "| read | 1 | 16 | 9.0 | 2,000 | 5,000 | 2.50 |"),
    ):
        target = tmp_path / f"{name}.json"
        assert main(["bench", name, "--json", str(target)]) == 0
        assert row in capsys.readouterr().out
        assert json.loads(target.read_text())["results"][0]["name"] == "read"


def test_facts_are_taught_and_saved(pretrained, capsys):
    """The saved adapter has the recall that was printed, and a lower loss on the facts than its base."""
    from memlib.pretrained.adapter import MemoryAdapter
    from memlib.pretrained.teaching import batch_of, recall

    from .pretrained.bases import byte_tokenizer

    words = ["train", "mine.yaml", "memory.kinds=[facts]", "memory.facts.num_facts=2"]
    words += ["memory.facts.threshold=0.7", "adapter.width=null", "adapter.gate=none"]
    words += ["training.training_mode=facts", "training.memory_lr=1.0", "training.max_steps=40"]
    words += ["--out", "run"]
    assert main(words) == 0
    said = capsys.readouterr().out
    facts = json.loads((pretrained / "run" / "taught.json").read_text())
    pairs = [(prompt, f" {fact['answer']}") for fact in facts for prompt in fact["prompts"]]
    adapter, tokenizer = MemoryAdapter.from_pretrained("run/adapter"), byte_tokenizer()
    shown = f"2 facts, 40 steps, .* taught phrasings {recall(adapter, tokenizer, pairs):.4f}, of unseen"
    assert re.search(shown, said) and len(pairs) == 8
    batch = batch_of(tokenizer, pairs)
    with torch.no_grad():
        taught = adapter(**batch).loss
        adapter.close_memory()
        assert taught < adapter(**batch).loss - 0.1
    assert main(words) == 2
    assert "already holds a taught adapter: choose another folder" in capsys.readouterr().err


def test_the_comparison_continues_and_prints_its_table(tmp_path, capsys, monkeypatch, peer):
    """`memlib train` of the preset and `memlib table facts` run the same; here on results that are there."""
    peer("transformers")
    from memlib.experiments import taught_facts

    asked = []

    def run_all(path, seeds, log):
        asked.append((path, seeds))
        log("a run")
        return [measured("base", None, 0, 2.0), measured("lora", 1e-3, 0, 2.5)]

    monkeypatch.setattr(taught_facts, "run_all", run_all)
    assert main(["train", "adapter_comparison", "--seeds", "0", "--out", str(tmp_path / "a")]) == 0
    first = capsys.readouterr()
    assert "| lora | 0.001 | 1 | 5 | 20 | 3 | 0.50 | 0.50 | +0.500 | +0.500 | 1.00 |" in first.out
    assert "a run" in first.err and "a run" not in first.out
    assert main(["table", "facts", "--out", str(tmp_path / "b")]) == 0
    assert asked == [(tmp_path / "a" / "facts.json", 1), (tmp_path / "b" / "facts.json", 3)]


def measured(arm, rate, seed, loss, taught=0.5):
    """A result as `memlib.experiments.taught_facts` stores it."""
    costs = {"parameters": 5, "bytes": 20, "cpu_seconds": 3.2}
    scores = {"taught": taught, "unseen": taught, "prose": loss, "code": loss, "strangers": 1.0}
    return {"arm": arm, **({} if rate is None else {"rate": rate}), "seed": seed, **costs, **scores}


def test_the_table_of_facts_has_each_arms_best_rate_and_its_range(peer):
    peer("transformers")
    from memlib.experiments.taught_facts import to_table

    results = [
        measured("base", None, 0, 2.0, 0.0),
        measured("base", None, 1, 3.0, 0.0),
        measured("lora", 1e-3, 0, 2.5, 0.7),
        measured("lora", 1e-2, 0, 9.0, 0.4),  # worse, so only the other rate is shown
        measured("lora", 1e-3, 1, 3.25, 0.9),
    ]
    rows = to_table(results).splitlines()
    spans = "0.70–0.90 | 0.70–0.90 | +0.250–+0.500 | +0.250–+0.500"
    assert rows[2] == "| base | – | 2 | 5 | 20 | 3 | 0.00 | 0.00 | +0.000 | +0.000 | 1.00 |"
    assert rows[3] == f"| lora | 0.001 | 2 | 5 | 20 | 3 | {spans} | 1.00 |"
    assert len(rows) == 4
    with pytest.raises(ValueError, match="no results of the arm 'base'"):
        to_table(results[2:])


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france(smollm2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["generate", "adapter_smollm2", "--tokens", "20", "--prompt", "What is the capital of France?"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "Paris" in said.out and "adapter_smollm2 is not trained here" in said.err
