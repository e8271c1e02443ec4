"""A fake of Tencent Cloud's VPC API (version 2017-03-12) and of its metadata service: no emulator has route tables.

Written from the public API documentation: "Signature v3", DescribeRouteTables, CreateRoutes, DeleteRoutes, ReplaceRoutes, DescribeVpcLimits,
"Error codes", "Querying instance metadata". It checks what the real service checks: the signature over host, content type
and body, the clock, action, version and region, names and types of parameters, duplicates, the quota. Errors come with
status 200, as there.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import itertools
import json
import re
import time
from typing import Any

from support.fake_cloud import Answer, Call, FakeCloud, json_answer

REGION, VPC, TABLE, MAC = "ap-guangzhou", "vpc-f49l6u0z", "rtb-azd4dt1c", "52:54:00:12:34:{:02x}"
_ROUTE_KEYS = {
    *("RouteId", "RouteItemId", "DestinationCidrBlock", "DestinationIpv6CidrBlock", "GatewayType", "GatewayId"),
    *("RouteDescription", "Enabled", "RouteType", "RouteTableId", "PublishedToVbc", "CreatedTime"),
}


class TencentError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def error_answer(code: str, message: str) -> Answer:
    """As the service answers a call that failed."""
    return json_answer(200, {"Response": {"Error": {"Code": code, "Message": message}, "RequestId": "3f934a21"}})


class FakeTencent(FakeCloud):
    """One region with one VPC. instances: private addresses by instance id. denied: actions that the key may not call."""

    def __init__(self, *, secret_id: str = "AKIDfake", secret_key: str = "tencent-secret-key", quota: int = 50) -> None:
        super().__init__()
        self.secret_id, self.secret_key, self.quota = secret_id, secret_key, quota
        self.instances: dict[str, str] = {}
        self.denied: set[str] = set()
        self.tables: dict[str, list[dict[str, Any]]] = {TABLE: []}
        self._ids = itertools.count(17000)
        self.insert(TABLE, "10.99.0.0/24", "LOCAL", "", RouteType="NETD")

    def add_instance(self, name: str, address: str) -> None:
        self.instances[name] = address
        self.addresses[address] = name

    def insert(self, table: str, destination: str, kind: str, gateway: str, **more: Any) -> dict[str, Any]:
        """Put a route into a table as the console would."""
        route = {
            "RouteId": next(self._ids),
            "DestinationCidrBlock": destination,
            "GatewayType": kind,
            "GatewayId": gateway,
            "RouteDescription": "",
            "Enabled": True,
            "RouteType": "USER",
            "RouteTableId": table,
        } | more
        self.tables[table].append(route)
        return route

    def routes(self, table: str = TABLE) -> dict[str, str]:
        """The enabled user routes to instances of a table: next hop by destination."""
        with self.lock:
            return {
                route["DestinationCidrBlock"]: route["GatewayId"]
                for route in self.tables[table]
                if route["RouteType"] == "USER" and route["GatewayType"] == "NORMAL_CVM" and route["Enabled"]
            }

    def answer(self, call: Call) -> Answer:
        if call.method == "GET":
            return self._metadata(call)
        action = call.headers.get("x-tc-action", "")
        try:
            with self.lock:
                self._check(call)
                self.actions.append(action)
                fault = self.fault(action)
                if fault:
                    return fault
                if action in self.denied:
                    raise TencentError(
                        "AuthFailure.UnauthorizedOperation",
                        f"You are not authorized to perform operation (vpc:{action}).",
                    )
                handler = {
                    "DescribeRouteTables": self._describe,
                    "CreateRoutes": self._create,
                    "DeleteRoutes": self._delete,
                    "ReplaceRoutes": self._replace,
                    "DescribeVpcLimits": self._limits,
                }.get(action)
                if handler is None:
                    raise TencentError("InvalidAction", f"The action {action} does not exist.")
                result = handler(call.json())
            self.after(action)
        except TencentError as error:
            return error_answer(error.code, error.message)
        return json_answer(200, {"Response": result | {"RequestId": "f2b5ff87"}})

    def _metadata(self, call: Call) -> Answer:
        if call.instance not in self.instances:
            return Answer(404, b"not found")
        mac = MAC.format(list(self.instances).index(call.instance))
        items = {
            "instance-id": call.instance,
            "local-ipv4": self.instances[call.instance],
            "mac": mac,
            "placement/region": REGION,
            f"network/interfaces/macs/{mac}/vpc-id": VPC,
        }
        text = items.get(call.path.removeprefix("/latest/meta-data/"))
        return Answer(404, b"not found") if text is None else Answer(200, text.encode(), {"Content-Type": "text/plain"})

    def _check(self, call: Call) -> None:
        """What every call is checked for before anything else."""
        found = re.fullmatch(
            r"TC3-HMAC-SHA256 Credential=([^/]+)/([\d-]+)/vpc/tc3_request, SignedHeaders=([^,]+), Signature=([0-9a-f]{64})",
            call.headers.get("authorization", ""),
        )
        if not found:
            raise TencentError("AuthFailure.InvalidAuthorization", "Authorization is not as the documentation says.")
        secret_id, day, signed, signature = found.groups()
        if secret_id != self.secret_id:
            raise TencentError("AuthFailure.SecretIdNotFound", "The SecretId is not found.")
        stamp = int(call.headers.get("x-tc-timestamp", "0"))
        if abs(time.time() - stamp) > 300 or time.strftime("%Y-%m-%d", time.gmtime(stamp)) != day:
            raise TencentError("AuthFailure.SignatureExpire", "The signature has expired.")
        if not {"host", "content-type"} <= set(signed.split(";")):
            raise TencentError("AuthFailure.SignatureFailure", "host and content-type must be signed.")
        canonical = "".join(f"{name}:{call.headers[name].lower()}\n" for name in signed.split(";"))
        digest = hashlib.sha256(call.body).hexdigest()
        request = hashlib.sha256(f"POST\n/\n\n{canonical}\n{signed}\n{digest}".encode()).hexdigest()
        key = b"TC3" + self.secret_key.encode()
        for part in (day, "vpc", "tc3_request"):
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        text = f"TC3-HMAC-SHA256\n{stamp}\n{day}/vpc/tc3_request\n{request}"
        if not hmac.compare_digest(hmac.new(key, text.encode(), hashlib.sha256).hexdigest(), signature):
            raise TencentError("AuthFailure.SignatureFailure", "The provided credentials could not be validated.")
        if call.headers.get("x-tc-version") != "2017-03-12":
            raise TencentError("NoSuchVersion", "The API version does not exist.")
        if call.headers.get("x-tc-region") != REGION:
            raise TencentError("UnsupportedRegion", "The region is not supported.")
        if call.method != "POST" or not call.headers.get("content-type", "").startswith("application/json"):
            raise TencentError("UnsupportedProtocol", "The request is neither POST nor JSON.")

    def _describe(self, body: dict[str, Any]) -> dict[str, Any]:
        _known(body, {"Filters", "RouteTableIds", "Offset", "Limit"})
        if "Filters" in body and "RouteTableIds" in body:
            raise TencentError("InvalidParameter.Coexist", "RouteTableIds and Filters can't be given together.")
        names = list(self.tables)
        for each in body.get("Filters", []):
            if each["Name"] == "vpc-id":
                names = names if VPC in each["Values"] else []
            elif each["Name"] != "association.main":
                raise TencentError("InvalidParameter.InvalidFilter", f"{each['Name']} is no filter here.")
        if "RouteTableIds" in body:
            names = [name for name in names if name in body["RouteTableIds"]]
        offset, limit = body.get("Offset", "0"), body.get("Limit", "20")
        if not isinstance(offset, str) or not isinstance(limit, str):
            raise TencentError("InvalidParameter", "Offset and Limit are strings.")
        shown = names[int(offset) : int(offset) + int(limit)]
        return {"TotalCount": len(names), "RouteTableSet": [self._table(name) for name in shown]}

    def _create(self, body: dict[str, Any]) -> dict[str, Any]:
        table, routes = self._target(body)
        there = {route["DestinationCidrBlock"] for route in table if route["Enabled"]}
        for route in routes:
            destination = route.get("DestinationCidrBlock", "")
            try:
                ipaddress.ip_network(destination)
            except ValueError:
                raise TencentError("InvalidParameterValue.Malformed", f"{destination} is no CIDR block.") from None
            if destination in there:
                raise TencentError("InvalidParameterValue.Duplicate", f"The route {destination} exists already.")
            if route.get("GatewayType") != "NORMAL_CVM" or route.get("GatewayId") not in self.instances.values():
                raise TencentError("InvalidParameterValue.RouteNextHopInvalid", "There is no such next hop.")
            there.add(destination)
        if sum(route["RouteType"] == "USER" for route in table) + len(routes) > self.quota:
            raise TencentError("LimitExceeded", f"The number of routes exceeds the limit {self.quota}.")
        for route in routes:
            self.insert(
                body["RouteTableId"],
                route["DestinationCidrBlock"],
                route["GatewayType"],
                route["GatewayId"],
                RouteDescription=route.get("RouteDescription", ""),
            )
        return {"TotalCount": len(routes), "RouteTableSet": [self._table(body["RouteTableId"])]}

    def _delete(self, body: dict[str, Any]) -> dict[str, Any]:
        table, routes = self._target(body)
        gone = [self._find(table, route) for route in routes]
        for route in gone:
            table.remove(route)
        return {"RouteSet": gone}

    def _replace(self, body: dict[str, Any]) -> dict[str, Any]:
        table, routes = self._target(body)
        found = [(self._find(table, route), route) for route in routes]
        old = [dict(there) for there, _ in found]
        for there, wanted in found:
            if wanted.get("GatewayType") != "NORMAL_CVM" or wanted.get("GatewayId") not in self.instances.values():
                raise TencentError("InvalidParameterValue.RouteNextHopInvalid", "There is no such next hop.")
            there.update(wanted)
        return {"OldRouteSet": old, "NewRouteSet": [there for there, _ in found]}

    def _limits(self, body: dict[str, Any]) -> dict[str, Any]:
        _known(body, {"LimitTypes"})
        known = {"route-table-max-policies": self.quota, "vpc-max-subnets": 100}
        return {"VpcLimitSet": [{"LimitType": name, "LimitValue": known[name]} for name in body["LimitTypes"]]}

    def _target(self, body: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        _known(body, {"RouteTableId", "Routes"})
        if body["RouteTableId"] not in self.tables:
            raise TencentError("ResourceNotFound", f"The route table {body['RouteTableId']} does not exist.")
        for route in body["Routes"]:
            _known(route, _ROUTE_KEYS)
        return self.tables[body["RouteTableId"]], body["Routes"]

    def _find(self, table: list[dict[str, Any]], route: dict[str, Any]) -> dict[str, Any]:
        for there in table:
            if there["RouteId"] == route.get("RouteId"):
                if there["RouteType"] != "USER":
                    raise TencentError("UnsupportedOperation.SystemRoute", "A system route can't be changed.")
                return there
        raise TencentError("ResourceNotFound", f"The route {route.get('RouteId')} does not exist.")

    def _table(self, name: str) -> dict[str, Any]:
        return {
            "VpcId": VPC,
            "RouteTableId": name,
            "RouteTableName": name,
            "Main": name == TABLE,
            "AssociationSet": [],
            "RouteSet": json.loads(json.dumps(self.tables[name])),
            "CreatedTime": "2020-09-22 00:00:00",
        }


def _known(given: dict[str, Any], known: set[str]) -> None:
    for name in given:
        if name not in known:
            raise TencentError("UnknownParameter", f"The parameter {name} is not recognized.")
