"""Which address of a block is next: a pure decision."""

from __future__ import annotations

from wincey.docker.errors import Refused
from wincey.docker.state import Pool
from wincey.model.address import Subnet, format_address, parse_address
from wincey.model.errors import BadAddress

GATEWAY = 1
"""The place of the bridge's own address in the block, as everywhere in flannel."""


def gateway(pool: Pool) -> str:
    """The address of the bridge, without a length."""
    return format_address(pool.own.host(GATEWAY))


def choose(pool: Pool, wanted: str) -> str:
    """The next free address after the last one given, or the wanted one; raises Refused."""
    block = pool.own
    if wanted:
        return _wanted(pool, block, wanted)
    size = block.size
    last = parse_address(pool.last) if pool.last else block.host(GATEWAY)
    place = int.from_bytes(last, "big") - block.first
    for step in range(1, size + 1):
        candidate = (place + step) % size
        if GATEWAY < candidate < size - 1:
            text = format_address(block.host(candidate))
            if text not in pool.addresses:
                return text
    raise Refused(
        f"all {size - 3} addresses of this engine's block {block} of {pool.network} are in use: remove containers, or make"
        f" the network anew with a larger block, as --ipam-opt block={block.length - 1}"
    )


def _wanted(pool: Pool, block: Subnet, wanted: str) -> str:
    try:
        address = parse_address(wanted)
    except BadAddress as error:
        raise Refused(str(error)) from None
    if not block.contains(address):
        raise Refused(
            f"{wanted} is not in {block}, the block of {pool.network} that this engine gives addresses from;"
            f" take one from {format_address(block.host(GATEWAY + 1))} to {format_address(block.host(block.size - 2))}"
        )
    place = int.from_bytes(address, "big") - block.first
    if place in {0, GATEWAY, block.size - 1}:
        raise Refused(f"{wanted} is the first, last or gateway address of the block {block}: no container can have it")
    text = format_address(address)
    if text in pool.addresses:
        raise Refused(f"{wanted} is in use on this engine already")
    return text
