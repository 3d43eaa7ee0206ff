"""Teach facts to a pretrained model in several ways, and measure what each way costs and breaks.

Every arm sees the same prompts. The trained arms take the same number of steps of the same batches, and each
tries as many learning rates; the best by recall of the taught prompts (then by unrelated loss) is run with
more seeds. All but the last two train about as many numbers: `lora_8x` trains eight times as many, and
`lora_long` those for four times the steps, at one rate and with one seed.
"""

from __future__ import annotations

import inspect
import itertools
import json
import pydoc_data.topics
import random
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memlib.config import Config, ConfigError, load_config, override, save_config
from memlib.evaluation.table import markdown, span
from memlib.files import write_text
from memlib.pretrained.adapter import MemoryAdapter
from memlib.pretrained.fitting import load_with_tokenizer
from memlib.pretrained.knn import NearestNeighbourLM
from memlib.pretrained.runs import ADAPTER
from memlib.pretrained.teaching import (
    Pair,
    answer_logits,
    fact_memories,
    recall,
    teach,
    write_facts,
)
from memlib.pretrained.weights import load_base
from memlib.tasks.facts import RELATIONS, Fact, make_facts

BASE = "smollm2-135m-instruct"
COUNT, STEPS = 100, 32
TEXT_TOKENS, TEXT_ROWS = 256, 4

LEARNED = {
    "memory.kinds": ["chapters"],
    "memory.chapters.use_chapters": False,
    "memory.chapters.num_memory_tokens": 128,
    "adapter.width": 40,
    "adapter.gate": "token",
}
ONE_RANK = {"adapter.use_lora": True, "adapter.lora_rank": 1, "adapter.lora_alpha": 2.0}
NO_MEMORY = {"adapter.use_memory_adapter": False}
LORA_8X = {**ONE_RANK, **NO_MEMORY, "adapter.lora_rank": 8, "adapter.lora_alpha": 16.0}


@dataclass(frozen=True)
class Arm:
    """One way to teach: changes of the preset `adapter_smollm2`, the learning rates to try, and steps."""

    changes: dict[str, Any]
    rates: tuple[float, ...]
    steps: int = STEPS


ARMS = {
    "facts": Arm({}, (0.3, 1.0)),
    "learned": Arm(LEARNED, (3e-3, 1e-2)),
    "lora": Arm({**ONE_RANK, **NO_MEMORY}, (3e-3, 1e-2)),
    "both": Arm(
        {**LEARNED, **ONE_RANK, "adapter.width": 16, "adapter.lora_targets": ["q_proj"]}, (3e-3, 1e-2)
    ),
    "always_on": Arm({**LEARNED, "adapter.gate": "none"}, (3e-3, 1e-2)),
    "lora_8x": Arm(LORA_8X, (1e-3, 3e-3)),
    "lora_long": Arm(LORA_8X, (1e-3, 2e-3), 4 * STEPS),
}
UNTRAINED = ("base", "prompt", "knn")


def configured(arm: str) -> Config:
    """The configuration of a trained arm."""
    return override(load_config("adapter_smollm2"), ARMS[arm].changes)


def taught_pairs(facts: list[Fact]) -> list[Pair]:
    return [(prompt, fact.completion) for fact in facts for prompt in fact.prompts()]


def unseen_pairs(facts: list[Fact]) -> list[Pair]:
    return [(prompt, fact.completion) for fact in facts for prompt in fact.prompts(unseen=True)]


def recall_of(model: Any, tokenizer: Any, facts: list[Fact]) -> dict[str, float]:
    """Recall of facts in taught and in unseen phrasings."""
    return {
        "taught": recall(model, tokenizer, taught_pairs(facts)),
        "unseen": recall(model, tokenizer, unseen_pairs(facts)),
    }


def texts() -> dict[str, str]:
    """Text that has nothing to do with the facts, on every machine with Python: prose and code."""
    topics = itertools.islice(pydoc_data.topics.topics.values(), 5, 25)
    return {"prose": " ".join(topics)[3000:], "code": inspect.getsource(textwrap)}


