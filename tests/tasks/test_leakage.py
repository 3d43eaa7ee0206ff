"""Nothing in the last segment tells the answer: guessers without memory sit at chance.

Each guesser counts, on thousands of training examples, which target followed which context of the
last segment, and says the commonest. Chance is a statement about the generator, so the tolerance is
that of the sample: four standard deviations of a binomial.
"""

import numpy as np
import pytest
import torch

from memlib.config import RecallConfig
from memlib.tasks import Recall

OUTSIDE = 256
CONTEXTS = [(width, place) for width in (1, 2, 3) for place in (False, True)]


def scored_contexts(task, split, batches, width, place):
    """Contexts [e] of the scored positions (last tokens in the segment, place) and targets [e]."""
    contexts, targets = [], []
    for step in range(batches):
        batch = task.batch(256, step, split=split)
        n = task.segment_length
        tokens, scored = batch.tokens[:, -n:].numpy(), batch.scored[:, -n:].numpy()
        row, position = np.nonzero(scored)
        context = position * place
        for back in range(width):
            token = np.where(position >= back, tokens[row, position - back], OUTSIDE)
            context = context * (OUTSIDE + 1) + token
        contexts.append(context)
        targets.append(batch.targets[:, -n:].numpy()[row, position])
    return np.concatenate(contexts), np.concatenate(targets)


def counting_accuracy(task, width, place):
    """(accuracy, examples) of the guesser on fresh examples."""
    contexts, targets = scored_contexts(task, "train", 16, width, place)
    known, which = np.unique(contexts, return_inverse=True)
    counts = np.zeros((len(known), task.vocab_size), dtype=int)
    np.add.at(counts, (which, targets), 1)
    contexts, targets = scored_contexts(task, "test", 16, width, place)
    found = np.searchsorted(known, contexts).clip(max=len(known) - 1)
    commonest = counts.sum(0).argmax()
    guess = np.where(known[found] == contexts, counts.argmax(1)[found], commonest)
    return (guess == targets).mean(), len(targets)


def noise(chance, examples):
    return 4 * np.sqrt(chance * (1 - chance) / examples)


def best_of_counting(task):
    """How far the best guesser is from chance, and how far it may be."""
    results = [counting_accuracy(task, width, place) for width, place in CONTEXTS]
    best, examples = max(results)
    return best - task.chance, noise(task.chance, examples)


def test_counting_is_at_chance(task):
    excess, tolerance = best_of_counting(task)
    assert abs(excess) < tolerance


class Leaky(Recall):
    """Recall whose answers, half of the time, follow from something in the last segment."""

    def __init__(self, clue):
        super().__init__(RecallConfig(), 16, 4)
        self.clue = clue

    def generate(self, rng, batch_size, segments):
        stream, scored = super().generate(rng, batch_size, segments)
        row, position = np.nonzero(scored)
        half = rng.random(len(row)) < 0.5
        row, position = row[half], position[half]
        clue = {
            "key": stream[row, position],
            "position": position,
            "filler": stream[row, position - 2],
        }[self.clue]
        value = self.vocabulary["value"]
        stream[row, position + 1] = value.start + clue % len(value)
        return stream, scored


@pytest.mark.parametrize("clue", ["key", "position", "filler"])
def test_counting_catches_a_leak(clue):
    excess, tolerance = best_of_counting(Leaky(clue))
    assert excess > 2 * tolerance


def test_the_oracle_with_anothers_memory_is_at_chance(task):
    """Each row's last segment after the earlier segments of its neighbour.

    Where the neighbour never spoke of what is asked the oracle says 0, so only answers count.
    """
    batch = task.batch(2048, 0, split="test")
    before = (task.segments - 1) * task.segment_length
    shuffled = batch.tokens.clone()
    shuffled[:, :before] = torch.roll(batch.tokens[:, :before], 1, dims=0)
    said, right = task.oracle(shuffled)[batch.scored], batch.targets[batch.scored]
    answered = said != 0
    assert answered.sum() > 200
    accuracy = (said == right)[answered].double().mean().item()
    assert abs(accuracy - task.chance) < noise(task.chance, int(answered.sum()))
