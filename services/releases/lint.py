"""Who stands where in a graph, and what in it keeps devices from going on. Pure.

Devices are counted by what they report, so that a large fleet costs no more than its few states. What is looked at is
structure and offerability: tags, shares, schedules, hardware and security floors are a device's own matter.

* ``UNREACHABLE``: no walk leads here. A walk begins at a release that takes devices by version, or after one that a
  device can stand on: one that devices stand on now, or one that can be reached and offered. A release that devices
  stand on was reached.
* ``REQUIRED_BLOCKED``: a required release before the latest that can never be offered: nothing after it is reached
  through it.
* ``REQUIREMENT_NEVER_MET``: of all releases from which a walk comes here, none has a version that satisfies the
  requirement.
* ``LATEST_NOT_OFFERABLE``: the latest release's bundle is unsigned or destroyed: nobody whose walk ends there is
  offered anything, not even an older release.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from libs.resolution import BundleFacts, CohortGraph, ReleaseNode, satisfies

Reported = tuple[str, str, str]
"""Release, bundle and version that a device reports together."""

UNREACHABLE: Final = "UNREACHABLE"
REQUIRED_BLOCKED: Final = "REQUIRED_BLOCKED"
REQUIREMENT_NEVER_MET: Final = "REQUIREMENT_NEVER_MET"
LATEST_NOT_OFFERABLE: Final = "LATEST_NOT_OFFERABLE"


@dataclass(frozen=True, slots=True)
class Warning_:  # noqa: N801 - `Warning` is Python's
    """One finding."""

    code: str
    message: str
    release: str
    devices: int
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Place:
    """Where devices of one reported state are."""

    current: ReleaseNode | None
    path: tuple[ReleaseNode, ...]
    """What they walk through next; empty on the latest, and for those that have no place in the graph."""
    count: int

    @property
    def placed(self) -> bool:
        """Whether the graph says anything about them."""
        return self.current is not None or bool(self.path)


def path_after(graph: CohortGraph, current: ReleaseNode) -> tuple[ReleaseNode, ...]:
    """What a device on this release walks through."""
    following = graph.releases.get(current.next)
    return graph.path_from(following) if following is not None else ()


def places(graph: CohortGraph, fleet: Mapping[Reported, int]) -> Iterator[Place]:
    """Steps 3 to 6 of resolution, for each reported state."""
    for (release, bundle, version), count in fleet.items():
        current = graph.releases.get(release) or graph.on_bundle(bundle)
        if current is not None:
            yield Place(current, path_after(graph, current), count)
            continue
        first = graph.entry(version) if version else None
        yield Place(None, graph.path_from(first) if first is not None else (), count)


def devices_behind(graph: CohortGraph, fleet: Mapping[Reported, int], name: str) -> int:
    """Devices that have this release still before them, past required ones too."""
    ahead = {name}
    # Each round takes in those one step further back; there are no more rounds than releases.
    while more := {node.name for node in graph.releases.values() if node.next in ahead} - ahead:
        ahead |= more
    return sum(place.count for place in places(graph, fleet) if place.path and place.path[0].name in ahead)


class Lint:
    """The findings of one graph and the devices of its cohort."""

    def __init__(
        self, graph: CohortGraph, bundles: Mapping[str, BundleFacts], fleet: Mapping[Reported, int] | None = None
    ) -> None:
        self.graph = graph
        self._bundles = bundles
        self.places: Sequence[Place] = tuple(places(graph, fleet or {}))

    def order(self) -> list[ReleaseNode]:
        """Each release before its next, the latest last; of equals the older first."""
        steps = self.steps_to_latest
        nodes = self.graph.releases.values()
        return sorted(nodes, key=lambda node: (-steps[node.name], node.created_ms, node.name))

    @cached_property
    def steps_to_latest(self) -> Mapping[str, int]:
        """How far each release is from the latest."""
        found: dict[str, int] = {}
        for name in self.graph.releases:
            way: list[str] = []
            at = name
            while at in self.graph.releases and at not in found and at not in way:
                way.append(at)
                at = self.graph.releases[at].next
            behind = found.get(at, -1)
            for index, passed in enumerate(reversed(way)):
                found[passed] = behind + 1 + index
        return found

    def offerable(self, node: ReleaseNode) -> bool:
        """Whether its bundle may be offered to anybody; what is not known here is not accused."""
        facts = self._bundles.get(node.bundle)
        return facts is None or facts.offerable

    def why_blocked(self, node: ReleaseNode) -> str:
        """Why it can never be offered, empty when it can."""
        if node.retracted:
            return "RETRACTED"
        if node.disabled:
            return "DISABLED"
        return "" if self.offerable(node) else "BUNDLE_NOT_OFFERABLE"

    @cached_property
    def _reached(self) -> frozenset[str]:
        """Releases that some walk leads to: a fixed point, because a walk may begin where another one ended."""
        standing = [place.current for place in self.places if place.current is not None]
        reached = {node.name for node in standing}
        starts = [self.graph.path_from(node) for node in self.graph.by_version]
        starts += [path_after(self.graph, node) for node in standing]
        while starts:
            for node in starts.pop():
                if node.name in reached:
                    continue  # its own walk has begun, or begins with the devices that stand there
                reached.add(node.name)
                if not self.why_blocked(node):
                    starts.append(path_after(self.graph, node))
        return frozenset(reached)

    @cached_property
    def _walkers(self) -> Mapping[str, Sequence[ReleaseNode]]:
        """Release → those that a walk comes from."""
        found: dict[str, list[ReleaseNode]] = {name: [] for name in self.graph.releases}
        for node in self.graph.releases.values():
            for passed in path_after(self.graph, node):
                found[passed.name].append(node)
        return found

    def _held_up(self, name: str, *, by_version: bool = True) -> int:
        """Devices whose walk passes a release."""
        return sum(
            place.count
            for place in self.places
            if (by_version or place.current is not None) and any(node.name == name for node in place.path)
        )

    def warnings(self) -> list[Warning_]:
        """All findings, in the order of the walk."""
        return [found for node in self.order() for found in self._of(node)]

    def _of(self, node: ReleaseNode) -> Iterator[Warning_]:
        blocked = self.why_blocked(node)
        if node.name not in self._reached:
            message = (
                "nothing leads to this release: give it a version and a version requirement, or put a release "
                "before it that devices can stand on"
            )
            yield Warning_(UNREACHABLE, message, node.name, 0)
        elif node.required and node.next and blocked:
            message = (
                f"this release is required and can never be offered ({blocked}): devices before it get no further; "
                "make it not required, or offerable"
            )
            yield Warning_(REQUIRED_BLOCKED, message, node.name, self._held_up(node.name), {"why": blocked})
        walkers = self._walkers[node.name]
        if node.requirement and walkers and not any(_may_satisfy(walker, node) for walker in walkers):
            versions = ", ".join(sorted({walker.version for walker in walkers}))
            message = (
                f"no release before it has a version that satisfies '{node.requirement}': they have {versions}; "
                "change the requirement"
            )
            metadata = {"requirement": node.requirement, "versions": versions}
            held_up = self._held_up(node.name, by_version=False)
            yield Warning_(REQUIREMENT_NEVER_MET, message, node.name, held_up, metadata)
        if not node.next and blocked == "BUNDLE_NOT_OFFERABLE":
            why = self._bundles[node.bundle].reason or "SIGNATURES_MISSING"
            message = (
                f"the latest release's bundle may not be offered ({why}): nobody is offered anything in its place; "
                "sign it, or disable the release"
            )
            metadata = {"bundle": node.bundle, "why": why}
            yield Warning_(LATEST_NOT_OFFERABLE, message, node.name, self._held_up(node.name), metadata)


def _may_satisfy(walker: ReleaseNode, node: ReleaseNode) -> bool:
    """A release without a version may be run by devices of any."""
    return not walker.version or satisfies(walker.version, node.requirement)
