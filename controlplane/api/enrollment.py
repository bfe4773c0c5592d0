"""EnrollmentService: a new host exchanges its token for a certificate."""

from __future__ import annotations

import hashlib
from typing import Any

import grpc.aio
import structlog
from sqlalchemy import Connection

from controlplane.api.fields import check_address
from controlplane.api.services import Enroller, Services
from controlplane.common.errors import DroverError
from controlplane.common.reasons import Reason
from controlplane.domain.names import check_host_id, host_name
from controlplane.domain.states import HostState
from controlplane.security.tokens import secret_digest
from controlplane.store import hosts, tokens
from controlplane.v1 import host_service_pb2 as pb
from controlplane.v1.host_service_pb2_grpc import EnrollmentServiceServicer

log = structlog.stdlib.get_logger(__name__)


class EnrollmentServicer(EnrollmentServiceServicer):
    """See proto/controlplane/v1/host_service.proto.

    Args:
        services: What the servicers work with.
        enroller: Signs hosts.
    """

    def __init__(self, services: Services, enroller: Enroller) -> None:
        self._services = services
        self._enroller = enroller

    async def JoinHost(
        self, request: pb.JoinHostRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.JoinHostResponse:
        """Use the token up and sign the host's key, both or neither."""
        host = check_host_id(request.host_id)
        address = check_address("address", request.address)

        def join(tx: Connection) -> bytes:
            if not tokens.use(tx, secret_digest(request.secret), host, self._services.clock()):
                # One message for all cases: a caller without a certificate is
                # not told which hosts or tokens exist.
                raise DroverError(
                    Reason.JOIN_TOKEN_INVALID,
                    f"The join token is not valid for {host_name(host)}: it is wrong, was used "
                    "before, has expired or was made for another host.",
                    metadata={"host": host},
                )
            certificate = self._enroller.sign_host_csr(request.csr_pem, host)
            hosts.update(
                tx,
                host,
                state=HostState.ENABLED,
                state_reason="",
                address=address,
                certificate_sha256=hashlib.sha256(certificate).hexdigest(),
            )
            return certificate

        certificate = await self._services.database.run(join)
        log.info("host joined", host=host, address=address)
        self._services.host_joined()
        return pb.JoinHostResponse(
            certificate_pem=certificate,
            ca_pem=self._enroller.ca_pem,
            fleet=self._enroller.fleet,
        )
