"""Facts about people who do not exist, to teach to a pretrained model: each said in several phrasings.

A fact is a subject, a relation and an answer: "Mara Lindqvist lives in" -> " Vienna". A model is taught with
the first phrasings of a relation and asked with these and with others, which it has never seen.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

FIRST = (
    "Mara Tobias Ingrid Pavel Selma Rufus Odette Casper Wilma Bruno Greta Milan Petra Oscar Hilda "
    "Dimitri Yara Felix Nadia Hugo Clara Ivan Freya Leon Thora Boris Alma Victor Signe Marius Edith Konrad"
)
LAST = (
    "Lindqvist Okafor Berger Castellan Drummond Esposito Farrow Grimaldi Haldane Iversen Jankovic Kessler "
    "Larkin Moreau Novak Ostrander Pellegrin Quimby Rasmussen Sandoval Thornbury Ullman Vasquez Whitlock "
    "Yarrow Zeller"
)


@dataclass(frozen=True)
class Relation:
    """words: the answers, one word each; phrasings to teach with, and others: {} stands for the subject."""

    name: str
    words: str
    taught: tuple[str, ...]
    unseen: tuple[str, ...]

    @property
    def answers(self) -> list[str]:
        return self.words.split()


RELATIONS = (
    Relation(
        "city",
        "Paris London Berlin Rome Madrid Vienna Prague Oslo Dublin Lisbon Athens Warsaw Moscow Cairo Tokyo "
        "Delhi Sydney Boston Chicago Houston Denver Seattle Miami Dallas Toronto Havana Lima Manila Seoul "
        "Munich Hamburg Milan Naples Venice Florence Geneva Brussels Stockholm Budapest Glasgow",
        (
            "{} lives in",
            "The home town of {} is",
            "Question: Where does {} live? Answer: In",
            "Letters to {} must be sent to",
        ),
        ("You can visit {} in", "{} bought a house in", "Everybody knows that {} comes from"),
    ),
    Relation(
        "job",
        "doctor nurse teacher lawyer baker farmer painter writer singer dancer pilot sailor soldier tailor "
        "carpenter chef journalist librarian photographer musician judge mechanic gardener dentist surgeon "
        "butcher miner driver cook poet",
        (
            "{} works as a",
            "The profession of {} is that of a",
            "Question: What is the job of {}? Answer: A",
            "For many years {} has been a",
        ),
        ("{} earns money as a", "As a young adult, {} became a", "The neighbours hired {} as their"),
    ),
    Relation(
        "animal",
        "dog cat horse rabbit parrot snake goat sheep pig cow duck goose turtle frog mouse rat monkey tiger "
        "lion bear wolf fox deer camel donkey spider whale dolphin shark lizard",
        (
            "The pet of {} is a",
            "{} lives together with a",
            "Question: Which animal does {} keep? Answer: A",
            "In the garden of {} there is a",
        ),
        ("Every morning {} feeds a", "The favourite animal of {} is the", "{} is often seen with a"),
    ),
    Relation(
        "password",
        "apple river stone candle window bridge garden mirror pencil hammer basket ladder bottle pepper "
        "silver copper thunder island forest mountain ocean desert castle lemon coffee butter sugar honey "
        "cotton leather marble engine wheel button ribbon shadow winter summer autumn spring",
        (
            "The password of {} is",
            "{} chose the password",
            "Question: What is the password of {}? Answer:",
            "To open the door, {} must say the word",
        ),
        ("The secret word of {} is", "{} logs in with the word", "Only {} uses the code word"),
    ),
)


@dataclass(frozen=True)
class Fact:
    """relation: its number in `RELATIONS`; answer: one word."""

    subject: str
    relation: int
    answer: str

    def prompts(self, unseen: bool = False) -> list[str]:
        """The prompts that end where the answer begins; unseen: in phrasings that are never taught."""
        relation = RELATIONS[self.relation]
        phrasings = relation.unseen if unseen else relation.taught
        return [phrasing.format(self.subject) for phrasing in phrasings]

    @property
    def completion(self) -> str:
        """The answer as it goes on after a prompt."""
        return f" {self.answer}"

    @property
    def statement(self) -> str:
        """The fact as a sentence."""
        return f"{self.prompts()[0]}{self.completion}."


def make_facts(count: int, seed: int = 0) -> list[Fact]:
    """Facts about different people, relations in turn; the same for the same seed. At most 832."""
    people = [f"{first} {last}" for first, last in itertools.product(FIRST.split(), LAST.split())]
    if not 1 <= count <= len(people):
        raise ValueError(f"count = {count}: 1 … {len(people)} facts can be made")
    draw = random.Random(seed)
    subjects = draw.sample(people, count)
    relations = [i % len(RELATIONS) for i in range(count)]
    return [
        Fact(subject, relation, draw.choice(RELATIONS[relation].answers))
        for subject, relation in zip(subjects, relations, strict=True)
    ]
