"""A small world for stories: people move and carry things; a batch of stories is simulated at once.

Every story is built around a hero and, where objects are asked for, a thing of the hero's. A short
script of the hero's deeds, at random points of the story, makes the question answerable; all other
events are random. A thing has one owner, is taken once and put down at most once: so no story
contradicts itself, although nobody says where things lay at first. No place is special, so an
answer is uniform over the places.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from memlib.tasks.placement import random_subset

MOVE, TAKE, DROP = range(3)
SCRIPTS = {
    1: ((MOVE,),),
    2: ((MOVE, TAKE), (TAKE, MOVE)),
    3: ((MOVE, TAKE, MOVE), (TAKE, MOVE, MOVE)),
}
UNKNOWN = -1


@dataclass(frozen=True)
class Stories:
    """b stories of e events each, and what is asked at the end.

    kind, person, place, thing: [b e], the event's deed, who, where to, what (as the kind needs)
    hero, treasure: [b], whom and what the question is about
    here:   [b], where the hero (1 fact) or the treasure (2 and 3 facts) is in the end
    before: [b], where the treasure was carried from to get there (3 facts)
    """

    kind: np.ndarray
    person: np.ndarray
    place: np.ndarray
    thing: np.ndarray
    hero: np.ndarray
    treasure: np.ndarray
    here: np.ndarray
    before: np.ndarray


def tell_stories(
    rng: np.random.Generator, b: int, e: int, facts: int, people: int, places: int, things: int
) -> Stories:
    """Simulate b stories of e >= facts events; `facts` (1 … 3) is what the question needs."""
    rows = np.arange(b)
    script = rng.choice(np.array(SCRIPTS[facts]), b)
    scripted = np.zeros((b, e), dtype=bool)
    np.put_along_axis(scripted, random_subset(rng, b, facts, of=e), True, 1)

    hero, treasure = rng.integers(0, people, b), rng.integers(0, things, b)
    owner = rng.integers(0, people, (b, things))
    owner[rows, treasure] = hero
    at = rng.integers(0, places, (b, people))
    told = np.zeros((b, people), dtype=bool)
    taken, dropped = np.zeros((2, b, things), dtype=bool)
    here, before = np.full((2, b), UNKNOWN)
    done = np.zeros(b, dtype=int)
    log = np.empty((4, b, e), dtype=int)

    for i in range(e):
        now = scripted[:, i]
        deed = script[rows, np.minimum(done, facts - 1)]
        thing = np.where(now, treasure, rng.integers(0, things, b))
        # The hero's own thing waits for the script, or it might be put down before it travels.
        free = (thing != treasure) | (done == facts) | (facts == 1)
        handled = rng.random(b) < 0.5
        can_take = free & handled & ~taken[rows, thing]
        can_drop = free & handled & taken[rows, thing] & ~dropped[rows, thing]
        kind = np.select([now, can_take, can_drop], [deed, TAKE, DROP], MOVE)

        anyone = np.where(now, hero, rng.integers(0, people, b))
        person = np.where(kind == MOVE, anyone, owner[rows, thing])
        moves = kind == MOVE
        target = (at[rows, person] + rng.integers(1, places, b)) % places
        at[rows, person] = np.where(moves, target, at[rows, person])
        told[rows, person] |= moves
        taken[rows, thing] |= kind == TAKE
        dropped[rows, thing] |= kind == DROP

        carried = taken[rows, treasure] & ~dropped[rows, treasure] & told[rows, hero]
        arrived = carried & (here != at[rows, hero])
        before = np.where(arrived, here, before)
        here = np.where(arrived, at[rows, hero], here)
        done += now
        log[:, :, i] = kind, person, target, thing
    if facts == 1:
        here = at[rows, hero]
    kinds, persons, targets, things_used = log
    return Stories(kinds, persons, targets, things_used, hero, treasure, here, before)