@torch.inference_mode()
def unrelated_loss(model: Any, tokenizer: Any, text: str) -> float:
    """Mean loss per token on rows of a text."""
    ids = torch.tensor(tokenizer(text)["input_ids"][: TEXT_ROWS * TEXT_TOKENS]).view(TEXT_ROWS, TEXT_TOKENS)
    return float(model(ids, labels=ids).loss)


@torch.inference_mode()
def strangers(model: Any, base: Any, tokenizer: Any, facts: list[Fact]) -> float:
    """Of prompts about people who were not taught, the share that the base answers alike: 1 is untouched."""
    known = {fact.subject for fact in facts}
    others = [fact for fact in make_facts(832, 1) if fact.subject not in known][:100]
    pairs = [(fact.prompts()[i % 4], fact.completion) for i, fact in enumerate(others)]
    mine, _ = answer_logits(model, tokenizer, pairs)
    theirs, _ = answer_logits(base, tokenizer, pairs)
    return float((mine.argmax(-1) == theirs.argmax(-1)).float().mean())


def measure(model: Any, base: Any, tokenizer: Any, facts: list[Fact]) -> dict[str, float]:
    """Recall on taught and unseen prompts, loss on unrelated text, and what happened to strangers."""
    losses = {name: unrelated_loss(model, tokenizer, text) for name, text in texts().items()}
    return {
        **recall_of(model, tokenizer, facts),
        **losses,
        "strangers": strangers(model, base, tokenizer, facts),
    }


@dataclass
class Taught:
    """A taught adapter; places: of its facts in a fact memory, None for the other arms."""

    adapter: MemoryAdapter
    parameters: list[nn.Parameter]
    places: torch.Tensor | None


def teach_arm(arm: str, base: Any, tokenizer: Any, facts: list[Fact], rate: float, seed: int) -> Taught:
    """Build an arm's adapter around the base and teach it; `adapter.detach()` gives the base back."""
    changes = {"training.seed": seed, "training.max_steps": ARMS[arm].steps, "training.batch_size": 50}
    return teach_facts(override(configured(arm), changes), base, tokenizer, facts, rate)


def teach_facts(config: Config, base: Any, tokenizer: Any, facts: list[Fact], rate: float) -> Taught:
    """Build an adapter around the base and teach it, with the seed, steps and batch size of `training`.

    A fact memory is written first, and its values are trained; without one, everything that was added.
    """
    training = config.training
    torch.manual_seed(training.seed)
    adapter = MemoryAdapter(config, base)
    parameters, places = [p for p in adapter.parameters() if p.requires_grad], None
    if config.adapter.memory and "facts" in config.memory.kinds:
        places = write_facts(adapter, tokenizer, [(fact.prompts(), fact.subject) for fact in facts])
        parameters = [memory.values for memory in fact_memories(adapter)]
    pairs, steps = taught_pairs(facts), training.max_steps
    teach(adapter, parameters, tokenizer, pairs, steps, rate, training.batch_size, training.seed)
    return Taught(adapter, parameters, places)


def run_arm(arm: str, base: Any, tokenizer: Any, rate: float, seed: int) -> dict[str, Any]:
    """One run of a trained arm, measured."""
    facts = make_facts(COUNT, seed)
    start = time.process_time()
    taught = teach_arm(arm, base, tokenizer, facts, rate, seed)
    seconds = time.process_time() - start
    result = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "steps": ARMS[arm].steps,
        "parameters": sum(p.numel() for p in taught.parameters),
        "bytes": sum(t.numel() * t.element_size() for _, t in taught.adapter.added()),
        "cpu_seconds": round(seconds, 1),
    }
    alone = load_base(str(taught.adapter.config.adapter.base_model_name))[0]
    result |= measure(taught.adapter, alone, tokenizer, facts)
    taught.adapter.detach()
    return result


