"""The log stays readable, whatever devices send."""

from __future__ import annotations

import logging

from aiohttp.http_exceptions import BadHttpMessage, BadStatusLine

from services.gateway.malformed import MalformedRequests


def test_what_is_no_http_is_one_line_now_and_then_without_what_was_sent() -> None:
    now = [100.0]
    malformed = MalformedRequests(lambda: now[0])
    lines: list[str] = []
    log = logging.getLogger("tests.malformed")
    log.propagate = False
    log.addFilter(malformed)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(  # type: ignore[method-assign]
        f"{record.levelname} {record.getMessage()}" + (" and a traceback" if record.exc_info else "")
    )
    log.addHandler(handler)
    for at, error in (
        (100.0, BadStatusLine("\x1b[31mred")),
        (101.0, BadHttpMessage("again")),
        (104.9, BadHttpMessage("and again")),
        (105.1, BadHttpMessage("later")),
        (105.2, ZeroDivisionError("a bug of ours")),
    ):
        now[0] = at
        log.error("Error handling request from %s", "somewhere", exc_info=error)
    assert lines == [
        "WARNING malformed request: BadStatusLine, 1 so far",
        "WARNING malformed request: BadHttpMessage, 4 so far",
        "ERROR Error handling request from somewhere and a traceback",
    ]
    assert malformed.count == 4
