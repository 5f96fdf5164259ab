"""What a supervised process is: how to start it, and how it says that it is ready.

Plain data, because two processes need it: `up`, which decides it, and the detached supervisor, which reads it from a
file and so needs no knowledge of Kafka or of any service.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import grpc
import msgspec
import urllib3
from aiokafka.admin import AIOKafkaAdminClient
from grpc_health.v1 import health_pb2
from minio import Minio
from redis.asyncio import Redis

_PROBE_SECONDS = 3.0


class KafkaProbe(msgspec.Struct, frozen=True, tag="kafka"):
    """Ready when the broker answers a metadata request."""

    bootstrap: str

    async def check(self) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=self.bootstrap, request_timeout_ms=2000)
        try:
            await admin.start()
            cluster = await admin.describe_cluster()
            if not cluster["brokers"]:
                raise ConnectionError("no broker registered yet")
        finally:
            await admin.close()


class RedisProbe(msgspec.Struct, frozen=True, tag="redis"):
    """Ready when PING is answered (a Redis that is still loading answers with an error)."""

    url: str

    async def check(self) -> None:
        client: Redis = Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2)
        try:
            await client.ping()
        finally:
            await client.aclose()


class S3Probe(msgspec.Struct, frozen=True, tag="s3"):
    """Ready when a signed HEAD of the bucket is answered, be it with "not there"."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str

    async def check(self) -> None:
        await asyncio.to_thread(s3_client(self.endpoint, self.access_key, self.secret_key).bucket_exists, self.bucket)


class GrpcProbe(msgspec.Struct, frozen=True, tag="grpc"):
    """Ready when the health service says SERVING, over mutual TLS with the service's own certificate."""

    target: str
    tls_dir: str
    identity: str

    async def check(self) -> None:
        folder = Path(self.tls_dir)
        credentials = grpc.ssl_channel_credentials(
            root_certificates=(folder / "ca.pem").read_bytes(),
            private_key=(folder / f"{self.identity}.key").read_bytes(),
            certificate_chain=(folder / f"{self.identity}.pem").read_bytes(),
        )
        async with grpc.aio.secure_channel(self.target, credentials) as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
                response_deserializer=health_pb2.HealthCheckResponse.FromString,
            )
            answer = await check(health_pb2.HealthCheckRequest(), timeout=2)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            raise ConnectionError(f"health says {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


class HttpProbe(msgspec.Struct, frozen=True, tag="http"):
    """Ready when the page answers 200."""

    url: str

    async def check(self) -> None:
        timeout = aiohttp.ClientTimeout(total=2)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(self.url) as response:
            if response.status != 200:
                raise ConnectionError(f"{self.url} answers {response.status}")


Probe = KafkaProbe | RedisProbe | S3Probe | GrpcProbe | HttpProbe


class Spec(msgspec.Struct, frozen=True):
    """One process. A stage starts when every process of the stages before it is ready."""

    name: str
    argv: tuple[str, ...]
    cwd: str
    env: dict[str, str]
    ports: tuple[int, ...]
    stage: int
    probe: Probe


async def is_ready(probe: Probe) -> str:
    """Empty when ready, else what the probe met, in a few words."""
    try:
        async with asyncio.timeout(_PROBE_SECONDS):
            await probe.check()
    except Exception as error:  # noqa: BLE001 - any failure at all means "not yet"
        text = str(error).strip() or type(error).__name__
        return text.splitlines()[0][:200]
    return ""


def s3_client(endpoint: str, access_key: str, secret_key: str) -> Minio:
    """A client that answers at once instead of retrying for minutes: the callers here wait on their own terms."""
    scheme, _, host = endpoint.rpartition("://")
    return Minio(
        host,
        access_key=access_key,
        secret_key=secret_key,
        secure=scheme == "https",
        region="us-east-1",
        http_client=urllib3.PoolManager(timeout=urllib3.Timeout(connect=2, read=5), retries=False),
    )
