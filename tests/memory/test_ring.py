"""The ring and the store against Python's own deque and OrderedDict, and the memory against its equation."""

from collections import OrderedDict, deque
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from memlib.config import Config, ConfigError, RingMemoryConfig, override
from memlib.memory import RingMemory
from memlib.memory.ring import Items, LruStore, Ring, newest_at

from ..laws import laws

D = 8


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(**options):
    torch.manual_seed(0)
    config = RingMemoryConfig(**({"short_slots": 3, "long_slots": 4, "slot_dim": 8} | options))
    return RingMemory(config, D).double().eval()


# against plain Python: items are numbers, rows of a batch run side by side


def items(numbers):
    """numbers: [b m] -> items that carry their number in every part."""
    numbers = torch.as_tensor(numbers, dtype=torch.float64)
    return Items(numbers[..., None].repeat(1, 1, 2), -numbers[..., None], numbers)


def empty(rows, places):
    return items(torch.zeros(rows, places))


def numbers_in(kept, order, filled):
    """For each row the numbers of the items that are there, by `order`."""
    rows = []
    for b in range(len(filled)):
        places = [p for p in order[b].argsort(stable=True).tolist() if filled[b, p]]
        assert torch.equal(kept.keys[b, places, 0], kept.importance[b, places])
        assert torch.equal(kept.keys[b, places, 1], -kept.values[b, places, 0])
        rows.append(kept.importance[b, places].int().tolist())
    return rows


def plain(ring, store, l, numbers, admitted, touched):
    """One segment of one row in plain Python: what the memory's docstring says."""
    for number in touched:
        store.move_to_end(number)
    for number in numbers:
        if len(ring) == ring.maxlen:
            oldest = ring[0]
            if admitted(oldest):
                if len(store) == l:
                    store.popitem(last=False)
                store[oldest] = True
        ring.append(number)


segment = st.tuples(
    st.lists(st.booleans(), min_size=5, max_size=5),  # which tokens count
    st.lists(st.booleans(), min_size=6, max_size=6),  # which places of the store are retrieved
)
row = st.lists(segment, min_size=4, max_size=12)


@given(
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 6)),
    rows=st.tuples(row, row),
    bad=st.sampled_from([1, 2, 3, 7]),
)
@settings(max_examples=300, deadline=None)
def test_ring_and_store_are_a_deque_and_an_ordered_dict(sizes, rows, bad):
    """Item i may enter the store unless `bad` divides it (for 1: all may)."""
    check(Ring.push, LruStore.touch, LruStore.insert, sizes, rows, bad)


def check(push, touch, insert, sizes, rows, bad):
    r, l = sizes

    def admitted(number):
        return bad == 1 or number % bad > 0

    none = torch.zeros(2, dtype=torch.int64)
    ring = Ring(empty(2, r), none)
    store = LruStore(empty(2, l), torch.zeros(2, l, dtype=torch.int64), none)
    models = [(deque(maxlen=r), OrderedDict()) for _ in rows]
    for step in range(min(map(len, rows))):
        numbers = torch.arange(1 + 5 * step, 6 + 5 * step).repeat(2, 1)
        mask = torch.tensor([rows[b][step][0] for b in range(2)])
        retrieved = torch.tensor([rows[b][step][1][:l] for b in range(2)]) & store.filled
        for b, (short, long) in enumerate(models):
            touched = store.items.importance[b, retrieved[b]].int().tolist()
            plain(short, long, l, numbers[b, mask[b]].tolist(), admitted, touched)

        ring, fallen, fell = push(ring, items(numbers), mask)
        may = torch.tensor([[admitted(int(x)) for x in line] for line in fallen.importance])
        store = insert(touch(store, retrieved), fallen, fell & may)

        age = newest_at(r, ring.count)
        assert numbers_in(ring.items, age, ring.filled) == [list(short) for short, _ in models]
        assert numbers_in(store.items, store.used, store.filled) == [list(long) for _, long in models]


def first_in_first_out(store, places):
    """A cache that does not count retrieval as use."""
    return store


def never_fills_free_places(store, new, mask):
    """Eviction by place alone."""
    return LruStore.insert(replace(store, used=torch.ones_like(store.used)), new, mask)


def off_by_one(ring, new, mask):
    """What falls out is the second oldest."""
    after, fallen, fell = Ring.push(ring, new, mask)
    return after, fallen.map(lambda tensor: tensor.roll(-1, 1)), fell


def forgets_the_mask(ring, new, mask):
    return Ring.push(ring, new, torch.ones_like(mask))


@pytest.mark.parametrize(
    "fault",
    [
        {"touch": first_in_first_out},
        {"insert": never_fills_free_places},
        {"push": off_by_one},
        {"push": forgets_the_mask},
    ],
)
def test_another_policy_is_caught(fault):
    sound = {"push": Ring.push, "touch": LruStore.touch, "insert": LruStore.insert}
    generator = torch.Generator().manual_seed(0)

    def flags(n):
        return (torch.rand(n, generator=generator) < 0.6).tolist()

    rows = tuple([(flags(5), flags(6)) for _ in range(8)] for _ in range(2))
    check(**sound, sizes=(3, 4), rows=rows, bad=3)
    with pytest.raises(AssertionError):
        check(**(sound | fault), sizes=(3, 4), rows=rows, bad=3)


