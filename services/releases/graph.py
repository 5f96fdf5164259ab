"""Rules of one cohort's graph, on plain mappings of after-images. Pure.

Each release has at most one next, many may point to one, exactly one has none (the latest), and there is no cycle. A
schedule in the future and a phase stand only on the latest, and while they do no newer one is created. Releases that a
rollout manages carry neither.
"""

from __future__ import annotations

from collections.abc import Mapping

from groundswell.releases.v1 import releases_pb2 as pb

from libs.errors import FailedPreconditionError, InvalidArgumentError
from libs.resolution import RequirementError, VersionError, check_requirement, parse_version

Releases = Mapping[str, pb.Release]


def latest_of(releases: Releases) -> pb.Release | None:
    """The one release without a next."""
    return next((release for release in releases.values() if not release.next), None)


def copy_of(release: pb.Release) -> pb.Release:
    """A copy that may be changed."""
    copied = pb.Release()
    copied.CopyFrom(release)
    return copied


def insert(releases: Releases, new: pb.Release, previous: str, now_ms: int) -> list[pb.Release]:
    """Place a release; returns the after-images that change, the new one last."""
    check_fields(new, now_ms)
    if previous and not new.next:
        raise InvalidArgumentError("INVALID_FIELD", "previous is given together with next", field="previous")
    if new.next:
        return _insert_before(releases, new, previous, now_ms)
    old = latest_of(releases)
    if old is None:
        return [new]
    if is_phased(old) or is_scheduled(old, now_ms):
        raise FailedPreconditionError(
            "LATEST_IS_PHASED",
            f"{old.name} is scheduled or phased: finish it before a newer release is created",
            release=old.name,
        )
    relinked = copy_of(old)
    relinked.next = new.name
    return [relinked, new]


def _insert_before(releases: Releases, new: pb.Release, previous: str, now_ms: int) -> list[pb.Release]:
    if new.next not in releases:
        raise InvalidArgumentError(
            "NEXT_UNKNOWN", f"{new.next} is not a release of the cohort", field="release.next", next=new.next
        )
    if is_phased(new) or is_scheduled(new, now_ms):
        raise InvalidArgumentError(
            "ONLY_LATEST_PHASED", "only the latest release is phased or scheduled", field="release"
        )
    if not previous:
        return [new]
    before = releases.get(previous)
    if before is None or before.next != new.next:
        raise InvalidArgumentError(
            "PREVIOUS_NOT_ADJACENT", f"{previous} does not stand before {new.next}", field="previous", previous=previous
        )
    relinked = copy_of(before)
    relinked.next = new.name
    return [relinked, new]


def remove(releases: Releases, name: str) -> list[pb.Release]:
    """Predecessors, relinked to what came after the removed release."""
    gone = releases[name]
    changed = []
    for release in releases.values():
        if release.next == name:
            relinked = copy_of(release)
            relinked.next = gone.next
            changed.append(relinked)
    if not gone.next and len(changed) > 1:
        raise FailedPreconditionError(
            "GRAPH_WOULD_BREAK",
            f"{len(changed)} releases point to {name}: without it there would be more than one latest",
            release=name,
        )
    return changed


def check_graph(releases: Releases) -> None:
    """Refuse what is no graph: several latest, a missing next, a cycle."""
    sinks = [release.name for release in releases.values() if not release.next]
    if releases and len(sinks) != 1:
        raise FailedPreconditionError(
            "GRAPH_WOULD_BREAK", f"exactly one release is the latest, not {len(sinks)}", latest=" ".join(sorted(sinks))
        )
    for release in releases.values():
        if release.next and release.next not in releases:
            raise FailedPreconditionError(
                "GRAPH_WOULD_BREAK", f"{release.next} is not a release of the cohort", release=release.name
            )
    # With one sink and every next known, a walk longer than the graph is a cycle.
    for release in releases.values():
        at, length = release, 0
        while at.next:
            at, length = releases[at.next], length + 1
            if length > len(releases):
                raise FailedPreconditionError(
                    "GRAPH_WOULD_BREAK", f"{release.name} would lead round in a circle", release=release.name
                )


def check_fields(release: pb.Release, now_ms: int) -> None:
    """Rules of a single release."""
    if release.version:
        try:
            parse_version(release.version)
        except VersionError as error:
            raise InvalidArgumentError("INVALID_FIELD", str(error), field="release.version") from None
    if release.version_requirement:
        try:
            check_requirement(release.version_requirement)
        except RequirementError as error:
            raise InvalidArgumentError("INVALID_FIELD", str(error), field="release.version_requirement") from None
    phase = release.phase
    if phase.share_ppm and phase.count:
        raise InvalidArgumentError("INVALID_FIELD", "a phase has a share or a count, not both", field="release.phase")
    if release.rollout and (is_phased(release) or is_scheduled(release, now_ms)):
        raise InvalidArgumentError(
            "INVALID_FIELD", "a release that a rollout manages carries no phase and no schedule", field="release.phase"
        )


def is_phased(release: pb.Release) -> bool:
    """Whether not every device of the cohort may take it."""
    phase = release.phase
    return bool(phase.tags or phase.count or 0 < phase.share_ppm < 1_000_000)


def is_scheduled(release: pb.Release, now_ms: int) -> bool:
    """Whether its time is still to come."""
    return release.HasField("schedule_time") and release.schedule_time.ToMilliseconds() > now_ms
