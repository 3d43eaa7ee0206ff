"""What each law must catch: memories and models with one fault, several found in published ones.

Every mutant works but for its fault, goes through the same law as the real ones and must break it;
`test_laws.py` shows that without the fault the law holds.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from einops import einsum, rearrange, reduce, repeat
from torch import nn

from memlib.config import InternalMemoryConfig
from memlib.memory import MEMORIES, InternalMemory, State, axes
from memlib.memory.internal import SlotState
from memlib.memory.layer import LayerMemories
from memlib.models import MemoryState, MemoryTransformer
from memlib.models import transformer as transformer_module
from memlib.tasks.scoring import correct, scored_cross_entropy
from memlib.training.trainer import Trainer

from . import laws
from .cases import Case, in_float32
from .laws import FEEDINGS
from .toys import RingConfig, RingMemory

FED = {feeding.name: feeding for feeding in FEEDINGS}
MANY, RAGGED, TOKENS = FED["many_segments"], FED["ragged"], FED["token_by_token"]


def case(write="addressed", **memory) -> Case:
    return Case("mutant", memory, {"internal": {"num_slots": 8, "num_heads": 2, "write": write}})


@pytest.fixture
def make_with(monkeypatch):
    """A function from a faulty memory class to what builds a model with it."""

    def make(memory, **options):
        monkeypatch.setitem(MEMORIES, "internal", memory)
        return case(**options).build

    return make


def make_model(model_type, **options):
    """What builds a faulty model with a sound memory."""

    def make():
        model = case(**options).build()
        model.__class__ = model_type
        return model

    return make


def breaks(law, of, *arguments):
    """The law, named by how its messages begin, is broken."""
    with pytest.raises(AssertionError, match=f"^{of}"):
        law(*arguments)


# L1 causality


class PooledGate(InternalMemory):
    """The LM2 release: what is read passes a gate that is pooled over the whole segment."""

    def read(self, hidden, state):
        gate = torch.sigmoid(reduce(hidden, "b n d -> b 1 d", "mean"))
        return gate * super().read(hidden, state)


class SeesItsOwnSegment(InternalMemory):
    """A write that is visible in the segment it was made from."""

    def read(self, hidden, state):
        everything = torch.ones(hidden.shape[:2], dtype=torch.bool)
        return super().read(hidden, self.write(hidden, state, everything))


@pytest.mark.parametrize("fault", [PooledGate, SeesItsOwnSegment])
@pytest.mark.parametrize("feeding", [MANY, RAGGED], ids=str)
def test_a_read_that_sees_the_whole_segment_is_caught(make_with, fault, feeding):
    breaks(laws.causality, "L1", make_with(fault), feeding)


@pytest.mark.parametrize("fault", [PooledGate, SeesItsOwnSegment])
def test_and_token_by_token_it_speaks_differently(make_with, fault):
    breaks(laws.segmentation, "L4", make_with(fault), TOKENS)


# L2 explicit state


class OnTheModule(InternalMemory):
    """State kept on the module and never reset: a new stream goes on where the last one ended."""

    kept = None

    def read(self, hidden, state):
        return super().read(hidden, self.kept or state)

    def write(self, hidden, state, mask):
        self.kept = super().write(hidden, self.kept or state, mask)
        return self.kept


class InPlace(InternalMemory):
    """A write into the tensor that was passed in."""

    def write(self, hidden, state, mask):
        state.slots.copy_(super().write(hidden, state, mask).slots)
        return state

    def init_state(self, batch_size):
        return super().init_state(batch_size).clone()


class OnTheClass(InternalMemory):
    """State in a class attribute, begun anew by each new stream of any model."""

    slots = None

    def init_state(self, batch_size):
        OnTheClass.slots = super().init_state(batch_size).slots
        return SlotState(OnTheClass.slots.clone())

    def read(self, hidden, state):
        return super().read(hidden, SlotState(OnTheClass.slots))

    def write(self, hidden, state, mask):
        OnTheClass.slots = super().write(hidden, SlotState(OnTheClass.slots), mask).slots
        return SlotState(OnTheClass.slots.clone())


class TableOnTheClass(InternalMemory):
    """A value table in a class attribute: every model trains the same one."""

    table = nn.Parameter(torch.zeros(8, 16, dtype=torch.float64))

    def __init__(self, config, hidden_dim):
        super().__init__(config, hidden_dim)
        self.values = TableOnTheClass.table


@pytest.mark.parametrize("fault", [OnTheModule, InPlace, OnTheClass])
def test_a_hidden_state_is_caught(make_with, fault):
    breaks(laws.explicit_state, "L2", make_with(fault, memory_sharing="per_layer"), MANY)


def test_a_class_attribute_shared_by_two_models_is_caught(make_with):
    """Each model alone, one stream after another, is right: only side by side are they wrong."""
    make = make_with(OnTheClass, memory_layer_placement="custom", memory_layer_custom=[1])
    first, second = make(), make()
    tokens = laws.stream(MANY)
    (alone, _), (again, _) = laws.feed(first, tokens), laws.feed(second, tokens)
    assert torch.equal(alone, again)
    breaks(laws.separate_models, "L2.*two models in turns", make)


def test_a_parameter_shared_by_two_models_is_caught(make_with):
    breaks(laws.separate_models, "L2.*share", make_with(TableOnTheClass))


# L3 isolation


class CrossRow(InternalMemory):
    """A read from the whole batch's slots."""

    def read(self, hidden, state):
        common = reduce(state.slots, "b s e -> s e", "mean")
        return super().read(hidden, SlotState(repeat(common, "s e -> b s e", b=len(hidden))))


