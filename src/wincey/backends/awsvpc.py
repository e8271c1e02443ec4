"""aws-vpc: a route in the VPC's route table for each host (reference, section 6.7)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.base import HostFacts
from wincey.backends.cloud import TABLES, CloudBackend, named_tables
from wincey.model.config import NetworkConfig


class AwsVpcBackend(CloudBackend):
    """The tables are those of `RouteTableID`, one or a list; without it, the one of the host's VPC subnet."""

    type: ClassVar[str] = "aws-vpc"
    keys: ClassVar[tuple[str, ...]] = (TABLES,)

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        super().__init__(config, host)
        self._tables = named_tables(config, "rtb-0a1b2c3d")

    def tables(self) -> tuple[str, ...]:
        return self._tables
