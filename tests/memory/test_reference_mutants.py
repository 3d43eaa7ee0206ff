"""Wrong memories that keep every shape: the comparison with the reference must catch each of them.

A fault changes one thing of a memory that agrees with its reference without it. Faults patch the object,
not the class, so that the reference beside it stays as it is.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from memlib.memory import hds
from memlib.memory.gates import gates_of_pairs
from tests.laws.cases import small_options

from .references.compare import agree, build


def around(memory, name, change):
    """Replace a method by change(the method, its arguments …)."""
    method = getattr(memory, name)
    setattr(memory, name, lambda *arguments: change(method, *arguments))


def output(module, change):
    """Change what a module returns."""
    module.register_forward_hook(lambda module, inputs, output: change(output))


# tokens and masks


def writes_the_first_half_only(memory):
    around(memory, "write", lambda write, x, state, mask: write(x, state, mask & (mask.cumsum(1) <= 2)))


def masks_by_the_first_row(memory):
    around(memory, "write", lambda write, x, state, mask: write(x, state, mask[:1].expand_as(mask)))


def ignores_the_mask(memory):
    around(memory, "write", lambda write, x, state, mask: write(x, state, torch.ones_like(mask)))


def exchanges_two_tokens(memory):
    """The last two tokens that count are written in the wrong order."""

    def write(method, x, state, mask):
        order = torch.arange(x.shape[1])
        order[-2:] = order[-2:].flip(0)
        return method(x[:, order], state, mask)

    around(memory, "write", write)


def writes_survivors_in_reverse(memory):
    """Survivors update one slot in the wrong order; keys, values and gates are right."""

    def compress(method, *arguments):
        tokens = method(*arguments)
        turned = {name: getattr(tokens, name).flip(1) for name in ("new", "strength", "kept", "index")}
        return replace(tokens, **turned)

    around(memory.writer, "compress", compress)


def shifts_by_two(memory):
    """A key is that of the token before the one before."""

    def key(hidden):
        before = F.pad(hidden, (0, 0, 2, 0))[:, :-2]
        return memory.key.query(torch.lerp(hidden, before, memory.key.shift))

    memory.key.key = key


def does_not_shift(memory):
    memory.key.key = memory.key.query


# addresses, keys and values


def exchanges_the_address_books(memory):
    """What is written with one book is read with another."""

    def read(method, hidden, slots):
        half = slots.shape[1] // 2
        return method(hidden, slots.roll(half, 1))

    around(memory.reader, "forward", read)


def softmax_over_books(memory):
    """Weights sum to 1 over the books, not over a book's slots."""
    address = memory.reader.address

    def forward(x):
        query = rearrange(address.proj(x), "b n (h k) -> b n h k", h=address.num_heads)
        score = address.sharpness.sum() * torch.einsum("bnhk,hsk->bnhs", query, address.table)
        return rearrange(torch.softmax(score, -2), "b n h s -> b n (h s)")

    address.forward = forward


def softmax_over_tokens(memory):
    around(memory.reader.attention, "weights", lambda weights, *a: weights(*a).log().softmax(1))


def values_beside_other_keys(memory):
    output(memory.v_proj, lambda values: values.roll(1, 1))


