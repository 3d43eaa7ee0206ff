"""A pretrained model with a short window: does a memory bring back what was said before the window?

    base      all tokens, with the base's own attention and cache       (needs a cache that grows)
    window    the newest 256 tokens alone
    external  the window, and key-value pairs of all tokens before it
    internal  the window, and slots of a fixed size

The text is the prose of Python's own documentation. Sentences such as "The access code of the red tiger is
apple." stand in some windows, and the last window says them again. An arm is measured at the answers (loss,
and how many come first of the whole vocabulary) and at the ordinary tokens (loss).

The base is frozen. Two things make 64 training streams enough, and `external_plain` lacks both:

- **A start that copies** (`start_copying`). W_down is the whitening of the layer's residual stream, and W_up
  the least-squares map from there to the output embedding of the token itself.
- **A retrieval loss** beside the language model's: -log of the share of a read that comes from stored tokens
  equal to the answer, as in pointer networks (Merity et al. 2016, arXiv 1609.07843).

Axes: b batch, t tokens of a window, n stored tokens, q questions, s slots of all books, d hidden of the base,
w width of the branch, v vocabulary.
"""

from __future__ import annotations

import copy
import json
import pydoc_data.topics
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import Config, load_config, override
from memlib.evaluation.table import markdown, span
from memlib.files import write_text
from memlib.memory.external.memory import ExternalMemory
from memlib.memory.gates import gates_of_pairs
from memlib.memory.internal import AddressedWrite, InternalMemory
from memlib.ops import token_shift
from memlib.pretrained.adapter import MemoryAdapter
from memlib.pretrained.branch import MemoryBranch
from memlib.pretrained.families import decoder_layers
from memlib.pretrained.weights import load_base

ADJECTIVES = (
    "red blue green old young small large quiet loud brave calm happy lonely gentle clever silver golden "
    "wooden ancient modern hidden frozen broken famous dark bright heavy tall short round sharp warm cold "
    "dry wet proud rich poor strange simple"
)
NOUNS = (
    "tiger castle river garden bridge tower engine mirror lantern pirate doctor farmer dragon wolf eagle "
    "rabbit sailor hunter baker temple harbor valley mountain forest island village market museum hotel "
    "library train ship robot clock statue painter teacher soldier poet turtle horse camel lion bear fox "
    "deer goat sheep monkey elephant whale shark dolphin spider bee ant king queen prince knight monk judge "
    "lawyer nurse pilot driver singer dancer writer miner chef tailor guard thief cave beach desert lake "
    "road street station airport factory school church palace prison theater farm cabin tent truck bus "
    "bicycle boat rocket camera radio piano table chair lamp door window basket bottle hammer sword shield "
    "crown ring coin box"
)
ANSWERS = (
    "apple banana lemon cherry coffee sugar butter honey pepper salt bread cheese chicken fish rice soup "
    "wine milk water gold iron copper steel glass paper cotton silk wool leather stone wood sand snow "
    "rain wind storm thunder fire ice Monday Friday Sunday January April October Paris London Berlin Rome "
    "Madrid Tokyo Vienna Prague Dublin Athens Moscow Cairo Delhi Boston Chicago Lima one two three four "
    "five six seven eight nine ten twelve twenty hundred thousand guitar violin drum flute trumpet "
    "football tennis chess hockey golf purple yellow pink black white brown gray orange potato tomato "
    "onion garlic carrot bean corn wheat nut grape peach pear plum mango lime olive tea juice beer cake "
    "pie candy chocolate cream egg meat beef pork turkey duck sun moon star planet comet cloud fog ocean "
    "hill north south east west spring summer autumn winter morning evening noon midnight circle square "
    "triangle cube diamond pearl ruby jade amber marble brick clay coal oil"
)

