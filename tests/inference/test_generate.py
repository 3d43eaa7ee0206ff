"""Generation: cached is uncached, a batch is its rows alone, and a row's memory is that of its own tokens."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from memlib.inference import GenerationConfig, TokenStream, generate, stream
from memlib.inference.generate import drained
from memlib.inference.sampling import seeded
from memlib.memory import MEMORIES
from memlib.models.eval_mode import eval_mode
from memlib.models.stores import attach_stores
from tests.laws.cases import BASELINE, SEGMENT, VOCAB, Case, stir, variants
from tests.laws.laws import same, same_state

LENGTHS = [1, SEGMENT - 1, 2 * SEGMENT + 1, 3 * SEGMENT]  # inside a segment, over borders, and on one
T = max(LENGTHS)


def one_of(kind: str, sharing: str = "per_layer", **options) -> Case:
    return Case(f"{kind}-{sharing}", {"memory_sharing": sharing}, {kind: variants(kind)[0] | options})


CASES = [
    BASELINE,
    *(one_of(kind) for kind in MEMORIES),
    one_of("internal", "shared"),
    Case("all", {}, {kind: variants(kind)[0] for kind in MEMORIES}),
]


def prompts(lengths=LENGTHS, seed=0):
    """Rows of these lengths, padded on the left: ids [b t], mask [b t]."""
    t = max(lengths)
    ids = torch.randint(VOCAB, (len(lengths), t), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(t) >= t - length for length in lengths])
    return ids * mask, mask.long()


def alone(model, ids, mask, row, **options):
    return generate(model, ids[row : row + 1, mask[row].bool()], **options)


@torch.no_grad()
def greedy_loop(model, prompt, count, stop=()):
    """The plain definition: the whole stream through the model for every token."""
    tokens = []
    while len(tokens) < count and not (tokens and tokens[-1] in stop):
        logits = model(torch.tensor([[*prompt, *tokens]])).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens, model(torch.tensor([[*prompt, *tokens]])).memory_state


def stops_for(model, ids, mask, count):
    """A token that some rows say early, and others never or late."""
    said = [alone(model, ids, mask, row, max_new_tokens=count).row(0) for row in range(len(ids))]
    return said[0][2 % len(said[0])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_of_a_padded_batch_are_each_what_the_plain_loop_says(case):
    """Tokens, lengths and memory, with rows of four lengths that stop at different times."""
    model = case.build()
    ids, mask = prompts()
    stop = (stops_for(model, ids, mask, 2 * SEGMENT + 1),)
    options = {"max_new_tokens": 2 * SEGMENT + 1, "stop_tokens": stop}
    got = generate(model, ids, mask, **options)
    for row in range(len(ids)):
        tokens, state = greedy_loop(model, ids[row, mask[row].bool()].tolist(), 2 * SEGMENT + 1, stop)
        assert got.row(row) == tokens
        assert bool(got.stopped[row]) == (tokens[-1] in stop)
        same_state("generation", f"row {row}", got.states[row], state)
    assert got.lengths.min() < got.lengths.max()  # some stopped early: the case shows something
    assert torch.equal(got.tokens[~got.mask], torch.zeros_like(got.tokens[~got.mask]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cached_and_uncached_say_the_same(case):
    model = case.build()
    ids, mask = prompts()
    stop = (stops_for(model, ids, mask, 7),)
    for options in ({}, {"temperature": 1.5, "top_k": 9, "top_p": 0.9}):
        drawn = [
            generate(
                model,
                ids,
                mask,
                max_new_tokens=7,
                stop_tokens=stop,
                generator=seeded("draw"),
                cached=cached,
                **options,
            )
            for cached in (True, False)
        ]
        assert torch.equal(drawn[0].tokens, drawn[1].tokens)
        assert torch.equal(drawn[0].lengths, drawn[1].lengths)
        for row in range(len(ids)):
            same_state("cache", f"row {row}", drawn[0].states[row], drawn[1].states[row])


def test_padding_in_a_forward_pass_is_not_the_row_alone_which_is_why_there_are_lanes():
    """The mutant: left padding through the model moves a row's segment borders, and its answer."""
    model = one_of("internal").build()
    ids, mask = prompts()
    row = 2
    with torch.no_grad():
        padded = model(ids, mask).logits[row, -1]
        plain = model(ids[row : row + 1, mask[row].bool()]).logits[0, -1]
    assert float((padded - plain).abs().max()) > 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_memory_is_carried_from_prompt_to_prompt(case):
    """Two calls are one conversation: its tokens in one stream give the same, row by row."""
    model = case.build()
    ids, mask = prompts()
    first = generate(model, ids, mask, max_new_tokens=3)
    more_ids, more_mask = prompts([2, 5, 1, SEGMENT], seed=1)
    second = generate(model, more_ids, more_mask, first.states, max_new_tokens=3)
    for row in range(len(ids)):
        said = ids[row, mask[row].bool()].tolist() + first.row(row)
        tokens, state = greedy_loop(model, said + more_ids[row, more_mask[row].bool()].tolist(), 3)
        assert second.row(row) == tokens
        same_state("carried", f"row {row}", second.states[row], state)


