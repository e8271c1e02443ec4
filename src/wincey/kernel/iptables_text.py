"""What iptables reads and prints, without running it: our chains, their jumps, and what older flannels left behind.

The texts are those that `iptables -S` prints (compatibility reference, section 7.1), so a rule read can be deleted by
the same text. A chain of ours is replaced whole, and its jump deleted and made again, by one restore: the kernel takes
over a table in one step, so no packet meets a half-made one, and rules of an old subnet can't survive.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import msgspec

from wincey.kernel.rules import (
    MARK,
    MULTICAST,
    Match,
    Rule,
    forward_rules,
    ingress_rules,
    masquerade_rules,
    separation_rules,
)
from wincey.model.address import Subnet
from wincey.model.state import RuleSet


class Place(NamedTuple):
    """A chain of ours: its table, the kernel's chain that jumps to it, its name and the comment on its rules."""

    table: str
    hook: str
    chain: str
    comment: str


class Seen(NamedTuple):
    """A place as it was found: the rules of its hook with the policy first, those of our chain (None: no chain)."""

    hook: tuple[str, ...]
    own: tuple[str, ...] | None


class Version(msgspec.Struct, frozen=True):
    """What `iptables --version` says: below it is nf_tables, or the legacy tables; and what it can do."""

    legacy: bool
    number: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read `iptables v1.8.9 (nf_tables)`; versions before 1.8 are legacy and don't say so."""
        match = re.search(r"v(\d+(?:\.\d+)*)", text)
        return cls("nf_tables" not in text, tuple(int(part) for part in match[1].split(".")) if match else ())

    @property
    def modern(self) -> bool:
        """MASQUERADE has --random-fully and iptables-restore has --wait: both came with 1.6.2."""
        return self.number >= (1, 6, 2)


ANCIENT = Place("nat", "POSTROUTING", "FLANNEL", "")
"""The chain of flannel up to 0.5.5."""


def places(suffix: str = "") -> tuple[Place, Place]:
    """Where our rules are: masquerading, forwarding. A suffix keeps the daemons of one host apart."""
    end = f"-{suffix}" if suffix else ""
    return (
        Place("nat", "POSTROUTING", f"FLANNEL-POSTRTG{end}", "flanneld masq"),
        Place("filter", "FORWARD", f"FLANNEL-FWD{end}", "flanneld forward"),
    )


def isolation_places(suffix: str) -> tuple[Place, Place]:
    """Where the rules are that keep a host's networks apart: what comes in, what is forwarded.

    The mangle table comes before the filter table, where a rule of Docker's accepts what leaves its bridges.
    """
    comment = "flanneld isolation"
    return (
        Place("mangle", "PREROUTING", f"FLANNEL-IN-{suffix}", comment),
        Place("mangle", "FORWARD", f"FLANNEL-SEP-{suffix}", comment),
    )


def rendered_isolation(rules: RuleSet) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rules of `isolation_places` as `rendered` has those of `places`."""
    ingress, separation = ingress_rules(rules), separation_rules(rules)
    return (
        tuple(text for rule in ingress for text in _rule(rule, "flanneld isolation", False)),
        tuple(text for rule in separation for text in _rule(rule, "flanneld isolation", False)),
    )


def rendered(rules: RuleSet, *, random_fully: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The rules of the two places without their `-A CHAIN`, in order."""
    masquerade, forward = places()
    return (
        tuple(text for rule in masquerade_rules(rules) for text in _rule(rule, masquerade.comment, random_fully)),
        tuple(text for rule in forward_rules(rules) for text in _rule(rule, forward.comment, False)),
    )


def _rule(rule: Rule, comment: str, random_fully: bool) -> Iterator[str]:
    """One rule, or several: a match takes one subnet."""
    for source, destination in product(_match("-s", rule.source), _match("-d", rule.destination)):
        words = [
            source,
            destination,
            f"-i {rule.device}" if rule.device else "",
            f"-p udp -m udp --dport {rule.udp_port}" if rule.udp_port else "",
            "-m addrtype --dst-type LOCAL" if rule.local else "",
            "-m rpfilter --invert" if rule.strayed else "",
            f"-m mark --mark {MARK:#x}/{MARK:#x}" if rule.marked else "",
            f'-m comment --comment "{comment}"' if comment else "",
            f"-j {rule.verdict.upper()}",
            "--random-fully" if random_fully and rule.verdict == "masquerade" else "",
        ]
        yield " ".join(word for word in words if word)


