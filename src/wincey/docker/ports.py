"""Which of the host's ports are published: `-p` read, conflicts told."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from wincey.docker.errors import Refused
from wincey.docker.protocol import PortBinding
from wincey.docker.state import Port
from wincey.model.address import parse_address
from wincey.model.errors import UNREADABLE, BadAddress

_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}
_EPHEMERAL = range(32768, 61000)


def choose(bindings: Sequence[Any], taken: Sequence[Port]) -> list[Port]:
    """The ports for a container's bindings; taken: those that others have. Raises Refused, and then none is published."""
    chosen: list[Port] = []
    for raw in bindings:
        try:
            binding = msgspec.convert(raw, PortBinding)
        except UNREADABLE as error:
            raise Refused(f"the published port {raw} can't be read: {error}") from None
        host_ip = _host_ip(binding.HostIP or "")
        if host_ip is None:
            continue
        chosen.append(_one(binding, host_ip, [*taken, *chosen]))
    return chosen


def _host_ip(text: str) -> str | None:
    """The address to publish on, "" for every one; None for an IPv6 one, where nothing is to be published."""
    try:
        address = parse_address(text) if text else bytes(4)
    except BadAddress as error:
        raise Refused(str(error)) from None
    if len(address) == 16:
        return None
    return text if any(address) else ""


def _one(binding: PortBinding, host_ip: str, taken: Sequence[Port]) -> Port:
    proto = _PROTOCOLS.get(binding.Proto)
    if proto is None:
        raise Refused(f"IP protocol {binding.Proto} can't be published: tcp, udp and sctp can")
    wanted = range(binding.HostPort, max(binding.HostPort, binding.HostPortEnd) + 1) if binding.HostPort else _EPHEMERAL
    for number in wanted:
        if not any(_collide(other, proto, host_ip, number) for other in taken) and _free(proto, host_ip, number):
            return Port(proto, host_ip, number, binding.Port)
    where = f"{host_ip or '0.0.0.0'}:{wanted[0]}" + (f"-{wanted[-1]}" if len(wanted) > 1 else "")
    raise Refused(f"port {where}/{proto} is in use on this host already")


def _collide(other: Port, proto: str, host_ip: str, number: int) -> bool:
    same_ip = not other.host_ip or not host_ip or other.host_ip == host_ip
    return other.proto == proto and other.host_port == number and same_ip


def _free(proto: str, host_ip: str, number: int) -> bool:
    """Whether no program of the host listens there, whose connections the published port would take."""
    if proto == "sctp":
        return True  # not every kernel can ask
    kind = socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, kind) as probe:
        if proto == "tcp":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host_ip, number))
        except OSError:
            return False
    return True
