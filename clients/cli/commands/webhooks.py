"""Webhook endpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.field_mask_pb2 import FieldMask
from groundswell.webhooks.v1 import webhooks_pb2

from clients.cli.context import session

webhook = typer.Typer(help="Webhook endpoints.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the group."""
    app.add_typer(webhook, name="webhook")


@webhook.command("create")
def webhook_create(
    context: typer.Context,
    endpoint_id: str,
    url: str,
    event: Annotated[list[str] | None, typer.Option(help="Event type or `prefix.*`, repeatable; default: all.")] = None,
    ca: Annotated[Path | None, typer.Option(help="PEM of a private CA of the receiver.", exists=True)] = None,
) -> None:
    """Create an endpoint. The answer holds the secret: keep it.

    Example: `swell webhook create ops https://ops.example/hooks --event 'rollout.*'`
    """
    state = session(context)
    wanted = webhooks_pb2.WebhookEndpoint(url=url, event_types=event or [], ca_pem=ca.read_text() if ca else "")
    request = webhooks_pb2.CreateWebhookEndpointRequest(
        parent=state.organization_name(), webhook_endpoint_id=endpoint_id, webhook_endpoint=wanted
    )
    state.output.one(state.client.webhooks.CreateWebhookEndpoint(request))


def _set_state(context: typer.Context, name: str, wanted: webhooks_pb2.WebhookEndpoint.State.ValueType) -> None:
    state = session(context)
    full = state.name_in_organization("webhookEndpoints", name)
    request = webhooks_pb2.UpdateWebhookEndpointRequest(
        webhook_endpoint=webhooks_pb2.WebhookEndpoint(name=full, state=wanted), update_mask=FieldMask(paths=["state"])
    )
    state.output.one(state.client.webhooks.UpdateWebhookEndpoint(request))


@webhook.command("disable")
def webhook_disable(context: typer.Context, name: str) -> None:
    """Stop deliveries to an endpoint."""
    _set_state(context, name, webhooks_pb2.WebhookEndpoint.STATE_DISABLED)


@webhook.command("enable")
def webhook_enable(context: typer.Context, name: str) -> None:
    """Start deliveries again."""
    _set_state(context, name, webhooks_pb2.WebhookEndpoint.STATE_ACTIVE)


@webhook.command("delete")
def webhook_delete(context: typer.Context, name: str) -> None:
    """Delete an endpoint."""
    state = session(context)
    full = state.name_in_organization("webhookEndpoints", name)
    state.client.webhooks.DeleteWebhookEndpoint(webhooks_pb2.DeleteWebhookEndpointRequest(name=full))
    state.output.text(f"{full} is deleted", name=full, deleted=True)