class CrossRowWrite(InternalMemory):
    """Gates on what is written that are pooled over the batch."""

    def write(self, hidden, state, mask):
        return super().write(hidden + reduce(hidden, "b n d -> 1 n d", "mean"), state, mask)


@pytest.mark.parametrize("fault", [CrossRow, CrossRowWrite])
def test_a_row_that_reads_another_is_caught(make_with, fault):
    breaks(laws.isolation, "L3", make_with(fault), MANY)


class ForgetsTheBankOnly(MemoryTransformer):
    """A reset that leaves the tokens of the open window to be attended to and written."""

    def reset(self, state, rows):
        return replace(super().reset(state, rows), window=state.window)


class ForgetsTheWindowOnly(MemoryTransformer):
    """A reset that leaves what was written."""

    def reset(self, state, rows):
        return replace(super().reset(state, rows), memories=state.memories)


class ForgetsEverybody(MemoryTransformer):
    """A reset of one row that resets all."""

    def reset(self, state, rows):
        return super().reset(state, torch.ones_like(rows))


@pytest.mark.parametrize("fault", [ForgetsTheBankOnly, ForgetsTheWindowOnly, ForgetsEverybody])
def test_a_reset_of_too_little_or_too_much_is_caught(fault):
    breaks(laws.forgetting, "L3", make_model(fault), TOKENS)


class BeginsWithTheCallOnly(MemoryTransformer):
    """A document that begins later in a call inherits what the one before it wrote."""

    def forward(self, input_ids, attention_mask=None, memory_state=None, fresh=None):
        if fresh is not None:
            fresh = fresh & (torch.arange(fresh.shape[1]) == 0)
        return super().forward(input_ids, attention_mask, memory_state=memory_state, fresh=fresh)


@pytest.mark.parametrize("fault", [ForgetsTheWindowOnly, ForgetsEverybody, BeginsWithTheCallOnly])
def test_documents_that_begin_too_seldom_or_in_every_row_are_caught(fault):
    breaks(laws.documents, "L3 documents", make_model(fault))


def test_a_state_on_the_module_survives_a_reset(make_with):
    breaks(laws.forgetting, "L3", make_with(OnTheModule), MANY)


# L4 segmentation and padding


class WritesAtEveryCall(MemoryTransformer):
    """A write at the end of each call, finished segment or not."""

    def forward(self, input_ids, attention_mask=None, labels=None, memory_state=None):
        output = super().forward(input_ids, attention_mask, labels, memory_state)
        state = output.memory_state
        if not state.window.length:
            return output
        memories, window = list(state.memories), state.window
        for hidden, layer in zip(window.hidden, self.stack.layers, strict=True):
            (slot,) = self.stack.slots[layer]
            (memory,) = self.stack.layers[layer].memory_list
            memories[slot] = memory.write(hidden, memories[slot], window.mask)
        return replace(output, memory_state=replace(state, memories=tuple(memories)))


class ForgetsTheWindow(MemoryTransformer):
    """A call that starts a window of its own, whatever the last one left open."""

    def forward(self, input_ids, attention_mask=None, labels=None, memory_state=None):
        if memory_state is not None:
            window = self.init_state(len(input_ids)).window
            memory_state = replace(memory_state, window=window)
        return super().forward(input_ids, attention_mask, labels, memory_state)


@pytest.mark.parametrize("fault", [WritesAtEveryCall, ForgetsTheWindow])
@pytest.mark.parametrize("feeding", [RAGGED, TOKENS], ids=str)
def test_pieces_that_count_as_segments_are_caught(fault, feeding):
    breaks(laws.segmentation, "L4", make_model(fault), feeding)


class WritesPadding(InternalMemory):
    """Padding that is written like a token."""

    def write(self, hidden, state, mask):
        return super().write(hidden, state, torch.ones_like(mask))


class WritesAsleep(LayerMemories):
    """A row whose segment is all padding, and whose slots fade all the same."""

    def write(self, hidden, inputs, keys=None, values=None):
        return super().write(hidden, inputs._replace(has_tokens=None), keys, values)


