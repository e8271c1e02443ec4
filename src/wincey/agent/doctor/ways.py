"""The checks of the ways to the peers: by what was really sent, and what came back."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from wincey.agent.doctor.facts import Facts, Network, Peer
from wincey.agent.doctor.finding import Finding
from wincey.model.address import format_address


def route(facts: Facts) -> Iterator[Finding]:
    """Whether the kernel takes our way to the peer's containers."""
    for network in facts.networks:
        for peer in network.peers:
            for taken in peer.taken:
                yield Finding(
                    "error",
                    "route",
                    f"packets to the containers of {_who(peer)} do not take our way: {taken}",
                    "see ip route get and ip rule: a narrower route or a policy rule comes before ours",
                )


def underlay(facts: Facts) -> Iterator[Finding]:
    """Whether there is a way to the host, outside of the network."""
    for network in facts.networks:
        for peer in network.peers:
            if peer.refusal:
                yield Finding("error", "underlay", f"no way to the host {_who(peer)}: {peer.refusal}", "see ip route")
            elif peer.way and peer.way in network.devices:
                yield Finding(
                    "error",
                    "underlay",
                    f"the way to the host {_who(peer)} leads into the network itself, by {peer.way}",
                    f"see ip route get {format_address(peer.public)}",
                )
            elif peer.way_mtu and network.mtu and peer.way_mtu < network.mtu:
                yield Finding(
                    "warning",
                    "mtu",
                    f"{peer.way}, towards {_who(peer)}, has MTU {peer.way_mtu}, and containers may send {network.mtu}",
                    "set MTU in the config's Backend",
                )


def silence(facts: Facts) -> Iterator[Finding]:
    """Peers that do not answer: at all, or not through the network."""
    strict = facts.counters.get("TcpExt.IPReversePathFilter", 0)
    for network in facts.networks:
        for peer in network.peers:
            inner, outer = peer.inner, peer.outer
            if outer and outer.silent and (inner is None or inner.silent):
                said = f" ({outer.refusal})" if outer.refusal else ""
                yield Finding(
                    "error",
                    "peer",
                    f"the host {_who(peer)} does not answer{said}, asked {outer.asked} times"
                    + (", nor through the network" if inner else ""),
                    "see whether it is up and whether this is still its address; it may also refuse to be pinged",
                )
            elif inner and inner.silent:
                if strict and (devices := _strict(facts, network)):
                    yield _reverse_path(peer, devices, strict)
                else:
                    yield _walled(network, peer)


def _walled(network: Network, peer: Peer) -> Finding:
    what = f"UDP port {network.port}" if network.port else "packets between the hosts"
    return Finding(
        "error",
        "encapsulation",
        f"the host {_who(peer)} answers, but not through the network: {peer.inner.lost if peer.inner else 0} packets by"
        f" {network.backend} were sent, and none came back",
        f"let {what} pass, both ways, in the firewalls of both hosts and between them; if that is so, run wincey doctor there",
    )


def _reverse_path(peer: Peer, devices: str, strict: int) -> Finding:
    return Finding(
        "error",
        "rp-filter",
        f"replies of {_who(peer)} come in by another device than packets to it go out by, and this host drops them: {strict}"
        f" dropped just now, by the strict reverse-path filter of {devices}",
        "sysctl -w net.ipv4.conf.<device>.rp_filter=2 (and not 1 for all), or make the way there and back the same",
    )


def _strict(facts: Facts, network: Network) -> str:
    """Devices whose filter is strict: that of the device or that of all, whichever is larger, is 1."""
    everywhere = int(facts.sysctls.get("net/ipv4/conf/all/rp_filter", "0"))
    return ", ".join(
        device
        for device in (network.underlay, *network.devices)
        if max(everywhere, int(facts.sysctls.get(f"net/ipv4/conf/{device}/rp_filter", "0"))) == 1
    )


def path_mtu(facts: Facts) -> Iterator[Finding]:
    """Black holes: paths that lose large packets."""
    for network in facts.networks:
        for peer in network.peers:
            if 0 < peer.mtu < peer.promised:
                less = peer.promised - peer.mtu
                yield Finding(
                    "error",
                    "mtu",
                    f"black hole: packets larger than {peer.mtu} bytes do not get to {_who(peer)}, and containers may send"
                    f" {peer.promised}",
                    f"mend the path, or set MTU in the config's Backend {less} smaller and restart the containers",
                )


def nat(facts: Facts) -> Iterator[Finding]:
    """Address translation between the hosts."""
    for network in facts.networks:
        own = {entry.address for each in facts.interfaces for entry in each.addresses}
        for public in network.public:
            if public not in own:
                yield Finding(
                    "note",
                    "nat",
                    f"peers are told {format_address(public)}, which is no address of this host: it stands behind NAT, which"
                    " has to forward to it",
                )
        for peer in network.peers:
            others = [each for each in peer.seen_from if each != peer.public]
            if others:
                yield Finding(
                    "warning",
                    "nat",
                    f"encapsulated packets of {_who(peer)} come from {', '.join(map(format_address, others))}: their address is"
                    " translated on the way",
                    "take the hosts' own traffic out of masquerading and NAT; firewalls and IPsec policies go by the address",
                )


def loss(facts: Facts) -> Iterator[Finding]:
    """Ways that lose some packets."""
    for network in facts.networks:
        for peer in network.peers:
            way = peer.inner or peer.outer
            if way and 0 < way.lost < way.asked:
                yield Finding(
                    "warning",
                    "peer",
                    f"{way.lost} of {way.asked} packets to {_who(peer)} were lost",
                    "see wincey peers of a daemon with --probe for more",
                )


def _who(peer: Peer) -> str:
    return f"{format_address(peer.public)} ({', '.join(map(str, peer.subnets))})"


WAYS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (route, underlay, silence, path_mtu, nat, loss)
