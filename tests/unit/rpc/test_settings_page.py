"""docs/conventions.md lists every setting: a person must not have to read the code to find one."""

from __future__ import annotations

import re
from pathlib import Path

from libs.settings import Settings

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "conventions.md").read_text()


def test_every_setting_is_on_the_page() -> None:
    told = set(re.findall(r"GROUNDSWELL_([A-Z0-9_<>]+)", PAGE))
    # A row that names several of one kind gives the others by their endings.
    told |= {f"QUOTA_{ending}" for ending in re.findall(r"`_([A-Z_]+)`", PAGE)}
    known = {
        re.sub(r"^(REGISTRY|PKI|ARTIFACTS|RELEASES|ROLLOUT|WEBHOOKS)_(INTERNAL|PUBLIC)$", r"<SERVICE>_\2", name.upper())
        for name in Settings.model_fields
    }
    assert known - told == set()
