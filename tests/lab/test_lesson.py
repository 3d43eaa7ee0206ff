"""What notebooks stand on: predictions are kept, verdicts say yes and NO, exercises judge."""

from __future__ import annotations

import json

import numpy as np
import pytest

from memlib.lab.lesson import Lesson
from memlib.lab.pictures import curves, heat_map


@pytest.fixture
def lesson(monkeypatch, tmp_path):
    monkeypatch.setenv("MEMLIB_HOME", str(tmp_path))
    return Lesson("07", cpu_seconds=1e9)


def test_predictions_are_kept_and_compared(lesson, tmp_path, capsys):
    guess = lesson.predict("How good?", 0.5)
    lesson.predict("How bad?", 0.1)
    assert json.loads((tmp_path / "predictions.json").read_text()) == {
        "07: How good?": 0.5,
        "07: How bad?": 0.1,
    }
    guess.compare(0.55)
    guess.compare(0.9)
    said = capsys.readouterr().out
    assert "you said 0.5, measured 0.55: you knew" in said
    assert "measured 0.9: a surprise" in said


def test_a_folder_that_cannot_be_written_is_said_and_survived(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMLIB_HOME", str(tmp_path / "file"))
    assert Lesson("07", 1).predict("How good?", 0.5).expected == 0.5
    assert "stored in this notebook only" in capsys.readouterr().out


def test_verdict(lesson, capsys):
    lesson.verdict({"short": True, "a longer claim": False})
    assert capsys.readouterr().out == "short............ yes\na longer claim... NO\n"


def test_exercise_judges(lesson, capsys):
    with lesson.exercise("one"):
        assert 1 + 1 == 2
    with lesson.exercise("two"):
        raise AssertionError("the sum is off")
    with lesson.exercise("three"):
        raise NotImplementedError
    with lesson.exercise("four"):
        {}["missing"]
    lines = capsys.readouterr().out.splitlines()
    assert [line[0] for line in lines] == ["✓", "✗", "○", "✗"]
    assert "the sum is off" in lines[1]


def test_budget(lesson):
    assert lesson.within_budget()
    assert not Lesson("07", cpu_seconds=0.0).within_budget()


def test_pictures_are_png_with_words():
    for picture in (
        heat_map(np.eye(3), "x", "y", "The diagonal of three.", marks=["a", "b", "c"]),
        curves({"memory": ([1, 2], [0.1, 0.9])}, "step", "accuracy", "It rises.", chance=0.1),
    ):
        data, _ = picture._repr_mimebundle_()
        assert data["image/png"].startswith(b"\x89PNG") and len(data["image/png"]) < 150_000
        assert len(data["text/plain"]) >= 9 and data["text/plain"] in data["text/html"]
