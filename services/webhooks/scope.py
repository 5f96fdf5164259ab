"""What an event is about, for filters and order: its product, its cohorts and its order key. Pure.

Found by the names of fields, not by record type, so that a record type that is added later is understood, too: a
field ``cohort``, ``cohorts`` or else ``release`` holds a name within a cohort, a field ``device`` a device. An event
that names no product or cohort is about none, and no filter by those lets it through.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from libs.names import product_of

_COHORT: Final = frozenset({"cohort", "cohorts"})
_RELEASE: Final = frozenset({"release"})
_DEPTH: Final = 3
Path = tuple[str, ...]


@functools.lru_cache(maxsize=256)
def _paths(kind: Descriptor, wanted: frozenset[str], depth: int = _DEPTH) -> tuple[Path, ...]:
    """Where string fields of these names are within a message."""
    found: list[Path] = []
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_STRING and field.name in wanted:
            found.append((field.name,))
        elif field.message_type is not None and depth and field.message_type.full_name.startswith("groundswell."):
            found += [(field.name, *rest) for rest in _paths(field.message_type, wanted, depth - 1)]
    return tuple(found)


def _values(message: Any, path: Path) -> Iterator[str]:
    value = getattr(message, path[0])
    many: Any = [value] if isinstance(value, str | Message) else value
    for one in many:
        if len(path) == 1:
            yield one
        else:
            yield from _values(one, path[1:])


def _upto(name: str, collection: str) -> str:
    """The name up to and with the id of a collection, empty when it has none."""
    parts = name.split("/")
    for index in range(0, len(parts) - 1, 2):
        if parts[index] == collection:
            return "/".join(parts[: index + 2])
    return ""


def product(resource: str) -> str:
    """Full name of the product that the resource is below."""
    return product_of(resource)


def cohorts(resource: str, payload: Message) -> frozenset[str]:
    """Full names of the cohorts that the event speaks of."""
    for wanted in (_COHORT, _RELEASE):
        # A device that was moved still runs a release of its old cohort: what it runs counts only without a cohort.
        names = [resource, *(name for path in _paths(payload.DESCRIPTOR, wanted) for name in _values(payload, path))]
        found = frozenset(_upto(name, "cohorts") for name in names) - {""}
        if found:
            return found
    return frozenset()


def order_key(resource: str, payload: Message) -> str:
    """What strict order holds for: the device if there is one, else the resource itself."""
    device = _upto(resource, "devices")
    if device:
        return device
    for path in _paths(payload.DESCRIPTOR, frozenset({"device"}), 1):
        for name in _values(payload, path):
            if _upto(name, "devices"):
                return _upto(name, "devices")
    return resource
