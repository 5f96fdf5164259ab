"""Devices in the order of names, whole and by what lists are filtered by: kept event by event, never sorted for a list.

`Names` is a persistent sorted set: runs of at most 512 names, so that a change copies one run and the list of runs, and
a page begins where a token says after two bisections. `DeviceIndex` holds one for every collection and for each value
of cohort, tag and reported version, for the quarantined and for the retired: a list walks the shortest that its filter
allows and checks the rest of the filter on what it meets.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import immutables
from groundswell.registry.v1 import registry_pb2 as pb

RUN_LIMIT: Final = 512
Key = tuple[str, str, str]
"""(collection, field, value); field and value are empty for the whole collection."""


class Names(NamedTuple):
    """See the module. A named tuple, because every device makes several of them and snapshots store them."""

    runs: tuple[tuple[str, ...], ...] = ()
    firsts: tuple[str, ...] = ()
    """The first name of each run."""
    size: int = 0

    def _run_of(self, name: str) -> int:
        return max(0, bisect_right(self.firsts, name) - 1)

    def has(self, name: str) -> bool:
        """Whether it is among them."""
        if not self.runs:
            return False
        run = self.runs[self._run_of(name)]
        at = bisect_left(run, name)
        return at < len(run) and run[at] == name

    def after(self, name: str) -> Iterator[str]:
        """Names greater than this one, in order."""
        if not self.runs:
            return
        begin = self._run_of(name)
        yield from self.runs[begin][bisect_right(self.runs[begin], name) :]
        for run in self.runs[begin + 1 :]:
            yield from run

    def add(self, name: str) -> Names:
        """With one more name; itself when it is there already."""
        runs = self.runs
        if not runs:
            return Names(((name,),), (name,), 1)
        run = runs[-1]
        if run[-1] < name:
            # Names often come in order: that is quick, and full runs stay full.
            if len(run) < RUN_LIMIT:
                return Names((*runs[:-1], (*run, name)), self.firsts, self.size + 1)
            return Names((*runs, (name,)), (*self.firsts, name), self.size + 1)
        index = self._run_of(name)
        run = runs[index]
        at = bisect_left(run, name)
        if at < len(run) and run[at] == name:
            return self
        longer = (*run[:at], name, *run[at:])
        if len(longer) <= RUN_LIMIT:
            return self._with(index, (longer,), 1)
        middle = len(longer) // 2
        return self._with(index, (longer[:middle], longer[middle:]), 1)

    def remove(self, name: str) -> Names:
        """Without a name; itself when it is not there."""
        if not self.has(name):
            return self
        index = self._run_of(name)
        run = self.runs[index]
        at = bisect_left(run, name)
        rest = (*run[:at], *run[at + 1 :])
        return self._with(index, (rest,) if rest else (), -1)

    def _with(self, index: int, runs: tuple[tuple[str, ...], ...], change: int) -> Names:
        """With these in place of one run."""
        return Names(
            (*self.runs[:index], *runs, *self.runs[index + 1 :]),
            (*self.firsts[:index], *(run[0] for run in runs), *self.firsts[index + 1 :]),
            self.size + change,
        )


EMPTY: Final = Names()


def keys_of(device: pb.Device | None, collection: str) -> frozenset[Key]:
    """Where a device is found."""
    if device is None:
        return frozenset()
    keys = {(collection, "", "")}
    keys.update((collection, "tags", tag) for tag in device.tags)
    if device.cohort:
        keys.add((collection, "cohort", device.cohort))
    if device.reported.version:
        keys.add((collection, "reported.version", device.reported.version))
    if device.quarantined:
        keys.add((collection, "quarantined", "true"))
    if device.state == pb.Device.STATE_RETIRED:
        keys.add((collection, "state", "RETIRED"))
    return frozenset(keys)


@dataclass(frozen=True, slots=True)
class DeviceIndex:
    """See the module."""

    names: immutables.Map[Key, Names] = field(default_factory=immutables.Map)

    def of(self, key: Key) -> Names:
        """Names under a key."""
        return self.names.get(key, EMPTY)

    def moved(self, name: str, before: pb.Device | None, after: pb.Device) -> DeviceIndex:
        """After a device became, or changed into, what it is now."""
        collection = name.rpartition("/")[0]
        old, new = keys_of(before, collection), keys_of(after, collection)
        if old == new:
            return self
        names = self.names
        for key in old - new:
            left = names[key].remove(name)
            names = names.set(key, left) if left.size else names.delete(key)
        for key in new - old:
            names = names.set(key, names.get(key, EMPTY).add(name))
        return DeviceIndex(names)

    def shortest(self, collection: str, clauses: Sequence[tuple[str, str, str]]) -> Names:
        """The fewest names among which everything is that the clauses of a filter can hold for."""
        found = self.of((collection, "", ""))
        for path, operator, value in clauses:
            key = _key_of(collection, path, operator, value)
            if key is not None and self.of(key).size < found.size:
                found = self.of(key)
        return found


def _key_of(collection: str, path: str, operator: str, value: str) -> Key | None:
    """The key that a clause asks for, or None when no index answers it."""
    if path == "tags" or (path in ("cohort", "reported.version") and operator == "=" and value):
        return collection, path, value
    if path == "quarantined" and value.lower() == "true":
        return collection, path, "true"
    if path == "state" and value in ("RETIRED", "STATE_RETIRED"):
        return collection, path, "RETIRED"
    return None