class AttendsToPadding(MemoryTransformer):
    """Padding that real tokens of the window attend to."""

    def step(self, ids, mask, state, noise=None):
        original = transformer_module.window_mask
        try:
            transformer_module.window_mask = lambda n, valid, past, device: original(n, None, past, device)
            return super().step(ids, mask, state, noise)
        finally:
            transformer_module.window_mask = original


@pytest.mark.parametrize("write", ["addressed", "attention"])
def test_padding_that_is_written_is_caught(make_with, write):
    breaks(laws.padding, "L4", make_with(WritesPadding, write=write))


def test_a_sleeping_row_that_fades_is_caught():
    def make():
        model = case(write="attention").build()
        for block in model.blocks:
            block.memories.__class__ = WritesAsleep
        return model

    breaks(laws.padding, "L4", make)


def test_padding_that_is_attended_to_is_caught():
    breaks(laws.padding, "L4", make_model(AttendsToPadding))


# L5 off means off


class NeverShut(MemoryTransformer):
    """A gate that closes as far as sigmoid(-10) does."""

    def close_memory(self):
        for block in self.blocks:
            with torch.no_grad():
                block.fusion.gate.bias[1:] = -10.0


def test_a_gate_that_never_quite_shuts_is_caught():
    model = make_model(NeverShut)()
    model.close_memory()
    breaks(laws.off, "L5", model, case().fresh(vanilla_mode=True), MANY)


def test_a_memory_that_starts_with_an_effect_is_caught():
    speaks_at_once = case(fusion="residual").fresh(wo_init_zero=False)
    breaks(laws.off, "L5", speaks_at_once, case().fresh(vanilla_mode=True), MANY)


# L6 bounded


@dataclass(frozen=True)
class GrowingState(SlotState):
    def where(self, rows, other):
        return self


class Grows(InternalMemory):
    """A copy of the slots more for every segment, of which the newest is read."""

    def read(self, hidden, state):
        return super().read(hidden, SlotState(state.slots[:, -8:]))

    def write(self, hidden, state, mask):
        newest = super().write(hidden, SlotState(state.slots[:, -8:]), mask)
        return GrowingState(torch.cat((state.slots, newest.slots), 1))

    def check_state(self, state, name):
        """Nobody refuses it at the door either."""


class Explodes(InternalMemory):
    """M <- 10^6 M + new: nothing decays."""

    def write(self, hidden, state, mask):
        return SlotState(1e6 * state.slots + super().write(hidden, state, mask).slots)


@pytest.mark.parametrize("feeding", [MANY, TOKENS], ids=str)
def test_a_state_that_grows_is_caught(make_with, feeding):
    breaks(laws.bounded, "L6", make_with(Grows), feeding)


def test_a_state_that_grows_is_caught_on_a_long_stream(make_with):
    breaks(laws.endless, "L6", make_with(Grows))


def test_a_state_that_explodes_is_caught(make_with):
    breaks(laws.endless, "L6", make_with(Explodes))


class LostOffset(RingMemory):
    """memorizing-transformers-pytorch: at capacity the keys start again, the values' offset counts on.

    Once full, the index of keys is emptied and its numbers restart at 0, so that key i no longer
    stands beside value i.
    """

    def write(self, hidden, state, mask):
        new = mask.sum(1)
        full = state.count + new > self.config.capacity
        keys = torch.where(rearrange(full, "b -> b 1 1"), torch.zeros_like(state.keys), state.keys)
        restarted = torch.where(full, torch.zeros_like(state.count), state.count)
        written = super().write(hidden, replace(state, keys=keys, count=restarted), mask)
        offset = rearrange(state.offset, "b -> b 1") + mask.cumsum(1) - 1
        values = self.put(self.v_proj(hidden), offset, mask, state.values)
        return OffsetState(written.keys, values, written.count, state.offset + new)

    def init_state(self, batch_size):
        state = super().init_state(batch_size)
        return OffsetState(state.keys, state.values, state.count, state.count)


@dataclass(frozen=True)
class OffsetState(State):
    keys: torch.Tensor = axes("batch slot feature")
    values: torch.Tensor = axes("batch slot feature")
    count: torch.Tensor = axes("batch")
    offset: torch.Tensor = axes("batch")


def ring(memory=RingMemory, capacity=10):
    return memory(RingConfig(capacity=capacity, sharpness=200.0), 16).double()


def test_after_overflow_the_newest_items_are_recalled_with_their_values():
    laws.overflow(ring(), 10, 16)


def test_wrong_values_after_overflow_are_caught():
    breaks(laws.overflow, "L6 overflow", ring(LostOffset), 10, 16)


def test_a_memory_that_forgets_too_early_is_caught():
    breaks(laws.overflow, "L6 overflow", ring(capacity=9), 10, 16)


