"""Train several configurations with several seeds and compare them: the tables of the README."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from memlib.config import Config, override
from memlib.evaluation.chapters import chapter_use
from memlib.evaluation.table import markdown
from memlib.files import write_text
from memlib.models import MemoryTransformer
from memlib.models.info import count_parameters
from memlib.tasks import Topics
from memlib.training.trainer import Trainer


@dataclass(frozen=True)
class Result:
    """Measurements of one run; accuracy: on the test split, by number of segments.

    chapters: use of chapters, for runs on topics (`memlib.evaluation.chapters.chapter_use`).
    """

    name: str
    seed: int
    parameters: int
    steps: int
    cpu_seconds: float
    chance: float
    accuracy: dict[int, float]
    chapters: dict[str, float] = field(default_factory=dict)


def measure(trainer: Trainer, name: str, segments: Sequence[int]) -> Result:
    """Measure a trained run at each number of segments."""
    return of_run(trainer, name, {n: trainer.evaluate(segments=n).accuracy for n in segments})


def of_run(trainer: Trainer, name: str, accuracy: dict[int, float]) -> Result:
    """Build the `Result` of a run from its accuracies."""
    return Result(
        name,
        trainer.config.training.seed,
        count_parameters(trainer.model),
        trainer.step,
        round(trainer.cpu_seconds, 1),
        trainer.task.chance,
        {n: round(score, 4) for n, score in accuracy.items()},
        chapter_use(trainer.model, trainer.task) if isinstance(trainer.task, Topics) else {},
    )


def compare(
    configs: dict[str, Config],
    seeds: Sequence[int],
    segments: Sequence[int],
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    measures: Callable[[Trainer, str, Sequence[int]], list[Result]] | None = None,
    prepare: Callable[[MemoryTransformer], None] | None = None,
) -> list[Result]:
    """Train every configuration with every seed; with a folder, runs are saved and finished ones reused.

    measures: measures each run, in place of its accuracy at each number of segments; prepare: changes a
    new model before training.
    """
    results = []
    for name, config in configs.items():
        for seed in seeds:
            run = Path(folder, name, f"seed-{seed}") if folder else None
            trainer = Trainer(override(config, {"training.seed": seed}), run, resume=True)
            if prepare is not None and trainer.step == 0:
                prepare(trainer.model)
            trainer.train(progress=progress)
            if measures:
                results += measures(trainer, name, segments)
            else:
                results.append(measure(trainer, name, segments))
    return results


def to_markdown(results: Sequence[Result]) -> str:
    """A table with one row per run."""
    segments = list(results[0].accuracy)
    measured = list(dict.fromkeys(name for r in results for name in r.chapters))
    rows = [
        [r.name, str(r.seed), f"{r.parameters:,}", str(r.steps), f"{r.cpu_seconds:.1f}", f"{r.chance:.4f}"]
        + [f"{r.accuracy[n]:.4f}" for n in segments]
        + [f"{r.chapters[name]:g}" if name in r.chapters else "" for name in measured]
        for r in results
    ]
    head = ["run", "seed", "parameters", "steps", "CPU-s", "chance", *(f"{n} segments" for n in segments)]
    head += measured
    return markdown(head, rows)


def summary(results: Sequence[Result]) -> str:
    """A table with one row per configuration: the range over its seeds."""
    segments, rows = list(results[0].accuracy), []
    for name in dict.fromkeys(r.name for r in results):
        runs = [r for r in results if r.name == name]
        spans = [sorted(r.accuracy[n] for r in runs) for n in segments]
        seconds = max(r.cpu_seconds for r in runs)
        rows.append(
            [name, f"{runs[0].parameters:,}", str(len(runs)), f"{seconds:.0f}"]
            + [f"{span[0]:.3f} – {span[-1]:.3f}" for span in spans]
        )
    head = ["model", "parameters", "seeds", "CPU-s each, at most", *(f"{n} segments" for n in segments)]
    return markdown(head, rows)


def write_json(results: Sequence[Result], path: str | os.PathLike[str]) -> None:
    """Write all results with torch's version and thread count, atomically."""
    document = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "results": [asdict(result) for result in results],
    }
    write_text(path, json.dumps(document, indent=1) + "\n")


def read_json(path: str | os.PathLike[str]) -> list[Result]:
    """Read results written by `write_json`."""
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    return [
        Result(**{**result, "accuracy": {int(n): a for n, a in result["accuracy"].items()}})
        for result in document["results"]
    ]
