"""GC, and DEL without state: what is left of attachments that are gone.

An attachment that GC finds is undone by the delegate's own DEL, with its namespace when that is still there, so that its
interface goes too. Then the addresses that nobody holds are freed: those that a container left which is unknown here.
"""

from __future__ import annotations

import os

from wincey.cni import delegate
from wincey.cni.commands import Request, delegate_del, delete, tell
from wincey.cni.jsontext import encode
from wincey.cni.leases import release
from wincey.cni.netconf import VALID_ATTACHMENTS, NetConf, delegate_config
from wincey.cni.protocol import BAD_NETWORK_CONFIG, INTERNAL, CniError
from wincey.cni.state import StateDir
from wincey.cni.subnetenv import read_subnet_env

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def rescue(conf: NetConf, request: Request) -> None:
    """DEL without state: undo what can be found. Never fails, as a runtime would repeat it for ever."""
    if request.netns and os.path.exists(request.netns):
        try:
            config = delegate_config(conf, read_subnet_env(conf.subnet_file))
            delegate_del(config["type"], encode(config), request)
        except CniError as error:
            tell(f"nothing is known of {request.container}, and its interface may be left: {error.message}")
    _free(conf, lambda container, interface: container == request.container and interface in {request.interface, ""})


def collect(conf: NetConf, request: Request) -> None:
    """GC: free what belongs to attachments of this network that are not valid any more; raises CniError at the end."""
    valid = conf.valid_attachments
    if valid is None:
        # An empty list means that nothing is valid; no list at all must not.
        raise CniError(BAD_NETWORK_CONFIG, f"GC needs the attachments to keep: {VALID_ATTACHMENTS} is missing")
    containers = {container for container, _ in valid}
    failures = {}
    for container, interface, netns in _gone(conf, valid, containers):
        try:
            delete(conf, Request(container, netns, interface, request.path))
            tell(f"freed {container} {interface}")
        except CniError as error:
            failures[container] = f"{container} {interface}: {error.message}"

    def leaked(container: str, interface: str) -> bool:
        if container in failures:
            return False  # its interface may still use the address
        return (container, interface) not in valid if interface else container not in containers

    _free(conf, leaked)
    try:
        _delegate_gc(conf, request.path)
    except CniError as error:
        failures[""] = f"the delegate: {error.message}"
    if failures:
        raise CniError(INTERNAL, "GC could not free everything", "; ".join(failures.values()))


def _gone(conf: NetConf, valid: set[tuple[str, str]], containers: set[str]) -> list[tuple[str, str, str]]:
    """Attachments that are not valid any more: container, interface, namespace."""
    state = StateDir(conf.data_dir)
    ours = [each for each in state.attachments(conf.name) if each[:2] not in valid]
    # Of what flannel added only the container is known. Its interface went with the namespace, or will.
    flannels = set(state.containers()) - state.attached() - containers
    return [*ours, *((each, "eth0", "") for each in sorted(flannels) if state.may_be_of(each, conf.name))]


def _free(conf: NetConf, leaked: Callable[[str, str], bool]) -> None:
    try:
        freed = release(conf, leaked)
    except OSError as error:
        tell(f"host-local's addresses can't be looked at: {error}")
        return
    if freed:
        tell(f"freed {', '.join(freed)}")


def _delegate_gc(conf: NetConf, path: str) -> None:
    """GC of the delegate, if it has one. Without subnet.env there is no config to call it with."""
    try:
        config = delegate_config(conf, read_subnet_env(conf.subnet_file))
    except CniError as error:
        tell(f"the delegate's own GC is left out: {error.message}")
        return
    program = delegate.find(config["type"], path)
    if not delegate.supports(program, "1.1.0"):
        return
    config[VALID_ATTACHMENTS] = [
        {"containerID": container, "ifname": interface} for container, interface in sorted(conf.valid_attachments or ())
    ]
    code, output = delegate.run(program, encode(config), {"CNI_COMMAND": "GC"})
    if code:
        raise delegate.failure(program, code, output)
