"""One nftables table that is ours as a whole: made by one script, and compared with its own listing from then on."""

from __future__ import annotations

from collections.abc import Callable

from wincey.kernel import nft
from wincey.kernel.nfmonitor import GenerationCounter, NftMonitor


class OwnTable:
    """A table of the family ip. What rules add to its sets is nobody's change.

    changed: called with the reason when someone else may have changed it, from the first `commit` on.
    """

    def __init__(self, name: str, changed: Callable[[str], None]) -> None:
        self.name = name
        self._changed = changed
        self._listing: str | None = None
        self._generation = GenerationCounter()
        self._verified: int | None = None  # the generation at which the table was as listed
        self._committing = False
        self._monitor: NftMonitor | None = None

    async def commit(self, script: str) -> None:
        """Replace it by what the script makes. Needs a running event loop. Raises ProgramFailed."""
        self._committing = True
        try:
            await nft.commit(script)
            self._verified, self._listing = self._generation.read(), await self._listed()
        finally:
            self._committing = False
        if self._monitor is None:
            name = self.name
            self._monitor = NftMonitor({name}, lambda family, table, chain: table == name, self._noticed)

    async def as_committed(self) -> bool:
        """Whether it is as the last script made it. Raises ProgramFailed."""
        generation = self._generation.read()
        if generation is None or generation != self._verified:
            if await self._listed() != self._listing:
                return False
            self._verified = generation
        return True

    async def delete(self) -> None:
        """Delete it, there or not, and watch no longer. Raises ProgramFailed."""
        self.close()
        await nft.delete_tables(("ip", self.name))
        self._verified = self._listing = None

    def close(self) -> None:
        """Stop watching; the table stays."""
        monitor, self._monitor = self._monitor, None
        if monitor:
            monitor.close()
        self._generation.close()

    async def _listed(self) -> str | None:
        return await nft.listing("table", "ip", self.name, elements=False)

    def _noticed(self, why: str) -> None:
        if not self._committing and self._generation.read() != self._verified:
            self._changed(why)
