"""The published vectors, which other signers and agents are built against, say what this code does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from libs import trust
from libs.trust.canonical import canonical_object, metadata_digest
from libs.trust.signatures import key_id, require_threshold, verify
from libs.trust.statement import parse

VECTORS: Any = json.loads((Path(trust.__file__).parent / "vectors.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["metadata"], ids=lambda vector: vector["text"])
def test_metadata(vector: dict[str, str]) -> None:
    assert canonical_object(vector["text"]) == vector["canonical"]
    assert metadata_digest(vector["canonical"]) == vector["sha256"]


@pytest.mark.parametrize("vector", VECTORS["keys"], ids=lambda vector: vector["key_id"][:8])
def test_key_ids(vector: dict[str, str]) -> None:
    public = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(vector["seed"])).public_key().public_bytes_raw()
    assert (public.hex(), key_id(public)) == (vector["public_key"], vector["key_id"])


@pytest.mark.parametrize("vector", VECTORS["statements"], ids=lambda vector: vector["digest"][:8])
def test_statements_parse_to_themselves_and_are_signed_by_both_keys(vector: dict[str, Any]) -> None:
    data = vector["statement"].encode()
    statement = parse(data)
    assert statement.to_bytes() == data
    assert statement.digest() == vector["digest"]
    signatures = [(one["key_id"], bytes.fromhex(one["signature"])) for one in vector["signatures"]]
    keys = [bytes.fromhex(key["public_key"]) for key in VECTORS["keys"]]
    assert len(require_threshold(data, signatures, keys, 2)) == 2


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["why"])
def test_every_other_spelling_is_refused(vector: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(vector["statement"].encode())


def test_a_binary_is_signed_over_the_hex_of_its_digest() -> None:
    vector = VECTORS["binary_signature"]
    key = next(key for key in VECTORS["keys"] if key["key_id"] == vector["key_id"])
    message, signature = vector["message"].encode(), bytes.fromhex(vector["signature"])
    assert verify(bytes.fromhex(key["public_key"]), signature, message)
    assert not verify(bytes.fromhex(key["public_key"]), signature, bytes.fromhex(vector["message"]))
