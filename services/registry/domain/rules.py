"""Rules of single fields, masks and quotas. Pure; every refusal names its field or quota."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.registry.v1 import registry_pb2 as pb

from libs.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
)

M = TypeVar("M", bound=Message)

DEVICE_FIELDS: Final = ("cohort", "tags", "target", "description", "quarantined", "quarantine_reason")
NAME_LIMIT: Final = 128
TEXT_LIMIT: Final = 256
REASON_LIMIT: Final = 1024
TAG_LIMIT: Final = 64
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_TARGET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}|")
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much an organization may have; cohorts are counted in their product."""

    products: int = 1_000
    cohorts: int = 1_000
    devices: int = 1_000_000
    members: int = 1_000
    api_keys: int = 1_000
    gateways: int = 1_000
    roles: int = 200
    device_imports: int = 20
    """Imports of a product that have not ended."""


def check_quota(name: str, used: int, limit: int) -> None:
    """Refuse one more when the limit is reached."""
    if used >= limit:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED", f"the quota '{name}' of {limit} is used up", quota=name, limit=limit, used=used
        )


def invalid(field: str, why: str, **metadata: object) -> InvalidArgumentError:
    """A wrong field."""
    return InvalidArgumentError("INVALID_FIELD", f"{field} {why}", field=field, **metadata)


def check_text(field: str, text: str, limit: int) -> None:
    """Refuse text that is too long or holds control characters."""
    if len(text) > limit:
        raise invalid(field, f"is longer than {limit} characters")
    if any(ord(character) < 32 and character not in "\n\t" for character in text):
        raise invalid(field, "holds control characters")


def check_identifier(field: str, value: str) -> None:
    """Refuse what cannot be the last segment of a device's name."""
    if not _IDENTIFIER.fullmatch(value):
        raise invalid(field, "must be letters, digits, '.', '_' or '-', at most 128, beginning with a letter or digit")


def check_fingerprint(field: str, value: str) -> None:
    """Refuse what is not a lowercase hex SHA-256."""
    if not _FINGERPRINT.fullmatch(value):
        raise invalid(field, "must be a lowercase hexadecimal SHA-256")


def clean_tags(tags: Iterable[str], field: str = "device.tags") -> list[str]:
    """Sorted, distinct tags."""
    wanted = sorted(set(tags))
    if len(wanted) > TAG_LIMIT:
        raise invalid(field, f"are more than {TAG_LIMIT}")
    for tag in wanted:
        if not _TAG.fullmatch(tag):
            raise invalid(field, f"hold '{tag[:80]}', which is not a tag", value=tag[:80])
    return wanted


def check_labels(labels: Mapping[str, str]) -> None:
    """Labels are made of what tags are made of; a value may be empty."""
    if len(labels) > TAG_LIMIT:
        raise invalid("cohort.labels", f"are more than {TAG_LIMIT}")
    for key, value in labels.items():
        if not _TAG.fullmatch(key) or (value and not _TAG.fullmatch(value)):
            raise invalid("cohort.labels", f"hold '{key[:80]}={value[:80]}', which is not a label", value=key[:80])


def clean_device(device: pb.Device) -> None:
    """Check and normalize a device's settable fields, in place on the caller's own copy."""
    check_text("device.description", device.description, TEXT_LIMIT)
    check_text("device.quarantine_reason", device.quarantine_reason, TEXT_LIMIT)
    if not _TARGET.fullmatch(device.target):
        raise invalid("device.target", "must be letters, digits, '.', '_' or '-', at most 64")
    tags = clean_tags(device.tags)
    del device.tags[:]
    device.tags.extend(tags)
    if not device.quarantined:
        device.quarantine_reason = ""


def masked(current: M, wanted: M, paths: Sequence[str], allowed: Collection[str], resource: str) -> M:
    """A copy of the current resource with the named fields taken from the wanted one; `*` names all that may change."""
    if not paths:
        raise invalid("update_mask", "names no field")
    unknown = [path for path in paths if path != "*" and path not in allowed]
    if unknown:
        raise invalid(
            "update_mask",
            f"names '{unknown[0][:80]}'; {resource} lets be changed: {', '.join(allowed)}",
            path=unknown[0][:80],
        )
    changed = type(current)()
    changed.CopyFrom(current)
    for path in allowed if "*" in paths else paths:
        _copy_field(changed, wanted, path)
    return changed


def _copy_field(target: Message, source: Message, path: str) -> None:
    head, _, rest = path.partition(".")
    if rest:
        _copy_field(getattr(target, head), getattr(source, head), rest)
        return
    target.ClearField(head)  # type: ignore[arg-type,unused-ignore]
    part = type(source)()
    part.CopyFrom(source)
    for field, _value in source.ListFields():
        if field.name != head:
            part.ClearField(field.name)  # type: ignore[arg-type,unused-ignore]
    target.MergeFrom(part)


def timestamp(now_ms: int) -> Timestamp:
    """Milliseconds as a message."""
    stamp = Timestamp()
    stamp.FromMilliseconds(now_ms)
    return stamp


def wrong_state(resource: str, why: str, **metadata: object) -> FailedPreconditionError:
    """The resource is in a state that does not allow this."""
    return FailedPreconditionError("WRONG_STATE", f"{resource} {why}", resource=resource, **metadata)
