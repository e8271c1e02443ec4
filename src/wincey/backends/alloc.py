"""alloc: take and hold a lease, program nothing. For hosts whose routes somebody else makes (reference, section 6.10)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.base import HostFacts, public_attrs
from wincey.model.config import NetworkConfig
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey
from wincey.model.state import Object


class AllocBackend:
    """Nothing but a lease."""

    type: ClassVar[str] = "alloc"
    keys: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        self._config, self._host = config, host

    @property
    def mtu(self) -> int:
        return self._host.mtu

    def attrs(self) -> LeaseAttrs:
        return public_attrs(self._host, self._config)

    def reaches(self, attrs: LeaseAttrs) -> bool:
        return True  # none is reached, and none needs to be

    def local(self, own: LeaseKey) -> list[Object]:
        return []

    def peer(self, own: LeaseKey, lease: Lease) -> list[Object]:
        return []
