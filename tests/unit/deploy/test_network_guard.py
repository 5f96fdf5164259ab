from __future__ import annotations

import asyncio
import socket

import pytest


def test_connecting_is_refused() -> None:
    with socket.socket() as probe, pytest.raises(RuntimeError, match="may not reach"):
        probe.connect(("127.0.0.1", 9))


def test_listening_is_refused() -> None:
    with socket.socket() as probe, pytest.raises(RuntimeError, match="may not reach"):
        probe.bind(("127.0.0.1", 0))


async def test_event_loops_work_and_their_connections_are_refused() -> None:
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="may not reach"):
        await asyncio.open_connection("localhost", 9)
