"""Import the libraries of the `pretrained` extra, which not every environment has."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


def extra(name: str) -> ModuleType:
    """Import a library of `make extras`; raises ImportError with that remedy if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise ImportError(f"{error.name} is not installed; `make extras` installs it", name=name) from error


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Temporarily disable transformers' progress bars, a setting of the process."""
    logging = extra("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
