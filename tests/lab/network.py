"""Names and addresses of a lab, and the one bridge that its hosts hang on.

Everything is named after the folder of the lab, so that several checkouts can
run labs side by side, and so that what a killed lab left can be found again.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LabNetwork:
    """Names and addresses.

    Attributes:
        tag: Prefix of every interface and namespace, at most 8 characters.
        subnet: The lab's /24; `.1` is the bridge, in the root namespace.
    """

    tag: str
    subnet: ipaddress.IPv4Network

    @classmethod
    def of(cls, directory: Path) -> LabNetwork:
        """The network of the lab in a folder: always the same one."""
        digest = hashlib.sha256(str(directory.resolve()).encode()).digest()
        subnet = ipaddress.IPv4Network(f"10.{100 + digest[0] % 100}.{digest[1]}.0/24")
        return cls(tag=f"dv{digest.hex()[:5]}", subnet=subnet)

    @property
    def bridge(self) -> str:
        """The bridge in the root namespace."""
        return self.tag

    @property
    def gateway(self) -> str:
        """Address of the bridge."""
        return str(self.subnet[1])

    def address(self, number: int) -> str:
        """Address of host number `number`, counted from 0."""
        return str(self.subnet[10 + number])

    def namespace(self, host: str) -> str:
        """Network namespace of a host."""
        return f"{self.tag}-{host}"

    def up(self) -> None:
        """Make the bridge.

        Raises:
            RuntimeError: Something else on this machine uses the subnet.
        """
        for link in json.loads(run("ip", "-j", "address")):
            for address in link.get("addr_info", ()):
                taken = ipaddress.ip_address(address["local"]) in self.subnet
                if taken and link["ifname"] != self.bridge:
                    raise RuntimeError(f"{link['ifname']} already uses {self.subnet}")
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "address", "add", f"{self.gateway}/24", "dev", self.bridge)
        run("ip", "link", "set", self.bridge, "up")

    def plug(self, host: str, number: int) -> None:
        """Make the namespace of a host and connect it to the bridge."""
        namespace, port = self.namespace(host), f"{self.tag}{host}"
        run("ip", "netns", "add", namespace)
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        run("ip", "link", "set", port, "master", self.bridge, "up")
        address = f"{self.address(number)}/24"
        run("ip", "-n", namespace, "address", "add", address, "dev", "eth0")
        for interface in ("lo", "eth0"):
            run("ip", "-n", namespace, "link", "set", interface, "up")

    def port(self, host: str) -> str:
        """The bridge's end of a host's cable."""
        return f"{self.tag}{host}"

    def down(self) -> None:
        """Remove namespaces, cables and the bridge, whatever there is of them."""
        for namespace in self.namespaces():
            run("ip", "netns", "delete", namespace, check=False)
        for link in self.links():
            run("ip", "link", "delete", link, check=False)

    def namespaces(self) -> list[str]:
        """The lab's namespaces that exist."""
        names = [line.split()[0] for line in run("ip", "netns", "list").splitlines() if line]
        return [name for name in names if name.startswith(f"{self.tag}-")]

    def links(self) -> list[str]:
        """The lab's interfaces in the root namespace that exist."""
        return [
            link["ifname"]
            for link in json.loads(run("ip", "-j", "link"))
            if link["ifname"].startswith(self.tag)
        ]


def run(*command: str, check: bool = True) -> str:
    """Run a command and return its standard output.

    Raises:
        RuntimeError: It failed, with all that it printed.
    """
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    if check and done.returncode != 0:
        said = f"{done.stdout}{done.stderr}"
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{said}")
    return done.stdout
