"""From a request to a command and back; lists with pages and filters."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, TypeVar

from google.protobuf.message import Message

from libs.errors import InvalidArgumentError
from libs.eventlog import Command, Deadline, Runtime
from libs.names import organization_of
from libs.rpc.identity import caller, report_position

S = TypeVar("S")
M = TypeVar("M", bound=Message)

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1000
MAX_EXAMINED: Final = 20_000
"""Items that one page looks at, at most: a filter that nothing matches must not hold everyone else up."""
_CLAUSE: Final = re.compile(r'\s*([a-z_.]+)\s*(=|:)\s*("(?:[^"\\]|\\.)*"|[A-Za-z0-9_.\-]+)\s*(AND\s+|$)')


async def submit(runtime: Runtime[Any], organization: str, payload: object, request: Message, context: Any) -> Any:
    """Decide a command within the call's deadline and answer its result.

    The request's ``request_id``, when it has one, makes a retry the same command; its digest is that of the whole
    request. The position of the answer goes back to the caller.
    """
    remaining = context.time_remaining() if context is not None else None
    fields = request.DESCRIPTOR.fields_by_name
    committed = await runtime.submit(
        Command(
            organization,
            payload,
            principal=caller().name,
            request_id=getattr(request, "request_id", "") if "request_id" in fields else "",
            request_digest=hashlib.sha256(request.SerializeToString(deterministic=True)).digest(),
        ),
        Deadline.after(min(remaining or 10.0, 60.0)),
    )
    report_position(committed.token)
    return committed.result


def snapshot_state(runtime: Runtime[S], name: str) -> S:
    """Committed state of the partition that a resource name belongs to; its position goes back to the caller."""
    snapshot = runtime.snapshot(organization_of(name))
    report_position(snapshot.token)
    return snapshot.state  # type: ignore[return-value]


def page(items: Iterable[tuple[str, M]], request: Any) -> tuple[list[M], str]:
    """One page of (name, message) pairs in the order of names, and the next page's token (AIP-158).

    ``page_size`` 0 means 100, more than 1000 means 1000; negative is an error. A filter is a list of
    ``field = value`` or ``field : value`` (has) joined by AND, over top-level string, bool, number and enum fields.
    """

    def walk(after: str) -> Iterator[tuple[str, M]]:
        return iter(sorted((item for item in items if item[0] > after), key=lambda item: item[0]))

    return page_in_order(walk, request, most=0)


def page_in_order(
    walk: Callable[[str], Iterable[tuple[str, M]]], request: Any, *, most: int = MAX_EXAMINED
) -> tuple[list[M], str]:
    """As `page`, over items that ``walk(after)`` gives in the order of names: a page costs what it walks.

    After ``most`` items (0: no limit) the page ends, even when the filter held for few of them: the token goes on.
    """
    if request.page_size < 0:
        raise InvalidArgumentError("INVALID_FIELD", "page_size must not be negative", field="page_size")
    size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
    clauses = parse_filter(getattr(request, "filter", ""))
    found: list[M] = []
    last = ""
    for examined, (name, message) in enumerate(walk(_decode_token(request.page_token))):
        if most and examined >= most:
            return found, _encode_token(last)
        if all(_holds(message, clause) for clause in clauses):
            if len(found) == size:
                return found, _encode_token(last)
            found.append(message)
        last = name
    return found, ""


def _encode_token(name: str) -> str:
    return base64.urlsafe_b64encode(name.encode()).decode()


def _decode_token(token: str) -> str:
    if not token:
        return ""
    try:
        return base64.b64decode(token.encode(), altchars=b"-_", validate=True).decode()
    except ValueError:
        raise InvalidArgumentError(
            "INVALID_FIELD", "page_token is not one that this server gave out", field="page_token"
        ) from None


def parse_filter(text: str) -> list[tuple[str, str, str]]:
    """(field, operator, value) clauses. Raises INVALID_FIELD on anything outside the subset."""
    clauses: list[tuple[str, str, str]] = []
    at = 0
    while at < len(text.rstrip()):
        match = _CLAUSE.match(text, at)
        if match is None or (match.group(4) == "" and match.end() < len(text.rstrip())):
            raise InvalidArgumentError(
                "INVALID_FIELD", 'filter takes `field = "value"` and `field : "value"`, joined by AND', field="filter"
            )
        value = match.group(3)
        if value.startswith('"'):
            value = re.sub(r"\\(.)", r"\1", value[1:-1])
        clauses.append((match.group(1), match.group(2), value))
        at = match.end()
    return clauses


def _holds(message: Message, clause: tuple[str, str, str]) -> bool:
    path, operator, wanted = clause
    value: Any = message
    field = None
    for part in path.split("."):
        field = value.DESCRIPTOR.fields_by_name.get(part) if isinstance(value, Message) else None
        if field is None:
            raise InvalidArgumentError("INVALID_FIELD", f"filter: no field '{path}'", field="filter")
        value = getattr(value, part)
    if field is not None and field.enum_type is not None and not field.is_repeated:
        number = field.enum_type.values_by_number.get(value)
        name = number.name if number else ""
        return wanted in (name, name.partition("STATE_")[2])
    if field is not None and field.is_repeated:
        return wanted in [str(item) for item in value]
    if isinstance(value, bool):
        return wanted.lower() == str(value).lower()
    return wanted in str(value) if operator == ":" else str(value) == wanted
