"""One JSON object a line. Nothing secret is ever given to it: no link, no key, no body."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TextIO


class Log:
    """Lines to a file, or to standard error."""

    __slots__ = ("_out",)

    def __init__(self, path: Path | None = None) -> None:
        self._out: TextIO = path.open("a", encoding="utf-8", buffering=1) if path else sys.stderr

    def __call__(self, event: str, **fields: object) -> None:
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "event": event, **fields}
        self._out.write(json.dumps(line, default=str) + "\n")
        self._out.flush()
