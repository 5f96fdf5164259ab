"""How the demo shows what it does: numbered steps with timings, checks with verdicts, and the commands it ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

ROOT: Final = Path(__file__).resolve().parent.parent


class DemoError(Exception):
    """The demo cannot go on; the message says what was expected and what was seen."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check of the final table."""

    name: str
    holds: bool
    detail: str


@dataclass(slots=True)
class Journal:
    """What happened, for the table at the end."""

    console: Console = field(default_factory=Console)
    verdicts: list[Verdict] = field(default_factory=list)
    timings: list[tuple[str, float]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """A numbered step with its time."""
        begin = time.monotonic()
        self.console.print(f"[bold cyan]{len(self.timings) + 1}. {title}[/bold cyan]")
        yield
        self.timings.append((title, time.monotonic() - begin))

    def say(self, line: str) -> None:
        """A line of progress."""
        self.console.print(f"   {line}", highlight=False)

    def check(self, name: str, holds: bool, detail: str = "") -> None:
        """Record a check; a failing one is shown at once."""
        self.verdicts.append(Verdict(name, holds, detail))
        mark = "[green]ok[/green]" if holds else "[bold red]FAIL[/bold red]"
        self.console.print(f"   {mark} {name}" + (f": {detail}" if detail else ""), highlight=False)

    def finish(self) -> int:
        """The table of checks and timings; 0 only when all hold."""
        checks = Table(title="Checks", title_justify="left")
        for column in ("", "check", "what was seen"):
            checks.add_column(column, overflow="fold")
        for verdict in self.verdicts:
            checks.add_row("[green]ok[/green]" if verdict.holds else "[red]FAIL[/red]", verdict.name, verdict.detail)
        times = Table(title="Timings", title_justify="left")
        times.add_column("step")
        times.add_column("seconds", justify="right")
        for title, seconds in self.timings:
            times.add_row(title, f"{seconds:.1f}")
        times.add_row("all", f"{time.monotonic() - self.started:.1f}")
        self.console.print(checks)
        self.console.print(times)
        failed = [verdict.name for verdict in self.verdicts if not verdict.holds]
        if failed or not self.verdicts:
            self.console.print(f"[bold red]{len(failed)} of {len(self.verdicts)} checks failed[/bold red]")
            return 1
        self.console.print(f"[bold green]all {len(self.verdicts)} checks hold[/bold green]")
        return 0


@dataclass(frozen=True, slots=True)
class Swell:
    """Runs the ``swell`` command as a person would, and reads its JSON."""

    profile: Path
    organization: str = ""
    product: str = ""
    key: str = ""
    journal: Path | None = None
    """Gets one line per acknowledged command."""

    def _environment(self) -> dict[str, str]:
        extra = {"GROUNDSWELL_COMMAND_JOURNAL": str(self.journal)} if self.journal else {}
        return {**os.environ, **extra}

    def _argv(self, arguments: Sequence[str]) -> list[str]:
        argv = [sys.executable, "-m", "clients.cli", "--output", "json", "--profile", str(self.profile)]
        for option, value in (("-O", self.organization), ("-P", self.product), ("--key", self.key)):
            if value:
                argv += [option, value]
        return [*argv, *arguments]

    def __call__(self, *arguments: str) -> Any:
        """Run a command; raises DemoError with its error when it fails."""
        done = subprocess.run(
            self._argv(arguments), cwd=ROOT, env=self._environment(), capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DemoError(f"swell {' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def stream(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command that writes one JSON line per change."""
        return subprocess.Popen(self._argv(arguments), cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_until(what: str, timeout_s: float, poll: Any, every_s: float = 0.25) -> Any:
    """Poll a public interface until it gives something true; raises DemoError with what was awaited."""
    give_up = time.monotonic() + timeout_s
    while True:
        value = poll()
        if value:
            return value
        if time.monotonic() > give_up:
            raise DemoError(f"after {timeout_s:.0f} s still waiting: {what}")
        time.sleep(every_s)
