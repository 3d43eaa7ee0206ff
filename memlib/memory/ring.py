"""The simplified prototype: a short-term ring buffer before a long-term store that evicts by last use.

Axes: b batch, n tokens of a segment, r places of the ring, l places of the store, m any items, d hidden,
k key width, e value width.

Everything is kept exactly as it was written: no place is ever mixed. In plain Python, for one row:

    for place in retrieved:                            # by this segment's tokens, in order of place
        store.move_to_end(place)
    for item in segment:
        if len(ring) == r:
            oldest = ring.popleft()
            if oldest.importance >= admit:
                if len(store) == l:
                    store.popitem(last=False)          # least recently retrieved or stored
                store[place] = oldest
        ring.append(item)

tests/memory/test_ring.py compares the module with this loop. Source: the prototype of "MM-Rec Memory
Architecture" (docs/coverage.md), which specifies a ring buffer and an LRU cache of [512, 512] each. Two
choices are ours: items that leave the ring enter the store if their importance is at least `admit`, and a
place counts as retrieved if a token gave it more than `retrieved_above` of its attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from memlib.config import RingMemoryConfig
from memlib.memory.base import Memory, State, axes, zeros
from memlib.memory.gates import Gate
from memlib.memory.key_attention import MemoryAttention, TokenKey, in_time_order
from memlib.nn.hook_point import HookPoint
from memlib.nn.linear import Linear
from memlib.ops import take_rows


@dataclass(frozen=True)
class Items(State):
    """keys: [b m k]; values: [b m e]; importance: [b m], log sigma of the score."""

    keys: Tensor = axes("batch slot feature")
    values: Tensor = axes("batch slot feature")
    importance: Tensor = axes("batch slot")

    def pick(self, index: Tensor) -> Items:
        """The items at index: [b j]; an index out of range gives some item."""
        index = index.clamp(0, self.importance.shape[1] - 1)
        return self.map(lambda tensor: take_rows(tensor, index))

    def replace(self, where: Tensor, other: Items) -> Items:
        """These items, and the other's where `where` is true: [b m]."""

        def choose(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rearrange(where, "b m -> b m" + " 1" * (mine.ndim - 2)), theirs, mine)

        return self.zip(other, choose)

    @property
    def slots(self) -> Tensor:
        """[b m k+e]."""
        return torch.cat((self.keys, self.values), -1)


@dataclass(frozen=True)
class Ring(State):
    """Item i of a row stands in place i mod r.  items: r of them; count: [b], items ever pushed."""

    items: Items
    count: Tensor = axes("batch")

    @property
    def filled(self) -> Tensor:
        """Which places hold an item: [b r]."""
        return newest_at(self.items.importance.shape[1], self.count) >= 0

    def push(self, new: Items, mask: Tensor) -> tuple[Ring, Items, Tensor]:
        """Append the items of mask: [b n] in order; also returns the items that leave the ring, [b n] oldest
        first, and which of those n exist: [b n].
        """
        r, n = self.items.importance.shape[1], mask.shape[1]
        new = new.pick(in_time_order(mask, n))
        before = rearrange(self.count, "b -> b 1")
        count = self.count + mask.sum(1)

        number = newest_at(r, count)
        items = self.items.replace(number >= before, new.pick(number - before))

        left = (before - r).clamp(min=0) + torch.arange(n, device=mask.device)
        fallen = self.items.pick(left % r).replace(left >= before, new.pick(left - before))
        return Ring(items, count), fallen, left < rearrange(count, "b -> b 1") - r


@dataclass(frozen=True)
class LruStore(State):
    """items: l of them; used: [b l], the tick of each place's last use, 0 if free; tick: [b], the last."""

    items: Items
    used: Tensor = axes("batch slot")
    tick: Tensor = axes("batch")

    @property
    def filled(self) -> Tensor:
        return self.used > 0

    def touch(self, places: Tensor) -> LruStore:
        """Mark slots: [b l] as used now, one after another in order of slot."""
        tick = rearrange(self.tick, "b -> b 1")
        used = torch.where(places, tick + places.cumsum(1), self.used)
        return LruStore(self.items, used, self.tick + places.sum(1))

    def insert(self, new: Items, mask: Tensor) -> LruStore:
        """Insert the items of mask: [b n] in order, each in the least recently used slot."""
        l, n = self.used.shape[1], mask.shape[1]
        new = new.pick(in_time_order(mask, n))
        turn = self.used.argsort(stable=True, dim=1).argsort(1)  # 0: evicted first; free places lead
        number = newest_at(l, mask.sum(1)).gather(1, turn)
        tick = rearrange(self.tick, "b -> b 1")
        return LruStore(
            items=self.items.replace(number >= 0, new.pick(number)),
            used=torch.where(number >= 0, tick + 1 + number, self.used),
            tick=self.tick + mask.sum(1),
        )


