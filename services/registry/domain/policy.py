"""Rules of a product's configuration policy. The registry keeps and checks them; the other services enforce them."""

from __future__ import annotations

from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from google.protobuf.duration_pb2 import Duration
from groundswell.registry.v1 import registry_pb2 as pb

from services.registry.domain.rules import invalid

PRODUCT_FIELDS: Final = (
    "display_name",
    "policy",
    "policy.poll_interval",
    "policy.poll_jitter",
    "policy.allow_development_ca",
    "policy.required_signatures",
    "policy.required_binary_signatures",
    "policy.default_failure_action",
    "policy.maintenance_window",
    "policy.certificate_policy",
    "policy.automatic_quarantine",
)
DEFAULT_POLL_S: Final = 60
DAY_MS: Final = 24 * 3600 * 1000
POLL_MOST_MS: Final = 7 * DAY_MS
POLL_LEAST_MS: Final = 100
SIGNATURES_MOST: Final = 16
WINDOW_LEAST_MS: Final = 15 * 60 * 1000
VALIDITY_MOST_MS: Final = 400 * DAY_MS
FAILURES_MOST: Final = 100
"""Also bounds how many times of failures are kept for a device."""
BURST_WINDOW_LEAST_MS: Final = 1_000
BURST_WINDOW_MOST_MS: Final = 30 * DAY_MS
BLOCK_LEAST_MS: Final = 1_000
BLOCK_MOST_MS: Final = 365 * DAY_MS


def clean_policy(policy: pb.ConfigurationPolicy) -> None:
    """Fill defaults and check, in place on the caller's own copy: after-images say what holds."""
    if not policy.HasField("poll_interval"):
        policy.poll_interval.FromSeconds(DEFAULT_POLL_S)
    _check_span("poll_interval", policy.poll_interval, POLL_LEAST_MS, POLL_MOST_MS, "0.1 s and 7 days")
    if policy.HasField("poll_jitter"):
        _check_span("poll_jitter", policy.poll_jitter, 0, POLL_MOST_MS, "0 and 7 days")
    for field in ("required_signatures", "required_binary_signatures"):
        if getattr(policy, field) > SIGNATURES_MOST:
            raise invalid(f"product.policy.{field}", f"must be at most {SIGNATURES_MOST}")
    if policy.default_failure_action not in pb.DefaultFailureAction.values():
        raise invalid("product.policy.default_failure_action", "is not one of the actions known here")
    if policy.HasField("maintenance_window"):
        _check_window(policy.maintenance_window)
    if policy.HasField("certificate_policy"):
        _check_certificates(policy.certificate_policy)
    if policy.HasField("automatic_quarantine"):
        _check_quarantine(policy.automatic_quarantine)


def _check_window(window: pb.MaintenanceWindow) -> None:
    field = "maintenance_window"
    if window.time_zone and not is_time_zone(window.time_zone):
        raise invalid(
            f"product.policy.{field}.time_zone",
            "must be an IANA time zone such as 'Europe/Vienna'",
            value=window.time_zone[:64],
        )
    if window.start_minute >= 24 * 60:
        raise invalid(f"product.policy.{field}.start_minute", "must be between 0 and 1439")
    if not window.HasField("length"):
        raise invalid(f"product.policy.{field}.length", "is required: 15 minutes to 24 hours")
    _check_span(f"{field}.length", window.length, WINDOW_LEAST_MS, DAY_MS, "15 minutes and 24 hours")
    days = sorted(window.weekdays)
    if len(set(days)) != len(days) or any(not 1 <= day <= 7 for day in days):
        raise invalid(f"product.policy.{field}.weekdays", "must be distinct numbers, 1 (Monday) to 7 (Sunday)")
    del window.weekdays[:]
    window.weekdays.extend(days)


def is_time_zone(name: str) -> bool:
    """Whether the zone database knows it. A name is a key, never a path."""
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


def _check_certificates(certificates: pb.CertificatePolicy) -> None:
    field = "certificate_policy"
    if certificates.expired_leaf not in pb.CertificatePolicy.ExpiredLeaf.values():
        raise invalid(f"product.policy.{field}.expired_leaf", "is not one of the choices known here")
    if certificates.HasField("validity"):
        _check_span(f"{field}.validity", certificates.validity, DAY_MS, VALIDITY_MOST_MS, "1 and 400 days")
    if certificates.HasField("expiring_soon"):
        _check_span(f"{field}.expiring_soon", certificates.expiring_soon, 0, VALIDITY_MOST_MS, "0 and 400 days")
        validity = certificates.validity.ToMilliseconds() if certificates.HasField("validity") else 365 * DAY_MS
        if certificates.expiring_soon.ToMilliseconds() >= validity:
            raise invalid(f"product.policy.{field}.expiring_soon", "must be shorter than the validity")


def _check_quarantine(quarantine: pb.AutomaticQuarantine) -> None:
    field = "automatic_quarantine"
    for limit in ("failures", "burst"):
        if getattr(quarantine, limit) > FAILURES_MOST:
            raise invalid(f"product.policy.{field}.{limit}", f"must be at most {FAILURES_MOST}")
    if not quarantine.failures and not quarantine.burst:
        raise invalid(f"product.policy.{field}", "needs a limit: failures, or burst within a window")
    if bool(quarantine.burst) != quarantine.HasField("window"):
        raise invalid(f"product.policy.{field}.window", "and burst are given together")
    if quarantine.HasField("window"):
        _check_span(
            f"{field}.window", quarantine.window, BURST_WINDOW_LEAST_MS, BURST_WINDOW_MOST_MS, "1 s and 30 days"
        )
    if quarantine.HasField("block_for"):
        _check_span(f"{field}.block_for", quarantine.block_for, BLOCK_LEAST_MS, BLOCK_MOST_MS, "1 s and 365 days")


def _check_span(field: str, span: Duration, least_ms: int, most_ms: int, words: str) -> None:
    if not least_ms <= span.ToMilliseconds() <= most_ms:
        raise invalid(f"product.policy.{field}", f"must be between {words}")
