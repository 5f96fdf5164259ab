"""Runtimes with one safeguard taken out each. If a story does not notice, the story proves nothing."""

from __future__ import annotations

import asyncio

from libs.eventlog import Runtime
from libs.eventlog.inbox import Inbox
from libs.eventlog.leader import Leadership
from libs.eventlog.ports import Record, TopicPartition
from libs.eventlog.state import Watermark
from libs.eventlog.work import ForeignWork
from libs.eventlog.working import Working
from tests.contract.eventlog.support import State


class UnfencedLeadership(Leadership[State]):
    """Every node has a transactional id of its own, so nobody fences anybody."""

    def transactional_id(self) -> str:
        return f"{super().transactional_id()}.{self.config.node}"


class Unfenced(Runtime[State]):
    leadership_type = UnfencedLeadership


class HastyLeadership(Leadership[State]):
    """Answers as soon as the broker has committed, before the own tail has applied anything."""

    async def wait_read_back(self, read_back: asyncio.Future[int], working: Working[State]) -> int:
        del working
        read_back.cancel()
        return self.replica.state.applied + len("x")


class Hasty(Runtime[State]):
    leadership_type = HastyLeadership


class ForgetfulWork(ForeignWork[State]):
    """Takes in whatever comes, as if there were no watermark."""

    @staticmethod
    def seen(record: Record, mark: Watermark | None) -> bool:
        del record, mark
        return False


class ForgetfulInbox(Inbox[State]):
    """Starts from the beginning at every claim."""

    work_type = ForgetfulWork

    def start_position(self, source: TopicPartition) -> int:
        del source
        return 0


class Forgetful(Runtime[State]):
    inbox_type = ForgetfulInbox
