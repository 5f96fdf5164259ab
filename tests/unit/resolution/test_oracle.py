"""resolve() against a slow reading of the rules, over random fleets."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from libs.resolution import (
    BundleFacts,
    Candidate,
    CohortGraph,
    DeviceFacts,
    OverrideFacts,
    ReleaseNode,
    parse_version,
    resolve,
    satisfies,
)

VERSIONS = ("", "1.0.0", "1.1.0-rc.1", "1.1.0", "2.0.0")
REQUIREMENTS = ("", ">= 1.0.0", "< 1.1.0", "~> 1.0", "== 2.0.0 or == 1.0.0")
TAGS = st.frozensets(st.sampled_from(["a", "b"]))
BUNDLES = ("b0", "b1", "b2", "b3")


def oracle(  # noqa: C901 - one place, in the order of the table
    device: DeviceFacts, graph: CohortGraph, overrides: list[OverrideFacts], bundles: dict[str, BundleFacts], now: int
) -> list[Candidate]:
    """The table of steps, word for word."""

    def fits(name: str) -> bool:
        return device.target in bundles[name].targets or "portable" in bundles[name].targets

    # Steps 0 to 2.
    if device.retired or device.quarantined:
        return []
    active = sorted(
        (o for o in overrides if o.start_ms <= now and (o.end_ms == 0 or now < o.end_ms)),
        key=lambda o: (-o.start_ms, -o.created_ms, o.name),
    )
    if active:
        chosen = active[0]
        good = bundles[chosen.bundle].offerable and bundles[chosen.bundle].security_version >= device.security_floor
        if device.bundle == chosen.bundle or not good or not fits(chosen.bundle):
            return []
        return [Candidate(bundle=chosen.bundle, bundle_override=chosen.name)]
    if not device.cohort:
        return []
    # Steps 3 to 5.
    releases = list(graph.releases.values())
    current: ReleaseNode | None = None
    candidate: ReleaseNode | None = None
    using = [r for r in releases if device.bundle and r.bundle == device.bundle]
    if device.release in graph.releases:
        current = graph.releases[device.release]
        if current.retracted:
            return [Candidate(rollback_of=current.name)]
    elif using:
        if any(r.version for r in using):
            using = [r for r in using if r.version]
            current = min(using, key=lambda r: (parse_version(r.version), r.created_ms, r.name))
        else:
            current = min(using, key=lambda r: (r.created_ms, r.name))
    else:
        able = [r for r in releases if r.version and r.requirement and satisfies(device.version, r.requirement)]
        if able:
            candidate = min(able, key=lambda r: (parse_version(r.version), r.created_ms, r.name))
    if current is not None:
        candidate = graph.releases.get(current.next)
    if candidate is None:
        return []
    # Step 6.
    path = [candidate]
    while path[-1].next and not path[-1].required:
        path.append(graph.releases[path[-1].next])
    # Steps 7 and 8.
    version = device.version or (current.version if current else "")
    found = []
    while path:
        target = path.pop()
        if target.disabled or target.retracted or target.schedule_ms > now:
            continue
        if target.requirement and not satisfies(version, target.requirement):
            continue
        if (target.tags and not target.tags & device.tags) or not fits(target.bundle):
            continue
        if target.security_version < device.security_floor or not bundles[target.bundle].offerable:
            break
        found.append(Candidate(release=target.name, bundle=target.bundle))
    return found


@st.composite
def worlds(draw: st.DrawFn) -> Any:
    size = draw(st.integers(1, 6))
    names = [f"r{index}" for index in range(size)]
    order = draw(st.permutations(names))
    releases = {}
    for index, name in enumerate(order):
        # A tree towards the last: each leads to some later one.
        ahead = order[draw(st.integers(index + 1, size - 1))] if index + 1 < size else ""
        releases[name] = ReleaseNode(
            name=name,
            bundle=draw(st.sampled_from(BUNDLES)),
            version=draw(st.sampled_from(VERSIONS)),
            requirement=draw(st.sampled_from(REQUIREMENTS)),
            security_version=draw(st.integers(0, 2)),
            required=draw(st.booleans()),
            disabled=draw(st.booleans()) and draw(st.booleans()),
            retracted=draw(st.integers(0, 5)) == 0,
            schedule_ms=draw(st.sampled_from([0, 0, 9, 10, 11])),
            next=ahead,
            tags=draw(TAGS) if draw(st.integers(0, 3)) == 0 else frozenset(),
            created_ms=draw(st.integers(0, 2)),
        )
    device = DeviceFacts(
        name="dev",
        uid=bytes(16),
        cohort=draw(st.sampled_from(["main", "main", "main", ""])),
        tags=draw(TAGS),
        target=draw(st.sampled_from(["x", "y"])),
        quarantined=draw(st.integers(0, 9)) == 0,
        release=draw(st.sampled_from(["", "elsewhere", *names, *names])),
        bundle=draw(st.sampled_from(["", "foreign", *BUNDLES])),
        version=draw(st.sampled_from([*VERSIONS, "odd"])),
        security_floor=draw(st.sampled_from([0, 0, 1])),
    )
    overrides = [
        OverrideFacts(
            f"o{index}",
            draw(st.sampled_from(BUNDLES)),
            draw(st.integers(8, 11)),
            draw(st.sampled_from([0, 10, 12])),
            draw(st.integers(0, 1)),
        )
        for index in range(draw(st.sampled_from([0, 0, 0, 1, 3])))
    ]
    bundles = {
        name: BundleFacts(
            name,
            offerable=draw(st.integers(0, 5)) > 0,
            targets=frozenset(draw(st.sampled_from([("x",), ("x", "y"), ("portable",)]))),
            security_version=draw(st.integers(0, 2)),
        )
        for name in BUNDLES
    }
    return device, CohortGraph("main", releases), overrides, bundles


@settings(max_examples=600, deadline=None)
@given(worlds())
def test_agrees_with_the_rules_read_slowly(world: Any) -> None:
    device, graph, overrides, bundles = world
    found = resolve(device, graph, overrides, bundles, (), 10)
    assert list(found.candidates) == oracle(device, graph, overrides, bundles, 10)
    assert found.steps, "every decision says why"
    assert found.candidates or any(step.blocking for step in found.steps)
    assert resolve(device, graph, overrides, bundles, (), 10) == found
