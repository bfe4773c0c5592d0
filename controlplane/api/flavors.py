"""FlavorService: the sizes that a resize can ask for."""

from __future__ import annotations

from typing import Any

import grpc.aio
from sqlalchemy import Connection

from controlplane.api.convert import flavor_to_proto
from controlplane.api.etags import expected_generation
from controlplane.api.fields import check_range
from controlplane.api.paging import decode_token, encode_token, page_limit
from controlplane.api.request_ids import Call
from controlplane.api.services import Services
from controlplane.domain.model import FlavorSize
from controlplane.domain.names import parse_flavor
from controlplane.store import flavors
from controlplane.v1 import flavor_pb2
from controlplane.v1 import flavor_service_pb2 as pb
from controlplane.v1.flavor_service_pb2_grpc import FlavorServiceServicer

Context = grpc.aio.ServicerContext[Any, Any]

_LARGEST = 2**62
_LEAST_MEMORY_MIB = 16
_MOST_VCPUS = 1024


class FlavorServicer(FlavorServiceServicer):
    """See proto/controlplane/v1/flavor_service.proto."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def CreateFlavor(
        self, request: pb.CreateFlavorRequest, context: Context
    ) -> flavor_pb2.Flavor:
        """Add a size."""
        given = request.flavor
        size = FlavorSize(
            name=parse_flavor(given.name, "flavor.name"),
            vcpus=check_range("flavor.vcpus", given.vcpus, 1, _MOST_VCPUS),
            memory_mib=check_range(
                "flavor.memory_mib", given.memory_mib, _LEAST_MEMORY_MIB, _LARGEST
            ),
            root_disk_bytes=check_range(
                "flavor.root_disk_bytes", given.root_disk_bytes, 0, _LARGEST
            ),
        )
        return await Call(self._services, "CreateFlavor", request).run(
            flavor_pb2.Flavor, lambda tx: flavor_to_proto(flavors.create(tx, size))
        )

    async def GetFlavor(self, request: pb.GetFlavorRequest, context: Context) -> flavor_pb2.Flavor:
        """Return one size."""
        name = parse_flavor(request.name)
        return await self._services.database.run(lambda tx: flavor_to_proto(flavors.get(tx, name)))

    async def ListFlavors(
        self, request: pb.ListFlavorsRequest, context: Context
    ) -> pb.ListFlavorsResponse:
        """Return sizes in name order."""
        limit = page_limit(request.page_size)
        after = decode_token(request.page_token, "ListFlavors", (), 1) or ("",)
        page = await self._services.database.run(
            lambda tx: flavors.list_page(tx, after=after[0], limit=limit + 1)
        )
        shown = page[:limit]
        more = len(page) > limit
        return pb.ListFlavorsResponse(
            flavors=[flavor_to_proto(flavor) for flavor in shown],
            next_page_token=encode_token("ListFlavors", (), (shown[-1].name,)) if more else "",
        )

    async def DeleteFlavor(
        self, request: pb.DeleteFlavorRequest, context: Context
    ) -> pb.DeleteFlavorResponse:
        """Remove a size."""
        name = parse_flavor(request.name)

        def delete(tx: Connection) -> pb.DeleteFlavorResponse:
            flavors.delete(tx, name, expected_generation=expected_generation(request.etag))
            return pb.DeleteFlavorResponse()

        return await Call(self._services, "DeleteFlavor", request).run(
            pb.DeleteFlavorResponse, delete
        )
