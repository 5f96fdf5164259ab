"""Renewal of the device's certificate: when, by which steps, and with which identity a check-in is sent.

At two thirds of its certificate's life and a part that its name decides, the agent makes a new key, asks for a
certificate over the old identity (EST simplereenroll), and sends its next check-in with the new one: the answer
confirms it. Whatever happens between two steps, :mod:`clients.device.identity` says what counts. The time is the
gateway's, from its last answer: a device's own clock may say 1970.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from clients.agent.failpoints import FailPoints
from clients.agent.log import Log
from clients.device.api import DeviceApi
from clients.device.certificate import Life, read_life
from clients.device.errors import ConfigError, DeviceError, ServerError, StateError, TransportError
from clients.device.identity import REQUEST, Files, IdentityStore
from clients.device.model import Answer

_TOOL_S: Final = 60.0
_BACKOFF_S: Final = (30.0, 3600.0)
_REFUSED: Final = frozenset(
    {"CERTIFICATE_LAPSED", "CERTIFICATE_REVOKED", "CERTIFICATE_SUPERSEDED", "CERTIFICATE_EXPIRED", "CA_UNKNOWN"}
)
"""The server will never take this certificate."""
_random = random.SystemRandom()


class Renewal:
    """The identity that check-ins are sent with."""

    def __init__(self, store: IdentityStore, api: DeviceApi, log: Log, fail: FailPoints) -> None:
        self._store = store
        self._api = api
        self._log = log
        self._fail = fail
        self._life: tuple[Path, Life] | None = None
        self._expired = False
        self._not_before = 0.0
        self._failures = 0

    def send(self, check_in: Callable[[], Answer]) -> Answer:
        """Send with the next identity when there is one, else with the one in use. Raises what the sending raises."""
        following = self._store.following
        if following is None:
            return self._with_current(check_in)
        try:
            self._use(following)
            answer = check_in()
        except (ServerError, ConfigError) as error:
            if isinstance(error, ServerError) and error.reason not in _REFUSED:
                raise
            self._log("renewal-refused", reason=error.reason, message=error.message)
            self._store.drop()
            return self._with_current(check_in)
        except TransportError:
            # Perhaps no gateway knows the new CA yet. The old identity says the same thing meanwhile.
            return self._with_current(check_in)
        self._fail.reached("renewal-confirmed")
        self._store.confirmed()
        self._expired = False
        self._log("renewal-confirmed")
        return answer

    def _with_current(self, check_in: Callable[[], Answer]) -> Answer:
        self._use(self._store.current)
        try:
            answer = check_in()
        except ServerError as error:
            if error.reason == "CERTIFICATE_SUPERSEDED" and self._store.following is not None:
                # The answer that confirmed the next one was lost.
                self._store.confirmed()
                self._log("renewal-confirmed")
            self._expired = error.reason == "CERTIFICATE_EXPIRED"
            raise
        self._expired = False
        return answer

    def renew_when_due(self, server_time: float | None) -> bool:
        """Get the next certificate when it is time. True when there is one to be used at once."""
        if self._store.following is not None or time.monotonic() < self._not_before:
            return False
        due = self._expired or (server_time is not None and server_time >= self._renew_at())
        if not due:
            return False
        try:
            self._renew()
        except (DeviceError, OSError, subprocess.SubprocessError) as error:
            self._put_off(error)
            return False
        self._failures = 0
        return True

    def _renew(self) -> None:
        folder = self._store.announced
        if folder is None:
            folder = self._store.begin()
            _tool(["make", str(folder), str(self._store.current.certificate)])
            self._fail.reached("renewal-key")
            self._store.announce(folder)
            self._store.tidy()
        self._fail.reached("renewal-announced")
        self._use(self._store.current)
        answer = self._api.reenroll((folder / REQUEST).read_bytes())
        self._fail.reached("renewal-answered")
        _tool(["accept", str(folder)], answer)
        self._store.stored()
        self._log("renewal-stored", identity=folder.name)
        self._fail.reached("renewal-stored")

    def _put_off(self, error: Exception) -> None:
        least, most = _BACKOFF_S
        pause = min(most, least * 2.0 ** min(self._failures, 16)) * _random.uniform(0.5, 1.0)
        self._failures += 1
        if isinstance(error, ServerError):
            pause = max(pause, error.retry_after_s or 0.0)
            if error.reason.startswith("CSR_"):
                # This request will never be answered; the next try has a key of its own.
                self._store.drop()
        reason = error.reason if isinstance(error, DeviceError) else type(error).__name__
        self._not_before = time.monotonic() + pause
        self._log("renewal-failed", reason=reason, message=str(error), retry_s=round(pause, 1))

    def _renew_at(self) -> float:
        path = self._store.current.certificate
        if self._life is None or self._life[0] != path:
            self._life = (path, read_life(path))
        return self._life[1].renew_at()

    def _use(self, files: Files) -> None:
        self._api.use(files.certificate, files.key)


def _tool(arguments: list[str], given: bytes = b"") -> None:
    done = subprocess.run(
        [sys.executable, "-m", "clients.agent.keys", *arguments],
        input=given,
        capture_output=True,
        timeout=_TOOL_S,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2][:300]
        raise StateError("RENEWAL_FAILED", f"{arguments[0]}: {said}")
