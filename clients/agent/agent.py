"""The loop around the machine: persist, then act, then tell the machine what came of it.

One thread. While a download runs, check-ins go on between two of its pieces, so the lease is renewed and a
cancellation is heard. Time-outs are measured on the monotonic clock only: a device's wall clock may say 1970.
"""

from __future__ import annotations

import os
import random
import time
import uuid
from collections import deque
from dataclasses import replace
from pathlib import Path

from clients.agent.config import Config
from clients.agent.failpoints import FailPoints
from clients.agent.log import Log
from clients.agent.program import Outcome, call
from clients.agent.renewal import Renewal
from clients.device import machine
from clients.device.api import DeviceApi, fitting
from clients.device.counter import Counter
from clients.device.download import fetch_once, verify_file
from clients.device.errors import DeviceError, DownloadError, RefusedError, ServerError, StateError, TransportError
from clients.device.identity import Files, IdentityStore
from clients.device.machine import State
from clients.device.model import MAX_REPORTS, Binary, CheckIn, Offer, Report
from clients.device.offers import role_and_filename
from clients.device.slots import Part, SlotStore
from clients.device.state import StateFile

_BACKOFF_S = (0.5, 60.0)
_DOWNLOAD_BACKOFF_S = (0.2, 10.0)
_LEAST_POLL_S = 0.05
# Refusals of a link that another check-in may cure; every other one ends the attempt.
_LINK_MAY_RETURN = {"LINK_EXPIRED", "OFFER_WITHDRAWN"}
_random = random.SystemRandom()


class _AttemptGoneError(Exception):
    """The attempt that is being downloaded was cancelled or replaced meanwhile."""


def backoff(failures: int, bounds: tuple[float, float]) -> float:
    """Exponential, capped, with jitter over its upper half."""
    least, most = bounds
    return min(most, least * 2.0 ** min(failures, 16)) * _random.uniform(0.5, 1.0)


