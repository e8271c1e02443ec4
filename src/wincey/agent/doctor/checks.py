"""The checks of the host itself, one small function each: facts in, findings out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from wincey.agent.doctor.facts import Facts, Network
from wincey.agent.doctor.finding import Finding, ordered
from wincey.agent.doctor.rules import Packet, dropped
from wincey.agent.doctor.ways import WAYS
from wincey.model.address import Subnet, format_address
from wincey.model.lease import TTL

_BRIDGES = ("docker0", "cni0")
_SHORT = 30 * 60.0
"""Seconds: a daemon renews its lease an hour before its end, so one with less left is not renewed."""
_SLOW = 2.0
_SKEW = 60.0
_CHURN = 50
_SUMS, _SHARE = 100, 0.01


def diagnose(facts: Facts) -> list[Finding]:
    """Everything that is wrong, the cause first."""
    return ordered(finding for check in CHECKS for finding in check(facts))


def daemon(facts: Facts) -> Iterator[Finding]:
    """Whether our own runs, and answers."""
    own = facts.daemon
    said = f"; its log ends with: {own.log[-1]}" if own.log else ""
    if own.state == "none":
        yield Finding(
            "error",
            "daemon",
            f"no daemon runs on this host: nobody answers at {own.socket} ({own.trouble}){said}. Packets flow on what it left"
            f" behind; new and moved hosts are not followed{_stale(facts)}",
            "start flanneld, and see its log (journalctl -u flanneld)",
        )
    elif own.state == "hangs":
        yield Finding(
            "error",
            "hang",
            f"the daemon (pid {own.pid}, {own.process or 'gone'}) does not answer: {own.trouble}{said}. Nothing is repaired, and"
            " its lease is not renewed",
            f"kill -CONT {own.pid}" if own.process.startswith("T") else "restart flanneld, and see its log",
        )
    else:
        for network in facts.networks:
            if network.trouble:
                yield Finding("error", "config", f"containers can't be started{_named(network)}: {network.trouble}")


def _stale(facts: Facts) -> str:
    stale = [item for each in facts.networks for item in (*each.missing, *each.changed, *each.surplus)]
    return f"; by now {len(stale)} objects are not as they should be, such as {stale[0]}" if stale else ""


def config(facts: Facts) -> Iterator[Finding]:
    """The network config, and whether this host can join by it."""
    if facts.store.config_trouble:
        yield Finding("error", "config", facts.store.config_trouble, "put it right with wincey config set")
    for note in facts.notes:
        yield Finding("error", "interface", note)


def kernel(facts: Facts) -> Iterator[Finding]:
    """What this kernel lacks for the backend."""
    for network in facts.networks:
        for failure in network.failures:
            yield Finding("error", "kernel", f"it could not be made: {failure}", "see the reason given")
        if network.backend == "udp" and facts.features.get("/dev/net/tun") is False:
            yield Finding("error", "kernel", "backend udp needs /dev/net/tun, which is not there", "modprobe tun")


def state(facts: Facts) -> Iterator[Finding]:
    """What is against what should be."""
    for network in facts.networks:
        for what, items in (("missing", network.missing), ("changed", network.changed)):
            for item in items:
                name = "device" if " device " in item.partition(" (")[0] + " " else "state"
                if item.startswith("packet filter rules"):
                    name = "rules"  # they may be there, and another program's keep them from having effect
                yield Finding(
                    "error",
                    name,
                    f"{'missing' if what == 'missing' else 'not as it should be'}: {item}",
                    "the daemon repairs it by itself within a moment; if it comes back, another program removes it"
                    if facts.daemon.state == "answers"
                    else "let the daemon run: it makes that right at its start",
                )
        for item in network.surplus:
            yield Finding("warning", "state", f"stale, of a host that is gone: {item}", "let the daemon run")
        if network.repaired >= _CHURN:
            yield Finding(
                "warning",
                "drift",
                f"other programs changed {network.repaired} objects of ours since the daemon's start",
                "see the daemon's log for which ones, and keep NetworkManager and the like off our devices",
            )


def interface(facts: Facts) -> Iterator[Finding]:
    """Whether packets to the peers leave by the interface that was chosen."""
    for network in facts.networks:
        ways = [peer for peer in network.peers if peer.way and peer.way not in network.devices]
        others = [peer for peer in ways if peer.way != network.underlay]
        if network.underlay and others and len(others) == len(ways):
            peer = others[0]
            yield Finding(
                "error",
                "interface",
                f"the daemon uses {network.underlay} ({_addresses(network)}), but packets to {format_address(peer.public)} leave"
                f" by {peer.way}: peers send to an address that they may not reach",
                f"start flanneld with --iface={peer.way}, or --iface-can-reach={format_address(peer.public)}",
            )


def _addresses(network: Network) -> str:
    return ", ".join(map(format_address, network.public))


def address(facts: Facts) -> Iterator[Finding]:
    """Addresses that two have."""
    for network in facts.networks:
        if network.own_macs:
            mine = ", ".join(format_address(each) for each in network.local)
            yield Finding(
                "error",
                "address",
                f"another machine answers to our address {mine} on {network.underlay}: {', '.join(network.own_macs)}",
                "give one of the two another address",
            )
        for peer in network.peers:
            if len(peer.macs) > 1:
                yield Finding(
                    "error",
                    "address",
                    f"two machines answer to {format_address(peer.public)} on {network.underlay}: {', '.join(peer.macs)}",
                    "give one of the two another address",
                )
    if facts.store.stranger:
        yield Finding(
            "error", "address", facts.store.stranger, "give one of the two an address of its own (--public-ip, --iface)"
        )
    for each in facts.store.same_host:
        yield Finding(
            "error",
            "address",
            f"one public address in two leases: {each}: two hosts have it, or one of them is left over",
            "give each host an address of its own; wincey leases release takes a lease away whose host is gone",
        )


def overlap(facts: Facts) -> Iterator[Finding]:
    """The network's range against what the host has besides."""
    for network in facts.networks:
        ours = set(network.devices)
        for interface in facts.interfaces:
            for entry in interface.addresses:
                inside = any(each.contains(entry.address) for each in network.ranges)
                own = any(each.contains(entry.address) for each in network.own)
                if inside and not own and interface.name not in ours:
                    yield Finding(
                        "error",
                        "overlap",
                        f"{interface.name} has {format_address(entry.address)}/{entry.length}, an address of the network that"
                        f" belongs to another host ({', '.join(map(str, network.ranges))})",
                        "give it another address, or the network another range",
                    )
        for subnet, where in facts.routes:
            if any(where.endswith(f"dev {device}") for device in ours):
                continue
            if any(subnet.overlaps(each) for each in network.ranges) and not any(
                each.contains(subnet) for each in network.own
            ):
                yield from _foreign_route(facts, network, subnet, where)


