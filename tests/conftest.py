"""How tests are spread over workers, and what some tests need that not every environment has."""

from __future__ import annotations

import importlib
import importlib.util
import os
import socket

import pytest

WORKERS = 4  # at most: each takes about 1 GiB, and a notebook's kernel as much again


def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: one worker for each core this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, WORKERS)


def is_long(item: pytest.Item) -> bool:
    """Whether the item's file takes longer than most."""
    return item.path.suffix == ".ipynb" or bool({"browser", "laws"} & set(item.path.parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that the workers end together: also every file that has a slow test."""
    long = {item.path for item in items if is_long(item) or item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def lacking():
    """Say that something is missing, and what installs it."""

    def lacking_(what: str, remedy: str) -> None:
        reason = f"no {what}: `{remedy}` installs it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)

    return lacking_


@pytest.fixture(scope="session")
def smollm2(lacking):
    """SmolLM2-135M-Instruct and its tokenizer, from the cache; shared, so a test must not change them."""
    from memlib.pretrained.cache import WeightsError
    from memlib.pretrained.weights import load_base

    if importlib.util.find_spec("transformers") is None:
        lacking("transformers", "make extras")
    try:
        return load_base("smollm2-135m-instruct")
    except WeightsError as error:
        lacking(f"SmolLM2 ({error})", "make model")


@pytest.fixture
def peer(lacking):
    """A library of `make extras` that does the same as memlib: peer("torchao.quantization")."""

    def peer_(name: str):
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            lacking(name.partition(".")[0], "make extras")
        return importlib.import_module(name)

    return peer_


@pytest.fixture
def no_network(monkeypatch):
    """A test that asks the network fails."""

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
