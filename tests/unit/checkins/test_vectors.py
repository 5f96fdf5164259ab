"""The published vectors of signed check-in records, which a team's own gateway is built against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from libs import checkins
from libs.checkins import CheckInSigner, GatewayKey, Rejected, VerifiedBatch, key_id_of, verify

VECTORS: Any = json.loads((Path(checkins.__file__).parent / "vectors.json").read_text())
KEY = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(VECTORS["seed"]))


class Keys:
    def get(self, gateway: str) -> GatewayKey:
        public = bytes.fromhex(VECTORS["public_key"])
        return GatewayKey(gateway, key_id_of(public), public)

    def reached(self, _gateway: str) -> int:
        return 41


def headers_of(record: dict[str, Any]) -> list[tuple[str, bytes]]:
    return [
        (name, bytes.fromhex(text) if name == "signature" else text.encode())
        for name, text in record["headers"].items()
    ]


def test_a_signer_makes_them() -> None:
    first = VECTORS["records"][0]["headers"]
    signer = CheckInSigner(KEY, first["gateway"], first["process"], VECTORS["topic"], int(first["registry-seq"]))
    for record in VECTORS["records"]:
        assert signer.headers(VECTORS["partition"], bytes.fromhex(record["value"])) == headers_of(record)
        assert KEY.sign(bytes.fromhex(record["signed"])).hex() == record["headers"]["signature"]


@pytest.mark.parametrize("record", VECTORS["records"], ids=lambda record: record["what"])
def test_a_verifier_takes_them_at_their_own_place_only(record: dict[str, Any]) -> None:
    place = {"topic": VECTORS["topic"], "partition": VECTORS["partition"]}
    value = bytes.fromhex(record["value"])
    verdict = verify(headers_of(record), value, **place, keys=Keys(), partitions=VECTORS["partitions"])
    assert isinstance(verdict, VerifiedBatch)
    elsewhere = place | {"topic": "prod.device.checkins.v1"}
    refused = verify(headers_of(record), value, **elsewhere, keys=Keys(), partitions=VECTORS["partitions"])
    assert isinstance(refused, Rejected)
    assert refused.reason == "BAD_SIGNATURE"
