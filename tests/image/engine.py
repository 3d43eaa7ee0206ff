"""An image, the engine that runs it, and the lab in a container: what check.py speaks through."""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

START = "notebooks/00_start_here.ipynb"
WORK = "/home/jovyan/work"
SECONDS_TO_START = 90


@dataclass
class Image:
    """An image and the engine that runs it."""

    engine: str
    name: str
    torch: str
    host_network: bool
    number: Iterator[int] = field(default_factory=itertools.count)

    def call(self, *arguments: str, fails: bool = False, both: bool = False) -> str:
        """What the engine printed, on `both` streams; AssertionError unless it succeeds, or `fails`."""
        errors = subprocess.STDOUT if both else subprocess.PIPE
        command = [self.engine, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=600)
        told = f"{' '.join(arguments)}: exit status {done.returncode}\n{done.stdout}{done.stderr or ''}"
        assert (done.returncode != 0) == fails, told
        return done.stdout

    def once(self, *command: str, options: tuple[str, ...] = ()) -> str:
        """The output of a container that runs `command` without a network, and ends."""
        return self.call("run", "--rm", "--network", "none", *options, self.name, *command)

    def inspect(self) -> dict:
        return json.loads(self.call("image", "inspect", self.name))[0]

    @property
    def is_podman(self) -> bool:
        return "podman" in self.call("--version")

    @contextmanager
    def volume(self) -> Iterator[str]:
        """The options that mount a new volume as the work folder."""
        name = f"memlib-check-{os.getpid()}-{next(self.number)}"
        self.call("volume", "create", name)
        try:
            yield f"--volume={name}:{WORK}"
        finally:
            self.call("volume", "rm", name)

    @contextmanager
    def lab(self, *options: str, command: tuple[str, ...] = (), base: str = "/") -> Iterator[Lab]:
        """A container whose server answers."""
        name = f"memlib-check-{os.getpid()}-{next(self.number)}"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        network = [f"--publish=127.0.0.1:{port}:8888"]
        if self.host_network:
            network = ["--network=host", f"--env=JUPYTER_PORT={port}", "--env=JUPYTER_PORT_RETRIES=0"]
        self.call("run", "--detach", "--name", name, *network, *options, self.name, *command)
        lab = Lab(self, name, f"http://127.0.0.1:{port}{base}")
        try:
            lab.wait()
            yield lab
        finally:
            self.call("rm", "--force", "--volumes", name)


@dataclass
class Lab:
    """A running container with its server."""

    image: Image
    name: str
    url: str

    def wait(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while True:
            try:
                self.get("api", token="")
                return
            except OSError:
                state = self.image.call("inspect", "--format", "{{.State.Status}}", self.name).strip()
                assert state == "running" and time.monotonic() < deadline, f"{state}\n{self.log}"
                time.sleep(0.3)

    @property
    def log(self) -> str:
        return self.image.call("logs", self.name, both=True)

    @property
    def token(self) -> str:
        """The token of the one address that the log shows, maybe a moment after the first answer."""
        address = rf"http://127\.0\.0\.1:\d+/lab/tree/{START}\?token=([0-9a-f]{{48}})\n"
        deadline = time.monotonic() + 5
        while not (found := re.findall(address, self.log)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(found) == 1, f"not one address with a token:\n{self.log}"
        return found[0]

    def get(
        self, path: str, token: str | None = None, method: str = "GET", body: object = None
    ) -> tuple[int, bytes]:
        """Status and body of the server's answer; without `token`, with the one that the log shows."""
        token = self.token if token is None else token
        request = urllib.request.Request(
            self.url + path,
            method=method,
            headers={"Authorization": f"token {token}"} if token else {},
            data=None if body is None else json.dumps(body).encode(),
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def read(self, path: str) -> dict:
        status, body = self.get(f"api/contents/{path}")
        assert status == 200, f"{path}: {status}"
        return json.loads(body)["content"]

    def edit(self, text: str) -> int:
        """Put `text` into the start page's first cell, as the browser saves; the answer's status."""
        notebook = self.read(START)
        notebook["cells"][0]["source"] = text
        body = {"type": "notebook", "format": "json", "content": notebook}
        return self.get(f"api/contents/{START}", method="PUT", body=body)[0]

    def first_cell(self) -> str:
        return self.read(START)["cells"][0]["source"]

    def exec(self, *command: str) -> str:
        return self.image.call("exec", self.name, *command)
