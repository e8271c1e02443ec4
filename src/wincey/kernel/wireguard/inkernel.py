"""The kernel's own WireGuard: devices by rtnetlink, keys and peers by generic netlink."""

from __future__ import annotations

import errno

from wincey.kernel import rtnl
from wincey.kernel.links import read_link
from wincey.kernel.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    Netlink,
    NetlinkError,
    Refusal,
    attribute,
    batches,
    messages,
)
from wincey.kernel.wireguard import genl
from wincey.kernel.wireguard.values import DeviceEdit, DeviceState, WireguardError

_NETLINK_GENERIC = 16
_IFLA_LINKINFO, _INFO_KIND, _NESTED = 18, 1, 0x8000
_KIND = attribute(_IFLA_LINKINFO | _NESTED, attribute(_INFO_KIND, b"wireguard"))


def kernel_has_wireguard() -> bool:
    """Whether the kernel has WireGuard, after loading its module if need be."""
    netlink = Netlink(strict=False, protocol=_NETLINK_GENERIC)
    try:
        netlink.request(genl.ask_family())
    except NetlinkError:
        return False
    else:
        return True
    finally:
        netlink.close()


class InKernel:
    """Devices of the kernel, in the network namespace that this is made in."""

    def __init__(self) -> None:
        self._links = Netlink()
        self._generic = Netlink(strict=False, protocol=_NETLINK_GENERIC)
        self._family = 0

    async def make(self, device: str) -> None:
        """See Running."""
        link = read_link(self._links, device)
        if link is None:
            request = rtnl.encode_link(rtnl.RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, name=device, up=True, info=_KIND)
        elif link.kind != "wireguard":
            raise WireguardError(
                f"device {device} is already there and of kind {link.kind or 'hardware'}, not wireguard: rename or remove it"
            )
        else:
            request = rtnl.encode_link(rtnl.RTM_NEWLINK, 0, index=link.index, up=True)
        if refusal := self._links.transact([request]).get(0):
            raise WireguardError(_explain(refusal, None))

    async def remove(self, device: str) -> None:
        """See Running."""
        link = read_link(self._links, device)
        if link and (refusal := self._links.transact([rtnl.encode_link(rtnl.RTM_DELLINK, 0, index=link.index)]).get(0)):
            raise WireguardError(_explain(refusal, None))

    async def read(self, device: str) -> DeviceState | None:
        """See Running."""
        try:
            family = self._number()
            return genl.decode_device(messages(self._generic.dump(family, genl.dump_device(device))), family)
        except NetlinkError as error:
            if error.errno in (errno.ENODEV, errno.EOPNOTSUPP):  # there is none, or it is of another kind
                return None
            raise WireguardError(_explain(error.refusal, None)) from None

    async def change(self, device: str, edit: DeviceEdit) -> None:
        """See Running."""
        try:
            requests = genl.encode_change(self._number(), device, edit)
        except NetlinkError as error:
            raise WireguardError(_explain(error.refusal, edit)) from None
        for batch in batches(requests):
            for refusal in self._generic.transact(requests[batch.start : batch.stop]).values():
                raise WireguardError(_explain(refusal, edit))

    def close(self) -> None:
        """See Running."""
        self._links.close()
        self._generic.close()

    def _number(self) -> int:
        if not self._family:
            self._family = genl.read_family(self._generic.request(genl.ask_family()))
        return self._family


def _explain(refusal: Refusal, edit: DeviceEdit | None) -> str:
    hint = ""
    if refusal.errno == errno.EADDRINUSE:
        port = f"UDP port {edit.port}" if edit and edit.port else "its UDP port"
        hint = f"{port} is taken by another program: choose another ListenPort"
    elif refusal.errno in (errno.EOPNOTSUPP, errno.ENOENT):
        hint = "the kernel has no WireGuard: load its module with `modprobe wireguard`"
    elif refusal.errno in (errno.EPERM, errno.EACCES):
        hint = "changing the network needs root or CAP_NET_ADMIN in this network namespace"
    return f"{refusal}; {hint}" if hint else str(refusal)
