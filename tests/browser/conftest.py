"""A real browser, and a real lab for it to open: Chromium driven by Playwright, JupyterLab with a token.

Without Chromium or Playwright these tests are skipped, and say so; under CI they fail instead.
Screenshots of what was seen are left in build/screenshots.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from .lab import Lab, Sheet

ROOT = Path(__file__).parents[2]
SHOTS = ROOT / "build" / "screenshots"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--disable-dev-shm-usage",
    "--force-color-profile=srgb",
    "--disable-lcd-text",
    "--disable-background-networking",
    "--disable-component-update",
]


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="module")  # not longer: while it lives, no other test can start an event loop
def chromium(lacking):
    """Chromium, once a file."""
    with contextlib.suppress(ImportError):
        from playwright.sync_api import sync_playwright

        executable = next(filter(None, map(shutil.which, CHROMIUM)), None)
        if executable is None:
            lacking("Chromium", "make browser")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
            yield browser
            browser.close()
        return
    lacking("Playwright", "make browser")


@pytest.fixture
def open_sheet(chromium, request):
    """Open an address in a fresh context that records errors and refuses every foreign request."""
    with contextlib.ExitStack() as opened:

        def open_(address: str, allowed: str = "file://", **options) -> Sheet:
            context = chromium.new_context(viewport={"width": 1280, "height": 900}, **options)
            opened.callback(context.close)
            return Sheet(context, address, allowed)

        yield open_


@pytest.fixture(scope="session")
def screenshot():
    """Keep a picture of a page or of one element under build/screenshots."""
    SHOTS.mkdir(parents=True, exist_ok=True)

    def keep(what, name: str) -> None:
        what.screenshot(path=SHOTS / f"{name}.png")

    return keep


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The lab as `make lab` starts it, with its settings and a token, on a copy of the notebooks."""
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", home / "notebooks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    private = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MEMLIB_HOME")
    private += ("JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = {k: v for k, v in os.environ.items() if k != "MEMLIB_FACES"} | {
        "JUPYTER_CONFIG_PATH": str(ROOT / "environment" / "jupyter"),
        "JUPYTER_TOKEN": token,
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        **{name: str(home / name.lower()) for name in private},
    }
    options = [f"--ServerApp.port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={home}"]
    options += ["--LabApp.expose_app_in_browser=True"]  # the tests ask the page's application what it does
    log = home / "server.log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", "--no-browser", *options],
            env=environment,
            stdout=out,
            stderr=out,
        )
    started = Lab(f"http://127.0.0.1:{port}", token, home, log)
    try:
        wait_for(started, server)
        yield started
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(lab: Lab, server: subprocess.Popen) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"{lab.address}/api/status?token={lab.token}", timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the lab did not start:\n{re.sub(lab.token, '…', lab.log.read_text())}")
