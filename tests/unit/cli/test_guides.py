"""Commands in the guides are real: the command exists, and so does each of its options."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from clients.cli.commands.products import span
from clients.cli.main import app

ROOT = Path(__file__).parents[3]
GUIDES = ("cohorts", "first-device", "manufacturing", "webhooks")


def commands_of(page: str) -> list[list[str]]:
    """`swell …` lines of a page's shell blocks."""
    text = page.replace("\\\n", " ")
    inside = [block.split("\n", 1)[1] for block in text.split("```")[1::2] if block.startswith("sh\n")]
    return [shlex.split(line)[1:] for block in inside for line in block.splitlines() if line.startswith("swell ")]


def problem_of(argv: list[str]) -> str:
    """What is wrong with a command line, or empty."""
    command: Any = typer.main.get_command(app)
    words = iter(argv)
    for word in words:
        found = command.commands.get(word)
        if found is None:
            return f"no command '{word}'"
        command = found
        if not hasattr(command, "commands"):
            break
    else:
        return "the command is not complete"
    options = {name for param in command.params for name in param.opts + param.secondary_opts}
    return next((f"no option '{word}'" for word in words if word.startswith("--") and word not in options), "")


@pytest.mark.parametrize("guide", GUIDES)
def test_commands_of_a_guide_exist(guide: str) -> None:
    found = commands_of((ROOT / "docs" / "guides" / f"{guide}.md").read_text())
    assert len(found) >= 5
    assert {" ".join(argv): problem_of(argv) for argv in found if problem_of(argv)} == {}


def test_what_does_not_exist_is_found() -> None:
    assert problem_of(["device", "paint", "SN-1"]) == "no command 'paint'"
    assert problem_of(["device", "tag", "SN-1", "--colour", "red"]) == "no option '--colour'"
    assert problem_of(["device"]) == "the command is not complete"


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("90s", 90), ("15m", 900), ("1.5h", 5400), ("7d", 604800)])
def test_spans_as_people_write_them(text: str, seconds: int) -> None:
    assert span(text).ToSeconds() == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5s", "5 m", "5w"])
def test_what_is_no_span_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        span(text)
