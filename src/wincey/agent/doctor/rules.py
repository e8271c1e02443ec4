"""Packet filters' rules as values, and what they do to a packet. Pure: reads what `nft -j` and `iptables -S` print.

Only what is certain counts: a rule with a condition that isn't known here (a limit, a mark, a set of another kind) is taken as
one that does not match, so that no rule is accused which lets a packet pass.
"""

from __future__ import annotations

import fnmatch
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from wincey.model.address import Address, Subnet, parse_address
from wincey.model.errors import BadAddress


class Packet(msgspec.Struct, frozen=True):
    """A packet on its way through one hook: the first of its connection."""

    source: Address
    destination: Address
    incoming: str = ""
    outgoing: str = ""
    protocol: str = "icmp"
    port: int = 0


class Match(msgspec.Struct, frozen=True):
    """One condition. field: as in _FIELDS. values: any of them will do; text, as the programs write them."""

    field: str
    values: tuple[str, ...]
    negated: bool = False


class Rule(msgspec.Struct, frozen=True):
    """verdict: accept, drop, jump, goto, return, or "" for none. known: whether all of its conditions are."""

    text: str
    verdict: str
    target: str = ""
    matches: tuple[Match, ...] = ()
    known: bool = True


class Chain(msgspec.Struct, frozen=True):
    """A chain on a hook, with the chains that it may jump to. where: the program, table and chain, for people."""

    where: str
    family: int
    hook: str
    priority: int
    policy: str
    rules: tuple[Rule, ...]
    others: Mapping[str, tuple[Rule, ...]] = {}


def dropped(chains: Iterable[Chain], hook: str, packet: Packet) -> str:
    """The rule or policy that drops a packet, in words, "" if none does."""
    family = 4 if len(packet.source) == 4 else 6
    for chain in sorted(chains, key=lambda each: each.priority):
        if chain.hook != hook or chain.family not in {0, family}:
            continue
        verdict, text = _walk(chain, chain.rules, packet, 0)
        if verdict == "drop":
            return f"{chain.where}: {text}"
        if not verdict and chain.policy == "drop":
            return f"{chain.where}: its policy is to drop, and no rule in it accepts"
    return ""


def _walk(chain: Chain, rules: Sequence[Rule], packet: Packet, depth: int) -> tuple[str, str]:
    for rule in rules:
        if not rule.known or not all(_holds(match, packet) for match in rule.matches):
            continue
        if rule.verdict in {"accept", "drop"}:
            return rule.verdict, rule.text
        if rule.verdict == "return":
            return "", ""
        if rule.verdict in {"jump", "goto"} and depth < 16:
            found = _walk(chain, chain.others.get(rule.target, ()), packet, depth + 1)
            if found[0] or rule.verdict == "goto":
                return found
    return "", ""


def _holds(match: Match, packet: Packet) -> bool:
    return any(_one(match.field, value, packet) for value in match.values) != match.negated


def _one(field: str, value: str, packet: Packet) -> bool:
    match field:
        case "source" | "destination":
            return _inside(value, packet.source if field == "source" else packet.destination)
        case "incoming" | "outgoing":
            name = packet.incoming if field == "incoming" else packet.outgoing
            return bool(name) and fnmatch.fnmatchcase(name, value)
        case "protocol":
            return value in {packet.protocol, "all"} or (value == "ipv6-icmp" and packet.protocol == "icmp")
        case "port":
            low, _, high = value.partition("-")
            return packet.protocol in {"udp", "tcp"} and int(low) <= packet.port <= int(high or low)
        case _:  # state
            return value.lower() == "new"


def _inside(value: str, address: Address) -> bool:
    try:
        if "-" in value:
            low, _, high = value.partition("-")
            return parse_address(low) <= address <= parse_address(high)
        subnet = Subnet.parse(value if "/" in value else f"{value}/{len(address) * 8}").masked()
    except BadAddress:
        return False
    return subnet.bits == len(address) * 8 and subnet.contains(address)


_IPTABLES = {
    "-s": "source",
    "-d": "destination",
    "-i": "incoming",
    "-o": "outgoing",
    "-p": "protocol",
    "--dport": "port",
    "--dports": "port",
    "--ctstate": "state",
    "--state": "state",
}
_WITHOUT_MEANING = {"-m", "--comment", "-c", "--reject-with", "--to-destination", "--to-source"}
_HOOKS = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}
_PRIORITIES = {"raw": -300, "mangle": -150, "filter": 0}


def read_iptables(program: str, table: str, text: str) -> list[Chain]:
    """What `iptables -t TABLE -S` prints."""
    chains: dict[str, list[Rule]] = {}
    policies: dict[str, str] = {}
    for line in text.splitlines():
        words = shlex.split(line)
        match words:
            case ["-P", name, policy]:
                policies[name] = policy.lower()
                chains.setdefault(name, [])
            case ["-N", name]:
                chains.setdefault(name, [])
            case ["-A", name, *rest]:
                chains.setdefault(name, []).append(_iptables_rule(line, rest))
    others = {name: tuple(rules) for name, rules in chains.items()}
    return [
        Chain(
            where=f"{program}, table {table}, chain {name}",
            family=6 if "6" in program else 4,
            hook=_HOOKS[name],
            priority=_PRIORITIES[table],
            policy=policy,
            rules=others[name],
            others=others,
        )
        for name, policy in policies.items()
        if name in _HOOKS
    ]


