"""Ships one file to a cohort and watches it arrive: upload, bundle, signature, rollout.

    python examples/ship_release.py organizations/acme/products/thermostat firmware.bin 1.2.0 release.pem canary beta

The private key stays on this machine; the server gets its public half and the signature. Run it again after any
interruption: every step finds what is there already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from google.protobuf.duration_pb2 import Duration
from groundswell.artifacts.v1 import artifacts_pb2
from groundswell.rollout.v1 import rollout_pb2

from clients.sdk import ApiError, Client
from clients.sdk.signing import generate_key, load_key, public_bytes, sign_bundle, sign_digest
from clients.sdk.upload import Upload, upload_binary

Created = TypeVar("Created")
Rollout = rollout_pb2.Rollout
METADATA = '{"role": "program"}'
"""What the reference agent wants to know of a binary: that it is the program to start."""
ENDED = (Rollout.STATE_COMPLETED, Rollout.STATE_ABORTED, Rollout.STATE_ROLLED_BACK)


def existing(create: Callable[[], Created], read: Callable[[], Created]) -> Created:
    """What is created, or what an earlier run created."""
    try:
        return create()
    except ApiError as error:
        if error.reason != "ALREADY_EXISTS":
            raise
        return read()


def signed_bundle(client: Client, product: str, file: Path, version: str, key_file: Path) -> artifacts_pb2.Bundle:
    """A bundle of that one file, signed by the key."""
    key = load_key(key_file) if key_file.exists() else generate_key(key_file)
    artifacts = client.artifacts
    existing(
        lambda: artifacts.CreateSigningKey(
            artifacts_pb2.CreateSigningKeyRequest(
                parent=product,
                signing_key_id="release",
                signing_key=artifacts_pb2.SigningKey(public_key=public_bytes(key)),
            )
        ),
        lambda: artifacts.GetSigningKey(artifacts_pb2.GetSigningKeyRequest(name=f"{product}/signingKeys/release")),
    )
    upload = Upload(file, f"{product}/artifacts/firmware", version, "portable", metadata=METADATA)
    binary = upload_binary(client, upload)
    if binary.state != artifacts_pb2.Binary.STATE_SIGNED:
        artifacts.SignBinary(
            artifacts_pb2.SignBinaryRequest(name=binary.name, signature=sign_digest(key, binary.sha256))
        )
    bundle_id = f"fw-{version.replace('.', '-')}"
    bundle = existing(
        lambda: artifacts.CreateBundle(
            artifacts_pb2.CreateBundleRequest(
                parent=product,
                bundle_id=bundle_id,
                version=version,
                security_version=1,
                entries=[artifacts_pb2.BundleEntrySpec(binary=binary.name)],
            )
        ),
        lambda: artifacts.GetBundle(artifacts_pb2.GetBundleRequest(name=f"{product}/bundles/{bundle_id}")),
    )
    if not bundle.offerable:
        bundle = artifacts.SignBundle(
            artifacts_pb2.SignBundleRequest(name=bundle.name, signature=sign_bundle(key, bundle))
        )
    return bundle


def started_rollout(
    client: Client, product: str, bundle: artifacts_pb2.Bundle, cohorts: Sequence[str]
) -> rollout_pb2.Rollout:
    """One stage a cohort; each passes when a device has confirmed and held for five seconds."""
    rollout_id = f"to-{bundle.version.replace('.', '-')}"
    stages = [
        rollout_pb2.Stage(
            display_name=cohort,
            cohort=f"{product}/cohorts/{cohort}",
            max_in_flight=10,
            gate=rollout_pb2.Gate(min_sample=1, soak=Duration(seconds=5)),
        )
        for cohort in cohorts
    ]
    created = existing(
        lambda: client.rollout.CreateRollout(
            rollout_pb2.CreateRolloutRequest(
                parent=product, rollout_id=rollout_id, rollout=Rollout(bundle=bundle.name, stages=stages)
            )
        ),
        lambda: client.rollout.GetRollout(rollout_pb2.GetRolloutRequest(name=f"{product}/rollouts/{rollout_id}")),
    )
    if created.state == Rollout.STATE_DRAFT:
        created = client.rollout.StartRollout(rollout_pb2.StartRolloutRequest(name=created.name))
    return created


def main(arguments: Sequence[str]) -> int:
    """Exit status 0 when the rollout completed."""
    product, file, version, key_file, *cohorts = arguments
    with Client.from_profile() as client:
        bundle = signed_bundle(client, product, Path(file), version, Path(key_file))
        print(f"{bundle.name} is signed, digest {bundle.digest}")
        rollout = started_rollout(client, product, bundle, cohorts)
        for seen in client.stream(client.rollout.WatchRollout, rollout_pb2.WatchRolloutRequest(name=rollout.name)):
            stages = ", ".join(
                f"{stage.display_name} {status.confirmed} confirmed, {status.in_flight} in flight"
                for stage, status in zip(seen.rollout.stages, seen.rollout.stage_statuses, strict=True)
            )
            print(f"{Rollout.State.Name(seen.rollout.state)}: {stages}", flush=True)
            if seen.rollout.state in ENDED:
                return 0 if seen.rollout.state == Rollout.STATE_COMPLETED else 1
    return 1


if __name__ == "__main__":
    if len(sys.argv) < 6:
        sys.exit("usage: ship_release.py PRODUCT FILE VERSION KEY_FILE COHORT...")
    sys.exit(main(sys.argv[1:]))