class Agent:
    """One device."""

    def __init__(self, config: Config, log: Log) -> None:
        root = config.state_directory
        root.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._log = log
        self._root = root
        self._fail = FailPoints(root)
        self._file = StateFile(root / "state.json")
        self._counter = Counter(StateFile(root / "counter.json"))
        self._slots = SlotStore(root)
        identities = IdentityStore(root / "identity", Files(config.endpoint.certificate, config.endpoint.key))
        endpoint = replace(config.endpoint, certificate=identities.current.certificate, key=identities.current.key)
        self._api = DeviceApi(endpoint, timeout_s=config.timeout_s, object_store_ca=config.object_store_ca)
        self._renewal = Renewal(identities, self._api, log, self._fail)
        self._boot_id = str(uuid.uuid4())
        self._outbox: tuple[Report, ...] = ()
        self._state = self._load()
        self._next_poll = 0.0
        self._asked_at = 0.0
        self._failures = 0
        self._trial_until: float | None = None
        if config.serial:
            (root / "serial").write_text(config.serial + "\n", encoding="utf-8")

    def run(self) -> None:
        """Work until the process is told to end."""
        self._log("started", instance=self._state.instance, slot=self._state.active)
        try:
            self._feed(machine.Started())
            while True:
                self._wait()
                self._poll()
        finally:
            self._api.close()

    def _load(self) -> State:
        body = self._file.load()
        if body is None:
            state = machine.factory(
                str(uuid.uuid4()), self._config.factory_version, self._config.factory_security_version
            )
            self._save(state)
            return state
        try:
            self._outbox = tuple(Report.from_json(one) for one in body["outbox"])
            return State.from_json(body["machine"])
        except (KeyError, TypeError, TransportError) as error:
            raise StateError("STATE_CORRUPT", f"the state file does not hold a state: {error}") from error

    def _save(self, state: State) -> None:
        self._file.save({"machine": state.to_json(), "outbox": [one.to_json() for one in self._outbox]})
        self._state = state

    # Machine

    def _feed(self, happened: machine.Input) -> None:
        """Step, persist, act; what comes of an effect is fed before the next effect is performed."""
        state, effects = machine.step(self._config.rules, self._state, happened)
        queued = [effect for effect in effects if isinstance(effect, machine.QueueReport)]
        if queued:
            self._outbox += tuple(
                Report(self._counter.take(), one.attempt, one.state, one.code, one.detail) for one in queued
            )
        if queued or state != self._state:
            self._save(state)
        todo = deque(effects)
        while todo:
            self._perform(todo.popleft())

    def _perform(self, effect: machine.Effect) -> None:
        match effect:
            case machine.Note(event, fields):
                self._log(event, **fields)
            case machine.CheckInNow():
                self._next_poll = 0.0
            case machine.DropStaging():
                self._slots.keep_only([])
            case machine.Download(offer):
                self._download(offer)
            case machine.Install(offer, slot):
                self._install(offer, slot)
            case machine.Switch(attempt, valid_for_s):
                self._switch(attempt, valid_for_s)
            case machine.BeginTrial():
                self._fail.reached("after-switch")
                self._feed(machine.TrialBegins())
            case machine.Boot(slot):
                self._boot(slot)
            case machine.CheckHealth(slot):
                self._check_health(slot)
            case machine.QueueReport():
                pass

    # Check-ins

    def _wait(self) -> None:
        """Until the next poll, or until the watchdog of a trial bites."""
        while True:
            now = time.monotonic()
            if self._trial_until is not None and now >= self._trial_until:
                self._trial_until = None
                self._feed(machine.TrialExpired())
                continue
            until = self._next_poll if self._trial_until is None else min(self._next_poll, self._trial_until)
            if now >= until:
                return
            time.sleep(until - now)

    def _poll(self) -> None:
        state = self._state
        request = fitting(
            CheckIn(
                instance=state.instance,
                boot_id=self._boot_id,
                counter=self._counter.take(),
                running=state.running(),
                attempt=state.work.offer.attempt if state.work else "",
                ask_go=state.asks_go(),
                reports=self._outbox[:MAX_REPORTS],
                attributes=self._config.attributes,
            )
        )
        # A `go` is counted from when it was asked for: its way here is part of its time.
        self._asked_at = time.monotonic()
        try:
            answer = self._renewal.send(lambda: self._api.check_in(request))
        except (TransportError, ServerError) as error:
            self._failures += 1
            pause = backoff(self._failures - 1, _BACKOFF_S)
            if isinstance(error, ServerError) and error.retry_after_s is not None:
                pause = max(pause, error.retry_after_s * _random.uniform(1.0, 1.25))
            self._next_poll = time.monotonic() + pause
            self._log("check-in-failed", reason=error.reason, message=error.message, retry_s=round(pause, 3))
            if self._renewal.renew_when_due(None):
                self._next_poll = 0.0
            return
        self._failures = 0
        poll = self._config.poll_s if self._config.poll_s is not None else answer.poll_after_s
        self._next_poll = time.monotonic() + max(_LEAST_POLL_S, poll)
        self._acknowledged(len(request.reports), answer.reports_accepted_through)
        # Not amid a trial: its watchdog must not wait for another program.
        if self._state.trial is None and self._renewal.renew_when_due(answer.server_time):
            self._next_poll = 0.0
        if answer.kind != "none":
            self._log("answered", answer=answer.kind, reasons=answer.reasons)
        self._feed(machine.Answered(answer))

    def _acknowledged(self, sent: int, through: int) -> None:
        """Forget what the log has. What did not fit is numbered anew, since its numbers now lie in the past."""
        kept = tuple(one for one in self._outbox[:sent] if one.counter > through)
        if not kept:
            kept = tuple(replace(one, counter=self._counter.take()) for one in self._outbox[sent:])
        else:
            kept += self._outbox[sent:]
        if kept != self._outbox:
            self._outbox = kept
            self._save(self._state)

    # Getting the bytes

    def _download(self, offer: Offer) -> None:
        self._fail.reached("before-download")
        self._slots.keep_only([one.digest for one in offer.binaries])
        until = time.monotonic() + self._config.pace.total_s
        done = 0
        try:
            self._require_space(offer)
            for binary in offer.binaries:
                self._fetch(offer.attempt, binary.digest, until)
                verify_file(self._slots.part(binary.digest), binary)
                done += 1
        except _AttemptGoneError:
            return
        except RefusedError as error:
            self._feed(machine.WorkFailed(error.reason, error.message))
            return
        except DownloadError as error:
            detail = f"{done} of {len(offer.binaries)} binaries fetched: {error.reason}: {error.message}"
            slow = error.reason in {"DOWNLOAD_TOO_SLOW", "NO_SPACE"}
            self._feed(machine.WorkFailed(error.reason if slow else "DOWNLOAD_INCOMPLETE", detail))
            return
        self._fail.reached("downloaded")
        self._feed(machine.Downloaded())

    def _require_space(self, offer: Offer) -> None:
        """What is still to be fetched, and as much again twice for what unpacking may make of it."""
        total = sum(one.size for one in offer.binaries)
        there = sum(path.stat().st_size for one in offer.binaries if (path := self._slots.part(one.digest)).exists())
        needed = max(0, total - there) + 2 * total + self._config.min_free_bytes
        if self._slots.free_bytes() < needed:
            raise DownloadError("NO_SPACE", f"{needed} bytes are needed")

    def _fetch(self, attempt: str, digest: str, until: float) -> None:
        """Fetch one binary, over as many links as it takes, within the deadline."""
        failures = 0
        while True:
            binary = self._offered(attempt, digest)
            path = self._slots.part(digest)
            size_before = path.stat().st_size if path.exists() else 0
            try:
                remaining = until - time.monotonic()
                fetch_once(
                    self._api, binary, path, self._config.pace, lambda: self._between(attempt), remaining_s=remaining
                )
            except (TransportError, DownloadError, ServerError) as error:
                self._log("download-interrupted", reason=error.reason, message=error.message)
                transient = not isinstance(error, ServerError) or (
                    error.reason in _LINK_MAY_RETURN or error.status >= 500 or error.status == 429
                )
                if not transient:
                    raise RefusedError(error.reason, error.message) from error
                grown = path.exists() and path.stat().st_size > size_before
                failures = 0 if grown else failures + 1
                self._pause_download(attempt, failures, until, error)
            else:
                return

    def _pause_download(self, attempt: str, failures: int, until: float, error: DeviceError) -> None:
        resume_at = time.monotonic() + backoff(failures, _DOWNLOAD_BACKOFF_S)
        if resume_at >= until:
            raise DownloadError(error.reason, f"no end within {self._config.pace.total_s:g} s: {error.message}")
        while (left := resume_at - time.monotonic()) > 0:
            time.sleep(min(left, max(_LEAST_POLL_S, self._next_poll - time.monotonic())))
            self._check_in_when_due(attempt)

    def _between(self, attempt: str) -> None:
        self._fail.reached("mid-download")
        self._check_in_when_due(attempt)

    def _check_in_when_due(self, attempt: str) -> None:
        if time.monotonic() >= self._next_poll:
            self._poll()
            if self._state.work is None or self._state.work.offer.attempt != attempt:
                raise _AttemptGoneError

    def _offered(self, attempt: str, digest: str) -> Binary:
        """The binary with its newest link."""
        work = self._state.work
        if work is None or work.offer.attempt != attempt:
            raise _AttemptGoneError
        return next(one for one in work.offer.binaries if one.digest == digest)

    # Slots

    def _install(self, offer: Offer, slot: str) -> None:
        parts = [Part(self._slots.part(one.digest), role_and_filename(one)[1]) for one in offer.binaries]
        try:
            for part, binary in zip(parts, offer.binaries, strict=True):
                # Once more: a kill may lie between the download and this.
                verify_file(part.path, binary)
            self._slots.install(slot, parts, self._state.active)
            self._fresh_data(slot)
        except FileNotFoundError as error:
            self._feed(machine.WorkFailed("DOWNLOAD_INCOMPLETE", f"{error.filename} is gone"))
        except RefusedError as error:
            self._feed(machine.WorkFailed(error.reason, error.message))
        except OSError as error:
            self._feed(machine.WorkFailed("DISK_WRITE_FAILED", str(error)))
        else:
            self._feed(machine.Installed())
            self._fail.reached("installed")

    def _switch(self, attempt: str, valid_for_s: float) -> None:
        self._fail.reached("before-switch")
        if time.monotonic() - self._asked_at >= valid_for_s:
            self._log("go-lapsed", attempt=attempt)
            self._next_poll = 0.0
            return
        self._feed(machine.SwitchAllowed(attempt))

    # Firmware

    def _data(self, slot: str) -> Path:
        return self._root / "data" / slot

    def _fresh_data(self, slot: str) -> None:
        directory = self._data(slot)
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            path.unlink()

    def _call(self, slot: str, action: str, timeout_s: float) -> Outcome:
        program = self._slots.program(slot)
        if program is None:
            # Factory firmware outside the slots; an installed slot always has a program.
            running = self._state.slots[slot]
            return Outcome() if running and not running.bundle else Outcome("BOOT_FAILED", "the slot has no program")
        self._data(slot).mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": os.environ.get("PATH", os.defpath),
            "GROUNDSWELL_STATE": str(self._root.resolve()),
            "GROUNDSWELL_DATA": str(self._data(slot).resolve()),
        }
        return call(program.resolve(), action, timeout_s, environment)

    def _boot(self, slot: str) -> None:
        trial = self._state.trial is not None
        if trial:
            self._fail.reached("in-trial")
            self._trial_until = time.monotonic() + self._config.trial_timeout_s
        outcome = self._call(slot, "boot", self._config.boot_timeout_s)
        if outcome.code:
            self._trial_until = None
            self._log("boot-failed", slot=slot, reason=outcome.code, detail=outcome.detail)
        self._feed(machine.BootEnded(outcome.code, outcome.detail))

    def _check_health(self, slot: str) -> None:
        outcome = self._call(slot, "health", self._config.health_timeout_s)
        if self._state.trial is not None:
            if not outcome.code:
                self._fail.reached("before-confirm")
            self._trial_until = None
        self._feed(machine.HealthJudged(not outcome.code, outcome.code, outcome.detail))
