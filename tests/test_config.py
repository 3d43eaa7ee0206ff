"""Configurations: what is refused and in which words, and that nothing is lost on the way to a file."""

import os

import pytest
import yaml

from memlib.config import (
    Config,
    ConfigError,
    InternalMemoryConfig,
    MemoryConfig,
    ModelConfig,
    Stage,
    TaskConfig,
    TrainingConfig,
    from_dict,
    get_memory_bank_assignments,
    get_memory_layer_indices,
    load_config,
    option,
    override,
    parse_overrides,
    preset_names,
    reference,
    save_config,
    to_dict,
)

SMALL = {"model.hidden_dim": 16, "model.num_heads": 2, "model.num_layers": 6}


def nested(path, value):
    """{"a": {"b": value}} for "a.b"."""
    *groups, name = path.split(".")
    values = {name: value}
    for group in reversed(groups):
        values = {group: values}
    return values


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("optimizer", "model, memory, task, training"),
        ("model.width", "hidden_dim"),
        ("memory.internal.slots", "num_slots"),
        ("task.recall.pairs", "num_pairs"),
    ],
)
def test_an_unknown_key_is_named_with_its_path_and_what_is_known(path, known):
    with pytest.raises(ConfigError, match=rf"^{path}: unknown key; known here: .*{known}"):
        from_dict(Config, nested(path, 1))


# Every field of the dataclasses in "Implementation Plan" and its place; several processes are not in the
# package, and neither are distributed_strategy and num_gpus.
PLAN = {
    "memory": """memory_layer_placement memory_layer_k memory_layer_n memory_layer_custom memory_sharing
        memory_sharing_k memory_block_variant wo_init_zero vanilla_mode""",
    "memory.chapters": """num_memory_tokens memory_dim use_low_rank_memory memory_rank low_rank_mode
        use_low_rank_projections projection_rank use_chapters num_chapters tokens_per_chapter
        top_k_chapters routing_strategy_train routing_strategy_inference use_load_balance_loss
        load_balance_coefficient use_z_loss z_loss_coefficient quantize_memory memory_quant_bits""",
    "training": """training_mode memory_lr lora_lr base_model_lr batch_size gradient_accumulation_steps
        max_steps warmup_steps weight_decay max_grad_norm gradient_checkpointing save_steps eval_steps""",
    "model": "hidden_dim num_heads num_layers intermediate_dim vocab_size use_rope",
    "adapter": """base_model_name freeze_base_model use_memory_adapter use_lora use_both_memory_and_lora
        lora_rank lora_alpha lora_targets""",
    "task.text": "text_field",
    "task.documents": "text_field",
}
RENAMED = {
    "model.max_seq_len": "model.segment_length",
    "training.dataset_name": "task.text.dataset or task.instructions.dataset or task.documents.dataset",
    "training.dataset_subset": "task.text.subset or task.instructions.subset or task.documents.subset",
    "training.dataset_split": "task.text.split or task.instructions.split or task.documents.split",
    "training.text_field": "task.text.text_field or task.documents.text_field",
    "model.base_model_name": "adapter.base_model_name",
    "model.freeze_base_model": "adapter.freeze_base_model",
    "memory.use_lora": "adapter.use_lora",
    "memory.lora_targets": "adapter.lora_targets",
    "memory.use_both_memory_and_lora": "adapter.use_both_memory_and_lora",
}


@pytest.mark.parametrize(
    "path", [f"{group}.{name}" for group, names in PLAN.items() for name in names.split()]
)
def test_every_field_of_the_plan_is_there_under_its_name(path):
    assert path in {row[0] for row in reference()}


@pytest.mark.parametrize(
    ("path", "place"),
    [*RENAMED.items(), ("memory.top_k_chapters", "memory.chapters.top_k_chapters")],
)
@pytest.mark.parametrize(
    "refuse", [lambda p: from_dict(Config, nested(p, 1)), lambda p: override(Config(), {p: 1})]
)
def test_a_field_the_plan_has_elsewhere_is_refused_with_its_place(path, place, refuse):
    with pytest.raises(ConfigError, match=rf"^{path}: unknown key; .*; did you mean {place}\?$"):
        refuse(path)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("model", 3, "expected a mapping"),
        ("model.num_layers", "six", "expected an integer"),
        ("model.num_layers", 2.0, "expected an integer"),
        ("model.num_layers", True, "expected an integer"),
        ("model.use_rope", 1, "expected true or false"),
        ("model.dropout", "none", "expected a number"),
        ("model.dropout", False, "expected a number"),
        ("memory.kinds", "internal", "expected a list of a string"),
        ("memory.memory_layer_custom", 3, "expected a list of an integer"),
        ("memory.internal.slot_dim", "wide", "expected an integer"),
        ("memory.fusion", "sum", "expected one of softmax, residual"),
        ("task.text.dataset", None, "expected a string"),
        ("training.curriculum", [{"set": 3}], "expected a mapping"),
    ],
)
def test_a_wrong_type_is_refused_and_says_what_would_be_right(path, value, expected):
    with pytest.raises(ConfigError, match=rf"^{path}.*{expected}"):
        from_dict(Config, nested(path, value))


