"""Two live hosts with one public address: told apart by a claim, and the second is refused.

A lease names its owner by public address alone, and its value's bytes are the contract's, so the lease can't tell two hosts
apart. Each host therefore keeps one more key, `<prefix>/wincey/hosts/<public address>`, with who it is. A host that starts
and finds another's claim there overwrites it and waits a moment: a live holder sees that in its watch and puts its own
claim back, and then the newcomer refuses to start. A dead holder doesn't, and the newcomer goes on. No heartbeat is
needed, and a host that restarts as itself (same boot) does not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from typing import NoReturn

import msgspec

from wincey.leasing.timing import renew_in, retry_in
from wincey.model.errors import UNREADABLE, DuplicateHost, KeyConflict, KeyExists, StoreError
from wincey.model.lease import TTL
from wincey.store.kv import Entry, KeyValueStore

log = logging.getLogger(__name__)

ANSWER_WITHIN = 3.0
"""Seconds that a live holder has for putting its claim back."""


class Host(msgspec.Struct, frozen=True):
    """Who lives at an address. `instance` is one boot of one machine (and network namespace); two are never equal."""

    name: str
    instance: str

    def __str__(self) -> str:
        return f"{self.name} ({self.instance[:8]})"

    def encode(self) -> bytes:
        """The claim's JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, value: bytes) -> Host:
        """Read a claim; one that can't be read is a host nobody knows."""
        try:
            return msgspec.json.decode(value, type=cls)
        except UNREADABLE:
            return cls("unknown host", value[:80].hex())


class Claim:
    """Our claim on one public address."""

    def __init__(self, store: KeyValueStore, key: str, me: Host) -> None:
        self._store, self._key, self._me = store, key, me
        self._defended = 0
        self._entry: Entry | None = None

    @property
    def key(self) -> str:
        """The store key."""
        return self._key

    async def stake(self) -> None:
        """Claim the address; raises DuplicateHost when another live host holds it."""
        while True:
            try:
                entry = await self._store.get(self._key)
                if entry is None:
                    self._entry = await self._store.create(self._key, self._me.encode(), TTL)
                    return
                holder = Host.decode(entry.value)
                if holder == self._me and not entry.permanent:
                    # A new value would wake every host of the cluster at each of our restarts.
                    self._entry = await self._store.refresh(entry, TTL)
                    return
                self._entry = await self._store.replace(entry, self._me.encode(), TTL)
            except (KeyExists, KeyConflict):
                continue  # somebody was faster: look again
            if holder.instance != self._me.instance:
                await self._await_answer(holder)
            return

    async def _await_answer(self, holder: Host) -> None:
        log.info(
            "the public address %s was claimed by host %s before; waiting up to %.0f s for it to object",
            self._key.rpartition("/")[2], holder, ANSWER_WITHIN,
        )  # fmt: skip
        deadline = asyncio.get_running_loop().time() + ANSWER_WITHIN
        while asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.25)
            entry = await self._store.get(self._key)
            if entry and (other := Host.decode(entry.value)).instance != self._me.instance:
                raise DuplicateHost(
                    f"hosts {self._me} (this one) and {other} both have the public address"
                    f" {self._key.rpartition('/')[2]}, and {other} is alive: give this host an address of its own"
                    " (--public-ip, --iface)"
                )

    async def keep(self, margin: float, rng: random.Random) -> NoReturn:
        """Renew it in time, for ever; margin: seconds before its end.

        It would be made again after its end, too, but that wakes every host of the cluster twice a day for each of them.
        """
        failures = 0
        while True:
            await asyncio.sleep(retry_in(failures, rng) if failures else renew_in(TTL, margin, rng))
            entry = self._entry
            try:
                if entry:
                    kept = await self._store.refresh(entry, TTL)
                    if self._entry is entry:
                        self._entry = kept
                failures = 0
            except KeyConflict:  # the watch tells what has become of it
                failures = 0
            except StoreError:
                failures += 1

    async def seen(self, entry: Entry | None) -> None:
        """The claim changed in the store: put ours back if another host overwrote it, or if it is gone.

        A claim that has expired, as one may while its host can't reach the store, is one that is gone.
        """
        if entry and self._entry and entry.revision < self._entry.revision:
            return  # as it was before we wrote it
        if entry and (other := Host.decode(entry.value)).instance == self._me.instance:
            self._entry = entry
            return
        if entry is None:
            with contextlib.suppress(KeyExists):  # its change is on the way to us
                self._entry = await self._store.create(self._key, self._me.encode(), TTL)
            return
        log.error(
            "host %s tries to use our public address %s; it is refused while this host (%s) lives",
            other, self._key.rpartition("/")[2], self._me,
        )  # fmt: skip
        # Two hosts that both believe to be first (the store was out of reach of one of them) put theirs back in turn: soon
        # they do so once a second. That is in time for a newcomer, which waits for longer.
        await asyncio.sleep(min(1.0, 0.02 * self._defended))
        self._defended += 1
        with contextlib.suppress(KeyConflict):  # its next change is on the way to us
            self._entry = await self._store.replace(entry, self._me.encode(), TTL)
