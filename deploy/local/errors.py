"""The one error of the local stack: a line that says what to do."""

from __future__ import annotations


class StackError(Exception):
    """Something the person at the terminal can act on; printed as one line, without a traceback."""

    def __init__(self, line: str, detail: str = "") -> None:
        super().__init__(line)
        self.line = line
        self.detail = detail
