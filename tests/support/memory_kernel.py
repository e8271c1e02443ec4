"""A kernel in memory: what the agent's own logic needs to be tested without root. The real one is in tests/e2e."""

from wincey.model.state import Failure


class MemoryKernel:
    """A driver that keeps objects of all kinds in a dictionary."""

    handles = (object,)

    def __init__(self):
        self.objects = {}
        self.applied = []
        self.failing = {}
        self._changed = lambda why: None

    async def observe(self, desired, scope):
        return dict(self.objects)

    async def apply(self, changes):
        self.applied.append(changes)
        failures = []
        for item in changes.delete:
            self.objects.pop(item.key, None)
        for item in changes.put:
            if reason := self.failing.get(type(item)):
                failures.append(Failure(item, reason))
            else:
                self.objects[item.key] = item
        return failures

    def watch(self, changed):
        self._changed = changed

    def tamper(self, *, remove=None, put=None):
        if remove is not None:
            self.objects.pop(remove)
        if put is not None:
            self.objects[put.key] = put
        self._changed("by hand")

    async def close(self):
        pass
