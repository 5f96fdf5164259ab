"""The page of test vectors names every file of vectors, and every test it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs/vectors/README.md").read_text()


def test_every_file_of_vectors_is_on_the_page() -> None:
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "libs").glob("*/vectors.json")}
    assert set(re.findall(r"\(\.\./\.\./(libs/\w+/vectors\.json)\)", PAGE)) == there


def test_every_test_on_the_page_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", PAGE)
    assert named
    assert all((ROOT / name).is_file() for name in named)
