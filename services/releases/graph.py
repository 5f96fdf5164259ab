"""Rules of one cohort's graph, on plain mappings of after-images. Pure.

Each release has at most one next, many may point to one, exactly one has none (the latest), and there is no cycle. A
schedule in the future and a phase stand only on the latest, and while they do no newer one is created. Releases that a
rollout manages carry neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.releases.v1 import releases_pb2 as pb

from libs.errors import FailedPreconditionError, InvalidArgumentError, ResourceExhaustedError
from libs.resolution import RequirementError, VersionError, check_requirement, parse_version

Releases = Mapping[str, pb.Release]

ALL_PPM: Final = 1_000_000
MAX_COUNT: Final = 1_000_000_000
MAX_DESCRIPTION: Final = 256
MAX_TAGS: Final = 64
MAX_TAG_LENGTH: Final = 128
MAX_IMAGE_BYTES: Final = 800_000
"""A graph or an override is published whole, and a record of the log holds less than a mebibyte."""
END_OF_TIME_S: Final = 253_402_300_800
"""The year 10000."""


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
    before: dict[str, list[str]] = {}
    for release in releases.values():
        if release.next and release.next not in releases:
            raise FailedPreconditionError(
                "GRAPH_WOULD_BREAK", f"{release.next} is not a release of the cohort", release=release.name
            )
        before.setdefault(release.next, []).append(release.name)
    # With one sink and every next known, what does not lead to the sink leads round in a circle.
    reached, frontier = set(sinks), list(sinks)
    while frontier:
        ahead = before.get(frontier.pop(), [])
        reached.update(ahead)
        frontier.extend(ahead)
    circling = sorted(set(releases) - reached)
    if circling:
        raise FailedPreconditionError(
            "GRAPH_WOULD_BREAK", f"{circling[0]} would lead round in a circle", release=circling[0]
        )


def check_edit(known: pb.Release, changed: pb.Release, now_ms: int) -> None:
    """Rules of changing one release."""
    if changed.next and (is_phased(changed) or is_scheduled(changed, now_ms)):
        raise InvalidArgumentError(
            "ONLY_LATEST_PHASED", "only the latest release is phased or scheduled", field="release"
        )
    if known.phase.share_ppm == ALL_PPM and known.phase != changed.phase:
        raise FailedPreconditionError(
            "PHASE_IS_FINAL", f"{known.name} was opened to 100 %, which is final", resource=known.name
        )
    if known.retracted and not changed.disabled:
        raise FailedPreconditionError(
            "RELEASE_RETRACTED", f"{known.name} was retracted for good: it stays disabled", resource=known.name
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
    if len(release.description) > MAX_DESCRIPTION:
        raise InvalidArgumentError(
            "INVALID_FIELD", f"a description has at most {MAX_DESCRIPTION} characters", field="release.description"
        )
    check_time(release, "schedule_time", "release")
    if release.HasField("phase"):
        _check_phase(release.phase)
    if release.rollout and (is_phased(release) or is_scheduled(release, now_ms)):
        raise InvalidArgumentError(
            "INVALID_FIELD", "a release that a rollout manages carries no phase and no schedule", field="release.phase"
        )


def _check_phase(phase: pb.Phase) -> None:
    if not (phase.share_ppm or phase.count or phase.tags):
        # An empty phase would open the release to everybody, which nobody means who lowers a share to 0.
        raise InvalidArgumentError(
            "INVALID_FIELD",
            "a phase has a share, a count or tags: leave it out to offer to all, disable the release to offer to none",
            field="release.phase",
        )
    if phase.share_ppm and phase.count:
        raise InvalidArgumentError("INVALID_FIELD", "a phase has a share or a count, not both", field="release.phase")
    if phase.share_ppm > ALL_PPM:
        raise InvalidArgumentError(
            "INVALID_FIELD", f"a share is at most {ALL_PPM} parts per million", field="release.phase.share_ppm"
        )
    if phase.count > MAX_COUNT:
        raise InvalidArgumentError("INVALID_FIELD", f"a count is at most {MAX_COUNT}", field="release.phase.count")
    if len(phase.tags) > MAX_TAGS or not all(0 < len(tag) <= MAX_TAG_LENGTH for tag in phase.tags):
        raise InvalidArgumentError(
            "INVALID_FIELD",
            f"at most {MAX_TAGS} tags of 1 to {MAX_TAG_LENGTH} characters",
            field="release.phase.tags",
        )


def check_time(message: Message, path: str, within: str) -> None:
    """A time that is set must be one: outside of these years nothing can show it."""
    if message.HasField(path):
        value: Timestamp = getattr(message, path)
        if not (0 <= value.seconds < END_OF_TIME_S and 0 <= value.nanos < 1_000_000_000):
            raise InvalidArgumentError("INVALID_FIELD", "not a time from 1970 to 9999", field=f"{within}.{path}")


def is_phased(release: pb.Release) -> bool:
    """Whether not every device of the cohort may take it."""
    phase = release.phase
    return bool(phase.tags or phase.count or 0 < phase.share_ppm < ALL_PPM)


def is_scheduled(release: pb.Release, now_ms: int) -> bool:
    """Whether its time is still to come."""
    return release.HasField("schedule_time") and release.schedule_time.ToMilliseconds() > now_ms


def check_size(image: Message, what: str) -> None:
    """What is published whole must fit into a record."""
    if image.ByteSize() > MAX_IMAGE_BYTES:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"{what} would be larger than {MAX_IMAGE_BYTES} bytes: make it smaller or delete what is not needed",
            quota="image_bytes",
            limit=MAX_IMAGE_BYTES,
        )


def timestamp(now_ms: int) -> Timestamp:
    """A moment as it is stored."""
    stamp = Timestamp()
    stamp.FromMilliseconds(now_ms)
    return stamp
