"""Stories and questions: an answer needs one, two or three facts from segments before the question.

Axes: b batch, t tokens of the stream, n tokens of a segment, s segments of the story, e events, m
sentences, w words of a sentence.
"""

from __future__ import annotations

import numpy as np
from einops import rearrange

from memlib.config import QaConfig
from memlib.tasks.base import GeneratedTask
from memlib.tasks.placement import place_blocks, write_blocks
from memlib.tasks.vocabulary import Vocabulary
from memlib.tasks.world import Stories, tell_stories

PEOPLE = ["anna", "boris", "clara", "dario", "elena", "felix", "greta", "hugo"]
PLACES = ["attic", "cellar", "courtyard", "harbour", "kitchen", "library", "market", "workshop"]
THINGS = ["lantern", "rope", "map", "coin", "kettle", "drum"]

# Every sentence has six words and every kind has two wordings, so that a batch is one array.
DEEDS = (
    ("PERSON walks into the PLACE .", "PERSON arrives at the PLACE ."),
    ("PERSON now takes the THING .", "PERSON lifts up the THING ."),
    ("PERSON leaves the THING behind .", "PERSON puts the THING down ."),
)
IDLE = (
    "PERSON hums an old tune .",
    "PERSON thinks of the sea .",
    "outside it begins to rain .",
    "a clock ticks somewhere near .",
)
QUESTIONS = (
    "where do we find PERSON ? PLACE",
    "where do we find the THING ? PLACE",
    "from where came the THING to the HERE ? PLACE",
)
SENTENCE = 6
BLANKS = {"PERSON": -1, "PLACE": -2, "THING": -3, "HERE": -4}


