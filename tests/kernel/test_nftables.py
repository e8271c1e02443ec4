"""The nftables flavour: its text, and what it does on a real kernel in namespaces of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from support.rules_ns import Hosts, Reconciled, on_a_host, reconciled, run
from wincey.kernel import nft
from wincey.kernel.nftables import NftablesDriver, rendered_table
from wincey.model.address import Subnet
from wincey.model.state import Isolation, RuleSet

V4 = RuleSet(Subnet.parse("10.3.0.0/16"), Subnet.parse("10.3.1.0/24"), masquerade=True, forward=True)
V6 = RuleSet(Subnet.parse("fd00:3::/48"), Subnet.parse("fd00:3:0:1::/64"), masquerade=True, forward=True)

POSTRTG = """\
table ip flannel-ipv4 {
	chain postrtg {
		comment "chain to manage traffic masquerading by flannel"
		type nat hook postrouting priority srcnat; policy accept;
		meta mark & 0x00004000 == 0x00004000 return
		ip saddr 10.3.1.0/24 ip daddr 10.3.0.0/16 return
		ip saddr 10.3.0.0/16 ip daddr 10.3.1.0/24 return
		ip saddr != 10.3.0.0/16 ip daddr 10.3.1.0/24 return
		ip saddr 10.3.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random
		ip saddr != 10.3.0.0/16 ip daddr 10.3.0.0/16 masquerade fully-random
	}
}
"""

FOREIGN = """\
table ip flannel-ipv4-not-ours { chain c { type filter hook forward priority 0; ip saddr 10.3.0.0/16 counter drop; }; }
table inet firewall { set s { type ipv4_addr; elements = { 10.3.1.9 }; }; chain forward { type filter hook forward priority 5; }; }
"""


@pytest.fixture
def host() -> Iterator[Hosts]:
    with on_a_host() as hosts:
        yield hosts


@pytest.fixture
async def kept(host: Hosts) -> AsyncIterator[Reconciled]:
    async with reconciled(NftablesDriver(), watched=True) as kept:
        yield kept


def listed(*what: str) -> str:
    return run("nft", "--stateless", "list", *what, check=False)


# ---- the text


def test_the_table_is_replaced_whole_in_one_transaction() -> None:
    script = rendered_table(V4, nft.Features())
    assert script.startswith("add table ip flannel-ipv4\ndelete table ip flannel-ipv4\ntable ip flannel-ipv4 {\n")
    assert script.count("masquerade fully-random") == 2


def test_what_nft_or_the_kernel_lacks_is_left_out() -> None:
    script = rendered_table(V4, nft.Features(fully_random=False, comments=False))
    assert "fully-random" not in script
    assert "comment" not in script


def test_fully_random_is_left_out_when_not_wanted() -> None:
    unwanted = RuleSet(V4.network, V4.subnet, masquerade=True, forward=True, random_fully=False)
    assert "fully-random" not in rendered_table(unwanted, nft.Features())


def test_a_forwarded_packet_meets_no_chain_of_ours_unless_one_may_drop_it() -> None:
    """What accepts all that it does not drop has nothing to say, and takes time for every packet."""
    plain = rendered_table(V4, nft.Features())
    assert "chain postrtg" in plain
    assert "hook forward" not in plain
    apart = RuleSet(
        V4.network, V4.subnet, masquerade=False, forward=True, isolation=Isolation((Subnet.parse("10.4.0.0/16"),))
    )
    text = rendered_table(apart, nft.Features())
    assert "chain postrtg" not in text
    assert "hook forward" in text
    assert "accept" not in text.replace("policy accept", "")


def test_a_suffix_is_part_of_the_tables_name() -> None:
    assert "table ip6 flannel-blue-ipv6 {" in rendered_table(V6, nft.Features(), "blue")


def test_exclusions_are_one_set_before_the_masquerading() -> None:
    exclude = tuple(Subnet.parse(text) for text in ("192.168.0.0/16", "10.0.0.0/8", "10.1.0.0/16", "fd00::/8"))
    lines = rendered_table(
        RuleSet(V4.network, V4.subnet, masquerade=True, forward=False, exclude=exclude), nft.Features()
    ).splitlines()
    rules = [line.strip() for line in lines]
    excluded = rules.index("ip saddr 10.3.0.0/16 ip daddr { 10.0.0.0/8, 192.168.0.0/16 } return")
    assert rules[excluded + 1] == "ip saddr 10.3.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random"


# ---- on a real kernel


@pytest.mark.root
async def test_the_kernel_lists_exactly_the_contracts_text(kept: Reconciled) -> None:
    kept.want(V4, V6)
    assert await kept.once()
    assert not kept.failures
    assert listed("chain", "ip", "flannel-ipv4", "postrtg") == POSTRTG
    assert listed("chain", "ip", "flannel-ipv4", "forward") == ""
    table = listed("table", "ip6", "flannel-ipv6")
    assert '\tcomment "rules for flannel-ipv6"\n' in table
    assert "\t\tip6 saddr != fd00:3::/48 ip6 daddr fd00:3:0:1::/64 return\n" in table
    assert "\t\tip6 saddr fd00:3::/48 ip6 daddr != ff00::/8 masquerade fully-random\n" in table


@pytest.mark.root
async def test_what_was_applied_is_seen_as_intact(kept: Reconciled) -> None:
    kept.want(V4, V6)
    await kept.once()
    assert not await kept.difference()
    run("nft", "add", "table", "ip", "unrelated")  # another generation of the rule set: looked at, and still intact
    assert not await kept.difference()


@pytest.mark.root
async def test_a_table_of_an_earlier_run_is_replaced_and_its_rules_are_gone(kept: Reconciled) -> None:
    run(
        "nft", "add table ip flannel-ipv4; add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority 50; }"
    )
    run("nft", "add rule ip flannel-ipv4 postrtg ip saddr 10.9.0.0/16 masquerade")
    run("nft", "add chain ip flannel-ipv4 extra")
    kept.want(V4)
    await kept.once()
    assert listed("chain", "ip", "flannel-ipv4", "postrtg") == POSTRTG
    assert listed("chain", "ip", "flannel-ipv4", "extra") == ""


@pytest.mark.root
async def test_the_old_subnets_rules_are_gone_after_a_change(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    kept.want(RuleSet(V4.network, Subnet.parse("10.3.7.0/24"), masquerade=True, forward=True))
    await kept.once()
    table = listed("table", "ip", "flannel-ipv4")
    assert "10.3.1.0/24" not in table
    assert table == listed("table", "ip", "flannel-ipv4")
    assert POSTRTG.replace("10.3.1.0", "10.3.7.0") == listed("chain", "ip", "flannel-ipv4", "postrtg")


@pytest.mark.root
async def test_a_family_that_is_not_wanted_any_more_goes(kept: Reconciled) -> None:
    kept.want(V4, V6)
    await kept.once()
    kept.want(V4)
    await kept.once()
    assert listed("table", "ip6", "flannel-ipv6") == ""
    assert listed("chain", "ip", "flannel-ipv4", "postrtg") == POSTRTG


@pytest.mark.root
async def test_an_earlier_runs_table_of_an_unwanted_family_goes(kept: Reconciled) -> None:
    run("nft", "add", "table", "ip6", "flannel-ipv6")
    kept.want(V4)
    await kept.once()
    assert listed("table", "ip6", "flannel-ipv6") == ""


@pytest.mark.root
@pytest.mark.parametrize(
    "damage",
    [
        "delete table ip flannel-ipv4",
        "flush table ip flannel-ipv4",
        "flush chain ip flannel-ipv4 postrtg; delete chain ip flannel-ipv4 postrtg",
        "add rule ip flannel-ipv4 postrtg drop",
        "flush ruleset",
    ],
)
async def test_damage_is_noticed_and_repaired(kept: Reconciled, damage: str) -> None:
    kept.want(V4)
    await kept.once()
    run("nft", damage)
    assert listed("chain", "ip", "flannel-ipv4", "postrtg") != POSTRTG
    await kept.repaired(lambda: listed("chain", "ip", "flannel-ipv4", "postrtg") == POSTRTG)


@pytest.mark.root
async def test_a_single_deleted_rule_is_noticed_and_repaired(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    line = next(
        line
        for line in run("nft", "-a", "list", "chain", "ip", "flannel-ipv4", "postrtg").splitlines()
        if "224" in line
    )
    run("nft", "delete", "rule", "ip", "flannel-ipv4", "postrtg", "handle", line.split()[-1])
    assert listed("chain", "ip", "flannel-ipv4", "postrtg") != POSTRTG
    await kept.repaired(lambda: listed("chain", "ip", "flannel-ipv4", "postrtg") == POSTRTG)


@pytest.mark.root
async def test_own_changes_come_to_rest(kept: Reconciled) -> None:
    kept.want(V4, V6)
    await kept.once()
    while True:  # ends when no notice comes any more: each one must find all intact
        try:
            async with asyncio.timeout(1):
                await kept.notice.wait()
        except TimeoutError:
            break
        kept.notice.clear()
        assert not await kept.once()


@pytest.mark.root
async def test_changes_of_others_are_no_news(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    await asyncio.sleep(0.5)  # the notices of our own change
    kept.reasons.clear()
    run("nft", "-f", "-", text=FOREIGN)
    run("iptables-nft", "-t", "nat", "-N", "KUBE-SERVICES")
    run("iptables-nft", "-N", "KUBE-FORWARD")
    await asyncio.sleep(0.5)
    assert [reason for reason in kept.reasons if "KUBE" in reason or "firewall" in reason or "not-ours" in reason] == []
    run("nft", "add", "chain", "ip", "flannel-ipv4", "extra")
    await kept.repaired(lambda: "extra" not in listed("table", "ip", "flannel-ipv4"))


@pytest.mark.root
async def test_foreign_tables_stay_and_cleanup_leaves_only_them(kept: Reconciled) -> None:
    run("nft", "-f", "-", text=FOREIGN)
    run("iptables-nft", "-A", "FORWARD", "-s", "10.3.0.0/16", "-j", "LOG")
    before = run("nft", "list", "ruleset")
    kept.want(V4, V6)
    await kept.once()
    assert run("nft", "list", "ruleset") != before
    await kept.driver.remove_all()  # type: ignore[attr-defined]  # the drivers of rules have it
    assert run("nft", "list", "ruleset") == before
    kept.want()
    assert not await kept.difference()


@pytest.mark.root
async def test_two_daemons_with_suffixes_do_not_meet(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    async with reconciled(NftablesDriver("blue")) as other:
        other.want(RuleSet(Subnet.parse("10.4.0.0/16"), Subnet.parse("10.4.1.0/24"), masquerade=True, forward=True))
        await other.once()
        assert not await kept.difference()
        assert not await other.difference()
        await other.driver.remove_all()  # type: ignore[attr-defined]  # the drivers of rules have it
    assert not await kept.difference()


@pytest.mark.root
async def test_rules_of_the_iptables_flavour_go_when_nftables_takes_over(host: Hosts) -> None:
    for program in ("iptables-nft", "iptables-legacy"):
        run(program, "-t", "nat", "-N", "FLANNEL-POSTRTG")
        run(program, "-t", "nat", "-A", "FLANNEL-POSTRTG", "-s", "10.3.0.0/16", "-j", "MASQUERADE")
        run(program, "-t", "nat", "-A", "POSTROUTING", "-j", "FLANNEL-POSTRTG")
        run(program, "-t", "nat", "-A", "POSTROUTING", "-s", "10.3.0.0/16", "-d", "10.3.0.0/16", "-j", "RETURN")
        run(
            program, "-t", "nat", "-A", "POSTROUTING", "-s", "10.8.0.0/16", "!", "-d", "224.0.0.0/4", "-j", "MASQUERADE"
        )
        run(program, "-t", "nat", "-A", "POSTROUTING", "-s", "10.5.0.0/16", "-j", "MASQUERADE")
        run(program, "-N", "FLANNEL-FWD")
        run(program, "-A", "FORWARD", "-j", "FLANNEL-FWD")
        run(program, "-A", "FORWARD", "-s", "10.3.0.0/16", "-j", "ACCEPT")
    async with reconciled(
        NftablesDriver(previous=[(Subnet.parse("10.8.0.0/16"), Subnet.parse("10.8.1.0/24"))])
    ) as kept:
        kept.want(V4)
        await kept.once()
        for program in ("iptables-nft", "iptables-legacy"):
            assert run(program, "-t", "nat", "-S").splitlines()[-1] == "-A POSTROUTING -s 10.5.0.0/16 -j MASQUERADE"
            assert "FLANNEL" not in run(program, "-t", "nat", "-S")
            assert run(program, "-S").splitlines() == ["-P INPUT ACCEPT", "-P FORWARD ACCEPT", "-P OUTPUT ACCEPT"]


@pytest.mark.root
async def test_no_legacy_table_is_made(kept: Reconciled) -> None:
    kept.want(V4, V6)
    await kept.once()
    await kept.difference()
    assert run("cat", "/proc/self/net/ip_tables_names") == ""
    assert run("cat", "/proc/self/net/ip6_tables_names") == ""


# ---- the way through iptables' FORWARD chain


GATE = [
    "-N FLANNEL-FWD",
    '-A FLANNEL-FWD -s 10.3.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
    '-A FLANNEL-FWD -d 10.3.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
]
JUMP = '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD'


@pytest.mark.root
@pytest.mark.parametrize("program", ["iptables-nft", "iptables-legacy"])
async def test_a_closed_forward_chain_is_opened_for_as_long_as_it_is_closed(host: Hosts, program: str) -> None:
    run(program, "-N", "DOCKER-USER")
    run(program, "-A", "FORWARD", "-j", "DOCKER-USER")
    run(program, "-P", "FORWARD", "DROP")
    async with reconciled(NftablesDriver(), watched=True) as kept:
        kept.want(V4)
        await kept.once()
        assert run(program, "-S", "FORWARD").splitlines() == ["-P FORWARD DROP", "-A FORWARD -j DOCKER-USER", JUMP]
        assert run(program, "-S", "FLANNEL-FWD").splitlines() == GATE
        assert not await kept.difference()

        run(program, "-F", "FLANNEL-FWD")
        run(program, "-D", "FORWARD", "2")
        await kept.repaired(lambda: JUMP in run(program, "-S") and GATE[1] in run(program, "-S"))

        run(program, "-P", "FORWARD", "ACCEPT")
        assert await kept.once()
        assert run(program, "-S", "FORWARD").splitlines() == ["-P FORWARD ACCEPT", "-A FORWARD -j DOCKER-USER"]
        assert "FLANNEL-FWD" not in run(program, "-S")
        assert not await kept.difference()


@pytest.mark.root
async def test_a_chain_that_closes_later_is_noticed(kept: Reconciled) -> None:
    kept.want(V4)
    await kept.once()
    run("iptables-nft", "-P", "FORWARD", "DROP")
    await kept.repaired(lambda: JUMP in run("iptables-nft", "-S"))


@pytest.mark.root
async def test_the_way_goes_with_the_rules(kept: Reconciled) -> None:
    run("iptables-nft", "-P", "FORWARD", "DROP")
    kept.want(V4)
    await kept.once()
    kept.want(RuleSet(V4.network, V4.subnet, masquerade=True, forward=False))
    await kept.once()
    assert "FLANNEL" not in run("iptables-nft", "-S")
    kept.want(V4)
    await kept.once()
    assert JUMP in run("iptables-nft", "-S")
    kept.want()
    await kept.once()
    assert "FLANNEL" not in run("iptables-nft", "-S")


@pytest.mark.root
async def test_without_iptables_a_closed_chain_is_explained(
    kept: Reconciled, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run("nft", "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority 0; policy drop; }")

    async def none(family: int, first: str = "") -> list[object]:
        return []

    monkeypatch.setattr("wincey.kernel.forwardgate.programs", none)
    kept.want(V4)
    await kept.once()
    await kept.once()
    assert [record.message for record in caplog.records if "install iptables" in record.message] == [
        "the chain FORWARD of the nftables table 'ip filter' has policy drop, which stops container traffic; install"
        " iptables, or accept 10.3.0.0/16 there: nft add rule ip filter FORWARD ip saddr 10.3.0.0/16 accept, and the same"
        " with daddr"
    ]
    assert not kept.failures


# ---- failures


@pytest.mark.root
async def test_one_family_that_fails_does_not_keep_the_other(kept: Reconciled) -> None:
    broken = RuleSet(V6.network, V4.subnet, masquerade=True, forward=True)  # a subnet of the wrong family
    kept.want(broken, V4)
    await kept.once()
    assert listed("chain", "ip", "flannel-ipv4", "postrtg") == POSTRTG
    assert listed("table", "ip6", "flannel-ipv6") == ""
    assert [failure.object for failure in kept.failures] == [broken]
    assert kept.failures[0].reason.startswith("traffic rules of fd00:3::/48: nft: ")


async def test_a_missing_nft_is_a_failure_that_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("wincey.kernel.program.SBIN", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    async with reconciled(NftablesDriver()) as kept:
        kept.want(V4)
        await kept.once()
        assert [failure.reason for failure in kept.failures] == ["traffic rules of 10.3.0.0/16: nft is not installed"]
