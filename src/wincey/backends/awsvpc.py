"""aws-vpc: a route in the VPC's route table for each host (reference, section 6.7)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.base import HostFacts
from wincey.backends.cloud import CloudBackend
from wincey.model.config import NetworkConfig

_TABLES = "RouteTableID"


class AwsVpcBackend(CloudBackend):
    """The tables are those of `RouteTableID`, one or a list; without it, the one of the host's VPC subnet."""

    type: ClassVar[str] = "aws-vpc"
    keys: ClassVar[tuple[str, ...]] = (_TABLES,)

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        super().__init__(config, host)
        given = config.backend.raw(_TABLES)
        names = [given] if isinstance(given, str) else given or []
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            config.backend.wrong(_TABLES, "must be the id of a route table, or a list of ids", "rtb-0a1b2c3d")
        self._tables = tuple(dict.fromkeys(names))

    def tables(self) -> tuple[str, ...]:
        return self._tables
