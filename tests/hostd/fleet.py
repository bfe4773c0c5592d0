"""Two real hypervisors with hostds, driven by raw RPCs as a control plane drives them."""

from __future__ import annotations

import secrets
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import Message
from grpc_status import rpc_status

from controlplane.common.errors import DroverError
from controlplane.common.identity import host_identity
from controlplane.common.reasons import Reason
from controlplane.common.rpc import TlsPaths
from hostd.v1 import domain_pb2, fence_pb2, host_service_pb2_grpc, job_pb2, preflight_pb2
from hostd.v1 import host_service_pb2 as pb
from tests.lab.host import IMAGES, Host
from tests.lab.network import LabNetwork, run
from tests.lab.process import Daemon, alive, kill_all
from tests.lab.wait import wait_for
from tests.support.pki import FLEET, TestPki

Mode = pb.EnsureStoppedRequest
# A seed of each host, where there is such a file.
KEPT = "kept/copy.raw"
CALL_SECONDS = 60.0
# A second storage root of each host.
FAST = "/var/lib/libvirt/fast"
# A copy that ended so goes on when it is started again.
GOES_ON = (Reason.COPY_INTERRUPTED, Reason.SESSION_REFUSED)


class HostClient:
    """Raw calls to one hostd; errors come back as DroverError."""

    def __init__(self, address: str, name: str, tls: TlsPaths, fleet: str = FLEET) -> None:
        override = host_identity(fleet, name).dns_name
        self._channel = grpc.secure_channel(
            address,
            tls.channel_credentials(),
            options=[
                ("grpc.ssl_target_name_override", override),
                ("grpc.max_reconnect_backoff_ms", 200),
                ("grpc.initial_reconnect_backoff_ms", 100),
            ],
        )
        self._stub = host_service_pb2_grpc.HostServiceStub(self._channel)

    def __call__(self, request: Message) -> Any:
        """Make the call that the request's type names, again until its outcome is known."""
        method = getattr(self._stub, type(request).__name__.removesuffix("Request"))

        def outcome() -> Any:
            try:
                return method(request, timeout=CALL_SECONDS, wait_for_ready=True)
            except grpc.RpcError as error:
                status = rpc_status.from_call(error) if isinstance(error, grpc.Call) else None
                told = DroverError.from_status(status) if status is not None else None
                if told is not None:
                    raise told from None
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    return None
                raise

        return wait_for(outcome, "outcome of a call", timeout_seconds=CALL_SECONDS)

    def watch(self, job_id: str) -> Iterator[job_pb2.Job]:
        """Follow a job."""
        return iter(self._stub.WatchJob(pb.WatchJobRequest(job_id=job_id), timeout=CALL_SECONDS))

    def close(self) -> None:
        self._channel.close()


@dataclass(frozen=True)
class Guest:
    """A machine of a test."""

    name: str
    uuid: str


@dataclass
class HostdHost:
    """A hypervisor with its hostd."""

    host: Host
    hostd: Daemon
    client: HostClient

    @property
    def name(self) -> str:
        return self.host.name

    def images(self) -> list[str]:
        """Every file below the storage root, as relative paths."""
        root = self.host.path(IMAGES)
        return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())

    def domains(self) -> list[str]:
        return self.host.virsh("list", "--all", "--name").split()

    def inventory(self) -> Any:
        return self.client(pb.GetInventoryRequest())


class TwoHosts:
    """Hosts `a` and `b`.

    Args:
        directory: Where everything of it lies.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.network = LabNetwork.of(self.directory)
        self.pki = TestPki(self.directory / "pki")
        self.hosts: dict[str, HostdHost] = {}

    def up(self) -> None:
        self.network.up()
        for number, name in enumerate(("a", "b"), start=1):
            host = Host(self.directory / name, self.network, name, number)
            host.up()
            config = self._configure(host)
            hostd = Daemon(
                name=f"hostd@{name}",
                command=host.enter(sys.executable, "-m", "hostd.main", "--config", str(config)),
                log=self.directory / f"hostd-{name}.log",
                ready=lambda host=host: self._serves(host),  # type: ignore[misc]
            )
            hostd.start()
            client = HostClient(f"{host.address}:7442", name, self.pki.controlplane())
            self.hosts[name] = HostdHost(host, hostd, client)

    def _configure(self, host: Host) -> Path:
        tls = self.pki.host(host.name)
        config = host.path("/etc/drover/hostd.toml")
        config.parent.mkdir(parents=True, exist_ok=True)
        host.path(FAST).mkdir()
        config.write_text(
            f"""
