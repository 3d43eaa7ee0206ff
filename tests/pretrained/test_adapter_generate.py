"""Generation with an adapter: transformers' `generate`, memlib's, and states that pass between them."""

import pytest
import torch

pytest.importorskip("transformers", reason="no transformers: `make extras` installs it")

from memlib.inference import GenerationConfig, Sessions, StateError, WordTokenizer, load_state, save_state
from memlib.inference import generate as generate_rows
from memlib.memory import MEMORIES
from memlib.pretrained.adapter import Pass
from memlib.pretrained.state import MemoryCache

from ..laws.cases import SEGMENT, VOCAB
from ..laws.laws import same_state
from .bases import FAMILIES, adapter, ids, tiny

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
NEW = 9  # more than two segments
SLIDING = {
    "mistral": {"sliding_window": 5},
    "qwen2": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
}


def every(name, values):
    return pytest.mark.parametrize(name, values, ids=str)


def ones(tokens):
    return torch.ones(len(tokens), 1, dtype=torch.int64)


@torch.no_grad()
def uncached(model, tokens, mask=None, new=NEW, choose=lambda logits: logits.argmax(-1, keepdim=True)):
    """Generate by reading the whole stream again for each token."""
    mask = torch.ones_like(tokens) if mask is None else mask
    for _ in range(new):
        tokens = torch.cat((tokens, choose(model(tokens, mask).logits[:, -1])), 1)
        mask = torch.cat((mask, ones(mask)), 1)
    return tokens


def left_padded(*lengths):
    """Rows of these lengths, padded on the left, and their mask."""
    longest = max(lengths)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids(len(lengths), longest) * mask, mask


# ---------------------------------------------------------------------------------- transformers' generate


@every("family", FAMILIES)
def test_greedy_is_the_uncached_loop(family):
    model = adapter(family)
    got = model.generate(ids(), max_new_tokens=NEW, **GREEDY)
    assert torch.equal(got, uncached(model, ids()))
    model.close_memory()
    assert not torch.equal(got, uncached(model, ids()))


@every("kind", MEMORIES)
def test_greedy_is_the_uncached_loop_with_every_memory(kind):
    model = adapter(kinds=(kind,), use_lora=True)
    tokens, mask = left_padded(7, 3)
    got = model.generate(tokens, mask, max_new_tokens=NEW, **GREEDY)
    assert torch.equal(got, uncached(model, tokens, mask))


