"""What happened in a run, told as lines and as a sequence diagram.

A run that nobody watches keeps none of it; as a seed tells all that will happen, a run worth telling is simply run again.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

import msgspec

from simulator.etcd import Version
from simulator.loop import OWNER, VirtualLoop

STORE = "etcd"


class Moment(msgspec.Struct, frozen=True):
    """At a second of virtual time `source` did something, to `target` if given. source "": the world."""

    at: float
    source: str
    target: str
    text: str

    def __str__(self) -> str:
        who = f"{self.source or '*'}{' -> ' + self.target if self.target else ''}"
        return f"{self.at:12.4f}  {who:<14} {self.text}"


class Recorder(logging.Handler):
    """Keeps the history of one run, the agents' logs among it while it is entered."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self.directory = ""
        """Of the run's files, which is another one each time."""
        self._loop = loop

    def __enter__(self) -> Recorder:
        logger = logging.getLogger("wincey")
        self._before = logger.level, logger.propagate
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *details: object) -> None:
        logger = logging.getLogger("wincey")
        logger.removeHandler(self)
        logger.setLevel(self._before[0])
        logger.propagate = self._before[1]

    def add(self, source: str, target: str, text: str) -> None:
        """Something happened now."""
        self.moments.append(Moment(self._loop.now, source, target, text))

    def emit(self, record: logging.LogRecord) -> None:
        """An agent logs."""
        owner, text = OWNER.get(), record.getMessage().replace(self.directory, "")
        self.add(owner.name.partition(".")[0] if owner else "", "", f"{record.levelname.lower()}: {text}")

    def wire(self, name: str) -> Callable[[str, str, bytes], None]:
        """Told of a host's requests."""

        def told(fate: str, what: str, body: bytes) -> None:
            self.add(name, STORE, f"{what}{'' if fate == 'asked' else f' ({fate})'}")

        return told

    def changed(self, actor: str, version: Version) -> None:
        """A key was put or deleted, by a host or (actor "") by whoever is none."""
        key = version.key.decode("utf-8", "backslashreplace")
        value = (version.value or b"").decode("utf-8", "backslashreplace")
        did = f"deletes {key}" if version.value is None else f"puts {key} = {value}"
        self.add(actor or STORE, STORE, f"{did} (revision {version.revision})")

    def digest(self) -> str:
        """One value for the whole history."""
        return hashlib.sha256("\n".join(map(str, self.moments)).encode()).hexdigest()

    def plain(self) -> str:
        """A line for each moment."""
        return "\n".join(map(str, self.moments))

    def mermaid(self, most: int = 400) -> str:
        """A sequence diagram (Mermaid's syntax): without the requests that only ask; the last `most` moments."""
        told = [moment for moment in self.moments if not _routine(moment)]
        lines = ["sequenceDiagram"]
        names = dict.fromkeys(name for moment in told for name in (moment.source, moment.target) if name)
        lines += [f"    participant {name}" for name in names]
        everybody = f"{next(iter(names))},{list(names)[-1]}" if names else STORE
        for moment in told[-most:]:
            text = f"{moment.at:.3f} {moment.text}".replace(";", ",").replace("#", "")
            if moment.target and moment.target != moment.source:
                lines.append(f"    {moment.source}->>{moment.target}: {text}")
            else:
                lines.append(f"    Note over {moment.source or everybody}: {text}")
        return "\n".join(lines)


def _routine(moment: Moment) -> bool:
    return moment.text.startswith(("kv/", "lease/")) and "lost" not in moment.text
