"""What can go wrong with a lab."""

from __future__ import annotations

from wincey.model.errors import UsageError, WinceyError


class LabError(WinceyError):
    """A lab can't be made, found or used; says which one and what to do."""


class UnknownName(UsageError):
    """A lab, host, container or placeholder that does not exist; says which ones do."""


class NotReady(LabError):
    """A daemon or the store did not get ready in time; names the host and shows the last lines of its log."""
