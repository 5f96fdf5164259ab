"""Records of the check-in topic: signing, verifying, replay protection (protos/groundswell/device/v1/device.proto)."""

from libs.checkins.record import (
    MAX_BYTES,
    MAX_ITEMS,
    CheckInSigner,
    Claim,
    GatewayKey,
    GatewayKeys,
    Rejected,
    VerifiedBatch,
    claimed,
    key_id_of,
    read,
    signed_bytes,
    verify,
)
from libs.checkins.sequence import SequenceGuard

__all__ = [
    "MAX_BYTES",
    "MAX_ITEMS",
    "CheckInSigner",
    "Claim",
    "GatewayKey",
    "GatewayKeys",
    "Rejected",
    "SequenceGuard",
    "VerifiedBatch",
    "claimed",
    "key_id_of",
    "read",
    "signed_bytes",
    "verify",
]
