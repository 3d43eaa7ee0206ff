"""What some tests need and not every environment has: skipped without it, but under CI they fail."""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest


@pytest.fixture(scope="session")
def lacking():
    """Say that something is missing, and what installs it."""

    def lacking_(what: str, remedy: str) -> None:
        reason = f"no {what}: `{remedy}` installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return lacking_


@pytest.fixture
def peer(lacking):
    """A library of `make extras` that does the same as memlib: peer("torchao.quantization")."""

    def peer_(name: str):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            lacking(name.partition(".")[0], "make extras")
        return importlib.import_module(name)

    return peer_
