"""Conversations: one model, many users, each with a separate memory (law L3).

    sessions = Sessions(load_model("runs/notes"))
    sessions.reply("ann", "The door code is 4711. ")
    sessions.reply("bob", "The door code is ")        # does not know what ann said
    sessions.save("ann", "ann.safetensors")

Each user has a memory state and a random generator. Users answered in one call are processed as one batch,
with the same results as if each were answered alone.
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
    """A user's memory state, and the state of their random generator."""

    state: MemoryState
    random: Tensor


class Sessions:
    """Conversations of up to `max_users` users with one model.

    tokenizer: the tokenizer of the model's task if None. config: how replies are generated; a reply also
    ends at the tokenizer's stop tokens. seed: seeds the users' generators, together with their names.

    If a call raises, every user's state is unchanged. What the call wrote to attached stores is deleted at
    once for new users, and for known users when they are forgotten. At the limit a new user is refused with
    ValueError; no user is evicted.
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
        self.failed: dict[str, list[MemoryState]] = {}  # states from which a failed call had written on

    @property
    def users(self) -> list[str]:
        """Names of all users with a session, oldest first."""
        return list(self.sessions)

    def reply(self, user: str, prompt: str) -> str:
        """Read a user's prompt and return a reply; both enter the user's memory."""
        return self.replies({user: prompt})[user]

    def replies(self, prompts: Mapping[str, str]) -> dict[str, str]:
        """Answer several users in one call, each exactly as if alone."""
        with self.calling(prompts):
            users, ids, known = self.prepared(prompts)
            generators = [generator_at(one.random) for one in known]
            states = [one.state for one in known]
            tokens = TokenStream(self.model, ids, states, self.config, generators)
            for _ in tokens:
                pass
            after = tokens.states
        for user, state, generator in zip(users, after, generators, strict=True):
            self.sessions[user] = Session(state, generator.get_state())
        ended = zip(tokens.tokens, tokens.stopped, strict=True)
        answers = [decode(self.tokenizer, row[:-1] if stopped else row) for row, stopped in ended]
        return dict(zip(users, answers, strict=True))

    def tell(self, user: str, text: str) -> None:
        """Read a user's text into their memory without a reply."""
        with self.calling([user]), eval_mode(self.model):
            (user,), (ids,), (known,) = self.prepared({user: text})
            groups, _ = read(self.model, row_groups([known.state]), {0: ids})
        self.sessions[user] = replace(known, state=row_states(groups)[0])

    def forget(self, user: str) -> None:
        """Delete a user's session, and their streams in attached stores."""
        self.check_known(user)
        for state in (self.sessions.pop(user).state, *self.failed.pop(user, ())):
            forget_streams(self.model, state)

    def save(self, user: str, path: str | os.PathLike[str]) -> None:
        """Write a user's session to a file, atomically."""
        self.check_known(user)
        known = self.sessions[user]
        save_state(known.state, path, self.model, known.random)

    def load(self, user: str, path: str | os.PathLike[str]) -> None:
        """Load a user's session from a file, replacing the current one."""
        self.check_room([user])
        state, random = load_state(path, self.model)
        fresh = seeded(self.seed, user).get_state()
        self.sessions[user] = Session(state, fresh if random is None else random)

    @contextmanager
    def calling(self, users: Iterable[str]) -> Iterator[None]:
        """Context of a model call; if it raises, record what it wrote to stores for later deletion."""
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
        """Users, the ids of their prompts, and their sessions (new ones for unknown users)."""
        self.check_room(prompts)
        ids = [self.tokenizer.encode(prompt) for prompt in prompts.values()]
        for user, row in zip(prompts, ids, strict=True):
            if not row:
                raise ValueError(f"the prompt of {user!r} is empty: it needs at least one token")
        known = [
            self.sessions.get(user) or Session(self.model.init_state(1), seeded(self.seed, user).get_state())
            for user in prompts
        ]
        return list(prompts), ids, known

    def check_room(self, users: Iterable[str]) -> None:
        total = len({*self.sessions, *users})
        if total > self.max_users:
            raise ValueError(
                f"{total} users: at most max_users = {self.max_users} can have a session; save and forget "
                "one, or raise max_users"
            )

    def check_known(self, user: str) -> None:
        if user not in self.sessions:
            raise ValueError(f"{user!r}: this user has no session; users: {', '.join(self.users)}")


def generator_at(state: Tensor) -> torch.Generator:
    """A generator that continues from a saved state."""
    generator = torch.Generator()
    generator.set_state(state)
    return generator
