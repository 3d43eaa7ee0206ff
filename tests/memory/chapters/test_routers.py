"""Routers: choices against brute force, losses against the papers' equations in plain loops."""

import math
from dataclasses import fields
from itertools import combinations

import pytest
import torch

from memlib import (
    ChapterRouter,
    HybridRouter,
    RollingRouter,
    RouterLossOptions,
    TokenLevelRouter,
    router_losses,
)

B, N, D, C = 3, 7, 5, 6
ALL = RouterLossOptions(True, 0.01, True, 0.01, True, 0.001)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def router(kind=ChapterRouter, top_k=2, **options):
    torch.manual_seed(0)
    return kind(D, C, top_k, **options).double()


def probabilities(layer, summary):
    """softmax(W s + b) of one summary [d], one number at a time."""
    weight, bias = layer.proj.weight.detach(), layer.proj.bias.detach()
    logits = [float(w @ summary + b) for w, b in zip(weight, bias, strict=True)]
    top = max(logits)
    e = [math.exp(z - top) for z in logits]
    return [x / sum(e) for x in e], logits


def brute_force(p, k):
    """The k chapters of largest total probability, by trying every set; best first."""
    best = max(combinations(range(C), k), key=lambda some: sum(p[c] for c in some))
    return sorted(best, key=lambda c: -p[c])


@pytest.mark.parametrize("top_k", [1, 2, 5, C])
def test_a_sequence_chooses_once_from_its_mean(top_k):
    layer, hidden = router(top_k=top_k), random(B, N, D)
    mask = torch.ones(B, N)
    mask[1, 4:] = 0
    indices, weights, _ = layer(hidden, mask)
    assert indices.shape == weights.shape == (B, top_k)
    for b in range(B):
        p, _ = probabilities(layer, hidden[b, mask[b].bool()].mean(0))
        chosen = brute_force(p, top_k)
        assert indices[b].tolist() == chosen
        total = sum(p[c] for c in chosen) if top_k > 1 else 1.0
        torch.testing.assert_close(weights[b], torch.tensor([p[c] / total for c in chosen]).double())


@pytest.mark.parametrize("kind", [TokenLevelRouter, RollingRouter, HybridRouter])
def test_a_token_chooses_from_its_own_summary(kind):
    options = {} if kind is TokenLevelRouter else {"window_size": 3}
    layer, hidden, before = router(kind, **options), random(B, N, D), random(B, 4, D, seed=1)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, [0, 3]] = False
    given = {"before": before} if kind is HybridRouter else {}
    indices, weights, _ = layer(hidden, mask, **given)
    assert indices.shape == weights.shape == (B, N, 2)
    for b, n in ((b, n) for b in range(B) for n in range(N) if mask[b, n]):
        last = [hidden[b, m] for m in range(n + 1) if mask[b, m]][-3:]
        summary = hidden[b, n] if kind is TokenLevelRouter else sum(last) / len(last)
        if kind is HybridRouter:
            summary = (summary + before[b].mean(0)) / 2
        p, _ = probabilities(layer, summary)
        chosen = brute_force(p, 2)
        assert indices[b, n].tolist() == chosen
        total = sum(p[c] for c in chosen)
        torch.testing.assert_close(weights[b, n], torch.tensor([p[c] / total for c in chosen]).double())


@pytest.mark.parametrize("kind", [TokenLevelRouter, RollingRouter, HybridRouter])
def test_tokenwise_routers_are_causal_and_the_sequence_router_is_not(kind):
    hidden = random(B, N, D)
    later = hidden.clone()
    later[:, 4:] += 5.0
    layer = router(kind)
    (before, weights, _), (after, changed, _) = layer(hidden), layer(later)
    assert torch.equal(after[:, :4], before[:, :4]) and torch.equal(changed[:, :4], weights[:, :4])
    assert not torch.equal(changed[:, 4:], weights[:, 4:])
    whole = router()
    assert not torch.equal(whole(later)[1], whole(hidden)[1])


def plain_losses(logits, indices):
    """The papers' equations with loops; logits: [t c], indices: [t k]."""
    t, k = indices.shape
    p = []
    for z in logits.tolist():
        e = [math.exp(x) for x in z]
        p.append([x / sum(e) for x in e])
    dispatched = [sum(c in row for row in indices.tolist()) for c in range(C)]  # tokens sent to c
    mean = [sum(row[c] for row in p) / t for c in range(C)]
    switch = C * sum(dispatched[c] / t * mean[c] for c in range(C))
    gshard = sum(dispatched[c] / t * mean[c] for c in range(C)) / C
    deviation = sum((m - sum(mean) / C) ** 2 for m in mean) / C  # Shazeer et al.: CV(importance)^2
    st_moe = sum(math.log(sum(math.exp(x) for x in z)) ** 2 for z in logits.tolist()) / t
    return switch / k, gshard * C * C / k, deviation / (sum(mean) / C) ** 2, st_moe


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_losses_are_those_of_the_papers(top_k):
    logits = 2 * random(40, C)
    indices = logits.topk(top_k, -1).indices
    got = {name: float(loss) for name, loss in router_losses(logits, indices).items()}
    switch, gshard, variation, st_moe = plain_losses(logits, indices)
    assert got["load_balance"] == pytest.approx(switch) == pytest.approx(gshard)
    assert got["auxiliary"] == pytest.approx(variation)
    assert got["z"] == pytest.approx(st_moe)


