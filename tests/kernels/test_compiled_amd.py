"""Rows of tiles.json for AMD's GPUs, compiled again through the launchers.

Two of each kernel and GPU; `python -m memlib_kernels.tile_search --check` compiles all.
"""

from __future__ import annotations

import pytest

from memlib_kernels.ahead_of_time import own_cache
from memlib_kernels.tile_search import drift, samples


@pytest.fixture(scope="module", autouse=True)
def cache():
    with own_cache():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("target", ["gfx942", "gfx950"])
@pytest.mark.parametrize("kernel", sorted({row["kernel"] for row, _ in samples("gfx942")}))
def test_the_compiler_reports_what_the_table_says(kernel, target):
    compiled = [(row, option) for row, option in samples(target) if row["kernel"] == kernel]
    assert compiled
    assert [found for row, option in compiled if (found := drift(row, option))] == []
