"""Domain states as bytes and back, without a line of code in any service, and without pickle.

What may occur is *registered by type*: everything reachable from the annotations of a domain's state (structs, frozen
dataclasses, named tuples, enums), plus protobuf messages by their full names. A value of any other type is an error,
so nothing is stored that could not be read back, and reading never runs code that a file names.

Big maps go through in pieces (:meth:`Codec.freeze` is a generator), so whoever drives it decides how long it may hold
the event loop. Roots of persistent maps do not move, so the log may go on meanwhile.

The registered shape has a fingerprint: a field added, removed or retyped makes another one.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, Final, TypeVar, get_args, get_origin, get_type_hints

import immutables
import msgspec
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message

FORMAT: Final = 1
"""Of the bytes; it is part of every fingerprint."""
PIECE: Final = 64
"""Entries of a map that are packed at a time; a smaller map is not taken apart."""

_PLAIN: Final = frozenset({int, str, bytes, bool, float, type(None)})
_TUPLE, _MAP, _FROZENSET, _DICT, _LIST, _MESSAGE = range(6)
_FIRST_TYPE: Final = 16
"""Tags from here on are registered types."""
_VALUE, _OPEN_MAP, _ENTRIES, _KEY, _CLOSE_MAP, _OPEN_RECORD = range(6)

Pack = Callable[[Any], list[Any]]


class FreezeError(Exception):
    """A value that cannot be stored, or bytes that are not what was stored."""


def _is_record(kind: type) -> bool:
    return (
        issubclass(kind, msgspec.Struct)
        or dataclasses.is_dataclass(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )


def _is_known(kind: type) -> bool:
    return _is_record(kind) or issubclass(kind, enum.Enum)


def fields_of(kind: type) -> tuple[str, ...]:
    """Names of a record's fields, in their order."""
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return tuple(kind._fields)  # type: ignore[attr-defined]


def reachable(*roots: Any) -> tuple[type, ...]:
    """Every record and enum that annotations lead to, in the order of their names."""
    waiting = list(roots)
    found: dict[type, None] = {}
    while waiting:
        hint = waiting.pop()
        if isinstance(hint, TypeVar):
            waiting.append(hint.__bound__)
        elif get_origin(hint) is not None:
            waiting.extend((get_origin(hint), *get_args(hint)))
        elif isinstance(hint, type) and hint not in found and _is_known(hint):
            found[hint] = None
            if _is_record(hint):
                waiting.extend(get_type_hints(hint).values())
    return tuple(sorted(found, key=_name))


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


