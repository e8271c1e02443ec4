"""What must change so that what is becomes what must be. Pure, and fast enough for 30,000 objects at every audit."""

from __future__ import annotations

from collections.abc import Mapping

from wincey.model.state import Changes, Key, Object


def diff(desired: Mapping[Key, Object], actual: Mapping[Key, Object]) -> Changes:
    """Put what is missing or different, delete what is there under a key that nothing desired has.

    `actual` may hold an object under another key than its own: that is how a driver reports that something surplus stands
    beside the object desired (a second remote of one MAC address, another next hop) and is to be deleted alone.
    """
    put: list[Object] = []
    known = 0
    find = actual.get
    for key, wanted in desired.items():
        found = find(key)
        if found is not None:
            known += 1
        if found is not wanted and found != wanted:
            put.append(wanted)
    if known == len(actual):
        return Changes(put=put)
    return Changes(put=put, delete=[found for key, found in actual.items() if key not in desired])