@pytest.mark.parametrize(
    ("path", "value", "limit"),
    [
        ("model.hidden_dim", 0, "at least 1"),
        ("model.dropout", 1.0, "at most 0.99"),
        ("model.dropout", float("nan"), "at least 0.0"),
        ("memory.memory_layer_k", 0, "at least 1"),
        ("memory.internal.num_slots", -4, "at least 1"),
        ("task.recall.num_values", 1, "at least 2"),
        ("task.passkey.depth", 1.5, "at most 1"),
        ("training.min_lr_ratio", 2, "at most 1.0"),
        ("training.horizon", 0, "at least 1"),
        ("training.curriculum", [{"from_step": 0}, {"from_step": -3}], "at least 0"),
    ],
)
def test_a_value_outside_its_limits_is_refused_with_the_limit(path, value, limit):
    with pytest.raises(ConfigError, match=rf"^{path}.*: must be {limit}"):
        from_dict(Config, nested(path, value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_heads": 3}, r"model.num_heads = 3: must divide model.hidden_dim = 16"),
        ({"model.num_heads": 16}, r"model.num_heads = 16: .* even head width.*use_rope: false"),
        ({"memory.kinds": ["lstm"]}, r"memory.kinds\[0\] = 'lstm': known memories: .*internal"),
        ({"memory.kinds": ["internal", "internal"]}, r"memory.kinds\[1\] = 'internal': named twice"),
        ({"memory.memory_layer_placement": "custom"}, r"memory.memory_layer_custom: needed"),
        (
            {"memory.memory_layer_placement": "custom", "memory.memory_layer_custom": [0, 6]},
            r"memory.memory_layer_custom\[1\] = 6: layers are 0 … 5",
        ),
        (
            {
                "memory.kinds": ["internal"],
                "memory.memory_layer_placement": "every_n",
                "memory.memory_layer_n": 7,
            },
            r"memory.memory_layer_n = 7: no layer has memory with model.num_layers = 6",
        ),
        (
            {"memory.kinds": ["internal"], "memory.internal.num_heads": 5},
            r"memory.internal.num_heads = 5: must divide the slot width 16",
        ),
        (
            {"memory.kinds": ["internal"], "memory.internal.num_slots": 6},
            r"memory.internal.num_slots = 6: must be a multiple of memory.internal.num_heads = 4",
        ),
        ({"memory.memory_block_variant": "B"}, r"memory.memory_block_variant = 'B'.*fusion: residual"),
        (
            {"training.training_mode": "facts"},
            r"training.training_mode = 'facts': is for a pretrained base only; set adapter.base_model_name",
        ),
        ({"task.segments_min": 5}, r"task.segments_min = 5: must be at most task.segments = 4"),
        (
            {"training.curriculum": [{"from_step": 5}, {"from_step": 5}]},
            r"training.curriculum: from_step must increase.*\[5, 5\]",
        ),
        (
            {"training.curriculum": [{"set": {"recall.pairs": 1}}]},
            r"training.curriculum\[0\].set: recall.pairs: unknown key; known here: num_pairs",
        ),
        (
            {"training.curriculum": [{"set": {"segments": "few"}}]},
            r"training.curriculum\[0\].set: segments = 'few': expected an integer",
        ),
    ],
)
def test_an_impossible_combination_is_refused_with_the_remedy(changes, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        override(Config(), SMALL | changes)


def test_a_config_built_in_python_is_checked_like_a_file():
    with pytest.raises(ConfigError, match=r"^model.hidden_dim = '16': expected an integer"):
        Config(model=ModelConfig(hidden_dim="16"))
    with pytest.raises(ConfigError, match=r"^training.curriculum\[0\].from_step = -1: must be at least 0"):
        Config(training=TrainingConfig(curriculum=[Stage(from_step=-1)]))


def test_numbers_are_read_as_people_write_them(tmp_path):
    """YAML 1.1 reads 1e-4 as text; an integer is a good value for a number."""
    file = tmp_path / "run.yaml"
    file.write_text("training: {memory_lr: 1e-4, gate_lr: 1.5E-3, max_grad_norm: 2}")
    training = load_config(file).training
    assert (training.memory_lr, training.gate_lr, training.max_grad_norm) == (1e-4, 1.5e-3, 2.0)
    assert isinstance(training.max_grad_norm, float)


def example():
    return Config(
        memory=MemoryConfig(kinds=["internal"], internal=InternalMemoryConfig(slot_dim=32)),
        task=TaskConfig(name="qa", segments_min=2),
        training=TrainingConfig(
            memory_lr=1e-5, curriculum=[Stage(set={"segments": 2, "qa.supporting_facts": 1})]
        ),
    )


@pytest.mark.parametrize("config", [Config(), example()], ids=["defaults", "example"])
def test_a_saved_config_loads_as_it_was(config, tmp_path):
    save_config(config, tmp_path / "new" / "run.yaml")
    assert load_config(tmp_path / "new" / "run.yaml") == config
    assert os.listdir(tmp_path / "new") == ["run.yaml"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    save_config(Config(), file)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_config(example(), file)
    assert load_config(file) == Config()


def test_presets_load_by_bare_name_and_round_trip(tmp_path):
    assert preset_names()
    for name in preset_names():
        config = load_config(name)
        save_config(config, tmp_path / f"{name}.yaml")
        assert load_config(tmp_path / f"{name}.yaml") == config


def test_a_file_that_is_not_there_or_not_yaml_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^no_such_preset: no such file or preset; presets: .*recall"):
        load_config("no_such_preset")
    with pytest.raises(ConfigError, match=r"nowhere.yaml: no such file"):
        load_config(tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("model: {hidden_dim: 8")
    with pytest.raises(ConfigError, match=r"broken.yaml: not valid YAML"):
        load_config(broken)
    broken.write_text("- model")
    with pytest.raises(ConfigError, match=r"the file = .* expected a mapping"):
        load_config(broken)
    broken.write_text("")
    assert load_config(broken) == Config()


def test_override_makes_a_checked_copy():
    config = Config()
    changed = override(config, {"model.num_layers": 2, "training.memory_lr": "1e-3"})
    assert (changed.model.num_layers, changed.training.memory_lr) == (2, 1e-3)
    assert config == Config()
    for path, message in {
        "model.depth": r"model.depth: unknown key; known here: hidden_dim",
        "modle.num_layers": r"modle: unknown key; known here: model",
        "model.num_layers.x": r"model.num_layers: unknown key",
    }.items():
        with pytest.raises(ConfigError, match=f"^{message}"):
            override(config, {path: 2})
    with pytest.raises(ConfigError, match=r"^model.num_layers = 0: must be at least 1"):
        override(config, {"model.num_layers": 0})


def test_overrides_are_read_as_yaml():
    words = ["memory.kinds=[internal]", "training.horizon=null", "task.name=qa", "training.memory_lr=1e-3"]
    assert parse_overrides(words) == {
        "memory.kinds": ["internal"],
        "training.horizon": None,
        "task.name": "qa",
        "training.memory_lr": "1e-3",
    }
    assert override(Config(), parse_overrides(words)).training.memory_lr == 1e-3
    with pytest.raises(ConfigError, match="expected path=value"):
        parse_overrides(["training.max_steps"])


def test_the_reference_has_every_field_its_documentation_and_its_default():
    rows = {path: (default, doc) for path, _, default, doc in reference()}
    leaves = 0

    def check(values, prefix):
        nonlocal leaves
        for name, value in values.items():
            default, doc = rows[prefix + name]
            assert doc, prefix + name
            if isinstance(value, dict) and value:
                check(value, f"{prefix}{name}.")
            else:
                leaves += 1
                assert yaml.safe_load(default) == value

    check(to_dict(Config()), "")
    groups = [path for path, kind, *_ in reference() if kind == "group"]
    assert len(rows) == leaves + len(groups)


def test_defaults_are_not_shared():
    first, second = Config(), Config()
    first.memory.kinds.append("internal")
    assert second.memory.kinds == [] and option([], "").default_factory() == []


@pytest.mark.parametrize(
    ("placement", "options", "layers"),
    [
        ("all", {}, [0, 1, 2, 3, 4, 5]),
        ("first_k", {"memory_layer_k": 2}, [0, 1]),
        ("first_k", {"memory_layer_k": 9}, [0, 1, 2, 3, 4, 5]),
        ("last_k", {"memory_layer_k": 2}, [4, 5]),
        ("every_n", {"memory_layer_n": 2}, [1, 3, 5]),
        ("every_n", {"memory_layer_n": 4}, [3]),
        ("custom", {"memory_layer_custom": [4, 1, 4]}, [1, 4]),
    ],
)
def test_placement_says_which_layers_have_memory(placement, options, layers):
    memory = {f"memory.{name}": value for name, value in options.items()}
    chosen = SMALL | memory | {"memory.memory_layer_placement": placement}
    assert get_memory_layer_indices(override(Config(), chosen | {"memory.kinds": ["internal"]})) == layers
    assert get_memory_layer_indices(override(Config(), chosen)) == []
    vanilla = {"memory.kinds": ["internal"], "memory.vanilla_mode": True}
    assert get_memory_layer_indices(override(Config(), chosen | vanilla)) == []


@pytest.mark.parametrize(
    ("sharing", "k", "banks"),
    [
        ("shared", 2, [0, 0, 0, 0, 0]),
        ("per_layer", 2, [0, 1, 2, 3, 4]),
        ("every_k_layers", 2, [0, 0, 1, 1, 2]),
        ("every_k_layers", 3, [0, 0, 0, 1, 1]),
    ],
)
def test_sharing_groups_the_memory_layers_in_order(sharing, k, banks):
    layers = [0, 2, 3, 4, 5]
    config = override(
        Config(),
        SMALL
        | {
            "memory.kinds": ["internal"],
            "memory.memory_layer_placement": "custom",
            "memory.memory_layer_custom": layers,
            "memory.memory_sharing": sharing,
            "memory.memory_sharing_k": k,
        },
    )
    assert get_memory_bank_assignments(config) == dict(zip(layers, banks, strict=True))
