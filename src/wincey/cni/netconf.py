"""The plugin's network config, and the config of the delegate that is made of it (compatibility reference, section 10). Pure."""

from __future__ import annotations

from wincey.cni.jsontext import decode
from wincey.cni.protocol import BAD_NETWORK_CONFIG, INTERNAL, UNDECODABLE, CniError, is_name
from wincey.cni.subnetenv import SubnetEnv, is_cidr

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

SUBNET_FILE = "/run/flannel/subnet.env"
DATA_DIR = "/var/lib/cni/flannel"
NETWORK_FILES = "/run/flannel/networks"
NETWORK_DATA = "/var/lib/cni/flannel-networks"
HOST_LOCAL_DATA = "/var/lib/cni/networks"
VALID_ATTACHMENTS = "cni.dev/valid-attachments"

_FIELDS = (
    *("cniVersion", "name", "network", "subnetFile", "dataDir", "delegate", "ipam", "runtimeConfig", "prevResult"),
    VALID_ATTACHMENTS,
)
_BY_LOWER = {field.lower(): field for field in _FIELDS}
_LONGEST_NETWORK = 11  # in a bridge's name: an interface has 15 characters, and cni- is 4


class NetConf:
    """The netconf that a runtime hands over. Fields are named as their keys are.

    network: one of several networks of this host ("" for the only one). It has its own subnet.env, state directory and bridge.
    valid_attachments: pairs of container id and interface name that GC must keep; None when the runtime gave no list.
    """

    __slots__ = (
        *("cni_version", "data_dir", "delegate", "ipam", "name", "network", "prev_result", "runtime_config"),
        *("subnet_file", "valid_attachments"),
    )

    def __init__(self, fields: dict[str, Any]) -> None:
        self.name = _text(fields, "name", "")
        if not self.name:
            raise CniError(BAD_NETWORK_CONFIG, "missing network name")
        if not is_name(self.name):
            raise CniError(BAD_NETWORK_CONFIG, "invalid characters found in network name", f"it is {self.name!r}")
        self.cni_version = _text(fields, "cniVersion", "")
        self.network = _text(fields, "network", "")
        if self.network and not is_name(self.network):
            raise CniError(BAD_NETWORK_CONFIG, f"'network' is no name of a network: {self.network!r}")
        self.subnet_file = _text(
            fields, "subnetFile", f"{NETWORK_FILES}/{self.network}.env" if self.network else SUBNET_FILE
        )
        self.data_dir = _text(fields, "dataDir", f"{NETWORK_DATA}/{self.network}" if self.network else DATA_DIR)
        self.delegate = _object(fields, "delegate") or {}
        self.ipam = _object(fields, "ipam") or {}
        self.runtime_config = _object(fields, "runtimeConfig")
        self.prev_result = _object(fields, "prevResult")
        self.valid_attachments = _attachments(fields)
        self._check_delegate()

    @property
    def version(self) -> str:
        """The version of the specification that it is written for; what names none is of the first."""
        return self.cni_version or "0.1.0"

    def _check_delegate(self) -> None:
        if not isinstance(self.delegate.get("type", ""), str):
            raise CniError(INTERNAL, "'delegate' dictionary, if present, must have (string) 'type' field")
        for key in ("name", "ipam"):
            if key in self.delegate:
                raise CniError(
                    INTERNAL, f"'delegate' dictionary must not have '{key}' field, it'll be set by flannel",
                    "write ipam beside delegate, not into it" if key == "ipam" else "",
                )  # fmt: skip


def parse_netconf(data: bytes) -> NetConf:
    """Read a netconf; raises CniError. Keys are known in any case, as Go's decoder does; unknown ones are left out."""
    try:
        document = decode(data)
    except ValueError as error:
        raise CniError(UNDECODABLE, f"error unmarshall network config: {error}") from None
    if not isinstance(document, dict):
        raise CniError(UNDECODABLE, "error unmarshall network config: it must be an object, {...}")
    fields = {_BY_LOWER[lower]: value for key, value in document.items() if (lower := key.lower()) in _BY_LOWER}
    return NetConf(fields | {field: document[field] for field in _FIELDS if field in document})


def delegate_config(conf: NetConf, env: SubnetEnv) -> dict[str, Any]:
    """What the delegate is told; raises CniError when the base routes can't be read."""
    made = dict(conf.delegate)
    if conf.runtime_config is not None:
        made["runtimeConfig"] = conf.runtime_config
    made["name"] = conf.name
    made.setdefault("type", "bridge")
    made.setdefault("ipMasq", not env.ip_masq)  # one of the two, never both
    made.setdefault("mtu", env.mtu)
    if made["type"] == "bridge":
        made.setdefault("isGateway", True)
        if conf.network:
            # On one bridge the networks of a host would be one.
            made.setdefault("bridge", bridge_name(conf.network))
    if conf.cni_version:
        made["cniVersion"] = conf.cni_version
    made["ipam"] = _ipam(conf, env)
    return made


def bridge_name(network: str) -> str:
    """The bridge of one of several networks. A long name is shortened, and told from its like by a checksum."""
    if len(network) <= _LONGEST_NETWORK:
        return f"cni-{network}"
    from binascii import crc32  # noqa: PLC0415  # rarely needed

    return f"cni-{network[:2]}-{crc32(network.encode()):08x}"


def _ipam(conf: NetConf, env: SubnetEnv) -> dict[str, Any]:
    made = dict(conf.ipam)
    made.setdefault("type", "host-local")
    made["ranges"] = [[{"subnet": subnet}] for subnet in env.subnets]
    routes = made.get("routes") or []
    if not isinstance(routes, list) or not all(isinstance(each, dict) and is_cidr(each.get("dst")) for each in routes):
        raise CniError(
            INTERNAL,
            "failed to read IPAM routes: each must have a network as 'dst'",
            'write them like [{"dst": "0.0.0.0/0"}]',
        )
    made["routes"] = [*routes, *({"dst": network} for network in env.networks)]
    return made


def _text(fields: dict[str, Any], key: str, default: str) -> str:
    value = fields.get(key)
    if value is None:
        return default
    if not isinstance(value, str):
        raise CniError(UNDECODABLE, f"error unmarshall network config: '{key}' must be a string")
    return value or default


def _object(fields: dict[str, Any], key: str) -> dict[str, Any] | None:
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise CniError(UNDECODABLE, f"error unmarshall network config: '{key}' must be an object, {{...}}")
    return value


def _attachments(fields: dict[str, Any]) -> set[tuple[str, str]] | None:
    listed = fields.get(VALID_ATTACHMENTS)
    if listed is None:
        return None
    try:
        pairs = {(each["containerID"], each["ifname"]) for each in listed}
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise TypeError
    except (TypeError, KeyError):
        raise CniError(
            UNDECODABLE,
            f"error unmarshall network config: '{VALID_ATTACHMENTS}' must be a list of containerID and ifname",
        ) from None
    return pairs
