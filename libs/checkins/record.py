"""One record of the check-in topic: its signature and the rules that need nothing but the record and the keys.

Rules (protocols.md section 5): one organization per record, on that organization's partition; up to 500 items and
256 KiB; a gateway of an organization speaks for that organization alone, one of ``platform`` for all; the Ed25519
signature covers topic, partition, gateway, key id, process, sequence and value, so a record is good in one place only.
What fails is rejected with a reason and never dropped in silence. Replays are judged by :mod:`libs.checkins.sequence`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from google.protobuf.message import DecodeError
from groundswell.device.v1 import device_pb2, reading_pb2

from libs.eventlog.config import partition_of

MAX_ITEMS: Final = 500
MAX_BYTES: Final = 256 * 1024
PLATFORM: Final = "platform"
_DOMAIN: Final = b"groundswell.checkin.v1"
_MAX_COUNT: Final = 2**63 - 1
_GATEWAY: Final = re.compile(r"organizations/([a-z][a-z0-9-]{1,40})/gateways/[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_KEY_ID: Final = re.compile(r"[0-9a-f]{64}\Z")
_PROCESS: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NUMBER: Final = re.compile(r"(0|[1-9][0-9]{0,18})\Z")
_HEADERS: Final = ("gateway", "key-id", "process", "sequence", "registry-seq", "signature")


@dataclass(frozen=True, slots=True)
class GatewayKey:
    """What the registry says of a gateway."""

    gateway: str
    key_id: str
    public_key: bytes
    disabled: bool = False


class GatewayKeys(Protocol):
    """The registry's gateways as the verifier has folded them."""

    def get(self, gateway: str) -> GatewayKey | None: ...

    def reached(self, gateway: str) -> int:
        """Public-seq up to which the gateway's registry partition has been folded."""


@dataclass(frozen=True, slots=True)
class VerifiedBatch:
    """A record that is what it says, but for replays."""

    gateway: str
    process: str
    sequence: int
    partition: int
    organization: str = ""
    """Of all items; empty on a heartbeat."""
    heartbeat: bool = False
    seen: Sequence[tuple[str, bytes]] = ()
    """Device and serialized receipt of every item, in order; empty bytes where there is none."""
    items: Sequence[device_pb2.CheckInItem] = ()
    """Those that are not idle, in order, without their receipts."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that must not be used. ``wait`` asks to judge it again when the keys have moved on; bound that wait."""

    reason: str
    detail: str
    wait: bool = False


@dataclass(frozen=True, slots=True)
class _Headers:
    gateway: str
    organization: str
    key_id: str
    process: str
    sequence: int
    registry_seq: int
    signature: bytes


def key_id_of(public_key: bytes) -> str:
    """Lowercase hex SHA-256 of the raw public key."""
    return hashlib.sha256(public_key).hexdigest()


def signed_bytes(
    topic: str, partition: int, gateway: str, key_id: str, process: str, sequence: int, value: bytes
) -> bytes:
    """What the signature covers. No part but the value may hold a NUL."""
    texts = (topic, str(partition), gateway, key_id, process, str(sequence))
    return b"\0".join((_DOMAIN, *(text.encode() for text in texts), value))


class CheckInSigner:
    """Signs for one gateway process. Sequences grow by partition, so send in the order of signing."""

    def __init__(
        self, private_key: Ed25519PrivateKey, gateway: str, process: str, topic: str, registry_seq: int = 0
    ) -> None:
        if not _GATEWAY.match(gateway) or not _PROCESS.match(process):
            raise ValueError("a gateway's resource name and a lowercase UUID of the process are needed")
        self._key = private_key
        self._gateway = gateway
        self._process = process
        self._topic = topic
        self._key_id = key_id_of(private_key.public_key().public_bytes_raw())
        self._sequences: dict[int, int] = {}
        self.registry_seq = registry_seq
        """Public-seq of the gateway's key in its registry partition: verifiers wait until they have read that far."""

    def headers(self, partition: int, value: bytes) -> list[tuple[str, bytes]]:
        """Headers of the next record of a partition."""
        sequence = self._sequences.get(partition, 0) + 1
        self._sequences[partition] = sequence
        signed = signed_bytes(self._topic, partition, self._gateway, self._key_id, self._process, sequence, value)
        return [
            ("gateway", self._gateway.encode()),
            ("key-id", self._key_id.encode()),
            ("process", self._process.encode()),
            ("sequence", str(sequence).encode()),
            ("registry-seq", str(self.registry_seq).encode()),
            ("signature", self._key.sign(signed)),
        ]


@dataclass(frozen=True, slots=True)
class Claim:
    """A record that says it is a gateway's, and that key's bytes: to be proven before anything of it is read."""

    headers: _Headers
    value: bytes
    key: bytes
    topic: str
    partition: int

    def holds(self) -> bool:
        """Whether the signature is that gateway's over this record in this place.

        Nearly all of it is outside of Python and without its lock, so threads may do it beside others.
        """
        it = self.headers
        signed = signed_bytes(self.topic, self.partition, it.gateway, it.key_id, it.process, it.sequence, self.value)
        try:
            _public_key(self.key).verify(it.signature, signed)
        except (InvalidSignature, ValueError):
            return False
        return True


