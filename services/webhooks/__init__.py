"""Webhooks: public events of an organization as signed HTTPS requests to its endpoints."""