def test_what_was_said_before_matters():
    model = one_of("internal").build()
    ids, _ = prompts([2 * SEGMENT] * 2)
    before = generate(model, ids[:1], max_new_tokens=1).states
    got = [generate(model, ids[1:], memory_state=state, max_new_tokens=9).tokens for state in (before, None)]
    assert not torch.equal(*got)


def test_a_batch_state_goes_in_and_comes_out_where_rows_stand_together():
    model = one_of("ltm").build()
    ids, _ = prompts([6, 6])
    with torch.no_grad():
        state = model(ids[:, :4]).memory_state
        got = generate(model, ids[:, 4:], memory_state=state, max_new_tokens=3)
        whole = generate(model, ids, max_new_tokens=3)
        assert torch.equal(got.tokens, whole.tokens)
        after = model(torch.cat((ids, got.tokens), 1)).memory_state
    same_state("batch", "state", got.memory_state, after)
    apart = generate(model, *prompts([1, 2]), max_new_tokens=1)
    with pytest.raises(ValueError, match=r"the rows have \[2, 3\] tokens in their open windows"):
        _ = apart.memory_state


@pytest.mark.parametrize("cached", [True, False])
def test_with_stores_as_without(cached):
    """Uncached, each step files the stream again, in a copy: nothing that was filed is seen twice.

    The capacity is above the stream's length, because a full store cannot go back to an older state.
    """
    case, (ids, mask) = one_of("external", capacity=24), prompts()
    want = generate(case.build(), ids, mask, max_new_tokens=7)
    model = case.build()
    attach_stores(model)
    got = generate(model, ids, mask, max_new_tokens=7, cached=cached)
    assert torch.equal(got.tokens, want.tokens)
    more = generate(model, *prompts([3, 1, 2, 2]), got.states, max_new_tokens=4, cached=cached)
    there = generate(case.build(), *prompts([3, 1, 2, 2]), want.states, max_new_tokens=4)
    assert torch.equal(more.tokens, there.tokens)


def test_padding_may_stand_anywhere():
    model = one_of("internal").build()
    ids, mask = prompts([3, 6])
    right = torch.zeros_like(ids)
    right[0, :3], right[1] = ids[0, 3:], ids[1]
    left = generate(model, ids, mask, max_new_tokens=6)
    got = generate(model, right, (torch.arange(6) < torch.tensor([[3], [6]])).long(), max_new_tokens=6)
    assert torch.equal(left.tokens, got.tokens)


def test_a_row_that_ends_writes_nothing_more_and_its_last_token_is_read():
    model = one_of("internal").build()
    ids, mask = prompts()
    stop = stops_for(model, ids, mask, 9)
    tokens = stream(model, ids, mask, max_new_tokens=9, stop_tokens=[stop])
    kept = {}
    for token in tokens:
        if token.last:
            kept[token.row] = tokens.states[token.row]
    assert sorted(kept) == [0, 1, 2, 3]
    for row, state in kept.items():
        same_state("ended", f"row {row}", tokens.states[row], state, within=0.0)
        read = [*ids[row, mask[row].bool()].tolist(), *tokens.tokens[row]]
        with torch.no_grad():
            same_state("ended", f"row {row}", state, model(torch.tensor([read])).memory_state)
            short = model(torch.tensor([read[:-1]])).memory_state
        assert short.window.length != state.window.length


def test_a_stream_gives_what_generate_gives_and_may_be_left_at_any_time():
    model = one_of("internal").build()
    ids, mask = prompts()
    whole = generate(model, ids, mask, max_new_tokens=6)
    got = [[] for _ in ids]
    for row, token, last in stream(model, ids, mask, max_new_tokens=6):
        got[row].append(token)
        assert last == (len(got[row]) == 6)
    assert got == [whole.row(row) for row in range(4)]

    left = stream(model, ids, mask, max_new_tokens=6)
    for _ in range(5):  # in the middle of the second step
        next(left)
    for row, state in enumerate(left.states):
        read = [*ids[row, mask[row].bool()].tolist(), *left.tokens[row]]
        with torch.no_grad():
            same_state("left", f"row {row}", state, model(torch.tensor([read])).memory_state)
    assert [token.row for token in left][:3] == [1, 2, 3]  # and it goes on where it was
    assert left.tokens == got


def test_tokens_come_before_the_end_is_known():
    """A stream computes no further than it is asked: nothing is read ahead."""
    model = one_of("internal").build()
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    tokens = stream(model, *prompts([3]), max_new_tokens=50)
    assert calls == []
    next(tokens), next(tokens)
    assert calls == [3, 1]


