"""The published vectors of sealed links, which another leader or gateway is built against, say what this code does."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest

from libs import seal as package
from libs.errors import PermissionDeniedError
from libs.seal import DownloadGrant, seal, unseal

VECTORS: Any = json.loads((Path(package.__file__).parent / "vectors.json").read_text())
KEYS = {int(generation): bytes.fromhex(key) for generation, key in VECTORS["keys"].items()}


@pytest.mark.parametrize("vector", VECTORS["seals"], ids=lambda vector: vector["mac"][:8])
def test_seals(vector: dict[str, Any]) -> None:
    grant, generation = DownloadGrant(**vector["grant"]), vector["generation"]
    assert seal(generation, KEYS[generation], grant) == vector["text"]
    assert unseal(KEYS, vector["text"], VECTORS["now_ms"]) == grant


@pytest.mark.parametrize("vector", VECTORS["seals"], ids=lambda vector: vector["mac"][:8])
def test_the_words_of_the_algorithm_hold(vector: dict[str, Any]) -> None:
    """docs/vectors/README.md, followed without this package."""
    said = bytes.fromhex(vector["mac_input"])
    domain = b"groundswell.download-grant.v1\0"
    assert said.startswith(domain)
    mac = hmac.new(KEYS[vector["generation"]], said, hashlib.sha256).digest()[:16]
    assert mac.hex() == vector["mac"]
    text = base64.urlsafe_b64encode(said[len(domain) :] + mac).decode().rstrip("=")
    assert text == vector["text"]


@pytest.mark.parametrize("vector", VECTORS["refused"], ids=lambda vector: vector["why"])
def test_everything_else_is_refused(vector: dict[str, Any]) -> None:
    with pytest.raises(PermissionDeniedError) as refused:
        unseal(KEYS, vector["text"], vector["now_ms"])
    assert refused.value.reason == vector["reason"]
