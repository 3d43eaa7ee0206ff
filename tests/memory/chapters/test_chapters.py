"""The memory in chapters: against plain loops, in the model, under the laws beyond their own cases."""

import pytest
import torch

from memlib import MemoryTransformer, count_parameters, record
from memlib.config import ChaptersMemoryConfig, Config, ConfigError, override
from memlib.lab.measures import chapter_loads
from memlib.memory import MEMORIES, ChapterMemory
from memlib.memory.chapters.memory import ChapterState
from memlib.memory.chapters.routers import router_losses
from memlib.ops import newest_tokens, rolling_mean
from tests.laws import laws
from tests.laws.cases import Case, small_options

B, N, D, M, C, T = 2, 5, 8, 12, 4, 3
STRATEGIES = ("sequence", "rolling", "token", "hybrid")
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def memory(**options):
    """A memory with every parameter moved off its start."""
    torch.manual_seed(0)
    sizes = {"num_memory_tokens": M, "num_heads": 2, "num_chapters": C, "top_k_chapters": 2}
    built = ChapterMemory(ChaptersMemoryConfig(**(sizes | options)), D).double().eval()
    with torch.no_grad():
        for i, parameter in enumerate(built.parameters()):
            parameter += 0.5 * random(*parameter.shape, seed=i)
    return built


def summaries(built, hidden, state):
    """What each token's choice rests on, [b n d], in plain loops over a state that was not opened."""
    strategy, w = built.config.routing_strategy_inference, built.config.routing_window_size
    found = torch.zeros_like(hidden)
    for b in range(B):
        tokens = [x for x, there in zip(state.recent[b], state.mask[b], strict=True) if there]
        for n in range(N):
            tokens.append(hidden[b, n])
            rolling, before = sum(tokens[-w:]) / len(tokens[-w:]), state.summary[b]
            found[b, n] = {
                "sequence": before,
                "token": hidden[b, n],
                "rolling": rolling,
                "hybrid": (rolling + before) / 2 if state.seen[b] else rolling,
            }[strategy]
    return found


def naive(built, hidden, summary):
    """Each token attends to its own chapters, gathered one by one, in a call of its own."""
    bank, said = built.bank.bank(), torch.zeros_like(hidden)
    k = built.config.top_k_chapters
    for b in range(B):
        for n in range(N):
            p = torch.softmax(built.router.proj(summary[b, n]), -1)
            chosen = sorted(range(C), key=lambda c: -float(p[c]))[:k]
            w = p[chosen] / (p[chosen].sum() if k > 1 else 1)
            tokens = torch.cat([bank[T * c : T * c + T] for c in chosen])
            bias = torch.stack([w[i].log() for i in range(k) for _ in range(T)])
            said[b, n] = w.sum() * built.attention(hidden[b, n][None, None], tokens, bias[None, None])[0, 0]
    return said


def begun(built):
    """A state of one stream that has seen a segment of five tokens, and one that is new."""
    start = built.init_state(B)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0] = True
    state = built.write(random(B, N, D, seed=9), start, mask)
    return state.where(mask.any(1), start)


@strategies
@pytest.mark.parametrize(
    "options", [{}, {"top_k_chapters": 1}, {"use_low_rank_memory": True, "memory_rank": 4}]
)
def test_reads_what_the_plain_loops_read(strategy, options):
    built = memory(routing_strategy_inference=strategy, routing_window_size=4, **options)
    hidden, state = random(B, N, D), begun(built)
    want = naive(built, hidden, summaries(built, hidden, state))
    torch.testing.assert_close(built.read(hidden, state), want)
    if strategy == "sequence":
        return
    one_by_one = []
    for n in range(N):
        seen = built.with_open_segment(state, hidden[:, :n], torch.ones(B, n + 1, dtype=torch.bool))
        one_by_one.append(built.read(hidden[:, n : n + 1], seen))
    torch.testing.assert_close(torch.cat(one_by_one, 1), want)


