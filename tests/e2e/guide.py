"""Guides are run: every `sh` block of a page, command by command, as somebody would who follows it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from typer.testing import CliRunner

from clients.cli.main import app
from deploy.local.settings import ROOT
from tests.e2e.stack import Stack
from tests.e2e.tenant import Tenant

_BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
END_S = 180


@dataclass(slots=True)
class Guide:
    """A page and the person who follows it, with an organization of their own."""

    page: Path
    directory: Path
    environment: dict[str, str]
    _running: list[subprocess.Popen[str]] = field(default_factory=list)

    @classmethod
    def open(cls, name: str, stack: Stack, tenant: Tenant) -> Guide:
        environment = dict(
            os.environ,
            GROUNDSWELL_PROFILE=str(stack.profile.path.resolve()),
            GROUNDSWELL_API_KEY=tenant.api_key,
            GROUNDSWELL_ORGANIZATION=tenant.organization,
            GROUNDSWELL_PRODUCT=tenant.product.rpartition("/")[2],
            COLUMNS="200",
        )
        return cls(ROOT / "docs" / "guides" / name, tenant.directory, environment)

    def blocks(self, kind: str) -> Iterator[tuple[str, str]]:
        """Name and text of the blocks of one kind."""
        for found, name, text in _BLOCK.findall(self.page.read_text()):
            if found == kind:
                yield name, text

    def file(self, name: str) -> dict[str, object]:
        """A JSON file that the page shows."""
        return next(json.loads(text) for found, text in self.blocks("json") if found == name)

    def commands(self) -> list[list[str]]:
        """Every command of the page; `export` lines are the reader's own names."""
        lines = [line for _, text in self.blocks("sh") for line in text.splitlines()]
        found = [shlex.split(line, comments=True) for line in lines]
        return [command for command in found if command and command[0] != "export"]

    def run(self, command: list[str]) -> str:
        """What a command writes. One that ends in `&` goes on; `wait` waits for those."""
        if command == ["wait"]:
            return "".join(self._ended(process) for process in self._running)
        assert command[0] == "swell", command
        if command[-1] == "&":
            argv = [sys.executable, "-m", "clients.cli", *command[1:-1]]
            self._running.append(
                subprocess.Popen(
                    argv,
                    cwd=self.directory,
                    env=self.environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
            return ""
        # The same program, without the second that it takes to start.
        with contextlib.chdir(self.directory):
            done = CliRunner().invoke(app, command[1:], env=self.environment)
        assert done.exit_code == 0, f"{command}: {done.output} {done.exception}"
        return done.output

    @staticmethod
    def _ended(process: subprocess.Popen[str]) -> str:
        try:
            said, _ = process.communicate(timeout=END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        assert process.returncode == 0, f"{process.args}: {said}"
        return said

    def close(self) -> None:
        """End what still runs."""
        for process in self._running:
            if process.poll() is None:
                process.kill()
                process.communicate()
