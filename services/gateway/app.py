"""Composition root of the gateway: followers, publisher, channels, and the device listener."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
import uuid
from typing import Final

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from groundswell.pki.v1 import pki_pb2_grpc
from groundswell.registry.v1 import registry_pb2, registry_pb2_grpc
from groundswell.rollout.v1 import rollout_pb2_grpc
from redis.asyncio import Redis

from libs.blobs import BlobStore
from libs.blobs.s3 import S3BlobStore
from libs.checkins import CheckInSigner
from libs.checkins.producer import KafkaCheckInProducer, checkin_topic
from libs.eventlog import Deadline
from libs.eventlog.kafka import KafkaLog
from libs.keystore import DirectoryKeyStore, KeyStore
from libs.rpc import channel, retry_unavailable
from libs.rpc.access import PLATFORM
from libs.rpc.certificates import CertificateFiles
from libs.seal import accepted_keys
from libs.settings import Settings
from services.gateway import malformed
from services.gateway.checkin import CheckInHandler
from services.gateway.claims import ClosedPlans, claims, switches
from services.gateway.connection import IDLE_S, STOP_S, Listener
from services.gateway.directory import DeviceDirectory
from services.gateway.http import DeviceApi
from services.gateway.identity import DeviceTls, HandshakeFailures
from services.gateway.malformed import MalformedRequests
from services.gateway.publisher import CheckInPublisher
from services.gateway.views import GatewayViews

log = logging.getLogger(__name__)

CERTIFICATE_LOOK_S = 2.0
"""How often the gateway looks whether its own certificate was replaced."""
START_S = 60.0
"""Longest wait for the views to be caught up; a supervisor then starts the process anew."""


HANDSHAKE_S: Final = 10.0
"""A TLS handshake that takes longer is given up."""
REDIS_S: Final = 0.5
"""Longest wait for Redis: the owners can be asked too."""


class Gateway:
    """Everything of one gateway process; see :func:`build`."""

    def __init__(self, settings: Settings, keystore: KeyStore, blobs: BlobStore) -> None:
        self._settings = settings
        self._keystore = keystore
        self._blobs = blobs
        self._log = KafkaLog(settings.kafka)
        self._name = f"organizations/{PLATFORM}/gateways/{settings.gateway_id}"
        self._failures = HandshakeFailures()
        certificate, key = (str(settings.tls_dir / f"gateway.{kind}") for kind in ("pem", "key"))
        self._tls = DeviceTls(certificate, key, settings.gateway_domain, self._failures)
        self._files = CertificateFiles(settings, "gateway")
        self._files.read()
        self._closed = ClosedPlans()
        self._channels = {
            service: channel(settings, service, identity="gateway") for service in ("registry", "pki", "rollout")
        }
        self._directory = DeviceDirectory(
            self._log,
            Redis.from_url(settings.redis, socket_timeout=REDIS_S, socket_connect_timeout=REDIS_S),
            settings.env,
            settings.partitions,
            settings.gateway_cache,
            registry_pb2_grpc.RegistryInternalServiceStub(self._channels["registry"]).LookupDevice,
            pki_pb2_grpc.PkiInternalServiceStub(self._channels["pki"]).LookupDeviceCertificate,
        )
        self._views = GatewayViews(
            self._log,
            settings.env,
            settings.partitions,
            self._tls.set_anchors,
            self._closed.reopen,
            self._directory.devices,
            self._directory.certificates,
        )
        self._producer = KafkaCheckInProducer(settings.kafka, checkin_topic(settings.env))
        self._publisher: CheckInPublisher | None = None
        self._heartbeats: asyncio.Task[None] | None = None
        self._renewals: asyncio.Task[None] | None = None
        self._runners: list[web.AppRunner] = []
        self._server: asyncio.Server | None = None
        self._listener: Listener | None = None
        self._malformed = MalformedRequests()
        self._listening = False

    async def start(self) -> None:
        """Health first, then views, enrolment, publisher, and last the device listener."""
        health, address = await self._runner(self._health_app()), self._settings.gateway_health.rpartition(":")
        await web.TCPSite(health, address[0], int(address[2])).start()
        for follower in self._views.followers.values():
            await follower.start()
        signing_key = self._signing_key()
        await self._enrol(signing_key)
        deadline = Deadline.after(START_S)
        for follower in self._views.followers.values():
            await follower.caught_up(deadline)
        await self._directory.start(self._views.followers)
        await self._producer.start()
        signer = CheckInSigner(
            signing_key, self._name, str(uuid.uuid4()), self._producer.topic, self._views.gateway_seq(self._name) or 0
        )
        publisher = CheckInPublisher(self._producer, lambda: signer, self._name, self._settings.partitions)
        self._publisher = publisher
        self._heartbeats = asyncio.create_task(publisher.heartbeats(), name="heartbeats")
        await self._listen(self._api(publisher))
        self._renewals = asyncio.create_task(self._renew_certificate(), name="certificate")
        self._listening = True
        log.info("listening: %s as %s", self._settings.gateway_listen, self._name)

    def _api(self, publisher: CheckInPublisher) -> DeviceApi:
        rollout = rollout_pb2_grpc.RolloutInternalServiceStub(self._channels["rollout"])
        pki = pki_pb2_grpc.PkiInternalServiceStub(self._channels["pki"])
        handler = CheckInHandler(
            self._views,
            claims(rollout.ClaimOffers, self._name),
            self._closed,
            switches(rollout.BatchAuthorizeSwitch),
            publisher,
        )
        return DeviceApi(
            self._views,
            handler,
            pki.AdmitCertificate,
            pki.IssueCertificate,
            self._directory,
            self._blobs.presign_get,
            lambda: accepted_keys(self._keystore, time.time_ns() // 1_000_000),
        )

    async def _renew_certificate(self) -> None:
        while True:
            await asyncio.sleep(CERTIFICATE_LOOK_S)
            if self._files.changed() is not None:
                try:
                    self._tls.renew()
                except (OSError, ssl.SSLError):
                    log.exception("the new certificate cannot be used: going on with the old one")

    def _signing_key(self) -> Ed25519PrivateKey:
        seed = self._keystore.get_or_create(
            f"gateway-{self._settings.gateway_id}", lambda: Ed25519PrivateKey.generate().private_bytes_raw()
        )
        return Ed25519PrivateKey.from_private_bytes(seed)

    async def _enrol(self, key: Ed25519PrivateKey) -> None:
        registry = registry_pb2_grpc.RegistryInternalServiceStub(self._channels["registry"])
        request = registry_pb2.CreateGatewayRequest(
            parent=f"organizations/{PLATFORM}",
            gateway_id=self._settings.gateway_id,
            gateway=registry_pb2.Gateway(public_key=key.public_key().public_bytes_raw()),
        )
        await retry_unavailable(lambda: registry.EnrolGateway(request), attempts=8)

    async def _runner(self, app: web.Application) -> web.AppRunner:
        # An idle connection is kept for longer than a usual poll interval; a head that takes longer is given up too.
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=STOP_S, keepalive_timeout=IDLE_S)
        await runner.setup()
        self._runners.append(runner)
        return runner

    async def _listen(self, api: DeviceApi) -> None:
        logging.getLogger(malformed.LOGGER).addFilter(self._malformed)
        server = (await self._runner(api.application())).server
        if server is None:
            raise RuntimeError("aiohttp made no server")
        self._listener = Listener(api, server, self._settings.gateway_connections)
        host, _, port = self._settings.gateway_listen.rpartition(":")
        # Several gateways may share the port: the kernel deals connections out among them.
        self._server = await asyncio.get_running_loop().create_server(
            self._listener,
            host,
            int(port),
            ssl=self._tls.context,
            backlog=1024,
            reuse_port=True,
            ssl_handshake_timeout=HANDSHAKE_S,
        )

    def _health_app(self) -> web.Application:
        async def health(_: web.Request) -> web.Response:
            lags = {name: round(one.lag_s(), 2) for name, one in self._views.followers.items() if one.live}
            healthy = self._listening and len(lags) == len(self._views.followers)
            body = {
                "status": "serving" if healthy else "not serving",
                "lag_s": {name: (lag if lag < 1e9 else None) for name, lag in lags.items()},
                "views": self._views.summary(),
                "devices": self._directory.summary(),
                "connections_cut": self._listener.cut if self._listener is not None else 0,
                "malformed_requests": self._malformed.count,
                "handshake_failures": {str(code): count for code, count in self._failures.counts.items()},
                "unacknowledged_records": self._publisher.failures if self._publisher is not None else 0,
                "dropped_items": self._publisher.dropped if self._publisher is not None else 0,
            }
            return web.json_response(body, status=200 if healthy else 503)

        app = web.Application()
        app.router.add_get("/healthz", health)
        return app

    def live(self) -> bool:
        """False when a follower or the heartbeats have ended."""
        ended = [f"the view of {name}" for name, follower in self._views.followers.items() if not follower.live]
        if self._heartbeats is None or self._heartbeats.done():
            ended.append("the heartbeats")
        if ended:
            log.error("not live: %s ended", ", ".join(ended))
        return not ended

    async def stop(self) -> None:
        """Stop intake, answer what was asked, publish what is open, leave."""
        if self._server is not None:
            self._server.close()
        if self._listener is not None:
            await self._listener.stop()
        for runner in reversed(self._runners):
            await runner.cleanup()
        for running in (self._heartbeats, self._renewals):
            if running is not None:
                running.cancel()
        if self._publisher is not None:
            await self._publisher.drain()
        await self._directory.stop()
        for follower in self._views.followers.values():
            await follower.stop()
        await self._producer.stop()
        for open_channel in self._channels.values():
            await open_channel.close()
        await self._log.close()


async def build(settings: Settings) -> Gateway:
    """The gateway, ready to start."""
    return Gateway(settings, DirectoryKeyStore(settings.keystore_dir), S3BlobStore.from_settings(settings))