class Qa(GeneratedTask):
    """`anna walks into the attic . … | … ? attic`: where is a person or a thing, or where was it before?

    One fact: where a person went last. Two facts: where a thing is, from the person who carries it. Three
    facts: from which place a thing was carried to its present place. Sentences fill all segments but the
    last: one in 1 + distractors is an event, the others are irrelevant. No sentence crosses a segment
    border. The last segment holds only the question. The scored position is the one that predicts the answer.

    Chance is exactly 1 / num_places, because the simulation treats all places alike. With three facts it
    is 1 / (num_places - 1), because the question names a place that cannot be the answer.

    Raises ValueError if the story or the question does not fit.
    Source: the idea of bAbI's tasks 1-3 (arXiv 1502.05698) and of BABILong (arXiv 2406.10149), with
    sentences and a simulation of our own.
    """

    def __init__(
        self,
        config: QaConfig,
        segment_length: int,
        segments: int = 4,
        segments_min: int | None = None,
    ) -> None:
        super().__init__(segment_length, segments, segments_min)
        self.config = config
        facts, question = config.supporting_facts, QUESTIONS[config.supporting_facts - 1].split()
        if len(question) > segment_length:
            raise ValueError(
                f"segment_length = {segment_length}: a question of {facts} facts and its answer "
                f"take {len(question)} tokens; raise segment_length"
            )
        if config.num_places < facts:
            raise ValueError(f"num_places = {config.num_places}: 3 facts need at least 3; raise num_places")
        self.chance = 1 / (config.num_places - (facts == 3))
        words = " ".join(sum(DEEDS, ()) + IDLE + QUESTIONS).split()
        self.vocabulary = Vocabulary(
            {
                "pad": ["_"],
                "question": ["?"],
                "word": sorted(set(words) - {"?", *BLANKS}),
                "person": PEOPLE[: config.num_people],
                "place": PLACES[: config.num_places],
                "thing": THINGS[: config.num_objects],
            }
        )
        self._events(self.segments_min)
        self._deeds = self._encode(sum(DEEDS, ()))
        self._idle = self._encode(IDLE)
        self._question = self._encode((QUESTIONS[facts - 1],))
        self._answers_at = question.index("?")

    def _events(self, segments: int) -> int:
        """Number of events in `segments` - 1 segments; raises ValueError if too few for the question."""
        c, n = self.config, self.segment_length
        room = (segments - 1) * (n // SENTENCE)
        events = room // (1 + c.distractors)
        if events < c.supporting_facts:
            needed = c.supporting_facts * (1 + c.distractors)
            raise ValueError(
                f"supporting_facts = {c.supporting_facts}: with distractors = {c.distractors} a "
                f"story needs {needed} sentences, and {segments - 1} segments of {n} tokens hold "
                f"{room}; raise segments or segment_length, or lower distractors"
            )
        return events

    def _encode(self, sentences: tuple[str, ...]) -> np.ndarray:
        """Token ids of m sentences of w words: [m w]; blanks are negative."""
        ids = BLANKS | {name: i for i, name in enumerate(self.vocabulary.names)}
        return np.array([[ids[word] for word in sentence.split()] for sentence in sentences])

    def _fill(self, sentences: np.ndarray, **blanks: np.ndarray) -> np.ndarray:
        """Fill the blanks of sentences [... w] with members [...] of the blank's family."""
        family = {"PERSON": "person", "PLACE": "place", "THING": "thing", "HERE": "place"}
        for blank, number in blanks.items():
            word = self.vocabulary[family[blank]].start + rearrange(number, "... -> ... 1")
            sentences = np.where(sentences == BLANKS[blank], word, sentences)
        return sentences

    def generate(
        self, rng: np.random.Generator, batch_size: int, segments: int
    ) -> tuple[np.ndarray, np.ndarray]:
        b, n, c = batch_size, self.segment_length, self.config
        world = c.num_people, c.num_places, c.num_objects
        stories = tell_stories(rng, b, self._events(segments), c.supporting_facts, *world)
        stream = np.full((b, segments * n + 1), self.vocabulary["pad"].start)
        self._write_story(rng, stream, stories, segments)

        question = self._fill(
            np.repeat(self._question, b, axis=0),
            PERSON=stories.hero,
            THING=stories.treasure,
            HERE=stories.here,
            PLACE=stories.before if c.supporting_facts == 3 else stories.here,
        )
        asked = (segments - 1) * n + place_blocks(rng, b, 1, question.shape[-1], n)
        write_blocks(stream, asked, rearrange(question, "b w -> b 1 w"))
        scored = np.zeros((b, segments * n), dtype=bool)
        np.put_along_axis(scored, asked + self._answers_at, True, 1)
        return stream, scored

    def _write_story(
        self, rng: np.random.Generator, stream: np.ndarray, stories: Stories, segments: int
    ) -> None:
        """Fill all segments but the last of stream [b t+1] with events and irrelevant sentences."""
        (b, e), n, c = stories.kind.shape, self.segment_length, self.config
        each = n // SENTENCE
        everywhere = (b, (segments - 1) * each)
        sentences = self._fill(
            self._idle[rng.integers(0, len(IDLE), everywhere)],
            PERSON=rng.integers(0, c.num_people, everywhere),
        )
        wording = 2 * stories.kind + rng.integers(0, 2, (b, e))
        events = self._fill(
            self._deeds[wording], PERSON=stories.person, PLACE=stories.place, THING=stories.thing
        )
        when = place_blocks(rng, b, e, 1, everywhere[1])
        sentences[rearrange(np.arange(b), "b -> b 1"), when] = events

        inside = place_blocks(rng, b * (segments - 1), each, SENTENCE, n)
        first = rearrange(np.arange(segments - 1) * n, "s -> s 1")
        starts = rearrange(inside, "(b s) m -> b s m", b=b) + first
        write_blocks(stream, rearrange(starts, "b s m -> b (s m)"), sentences)

    def solve(self, row: list[int]) -> list[int]:
        """Track every person and thing sentence by sentence, and answer at the question mark."""
        where: dict[str, str] = {}
        carries: dict[str, set[str]] = {}
        route: dict[str, list[str]] = {}
        sentence: list[str] = []
        predictions = [0] * len(row)
        for position, word in enumerate(self.name_of(token) for token in row):
            if word == "?":
                answer = self._answer(sentence, where, route)
                predictions[position] = self.vocabulary.names.index(answer)
                sentence = []
            elif word == ".":
                person, things = sentence[0], carries.setdefault(sentence[0], set())
                thing = next((w for w in sentence if w in THINGS), "")
                if sentence[-1] in PLACES:
                    where[person] = sentence[-1]
                elif thing and {"takes", "lifts"} & set(sentence):
                    things.add(thing)
                elif thing:
                    things.discard(thing)
                for carried in things:
                    visited, place = route.setdefault(carried, []), where.get(person)
                    if place and visited[-1:] != [place]:
                        visited.append(place)
                sentence = []
            elif word != "_":
                sentence.append(word)
        return predictions

    def _answer(self, question: list[str], where: dict[str, str], route: dict[str, list[str]]) -> str:
        """The place asked for, or the name of the padding token if the story does not state it."""
        unknown = self.name_of(0)
        about = next(word for word in question if word in PEOPLE + THINGS)
        if about in PEOPLE:
            return where.get(about, unknown)
        places = route.get(about, [])
        if question[0] == "where":
            return places[-1] if places else unknown
        arrivals = [i for i, place in enumerate(places) if place == question[-1] and i]
        return places[arrivals[-1] - 1] if arrivals else unknown
