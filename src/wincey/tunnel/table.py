"""Which peer an inner address belongs to: longest prefix first.

One dictionary for each prefix length in use, so that a look-up costs one probe for each length (there is seldom more than
one) however many peers there are. Addresses are numbers, endpoints four packed bytes: 10,000 peers take about 2 MB.
"""

from __future__ import annotations

from wincey.tunnel.control import PEER

_NOBODY = bytes(4)  # in a record: no endpoint, the peer is to go


class PeerTable:
    """Subnets and the hosts that have them. A record is 9 bytes: subnet, prefix length, endpoint (0.0.0.0: remove it)."""

    def __init__(self) -> None:
        self._levels: list[tuple[int, int, dict[int, bytes]]] = []  # (length, mask, network number -> endpoint)
        self._endpoints: frozenset[bytes] | None = None

    def __len__(self) -> int:
        return sum(len(networks) for _, _, networks in self._levels)

    def update(self, records: bytes) -> None:
        """Apply records in their order; raises ValueError (and changes nothing) when they are not well formed."""
        if len(records) % PEER.size or any(length > 32 for length in records[4 :: PEER.size]):
            raise ValueError("peer records are malformed")
        levels = {length: networks for length, _, networks in self._levels}
        for address, length, endpoint in PEER.iter_unpack(records):
            network = int.from_bytes(address, "big") & _mask(length)
            if endpoint != _NOBODY:
                levels.setdefault(length, {})[network] = endpoint
            elif length in levels:
                levels[length].pop(network, None)
        self._levels = [
            (length, _mask(length), levels[length]) for length in sorted(levels, reverse=True) if levels[length]
        ]
        self._endpoints = None

    def records(self) -> bytes:
        """The whole table as records, for `update` of another one."""
        return b"".join(
            [
                PEER.pack(network.to_bytes(4, "big"), length, endpoint)
                for length, _, networks in self._levels
                for network, endpoint in networks.items()
            ]
        )

    def lookup(self, address: bytes) -> bytes | None:
        """The endpoint for an inner address (four bytes), None when nobody has it."""
        number = int.from_bytes(address, "big")
        for _, mask, networks in self._levels:
            endpoint = networks.get(number & mask)
            if endpoint is not None:
                return endpoint
        return None

    @property
    def endpoints(self) -> frozenset[bytes]:
        """Every peer's endpoint."""
        if self._endpoints is None:
            self._endpoints = frozenset(endpoint for _, _, networks in self._levels for endpoint in networks.values())
        return self._endpoints


def _mask(length: int) -> int:
    return (1 << 32) - (1 << (32 - length))
