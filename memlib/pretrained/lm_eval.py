"""Adapters, and memlib's own models, in EleutherAI's lm-evaluation-harness.

    from lm_eval import simple_evaluate
    results = simple_evaluate(AdapterLM(adapter, tokenizer), tasks=["hellaswag"])

A request is a stream of its own: it starts without memories, and its log-likelihood does not depend on the
other rows of its batch. Rows are padded on the right, where padding moves no border of a segment; a long
document is fed in pieces, and the memories carry it on.

Needs the evaluation extra (`make evaluation`).

Axes: b requests of a batch, t tokens, n tokens of a piece, v vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlib.inference.generate import GenerationConfig, TokenStream
from memlib.inference.sampling import seeded
from memlib.models.eval_mode import eval_mode
from memlib.models.protocol import RecurrentModel

try:
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
except ModuleNotFoundError as error:
    remedy = f"{error.name} is not installed; `make evaluation` installs it"
    raise ImportError(remedy, name=error.name) from error

PIECE = 512  # tokens of a forward pass
OPTIONS = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks"}

Scored = tuple[float, bool]


class Request(NamedTuple):
    """Token ids of a context and of what follows it; key: the texts, for lm-eval's cache of results."""

    key: tuple[str, str] | None
    context: list[int]
    continuation: list[int]


class AdapterLM(TemplateLM):
    """A model for lm-eval's `simple_evaluate` and `evaluate`.

    tokenizer: of transformers. max_length: tokens of a request that are read, the last ones; None: all, or
    as many as the base has positions for if it attends to all it has seen (mode full).
    Raises ValueError for a tokenizer without an end token, which stands before texts that have no other.
    """

    def __init__(
        self,
        model: RecurrentModel,
        tokenizer: Any,
        batch_size: int = 8,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos_token: set tokenizer.eos_token to the end of a text")
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_gen_toks, self.seed = batch_size, max_gen_toks, seed
        base = getattr(model, "base", None)
        if max_length is None and base is not None and model.config.adapter.mode == "full":
            max_length = getattr(base.config, "max_position_embeddings", None)
        self.max_length = max_length
        self._device = model.device

    # ------------------------------------------------------------------------------------- the tokenizer

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before the first token of a text."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text; None: with the tokenizer's special tokens unless the text begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's template writes it."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # ----------------------------------------------------------------------------------- log-likelihoods

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[Scored]:
        """(log-likelihood of the continuation, whether each of its tokens is the most probable one)."""
        found: dict[int, Scored] = {}
        rows = [Request(*request) for request in requests]
        by_length = sorted(range(len(rows)), key=lambda i: -len(rows[i].context) - len(rows[i].continuation))
        for numbers in batches(by_length, self.batch_size):
            for number, scored in zip(numbers, self.score([rows[i] for i in numbers]), strict=True):
                found[number] = scored
                if (key := rows[number].key) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, scored)
        return [found[number] for number in range(len(rows))]

    @torch.no_grad()
    def score(self, rows: Sequence[Request]) -> list[Scored]:
        """The scores of one batch."""
        streams = [self.truncated(row.context + row.continuation, 1) for row in rows]
        longest = max(map(len, streams)) - 1
        inputs, targets = (torch.zeros(len(rows), longest, dtype=torch.int64) for _ in range(2))
        real, counts = (torch.zeros(len(rows), longest, dtype=torch.bool) for _ in range(2))
        for i, (row, stream) in enumerate(zip(rows, streams, strict=True)):
            length = len(stream) - 1
            inputs[i, :length], targets[i, :length] = torch.tensor(stream[:-1]), torch.tensor(stream[1:])
            real[i, :length] = True
            counts[i, max(0, length - len(row.continuation)) : length] = True
        total = torch.zeros(len(rows), dtype=torch.float64)
        greedy = torch.ones(len(rows), dtype=torch.bool)
        state = None
        with eval_mode(self.model):
            for ids, next_ids, mask, counted in zip(
                *(tensor.split(PIECE, 1) for tensor in (inputs, targets, real, counts)), strict=True
            ):
                output = self.model(
                    ids.to(self.device),
                    None if bool(real.all()) else mask.to(self.device, torch.int64),
                    memory_state=state,
                )
                state = output.memory_state
                value, best = log_probabilities(output.logits, next_ids.to(self.device))
                total += (value.cpu().double() * counted).sum(1)
                greedy &= (best.cpu() | ~counted).all(1)
        return list(zip(total.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts: each is one stream, or lm-eval's windows with a max_length."""
        windows: list[tuple[int, Request]] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            ids = self.tok_encode(text)
            pairs = [([self.prefix_token_id], ids)] if ids else []
            if self.max_length is not None:
                rolled = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
                pairs = [utils.make_disjoint_window(pair) for pair in rolled]
            windows += [(number, Request(None, *pair)) for pair in pairs]
        totals = [0.0] * len(requests)
        for (number, _), (value, _) in zip(
            windows, self._loglikelihood_tokens([request for _, request in windows]), strict=True
        ):
            totals[number] += value
        for request, value in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return totals

    def truncated(self, ids: list[int], more: int) -> list[int]:
        """The last ids, as many as max_length allows, and `more` that are not read."""
        return ids if self.max_length is None else ids[-(self.max_length + more) :]

    # ------------------------------------------------------------------------------------------ generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to a stop text, greedy unless a task asks for samples; each row as if alone."""
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        for numbers in by_options.values():
            for chosen in batches(numbers, self.batch_size):
                batch = [requests[number].args for number in chosen]
                for number, args, text in zip(chosen, batch, self.generate(batch), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", args, text)
        return [texts[number] for number in range(len(requests))]

    def generate(self, batch: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
        """The texts of some contexts with the same options."""
        options = normalize_gen_kwargs(batch[0][1], self.max_gen_toks)
        if unknown := sorted(options.keys() - OPTIONS):
            raise ValueError(f"generation option {unknown[0]!r}: known are {', '.join(sorted(OPTIONS))}")
        until = options["until"]
        room = options["max_gen_toks"]
        if self.max_length is not None and room >= self.max_length:
            raise ValueError(
                f"max_gen_toks = {room} leaves no room for a prompt: max_length = {self.max_length}; "
                "generate fewer tokens or raise max_length"
            )
        prompts = [self.truncated(self.tok_encode(context), -room) for context, _ in batch]
        temperature = options.get("temperature", 1.0 if options.get("do_sample") else 0.0)
        config = GenerationConfig(
            max_new_tokens=room,
            temperature=temperature,
            top_k=options.get("top_k") if temperature else None,
            top_p=options.get("top_p") if temperature else None,
            stop_tokens=(self.eot_token_id,),
        )
        generators = [seeded(self.seed, context) for context, _ in batch]
        tokens = TokenStream(self.model, prompts, None, config, generators)
        ended: set[int] = set()
        for row, _, _ in tokens:
            if any(stop in self.text(tokens, row) for stop in until):
                ended.add(row)
            if len(ended) == len(batch):
                break
        return [cut(self.text(tokens, row), until) for row in range(len(batch))]

    def text(self, tokens: TokenStream, row: int) -> str:
        """A row's text so far, without its end token."""
        ids = tokens.tokens[row]
        return str(self.tokenizer.decode(ids[:-1] if tokens.stopped[row] else ids, skip_special_tokens=True))


def batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Numbers in groups of a size, the last one smaller."""
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def log_probabilities(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of each id [b n] under logits [b n v]: its log-probability, and whether it is the most probable."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return wide.gather(-1, ids[..., None])[..., 0], wide.argmax(-1) == ids


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of its stop texts."""
    return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]