fleet = "{FLEET}"
host = "{host.name}"
[listen]
advertise_control = "{host.address}:7442"
advertise_data = "{host.address}:7443"
[tls]
ca = "{tls.ca}"
cert = "{tls.cert}"
key = "{tls.key}"
[storage]
seeds = ["images/{KEPT}"]
[storage.roots]
images = "{IMAGES}"
fast = "{FAST}"
[state]
directory = "{host.path("/var/lib/drover")}"
"""
        )
        return config

    def _serves(self, host: Host) -> bool:
        return ":7442 " in run("ip", "netns", "exec", host.namespace, "ss", "-Hltn")

    def down(self) -> None:
        for each in self.hosts.values():
            each.client.close()
        for namespace in self.network.namespaces():
            kill_all([int(pid) for pid in run("ip", "netns", "pids", namespace).split()])
        self.network.down()
        shutil.rmtree(self.directory, ignore_errors=True)

    def revive(self) -> None:
        """Start again what a test has left dead."""
        for each in self.hosts.values():
            for daemon in (each.host.libvirtd, each.hostd):
                if not alive(daemon.pid):
                    daemon.start()

    def __getitem__(self, name: str) -> HostdHost:
        return self.hosts[name]


@dataclass
class Move:
    """One migration as a control plane conducts it; each step is one method.

    Attributes:
        source: Host that the machine leaves.
        target: Host that it goes to.
        uuid: libvirt UUID of the machine.
        repeat: Make each call twice and expect the same answer.
        between: Called between any two calls.
    """

    source: HostdHost
    target: HostdHost
    uuid: str
    repeat: bool = False
    between: Callable[[str], None] = lambda step: None
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    saga_seq: int = 1
    generation: int = 1
    limit_bytes_per_second: int = 0
    size: preflight_pb2.TargetSize | None = None
    identity: str = ""
    volumes: list[domain_pb2.Volume] = field(default_factory=list)
    digests: list[pb.ExpectedDigest] = field(default_factory=list)

    @property
    def job_id(self) -> str:
        return f"{self.id}/copy"

    def fence(self, step: str) -> fence_pb2.Fence:
        return fence_pb2.Fence(
            domain_uuid=self.uuid,
            migration_id=self.id,
            saga_id=self.id,
            saga_seq=self.saga_seq,
            generation=self.generation,
            step=step,
        )

    def call(self, host: HostdHost, request: Any) -> Any:
        step = type(request).__name__.removesuffix("Request")
        request.fence.CopyFrom(self.fence(step))
        answer = host.client(request)
        self.between(step)
        if self.repeat:
            again = host.client(request)
            self.between(step)
            if step not in ("DiscardParked", "EnsureStarted", "PrepareTarget", "EnsureBuilt"):
                assert again == answer, step
        return answer

    # --- forward

    def prepare(self) -> Any:
        domain = self.source.client(pb.GetDomainRequest(domain_uuid=self.uuid))
        machine = preflight_pb2.IncomingMachine(domain=domain, size=self.size)
        answer = self.call(self.target, pb.PrepareTargetRequest(machine=machine))
        self.identity = answer.data_identity
        return answer

    def stop(self, mode: Any = Mode.MODE_GRACEFUL_THEN_FORCE, seconds: float = 30) -> Any:
        return self.until_stopped(self.source, mode, seconds)

    def until_stopped(self, host: HostdHost, mode: Any, seconds: float = 30) -> Any:
        timeout = duration_pb2.Duration(seconds=int(seconds))
        request = pb.EnsureStoppedRequest(mode=mode, timeout=timeout)
        request.retry_interval.FromMilliseconds(1000)

        def stopped() -> Any:
            request.fence.CopyFrom(self.fence("EnsureStopped"))
            answer = host.client(request)
            self.between("EnsureStopped")
            return answer if answer.stopped else None

        return wait_for(stopped, "guest stopped", timeout_seconds=seconds + 30)

    def park(self) -> Any:
        answer = self.call(self.source, pb.EnsureParkedRequest())
        self.volumes = list(answer.volumes)
        return answer

    def start_copy(self) -> job_pb2.Job:
        key = secrets.token_bytes(32)
        opened = self.call(
            self.target,
            pb.OpenReceiveRequest(
                session_key=key,
                sender_identity=host_identity(FLEET, self.source.name).uri,
                volumes=self.volumes,
            ),
        )
        request = pb.StartCopyRequest(
            job_id=self.job_id,
            session_key=key,
            data_address=opened.data_address,
            receiver_identity=self.identity,
            limit_bytes_per_second=self.limit_bytes_per_second,
            volume_ids=[volume.volume_id for volume in self.volumes],
        )
        request.fence.CopyFrom(self.fence("StartCopy"))
        job: job_pb2.Job = self.source.client(request)
        if self.repeat:
            assert self.source.client(request).job_id == job.job_id
        return job

    def job(self) -> job_pb2.Job:
        found: job_pb2.Job = self.source.client(pb.GetJobRequest(job_id=self.job_id))
        return found

    def copy(self, *, attempts: int = 10) -> job_pb2.Job:
        """Copy as the saga does: start again whatever can go on."""
        self.start_copy()
        for _ in range(attempts):
            job = wait_for(self._ended, "copy ended", timeout_seconds=120)
            self.between("Copy")
            if job.state == job_pb2.Job.STATE_SUCCEEDED:
                self.digests = [
                    pb.ExpectedDigest(volume_id=r.volume_id, digest=r.digest) for r in job.receipts
                ]
                return job
            error = DroverError.from_status(job.error) if job.HasField("error") else None
            if error is not None and error.reason not in GOES_ON:
                raise error
            self.start_copy()
        raise AssertionError(f"the copy did not end in {attempts} attempts: {job}")

    def _ended(self) -> job_pb2.Job | None:
        job = self.job()
        return job if job.state != job_pb2.Job.STATE_RUNNING else None

    def build(self) -> Any:
        return self.call(self.target, pb.EnsureBuiltRequest(digests=self.digests, size=self.size))

    def start(self) -> None:
        def running() -> bool:
            answer = self.call(self.target, pb.EnsureStartedRequest())
            return bool(answer.running)

        wait_for(running, "guest running", timeout_seconds=60)

    def discard(self) -> Any:
        return self.call(self.source, pb.DiscardParkedRequest())

    def forget(self) -> None:
        for host in (self.source, self.target):
            self.call(host, pb.ForgetMigrationRequest())

    def forward(self) -> None:
        """Everything up to a machine that runs on the target."""
        self.prepare()
        before = self.stop()
        self.park()
        self.copy()
        self.build()
        if before.previous_power_state == domain_pb2.POWER_STATE_RUNNING:
            self.start()

    def confirm(self) -> None:
        """Delete the source copy and the records."""
        self.discard()
        self.forget()

    # --- back

    def undo(self) -> None:
        """Undo everything as an unwinding saga does, whatever was done."""
        self.stop_if_there(self.target, Mode.MODE_FORCE)
        self.call(self.target, pb.EnsureUndefinedRequest())
        self.call(self.source, pb.CancelJobRequest(job_id=self.job_id))
        self.call(self.source, pb.EnsureUnparkedRequest())
        self.call(self.source, pb.RestorePowerRequest())
        self.call(self.source, pb.ForgetMigrationRequest())
        self.call(self.target, pb.EnsureAbsentRequest())
        self.call(self.target, pb.ForgetMigrationRequest())

    def stop_if_there(self, host: HostdHost, mode: Any) -> None:
        try:
            self.until_stopped(host, mode)
        except DroverError as error:
            if error.reason.name != "DOMAIN_NOT_FOUND":
                raise


@contextmanager
def two_hosts(directory: Path) -> Iterator[TwoHosts]:
    """Two hosts that are gone afterwards; their logs are shown when a test fails."""
    fleet = TwoHosts(directory)
    try:
        fleet.up()
        yield fleet
    except BaseException:
        for each in fleet.hosts.values():
            sys.stderr.write(f"--- hostd {each.name}\n{each.hostd.tail(60)}\n")
        raise
    finally:
        fleet.down()
