"""Commands of the user's own, and what the extension backend wants of them (compatibility reference, section 6.11).

A command is an argument vector, or a text for a shell where the config asks for one. Which of the two a text is, is decided
so that nothing changes its meaning: flannel up to 0.28.1 gave each text to `sh -c`, and a text runs without a shell here only
if a shell would make the same words of it. Values reach a command through its environment and its standard input, never by
being pasted into a shell's text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar, TypeAlias

import msgspec

from wincey.model.config import BackendOptions
from wincey.model.errors import WinceyError
from wincey.model.state import Key, Object

VARIABLES = ("NETWORK", "SUBNET", "PUBLIC_IP", "IPV6NETWORK", "IPV6SUBNET", "PUBLIC_IPV6", "IFACE", "MTU")
"""What a command may find in its environment."""

Environment: TypeAlias = tuple[tuple[str, str], ...]
"""Names and values, each a string, in the order of VARIABLES."""

_NAME = re.compile(r"\$(?:\{([A-Za-z_]\w*)\}|([A-Za-z_]\w*))", re.ASCII)
_OURS = "|".join(VARIABLES)
# Characters that mean themselves to a shell, and our variables, whose values have nothing that a shell would split.
_PLAIN = re.compile(rf"(?:[A-Za-z0-9_@%+=:,./-]|\$(?:{_OURS})(?![A-Za-z0-9_])|\$\{{(?:{_OURS})\}})+\Z", re.ASCII)
_PROGRAM = re.compile(r"[A-Za-z0-9_@%+:,./-]+\Z", re.ASCII)
# What is no program but a shell's own word. `echo`, `test` and their like are both, and do the same.
_SHELL_WORD = re.compile(
    r"(?:[.:]|alias|bg|break|case|cd|command|continue|do|done|elif|else|esac|eval|exec|exit|export|fc|fg|fi|for|getopts|hash"
    r"|if|jobs|local|read|readonly|return|set|shift|source|then|times|trap|type|ulimit|umask|unalias|unset|until|wait|while)\Z"
)


class CommandFailed(WinceyError):
    """A command could not be run, took too long or ended with an error; says which, how, and what it said."""


class Command(msgspec.Struct, frozen=True, gc=False):
    """words: a program and its arguments, with `$NAME` or `${NAME}` for values; or, with `sh`, one text for a shell."""

    words: tuple[str, ...]
    sh: bool = False

    @classmethod
    def read(cls, options: BackendOptions, key: str) -> Command | None:
        """The command under a key of the config's Backend: a text or a list of words. None without one.

        The key `Shell` decides for all texts: true gives them to a shell, false forbids one. Raises BadConfig.
        """
        value = options.raw(key)
        example = ["/usr/local/bin/connect", "$SUBNET"]
        if isinstance(value, list):
            if not value or not all(isinstance(word, str) and "\0" not in word for word in value) or not value[0]:
                options.wrong(key, "must be a program and its arguments, each a text in quotes", example)
            return cls(tuple(value))
        text = options.text(key, "").strip()
        if "\0" in text:
            options.wrong(key, "must be without NUL characters", " ".join(example))
        if not text:
            return None
        asked = None if options.raw("Shell") is None else options.boolean("Shell", default=False)
        words = text.split()
        if asked or not _is_plain(text, words):
            if asked is False:
                options.wrong(key, "needs a shell, which Backend.Shell is false for: write a list of words", example)
            return cls((text,), sh=True)
        return cls(tuple(words))

    def argv(self, environment: Mapping[str, str]) -> list[str]:
        """What to run, with the values filled in; raises CommandFailed for a value that there is none of.

        A shell finds its values itself.
        """
        if self.sh:
            return ["sh", "-c", self.words[0]]

        def value(match: re.Match[str]) -> str:
            name = match[1] or match[2]
            if name not in environment:
                raise CommandFailed(f"names ${name}, which is not set here")
            return environment[name]

        return [_NAME.sub(value, word) for word in self.words]


class CommandNetwork(Object, frozen=True, gc=False):
    """The host's own part: what ran before its lease (`before`) and said `data`, and what runs once it has one (`after`).

    shutdown: what takes it all back. timeout: seconds for each command.
    """

    tag: ClassVar[str] = "command-network"
    essential: ClassVar[bool] = True
    environment: Environment
    before: Command | None = None
    data: str = ""
    after: Command | None = None
    shutdown: Command | None = None
    timeout: float = 30.0

    @property
    def key(self) -> Key:
        return (self.tag,)

    @property
    def starts(self) -> bool:
        """Whether a start runs anything at all."""
        return bool(self.before or self.after)

    def starts_like(self, other: CommandNetwork | None) -> bool:
        """Whether a start with the other has done all that one with this would do."""
        return other is not None and (self.environment, self.before, self.data, self.after) == (
            (other.environment, other.before, other.data, other.after)
        )

    def __str__(self) -> str:
        return "extension backend"


class CommandPeer(Object, frozen=True, gc=False):
    """One peer: what connects it and what takes that back. data: what its own `before` said, given on standard input."""

    tag: ClassVar[str] = "command-peer"
    subnet: str
    environment: Environment
    data: str = ""
    add: Command | None = None
    remove: Command | None = None
    timeout: float = 30.0

    @property
    def key(self) -> Key:
        return (self.tag, self.subnet)

    def adds_like(self, other: CommandPeer) -> bool:
        """Whether adding the other has done all that adding this one would do."""
        return (self.environment, self.data, self.add) == (other.environment, other.data, other.add)

    def __str__(self) -> str:
        return f"extension peer {self.subnet}"


def _is_plain(text: str, words: list[str]) -> bool:
    """Whether a shell would make just these words of a text, and run the first one as a program."""
    return (
        "\n" not in text
        and _PROGRAM.match(words[0]) is not None
        and not _SHELL_WORD.match(words[0])
        and all(_PLAIN.match(word) for word in words)
    )
