"""The dialect of AWS's route tables (compatibility reference, section 6.7): EC2's API by boto3, in threads.

boto3 finds credentials and endpoints in its usual ways (environment, files, the instance's role; AWS_ENDPOINT_URL). It costs
a daemon about 50 MB of memory and 0.4 s of its start, so it is imported when the backend is used, and an extra of the package.

Routes lead to network interfaces. A listing names the interface, and its instance where there is one. What is no host (an
internet, NAT or transit gateway, a peering, a prefix list) has no such names. Routes that a virtual private gateway propagates
can't be changed, and are taken for what is no host too.

Permissions: ec2:DescribeInstances, DescribeRouteTables, CreateRoute, ReplaceRoute, DeleteRoute,
ModifyNetworkInterfaceAttribute; and, to see the quota before it is hit, servicequotas:GetServiceQuota.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from wincey.cloud.errors import CloudConflict, CloudDenied, CloudError, CloudNotInstalled
from wincey.cloud.table import CloudHost, Hosts, Step, Table, TableRoute
from wincey.model.address import Subnet, format_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import BadAddress

log = logging.getLogger(__name__)

_FILTER = 200  # values that a filter may have
_USUAL_QUOTA = 50
_QUOTA = {"ServiceCode": "vpc", "QuotaCode": "L-93826ACB"}
"""Routes per route table: https://docs.aws.amazon.com/vpc/latest/userguide/amazon-vpc-limits.html"""
_QUOTA_AGAIN = 3600.0  # seconds

_Json: TypeAlias = Mapping[str, Any]  # boto3's answers have no types


class AwsDialect:
    """See wincey.cloud.table.Dialect. `settings` of the table: `region`, where boto3 is not to find it."""

    provider: ClassVar[str] = "aws-vpc"

    def __init__(self, table: CloudTable) -> None:
        self._table = table
        self._clients: tuple[Any, Any] | None = None  # of EC2, and of Service Quotas
        self._vpc = ""
        self._limit: int | None = None
        self._limit_asked: float | None = None

    async def hosts(self, wanted: Sequence[HostRef]) -> Hosts:
        """By instance id where the lease names one, else by private, then by public address."""
        if self._table.tables and not self._vpc:
            await self.tables({})
        instances = await self._instances("instance-id", {ref.instance for ref in wanted if ref.instance})
        found = {ref: host for ref in wanted if ref.instance for host in self._matching(instances, ref)}
        for kind in ("private-ip-address", "ip-address"):
            missing = {ref for ref in wanted if not ref.instance and ref.address and ref not in found}
            instances = await self._instances(kind, {format_address(ref.address) for ref in missing if ref.address})
            for ref in missing:
                hosts = self._matching(instances, ref)
                if len({host.next_hop for host in hosts}) > 1:
                    log.warning(
                        "aws-vpc: %s is the address of several instances of this region; name RouteTableID in the network"
                        " config, which tells the VPC",
                        ref,
                    )
                elif hosts:
                    found[ref] = hosts[0]
        return found

    async def tables(self, hosts: Hosts) -> Sequence[Table]:
        """Those of RouteTableID; else those that the hosts' subnets are associated with, or the main one of their VPC."""
        if self._table.tables:
            names = list(self._table.tables)
            listed = await self._describe_tables(f"route table {', '.join(names)}", RouteTableIds=names)
            self._vpc = listed[0]["VpcId"] if listed else ""
        else:
            listed = await self._tables_of({host.place for host in hosts.values()})
        limit = await self._quota()
        return [_read_table(table, limit) for table in listed]

    async def put(self, step: Step) -> None:
        """CreateRoute, or ReplaceRoute, which leaves no moment without a route."""
        replaces = step.old is not None
        await self._call(
            "replace_route" if replaces else "create_route",
            "ec2:ReplaceRoute" if replaces else "ec2:CreateRoute",
            f"route table {step.table}",
            RouteTableId=step.table,
            DestinationCidrBlock=str(step.destination),
            NetworkInterfaceId=step.host.next_hop[0],
        )

    async def delete(self, route: TableRoute) -> None:
        """DeleteRoute, by destination: EC2 knows no condition."""
        try:
            await self._call(
                "delete_route",
                "ec2:DeleteRoute",
                f"route table {route.table}",
                RouteTableId=route.table,
                DestinationCidrBlock=str(route.destination),
            )
        except CloudConflict:
            log.debug("%s is gone", route)

    async def allow_forwarding(self, host: CloudHost) -> None:
        """Switch the source/destination check off."""
        await self._call(
            "modify_network_interface_attribute",
            "ec2:ModifyNetworkInterfaceAttribute",
            f"network interface {host.next_hop[0]} (its source/destination check is on, and drops what containers send)",
            NetworkInterfaceId=host.next_hop[0],
            SourceDestCheck={"Value": False},
        )

    async def close(self) -> None:
        """End connections."""
        for client in self._clients or ():
            client.close()

    async def _instances(self, kind: str, values: set[str]) -> list[_Json]:
        """Instances by a filter: unlike a list of ids it does not fail as a whole for one that is gone."""
        found: list[_Json] = []
        for some in _chunks(sorted(values)):
            filters = [{"Name": kind, "Values": some}]
            token: dict[str, str] = {}
            while True:
                answer = await self._call("describe_instances", "ec2:DescribeInstances", "*", Filters=filters, **token)
                found += [each for reservation in answer["Reservations"] for each in reservation["Instances"]]
                if not answer.get("NextToken"):
                    break
                token = {"NextToken": answer["NextToken"]}
        return found

    def _matching(self, instances: Iterable[_Json], ref: HostRef) -> list[CloudHost]:
        """The interfaces among those of some instances that have the host's address."""
        address = format_address(ref.address) if ref.address else ""
        return [
            CloudHost(
                (interface["NetworkInterfaceId"], instance["InstanceId"]),
                forwards=not interface["SourceDestCheck"],
                place=(interface["SubnetId"], interface["VpcId"]),
            )
            for instance in instances
            if ref.instance in {"", instance["InstanceId"]}
            for interface in instance.get("NetworkInterfaces", ())
            if self._vpc in {"", interface["VpcId"]} and address in _addresses(interface)
        ]

    async def _tables_of(self, places: set[tuple[str, ...]]) -> list[_Json]:
        listed: dict[str, _Json] = {}
        associated: set[str] = set()
        for some in _chunks(sorted({subnet for subnet, _ in places})):
            for table in await self._describe_tables("*", Filters=[{"Name": "association.subnet-id", "Values": some}]):
                listed[table["RouteTableId"]] = table
                associated |= {each.get("SubnetId", "") for each in table["Associations"]}
        for some in _chunks(sorted({vpc for subnet, vpc in places if subnet not in associated})):
            filters = [{"Name": "association.main", "Values": ["true"]}, {"Name": "vpc-id", "Values": some}]
            for table in await self._describe_tables("*", Filters=filters):
                listed[table["RouteTableId"]] = table
        return list(listed.values())

    async def _describe_tables(self, what: str, **arguments: object) -> list[_Json]:
        answer = await self._call("describe_route_tables", "ec2:DescribeRouteTables", what, **arguments)
        listed: list[_Json] = list(answer["RouteTables"])
        while answer.get("NextToken"):
            more = {**arguments, "NextToken": answer["NextToken"]}
            answer = await self._call("describe_route_tables", "ec2:DescribeRouteTables", what, **more)
            listed += answer["RouteTables"]
        return listed

    async def _quota(self) -> int | None:
        """Routes that a table may hold, None where we may not see it."""
        now = time.monotonic()
        if self._limit_asked is None or now - self._limit_asked > _QUOTA_AGAIN:
            self._limit_asked = now
            try:
                answer = await self._call("get_service_quota", "servicequotas:GetServiceQuota", "*", **_QUOTA)
                self._limit = int(answer["Quota"]["Value"])
            except CloudDenied as error:
                log.info("%s; until then the quota of the route table is not known", error)
            except CloudError as error:
                log.debug("%s", error)
        return self._limit

    async def _call(self, name: str, action: str, what: str, **arguments: object) -> _Json:
        """One call; a name and the permission that it takes."""
        if self._clients is None:
            try:
                self._clients = await asyncio.to_thread(_open, dict(self._table.settings).get("region"))
            except ImportError:
                raise CloudNotInstalled(
                    "the backend aws-vpc needs boto3, which is not installed: pip install 'wincey[aws]'"
                ) from None
            except Exception as error:
                raise _translated(error, action, what) from None
        ec2, quotas = self._clients
        try:
            client = quotas if action.startswith("servicequotas:") else ec2
            answer: _Json = await asyncio.to_thread(getattr(client, name), **arguments)
        except Exception as error:  # botocore's kinds are many, and translated; others come out with what they say
            raise _translated(error, action, what) from None
        return answer


