"""The command-line syntax of Go's flag package, and flags from the environment (compatibility reference, 1.1 and 1.3).

`-x` and `--x` are the same; `-x=v` and `-x v` too, except that a boolean takes its value only after `=`; `--` ends the
flags. Pure: definitions, arguments and environment in, values and complaints out.

Two of flannel's ways are not followed, as they hide mistakes: a word that is no flag is an error (flannel ignores it
together with every flag after it), and so is an unknown flag with the exit code of an error (flannel exits with 0).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import msgspec

from wincey.model.errors import UsageError

_TRUE = frozenset({"1", "t", "T", "true", "TRUE", "True"})
_FALSE = frozenset({"0", "f", "F", "false", "FALSE", "False"})
_INTEGER = re.compile(r"[+-]?[0-9][0-9a-zA-Z_]*\Z", re.ASCII)
_LEADING_ZERO = re.compile(r"\A([+-]?)0(?=[0-9_])")
_TYPE_NAMES = {"s": "string", "b": "", "i": "int", "l": "value"}


class Flag(msgspec.Struct, frozen=True):
    """One flag. kind: string, boolean, integer or repeatable list.

    since, last: the flannel versions that have it ("" for one of ours, or still there). read: turns the text (for a list:
    of each element) into the value, or raises ValueError that says what is expected. secret: never shown.
    """

    name: str
    kind: Literal["s", "b", "i", "l"]
    default: Any
    help: str
    since: str = ""
    last: str = ""
    read: Callable[[str], Any] | None = None
    secret: bool = False

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "FLANNELD_" + self.name.upper().replace("-", "_")

    def value(self, text: str) -> Any:
        """Read a value; raises ValueError that says what is expected."""
        if self.kind == "b":
            return _boolean(text)
        if self.kind == "i":
            return _integer(text)
        return self.read(text) if self.read else text


class Parsed(msgspec.Struct):
    """What was given: `values` by flag name, defaults included, and `given`: where each came from, and its text.

    wants_help: -h or --help was met. complaints: what is wrong in the environment, to be logged as errors.
    """

    values: dict[str, Any]
    given: dict[str, tuple[str, str]] = msgspec.field(default_factory=dict)
    wants_help: bool = False
    complaints: list[str] = msgspec.field(default_factory=list)


def parse_arguments(flags: Sequence[Flag], arguments: Sequence[str]) -> Parsed:
    """Read a command line (without the program's name). Raises UsageError. Stops at -h or --help, as Go does."""
    known = {flag.name: flag for flag in flags}
    parsed = Parsed({flag.name: flag.default for flag in flags})
    rest = list(reversed(arguments))
    before: Flag | None = None  # the boolean just read, which an unexpected word may have been meant for
    while rest:
        argument = rest.pop()
        if argument == "--" and not rest:
            break
        if argument == "--":
            _stray(rest.pop(), None)
        if len(argument) < 2 or argument[0] != "-":
            _stray(argument, before)
        name, equals, text = argument[2 if argument[1] == "-" else 1 :].partition("=")
        if not name or name[0] in "-=":
            raise UsageError(f"bad flag syntax: {argument!r}; write a flag like --iface=eth0")
        flag = known.get(name)
        if flag is None:
            if name in {"h", "help"}:
                parsed.wants_help = True
                return parsed
            raise UsageError(f"flag provided but not defined: --{name}{_meant(name, known, '; did you mean --{}?')}")
        before = flag if flag.kind == "b" and not equals else None
        if not equals:
            if flag.kind == "b":
                text = "true"
            elif rest:
                text = rest.pop()
            else:
                raise UsageError(f"flag needs an argument: --{name}; write it like --{name}=VALUE")
        try:
            _store(parsed, flag, text, f"--{name}")
        except ValueError as error:
            raise UsageError(f"invalid value {_show(flag, text)} for flag --{name}: {error}") from None
    return parsed


def apply_environment(flags: Sequence[Flag], parsed: Parsed, environ: Mapping[str, str]) -> None:
    """Set flags that the command line did not give from FLANNELD_*. An empty variable counts as unset.

    A bad value is a complaint, and its flag keeps its default; so is a variable that looks like a misspelt flag.
    """
    variables = {flag.variable: flag for flag in flags}
    for variable, flag in variables.items():
        text = environ.get(variable)
        if not text or flag.name in parsed.given:
            continue
        try:
            _store(parsed, flag, text, variable)
        except ValueError as error:
            parsed.complaints.append(
                f"{variable}={_show(flag, text)} is ignored: {error}; --{flag.name} keeps its default"
            )
    for variable in sorted(environ):
        if variable.startswith("FLANNELD_") and variable not in variables:
            hint = _meant(variable, variables, "{}", cutoff=0.85)
            if hint:
                parsed.complaints.append(f"{variable} is ignored: no flag has this name; did you mean {hint}?")


def describe(flags: Iterable[Flag], parsed: Parsed) -> str:
    """The flags that were given and where, for a line in the log. Secrets, also those inside URLs, are masked."""
    parts = []
    for flag in flags:
        if flag.name in parsed.given:
            origin, text = parsed.given[flag.name]
            shown = "***" if flag.secret else _without_users(text)
            parts.append(f"--{flag.name}={shown}" + ("" if origin.startswith("--") else f" (from {origin})"))
    return " ".join(parts) or "all defaults"


def usage(program: str, flags: Iterable[Flag]) -> str:
    """The help text in the form that Go prints: sorted, with types and defaults."""
    lines = [f"Usage: {program} [OPTION]..."]
    for flag in sorted(flags, key=lambda flag: flag.name):
        default = _text(flag.default)
        if flag.default in ("", (), 0, None, False):
            default = ""
        elif flag.kind == "s":
            default = f'"{default}"'
        era = f" [flannel {flag.since} to {flag.last}]" if flag.last else ""
        lines.append(f"  --{flag.name} {_TYPE_NAMES[flag.kind]}".rstrip())
        lines.append(f"    \t{flag.help}{f' (default {default})' if default else ''}{era}")
    return "\n".join(lines) + "\n"


def _store(parsed: Parsed, flag: Flag, text: str, origin: str) -> None:
    value = flag.value(text)
    if flag.kind == "l" and flag.name in parsed.given:
        value, text = (*parsed.values[flag.name], value), f"{parsed.given[flag.name][1]},{text}"
    elif flag.kind == "l":
        value = (value,)
    parsed.values[flag.name] = value
    parsed.given[flag.name] = (origin, text)


def _stray(word: str, before: Flag | None) -> NoReturn:
    if before and word in _TRUE | _FALSE:
        raise UsageError(f"{word!r} after --{before.name} is not a flag: write --{before.name}={word}")
    raise UsageError(f"{word!r} is not a flag; every argument is a flag, written like --iface=eth0 or --ip-masq")


def _meant(name: str, known: Iterable[str], form: str, cutoff: float = 0.6) -> str:
    import difflib  # noqa: PLC0415  # needed for mistakes only, and it costs 3 ms

    by_lower = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return form.format(by_lower[close[0]]) if close else ""


def _boolean(text: str) -> bool:
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise ValueError("must be true or false")


def _integer(text: str) -> int:
    """An integer as Go's strconv reads it: decimal, 0x, 0o or 0, 0b, within 64 bits."""
    try:
        if _INTEGER.match(text):
            number = int(_LEADING_ZERO.sub(r"\g<1>0o", text), 0)
            if -(1 << 63) <= number < 1 << 63:
                return number
    except ValueError:
        pass
    raise ValueError("must be a whole number, like 60")


def _show(flag: Flag, text: str) -> str:
    return "***" if flag.secret else repr(_without_users(text))


def _without_users(text: str) -> str:
    """A text without what stands before the @ of a URL, which may be a password."""
    return re.sub(r"//[^/\s]*@", "//***@", text)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(_text, value))
    return str(value)
