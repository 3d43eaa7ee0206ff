"""The capacity page is up to date, and its figures are those of real states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memlib.config import Config, HdsMemoryConfig, override
from memlib.evaluation.capacity import Part, capacity, designs, page, parts_of, size, table
from memlib.memory import MEMORIES, State, axes

PAGE = Path(__file__).parents[2] / "docs" / "capacity.md"


def test_the_stored_page_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == page(), "make docs writes it anew"


@pytest.mark.parametrize("kind", MEMORIES)
def test_bytes_are_those_of_a_real_state(kind):
    real = MEMORIES[kind](getattr(Config().memory, kind), 768)
    found = capacity(kind, 768)
    assert found.nbytes == real.init_state(1).nbytes == real.to(torch.bfloat16).init_state(1).nbytes
    content = sum(part.values for part in found.parts)
    assert 0.98 < 4 * content / found.nbytes <= 1 or kind == "ltm"  # 512 ages beside narrow slots
    assert f"| {kind} | {found.parts[0].name} | {found.parts[0].places:,} |" in page()


def test_options_count():
    plain, half = capacity("hds", 768), capacity("hds", 768, num_memories=4, num_blocks=16)
    assert half.part("level 3, banks").places * 2 == plain.part("level 3, banks").places == 8 * 1024
    assert half.part("level 1, blocks") == Part("level 1, blocks", 16, 768, HdsMemoryConfig().chunk_size)
    with pytest.raises(ValueError, match=r"memory.hds.slots"):
        capacity("hds", 768, slots=3)


def test_the_sizes_of_the_mm_rec_design_and_prototype():
    made = designs()
    banks = made["design"].part("level 3, banks")
    assert (banks.places, banks.width, banks.values) == (8192, 512, 8 * 1024 * 512)
    ring, store = made["prototype"].parts
    assert ring.places + store.places == 1024 and ring.width == 512 + 512


def test_the_design_is_what_a_model_of_it_would_carry():
    """Summed over one shared state; per layer it is a multiple."""
    from memlib.models import MemoryTransformer

    sizes = {"model.hidden_dim": 64, "model.num_heads": 1, "model.num_layers": 2, "model.vocab_size": 50}
    sizes |= {"memory.kinds": ["hds"], "model.intermediate_dim": 8, "memory.hds.num_slots": 16}
    for sharing, states in (("shared", 1), ("per_layer", 2)):
        model = MemoryTransformer(override(Config(), sizes | {"memory.memory_sharing": sharing}))
        assert model.init_state(1).nbytes == states * capacity("hds", 64, num_slots=16).nbytes


@dataclass(frozen=True)
class Unknown(State):
    """A state this package does not have: [b k s e] and counters."""

    banks: Tensor = axes("batch bank slot feature")
    counts: Tensor = axes("batch bank slot")


def test_a_memory_nobody_named_counts_what_holds_content():
    state = Unknown(torch.zeros(1, 3, 5, 7), torch.zeros(1, 4, 4, dtype=torch.int64))
    assert parts_of(state, None) == [Part("banks", 15, 7)]


@dataclass(frozen=True)
class Matrices(State):
    """Four heads of a linear memory."""

    matrix: Tensor = axes("batch head feature value")


def test_matrices_of_keys_and_values_hold_no_number_of_tokens():
    (part,) = parts_of(Matrices(torch.zeros(1, 4, 64, 64)), None)
    assert (part.places, part.width, part.tokens) == (1, 4 * 64 * 64, None)


def test_sizes_are_read_easily():
    assert [size(n) for n in (999, 2_000, 16_881_708)] == ["999", "2,000 (2 kB)", "16,881,708 (16.9 MB)"]
    assert table([capacity("ltm", 64)]).count("\n") == 2
