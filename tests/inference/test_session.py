"""Sessions: users are apart in memory and in chance, and a user outlives the process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from memlib.config import load_config, override
from memlib.inference import (
    GenerationConfig,
    Sessions,
    StateError,
    WordTokenizer,
    load_state,
    save_state,
)
from memlib.memory import MEMORIES
from memlib.models.stores import attach_stores
from memlib.training.trainer import Trainer
from tests.laws.cases import BASELINE, VOCAB, Case, variants
from tests.laws.laws import same_state

WORDS = WordTokenizer([f"w{i}" for i in range(VOCAB)])
DRAWN = GenerationConfig(max_new_tokens=7, temperature=2.0)
GREEDY = GenerationConfig(max_new_tokens=7)


def model_of(kind="internal", **options):
    return Case(kind, {}, {kind: variants(kind)[0] | options}).build()


def words(count, seed):
    ids = torch.randint(VOCAB, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def open_sessions(model=None, config=DRAWN, **options):
    return Sessions(model or model_of(), WORDS, config, **options)


SCRIPT = {  # what each user says, turn by turn: of different lengths, over segment borders
    "ann": [words(9, 0), words(1, 1), words(4, 2)],
    "bob": [words(2, 3), words(6, 4), words(3, 5)],
    "cy": [words(5, 6), words(5, 7), words(12, 8)],
}


def alone(user, model, config):
    sessions = open_sessions(model, config)
    return [sessions.reply(user, text) for text in SCRIPT[user]], sessions.sessions[user]


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("config", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_users_answered_in_one_call_are_as_if_alone(kind, config):
    model = model_of(kind)
    sessions = open_sessions(model, config)
    turns = [sessions.replies({user: said[i] for user, said in SCRIPT.items()}) for i in range(3)]
    for user in SCRIPT:
        replies, known = alone(user, model, config)
        assert [turn[user] for turn in turns] == replies
        assert torch.equal(sessions.sessions[user].random, known.random)
        same_state("sessions", user, sessions.sessions[user].state, known.state)


class OneForAll(Sessions):
    """The mutant: one memory behind all users."""

    def prepared(self, prompts):
        users, ids, known = super().prepared(prompts)
        if self.sessions:
            known = [list(self.sessions.values())[-1] for _ in users]
        return users, ids, known


def bob_knows_nothing_of_ann(kind, make=Sessions):
    """Bit for bit: what bob hears is the same whether ann was there or not."""
    model = model_of(kind)
    heard, states = [], []
    for with_ann in (True, False):
        sessions = make(model, WORDS, DRAWN)
        for mine, hers in zip(SCRIPT["bob"], SCRIPT["ann"], strict=True):
            if with_ann:
                sessions.tell("ann", hers)
                sessions.reply("ann", hers)
            heard.append(sessions.reply("bob", mine))
        states.append(sessions.sessions["bob"].state)
    assert heard[:3] == heard[3:]
    same_state("isolation", "bob", *states, within=0.0)


@pytest.mark.parametrize("kind", MEMORIES)
def test_one_user_knows_nothing_of_another(kind):
    bob_knows_nothing_of_ann(kind)


def test_a_memory_shared_by_all_users_is_caught():
    with pytest.raises(AssertionError):
        bob_knows_nothing_of_ann("internal", OneForAll)


@pytest.mark.slow
def test_a_secret_is_recalled_by_who_was_told_and_by_nobody_else():
    """A trained model: each user is told four pairs and asked for one, their own or another's."""
    changes = {"training.max_steps": 40, "training.gate_lr": 0.002, "task.segments": 4}
    trainer = Trainer(override(load_config("recall_internal"), changes | {"task.segments_min": None}))
    trainer.train(progress=False)
    batch, names = trainer.task.batch(64, 0, split="test"), trainer.task.vocabulary.names
    cut = 3 * trainer.task.segment_length

    def spoken(tokens):
        return " ".join(names[token] for token in tokens)

    def accuracy(asked_of):
        sessions = Sessions(trainer.model, config=GenerationConfig(max_new_tokens=1))
        for row in range(64):
            sessions.tell(f"user {row}", spoken(batch.tokens[row, :cut].tolist()))
        at = [cut + int(batch.scored[row, cut:].int().argmax()) for row in range(64)]
        questions = {
            f"user {(row + asked_of) % 64}": spoken(batch.tokens[row, cut : at[row] + 1].tolist())
            for row in range(64)
        }
        replies = sessions.replies(questions)
        right = [
            replies[f"user {(row + asked_of) % 64}"] == names[batch.targets[row, at[row]]]
            for row in range(64)
        ]
        return sum(right) / 64

    assert accuracy(asked_of=0) >= 0.9
    assert accuracy(asked_of=1) <= 0.25  # chance is 1/16