@pytest.mark.parametrize("places", [1, 2, 5])
def test_newest_at_is_where_counting_round_and_round_ends(places):
    for total in range(13):
        want = [-1] * places
        for i in range(total):
            want[i % places] = i
        got = newest_at(places, torch.tensor([total]))[0].tolist()
        assert [max(number, -1) for number in got] == want


# the memory


@torch.no_grad()
def test_reading_is_attention_over_every_item_kept_with_its_importance():
    built, n = memory(admit=0.0, retrieved_above=1.0), 6
    built.writer.importance_gate.weight.copy_(random(1, 8, seed=3))
    hidden, query = random(2, n, D, seed=1), random(2, 2, D, seed=2)
    state = built.write(hidden, built.init_state(2), torch.ones(2, n, dtype=torch.bool))
    got = built.read(query, state)
    for b in range(2):
        before = torch.cat((torch.zeros(1, D, dtype=torch.float64), hidden[b, :-1]))
        keys, values = F.normalize(built.key.proj(before), dim=-1), built.writer.v_proj(hidden[b])
        importance = torch.sigmoid(built.writer.importance_gate(torch.cat((keys, values), -1)))[:, 0]
        importance[n - 3 :] = 1.0  # still in the ring
        for t in range(2):
            asked = F.normalize(built.key.proj(query[b, t]), dim=0)
            weight = importance * torch.exp(built.reader.sharpness * 2 * keys @ asked)
            want = built.o_proj(weight @ values / weight.sum())
            torch.testing.assert_close(got[b, t], want)


@torch.no_grad()
def test_a_new_stream_reads_nothing():
    built = memory()
    assert not built.read(random(2, 3, D), built.init_state(2)).any()


@torch.no_grad()
def test_what_is_unimportant_leaves_for_good():
    shut, open_ = memory(importance_bias=-1.0), memory(importance_bias=1.0)
    mask = torch.ones(1, 6, dtype=torch.bool)
    for built, stored in ((shut, 0), (open_, 3)):
        state = built.write(random(1, 6, D), built.init_state(1), mask)
        assert int(state.store.filled.sum()) == stored and bool(state.ring.filled.all())


@torch.no_grad()
def test_what_is_asked_for_stays_and_what_is_not_is_evicted():
    """Retrieval is use: of the store's two places the one that was asked for outlives the next item."""
    built = memory(short_slots=1, long_slots=2, slot_dim=32, sharpness=50.0, shift_init=0.0)
    one = torch.ones(1, 1, dtype=torch.bool)
    tokens = [random(1, 1, D, seed=s) for s in range(5)]
    state = built.init_state(1)
    for token in tokens[:3]:  # tokens 0 and 1 are in the store, 2 in the ring
        state = built.write(token, state, one)
    for again in (True, False):
        asked = built.write(tokens[0] if again else tokens[4], state, one)  # token 2 enters, one leaves
        kept = F.normalize(built.key.proj(tokens[0][0]), dim=-1)
        found = (asked.store.items.keys[0] @ kept.T).max()
        assert (float(found) > 0.999) == again


def test_gradients_reach_what_was_kept():
    built = memory(admit=0.0)
    mask = torch.ones(1, 6, dtype=torch.bool)

    def said(hidden, query):
        return built.read(query, built.write(hidden, built.init_state(1), mask))

    inputs = [random(1, 6, D).requires_grad_(), random(1, 2, D, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(said, inputs)
    said(*inputs).sum().backward()
    assert built.writer.importance_gate.weight.grad.any()


class LosesItsPlace(RingMemory):
    """memorizing-transformers-pytorch's fault: values count on where keys started again."""

    def write(self, hidden, state, mask):
        after = super().write(hidden, state, mask)
        values = after.ring.items.values.roll(1, 1)
        wrong = replace(after.ring, items=replace(after.ring.items, values=values))
        return replace(after, ring=wrong if bool((after.ring.count > 4).all()) else after.ring)


def exact(kind=RingMemory, **options):
    """A memory that reads one item at a time and never counts it as use: 4 + 6 items exactly."""
    torch.manual_seed(0)
    config = {"short_slots": 4, "long_slots": 6, "slot_dim": 64, "sharpness": 200.0, "shift_init": 0.0}
    config |= {"importance_bias": 50.0, "retrieved_above": 1.0}
    return kind(RingMemoryConfig(**(config | options)), 16).double().eval()


def test_after_overflow_the_newest_items_are_recalled_with_their_values():
    laws.overflow(exact(), 10, 16)


@pytest.mark.parametrize(
    "faulty",
    [lambda: exact(LosesItsPlace), lambda: exact(long_slots=5), lambda: exact(importance_bias=-50.0)],
    ids=["values_beside_other_keys", "too_small", "nothing_admitted"],
)
def test_wrong_recall_after_overflow_is_caught(faulty):
    with pytest.raises(AssertionError, match="L6 overflow"):
        laws.overflow(faulty(), 10, 16)


def test_the_defaults_are_the_documents():
    config = RingMemoryConfig()
    assert (config.short_slots, config.long_slots, config.slot_dim) == (512, 512, 512)
    state = RingMemory(config, 48).init_state(2)
    assert state.ring.items.slots.shape == state.store.items.slots.shape == (2, 512, 512)


def test_an_odd_width_is_refused():
    with pytest.raises(ConfigError, match=r"memory.ring.slot_dim = 7: must be even"):
        override(Config(), {"memory.kinds": ["ring"], "memory.ring.slot_dim": 7})
