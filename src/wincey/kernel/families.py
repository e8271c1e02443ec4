"""What both rule drivers do family by family: a trouble with one is no trouble for the other."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from wincey.kernel.driver import Desired
from wincey.kernel.program import ProgramFailed
from wincey.kernel.rules import FAMILIES, rules_key
from wincey.model.state import Changes, Failure, Key, Object, RuleSet

log = logging.getLogger(__name__)


async def observe_families(
    desired: Desired, observe: Callable[[int, RuleSet | None], Awaitable[RuleSet | None]]
) -> dict[Key, Object]:
    """What `observe(family, wanted)` finds. What can't be read counts as absent: putting it then tells why."""
    found: dict[Key, Object] = {}
    for family in FAMILIES:
        wanted = desired.get(rules_key(family))
        assert wanted is None or isinstance(wanted, RuleSet)
        try:
            seen = await observe(family, wanted)
        except ProgramFailed as error:
            log.debug("traffic rules can't be read: %s", error)
            continue
        if seen is not None:
            found[seen.key] = seen
    return found


async def apply_families(
    changes: Changes, put: Callable[[RuleSet], Awaitable[None]], remove: Callable[[int], Awaitable[None]]
) -> list[Failure]:
    """Delete, then put; what failed, and why."""
    failures = []
    for wanted, objects in ((False, changes.delete), (True, changes.put)):
        for rules in objects:
            if not isinstance(rules, RuleSet):
                continue
            try:
                await (put(rules) if wanted else remove(rules.network.family))
            except ProgramFailed as error:
                failures.append(Failure(rules, f"traffic rules of {rules.network}: {error}"))
    return failures