def _match(option: str, match: Match | None) -> list[str]:
    if match is None:
        return [""]
    return [f"{'' if match.inside else '! '}{option} {subnet.masked()}" for subnet in match.subnets]


def jump(place: Place) -> str:
    """The rule in the hook that leads to our chain, without its `-A CHAIN`."""
    return f'-m comment --comment "{place.comment}" -j {place.chain}'


def is_jump(place: Place, line: str) -> bool:
    """Whether a rule of the hook leads to our chain, however it is written."""
    return re.search(rf"-[jg] {re.escape(place.chain)}$", line) is not None


def blocks(hook: Sequence[str]) -> bool:
    """Whether a hook lets through only what a rule accepts: by its policy, or by a rule that stops all the rest."""
    return f"-P {_hook_name(hook)} DROP" in hook or _barrier(hook) is not None


def placed(place: Place, seen: Seen) -> bool:
    """Whether our chain exists and is jumped to once, from where packets still arrive."""
    jumps = [index for index, line in enumerate(seen.hook) if is_jump(place, line)]
    barrier = _barrier(seen.hook)
    return seen.own is not None and len(jumps) == 1 and (barrier is None or jumps[0] < barrier)


def absent(place: Place, seen: Seen) -> bool:
    """Whether nothing of ours is there."""
    return seen.own is None and not any(is_jump(place, line) for line in seen.hook)


def restore_text(place: Place, seen: Seen, rules: Sequence[str], stale: frozenset[str] = frozenset()) -> str:
    """Input for `iptables-restore --noflush` that makes a place hold these rules, or with none, be gone.

    Stale are rules (without `-A CHAIN`) that go from the hook too. "" when there is nothing to do.
    """
    prefix = f"-A {place.hook} "
    going = [
        line for line in seen.hook if is_jump(place, line) or (line.startswith(prefix) and line[len(prefix) :] in stale)
    ]
    lines = [f"*{place.table}"]
    if rules or seen.own is not None:
        lines.append(f":{place.chain} - [0:0]")  # makes the chain, or empties it
    lines += [f"-D {line[3:]}" for line in going]
    if rules:
        lines += [f"-A {place.chain} {rule}" for rule in rules]
        barrier = _barrier([line for line in seen.hook if line not in going])
        # Appended, as flannel does and as kube-proxy and Docker expect; unless nothing would reach it there.
        lines.append(f"{f'-A {place.hook}' if barrier is None else f'-I {place.hook} {barrier}'} {jump(place)}")
    elif seen.own is not None:
        lines.append(f"-X {place.chain}")
    return "\n".join([*lines, "COMMIT", ""]) if len(lines) > 1 else ""


def historical(network: Subnet, subnet: Subnet) -> frozenset[str]:
    """The rules that flannel before 0.20 wrote into POSTROUTING and FORWARD themselves (reference, section 7.2)."""
    inside, here = Match((network.masked(),)), Match((subnet.masked(),))
    outside = Match((network.masked(),), inside=False)
    unicast = Match((MULTICAST[network.family],), inside=False)
    masquerade = (
        Rule("return", inside, inside),
        Rule("masquerade", inside, unicast),
        Rule("return", outside, here),
        Rule("masquerade", outside, inside),
    )
    forward = (Rule("accept", source=inside), Rule("accept", destination=inside))
    masq, fwd = (place.comment for place in places())
    return frozenset(
        text
        for group, comments in ((masquerade, ("", masq)), (forward, ("", fwd)))
        for rule, comment, random_fully in product(group, comments, (False, True))
        for text in _rule(rule, comment, random_fully)
    ) | {f"-s {network.masked()} -j {ANCIENT.chain}"}


def is_ancient(network: Subnet, own: Sequence[str]) -> bool:
    """Whether a chain named FLANNEL holds what flannel up to 0.5.5 put there, and nothing else."""
    known = [f"-d {network.masked()} -j ACCEPT", f"! -d {MULTICAST[network.family]} -j MASQUERADE"]
    return list(own) == [f"-A {ANCIENT.chain} {rule}" for rule in known]


def _hook_name(hook: Sequence[str]) -> str:
    return hook[0].split()[1] if hook else ""


def _barrier(hook: Sequence[str]) -> int | None:
    """The place (1 is the first rule, as iptables counts) of the first rule that stops every packet."""
    rules = [line for line in hook if line.startswith("-A ")]
    for number, line in enumerate(rules, 1):
        if re.fullmatch(r'-A \S+(?: -m comment --comment (?:"(?:[^"\\]|\\.)*"|\S+))? -j (?:DROP|REJECT)(?: .*)?', line):
            return number
    return None
