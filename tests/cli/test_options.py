import subprocess
import sys

import msgspec
import pytest

from wincey import __version__
from wincey.cli.options import FLAGS, NOT_YET, WITHOUT_EFFECT, Options, load
from wincey.model.address import Subnet, parse_address
from wincey.model.errors import BadOption, UsageError

# Name, type and default of every flag that a version of flannel had (compatibility reference, section 1.2).
CONTRACT = {
    "etcd-endpoint": "s", "etcd-endpoints": "s", "etcd-prefix": "s", "etcd-keyfile": "s", "etcd-certfile": "s",
    "etcd-cafile": "s", "etcd-username": "s", "etcd-password": "s", "iface": "l", "iface-regex": "l",
    "iface-can-reach": "s", "public-ip": "s", "public-ipv6": "s", "subnet-file": "s", "subnet-dir": "s", "networks": "s",
    "watch-networks": "b", "listen": "s", "remote": "s", "remote-keyfile": "s", "remote-certfile": "s",
    "remote-cafile": "s", "ip-masq": "b", "ip-masq-fully-random-disable": "b", "subnet-lease-renew-margin": "i",
    "kube-subnet-mgr": "b", "kube-api-url": "s", "kubeconfig-file": "s", "kube-annotation-prefix": "s",
    "net-config-path": "s", "set-node-network-unavailable": "b", "use-multi-cluster-cidr": "b", "healthz-ip": "s",
    "healthz-port": "i", "iptables-resync": "i", "iptables-forward-rules": "b", "ip-blackhole-route": "b", "version": "b",
    "v": "i", "vmodule": "s", "log_backtrace_at": "s", "logtostderr": "b", "alsologtostderr": "b", "stderrthreshold": "s",
    "log_dir": "s",
}  # fmt: skip
OURS = {
    "store", "etcd-api", "log-format", "cleanup", "ip-masq-exclude", "remote-token-file", "cloud-routes", "api-socket",
    "api-group", "api-listen", "api-certfile", "api-keyfile", "api-token-file", "metrics-listen", "probe", "probe-interval", "metrics-peers",
    "fast-path", "fast-path-mark", "udp-engine", "udp-source-check",
}  # fmt: skip


def options(*arguments, **environ):
    loaded = load(arguments, environ)
    assert isinstance(loaded, Options)
    return loaded


def test_every_flag_of_flannel_is_there():
    flags = {flag.name: flag.kind for flag in FLAGS}
    assert len(flags) == len(FLAGS)
    assert {name: flags.get(name) for name in CONTRACT} == CONTRACT
    assert flags.keys() - CONTRACT.keys() == OURS


def test_defaults():
    defaults = options()
    assert defaults.etcd_endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert defaults.etcd_prefix == "/coreos.com/network"
    assert defaults.etcd_api == "auto"
    assert defaults.sqlite_path is None
    assert (defaults.iface, defaults.iface_regex, defaults.iface_can_reach) == ((), (), None)
    assert (defaults.public_ip, defaults.public_ipv6) == (None, None)
    assert defaults.subnet_file == "/run/flannel/subnet.env"
    assert (defaults.networks, defaults.watch_networks) == ((), False)
    assert defaults.subnet_dir == "/run/flannel/networks"
    assert defaults.subnet_lease_renew_margin == 3600.0
    assert (defaults.ip_masq, defaults.iptables_forward_rules, defaults.ip_blackhole_route) == (False, True, False)
    assert (defaults.healthz_ip, defaults.healthz_port, defaults.iptables_resync) == ("0.0.0.0", 0, 5)
    assert (defaults.cleanup, defaults.log_format, defaults.verbosity) == (False, "klog", 0)
    assert (defaults.description, defaults.errors, defaults.warnings) == ("all defaults", (), ())


def test_everything_given():
    given = options(
        "--etcd-endpoints=https://a:2379, https://b:2379,", "--iface=eth1", "--iface=", "--iface-regex=^eth",
        "--iface-can-reach=fd00::9", "--public-ip=192.0.2.7", "--public-ipv6=2001:db8::7", "--ip-masq",
        "--ip-masq-exclude=10.9.0.1/8", "--ip-masq-exclude=192.168.0.0/16,fd00::/8", "--subnet-lease-renew-margin=1439",
        "--store=sqlite:/tmp/x.db", "--etcd-api=v2", "--log-format=json", "--cleanup", "-v=4",
    )  # fmt: skip
    assert given.etcd_endpoints == ("https://a:2379", "https://b:2379")
    assert (given.iface, given.iface_regex) == (("eth1",), ("^eth",))
    assert given.iface_can_reach == parse_address("fd00::9")
    assert (given.public_ip, given.public_ipv6) == (parse_address("192.0.2.7"), parse_address("2001:db8::7"))
    assert given.ip_masq_exclude == tuple(map(Subnet.parse, ("10.0.0.0/8", "192.168.0.0/16", "fd00::/8")))
    assert given.subnet_lease_renew_margin == 1439 * 60
    assert given.sqlite_path == "/tmp/x.db"
    assert (given.etcd_api, given.log_format, given.cleanup, given.verbosity) == ("v2", "json", True, 4)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--public-ip=fd00::1", "must be an IPv4 address"),
        ("--public-ip=host", "must be an IPv4 address"),
        ("--public-ipv6=10.0.0.1", "must be an IPv6 address"),
        ("--iface-can-reach=gateway", "not an IPv4 or IPv6 address"),
        ("--ip-masq-exclude=10.0.0.0", "not a subnet"),
        ("--etcd-api=v4", "one of auto, v3, v2"),
        ("--log-format=xml", "one of klog, json"),
        ("--store=redis:x", "sqlite:"),
        ("--store=sqlite:", "sqlite:"),
        ("--etcd-endpoints=,", "list of URLs"),
    ],
)
def test_bad_values(argument, words):
    with pytest.raises(UsageError, match=words) as caught:
        load([argument], {})
    assert str(caught.value).startswith("invalid value ")


