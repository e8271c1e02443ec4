"""The nft program: transactions, listings, and what nft and the kernel below it can do.

A listing is only ever compared with another one, so its text will do, and nft need not be built with JSON. It is asked
for stateless: without counters, and without handles unless one wants them.
"""

from __future__ import annotations

import msgspec

from wincey.kernel.program import ProgramFailed, must, run

_PROBE = """\
table ip flannel-probe {{
    {comment}
    chain postrtg {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr 10.0.0.0/8 masquerade {options}
    }}
}}
"""


class Features(msgspec.Struct, frozen=True):
    """What differs between versions of nft (1.0 has both) and kernels (3.13 has fully-random, 5.10 keeps comments)."""

    fully_random: bool = True
    comments: bool = True


async def commit(script: str) -> None:
    """Carry out a script as one transaction: all of it or, raising ProgramFailed, nothing."""
    await must("nft", "-f", "-", text=script)


async def listing(*what: str, elements: bool = True) -> str | None:
    """The text of a table (`"table", "ip", "filter"`) or chain; None if there is none, or it can't be read.

    elements: with those of its sets, which rules may add to.
    """
    result = await run("nft", "--stateless", *([] if elements else ["--terse"]), "list", *what)
    return None if result.code else result.out


async def complaint() -> str:
    """Why nftables is of no use here, "" if it is: a nat table that is checked and not made, kernel included."""
    return await _refused(Features(fully_random=False, comments=False))


async def features() -> Features:
    """Try what not every nft and kernel can do, without changing anything."""
    if not await _refused(Features()):
        return Features()
    return Features(
        fully_random=not await _refused(Features(comments=False)),
        comments=not await _refused(Features(fully_random=False)),
    )


async def delete_tables(*tables: tuple[str, str]) -> None:
    """Delete tables (family, name) in one transaction; those that don't exist are made and deleted within it."""
    await commit(deletion(*tables))


def deletion(*tables: tuple[str, str]) -> str:
    """The lines of a script that delete tables (family, name), there or not. Pure."""
    return "".join(f"add table {family} {name}\ndelete table {family} {name}\n" for family, name in tables)


async def _refused(wanted: Features) -> str:
    script = _PROBE.format(
        comment='comment "probe"' if wanted.comments else "", options="fully-random" if wanted.fully_random else ""
    )
    try:
        await must("nft", "--check", "-f", "-", text=script)
    except ProgramFailed as error:
        return str(error)
    return ""