def test_cached_generation_reads_every_token_once_and_prompts_side_by_side():
    model = one_of("internal").build()
    calls = []
    model.register_forward_hook(lambda module, args, output: calls.append(tuple(args[0].shape)))
    generate(model, *prompts([6, 6, 10]), max_new_tokens=3)  # 6, 6 and 10 stand at one place of a segment
    assert calls == [(3, 4), (2, 2), (1, 4), (1, 2), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generators(temperature):
    model = one_of("internal").build()
    ids, mask = prompts()
    options = {"max_new_tokens": 8, "temperature": temperature}

    def drawn(name):
        return generate(model, ids, mask, generator=seeded(name), **options).tokens

    assert torch.equal(drawn("a"), drawn("a"))
    assert torch.equal(drawn("a"), drawn("b")) == (temperature == 0)
    own = generate(model, ids, mask, generator=[seeded(row) for row in range(4)], **options)
    for row in range(4):
        assert own.row(row) == alone(model, ids, mask, row, generator=[seeded(row)], **options).row(0)


def test_the_model_is_left_as_it_was():
    model = stir(one_of("ltm").fresh()).train()
    ids, _ = prompts([5])
    before = torch.get_rng_state()
    got = [generate(model, ids, max_new_tokens=4).tokens for _ in range(2)]
    assert model.training and torch.equal(*got)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"temperature": -1.0}, "temperature = -1.0: must be 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0: must be at least 1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1"),
        ({"top_k": 3}, "set temperature above 0"),
        ({"generator": [seeded(0)]}, "1 generators for 2 prompts"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        generate(BASELINE.build(), torch.zeros(2, 3, dtype=torch.int64), **options)


def test_prompts_and_states_that_do_not_fit_are_refused():
    model = one_of("internal").build()
    ids, _ = prompts([5, 5])
    state = model.init_state(3)
    with pytest.raises(ValueError, match="input_ids holds 17: ids are 0 … 16"):
        generate(model, ids * 0 + VOCAB)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        generate(model, ids, torch.ones(2, 4))
    with pytest.raises(ValueError, match="prompt 1 has no tokens"):
        generate(model, ids, torch.tensor([[1] * 5, [0] * 5]))
    with pytest.raises(ValueError, match="memory_state holds 3 rows, but there are 2 prompts"):
        generate(model, ids, memory_state=state)
    with pytest.raises(ValueError, match=r"memory_state\[0\] holds 3 rows: in a list"):
        generate(model, ids, memory_state=[state, state])
    with pytest.raises(ValueError, match="memory_state is of a model with"):
        generate(model, ids, memory_state=BASELINE.build().init_state(2))


def test_a_config_may_be_kept_and_used_again():
    model = one_of("internal").build()
    config = GenerationConfig(max_new_tokens=5)
    tokens = TokenStream(model, [[1, 2], [3]], config=config)
    assert len(list(tokens)) == 10 and list(tokens) == []
    want = generate(model, torch.tensor([[1, 2]]), max_new_tokens=5)
    assert tokens.tokens[0] == want.row(0)
    same("config", "tokens", drained(tokens).tokens[0], want.tokens[0], within=0.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5: must be a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"top_k": 1.5, "temperature": 1.0}, "top_k = 1.5: must be a whole number"),
        ({"stop_tokens": (1, 2.0)}, "stop_tokens = 2.0: must be a whole number"),
        ({"temperature": 1e-46}, "temperature = 1e-46: must be 0 .* or at least 1e-06"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": -1.0}, "temperature = -1.0"),
    ],
)
def test_options_that_cannot_work_are_refused_at_the_door(options, said):
    with pytest.raises(ValueError, match=said):
        GenerationConfig(**options)


def test_the_smallest_nucleus_is_the_most_probable_token():
    model, (ids, mask) = CASES[1].build().float(), prompts()
    sampled = generate(model, ids, mask, max_new_tokens=5, temperature=1.0, top_p=1e-300)
    coldest = generate(model, ids, mask, max_new_tokens=5, temperature=1e-6)
    greedy = generate(model, ids, mask, max_new_tokens=5)
    assert torch.equal(sampled.tokens, greedy.tokens) and torch.equal(coldest.tokens, greedy.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_of_nan_says_no_token(temperature):
    model = CASES[1].build()
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"logits of row 0 are no numbers: .* load an earlier checkpoint"):
        generate(model, *prompts(), max_new_tokens=3, temperature=temperature)


def test_threads_that_generate_leave_a_model_in_training():
    """The last one out restores what the first one in found, in whatever order they overlap."""
    model = CASES[1].build().train()
    inside, seen = threading.Barrier(4), []

    def enter(order):
        with eval_mode(model):
            inside.wait()
            time.sleep(0.01 * order)
            seen.append(model.training)

    threads = [threading.Thread(target=enter, args=(order,)) for order in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] * 4 and model.training
    with eval_mode(model):
        assert not model.training
    assert model.training
