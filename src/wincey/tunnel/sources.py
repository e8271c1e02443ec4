"""Which inner source addresses may come from a peer whose lease does not have them (`--udp-source-check`)."""

from __future__ import annotations

from dataclasses import dataclass

MODES = ("off", "network", "strict")


@dataclass(frozen=True)
class SourceCheck:
    """off: all may. network: those outside the cluster's network may, unless another host has leased them. strict: none may.

    network: four bytes, length: bits of its prefix; only `network` reads them. A host that is no peer is not judged.
    """

    mode: str = "off"
    network: bytes = bytes(4)
    length: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"a check of sources is one of {', '.join(MODES)}, not {self.mode!r}")
        if len(self.network) != 4 or not 0 <= self.length <= 32:
            raise ValueError("a check of sources needs the cluster's IPv4 network")

    def refuses(self, source: bytes) -> bool:
        """Whether a source (four bytes) that nobody has leased is dropped."""
        if self.mode != "network":
            return self.mode == "strict"
        away = int.from_bytes(source, "big") ^ int.from_bytes(self.network, "big")
        return away >> (32 - self.length) == 0
