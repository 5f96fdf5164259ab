"""Life of an endpoint: created, verified, changed, its secret rotated, deleted. Pure.

* A new endpoint is PENDING, and so is one whose URL changed: nothing but ``webhook.test_fire`` is sent to it until
  its receiver has shown, in the way that ``verification`` names, that it wants the deliveries. What happens meanwhile
  is delivered afterwards. The server asks by itself a few times; then somebody has to (``VerifyWebhookEndpoint``).
* A disabled endpoint keeps its cursor. Enabled again it goes on from there: nothing is lost, whatever it missed.
* At most two secrets sign at a time. The log knows generations and times; no secret is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import immutables
from cryptography import x509
from google.protobuf.empty_pb2 import Empty
from groundswell.webhooks.v1 import events_pb2 as events
from groundswell.webhooks.v1 import webhooks_pb2 as pb

from libs.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    check_etag,
)
from libs.eventlog import Context, Decision, NewEvent, Public, Task, Timer
from libs.names import is_within, organization_of
from services.webhooks.catalogue import check_filters
from services.webhooks.model import (
    MAX_ENDPOINTS,
    MAX_OVERLAP_MS,
    NOT_VERIFIED,
    OPERATOR,
    VERIFY,
    VERIFY_STEPS_MS,
    CreateEndpoint,
    DeleteEndpoint,
    Endpoint,
    RecordVerification,
    RotateSecret,
    State,
    Stream,
    UpdateEndpoint,
    find,
    generation_of,
    previous_until_ms,
    shown,
)
from services.webhooks.render import PAYLOAD_VERSIONS

Image = pb.WebhookEndpoint
PublicKeyOf = Callable[[str, str, int], str]
"""Public key of (endpoint, uid, generation): derived, so always the same."""

MAX_SCOPES: Final = 100
MAX_RATE: Final = 10_000
_PLAIN: Final = frozenset({"payload_version", "verification", "ordering", "max_per_second", "ca_pem", "url"})
_LISTS: Final = frozenset({"event_types", "products", "cohorts"})
UPDATABLE: Final = _PLAIN | _LISTS | {"state"}
_NUMBERED_BY: Final = ("event_types", "products", "cohorts", "ordering")
"""Strict order: with other filters, other deliveries are counted."""


def create(state: State, command: CreateEndpoint, public_key_of: PublicKeyOf, ctx: Context) -> Decision:
    """A new endpoint, to be verified."""
    wanted = command.endpoint
    if wanted.name in state.endpoints:
        raise AlreadyExistsError("ALREADY_EXISTS", f"{wanted.name} exists", resource=wanted.name)
    count = sum(1 for name in state.endpoints if organization_of(name) == ctx.organization)
    if count >= MAX_ENDPOINTS:
        raise ResourceExhaustedError(
            "QUOTA_EXCEEDED",
            f"{ctx.organization} has {count} webhook endpoints and may have {MAX_ENDPOINTS}",
            quota="webhook_endpoints",
            limit=MAX_ENDPOINTS,
        )
    uid = ctx.new_uuid("webhook-endpoint")
    image = Image(
        name=wanted.name,
        uid=uid,
        url=wanted.url,
        event_types=sorted(set(wanted.event_types)),
        products=sorted(set(wanted.products)),
        cohorts=sorted(set(wanted.cohorts)),
        ca_pem=wanted.ca_pem,
        payload_version=wanted.payload_version or max(PAYLOAD_VERSIONS),
        verification=wanted.verification or Image.VERIFICATION_CHALLENGE,
        ordering=wanted.ordering or Image.ORDERING_BEST_EFFORT,
        max_per_second=wanted.max_per_second,
        secret_generation=1,
        state=Image.STATE_PENDING,
        state_reason=NOT_VERIFIED,
        public_key=public_key_of(wanted.name, uid, 1),
        etag=str(ctx.version(wanted.name) + 1),
    )
    check_image(image)
    image.create_time.FromMilliseconds(ctx.now_ms)
    starts = [
        events.SourceStart(topic=topic, partition=partition, position=position)
        for (topic, partition), position in command.starts
    ]
    saved = events.WebhookEndpointSaved(webhook_endpoint=image, starts=starts)
    # The secret is added by the servicer: no answer that is stored holds one.
    return Decision(
        events=(saved_event(saved, "webhook.endpoint.created", ctx),),
        result=pb.CreateWebhookEndpointResponse(webhook_endpoint=image),
        open_tasks=(verify_task(image, 0),),
    )


def update(state: State, command: UpdateEndpoint, ctx: Context) -> Decision:
    """New values for named fields."""
    wanted, paths = command.endpoint, frozenset(command.paths)
    current = find(state, wanted.name)
    check_etag(wanted.etag, current.image.etag, wanted.name)
    unknown = sorted(paths - UPDATABLE)
    if unknown or not paths:
        raise InvalidArgumentError(
            "INVALID_FIELD",
            f"update_mask takes {', '.join(sorted(UPDATABLE))}",
            field="update_mask",
            value=",".join(unknown)[:200],
        )
    image = Image()
    image.CopyFrom(current.image)
    for path in sorted(paths & _PLAIN):
        setattr(image, path, getattr(wanted, path))
    for path in sorted(paths & _LISTS):
        values = getattr(image, path)
        del values[:]
        values.extend(sorted(set(getattr(wanted, path))))
    image.payload_version = image.payload_version or max(PAYLOAD_VERSIONS)
    image.verification = image.verification or Image.VERIFICATION_CHALLENGE
    image.ordering = image.ordering or Image.ORDERING_BEST_EFFORT
    check_image(image)
    if image.url != current.image.url:
        image.ClearField("verify_time")
    change = "webhook.endpoint.updated"
    if "state" in paths and _switched(image, wanted):
        change = "webhook.endpoint.disabled"
    if image.state == Image.STATE_ACTIVE and image.url != current.image.url:
        image.state, image.state_reason = Image.STATE_PENDING, NOT_VERIFIED
    if image == current.image:
        return Decision(result=shown(current))
    image.etag = str(ctx.version(image.name) + 1)
    saved = events.WebhookEndpointSaved(webhook_endpoint=image, renumbered=_renumbered(current.image, image))
    asks = image.state == Image.STATE_PENDING and (
        current.image.state != Image.STATE_PENDING or image.url != current.image.url
    )
    return Decision(
        events=(saved_event(saved, change, ctx),),
        result=shown(replace(current, image=image, verify_reason="" if asks else current.verify_reason)),
        open_tasks=(verify_task(image, 0),) if asks else (),
    )


def _switched(image: Image, wanted: Image) -> bool:
    """Set the state that is wanted; True when that disables it."""
    if wanted.state not in {Image.STATE_ACTIVE, Image.STATE_DISABLED}:
        raise InvalidArgumentError("INVALID_FIELD", "state takes ACTIVE and DISABLED", field="webhook_endpoint.state")
    if wanted.state == Image.STATE_DISABLED:
        disabled = image.state != Image.STATE_DISABLED
        image.state, image.state_reason = Image.STATE_DISABLED, OPERATOR if disabled else image.state_reason
        return disabled
    if image.state == Image.STATE_DISABLED:
        verified = image.HasField("verify_time")
        image.state = Image.STATE_ACTIVE if verified else Image.STATE_PENDING
        image.state_reason = "" if verified else NOT_VERIFIED
    return False


def _renumbered(before: Image, after: Image) -> bool:
    if after.ordering != Image.ORDERING_STRICT:
        return False
    return any(getattr(before, path) != getattr(after, path) for path in _NUMBERED_BY)


def delete(state: State, command: DeleteEndpoint, ctx: Context) -> Decision:
    """Stop for good."""
    current = find(state, command.name)
    check_etag(command.etag, current.image.etag, command.name)
    image = Image()
    image.CopyFrom(current.image)
    image.etag = str(ctx.version(image.name) + 1)
    saved = events.WebhookEndpointSaved(webhook_endpoint=image, deleted=True)
    return Decision(events=(saved_event(saved, "webhook.endpoint.deleted", ctx),), result=Empty())


def rotate(state: State, command: RotateSecret, public_key_of: PublicKeyOf, ctx: Context) -> Decision:
    """The next secret signs from now on, the one before until the overlap ends, and none before that."""
    current = find(state, command.name)
    check_etag(command.etag, current.image.etag, command.name)
    if not 0 <= command.overlap_ms <= MAX_OVERLAP_MS:
        raise InvalidArgumentError("INVALID_FIELD", "overlap must be between 0 and 24 hours", field="overlap")
    running = previous_until_ms(current.image) > ctx.now_ms
    if running and command.overlap_ms:
        raise FailedPreconditionError(
            "WRONG_STATE",
            f"{command.name} has two secrets already: wait for the overlap to end, or rotate with overlap 0",
            resource=command.name,
            until_ms=previous_until_ms(current.image),
        )
    image = Image()
    image.CopyFrom(current.image)
    image.secret_generation = generation_of(image) + 1
    image.public_key = public_key_of(image.name, image.uid, image.secret_generation)
    image.ClearField("previous_secret_expire_time")
    image.previous_public_key = ""
    if command.overlap_ms:
        image.previous_public_key = current.image.public_key
        image.previous_secret_expire_time.FromMilliseconds(ctx.now_ms + command.overlap_ms)
    image.etag = str(ctx.version(image.name) + 1)
    saved = events.WebhookEndpointSaved(webhook_endpoint=image)
    event = saved_event(saved, "webhook.endpoint.secret_rotated", ctx)
    result = pb.RotateWebhookSecretResponse(webhook_endpoint=shown(replace(current, image=image)))
    return Decision(events=(event,), result=result)


def record_verification(state: State, command: RecordVerification, ctx: Context) -> Decision:
    """ACTIVE when the receiver wants it; else asked again later, a number of times."""
    closed = (command.task_id,) if command.task_id else ()
    current = state.endpoints.get(command.name)
    if current is None or current.image.uid != command.uid or current.image.url != command.url:
        return Decision(close_tasks=closed)  # that question is about another receiver
    if current.image.state != Image.STATE_PENDING:
        return Decision(result=shown(current), close_tasks=closed)
    if not command.problem:
        image = Image()
        image.CopyFrom(current.image)
        image.state, image.state_reason = Image.STATE_ACTIVE, ""
        image.verify_time.FromMilliseconds(ctx.now_ms)
        image.etag = str(ctx.version(image.name) + 1)
        event = saved_event(events.WebhookEndpointSaved(webhook_endpoint=image), "webhook.endpoint.verified", ctx)
        result = shown(replace(current, image=image))
        return Decision(events=(event,), result=result, close_tasks=closed, clear_timers=(_timer_id(image),))
    failed = events.EndpointVerificationFailed(webhook_endpoint=command.name, reason=command.problem[:300])
    # An aggregate of its own, as for deliveries: the etag moves only when the endpoint itself changes.
    event = NewEvent(ctx.organization, f"{command.name}/deliveries", failed)
    result = shown(replace(current, verify_reason=failed.reason))
    timers: tuple[Timer, ...] = ()
    failures = current.verify_failures + 1
    if command.task_id and failures < len(VERIFY_STEPS_MS):
        at_ms = ctx.now_ms + VERIFY_STEPS_MS[failures]
        timers = (Timer(_timer_id(current.image), VERIFY, at_ms, command.name.encode(), ctx.organization),)
    return Decision(events=(event,), result=result, close_tasks=closed, set_timers=timers)


def verify_again(state: State, name: str) -> Decision:
    """The time for another attempt has come."""
    current = state.endpoints.get(name)
    if current is None or current.image.state != Image.STATE_PENDING:
        return Decision()
    return Decision(open_tasks=(verify_task(current.image, current.verify_failures),))


def verify_task(image: Image, number: int) -> Task:
    """Ask the receiver. The etag tells one URL's question from the next one's."""
    return Task(f"{VERIFY}/{image.uid}/{image.etag}/{number}", VERIFY, image.name.encode(), organization_of(image.name))


def _timer_id(image: Image) -> str:
    return f"{VERIFY}/{image.uid}"


def check_image(image: Image) -> None:
    """All fields that an operator sets. Raises INVALID_FIELD."""
    check_filters(image.event_types)
    check_ca(image.ca_pem)
    organization = f"organizations/{organization_of(image.name)}"
    _check_scopes("products", image.products, 4, organization)
    _check_scopes("cohorts", image.cohorts, 6, organization)
    for cohort in image.cohorts:
        if image.products and not any(is_within(cohort, product) for product in image.products):
            raise _invalid("cohorts", f"names {cohort}, which is of none of the products: nothing could match")
    if image.payload_version not in PAYLOAD_VERSIONS:
        raise _invalid("payload_version", f"must be one of {', '.join(map(str, PAYLOAD_VERSIONS))}")
    if image.max_per_second > MAX_RATE:
        raise _invalid("max_per_second", f"must be at most {MAX_RATE}")
    for path, known in (("verification", Image.Verification.values()), ("ordering", Image.Ordering.values())):
        if getattr(image, path) not in known:
            raise _invalid(path, "is not a value that this server knows")


def _check_scopes(path: str, names: Sequence[str], parts: int, organization: str) -> None:
    if len(names) > MAX_SCOPES:
        raise _invalid(path, f"must have at most {MAX_SCOPES} entries")
    collections = ("organizations", "products", "cohorts")[: parts // 2]
    for name in names:
        found = name.split("/")
        if tuple(found[::2]) != collections or not all(found) or not is_within(name, organization):
            raise _invalid(path, f"takes full names within {organization}, not '{name[:200]}'")


def check_ca(pem: str) -> None:
    """A private CA must be one or more certificates, and nothing else than certificates. Raises INVALID_FIELD."""
    if not pem:
        return
    problem = "holds a private key: send certificates only" if "PRIVATE KEY" in pem else ""
    if not problem:
        try:
            x509.load_pem_x509_certificates(pem.encode())
        except ValueError:
            problem = "must hold PEM certificates"
    if problem:
        raise _invalid("ca_pem", problem)


def _invalid(path: str, problem: str) -> InvalidArgumentError:
    return InvalidArgumentError("INVALID_FIELD", f"{path} {problem}", field=f"webhook_endpoint.{path}")


def saved_event(saved: events.WebhookEndpointSaved, change: str, ctx: Context) -> NewEvent:
    """The event and its public after-image."""
    image = saved.webhook_endpoint
    public = Public(image.name, events.WebhookEndpointChanged(webhook_endpoint=image, change=change))
    return NewEvent(ctx.organization, image.name, saved, (public,))


def evolve_saved(state: State, saved: events.WebhookEndpointSaved) -> State:
    """After-images replace; progress stays."""
    image = saved.webhook_endpoint
    if saved.deleted:
        return replace(state, endpoints=state.endpoints.delete(image.name))
    current = state.endpoints.get(image.name)
    if current is None or current.image.uid != image.uid:
        # The cursor is inclusive, the start is the first that counts.
        streams = {
            (start.topic, start.partition): Stream(start.position - 1, numbered_from=start.position - 1)
            for start in saved.starts
        }
        return replace(state, endpoints=state.endpoints.set(image.name, Endpoint(image, immutables.Map(streams))))
    endpoint = replace(current, image=image)
    if endpoint.active and not current.active:
        endpoint = replace(endpoint, failing_since_ms=0)
    if image.state == Image.STATE_PENDING and (
        current.image.state != Image.STATE_PENDING or image.url != current.image.url
    ):
        endpoint = replace(endpoint, verify_failures=0, verify_reason="")
    if saved.renumbered:
        anew = {place: replace(stream, numbered_from=stream.cursor) for place, stream in endpoint.streams.items()}
        endpoint = replace(endpoint, streams=immutables.Map(anew))
    return replace(state, endpoints=state.endpoints.set(image.name, endpoint))


def evolve_verification_failed(state: State, failed: events.EndpointVerificationFailed) -> State:
    """The reason is shown, and the next attempt comes later."""
    current = state.endpoints.get(failed.webhook_endpoint)
    if current is None:
        return state
    endpoint = replace(current, verify_failures=current.verify_failures + 1, verify_reason=failed.reason)
    return replace(state, endpoints=state.endpoints.set(failed.webhook_endpoint, endpoint))
