"""Unit tests reach no network: a socket that connects or binds is an error here, not a slow test."""

from __future__ import annotations

import socket
from typing import Any, NoReturn

import pytest

from tests.snapshots import states_survive_snapshots  # noqa: F401 - a fixture of every test here

_LOCAL = getattr(socket, "AF_UNIX", None)


class NetworkInUnitTestError(RuntimeError):
    """A unit test tried to reach a network."""


class _GuardedSocket(socket.socket):
    """Socket pairs, which event loops need, stay possible."""

    def connect(self, address: Any) -> None:
        self._refuse(address)
        super().connect(address)

    def connect_ex(self, address: Any) -> int:
        self._refuse(address)
        return super().connect_ex(address)

    def bind(self, address: Any) -> None:
        self._refuse(address)
        super().bind(address)

    def _refuse(self, address: Any) -> None:
        if self.family != _LOCAL:
            _refuse(address)


def _refuse(address: Any, *_: Any, **__: Any) -> NoReturn:
    raise NetworkInUnitTestError(f"a unit test may not reach {address}: move it to tests/integration")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", _GuardedSocket)
    monkeypatch.setattr(socket, "getaddrinfo", _refuse)
