"""Gathers the facts: from the daemon where it answers, from the store, the kernel and the programs of the packet filters."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import struct
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from wincey.agent.doctor import asking
from wincey.agent.doctor.facts import Daemon, Facts, Network, Peer
from wincey.agent.doctor.rules import Chain, read_iptables, read_nft
from wincey.agent.doctor.storelook import StoreLook
from wincey.agent.envfile import EnvFile, read_env_file
from wincey.http.client import HttpClient, HttpError
from wincey.kernel.interfaces import Interface, read_interfaces
from wincey.kernel.rtnl import ROUTE_PROTOCOL
from wincey.model.address import Subnet, parse_address
from wincey.model.errors import UNREADABLE, BadAddress, BadConfig
from wincey.model.report import API, DifferenceReport, NetworkReport, PeerReport, PeersReport, StatusReport

T = TypeVar("T")

PATIENCE = 4.0
"""Seconds for the daemon to answer."""

MOST = 32
"""How many peers are asked where none is named."""

PORTS = {"vxlan": 8472, "udp": 8285, "wireguard": 51820}
"""UDP ports of encapsulated packets, unless the config has another."""

_LOG_LINES = 40
_SYSCTLS = ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/rp_filter")


async def ask_daemon(path: str) -> Daemon:
    """Who listens at the local API's socket, and its status."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(PATIENCE)
        connection.connect(path)
        pid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    except OSError as error:
        return Daemon(state="none", socket=path, trouble=(error.strerror or str(error)).lower())
    finally:
        connection.close()
    log = _log_of(pid)
    process = _process_state(pid)
    if process.startswith("T"):
        return Daemon(
            state="hangs", socket=path, pid=pid, process=process, log=log, trouble="it is stopped by a signal"
        )
    try:
        status = await _ask(path, "status", StatusReport)
    except (HttpError, *UNREADABLE) as error:
        return Daemon(state="hangs", socket=path, pid=pid, process=process, log=log, trouble=str(error))
    return Daemon(state="answers", socket=path, pid=pid, process=process, log=log, status=status)


async def gather(daemon: Daemon, store: StoreLook, subnet_file: str, named: Sequence[str], host: str) -> Facts:
    """All facts. named: the peers to ask, by name, address or subnet, none for all."""
    interfaces = read_interfaces()
    networks: list[Network] = []
    if daemon.status:
        peers, differences = await asyncio.gather(
            _ask_or(daemon.socket, "peers", list[PeersReport]), _ask_or(daemon.socket, "diff", list[DifferenceReport])
        )
        networks += [
            _from_reports(
                report,
                next((each for each in peers or [] if each.network == report.name), None),
                next((each for each in differences or [] if each.network == report.name), None),
                store,
                interfaces,
            )
            for report in daemon.status.networks
        ]
    elif store.host or store.leases:
        networks.append(_from_store(store, interfaces, subnet_file))
    elif (env := read_env_file(subnet_file)).subnets:
        networks.append(_from_env(env, interfaces))
    before = _counters()
    asked = await asyncio.gather(*(asking.ask_all(each, _chosen(each, named), interfaces) for each in networks))
    after = _counters()
    chains, routes = await asyncio.gather(asyncio.to_thread(_chains), asyncio.to_thread(_routes))
    devices = {each.underlay for each in networks} | {device for each in networks for device in each.devices}
    sysctls = (*_SYSCTLS, *(f"net/ipv4/conf/{each}/rp_filter" for each in sorted(filter(None, devices))))
    return Facts(
        host=host,
        daemon=daemon,
        store=store.facts,
        networks=asked,
        interfaces=interfaces,
        sysctls={path: text for path in sysctls if (text := _read(f"/proc/sys/{path}")) is not None},
        routes=routes,
        chains=chains,
        counters={name: after[name] - before.get(name, 0) for name in after}
        | {f"total.{name}": count for name, count in after.items()},
        features=_features(),
        notes=[store.trouble] if store.trouble else [],
    )


def _features() -> dict[str, bool]:
    return {path: os.path.exists(path) for path in ("/dev/net/tun",)}


def unknown_names(facts: Facts, named: Sequence[str]) -> list[str]:
    """Those of `named` that are no peer's, as far as the peers are known."""
    return [name for name in named if not any(_is(peer, name) for network in facts.networks for peer in network.peers)]


def _chosen(network: Network, named: Sequence[str]) -> list[Peer]:
    if named:
        return [peer for peer in network.peers if any(_is(peer, name) for name in named)]
    return list(network.peers)[:MOST]


