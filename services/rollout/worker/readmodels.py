"""Last-seen and the last receipt of each device in Redis: rebuildable, so trouble here never holds the stream up.

One script for the records of one acknowledgement, guarded by (partition, position): what was applied and is delivered
again changes nothing.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from typing import Final

from redis.asyncio import Redis
from redis.exceptions import RedisError

from services.rollout.keys import positions_key, seen_key
from services.rollout.observations import Observed
from services.rollout.seen import TIME_DIGITS, written_time

log = logging.getLogger(__name__)

KEEP_S: Final = 14 * 24 * 3600
"""As long as the check-in topic keeps receipts."""
MOST_DEVICES: Final = 2000
"""Devices of one script, which keeps Redis from everybody else while it runs."""
_SCRIPT: Final = f"""
local at = redis.call('HGET', KEYS[1], ARGV[1])
if at and tonumber(at) >= tonumber(ARGV[2]) then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
local said = cmsgpack.unpack(ARGV[4])
local time = ''
for i = 1, #said, 2 do
  if said[i] == '' then
    time = said[i + 1]
  elseif said[i + 1] == '' and redis.call('STRLEN', ARGV[5] .. said[i]) > {TIME_DIGITS} then
    redis.call('SETRANGE', ARGV[5] .. said[i], 0, time)
    redis.call('EXPIRE', ARGV[5] .. said[i], ARGV[3])
  else
    redis.call('SET', ARGV[5] .. said[i], time .. said[i + 1], 'EX', ARGV[3])
  end
end
return 1
"""
"""Device and receipt come by turns in one MessagePack array, and a nameless device brings the time of those after it:
as arguments of the command they would cost the worker several times as much. Redis knows only the format's older part,
where bytes are raw strings."""
_LENGTH: Final = struct.Struct(">BI").pack
_RAW: Final = tuple(_LENGTH(0xDB, length) for length in range(4096))
"""Heads of raw strings by their length."""


def _head(text: bytes) -> bytes:
    length = len(text)
    return _RAW[length] if length < len(_RAW) else _LENGTH(0xDB, length)


class _Said:
    """What records say, on its way to Redis."""

    def __init__(self) -> None:
        self.devices = 0
        self._count = 0
        self._parts: list[bytes] = []

    def add(self, observed: Observed) -> None:
        parts, raw, short = self._parts, _RAW, len(_RAW)
        time = written_time(observed.seen_ms)
        parts += (raw[0], raw[len(time)], time)
        for device, receipt in observed.seen:
            name = device.encode()
            length = len(receipt)
            parts += (_head(name), name, raw[length] if length < short else _head(receipt), receipt)
        self.devices += len(observed.seen)
        self._count += 2 + 2 * len(observed.seen)

    def packed(self) -> bytes:
        return _LENGTH(0xDD, self._count) + b"".join(self._parts)


class ReadModels:
    """Writes what a record says of devices."""

    def __init__(self, redis: Redis, env: str) -> None:
        self._env = env
        self._redis = redis
        self._script = redis.register_script(_SCRIPT)
        self.failures = 0

    async def update(self, partition: int, records: Sequence[Observed]) -> None:
        """Apply records, in order, once; a failure is counted and forgotten, the next check-in repeats it."""
        said = _Said()
        for index, observed in enumerate(records):
            if observed.seen:
                said.add(observed)
            if said.devices and (said.devices >= MOST_DEVICES or index + 1 == len(records)):
                await self._apply(partition, observed.position, said.packed())
                said = _Said()

    async def _apply(self, partition: int, position: int, said: bytes) -> None:
        try:
            await self._script(
                keys=[positions_key(self._env)], args=[partition, position, KEEP_S, said, seen_key(self._env, "")]
            )
        except RedisError as error:
            self.failures += 1
            if self.failures % 100 == 1:
                log.warning("read models not updated (%d so far): %s", self.failures, type(error).__name__)

    async def close(self) -> None:
        """Disconnect."""
        await self._redis.aclose()
