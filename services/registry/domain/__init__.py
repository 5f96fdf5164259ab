"""The registry's pure core: see `registry` for the rules, `state` for what is folded, `commands` for what is asked."""

from services.registry.domain.commands import (
    Bootstrap,
    CreateApiKey,
    CreateCohort,
    CreateDevice,
    CreateGateway,
    CreateMember,
    CreateOrganization,
    CreateProduct,
    EnrolGateway,
    ProvisionDevice,
    RetireDevice,
    RevokeApiKey,
    UndoProvisioning,
    UpdateDevice,
    UpdateProduct,
)
from services.registry.domain.registry import Registry
from services.registry.domain.rules import Quotas
from services.registry.domain.state import State, find

__all__ = [
    "Bootstrap",
    "CreateApiKey",
    "CreateCohort",
    "CreateDevice",
    "CreateGateway",
    "CreateMember",
    "CreateOrganization",
    "CreateProduct",
    "EnrolGateway",
    "ProvisionDevice",
    "Quotas",
    "Registry",
    "RetireDevice",
    "RevokeApiKey",
    "State",
    "UndoProvisioning",
    "UpdateDevice",
    "UpdateProduct",
    "find",
]