def test_forgetting_one_leaves_the_others_bit_for_bit():
    sessions = open_sessions()
    sessions.replies({user: said[0] for user, said in SCRIPT.items()})
    before = {user: known.state.clone() for user, known in sessions.sessions.items()}
    sessions.forget("bob")
    assert sessions.users == ["ann", "cy"]
    for user in sessions.users:
        same_state("forgetting", user, sessions.sessions[user].state, before[user], within=0.0)
    again = sessions.reply("bob", SCRIPT["bob"][0])
    assert again == alone("bob", sessions.model, DRAWN)[0][0]  # as new
    with pytest.raises(ValueError, match="'dora': this user has no session; users: ann, cy, bob"):
        sessions.forget("dora")


def test_forgetting_drops_what_a_store_holds():
    model = model_of("external")
    stores = attach_stores(model)
    sessions = open_sessions(model)
    sessions.replies({user: said[0] for user, said in SCRIPT.items()})

    def live(place, *users):
        """Rows a store holds of these users: all that were filed, up to the capacity."""
        filed = (int(sessions.sessions[user].state.memories[place].cursor) for user in users)
        return sum(min(count, model.config.memory.external.capacity) for count in filed)

    assert [len(store) for store in stores.values()] == [live(place, *SCRIPT) for place in stores]
    assert all(live(place, "bob") for place in stores)
    sessions.forget("bob")
    assert [len(store) for store in stores.values()] == [live(place, "ann", "cy") for place in stores]


@pytest.mark.parametrize("call", ["replies", "tell"])
def test_forgetting_drops_what_a_failed_call_filed(call):
    """New streams at once, since nobody knows them; a known user's with the user."""
    model = model_of("external", capacity=64)  # a full store could not go back to before the failed call
    stores = attach_stores(model)
    sessions = open_sessions(model)
    sessions.tell("ann", words(9, 0))
    last, passes = model.block(model.config.model.num_layers - 1), []

    def fail(module, inputs):
        passes.append(inputs)
        if len(passes) == 3:
            raise RuntimeError("out of memory")

    for user in ("ann", "bob"):
        passes.clear()
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError):
            sessions.tell(user, words(30, 1)) if call == "tell" else sessions.replies({user: words(30, 1)})
        hook.remove()
    sessions.tell("ann", words(5, 2))  # goes on in a copy, from where the failed call began
    sessions.forget("ann")
    assert [len(store) for store in stores.values()] == [0] * len(stores)


def test_what_is_told_is_remembered_and_not_answered():
    model = model_of()
    told = open_sessions(model)
    told.tell("ann", SCRIPT["ann"][0])
    with torch.no_grad():
        want = model(torch.tensor([WORDS.encode(SCRIPT["ann"][0])])).memory_state
    same_state("told", "ann", told.sessions["ann"].state, want)


def test_a_user_at_the_limit_is_refused_and_nobody_is_put_out():
    sessions = open_sessions(max_users=2)
    sessions.replies({"ann": "w1", "bob": "w2"})
    with pytest.raises(ValueError, match="3 users: at most max_users = 2"):
        sessions.reply("cy", "w3")
    with pytest.raises(ValueError, match="3 users"):
        sessions.load("cy", "nowhere")
    assert sessions.users == ["ann", "bob"] and sessions.reply("ann", "w1")
    sessions.forget("ann")
    sessions.reply("cy", "w3")
    with pytest.raises(ValueError, match="max_users = 0"):
        open_sessions(max_users=0)