@strategies
def test_even_weights_on_all_chapters_are_the_whole_bank(strategy):
    routed = memory(top_k_chapters=C, routing_strategy_inference=strategy)
    with torch.no_grad():
        routed.router.proj.weight.zero_()
        routed.router.proj.bias.zero_()
    whole = memory(use_chapters=False)
    whole.load_state_dict(
        {k.replace("bank.bank", "bank"): v for k, v in routed.state_dict().items() if "router" not in k}
    )
    hidden = random(B, N, D)
    want = whole.read(hidden, whole.init_state(B))
    torch.testing.assert_close(routed.read(hidden, routed.init_state(B)), want)


def test_a_bank_read_whole_has_no_state():
    assert memory(use_chapters=False).init_state(B).nbytes == 0


@strategies
def test_gradients_reach_what_learns(strategy):
    built = memory(routing_strategy_inference=strategy)
    built.read(random(B, N, D), begun(built)).square().sum().backward()
    for name, parameter in built.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_a_choice_that_no_token_shares_gives_no_nan():
    """A closed chapter has weight zero, whose logarithm has no gradient to give."""
    built = memory(routing_strategy_inference="token", top_k_chapters=1)
    with torch.no_grad():
        built.router.proj.weight.mul_(1e4)
    built.read(random(B, N, D), begun(built)).sum().backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in built.parameters())


@strategies
def test_half_precision_routes_in_full(strategy):
    built = memory(routing_strategy_inference=strategy).to(torch.bfloat16)
    hidden = random(B, N, D).to(torch.bfloat16)
    assert built.init_state(B).summary.dtype == torch.float32
    assert built.read(hidden, built.init_state(B).cast(torch.bfloat16)).dtype == torch.bfloat16
    assert built.router.choose(hidden).logits.dtype == torch.float32


def test_only_the_chosen_chapters_are_touched():
    built = memory(top_k_chapters=1)
    built.read(random(1, N, D), built.init_state(1)).sum().backward()
    (chosen,) = built.router.choose(torch.zeros(1, 1, D).double()).indices.flatten().tolist()
    touched = built.bank.bank.tokens.weight.grad.any(1).tolist()
    assert touched == [m // T == chosen for m in range(M)]


@pytest.mark.parametrize("count", [0, 2, 4, 9])
def test_the_newest_tokens_are_kept_in_order(count):
    tokens = random(B, N, D)
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()
    kept, there = newest_tokens(tokens, mask, count)
    for b in range(B):
        want = [tokens[b, n] for n in range(N) if mask[b, n]][max(0, int(mask[b].sum()) - count) :]
        missing = count - len(want)
        assert there[b].tolist() == [False] * missing + [True] * len(want)
        assert not kept[b, :missing].any()
        assert all(torch.equal(x, y) for x, y in zip(kept[b, missing:], want, strict=True))


def test_a_rolling_mean_of_the_newest_is_the_end_of_the_whole():
    hidden, mask = random(B, N, D), torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1]]).bool()
    torch.testing.assert_close(rolling_mean(hidden, mask, 2, 2), rolling_mean(hidden, mask, 2)[:, -2:])


# ------------------------------------------------------------------------------------------ in the model

MODEL = {
    "model.hidden_dim": 16,
    "model.num_heads": 2,
    "model.num_layers": 3,
    "model.intermediate_dim": 24,
    "model.vocab_size": 17,
    "model.segment_length": 4,
    "memory.kinds": ["chapters"],
    "memory.chapters.num_memory_tokens": 16,
    "memory.chapters.num_chapters": 4,
    "memory.chapters.top_k_chapters": 2,
    "memory.chapters.num_heads": 2,
}


def model(changes=None):
    torch.manual_seed(0)
    return MemoryTransformer(override(Config(), MODEL | (changes or {})))


