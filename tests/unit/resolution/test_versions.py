"""SemVer precedence and requirements, as the reference settles them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from libs.resolution import RequirementError, VersionError, check_requirement, parse_version, satisfies

ORDERED = (
    "0.9.9", "1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta", "1.0.0-beta.2", "1.0.0-beta.11",
    "1.0.0-rc.1", "1.0.0", "1.0.1", "1.2.0", "1.10.0", "2.0.0",
)  # fmt: skip


@pytest.mark.parametrize(("lower", "higher"), list(itertools.combinations(ORDERED, 2)))
def test_precedence(lower: str, higher: str) -> None:
    assert parse_version(lower) < parse_version(higher)


def test_build_metadata_does_not_count() -> None:
    assert parse_version("1.0.0+a.1") == parse_version("1.0.0+b")


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.2", "1.2.3.4", "v1.2.3", "01.2.3", "1.2.3-", "1.2.3-01", "1.2.3+", "1.2.3 ", "1.2.3-ä",
     "\u0661.0.0", "1" * 200],
)  # fmt: skip
def test_what_is_no_version(text: str) -> None:
    with pytest.raises(VersionError):
        parse_version(text)
    assert not satisfies(text, ">= 0.0.0")


@pytest.mark.parametrize(
    ("version", "requirement", "expected"),
    [
        ("1.2.3", "== 1.2.3", True),
        ("1.2.3+build", "== 1.2.3", True),
        ("1.2.4", "!= 1.2.3", True),
        ("1.2.3", "> 1.2.3", False),
        ("1.2.3", ">= 1.2.3", True),
        ("1.2.3", "< 1.2.3", False),
        ("1.2.3", "<= 1.2.3", True),
        ("2.0.0-rc.1", "< 2.0.0", True),
        ("1.2.9", "~> 1.2.3", True),
        ("1.2.2", "~> 1.2.3", False),
        ("1.3.0", "~> 1.2.3", False),
        ("1.3.0-alpha", "~> 1.2.3", False),
        ("1.2.3-rc.2", "~> 1.2.3-rc.1", True),
        ("1.9.0", "~> 1.2", True),
        ("2.0.0", "~> 1.2", False),
        ("2.0.0-0", "~> 1.2", False),
        ("1.1.9", "~> 1.2", False),
        ("1.5.0", ">= 1.0.0 and < 2.0.0", True),
        ("2.0.0", ">= 1.0.0 and < 2.0.0", False),
        ("3.0.0", "< 1.0.0 or >= 3.0.0", True),
        # `and` binds tighter.
        ("1.0.0", "== 1.0.0 or >= 2.0.0 and < 2.5.0", True),
        ("3.0.0", "== 1.0.0 or >= 2.0.0 and < 2.5.0", False),
    ],
)
def test_requirement(version: str, requirement: str, expected: bool) -> None:
    assert satisfies(version, requirement) is expected


@pytest.mark.parametrize(
    "text",
    ["", "1.0.0", "=1.0.0", "== 1.0", "> 1", "~> 1", "~> 1.2-rc", "=== 1.0.0", ">=1.0.0", "==  1.0.0", " == 1.0.0",
     "== 1.0.0 ",
     "== 1.0.0 and", "and == 1.0.0", "== 1.0.0 or or == 2.0.0", "== 1.0.0 AND == 2.0.0", "== 1.0.0, == 2.0.0",
     "(== 1.0.0)", "== 1.0.0\n", "== 1.0.0 or " * 60 + "== 1.0.0"],
)  # fmt: skip
def test_what_is_no_requirement(text: str) -> None:
    with pytest.raises(RequirementError):
        check_requirement(text)


parts = st.integers(0, 3)
versions = st.tuples(parts, parts, parts).map(lambda v: ".".join(map(str, v)))


@given(versions, versions, st.sampled_from(["==", "!=", ">", ">=", "<", "<="]))
def test_comparisons_agree_with_tuples(version: str, bound: str, operator: str) -> None:
    left, right = (tuple(map(int, text.split("."))) for text in (version, bound))
    expected = {
        "==": left == right, "!=": left != right, ">": left > right, ">=": left >= right,
        "<": left < right, "<=": left <= right,
    }[operator]  # fmt: skip
    assert satisfies(version, f"{operator} {bound}") is expected