@every("family", FAMILIES)
def test_beam_search_is_the_uncached_search(family):
    """Without an end of text: each step keeps the most probable continuations of all running beams."""
    model, beams = adapter(family), 3
    tokens, mask = left_padded(7, 4)
    got = model.generate(tokens, mask, num_beams=beams, max_new_tokens=NEW, **GREEDY)
    for row, (prompt, real) in enumerate(zip(tokens, mask, strict=True)):
        running, scores = prompt[None], torch.zeros(1)
        real = real[None]
        for _ in range(NEW):
            with torch.no_grad():
                logits = model(running, real.expand(len(running), -1)).logits[:, -1]
            total = scores[:, None] + logits.float().log_softmax(-1)
            scores, best = total.flatten().topk(beams)
            running = torch.cat((running[best // VOCAB], best[:, None] % VOCAB), 1)
            real = torch.cat((real, ones(real)), 1)
        assert torch.equal(got[row], running[0])


def test_sampling_with_one_seed_is_the_uncached_loop():
    model = adapter()
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0}

    def draw(logits):
        return torch.multinomial(logits.float().softmax(-1), 1)

    torch.manual_seed(3)
    want = uncached(model, ids(), choose=draw)
    for seed, equal in ((3, True), (3, True), (4, False)):
        torch.manual_seed(seed)
        assert torch.equal(model.generate(ids(), max_new_tokens=NEW, **options), want) == equal


def test_rows_padded_by_whole_segments_are_as_if_alone():
    model = adapter()
    tokens, mask = left_padded(2 * SEGMENT + 3, SEGMENT + 3, 3)
    together = model.generate(tokens, mask, max_new_tokens=NEW, **GREEDY)
    for row, real in enumerate(mask.sum(1).tolist()):
        alone = model.generate(tokens[row : row + 1, -real:], max_new_tokens=NEW, **GREEDY)
        assert torch.equal(together[row, -real - NEW :], alone[0])


def test_other_padding_moves_a_rows_borders_as_documented():
    """Also in one call to forward: padding takes places in segments. memlib's generate pads no row."""
    model = adapter()
    tokens, mask = left_padded(2 * SEGMENT + 3, SEGMENT + 1)
    real = tokens[1:, SEGMENT - 2 + 4 :]
    assert real.shape[1] == SEGMENT + 1
    with torch.no_grad():
        padded, alone = model(tokens, mask).logits[1, -1], model(real).logits[0, -1]
    assert (padded - alone).abs().max() > 1e-3
    rows = generate_rows(model, tokens, mask, max_new_tokens=NEW)
    for row, length in enumerate(mask.sum(1).tolist()):
        lone = model.generate(tokens[row : row + 1, -length:], max_new_tokens=NEW, **GREEDY)
        assert rows.row(row) == lone[0, length:].tolist()


def test_generating_twice_from_one_state_is_the_same_and_leaves_the_state():
    model = adapter()
    state = model.new_context(model(ids(seed=5)).memory_state)
    copy = state.clone()
    first = model.generate(ids(), memory_state=state, max_new_tokens=NEW, **GREEDY)
    beams = model.generate(ids(), memory_state=state, max_new_tokens=NEW, num_beams=2, **GREEDY)
    assert torch.equal(first, model.generate(ids(), memory_state=state, max_new_tokens=NEW, **GREEDY))
    assert beams.shape == first.shape
    same_state("generate", "the state that was passed in", state, copy, 0.0)
    assert not torch.equal(first, model.generate(ids(), max_new_tokens=NEW, **GREEDY))


@every("lengths", [(9, 9), (9, 6)])
@every("family", FAMILIES)
def test_the_returned_cache_goes_on_as_a_state_does(family, lengths):
    """By keyword, by cache, and in one call with all tokens; padding of the prompt takes no position."""
    model = adapter(family)
    tokens, mask = left_padded(*lengths)
    output = model.generate(tokens, mask, max_new_tokens=NEW, return_dict_in_generate=True, **GREEDY)
    cache = output.past_key_values
    state = cache.memory_state
    more = torch.cat((output.sequences[:, -1:], ids(tokens=5, seed=5)), 1)
    with torch.no_grad():
        by_state = model(more, memory_state=state)
        everything = torch.cat((output.sequences[:, :-1], more), 1)
        real = torch.cat((mask, torch.ones(2, NEW + 5, dtype=torch.int64)), 1)
        whole = model(everything, real)
        by_cache = model(more, past_key_values=cache)
    close = {"rtol": 0, "atol": 1e-12}
    torch.testing.assert_close(by_state.logits, whole.logits[:, -6:], **close)
    torch.testing.assert_close(by_cache.logits, by_state.logits, **close)
    same_state("adapter", "by keyword", by_state.memory_state, whole.memory_state)
    same_state("adapter", "by cache", by_cache.memory_state, whole.memory_state)
    assert by_cache.past_key_values is cache


def test_positions_that_count_padding_break_what_follows_a_padded_prompt(monkeypatch):
    monkeypatch.setattr(Pass, "positions", None)
    with pytest.raises(AssertionError, match="not close"):
        test_the_returned_cache_goes_on_as_a_state_does("llama", (9, 6))


ROWS = {
    "repeat": (lambda cache: cache.batch_repeat_interleave(3), [0, 0, 0, 1, 1, 1]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
}


@every("operation", ROWS)
def test_a_cache_moves_its_rows_together(operation):
    model, (move, rows) = adapter(), ROWS[operation]
    with torch.no_grad():
        cache = model(ids(), past_key_values=MemoryCache(model.base.config)).past_key_values
        want = model(ids(tokens=5), memory_state=cache.memory_state).logits
        move(cache)
        got = model(ids(tokens=5)[rows], past_key_values=cache).logits
    torch.testing.assert_close(got, want[rows], rtol=0, atol=1e-12)


def test_tokens_cannot_be_taken_back():
    model = adapter()
    cache = model(ids(), past_key_values=MemoryCache(model.base.config)).past_key_values
    with pytest.raises(ValueError, match=r"crop\(-1\): a memory that was written cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="assisted and speculative decoding do not work with memories"):
        model.generate(ids(1).repeat(1, 3), prompt_lookup_num_tokens=2, max_new_tokens=20, **GREEDY)


def test_two_streams_through_one_adapter_stay_apart():
    model = adapter()
    streams = [ids(tokens=13), ids(tokens=13, seed=5)]
    want = [model(tokens).logits for tokens in streams]
    states, got = [None, None], [[], []]
    for start, stop in ((0, 3), (3, 9), (9, 13)):
        for i, tokens in enumerate(streams):
            output = model(tokens[:, start:stop], memory_state=states[i])
            states[i] = output.memory_state
            got[i].append(output.logits)
            model.generate(ids(1), max_new_tokens=2, **GREEDY)
    for mine, whole in zip(got, want, strict=True):
        torch.testing.assert_close(torch.cat(mine, 1), whole, rtol=0, atol=1e-12)


def test_a_new_context_keeps_memories_and_forgets_the_rest():
    model = adapter()
    state = model(ids(tokens=2 * SEGMENT)).memory_state
    fresh = model.new_context(state)
    assert not fresh.window.seen.numel() and fresh.memories is state.memories
    got = model(ids(seed=5), memory_state=fresh).logits
    assert (got - model(ids(seed=5)).logits).abs().max() > 1e-3  # the memories
    assert (got - model(ids(seed=5), memory_state=state).logits).abs().max() > 1e-3  # the base's cache
    model.close_memory()
    torch.testing.assert_close(model(ids(seed=5), memory_state=fresh).logits, model.base(ids(seed=5)).logits)


# -------------------------------------------------------------------------------------------- sliding windows


@every("mode", ["full", "segment"])
@every("family", SLIDING)
def test_a_sliding_window_shorter_than_the_text(family, mode):
    model = adapter(family, base=tiny(family, **SLIDING[family]), mode=mode, scale=1.0)
    longer = adapter(family, mode=mode, scale=1.0)
    tokens, mask = ids(tokens=17), torch.ones(2, 17, dtype=torch.int64)
    mask[0, :3] = 0
    with torch.no_grad():
        whole = model(tokens, mask)
        differs = not torch.allclose(whole.logits, longer(tokens, mask).logits)
        assert differs == (mode == "full")  # a segment is shorter than the window
        for pieces in ([17], [3, 6, 1, 1, 6], [1] * 17):
            state, logits = None, []
            for piece, real in zip(tokens.split(pieces, 1), mask.split(pieces, 1), strict=True):
                output = model(piece, real, memory_state=state)
                state = output.memory_state
                logits.append(output.logits)
                kept = [keys.shape[2] for keys in state.window.keys]
                assert max(kept[1:]) <= 4
            torch.testing.assert_close(torch.cat(logits, 1), whole.logits, rtol=0, atol=1e-12)
            same_state("adapter", f"after pieces of {pieces}", state, whole.memory_state)


@every("family", SLIDING)
def test_generation_past_a_sliding_window(family, tmp_path):
    model = adapter(family, base=tiny(family, **SLIDING[family]))
    tokens, mask = left_padded(7, 4)
    got = model.generate(tokens, mask, max_new_tokens=NEW, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(got.sequences, uncached(model, tokens, mask))
    state = got.past_key_values.memory_state
    save_state(state, tmp_path / "state.safetensors", model)
    loaded, _ = load_state(tmp_path / "state.safetensors", model)
    last = got.sequences[:, -1:]
    assert torch.equal(model(last, memory_state=loaded).logits, model(last, memory_state=state).logits)
    rows = generate_rows(model, tokens, mask, max_new_tokens=NEW)
    alone = uncached(model, tokens[1:, -4:])
    assert rows.row(1) == alone[0, 4:].tolist()


# ----------------------------------------------------------------------------- memlib's generate and sessions


@every("mode", ["full", "segment"])
def test_rows_of_different_lengths_are_as_if_alone(mode):
    model = adapter(mode=mode)
    tokens, mask = left_padded(7, 3, 5, 3)
    first = generate_rows(model, tokens, mask, max_new_tokens=NEW)
    again = generate_rows(model, ids(4, 3, seed=5), memory_state=first.states, max_new_tokens=NEW)
    reread = generate_rows(model, tokens, mask, max_new_tokens=NEW, cached=False)
    assert first.tokens.equal(reread.tokens)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = tokens[row : row + 1, -length:]
        want = uncached(model, own)
        assert first.row(row) == want[0, length:].tolist()
        want = uncached(model, torch.cat((want, ids(4, 3, seed=5)[row : row + 1]), 1))
        assert again.row(row) == want[0, -NEW:].tolist()
    if mode == "full":
        assert first.row(0) == model.generate(tokens[:1], max_new_tokens=NEW, **GREEDY)[0, 7:].tolist()


@every("mode", ["full", "segment"])
def test_sessions_of_several_users(mode, tmp_path):
    model, words = adapter(mode=mode), WordTokenizer([f"w{i}" for i in range(VOCAB)])
    config = GenerationConfig(max_new_tokens=7, temperature=1.0)
    script = {"ann": ["w1 w2 w3 w4 w5", "w6"], "bob": ["w7 w8", "w9 w1 w2"]}
    together = Sessions(model, words, config)
    replies = [together.replies({user: turns[i] for user, turns in script.items()}) for i in range(2)]
    for user, turns in script.items():
        alone = Sessions(model, words, config)
        assert [alone.reply(user, text) for text in turns] == [turn[user] for turn in replies]
        together.save(user, tmp_path / user)
        assert together.reply(user, "w3") == alone.reply(user, "w3")
        again = Sessions(model, words, config)
        again.load(user, tmp_path / user)
        alone.load(user, tmp_path / user)
        assert again.reply(user, "w3") == alone.reply(user, "w3")


@every("mode", ["full", "segment"])
def test_a_saved_state_goes_on_and_is_bound_to_its_adapter(mode, tmp_path):
    model = adapter(mode=mode)
    state = model(ids()).memory_state
    save_state(state, tmp_path / "state", model)
    loaded, random = load_state(tmp_path / "state", adapter(mode=mode))
    assert random is None
    same_state("state file", "loaded", loaded, state, 0.0)
    assert torch.equal(model(ids(), memory_state=loaded).logits, model(ids(), memory_state=state).logits)
    for other in (adapter(mode=mode, stirred=False), adapter("qwen2", mode=mode)):
        with pytest.raises(StateError, match="of another model, or of this model with other weights"):
            load_state(tmp_path / "state", other)