def stream(tokens=12, seed=0):
    return torch.randint(17, (3, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("sharing", "banks"), [("shared", 1), ("per_layer", 3), ("every_k_layers", 2)])
def test_layers_of_one_bank_share_its_tokens_and_nothing_else(sharing, banks):
    built = model({"memory.memory_sharing": sharing, "memory.memory_sharing_k": 2})
    memories = [block.memories["chapters"] for block in built.blocks]
    assert len({id(m.bank) for m in memories}) == banks
    assert len({id(m.router) for m in memories}) == len({id(m.attention) for m in memories}) == 3
    assert len(built.init_state(2).memories) == 3
    alone = model({"memory.memory_sharing": "per_layer"})
    assert count_parameters(alone) - count_parameters(built) == (3 - banks) * 16 * 16


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"use_chapters": False}, {"quantize_memory": True}])
@pytest.mark.parametrize("feeding", laws.FEEDINGS, ids=str)
def test_the_laws_hold_also_in_training_without_chapters_and_quantised(training, options, feeding):
    case = Case("chapters", {"memory_sharing": "shared"}, {"chapters": small_options("chapters") | options})
    for law in laws.LAWS.values():
        law(lambda: case.build().train(training), feeding)
    laws.padding(lambda: case.build().train(training))


class Pooled(ChapterMemory):
    """The mean of the segment itself in a stream: the choice depends on later tokens (not causal)."""

    def summary(self, hidden, state):
        return hidden.mean(1, keepdim=True)


def test_pooling_the_segment_itself_breaks_causality(monkeypatch):
    monkeypatch.setitem(MEMORIES, "chapters", Pooled)
    case = Case("mutant", {}, {"chapters": {"num_memory_tokens": 8, "num_chapters": 4, "top_k_chapters": 2}})
    with pytest.raises(AssertionError, match=r"^L1 causality"):
        laws.causality(case.build, laws.MANY)


class Forgetful(ChapterMemory):
    """A rolling window that begins anew with each call."""

    def with_open_segment(self, state, hidden, mask):
        return state


def test_a_window_that_ends_at_a_call_breaks_segmentation(monkeypatch):
    monkeypatch.setitem(MEMORIES, "chapters", Forgetful)
    options = {"num_memory_tokens": 8, "num_chapters": 4, "routing_strategy_inference": "rolling"}
    case = Case("mutant", {}, {"chapters": options})
    with pytest.raises(AssertionError, match=r"^L4 segmentation"):
        laws.segmentation(case.build, laws.PIECES)


def test_router_losses_are_means_over_layers_and_finished_segments():
    built = model({"memory.chapters.use_z_loss": True, "memory.chapters.use_auxiliary_loss": True}).double()
    tokens = stream(14)
    output = built(tokens)
    assert set(output.router_losses) == {"load_balance", "auxiliary", "z"}
    state, terms = None, {name: [] for name in output.router_losses}
    for start in range(0, 12, 4):
        for i, block in enumerate(built.blocks):
            router = block.memories["chapters"].router
            if state is None:  # nothing was seen, so nothing was chosen
                losses = dict.fromkeys(terms, torch.zeros(()).double())
            else:
                choice = router.choose(state.memories[i].summary[:, None])
                losses = router_losses(choice.logits[:, 0], choice.indices[:, 0])
            for name, loss in losses.items():
                terms[name].append({"z": 0.001}.get(name, 0.01) * loss)
        state = built(tokens[:, start : start + 4], memory_state=state).memory_state
    for name, values in terms.items():
        torch.testing.assert_close(output.router_losses[name], torch.stack(values).mean())
    assert built(tokens[:, :3]).router_losses == {}  # no segment was finished
    assert model({"memory.chapters.use_load_balance_loss": False})(tokens).router_losses == {}
    assert model({"memory.chapters.use_chapters": False})(tokens).router_losses == {}


def test_padded_rows_and_new_streams_have_no_share_in_the_losses():
    built, tokens = model().double(), stream()
    mask = torch.ones_like(tokens)
    mask[1, 4:], mask[2] = 0, 0
    alone = built(tokens[:1]).router_losses["load_balance"]
    torch.testing.assert_close(built(tokens, mask).router_losses["load_balance"], alone)


