"""Errors of the SDK. Every one has a stable ``reason`` (UPPER_SNAKE), which is also what a device reports."""

from __future__ import annotations


class DeviceError(Exception):
    """Base of all errors with a reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class ConfigError(DeviceError):
    """The agent's own configuration cannot be used."""


class StateError(DeviceError):
    """What is on disk cannot be read back."""


class RefusedError(DeviceError):
    """This offer must never be installed: trying again gives the same answer."""


class ArchiveError(RefusedError):
    """A verified archive that may not be unpacked."""


class TransportError(DeviceError):
    """No complete answer: the network, TLS, or a peer that broke the protocol. Try again later."""


class ServerError(DeviceError):
    """The gateway answered with a refusal."""

    def __init__(self, status: int, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(reason, message)
        self.status = status
        self.retry_after_s = retry_after_s


class DownloadError(DeviceError):
    """A binary was not fetched this time; what was fetched stays for the next try."""
