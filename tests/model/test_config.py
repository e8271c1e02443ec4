import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.config import BackendOptions, NetworkConfig
from wincey.model.errors import BadConfig, UnknownBackend
from wincey.model.lease import LeaseKey


def parse(**keys):
    return NetworkConfig.parse(json.dumps(keys))


def v4(config):
    return config.subnet_len, format_address(config.subnet_min), format_address(config.subnet_max)


def v6(config):
    return config.ipv6_subnet_len, format_address(config.ipv6_subnet_min), format_address(config.ipv6_subnet_max)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("10.3.0.0/16", (24, "10.3.1.0", "10.3.255.0")),
        ("10.3.0.0/22", (24, "10.3.1.0", "10.3.3.0")),
        ("10.3.0.0/23", (25, "10.3.0.128", "10.3.1.128")),
        ("10.3.0.0/24", (26, "10.3.0.64", "10.3.0.192")),
        ("10.3.0.0/28", (30, "10.3.0.4", "10.3.0.12")),
        ("255.255.0.0/16", (24, "255.255.1.0", "255.255.255.0")),
        ("128.0.0.0/1", (24, "128.0.1.0", "255.255.255.0")),
        ("0.0.0.0/1", (24, "0.0.1.0", "127.255.255.0")),
        ("255.255.255.240/28", (30, "255.255.255.244", "255.255.255.252")),
    ],
)
def test_ipv4_defaults(network, expected):
    assert v4(parse(Network=network)) == expected


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("fc00::/48", (64, "fc00:0:0:1::", "fc00:0:0:ffff::")),
        ("fc00::/62", (64, "fc00:0:0:1::", "fc00:0:0:3::")),
        ("fc00::/63", (65, "fc00:0:0:0:8000::", "fc00:0:0:1:8000::")),
        ("fc00::/124", (126, "fc00::4", "fc00::c")),
        ("ffff:ffff:ffff::/48", (64, "ffff:ffff:ffff:1::", "ffff:ffff:ffff:ffff::")),
    ],
)
def test_ipv6_defaults(network, expected):
    config = parse(EnableIPv4=False, EnableIPv6=True, IPv6Network=network)
    assert v6(config) == tuple(format_address(parse_address(x)) if isinstance(x, str) else x for x in expected)
    assert (config.network, config.subnet_len, config.subnet_min) == (None, 0, bytes(4))
    assert config.networks == (Subnet.parse(network),)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (
            {"Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0"},
            (20, "10.10.0.0", "10.99.0.0"),
        ),
        (
            {"Network": "172.17.0.0/16", "SubnetMin": "172.17.1.0", "SubnetMax": "172.17.254.0"},
            (24, "172.17.1.0", "172.17.254.0"),
        ),
        ({"Network": "10.3.4.5/16"}, (24, "10.3.1.0", "10.3.255.0")),
        ({"Network": "10.3.0.0/16", "SubnetLen": 0}, (24, "10.3.1.0", "10.3.255.0")),
        ({"Network": "10.3.0.0/16", "SubnetLen": None, "SubnetMin": None}, (24, "10.3.1.0", "10.3.255.0")),
        ({"Network": "10.3.0.0/16", "SubnetMin": "0.0.0.0"}, (24, "10.3.1.0", "10.3.255.0")),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.0.0"}, (24, "10.3.0.0", "10.3.255.0")),
        ({"Network": "10.3.0.0/28", "SubnetLen": 30}, (30, "10.3.0.4", "10.3.0.12")),
        ({"Network": "10.3.0.0/16", "SubnetLen": 18}, (18, "10.3.64.0", "10.3.192.0")),
    ],
)
def test_ipv4_given(keys, expected):
    assert v4(parse(**keys)) == expected


