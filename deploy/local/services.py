"""The services as processes: one table, in the order they start."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from deploy.local.credentials import S3Credentials
from deploy.local.errors import StackError
from deploy.local.settings import GATEWAYS_HEALTH, Settings
from deploy.local.specs import GrpcProbe, HttpProbe, Spec


@dataclass(frozen=True, slots=True)
class Service:
    """A process of ours. `stage`: what it needs at start is in the stages before."""

    name: str
    module: str
    stage: int


SERVICES = (
    Service("registry", "services.registry", 1),
    Service("pki", "services.pki", 1),
    Service("artifacts", "services.artifacts", 2),
    Service("releases", "services.releases", 2),
    Service("rollout", "services.rollout", 2),
    Service("webhooks", "services.webhooks", 2),
    Service("worker", "services.rollout.worker", 3),
    Service("gateway", "services.gateway", 3),
)

SINGLE = ("worker", "gateway")
"""They hold no log of their own, and stay one process each here."""
_PORTS = ("INTERNAL", "PUBLIC")


def service_environment(settings: Settings, credentials: S3Credentials) -> dict[str, str]:
    """What a service, and the commands run beside it, find in the environment."""
    return {
        **os.environ,
        **settings.environment,
        "GROUNDSWELL_S3_ACCESS_KEY": credentials.access_key,
        "GROUNDSWELL_S3_SECRET_KEY": credentials.secret_key,
        "PYTHONUNBUFFERED": "1",
    }


def service_specs(settings: Settings, credentials: S3Credentials) -> tuple[Spec, ...]:
    """Every service of the table, the gateway as often as is wanted."""
    environment = service_environment(settings, credentials)
    specs = [
        _spec(service, settings, environment, replica)
        for service in SERVICES
        for replica in range(1 if service.name in SINGLE else settings.replicas)
    ]
    return (*specs, *(_next_gateway(number, settings, environment) for number in range(2, settings.gateways + 1)))


def _next_gateway(number: int, settings: Settings, environment: dict[str, str]) -> Spec:
    """One more gateway on the same device port: the kernel shares connections out.

    It has an id, and so a signing key, and a health port of its own.
    """
    health = settings.address(GATEWAYS_HEALTH + number)
    own = {"GROUNDSWELL_GATEWAY_ID": f"local-{number}", "GROUNDSWELL_GATEWAY_HEALTH": health}
    return Spec(
        name=f"gateway-{number}",
        argv=(sys.executable, "-m", "services.gateway"),
        cwd=str(settings.root),
        env=environment | own,
        ports=(int(health.rpartition(":")[2]),),
        stage=3,
        probe=HttpProbe(f"http://{health}/healthz"),
    )


def process_name(service: str, replica: int) -> str:
    """What a replica is called in `status`, in its log and in its pid file; the first has its service's own name."""
    return service if replica == 0 else f"{service}-{replica + 1}"


def _spec(service: Service, settings: Settings, environment: dict[str, str], replica: int) -> Spec:
    probe: GrpcProbe | HttpProbe
    if service.name in ("gateway", "worker"):
        health = environment[f"GROUNDSWELL_{service.name.upper()}_HEALTH"]
        addresses = [health]
        probe = HttpProbe(f"http://{health}/healthz")
        if service.name == "gateway":
            addresses.append(environment["GROUNDSWELL_GATEWAY_LISTEN"])
    else:
        listed = [environment[f"GROUNDSWELL_{service.name.upper()}_{port}"].split(",") for port in _PORTS]
        if any(len(each) != settings.replicas for each in listed):
            raise StackError(
                f"GROUNDSWELL_REPLICAS={settings.replicas}, but the addresses given for {service.name} are not as many"
            )
        addresses = [each[replica].strip() for each in listed]
        probe = GrpcProbe(addresses[0], str(settings.tls_dir), service.name)
    return Spec(
        name=process_name(service.name, replica),
        argv=(sys.executable, "-m", service.module),
        cwd=str(settings.root),
        env=environment | {"GROUNDSWELL_REPLICA": str(replica)},
        ports=tuple(int(address.rpartition(":")[2]) for address in addresses),
        stage=service.stage,
        probe=probe,
    )
