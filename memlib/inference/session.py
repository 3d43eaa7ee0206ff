"""Conversations: one model, many users, each with a memory that is theirs alone (law L3).

    sessions = Sessions(load_model("runs/notes"))
    sessions.reply("ann", "The door code is 4711. ")
    sessions.reply("bob", "The door code is ")        # knows nothing of what ann said
    sessions.save("ann", "ann.safetensors")

A user is a memory state and a random generator of their own; users that are answered in one call read
side by side, each with the result of being answered alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memlib.inference.generate import GenerationConfig, TokenStream
from memlib.inference.row_groups import read, row_groups, row_states
from memlib.inference.sampling import seeded
from memlib.inference.states import load_state, save_state
from memlib.inference.tokenizer import Tokenizer, decode, tokenizer_for
from memlib.models import MemoryState
from memlib.models.eval_mode import eval_mode
from memlib.models.protocol import RecurrentModel
from memlib.models.stores import attached_stores, forget_streams, forgetting_on_failure


@dataclass(frozen=True)
class Session:
    """What is kept of a user: the memory, and where their random generator stands."""

    state: MemoryState
    random: Tensor


class Sessions:
    """Users' conversations with one model, at most `max_users` of them at a time.

    tokenizer: how text becomes tokens; that of the model's task if None. config: how replies are
    generated; a reply ends with the tokenizer's stop tokens too. seed: of the users' generators, with
    their names. A call that raises leaves every user as they were; what it had filed
    in attached stores is dropped at once for new users, and for known ones when they are forgotten.

    Nobody is put out to make room: at the limit a new user is refused until another one is forgotten.
    """

    def __init__(
        self,
        model: RecurrentModel,
        tokenizer: Tokenizer | None = None,
        config: GenerationConfig | None = None,
        max_users: int = 64,
        seed: int = 0,
    ) -> None:
        if max_users < 1:
            raise ValueError(f"max_users = {max_users}: must be at least 1")
        self.model, self.max_users, self.seed = model, max_users, seed
        self.tokenizer = tokenizer or tokenizer_for(model.config)
        config = config or GenerationConfig()
        stop = dict.fromkeys((*config.stop_tokens, *self.tokenizer.stop))
        self.config = replace(config, stop_tokens=tuple(stop))
        self.sessions: dict[str, Session] = {}
        self.failed: dict[str, list[MemoryState]] = {}  # from where a call that raised had written on

    @property
    def users(self) -> list[str]:
        """Who is remembered, in the order they came."""
        return list(self.sessions)

    def reply(self, user: str, prompt: str) -> str:
        """Read what a user says and answer; both are remembered."""
        return self.replies({user: prompt})[user]

    def replies(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Answer several users in one call, each as if alone."""
        with self.calling(prompts):
            users, ids, known = self.prepared(prompts)
            generators = [generator_at(one.random) for one in known]
            states = [one.state for one in known]
            tokens = TokenStream(self.model, ids, states, self.config, generators)
            for _ in tokens:
                pass
            remembered = tokens.states
        for user, state, generator in zip(users, remembered, generators, strict=True):
            self.sessions[user] = Session(state, generator.get_state())
        ended = zip(tokens.tokens, tokens.stopped, strict=True)
        said = [decode(self.tokenizer, row[:-1] if stopped else row) for row, stopped in ended]
        return dict(zip(users, said, strict=True))

    def tell(self, user: str, text: str) -> None:
        """Let a user say something that is remembered and not answered."""
        with self.calling([user]), eval_mode(self.model):
            (user,), (ids,), (known,) = self.prepared({user: text})
            groups, _ = read(self.model, row_groups([known.state]), {0: ids})
        self.sessions[user] = replace(known, state=row_states(groups)[0])

    def forget(self, user: str) -> None:
        """Forget all of a user; what stores hold of their stream too."""
        self.check_known(user)
        for state in (self.sessions.pop(user).state, *self.failed.pop(user, ())):
            forget_streams(self.model, state)

    def save(self, user: str, path: str | os.PathLike[str]) -> None:
        """Write a user's memory to a file, whole or not at all."""
        self.check_known(user)
        known = self.sessions[user]
        save_state(known.state, path, self.model, known.random)

    def load(self, user: str, path: str | os.PathLike[str]) -> None:
        """Take a user's memory from a file, in place of what is known of them."""
        self.check_room([user])
        state, random = load_state(path, self.model)
        fresh = seeded(self.seed, user).get_state()
        self.sessions[user] = Session(state, fresh if random is None else random)

    @contextmanager
    def calling(self, users: Iterable[str]) -> Iterator[None]:
        """A call to the model for some users: if it raises, what it filed in stores can still be dropped."""
        try:
            with forgetting_on_failure(self.model):
                yield
        except BaseException:
            for user in users if attached_stores(self.model) else ():
                if user in self.sessions:
                    left, state = self.failed.setdefault(user, []), self.sessions[user].state
                    if not any(state is one for one in left):
                        left.append(state)
            raise

    def prepared(self, prompts: Mapping[str, str]) -> tuple[list[str], list[list[int]], list[Session]]:
        """Users, the ids of what they say, and what is known of them so far."""
        self.check_room(prompts)
        ids = [self.tokenizer.encode(prompt) for prompt in prompts.values()]
        for user, row in zip(prompts, ids, strict=True):
            if not row:
                raise ValueError(f"{user!r} says nothing: a prompt needs at least one token")
        known = [
            self.sessions.get(user) or Session(self.model.init_state(1), seeded(self.seed, user).get_state())
            for user in prompts
        ]
        return list(prompts), ids, known

    def check_room(self, users: Iterable[str]) -> None:
        total = len({*self.sessions, *users})
        if total > self.max_users:
            raise ValueError(
                f"{total} users: at most max_users = {self.max_users} are remembered at a time; "
                "save and forget one, or raise max_users"
            )

    def check_known(self, user: str) -> None:
        if user not in self.sessions:
            raise ValueError(f"{user!r}: nothing is known of this user; known: {', '.join(self.users)}")


def generator_at(state: Tensor) -> torch.Generator:
    """A generator that goes on from a saved place."""
    generator = torch.Generator()
    generator.set_state(state)
    return generator
