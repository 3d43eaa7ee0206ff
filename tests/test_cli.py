"""The command line: train, resume, measure, tables, configs, and errors in one line."""

from __future__ import annotations

import json

import pytest
import yaml

from memlib.cli import main
from memlib.config import load_config, override, preset_names
from memlib.models import MemoryTransformer
from memlib.models.info import count_parameters
from memlib.training.trainer import Trainer

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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "nowhere"], "no such file or preset; presets: passkey_baseline"),
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


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_takes_a_step(name):
    config = override(load_config(name), {"training.max_steps": 1, "training.batch_size": 2})
    assert Trainer(config).train(progress=False)["loss"] > 0


def test_retrieval_prints_latency_with_recall(tmp_path, capsys):
    words = ["retrieval", "--keys", "600", "--dim", "8", "--index", "torch", "hnsw"]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("| keys | index | ms per batch | recall |") and len(said) == 4
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["index"] for r in found] == ["torch", "hnsw"] and found[0]["recall"] == 1
    assert main([*words[:-1], "tree"]) == 2
    assert "index 'tree': known: torch, flat" in capsys.readouterr().err


def test_stream_says_what_is_not_flat(tmp_path, capsys):
    words = ["stream", "recall_baseline", "recall_external", "model.segment_length=64", "--store", "torch"]
    size = ["--tokens", "3000", "--segments", "2", "--json", str(tmp_path / "r.json")]
    status = main([*words, *size])
    said = capsys.readouterr().out
    assert "| recall_external, torch | 3,072 | 64 |" in said and "| recall_baseline | 3,072 | 64 |" in said
    assert ("flat: memory, speed" in said) == (status == 0)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [r["search"] for r in found] == ["", "", "torch"] and all(r["resumed"] for r in found)
    assert main([*words, "--tokens", "3000"]) == 2
    assert "feed at least" in capsys.readouterr().err
    assert main([*words[:4], "--store", "tree"]) == 2
    assert "index 'tree': known: torch, flat" in capsys.readouterr().err