@pytest.mark.parametrize("argument", ["--store=etcd", "--store="])
def test_etcd_can_be_named(argument):
    assert options(argument).sqlite_path is None


@pytest.mark.parametrize("minutes", [0, 1440, -5])
def test_renew_margin_out_of_range_exits_with_1(minutes):
    with pytest.raises(BadOption, match="1 to 1439") as caught:
        load([f"--subnet-lease-renew-margin={minutes}"], {})
    assert caught.value.exit_code == 1
    with pytest.raises(BadOption):
        load([], {"FLANNELD_SUBNET_LEASE_RENEW_MARGIN": str(minutes)})


def test_resync_must_be_positive():
    with pytest.raises(BadOption, match="at least 1"):
        load(["--iptables-resync=0"], {})


@pytest.mark.parametrize("name", NOT_YET)
def test_flags_of_what_is_not_there_yet_are_refused(name):
    flag = next(flag for flag in FLAGS if flag.name == name)
    value = str(not flag.default).lower() if flag.kind == "b" else "x"
    with pytest.raises(UsageError, match=f"^not yet: --{name} ") as caught:
        load([f"--{name}={value}"], {})
    assert caught.value.exit_code == 2
    with pytest.raises(UsageError, match=f"^not yet: {flag.variable} "):
        load([], {flag.variable: value})
    load([f"--{name}={str(flag.default).lower() if flag.kind == 'b' else flag.default}"], {})


def test_flags_without_effect_say_so_once():
    given = options(*[f"--{name}={'false' if name == 'logtostderr' else '1'}" for name in WITHOUT_EFFECT])
    assert [warning.split(" ")[0] for warning in sorted(given.warnings)] == sorted(
        f"--{name}" for name in WITHOUT_EFFECT
    )
    assert options("--logtostderr=true", "--alsologtostderr").warnings == ()


def test_the_oldest_endpoint_flag():
    assert options("--etcd-endpoint=http://h:1").etcd_endpoints == ("http://h:1",)
    both = options("--etcd-endpoint=http://h:1", "--etcd-endpoints=http://h:2")
    assert both.etcd_endpoints == ("http://h:2",)
    assert "--etcd-endpoint has no effect" in both.warnings[0]


def test_environment():
    given = options("--iface=eth0", FLANNELD_IFACE="eth1", FLANNELD_IP_MASQ="true", FLANNELD_ETCD_API="v9")
    assert given.iface == ("eth0",)
    assert given.ip_masq is True
    assert given.etcd_api == "auto"
    assert len(given.errors) == 1
    assert "FLANNELD_ETCD_API='v9' is ignored" in given.errors[0]


def test_secrets_are_never_shown():
    given = options("--etcd-endpoints=http://u:hunter2@h:1", FLANNELD_ETCD_PASSWORD="hunter2")
    assert given.etcd_password == "hunter2"
    assert "hunter2" not in given.description + repr(given) + str(given)
    changed = msgspec.structs.replace(given, verbosity=1)
    assert "hunter2" not in repr(changed)


def test_version_comes_before_the_environment():
    assert load(["--version"], {"FLANNELD_NETWORKS": "a,b"}) == __version__ + "\n"
    assert isinstance(load(["--version=false"], {}), Options)


def test_help_lists_every_flag_and_what_is_not_there_yet():
    text = load(["--help"], {})
    assert isinstance(text, str)
    names = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert names == sorted(f"--{flag.name}" for flag in FLAGS)
    assert text.count("(not yet)") == len(NOT_YET)
    assert '(default "http://127.0.0.1:4001,http://127.0.0.1:2379")' in text


def test_help_and_mistakes_import_nothing_slow():
    program = (
        "import sys\n"
        "from wincey.cli.options import load\n"
        "load(['--help'], {})\n"
        "slow = {'asyncio', 'logging', 'json', 'ssl', 'h11', 'difflib', 'wincey.agent', 'wincey.http', 'wincey.store'}\n"
        "print(sorted(slow & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"


def test_names_of_networks():
    assert options("--networks=blue, green,,blue").networks == ("blue", "green")
    assert options(FLANNELD_NETWORKS="blue").networks == ("blue",)
    with pytest.raises(UsageError, match="can't be a network's name"):
        load(["--networks=blue,subnets"], {})
