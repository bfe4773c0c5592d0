"""Checks of what a definition takes from its host by number, size or name. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from controlplane.common.reasons import Reason
from hostd.preflight_model import Check, IncomingMachine, TargetFacts, failed, passed, warned

_KIB_PER_MIB = 1024


def _loader(machine: IncomingMachine, facts: TargetFacts) -> Check:
    wanted = machine.domain.host_needs.loader_path
    if facts.supplies.loader_problem:
        fix = "Install the package that has it on the source, or let libvirt choose the firmware."
        message = facts.supplies.loader_problem
        return failed("loader", Reason.TARGET_LACKS_FIRMWARE, message, fix)
    said = f"The firmware image {wanted} is here." if wanted else "It names no firmware image."
    return passed("loader", said)


def _cpu_pins(machine: IncomingMachine, facts: TargetFacts) -> Check:
    wanted, here = machine.domain.host_needs.cpus, facts.supplies.cpus
    if not wanted:
        return passed("cpu-pins", "It is pinned to no CPU.")
    if here is None:
        return _untold("cpu-pins", "which CPUs are online")
    missing = sorted(set(wanted) - here)
    if missing:
        message = f"It is pinned to CPU {_ranges(missing)}; online here are {_ranges(here)}."
        fix = "Pin it to CPUs that both hosts have, or choose a larger host."
        return failed("cpu-pins", Reason.TARGET_LACKS_PINNED_CPUS, message, fix)
    return passed("cpu-pins", f"The CPUs {_ranges(wanted)} that it is pinned to are online.")


def _numa(machine: IncomingMachine, facts: TargetFacts) -> Check:
    wanted, here = machine.domain.host_needs.numa_nodes, facts.supplies.numa_nodes
    if not wanted:
        return passed("numa", "Its memory is bound to no NUMA node.")
    if here is None:
        return _untold("numa", "which NUMA nodes there are")
    missing = sorted(set(wanted) - here)
    if missing:
        message = f"Its memory is bound to NUMA node {_ranges(missing)}; here are {_ranges(here)}."
        fix = "Bind it to nodes that both hosts have, or choose another host."
        return failed("numa", Reason.TARGET_LACKS_NUMA_NODE, message, fix)
    return passed("numa", f"The NUMA nodes {_ranges(wanted)} that it is bound to are here.")


def _hugepages(machine: IncomingMachine, facts: TargetFacts) -> Check:
    sizes, here = machine.domain.host_needs.hugepage_kib, facts.supplies.hugepages
    if not sizes:
        return passed("hugepages", "It takes no huge pages.")
    if here is None:
        return _untold("hugepages", "which huge pages are free")
    memory_mib = machine.size.memory_mib if machine.HasField("size") else machine.domain.memory_mib
    for size in sizes:
        kib = size or facts.supplies.default_hugepage_kib
        if kib not in here:
            message = f"Its memory is made of pages of {kib} KiB, which this host does not have."
            if not kib:
                message = "Its memory is made of huge pages, which this host does not have."
            fix = "Choose another host, or another page size."
            return failed("hugepages", Reason.TARGET_LACKS_HUGEPAGES, message, fix)
        # How its memory is shared out among several sizes is QEMU's affair.
        needed = -(-memory_mib * _KIB_PER_MIB // kib) if len(sizes) == 1 else 1
        if here[kib] < needed:
            message = f"It needs {needed} free pages of {kib} KiB; here are {here[kib]}."
            fix = f"Reserve more: /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages."
            return failed("hugepages", Reason.TARGET_LACKS_HUGEPAGES, message, fix)
    return passed("hugepages", "There are enough free pages of the sizes that it takes.")


def _network_filters(machine: IncomingMachine, facts: TargetFacts) -> Check:
    wanted, here = machine.domain.host_needs.network_filters, facts.supplies.network_filters
    if not wanted:
        return passed("network-filter", "It has no network filters.")
    if here is None:
        return _untold("network-filter", "which network filters are defined")
    missing = sorted(set(wanted) - here)
    if missing:
        message = f"The network filter {', '.join(missing)} is not defined here."
        fix = "; ".join(f"virsh nwfilter-dumpxml {name} on the source" for name in missing)
        fix += ", then virsh nwfilter-define here."
        return failed("network-filter", Reason.TARGET_LACKS_NETWORK_FILTER, message, fix)
    return passed("network-filter", "Every network filter that it has is defined.")


NEEDS = (_loader, _cpu_pins, _numa, _hugepages, _network_filters)


def _untold(check: str, what: str) -> Check:
    return warned(check, f"libvirt here does not tell {what}.", "Compare the hosts by hand.")


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: "0-3, 8"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return (
        ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
    )