def _is(peer: Peer, name: str) -> bool:
    """Whether a peer is meant: its address, its subnet, an address in it, or a name of that address."""
    if "/" in name:
        return name in map(str, peer.subnets)
    try:
        address = parse_address(name)
    except BadAddress:
        with contextlib.suppress(OSError):
            found = {parse_address(str(each[4][0]).partition("%")[0]) for each in socket.getaddrinfo(name, None)}
            return peer.public in found
        return False
    return address == peer.public or any(subnet.contains(address) for subnet in peer.subnets)


def _from_reports(
    report: NetworkReport,
    peers: PeersReport | None,
    difference: DifferenceReport | None,
    store: StoreLook,
    interfaces: Sequence[Interface],
) -> Network:
    left = {
        tuple(map(str, lease.key.subnets)): store.left.get(key) for key, lease in store.leases.items()
    }  # by subnets: keys in the store have a prefix
    interface = report.interface
    return Network(
        name=report.name,
        ranges=[Subnet.parse(each) for each in report.networks],
        backend=report.backend,
        mtu=report.mtu,
        underlay=interface.name if interface else "",
        local=[parse_address(each) for each in interface.addresses] if interface else (),
        public=[parse_address(each) for each in interface.public] if interface else (),
        own=[Subnet.parse(each) for each in report.lease.subnets] if report.lease else (),
        left=report.lease.left if report.lease else None,
        leased=store.leased,
        devices=report.devices,
        port=_port(report.backend, report.devices, store),
        peers=[
            Peer(
                subnets=[Subnet.parse(each) for each in peer.subnets],
                public=public,
                backend=peer.backend or "udp",
                left=left.get(tuple(peer.subnets)),
            )
            for peer in (peers.peers if peers else ())
            if peer.subnets and (public := _public(peer))
        ],
        missing=difference.missing if difference else (),
        changed=difference.changed if difference else (),
        surplus=difference.surplus if difference else (),
        failures=[f"{each.what}: {each.reason}" for each in report.reconcile.failures],
        bad_keys=[f"{each.key}: {each.reason}" for each in report.bad_keys],
        repaired=report.reconcile.repaired,
        trouble=report.trouble or "",
    )


def _public(peer: PeerReport) -> bytes | None:
    """Its address between hosts; where the store does not tell it, what exists here for the peer does."""
    found = re.search(r" (?:dst|at|via) (\S+)", " ".join(sorted(peer.objects))) if not peer.public else None
    text = peer.public[0] if peer.public else found[1] if found else ""
    with contextlib.suppress(BadAddress):
        return parse_address(text)
    return None


def _from_store(store: StoreLook, interfaces: Sequence[Interface], subnet_file: str) -> Network:
    config, host, difference = store.config, store.host, store.difference
    env = read_env_file(subnet_file)
    backend = config.backend_type if config else ""
    devices = [each.name for each in interfaces if each.name.startswith("flannel")]
    return Network(
        ranges=config.networks if config else env.networks,
        backend=backend,
        mtu=store.prepared.backend.mtu if store.prepared else env.mtu,
        underlay=host.underlay if host else "",
        local=[each for each in (host.local, host.local_v6) if each] if host else (),
        public=[each for each in (host.public, host.public_v6) if each] if host else (),
        own=store.own.subnets if store.own else [each.masked() for each in env.subnets],
        left=store.left.get(store.own_key),
        leased=store.leased,
        devices=devices,
        port=_port(backend, devices, store),
        peers=[
            Peer(
                subnets=lease.key.subnets,
                public=public,
                backend=lease.attrs.backend_type or "udp",
                left=store.left.get(key),
            )
            for key, lease in store.leases.items()
            if key != store.own_key
            and (public := lease.attrs.public_ip or lease.attrs.public_ipv6)
            and not (host and public in {host.public, host.public_v6})
        ],
        missing=difference.missing if difference else (),
        changed=difference.changed if difference else (),
        surplus=difference.surplus if difference else (),
    )


def _from_env(env: EnvFile, interfaces: Sequence[Interface]) -> Network:
    """What can be known without daemon and store."""
    return Network(
        ranges=env.networks,
        mtu=env.mtu,
        own=[each.masked() for each in env.subnets],
        devices=[each.name for each in interfaces if each.name.startswith("flannel")],
    )


def _port(backend: str, devices: Sequence[str], store: StoreLook) -> int:
    if backend not in PORTS:
        return 0
    option = "ListenPort" if backend == "wireguard" else "Port"
    configured = 0
    with contextlib.suppress(BadConfig):  # told as what is wrong with the config
        configured = store.config.backend.integer(option, 0, minimum=0, maximum=65535) if store.config else 0
    if configured or backend != "vxlan":
        return configured or PORTS[backend]
    for link in _json(["ip", "-d", "-j", "link", "show", "type", "vxlan"]):
        if link.get("ifname") in devices:
            return int(link["linkinfo"]["info_data"]["port"])
    return PORTS[backend]


