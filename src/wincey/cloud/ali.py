"""Alibaba Cloud: custom entries of a VPC's route table, by the RPC API of version 2016-04-28 (compatibility reference, 6.9).

An entry leads to an instance by its id. A new one is Pending for some seconds, one that goes is Modifying, and meanwhile the
VPC takes no other change: whoever comes then is told so (IncorrectRouteEntryStatus, TaskConflict) and waits as for a change of its own. There is no
call that replaces an entry, so it is deleted, awaited and made anew. The table is the one that the config names, else the
one that the VPC's router has by itself (type System).

Flannel deletes every custom entry that leads to its host, save its own and the default route. Here only those inside the
cluster network go, as with every other cloud: a route that somebody made for something else stays.
"""

from __future__ import annotations

import asyncio
import random
import secrets
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
from wincey.cloud.signing_ali import signed_query
from wincey.cloud.table import CloudHost, Hosts, Step, Table, TableRoute
from wincey.model.address import Subnet, format_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import BadAddress

CLOUD = "Alibaba Cloud"
ENDPOINT, ECS_ENDPOINT, METADATA = "WINCEY_ALI_ENDPOINT", "WINCEY_ALI_ECS_ENDPOINT", "WINCEY_ALI_METADATA"
_VPC, _ECS = "2016-04-28", "2014-05-26"
_PREFIX = "flannel-"
_PATIENCE = 10.0  # seconds for the changes of one call
_POLL_FIRST, _POLL_MOST = 0.2, 2.0
_PAGE = 50  # the most that DescribeRouteTables shows
_SOME = 100  # the most addresses that DescribeInstances takes


class _Busy(CloudThrottled):
    """The VPC is about another change, of another host perhaps."""


_KINDS: tuple[tuple[str, type[CloudError]], ...] = (
    ("Throttling", CloudThrottled),
    ("IncorrectRouteEntryStatus", _Busy),
    ("IncorrectVpcStatus", _Busy),
    ("IncorrectStatus", _Busy),
    ("TaskConflict", _Busy),
    ("OperationConflict", _Busy),
    ("LastTokenProcessing", _Busy),
    ("SignatureNonceUsed", CloudThrottled),  # sent twice by a connection that broke: a new one has another
    ("QuotaExceeded", CloudFull),
    ("RouterEntryConflict.Duplicated", CloudConflict),
    ("InvalidRouteEntry.NotFound", CloudConflict),
    ("RouterEntry.NotFound", CloudConflict),
    ("InvalidAccessKeyId", CloudDenied),
    ("SignatureDoesNotMatch", CloudDenied),
    ("InvalidTimeStamp", CloudDenied),
    ("Forbidden", CloudDenied),
    ("NoPermission", CloudDenied),
    ("ServiceUnavailable", CloudUnavailable),
    ("InternalError", CloudUnavailable),
    ("SystemBusy", CloudUnavailable),
)


async def ask_host() -> dict[str, str]:
    """What only the instance can tell: `region`, `vpc`, `instance`. Raises NotJoinable.

    An instance may be set to answer only who shows a session token first; one that knows no such tokens answers without.
    """
    async with Metadata(METADATA, "http://100.100.100.200", CLOUD, {}) as metadata:
        token = await metadata.request("PUT", "/latest/api/token", {"x-aliyun-ecs-metadata-token-ttl-seconds": "60"})
        if token.status == 200:
            metadata.headers["x-aliyun-ecs-metadata-token"] = token.body.decode("latin-1").strip()
        items = "/latest/meta-data"
        return {
            "region": await metadata.text(f"{items}/region-id"),
            "vpc": await metadata.text(f"{items}/vpc-id"),
            "instance": await metadata.text(f"{items}/instance-id"),
        }


