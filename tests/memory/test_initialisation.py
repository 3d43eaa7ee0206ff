"""Built on the meta device and initialised later, or built at once: the same memory."""

import pytest
import torch
from torch import nn

from memlib.config import Config, load_config, override, preset_names
from memlib.memory import MEMORIES
from memlib.models import MemoryTransformer
from memlib.nn.linear import initialise
from tests.laws.cases import memory_config, variants

EACH = [(kind, options) for kind in MEMORIES for options in variants(kind)]


def tensors(module):
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def later(build):
    """Built without numbers, given memory full of garbage, then initialised."""
    with torch.device("meta"):
        module = build()
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in tensors(module).values():
            tensor.fill_(7)
    torch.manual_seed(0)
    return initialise(module)


def at_once(build):
    module = build()
    torch.manual_seed(0)
    return initialise(module)


def same(mine, theirs):
    mine, theirs = tensors(mine), tensors(theirs)
    assert list(mine) == list(theirs)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


@pytest.mark.parametrize(("kind", "options"), EACH, ids=lambda value: str(value)[:60])
def test_a_memory_initialised_after_the_meta_device_equals_one_built_at_once(kind, options):
    def build():
        return MEMORIES[kind](memory_config(kind)(**options), 16)

    same(later(build), at_once(build))


@pytest.mark.parametrize(
    "preset", [name for name in preset_names() if not name.startswith(("design", "hds_100m"))]
)
def test_every_preset_can_be_built_on_the_meta_device(preset):
    same(*(make(lambda: MemoryTransformer(load_config(preset))) for make in (later, at_once)))


@pytest.mark.parametrize(("kind", "options"), EACH, ids=lambda value: str(value)[:60])
def test_what_a_constructor_sets_is_what_initialising_sets(kind, options):
    """All that is not random: gates, slots, tables, half-lives, sharpness, buffers."""
    built = MEMORIES[kind](memory_config(kind)(**options), 16)
    fixed = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        fixed.append({name: t.clone() for name, t in tensors(initialise(built)).items()})
    still = [name for name in fixed[0] if torch.equal(fixed[0][name], fixed[1][name])]
    assert still
    again = MEMORIES[kind](memory_config(kind)(**options), 16)
    for name in still:
        assert torch.equal(tensors(again)[name], fixed[0][name]), name


def test_no_parameter_is_a_scalar():
    for kind, options in EACH:
        built = MEMORIES[kind](memory_config(kind)(**options), 16)
        assert all(p.ndim for p in built.parameters()), kind


@pytest.mark.parametrize("kind", MEMORIES)
def test_only_the_blocks_own_maps_into_the_residual_stream_shrink_with_depth(kind):
    """A memory's W_o goes into the fusion: its start does not depend on the number of layers."""
    sizes = {"model.hidden_dim": 64, "model.num_heads": 4, "model.num_layers": 8, "memory.kinds": [kind]}
    sizes |= {"model.intermediate_dim": 96, "model.vocab_size": 50, "model.segment_length": 16}
    model = MemoryTransformer(override(Config(), sizes))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("blocks") and module.weight.std() > 0:
            scaled = float(module.weight.std()) * module.in_features**0.5
            own = ".memories." not in name and name.endswith(("attention.o_proj", "mlp.down_proj"))
            assert scaled == pytest.approx(0.25 if own else 1.0, rel=0.2), name