def _open(region: str | None) -> tuple[Any, Any]:
    import boto3  # type: ignore[import-untyped]  # noqa: PLC0415  # an extra, and large; it has no types
    from botocore.config import Config  # type: ignore[import-untyped]  # noqa: PLC0415  # likewise

    # The driver waits and tries again; it has its own deadline.
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=4, read_timeout=10)
    session = boto3.session.Session(region_name=region)
    return session.client("ec2", config=config), session.client("service-quotas", config=config)


def _translated(error: Exception, action: str, what: str) -> CloudError:
    from wincey.cloud.aws_errors import translate  # noqa: PLC0415  # needs botocore

    return translate(error, action, what)


def _chunks(values: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(values), _FILTER):
        yield list(values[start : start + _FILTER])


def _addresses(interface: _Json) -> set[str]:
    own = interface.get("PrivateIpAddresses", ())
    return {
        *(each.get("PrivateIpAddress", "") for each in own),
        *(each.get("Association", {}).get("PublicIp", "") for each in own),
    }


def _read_table(table: _Json, limit: int | None) -> Table:
    routes = []
    used: dict[bool, int] = defaultdict(int)
    for route in table["Routes"]:
        propagated = route.get("Origin") == "EnableVgwRoutePropagation"
        if "DestinationIpv6CidrBlock" not in route:  # those have a quota of their own
            used[propagated] += 1
        try:
            destination = Subnet.parse(route.get("DestinationCidrBlock", ""))
        except BadAddress:
            continue
        names = () if propagated else (route.get("NetworkInterfaceId"), route.get("InstanceId"))
        routes.append(
            TableRoute(
                table["RouteTableId"],
                destination,
                tuple(name for name in names if name),
                "blackhole" if route.get("State") == "blackhole" else "active",
            )
        )
    return Table(table["RouteTableId"], tuple(routes), used[False], limit, _USUAL_QUOTA)
