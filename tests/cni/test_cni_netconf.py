"""The delegate's config, byte for byte (compatibility reference, sections 10 and 13.4), and what netconfs are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.cni import ENV
from wincey.cni.jsontext import decode, encode
from wincey.cni.netconf import bridge_name, delegate_config, parse_netconf
from wincey.cni.protocol import CniError
from wincey.cni.subnetenv import parse_subnet_env

V6 = "FLANNEL_IPV6_NETWORK=fc00::/48\nFLANNEL_IPV6_SUBNET=fc00::1/64\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n"


def made(env=ENV, **fields):
    conf = {"name": "cni-flannel", "type": "flannel"} | fields
    return encode(
        delegate_config(parse_netconf(json.dumps(conf).encode()), parse_subnet_env(env, "subnet.env"))
    ).decode()


def refused(**fields):
    with pytest.raises(CniError) as caught:
        made(**fields)
    return caught.value


class TestSavedState:
    def test_ipv4(self):
        assert made() == (
            '{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],'
            '"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}'
        )

    def test_ipv4_with_two_networks(self):
        env = ENV.replace("10.1.0.0/16", "10.1.0.0/16,192.168.0.0/16,10.1.0.0/16")
        assert '"routes":[{"dst":"10.1.0.0/16"},{"dst":"192.168.0.0/16"}]' in made(env)

    def test_ipv6(self):
        assert made(V6) == (
            '{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"fc00::/64"}]],"routes":[{"dst":"fc00::/48"}],'
            '"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}'
        )

    def test_dual_stack(self):
        assert (
            '"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00::/64"}]],'
            '"routes":[{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}],"type":"host-local"}'
        ) in made(V6 + ENV)

    def test_what_the_user_says_goes_first(self):
        conf = json.loads(
            made(
                cniVersion="0.3.1",
                delegate={"type": "ptp", "ipMasq": True, "mtu": 1400, "dns": {"nameservers": ["10.1.0.10"]}},
                runtimeConfig={"portMappings": [{"hostPort": 80}]},
            )
        )
        assert (conf["type"], conf["ipMasq"], conf["mtu"], conf["cniVersion"]) == ("ptp", True, 1400, "0.3.1")
        assert conf["runtimeConfig"] == {"portMappings": [{"hostPort": 80}]}
        assert conf["dns"] == {"nameservers": ["10.1.0.10"]}
        assert "isGateway" not in conf  # a key of bridge

    def test_masquerading_is_done_once(self):
        assert '"ipMasq":true' in made(ENV.replace("IPMASQ=true", "IPMASQ=false"))
        assert '"ipMasq":true' in made(ENV.replace("IPMASQ=true", "IPMASQ=True"))  # only the exact text counts

    def test_text_is_escaped_as_go_does(self):
        assert '"x":"\\u003ca\\u0026b\\u003eé"' in made(delegate={"x": "<a&b>é"})


class TestIpam:
    """Base ipam with a type given or not, with routes or not."""

    @pytest.mark.parametrize("given_type", [None, "calico-ipam"])
    def test_type(self, given_type):
        ipam = {"type": given_type} if given_type else {"dataDir": "/x"}
        conf = json.loads(made(ipam=ipam))
        assert conf["ipam"]["type"] == (given_type or "host-local")
        assert conf["ipam"]["ranges"] == [[{"subnet": "10.1.17.0/24"}]]

    def test_routes_are_added_to(self):
        conf = json.loads(made(ipam={"routes": [{"dst": "0.0.0.0/0", "gw": "10.1.17.9"}]}))
        assert conf["ipam"]["routes"] == [{"dst": "0.0.0.0/0", "gw": "10.1.17.9"}, {"dst": "10.1.0.0/16"}]

    @pytest.mark.parametrize("routes", [[{"dst": "nonsense"}], [{}], ["0.0.0.0/0"], {"dst": "0.0.0.0/0"}])
    def test_bad_routes(self, routes):
        assert refused(ipam={"routes": routes}).message.startswith("failed to read IPAM routes")


class TestNamedNetwork:
    def test_it_has_files_and_a_bridge_of_its_own(self):
        conf = parse_netconf(b'{"name": "n", "network": "blue"}')
        assert conf.subnet_file == "/run/flannel/networks/blue.env"
        assert conf.data_dir == "/var/lib/cni/flannel-networks/blue"
        assert '"bridge":"cni-blue"' in made(network="blue")
        assert '"bridge":"br7"' in made(network="blue", delegate={"bridge": "br7"})

    def test_without_one_all_is_as_with_flannel(self):
        conf = parse_netconf(b'{"name": "n"}')
        assert (conf.subnet_file, conf.data_dir) == ("/run/flannel/subnet.env", "/var/lib/cni/flannel")
        assert "bridge" not in json.loads(made())

    @given(st.text("abc-_.0", min_size=1, max_size=60))
    def test_bridge_names_fit(self, network):
        assert len(bridge_name(network)) <= 15

    def test_long_names_differ(self):
        assert bridge_name("production-a") != bridge_name("production-b")

    @pytest.mark.parametrize("network", ["../etc", "a/b", "-x", "a b"])
    def test_no_way_out_of_the_directory(self, network):
        assert "no name of a network" in refused(network=network).message


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "code", "words"),
        [
            ({"delegate": {"name": "x"}}, 999, "'delegate' dictionary must not have 'name' field"),
            ({"delegate": {"ipam": {}}}, 999, "'delegate' dictionary must not have 'ipam' field"),
            ({"delegate": {"type": 1}}, 999, "must have (string) 'type' field"),
            ({"delegate": []}, 6, "'delegate' must be an object"),
            ({"name": ""}, 7, "missing network name"),
            ({"name": "a b"}, 7, "invalid characters found in network name"),
            ({"dataDir": 5}, 6, "'dataDir' must be a string"),
            ({"cni.dev/valid-attachments": ["x"]}, 6, "must be a list of containerID and ifname"),
        ],
    )
    def test_fields(self, fields, code, words):
        error = refused(**fields)
        assert error.code == code
        assert words in error.message

    @pytest.mark.parametrize("text", [b"", b"{", b"[]", b"{} {}", b"\xff", b'{"a": NaN}', b"[" * 100_000])
    def test_no_json(self, text):
        with pytest.raises(CniError) as caught:
            parse_netconf(text)
        assert caught.value.code == 6

    def test_keys_are_known_in_any_case(self):
        assert parse_netconf(b'{"Name": "n", "SUBNETFILE": "/x"}').subnet_file == "/x"


class TestSubnetEnv:
    @pytest.mark.parametrize(
        ("without", "missing"),
        [
            ("NETWORK", "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK"),
            ("SUBNET", "FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET"),
            ("MTU", "FLANNEL_MTU"),
            ("IPMASQ", "FLANNEL_IPMASQ"),
            (
                "FLANNEL",
                "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK, FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET, FLANNEL_MTU, FLANNEL_IPMASQ",
            ),
        ],
    )
    def test_missing_variables(self, without, missing):
        text = "".join(f"{line}\n" for line in ENV.splitlines() if without not in line)
        with pytest.raises(CniError, match=f"/x/subnet.env is missing {missing}$"):
            parse_subnet_env(text, "/x/subnet.env")

    @pytest.mark.parametrize("line", ["FLANNEL_MTU=big", "FLANNEL_SUBNET=10.1.17.1", "FLANNEL_NETWORK=10.1.0.0/33,x"])
    def test_bad_values_are_named(self, line):
        name, _, value = line.partition("=")
        text = "".join(f"{each}\n" for each in ENV.splitlines() if not each.startswith(name)) + line
        with pytest.raises(CniError, match=value.partition(",")[0]):
            parse_subnet_env(text, "subnet.env")

    def test_lines_that_say_nothing_are_passed_over(self):
        """They end flannel's plugin with a panic."""
        env = parse_subnet_env("\n# by hand\nFLANNEL_SUBNET\n" + ENV, "subnet.env")
        assert env.subnets == ["10.1.17.0/24"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(JSON)
def test_json_is_what_json_makes_of_it(value):
    assert decode(encode(value)) == value
    assert json.loads(encode(value)) == value
    assert decode(json.dumps(value, indent=1).encode()) == value
