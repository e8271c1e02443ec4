"""What is compared: one line for each way from a container on one host to a container on the other.

Another way is another line here. A variant that this machine, or this Wincey, can't do is left out of a run, with the
reason in the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import msgspec

from wincey.lab.suggest import suggestion
from wincey.model.errors import UsageError

Kind: TypeAlias = Literal["underlay", "routes", "vxlan", "host-gw", "proxy", "daemon"]


class Variant(msgspec.Struct, frozen=True, kw_only=True):
    """A way to join two hosts.

    kind: `daemon` starts one on each host; the others are made by hand, to compare with: the hosts themselves, static
    routes without any rule, vxlan and host-gw with flannel's rules, a proxy that carries one packet for each system call.
    flags: the daemon's, besides those that any gets. backend: with `config` beside its Type. command: another daemon.
    environment: of the daemon. without: files of the package that it must do without, as where they could not be built.
    hosts: the hosts themselves talk through the tunnel, from one's own device to the other's: no container, nothing forwarded.
    quick: whether the short run has it.
    """

    name: str
    what: str
    kind: Kind = "daemon"
    backend: str = ""
    config: dict[str, int | str | bool] = {}
    flags: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    without: tuple[str, ...] = ()
    hosts: bool = False
    command: str = ""
    quick: bool = True


_FAST = ("--fast-path=on",)
_OFFLOAD = ("--udp-engine=offload",)
_NO_RULES = ("--ip-masq=false", "--iptables-forward-rules=false")

UNDERLAY, ROUTES, FLANNEL_VXLAN, FLANNEL_HOST_GW, PROXY, PROXY_HOSTS = (
    "underlay",
    "routes",
    "vxlan-flannel-rules",
    "host-gw-flannel-rules",
    "proxy",
    "proxy-hosts",
)

VARIANTS = (
    Variant(name=UNDERLAY, what="host to host, no containers", kind="underlay"),
    Variant(name=ROUTES, what="static routes, no rules", kind="routes"),
    Variant(name=FLANNEL_HOST_GW, what="static routes, flannel's rules", kind="host-gw", quick=False),
    Variant(name="host-gw", what="host-gw", backend="host-gw"),
    Variant(name=FLANNEL_VXLAN, what="vxlan as flannel sets it up, flannel's rules", kind="vxlan"),
    Variant(name="vxlan", what="vxlan", backend="vxlan"),
    Variant(name="vxlan-fast", what="vxlan, fast path", backend="vxlan", flags=_FAST),
    Variant(
        name="vxlan-fast-tunnel",
        what="vxlan, fast path that leaves encapsulation to the device (GBP asks for that)",
        backend="vxlan",
        config={"GBP": True},
        flags=_FAST,
        quick=False,
    ),
    Variant(name="host-gw-fast", what="host-gw, fast path", backend="host-gw", flags=_FAST, quick=False),
    Variant(name="vxlan-no-rules", what="vxlan without any rule", backend="vxlan", flags=_NO_RULES, quick=False),
    Variant(name=PROXY, what="a proxy as flannel's udp: one packet for each system call", kind="proxy"),
    Variant(name=PROXY_HOSTS, what="the same, from host to host through it", kind="proxy", hosts=True, quick=False),
    Variant(name="udp-plain", what="udp, engine plain", backend="udp", flags=("--udp-engine=plain",)),
    Variant(name="udp-offload", what="udp, engine offload", backend="udp", flags=_OFFLOAD),
    Variant(
        name="udp-offload-hosts",
        what="udp, engine offload, from host to host through it",
        backend="udp",
        flags=_OFFLOAD,
        hosts=True,
        quick=False,
    ),
    Variant(
        name="udp-offload-python",
        what="udp, engine offload without its compiled core",
        backend="udp",
        flags=_OFFLOAD,
        without=("tunnel/core.so",),
    ),
    Variant(name="udp-bpf", what="udp, engine bpf", backend="udp", flags=("--udp-engine=bpf",)),
    Variant(
        name="udp-fast",
        what="udp, engine bpf, fast path",
        backend="udp",
        flags=("--udp-engine=bpf", *_FAST),
        quick=False,
    ),
    Variant(name="wireguard", what="wireguard", backend="wireguard", quick=False),
    Variant(name="ipip", what="ipip", backend="ipip", quick=False),
)


def chosen(names: Sequence[str], peers: Sequence[tuple[str, str]], *, quick: bool) -> list[Variant]:
    """The variants of these names (none: all, or those of the quick run) and those of the peers, in order.

    peers: name and command of other daemons; all of their variants take part unless some are named. Raises UsageError for a
    name that there is not.
    """
    others = [
        Variant(name=f"{name}-{backend}", what=f"{name}, {backend}", backend=backend, command=command)
        for name, command in peers
        for backend in ("vxlan", "host-gw", "udp")
    ]
    there = {variant.name: variant for variant in (*VARIANTS, *others)}
    for name in names:
        if name not in there:
            raise UsageError(f"no variant {name!r}: there are {', '.join(there)}{suggestion(name, list(there))}")
    if names:
        besides = [] if any(variant.name in names for variant in others) else [variant.name for variant in others]
        return [there[name] for name in dict.fromkeys((*names, *besides))]
    return [variant for variant in there.values() if variant.quick or not quick]


def parse_peers(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Name and command of each NAME=COMMAND; raises UsageError."""
    peers = []
    for text in texts:
        name, _, command = text.partition("=")
        if not name.replace("-", "").isalnum() or not name[0].isalpha() or name != name.lower() or not command.strip():
            raise UsageError(
                f"--peer {text!r}: write it as NAME=COMMAND, the name of small letters and digits,"
                " as in --peer flannel=/opt/flannel/flanneld"
            )
        peers.append((name, command))
    return peers
