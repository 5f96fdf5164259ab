"""Rules of single fields, masks, quotas, and who may give what. Pure; every refusal names its field or quota."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.registry.v1 import registry_pb2 as pb

from libs.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    PermissionDeniedError,
    ResourceExhaustedError,
)
from libs.names import is_within
from libs.rpc.access import ROLES, KeyRecord, covers, may_grant

M = TypeVar("M", bound=Message)

DEVICE_FIELDS: Final = ("cohort", "tags", "target", "description", "quarantined", "quarantine_reason")
PRODUCT_FIELDS: Final = (
    "display_name",
    "policy",
    "policy.poll_interval",
    "policy.poll_jitter",
    "policy.allow_development_ca",
    "policy.required_signatures",
)
NAME_LIMIT: Final = 128
TEXT_LIMIT: Final = 256
TAG_LIMIT: Final = 64
DEFAULT_POLL_S: Final = 60
POLL_MOST_MS: Final = 7 * 24 * 3600 * 1000
POLL_LEAST_MS: Final = 100
SIGNATURES_MOST: Final = 16
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}")
_TARGET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}|")
_IDENTIFIER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_SCOPE: Final = re.compile(r"\*|(?:\*|[a-z][A-Za-z]*)(?:\.(?:\*|[a-z][A-Za-z]*)){1,2}")


@dataclass(frozen=True, slots=True)
class Quotas:
    """How much an organization may have; cohorts are counted in their product."""

    products: int = 1_000
    cohorts: int = 1_000
    devices: int = 1_000_000
    members: int = 1_000
    api_keys: int = 1_000
    gateways: int = 1_000


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


def clean_tags(tags: Iterable[str]) -> list[str]:
    """Sorted, distinct tags."""
    wanted = sorted(set(tags))
    if len(wanted) > TAG_LIMIT:
        raise invalid("device.tags", f"are more than {TAG_LIMIT}")
    for tag in wanted:
        if not _TAG.fullmatch(tag):
            raise invalid("device.tags", f"hold '{tag[:80]}', which is not a tag", value=tag[:80])
    return wanted


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


def clean_policy(policy: pb.ConfigurationPolicy) -> None:
    """Fill defaults and check, in place on the caller's own copy: after-images say what holds."""
    if not policy.HasField("poll_interval"):
        policy.poll_interval.FromSeconds(DEFAULT_POLL_S)
    interval = policy.poll_interval.ToMilliseconds()
    if not POLL_LEAST_MS <= interval <= POLL_MOST_MS:
        raise invalid("product.policy.poll_interval", "must be between 0.1 s and 7 days")
    if policy.HasField("poll_jitter") and not 0 <= policy.poll_jitter.ToMilliseconds() <= POLL_MOST_MS:
        raise invalid("product.policy.poll_jitter", "must be between 0 and 7 days")
    if policy.required_signatures > SIGNATURES_MOST:
        raise invalid("product.policy.required_signatures", f"must be at most {SIGNATURES_MOST}")


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


def check_role(giver: KeyRecord | None, role: str, field: str) -> None:
    """Refuse an unknown role, and one above the giver's own."""
    if role not in ROLES:
        raise invalid(field, "must be owner, admin, operator or viewer", value=role[:40])
    if giver is None or not may_grant(giver.role, role):
        raise PermissionDeniedError(
            "ROLE_ABOVE_OWN",
            f"the role '{role}' is more than the caller's own",
            role=role,
            own_role=giver.role if giver else "",
        )


def check_scopes(giver: KeyRecord | None, scopes: Sequence[str], prefix: str, organization: str) -> None:
    """Refuse malformed scopes and prefixes, and any right that the giving key does not hold itself."""
    if not scopes:
        raise invalid("api_key.scopes", "are empty: such a key could do nothing")
    if len(scopes) > TAG_LIMIT:
        raise invalid("api_key.scopes", f"are more than {TAG_LIMIT}")
    for scope in scopes:
        if not _SCOPE.fullmatch(scope):
            raise invalid("api_key.scopes", f"hold '{scope[:80]}', which is not a permission pattern")
        if giver is None or not covers(giver.scopes, scope):
            raise PermissionDeniedError(
                "SCOPE_ABOVE_OWN", f"the caller's key does not hold '{scope}' itself", permission=scope
            )
    if prefix and not is_within(prefix, f"organizations/{organization}"):
        raise invalid("api_key.resource_prefix", f"must be within organizations/{organization}")
    if giver is not None and not is_within(prefix, giver.resource_prefix):
        raise PermissionDeniedError(
            "PREFIX_ABOVE_OWN", "the prefix reaches further than the caller's own key", prefix=prefix
        )


def wrong_state(resource: str, why: str, **metadata: object) -> FailedPreconditionError:
    """The resource is in a state that does not allow this."""
    return FailedPreconditionError("WRONG_STATE", f"{resource} {why}", resource=resource, **metadata)
