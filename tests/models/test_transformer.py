"""The model's interface: what it takes, returns and refuses; the laws are in tests/laws."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from memlib.config import Config, override
from memlib.memory import MEMORIES
from memlib.memory.gates import Gate
from memlib.models import MemoryTransformer
from tests.laws.cases import BASELINE, Case, stir, variants

SMALL = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 6,
    "model.intermediate_dim": 24,
    "model.vocab_size": 11,
    "model.segment_length": 4,
    "memory.kinds": ["internal"],
    "memory.internal.num_slots": 4,
    "memory.internal.num_heads": 2,
}


def build(changes=None):
    """The small model with the given fields of its config changed."""
    torch.manual_seed(0)
    return MemoryTransformer(override(Config(), SMALL | (changes or {}))).eval()


def ids(batch=2, tokens=10):
    return torch.randint(11, (batch, tokens), generator=torch.Generator().manual_seed(0))


def test_outputs_are_had_by_attribute_and_by_key():
    out = build()(ids(), labels=ids())
    assert out.logits.shape == (2, 10, 11)
    assert list(out) == out.keys() == ["logits", "memory_state", "loss", "router_losses"]
    for key in out:
        assert out[key] is getattr(out, key)
    assert {**out}["loss"] is out.loss and out.router_losses == {}
    with pytest.raises(KeyError, match="'attentions': the output has logits, memory_state, loss"):
        out["attentions"]
    assert build()(ids()).loss is None


def test_the_loss_is_next_token_cross_entropy_with_the_shift_made_here():
    labels = ids().clone()
    labels[0, :5] = -100
    out = build()(ids(), labels=labels)
    want, count = 0.0, 0
    for b in range(2):
        for t in range(9):
            if labels[b, t + 1] != -100:
                want -= F.log_softmax(out.logits[b, t], 0)[labels[b, t + 1]]
                count += 1
    torch.testing.assert_close(out.loss, want / count)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": torch.zeros(4).long()}, r"input_ids has shape \(4,\): expected \[batch, tokens\]"),
        ({"input_ids": torch.zeros(2, 0).long()}, r"shape \(2, 0\): .*not empty"),
        (
            {"input_ids": ids(), "attention_mask": torch.ones(2, 9)},
            r"attention_mask has shape \(2, 9\): expected input_ids' \(2, 10\)",
        ),
        (
            {"input_ids": ids(), "labels": ids(batch=1)},
            r"labels has shape \(1, 10\): expected input_ids' \(2, 10\)",
        ),
        (
            {"input_ids": torch.tensor([[3, 11]])},
            r"holds 11: ids are 0 … 10; .*raise model.vocab_size",
        ),
        ({"input_ids": torch.tensor([[-1, 3]])}, r"holds -1: ids are 0 … 10"),
        ({"input_ids": ids().float()}, r"input_ids is torch.float32: pass whole numbers"),
        ({"input_ids": ids(), "labels": ids().double()}, r"labels is torch.float64: pass whole numbers"),
        ({"input_ids": ids(), "labels": ids() + 5}, r"labels hold 1\d: labels are ids, 0 … 10, or -100"),
        ({"input_ids": ids(), "labels": ids() - 99}, r"labels hold -\d\d: labels are ids"),
        ({"input_ids": ids(), "labels": ids() * 0 - 100}, r"all -100 .*: nothing is left to predict"),
        ({"input_ids": ids()[:, :1], "labels": ids()[:, :1]}, r"nothing is left to predict"),
        (
            {"input_ids": ids(), "memory_state": build().init_state(3)},
            r"memory_state holds 3 streams, input_ids 2: pick rows with memory_state.rows",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_value_limit_and_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        build()(**arguments)


def test_any_integer_mask_will_do():
    mask = torch.ones(2, 10)
    mask[1, 6:] = 0
    outputs = [build()(ids(), attention_mask=mask.to(dtype)).logits for dtype in (torch.bool, torch.int64)]
    assert torch.equal(*outputs)


def test_tied_embeddings_are_one_matrix():
    tied, loose = build({"model.tie_embeddings": True}), build()
    assert tied.head.weight is tied.embedding.weight
    assert loose.head.weight is not loose.embedding.weight
    before, after = (sum(p.numel() for p in m.parameters()) for m in (loose, tied))
    assert before - after == 11 * 16


@pytest.mark.parametrize(
    ("placement", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"memory.memory_layer_placement": "first_k", "memory.memory_layer_k": 2}, [0, 1]),
        ({"memory.memory_layer_placement": "last_k", "memory.memory_layer_k": 2}, [4, 5]),
        ({"memory.memory_layer_placement": "every_n", "memory.memory_layer_n": 2}, [1, 3, 5]),
        ({"memory.memory_layer_placement": "custom", "memory.memory_layer_custom": [3]}, [3]),
        ({"memory.kinds": []}, []),
        ({"memory.vanilla_mode": True}, []),
    ],
)
def test_only_the_placed_layers_have_memory(placement, layers):
    model = build(placement)
    assert [i for i in range(6) if model.block(i).memories.memory_list] == layers
    assert [i for i in range(6) if model.block(i).fusion is not None] == layers
    state = model(ids(tokens=6)).memory_state
    assert len(state.window.hidden) == len(layers) and len(state.memories) == len(layers)


@pytest.mark.parametrize(
    ("sharing", "k", "banks"),
    [("shared", 2, 1), ("per_layer", 2, 6), ("every_k_layers", 2, 3), ("every_k_layers", 4, 2)],
)
def test_sharing_says_how_many_banks_there_are(sharing, k, banks):
    model = build({"memory.memory_sharing": sharing, "memory.memory_sharing_k": k})
    state = model.init_state(3)
    assert len(state.memories) == banks
    assert {bank.slots.shape for bank in state.memories} == {(3, 4, 16)}
    assert len(model(ids()).memory_state.memories) == banks


def test_layers_that_share_a_bank_write_it_one_after_another():
    model, mask, seen = build({"memory.memory_sharing": "shared"}), torch.ones(2, 4, dtype=torch.bool), []
    for block in model.blocks:
        block.register_forward_hook(lambda _block, _inputs, output: seen.append(output.hidden))
    (state,) = model.init_state(2).memories
    (got,) = model(ids(tokens=4)).memory_state.memories
    for layer in range(6):
        (memory,) = model.block(layer).memories.memory_list
        state = memory.write(seen[layer], state, mask)
    assert torch.equal(got.slots, state.slots)


@torch.no_grad()
def test_the_window_holds_what_no_write_has_seen_yet():
    model = build()
    state = model(ids(tokens=6)).memory_state
    assert state.window.length == 2
    assert state.window.keys[0].shape == state.window.values[5].shape == (2, 2, 2, 8)
    assert state.window.hidden[0].shape == (2, 2, 16) and state.window.mask.all()
    assert model(ids(tokens=8)).memory_state.window.length == 0


@pytest.mark.parametrize("write", ["addressed", "attention"])
@pytest.mark.parametrize("fusion", [{}, {"memory.fusion": "residual", "memory.wo_init_zero": False}])
def test_every_parameter_gets_a_gradient_within_two_segments(write, fusion):
    """Gates start with zero weights: only what comes before them may stay still in the first step."""
    model = build({"memory.internal.write": write, "memory.memory_sharing": "shared", **fusion})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokens = ids(tokens=12)
    model(tokens, labels=tokens).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_fresh_models_start_as_the_table_says():
    model = build({"model.hidden_dim": 64, "model.vocab_size": 2000, "memory.fusion": "residual"})
    weights = dict(model.named_parameters())

    def std(name):
        return float(weights[name].detach().std())

    assert std("embedding.weight") == pytest.approx(64**-0.5, rel=0.05)
    assert std("head.weight") == pytest.approx(64**-0.5, rel=0.05)
    assert std("blocks.0.attention.q_proj.weight") == pytest.approx(64**-0.5, rel=0.05)
    assert std("blocks.0.attention.o_proj.weight") == pytest.approx((64 * 12) ** -0.5, rel=0.05)
    assert std("blocks.0.mlp.down_proj.weight") == pytest.approx((24 * 12) ** -0.5, rel=0.1)
    assert not weights["blocks.0.fusion.o_proj.0.weight"].any()
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    assert gates and not any(gate.weight.any() for gate in gates)


def test_the_second_mlp_of_variant_b_starts_at_zero():
    model = build({"memory.fusion": "residual", "memory.memory_block_variant": "B"})
    assert not model.block(0).extra_mlp.down_proj.weight.any()
    assert build({"memory.fusion": "residual"}).block(0).extra_mlp is None


def test_the_seed_decides_the_weights():
    first, second = build(), build()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_dropout_works_in_training_only():
    model = build({"model.dropout": 0.5})
    assert torch.equal(model(ids()).logits, model(ids()).logits)
    model.train()
    assert not torch.equal(model(ids()).logits, model(ids()).logits)


def test_a_printed_model_shows_where_its_memory_is():
    text = str(build({"memory.memory_layer_placement": "custom", "memory.memory_layer_custom": [3]}))
    assert text.count("(internal): InternalMemory(") == text.count("SoftmaxFusion(") == 1


@torch.no_grad()
def test_reset_rows_are_as_new_and_the_state_passed_in_is_not_touched():
    model = build()
    state = model(ids(batch=3)).memory_state
    copy = state.clone()
    reset = model.reset(state, torch.tensor([True, False, True]))
    fresh = model.init_state(3)
    for old, new, start in zip(state.memories, reset.memories, fresh.memories, strict=True):
        assert torch.equal(new.slots[[0, 2]], start.slots[[0, 2]])
        assert torch.equal(new.slots[1], old.slots[1])
    assert reset.window.mask.tolist() == [[False, False], [True, True], [False, False]]
    for (_, mine), (_, theirs) in zip(state.named_tensors(), copy.named_tensors(), strict=True):
        assert torch.equal(mine, theirs)


@torch.no_grad()
def test_rows_of_a_state_go_on_alone():
    model = build()
    state = model(ids(batch=3)).memory_state
    more = ids(batch=3, tokens=5)
    together = model(more, memory_state=state).logits
    alone = model(more[1:2], memory_state=state.rows(torch.tensor([1]))).logits
    torch.testing.assert_close(alone, together[1:2])


def test_the_state_is_frozen():
    state = build().init_state(2)
    with pytest.raises(AttributeError):
        state.memories = ()
    assert replace(state, memories=()).memories == ()


def test_a_state_of_another_model_is_refused():
    one, two = (build({"model.num_layers": layers}) for layers in (1, 2))
    state = one(torch.zeros(2, 3, dtype=torch.long)).memory_state
    with pytest.raises(ValueError, match=r"memory_state is of a model with 1 layers.*start from None"):
        two(torch.zeros(2, 3, dtype=torch.long), memory_state=state)


RECOMPUTED = [BASELINE, *(Case(kind, {}, {kind: variants(kind)[0]}) for kind in MEMORIES)]
RECOMPUTED.append(
    Case("noise", {}, {"external": variants("external")[0] | {"retrieval_gate": "query", "exploration": 1.0}})
)


def trained(case, again, kept=None):
    """A training pass with dropout over three segments; kept: what autograd keeps on the way."""
    torch.manual_seed(0)
    changes = {"training.gradient_checkpointing": again, "model.dropout": 0.1}
    model = stir(MemoryTransformer(override(case.config(), changes)).double()).train()

    def keep(tensor):
        if kept is not None:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids(3, 12), labels=ids(3, 12))
    torch.rand(1)  # what is drawn between the passes must not shift what is computed again
    (output.loss + sum(output.router_losses.values())).backward()
    return output, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("case", RECOMPUTED, ids=str)
def test_gradient_checkpointing_changes_no_gradient(case):
    plain, again = trained(case, False), trained(case, True)
    assert torch.equal(plain[0].logits, again[0].logits)
    for want, got in zip(plain[1], again[1], strict=True):
        assert (want is None) == (got is None)
        assert want is None or torch.equal(want, got)


CHECKPOINTED = [
    {},
    {"recompute_every": 2},
    {"recompute": "mlp"},
    {"recompute": "selective"},
]


def recomputing(options):
    """One training pass of a wider model in which `options` say what is computed again."""
    changes = {
        "model.hidden_dim": 64,
        "model.intermediate_dim": 256,
        "model.num_layers": 4,
        "model.dropout": 0.1,
    }
    changes |= {f"training.{name}": value for name, value in options.items()}
    case = next(case for case in RECOMPUTED if case.name.startswith("internal"))
    torch.manual_seed(0)
    model = stir(MemoryTransformer(override(case.config(), changes)).double()).train()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output = model(ids(8, 8), labels=ids(8, 8))
        output.loss.backward()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    highest = max(held)
    return output.logits, [parameter.grad for parameter in model.parameters()], highest


def test_every_granularity_keeps_less_and_changes_no_gradient():
    logits, gradients, most = recomputing({})
    peaks = []
    for options in CHECKPOINTED:
        again = recomputing({"gradient_checkpointing": True} | options)
        assert torch.equal(logits, again[0])
        for want, got in zip(gradients, again[1], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        peaks.append(again[2] / most)
    block, every_second, mlp, selective = peaks
    assert block < every_second < 0.95 and block < mlp < 0.95 and block < selective < 0.95, peaks


def test_gradient_checkpointing_keeps_less_in_training_only():
    plain, again = {}, {}
    trained(BASELINE, False, plain), trained(BASELINE, True, again)
    assert sum(again.values()) < 0.5 * sum(plain.values())


def test_a_wrong_number_of_beginnings_is_refused():
    model, fresh = build(), torch.ones(2, 3, dtype=torch.bool)
    model(ids(), fresh=fresh)
    with pytest.raises(ValueError, match=r"10 tokens begin 3 segments of 4; pass booleans \[2, 3\]"):
        model(ids(), fresh=fresh[:, 1:])
    state = model(ids(tokens=2)).memory_state
    model(ids(), memory_state=state, fresh=fresh[:, 1:])
    with pytest.raises(ValueError, match="after 2 tokens of a segment that an earlier call began, begin 2"):
        model(ids(), memory_state=state, fresh=fresh)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        model(ids(), fresh=fresh.long())