@lru_cache(maxsize=256)
def _public_key(raw: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(raw)


def verify(
    record_headers: Iterable[tuple[str, bytes]],
    value: bytes,
    topic: str,
    partition: int,
    keys: GatewayKeys,
    *,
    partitions: int,
) -> VerifiedBatch | Rejected:
    """Judge one record: its three steps, one after the other. Nothing of the value is parsed before it is proven."""
    claim = claimed(record_headers, value, topic, partition, keys)
    return claim if isinstance(claim, Rejected) else read(claim, proven=claim.holds(), partitions=partitions)


def claimed(
    record_headers: Iterable[tuple[str, bytes]], value: bytes, topic: str, partition: int, keys: GatewayKeys
) -> Claim | Rejected:
    """First step: what the headers say, and with which key."""
    headers = _read_headers(record_headers)
    if isinstance(headers, Rejected):
        return headers
    if len(value) > MAX_BYTES:
        return Rejected("BATCH_TOO_LARGE", f"the record has {len(value)} bytes, {MAX_BYTES} are allowed")
    key = keys.get(headers.gateway)
    if key is None or key.key_id != headers.key_id:
        if headers.registry_seq > keys.reached(headers.gateway):
            return Rejected("KEY_NOT_YET_KNOWN", f"the key of {headers.gateway} is not folded yet", wait=True)
        return Rejected("UNKNOWN_GATEWAY_KEY", f"{headers.gateway} has no key {headers.key_id}")
    if key.disabled:
        return Rejected("KEY_DISABLED", f"{headers.gateway} is disabled")
    return Claim(headers, value, key.public_key, topic, partition)


def read(claim: Claim, *, proven: bool, partitions: int) -> VerifiedBatch | Rejected:
    """Last step: what a record says for whom the second, `Claim.holds`, was true."""
    headers = claim.headers
    if not proven:
        return Rejected("BAD_SIGNATURE", f"the signature is not that of {headers.gateway} over this record")
    try:
        # Most items are idle and their receipts are only stored: to read all of each would be most of the work.
        batch = reading_pb2.CheckInBatchReading.FromString(claim.value)
        problem = _check_batch(batch, headers, claim.partition, partitions)
        if problem is not None:
            return problem
        prefix = f"organizations/{batch.organization}/"
        seen: list[tuple[str, bytes]] = []
        items: list[device_pb2.CheckInItem] = []
        for item in batch.items:
            device, receipt = item.device, item.receipt
            if not device.startswith(prefix):
                return Rejected("ORGANIZATION_MISMATCH", "an item speaks of a device of another organization")
            seen.append((device, receipt[0] if len(receipt) == 1 else b"".join(receipt)))
            if not item.idle:
                item.ClearField("receipt")
                items.append(device_pb2.CheckInItem.FromString(item.SerializeToString()))
    except DecodeError:
        return Rejected("MALFORMED", "the value is not a CheckInBatch")
    return VerifiedBatch(
        headers.gateway,
        headers.process,
        headers.sequence,
        claim.partition,
        batch.organization,
        batch.heartbeat,
        seen,
        items,
    )


def _read_headers(record_headers: Iterable[tuple[str, bytes]]) -> _Headers | Rejected:
    found: dict[str, bytes] = {}
    for name, content in record_headers:
        if name in _HEADERS:
            if name in found:
                return Rejected("MALFORMED", f"header {name} is there twice")
            found[name] = content
    missing = [name for name in _HEADERS if name not in found]
    if missing:
        return Rejected("MALFORMED", f"header {missing[0]} is missing")
    texts = {name: content.decode("utf-8", "replace") for name, content in found.items() if name != "signature"}
    gateway = _GATEWAY.match(texts["gateway"])
    forms = {"key-id": _KEY_ID, "process": _PROCESS, "sequence": _NUMBER, "registry-seq": _NUMBER}
    if gateway is None:
        return Rejected("MALFORMED", "header gateway is not a gateway's resource name")
    for name, form in forms.items():
        if not form.match(texts[name]) or (form is _NUMBER and int(texts[name]) > _MAX_COUNT):
            return Rejected("MALFORMED", f"header {name} is malformed")
    return _Headers(
        gateway=texts["gateway"],
        organization=gateway[1],
        key_id=texts["key-id"],
        process=texts["process"],
        sequence=int(texts["sequence"]),
        registry_seq=int(texts["registry-seq"]),
        signature=found["signature"],
    )


def _check_batch(
    batch: reading_pb2.CheckInBatchReading, headers: _Headers, partition: int, partitions: int
) -> Rejected | None:
    if batch.gateway != headers.gateway:
        return Rejected("GATEWAY_MISMATCH", "the batch names another gateway than its signed header")
    if len(batch.items) > MAX_ITEMS:
        return Rejected("BATCH_TOO_LARGE", f"the batch has {len(batch.items)} items, {MAX_ITEMS} are allowed")
    if batch.heartbeat:
        if batch.items or batch.organization:
            return Rejected("MALFORMED", "a heartbeat holds no items and no organization")
        # The heartbeat of an organization's own gateway counts where that organization lives.
        spoken_for = headers.organization if headers.organization != PLATFORM else ""
    else:
        if not batch.organization:
            return Rejected("MALFORMED", "a batch of items names its organization")
        spoken_for = batch.organization
    if headers.organization not in {PLATFORM, batch.organization} and not batch.heartbeat:
        return Rejected("ORGANIZATION_MISMATCH", f"{headers.gateway} does not speak for {batch.organization}")
    if spoken_for and partition_of(spoken_for, partitions) != partition:
        return Rejected("PARTITION_MISMATCH", f"{spoken_for} does not belong to partition {partition}")
    return None
