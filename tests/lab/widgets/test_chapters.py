"""The view of chapters says what the recording says."""

import numpy as np
import pytest
import torch

from memlib import MemoryTransformer, load_config, record
from memlib.lab.widgets import chapters_over_time, strips


@pytest.fixture(scope="module")
def trace():
    torch.manual_seed(0)
    model = MemoryTransformer(load_config("topics_routed")).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    with record(model) as trace, torch.no_grad():
        model(torch.randint(0, 96, (2, 48)))
    return trace


@pytest.mark.parametrize("point", ["probability", "weight"])
def test_shows_what_was_recorded(trace, point):
    view = chapters_over_time(trace, point=point, row=1, segment_length=16)
    want = trace[f"chapters.{point}"].at(layer=0, batch=1).values
    assert np.array_equal(view.arrays["lines"], want.T.astype(np.float32))
    assert view.times == 48 and view.items == want.shape[1]
    assert view.words["rows"][3] == "chapter 3" and f"chapter 3 from {want[:, 3].min():.2f}" in view.summary


def test_follows_the_other_views_of_its_stream(trace):
    views = [chapters_over_time(trace, row=row, segment_length=16) for row in (0, 1)]
    assert views[0].group != views[1].group
    assert views[0].group == chapters_over_time(trace, point="weight").group


@pytest.mark.parametrize(("count", "lines", "images"), [(4, 4, 0), (5, 0, 1), (16, 0, 1)])
def test_many_lines_are_drawn_as_strips(count, lines, images):
    """A picture of lines that hide each other, under a legend wider than itself, shows nothing."""
    from matplotlib.figure import Figure

    values = np.random.default_rng(0).random((count, 12), dtype=np.float32)
    view = strips({f"line {i}": row for i, row in enumerate(values)}, [str(i) for i in range(12)], "Lines")
    axis = Figure().subplots()
    view.draw(axis, 0)
    assert (len(axis.lines), len(axis.images)) == (lines, images)
    if images:
        assert np.array_equal(axis.images[0].get_array(), values)
        assert [label.get_text() for label in axis.get_yticklabels()] == [f"line {i}" for i in range(count)]
