"""tencent-vpc: a route in the VPC's route table on Tencent Cloud for each host (reference, section 6.9)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.keyed import KeyedBackend


class TencentVpcBackend(KeyedBackend):
    """Without `RouteTableID` the table is the VPC's first."""

    type: ClassVar[str] = "tencent-vpc"
    example: ClassVar[str] = "rtb-azd4dt1c"
