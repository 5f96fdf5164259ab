"""The event log: see README.md. Service authors import from here; adapters live in `memory` and `kafka`."""

from libs.eventlog.config import Health, PartitionHealth, RuntimeConfig, TaskContext, TaskHandler, partition_of
from libs.eventlog.deadline import Deadline
from libs.eventlog.leader import NotLeaderError
from libs.eventlog.model import (
    Command,
    Committed,
    Context,
    Decision,
    Domain,
    Event,
    Foreign,
    NewEvent,
    Public,
    Snapshot,
    Task,
    Timer,
    TimerFired,
    Token,
)
from libs.eventlog.runtime import Runtime

__all__ = [
    "Command",
    "Committed",
    "Context",
    "Deadline",
    "Decision",
    "Domain",
    "Event",
    "Foreign",
    "Health",
    "NewEvent",
    "NotLeaderError",
    "PartitionHealth",
    "Public",
    "Runtime",
    "RuntimeConfig",
    "Snapshot",
    "Task",
    "TaskContext",
    "TaskHandler",
    "Timer",
    "TimerFired",
    "Token",
    "partition_of",
]
