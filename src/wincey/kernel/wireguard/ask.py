"""What the wireguard backend has to know of the host before it can plan: its public key, and who is to run the devices."""

from __future__ import annotations

from wincey.kernel.links import read_link
from wincey.kernel.netlink import Netlink
from wincey.kernel.wireguard.curve25519 import public_key
from wincey.kernel.wireguard.inkernel import kernel_has_wireguard
from wincey.kernel.wireguard.keyfile import key_path, read_or_make_key
from wincey.kernel.wireguard.userspace import PROGRAM, find_program
from wincey.model.errors import NotJoinable
from wincey.model.wireguard import DEVICE, DEVICE_V6, Way, key_text


async def ask() -> dict[str, str]:
    """`public_key` in base64, `key_file`, and `way`. Makes the key file if there is none. Raises NotJoinable."""
    way, path = choose_way(), key_path()
    return {"public_key": key_text(public_key(read_or_make_key(path).value)), "key_file": str(path), "way": way}


def choose_way() -> Way:
    """The kernel where it has WireGuard, else wireguard-go; raises NotJoinable where there is neither.

    A device that wireguard-go already runs stays with it until it goes, for changing over would interrupt its traffic.
    """
    netlink = Netlink()
    try:
        links = [read_link(netlink, device) for device in (DEVICE, DEVICE_V6)]
    finally:
        netlink.close()
    if not any(link and link.kind == "tun" for link in links) and kernel_has_wireguard():
        return "kernel"
    if find_program():
        return "wireguard-go"
    raise NotJoinable(
        f"the wireguard backend needs WireGuard in the kernel (Linux 5.6 or later; `modprobe wireguard`) or {PROGRAM}"
        " (Debian package wireguard-go), and this host has neither"
    )
