"""A fake of Alibaba Cloud's VPC API (version 2016-04-28) and of its metadata service: no emulator has route tables.

Written from the public API documentation: "Request signatures" of RPC-style APIs, DescribeVpcs, DescribeVRouters,
DescribeRouteTables, CreateRouteEntry, DeleteRouteEntry, ECS DescribeInstances, "Instance metadata". It checks what the real service checks: the
signature over all parameters, the clock, that no nonce comes twice, action and version, duplicates, the quota. As there, a
new entry is Pending for a while, and the VPC takes no other change until it is Available.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from support.fake_cloud import Answer, Call, FakeCloud, json_answer

REGION, VPC, ROUTER, TABLE = "cn-hangzhou", "vpc-bp15zckdt37pq72zv", "vrt-bp1lhl0taikrteen8", "vtb-bp145q7glnuzdvzu2"


class AliError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


def error_answer(status: int, code: str, message: str) -> Answer:
    """As the service answers a call that failed."""
    return json_answer(status, {"RequestId": "0ED8D006", "HostId": "vpc", "Code": code, "Message": message})


class FakeAli(FakeCloud):
    """One region with one VPC. instances: private addresses by instance id. denied: actions that the key may not call.

    settling: seconds that a change takes. hardened: whether the metadata service asks for a session token.
    """

    def __init__(
        self,
        *,
        key_id: str = "LTAIfake",
        key_secret: str = "ali-secret-key",
        quota: int = 48,
        settling: float = 0.1,
        hardened: bool = True,
    ) -> None:
        super().__init__()
        self.key_id, self.key_secret, self.quota = key_id, key_secret, quota
        self.settling, self.hardened = settling, hardened
        self.instances: dict[str, str] = {}
        self.denied: set[str] = set()
        self.entries: list[dict[str, Any]] = []
        self._due: list[tuple[float, dict[str, Any]]] = []
        self._nonces: set[str] = set()
        self.insert("10.99.0.0/24", "", Type="System", NextHopType="local")
        self.insert("100.64.0.0/10", "", Type="System", NextHopType="service")

    def add_instance(self, name: str, address: str) -> None:
        self.instances[name] = address
        self.addresses[address] = name

    def insert(self, destination: str, instance: str, **more: Any) -> dict[str, Any]:
        """Put an entry into the table as the console would."""
        entry = {
            "RouteTableId": TABLE,
            "DestinationCidrBlock": destination,
            "Type": "Custom",
            "NextHopType": "Instance",
            "InstanceId": instance,
            "Status": "Available",
            "RouteEntryName": "",
        } | more
        self.entries.append(entry)
        return entry

    def routes(self) -> dict[str, str]:
        """The custom entries that point to instances: instance by destination."""
        with self.lock:
            self._settle()
            return {
                entry["DestinationCidrBlock"]: entry["InstanceId"]
                for entry in self.entries
                if entry["Type"] == "Custom" and entry["NextHopType"] == "Instance"
            }

    def answer(self, call: Call) -> Answer:
        if call.path.startswith("/latest/"):
            return self._metadata(call)
        action = call.query.get("Action", "")
        try:
            with self.lock:
                self._settle()
                self._check(call)
                self.actions.append(action)
                fault = self.fault(action)
                if fault:
                    return fault
                if action in self.denied:
                    raise AliError(403, "Forbidden.RAM", "User not authorized to operate on the specified resource.")
                handler = {
                    "DescribeVpcs": self._vpcs,
                    "DescribeVRouters": self._routers,
                    "DescribeRouteTables": self._tables,
                    "CreateRouteEntry": self._create,
                    "DeleteRouteEntry": self._delete,
                    "DescribeInstances": self._instances,
                }.get(action)
                if handler is None:
                    raise AliError(404, "InvalidAction.NotFound", "Specified api is not found.")
                result = handler(call.query)
            self.after(action)
        except AliError as error:
            return error_answer(error.status, error.code, error.message)
        return json_answer(200, result | {"RequestId": "C1221A1F"})

    def _metadata(self, call: Call) -> Answer:
        if call.instance not in self.instances:
            return Answer(404, b"not found")
        if (call.method, call.path) == ("PUT", "/latest/api/token"):
            if not call.headers.get("x-aliyun-ecs-metadata-token-ttl-seconds", "").isdigit():
                return Answer(400, b"bad ttl")
            return Answer(200, f"token-of-{call.instance}".encode(), {"Content-Type": "text/plain"})
        if self.hardened and call.headers.get("x-aliyun-ecs-metadata-token") != f"token-of-{call.instance}":
            return Answer(403, b"Forbidden")
        items = {"region-id": REGION, "instance-id": call.instance, "vpc-id": VPC}
        text = items.get(call.path.removeprefix("/latest/meta-data/"))
        return Answer(404, b"not found") if text is None else Answer(200, text.encode(), {"Content-Type": "text/plain"})

    def _check(self, call: Call) -> None:
        """What every call is checked for before anything else."""
        given = dict(call.query)
        signature = given.pop("Signature", "")
        if given.get("AccessKeyId") != self.key_id:
            raise AliError(404, "InvalidAccessKeyId.NotFound", "Specified access key is not found.")
        version = "2014-05-26" if given.get("Action") == "DescribeInstances" else "2016-04-28"  # of ECS and of VPC
        wanted = {"SignatureMethod": "HMAC-SHA1", "SignatureVersion": "1.0", "Format": "JSON", "Version": version}
        for name, value in wanted.items():
            if given.get(name) != value:
                raise AliError(400, "InvalidParameter", f"The parameter {name} is not {value}.")
        try:
            stamp = datetime.strptime(given.get("Timestamp", ""), "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
        except ValueError:
            raise AliError(400, "InvalidTimeStamp.Format", "Specified time stamp is not well formatted.") from None
        if abs(time.time() - stamp.timestamp()) > 900:
            raise AliError(400, "InvalidTimeStamp.Expired", "Specified time stamp or date value is expired.")
        text = "&".join(f"{quote(name, safe='~')}={quote(value, safe='~')}" for name, value in sorted(given.items()))
        signed = f"{call.method}&%2F&{quote(text, safe='~')}"
        digest = hmac.new(f"{self.key_secret}&".encode(), signed.encode(), hashlib.sha1).digest()
        if base64.b64encode(digest).decode() != signature:
            raise AliError(400, "SignatureDoesNotMatch", "Specified signature is not matched with our calculation.")
        if given.get("SignatureNonce", "") in self._nonces or not given.get("SignatureNonce"):
            raise AliError(400, "SignatureNonceUsed", "Specified signature nonce was used already.")
        self._nonces.add(given["SignatureNonce"])
        if given.get("RegionId") != REGION:
            raise AliError(404, "InvalidRegionId.NotFound", "The specified RegionId does not exist.")

    def _vpcs(self, query: dict[str, str]) -> dict[str, Any]:
        found = [{"VpcId": VPC, "VRouterId": ROUTER, "Status": "Available", "CidrBlock": "10.99.0.0/24"}]
        found = found if query.get("VpcId", VPC) == VPC else []
        return {"Vpcs": {"Vpc": found}, "TotalCount": len(found), "PageNumber": 1, "PageSize": 10}

    def _routers(self, query: dict[str, str]) -> dict[str, Any]:
        found = [{"VRouterId": ROUTER, "VpcId": VPC, "RouteTableIds": {"RouteTableId": [TABLE]}}]
        found = found if query.get("VRouterId", ROUTER) == ROUTER else []
        return {"VRouters": {"VRouter": found}, "TotalCount": len(found), "PageNumber": 1, "PageSize": 10}

    def _tables(self, query: dict[str, str]) -> dict[str, Any]:
        if query.get("VRouterId", ROUTER) != ROUTER or query.get("RouteTableId", TABLE) != TABLE:
            return {"RouteTables": {"RouteTable": []}, "TotalCount": 0, "PageNumber": 1, "PageSize": 10}
        table = {
            "VRouterId": ROUTER,
            "RouteTableId": TABLE,
            "RouteTableType": "System",
            "RouteEntrys": {"RouteEntry": [dict(entry) for entry in self.entries]},
        }
        return {"RouteTables": {"RouteTable": [table]}, "TotalCount": 1, "PageNumber": 1, "PageSize": 10}

    def _create(self, query: dict[str, str]) -> dict[str, Any]:
        self._must_be_still(query)
        destination = query.get("DestinationCidrBlock", "")
        try:
            ipaddress.ip_network(destination)
        except ValueError:
            raise AliError(400, "InvalidCidrBlock.Malformed", "Specified CIDR block is not valid.") from None
        if query.get("NextHopType") != "Instance" or query.get("NextHopId") not in self.instances:
            raise AliError(404, "InvalidNextHopId.NotFound", "Specified next hop does not exist.")
        if any(entry["DestinationCidrBlock"] == destination for entry in self.entries):
            raise AliError(400, "RouterEntryConflict.Duplicated", f"A route entry already exists, CIDR {destination}.")
        if sum(entry["Type"] == "Custom" for entry in self.entries) >= self.quota:
            raise AliError(403, "QuotaExceeded", "Route entry quota exceeded in this route table.")
        name = query.get("RouteEntryName", "")
        entry = self.insert(destination, query["NextHopId"], Status="Pending", RouteEntryName=name)
        self._due.append((time.monotonic() + self.settling, entry))
        return {"RouteEntryId": "rte-bp1mnnr2al0naomnp"}

    def _delete(self, query: dict[str, str]) -> dict[str, Any]:
        self._must_be_still(query)
        for entry in self.entries:
            if (entry["DestinationCidrBlock"], entry["InstanceId"]) == (
                query.get("DestinationCidrBlock"),
                query.get("NextHopId"),
            ):
                if entry["Type"] != "Custom":
                    raise AliError(400, "OperationDenied", "Specified operation is denied as route entry is system.")
                entry["Status"] = "Modifying"
                self._due.append((time.monotonic() + self.settling, entry))
                return {}
        raise AliError(400, "InvalidRouteEntry.NotFound", "Route entry not exists.")

    def _instances(self, query: dict[str, str]) -> dict[str, Any]:
        addresses = json.loads(query["PrivateIpAddresses"])
        if len(addresses) > 100 or query.get("VpcId", VPC) != VPC:
            raise AliError(400, "InvalidParameter", "The specified parameter is not valid.")
        shown = [
            {"InstanceId": name, "VpcAttributes": {"VpcId": VPC, "PrivateIpAddress": {"IpAddress": [address]}}}
            for name, address in self.instances.items()
            if address in addresses
        ]
        return {"Instances": {"Instance": shown}, "TotalCount": len(shown), "PageNumber": 1, "PageSize": 100}

    def _must_be_still(self, query: dict[str, str]) -> None:
        if query.get("RouteTableId") != TABLE:
            raise AliError(404, "InvalidRouteTableId.NotFound", "Specified route table does not exist.")
        if self._due:
            raise AliError(400, "IncorrectRouteEntryStatus", "Some route entry status blocked this operation.")

    def _settle(self) -> None:
        """Finish the changes whose time has come."""
        now = time.monotonic()
        for due, entry in list(self._due):
            if due <= now:
                self._due.remove((due, entry))
                if entry["Status"] == "Modifying":
                    self.entries.remove(entry)
                else:
                    entry["Status"] = "Available"