def test_even_use_is_where_the_losses_are_least():
    even = torch.zeros(C, C).double()
    losses = router_losses(even, torch.arange(C)[:, None])
    assert float(losses["load_balance"]) == pytest.approx(1.0)
    assert float(losses["auxiliary"]) == pytest.approx(0.0)
    collapsed = router_losses(even + 50 * torch.eye(C)[0], torch.zeros(C, 1, dtype=torch.int64))
    assert float(collapsed["load_balance"]) == pytest.approx(C)
    assert float(collapsed["auxiliary"]) == pytest.approx(C - 1)


@pytest.mark.parametrize("name", ["load_balance", "auxiliary"])
def test_a_loss_spreads_what_collapsed(name):
    torch.manual_seed(0)
    logits = (torch.randn(64, C) * 0.1 + 3 * torch.eye(C)[0]).requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=20.0)
    for _ in range(200):
        optimizer.zero_grad()
        router_losses(logits, logits.topk(1, -1).indices)[name].backward()
        optimizer.step()
    use = torch.softmax(logits, -1).mean(0)
    assert float(use.max()) < 0.25 < 0.7 < float(torch.softmax(3 * torch.eye(C)[0], -1).max())


FLAGS = [f.name for f in fields(RouterLossOptions) if f.name.startswith("use")]


@pytest.mark.parametrize("kind", [ChapterRouter, TokenLevelRouter, RollingRouter, HybridRouter])
@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_switches_one_loss(kind, flag):
    off = dict.fromkeys(FLAGS, False)
    (name,) = router(kind, losses=RouterLossOptions(**off | {flag: True})).coefficients
    assert flag == f"use_{name}_loss"
    layer, hidden = router(kind, losses=RouterLossOptions(**off | {flag: True})), random(B, N, D)
    everything = router(kind, losses=ALL)(hidden)[2]
    assert set(everything) == {"load_balance", "auxiliary", "z"}
    losses = layer(hidden)[2]
    assert set(losses) == {name} and torch.equal(losses[name], everything[name])
    assert router(kind, losses=RouterLossOptions(**off))(hidden)[2] == {}
    assert layer(hidden, return_losses=False)[2] == {}


def test_losses_come_times_their_coefficients_and_ignore_padding():
    layer, hidden = router(TokenLevelRouter, losses=ALL), random(B, N, D)
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[0, 2:] = False
    indices, _, losses = layer(hidden, mask)
    switch, _, variation, st_moe = plain_losses(layer.proj(hidden)[mask], indices[mask])
    want = {"load_balance": 0.01 * switch, "auxiliary": 0.01 * variation, "z": 0.001 * st_moe}
    assert {name: float(loss) for name, loss in losses.items()} == pytest.approx(want)


def test_the_losses_have_the_documents_defaults():
    assert RouterLossOptions().coefficients == {"load_balance": 0.01}
    assert ALL.coefficients == {"load_balance": 0.01, "auxiliary": 0.01, "z": 0.001}
    assert RouterLossOptions(False, use_auxiliary_loss=True, use_z_loss=True).coefficients == {
        "auxiliary": 0.01,
        "z": 0.001,
    }


def test_no_decision_is_no_loss():
    losses = router(losses=ALL)(random(B, N, D), torch.zeros(B, N))[2]
    assert [float(loss) for loss in losses.values()] == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("top_k", [1, 3])
def test_the_router_learns_from_the_weights(top_k):
    layer = router(top_k=top_k)
    hidden = random(B, N, D).requires_grad_()
    wanted = random(B, top_k, seed=3)
    assert torch.autograd.gradcheck(lambda h: (layer(h)[1] * wanted).sum(), hidden)
    (layer(hidden)[1] * wanted).sum().backward()
    assert layer.proj.weight.grad.any()


@pytest.mark.parametrize("top_k", [0, C + 1])
def test_more_chapters_than_there_are_is_refused(top_k):
    with pytest.raises(ValueError, match=f"top_k = {top_k}: must be 1 … num_chapters = {C}"):
        router(top_k=top_k)
