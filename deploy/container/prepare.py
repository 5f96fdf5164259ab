"""`python -m deploy.container.prepare`: the one deploy step of an installation in containers; safe to repeat.

Makes what is missing in the shared state folder (internal CA and certificates, key-encryption key, bootstrap secret),
waits for Kafka, Redis and S3, and creates topics and bucket. Services start after it has ended well.
"""

from __future__ import annotations

import contextlib
import os
import sys

from deploy.local import control
from deploy.local.credentials import ensure_all
from deploy.local.errors import StackError
from deploy.local.settings import load

SERVERS = ("GROUNDSWELL_KAFKA", "GROUNDSWELL_REDIS", "GROUNDSWELL_S3_ENDPOINT")
MADE_HERE = ("GROUNDSWELL_TLS_DIR", "GROUNDSWELL_KEYSTORE_DIR")
WITHIN_S = 120.0


def main() -> int:
    """Exit status 0 when the services can start."""
    missing = [name for name in SERVERS if not os.environ.get(name)]
    if missing:
        print(f"groundswell: set {', '.join(missing)}: this step starts no servers", file=sys.stderr)
        return 1
    try:
        # Certificates and keys are made here, so their folders are the state folder's own and not somebody else's.
        given = {name: value for name, value in os.environ.items() if name not in MADE_HERE}
        settings = load(given)
        credentials = ensure_all(settings)
        control.await_external(settings, credentials, within=WITHIN_S)
        control.create_topics_and_bucket(settings, credentials)
    except StackError as error:
        print(f"groundswell: {error.line}", file=sys.stderr)
        return 1
    print("prepared: certificates, keys, topics, bucket")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
