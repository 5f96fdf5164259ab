"""What a device must know of its own certificate, read without a certificate library: a walk over a few DER fields.

Nothing here is a check: whether a certificate is any good is judged by who is shown it. A device only wants to know
when to ask for the next one.
"""

from __future__ import annotations

import calendar
import hashlib
import ssl
import time
from dataclasses import dataclass
from pathlib import Path

from clients.device.errors import ConfigError

_SEQUENCE, _UTC_TIME, _GENERALIZED_TIME, _VERSION = 0x30, 0x17, 0x18, 0xA0
_COMMON_NAME = b"\x06\x03\x55\x04\x03"
RENEW_AFTER = 2 / 3
JITTER = 1 / 12
"""Of a certificate's life: a fleet that was made in one hour does not renew in one hour."""
_END = "-----END CERTIFICATE-----"


@dataclass(frozen=True, slots=True)
class Life:
    """Of a certificate: its name, and its validity in seconds since the epoch."""

    common_name: str
    not_before: float
    not_after: float

    def renew_at(self) -> float:
        """When to ask for the next one: after two thirds, and a part that the device's name decides."""
        life = self.not_after - self.not_before
        share = int.from_bytes(hashlib.sha256(self.common_name.encode()).digest()[:8], "big") / 2**64
        return self.not_before + life * (RENEW_AFTER + JITTER * share)


def read_life(path: Path) -> Life:
    """Of the first certificate of a PEM file."""
    try:
        pem = path.read_text(encoding="ascii", errors="replace")
        der = ssl.PEM_cert_to_DER_cert(pem[pem.index("-----BEGIN CERTIFICATE-----") : pem.index(_END) + len(_END)])
        return life_of(der)
    except (OSError, ValueError, IndexError) as error:
        raise ConfigError("TLS_FILES", f"{path.name} holds no readable certificate: {error}") from error


def life_of(der: bytes) -> Life:
    """Raises ValueError or IndexError for what is no certificate."""
    at, _ = _enter(der, 0, _SEQUENCE)  # Certificate
    at, _ = _enter(der, at, _SEQUENCE)  # TBSCertificate
    if der[at] == _VERSION:
        at = _after(der, at)
    for _ in range(3):  # serial, signature algorithm, issuer
        at = _after(der, at)
    inside, validity_end = _enter(der, at, _SEQUENCE)
    not_before, inside = _time(der, inside)
    not_after, _ = _time(der, inside)
    subject, subject_end = _enter(der, validity_end, _SEQUENCE)
    return Life(_common_name(der[subject:subject_end]), not_before, not_after)


def _header(der: bytes, at: int) -> tuple[int, int, int]:
    """(tag, where the content begins, where it ends)."""
    tag, length, begin = der[at], der[at + 1], at + 2
    if length & 0x80:
        count = length & 0x7F
        length = int.from_bytes(der[begin : begin + count], "big")
        begin += count
    if begin + length > len(der):
        raise ValueError("a field is longer than the certificate")
    return tag, begin, begin + length


def _enter(der: bytes, at: int, wanted: int) -> tuple[int, int]:
    tag, begin, end = _header(der, at)
    if tag != wanted:
        raise ValueError(f"tag {tag:#x} where {wanted:#x} belongs")
    return begin, end


def _after(der: bytes, at: int) -> int:
    return _header(der, at)[2]


def _time(der: bytes, at: int) -> tuple[float, int]:
    tag, begin, end = _header(der, at)
    text = der[begin:end].decode("ascii")
    if tag == _UTC_TIME:
        text = ("19" if text[:2] >= "50" else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError(f"tag {tag:#x} where a time belongs")
    return float(calendar.timegm(time.strptime(text, "%Y%m%d%H%M%SZ"))), end


def _common_name(subject: bytes) -> str:
    found = subject.find(_COMMON_NAME)
    if found < 0:
        return ""
    _, begin, end = _header(subject, found + len(_COMMON_NAME))
    return subject[begin:end].decode("utf-8", "replace")
