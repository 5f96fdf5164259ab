"""Who is calling: one frozen principal per call, read once from what cannot be forged."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from libs.errors import UnauthenticatedError


@dataclass(frozen=True, slots=True)
class Principal:
    """An API key with its member's rights, or one of our own services."""

    name: str
    """Resource name of the API key, or SPIFFE id of the service."""
    kind: str
    """``api_key`` or ``service``."""
    organization: str = ""
    """Organization id of the key; empty for a service."""
    member: str = ""
    role: str = ""
    scopes: tuple[str, ...] = ()
    resource_prefix: str = ""
    service: str = ""
    """Name of the service, empty for a key."""
    permissions: tuple[str, ...] = ()
    """What the member's custom role holds; of no meaning when the role is built in."""


_caller: ContextVar[Principal | None] = ContextVar("caller", default=None)
_tokens: ContextVar[tuple[str, ...]] = ContextVar("read_after", default=())
_position: ContextVar[list[str] | None] = ContextVar("log_position", default=None)

READ_AFTER: Final = "x-read-after"
LOG_POSITION: Final = "x-log-position"


def caller() -> Principal:
    """The principal of the call being handled. Raises UNAUTHENTICATED outside of one."""
    principal = _caller.get()
    if principal is None:
        raise UnauthenticatedError("UNAUTHENTICATED", "no caller: this is not inside a call")
    return principal


def caller_name() -> str:
    """The principal for a log line; `-` while nobody has been identified."""
    principal = _caller.get()
    return principal.name if principal is not None else "-"


def set_caller(principal: Principal) -> None:
    """Used by the interceptor only."""
    _caller.set(principal)


def read_after_tokens() -> tuple[str, ...]:
    """Tokens that came with the call, for passing on."""
    return _tokens.get()


def set_read_after_tokens(tokens: tuple[str, ...]) -> None:
    """Used by the interceptor only."""
    _tokens.set(tokens)


def begin_positions() -> list[str]:
    """Collects the positions a call reports; used by the interceptor only."""
    positions: list[str] = []
    _position.set(positions)
    return positions


def report_position(token: object) -> None:
    """Tell the caller where the log stood."""
    positions = _position.get()
    if positions is not None:
        positions.append(str(token))