class AliDialect:
    """See wincey.cloud.table.Dialect. settings: `region`, `vpc`."""

    provider: ClassVar[str] = "ali-vpc"

    def __init__(self, table: CloudTable) -> None:
        self._table = table
        self._settings = dict(table.settings)
        self._keys = Keys.of(table, CLOUD)
        self._vpc_api = Rest(ENDPOINT, "https://vpc.aliyuncs.com", CLOUD)
        self._ecs_api = Rest(ECS_ENDPOINT, "https://ecs.aliyuncs.com", CLOUD)

    async def hosts(self, wanted: Sequence[HostRef]) -> Hosts:
        """This host is known by its own metadata server. Others, which a server sees to, are asked for by address."""
        found = {host: CloudHost((host.instance,), forwards=True) for host in wanted if host == self._table.own}
        others = {format_address(host.address): host for host in wanted if host.address and host not in found}
        addresses = list(others)
        for start in range(0, len(addresses), _SOME):
            some = addresses[start : start + _SOME]
            answer = await self._call(
                "DescribeInstances",
                VpcId=self._settings.get("vpc", ""),
                PrivateIpAddresses=msgspec.json.encode(some).decode(),
                PageSize=str(_SOME),
            )
            for instance in answer["Instances"]["Instance"]:
                for address in instance["VpcAttributes"]["PrivateIpAddress"]["IpAddress"]:
                    host = others.get(address)
                    if host and host.instance in {"", instance["InstanceId"]}:
                        found[host] = CloudHost((instance["InstanceId"],), forwards=True)
        return found

    async def tables(self, hosts: Hosts) -> Sequence[Table]:
        return [_table(each) for each in await self._tables()]

    async def put(self, step: Step) -> None:
        deadline = _now() + _PATIENCE
        if step.old:
            await self._delete(step.old, deadline)
            if await self._status(step, step.old.next_hop[0], deadline) != "":
                raise CloudThrottled(f"{CLOUD} is still deleting the {step.old}")
        await self._change(
            "CreateRouteEntry",
            deadline,
            RouteTableId=step.table,
            DestinationCidrBlock=str(step.destination),
            NextHopType="Instance",
            NextHopId=step.host.next_hop[0],
            RouteEntryName=_PREFIX + str(step.destination).replace(".", "-").replace("/", "-"),
            ClientToken=secrets.token_hex(16),
        )
        await self._status(step, step.host.next_hop[0], deadline)

    async def delete(self, route: TableRoute) -> None:
        try:
            await self._delete(route, _now() + _PATIENCE)
        except CloudConflict:  # it is gone, or leads elsewhere by now
            return

    async def allow_forwarding(self, host: CloudHost) -> None:
        """Nothing to do: instances may forward."""

    async def close(self) -> None:
        await self._vpc_api.close()
        await self._ecs_api.close()

    async def _delete(self, route: TableRoute, deadline: float) -> None:
        await self._change(
            "DeleteRouteEntry",
            deadline,
            RouteTableId=route.table,
            DestinationCidrBlock=str(route.destination),
            NextHopId=route.next_hop[0],
        )

    async def _change(self, action: str, deadline: float, **parameters: str) -> None:
        """A call that waits its turn."""
        pause = _POLL_FIRST
        while True:
            try:
                await self._call(action, **parameters)
            except _Busy:
                pause = min(_POLL_MOST, 2 * pause)
                if _now() + pause > deadline:
                    raise
                await asyncio.sleep(random.uniform(0.5, 1) * pause)  # noqa: S311  # so that hosts come one by one
            else:
                return

    async def _status(self, step: Step, instance: str, deadline: float) -> str:
        """Wait until an entry has settled: "Available", or "" when it is gone; its status when the time is over."""
        pause = _POLL_FIRST
        while True:
            await asyncio.sleep(pause)
            status = next(
                (
                    str(entry.get("Status"))
                    for table in await self._tables()
                    if table["RouteTableId"] == step.table
                    for entry in _entries(table)
                    if (entry.get("DestinationCidrBlock"), entry.get("InstanceId")) == (str(step.destination), instance)
                ),
                "",
            )
            pause = min(_POLL_MOST, 2 * pause)
            if status in {"", "Available"} or _now() + pause > deadline:
                return status

    async def _tables(self) -> list[dict[str, Any]]:
        """The tables to keep, as the API has them."""
        names = self._table.tables
        router = await self._router()
        found: list[dict[str, Any]] = []
        page = 1
        while True:
            answer = await self._call(
                "DescribeRouteTables", VRouterId=router, PageNumber=str(page), PageSize=str(_PAGE)
            )
            shown = answer["RouteTables"]["RouteTable"]
            found += shown
            if not shown or len(found) >= answer["TotalCount"]:
                break
            page += 1
        if missing := set(names) - {table["RouteTableId"] for table in found}:
            raise CloudError(f"{CLOUD} has no route table {', '.join(sorted(missing))}: correct Backend.RouteTableID")
        if not found:
            raise CloudError(f"{CLOUD} shows no route table of {self._settings.get('vpc')}")
        if names:
            return [table for table in found if table["RouteTableId"] in names]
        return [min(found, key=lambda table: table.get("RouteTableType") != "System")]

    async def _router(self) -> str:
        """The VPC's router, which has the tables."""
        vpc, region = self._settings.get("vpc", ""), self._settings.get("region", "")
        answer = await self._call("DescribeVpcs", VpcId=vpc)
        for each in answer["Vpcs"]["Vpc"]:
            return str(each["VRouterId"])
        raise CloudError(f"{CLOUD} has no VPC {vpc} in {region}, or the access key is another account's")

    async def _call(self, action: str, **parameters: str) -> dict[str, Any]:
        ecs = action == "DescribeInstances"
        own = {"Action": action, "Version": _ECS if ecs else _VPC, "RegionId": self._settings.get("region", "")}
        query = signed_query(
            own | parameters,
            key_id=self._keys.key_id,
            key_secret=self._keys.secret,
            now=time.time(),
            nonce=secrets.token_hex(16),
        )
        status, document = await (self._ecs_api if ecs else self._vpc_api).call("GET", f"/?{query}")
        if status >= 300:
            self._refused(action, ecs, status, str(document.get("Code", "")), str(document.get("Message", "")))
        return document

    def _refused(self, action: str, ecs: bool, status: int, code: str, message: str) -> NoReturn:
        usual = CloudUnavailable if status >= 500 else CloudError
        kind = next((kind for start, kind in _KINDS if code.startswith(start)), usual)
        text = f"{CLOUD} refuses {action}: {' '.join(message.split()).rstrip('.')} ({code or f'status {status}'})"
        if kind is CloudFull:
            text += "; the route table's quota of custom entries is reached: delete some, or have the quota raised"
        elif code.startswith(("InvalidAccessKeyId", "SignatureDoesNotMatch")):
            text += "; check AccessKeyID and AccessKeySecret"
        elif code.startswith("InvalidTimeStamp"):
            text += "; set the host's clock"
        elif kind is CloudDenied:
            text += f"; grant the key's RAM user {'ecs' if ecs else 'vpc'}:{action}"
        raise kind(text)


def _entries(table: dict[str, Any]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = table["RouteEntrys"]["RouteEntry"]
    return entries


def _table(document: dict[str, Any]) -> Table:
    name, entries = document["RouteTableId"], _entries(document)
    routes = tuple(route for each in entries if (route := _route(name, each)))
    return Table(name, routes, sum(each.get("Type") == "Custom" for each in entries))


def _route(table: str, document: dict[str, Any]) -> TableRoute | None:
    """None for what has no IPv4 destination."""
    try:
        destination = Subnet.parse(document.get("DestinationCidrBlock") or "")
    except BadAddress:
        return None
    if len(destination.address) != 4:
        return None
    custom = document.get("Type") == "Custom" and document.get("NextHopType") == "Instance"
    return TableRoute(
        table,
        destination,
        (document["InstanceId"],) if custom else (),
        "active" if document.get("Status", "Available") == "Available" else "pending",
        marked=str(document.get("RouteEntryName", "")).startswith(_PREFIX),
    )


def _now() -> float:
    return asyncio.get_running_loop().time()
