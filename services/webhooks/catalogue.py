"""Every event type that can be delivered, and the matching of events by an endpoint's filters.

A type is the ``change`` of a public record. Types that begin with ``webhook.`` speak of endpoints; they go only to
endpoints whose filter names them, and never to the endpoint that they speak of: a failing endpoint must not cause
events that cause deliveries to itself. A type that is missing here is delivered all the same (to endpoints that take
all, or its prefix), under a general description and schema.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import InvalidArgumentError
from services.webhooks import scope
from services.webhooks.render import WebhookEvent

OWN_PREFIX: Final = "webhook."
MAX_FILTERS: Final = 100
MAX_REMEMBERED: Final = 1_000
_FILTER: Final = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*(\.\*)?\Z")

EVENT_TYPES: Final[dict[str, str]] = {
    "api_key.created": "An API key was created; the event never holds its secret.",
    "api_key.revoked": "An API key was revoked.",
    "api_key.rotated": "An API key has a new secret; the event never holds it.",
    "api_key.updated": "An API key's scopes, prefix or secret hash changed.",
    "bundle.created": "A bundle of binaries was created.",
    "bundle.signed": "A signature was added to a bundle's statement.",
    "bundle.updated": "A bundle changed, for example whether it may be offered.",
    "bundle_override.created": "Named devices are held at a bundle.",
    "bundle_override.deleted": "A bundle override ended.",
    "bundle_override.updated": "A bundle override's bundle, time or devices changed.",
    "ca.expired": "A CA's validity ended: it creates no new devices, known ones go on.",
    "ca_certificate.registered": "A CA certificate was registered after proof of possession.",
    "ca_certificate.resumed": "A CA's suspension ended.",
    "ca_certificate.revoked": "A CA was denied for good, with every device certificate that it signed.",
    "ca_certificate.suspended": "A CA was switched off for new devices and for connections.",
    "ca_certificate.updated": "A CA certificate's state or provisioning rules changed.",
    "certificate.confirmed": "A device used its new certificate: it is in force.",
    "certificate.expired": "A device certificate's validity ended.",
    "certificate.expiring": "Less of a device certificate's life is left than its product wants.",
    "certificate.issued": "A device was given its next certificate and has not used it yet.",
    "certificate.lapsed": "A device's next certificate was never used, or replaced by another.",
    "certificate.superseded": "A device certificate was retired by the use of a newer one.",
    "cohort.created": "A cohort was created.",
    "cohort.updated": "A cohort changed.",
    "device.claimed_release": "A device was granted an attempt at a release.",
    "device.created": "A device was created, by an operator or just in time.",
    "device.quarantined": "A device was quarantined, by an operator or by itself; the device holds the reason.",
    "device.release_changed": "A device reported that it runs something else than before.",
    "device.released": "A device's quarantine ended.",
    "device.retired": "A device was retired for good.",
    "device.rolled_back": "A device reverted to the firmware it came from.",
    "device.update_cancelled": "An attempt ended without success or failure: cancelled or expired.",
    "device.update_confirmed": "New firmware checked in and found itself healthy.",
    "device.update_failed": "An attempt failed.",
    "device.update_withdrawn": "A confirmed device turned out to be unhealthy later.",
    "device.updated": "A device's cohort, tags, target or description changed, or a certificate was bound to it.",
    "device_certificate.bound": "A certificate now identifies a device.",
    "device_certificate.refused": "A certificate was refused at admission.",
    "device_certificate.revoked": "A device certificate was revoked.",
    "gateway.created": "A gateway was registered.",
    "gateway.updated": "A gateway changed.",
    "identity.cloned": "Two agents check in under one identity.",
    "issuing_ca.created": "An issuing CA of the organization was made.",
    "issuing_ca.expired": "An issuing CA's validity ended.",
    "issuing_ca.rotated": "An issuing CA was replaced: it signs nothing new.",
    "member.created": "A member joined the organization.",
    "member.removed": "A member left the organization; its keys are revoked.",
    "member.updated": "A member's role or name changed.",
    "organization.created": "The organization was created.",
    "organization.updated": "The organization changed.",
    "product.archived": "A product takes no new devices any more.",
    "product.created": "A product was created.",
    "product.unarchived": "A product is in use again.",
    "product.updated": "A product or its policy changed.",
    "release.created": "A release was added to a cohort.",
    "release.deleted": "A release was taken out of a cohort.",
    "release.retracted": "A release was retracted: its devices go back.",
    "release.updated": "A release changed.",
    "role.created": "A role of the organization's own was defined.",
    "role.deleted": "A custom role was deleted.",
    "role.updated": "A custom role's permissions changed.",
    "rollout.aborted": "A rollout was aborted.",
    "rollout.completed": "A rollout's last stage passed.",
    "rollout.created": "A rollout was planned.",
    "rollout.halted": "A gate tripped and the rollout halted.",
    "rollout.killed": "A rollout was killed: nothing more is offered or allowed to switch.",
    "rollout.paused": "A rollout was paused.",
    "rollout.resumed": "A rollout goes on.",
    "rollout.retried": "Devices that failed may try a rollout again.",
    "rollout.rolled_back": "Every device that could go back has gone back.",
    "rollout.rolling_back": "A rollout began to take its devices back.",
    "rollout.stage_advanced": "An operator moved a rollout to its next stage.",
    "rollout.stage_awaiting_approval": "A stage passed its gate and waits for approval.",
    "rollout.stage_opened": "A stage began to offer.",
    "rollout.stage_passed": "A stage passed its gate.",
    "rollout.stage_stalled": "A stage cannot pass in its time.",
    "rollout.started": "A rollout began.",
    "rollout.updated": "A rollout changed.",
    "signing_key.created": "A signing key was registered.",
    "signing_key.revoked": "A signing key was revoked.",
    "webhook.endpoint.created": "A webhook endpoint was created.",
    "webhook.endpoint.degraded": "Some deliveries in a row to a webhook endpoint failed.",
    "webhook.endpoint.deleted": "A webhook endpoint was deleted.",
    "webhook.endpoint.disabled": "A webhook endpoint was disabled: by an operator, by 410, or after long failure.",
    "webhook.endpoint.opened": "A webhook endpoint fails: its breaker is open and lets single probes through.",
    "webhook.endpoint.recovered": "A webhook endpoint answers again.",
    "webhook.endpoint.secret_rotated": "A webhook endpoint has a new secret and key pair; the event holds no secret.",
    "webhook.endpoint.updated": "A webhook endpoint changed.",
    "webhook.endpoint.verified": "A webhook endpoint's receiver proved that it wants the deliveries.",
    "webhook.test_fire": "Sent to verify an endpoint, and by hand, to that endpoint alone whatever its filter.",
}
SINCE: Final[dict[str, str]] = {}
"""Release that first sent a type, where that is not the first release."""
FIRST_RELEASE: Final = "0.1.0"
TEST_FIRE: Final = "webhook.test_fire"


def description_of(event_type: str) -> str:
    """For people; a general one for a type that the catalogue does not describe."""
    known = EVENT_TYPES.get(event_type)
    if known is not None:
        return known
    noun, _, verb = event_type.partition(".")
    return f"Something happened to a {noun.replace('_', ' ')}: {verb.replace('_', ' ').replace('.', ' ')}."


def since(event_type: str) -> str:
    """Release that first sent it; empty for a type that the catalogue does not describe."""
    return SINCE.get(event_type, FIRST_RELEASE) if event_type in EVENT_TYPES else ""


def matches(filters: Sequence[str], event_type: str) -> bool:
    """Whether an endpoint with these filters receives the type. No filter means all but those about endpoints."""
    if not event_type or event_type == TEST_FIRE:
        return False
    if not filters:
        return not event_type.startswith(OWN_PREFIX)
    return any(event_type.startswith(one[:-1]) if one.endswith(".*") else event_type == one for one in filters)


class Filter:
    """All filters of an endpoint at once: type and product and cohort. Remembers types, because there are few."""

    def __init__(self, image: pb.WebhookEndpoint) -> None:
        self._name = image.name
        self._types = tuple(image.event_types)
        self._products = frozenset(image.products)
        self._cohorts = frozenset(image.cohorts)
        self._known: dict[str, bool] = {}

    def __call__(self, event: WebhookEvent) -> bool:
        """Whether the endpoint receives the event."""
        kind = event.event_type
        wanted = self._known.get(kind)
        if wanted is None:
            wanted = matches(self._types, kind)
            if len(self._known) < MAX_REMEMBERED:
                self._known[kind] = wanted
        if not wanted or event.resource == self._name:
            return False
        if self._products and scope.product(event.resource) not in self._products:
            return False
        return not self._cohorts or not self._cohorts.isdisjoint(scope.cohorts(event.resource, event.payload))


def check_filters(filters: Sequence[str], field: str = "webhook_endpoint.event_types") -> None:
    """Refuse filters that could never match: a typing error would mean silence. Raises INVALID_FIELD."""
    if len(filters) > MAX_FILTERS:
        raise _refuse(f"must have at most {MAX_FILTERS} entries", "", field)
    for one in filters:
        if not _FILTER.match(one):
            raise _refuse(
                "takes event types such as 'rollout.halted' or 'rollout.*'; none at all means every type", one, field
            )
        if not any(matches((one,), known) for known in EVENT_TYPES):
            raise _refuse("names no event type of the catalogue (see ListEventTypes)", one, field)


def _refuse(what: str, value: str, field: str) -> InvalidArgumentError:
    return InvalidArgumentError("INVALID_FIELD", f"event_types {what}", field=field, value=value[:200])