def test_a_call_that_fails_changes_nobody():
    model = model_of()
    sessions = open_sessions(model)
    sessions.reply("ann", SCRIPT["ann"][0])
    before = sessions.sessions["ann"]
    calls = []

    def fail(module, inputs):
        calls.append(inputs)
        if len(calls) == 4:
            raise RuntimeError("out of memory")

    hook = model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        sessions.replies({"ann": "w1", "bob": "w2 w3"})
    hook.remove()
    for prompts in ({"ann": "w1", "bob": ""}, {"ann": "w1", "bob": "hello"}):
        with pytest.raises(ValueError, match=r"prompt of 'bob' is empty|'hello' is not in this vocabulary"):
            sessions.replies(prompts)
    assert sessions.users == ["ann"] and sessions.sessions["ann"] is before
    assert sessions.reply("ann", SCRIPT["ann"][1]) == alone("ann", model, DRAWN)[0][1]


GO_ON = """
import sys
from tests.inference.test_session import SCRIPT, open_sessions
sessions = open_sessions()
sessions.load("ann", sys.argv[1])
print(sessions.reply("ann", SCRIPT["ann"][1]))
print(sessions.reply("ann", SCRIPT["ann"][2]))
"""


def test_a_user_goes_on_in_another_process(tmp_path):
    sessions = open_sessions()
    said = [sessions.reply("ann", SCRIPT["ann"][0])]
    sessions.save("ann", tmp_path / "users" / "ann.safetensors")
    words = [sys.executable, "-c", GO_ON, str(tmp_path / "users" / "ann.safetensors")]
    root = os.path.join(os.path.dirname(__file__), "..", "..")
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    want = alone("ann", sessions.model, DRAWN)[0]
    assert said + done.stdout.splitlines() == want
    stranger = open_sessions()
    assert [stranger.reply("ann", text) for text in SCRIPT["ann"][1:]] != want[1:]


@pytest.mark.parametrize("kind", [*MEMORIES, None])
def test_a_state_is_saved_bit_for_bit(kind, tmp_path):
    model = model_of(kind) if kind else BASELINE.build()
    with torch.no_grad():
        state = model(torch.arange(14).reshape(2, 7)).memory_state
    save_state(state, tmp_path / "state", model)
    found, random = load_state(tmp_path / "state", model)
    assert random is None
    same_state("file", "state", found, state, within=0.0)
    assert {t.dtype for _, t in found.named_tensors()} == {t.dtype for _, t in state.named_tensors()}


def test_files_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    model, file = model_of(), tmp_path / "ann"
    state = model.init_state(1)
    with pytest.raises(StateError, match="no such file; save_state writes it"):
        load_state(file, model)
    save_state(state, file, model)
    whole = file.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(StateError, match="incomplete or damaged state file"):
            load_state(file, model)
    file.write_bytes(whole.replace(b"memory state 1", b"memory state 9"))
    with pytest.raises(StateError, match="format 'memlib memory state 9', not"):
        load_state(file, model)

    file.write_bytes(whole)
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_state(model(torch.tensor([[1]])).memory_state, file, model)
    assert file.read_bytes() == whole


def test_a_state_belongs_to_its_weights_and_its_stores(tmp_path):
    model, file = model_of("external"), tmp_path / "ann"
    save_state(model.init_state(1), file, model)
    attach_stores(model)
    with pytest.raises(StateError, match=r"lacks .* attach stores as they were"):
        load_state(file, model)
    other = model_of("external")
    load_state(file, other)
    with torch.no_grad():
        other.head.weight += 1e-3
    with pytest.raises(StateError, match="of another model, or of this model with other weights"):
        load_state(file, other)