class Codec:
    """Freezes and thaws values made of the given types."""

    def __init__(self, types: Sequence[type]) -> None:
        self._types = tuple(types)
        self._tags = {kind: _FIRST_TYPE + index for index, kind in enumerate(self._types)}
        self._fields = {kind: fields_of(kind) for kind in self._types if _is_record(kind)}
        self._packs: dict[type, Pack] = {
            tuple: lambda value: [_TUPLE, *map(self.pack, value)],
            immutables.Map: lambda value: self._entries(_MAP, value.items()),
            frozenset: lambda value: [_FROZENSET, *map(self.pack, sorted(value, key=repr))],
            dict: lambda value: self._entries(_DICT, value.items()),
            list: lambda value: [_LIST, *map(self.pack, value)],
        }
        self._unpacks: dict[int, Callable[[list[Any]], Any]] = {
            _TUPLE: lambda parts: tuple(self.unpack(part) for part in parts[1:]),
            _MAP: lambda parts: immutables.Map(self._pairs(parts)),
            _FROZENSET: lambda parts: frozenset(self.unpack(part) for part in parts[1:]),
            _DICT: lambda parts: dict(self._pairs(parts)),
            _LIST: lambda parts: [self.unpack(part) for part in parts[1:]],
            _MESSAGE: lambda parts: _message_type(parts[1]).FromString(parts[2]),
        }
        for kind, tag in self._tags.items():
            self._unpacks[tag] = self._unpack_of(kind)

    @property
    def fingerprint(self) -> str:
        """Of everything registered: equal fingerprints read each other's bytes."""
        digest = hashlib.sha256(f"format {FORMAT}".encode())
        for kind in self._types:
            hints = get_type_hints(kind) if _is_record(kind) else {}
            members = [f"{each.name}={each.value}" for each in kind] if issubclass(kind, enum.Enum) else []
            shape = [f"{name}:{hints.get(name)}" for name in self._fields.get(kind, ())] or members
            digest.update(f"\n{_name(kind)} {';'.join(shape)}".encode())
        return digest.hexdigest()[:12]

    # To bytes.

    def freeze(self, values: Sequence[Any]) -> Iterator[bytes]:
        """The values in frames, a bounded piece of work each."""
        for value in values:
            for frame in self._walk(value):
                try:
                    yield msgspec.msgpack.encode(frame)
                except (TypeError, ValueError, OverflowError) as error:
                    raise FreezeError(f"a value cannot be stored: {error}") from error

    def _walk(self, value: Any) -> Iterator[list[Any]]:
        if type(value) in (immutables.Map, dict) and len(value) > PIECE:
            yield [_OPEN_MAP, _MAP if type(value) is immutables.Map else _DICT]
            entries: list[Any] = [_ENTRIES]
            for key, item in value.items():
                if type(item) is immutables.Map and len(item) > PIECE:
                    yield [_KEY, self.pack(key)]
                    yield from self._walk(item)
                    continue
                entries += (self.pack(key), self.pack(item))
                if len(entries) > 2 * PIECE:
                    yield entries
                    entries = [_ENTRIES]
            yield entries
            yield [_CLOSE_MAP]
        elif type(value) in self._fields and any(type(part) is immutables.Map for part in self._parts(value)):
            parts = self._parts(value)
            yield [_OPEN_RECORD, self._tags[type(value)], len(parts)]
            for part in parts:
                yield from self._walk(part)
        else:
            yield [_VALUE, self.pack(value)]

    def _parts(self, value: Any) -> list[Any]:
        return [getattr(value, name) for name in self._fields[type(value)]]

    def pack(self, value: Any) -> Any:
        """A value as what msgpack knows; composite ones are lists that begin with a tag."""
        kind = type(value)
        if kind in _PLAIN:
            return value
        known = self._packs.get(kind) or self._learn(kind)
        return known(value)

    def _learn(self, kind: type) -> Pack:
        tag = self._tags.get(kind)
        if tag is not None:
            pack = self._pack_of(kind, tag)
        elif issubclass(kind, Message):
            name = kind.DESCRIPTOR.full_name
            pack = lambda value: [_MESSAGE, name, value.SerializeToString(deterministic=True)]  # noqa: E731
        else:
            raise FreezeError(f"{_name(kind)} is not registered: annotate the state with it")
        self._packs[kind] = pack
        return pack

    def _pack_of(self, kind: type, tag: int) -> Pack:
        if issubclass(kind, enum.Enum):
            return lambda value: [tag, value.value]
        names = self._fields[kind]
        if len(names) < 2:
            return lambda value: [tag, *(self.pack(getattr(value, name)) for name in names)]
        get, pack = attrgetter(*names), self.pack
        return lambda value: [tag, *[part if type(part) in _PLAIN else pack(part) for part in get(value)]]

    def _entries(self, tag: int, items: Any) -> list[Any]:
        packed: list[Any] = [tag]
        for key, value in items:
            packed += (self.pack(key), self.pack(value))
        return packed

    # From bytes.

    def thaw(self, frames: Iterator[bytes]) -> Iterator[list[Any]]:
        """Yields the values read so far, frame by frame; the last one yielded holds all of them."""
        builder = _Builder(self)
        for frame in frames:
            try:
                builder.take(msgspec.msgpack.decode(frame))
            except FreezeError:
                raise
            except Exception as error:  # whatever it is, these are not the bytes that were stored
                raise FreezeError(f"not readable: {type(error).__name__}: {error}") from error
            yield builder.values
        if builder.unfinished:
            raise FreezeError("the end is missing")

    def unpack(self, part: Any) -> Any:
        """The value of what `pack` gave."""
        if type(part) is not list:
            return part
        return self._unpacks[part[0]](part)

    def _pairs(self, parts: list[Any]) -> Iterator[tuple[Any, Any]]:
        unpack = self.unpack
        for index in range(1, len(parts), 2):
            yield unpack(parts[index]), unpack(parts[index + 1])

    def _unpack_of(self, kind: Any) -> Callable[[list[Any]], Any]:
        unpack = self.unpack
        if issubclass(kind, enum.Enum):
            return lambda parts: kind(parts[1])
        if dataclasses.is_dataclass(kind) and any(not it.init or it.kw_only for it in dataclasses.fields(kind)):
            raise FreezeError(f"{kind} must take all its fields by position")
        return lambda parts: kind(*[part if type(part) is not list else unpack(part) for part in parts[1:]])

    def record(self, tag: int, parts: list[Any]) -> Any:
        """A registered record of its parts."""
        return self._types[tag - _FIRST_TYPE](*parts)


class _Builder:
    """Puts values together again."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._open: list[_OpenMap | _OpenRecord] = []
        self.values: list[Any] = []

    @property
    def unfinished(self) -> bool:
        return bool(self._open)

    def take(self, frame: list[Any]) -> None:
        kind = frame[0]
        top = self._open[-1] if self._open else None
        if kind == _VALUE:
            self._put(self._codec.unpack(frame[1]))
        elif kind == _ENTRIES and isinstance(top, _OpenMap):
            unpack, entries = self._codec.unpack, top.entries
            for index in range(1, len(frame), 2):
                entries[unpack(frame[index])] = unpack(frame[index + 1])
        elif kind == _KEY and isinstance(top, _OpenMap):
            top.key = self._codec.unpack(frame[1])
        elif kind == _OPEN_MAP:
            self._open.append(_OpenMap(persistent=frame[1] == _MAP))
        elif kind == _CLOSE_MAP and isinstance(top, _OpenMap):
            self._open.pop()
            self._put(top.closed())
        elif kind == _OPEN_RECORD:
            self._open.append(_OpenRecord(frame[1], frame[2]))
        else:
            raise FreezeError(f"a frame of kind {kind} is out of place")

    def _put(self, value: Any) -> None:
        while self._open:
            top = self._open[-1]
            if isinstance(top, _OpenMap):
                top.entries[top.key] = value
                return
            top.parts.append(value)
            if len(top.parts) < top.count:
                return
            self._open.pop()
            value = self._codec.record(top.tag, top.parts)
        self.values.append(value)


class _OpenMap:
    def __init__(self, *, persistent: bool) -> None:
        self.entries: Any = immutables.Map().mutate() if persistent else {}
        self.key: Any = None
        self._persistent = persistent

    def closed(self) -> Any:
        return self.entries.finish() if self._persistent else self.entries


class _OpenRecord:
    def __init__(self, tag: int, count: int) -> None:
        self.tag = tag
        self.count = count
        self.parts: list[Any] = []


def _message_type(name: str) -> type[Message]:
    found: type[Message] = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName(name))
    return found
