"""Content in the object store: who holds it, and when it goes. Pure.

A binary or an attachment *holds* a content key from before anything is written there until it gives it up: the events
that say so are the reference count. When the last holder has gone, a timer waits for the grace time. If nobody holds
the key then, it is condemned in the log, and only after that deleted. Whoever needs content of that digest from then on
gets a key of the next generation, so a key once deleted is never written again, and an attachment that races with the
collection lands either before the timer's decision, and stops it, or after it, on another key.
"""

from __future__ import annotations

from typing import Final

from groundswell.artifacts.v1 import events_pb2 as ev

from libs.blobs import GENERATION, content_key, parse_content_key
from libs.eventlog import Context, Decision, NewEvent, Task, Timer, TimerFired
from services.artifacts.state import State, upload_of

COLLECT: Final = "collect"
DROP: Final = "drop_staged"


def reserved(state: State, organization: str, sha256: str) -> str:
    """The key that content of this digest has to have now."""
    return content_key(organization, sha256, state.generations.get(f"{organization}/{sha256}", GENERATION))


def drop_task(keys: tuple[str, ...], organization: str) -> Task:
    """Delete objects that are of no more use."""
    return Task(f"{DROP}/{keys[0]}", DROP, "\n".join(keys).encode(), organization=organization)


def with_timers(state: State, decision: Decision, ctx: Context, grace_ms: int) -> Decision:
    """The decision, with a timer for each content key that its events leave without a holder."""
    timers: list[Timer] = []
    for event in decision.events:
        payload = event.payload
        if not isinstance(payload, ev.BinarySaved | ev.AttachmentSaved):
            continue
        before = upload_of(state, event.resource).blob_key
        after = "" if payload.deleted else payload.blob_key
        if before and before != after and len(state.holders.get(before) or ()) <= 1:
            timer = Timer(f"{COLLECT}/{before}", COLLECT, ctx.now_ms + grace_ms, before.encode(), event.organization)
            timers.append(timer)
    return decision.replace(set_timers=(*decision.set_timers, *timers)) if timers else decision


def collect(state: State, fired: TimerFired, ctx: Context) -> Decision:
    """The grace time of a key is over: condemn it unless somebody holds it again."""
    key = fired.payload.decode()
    known = parse_content_key(key)
    if known is None or state.holders.get(key) or reserved(state, known[0], known[1]) != key:
        return Decision()
    organization, sha256, generation = known
    condemned = ev.ContentCondemned(blob_key=key, sha256=sha256, generation=generation)
    event = NewEvent(ctx.organization, f"organizations/{organization}/contents/{sha256}", condemned)
    return Decision((event,), open_tasks=(drop_task((key,), ctx.organization),))
