"""Read your writes: waiting until the views of this process have reached read-after tokens.

Tokens of the own log wait for the view, tokens of a source wait for the Inbox. A token of another log, or one that lies
beyond the end of this one, is refused at once with LOG_RESET: waiting for it would end nowhere.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from libs.errors import FailedPreconditionError, UnavailableError
from libs.eventlog.config import RuntimeConfig, events_topic, public_topic
from libs.eventlog.deadline import Deadline, monotonic
from libs.eventlog.model import Token
from libs.eventlog.ports import EventLog, LogError, TopicPartition
from libs.eventlog.replica import Replica, not_caught_up
from libs.eventlog.state import Schema

S = TypeVar("S")

_LATE_MARKER_S = 2.0
"""Private and public records of a transaction become visible at slightly different times."""


class TokenWaits(Generic[S]):
    """`source_lag(partition, source)` is how far the Inbox is behind a source, infinite where it does not run.

    `hurry(partition)` tells the Inbox that somebody waits for it.
    """

    def __init__(
        self,
        log: EventLog,
        config: RuntimeConfig,
        schema: Schema[S],
        replicas: Sequence[Replica[S]],
        source_lag: Callable[[int, TopicPartition], float],
        hurry: Callable[[int], None],
    ) -> None:
        self._log = log
        self._config = config
        self._service = schema.domain.service
        self._sources = schema.domain.sources
        self._topic = events_topic(config.env, self._service)
        self._replicas = replicas
        self._source_lag = source_lag
        self._hurry = hurry

    async def wait_for(self, tokens: Sequence[Token], deadline: Deadline) -> None:
        """Wait until reads here reflect the tokens: own ones in the view, foreign ones in the Inbox."""
        for token in tokens:
            if not 0 <= token.partition < self._config.partitions:
                raise log_reset(token)
            if token.service == self._service:
                await self._wait_own(token, deadline)
            elif token.service in self._sources and token.public_seq > 0:
                await self._wait_foreign(token, deadline)

    async def _wait_own(self, token: Token, deadline: Deadline) -> None:
        replica = self._replicas[token.partition]
        if replica.state.applied < token.position:
            place = TopicPartition(self._topic, token.partition)
            try:
                async with asyncio.timeout(deadline.remaining()):
                    end = (await self._log.end_positions([place]))[place]
            except (TimeoutError, LogError):
                raise not_caught_up(self._service, token.partition) from None
            if token.position >= end:
                raise log_reset(token)
            if replica.state.log_id and token.log_id != replica.state.log_id:
                raise log_reset(token)
            await replica.wait_applied(token.position, deadline)
        if token.log_id != replica.state.log_id:
            raise log_reset(token)

    async def _wait_foreign(self, token: Token, deadline: Deadline) -> None:
        replica = self._replicas[token.partition]
        source = (public_topic(self._config.env, token.service), token.partition)
        asked = monotonic()
        while True:
            mark = replica.state.inbox.get(source)
            if mark is not None and mark.log_id and mark.log_id != token.log_id:
                raise log_reset(token)
            if mark is not None and mark.public_seq >= token.public_seq:
                return
            if self._source_lag(token.partition, TopicPartition(*source)) < monotonic() - asked - _LATE_MARKER_S:
                # All that was committed well after the question has been taken in, and the number was not there.
                raise log_reset(token)
            self._hurry(token.partition)
            with contextlib.suppress(UnavailableError):
                await replica.wait_change(deadline.earlier(0.5))
            if deadline.expired:
                raise not_caught_up(token.service, token.partition)


def log_reset(token: Token) -> FailedPreconditionError:
    """The client drops the token and retries once."""
    return FailedPreconditionError(
        "LOG_RESET",
        "the read-after token belongs to another log, or lies beyond the end of this one: drop it and retry",
        token=token,
    )