STEPS, START_STREAMS, GAIN = 64, 24, 1.5
TRAINING = {1: 8, 2: 8}  # facts by their distance in windows
DISTANCES, FACTS, ASKS, TEST_STREAMS = (1, 2, 4, 8, 16), 9, 3, 4
TEST_TEXT = 0.2  # the last part of the prose


@dataclass(frozen=True)
class Arm:
    """changes of the preset `adapter_long_context`, None for the base itself; rate: AdamW's, 0 trains
    nothing; helped: with the start that copies and the retrieval loss."""

    changes: dict[str, Any] | None
    rate: float = 0.0
    helped: bool = False


ARMS = {
    "base": Arm(None),
    "window": Arm({"memory.kinds": []}),
    "external": Arm({}, 2e-3, True),
    "internal": Arm({"memory.kinds": ["internal"]}, 3e-3, True),
    "external_plain": Arm({"adapter.gate_init": 0.0}, 3e-3),
}


def configured(arm: str) -> Config:
    """The configuration of an arm with an adapter."""
    return override(load_config("adapter_long_context"), ARMS[arm].changes or {})


# ------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True)
class Question:
    """place: of the answer in its window; distance: windows between the fact and it; seen: in training."""

    place: int
    answer: int
    distance: int
    seen: bool


@dataclass(frozen=True)
class Window:
    """ids: [t]; ordinary: [t], which are prose; questions: those asked here."""

    ids: Tensor
    ordinary: Tensor
    questions: list[Question]


@dataclass(frozen=True)
class Stream:
    """windows: what is read in order; asks: last windows, each of them read right after `windows`."""

    windows: list[Window]
    asks: list[Window]


