"""What is read out of a hierarchy of states: equal to what its levels really hold and say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einops import einsum, rearrange

from memlib import load_config, override, record
from memlib.lab.levels import blocks_of, levels_of, what_is_left
from memlib.lab.measures import provenance, write_strength
from memlib.lab.trace import TraceError
from memlib.lab.widgets import drive, levels_over_time
from memlib.lab.widgets.levels import ladder
from memlib.models import MemoryTransformer

BANKS, SLOTS, N = 3, 8, 16


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = {"num_memories": BANKS, "num_slots": SLOTS, "chunk_size": 6, "num_blocks": 4, "decay": "fixed"}
    changes = {f"memory.hds.{name}": value for name, value in small.items()}
    model = MemoryTransformer(override(load_config("recall_hds"), changes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("log_half_life"):
                p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.fixture(scope="module")
def recorded(model):
    """A stream of 4 segments and a piece; the values its tokens wrote, and what they found in the banks."""
    ids = torch.randint(0, 64, (2, 4 * N + 5), generator=torch.Generator().manual_seed(1))
    said = {"v": [], "found": []}
    banks = model.blocks[0].memories["hds"].banks
    hooks = [
        banks.v_proj.register_forward_hook(lambda _m, _i, out: said["v"].append(torch.tanh(out))),
        banks.o_proj.register_forward_hook(lambda _m, into, _o: said["found"].append(into[0])),
    ]
    with record(model) as trace, torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return trace, *(torch.cat(said[name], 1).numpy() for name in ("v", "found"))


def test_what_is_left_is_what_the_banks_hold(recorded):
    """M_k at segment t = sum_u left_tuk a_uks v_u, in every bank and segment."""
    trace, v, _ = recorded
    seen = levels_of(trace, row=1)
    address = trace["hds.banks.writer.weight"].at(layer=0, batch=1).values
    address = rearrange(address, "n (k s) -> n k s", k=BANKS)
    slots = trace["hds.banks.before"].at(layer=0, batch=1).values
    for t in range(4):
        held = einsum(seen.left[t, : 4 * N], address, v[1], "u k, u k s, u e -> k s e")
        np.testing.assert_allclose(rearrange(slots[t], "(k s) e -> k s e", k=BANKS), held, atol=1e-5)
    assert not seen.left[0].any() and seen.left[4, :N].any()
    np.testing.assert_allclose(seen.norm[3], np.linalg.norm(slots[3], axis=-1), rtol=1e-5)


def test_provenance_is_what_is_read_from_the_banks(recorded):
    trace, v, found = recorded
    row = 1
    closed = 4 * N
    said = provenance(trace, "hds.banks", row)[:closed]
    np.testing.assert_allclose(said[:, :closed] @ v[row], found[row, :closed], atol=1e-5)


def test_strength_counts_the_share_of_the_bank(recorded):
    trace, _, _ = recorded
    strength = write_strength(trace, "hds.banks")
    by_bank = rearrange(strength, "n (k s) -> n k s", k=BANKS).sum(-1)
    np.testing.assert_allclose(by_bank, levels_of(trace).written[: 4 * N], rtol=1e-4)


def test_blocks_are_seen_when_they_are_complete(recorded):
    """Blocks of 6 tokens, seen from the next segment on; four are kept."""
    trace, _, _ = recorded
    seen = levels_of(trace)
    assert seen.bounds[:3].tolist() == [[0, 5], [6, 11], [12, 17]] and len(seen.bounds) == 4 * N // 6
    there = seen.block > 0
    for t in range(4 * N + 5):
        complete = [m for m, (_, last) in enumerate(seen.bounds) if last < t // N * N]
        assert np.flatnonzero(there[t]).tolist() == complete[-4:]
    np.testing.assert_allclose(seen.block.sum(1) + seen.nothing, 1, atol=1e-5)
    assert seen.filled[[0, 5, 6, 4 * N]] == pytest.approx([1 / 6, 1, 1 / 6, 0])


def test_shares_sum_to_one(recorded):
    seen = levels_of(recorded[0])
    np.testing.assert_allclose(seen.level.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(seen.read.sum(1), 1, atol=1e-5)
    assert seen.segment_length == N and seen.left.shape == (5, 4 * N + 5, BANKS)


def test_fixed_half_lives_come_back(model, recorded):
    expected = model.blocks[0].memories["hds"].half_lives
    np.testing.assert_allclose(levels_of(recorded[0]).half_lives, expected, rtol=1e-4)


def test_half_is_left_after_a_half_life():
    """One token writes; two segments of a half-life of two later, half of it is left."""
    length, half_life = 4, 2
    written = np.zeros((20, 1))
    written[3] = 1
    left = what_is_left(written, np.full((20, 1), -np.log(2) / (half_life * length)), length, 5)
    assert left[:, 3, 0] == pytest.approx([0, 1, 2**-0.5, 0.5, 2**-1.5])


def test_the_ladder_shows_only_the_past(recorded):
    """The static face: what token 40 sees of each level and bank ends with the segment before its own."""
    seen, time = levels_of(recorded[0]), 40
    lines = ladder(seen, time)
    assert lines.shape == (4 + BANKS, len(seen.level)) and lines.max() <= 1
    assert np.flatnonzero(lines[0]).tolist() == [time]
    assert not lines[1:, 2 * N :].any() and lines[2:, : 2 * N].all()
    first, last = seen.bounds[4]
    assert lines[1, first] == pytest.approx(seen.level[time, 1] * seen.block[time, 4])
    assert lines[4 + 1, 7] == pytest.approx(seen.left[2, 7, 1] / seen.left.max())


def test_the_view_tells_half_lives_and_shares(recorded):
    view, seen = levels_over_time(recorded[0]), levels_of(recorded[0])
    assert f"3 banks with half-lives of {seen.half_lives[0]:.1f}, " in view.summary
    assert view.times == len(seen.level) and view.items == 4 + BANKS
    assert drive(view) == 3 + 3 * 3


def test_padding_fills_no_block():
    filled = np.array([0, 0.5, 0, 1, 0.5, 1])
    weight = np.tile([0.2, 0.3, 0.5], (6, 1))
    weight[:2] = [1, 0, 0]
    bounds, block, nothing = blocks_of(weight, filled, length=2)
    assert bounds.tolist() == [[0, 3], [4, 5]]
    assert block[4:].tolist() == [[0.5, 0]] * 2 and not block[:4].any() and nothing[0] == 1


def test_a_memory_without_levels_is_refused():
    with record(MemoryTransformer(load_config("recall_internal"))) as trace, torch.no_grad():
        pass
    with pytest.raises(TraceError, match="hds: has no levels; recorded: nothing"):
        levels_of(trace)


def test_a_recording_from_inside_a_segment_is_refused(model):
    with torch.no_grad():
        state = model(torch.randint(0, 64, (1, 5))).memory_state
        with record(model) as trace:
            model(torch.randint(0, 64, (1, N - 4)), memory_state=state)
    with pytest.raises(TraceError, match="start recording at a segment's border"):
        levels_of(trace)
