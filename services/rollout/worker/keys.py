"""Gateway keys as the registry published them; plain aiokafka, because Faust must not read transactional topics."""

from __future__ import annotations

from groundswell.registry.v1 import events_pb2

from libs.checkins import GatewayKey
from libs.eventlog import Foreign, partition_of
from libs.eventlog.follower import PublicFollower
from libs.eventlog.ports import EventLog
from libs.names import organization_of
from libs.rpc.directory import registry_records_but


class FollowedGatewayKeys:
    """A libs.checkins.GatewayKeys over the registry's public log."""

    def __init__(self, log: EventLog, env: str, partitions: int) -> None:
        self._partitions = partitions
        self._keys: dict[str, GatewayKey] = {}
        self.follower = PublicFollower(
            log,
            "registry",
            partitions,
            self._apply,
            env=env,
            types=(events_pb2.GatewayChanged,),
            ignored=registry_records_but(events_pb2.GatewayChanged),
        )

    def _apply(self, record: Foreign) -> None:
        if isinstance(record.payload, events_pb2.GatewayChanged):
            it = record.payload.gateway
            self._keys[it.name] = GatewayKey(it.name, it.key_id, it.public_key, it.disabled)

    def get(self, gateway: str) -> GatewayKey | None:
        return self._keys.get(gateway)

    def reached(self, gateway: str) -> int:
        return self.follower.public_seq(partition_of(organization_of(gateway), self._partitions))
