"""What has to be known of the host before there is a plan: who encrypts, the kernel or charon."""

from __future__ import annotations

from typing import Literal

from wincey.model.errors import NotJoinable
from wincey.programs.strongswan.charon import USER_PACKAGE, CharonError, find_charon, has_user_esp
from wincey.programs.strongswan.xfrm import kernel_has_esp


def choose_esp(wish: str) -> Literal["kernel", "user"]:
    """wish: the config's ESP: auto (the kernel if it can), kernel, user. Raises NotJoinable for what the host lacks."""
    try:
        charon = find_charon()
    except CharonError as error:
        raise NotJoinable(str(error)) from None
    if wish != "user" and kernel_has_esp():
        return "kernel"
    lack = "this kernel has no ESP with AES-GCM (modprobe esp4; needs CAP_NET_ADMIN)"
    if wish == "kernel":
        raise NotJoinable(f'{lack}, which the config asks for: set "ESP" in its Backend to "auto" or "user"')
    if not has_user_esp(charon):
        missing = f"charon's plugin kernel-libipsec for ESP in user space is not installed (Debian: {USER_PACKAGE})"
        raise NotJoinable(missing if wish == "user" else f"{lack}, and {missing}")
    return "user"
