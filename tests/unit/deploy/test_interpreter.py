"""`.venv` is built from the fastest build of the Python that the user would get, and from no other version."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from deploy import interpreter
from deploy.interpreter import Build, choose, found


def build(path: str, minor: int, seconds: float) -> Build:
    return Build(path, (3, minor), seconds)


def test_a_much_faster_build_of_the_same_version_is_taken() -> None:
    assert choose([build("managed", 11, 0.30), build("system", 11, 0.20)]) == build("system", 11, 0.20)


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([build("a little faster", 11, 0.28)], id="within the margin"),
        pytest.param([build("newer", 13, 0.10)], id="another version"),
        pytest.param([build("old", 9, 0.10)], id="too old"),
        pytest.param([], id="alone"),
    ],
)
def test_else_it_is_what_python3_is(others: list[Build]) -> None:
    first = build("managed", 11, 0.30)

    assert choose([first, *others]) == first


def test_when_python3_is_too_old_the_first_that_is_not_counts() -> None:
    assert choose([build("old", 9, 0.1), build("newer", 12, 0.3), build("fast", 11, 0.1)]) == build("newer", 12, 0.3)


def test_nothing_is_chosen_when_all_are_too_old() -> None:
    assert choose([build("old", 9, 0.1)]) is None
    assert choose([]) is None


def test_what_does_not_run_is_passed_over(tmp_path: Path) -> None:
    broken, working = tmp_path / "first", tmp_path / "second"
    broken.mkdir()
    working.mkdir()
    (broken / "python3").write_text("#!/bin/sh\nexit 127\n")
    (broken / "python3").chmod(0o755)
    (working / "python3").symlink_to(sys.executable)
    (working / "python3.11").symlink_to(sys.executable)

    builds = found(os.pathsep.join(["", str(tmp_path / "missing"), str(broken), str(working)]))

    assert [one.version for one in builds] == [sys.version_info[:2]]
    assert 0 < builds[0].seconds < interpreter.PROBE_TIMEOUT_S


def test_the_refusal_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(interpreter, "found", lambda _: [build("old", 9, 0.1)])

    assert interpreter.main() == 1

    assert "make setup PYTHON=python3.11" in capsys.readouterr().err


def test_standard_output_is_the_choice_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interpreter, "found", lambda _: [build("managed", 11, 0.30), build("system", 11, 0.15)])

    assert interpreter.main() == 0

    said = capsys.readouterr()
    assert said.out == "system\n"
    assert "50%" in said.err
    assert "PYTHON=python3" in said.err
