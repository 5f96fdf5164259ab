"""Gateway keys as the check-in worker follows them: a disabled gateway and a key before its rotation count no more."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.device.v1 import device_pb2
from groundswell.registry.v1 import events_pb2
from groundswell.registry.v1 import registry_pb2 as pb

from libs.checkins import CheckInSigner, Rejected, key_id_of, verify
from libs.eventlog import Foreign, partition_of
from libs.eventlog.memory import MemoryLog
from services.registry import domain as ask
from services.rollout.worker.keys import FollowedGatewayKeys
from tests.unit.registry.world import ORG, World, furnished

EDGE = f"{ORG}/gateways/edge"
TOPIC = "t.device.checkins.v1"
PARTITIONS = 4
PARTITION = partition_of("acme", PARTITIONS)


class Known(FollowedGatewayKeys):
    """Follows what a registry of this test publishes, record by record."""

    def __init__(self, world: World) -> None:
        super().__init__(MemoryLog(partitions=PARTITIONS), "t", PARTITIONS)
        self._world = world

    def reached(self, gateway: str) -> int:
        for number, record in enumerate(self._world.published):
            if isinstance(record, events_pb2.GatewayChanged):
                name = record.gateway.name
                self._apply(Foreign("registry", "t", PARTITION, number, number, "acme", name, record, 0))
        return len(self._world.published)


def judged(keys: Known, private: Ed25519PrivateKey) -> str:
    """Empty when a check-in signed by the key is taken, else why not."""
    batch = device_pb2.CheckInBatch(gateway=EDGE, organization="acme")
    value = batch.SerializeToString()
    signer = CheckInSigner(private, EDGE, "00000000-0000-4000-8000-000000000000", TOPIC, registry_seq=1)
    keys.reached(EDGE)
    result = verify(signer.headers(PARTITION, value), value, TOPIC, PARTITION, keys, partitions=PARTITIONS)
    return result.reason if isinstance(result, Rejected) else ""


def raw(private: Ed25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def test_a_disabled_gateway_is_refused_until_it_is_enabled() -> None:
    world, private = furnished(), Ed25519PrivateKey.generate()
    world.do(ask.CreateGateway(ORG, "edge", pb.Gateway(public_key=raw(private))))
    keys = Known(world)
    assert judged(keys, private) == ""
    world.do(ask.UpdateGateway(pb.Gateway(name=EDGE, disabled=True), ("disabled",)))
    assert judged(keys, private) == "KEY_DISABLED"
    world.do(ask.UpdateGateway(pb.Gateway(name=EDGE), ("disabled",)))
    assert judged(keys, private) == ""


def test_after_a_rotation_only_the_new_key_counts() -> None:
    world, old, new = furnished(), Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    world.do(ask.CreateGateway(ORG, "edge", pb.Gateway(public_key=raw(old))))
    keys = Known(world)
    assert judged(keys, new) == "UNKNOWN_GATEWAY_KEY"
    rotated = world.do(ask.UpdateGateway(pb.Gateway(name=EDGE, public_key=raw(new)), ("public_key",)))
    assert rotated.key_id == key_id_of(raw(new))
    assert judged(keys, new) == ""
    assert judged(keys, old) == "UNKNOWN_GATEWAY_KEY"
