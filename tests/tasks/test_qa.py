import re
from collections import Counter

import pytest
import torch

from memlib.config import QaConfig
from memlib.tasks import Qa


def words_of(task, row):
    return [task.name_of(token) for token in row]


def test_sentences_do_not_straddle_segments():
    task = Qa(QaConfig(), 20, 6)
    for row in task.batch(32, 0).tokens.tolist():
        for first in range(0, 100, 20):
            text = " ".join(word for word in words_of(task, row[first : first + 20]) if word != "_")
            assert re.fullmatch(r"(\w+ \w+ \w+ \w+ \w+ \. ?){3}", text)


def test_the_last_segment_holds_the_question_alone():
    task = Qa(QaConfig(supporting_facts=2, distractors=1), 20, 6)
    for row in task.batch(32, 0).tokens.tolist():
        text = " ".join(word for word in words_of(task, row[-20:]) if word != "_")
        assert re.fullmatch(r"where do we find the \w+ \? \w+", text)


@pytest.mark.parametrize("facts", [1, 2, 3])
def test_answers_are_uniform_over_the_places(facts):
    task = Qa(QaConfig(supporting_facts=facts, distractors=0), 16, 5)
    batch = task.batch(6000, 0)
    counts = Counter(batch.targets[batch.scored].tolist())
    assert set(counts) == set(task.vocabulary["place"])
    assert all(abs(count - 1000) < 4 * (1000 * 5 / 6) ** 0.5 for count in counts.values())


def test_a_known_story():
    task = Qa(QaConfig(supporting_facts=3, distractors=0, num_places=8), 16, 5)
    story = """anna lifts up the rope . anna walks into the attic . boris arrives at the market .
        anna hums an old tune . anna arrives at the cellar . anna walks into the attic .
        anna puts the rope down . anna walks into the kitchen . a clock ticks somewhere near ."""
    asked = {
        "where do we find anna ?": "kitchen",
        "where do we find boris ?": "market",
        "where do we find the rope ?": "attic",
        "from where came the rope to the attic ?": "cellar",
        "from where came the rope to the cellar ?": "attic",
        "where do we find clara ?": "_",
        "where do we find the map ?": "_",
        "from where came the rope to the market ?": "_",
    }
    for question, answer in asked.items():
        words = f"{story} {question}".split()
        tokens = torch.tensor([[task.vocabulary.names.index(word) for word in words]])
        assert task.name_of(int(task.oracle(tokens)[0, -1])) == answer, question


@pytest.mark.parametrize("facts", [2, 3])
def test_who_took_what_is_needed(facts):
    """Without the sentences in which things are taken, no question about a thing has an answer."""
    task = Qa(QaConfig(supporting_facts=facts, distractors=0), 16, 7)
    batch = task.batch(64, 0)
    taking = {task.vocabulary.names.index(word) for word in ("takes", "lifts")}
    tokens = batch.tokens.clone()
    for row in tokens:
        for i, token in enumerate(row.tolist()):
            if token in taking:
                begin = i - 2 if task.name_of(token) == "takes" else i - 1
                row[begin : begin + 6] = 0
    assert (task.oracle(tokens)[batch.scored] == 0).all()


def test_nobody_contradicts_the_story():
    """Things are put down only by who took them, once, and every move leads to another place."""
    task = Qa(QaConfig(supporting_facts=3, distractors=0), 24, 8)
    for row in task.batch(32, 0).tokens.tolist():
        text = " ".join(word for word in words_of(task, row[:-24]) if word != "_")
        where, holder = {}, {}
        for sentence in text.split(" ."):
            move = re.search(r"(\w+) (?:walks into|arrives at) the (\w+)", sentence)
            take = re.search(r"(\w+) (?:now takes|lifts up) the (\w+)", sentence)
            drop = re.search(r"(\w+) (?:leaves|puts) the (\w+) (?:behind|down)", sentence)
            if move:
                assert where.get(move[1]) != move[2]
                where[move[1]] = move[2]
            elif take:
                assert take[2] not in holder
                holder[take[2]] = take[1]
            elif drop:
                assert holder[drop[2]] == drop[1]
                holder[drop[2]] = "nobody"


def test_chance_is_one_place_less_where_the_question_names_one():
    options = {"num_places": 5, "distractors": 0}
    assert Qa(QaConfig(supporting_facts=2, **options), 16, 5).chance == 1 / 5
    assert Qa(QaConfig(supporting_facts=3, **options), 16, 5).chance == 1 / 4


@pytest.mark.parametrize(
    ("options", "n", "segments", "message"),
    [
        ({"supporting_facts": 3}, 8, 9, "segment_length = 8: a question of 3 facts"),
        (
            {"supporting_facts": 3, "num_places": 2},
            32,
            9,
            "num_places = 2: 3 facts need at least 3",
        ),
        (
            {"supporting_facts": 3, "distractors": 4},
            16,
            4,
            "needs 15 sentences, and 3 segments of 16 tokens hold 6",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, n, segments, message):
    with pytest.raises(ValueError, match=message):
        Qa(QaConfig(**options), n, segments)
