"""The iptables flavours: their text, and what they do on a real kernel in namespaces of its own."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator

import pytest

from support.rules_ns import Hosts, Reconciled, on_a_host, reconciled, run
from wincey.kernel.iptables import IptablesDriver
from wincey.kernel.iptables_text import Seen, Version, blocks, places, rendered, restore_text
from wincey.kernel.nftables import NftablesDriver
from wincey.model.address import Subnet
from wincey.model.errors import UsageError
from wincey.model.state import RuleSet

V4 = RuleSet(Subnet.parse("10.3.0.0/16"), Subnet.parse("10.3.1.0/24"), masquerade=True, forward=True)
V6 = RuleSet(Subnet.parse("fd00:3::/48"), Subnet.parse("fd00:3:0:1::/64"), masquerade=True, forward=True)
MASQUERADE, FORWARD = places()

NAT = """\
-P PREROUTING ACCEPT
-P INPUT ACCEPT
-P OUTPUT ACCEPT
-P POSTROUTING ACCEPT
-N FLANNEL-POSTRTG
-A POSTROUTING -m comment --comment "flanneld masq" -j FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.3.1.0/24 -d 10.3.0.0/16 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.3.0.0/16 -d 10.3.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s 10.3.0.0/16 -d 10.3.1.0/24 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s 10.3.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s 10.3.0.0/16 -d 10.3.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
"""

FILTER = """\
-P INPUT ACCEPT
-P FORWARD ACCEPT
-P OUTPUT ACCEPT
-N FLANNEL-FWD
-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD
-A FLANNEL-FWD -s 10.3.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
-A FLANNEL-FWD -d 10.3.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT
"""

EMPTY = ["-P INPUT ACCEPT", "-P FORWARD ACCEPT", "-P OUTPUT ACCEPT"]


@pytest.fixture
def host() -> Iterator[Hosts]:
    with on_a_host() as hosts:
        yield hosts


@pytest.fixture(params=["iptables-nft", "iptables-legacy"])
def program(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def kept(host: Hosts, program: str) -> AsyncIterator[Reconciled]:
    async with reconciled(IptablesDriver(program), watched=True) as kept:
        yield kept


def of_v6(text: str) -> str:
    for old, new in (
        ("10.3.1.0/24", "fd00:3:0:1::/64"),
        ("10.3.0.0/16", "fd00:3::/48"),
        ("224.0.0.0/4", "ff00::/8"),
    ):
        text = text.replace(old, new)
    return text


# ---- the text


def test_versions() -> None:
    assert Version.parse("iptables v1.8.9 (nf_tables)\n") == Version(legacy=False, number=(1, 8, 9))
    assert Version.parse("ip6tables v1.8.10 (legacy)") == Version(legacy=True, number=(1, 8, 10))
    assert Version.parse("iptables v1.6.1") == Version(legacy=True, number=(1, 6, 1))
    assert Version.parse("iptables v1.6.2").modern
    assert not Version.parse("iptables v1.6.1").modern
    assert not Version.parse("iptables v1.4.21").modern


def test_random_fully_is_left_out_when_not_possible() -> None:
    masquerade, _ = rendered(V4, random_fully=False)
    assert masquerade[-1] == '! -s 10.3.0.0/16 -d 10.3.0.0/16 -m comment --comment "flanneld masq" -j MASQUERADE'


def test_exclusions_come_before_the_masquerading() -> None:
    exclude = (Subnet.parse("192.168.0.0/16"), Subnet.parse("10.0.0.0/8"), Subnet.parse("fd00::/8"))
    masquerade, _ = rendered(
        RuleSet(V4.network, V4.subnet, masquerade=True, forward=True, exclude=exclude), random_fully=False
    )
    assert masquerade[4:7] == (
        '-s 10.3.0.0/16 -d 10.0.0.0/8 -m comment --comment "flanneld masq" -j RETURN',
        '-s 10.3.0.0/16 -d 192.168.0.0/16 -m comment --comment "flanneld masq" -j RETURN',
        '-s 10.3.0.0/16 ! -d 224.0.0.0/4 -m comment --comment "flanneld masq" -j MASQUERADE',
    )


def test_a_second_restore_deletes_the_jump_before_it_adds_it() -> None:
    jump = '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD'
    seen = Seen(("-P FORWARD ACCEPT", jump, "-A FORWARD -j OTHER"), ("-A FLANNEL-FWD -s 10.9.0.0/16 -j ACCEPT",))
    assert restore_text(FORWARD, seen, rendered(V4, random_fully=False)[1]).splitlines() == [
        "*filter",
        ":FLANNEL-FWD - [0:0]",
        '-D FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
        '-A FLANNEL-FWD -s 10.3.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        '-A FLANNEL-FWD -d 10.3.0.0/16 -m comment --comment "flanneld forward" -j ACCEPT',
        '-A FORWARD -m comment --comment "flanneld forward" -j FLANNEL-FWD',
        "COMMIT",
    ]


def test_nothing_to_remove_is_nothing_to_do() -> None:
    assert restore_text(FORWARD, Seen(("-P FORWARD ACCEPT", "-A FORWARD -j FLANNEL-FWD-2"), None), ()) == ""


@pytest.mark.parametrize(
    ("rule", "closed"),
    [
        ("-A FORWARD -j DROP", True),
        ("-A FORWARD -j REJECT --reject-with icmp-host-prohibited", True),
        ('-A FORWARD -m comment --comment "the end -j" -j DROP', True),
        ("-A FORWARD -i eth9 -j DROP", False),
        ('-A FORWARD -i eth9 -m comment --comment "x" -j DROP', False),
        ("-A FORWARD -j ACCEPT", False),
    ],
)
def test_a_rule_that_stops_all_the_rest_closes_a_chain(rule: str, closed: bool) -> None:
    assert blocks(("-P FORWARD ACCEPT", rule)) is closed


def test_a_suffix_has_to_fit_in_a_chains_name() -> None:
    assert places("blue")[0].chain == "FLANNEL-POSTRTG-blue"
    for wrong in ("twelve_chars", "a b", "Blue", "-x", "a;b"):
        with pytest.raises(UsageError, match="suffix"):
            IptablesDriver(suffix=wrong)


# ---- on a real kernel


@pytest.mark.root
async def test_exactly_the_contracts_text(kept: Reconciled, program: str) -> None:
    kept.want(V4, V6)
    assert await kept.once()
    assert not kept.failures
    v6 = program.replace("iptables", "ip6tables")
    assert run(program, "-t", "nat", "-S") == NAT
    assert run(program, "-S") == FILTER
    assert run(v6, "-t", "nat", "-S") == of_v6(NAT)
    assert run(v6, "-S") == of_v6(FILTER)
    assert not await kept.difference()


@pytest.mark.root
async def test_without_masquerading_and_without_forwarding(kept: Reconciled, program: str) -> None:
    kept.want(RuleSet(V4.network, V4.subnet, masquerade=False, forward=True))
    await kept.once()
    assert "FLANNEL" not in run(program, "-t", "nat", "-S")
    assert run(program, "-S") == FILTER
    assert not await kept.difference()
    kept.want(RuleSet(V4.network, V4.subnet, masquerade=True, forward=False))
    await kept.once()
    assert run(program, "-t", "nat", "-S") == NAT
    assert run(program, "-S").splitlines() == EMPTY
    assert not await kept.difference()
    kept.want(RuleSet(V4.network, V4.subnet, masquerade=False, forward=False))
    await kept.once()
    assert "FLANNEL" not in run(program, "-t", "nat", "-S") + run(program, "-S")
    assert not await kept.difference()


@pytest.mark.root
async def test_the_jump_is_last_behind_the_rules_of_kube_proxy_and_docker(kept: Reconciled, program: str) -> None:
    others = [
        "-A FORWARD -j DOCKER-USER",
        '-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD',
    ]
    run(program, "-N", "DOCKER-USER")
    run(program, "-N", "KUBE-FORWARD")
    run(program, "-A", "FORWARD", "-j", "DOCKER-USER")
    run(program, "-A", "FORWARD", "-m", "comment", "--comment", "kubernetes forwarding rules", "-j", "KUBE-FORWARD")
    kept.want(V4)
    await kept.once()
    assert run(program, "-S", "FORWARD").splitlines() == ["-P FORWARD ACCEPT", *others, FILTER.splitlines()[4]]


@pytest.mark.root
async def test_the_jump_is_before_a_rule_that_stops_everything(kept: Reconciled, program: str) -> None:
    run(program, "-A", "FORWARD", "-i", "lo", "-j", "ACCEPT")
    run(program, "-A", "FORWARD", "-j", "REJECT")
    kept.want(V4)
    await kept.once()
    jump = FILTER.splitlines()[4]
    assert run(program, "-S", "FORWARD").splitlines()[1:3] == ["-A FORWARD -i lo -j ACCEPT", jump]
    run(program, "-I", "FORWARD", "-j", "DROP")
    await kept.repaired(lambda: run(program, "-S", "FORWARD").splitlines()[1] == jump)


@pytest.mark.root
async def test_the_old_subnets_rules_are_gone_after_a_change(kept: Reconciled, program: str) -> None:
    kept.want(V4)
    await kept.once()
    kept.want(RuleSet(Subnet.parse("10.8.0.0/16"), Subnet.parse("10.8.7.0/24"), masquerade=True, forward=True))
    await kept.once()
    new = NAT.replace("10.3.1.0/24", "10.8.7.0/24").replace("10.3.0.0/16", "10.8.0.0/16")
    assert run(program, "-t", "nat", "-S") == new
    assert run(program, "-S") == FILTER.replace("10.3.0.0/16", "10.8.0.0/16")


@pytest.mark.root
@pytest.mark.parametrize(
    "damage",
    [
        ["-t", "nat", "-F", "FLANNEL-POSTRTG"],
        ["-t", "nat", "-D", "POSTROUTING", "1"],
        ["-t", "nat", "-D", "FLANNEL-POSTRTG", "3"],
        ["-t", "nat", "-I", "FLANNEL-POSTRTG", "-j", "RETURN"],
        ["-F"],
    ],
    ids=" ".join,
)
async def test_damage_is_noticed_and_repaired(kept: Reconciled, program: str, damage: list[str]) -> None:
    def now() -> str:
        return run(program, "-t", "nat", "-S") + run(program, "-S")

    kept.want(V4)
    await kept.once()
    assert now() == NAT + FILTER
    run(program, *damage)
    assert now() != NAT + FILTER
    await kept.repaired(lambda: now() == NAT + FILTER)


@pytest.mark.root
async def test_a_deleted_chain_is_noticed_and_repaired(kept: Reconciled, program: str) -> None:
    kept.want(V4, V6)
    await kept.once()
    v6 = program.replace("iptables", "ip6tables")
    for one, text in ((program, FILTER), (v6, of_v6(FILTER))):
        run(one, "-F", "FORWARD")
        run(one, "-F", "FLANNEL-FWD")
        run(one, "-X", "FLANNEL-FWD")
        await kept.repaired(lambda one=one, text=text: run(one, "-S") == text)  # type: ignore[misc]  # bound on purpose


@pytest.mark.root
async def test_own_changes_come_to_rest(kept: Reconciled) -> None:
    kept.want(V4, V6)
    await kept.once()
    while True:  # ends when no notice comes any more: each one must find all intact
        try:
            async with asyncio.timeout(1.5):
                await kept.notice.wait()
        except TimeoutError:
            break
        kept.notice.clear()
        assert not await kept.once()


@pytest.mark.root
async def test_foreign_rules_stay_and_cleanup_leaves_only_them(kept: Reconciled, program: str) -> None:
    run(program, "-t", "nat", "-N", "KUBE-POSTROUTING")
    run(program, "-t", "nat", "-A", "POSTROUTING", "-j", "KUBE-POSTROUTING")
    run(program, "-t", "nat", "-A", "POSTROUTING", "-s", "10.5.0.0/16", "-j", "MASQUERADE")
    run(program, "-N", "FLANNEL-FWD-NOT-OURS")
    run(program, "-A", "FORWARD", "-j", "FLANNEL-FWD-NOT-OURS")
    run(program, "-A", "FORWARD", "-s", "10.3.0.0/16", "-p", "tcp", "-j", "ACCEPT")
    before = run(program, "-t", "nat", "-S"), run(program, "-S")
    kept.want(V4)
    await kept.once()
    assert (run(program, "-t", "nat", "-S"), run(program, "-S")) != before
    await kept.driver.remove_all()  # type: ignore[attr-defined]  # the drivers of rules have it
    assert (run(program, "-t", "nat", "-S"), run(program, "-S")) == before


@pytest.mark.root
async def test_a_family_that_is_not_wanted_any_more_goes(kept: Reconciled, program: str) -> None:
    kept.want(V4, V6)
    await kept.once()
    kept.want(V4)
    await kept.once()
    assert "FLANNEL" not in run(program.replace("iptables", "ip6tables"), "-t", "nat", "-S")
    assert run(program, "-t", "nat", "-S") == NAT


@pytest.mark.root
@pytest.mark.parametrize("commented", [True, False])
async def test_rules_of_older_flannels_go_when_a_host_is_switched_over(
    host: Hosts, program: str, commented: bool
) -> None:
    masq = ["-m", "comment", "--comment", "flanneld masq"] if commented else []
    forward = ["-m", "comment", "--comment", "flanneld forward"] if commented else []
    for network, subnet in (("10.3.0.0/16", "10.3.1.0/24"), ("10.8.0.0/16", "10.8.1.0/24")):
        for rule in (
            ["-s", network, "-d", network, *masq, "-j", "RETURN"],
            ["-s", network, "!", "-d", "224.0.0.0/4", *masq, "-j", "MASQUERADE", "--random-fully"],
            ["!", "-s", network, "-d", subnet, *masq, "-j", "RETURN"],
            ["!", "-s", network, "-d", network, *masq, "-j", "MASQUERADE", "--random-fully"],
        ):
            run(program, "-t", "nat", "-A", "POSTROUTING", *rule)
        for direction in ("-s", "-d"):
            run(program, "-A", "FORWARD", direction, network, *forward, "-j", "ACCEPT")
    async with reconciled(
        IptablesDriver(program, previous=[(Subnet.parse("10.8.0.0/16"), Subnet.parse("10.8.1.0/24"))])
    ) as kept:
        kept.want(V4)
        await kept.once()
        assert run(program, "-t", "nat", "-S") == NAT
        assert run(program, "-S") == FILTER


@pytest.mark.root
async def test_the_chain_of_the_oldest_flannel_goes(host: Hosts, program: str) -> None:
    run(program, "-t", "nat", "-N", "FLANNEL")
    run(program, "-t", "nat", "-A", "FLANNEL", "-d", "10.3.0.0/16", "-j", "ACCEPT")
    run(program, "-t", "nat", "-A", "FLANNEL", "!", "-d", "224.0.0.0/4", "-j", "MASQUERADE")
    run(program, "-t", "nat", "-A", "POSTROUTING", "-s", "10.3.0.0/16", "-j", "FLANNEL")
    async with reconciled(IptablesDriver(program)) as kept:
        kept.want(V4)
        await kept.once()
        assert run(program, "-t", "nat", "-S") == NAT


@pytest.mark.root
async def test_rules_of_the_nftables_flavour_and_of_the_other_iptables_go(host: Hosts, program: str) -> None:
    other = {"iptables-nft": "iptables-legacy", "iptables-legacy": "iptables-nft"}[program]
    for driver in (IptablesDriver(other), NftablesDriver()):
        async with reconciled(driver) as before, reconciled(IptablesDriver(program)) as kept:
            before.want(V4, V6)
            await before.once()
            kept.want(V4, V6)
            await kept.once()
            assert run(program, "-t", "nat", "-S") == NAT
            assert "FLANNEL" not in run(other, "-t", "nat", "-S") + run(other, "-S")
            assert "flannel-ipv" not in run("nft", "list", "tables")
            assert not await kept.difference()


@pytest.mark.root
async def test_a_held_lock_is_waited_for(host: Hosts) -> None:
    holder = subprocess.Popen(["flock", "/run/xtables.lock", "sleep", "1.5"])
    async with reconciled(IptablesDriver("iptables-legacy")) as kept:
        kept.want(V4)
        await kept.once()
        assert not kept.failures
        assert run("iptables-legacy", "-w", "5", "-t", "nat", "-S") == NAT
        assert holder.wait(timeout=20) == 0


async def test_a_missing_iptables_is_a_failure_that_says_so() -> None:
    async with reconciled(IptablesDriver("iptables-of-nobody")) as kept:
        kept.want(V4)
        await kept.once()
        assert [failure.reason for failure in kept.failures] == [
            "traffic rules of 10.3.0.0/16: iptables-of-nobody is not installed"
        ]


@pytest.mark.root
async def test_the_nft_flavour_makes_no_legacy_table(host: Hosts) -> None:
    async with reconciled(IptablesDriver("iptables-nft")) as kept:
        kept.want(V4, V6)
        await kept.once()
        await kept.difference()
        assert run("cat", "/proc/self/net/ip_tables_names") == ""
        assert run("cat", "/proc/self/net/ip6_tables_names") == ""