def run_untrained(arm: str, base: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """The base alone, with the fact in the prompt, or beside a kNN store."""
    facts = make_facts(COUNT, seed)
    start = time.process_time()
    model: Any = base
    result: dict[str, Any] = {"arm": arm, "seed": seed, "parameters": 0, "bytes": 0}
    if arm == "knn":
        model = NearestNeighbourLM(base)
        model.write(tokenizer, taught_pairs(facts))
        result["bytes"] = model.store.nbytes
    result["cpu_seconds"] = round(time.process_time() - start, 1)
    result |= measure(model, base, tokenizer, facts)
    if arm == "prompt":
        for name, make in (("taught", taught_pairs), ("unseen", unseen_pairs)):
            pairs = [(f"{fact.statement} {prompt}", a) for fact in facts for prompt, a in make([fact])]
            result[name] = recall(model, tokenizer, pairs)
    return result


def best_rate(results: list[dict[str, Any]], arm: str) -> float:
    """The rate with the best recall of taught prompts; within 0.01 of it, the lowest unrelated loss."""
    tried = [r for r in results if r["arm"] == arm and r["seed"] == 0]
    top = max(r["taught"] for r in tried)
    good = [r for r in tried if r["taught"] >= top - 0.01]
    return min(good, key=lambda r: r["prose"] + r["code"])["rate"]


def run_all(
    path: str | Path,
    arms: Sequence[str] = (*ARMS, *UNTRAINED),
    seeds: int = 3,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """All runs, in a file of results that is continued where it stops."""
    base, tokenizer = load_base(BASE)
    path = Path(path)
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []

    def run(arm: str, rate: float | None, seed: int) -> None:
        if any((r["arm"], r.get("rate"), r["seed"]) == (arm, rate, seed) for r in results):
            return
        if rate is None:
            results.append(run_untrained(arm, base, tokenizer, seed))
        else:
            results.append(run_arm(arm, base, tokenizer, rate, seed))
        write_text(path, json.dumps(results, indent=1) + "\n")
        log(json.dumps(results[-1]))

    trained = [arm for arm in ARMS if arm in arms]
    for arm in trained:
        for rate in ARMS[arm].rates:
            run(arm, rate, 0)
    for seed in range(seeds):
        for arm in UNTRAINED:
            if arm in arms:
                run(arm, None, seed)
        for arm in trained:
            run(arm, best_rate(results, arm), seed)
    return results


def to_table(results: list[dict[str, Any]]) -> str:
    """Results as a Markdown table: a row for each arm at its best rate, min–max over seeds.

    Losses are those on unrelated text minus the base's. Raises ValueError without the base's own results.
    """
    bases = {r["seed"]: r for r in results if r["arm"] == "base"}
    if not bases:
        raise ValueError("no results of the arm 'base', against which losses are compared: run it too")
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        rate = best_rate(results, arm) if arm in ARMS else None
        runs = [r for r in results if (r["arm"], r.get("rate")) == (arm, rate) and r["seed"] in bases]
        if not runs:
            continue
        changed = {text: [r[text] - bases[r["seed"]][text] for r in runs] for text in ("prose", "code")}
        sizes = [str(len(runs)), f"{runs[0]['parameters']:,}", f"{runs[0]['bytes']:,}"]
        spans = [[r[name] for r in runs] for name in ("taught", "unseen")]
        rows.append(
            [arm, "–" if rate is None else f"{rate:g}", *sizes]
            + [span([r["cpu_seconds"] for r in runs], ".0f"), *(span(values, ".2f") for values in spans)]
            + [span(values, "+.3f") for values in changed.values()]
            + [span([r["strangers"] for r in runs], ".2f")]
        )
    head = ["arm", "rate", "seeds", "parameters", "bytes", "CPU-s", "taught", "unseen"]
    return markdown([*head, "prose loss", "code loss", "strangers"], rows)


def check_base(config: Config) -> None:
    """Raise ConfigError for another base than that of the compared configurations."""
    if config.adapter.base_model_name != BASE:
        raise ConfigError(
            f"adapter.base_model_name = {config.adapter.base_model_name!r}: training_mode comparison is of "
            f"configurations for {BASE}; name that, or teach with training_mode: facts"
        )


def teach_run(config: Config, folder: Path, download: bool = False) -> dict[str, float]:
    """Teach as `training_mode: facts` asks; writes `adapter/` and `taught.json`, returns recall.

    memory.facts.num_facts facts with a fact memory, else COUNT. The rate is memory_lr, or lora_lr where no
    memory is added. Raises FileExistsError if the folder already holds an adapter.
    """
    if (folder / ADAPTER).exists():
        raise FileExistsError(f"{folder} already holds a taught adapter: choose another folder")
    training = config.training
    if training.device != "cpu":
        raise ConfigError(f"training.device = {training.device!r}: facts are taught on the CPU; set cpu")
    torch.set_num_threads(training.num_threads)
    base, tokenizer = load_with_tokenizer(config, download)
    written = config.adapter.memory and "facts" in config.memory.kinds
    facts = make_facts(config.memory.facts.num_facts if written else COUNT, training.seed)
    rate = training.memory_lr if config.adapter.memory else training.lora_lr
    start = time.process_time()
    adapter = teach_facts(config, base, tokenizer, facts, rate).adapter
    seconds = time.process_time() - start
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    known = [{"statement": f.statement, "prompts": f.prompts(), "answer": f.answer} for f in facts]
    write_text(folder / "taught.json", json.dumps(known, indent=1) + "\n")
    adapter.save_pretrained(folder / ADAPTER)
    scores = recall_of(adapter, tokenizer, facts)
    return {"facts": len(facts), "steps": training.max_steps, "cpu_seconds": seconds, **scores}


def edit(
    arm: str, rate: float, count: int = 20, steps: int = 20, taught: Taught | None = None
) -> dict[str, Any]:
    """Teach, then replace some facts and delete others: what do the rest lose? Recall of each group.

    Facts: the values of the replaced are trained anew, the deleted are forgotten by one call. LoRA: the
    replaced are trained with their new answers, the deleted towards what the base says. taught: by
    `teach_arm` with seed 0; None teaches first.
    """
    base, tokenizer = load_base(BASE)
    facts = make_facts(COUNT, 0)
    taught = taught or teach_arm(arm, base, tokenizer, facts, rate, 0)
    draw = random.Random(0)
    chosen = draw.sample(range(COUNT), 2 * count)
    replaced, deleted = chosen[:count], chosen[count:]
    kept = [fact for i, fact in enumerate(facts) if i not in chosen]
    new = [Fact(facts[i].subject, facts[i].relation, other_answer(facts[i], draw)) for i in replaced]
    gone = [facts[i] for i in deleted]
    report: dict[str, Any] = {"arm": arm, "rate": rate, "before": recall_of(taught.adapter, tokenizer, kept)}
    start = time.process_time()
    if taught.places is None:
        alone = load_base(BASE)[0]
        untaught = [(prompt, said(alone, tokenizer, prompt)) for fact in gone for prompt in fact.prompts()]
        teach(taught.adapter, taught.parameters, tokenizer, taught_pairs(new) + untaught, steps, rate / 2)
    else:
        rewrite(taught, tokenizer, replaced, deleted, new, steps, rate)
    report |= {
        "cpu_seconds": round(time.process_time() - start, 1),
        "kept": recall_of(taught.adapter, tokenizer, kept),
        "replaced": recall_of(taught.adapter, tokenizer, new),
        "deleted": recall_of(taught.adapter, tokenizer, gone),
    }
    taught.adapter.detach()
    return report


def rewrite(
    taught: Taught,
    tokenizer: Any,
    replaced: list[int],
    deleted: list[int],
    new: list[Fact],
    steps: int,
    rate: float,
) -> None:
    """Forget some facts and train the values of others anew; all other values stay bit for bit."""
    assert taught.places is not None
    memories = fact_memories(taught.adapter)
    for memory in memories:
        memory.forget_facts(taught.places[deleted])
    before = [memory.values.detach().clone() for memory in memories]
    teach(taught.adapter, taught.parameters, tokenizer, taught_pairs(new), steps, rate)
    for memory, values in zip(memories, before, strict=True):  # near keys train a little of each other
        others = torch.ones(len(values), dtype=torch.bool)
        others[taught.places[replaced]] = False
        with torch.no_grad():
            memory.values[others] = values[others]


def other_answer(fact: Fact, draw: random.Random) -> str:
    """Another answer of the same relation."""
    return draw.choice([word for word in RELATIONS[fact.relation].answers if word != fact.answer])


@torch.inference_mode()
def said(base: Any, tokenizer: Any, prompt: str) -> str:
    """What the base says next."""
    logits, _ = answer_logits(base, tokenizer, [(prompt, " x")])
    return tokenizer.decode(logits[0].argmax())
