"""What Docker's user is told, as Docker shows our text behind its own."""

from __future__ import annotations

from wincey.model.errors import WinceyError


class Refused(WinceyError):
    """A call of Docker that can't be carried out; says what, why and what to do."""
