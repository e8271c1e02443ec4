"""ali-vpc: a custom entry in the VPC's route table on Alibaba Cloud for each host (reference, section 6.9)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.keyed import KeyedBackend


class AliVpcBackend(KeyedBackend):
    """Without `RouteTableID` the table is the one of the VPC's router."""

    type: ClassVar[str] = "ali-vpc"
    example: ClassVar[str] = "vtb-bp145q7glnuzdvzu2"
