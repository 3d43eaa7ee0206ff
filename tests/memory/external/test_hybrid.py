"""The hybrid: fusion equation, retrieval gate, and searches that are really skipped."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from memlib.config import Config, ExternalMemoryConfig, load_config, override
from memlib.lab.trace import record
from memlib.memory import ExternalMemory
from memlib.memory.base import AttentionHeads
from memlib.models import MemoryTransformer
from memlib.models.stores import attach_stores
from memlib.training.optimizer import parameter_groups
from memlib.training.trainer import Trainer

B, N, D, H, C, J = 2, 6, 8, 2, 12, 4
GATES = ("layer", "query")


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(gate="query", stirred=True, **options):
    torch.manual_seed(0)
    sizes = {"num_heads": H, "capacity": C, "top_k": J, "retrieval_gate": gate}
    built = ExternalMemory(ExternalMemoryConfig(**(sizes | options)), D).double().eval()
    if stirred:
        with torch.no_grad():
            for i, parameter in enumerate(built.parameters()):
                parameter += 0.3 * random(*parameter.shape, seed=i)
    return built


def filled(built, segments=2):
    state = built.init_state(B)
    for segment in random(B, segments * N, D, seed=10).split(N, 1):
        state = built.write(segment, state, torch.ones(B, N, dtype=torch.bool))
    return state


def plain(built, hidden_dim=D):
    """The same memory without a gate: what comes back, whole."""
    config = override(built.config, {"retrieval_gate": "none"})
    same = ExternalMemory(config, hidden_dim).double().eval()
    own = built.state_dict()
    same.load_state_dict({name: own[name] for name in same.state_dict()})
    return same


class Counting:
    """A backend that counts the queries it is asked for."""

    def __init__(self, backend):
        self.backend, self.state, self.queries = backend, backend.state, []

    def search(self, query, state):
        self.queries.append(query.shape[2])
        return self.backend.search(query, state)


@pytest.mark.parametrize("gate", GATES)
def test_every_token_starts_at_sigma_of_one_half(gate):
    share = memory(gate, stirred=False).retrieval(random(B, N, D))
    torch.testing.assert_close(share, torch.full((B, N), 0.6224593, dtype=torch.float64))


def test_the_fusion_equation_in_a_whole_model():
    """H = g0 A + g1 M_int + g2 sigma(g_retrieve) M_ext, g = softmax(W_g h + b_g)."""
    config = override(load_config("mixed_hybrid"), {"model.num_layers": 1})
    model = MemoryTransformer(config).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.1 * random(*parameter.shape, seed=i)
    ids = torch.randint(80, (B, 64), generator=torch.Generator().manual_seed(0))
    state = model(ids).memory_state
    block = model.block(0)
    hidden = block.attention_norm(model.embedding(ids[:, :32]))
    internal, external = block.memories.memory_list
    nothing = random(B, 4, 0, 16)
    attended, _, _ = block.attention(hidden, nothing, nothing, None)
    sigma = torch.sigmoid(hidden @ external.retrieval.query.weight[0] + external.retrieval.query.bias)
    whole = plain(external, 64).read(hidden, state.memories[1])
    g = F.softmax(hidden @ block.fusion.gate.weight.T + block.fusion.gate.bias, -1)
    said = torch.where(sigma[..., None] > 0.5, sigma[..., None] * whole, 0)
    parts = (attended, internal.read(hidden, state.memories[0]), said)
    want = sum(g[..., i, None] * part for i, part in enumerate(parts))
    got = block.fusion(hidden, attended, block.memories.read(hidden, state.memories, ids))
    torch.testing.assert_close(got, want)
    assert (sigma > 0.5).any() and (sigma <= 0.5).any()


@pytest.mark.parametrize("gate", GATES)
def test_training_always_retrieves_and_weighs(gate):
    built = memory(gate, retrieval_threshold=1.0).train()
    state, hidden = filled(built), random(B, N, D, seed=40)
    want = plain(built).read(hidden, state) * rearrange(built.retrieval(hidden), "b n -> b n 1")
    torch.testing.assert_close(built.read(hidden, state), want)


@pytest.mark.parametrize("weighted", [True, False])
@torch.no_grad()
def test_inference_retrieves_where_sigma_is_above_the_threshold(weighted):
    """Unweighted as in "Architecture Diagrams", or weighted as in training (the default)."""
    built = memory(retrieval_weighted=weighted)
    state, hidden = filled(built), random(B, N, D, seed=40)
    sigma = rearrange(built.retrieval(hidden), "b n -> b n 1")
    open_ = sigma > 0.5
    assert 0 < int(open_.sum()) < B * N and open_[0].sum() != open_[1].sum()
    want = plain(built).read(hidden, state) * (sigma if weighted else 1) * open_
    torch.testing.assert_close(built.read(hidden, state), want)


@pytest.mark.parametrize("join", ["heads", "joint"])
@torch.no_grad()
def test_in_the_attention_the_memorys_share_is_multiplied(join):
    built = memory(join=join, gate_init=0.4)
    state, hidden, attended = filled(built), random(B, N, D, seed=40), random(B, H, N, D // H, seed=41)

    def mixed(kind):
        heads = AttentionHeads(hidden, *[attended] * 4, attended.sum(-1), None)
        return kind.mix(heads, state)

    sigma = rearrange(built.retrieval(hidden), "b n -> b 1 n 1")
    want = torch.lerp(attended, mixed(plain(built)), sigma * (sigma > 0.5))
    torch.testing.assert_close(mixed(built), want)


@torch.no_grad()
def test_what_is_not_asked_for_is_not_computed():
    built = memory()
    state, hidden = filled(built), random(B, N, D, seed=40)
    counting = Counting(built.backend)
    built.backend = counting
    built.read(hidden, state)
    assert counting.queries == [int((built.retrieval(hidden) > 0.5).sum(1).max())] != [N]
    built.retrieval.query.weight.zero_()
    built.retrieval.query.bias.fill_(-3.0)
    assert not built.read(hidden, state).any()
    assert len(counting.queries) == 1  # the backend was not asked at all


@torch.no_grad()
def test_a_recording_says_who_was_searched_for():
    model = MemoryTransformer(load_config("mixed_hybrid")).eval()
    gate = model.block(0).memories["external"].retrieval.query
    gate.weight.normal_(generator=torch.Generator().manual_seed(0))
    with record(model) as trace:
        model(torch.arange(64).reshape(1, 64))
    sigma, search = (trace[f"external.{name}"].values for name in ("retrieval", "search"))
    assert ((sigma > 0.5) == search.astype(bool)).all()
    silent = ~search[0, 0].astype(bool)
    assert silent.any() and not silent.all()
    assert (trace["external.source"].values[0, 0, :, silent] == -1).all()
    assert not trace["external.weight"].values[0, 0, :, silent].any()


@torch.no_grad()
def test_a_closed_gate_counts_no_retrieval():
    """least_retrieved asks what came back: nothing did where nothing was searched for."""
    built = memory(eviction="least_retrieved")
    built.retrieval.query.weight.zero_()
    built.retrieval.query.bias.fill_(-3.0)
    assert not filled(built, 3).retrieved.any()
    built.retrieval.query.bias.fill_(3.0)
    assert filled(built, 3).retrieved.any()


@torch.no_grad()
def test_skipping_in_a_store_is_skipping_in_the_state():
    config = override(
        load_config("mixed_hybrid"), {"model.segment_length": 8, "memory.external.capacity": 64}
    )
    torch.manual_seed(0)
    model = MemoryTransformer(config).double().eval()
    model.block(0).memories["external"].retrieval.query.weight.normal_()
    ids = torch.randint(80, (3, 40), generator=torch.Generator().manual_seed(0))
    want = model(ids).logits
    attach_stores(model)
    torch.testing.assert_close(model(ids).logits, want)


@pytest.mark.parametrize("gate", GATES)
def test_a_search_costs_what_the_configuration_says(gate):
    built = memory(gate, retrieval_cost=0.25, exploration=2.0).train()
    hidden = random(B, N, D, seed=40)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, :3] = False
    loss = built.losses(hidden, None, mask)["retrieval"]
    own = built.retrieval
    logit = own.layer.bias if gate == "layer" else own.query(hidden)
    sigma = torch.sigmoid(logit).expand(B, N) if gate == "layer" else torch.sigmoid(logit)[..., 0]
    torch.testing.assert_close(loss, 0.25 * sigma[mask].mean())
    assert memory(gate).losses(hidden, None, mask) == {}


@pytest.mark.parametrize("gate", GATES)
def test_exploration_is_noise_on_the_logit_in_training_only(gate):
    built = memory(gate, exploration=1.0)
    hidden = random(1, 4000, D, seed=40)
    still = built.retrieval(hidden)
    assert torch.equal(still, built.retrieval(hidden))
    torch.manual_seed(0)
    noise = torch.logit(built.train().retrieval(hidden)) - torch.logit(still)
    u = torch.sigmoid(noise).flatten().sort().values  # logistic noise: uniform under sigma
    assert (u - torch.linspace(0, 1, 4000, dtype=u.dtype)).abs().max() < 0.04


@pytest.mark.parametrize("gate", GATES)
def test_gates_learn_at_the_gates_rate_and_from_the_answers(gate):
    built = memory(gate).train()
    groups = parameter_groups(torch.nn.ModuleList([built]), Config().training)
    gates = {id(p) for g in groups if g["name"] == "gates" for p in g["params"]}
    assert {id(p) for p in built.retrieval.parameters()} <= gates
    built.read(random(B, N, D, seed=40), filled(built)).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in built.retrieval.parameters())


def test_the_trainer_adds_the_cost():
    """One step with a cost closes the gate further than the same step without; the log shows it."""
    sizes = {"training.batch_size": 4, "training.max_steps": 1, "training.warmup_steps": 1}
    sizes["memory.external.exploration"] = 0.0
    config = override(load_config("mixed_hybrid"), sizes)
    losses, opened = [], []
    for cost in (0.0, 1.0):
        trainer = Trainer(override(config, {"memory.external.retrieval_cost": cost}))
        losses.append(trainer.train_step().get("router_loss", 0.0))
        opened.append(float(trainer.model.block(0).memories["external"].retrieval.query.bias.detach()))
    assert losses[0] == 0 and losses[1] == pytest.approx(0.6225, abs=1e-3)
    assert opened[1] < opened[0]