def delta_rule(writer, hidden, slots, mask):
    """M <- M + k (v - k M), token by token; slots: [b s e]."""
    keys = 0.1 * writer.address.proj(hidden)[..., : slots.shape[1]] * mask[..., None]
    for key, value in zip(keys.unbind(1), writer.v_proj(hidden).unbind(1), strict=True):
        error = value - einsum(key, slots, "b s, b s e -> b e")
        slots = slots + einsum(key, error, "b s, b e -> b s e")
    return slots


class UnnormalisedDelta(InternalMemory):
    """A delta rule with keys of any length: it shrinks the error while |k|^2 < 2, and then it grows."""

    def write(self, hidden, state, mask):
        return SlotState(delta_rule(self.writer, hidden, state.slots, mask))


def without_norms(make):
    """What builds a model of which memories get the residual stream as large as it is."""

    def made():
        model = make()
        for block in model.blocks:
            block.attention_norm = nn.Identity()
        return model

    return made


def test_a_write_that_explodes_with_other_weights_is_caught(make_with, monkeypatch):
    make = make_with(UnnormalisedDelta)
    with monkeypatch.context() as patch:
        patch.setattr(laws, "STIRRED", laws.STIRRED[:1])
        laws.endless(make)  # it is finite with the weights it has
    breaks(laws.endless, "L6", make)


def test_a_write_that_explodes_with_large_inputs_is_caught(make_with, monkeypatch):
    monkeypatch.setattr(laws, "STIRRED", laws.STIRRED[:1])
    first = {"memory_layer_placement": "first_k", "memory_layer_k": 1}
    make = without_norms(make_with(UnnormalisedDelta, **first))
    with monkeypatch.context() as patch:
        patch.setattr(laws, "SCALES", (1.0, 1.0, 1.0))
        laws.endless(make)  # it is finite with inputs of the usual size
    breaks(laws.endless, "L6", make)


# float32


class RaisesTooHigh(InternalMemory):
    """A softmax that does not take the largest score off first: fine in float64."""

    def read(self, hidden, state):
        raised = torch.exp(20 * einsum(hidden, hidden, "b n d, b n d -> b n"))
        return super().read(hidden, state) * (raised / raised)[..., None]


def test_an_overflow_of_float32_is_caught(make_with):
    make_with(RaisesTooHigh)
    laws.isolation(case().build, MANY)
    breaks(laws.isolation, "L3", in_float32(case()).build, MANY)


# truncated backpropagation


class RebindsALocal(MemoryState):
    """RMT's `k2`: detach assigns to a name of its own and returns what it was given."""

    def detach(self):
        for _, tensor in self.named_tensors():
            tensor = tensor.detach()
        return self


class KeepsTheGraph(MemoryTransformer):
    def forward(self, *arguments, **keywords):
        output = super().forward(*arguments, **keywords)
        state = output.memory_state
        return replace(output, memory_state=RebindsALocal(state.memories, state.window))


class CutsAlways(InternalMemory):
    """A write without gradient: nothing learns to write."""

    def write(self, hidden, state, mask):
        return super().write(hidden.detach(), state, mask).detach()


class ForgetsToReassign(Trainer):
    """The same fault in the loop: a helper detaches its own variable and returns whether it did."""

    def backward(self, batch, task, positions):
        def manage_gradients(state):
            state = state.detach()
            return state is not None

        state, loss, right = None, 0.0, 0
        horizon = (self.config.training.horizon or task.segments) * task.segment_length
        for start in range(0, batch.tokens.shape[1], horizon):
            part = slice(start, start + horizon)
            output = self.model(batch.tokens[:, part], memory_state=state)
            state = output.memory_state
            manage_gradients(state)
            where = batch.targets[:, part], batch.scored[:, part]
            if where[1].any():
                piece = scored_cross_entropy(output.logits, *where) / positions
                piece.backward(retain_graph=True)
                loss, right = loss + float(piece.detach()), right + correct(output.logits, *where)
        return loss, right


def test_a_detach_that_rebinds_a_local_is_caught():
    breaks(laws.truncation, "truncation", make_model(KeepsTheGraph))


def test_a_memory_no_gradient_reaches_is_caught(make_with):
    breaks(laws.truncation, "truncation", make_with(CutsAlways))


def test_a_training_loop_that_rebinds_a_local_is_caught():
    breaks(laws.horizon, "horizon", ForgetsToReassign, case())


def test_a_memory_that_carries_nothing_in_training_is_caught(make_with):
    make_with(CutsAlways)
    breaks(laws.horizon, "horizon", Trainer, case())


def test_a_memory_that_carries_what_it_denies_is_caught(monkeypatch):
    monkeypatch.setattr(InternalMemoryConfig, "carries", property(lambda self: False))
    breaks(laws.horizon, "horizon", Trainer, case())
