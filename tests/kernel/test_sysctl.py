"""Kernel settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from support.rules_ns import Hosts, Reconciled, on_a_host, run
from wincey.kernel import sysctl
from wincey.kernel.sysctl import SysctlDriver, bridge_netfilter_note, read
from wincey.model.state import Sysctl


@pytest.fixture
def host() -> Iterator[Hosts]:
    with on_a_host() as hosts:
        yield hosts


@pytest.fixture
def kept() -> Reconciled:
    return Reconciled(SysctlDriver())


@pytest.mark.root
async def test_a_setting_is_put_and_kept(host: Hosts, kept: Reconciled) -> None:
    run("ip", "link", "add", "flannel.1", "type", "veth", "peer", "name", "other")
    forwarding = Sysctl("net/ipv4/conf/flannel.1/forwarding", "1")
    accept_ra = Sysctl("net/ipv6/conf/flannel.1/accept_ra", "0")
    Path("/proc/sys/net/ipv4/conf/flannel.1/forwarding").write_text("0")
    kept.want(forwarding, accept_ra)
    assert await kept.once()
    assert not kept.failures
    assert Path("/proc/sys/net/ipv4/conf/flannel.1/forwarding").read_text() == "1\n"
    assert Path("/proc/sys/net/ipv6/conf/flannel.1/accept_ra").read_text() == "0\n"
    assert not await kept.once()
    Path("/proc/sys/net/ipv6/conf/flannel.1/accept_ra").write_text("2")
    assert await kept.once()
    assert Path("/proc/sys/net/ipv6/conf/flannel.1/accept_ra").read_text() == "0\n"


@pytest.mark.root
async def test_a_setting_of_several_words_is_compared_by_its_words(host: Hosts, kept: Reconciled) -> None:
    kept.want(Sysctl("net/ipv4/ip_local_port_range", "20000 30000"))
    assert await kept.once()
    assert not await kept.once()


async def test_an_absent_setting_is_a_failure_unless_it_is_optional(kept: Reconciled) -> None:
    kept.want(Sysctl("net/ipv4/conf/no-such-device/forwarding", "1"), Sysctl("net/no/such", "1", optional=True))
    assert await kept.once()
    assert [failure.reason for failure in kept.failures] == [
        "sysctl net/ipv4/conf/no-such-device/forwarding = 1: this kernel, or device, has no such setting"
    ]


@pytest.mark.root
async def test_one_refused_value_does_not_keep_the_others(host: Hosts, kept: Reconciled) -> None:
    kept.want(Sysctl("net/ipv4/ip_forward", "maybe"), Sysctl("net/ipv6/conf/all/forwarding", "1"))
    await kept.once()
    assert [failure.reason for failure in kept.failures] == ["sysctl net/ipv4/ip_forward = maybe: Invalid argument"]
    assert read("net/ipv6/conf/all/forwarding") == "1"


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (None, "br_netfilter is not loaded: traffic between containers on the same bridge is not seen by iptables"),
        ("0\n", "net.bridge.bridge-nf-call-iptables is 0: traffic between containers on the same bridge"),
        ("1\n", None),
    ],
)
def test_the_note_on_br_netfilter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, note: str | None
) -> None:
    monkeypatch.setattr(sysctl, "_ROOT", tmp_path)
    if content is not None:
        (tmp_path / "net/bridge").mkdir(parents=True)
        (tmp_path / "net/bridge/bridge-nf-call-iptables").write_text(content)
    said = bridge_netfilter_note()
    if note is None:
        assert said is None
    else:
        assert said is not None
        assert said.startswith(note)
        assert "\n" not in said
