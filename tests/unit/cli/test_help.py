"""What `swell` says of itself: every command can be understood from its `--help` alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer

from clients.cli.main import app


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Path and command of every leaf."""
    if hasattr(group, "commands"):
        for name, command in group.commands.items():
            if not command.hidden:
                yield from commands(command, (*path, name))
    else:
        yield " ".join(path), group


COMMANDS = dict(commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", sorted(COMMANDS))
def test_every_command_says_what_it_does_with_an_example_of_itself(path: str) -> None:
    said = COMMANDS[path].help or ""
    assert said, "no help"
    words = path.split()
    assert "swell " in said, "no example"
    examples = said[said.index("swell ") :]
    assert all(word in examples for word in words), f"the example is of another command: {examples}"


@pytest.mark.parametrize("path", sorted(COMMANDS))
def test_every_option_is_explained(path: str) -> None:
    unexplained = [
        option.name
        for option in COMMANDS[path].params
        if option.param_type_name == "option" and not option.help and option.name != "help"
    ]
    assert unexplained == []


def test_there_are_commands_for_every_part() -> None:
    assert {path.split()[0] for path in COMMANDS} >= {
        "org",
        "product",
        "ca",
        "bundle",
        "release",
        "rollout",
        "webhook",
        "doctor",
    }
