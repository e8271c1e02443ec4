"""Write docs/flags.md from the flag table of flanneld. Run it when a flag changes; a test says when it was forgotten."""

from __future__ import annotations

from pathlib import Path

from wincey.cli.goflags import Flag
from wincey.cli.options import FLAGS, NOT_YET, WITHOUT_EFFECT

PAGE = Path(__file__).parents[1] / "docs" / "flags.md"

INTRODUCTION = """\
# flanneld's flags

<!-- Written by scripts/flags_doc.py from src/wincey/cli/options.py. -->

Flags are written as Go programs have them: `-x` and `--x` are the same, and so are `--x=v` and `--x v`, except that a
boolean takes its value only after `=` (`--ip-masq=false`). A repeated flag's last value counts; a repeatable one collects
them.

Each flag can also be set in the environment, as `FLANNELD_` and its name in capitals with `_` for `-`
(`FLANNELD_ETCD_ENDPOINTS`). The command line wins over the environment, and an empty variable is no variable. A bad value
in the environment is logged, and the flag keeps its default.

Exit codes: 0 after SIGTERM, SIGINT, `--help` and `--version`; 1 when the daemon can't start; 2 when the command line is
wrong. (Flannel exits with 0 after an unknown flag, so that supervisors take it for a success.)
"""


def _default(flag: Flag) -> str:
    match flag.default:
        case None | "" | ():
            return ""
        case bool():
            return f"`{str(flag.default).lower()}`"
        case tuple():
            return f"`{','.join(map(str, flag.default))}`"
        case _:
            return f"`{flag.default}`"


def _origin(flag: Flag) -> str:
    if not flag.since:
        return "Wincey"
    if flag.last == flag.since:
        return f"flannel {flag.since} only"
    return f"flannel {flag.since} to {flag.last}" if flag.last else f"flannel {flag.since}"


def _row(flag: Flag, meaning: str) -> str:
    return f"| `--{flag.name}` | {_default(flag)} | {meaning} | {_origin(flag)} |"


def _table(rows: list[str]) -> str:
    return "\n".join(["| Flag | Default | Meaning | Since |", "|---|---|---|---|", *rows])


def render() -> str:
    """The page."""
    usable = [_row(flag, flag.help) for flag in FLAGS if flag.name not in NOT_YET | WITHOUT_EFFECT]
    idle = [_row(flag, WITHOUT_EFFECT[flag.name]) for flag in FLAGS if flag.name in WITHOUT_EFFECT]
    later = [_row(flag, f"{flag.help} ({NOT_YET[flag.name]})") for flag in FLAGS if flag.name in NOT_YET]
    parts = [
        INTRODUCTION,
        "## Flags\n\n" + _table(usable) + "\n",
        "## Accepted without effect\n\nExisting command lines go on working; a warning says what is ignored.\n\n"
        + _table(idle)
        + "\n",
        "## Not yet\n\nAny value but the default is refused with an error, never ignored.\n\n" + _table(later) + "\n",
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
