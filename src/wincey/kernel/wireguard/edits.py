"""From objects to be put and deleted to changes of peers. Pure.

New owners of subnets come first, which takes the subnets from the old ones, and peers go last: make before break. A peer that
takes a subnet over from another one is most often the same host with a new key. Both ends then hold packets back until a
handshake, so one is begun at once (see `wake`) rather than with the next packet, or 5 s after an attempt that came too early.
The same goes for peers that had a session with a device that had to be made anew: they send by the old one for 15 s or more.

The endpoint is given to a peer when it is new or its lease names another one, and otherwise left alone: WireGuard learns it
from the packets that arrive, and for a host behind NAT or on the move it knows better than the lease.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from wincey.kernel.wireguard.values import NO_KEY, DeviceState, Endpoint, PeerEdit, PeerState
from wincey.model.address import Subnet
from wincey.model.secret import Secret
from wincey.model.state import Object
from wincey.model.wireguard import WireguardPeer, WireguardSubnet

LIVE = 180.0
"""Seconds after a handshake that its session can be used (WireGuard's REJECT_AFTER_TIME)."""


class Known(msgspec.Struct):
    """What is known of a device's peers since it was last read, and what has been changed since.

    given: the endpoint that the lease of each peer named when it was last looked at, not where the peer may be by now.
    live: those with a session, now or with a device that is gone. keepalives: by peer, where there is any.
    """

    subnets: dict[Subnet, bytes] = msgspec.field(default_factory=dict)
    given: dict[bytes, Endpoint] = msgspec.field(default_factory=dict)
    keepalives: dict[bytes, int] = msgspec.field(default_factory=dict)
    live: set[bytes] = msgspec.field(default_factory=set)

    def note(self, edit: PeerEdit) -> None:
        """Remember a change that was carried out."""
        key = edit.public_key
        if edit.remove:
            self.subnets = {subnet: owner for subnet, owner in self.subnets.items() if owner != key}
            self.given.pop(key, None)
            self.keepalives.pop(key, None)
            self.live.discard(key)
            return
        if edit.replace:
            self.subnets = {subnet: owner for subnet, owner in self.subnets.items() if owner != key}
        self.subnets.update(dict.fromkeys(edit.subnets, key))
        if edit.endpoint:
            self.given[key] = edit.endpoint
        if edit.keepalive is not None:
            self.keepalives[key] = edit.keepalive

    def note_all(self, edits: Iterable[PeerEdit]) -> None:
        """Remember changes that were carried out; many removals at once cost no more than one."""
        gone = {edit.public_key for edit in edits if edit.remove}
        if gone:
            self.subnets = {subnet: owner for subnet, owner in self.subnets.items() if owner not in gone}
        for edit in edits:
            if not edit.remove:
                self.note(edit)
        for key in gone:
            self.given.pop(key, None)
            self.keepalives.pop(key, None)
        self.live -= gone


def is_live(peer: PeerState, now: float) -> bool:
    """Whether a peer has a session. now: Unix time. A clock that was set back makes a handshake one of the future."""
    return peer.handshake > 0 and now - peer.handshake < LIVE


def read_peers(
    device: str, state: DeviceState, desired: dict[bytes, WireguardPeer], now: float
) -> tuple[list[Object], Known]:
    """A device's peers as objects. One that has a session is told with the endpoint desired, wherever it may be."""
    objects, known = list[Object](), Known()
    for peer in state.peers:
        wanted = desired.get(peer.public_key)
        endpoint = peer.endpoint or (b"", 0)
        if is_live(peer, now):
            known.live.add(peer.public_key)
            if wanted:
                endpoint = wanted.endpoint, wanted.port
        known.given[peer.public_key] = endpoint
        known.keepalives[peer.public_key] = peer.keepalive
        objects.append(WireguardPeer(device, peer.public_key, *endpoint, peer.keepalive, peer.psk))
        for subnet in peer.subnets:
            known.subnets[subnet] = peer.public_key
            objects.append(WireguardSubnet(device, subnet, peer.public_key))
    return objects, known


def moved(put: Iterable[Object], known: Known) -> set[bytes]:
    """The peers that are there and whose lease names another endpoint now."""
    return {
        item.public_key
        for item in put
        if isinstance(item, WireguardPeer)
        and known.given.get(item.public_key, (item.endpoint, item.port)) != (item.endpoint, item.port)
    }


def learned(state: DeviceState, known: Known, now: float) -> set[bytes]:
    """The peers that have a session and are elsewhere than where their lease had them."""
    return {
        peer.public_key
        for peer in state.peers
        if is_live(peer, now) and peer.endpoint and peer.endpoint != known.given.get(peer.public_key)
    }


def compose(
    put: Sequence[Object], delete: Sequence[Object], known: Known, keep: frozenset[bytes] = frozenset()
) -> list[PeerEdit]:
    """The changes of one device's peers. keep: those whose endpoint is not to be touched."""
    peers = {item.public_key: item for item in put if isinstance(item, WireguardPeer)}
    gone = {item.public_key for item in delete if isinstance(item, WireguardPeer)} - peers.keys()
    gained: dict[bytes, list[Subnet]] = {}
    took_over: dict[bytes, None] = {}
    for item in put:
        if isinstance(item, WireguardSubnet):
            gained.setdefault(item.public_key, []).append(item.subnet)
            if known.subnets.get(item.subnet, item.public_key) != item.public_key:
                took_over[item.public_key] = None
    lost: dict[bytes, set[Subnet]] = {}
    for item in delete:
        if isinstance(item, WireguardSubnet) and item.public_key not in gone:
            lost.setdefault(item.public_key, set()).add(item.subnet)
    remaining: dict[bytes, list[Subnet]] = {key: [] for key in lost}
    if lost:
        taken = {subnet for subnets in gained.values() for subnet in subnets}
        for subnet, owner in known.subnets.items():
            if owner in lost and subnet not in lost[owner] and subnet not in taken:
                remaining[owner].append(subnet)
    edits = []
    for key in dict.fromkeys((*peers, *gained, *lost)):
        subnets = (*remaining.get(key, ()), *gained.get(key, ()))
        edits.append(_edit(key, peers.get(key), known, keep=key in keep, replace=key in lost, subnets=subnets))
    keepalives = known.keepalives | {key: peer.keepalive for key, peer in peers.items()}
    lost_session = [key for key in peers if key in known.live and key not in known.given]
    edits += [edit for key in (*took_over, *lost_session) for edit in wake(key, keepalives.get(key, 0))]
    return [*edits, *(PeerEdit(key, remove=True) for key in gone)]


def wake(public_key: bytes, keepalive: int) -> tuple[PeerEdit, ...]:
    """Have a handshake with a peer begin now: turning the keepalive on sends one at once. keepalive: what it is to be."""
    off, on = PeerEdit(public_key, keepalive=0), PeerEdit(public_key, keepalive=keepalive or 1)
    return (off, on) if keepalive else (on, off)


def _edit(
    key: bytes, wanted: WireguardPeer | None, known: Known, *, keep: bool, replace: bool, subnets: tuple[Subnet, ...]
) -> PeerEdit:
    if wanted is None:
        return PeerEdit(key, replace=replace, subnets=subnets)
    endpoint = wanted.endpoint, wanted.port
    return PeerEdit(
        key,
        create=True,
        psk=wanted.psk or Secret(NO_KEY),
        endpoint=None if keep or known.given.get(key) == endpoint else endpoint,
        keepalive=wanted.keepalive,
        replace=replace,
        subnets=subnets,
    )