@strategies
def test_choices_can_be_recorded(strategy):
    built = model({"memory.chapters.routing_strategy_inference": strategy}).eval()
    with torch.no_grad(), record(built) as trace:
        built(stream())
    weight, probability = trace["chapters.weight"], trace["chapters.probability"]
    assert weight.axes == probability.axes == ("layer", "batch", "token", "chapter")
    assert weight.values.shape == (3, 3, 12, 4)
    assert ((weight.values > 0).sum(-1) == 2).all()
    torch.testing.assert_close(torch.tensor(weight.values.sum(-1)), torch.ones(3, 3, 12))
    torch.testing.assert_close(torch.tensor(probability.values.sum(-1)), torch.ones(3, 3, 12))
    loads = [sum(weight.values[1, b, n, c] for b in range(3) for n in range(12)) / 36 for c in range(4)]
    assert chapter_loads(trace, layer=1).tolist() == pytest.approx(loads)


def test_checkpointing_changes_no_gradient():
    def gradients(again):
        built = model({"memory.chapters.gradient_checkpointing": again}).double()
        output = built(stream(), labels=stream())
        (output.loss + sum(output.router_losses.values())).backward()
        return [p.grad for p in built.parameters()]

    for want, got in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(got, want)


def test_a_state_of_another_strategy_can_be_read_and_goes_on():
    built = model({"memory.chapters.routing_strategy_inference": "rolling"})
    state = built.train()(stream(6)).memory_state
    assert isinstance(state.memories[0], ChapterState) and not state.memories[0].recent.shape[1]
    output = built.eval()(stream(10), memory_state=state)
    assert torch.isfinite(output.logits).all()
    assert output.memory_state.memories[0].recent.shape[1] == built.config.memory.chapters.routing_window_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_chapters": 5}, "num_chapters = 5: must divide memory.chapters.num_memory_tokens = 1024"),
        ({"tokens_per_chapter": 3}, "tokens_per_chapter = 3: 1024 tokens in 16 chapters are 64 each"),
        ({"top_k_chapters": 17}, "top_k_chapters = 17: must be at most memory.chapters.num_chapters = 16"),
        ({"num_heads": 5}, "num_heads = 5: must divide model.hidden_dim = 768"),
        (
            {"use_low_rank_projections": True, "projection_rank": 6},
            "num_heads = 4: must divide memory.chapters.projection_rank = 6",
        ),
        (
            {"use_low_rank_memory": True, "low_rank_mode": "reduced_dim", "memory_rank": 6},
            "num_heads = 4: must divide memory.chapters.memory_rank = 6",
        ),
        ({"quantize_memory": True, "memory_quant_bits": 5}, "memory_quant_bits = 5: must be 8 or 4"),
        ({"memory_quant_bits": 9}, "memory_quant_bits = 9: must be at most 8"),
        (
            {"quantize_memory": True, "memory_quant_bits": 4, "memory_dim": 7},
            "memory_dim = 7: must be even, because two 4-bit",
        ),
        (
            {
                "quantize_memory": True,
                "memory_quant_bits": 4,
                "use_low_rank_memory": True,
                "memory_rank": 7,
            },
            "memory_rank = 7: must be even, because two 4-bit",
        ),
        ({"routing_strategy_train": "token"}, "routing_strategy_train = 'token': expected one of sequence"),
        ({"low_rank_mode": "lora"}, "low_rank_mode = 'lora': expected one of factorized, reduced_dim"),
        ({"init_std": -1.0}, "init_std = -1.0: must be at least 0"),
    ],
)
def test_what_cannot_work_is_refused_with_its_path(changes, message):
    paths = {f"memory.chapters.{name}": value for name, value in changes.items()}
    with pytest.raises(ConfigError, match=f"memory.chapters.{message}"):
        override(Config(), {"memory.kinds": ["chapters"], **paths})
