"""What runs where: devices of a product by cohort and version, as JSON.

    python examples/fleet_report.py organizations/acme/products/thermostat [FILTER]

A filter is a subset of AIP-160, such as `cohort = "…/cohorts/beta" AND quarantined = false`.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

from groundswell.registry.v1 import registry_pb2

from clients.sdk import Client


def report(devices: Iterable[registry_pb2.Device]) -> dict[str, dict[str, int]]:
    """Cohort (its last segment) to version to count."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for device in devices:
        counts[device.cohort.rpartition("/")[2] or "(none)"][device.reported.version or "(unknown)"] += 1
    return {cohort: dict(sorted(versions.items())) for cohort, versions in sorted(counts.items())}


def main(arguments: Sequence[str]) -> int:
    """Print the report."""
    request = registry_pb2.ListDevicesRequest(parent=arguments[0], filter=arguments[1] if len(arguments) > 1 else "")
    with Client.from_profile() as client:
        print(json.dumps(report(client.pages(client.registry.ListDevices, request, "devices")), indent=1))
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: fleet_report.py PRODUCT [FILTER]")
    sys.exit(main(sys.argv[1:]))
