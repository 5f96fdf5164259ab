"""Webhook endpoints, their deliveries and replays, and the catalogue of event types."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.timestamp_pb2 import Timestamp
from groundswell.webhooks.v1 import webhooks_pb2

from clients.cli.context import Session, session

Image = webhooks_pb2.WebhookEndpoint
webhook = typer.Typer(help="Webhook endpoints, deliveries and replays.", no_args_is_help=True)
event_type = typer.Typer(help="What webhooks can tell.", no_args_is_help=True)
DELIVERY_COLUMNS: Final = ("name", "event_type", "state", "attempt_count", "last_status", "last_error")
REPLAY_COLUMNS: Final = ("name", "state", "matched_count", "delivered_count", "failed_count")
_VERIFICATIONS: Final = {
    "challenge": Image.VERIFICATION_CHALLENGE,
    "cloudevents": Image.VERIFICATION_CLOUDEVENTS,
    "test-fire": Image.VERIFICATION_TEST_FIRE,
}
EventOption = Annotated[
    list[str] | None, typer.Option("--event", help="Event type or `prefix.*`, repeatable; default: all.")
]
ProductOption = Annotated[
    list[str] | None, typer.Option("--of-product", help="Only events of this product, repeatable; id or full name.")
]
CohortOption = Annotated[
    list[str] | None, typer.Option("--of-cohort", help="Only events of this cohort, repeatable; id or full name.")
]
CaOption = Annotated[Path | None, typer.Option(help="PEM of a private CA of the receiver.", exists=True)]
VerificationOption = Annotated[str, typer.Option(help=f"How it is verified: {', '.join(_VERIFICATIONS)}.")]
StrictOption = Annotated[bool | None, typer.Option("--strict/--best-effort", help="Strict order per device, or none.")]
RateOption = Annotated[int | None, typer.Option(help="Most attempts a second; 0: no limit.", min=0)]
VersionOption = Annotated[int | None, typer.Option("--payload-version", help="Version of the bodies.", min=1)]


def register(app: typer.Typer) -> None:
    """Add the groups."""
    app.add_typer(webhook, name="webhook")
    app.add_typer(event_type, name="event-type")


def _endpoint(state: Session, name: str) -> str:
    return state.name_in_organization("webhookEndpoints", name)


def _verification(name: str) -> Image.Verification.ValueType:
    if name not in _VERIFICATIONS:
        raise typer.BadParameter(f"--verification takes {', '.join(_VERIFICATIONS)}, not '{name}'")
    return _VERIFICATIONS[name]


def _fields(
    state: Session,
    *,
    event: list[str] | None,
    product: list[str] | None,
    cohort: list[str] | None,
    ca: Path | None,
    verification: str,
    strict: bool | None,
    rate: int | None,
    version: int | None,
) -> dict[str, Any]:
    """Fields of an endpoint that were given, and no others."""
    ordering = Image.ORDERING_STRICT if strict else Image.ORDERING_BEST_EFFORT
    given = {
        "event_types": event,
        "products": None if product is None else [state.product_name(each) for each in product],
        "cohorts": None if cohort is None else [state.name_in_product("cohorts", each) for each in cohort],
        "ca_pem": None if ca is None else ca.read_text(),
        "verification": _verification(verification) if verification else None,
        "ordering": None if strict is None else ordering,
        "max_per_second": rate,
        "payload_version": version,
    }
    return {name: value for name, value in given.items() if value is not None}


@webhook.command("create")
def webhook_create(
    context: typer.Context,
    endpoint_id: str,
    url: str,
    event: EventOption = None,
    product: ProductOption = None,
    cohort: CohortOption = None,
    ca: CaOption = None,
    verification: VerificationOption = "",
    strict: StrictOption = None,
    rate: RateOption = None,
    version: VersionOption = None,
) -> None:
    """Create an endpoint. The answer holds the secret: keep it. Deliveries begin when the receiver has been verified.

    Example: `swell webhook create ops https://ops.example/hooks --event 'rollout.*'`
    """
    state = session(context)
    fields = _fields(
        state,
        event=event,
        product=product,
        cohort=cohort,
        ca=ca,
        verification=verification,
        strict=strict,
        rate=rate,
        version=version,
    )
    request = webhooks_pb2.CreateWebhookEndpointRequest(
        parent=state.organization_name(), webhook_endpoint_id=endpoint_id, webhook_endpoint=Image(url=url, **fields)
    )
    state.output.one(state.client.webhooks.CreateWebhookEndpoint(request))


@webhook.command("list")
def webhook_list(
    context: typer.Context,
    filter_: Annotated[str, typer.Option("--filter", help='`field = "value"`, joined by AND.')] = "",
) -> None:
    """List endpoints. Example: `swell webhook list --filter 'state = "DISABLED"'`."""
    state = session(context)
    request = webhooks_pb2.ListWebhookEndpointsRequest(parent=state.organization_name(), page_size=500, filter=filter_)
    found = state.client.pages(state.client.webhooks.ListWebhookEndpoints, request, "webhook_endpoints")
    state.output.many(found, ("name", "url", "state", "state_reason", "health", "delivered_count"))


@webhook.command("get")
def webhook_get(context: typer.Context, name: str) -> None:
    """Show an endpoint. Example: `swell webhook get ops`."""
    state = session(context)
    request = webhooks_pb2.GetWebhookEndpointRequest(name=_endpoint(state, name))
    state.output.one(state.client.webhooks.GetWebhookEndpoint(request))


@webhook.command("update")
def webhook_update(
    context: typer.Context,
    name: str,
    url: Annotated[str, typer.Option(help="Another URL: its receiver must be verified anew.")] = "",
    event: EventOption = None,
    product: ProductOption = None,
    cohort: CohortOption = None,
    ca: CaOption = None,
    verification: VerificationOption = "",
    strict: StrictOption = None,
    rate: RateOption = None,
    version: VersionOption = None,
    clear: Annotated[
        list[str] | None, typer.Option(help="Field to empty: event_types, products, cohorts or ca_pem; repeatable.")
    ] = None,
    etag: Annotated[str, typer.Option(help="Only if it is still this version.")] = "",
) -> None:
    """Change what is given and nothing else.

    Example: `swell webhook update ops --url https://ops.example/v2 --event 'device.*' --clear cohorts`
    """
    state = session(context)
    fields = _fields(
        state,
        event=event,
        product=product,
        cohort=cohort,
        ca=ca,
        verification=verification,
        strict=strict,
        rate=rate,
        version=version,
    )
    if url:
        fields["url"] = url
    paths = sorted({*fields, *(clear or ())})
    if not paths:
        raise typer.BadParameter("say what to change: `swell webhook update --help`")
    request = webhooks_pb2.UpdateWebhookEndpointRequest(
        webhook_endpoint=Image(name=_endpoint(state, name), etag=etag, **fields), update_mask=FieldMask(paths=paths)
    )
    state.output.one(state.client.webhooks.UpdateWebhookEndpoint(request))


def _set_state(context: typer.Context, name: str, wanted: Image.State.ValueType) -> None:
    state = session(context)
    request = webhooks_pb2.UpdateWebhookEndpointRequest(
        webhook_endpoint=Image(name=_endpoint(state, name), state=wanted), update_mask=FieldMask(paths=["state"])
    )
    state.output.one(state.client.webhooks.UpdateWebhookEndpoint(request))


@webhook.command("disable")
def webhook_disable(context: typer.Context, name: str) -> None:
    """Stop deliveries to an endpoint; nothing is lost. Example: `swell webhook disable ops`."""
    _set_state(context, name, Image.STATE_DISABLED)


@webhook.command("enable")
def webhook_enable(context: typer.Context, name: str) -> None:
    """Go on where deliveries stopped. Example: `swell webhook enable ops`."""
    _set_state(context, name, Image.STATE_ACTIVE)


@webhook.command("delete")
def webhook_delete(context: typer.Context, name: str) -> None:
    """Delete an endpoint. Example: `swell webhook delete ops`."""
    state = session(context)
    full = _endpoint(state, name)
    state.client.webhooks.DeleteWebhookEndpoint(webhooks_pb2.DeleteWebhookEndpointRequest(name=full))
    state.output.text(f"{full} is deleted", name=full, deleted=True)


@webhook.command("verify")
def webhook_verify(context: typer.Context, name: str) -> None:
    """Ask the receiver now whether it wants the deliveries. Example: `swell webhook verify ops`."""
    state = session(context)
    request = webhooks_pb2.VerifyWebhookEndpointRequest(name=_endpoint(state, name))
    state.output.one(state.client.webhooks.VerifyWebhookEndpoint(request, timeout=20))


@webhook.command("test")
def webhook_test(context: typer.Context, name: str) -> None:
    """Send one `webhook.test_fire` and show the answer. Example: `swell webhook test ops`."""
    state = session(context)
    request = webhooks_pb2.TestWebhookEndpointRequest(name=_endpoint(state, name))
    attempt = state.client.webhooks.TestWebhookEndpoint(request, timeout=20)
    state.output.one(attempt)
    if attempt.error:
        raise typer.Exit(1)


@webhook.command("rotate-secret")
def webhook_rotate_secret(
    context: typer.Context,
    name: str,
    overlap: Annotated[float, typer.Option(help="Hours that the old secret signs, too; 0 ends it.", min=0)] = 24.0,
) -> None:
    """Make a new secret and key pair. Example: `swell webhook rotate-secret ops --overlap 2`."""
    state = session(context)
    wanted = Duration()
    wanted.FromMilliseconds(round(overlap * 3_600_000))
    request = webhooks_pb2.RotateWebhookSecretRequest(name=_endpoint(state, name), overlap=wanted)
    state.output.one(state.client.webhooks.RotateWebhookSecret(request))


@webhook.command("deliveries")
def webhook_deliveries(
    context: typer.Context,
    name: str,
    delivery: Annotated[str, typer.Option(help="Show this one with its attempts: its `msg_…` id.")] = "",
    state_is: Annotated[str, typer.Option("--state", help="PENDING, SUCCEEDED or DEAD.")] = "",
    event: Annotated[str, typer.Option(help="Only this event type.")] = "",
) -> None:
    """What waits, was given up, or was delivered lately. Example: `swell webhook deliveries ops --state DEAD`."""
    state = session(context)
    full = _endpoint(state, name)
    if delivery:
        request = webhooks_pb2.GetDeliveryRequest(name=_delivery(full, delivery))
        state.output.one(state.client.webhooks.GetDelivery(request))
        return
    clauses = [f'{field} = "{value}"' for field, value in (("state", state_is), ("event_type", event)) if value]
    listed = webhooks_pb2.ListDeliveriesRequest(parent=full, page_size=500, filter=" AND ".join(clauses))
    found = state.client.pages(state.client.webhooks.ListDeliveries, listed, "deliveries")
    state.output.many(found, DELIVERY_COLUMNS)


def _delivery(endpoint: str, identifier: str) -> str:
    return identifier if identifier.startswith("organizations/") else f"{endpoint}/deliveries/{identifier}"


@webhook.command("resend")
def webhook_resend(context: typer.Context, name: str, delivery: str) -> None:
    """Make one delivery again, under its old id. Example: `swell webhook resend ops msg_0123…`."""
    state = session(context)
    request = webhooks_pb2.ResendDeliveryRequest(name=_delivery(_endpoint(state, name), delivery))
    state.output.one(state.client.webhooks.ResendDelivery(request))


def _timestamp(text: str, option: str) -> Timestamp | None:
    if not text:
        return None
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{option} takes a time such as 2026-01-31T08:00:00Z, not '{text}'") from None
    if at.tzinfo is None:
        raise typer.BadParameter(f"{option} needs a time zone: 2026-01-31T08:00:00Z")
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp


def _range(text: str) -> webhooks_pb2.PositionRange:
    topic, _, rest = text.partition("/")
    partition, _, positions = rest.partition("/")
    first, _, end = positions.partition("-")
    if not topic or not partition.isdigit() or not first.isdigit() or not (end.isdigit() or not end):
        raise typer.BadParameter(f"--positions takes TOPIC/PARTITION/FROM-TO, as `deliveries` shows them, not '{text}'")
    return webhooks_pb2.PositionRange(
        topic=topic, partition=int(partition), from_position=int(first), to_position=int(end or 0)
    )


@webhook.command("replay")
def webhook_replay(
    context: typer.Context,
    name: str,
    since: Annotated[str, typer.Option("--from", help="Events from this time on, RFC 3339.")] = "",
    until: Annotated[str, typer.Option("--to", help="Events before this time.")] = "",
    positions: Annotated[
        list[str] | None, typer.Option(help="TOPIC/PARTITION/FROM-TO, without TO up to the end; repeatable.")
    ] = None,
    event: EventOption = None,
    only_failed: Annotated[bool, typer.Option(help="Only what is dead or waits for another attempt.")] = False,
    status: Annotated[str, typer.Option(help="Instead: show this replay.")] = "",
    cancel: Annotated[str, typer.Option(help="Instead: end this replay.")] = "",
    show: Annotated[bool, typer.Option("--list", help="Instead: list replays.")] = False,
) -> None:
    """Make deliveries of a range again from the log, under their old ids and with the same bytes.

    Example: `swell webhook replay ops --from 2026-01-31T08:00:00Z --to 2026-02-01T08:00:00Z --event 'rollout.*'`
    """
    state = session(context)
    full = _endpoint(state, name)
    api = state.client.webhooks
    if status:
        state.output.one(api.GetReplay(webhooks_pb2.GetReplayRequest(name=f"{full}/replays/{status}")))
    elif cancel:
        state.output.one(api.CancelReplay(webhooks_pb2.CancelReplayRequest(name=f"{full}/replays/{cancel}")))
    elif show:
        listed = webhooks_pb2.ListReplaysRequest(parent=full, page_size=500)
        state.output.many(state.client.pages(api.ListReplays, listed, "replays"), REPLAY_COLUMNS)
    else:
        if not (since or until or positions or only_failed):
            raise typer.BadParameter("say what to replay: --from, --to, --positions or --only-failed")
        request = webhooks_pb2.ReplayDeliveriesRequest(
            parent=full,
            start_time=_timestamp(since, "--from"),
            end_time=_timestamp(until, "--to"),
            ranges=[_range(each) for each in positions or ()],
            event_types=event or [],
            only_failed=only_failed,
        )
        state.output.one(api.ReplayDeliveries(request))


@event_type.command("list")
def event_type_list(context: typer.Context) -> None:
    """Every event type that a filter can name. Example: `swell event-type list`."""
    state = session(context)
    request = webhooks_pb2.ListEventTypesRequest(parent=state.organization_name(), page_size=500)
    found = state.client.pages(state.client.webhooks.ListEventTypes, request, "event_types")
    state.output.many(found, ("name", "description"))


@event_type.command("show")
def event_type_show(
    context: typer.Context,
    name: str,
    version: VersionOption = None,
    example: Annotated[bool, typer.Option(help="An example of the body instead of its schema.")] = False,
) -> None:
    """The JSON Schema of an event's body. Example: `swell event-type show rollout.halted > halted.schema.json`."""
    state = session(context)
    full = state.name_in_organization("eventTypes", name)
    request = webhooks_pb2.GetEventTypeRequest(name=full, payload_version=version or 0)
    found = state.client.webhooks.GetEventType(request)
    typer.echo(json.dumps(json.loads(found.example if example else found.schema), indent=1, sort_keys=True))