def test_dual_stack():
    config = parse(Network="10.3.0.0/16", EnableIPv6=True, IPv6Network="fd00:3::/48", IPv6SubnetLen=80)
    assert v4(config) == (24, "10.3.1.0", "10.3.255.0")
    assert v6(config) == (80, "fd00:3:0:0:1::", "fd00:3:0:ffff:ffff::")
    assert config.networks == (Subnet.parse("10.3.0.0/16"), Subnet.parse("fd00:3::/48"))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, ["Network is missing", '"Network": "10.3.0.0/16"']),
        ({"Netwrk": "10.3.0.0/16"}, ["Network is missing", "Netwrk", "did you mean Network?"]),
        ({"Network": "0.0.0.0/0"}, ["Network", "0.0.0.0/0"]),
        ({"Network": ""}, ["Network", "IPv4 subnet"]),
        ({"Network": 10}, ["Network is 10", "IPv4 subnet"]),
        ({"Network": "10.3.0.0"}, ["prefix length"]),
        ({"Network": "fd00::/48"}, ["IPv4 subnet"]),
        ({"Network": "10.3.0.0/29"}, ["10.3.0.0/29", "/28 or wider"]),
        ({"Network": "10.3.0.0/29", "SubnetLen": 30}, ["/28 or wider"]),
        ({"Network": "10.3.0.0/16", "SubnetLen": 31}, ["SubnetLen is 31", "from 0 to 30", '"SubnetLen": 24']),
        ({"Network": "10.3.0.0/16", "SubnetLen": 17}, ["SubnetLen is 17", "at least 18", "four subnets"]),
        ({"Network": "10.3.0.0/16", "SubnetLen": "24"}, ['SubnetLen is "24"', "without quotes"]),
        ({"Network": "10.3.0.0/16", "SubnetLen": 24.0}, ["SubnetLen is 24.0"]),
        ({"Network": "10.3.0.0/16", "SubnetLen": -1}, ["SubnetLen is -1"]),
        ({"Network": "10.3.0.0/16", "SubnetLen": True}, ["SubnetLen is true"]),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.2.0.0"}, ["SubnetMin", "in the range", '"10.3.1.0"']),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.4.0.0"}, ["SubnetMax", "in the range", '"10.3.255.0"']),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.1"}, ["SubnetMin", "is not on a SubnetLen boundary"]),
        ({"Network": "10.3.0.0/16", "SubnetMax": "10.3.1.128"}, ["SubnetMax", "is not on a SubnetLen boundary"]),
        ({"Network": "10.3.0.0/16", "SubnetMin": "10.3.1.0/24"}, ["without a prefix length"]),
        ({"Network": "10.3.0.0/16", "SubnetMin": "fd00::"}, ["IPv4 address"]),
        ({"Network": "10.3.0.0/16", "EnableIPv6": True}, ["IPv6Network is missing"]),
        ({"Network": "10.3.0.0/16", "EnableIPv6": "true"}, ["EnableIPv6", "true or false"]),
        ({"Network": "10.3.0.0/16", "EnableNFTables": 1}, ["EnableNFTables is 1"]),
        ({"EnableIPv4": False}, ["EnableIPv4 is false"]),
        ({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "::/0"}, ["IPv6Network"]),
        ({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/125"}, ["/124 or wider"]),
        ({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 127}, ["0 to 126"]),
        ({"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetLen": 49}, ["at least 50"]),
        (
            {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": "fc00::/48", "IPv6SubnetMin": "fc00::1"},
            ["IPv6SubnetMin", "boundary", '"fc00:0:0:1::"'],
        ),
        ({"Network": "10.3.0.0/16", "Backend": "vxlan"}, ["Backend", "object"]),
        ({"Network": "10.3.0.0/16", "Backend": []}, ["Backend", "object"]),
        ({"Network": "10.3.0.0/16", "Backend": {"Type": 5}}, ["Backend.Type is 5", "text in quotes"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(keys, words):
    with pytest.raises(BadConfig) as caught:
        parse(**keys)
    text = str(caught.value)
    assert all(word in text for word in [*words, "network config: ", "write it like"]), text
    assert "\n" not in text
    assert not isinstance(caught.value, UnknownBackend)


@pytest.mark.parametrize(
    "text",
    ["", "{", "{'Network': 1}", "[]", '"10.3.0.0/16"', '{"Network": "10.3.0.0/16"} x', '{"SubnetLen": NaN}', "[" * 100_000,
     '{"SubnetLen": ' + "9" * 5000 + "}", b"\xff\xfe"],
)  # fmt: skip
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(BadConfig, match="write it like"):
        NetworkConfig.parse(text)


def test_null_document_is_an_empty_config_as_in_go():
    with pytest.raises(BadConfig, match="Network is missing"):
        NetworkConfig.parse("null")


@pytest.mark.parametrize("backend", [{}, None, {"Type": ""}, {"Type": None}, {"VNI": 1}])
def test_backend_without_a_type_is_its_own_error(backend):
    with pytest.raises(UnknownBackend, match="unknown backend type"):
        parse(Network="10.3.0.0/16", Backend=backend)


def test_a_config_wrong_otherwise_is_no_unknown_backend():
    with pytest.raises(BadConfig) as caught:
        parse(Network="10.3.0.0/29", Backend={})
    assert not isinstance(caught.value, UnknownBackend)


def test_absent_backend_is_udp_and_types_are_lower_case():
    assert parse(Network="10.3.0.0/16").backend_type == "udp"
    assert parse(Network="10.3.0.0/16", Backend={"tYPE": "VXLAN"}).backend_type == "vxlan"


def test_nftables_tells_absent_from_false():
    assert parse(Network="10.3.0.0/16").enable_nftables is None
    assert parse(Network="10.3.0.0/16", EnableNFTables=None).enable_nftables is None
    assert parse(Network="10.3.0.0/16", EnableNFTables=False).enable_nftables is False
    assert parse(Network="10.3.0.0/16", enablenftables=True).enable_nftables is True


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ('{ "network": "10.1.0.0/16" }', 24),
        ('{"NETWORK":"10.1.0.0/16","subnetlen":25,"SubnetLen":26}', 26),
        ('{"Network":"10.1.0.0/16","SubnetLen":25,"subnetlen":26,"SubnetLen":27}', 27),
        ('{"Network":"10.1.0.0/16","SubnetLen":25,"SubnetLen":26}', 26),
        ('{"Network":"10.9.0.0/16","nEtWoRk":"10.1.0.0/16"}', 24),
    ],
)
def test_keys_match_in_any_case_and_the_last_one_counts(text, length):
    config = NetworkConfig.parse(text.encode())
    assert (config.network, config.subnet_len) == (Subnet.parse("10.1.0.0/16"), length)


def test_unknown_and_idle_keys_are_told():
    config = parse(Network="10.3.0.0/16", SubnetLn=24, Zzz={"x": 1}, IPv6Network="fd00::/48")
    misspelt, foreign, idle = config.warnings
    assert "SubnetLn" in misspelt
    assert "did you mean SubnetLen?" in misspelt
    assert "Zzz" in foreign
    assert idle == "IPv6Network is ignored because EnableIPv6 is not true"
    assert parse(Network="10.3.0.0/16", Backend={"Type": "vxlan"}).warnings == ()


def test_backend_options_are_typed_and_in_any_case():
    options = parse(
        Network="10.3.0.0/16", Backend={"Type": "vxlan", "vni": 7, "GBP": True, "MacPrefx": "a", "L": [1]}
    ).backend
    assert options.integer("VNI", 1, minimum=0, maximum=10) == 7
    assert options.integer("Port", 8472, minimum=1, maximum=65535) == 8472
    assert options.boolean("gbp", default=False) is True
    assert options.boolean("Learning", default=False) is False
    assert options.text("MACPREFX", "") == "a"
    assert options.text("Other", "x") == "x"
    assert options.raw("l") == [1]
    assert options.raw("nothing") is None
    assert options.unknown_keys(("Type", "VNI", "GBP", "MacPrefix", "L")) == [
        "unknown key Backend.MacPrefx is ignored; did you mean MacPrefix?"
    ]


@pytest.mark.parametrize("value", [11, -1, "7", 7.0, True, [7]])
def test_backend_options_out_of_bounds(value):
    with pytest.raises(BadConfig, match=r'network config: Backend.VNI is .*from 0 to 10.*write it like "VNI": 1$'):
        BackendOptions.of({"VNI": value}).integer("VNI", 1, minimum=0, maximum=10)


def test_backend_options_of_the_wrong_type():
    with pytest.raises(BadConfig, match=r'Backend.GBP is "yes", but must be true or false'):
        BackendOptions.of({"GBP": "yes"}).boolean("GBP", default=False)
    with pytest.raises(BadConfig, match=r"Backend.Mac is 5, but must be a text"):
        BackendOptions.of({"Mac": 5}).text("Mac", "")


@pytest.mark.parametrize(
    ("key", "v4_only", "dual", "v6_only"),
    [
        ("10.3.1.0-24", True, False, False),
        ("10.3.255.0-24", True, False, False),
        ("10.3.0.0-24", False, False, False),
        ("10.4.1.0-24", False, False, False),
        ("10.3.1.0-25", False, False, False),
        ("10.3.1.0-24&fd00:3:0:1::-64", False, True, False),
        ("10.3.1.0-24&fd00:3::-64", False, False, False),
        ("10.3.1.0-24&fd00:3:0:1::-65", False, False, False),
        ("0.0.0.0-0&fd00:3:0:1::-64", False, False, True),
    ],
)
def test_which_leases_fit(key, v4_only, dual, v6_only):
    both = {"Network": "10.3.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:3::/48"}
    lease = LeaseKey.parse(key)
    assert parse(Network="10.3.0.0/16").allows(lease) is v4_only
    assert parse(**both).allows(lease) is dual
    assert parse(**both, EnableIPv4=False).allows(lease) is v6_only


def test_capacity():
    config = parse(Network="10.3.0.0/16")
    assert config.capacity(socket.AF_INET) == 255
    assert config.capacity(socket.AF_INET6) == 0
    assert parse(Network="10.3.0.0/16", SubnetMin="10.3.9.0", SubnetMax="10.3.8.0").capacity(socket.AF_INET) == 0
    assert parse(EnableIPv4=False, EnableIPv6=True, IPv6Network="fc00::/48").capacity(socket.AF_INET6) == 65535


subnets_v4 = st.builds(
    lambda number, length: Subnet(number.to_bytes(4, "big"), length), st.integers(0, 2**32 - 1), st.integers(0, 32)
)
subnets_v6 = st.builds(
    lambda number, length: Subnet(number.to_bytes(16, "big"), length), st.integers(0, 2**128 - 1), st.integers(0, 128)
)


@given(st.one_of(subnets_v4, subnets_v6), st.integers(0, 130))
def test_a_config_is_refused_or_holds(network, length):
    six = network.bits == 128
    prefix = "IPv6" if six else ""
    keys = {f"{prefix}Network": str(network), f"{prefix}SubnetLen": length, "EnableIPv6": six, "EnableIPv4": not six}
    wide_enough = network.length <= network.bits - 4 and network.masked() != Subnet(bytes(network.bits // 8), 0)
    fitting = length == 0 or network.length + 2 <= length <= network.bits - 2
    if not (wide_enough and fitting):
        with pytest.raises(BadConfig):
            parse(**keys)
        return
    config = parse(**keys)
    got, low, high = (
        (config.ipv6_subnet_len, config.ipv6_subnet_min, config.ipv6_subnet_max)
        if six
        else (config.subnet_len, config.subnet_min, config.subnet_max)
    )
    first, last = Subnet(low, got), Subnet(high, got)
    assert network.contains(first)
    assert network.contains(last)
    assert first.first == network.first + first.size  # the second subnet
    assert last.last == network.last
    assert config.capacity(network.family) == (1 << (got - network.length)) - 1
    for subnet in (first, last):
        assert config.allows(LeaseKey(None, subnet) if six else LeaseKey(subnet))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
known_keys = st.sampled_from(
    ["Network", "subnetLen", "SubnetMin", "Backend", "EnableIPv6", "IPv6Network", "IPv6SubnetMax"]
)


@given(st.dictionaries(known_keys | st.text(max_size=8), json_values, max_size=5))
def test_nothing_but_bad_config_ever_comes_of_bad_input(keys):
    try:
        NetworkConfig.parse(json.dumps({"Network": "10.3.0.0/16"} | keys))
    except BadConfig as error:
        assert "\n" not in str(error)  # noqa: PT017  # a valid config is as good an outcome
