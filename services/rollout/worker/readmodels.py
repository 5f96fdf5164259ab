"""Last-seen and the last receipt of each device in Redis: rebuildable, so trouble here never holds the stream up.

One value for each device (:mod:`services.rollout.seen`), written in the order of the log, so what is delivered again
leads to the same end; what Redis had taken in before is left out.

A worker writes a hundred thousand of these a second. They go as one stream of plain commands with their replies
switched off: a script over the same values costs Redis more than twice as much, and reading that many replies would
cost the worker more than everything else it does. The position is written last, with a reply: a Redis that takes no
writes refuses that one too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.rollout.keys import positions_key, seen_key
from services.rollout.observations import Observed
from services.rollout.seen import written_time

log = logging.getLogger(__name__)

KEEP_S: Final = 14 * 24 * 3600
"""As long as the check-in topic keeps receipts."""
MOST_DEVICES: Final = 2000
"""Devices at a time: others want something of Redis too."""


def command(*words: bytes) -> bytes:
    """A command as it goes over the wire (RESP arrays of bulk strings)."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


_QUIET: Final = command(b"CLIENT", b"REPLY", b"OFF")
_LOUD: Final = command(b"CLIENT", b"REPLY", b"ON")
_KEEP: Final = b"%d" % KEEP_S
_SET: Final = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b"
_VALUE: Final = b"\r\n$%d\r\n%b"
_EXPIRY: Final = b"\r\n" + command(b"EX", _KEEP).removeprefix(b"*2\r\n")


class _Heads(dict[int, bytes]):
    """What stands before a device's name, or before its receipt, by the length of that.

    SET key value EX seconds, with key and value in two parts each, is in pieces most of which are made once.
    """

    def __init__(self, form: bytes, before: bytes) -> None:
        super().__init__()
        self._form, self._before = form, before

    def __missing__(self, length: int) -> bytes:
        head = self[length] = self._form % (len(self._before) + length, self._before)
        return head


def _refreshed(key: bytes, time: bytes) -> bytes:
    """Another time before the receipt that is there."""
    return command(b"SETRANGE", key, b"0", time) + command(b"EXPIRE", key, _KEEP)


class ReadModels:
    """Writes what a record says of devices."""

    def __init__(self, redis: Redis, env: str) -> None:
        self._prefix = seen_key(env, "").encode()
        self._keys = _Heads(_SET, self._prefix)
        self._positions = positions_key(env)
        self._redis = redis
        self._reached: dict[int, int] = {}
        """Position that Redis stands at, by partition, as far as this process knows."""
        self.failures = 0

    async def update(self, partition: int, records: Sequence[Observed]) -> None:
        """Apply records, in order; a failure is counted and forgotten, the next check-in repeats it."""
        try:
            if partition not in self._reached:
                self._reached[partition] = await self._read_position(partition)
            commands: list[bytes] = []
            devices = 0
            for index, observed in enumerate(records):
                if observed.seen and observed.position > self._reached[partition]:
                    self._add(commands, observed)
                    devices += len(observed.seen)
                if commands and (devices >= MOST_DEVICES or index + 1 == len(records)):
                    await self._write(partition, observed.position, commands)
                    commands, devices = [], 0
        except (RedisError, OSError) as error:
            self._reached.pop(partition, None)
            self.failures += 1
            if self.failures % 100 == 1:
                log.warning("read models not updated (%d so far): %s", self.failures, type(error).__name__)

    async def _read_position(self, partition: int) -> int:
        stored: Any = await self._redis.hget(self._positions, str(partition))
        return int(stored or -1)

    def _add(self, commands: list[bytes], observed: Observed) -> None:
        time = written_time(observed.seen_ms)
        keys, values = self._keys, _Heads(_VALUE, time)
        for name, receipt in observed.seen:
            device = name.encode()
            if receipt:
                commands += (keys[len(device)], device, values[len(receipt)], receipt, _EXPIRY)
            else:
                commands.append(_refreshed(self._prefix + device, time))

    async def _write(self, partition: int, position: int, commands: list[bytes]) -> None:
        reached = command(b"HSET", self._positions.encode(), b"%d" % partition, b"%d" % position)
        pool = self._redis.connection_pool
        connection: Any = await pool.get_connection()  # type: ignore[no-untyped-call]
        try:
            await connection.send_packed_command(b"".join((_QUIET, *commands, _LOUD, reached)))
            for _ in ("switched on again", "written"):
                await connection.read_response()
        except BaseException:
            await connection.disconnect()  # whatever came of it, nobody else must get a silent connection
            raise
        finally:
            await pool.release(connection)
        self._reached[partition] = position

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()
