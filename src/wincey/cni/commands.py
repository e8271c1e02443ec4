"""ADD, DEL and CHECK of one attachment: a container's interface in this network."""

from __future__ import annotations

import os
import sys

from wincey.cni import delegate
from wincey.cni.jsontext import encode
from wincey.cni.netconf import NetConf, delegate_config
from wincey.cni.protocol import BAD_NETWORK_CONFIG, INTERNAL, CniError
from wincey.cni.state import StateDir
from wincey.cni.subnetenv import read_subnet_env

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn


class Request:
    """What the runtime asks for, out of its environment variables; those that a command does not need may be empty."""

    __slots__ = ("container", "interface", "netns", "path")

    def __init__(self, container: str, netns: str, interface: str, path: str) -> None:
        self.container = container
        self.netns = netns
        self.interface = interface
        self.path = path


def add(conf: NetConf, request: Request) -> NoReturn:
    """Write the delegate's config for DEL, then become the delegate; raises CniError, with nothing written unless it can be."""
    config = delegate_config(conf, read_subnet_env(conf.subnet_file))
    program = delegate.find(config["type"], request.path)
    text = encode(config)
    tell(f"delegateAdd: netconf sent to delegate plugin:\n{text.decode()}")
    state = StateDir(conf.data_dir)
    state.write(conf.name, request.container, request.interface, request.netns, text)
    delegate.become(program, os.open(state.file(request.container), os.O_RDONLY), "ADD")


def delete(conf: NetConf, request: Request) -> None:
    """Have the delegate undo ADD, then forget it; raises CniError, with the state kept for the runtime's next attempt."""
    state = StateDir(conf.data_dir)
    try:
        saved = state.read(request.container)
    except ValueError as error:
        tell(f"{state.file(request.container)} can't be read: {error}; cleaning up without it")
        saved = None
    if saved and saved[1].get("name") == conf.name:
        delegate_del(saved[1]["type"], saved[0], request)
    else:  # nothing, or what the same container's ADD in another network left
        from wincey.cni.collect import rescue  # noqa: PLC0415  # only a DEL without state needs it

        rescue(conf, request)
    state.forget(request.container, request.interface)


def delegate_del(kind: str, config: bytes, request: Request) -> None:
    """Run the DEL of a delegate of some type; raises CniError with the delegate's own words."""
    program = delegate.find(kind, request.path)
    environment = {
        "CNI_COMMAND": "DEL",
        "CNI_CONTAINERID": request.container,
        "CNI_NETNS": request.netns,
        "CNI_IFNAME": request.interface,
    }
    code, output = delegate.run(program, config, environment)
    if code:
        raise delegate.failure(program, code, output)


def check(conf: NetConf, request: Request) -> NoReturn:
    """Check what is ours, then become the delegate for the rest; raises CniError."""
    state = StateDir(conf.data_dir)
    path = state.file(request.container)
    try:
        saved = state.read(request.container)
    except ValueError as error:
        raise CniError(INTERNAL, f"{path} can't be read: {error}", "DEL and ADD make it anew") from None
    if saved is None:
        raise CniError(INTERNAL, f"there is no {path}: the container was not added, or was deleted since")
    if conf.prev_result is None:
        raise CniError(BAD_NETWORK_CONFIG, "CHECK needs the result of ADD: prevResult is missing")
    config = saved[1]
    _check_subnet(config, read_subnet_env(conf.subnet_file).subnets)
    program = delegate.find(config["type"], request.path)
    config["cniVersion"] = conf.version
    config["prevResult"] = with_gateways(conf.prev_result)
    delegate.become(program, delegate.in_memory(config), "CHECK")


def with_gateways(result: dict[str, Any]) -> dict[str, Any]:
    """A result whose routes name their gateways.

    `bridge` sends a route without one to the gateway of the address, but its CHECK then looks for a route without a gateway,
    and finds fault with every healthy container.
    """
    gateways = {_is_v6(text): text for each in reversed(result.get("ips") or []) if (text := each.get("gateway"))}
    routes = []
    for route in result.get("routes") or []:
        gateway = gateways.get(_is_v6(route.get("dst", "")))
        routes.append({"gw": gateway} | route if gateway else route)
    return {**result, "routes": routes} if routes else result


def _is_v6(text: str) -> bool:
    return ":" in text


def _check_subnet(config: dict[str, Any], now: list[str]) -> None:
    ipam = config.get("ipam")
    ranges = ipam.get("ranges") if isinstance(ipam, dict) else None
    if not isinstance(ranges, list):
        return  # of an early flannel, with a single subnet
    then = [each[0].get("subnet") for each in ranges if each]
    if then != now:
        raise CniError(
            INTERNAL,
            f"this host's subnet is {', '.join(now)}, the container's address is of {', '.join(map(str, then))}",
            "other hosts do not find the container at its address any more: start it anew",
        )


def tell(text: str) -> None:
    """One message for whoever reads the runtime's log."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()  # before another program takes our place
