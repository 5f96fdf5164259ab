"""API keys and gateways as services other than the registry know them: folded from its public log.

A key that is not here yet is asked for; for a gateway one waits until the view has caught up.
"""

from __future__ import annotations

import logging
import math
from typing import Final, TypeVar

import grpc
from google.protobuf.message import Message
from groundswell.registry.v1 import events_pb2, registry_pb2, registry_pb2_grpc

from libs.errors import UnavailableError
from libs.eventlog import Deadline, Foreign, partition_of
from libs.eventlog.follower import ParkedRecord, PublicFollower
from libs.eventlog.ports import EventLog
from libs.names import organization_of
from libs.rpc.access import KeyRecord, is_custom
from libs.settings import Settings

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)

STALE_S: Final = 5.0
"""The revocation bound: what is older answers UNAVAILABLE (protocols.md section 8)."""

REGISTRY_RECORDS: Final = (
    events_pb2.OrganizationChanged,
    events_pb2.ProductChanged,
    events_pb2.CohortChanged,
    events_pb2.DeviceChanged,
    events_pb2.MemberChanged,
    events_pb2.ApiKeyChanged,
    events_pb2.GatewayChanged,
    events_pb2.RoleChanged,
)
"""Every public record type of the registry."""
_HEEDED: Final = (events_pb2.ApiKeyChanged, events_pb2.MemberChanged, events_pb2.RoleChanged, events_pb2.GatewayChanged)


def registry_records_but(*heeded: type[Message]) -> tuple[type[Message], ...]:
    """What a follower of the registry ignores that heeds these alone; devices are most of what there is."""
    return tuple(kind for kind in REGISTRY_RECORDS if kind not in heeded)


def key_record(
    key: registry_pb2.ApiKey, member: registry_pb2.Member, role: registry_pb2.Role | None = None
) -> KeyRecord:
    """The key with its member's role; a custom role that is not given holds nothing."""
    return KeyRecord(
        name=key.name,
        secret_sha256=key.secret_sha256,
        member=key.member,
        role=member.role,
        scopes=tuple(key.scopes),
        resource_prefix=key.resource_prefix,
        expire_ms=key.expire_time.ToMilliseconds() if key.HasField("expire_time") else 0,
        revoked=key.revoked,
        permissions=tuple(role.permissions) if role is not None else (),
        previous_sha256=key.previous_secret_sha256,
        previous_expire_ms=key.previous_expire_time.ToMilliseconds() if key.HasField("previous_expire_time") else 0,
    )


def check_fresh(lag_s: float) -> None:
    """Refuse to judge by a view of who may do what that may lack a revocation."""
    if lag_s > STALE_S:
        shown = "unknown" if math.isinf(lag_s) else f"{lag_s:.1f} s"
        raise UnavailableError(
            "ACCESS_VIEW_STALE", f"the view of who may do what is behind ({shown}): try again", retry_after_s=0.5
        )


class AccessDirectory:
    """A :class:`libs.rpc.access.KeyDirectory` over the registry's public log."""

    def __init__(
        self, log_: EventLog, settings: Settings, registry: registry_pb2_grpc.RegistryInternalServiceAsyncStub
    ) -> None:
        self._partitions = settings.partitions
        self._registry = registry
        self._keys: dict[str, registry_pb2.ApiKey] = {}
        self._members: dict[str, registry_pb2.Member] = {}
        self._roles: dict[str, registry_pb2.Role] = {}
        self._gateways: dict[str, registry_pb2.Gateway] = {}
        self.follower = PublicFollower(
            log_,
            "registry",
            settings.partitions,
            self._apply,
            env=settings.env,
            types=_HEEDED,
            ignored=registry_records_but(*_HEEDED),
            on_parked=self._forget,
        )

    @property
    def live(self) -> bool:
        """False when following has ended for good, so that the process has to be started anew."""
        return self.follower.live

    async def start(self) -> None:
        """Begin to follow."""
        await self.follower.start()

    async def stop(self) -> None:
        """Stop following."""
        await self.follower.stop()

    def _apply(self, record: Foreign) -> None:
        payload = record.payload
        if isinstance(payload, events_pb2.ApiKeyChanged):
            self._keys[record.resource] = payload.api_key
        elif isinstance(payload, events_pb2.MemberChanged):
            _fold(self._members, record.resource, payload.member, gone=payload.change == "member.removed")
        elif isinstance(payload, events_pb2.RoleChanged):
            _fold(self._roles, record.resource, payload.role, gone=payload.change == "role.deleted")
        elif isinstance(payload, events_pb2.GatewayChanged):
            self._gateways[record.resource] = payload.gateway

    def _forget(self, record: ParkedRecord) -> None:
        """What is not understood must not be trusted as it was before: the registry is asked."""
        for known in (self._keys, self._members, self._roles, self._gateways):
            if record.resource:
                known.pop(record.resource, None)
            else:
                known.clear()

    async def lookup(self, organization: str, name: str) -> KeyRecord | None:
        """The key as folded, or as the registry says when it is not here yet."""
        key = self._keys.get(name)
        member = self._members.get(key.member) if key is not None else None
        role = self._roles.get(member.role) if member is not None else None
        if key is None or member is None or (role is None and is_custom(member.role)):
            return await self._ask(name)
        lag = self.follower.lag_s(partition_of(organization, self._partitions))
        if math.isinf(lag):
            return await self._ask(name)  # just started: how far the view is was not measured yet
        check_fresh(lag)
        return key_record(key, member, role)

    async def gateway(self, name: str) -> registry_pb2.Gateway | None:
        """The gateway as folded; one made a moment ago is waited for."""
        if name not in self._gateways or math.isinf(self.follower.lag_s(self._partition(name))):
            await self.follower.caught_up(Deadline.after(STALE_S))
        check_fresh(self.follower.lag_s(self._partition(name)))
        return self._gateways.get(name)

    def _partition(self, name: str) -> int:
        return partition_of(organization_of(name), self._partitions)

    async def _ask(self, name: str) -> KeyRecord | None:
        try:
            answer = await self._registry.LookupApiKey(registry_pb2.LookupApiKeyRequest(name=name), timeout=3)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise UnavailableError("REGISTRY_UNAVAILABLE", "the registry cannot be asked about an API key") from error
        return key_record(answer.api_key, answer.member, answer.role if answer.HasField("role") else None)


def _fold(known: dict[str, M], name: str, image: M, *, gone: bool) -> None:
    if gone:
        known.pop(name, None)
    else:
        known[name] = image
