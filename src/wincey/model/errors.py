"""One class per kind of failure. Each message says what, where, why and what to do.

Exit codes follow the compatibility reference, section 1.4: 0 for a clean end, 1 for a failure to start, 2 for a wrong
command line.
"""

from __future__ import annotations

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for a text that is not what it should be: no JSON or of another form, no UTF-8, nested too deeply."""


class WinceyError(Exception):
    """Base of every error we raise on purpose; its text is one line that a user can act on."""

    exit_code = 1


class UsageError(WinceyError):
    """The command line or the environment is wrong."""

    exit_code = 2


class BadOption(WinceyError):
    """A flag's value is well-formed but can't be used."""


class CannotListen(WinceyError):
    """An address of ours can't be listened on; names the flag, the address and the reason."""


class BadAddress(WinceyError, ValueError):
    """A text that should be an address, a subnet or a MAC address is none."""


class BadConfig(WinceyError):
    """The network config (JSON) breaks a rule; says key, value, rule and an example."""


class UnknownBackend(BadConfig):
    """Backend.Type names no backend. Unlike other faults of the config this one ends the daemon, as flannel does."""


class BadLease(WinceyError, ValueError):
    """A lease key or value can't be read. It concerns that lease alone and never the others."""


class NotJoinable(WinceyError):
    """This host can't take part as it is (no usable interface, backend needs what the host lacks)."""


class DuplicateHost(WinceyError):
    """Another live host has the same public address; both are named."""


class OutOfSubnets(WinceyError):
    """Every subnet between SubnetMin and SubnetMax is leased; says how many and by whom."""


class StoreError(WinceyError):
    """The store could not do what it was asked to."""


class StoreUnavailable(StoreError):
    """No endpoint answered in time, or the member has no leader: trying again later is right."""


class StoreDenied(StoreError):
    """The store refuses us: wrong certificate, user, password or permission."""


class KeyExists(StoreError):
    """Create-if-absent found the key present."""


class KeyConflict(StoreError):
    """Compare-and-swap found another revision, or no key at all."""


class HistoryLost(StoreError):
    """The store no longer has the events after the cursor (compaction, "index cleared"): read a new snapshot."""


class KernelError(WinceyError):
    """The kernel refused a change; carries the object, errno and the kernel's own words."""
