"""T22: no bytes are read in two ways. Whatever the statement's parser takes, every other JSON reader reads the same."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from libs.trust.statement import TAG, Statement, StatementBinary, parse

STATEMENT = Statement(
    "organizations/acme/products/pump",
    "1.2.3-rc.1+é",
    7,
    (
        StatementBinary("ab" * 32, "cd" * 32, 123_456, "board-a"),
        StatementBinary("ef" * 32, "01" * 32, 1, "portable"),
    ),
)
VALID = STATEMENT.to_bytes()
PIECES = (
    b'"version":"9.9.9"',
    b'"security_version":0',
    b'"signed":{}',
    b'"binaries":[]',
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b" ",
    b"\n",
    b"\t",
    b"\x00",
    b"\xef\xbb\xbf",
    b"\\u0031",
    b"1e0",
    b"7.0",
    b"-0",
    b"NaN",
    b"true",
    b"null",
    b"//x",
    b"/*x*/",
    TAG,
)
ROUNDS = 20_000


def first_wins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        found.setdefault(key, value)
    return found


def mutated(dice: random.Random) -> bytes:
    data = bytearray(VALID)
    for _ in range(dice.choice((1, 1, 2, 3))):
        at = dice.randrange(len(data) + 1)
        match dice.randrange(5):
            case 0:
                data[at:at] = dice.choice(PIECES)
            case 1:
                del data[at : at + dice.randrange(1, 9)]
            case 2:
                data[at : at + 1] = bytes([dice.randrange(256)])
            case 3:  # a piece of itself, somewhere else
                start = dice.randrange(len(data))
                data[at:at] = data[start : start + dice.randrange(1, 40)]
            case 4:
                end = at + dice.randrange(1, 20)
                data[at:end] = dice.choice(PIECES)
    return bytes(data)


@pytest.mark.parametrize("seed", range(3))
def test_t22_what_is_taken_has_one_reading_and_one_spelling(seed: int) -> None:
    dice = random.Random(seed)
    taken = 0
    for _ in range(ROUNDS):
        data = mutated(dice)
        try:
            statement = parse(data)
        except ValueError:
            continue
        taken += data != VALID
        assert statement.to_bytes() == data
        body = data.removeprefix(TAG)
        for reading in (json.loads(body), json.loads(body, object_pairs_hook=first_wins)):
            assert (reading["product"], reading["version"]) == (statement.product, statement.version)
            assert reading["security_version"] == statement.security_version
            assert [one["digest"] for one in reading["binaries"]] == [one.digest for one in statement.binaries]
    assert taken, "some mutations are other valid statements, or the mutations test nothing"
