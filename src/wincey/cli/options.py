"""flanneld's flags: every one of today's flannel and of its earlier versions, and ours (compatibility reference, 1.2).

`load` is all that a program needs: it turns arguments and environment into `Options`, or into a text to print. Nothing here
is slow to import: `flanneld --help` goes through this module and goflags alone.

Exit codes: 2 for a command line that can't be read or asks for what is not there yet; 1 for a value that is well-formed but
out of its range, as in flannel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from wincey import __version__
from wincey.cli.goflags import Flag, Parsed, apply_environment, describe, parse_arguments, usage
from wincey.model.address import Address, Subnet, parse_address
from wincey.model.errors import BadAddress, BadOption, UsageError
from wincey.model.networkname import check_network_name
from wincey.model.serveraddress import Where, parse_listen, parse_servers

NOT_YET = {
    "kube-subnet-mgr": "Kubernetes as the store",
    "kube-api-url": "Kubernetes as the store",
    "kubeconfig-file": "Kubernetes as the store",
    "kube-annotation-prefix": "Kubernetes as the store",
    "net-config-path": "Kubernetes as the store",
    "set-node-network-unavailable": "Kubernetes as the store",
    "use-multi-cluster-cidr": "Kubernetes as the store",
}
"""Flags whose feature is not there yet: any value but the default is refused, never ignored."""

WITHOUT_EFFECT = {
    "logtostderr": "the log always goes to standard error",
    "stderrthreshold": "the log always goes to standard error, whole",
    "log_dir": "the log goes to standard error; your supervisor can keep it in files",
    "vmodule": "verbosity is set for all modules at once, by -v",
    "log_backtrace_at": "errors carry their traceback where it helps",
}
"""Flags that are accepted for the sake of existing command lines."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line and the environment ask for. Fields are named as their flags.

    sqlite_path: None means etcd. subnet_lease_renew_margin: seconds. healthz_port: 0 or less means none.
    description: the flags given, without secrets, for the log. errors, warnings: to be logged once the log is set up.
    """

    etcd_endpoints: tuple[str, ...]
    etcd_prefix: str
    etcd_keyfile: str
    etcd_certfile: str
    etcd_cafile: str
    etcd_username: str
    etcd_password: str
    etcd_api: str
    sqlite_path: str | None
    listen: Where | None
    remote: tuple[str, ...]
    remote_keyfile: str
    remote_certfile: str
    remote_cafile: str
    remote_token_file: str
    cloud_routes: bool
    iface: tuple[str, ...]
    iface_regex: tuple[str, ...]
    iface_can_reach: Address | None
    public_ip: Address | None
    public_ipv6: Address | None
    subnet_file: str
    networks: tuple[str, ...]
    watch_networks: bool
    subnet_dir: str
    ip_masq: bool
    ip_masq_fully_random_disable: bool
    ip_masq_exclude: tuple[Subnet, ...]
    subnet_lease_renew_margin: float
    healthz_ip: str
    healthz_port: int
    iptables_resync: int
    iptables_forward_rules: bool
    ip_blackhole_route: bool
    fast_path: str
    fast_path_mark: int
    udp_engine: str
    udp_source_check: str
    cleanup: bool
    api_socket: str
    api_group: str
    api_listen: tuple[str, int] | None
    api_certfile: str
    api_keyfile: str
    api_token_file: str
    metrics_listen: tuple[str, int] | None
    metrics_peers: int
    probe: bool
    probe_interval: int
    log_format: str
    verbosity: int
    description: str
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def __repr__(self) -> str:
        """Without the password, so that no log and no traceback ever shows it."""
        return f"Options({self.description})"


def load(arguments: Sequence[str], environ: Mapping[str, str]) -> Options | str:
    """Read the command line (without the program's name), then the environment.

    Returns a text to print on standard error before an exit with 0 when help or the version is asked for. Raises UsageError
    and BadOption.
    """
    parsed = parse_arguments(FLAGS, arguments)
    if parsed.wants_help:
        return usage("flanneld", (_with_note(flag) for flag in FLAGS))
    if parsed.values["version"]:
        return __version__ + "\n"
    apply_environment(FLAGS, parsed, environ)
    return _build(parsed)


def _build(parsed: Parsed) -> Options:
    values, changed = parsed.values, _changed(parsed)
    for name in changed:
        if name in NOT_YET:
            origin = parsed.given[name][0]
            raise UsageError(f"not yet: {origin} needs {NOT_YET[name]}, which this version does not have; leave it out")
    warnings = [f"--{name} has no effect: {WITHOUT_EFFECT[name]}" for name in changed if name in WITHOUT_EFFECT]
    margin = values["subnet-lease-renew-margin"]
    if not 1 <= margin <= 1439:
        raise BadOption(
            f"invalid --subnet-lease-renew-margin {margin}: it must be 1 to 1439 minutes, less than the 24 hours of a"
            " lease; write it like --subnet-lease-renew-margin=60"
        )
    if values["iptables-resync"] < 1:
        raise BadOption(
            f"invalid --iptables-resync {values['iptables-resync']}: it must be at least 1 second; leave it out for 5"
        )
    if not 0 <= values["metrics-peers"] <= 1000:
        raise BadOption(
            f"invalid --metrics-peers {values['metrics-peers']}: it must be 0 to 1000; leave it out for none"
        )
    if not 1 <= values["probe-interval"] <= 3600:
        raise BadOption(
            f"invalid --probe-interval {values['probe-interval']}: it must be 1 to 3600 seconds; leave it out for 60"
        )
    if values["listen"] and values["remote"]:
        raise BadOption("--listen and --remote exclude each other: a server joins no network; run two daemons for both")
    if values["remote"]:
        warnings += [
            f"--{name} has no effect: --remote is given"
            for name in changed
            if name == "store" or name.startswith("etcd-")
        ]
    endpoints = values["etcd-endpoints"]
    if values["etcd-endpoint"] and "etcd-endpoints" in parsed.given:
        warnings.append("--etcd-endpoint has no effect: --etcd-endpoints is given")
    elif values["etcd-endpoint"]:
        endpoints = values["etcd-endpoint"]
    fields = {name.replace("-", "_"): value for name, value in values.items()}
    fields |= {
        "etcd_endpoints": endpoints,
        "sqlite_path": values["store"],
        "iface": tuple(filter(None, values["iface"])),  # --iface=$UNSET in a unit file means none
        "iface_regex": tuple(filter(None, values["iface-regex"])),
        "ip_masq_exclude": tuple(subnet for subnets in values["ip-masq-exclude"] for subnet in subnets),
        "subnet_lease_renew_margin": margin * 60.0,
        "verbosity": values["v"],
        "description": describe(FLAGS, parsed),
        "errors": tuple(parsed.complaints),
        "warnings": tuple(warnings),
    }
    return Options(**{name: fields[name] for name in Options.__struct_fields__})


def _with_note(flag: Flag) -> Flag:
    return msgspec.structs.replace(flag, help=f"{flag.help} (not yet)") if flag.name in NOT_YET else flag


def _changed(parsed: Parsed) -> list[str]:
    """The flags that were given a value other than their default."""
    return [flag.name for flag in FLAGS if parsed.values[flag.name] != flag.default]


def _choice(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return text

    return read


def _bit(text: str) -> int:
    value = int(text, 0)
    if not 0 < value < 1 << 32 or value & (value - 1):
        raise ValueError("must be a number of 32 bits with one of them set, like 0x1000")
    return value


def _address(length: int, example: str) -> Callable[[str], Address | None]:
    def read(text: str) -> Address | None:
        try:
            address = parse_address(text) if text else None
        except BadAddress:
            address = b""
        if address is not None and len(address) != length:
            raise ValueError(f"must be an {'IPv4' if length == 4 else 'IPv6'} address, like {example}")
        return address

    return read


# BadAddress, which parse_address and Subnet.parse raise, is a ValueError that says what is expected.
def _any_address(text: str) -> Address | None:
    return parse_address(text) if text else None


def _subnets(text: str) -> tuple[Subnet, ...]:
    return tuple(Subnet.parse(part.strip()).masked() for part in text.split(","))


def _endpoints(text: str) -> tuple[str, ...]:
    endpoints = tuple(part.strip() for part in text.split(",") if part.strip())
    if not endpoints:
        raise ValueError("must be a comma-separated list of URLs, like http://10.0.0.1:2379,http://10.0.0.2:2379")
    return endpoints


def _networks(text: str) -> tuple[str, ...]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    try:
        return tuple(dict.fromkeys(check_network_name(name) for name in names))
    except UsageError as error:
        raise ValueError(str(error)) from None


def _listen(text: str) -> Where | None:
    return parse_listen(text) if text else None


def _listen_on(example: int) -> Callable[[str], tuple[str, int] | None]:
    def read(text: str) -> tuple[str, int] | None:
        where = parse_listen(text) if text else None
        if where and where.fd is not None:
            raise ValueError(f"must be HOST:PORT, like 127.0.0.1:{example}")
        return (where.host, where.port) if where else None

    return read


def _remote(text: str) -> tuple[str, ...]:
    return parse_servers(text)


def _store(text: str) -> str | None:
    if text in {"", "etcd"}:
        return None
    kind, _, path = text.partition(":")
    if kind != "sqlite" or not path:
        raise ValueError("must be etcd, or sqlite: with the path of a file, like sqlite:/var/lib/wincey/store.db")
    return path


_ETCD = ("http://127.0.0.1:4001", "http://127.0.0.1:2379")

FLAGS: tuple[Flag, ...] = (
    # The store.
    Flag("etcd-endpoints", "s", _ETCD, "etcd's client URLs, separated by commas", "0.2.0", read=_endpoints),
    Flag("etcd-endpoint", "s", (), "one etcd client URL; use --etcd-endpoints", "0.1.0", "0.1.0", read=_endpoints),
    Flag("etcd-prefix", "s", "/coreos.com/network", "the key below which everything is kept", "0.1.0"),
    Flag("etcd-keyfile", "s", "", "file with the key of our TLS client certificate", "0.2.0"),
    Flag("etcd-certfile", "s", "", "file with our TLS client certificate", "0.2.0"),
    Flag("etcd-cafile", "s", "", "file with the certificate authority that signs etcd's certificate", "0.2.0"),
    Flag("etcd-username", "s", "", "user name for etcd", "0.5.6"),
    Flag("etcd-password", "s", "", "password for etcd; FLANNELD_ETCD_PASSWORD keeps it out of ps", "0.5.6", secret=True),
    Flag("etcd-api", "s", "auto", "etcd's API: auto, v3 or v2", read=_choice("auto", "v3", "v2")),
    Flag("store", "s", None, "where config and leases are kept: etcd (also when empty) or sqlite:PATH", read=_store),
    # Client and server.
    Flag("listen", "s", None, "serve leases on HOST:PORT, fd:// or fd://N; joins nothing", "0.5.0", "0.7.1", read=_listen),
    Flag("remote", "s", (), "servers to join through, HOST:PORT, separated by commas", "0.5.0", "0.7.1", read=_remote),
    Flag("remote-keyfile", "s", "", "file with our TLS key, between client and server", "0.5.2", "0.7.1"),
    Flag("remote-certfile", "s", "", "file with our TLS certificate, between client and server", "0.5.2", "0.7.1"),
    Flag("remote-cafile", "s", "", "file with the certificate authority of the other side", "0.5.2", "0.7.1"),
    Flag("remote-token-file", "s", "", "a client's token, or a server's list of them and their networks"),
    Flag("cloud-routes", "b", False, "with --listen: keep the cloud's route tables for the clients"),
    # Which interface and which addresses.
    Flag("iface", "l", (), "interface for traffic between hosts, by address or name; repeatable, first match", "0.1.0"),
    Flag("iface-regex", "l", (), "the same by regular expression; repeatable, after all --iface", "0.8.0"),
    Flag("iface-can-reach", "s", None, "the interface that traffic to this address uses", "0.18.0", read=_any_address),
    Flag("public-ip", "s", None, "IPv4 address that peers reach us by", "0.5.2", read=_address(4, "192.0.2.7")),
    Flag("public-ipv6", "s", None, "IPv6 address that peers reach us by", "0.15.0", read=_address(16, "2001:db8::7")),
    # What is written and kept.
    Flag("subnet-file", "s", "/run/flannel/subnet.env", "file for the subnet and MTU that containers get", "0.1.0"),
    Flag("subnet-lease-renew-margin", "i", 60, "renew the lease this many minutes before it ends: 1 to 1439", "0.7.0"),
    Flag("ip-masq", "b", False, "masquerade traffic that leaves the cluster network", "0.1.0"),
    Flag("ip-masq-fully-random-disable", "b", False, "masquerade without --random-fully", "0.27.4"),
    Flag("ip-masq-exclude", "l", (), "destination subnet that is not masqueraded; repeatable", read=_subnets),
    Flag("iptables-resync", "i", 5, "seconds between two audits of the rules", "0.11.0"),
    Flag("iptables-forward-rules", "b", True, "accept forwarded traffic of the cluster network", "0.11.0"),
    Flag("ip-blackhole-route", "b", False, "keep a blackhole route for our subnet's unused addresses", "0.27.1"),
    Flag("fast-path", "s", "off", "carry established flows of containers past the host's stack: off, on, bpf or flowtable", read=_choice("off", "on", "bpf", "flowtable")),
    Flag("fast-path-mark", "s", 0x1000, "the bit of the packet mark that --fast-path uses", read=_bit),
    Flag("udp-engine", "s", "auto", "how the udp backend carries packets: auto, bpf, fou, offload or plain", read=_choice("auto", "bpf", "fou", "offload", "plain")),
    Flag("udp-source-check", "s", "network", "which inner sources the udp backend takes from a peer: strict, network or off", read=_choice("strict", "network", "off")),
    Flag("cleanup", "b", False, "remove all that we made on this host, and end"),
    # Several networks.
    Flag("networks", "s", (), "join these networks, names separated by commas", "0.5.0", "0.7.1", read=_networks),
    Flag("watch-networks", "b", False, "join and leave networks as they come and go in the store", "0.5.6", "0.7.1"),
    Flag("subnet-dir", "s", "/run/flannel/networks", "directory for a file NETWORK.env of each", "0.5.0", "0.7.1"),
    # Health, log, help.
    Flag("healthz-ip", "s", "0.0.0.0", "address that /healthz and /readyz listen on", "0.8.0"),
    Flag("healthz-port", "i", 0, "port that /healthz and /readyz listen on; 0 for none", "0.8.0"),
    Flag("log-format", "s", "klog", "lines of the log: klog or json", read=_choice("klog", "json")),
    Flag("v", "i", 0, "verbosity of the log", "0.1.0"),
    Flag("vmodule", "s", "", "accepted, without effect", "0.1.0"),
    Flag("log_backtrace_at", "s", "", "accepted, without effect", "0.1.0"),
    Flag("logtostderr", "b", True, "accepted; the log always goes to standard error", "0.1.0", "0.7.1"),
    Flag("alsologtostderr", "b", False, "accepted; the log always goes to standard error", "0.1.0", "0.7.1"),
    Flag("stderrthreshold", "s", "", "accepted, without effect", "0.1.0", "0.7.1"),
    Flag("log_dir", "s", "", "accepted, without effect", "0.1.0", "0.7.1"),
    Flag("version", "b", False, "print the version and end", "0.1.0"),
    # What can be seen.
    Flag("api-socket", "s", "auto", "Unix socket of the local API: a path, auto (beside the subnet file) or off"),
    Flag("api-group", "s", "", "group that may use the local API besides root"),
    Flag("api-listen", "s", None, "serve the local API on HOST:PORT as well, to whoever has the token", read=_listen_on(8471)),
    Flag("api-certfile", "s", "", "file with our TLS certificate for --api-listen"),
    Flag("api-keyfile", "s", "", "file with our TLS key for --api-listen"),
    Flag("api-token-file", "s", "", "file with the token that --api-listen asks for"),
    Flag("probe", "b", False, "ask each peer a few times a minute whether it answers, how soon, how large a packet gets there"),
    Flag("probe-interval", "i", 60, "seconds between two rounds of --probe: 1 to 3600"),
    Flag("metrics-peers", "i", 0, "also tell the traffic of this many peers, the busiest; it costs each packet a look-up"),
    Flag("metrics-listen", "s", None, "serve /metrics for Prometheus on HOST:PORT; also on the healthz port", read=_listen_on(9470)),
    # Refused for now, see NOT_YET.
    Flag("kube-subnet-mgr", "b", False, "take leases from Kubernetes nodes", "0.7.0"),
    Flag("kube-api-url", "s", "", "URL of the Kubernetes API", "0.8.0"),
    Flag("kubeconfig-file", "s", "", "kubeconfig file", "0.8.0"),
    Flag("kube-annotation-prefix", "s", "flannel.alpha.coreos.com", "prefix of the annotations of nodes", "0.11.0"),
    Flag("net-config-path", "s", "/etc/kube-flannel/net-conf.json", "network config, with Kubernetes", "0.12.0"),
    Flag("set-node-network-unavailable", "b", True, "clear the node's NetworkUnavailable condition", "0.15.0"),
    Flag("use-multi-cluster-cidr", "b", False, "use the ClusterCIDR API", "0.21.0", "0.22.3"),
)  # fmt: skip