def _foreign_route(facts: Facts, network: Network, subnet: Subnet, where: str) -> Iterator[Finding]:
    local = {Subnet(entry.address, entry.length).masked() for each in facts.interfaces for entry in each.addresses}
    if subnet in local:
        return  # told as the address it comes with
    yield Finding(
        "error",
        "overlap",
        f"route {subnet} {where} leads into the network {', '.join(map(str, network.ranges))}, and another program made it",
        f"ip route del {subnet} {where}, or give the network another range",
    )


def lease(facts: Facts) -> Iterator[Finding]:
    """This host's own, and those that exclude each other."""
    for each in facts.store.overlapping:
        yield Finding("error", "lease", f"two leases overlap: {each}", "release one: wincey leases release")
    for network in facts.networks:
        own = ", ".join(map(str, network.own))
        if network.leased is False and own and facts.daemon.state != "answers":
            yield Finding(
                "error",
                "lease",
                f"this host's lease on {own} has expired or was deleted: other hosts have no way here, and one of them may be"
                " given the subnet",
                "let the daemon run: it claims the lease again",
            )
        elif network.left is not None and network.left < _SHORT:
            yield Finding(
                "warning",
                "lease",
                f"this host's lease on {own} ends in {network.left / 60:.0f} min, and was not renewed in time",
                "see the daemon's log for what keeps it from the store",
            )
        if network.left is not None and network.left > TTL + _SKEW:
            yield Finding(
                "warning",
                "clock",
                f"the lease on {own} has {network.left:.0f} s left, more than a lease ever gets: a clock was set back",
                "keep the hosts' clocks with NTP",
            )
        for peer in network.peers:
            if peer.left is not None and peer.left < _SHORT:
                yield Finding(
                    "warning",
                    "peer-lease",
                    f"the lease of {format_address(peer.public)} on {', '.join(map(str, peer.subnets))} ends in"
                    f" {peer.left / 60:.0f} min and is not renewed: its daemon does not run, or can't reach the store",
                    "start flanneld there; when the lease ends, all hosts forget the way to it",
                )


def store(facts: Facts) -> Iterator[Finding]:
    """Whether it answers, and in time."""
    status = facts.daemon.status
    told = next((each.store for each in status.networks if each.store.trouble), None) if status else None
    trouble = facts.store.trouble or (told.trouble if told else "")
    if trouble:
        yield Finding(
            "error",
            "store",
            f"{facts.store.name or (told.name if told else 'the store')}: {trouble}. Packets flow on; changes are not followed",
            "see whether it runs and whether a firewall is between; leases last a day after the last renewal",
        )
    elif facts.store.took > _SLOW:
        yield Finding("warning", "store", f"{facts.store.name} took {facts.store.took:.1f} s to tell the leases")
    bad = dict.fromkeys((*facts.store.bad_keys, *(each for network in facts.networks for each in network.bad_keys)))
    for each in bad:
        yield Finding(
            "warning", "bad-key", f"a key among the leases can't be read and is passed over: {each}", "delete it"
        )


