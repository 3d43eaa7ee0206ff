"""Token ids, assigned family by family."""

from __future__ import annotations

LIMIT = 256


class Vocabulary:
    """Families of named tokens with consecutive ids; the first token of the first family is 0.

    >>> vocabulary = Vocabulary({"pad": ["_"], "key": ["k0", "k1"]})
    >>> vocabulary["key"], vocabulary.names[2]
    (range(1, 3), 'k1')

    Raises ValueError if there are more than 256 tokens, which keeps small models small.
    """

    def __init__(self, families: dict[str, list[str]]) -> None:
        self.names: list[str] = []
        self._ranges: dict[str, range] = {}
        for family, names in families.items():
            first = len(self.names)
            self.names += names
            self._ranges[family] = range(first, len(self.names))
        if len(self.names) > LIMIT:
            sizes = ", ".join(f"{family} {len(names)}" for family, names in families.items())
            raise ValueError(
                f"vocabulary of {len(self.names)} tokens ({sizes}): at most {LIMIT}; "
                "lower the size of the largest family"
            )

    @property
    def families(self) -> list[str]:
        return list(self._ranges)

    def __getitem__(self, family: str) -> range:
        return self._ranges[family]

    def __len__(self) -> int:
        return len(self.names)


def numbered(prefix: str, count: int) -> list[str]:
    """`numbered("k", 2)` is `["k0", "k1"]`."""
    return [f"{prefix}{i}" for i in range(count)]