def _iptables_rule(line: str, words: list[str]) -> Rule:
    matches, known, verdict, target, negated = [], True, "", "", False
    at = 0
    while at < len(words):
        word, value = words[at], words[at + 1] if at + 1 < len(words) else ""
        at += 2
        if word == "!":
            negated, at = True, at - 1
            continue
        if word in {"-j", "-g"}:
            target = value
            verdict = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return"}.get(value, "jump")
            if word == "-g":
                verdict = "goto"
        elif field := _IPTABLES.get(word):
            values = value.split(",")
            if field == "port":
                values = [each.replace(":", "-") for each in values]
            if field in {"incoming", "outgoing"}:
                values = [each.replace("+", "*") for each in values]
            matches.append(Match(field, tuple(values), negated))
        elif word not in _WITHOUT_MEANING:
            known = False
        negated = False
    return Rule(line, verdict, target, tuple(matches), known)


_NFT_FIELDS = {
    ("ip", "saddr"): "source",
    ("ip", "daddr"): "destination",
    ("ip6", "saddr"): "source",
    ("ip6", "daddr"): "destination",
    ("ip", "protocol"): "protocol",
    ("udp", "dport"): "port",
    ("tcp", "dport"): "port",
    ("th", "dport"): "port",
    "iifname": "incoming",
    "oifname": "outgoing",
    "iif": "incoming",
    "oif": "outgoing",
    "l4proto": "protocol",
}
_NFT_FAMILIES = {"ip": 4, "ip6": 6, "inet": 0}


def read_nft(document: Mapping[str, Any], text: str = "") -> list[Chain]:
    """What `nft -j list ruleset` prints, decoded; text: what `nft -a list ruleset` does, for showing rules."""
    words = _texts(text)
    bases: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    rules: dict[tuple[str, str], dict[str, list[Rule]]] = {}
    for entry in document.get("nftables", []):
        if chain := entry.get("chain"):
            rules.setdefault((chain["family"], chain["table"]), {}).setdefault(chain["name"], [])
            if "hook" in chain and chain.get("type") == "filter":
                bases[chain["family"], chain["table"], chain["name"]] = chain
        elif rule := entry.get("rule"):
            place = (rule["family"], rule["table"])
            shown = words.get((*place, rule["handle"]), "a rule of it")
            rules.setdefault(place, {}).setdefault(rule["chain"], []).append(_nft_rule(rule.get("expr", []), shown))
    found = []
    for (family, table, name), chain in bases.items():
        if family in _NFT_FAMILIES:
            others = {each: tuple(held) for each, held in rules[family, table].items()}
            found.append(
                Chain(
                    where=f"nft, table {family} {table}, chain {name}",
                    family=_NFT_FAMILIES[family],
                    hook=chain["hook"],
                    priority=int(chain.get("prio", 0)),
                    policy=chain.get("policy", "accept"),
                    rules=others[name],
                    others=others,
                )
            )
    return found


def _texts(text: str) -> dict[tuple[str, str, int], str]:
    """Rules as nft prints them, by family, table and handle."""
    found: dict[tuple[str, str, int], str] = {}
    place = ("", "")
    for line in text.splitlines():
        if table := re.match(r"table (\S+) (\S+) \{", line):
            place = (table[1], table[2])
        elif rule := re.match(r"\s+(.*\S) # handle (\d+)$", line):
            found[*place, int(rule[2])] = rule[1]
    return found


def _nft_rule(expressions: Sequence[Any], text: str) -> Rule:
    matches, known, verdict, target = [], True, "", ""
    for expression in expressions:
        if not isinstance(expression, dict):
            continue
        ((kind, body),) = expression.items()
        if kind == "match":
            found = list(_nft_match(body))
            matches += found
            known = known and bool(found)
        elif kind in {"accept", "drop", "reject", "return"}:
            verdict = "drop" if kind == "reject" else kind
        elif kind in {"jump", "goto"}:
            verdict, target = kind, body["target"]
        elif kind not in {"counter", "comment", "log"}:
            known = False
    return Rule(text, verdict, target, tuple(matches), known)


def _nft_match(body: Mapping[str, Any]) -> Iterator[Match]:
    """Nothing for what is not known."""
    left, right, operator = body["left"], body["right"], body.get("op", "==")
    if operator not in {"==", "!=", "in"}:
        return
    negated = operator == "!="
    if "payload" in left and "protocol" in left["payload"]:
        place = (left["payload"]["protocol"], left["payload"]["field"])
        if place[0] in {"udp", "tcp"}:
            yield Match("protocol", (place[0],))
        field = _NFT_FIELDS.get(place)
    elif "meta" in left:
        field = _NFT_FIELDS.get(left["meta"]["key"])
    else:
        field = "state" if left.get("ct", {}).get("key") == "state" else None
    values = tuple(_values(right))
    if field and values:
        yield Match(field, values, negated)


def _values(right: Any) -> Iterator[str]:
    if isinstance(right, list):
        for each in right:
            yield from _values(each)
    elif isinstance(right, dict):
        if "set" in right:
            yield from _values(right["set"])
        elif "prefix" in right:
            yield f"{right['prefix']['addr']}/{right['prefix']['len']}"
        elif "range" in right:
            yield f"{right['range'][0]}-{right['range'][1]}"
    elif not str(right).startswith("@"):
        yield str(right)
