import pytest

from memlib.tasks.vocabulary import Vocabulary, numbered


def test_families_are_consecutive():
    vocabulary = Vocabulary({"pad": ["_"], "key": numbered("k", 3), "value": numbered("v", 2)})
    assert vocabulary.names == ["_", "k0", "k1", "k2", "v0", "v1"]
    assert (vocabulary["key"], vocabulary["value"]) == (range(1, 4), range(4, 6))
    assert len(vocabulary) == 6


def test_more_than_256_tokens_are_refused():
    with pytest.raises(ValueError, match=r"257 tokens \(pad 1, key 256\): at most 256"):
        Vocabulary({"pad": ["_"], "key": numbered("k", 256)})
