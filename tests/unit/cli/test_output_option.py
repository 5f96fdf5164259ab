"""Where the form of output may stand on the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from clients.cli.main import app, hoisted


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("list devices --output json", "--output json list devices"),
        ("list devices -o json --filter x", "-o json list devices --filter x"),
        ("list devices --output=json", "--output=json list devices"),
        ("list devices -ojson", "-ojson list devices"),
        ("-o json list devices", "-o json list devices"),
        ("list devices", "list devices"),
        ("list devices -- --output json", "list devices -- --output json"),
        ("list devices --output", "--output list devices"),
    ],
)
def test_it_may_stand_anywhere(written: str, read: str) -> None:
    assert hoisted(written.split()) == read.split()


def test_a_form_that_does_not_exist_is_refused_as_at_the_front() -> None:
    answer = CliRunner().invoke(app, ["list", "devices", "--output", "yaml"])
    assert answer.exit_code == 2
    assert "yaml" in answer.output
