"""The one table of reasons that Drover gives for an error.

A reason is part of the API: clients switch on it. So a symbol is never renamed
and never reused for something else; a message may change at any time.

Who does what on seeing a code:

==================== =======================================================
code                 meaning, and what the caller does
==================== =======================================================
INVALID_ARGUMENT     wrong in any state; correct the request
NOT_FOUND            no such thing; look at the list
ALREADY_EXISTS       the name is taken; choose another
FAILED_PRECONDITION  wrong in this state; do what the message says first
ABORTED              lost a race; read again and decide anew
RESOURCE_EXHAUSTED   nothing has room; the details say why, host by host
PERMISSION_DENIED    known, but not allowed
UNAUTHENTICATED      not known; get a certificate
UNAVAILABLE          something is out of reach; ask again, unchanged
INTERNAL             a bug; report the incident id
==================== =======================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum, unique

import grpc


@unique
class Detail(StrEnum):
    """Which google.rpc detail goes with a reason besides ErrorInfo."""

    NONE = "none"
    BAD_REQUEST = "bad_request"
    PRECONDITION = "precondition"
    RESOURCE = "resource"
    RETRY = "retry"


@dataclass(frozen=True)
class ReasonInfo:
    """What is fixed about a reason.

    Attributes:
        code: gRPC status code.
        detail: The google.rpc detail that is added.
        help: What to do next, in general; the message can be more precise.
    """

    code: grpc.StatusCode
    detail: Detail
    help: str


_C = grpc.StatusCode


def _bad(help_: str) -> ReasonInfo:
    return ReasonInfo(_C.INVALID_ARGUMENT, Detail.BAD_REQUEST, help_)


def _state(help_: str) -> ReasonInfo:
    return ReasonInfo(_C.FAILED_PRECONDITION, Detail.PRECONDITION, help_)


def _missing(help_: str) -> ReasonInfo:
    return ReasonInfo(_C.NOT_FOUND, Detail.RESOURCE, help_)


def _race(help_: str) -> ReasonInfo:
    return ReasonInfo(_C.ABORTED, Detail.NONE, help_)


def _away(help_: str) -> ReasonInfo:
    return ReasonInfo(_C.UNAVAILABLE, Detail.RETRY, help_)


class Reason(Enum):
    """Every reason, by symbol."""

    # --- requests that are wrong in any state
    INVALID_NAME = _bad("Give the name in the form that the message shows.")
    INVALID_FIELD = _bad("Correct the field that the message names.")
    INVALID_PAGE_TOKEN = _bad("Start again from the first page with the new query.")
    REQUEST_ID_REUSED = _bad("Use a fresh request id for a different request.")
    SAME_HOST = _bad("Name another host, or none to let the scheduler choose.")
    SAME_FLAVOR = _bad("Leave the flavor out to move without a resize.")
    DISK_SHRINK = _bad("Choose a flavor whose root disk is at least as large.")

    # --- things that do not exist, or exist twice
    HOST_NOT_FOUND = _missing("See `drover host list`.")
    INSTANCE_NOT_FOUND = _missing("See `drover instance list`.")
    FLAVOR_NOT_FOUND = _missing("See `drover flavor list`.")
    MIGRATION_NOT_FOUND = _missing("See `drover migration list`.")
    DOMAIN_NOT_FOUND = _missing("See `virsh list --all` on the host.")
    JOB_NOT_FOUND = _missing("Start the job again.")
    PARKED_NOT_FOUND = _missing("Look at the parked machines of the host's inventory.")
    AMBIGUOUS_NAME = _bad("Use the UUID of the one that is meant.")
    ALREADY_EXISTS = ReasonInfo(_C.ALREADY_EXISTS, Detail.RESOURCE, "Choose another name.")

    # --- hosts
    HOST_DISABLED = _state("Enable it with `drover host enable`, or choose another host.")
    HOST_DEAD = _state("Start drover-hostd there, or choose another host.")
    HOST_ALIVE = _state("Switch it off, wait until it counts as dead, then say so again.")
    HOST_GONE = _state("The host was declared gone; join it anew to use it again.")
    HOST_NOT_JOINED = _state("Run the join command on the host first.")
    HOST_NOT_REQUESTED = _state("Leave the host out to let the scheduler choose.")
    HOST_BUSY = _state("Finish or abandon the moves of this host first.")
    NO_VALID_HOST = ReasonInfo(
        _C.RESOURCE_EXHAUSTED,
        Detail.PRECONDITION,
        "The details give the reason for each host; mend the cheapest one.",
    )

    # --- instances
    INSTANCE_STATE = _state("Bring the machine to running or shut off first.")
    INSTANCE_BUSY = _state(
        "Wait for its move or cancel it; confirm or revert one that has finished."
    )
    INSTANCE_LOCKED = _state("Ask the one who locked it to unlock it.")
    INSTANCE_CONFLICT = _state("Remove the duplicate definition from all hosts but one.")
    INSTANCE_MISSING = _state("See why its host does not report it.")
    INSTANCE_IMMOVABLE = _state("Remove what the message names from the machine.")
    INSTANCE_STARTED_MEANWHILE = _state("Find out who started it; then move it again.")
    INSTANCE_NOT_OWNED = _state("The machine belongs to another host now; act on it there.")
    DOMAIN_RELEASED = _state("Adopt it again with `drover instance adopt`.")

    # --- moves
    MIGRATION_STATE = _state("See `drover migration show` for what can be done now.")
    CANCEL_TOO_LATE = _state("Revert it: `drover migration revert`.")
    CANCELLED = _state("The move was cancelled; start a new one to move the machine.")
    SHUTDOWN_TIMEOUT = _state("Allow force, give it more time, or stop it from inside.")
    DIGEST_MISMATCH = _state("Nothing was lost. Check memory and disks of both hosts; move again.")
    BUILD_FAILED = _state("See the message from libvirt; correct the target and move again.")
    START_FAILED = _state(
        "See the log of the guest on the target; the guest is back on its source."
    )

    # --- what a target lacks
    TARGET_LACKS_SPACE = _state("Free space in the storage root, or choose another host.")
    TARGET_LACKS_SMALL_BLOCKS = _state(
        "Make the raw disk a multiple of the target's blocks, or choose another host."
    )
    TARGET_LACKS_MEMORY = _state("Move something away, or choose another host.")
    TARGET_LACKS_CPUS = _state("Choose a host with at least as many CPUs.")
    TARGET_LACKS_BRIDGE = _state("Create the bridge on the target.")
    TARGET_LACKS_NETWORK = _state("Define and start the libvirt network on the target.")
    TARGET_LACKS_MACHINE_TYPE = _state("Install a QEMU that has it on the target.")
    TARGET_LACKS_CPU_FEATURE = _state("Choose a host with the same CPU features.")
    TARGET_LACKS_FIRMWARE = _state("Install the firmware package on the target.")
    TARGET_LACKS_PINNED_CPUS = _state("Pin it to CPUs that both hosts have, or choose another.")
    TARGET_LACKS_NUMA_NODE = _state("Bind it to nodes that both hosts have, or choose another.")
    TARGET_LACKS_HUGEPAGES = _state("Reserve huge pages on the target, or choose another host.")
    TARGET_LACKS_NETWORK_FILTER = _state("Define the network filter on the target.")
    TARGET_LACKS_TPM = _state("Install swtpm on the target.")
    TARGET_LACKS_ROOT = _state("Configure the storage root on the target.")
    TARGET_LACKS_VIRT_TYPE = _state("Choose a host with the same kind of virtualisation.")
    TARGET_NAME_TAKEN = _state("Rename or remove the other domain on the target.")
    TARGET_UUID_TAKEN = _state("Remove the other domain with this UUID from the target.")
    TARGET_MAC_TAKEN = _state("Give one of the two machines another MAC address.")
    TARGET_FILE_EXISTS = _state("Move the file on the target out of the way.")
    TARGET_UNREACHABLE = _state("Open the data port of the target for the source.")
    TARGET_CLOCK_SKEW = _state("Synchronise the clocks of the hosts.")

    # --- source disks
    DISK_MISSING = _state("Restore the file, or correct the definition.")
    DISK_IN_USE = _state("Stop the process that the message names.")
    DISK_FORMAT_FORBIDDEN = _state("Convert the disk to a format that the host allows.")
    DISK_OUTSIDE_ROOTS = _state("Move the disk under a storage root, or configure one.")
    DISK_CHANGED = _state("Find out what wrote to the disk; then move it again.")
    DISK_CORRUPT = _state("Run `qemu-img check` on the disk.")
    DISK_IO_ERROR = _state("Check the medium that the message names.")
    SOURCE_LACKS_SPACE = _state("Free some space there; then move the machine again.")

    # --- lost races and fences
    STALE_GENERATION = _race("Another control-plane replica took over; it goes on by itself.")
    ETAG_MISMATCH = _race("Read the resource again and decide anew.")
    CLAIM_LOST = _race("Another move took the room; try again.")

    # --- who may
    UNAUTHENTICATED = ReasonInfo(
        _C.UNAUTHENTICATED, Detail.NONE, "Use a certificate of this fleet."
    )
    PERMISSION_DENIED = ReasonInfo(
        _C.PERMISSION_DENIED, Detail.NONE, "Ask somebody who has the role that the message names."
    )
    JOIN_TOKEN_INVALID = ReasonInfo(
        _C.PERMISSION_DENIED, Detail.NONE, "Make a new one with `drover host add`."
    )
    SESSION_REFUSED = ReasonInfo(
        _C.PERMISSION_DENIED, Detail.NONE, "The control plane opens a new session by itself."
    )

    # --- out of reach, and bugs
    HOST_UNREACHABLE = _away("It is asked again until it answers.")
    LIBVIRT_UNAVAILABLE = _away("Start libvirtd on the host; it is asked again until it answers.")
    HOST_DISK_FULL = _away("Free some space there; it is asked again until it can be done.")
    COPY_INTERRUPTED = _away("The copy goes on from what is durable on the target.")
    DATABASE_UNAVAILABLE = _away("Ask again; if it lasts, look at the control plane's database.")
    SHUTTING_DOWN = _away("Ask again; another replica or the restarted one answers.")
    DEADLINE_REQUIRED = _bad("Set a deadline of at least one second on the call.")
    INTERNAL = ReasonInfo(_C.INTERNAL, Detail.NONE, "Report the incident id; it is in the log.")

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self.info.code

    @property
    def info(self) -> ReasonInfo:
        """What is fixed about the reason."""
        info: ReasonInfo = self.value[1]
        return info

    def __new__(cls, info: ReasonInfo) -> Reason:
        """Keep members distinct although many share the same code and detail."""
        member = object.__new__(cls)
        member._value_ = (len(cls.__members__), info)
        return member
