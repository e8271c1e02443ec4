"""The CNI plugin as a runtime calls it: an executable in a directory, environment variables, JSON in and out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from wincey.cli.install_cni import install, plugin_script

STANDARD = Path("/usr/lib/cni")
"""Where Debian's containernetworking-plugins are."""


def require_plugins() -> None:
    """Skip where the standard plugins are missing."""
    if not (STANDARD / "bridge").exists():
        pytest.skip("needs the standard CNI plugins (package containernetworking-plugins)")


def require(*programs: str) -> None:
    """Skip where a runtime is missing."""
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"needs {program}")


class Answer:
    """What a call of the plugin gave."""

    def __init__(self, done: subprocess.CompletedProcess[bytes]) -> None:
        self.code = done.returncode
        self.stdout = done.stdout.decode()
        self.stderr = done.stderr.decode()

    @property
    def json(self) -> Any:
        """Standard output."""
        return json.loads(self.stdout)

    def __repr__(self) -> str:
        """For a failing assertion."""
        return f"Answer({self.code}, {self.stdout!r}, {self.stderr!r})"


class Plugin:
    """The plugin, installed with the standard ones in `directory`/bin; it keeps its files in `directory` too.

    netns: the host's namespace, None for this one.
    """

    def __init__(self, directory: Path, *, netns: str | None = None, standard: bool = True) -> None:
        self.directory, self.netns = directory, netns
        self.bin = directory / "bin"
        self.state = directory / "state"
        self.leases = directory / "ipam"
        self.subnet_file = directory / "subnet.env"
        install(self.bin / "flannel", plugin_script(), mode=0o755)
        for each in sorted(STANDARD.iterdir()) if standard else []:
            (self.bin / each.name).symlink_to(each)

    def conf(self, name: str = "cni-flannel", version: str | None = "1.0.0", **fields: Any) -> dict[str, Any]:
        """A netconf that keeps all files in our directory."""
        base = {"name": name, "type": "flannel", "subnetFile": str(self.subnet_file), "dataDir": str(self.state)}
        fields["ipam"] = {"dataDir": str(self.leases)} | fields.get("ipam", {})
        return base | ({"cniVersion": version} if version else {}) | fields

    def environment(self, command: str, container: str, netns: str, interface: str, **more: str) -> dict[str, str]:
        """The variables of a call; an empty one is left out."""
        cni = {"COMMAND": command, "CONTAINERID": container, "NETNS": netns, "IFNAME": interface, "PATH": str(self.bin)}
        names = {name: value for name, value in os.environ.items() if not name.startswith("CNI_")}
        return names | {f"CNI_{name}": value for name, value in cni.items() if value} | more

    def argv(self) -> list[str]:
        """The command of a call."""
        enter = ["nsenter", f"--net=/run/netns/{self.netns}", "--"] if self.netns else []
        return [*enter, str(self.bin / "flannel")]

    def call(
        self,
        command: str,
        conf: dict[str, Any] | bytes,
        *,
        container: str = "c1",
        netns: str = "",
        interface: str = "eth0",
        **more: str,
    ) -> Answer:
        """Call it."""
        done = subprocess.run(
            self.argv(),
            input=conf if isinstance(conf, bytes) else json.dumps(conf).encode(),
            env=self.environment(command, container, netns, interface, **more),
            capture_output=True,
            timeout=60,
            check=False,
        )
        return Answer(done)

    def write_env(self, text: str | None = None) -> None:
        """Write a subnet.env, by default the reference's example."""
        self.subnet_file.write_text(text or ENV)

    def addresses(self, name: str = "cni-flannel") -> list[str]:
        """The addresses that host-local has given away in a network."""
        directory = self.leases / name
        kept = ("lock", "last_reserved_ip.")
        return sorted(each.name for each in directory.glob("*") if not each.name.startswith(kept))


ENV = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"
