import pytest
import torch
from torch import nn

from memlib.config import Config, override
from memlib.models import MemoryTransformer
from memlib.models.info import count_parameters, format_params, get_model_size_mb, print_model_info

SMALL = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 3,
    "model.intermediate_dim": 24,
    "model.vocab_size": 10,
    "model.segment_length": 4,
}


def test_parameters_are_counted_once_and_frozen_ones_on_request():
    first, second = nn.Linear(3, 4), nn.Linear(3, 4, bias=False)
    second.weight = first.weight
    model = nn.ModuleList([first, second])
    assert count_parameters(model) == 3 * 4 + 4
    first.weight.requires_grad = False
    assert count_parameters(model) == 4
    assert count_parameters(model, trainable_only=False) == 3 * 4 + 4


def test_the_baseline_has_the_parameters_of_the_formula():
    d, i, v, layers = 16, 24, 10, 3
    model = MemoryTransformer(override(Config(), SMALL))
    assert count_parameters(model) == layers * (4 * d * d + 3 * d * i + 2 * d) + d + 2 * v * d


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.2K"),
        (2000, "2K"),
        (350_000_000, "350M"),
        (1_200_000_000, "1.2B"),
        (999_999, "1M"),
        (999_960_000, "1B"),
    ],
)
def test_params_are_formatted_as_people_say_them(count, text):
    assert format_params(count) == text


def test_size_counts_parameters_and_buffers_in_mib():
    model = nn.BatchNorm1d(256, dtype=torch.float64)
    numbers = 4 * 256 * 8 + 8
    assert get_model_size_mb(model) == pytest.approx(numbers / 2**20)


def test_the_diagram_names_every_layers_memory_and_bank(capsys):
    memory = {
        "memory.kinds": ["internal"],
        "memory.memory_layer_placement": "custom",
        "memory.memory_layer_custom": [0, 2],
        "memory.internal.num_heads": 2,
    }
    config = override(Config(), SMALL | memory)
    model = MemoryTransformer(config)
    print_model_info(model, config)
    assert capsys.readouterr().out.splitlines() == [
        "3 layers, width 16, 2 heads, window 4 tokens",
        "  layer 0: internal, bank 0",
        "  layer 1: no memory",
        "  layer 2: internal, bank 1",
        f"{format_params(count_parameters(model))} parameters, {get_model_size_mb(model):.2f} MiB",
    ]
