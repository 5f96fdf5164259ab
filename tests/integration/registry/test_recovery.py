"""The log is the database: after a power cut the registry is what it was."""

from __future__ import annotations

import uuid

from groundswell.registry.v1 import registry_pb2 as pb

from tests.integration.registry.running import Running


def test_a_killed_registry_comes_back_with_all_it_had_said(running: Running) -> None:
    tenant = running.organization()
    request = pb.CreateProductRequest(
        parent=tenant.name, product_id="pump", product=pb.Product(), request_id=str(uuid.uuid4())
    )
    product = tenant.call("CreateProduct", request)
    device = tenant.call(
        "CreateDevice", pb.CreateDeviceRequest(parent=product.name, device_id="SN-1", device=pb.Device(tags=["a"]))
    )
    running.restart()
    assert tenant.call("GetDevice", pb.GetDeviceRequest(name=device.name)) == device
    assert tenant.call("CreateProduct", request) == product
    other = pb.CreateDeviceRequest(parent=product.name, device_id="SN-1", device=pb.Device())
    assert tenant.refused("CreateDevice", other)[1] == "ALREADY_EXISTS"
