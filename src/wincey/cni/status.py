"""STATUS: whether a container could be added now, and if not, why."""

from __future__ import annotations

import os

from wincey.cni import delegate
from wincey.cni.jsontext import encode
from wincey.cni.netconf import NetConf, delegate_config
from wincey.cni.protocol import NOT_AVAILABLE, CniError
from wincey.cni.subnetenv import read_subnet_env


def check_status(conf: NetConf, path: str) -> None:
    """Raise CniError 50 with the reason when ADD would fail. path: CNI_PATH."""
    daemon = daemons_reason(conf.subnet_file)
    try:
        config = delegate_config(conf, read_subnet_env(conf.subnet_file))
        program = delegate.find(config["type"], path)
    except CniError as error:
        raise CniError(NOT_AVAILABLE, error.message, daemon or error.details) from None
    if daemon:
        raise CniError(NOT_AVAILABLE, "flanneld is not ready", daemon)
    if delegate.supports(program, "1.1.0"):
        code, output = delegate.run(program, encode(config), {"CNI_COMMAND": "STATUS"})
        if code:
            raise delegate.failure(program, code, output)


def daemons_reason(subnet_file: str) -> str:
    """Why our daemon is not ready, in its own words; "" when it is, or when the daemon is flannel's, which tells nothing."""
    directory, name = os.path.split(subnet_file)
    stem = name.rpartition(".")[0] or name
    try:
        with open(f"{directory}/wincey/{stem}/not-ready", encoding="utf-8") as file:
            return file.read().strip()
    except OSError:
        return ""
