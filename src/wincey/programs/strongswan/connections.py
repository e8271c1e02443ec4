"""What charon is told of a peer, and how it is found again in what charon tells. Pure.

Names, proposals, identities, selectors, modes and times are flannel's (compatibility reference, section 6.6), so that hosts
of both kinds share a network. What differs cannot be seen by a peer: dead peers are looked for (flannel's charon notices
none), and connections are initiated by `upkeep` rather than by charon at the moment of loading, when the other side may not
have its part yet.

With ESP in the kernel the policies are ours (see xfrm), and charon installs none: they are there from before the first key
until after the last, whatever becomes of charon, and so nothing is ever sent plain. With user-space ESP charon needs them
to itself, and the request number must be its own choice, as it tells tunnels apart by it.
"""

from __future__ import annotations

import hashlib
import re

import msgspec

from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.errors import BadAddress
from wincey.model.ipsec import REQID, IpsecPeer, IpsecTerms
from wincey.programs.strongswan.vici import Message

IKE_PROPOSAL = "aes256-sha256-modp4096"
_NAME = re.compile(r"([\d.]+)-([\d.]+/\d+)-([\d.]+/\d+)-([\d.]+)\Z", re.ASCII)


def connection_name(peer: IpsecPeer) -> str:
    """`<our address>-<our subnet>-<its subnet>-<its address>`."""
    return f"{format_address(peer.identity)}-{child_name(peer)}-{format_address(peer.remote)}"


def child_name(peer: IpsecPeer) -> str:
    """`<our subnet>-<its subnet>`."""
    return f"{peer.own}-{peer.subnet}"


def definition(peer: IpsecPeer) -> Message:
    """The message of `load-conn`. `peer.terms` must be there."""
    terms = peer.terms
    assert terms
    kernel = terms.esp == "kernel"
    auth = "psk" if terms.auth == "psk" else "pubkey"
    child = {
        "local_ts": [str(peer.own)],
        "remote_ts": [str(peer.subnet)],
        "esp_proposals": [terms.proposal],
        "mode": "tunnel",
        "start_action": "none",
        "close_action": "none",
        "dpd_action": "restart",
        "rekey_time": "1h",
        "policies": "no" if kernel else "yes",
    }
    if kernel:
        child["reqid"] = str(REQID)
    return {
        connection_name(peer): {
            "version": "2",
            "local_addrs": [format_address(terms.local)],
            "remote_addrs": [format_address(peer.remote)],
            "proposals": [IKE_PROPOSAL],
            "keyingtries": "0",
            "encap": "yes" if terms.encap else "no",
            "dpd_delay": "30s",
            "mobike": "no",  # the addresses of a lease are the ones that count
            "local": {"auth": auth, "id": format_address(peer.identity)},
            "remote": {"auth": auth, "id": format_address(peer.remote)},
            "children": {child_name(peer): child},
        }
    }


def read(name: str, connection: Message) -> tuple[IpsecPeer, str] | None:
    """A connection of `list-conns`, without its terms, and the address that it sends from; None for one that is not ours."""
    found = _NAME.match(name)
    local = connection.get("local_addrs")
    if not found or not isinstance(local, list) or len(local) != 1:
        return None
    try:
        identity, remote = parse_address(found[1]), parse_address(found[4])
        peer = IpsecPeer(Subnet.parse(found[2]), Subnet.parse(found[3]), identity, remote, None)
    except BadAddress:
        return None
    return peer, local[0]


def fingerprint(terms: IpsecTerms) -> str:
    """Tells terms apart. They hold no secret."""
    return hashlib.sha256(msgspec.json.encode(terms)).hexdigest()[:32]


def has_tunnel(association: Message) -> tuple[bool, bool]:
    """Of an IKE_SA of `list-sas`: whether packets can pass, and whether it is on its way to that."""
    children = association.get("child-sas")
    states = (
        [child.get("state") for child in children.values() if isinstance(child, dict)]
        if isinstance(children, dict)
        else []
    )
    up = any(state in {"INSTALLED", "UPDATED", "REKEYING", "REKEYED"} for state in states)
    return up, not up and association.get("state") in {"CREATED", "CONNECTING"}
