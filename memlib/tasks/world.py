"""Simulation of stories in which people move and carry things, for a batch of stories at once.

Each story has a hero. If the question is about a thing, the hero owns that thing. A short script of the
hero's actions, at random points of the story, makes the question answerable; all other events are random.
A thing has one owner, is taken once and put down at most once. Hence no story contradicts itself, although
the first position of a thing is never stated. All places are treated alike, so the answer is uniform over
places.
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
    """b stories of e events each, with the question's subject and answer.

    kind, person, place, thing: [b e], action of the event, acting person, destination, thing
    hero, treasure: [b], person and thing of the question
    here:   [b], final place of the hero (1 fact) or the treasure (2 and 3 facts)
    before: [b], the place from which the treasure was carried there (3 facts)
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
    """Simulate b stories of e >= facts events; facts: number of facts the question needs, 1 … 3."""
    rows = np.arange(b)
    script = rng.choice(np.array(SCRIPTS[facts]), b)
    scripted = np.zeros((b, e), dtype=bool)
    np.put_along_axis(scripted, random_subset(rng, b, facts, of=e), True, 1)

    hero, treasure = rng.integers(0, people, b), rng.integers(0, things, b)
    owner = rng.integers(0, people, (b, things))
    owner[rows, treasure] = hero
    at = rng.integers(0, places, (b, people))
    known = np.zeros((b, people), dtype=bool)
    taken, dropped = np.zeros((2, b, things), dtype=bool)
    here, before = np.full((2, b), UNKNOWN)
    done = np.zeros(b, dtype=int)
    log = np.empty((4, b, e), dtype=int)

    for i in range(e):
        now = scripted[:, i]
        deed = script[rows, np.minimum(done, facts - 1)]
        thing = np.where(now, treasure, rng.integers(0, things, b))
        # Only the script handles the treasure until it is done: else it might be put down too early.
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
        known[rows, person] |= moves
        taken[rows, thing] |= kind == TAKE
        dropped[rows, thing] |= kind == DROP

        carried = taken[rows, treasure] & ~dropped[rows, treasure] & known[rows, hero]
        arrived = carried & (here != at[rows, hero])
        before = np.where(arrived, here, before)
        here = np.where(arrived, at[rows, hero], here)
        done += now
        log[:, :, i] = kind, person, target, thing
    if facts == 1:
        here = at[rows, hero]
    kinds, persons, targets, things_used = log
    return Stories(kinds, persons, targets, things_used, hero, treasure, here, before)