def bridge(facts: Facts) -> Iterator[Finding]:
    """The containers' bridges: in our subnet, and with an MTU that fits."""
    for network in facts.networks:
        there = [each for each in facts.interfaces if each.name in _BRIDGES]
        inside = [
            each
            for each in there
            if any(own.contains(entry.address) for own in network.own for entry in each.addresses)
        ]
        own = ", ".join(map(str, network.own))
        for each in there:
            held = (
                ", ".join(f"{format_address(e.address)}/{e.length}" for e in each.addresses if not e.scope)
                or "no address"
            )
            if not inside and own and any(not entry.scope for entry in each.addresses):
                yield Finding(
                    "warning",
                    "bridge",
                    f"{each.name} has {held}, not an address in this host's subnet {own}: its containers are not in the network",
                    "give dockerd the --bip and --mtu that mk-docker-opts.sh prints, or CNI the subnet file, and restart it",
                )
            if each in inside and network.mtu and each.mtu > network.mtu:
                yield Finding(
                    "warning",
                    "mtu",
                    f"{each.name} has MTU {each.mtu}, but the network carries {network.mtu}: large packets of its containers are"
                    " lost",
                    f"give it and the containers MTU {network.mtu} (FLANNEL_MTU in the subnet file)",
                )


def forwarding(facts: Facts) -> Iterator[Finding]:
    """Whether the host forwards at all."""
    for bits, path in ((32, "net/ipv4/ip_forward"), (128, "net/ipv6/conf/all/forwarding")):
        if facts.sysctls.get(path) == "0" and any(each.bits == bits for net in facts.networks for each in net.ranges):
            yield Finding(
                "error",
                "forwarding",
                f"{path.replace('/', '.')} is 0: this host does not forward, and its containers reach no other host",
                f"sysctl -w {path.replace('/', '.')}=1, and keep it in /etc/sysctl.d",
            )


def firewall(facts: Facts) -> Iterator[Finding]:
    """Rules of this host that drop what containers send and get, or what carries it."""
    for network in facts.networks:
        bridge = next((each.name for each in facts.interfaces if each.name in _BRIDGES), "cni0")
        device = next(iter(network.devices), network.underlay)
        for peer in list(network.peers)[:64]:
            packets = []
            for own in network.own:
                theirs = next((each for each in peer.subnets if each.bits == own.bits), None)
                if theirs:
                    here, there = own.host(2), theirs.host(2)
                    packets.append(
                        ("forward", Packet(here, there, bridge, device), "packets of containers to other hosts")
                    )
                    packets.append(
                        ("forward", Packet(there, here, device, bridge), "packets of other hosts to containers")
                    )
            local = next((each for each in network.local if len(each) == len(peer.public)), None)
            if local and network.port:
                port, out = network.port, network.underlay
                what = f"encapsulated packets (UDP port {port})"
                packets.append(("input", Packet(peer.public, local, out, "", "udp", port), f"{what} of other hosts"))
                packets.append(
                    ("prerouting", Packet(peer.public, local, out, "", "udp", port), f"{what} of other hosts")
                )
                packets.append(("output", Packet(local, peer.public, "", out, "udp", port), f"{what} to other hosts"))
            for hook, packet, what in packets:
                if rule := dropped(facts.chains, hook, packet):
                    yield Finding(
                        "error",
                        "firewall",
                        f"this host's packet filter drops {what}: {rule}",
                        "delete the rule, or accept the network before it",
                    )


def checksum(facts: Facts) -> Iterator[Finding]:
    """Packets that came with a wrong checksum."""
    bad, all_ = facts.counters.get("total.Udp.InCsumErrors", 0), facts.counters.get("total.Udp.InDatagrams", 0)
    if bad >= _SUMS and bad >= _SHARE * (bad + all_):
        yield Finding(
            "warning",
            "checksum",
            f"{bad} UDP packets came in with a wrong checksum since the boot (of {bad + all_}): a network card or hypervisor"
            " breaks checksum offload of encapsulated packets",
            "on the sending hosts: ethtool -K <device> tx-checksum-ip-generic off, or TxChecksumOffload off in the config's"
            " Backend",
        )


CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    daemon,
    config,
    kernel,
    interface,
    address,
    overlap,
    lease,
    state,
    forwarding,
    firewall,
    *WAYS,
    store,
    bridge,
    checksum,
)


def _named(network: Network) -> str:
    return f" in network {network.name}" if network.name else ""
