"""What makes an offer trustworthy: pure, and the only source of trust on a device.

The server, its operators' accounts and the network are not believed. An offer counts only if distinct pinned keys
signed its bundle statement at the device's own threshold, the statement is for this product, its security version is
not below the device's floor, and what is offered equals the statement's entries for this hardware, one by one and in
order. Each refusal has its own reason code, which is reported.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clients.device.errors import ArchiveError, ConfigError, RefusedError
from clients.device.model import Binary, Offer
from clients.device.slots import safe_name
from libs.trust.signatures import signers
from libs.trust.statement import Statement, StatementBinary, parse

PORTABLE = "portable"
ROLES = ("program", "config")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Rules:
    """What was pinned into the device when it was made."""

    product: str
    target: str
    trusted_keys: tuple[bytes, ...]
    """Raw Ed25519 public keys."""
    threshold: int
    max_bundle_bytes: int = 1024 * 1024 * 1024

    def __post_init__(self) -> None:
        if any(len(key) != 32 for key in self.trusted_keys):
            raise ConfigError("TRUSTED_KEY_MALFORMED", "a trusted key is not 32 bytes")
        if self.threshold < 1:
            raise ConfigError("THRESHOLD_TOO_LOW", "the threshold must be at least 1")


def verify(rules: Rules, offer: Offer, floor: int) -> Offer:
    """The offer with only the binaries this hardware installs, or a RefusedError."""
    statement = _trusted_statement(rules, offer)
    if statement.product != rules.product:
        raise RefusedError("WRONG_PRODUCT", f"the statement is for {statement.product[:120]}")
    if statement.security_version < floor:
        raise RefusedError(
            "SECURITY_VERSION_TOO_LOW", f"security version {statement.security_version} is below the floor {floor}"
        )
    if (offer.version, offer.security_version) != (statement.version, statement.security_version):
        raise RefusedError("STATEMENT_MISMATCH", "version or security version is not what was signed")
    mine = tuple(one for one in offer.binaries if one.target in {rules.target, PORTABLE})
    signed = tuple(one for one in statement.binaries if one.target in {rules.target, PORTABLE})
    if not signed:
        raise RefusedError("WRONG_TARGET", f"nothing in the bundle is for {rules.target}")
    if [_entry(one) for one in mine] != list(signed):
        raise RefusedError("STATEMENT_MISMATCH", "the binaries are not the ones that were signed, in that order")
    if len({one.digest for one in mine}) != len(mine):
        raise RefusedError("STATEMENT_MISMATCH", "a component comes twice")
    if sum(one.size for one in mine) > rules.max_bundle_bytes:
        raise RefusedError("OFFER_TOO_LARGE", f"the bundle is larger than {rules.max_bundle_bytes} bytes")
    programs = 0
    for one in mine:
        role, _ = role_and_filename(one)
        programs += role == "program"
    if programs == 0 and len(signed) < len(statement.binaries):
        raise RefusedError("WRONG_TARGET", f"the bundle's programs are not for {rules.target}")
    if programs == 0:
        raise RefusedError("METADATA_UNUSABLE", "no binary of the bundle is a program")
    return replace(offer, binaries=mine)


def role_and_filename(binary: Binary) -> tuple[str, str]:
    """How a binary is installed, from its signed metadata: an archive, or one file under ``filename``.

    Metadata ``{"role": "program"}`` (the default) is a tar.gz archive; ``{"role": "config", "filename":
    "config.json"}`` a plain file that lies beside the program. A filename alone means a config.
    """
    try:
        metadata: Any = json.loads(binary.metadata or "{}")
    except ValueError:
        metadata = None
    if not isinstance(metadata, Mapping):
        raise RefusedError("METADATA_UNUSABLE", "the metadata of a binary is not a JSON object")
    filename = metadata.get("filename", "")
    role = metadata.get("role", "config" if filename else "program")
    if role not in ROLES or not isinstance(filename, str):
        raise RefusedError("METADATA_UNUSABLE", "the metadata of a binary names no known role or no usable filename")
    if role == "program":
        return role, ""
    filename = filename or "config.json"
    try:
        if len(safe_name(filename).parts) != 1:
            raise RefusedError("METADATA_UNUSABLE", "a configuration file lies beside the program, not in a folder")
    except ArchiveError as error:
        raise RefusedError("METADATA_UNUSABLE", error.message) from error
    return role, filename


def _trusted_statement(rules: Rules, offer: Offer) -> Statement:
    if not rules.trusted_keys:
        raise RefusedError("TRUST_LIST_EMPTY", "the device trusts no key, so no statement can be believed")
    found = signers(offer.statement, [(one.key_id, one.signature) for one in offer.signatures], rules.trusted_keys)
    if len(found) < rules.threshold:
        raise RefusedError(
            "SIGNATURES_BELOW_THRESHOLD", f"{len(found)} trusted keys have signed where {rules.threshold} must"
        )
    try:
        return parse(offer.statement)
    except ValueError as error:
        raise RefusedError("STATEMENT_MALFORMED", str(error)[:200]) from error


def _entry(binary: Binary) -> StatementBinary:
    if not _DIGEST.fullmatch(binary.digest):
        raise RefusedError("STATEMENT_MISMATCH", "a digest is not lowercase hex SHA-256")
    if hashlib.sha256(binary.metadata.encode()).hexdigest() != binary.metadata_digest:
        raise RefusedError("STATEMENT_MISMATCH", "metadata does not have its digest")
    return StatementBinary(binary.digest, binary.metadata_digest, binary.size, binary.target)