def heads_exchanged(memory):
    output(memory.v_proj, lambda values: values.roll(values.shape[-1] // 2, -1))


# gates and decay


def does_not_decay(memory):
    around(memory.banks, "log_decay", lambda decay, context, mask: 0 * decay(context, mask))


def padding_decays(memory):
    around(memory.banks, "log_decay", lambda decay, c, mask: decay(c, torch.ones_like(mask)))


def gates_on_the_wrong_side(memory):
    """1 - sigma(g) where sigma(g) belongs."""
    output(memory.reader.output_gate.gate, torch.neg)


def attention_and_memory_exchanged(memory):
    """w A + (1 - w) M."""

    def mix(method, heads, state):
        memory_part = method(replace(heads, attended=torch.zeros_like(heads.attended)), state)
        attention_part = method(heads, state) - memory_part
        return heads.attended - attention_part + memory_part

    around(memory, "mix", mix)


def does_not_weigh_what_is_retrieved(memory):
    memory.config.retrieval_weighted = False


def searches_above_another_threshold(memory):
    memory.config.retrieval_threshold = 0.8


# what is kept, and for how long


def evicts_one_too_early(memory):
    """A full memory gives up its oldest token before it must."""

    def write(method, hidden, state, mask):
        after = method(hidden, state, mask)
        oldest = after.serial == after.serial.amin(1, keepdim=True)
        return replace(after, serial=after.serial.masked_fill(oldest & (after.serial >= 0), -1))

    around(memory, "write", write)


def evicts_the_oldest(memory):
    memory.config.eviction = "oldest"


def all_equal_hits_count(memory):
    memory.config.newest_within = None


def retrieval_is_no_use(memory):
    """A store that evicts what came first."""
    memory.config.retrieved_above = 1.0


def a_block_too_short(memory):
    memory.blocks.chunk_size -= 1


def forgets_what_it_knew_of_the_segment(memory):
    """A rolling window that begins anew in each call."""
    memory.with_open_segment = lambda state, hidden, mask: state


def even_weights(memory):
    """Chosen chapters count alike, whatever the router's weights."""
    around(memory.router, "choose", even)


def even(choose, summary):
    choice = choose(summary)
    return choice._replace(log_weights=torch.log_softmax(0 * choice.log_weights, -1))


# gradients only: every value is right


def cuts_the_values(memory):
    output(memory.writer.v_proj, torch.detach)


def cuts_the_input_gate(memory):
    def cut(*given):
        opened, *others = gates_of_pairs(*given)
        return [opened.detach(), *others]

    def write(method, *given):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hds, "gates_of_pairs", cut)
            return method(*given)

    around(memory.banks, "write", write)


def cuts_the_query(memory):
    output(memory.query_address, torch.detach)


def cuts_the_state(memory):
    around(memory, "write", lambda write, x, state, mask: write(x, state.detach(), mask))


def cuts_the_router(memory):
    output(memory.router.proj, torch.detach)


ADAPTIVE = {"slots": "adaptive"}
QUERY = {"retrieval_gate": "query"}
CONTENT = {"write": "attention"}
ROLLING = {"routing_strategy_inference": "rolling"}
FAULTS = [
    (writes_the_first_half_only, "internal", {}, "state"),
    (writes_the_first_half_only, "internal", CONTENT, "state"),
    (writes_the_first_half_only, "hds", {}, "state"),
    (writes_the_first_half_only, "external", {}, "state"),
    (masks_by_the_first_row, "internal", {}, "state"),
    (masks_by_the_first_row, "ltm", {}, "state"),
    (masks_by_the_first_row, "chapters", {}, "state"),
    (ignores_the_mask, "ring", {}, "state"),
    (ignores_the_mask, "internal", CONTENT, "state"),
    (exchanges_two_tokens, "internal", {}, "state"),
    (exchanges_two_tokens, "hds", {}, "state"),
    (exchanges_two_tokens, "external", {}, "state"),
    (writes_survivors_in_reverse, "ltm", {}, "state"),
    (writes_survivors_in_reverse, "ltm", ADAPTIVE, "state"),
    (shifts_by_two, "ltm", {}, "state"),
    (shifts_by_two, "ring", {}, "state"),
    (does_not_shift, "ring", {}, "state"),
    (exchanges_the_address_books, "internal", {}, "read"),
    (softmax_over_books, "internal", {}, "state"),
    (softmax_over_tokens, "ltm", {}, "state"),
    (values_beside_other_keys, "external", {}, "state"),
    (heads_exchanged, "external", {"join": "heads"}, "state"),
    (does_not_decay, "hds", {}, "state"),
    (padding_decays, "hds", {}, "state"),
    (gates_on_the_wrong_side, "internal", {}, "read"),
    (attention_and_memory_exchanged, "external", {"join": "joint"}, "read"),
    (does_not_weigh_what_is_retrieved, "external", QUERY, "read"),
    (searches_above_another_threshold, "external", QUERY, "read"),
    (evicts_one_too_early, "external", {}, "state"),
    (evicts_the_oldest, "external", {"eviction": "least_retrieved"}, "state"),
    (all_equal_hits_count, "external", {"newest_within": 3.0}, "read"),
    (retrieval_is_no_use, "ring", {"admit": 0.0, "retrieved_above": 0.2}, "state"),
    (a_block_too_short, "hds", {}, "state"),
    (forgets_what_it_knew_of_the_segment, "chapters", ROLLING, "read"),
    (even_weights, "chapters", {}, "read"),
    (cuts_the_values, "internal", {}, "gradient"),
    (cuts_the_values, "ltm", {}, "gradient"),
    (cuts_the_input_gate, "hds", {}, "gradient"),
    (cuts_the_query, "external", {}, "gradient"),
    (cuts_the_state, "internal", CONTENT, "gradient"),
    (cuts_the_state, "ring", {}, "gradient"),
    (cuts_the_router, "chapters", {}, "gradient"),
]


@pytest.mark.parametrize(
    ("fault", "kind", "options", "where"), FAULTS, ids=[f"{kind}-{f.__name__}" for f, kind, _, _ in FAULTS]
)
def test_a_wrong_memory_is_caught(fault, kind, options, where):
    memory, reference = build(kind, small_options(kind) | options)
    fault(memory)
    with pytest.raises(AssertionError, match=f"^{where} .*differs|^{where} .* of "):
        agree(memory, reference)