class Material:
    """Prose and words of one token, each in a part for training and a part for testing.

    tokenizer: any whose calls give `input_ids` and that decodes single ids. Facts of the two parts share
    adjectives but no noun; of a test's answers about one in two is new.
    """

    def __init__(self, tokenizer: Any, text: str) -> None:
        self.tokenizer = tokenizer
        prose = self.encode(text)
        cut = round(len(prose) * (1 - TEST_TEXT))
        self.prose = {False: prose[:cut], True: prose[cut:]}
        self.breaks = {id_ for id_ in set(prose) if tokenizer.decode([id_])[:1].isspace()}
        self.adjectives = self.single(ADJECTIVES)
        nouns = [word for word in self.single(NOUNS) if word not in self.adjectives]
        answers = [word for word in self.single(ANSWERS) if word not in nouns + self.adjectives]
        self.nouns = {False: [n for i, n in enumerate(nouns) if i % 4], True: nouns[::4]}
        self.answers = {False: [a for i, a in enumerate(answers) if i % 5], True: answers[::5]}

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def single(self, words: str) -> list[str]:
        """The words that are one token after a space."""
        return [word for word in words.split() if len(self.encode(f" {word}")) == 1]

    def stream(
        self, draw: random.Random, facts: Mapping[int, int], asks: int, length: int, test: bool
    ) -> Stream:
        """A stream of max(facts) windows of `length` tokens, and `asks` last windows that ask all facts.

        facts: how many by their distance in windows from the last one.
        """
        distances = [distance for distance, count in facts.items() for _ in range(count)]
        total = len(distances)
        pairs = [(adjective, noun) for adjective in self.adjectives for noun in self.nouns[test]]
        subjects = draw.sample(pairs, total)
        answers = draw.sample(self.answers[False], total)
        if test:
            new = draw.sample(self.answers[True], min(total // 2, len(self.answers[True])))
            answers[: len(new)] = new
            draw.shuffle(answers)
        sentences = [
            self.encode(f" The access code of the {adjective} {noun} is") + self.encode(f" {answer}")
            for (adjective, noun), answer in zip(subjects, answers, strict=True)
        ]
        known = set(self.answers[False])
        chosen = [
            [i for i in range(total) if distances[i] == distance] for distance in range(max(facts), 0, -1)
        ]
        order = draw.sample(range(total), total)

        def window(here: list[int], asked: bool) -> Window:
            ids, ordinary, places = self.mixed(draw, [sentences[i] for i in here], length, test)
            questions = [
                Question(place, sentences[i][-1], distances[i], answers[i] in known)
                for i, place in zip(here, places, strict=True)
            ]
            return Window(ids, ordinary, questions if asked else [])

        return Stream(
            [window(here, False) for here in chosen],
            [window(order[i::asks], True) for i in range(asks)],
        )

    def mixed(
        self, draw: random.Random, sentences: list[list[int]], length: int, test: bool
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Prose with sentences between its words: ids, which are prose: [t]; and where each sentence ends.

        Raises ValueError if the sentences do not fit.
        """
        stop = self.encode(".")
        room = length - sum(len(sentence) + len(stop) for sentence in sentences)
        if room < 0:
            raise ValueError(
                f"{len(sentences)} sentences take {length - room} tokens of a window of {length}"
            )
        prose = self.prose[test]
        first = draw.randrange(len(prose) - room + 1)
        part = prose[first : first + room]
        cuts = [i for i, id_ in enumerate(part) if id_ in self.breaks] + [room]
        ids: list[int] = []
        ordinary: list[bool] = []
        places: list[int] = []
        start = 0
        for cut, sentence in zip(sorted(draw.choices(cuts, k=len(sentences))), sentences, strict=True):
            ids += part[start:cut] + sentence
            places.append(len(ids) - 1)
            ids += stop
            ordinary += [True] * (cut - start) + [False] * (len(sentence) + len(stop))
            start = cut
        ids += part[start:]
        ordinary += [True] * (room - start)
        return torch.tensor(ids), torch.tensor(ordinary), places


def prose() -> str:
    """Text on every machine with Python: its documentation's topics."""
    return " ".join(pydoc_data.topics.topics.values())


# ------------------------------------------------------------------------------------- a start that copies


@torch.no_grad()
def residuals(base: Any, layer: int, windows: Sequence[Tensor]) -> Tensor:
    """The residual stream after a layer, each window read alone: [n d]."""
    found: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    handle = decoder_layers(base)[layer].register_forward_hook(keep)
    for ids in windows:
        base.get_decoder()(rearrange(ids, "t -> 1 t"), use_cache=False)
    handle.remove()
    return rearrange(torch.cat(found), "b t d -> (b t) d")


@torch.no_grad()
def start_copying(branch: MemoryBranch, embedding: Tensor, stream: Tensor, ids: Tensor, gain: float) -> None:
    """Start a branch so that a retrieved token makes itself more probable.

    W_down: the w largest principal directions of the stream at unit variance. Values and the memory's own
    output: the identity. W_up: ridge regression from norm(x W_down) to the token's output embedding, less
    the mean embedding, every id with the same total weight; its output's median RMS is `gain`.

    embedding: [v d]; stream: [n d], ids: [n] of ordinary text. Tokens of more than 5 times the median norm,
    the attention sinks, are left out.
    """
    width = branch.norm.weight.shape[0]
    norms = stream.norm(dim=-1)
    keep = norms < 5 * norms.median()
    stream, ids = stream[keep], ids[keep]
    sizes, directions = torch.linalg.eigh((stream.T @ stream / len(stream)).double())
    down = (directions[:, -width:] * sizes[-width:] ** -0.5).T.to(stream.dtype)
    cast(nn.Linear, branch.down_proj).weight.copy_(down)
    seen = branch.norm(stream @ down.T)
    weight = rearrange(1 / torch.bincount(ids)[ids], "n -> n 1")
    wanted = embedding[ids] - embedding[ids.unique()].mean(0)
    ridge = 10 * weight.mean() * torch.eye(width)
    up = torch.linalg.solve(seen.T @ (seen * weight) + ridge, seen.T @ (wanted * weight))
    up *= gain / (seen @ up).pow(2).mean(-1).sqrt().median()
    cast(nn.Linear, branch.up_proj[0]).weight.copy_(up.T)
    memory: Any = branch.memories.memory_list[0]
    slots = isinstance(memory, InternalMemory)
    value, output = (memory.writer.v_proj, memory.reader.o_proj) if slots else (memory.v_proj, memory.o_proj)
    nn.init.eye_(value.weight).mul_(0.5 if slots else 1.0)  # tanh is nearly linear there
    nn.init.eye_(output.weight)


# -------------------------------------------------------------------------------------------- the training


def shares(memory: Any, stored: Sequence[Tensor], asking: Tensor) -> Tensor:
    """How much of each read comes from each stored token, before eviction and erasure: [q n].

    stored: the branch's stream of each past window, [1 t w]; asking: [q w].
    """
    if isinstance(memory, ExternalMemory):
        keys = memory.address(memory.key_address, token_shift(torch.cat(list(stored), 1), memory.shift))
        queries = memory.address(memory.query_address, rearrange(asking, "q w -> 1 q w"))
        score = einsum(memory.sharpness, queries, keys, "h, b h q k, b h n k -> b h q n")
        return torch.softmax(score, -1).mean((0, 1))
    writer: AddressedWrite = memory.writer
    past = torch.cat(list(stored))
    opened = torch.sigmoid(gates_of_pairs(past, (writer.input_gate,))[0])
    written = rearrange(writer.address(token_shift(past, writer.shift)) * opened, "b t s -> (b t) s")
    read = writer.address(rearrange(asking, "q w -> 1 q w"))[0]
    overlap = read @ written.T
    return overlap / overlap.sum(-1, keepdim=True).clamp(min=1e-6)


class Streams:
    """Record a branch's stream, norm(x W_down), of every call: [1 t w] each."""

    def __init__(self, adapter: MemoryAdapter) -> None:
        self.branch = adapter.branch(next(iter(adapter.stack.layers)))
        self.memory = self.branch.memories.memory_list[0]
        self.found: list[Tensor] = []
        self.handle = self.branch.norm.register_forward_hook(lambda _m, _a, out: self.found.append(out))

    def shares(self, past: int, window: Window) -> Tensor:
        """The share of each question's read by stored token: [q n]; past: the number of windows before."""
        before = torch.tensor([question.place - 1 for question in window.questions])
        return shares(self.memory, self.found[:past], self.found[-1][0, before])

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def answers_of(window: Window) -> tuple[Tensor, Tensor]:
    """The places of a window's answers, and the answers: [q], [q]."""
    places = torch.tensor([question.place for question in window.questions])
    return places, window.ids[places]


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss of each token from the second on; logits: [t v], ids: [t] -> [t-1]."""
    return F.cross_entropy(logits[:-1], ids[1:], reduction="none")


def train(
    adapter: MemoryAdapter,
    streams: Sequence[Stream],
    rate: float,
    retrieval: bool,
    log: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """One step for each stream: AdamW on the answers' loss, the ordinary tokens', and the retrieval loss."""
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))
    steps = len(streams)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 5, 1 - i / steps))
    history: list[dict[str, float]] = []
    adapter.train()
    for stream in streams:
        ask = stream.asks[0]
        places, answers = answers_of(ask)
        past = torch.cat([window.ids for window in stream.windows])
        with Streams(adapter) as seen:
            state = adapter(rearrange(past, "t -> 1 t")).memory_state
            logits = adapter(rearrange(ask.ids, "t -> 1 t"), memory_state=state).logits[0]
            share = seen.shares(len(stream.windows), ask)
        losses = token_losses(logits, ask.ids)
        parts = {"answer": losses[places - 1].mean(), "ordinary": losses[ask.ordinary[1:]].mean()}
        right = logits[places - 1].argmax(-1) == answers
        if retrieval:
            equal = rearrange(answers, "q -> q 1") == past
            parts["retrieval"] = -(share * equal).sum(-1).clamp(min=1e-6).log().mean()
        optimizer.zero_grad()
        torch.stack(list(parts.values())).sum().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        history.append(
            {name: part.item() for name, part in parts.items()} | {"right": right.float().mean().item()}
        )
        if len(history) % 16 == 0:
            newest = history[-16:]
            log(f"step {len(history)}: {mean_of(newest)}")
    adapter.eval()
    return history


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over rows."""
    return {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}


# ------------------------------------------------------------------------------------------- the measuring


def read(model: Any, ids: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Read a window after a state, None at the start: logits [t v], and the state after it.

    An adapter's state is its own; the base's is its cache, which is changed in place.
    """
    ids = rearrange(ids, "t -> 1 t")
    if isinstance(model, MemoryAdapter):
        output = model(ids, memory_state=state)
        return output.logits[0], output.memory_state
    output = model(ids, past_key_values=state, use_cache=True)
    return output.logits[0], output.past_key_values


@torch.inference_mode()
def measure(model: Any, streams: Sequence[Stream]) -> dict[str, Any]:
    """Loss and accuracy of the answers by distance and by whether training has seen the answer; the loss of
    ordinary tokens; and CPU seconds for each thousand tokens of the windows before the last.

    An answer is right if it is the most probable of the whole vocabulary.
    """
    asked: list[tuple[Question, float, bool]] = []
    ordinary: list[Tensor] = []
    seconds, tokens = 0.0, 0
    for stream in streams:
        state: Any = None
        for window in stream.windows:
            start = time.process_time()
            logits, state = read(model, window.ids, state)
            seconds, tokens = seconds + time.process_time() - start, tokens + len(window.ids)
            ordinary.append(token_losses(logits, window.ids)[window.ordinary[1:]])
        for ask in stream.asks:
            logits, _ = read(model, ask.ids, copy.deepcopy(state))
            losses, best = token_losses(logits, ask.ids), logits.argmax(-1)
            ordinary.append(losses[ask.ordinary[1:]])
            asked += [
                (q, float(losses[q.place - 1]), int(best[q.place - 1]) == q.answer) for q in ask.questions
            ]

    def over(some: list[tuple[Question, float, bool]]) -> dict[str, float]:
        return {
            "loss": round(sum(loss for _, loss, _ in some) / len(some), 4),
            "accuracy": round(sum(right for _, _, right in some) / len(some), 4),
            "questions": len(some),
        }

    distances = sorted({q.distance for q, _, _ in asked})
    return {
        "all": over(asked),
        "by_distance": {d: over([row for row in asked if row[0].distance == d]) for d in distances},
        "by_seen": {
            name: over([row for row in asked if row[0].seen == seen])
            for name, seen in (("seen", True), ("new", False))
            if any(row[0].seen == seen for row in asked)
        },
        "ordinary": round(float(torch.cat(ordinary).mean()), 4),
        "cpu_seconds_per_1000_tokens": round(1000 * seconds / tokens, 3),
    }


@torch.inference_mode()
def found(adapter: MemoryAdapter, streams: Sequence[Stream]) -> float:
    """The share of questions whose largest share of the read is a stored token equal to the answer."""
    hits: list[bool] = []
    for stream in streams:
        past = torch.cat([window.ids for window in stream.windows])
        with Streams(adapter) as seen:
            state = adapter(rearrange(past, "t -> 1 t")).memory_state
            for ask in stream.asks:
                adapter(rearrange(ask.ids, "t -> 1 t"), memory_state=state)
                best = seen.shares(len(stream.windows), ask).argmax(-1)
                hits += (past[best] == answers_of(ask)[1]).tolist()
    return round(sum(hits) / len(hits), 4)


def cache_bytes(base: Any, tokens: int) -> int:
    """Bytes of the base's keys and values of so many tokens."""
    config = base.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * width * tokens * base.dtype.itemsize


# ---------------------------------------------------------------------------------------------- the results


def run_arm(
    arm: str, base: Any, material: Material, seed: int, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Build, train and measure one arm; the base is given back as it was."""
    options, config = ARMS[arm], configured(arm)
    length = config.model.segment_length
    tests = random.Random(f"test {seed}")
    held_out = [
        material.stream(tests, dict.fromkeys(DISTANCES, FACTS), ASKS, length, True)
        for _ in range(TEST_STREAMS)
    ]
    result: dict[str, Any] = {"arm": arm, "seed": seed}
    if options.changes is None:
        window = (max(DISTANCES) + 1) * length
        sizes = {"parameters": 0, "memory_bytes": 0, "cache_bytes": cache_bytes(base, window)}
        return result | sizes | measure(base, held_out)
    draw, start = random.Random(f"training {seed}"), time.process_time()
    torch.manual_seed(seed)
    streams = (
        [material.stream(draw, TRAINING, 1, length, False) for _ in range(STEPS)] if options.rate else []
    )
    adapter = MemoryAdapter(config, base)
    if options.helped:
        layer = next(iter(adapter.stack.layers))
        windows = [window.ids for one in streams[:START_STREAMS] for window in one.windows]
        collected, embedding = residuals(base, layer, windows), base.get_output_embeddings().weight
        start_copying(adapter.branch(layer), embedding, collected, torch.cat(windows), GAIN)
    if options.rate:
        result |= {"steps": STEPS, "rate": options.rate}
        history = train(adapter, streams, options.rate, options.helped, log)
        result["training"] = [mean_of(history[i : i + 16]) for i in range(0, STEPS, 16)]
        result["training_cpu_seconds"] = round(time.process_time() - start, 1)
    adapter.eval()
    result |= {
        "parameters": sum(p.numel() for p in adapter.branches.parameters()),
        "memory_bytes": sum(state.nbytes for state in adapter.init_state(1).memories),
        "cache_bytes": cache_bytes(base, length),
    } | measure(adapter, held_out)
    if options.helped:
        result["found"] = found(adapter, held_out[:1])
    adapter.detach()
    return result


def run_all(
    path: str | Path,
    arms: Sequence[str] = tuple(ARMS),
    seeds: Sequence[int] = (0,),
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """All runs, in a file of results that is continued where it stops."""
    path = Path(path)
    results: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    done = {(row["arm"], row["seed"]) for row in results}
    missing = [(arm, seed) for seed in seeds for arm in arms if (arm, seed) not in done]
    if missing:
        base, tokenizer = load_base("smollm2-135m-instruct")
        material = Material(tokenizer, prose())
    for arm, seed in missing:
        results.append(run_arm(arm, base, material, seed, log))
        write_text(path, json.dumps(results, indent=1) + "\n")
        log(json.dumps(results[-1]))
    return cast(list[dict[str, Any]], json.loads(path.read_text()))


def to_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Results as a Markdown table: a row for each arm, min–max over seeds."""
    rows = []
    for arm in dict.fromkeys(r["arm"] for r in results):
        runs = [r for r in results if r["arm"] == arm]
        sizes = [str(len(runs)), *(f"{runs[0][f'{what}_bytes'] / 1e6:.2f}" for what in ("memory", "cache"))]
        near = [[r["by_distance"][str(d)]["accuracy"] for r in runs] for d in DISTANCES]
        losses = [[r["all"]["loss"] for r in runs], [r["ordinary"] for r in runs]]
        rows.append(
            [arm, *sizes, *(span(values, ".2f") for values in (*near, *losses))]
            + [span([r["cpu_seconds_per_1000_tokens"] for r in runs], ".1f")]
        )
    head = ["arm", "seeds", "memory MB", "cache MB", *(f"right at {d}" for d in DISTANCES)]
    return markdown([*head, "answer loss", "prose loss", "CPU-s/1000 tokens"], rows)