def newest_at(places: int, total: Tensor) -> Tensor:
    """The number of the newest item in each slot, if item i goes to slot i mod slots.

    total: [b] items so far -> [b p]; negative for empty slots.
    """
    last = rearrange(total, "b -> b 1") - 1
    return last - (last - torch.arange(places, device=total.device)) % places


@dataclass(frozen=True)
class RingState(State):
    ring: Ring
    store: LruStore


class RingMemory(Memory):
    """The newest tokens in a ring buffer; important tokens that leave it in a store with LRU eviction."""

    config: RingMemoryConfig

    def __init__(self, config: RingMemoryConfig, hidden_dim: int) -> None:
        super().__init__(config, hidden_dim)
        width = config.slot_dim // 2
        self.key = TokenKey(hidden_dim, width, config.shift_init)
        self.reader = MemoryAttention(config.sharpness, "reader.weight")
        self.o_proj = Linear(width, hidden_dim)
        self.writer = ItemWrite(config, hidden_dim, self.key)
        self.before_point = HookPoint("before", "batch slot feature")
        self.after_point = HookPoint("after", "batch slot feature")

    def init_state(self, batch_size: int) -> RingState:
        def items(places: int) -> Items:
            width = self.config.slot_dim // 2
            return Items(
                keys=zeros(self, batch_size, places, width),
                values=zeros(self, batch_size, places, width),
                importance=zeros(self, batch_size, places),
            )

        def none(*shape: int) -> Tensor:
            return zeros(self, batch_size, *shape, dtype=torch.int64)

        short, long = self.config.short_slots, self.config.long_slots
        return RingState(Ring(items(short), none()), LruStore(items(long), none(long), none()))

    def read(self, hidden: Tensor, state: RingState) -> Tensor:
        """y = Attn(query; ring and store) W_o, the store's scores plus log importance; -> [b n d]."""
        slots, bias = everything(state)
        keys, values = slots.chunk(2, -1)
        return self.o_proj(self.reader(self.key.query(hidden), keys, values, bias))

    def write(self, hidden: Tensor, state: RingState, mask: Tensor) -> RingState:
        slots, bias = everything(state)
        self.before_point(slots)
        query = self.key.query(hidden).to(slots.dtype)
        weight = self.reader.used(query, slots.chunk(2, -1)[0], bias, mask)
        retrieved = weight[:, self.config.short_slots :] > self.config.retrieved_above
        new = self.writer(hidden, mask).cast(slots.dtype)
        ring, fallen, fell = state.ring.push(new, mask)
        if self.config.admit:
            fell = fell & (fallen.importance >= math.log(self.config.admit))
        store = state.store.touch(retrieved).insert(fallen, fell)
        self.writer.record_places(state.ring.count, mask, slots.shape[1])
        after = RingState(ring, store)
        self.after_point(lambda: everything(after)[0])
        return after


class ItemWrite(nn.Module):
    """The stored item of a token: (key_t, x_t W_v, log sigma([key_t, x_t W_v] W_g + b)); [b n d] -> n
    items.
    """

    def __init__(self, config: RingMemoryConfig, hidden_dim: int, key: TokenKey) -> None:
        super().__init__()
        self.key = key
        self.short_slots = config.short_slots
        self.v_proj = Linear(hidden_dim, config.slot_dim // 2)
        self.importance_gate = Gate(config.slot_dim, 1, config.importance_bias)
        self.importance_point = HookPoint("writer.importance", "batch token")
        self.weight_point = HookPoint("writer.weight", "batch token slot")
        self.input_point = HookPoint("writer.input", "batch token")
        self.forget_point = HookPoint("writer.forget", "batch token")

    def forward(self, hidden: Tensor, mask: Tensor) -> Items:
        hidden = hidden * rearrange(mask, "b n -> b n 1")
        keys, values = self.key.key(hidden), self.v_proj(hidden)
        score = self.importance_gate(torch.cat((keys, values), -1))
        importance = F.logsigmoid(rearrange(score, "b n 1 -> b n"))
        self.importance_point(importance.exp)
        return Items(keys, values, importance)

    def record_places(self, count: Tensor, mask: Tensor, slots: int) -> None:
        """Record each token's ring slot: it is written there in full and nothing else stays."""

        def place() -> Tensor:
            number = rearrange(count, "b -> b 1") + mask.cumsum(1) - 1
            one = F.one_hot(number.clamp(min=0) % self.short_slots, slots)
            return one * rearrange(mask, "b n -> b n 1")

        self.weight_point(place)
        self.input_point(mask.double)
        self.forget_point(lambda: torch.zeros_like(mask, dtype=torch.float64))


def everything(state: RingState) -> tuple[Tensor, Tensor]:
    """The ring's and the store's slots [b r+l k+e] and their attention bias [b r+l], -inf where empty."""
    ring, store = state.ring, state.store
    slots = torch.cat((ring.items.slots, store.items.slots), 1)
    short = torch.zeros_like(ring.items.importance).masked_fill(~ring.filled, -torch.inf)
    long = store.items.importance.masked_fill(~store.filled, -torch.inf)
    return slots, torch.cat((short, long), 1)
