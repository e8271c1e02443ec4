"""Tencent Cloud: routes of a VPC's route table, by API 3.0, version 2017-03-12 (compatibility reference, section 6.9).

A route leads to an instance's private address (gateway type NORMAL_CVM), so a host is known by the address that its lease
publishes, and that of another VPC is refused by the API. A route that was switched off (Enabled false) is made anew; one that
leads elsewhere is replaced in place. The table is the one that the config names, else the VPC's first, as in flannel.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import msgspec

from wincey.cloud.errors import (
    CloudConflict,
    CloudDenied,
    CloudError,
    CloudFull,
    CloudThrottled,
    CloudUnavailable,
)
from wincey.cloud.rest import Keys, Metadata, Rest
from wincey.cloud.signing_tencent import authorization
from wincey.cloud.table import CloudHost, Hosts, Step, Table, TableRoute
from wincey.model.address import Subnet, format_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import BadAddress

CLOUD = "Tencent Cloud"
ENDPOINT, METADATA = "WINCEY_TENCENT_ENDPOINT", "WINCEY_TENCENT_METADATA"
MARK = "flannel subnet, kept by wincey"
_VERSION, _INSTANCE, _PAGE = "2017-03-12", "NORMAL_CVM", 100

_KINDS: tuple[tuple[str, type[CloudError]], ...] = (
    ("RequestLimitExceeded", CloudThrottled),
    ("LimitExceeded", CloudFull),
    ("InvalidParameterValue.LimitExceeded", CloudFull),
    ("AuthFailure", CloudDenied),
    ("UnauthorizedOperation", CloudDenied),
    ("InvalidParameterValue.Duplicate", CloudConflict),
    ("ResourceNotFound", CloudConflict),
    ("ResourceInUse", CloudThrottled),
    ("InternalError", CloudUnavailable),
    ("InternalServerError", CloudUnavailable),
    ("ResourceUnavailable", CloudUnavailable),
)


async def ask_host() -> dict[str, str]:
    """What only the instance can tell: `region` and `vpc`. Raises NotJoinable."""
    async with Metadata(METADATA, "http://metadata.tencentyun.com", CLOUD, {}) as metadata:
        items = "/latest/meta-data"
        mac = await metadata.text(f"{items}/mac")
        return {
            "region": await metadata.text(f"{items}/placement/region"),
            "vpc": await metadata.text(f"{items}/network/interfaces/macs/{mac}/vpc-id"),
        }


class TencentDialect:
    """See wincey.cloud.table.Dialect. settings: `region`, `vpc`."""

    provider: ClassVar[str] = "tencent-vpc"

    def __init__(self, table: CloudTable) -> None:
        self._table = table
        self._settings = dict(table.settings)
        self._keys = Keys.of(table, CLOUD)
        self._rest = Rest(ENDPOINT, "https://vpc.tencentcloudapi.com", CLOUD)
        self._limit: int | None = None
        self._asked_limit = False

    async def hosts(self, wanted: Sequence[HostRef]) -> Hosts:
        """No call: the address is the host's name. There is no switch for forwarding."""
        return {host: CloudHost((format_address(host.address),), forwards=True) for host in wanted if host.address}

    async def tables(self, hosts: Hosts) -> Sequence[Table]:
        vpc = self._settings.get("vpc", "")
        names = self._table.tables
        select: dict[str, Any] = (
            {"RouteTableIds": list(names)} if names else {"Filters": [{"Name": "vpc-id", "Values": [vpc]}]}
        )
        found: list[dict[str, Any]] = []
        while True:
            page = await self._call("DescribeRouteTables", {**select, "Offset": str(len(found)), "Limit": str(_PAGE)})
            found += page["RouteTableSet"]
            if not names or len(found) >= page["TotalCount"] or not page["RouteTableSet"]:
                break
        if missing := set(names) - {table["RouteTableId"] for table in found}:
            raise CloudError(f"{CLOUD} has no route table {', '.join(sorted(missing))}: correct Backend.RouteTableID")
        if not found:
            raise CloudError(f"{CLOUD} shows no route table of {vpc} in {self._settings.get('region')}")
        limit = await self._quota()
        return [_table(each, limit) for each in (found if names else found[:1])]

    async def put(self, step: Step) -> None:
        route: dict[str, Any] = {
            "DestinationCidrBlock": str(step.destination),
            "GatewayType": _INSTANCE,
            "GatewayId": step.host.next_hop[0],
            "RouteDescription": MARK,
        }
        if step.old and step.old.state == "active":
            route["RouteId"] = int(step.old.handle)
            await self._call("ReplaceRoutes", {"RouteTableId": step.table, "Routes": [route]})
            return
        if step.old:
            await self.delete(step.old)
        await self._call("CreateRoutes", {"RouteTableId": step.table, "Routes": [route]})

    async def delete(self, route: TableRoute) -> None:
        try:
            await self._call("DeleteRoutes", {"RouteTableId": route.table, "Routes": [{"RouteId": int(route.handle)}]})
        except CloudConflict:  # it is gone
            return

    async def allow_forwarding(self, host: CloudHost) -> None:
        """Nothing to do: instances may forward."""

    async def close(self) -> None:
        await self._rest.close()

    async def _quota(self) -> int | None:
        """How many routes a table may have; None when we may not know. Asked once: it changes by a request to support."""
        if not self._asked_limit:
            try:
                answer = await self._call("DescribeVpcLimits", {"LimitTypes": ["route-table-max-policies"]})
                self._limit = next((int(each["LimitValue"]) for each in answer.get("VpcLimitSet", [])), None)
            except (CloudThrottled, CloudUnavailable):
                raise
            except CloudError:
                self._limit = None
            self._asked_limit = True
        return self._limit

    async def _call(self, action: str, parameters: dict[str, Any]) -> dict[str, Any]:
        body, now = msgspec.json.encode(parameters), int(time.time())
        signed = {"content-type": "application/json; charset=utf-8", "host": self._rest.host}
        headers = {
            **signed,
            "authorization": authorization(
                secret_id=self._keys.key_id,
                secret_key=self._keys.secret,
                service="vpc",
                headers=signed,
                body=body,
                timestamp=now,
            ),
            "x-tc-action": action,
            "x-tc-version": _VERSION,
            "x-tc-region": self._settings.get("region", ""),
            "x-tc-timestamp": str(now),
        }
        status, document = await self._rest.call("POST", "/", headers, body)
        answer = document.get("Response")
        if not isinstance(answer, dict):
            raise CloudUnavailable(f"{CLOUD} answers {action} with status {status} and nothing that we understand")
        if error := answer.get("Error"):
            self._refused(action, str(error.get("Code")), str(error.get("Message")))
        return answer

    def _refused(self, action: str, code: str, message: str) -> NoReturn:
        kind = next((kind for start, kind in _KINDS if code.startswith(start)), CloudError)
        text = f"{CLOUD} refuses {action}: {message.rstrip('.')} ({code})"
        if kind is CloudFull:
            limit = f" of {self._limit}" if self._limit else ""
            text += f"; the route table's quota{limit} is reached: delete routes, or have the quota raised"
        elif code.startswith(("AuthFailure.SecretId", "AuthFailure.SignatureFailure")):
            text += "; check AccessKeyID and AccessKeySecret"
        elif code.startswith("AuthFailure.SignatureExpire"):
            text += "; set the host's clock"
        elif kind is CloudDenied:
            text += f"; grant the key's user vpc:{action}"
        raise kind(text)


def _table(document: dict[str, Any], limit: int | None) -> Table:
    name = document["RouteTableId"]
    routes = tuple(route for each in document["RouteSet"] if (route := _route(name, each)))
    used = sum(each.get("RouteType", "USER") == "USER" for each in document["RouteSet"])
    return Table(name, routes, used, limit)


def _route(table: str, document: dict[str, Any]) -> TableRoute | None:
    """None for what has no IPv4 destination."""
    try:
        destination = Subnet.parse(document.get("DestinationCidrBlock") or "")
    except BadAddress:
        return None
    ours = document.get("GatewayType") == _INSTANCE and document.get("RouteType", "USER") == "USER"
    return TableRoute(
        table,
        destination,
        (document["GatewayId"],) if ours else (),
        state="active" if document.get("Enabled", True) else "disabled",
        handle=str(document.get("RouteId", "")),
        marked=document.get("RouteDescription") == MARK,
    )
