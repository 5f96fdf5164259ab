"""Completes an offer: the signed statement, the binaries that fit, and a sealed link for each.

Sealing needs a key and the clock, so it happens here and not in the decision. A link lives as long as the attempt may;
a pause, abort or kill ends it earlier, because it carries the control epoch of its plan. The plan of a plain release is
the release itself: its links end when it is disabled.
"""

from __future__ import annotations

from groundswell.rollout.v1 import rollout_pb2

from libs.keystore import KeyStore
from libs.seal import DownloadGrant, generation_at, generation_key, seal
from services.rollout.domain import State


class OfferBuilder:
    """Fills what the decision left open."""

    def __init__(self, keys: KeyStore) -> None:
        self._keys = keys

    def complete(self, offer: rollout_pb2.Offer, state: State, now_ms: int) -> None:
        """Add statement, signatures, binaries and links to the offer of a live attempt."""
        attempt = state.attempts[offer.attempt]
        bundle = state.bundles[attempt.bundle].bundle
        facts = state.devices[attempt.device]
        plan = state.rollouts.get(attempt.rollout) if attempt.rollout else None
        epoch = plan.control.control_epoch if plan is not None else 0
        generation = generation_at(now_ms)
        key = generation_key(self._keys, generation)
        offer.statement = bundle.statement
        offer.signatures.extend(bundle.signatures)
        for entry in bundle.entries:
            if entry.target not in (facts.target, "portable"):
                continue
            grant = DownloadGrant(
                attempt=attempt.name,
                device_uid=facts.uid,
                digest=entry.sha256,
                rollout=attempt.rollout or attempt.release,
                control_epoch=epoch,
                expires_at_ms=now_ms + attempt.policy.max_lease_ms,
            )
            offer.binaries.add(
                digest=entry.sha256,
                size=entry.size,
                target=entry.target,
                metadata=entry.metadata,
                metadata_digest=entry.metadata_sha256,
                link=f"/v1/downloads/{seal(generation, key, grant)}/{entry.sha256}",
            )
