"""The desired state of a host, kept by owner: what each lease, and the host itself, asks for.

One object may be asked for by several owners (two peers reached over one helper device), or two owners may ask for
different objects of one key (two leases that overlap). The owner who was there first is served, and the next one when the
first is gone, so that no order of joining and leaving loses an object that somebody still needs. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from wincey.model.state import Changes, Key, Object


class DesiredState:
    """Objects by key, and what has changed since somebody last asked."""

    def __init__(self) -> None:
        self._objects: dict[Key, Object] = {}
        self._owners: dict[str, tuple[Object, ...]] = {}
        # Only keys with more than one owner, which are few: the memory of 10,000 peers counts.
        self._shared: dict[Key, dict[str, Object]] = {}
        self._before: dict[Key, Object | None] = {}

    @property
    def objects(self) -> Mapping[Key, Object]:
        """Everything that must exist."""
        return self._objects

    @property
    def owners(self) -> Iterable[str]:
        """Who asks for something."""
        return self._owners

    def of(self, owner: str) -> Sequence[Object]:
        """What one owner asks for."""
        return self._owners.get(owner, ())

    def put(self, owner: str, objects: Iterable[Object]) -> None:
        """All that this owner asks for from now on; nothing removes the owner."""
        wanted = tuple(objects)
        if wanted == self._owners.get(owner, ()):
            return
        for old in self._owners.pop(owner, ()):
            self._withdraw(owner, old.key)
        if wanted:
            for new in wanted:
                self._add(owner, new.key, new)
            self._owners[owner] = wanted

    def take_changes(self) -> Changes:
        """The difference since the last call."""
        changes = Changes()
        for key, before in self._before.items():
            now = self._objects.get(key)
            if now is None and before is not None:
                changes.delete.append(before)
            elif now is not None and now != before:
                changes.put.append(now)
        self._before = {}
        return changes

    def _add(self, owner: str, key: Key, new: Object) -> None:
        if key not in self._objects:
            self._set(key, new)
            return
        if key not in self._shared:
            first = next((name for name, objects in self._owners.items() if any(o.key == key for o in objects)), owner)
            self._shared[key] = {first: self._objects[key]}
        self._shared[key][owner] = new
        self._set(key, next(iter(self._shared[key].values())))

    def _withdraw(self, owner: str, key: Key) -> None:
        rivals = self._shared.get(key)
        if rivals is None:
            self._set(key, None)
            return
        rivals.pop(owner, None)
        self._set(key, next(iter(rivals.values()), None))
        if len(rivals) <= 1:
            del self._shared[key]

    def _set(self, key: Key, new: Object | None) -> None:
        self._before.setdefault(key, self._objects.get(key))
        if new is None:
            self._objects.pop(key, None)
        else:
            self._objects[key] = new