async def _ask_or(path: str, what: str, kind: type[T]) -> T | None:
    try:
        return await _ask(path, what, kind)
    except (HttpError, *UNREADABLE):
        return None


async def _ask(path: str, what: str, kind: type[T]) -> T:
    client = HttpClient(f"unix://{path}")
    try:
        answer = await client.request("GET", f"/{API}/{what}", timeout=PATIENCE)
    finally:
        await client.close()
    return msgspec.json.decode(answer.body, type=kind)


def _process_state(pid: int) -> str:
    found = re.search(r"^State:\s+(.+)$", _read(f"/proc/{pid}/status") or "", re.MULTILINE)
    return found[1] if found else ""


def _log_of(pid: int) -> list[str]:
    """The end of the file that the process logs to, if it is one."""
    with contextlib.suppress(OSError):
        path = os.readlink(f"/proc/{pid}/fd/2")
        if os.path.isfile(path):
            with open(path, errors="replace") as file:
                file.seek(max(0, os.path.getsize(path) - 20_000))
                return file.read().splitlines()[-_LOG_LINES:]
    return []


def command_line(pid: int) -> tuple[list[str], Mapping[str, str]]:
    """Arguments and environment of a process; raises OSError."""
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    pairs = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return arguments, dict(each.split("=", 1) for each in pairs if "=" in each)


def _counters() -> dict[str, int]:
    """Of this network namespace: /proc/net/snmp and netstat, as `Udp.InCsumErrors`."""
    found: dict[str, int] = {}
    for path in ("/proc/net/snmp", "/proc/net/netstat"):
        lines = (_read(path) or "").splitlines()
        for names, values in zip(lines[::2], lines[1::2], strict=False):
            group = names.partition(":")[0]
            for name, value in zip(names.split()[1:], values.split()[1:], strict=False):
                found[f"{group}.{name}"] = int(value)
    return found


def _routes() -> list[tuple[Subnet, str]]:
    """The main table's routes that are not ours."""
    found = []
    for family in ("-4", "-6"):
        for route in _json(["ip", "-N", family, "-j", "route", "show", "table", "254"]):
            text = str(route.get("dst", "default"))
            if str(route.get("protocol")) == str(ROUTE_PROTOCOL) or text == "default":
                continue
            with contextlib.suppress(BadAddress):
                bits = 32 if family == "-4" else 128
                subnet = Subnet.parse(text if "/" in text else f"{text}/{bits}")
                where = f"via {route['gateway']} " if "gateway" in route else ""
                found.append((subnet, f"{where}dev {route.get('dev', '?')}"))
    return found


def _chains() -> list[Chain]:
    """What the packet filters have; of those whose program is not there, nothing."""
    chains: list[Chain] = []
    taken: set[tuple[str, str]] = set()
    ruleset = _run(["nft", "-j", "list", "ruleset"])
    document = json.loads(ruleset) if ruleset else {}
    tables = {
        (each["table"]["family"], each["table"]["name"]) for each in document.get("nftables", []) if "table" in each
    }
    for family, program in (("ip", "iptables"), ("ip6", "ip6tables")):
        legacy = set((_read(f"/proc/net/{family}_tables_names") or "").split())
        for table in ("raw", "mangle", "filter"):
            if (family, table) in tables and (text := _run([f"{program}-nft", "-t", table, "-S"])):
                chains += read_iptables(f"{program}-nft", table, text)
                taken.add((family, table))
            if table in legacy and (text := _run([f"{program}-legacy", "-t", table, "-S"])):
                chains += read_iptables(f"{program}-legacy", table, text)
    document["nftables"] = [
        each
        for each in document.get("nftables", [])
        if not any((body.get("family"), body.get("table")) in taken for body in each.values())
    ]
    return chains + read_nft(document, _run(["nft", "-a", "list", "ruleset"]))


def _json(argv: list[str]) -> Sequence[Mapping[str, Any]]:
    text = _run(argv)
    with contextlib.suppress(ValueError):
        found: Sequence[Mapping[str, Any]] = json.loads(text or "[]")
        return found
    return []


def _run(argv: list[str]) -> str:
    """What a program prints, "" where it fails or is not there."""
    if not shutil.which(argv[0]):
        return ""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
        return done.stdout if not done.returncode else ""
    return ""


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return None
