import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.agent.envfile import EnvFile, read_env_file, write_env_file
from wincey.model.address import Subnet
from wincey.model.config import NetworkConfig
from wincey.model.lease import LeaseKey

DUAL = '{"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}'
V6 = '{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}'


def subnets(*texts):
    return tuple(map(Subnet.parse, texts))


@pytest.mark.parametrize(
    ("config", "key", "mtu", "ip_masq", "expected"),
    [
        (
            '{"Network": "10.1.0.0/16"}',
            "10.1.74.0-24",
            1472,
            False,
            b"FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n",
        ),
        (
            DUAL,
            "10.3.1.0-24&fd00:3:0:1::-64",
            1450,
            True,
            b"FLANNEL_NETWORK=10.3.0.0/16\nFLANNEL_SUBNET=10.3.1.1/24\n"
            b"FLANNEL_IPV6_NETWORK=fd00:3::/48\nFLANNEL_IPV6_SUBNET=fd00:3:0:1::1/64\n"
            b"FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        ),
        (
            V6,
            "0.0.0.0-0&fd00:3:0:1::-64",
            1430,
            True,
            b"FLANNEL_IPV6_NETWORK=fd00:3::/48\nFLANNEL_IPV6_SUBNET=fd00:3:0:1::1/64\n"
            b"FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n",
        ),
    ],
)
def test_bytes_are_flannels(tmp_path, config, key, mtu, ip_masq, expected):
    env = EnvFile.of(NetworkConfig.parse(config), LeaseKey.parse(key), mtu=mtu, ip_masq=ip_masq)
    assert env.render() == expected
    write_env_file(str(tmp_path / "subnet.env"), env)
    assert (tmp_path / "subnet.env").read_bytes() == expected
    assert read_env_file(str(tmp_path / "subnet.env")) == env


@pytest.mark.parametrize("umask", [0o022, 0o077, 0])
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    path = tmp_path / "run" / "flannel" / "subnet.env"
    before = os.umask(umask)
    try:
        write_env_file(str(path), EnvFile(mtu=1500))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_an_existing_directory_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o700)
    write_env_file(str(tmp_path / "subnet.env"), EnvFile())
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o700


def test_replaced_as_a_whole_and_nothing_left_behind(tmp_path):
    path = tmp_path / "subnet.env"
    write_env_file(str(path), EnvFile(mtu=1))
    with path.open("rb") as reader:
        write_env_file(str(path), EnvFile(mtu=2))
        assert b"FLANNEL_MTU=1\n" in reader.read()  # who has the old file open reads it to its end
    assert read_env_file(str(path)).mtu == 2
    assert os.listdir(tmp_path) == ["subnet.env"]


def test_a_failed_write_leaves_no_draft(tmp_path):
    target = tmp_path / "subnet.env"
    target.mkdir()
    with pytest.raises(OSError, match=r"subnet\.env"):
        write_env_file(str(target), EnvFile())
    assert os.listdir(tmp_path) == ["subnet.env"]


def test_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_env_file("subnet.env", EnvFile(mtu=9))
    assert read_env_file("subnet.env").mtu == 9


def test_missing_file_is_empty(tmp_path):
    assert read_env_file(str(tmp_path / "subnet.env")) == EnvFile()


def test_unreadable_file_is_empty_and_told(tmp_path, caplog):
    assert read_env_file(str(tmp_path)) == EnvFile()
    assert "can't be read" in caplog.text


@pytest.mark.parametrize(
    ("text", "networks"),
    [
        ("FLANNEL_NETWORK=10.1.0.0/16", subnets("10.1.0.0/16")),
        ("export FLANNEL_NETWORK=10.1.0.0/16 # ours", subnets("10.1.0.0/16")),
        ("  export\tFLANNEL_NETWORK = '10.1.0.0/16'   # ours", subnets("10.1.0.0/16")),
        ('FLANNEL_NETWORK="10.1.0.0/16"', subnets("10.1.0.0/16")),
        ("FLANNEL_NETWORK: 10.1.0.0/16", subnets("10.1.0.0/16")),
        ("FLANNEL_NETWORK=10.1.0.0/16\r\n", subnets("10.1.0.0/16")),
        ("# FLANNEL_NETWORK=10.1.0.0/16", ()),
        ("FLANNEL_NETWORK=10.1.2.3/16", subnets("10.1.0.0/16")),
        ("FLANNEL_NETWORK=10.1.0.0/16,10.2.0.0/16", subnets("10.1.0.0/16", "10.2.0.0/16")),
        ("FLANNEL_NETWORK=10.1.0.0/16, junk ,10.2.0.0/33,10.4.0.0/16", subnets("10.1.0.0/16", "10.4.0.0/16")),
        ("FLANNEL_NETWORK=junk,10.3.0.0", ()),
        ("FLANNEL_NETWORK=", ()),
        ("FLANNEL_NETWORK=fd00::/48", ()),
        ("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_NETWORK=10.2.0.0/16", subnets("10.2.0.0/16")),
        ("no equals sign\nFLANNEL_NETWORK=10.1.0.0/16\n=\n", subnets("10.1.0.0/16")),
        ("FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_NETWORK=10.1.0.0/16", subnets("10.1.0.0/16", "fd00::/48")),
        ("", ()),
    ],
)
def test_dotenv_syntax(text, networks):
    assert EnvFile.parse(text).networks == networks


def test_values_of_an_old_file():
    env = EnvFile.parse("FLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=many\nFLANNEL_IPMASQ=TRUE\n")
    assert env == EnvFile((), subnets("10.1.74.1/24"), 0, ip_masq=False)
    assert EnvFile.parse("FLANNEL_IPMASQ='true' # yes\nFLANNEL_MTU=1450").ip_masq is True


@given(
    st.text() | st.lists(st.sampled_from(["FLANNEL_NETWORK", "=", '"', "'", "\\", "#", "10.0.0.0/8", ",", "\n", " "]))
)
def test_any_text_can_be_read(text):
    env = EnvFile.parse("".join(text))
    assert EnvFile.parse(env.render().decode()) == env
