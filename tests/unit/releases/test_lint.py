"""N18: what lint finds in a graph is what really happens to devices in it, and every rule has a failing example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.resolution import BundleFacts, Code, CohortGraph, DeviceFacts, ReleaseNode, Resolution, resolve
from services.releases.lint import Lint, Reported, devices_behind
from tests.unit.resolution.fleet import bundle, chain

VERSIONS = ("", "1.0.0", "1.1.0", "2.0.0")
REQUIREMENTS = ("", "< 1.1.0", "> 1.0.0", "== 2.0.0 or == 1.0.0", "> 9.0.0")
BUNDLES = ("b0", "b1", "b2", "b3", "b4", "b5")
Found = set[tuple[str, str, int]]
ABOUT_PLACE = {Code.CURRENT_BY_RELEASE, Code.CURRENT_BY_BUNDLE, Code.MATCHED_BY_VERSION, Code.REQUIRED_STOP}


def found_by_lint(graph: CohortGraph, bundles: Mapping[str, BundleFacts], fleet: Mapping[Reported, int]) -> Found:
    return {(one.code, one.release, one.devices) for one in Lint(graph, bundles, fleet).warnings()}


class Trials:
    """The oracle: it lets devices ask ``resolve()`` and looks at what happens to them."""

    def __init__(self, graph: CohortGraph, bundles: Mapping[str, BundleFacts], fleet: Mapping[Reported, int]) -> None:
        self.graph = graph
        self.bundles = bundles
        self.fleet = fleet
        self.lenient = {name: replace(facts, offerable=True) for name, facts in bundles.items()}

    def ask(self, *reported: str, real: bool = False) -> Resolution:
        release, bundle_, version = reported
        device = DeviceFacts("dev", b"", "main", release=release, bundle=bundle_, version=version, target="board")
        return resolve(device, self.graph, (), self.bundles if real else self.lenient, (), 0)

    def path(self, *reported: str) -> set[str]:
        """Every release that is looked at leaves a step, when no bundle ends the list."""
        passed = self.ask(*reported)
        return {step.subject for step in passed.steps if step.code not in ABOUT_PLACE} & set(self.graph.releases)

    def stands_on(self, *reported: str) -> str:
        first = self.ask(*reported).steps[0]
        return first.subject if first.code in (Code.CURRENT_BY_RELEASE, Code.CURRENT_BY_BUNDLE) else ""

    def walk(self, name: str) -> set[str]:
        """What a device passes that stands on a release; on a retracted one as if it were not, on the latest none."""
        node = self.graph.releases[name]
        if not node.next:
            return set()
        plain = {**self.graph.releases, name: replace(node, retracted=False)}
        return Trials(CohortGraph("main", plain), self.bundles, {}).path(name, "", "")

    def takes(self, name: str) -> bool:
        """Whether a device that asks for nothing more could be given it."""
        node = self.graph.releases[name]
        alone = replace(node, next="", requirement=">= 0.0.0", version="1.0.0", required=False)
        found = resolve(
            DeviceFacts("dev", b"", "main", version="1.0.0", target="board"),
            CohortGraph("main", {name: alone}),
            (),
            self.bundles,
            (),
            0,
        )
        return bool(found.candidates)

    def fleet_paths(self) -> list[tuple[str, set[str], int]]:
        """Where each reported state stands, what it passes, how many report it."""
        found = []
        for reported, count in self.fleet.items():
            standing = self.stands_on(*reported)
            found.append((standing, self.walk(standing) if standing else self.path(*reported), count))
        return found

    def reached(self) -> set[str]:
        reached = {standing for standing, _, _ in self.fleet_paths() if standing}
        for node in self.graph.releases.values():
            if node.version and node.requirement:
                # A device whose version only this release takes: nothing else is asked of the way in.
                others = {
                    name: replace(one, requirement="" if name != node.name else ">= 0.0.0")
                    for name, one in self.graph.releases.items()
                }
                reached |= Trials(CohortGraph("main", others), self.bundles, {}).path("", "", "1.0.0")
        for name in tuple(reached):
            reached |= self.walk(name) if any(name == standing for standing, _, _ in self.fleet_paths()) else set()
        while more := {far for name in reached if self.takes(name) for far in self.walk(name)} - reached:
            reached |= more
        return reached

    def warnings(self) -> Found:
        reached, found = self.reached(), set()
        held_up: Counter[str] = Counter()
        standing_before: Counter[str] = Counter()
        for standing, path, count in self.fleet_paths():
            for name in path:
                held_up[name] += count
                standing_before[name] += count if standing else 0
        for name, node in self.graph.releases.items():
            blocked = not self.takes(name)
            if name not in reached:
                found.add(("UNREACHABLE", name, 0))
            elif node.required and node.next and blocked:
                found.add(("REQUIRED_BLOCKED", name, held_up[name]))
            before = [other for other in self.graph.releases.values() if name in self.walk(other.name)]
            if node.requirement and before and all(self.never_satisfied(other, node) for other in before):
                found.add(("REQUIREMENT_NEVER_MET", name, standing_before[name]))
            if not node.next and not node.disabled and not node.retracted and blocked:
                found.add(("LATEST_NOT_OFFERABLE", name, held_up[name]))
        return found

    def never_satisfied(self, standing: ReleaseNode, node: ReleaseNode) -> bool:
        """A device on that release, which has its version, is refused this one for its version."""
        if not standing.version:
            return False
        wanted = replace(node, disabled=False, retracted=False, next="")
        two = {
            standing.name: replace(standing, next=node.name, retracted=False),
            node.name: wanted,
        }
        return not Trials(CohortGraph("main", two), self.bundles, {}).ask(standing.name, "", "").candidates


@st.composite
def worlds(draw: st.DrawFn) -> Any:
    size = draw(st.integers(1, 6))
    order = draw(st.permutations([f"r{index}" for index in range(size)]))
    releases = {}
    for index, name in enumerate(order):
        releases[name] = ReleaseNode(
            name=name,
            bundle=draw(st.sampled_from(BUNDLES)),
            version=draw(st.sampled_from(VERSIONS)),
            requirement=draw(st.sampled_from(REQUIREMENTS)),
            required=draw(st.integers(0, 2)) == 0,
            disabled=draw(st.integers(0, 3)) == 0,
            retracted=draw(st.integers(0, 5)) == 0,
            next=order[draw(st.integers(index + 1, size - 1))] if index + 1 < size else "",
            created_ms=draw(st.integers(0, 2)),
        )
    bundles = {name: bundle(name, offerable=draw(st.integers(0, 3)) > 0) for name in BUNDLES}
    reported = st.tuples(
        st.sampled_from(["", "elsewhere", *order]), st.sampled_from(["", *BUNDLES]), st.sampled_from(VERSIONS)
    )
    return CohortGraph("main", releases), bundles, draw(st.dictionaries(reported, st.integers(1, 9), max_size=4))


@settings(max_examples=500, deadline=None)
@given(worlds())
def test_lint_finds_what_happens_to_devices(world: Any) -> None:
    graph, bundles, fleet = world
    assert found_by_lint(graph, bundles, fleet) == Trials(graph, bundles, fleet).warnings()


@settings(max_examples=300, deadline=None)
@given(worlds())
def test_the_order_of_the_walk_and_who_is_behind(world: Any) -> None:
    graph, bundles, fleet = world
    lint = Lint(graph, bundles, fleet)
    order = [node.name for node in lint.order()]
    assert sorted(order) == sorted(graph.releases)
    for name, node in graph.releases.items():
        if node.next:
            assert order.index(name) < order.index(node.next)
            assert lint.steps_to_latest[name] == lint.steps_to_latest[node.next] + 1
        else:
            assert lint.steps_to_latest[name] == 0
    trials = Trials(graph, bundles, fleet)
    for wanted in graph.releases:
        behind = 0
        for reported, count in fleet.items():
            steps = trials.ask(*reported).steps
            at = steps[0].subject if steps[0].code in ABOUT_PLACE else ""
            if steps[0].code is not Code.MATCHED_BY_VERSION:
                at = graph.releases[at].next if at else ""
            while at and at != wanted:
                at = graph.releases[at].next
            behind += count if at else 0
        assert devices_behind(graph, fleet, wanted) == behind


ALL_GOOD = {f"b{index}": bundle(f"b{index}") for index in range(4)}
ENTRY = {"requirement": "< 1.0.0"}
EXAMPLES = [
    (chain(ENTRY, {"requirement": "< 1.1.0"}), {}, {}, set()),
    # Nobody could ever come here: there is no way in.
    (chain({}, {}), {}, {}, {("UNREACHABLE", "r0", 0), ("UNREACHABLE", "r1", 0)}),
    # Devices that stand there show that it was reached.
    (chain({}, {}), {}, {("r0", "b0", "1.0.0"): 3}, set()),
    # Required traps: disabled, retracted, unsigned.
    (
        chain(ENTRY, {"required": True, "disabled": True}, {}),
        {},
        {("r0", "b0", ""): 2, ("", "", "0.1.0"): 1, ("r1", "", ""): 5},
        {("REQUIRED_BLOCKED", "r1", 3)},
    ),
    (
        chain(ENTRY, {"required": True, "retracted": True}, {}),
        {},
        {},
        {("REQUIRED_BLOCKED", "r1", 0), ("UNREACHABLE", "r2", 0)},
    ),
    (
        chain(ENTRY, {"required": True}, {}),
        {"b1": bundle("b1", offerable=False)},
        {},
        {("REQUIRED_BLOCKED", "r1", 0), ("UNREACHABLE", "r2", 0)},
    ),
    # On the latest a required stop cuts nothing off.
    (chain(ENTRY, {"required": True, "disabled": True}), {}, {}, set()),
    (
        chain(ENTRY, {"requirement": "> 3.0.0"}),
        {},
        {("r0", "b0", ""): 2, ("", "", "0.1.0"): 1},
        {("REQUIREMENT_NEVER_MET", "r1", 2)},
    ),
    # A device on a release without a version may have any.
    (chain(ENTRY | {"version": ""}, {"requirement": "> 3.0.0"}), {}, {("r0", "", ""): 1}, set()),
    (
        chain(ENTRY, {}),
        {"b1": bundle("b1", offerable=False, reason="BINARY_DESTROYED")},
        {("r0", "b0", ""): 2},
        {("LATEST_NOT_OFFERABLE", "r1", 2)},
    ),
    # A disabled latest is stepped over, and keeps nobody from the one before it.
    (chain(ENTRY, {"disabled": True}), {"b1": bundle("b1", offerable=False)}, {}, set()),
]


@pytest.mark.parametrize(("graph", "bundles", "fleet", "expected"), EXAMPLES)
def test_every_rule_has_an_example(graph: CohortGraph, bundles: Any, fleet: Any, expected: Found) -> None:
    known = ALL_GOOD | bundles
    findings = Lint(graph, known, fleet).warnings()
    assert {(one.code, one.release, one.devices) for one in findings} == expected
    for one in findings:
        assert ":" in one.message, "a warning says what to do"


def test_a_bundle_that_is_not_known_here_is_not_accused() -> None:
    assert Lint(chain(ENTRY, {}), {}).warnings() == []
