"""Write man/flanneld.8 and man/wincey.1 from the flags of flanneld and the commands of wincey. A test says when it was forgotten.

In man(7)'s macros, as both groff and mandoc read them. The pages bear the version in place of a date, so that the same source
makes the same page.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from reference import blocks, commands, options, usage

from wincey import __version__
from wincey.cli.goflags import Flag
from wincey.cli.options import FLAGS, NOT_YET, WITHOUT_EFFECT

DIRECTORY = Path(__file__).parents[1] / "man"
_KINDS = {"s": "TEXT", "i": "NUMBER", "l": "TEXT", "b": ""}


def _roff(text: str) -> str:
    """Text that means nothing to roff: a hyphen that people may copy, a backslash, a dot at a line's beginning."""
    text = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga").replace("^", "\\(ha")
    )
    text = text.replace("~", "\\(ti")
    text = re.sub(r"[^\x00-\x7f]", lambda found: f"\\[u{ord(found[0]):04X}]", text)
    return re.sub(r"^\.", r"\\&.", text, flags=re.MULTILINE)


def _prose(text: str) -> str:
    """Words that Markdown quotes stand by themselves here."""
    return _roff(text.replace("`", ""))


def _head(title: str, section: int, what: str) -> list[str]:
    return [
        '.\\" Written by scripts/man.py.',
        f'.TH {title.upper()} {section} "" "Wincey {__version__}" "Container networks"',
        ".SH NAME",
        f"{title} \\- {_roff(what)}",
    ]


def _entry(term: str, text: str) -> list[str]:
    return [".TP", f"\\fB{_roff(term)}\\fR", _prose(text) or "\\&"]


def _kept(text: str) -> list[str]:
    return [".PP", ".nf", ".RS 4", *_roff(text).splitlines(), ".RE", ".fi"]


def _page(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


# --- flanneld(8) ------------------------------------------------------------------------------------------------------


def _flag(flag: Flag) -> list[str]:
    value = _KINDS[flag.kind]
    default = ",".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default or "")
    if flag.kind == "b":
        default = "true" if flag.default else ""
    help_ = WITHOUT_EFFECT.get(flag.name) or flag.help
    text = help_[0].upper() + help_[1:] + "."
    return _entry(
        f"--{flag.name}" + (f"={value}" if value else ""), text + (f" Default: {default}." if default else "")
    )


def flanneld() -> str:
    """The page of the daemon."""
    usable = [flag for flag in FLAGS if flag.name not in NOT_YET | WITHOUT_EFFECT]
    lines = [
        *_head("flanneld", 8, "joins this host's containers to the network of all hosts"),
        *(".SH SYNOPSIS", ".B flanneld", ".RI [ OPTION ]..."),
        ".SH DESCRIPTION",
        _prose(
            "flanneld takes a lease on a subnet for this host, reads the leases of the other hosts, and keeps devices, routes,"
            " neighbors and packet filter rules as they say. Containers of all hosts then reach each other. It forwards no packets"
            " itself: it may be stopped, upgraded or killed, and the store may be down, while packets go on."
        ),
        ".PP",
        _prose(
            "The network config and the leases are kept in etcd, or in an SQLite file with --store=sqlite:PATH. wincey config"
            " writes the config. What containers get is written to /run/flannel/subnet.env when they can be started."
        ),
        ".PP",
        _prose(
            "It is a drop-in for flannel's program of the same name: same flags, environment, store keys and packets."
        ),
        ".SH OPTIONS",
        _prose(
            "-x and --x are the same, and so are --x=v and --x v, except that a boolean takes its value only after the equals sign"
            " (--ip-masq=false). Of a repeated flag the last value counts, unless it says that it is repeatable."
        ),
        *(line for flag in usable for line in _flag(flag)),
        ".SS Accepted without effect",
        _roff(", ".join(f"--{flag.name}" for flag in FLAGS if flag.name in WITHOUT_EFFECT)) + ".",
        ".SS Not yet",
        "Any value but the default is refused:",
        _roff(", ".join(f"--{flag.name}" for flag in FLAGS if flag.name in NOT_YET)) + ".",
        ".SH ENVIRONMENT",
        _prose(
            "Each flag can be set as FLANNELD_ and its name in capitals with _ for -, as FLANNELD_ETCD_ENDPOINTS. The command line"
            " wins. An empty variable is no variable."
        ),
        ".SH FILES",
        *_entry("/run/flannel/subnet.env", "The subnet and the MTU of containers on this host; see --subnet-file."),
        *_entry("/run/flannel/wincey/subnet/api.sock", "The local API that wincey asks; see --api-socket."),
        *_entry("/run/flannel/wincey/subnet/state.json", "Which devices the daemon has made."),
        ".SH EXIT STATUS",
        *_entry("0", "After SIGTERM, SIGINT, --help and --version."),
        *_entry("1", "The daemon can't start; standard error says why."),
        *_entry("2", "The command line is wrong."),
        ".SH SIGNALS",
        *_entry("SIGTERM, SIGINT", "End. Devices, routes and rules stay, and packets go on; --cleanup removes them."),
        ".SH EXAMPLES",
        "Join the hosts that use this etcd, by the interface eth0:",
        *_kept("flanneld --etcd-endpoints=http://10.0.0.1:2379 --iface=eth0 --ip-masq"),
        ".SH SEE ALSO",
        ".BR wincey (1)",
    ]
    return _page(lines)


# --- wincey(1) --------------------------------------------------------------------------------------------------------


def wincey() -> str:
    """The page of the operator's command line."""
    lines = [*_head("wincey", 1, "looks at container networks, and looks after them")]
    for context in commands():
        if context.parent is None:
            lines += [
                ".SH SYNOPSIS",
                ".B wincey",
                ".RI [ OPTIONS ]",
                ".I COMMAND",
                ".RI [ ARGS ]...",
                ".SH DESCRIPTION",
            ]
        else:
            lines += [f".SS {_roff(context.command_path)}", f"\\fB{_roff(usage(context))}\\fR"]
        for number, (kept, text) in enumerate(blocks(context)):
            if kept:
                lines += _kept(text)
            else:
                lines += [*([".PP"] if number or context.parent else []), _prose(text)]
        for name, meaning in options(context):
            if "--help" not in name:
                lines += _entry(name, meaning)
        if context.parent is None:
            lines += [".SH COMMANDS", _prose("-h or --help after any of them prints its part of this page.")]
    lines += [
        ".SH ENVIRONMENT",
        *_entry("WINCEY_SOCKET", "The daemon's socket, where --socket does not say it."),
        ".SH EXIT STATUS",
        *_entry("0", "All is well."),
        *_entry("1", "Something is wrong with what was looked at, or the command failed; standard error says why."),
        *_entry("2", "The command line is wrong."),
        ".SH SEE ALSO",
        ".BR flanneld (8)",
    ]
    return _page(lines)


PAGES = {"flanneld.8": flanneld, "wincey.1": wincey}
"""Each page and what makes it."""

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DIRECTORY / name).write_text(make())
