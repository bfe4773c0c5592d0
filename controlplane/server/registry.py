"""Which servicers are on which port."""

from __future__ import annotations

from collections.abc import Sequence

from controlplane.api.enrollment import EnrollmentServicer
from controlplane.api.flavors import FlavorServicer
from controlplane.api.hosts import HostServicer
from controlplane.api.instances import InstanceServicer
from controlplane.api.migrations import MigrationServicer
from controlplane.api.services import Enroller, Services
from controlplane.server.ports import Register
from controlplane.v1.flavor_service_pb2_grpc import add_FlavorServiceServicer_to_server
from controlplane.v1.host_service_pb2_grpc import (
    add_EnrollmentServiceServicer_to_server,
    add_HostServiceServicer_to_server,
)
from controlplane.v1.instance_service_pb2_grpc import add_InstanceServiceServicer_to_server
from controlplane.v1.migration_service_pb2_grpc import add_MigrationServiceServicer_to_server

API_SERVICES = (
    "controlplane.v1.HostService",
    "controlplane.v1.InstanceService",
    "controlplane.v1.FlavorService",
    "controlplane.v1.MigrationService",
)


def api_registrations(services: Services) -> Sequence[Register]:
    """What adds the services of the API port to a server."""
    return (
        lambda server: add_HostServiceServicer_to_server(HostServicer(services), server),
        lambda server: add_InstanceServiceServicer_to_server(InstanceServicer(services), server),
        lambda server: add_FlavorServiceServicer_to_server(FlavorServicer(services), server),
        lambda server: add_MigrationServiceServicer_to_server(MigrationServicer(services), server),
    )


def enrolment_registrations(services: Services, enroller: Enroller) -> Sequence[Register]:
    """What adds the service of the enrolment port to a server."""
    return (
        lambda server: add_EnrollmentServiceServicer_to_server(
            EnrollmentServicer(services, enroller), server
        ),
    )
