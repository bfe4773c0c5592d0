"""Would this machine run here; could it leave. Nothing is changed.

`gather_target` collects facts, `check_target` judges them: the checks are pure and
run in one fixed order, the ones that no mending helps first, so that the first
failure is the most telling one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from controlplane.common.errors import DroverError, Violation
from controlplane.common.reasons import Reason
from hostd.disks.users import FileUser
from hostd.libvirt.domains import Inspection
from hostd.libvirt.sharing import Sharer
from hostd.preflight_model import (
    FAIL,
    Check,
    IncomingMachine,
    TargetFacts,
    failed,
    passed,
    warned,
)
from hostd.preflight_needs import NEEDS
from hostd.preflight_storage import STORAGE
from hostd.v1 import domain_pb2, preflight_pb2

_HOST_CPU_MODES = ("host-passthrough", "host-model", "maximum")


_Machine = IncomingMachine
Judge = Callable[[_Machine, TargetFacts], Check]


def check_target(machine: _Machine, facts: TargetFacts) -> preflight_pb2.PreflightReport:
    """Every check of a target, whatever its outcome. Pure.

    While libvirt is away only what does not need it is judged.
    """
    checks = [_libvirt(machine, facts)]
    judges = [*_NEED_LIBVIRT, *_ALWAYS] if facts.host.libvirt_connected else _ALWAYS
    checks += [judge(machine, facts) for judge in judges]
    return preflight_pb2.PreflightReport(checks=checks)


def check_source(
    found: Inspection, users: Sequence[FileUser], sharers: Sequence[Sharer]
) -> preflight_pb2.PreflightReport:
    """Every check of a source. Pure.

    Args:
        found: The domain.
        users: Who has its disks open.
        sharers: Other domains that need its disks.
    """
    domain = found.domain
    checks = [_state(domain)]
    for obstacle in found.obstacles:
        about_disk = obstacle.reason is not Reason.INSTANCE_IMMOVABLE
        name = "disk" if about_disk else "obstacle"
        checks.append(failed(name, obstacle.reason, obstacle.message, obstacle.reason.info.help))
    if not found.obstacles:
        checks.append(passed("obstacle", "Nothing in its definition or disks binds it here."))
    checks += _uses(domain, users, sharers)
    if domain.power_state == domain_pb2.POWER_STATE_SHUTOFF:
        repair = "To have it repaired now: qemu-img check -f qcow2 -r all"
        checks += _closed(domain.volumes, lambda volume: f"{repair} {volume.path}")
    return preflight_pb2.PreflightReport(checks=checks)


def check_parked(volumes: Iterable[domain_pb2.Volume]) -> preflight_pb2.PreflightReport:
    """What a person should know of the volumes of a machine that is parked. Pure."""
    fix = "Look at it with qemu-img check once the move has ended: it is in use until then."
    return preflight_pb2.PreflightReport(checks=_closed(volumes, lambda _: fix))


def refuse_failures(report: preflight_pb2.PreflightReport, subject: str) -> None:
    """Raise when a check failed.

    Raises:
        DroverError: The reason of the first failed check; all failed ones are
            its violations.
    """
    failures = [check for check in report.checks if check.outcome == FAIL]
    if not failures:
        return
    raise DroverError(
        Reason.__members__.get(failures[0].reason, Reason.INSTANCE_IMMOVABLE),
        failures[0].message,
        subject=subject,
        metadata={"check": failures[0].check, "failed": ",".join(c.check for c in failures)},
        violations=[Violation(subject, f"{c.message} {c.fix}".strip(), c.reason) for c in failures],
    )


# --- source


def _state(domain: domain_pb2.Domain) -> Check:
    state = domain_pb2.PowerState.Name(domain.power_state).removeprefix("POWER_STATE_")
    movable = (domain_pb2.POWER_STATE_RUNNING, domain_pb2.POWER_STATE_SHUTOFF)
    if domain.power_state in movable:
        return passed("state", f"It is {state}.")
    message = f"It is {state}; only a running or shut-off machine can move."
    return failed("state", Reason.INSTANCE_STATE, message, Reason.INSTANCE_STATE.info.help)


def _uses(
    domain: domain_pb2.Domain, users: Sequence[FileUser], sharers: Sequence[Sharer]
) -> Iterator[Check]:
    running = domain.power_state != domain_pb2.POWER_STATE_SHUTOFF
    # Its own QEMU has them open while it runs; anybody else must not.
    strangers = [
        user
        for user in users
        if not (running and (user.runs_domain(domain.uuid) or (not user.pid and user.locked)))
    ]
    for user in strangers:
        message = f"{user.path} is open in {user}."
        yield failed("disk-use", Reason.DISK_IN_USE, message, f"Stop {user}.")
    for sharer in sharers:
        message = f"{sharer}, which would be left without it."
        fix = f"Move {sharer.domain_name} off that file, or give it a copy."
        yield failed("disk-use", Reason.INSTANCE_IMMOVABLE, message, fix)
    if not strangers and not sharers:
        yield passed("disk-use", "Nobody else has its disks.")


def _closed(
    volumes: Iterable[domain_pb2.Volume], fix: Callable[[domain_pb2.Volume], str]
) -> Iterator[Check]:
    """What was not closed moves as it is: the next QEMU repairs it, there as here."""
    unclean = [volume for volume in volumes if volume.unclean]
    for volume in unclean:
        later = "nobody repairs it, as it is only read"
        if not volume.read_only:
            later = "QEMU repairs it when the guest starts"
        message = (
            f"Disk {volume.volume_id} ({volume.path}) was not closed cleanly, as when its QEMU"
            f" or its host crashed. It moves as it is, mark and all; {later}."
        )
        yield warned("disk-closed", message, fix(volume))
    if not unclean:
        yield passed("disk-closed", "No image of it says that it was not closed cleanly.")


# --- target


def _libvirt(machine: _Machine, facts: TargetFacts) -> Check:
    if not facts.host.libvirt_connected:
        return failed(
            "libvirt", Reason.LIBVIRT_UNAVAILABLE, "libvirt does not answer.", "Start libvirtd."
        )
    libvirt_, qemu = _version(facts.host.libvirt_version), _version(facts.host.qemu_version)
    return passed("libvirt", f"libvirt {libvirt_} with QEMU {qemu} answers.")


def _uuid(machine: _Machine, facts: TargetFacts) -> Check:
    for other in facts.neighbours:
        if other.uuid == machine.domain.uuid:
            message = f"A domain with UUID {other.uuid} ({other.name}) is here already."
            return failed("uuid", Reason.TARGET_UUID_TAKEN, message, f"virsh undefine {other.uuid}")
    return passed("uuid", "No domain here has its UUID.")


def _name(machine: _Machine, facts: TargetFacts) -> Check:
    for other in facts.neighbours:
        if other.name == machine.domain.name and other.uuid != machine.domain.uuid:
            message = f"Another domain called {other.name} {other.where} ({other.uuid})."
            fix = f"virsh domrename {other.uuid} NEWNAME"
            if other.migration_id:
                fix = f"Wait for the end of migration {other.migration_id}: confirm or revert it."
            return failed("name", Reason.TARGET_NAME_TAKEN, message, fix)
    return passed("name", f"No other domain here is called {machine.domain.name}.")


def _mac(machine: _Machine, facts: TargetFacts) -> Check:
    mine = {i.mac_address for i in machine.domain.interfaces if i.mac_address}
    for other in facts.neighbours:
        for mac in sorted(mine & other.mac_addresses):
            if other.uuid != machine.domain.uuid:
                message = f"The domain {other.name} {other.where} with the MAC address {mac}."
                fix = f"Give {other.name} another MAC address."
                return failed("mac", Reason.TARGET_MAC_TAKEN, message, fix)
    return passed("mac", "No domain here has one of its MAC addresses.")


def _virt_type(machine: _Machine, facts: TargetFacts) -> Check:
    wanted, found = machine.domain.virt_type, list(facts.host.virt_types)
    if machine.domain.arch != facts.host.arch:
        message = f"The CPUs here are {facts.host.arch}; it needs {machine.domain.arch}."
        fix = "Choose a host of that architecture."
        return failed("virt-type", Reason.TARGET_LACKS_VIRT_TYPE, message, fix)
    if wanted not in found:
        message = f"It needs {wanted}; this host has {', '.join(found) or 'nothing'}."
        fix = "Load the kvm module; see that virtualisation is on in the firmware."
        return failed("virt-type", Reason.TARGET_LACKS_VIRT_TYPE, message, fix)
    return passed("virt-type", f"{wanted} for {machine.domain.arch} can be had.")


def _machine_type(machine: _Machine, facts: TargetFacts) -> Check:
    wanted = machine.domain.machine_type
    if wanted not in facts.host.machine_types:
        message = f"QEMU {_version(facts.host.qemu_version)} here has no machine type {wanted}."
        fix = "Install a QEMU that has it."
        return failed("machine-type", Reason.TARGET_LACKS_MACHINE_TYPE, message, fix)
    return passed("machine-type", f"The machine type {wanted} can be had.")


def _cpu(machine: _Machine, facts: TargetFacts) -> Check:
    domain = machine.domain
    if domain.virt_type == "kvm" and domain.cpu_mode in _HOST_CPU_MODES:
        message = (
            f"It takes its CPU from the host ({domain.cpu_mode}), which here is a"
            f" {facts.host.cpu_model}."
        )
        fix = "See that the source has the same model, or give the machine a named one."
        return warned("cpu", message, fix)
    if facts.cpu_fits is False:
        message = f"The CPU that it is defined with cannot be had on a {facts.host.cpu_model}."
        if domain.virt_type != "kvm":
            # QEMU emulates what it can and says what it leaves out.
            fix = "Compare the guest's CPU features with those on the source."
            return warned("cpu", message, fix)
        fix = "Choose a host with these features, or lower the machine's CPU model."
        return failed("cpu", Reason.TARGET_LACKS_CPU_FEATURE, message, fix)
    if facts.cpu_fits is None and domain.cpu_xml:
        message = "libvirt here cannot compare the CPU that it is defined with."
        return warned("cpu", message, "Compare the hosts by hand.")
    return passed("cpu", "The CPU that it is defined with can be had.")


def _firmware(machine: _Machine, facts: TargetFacts) -> Check:
    wanted = machine.domain.firmware or "bios"
    if wanted not in facts.host.firmwares:
        message = f"It needs {wanted} firmware; here is {', '.join(facts.host.firmwares)}."
        fix = "Install the UEFI firmware (package ovmf or edk2-ovmf)."
        return failed("firmware", Reason.TARGET_LACKS_FIRMWARE, message, fix)
    return passed("firmware", f"{wanted} firmware can be had.")


def _tpm(machine: _Machine, facts: TargetFacts) -> Check:
    if machine.domain.has_tpm and not facts.host.tpm:
        message = "It has a TPM, and swtpm is not installed here."
        return failed("tpm", Reason.TARGET_LACKS_TPM, message, "Install swtpm and swtpm-tools.")
    return passed("tpm", "A TPM can be had." if machine.domain.has_tpm else "It needs no TPM.")


def _memory(machine: _Machine, facts: TargetFacts) -> Check:
    wanted_mib = machine.size.memory_mib if machine.HasField("size") else machine.domain.memory_mib
    limit_mib = facts.host.memory_mib - facts.host.reserved_memory_mib
    if wanted_mib > limit_mib:
        message = f"It needs {wanted_mib} MiB of memory; guests here can have {limit_mib} MiB."
        fix = "Choose a smaller flavor or a larger host."
        return failed("memory", Reason.TARGET_LACKS_MEMORY, message, fix)
    return passed("memory", f"{wanted_mib} of the {limit_mib} MiB that guests here can have.")


def _vcpus(machine: _Machine, facts: TargetFacts) -> Check:
    wanted = machine.size.vcpus if machine.HasField("size") else machine.domain.vcpus
    if facts.max_vcpus and wanted > facts.max_vcpus:
        message = f"Its machine type has at most {facts.max_vcpus} virtual CPUs; it needs {wanted}."
        return failed("vcpus", Reason.TARGET_LACKS_CPUS, message, "Choose a smaller flavor.")
    if wanted > facts.host.cpus:
        message = f"It has {wanted} virtual CPUs, more than the {facts.host.cpus} CPUs here."
        return warned("vcpus", message, "Choose a larger host.")
    return passed("vcpus", f"{wanted} virtual CPUs on {facts.host.cpus} CPUs.")


def _bridge(machine: _Machine, facts: TargetFacts) -> Check:
    interfaces = machine.domain.interfaces
    wanted = {i.source for i in interfaces if i.type == "bridge"} - set(facts.host.bridges)
    devices = {i.source for i in interfaces if i.type == "direct"} - facts.network_devices
    missing = sorted({*wanted, *devices} - {""})
    if missing:
        message = f"There is no {', '.join(missing)} here; there are bridges "
        message += f"{', '.join(facts.host.bridges) or 'none'}."
        fix = "; ".join(
            f"ip link add {name} type bridge" if name in wanted else f"Bring {name} up here."
            for name in missing
        )
        return failed("bridge", Reason.TARGET_LACKS_BRIDGE, message, fix)
    return passed("bridge", "Every bridge and device that it is attached to is here.")


def _network(machine: _Machine, facts: TargetFacts) -> Check:
    wanted = {i.source for i in machine.domain.interfaces if i.type == "network"}
    missing = sorted(wanted - set(facts.host.networks))
    if missing:
        here = ", ".join(facts.host.networks) or "none"
        message = f"There is no active libvirt network {', '.join(missing)}; there are {here}."
        fix = "; ".join(f"virsh net-start {name}" for name in missing)
        return failed("network", Reason.TARGET_LACKS_NETWORK, message, fix)
    return passed("network", "Every libvirt network that it is attached to is active.")


def _time(machine: _Machine, facts: TargetFacts) -> Check:
    if facts.clock_synchronised is False:
        message = "The kernel says that this host's clock is not synchronised."
        fix = "Start chrony or systemd-timesyncd."
        return warned("time", message, fix)
    return passed("time", "Nothing is known against this host's clock.")


_NEED_LIBVIRT: tuple[Judge, ...] = (
    _uuid, _name, _mac, _virt_type, _machine_type, _cpu, _firmware, _tpm, _memory, _vcpus,
    _network, *NEEDS,
)  # fmt: skip
_ALWAYS: tuple[Judge, ...] = (_bridge, *STORAGE, _time)


# --- words


def _version(number: int) -> str:
    return f"{number // 1_000_000}.{number // 1000 % 1000}.{number % 1000}"
