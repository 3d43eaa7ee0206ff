"""What a run shows beside its loss: speed, share of the peak, gates, loads of routers, and what made it."""

import json
import platform
import re

import pytest
import torch

from memlib.config import load_config, override
from memlib.training import monitor
from memlib.training.log import read_log
from memlib.training.trainer import Trainer


def test_speed_and_share_of_the_peak(tiny, tmp_path, monkeypatch):
    """Two of three known, the third follows: tokens, seconds, operations."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(monitor, "matmul_flops", lambda device, dtype: 1e9)
    config = tiny({"training.log_steps": 1, "task.segments_min": None})
    trainer = Trainer(config, tmp_path)
    trainer.train(progress=False)
    model, size, training = trainer.model, config.model, config.training
    tokens = training.batch_size * training.gradient_accumulation_steps
    tokens *= config.task.segments * size.segment_length
    matrices = sum(p.numel() for p in model.parameters()) - model.embedding.weight.numel()
    flops = 6 * matrices + 12 * size.num_layers * size.hidden_dim * size.segment_length
    for record in read_log(tmp_path):
        if "loss" in record:
            assert record["tokens_per_second"] == tokens / 2
            assert record["mfu"] == pytest.approx(tokens / 2 * flops / 1e9)


def test_padding_does_not_count_as_speed(tiny, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i:02}.txt").write_text("ab" * (5 + i))
    text = {"task.name": "text", "task.text.dataset": str(folder), "task.text.documents": "lanes"}
    trainer = Trainer(tiny(text | {"model.vocab_size": 256}))
    batch = trainer.task.batch(4, 0)
    trainer.train_step()
    assert trainer.monitor.tokens == int(batch.mask.sum()) < batch.tokens.numel()


def test_the_peak_is_that_of_a_product():
    peak = monitor.matmul_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < peak < 1e14


def test_gates_are_means_over_the_tokens_of_a_step(tiny, tmp_path):
    trainer, seen = Trainer(tiny({"training.log_steps": 3}), tmp_path), []
    fusion = trainer.model.blocks[0].fusion.weight_point
    step = trainer.train_step

    def listened():
        if trainer.step != 2:
            return step()
        with fusion.listening(lambda weight: seen.append(1 - weight[..., 0].detach().mean())):
            return step()

    trainer.train_step = listened
    trainer.train(until=3, progress=False)
    (record,) = (r for r in read_log(tmp_path) if "loss" in r)
    assert record["step"] == 3
    assert record["0.fusion.weight"] == pytest.approx(float(torch.stack(seen).mean()))
    assert 0 < record["0.internal.writer.input"] < 1 and 0 < record["0.internal.writer.forget"] < 1
    assert not fusion.listeners


def test_loads_of_a_router_are_shares_of_the_tokens():
    config = override(load_config("topics_routed"), {"training.max_steps": 1, "training.log_steps": 1})
    trainer = Trainer(config)
    with trainer.monitor.listening(True):
        trainer.train_step()
    report = trainer.monitor.report()
    loads = [value for name, value in report.items() if re.fullmatch(r"\d+\.chapters\.weight\.\d+", name)]
    chapters = config.memory.chapters
    layers = sum(name.endswith("chapters.weight.0") for name in report)
    assert len(loads) == layers * chapters.num_chapters
    assert sum(loads) == pytest.approx(layers * chapters.top_k_chapters)


def test_a_run_says_what_made_it(tiny, tmp_path):
    Trainer(tiny(), tmp_path).train(until=2, progress=False)
    Trainer(tiny(), tmp_path, resume=True).train(progress=False)
    starts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert len(starts) == 2
    assert starts[0]["python"] == platform.python_version() and starts[0]["torch"] == torch.__version__
    assert starts[0]["processes"] == 1 and starts[0]["command"]
    assert starts[0]["commit"] is None or re.fullmatch("[0-9a-f]{40}", starts[0]["commit"])


def test_listening_changes_no_step(tiny):
    one, other = Trainer(tiny()), Trainer(tiny())
    with one.monitor.listening(True):
        a = one.train_step()
    assert a == other.train_step()
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)
