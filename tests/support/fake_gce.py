"""A fake of the Compute Engine API (v1) and of its metadata server: no emulator has routes.

Written from the public reference: routes insert, get, list, delete; globalOperations get; instances get, aggregatedList; projects get;
"Error messages"; "VM metadata". It checks what the real service checks: the metadata header, the bearer token and its scope,
permissions, names and URLs, duplicates, quotas. As there, a change is an operation that takes its time, and a route neither
appears nor goes before the operation is done.
"""

from __future__ import annotations

import ipaddress
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.fake_cloud import Answer, Call, FakeCloud, json_answer

PROJECT, NUMBER, ZONE, NETWORK = "bright-cloud-17", "415104041262", "europe-west1-b", "default"
_API = "https://www.googleapis.com/compute/v1"
_ROUTE_KEYS = {"name", "description", "network", "tags", "destRange", "priority", "nextHopInstance", "nextHopIp"}


@dataclass
class Instance:
    address: str
    can_ip_forward: bool = True
    network: str = NETWORK


@dataclass
class Operation:
    name: str
    kind: str
    target: str
    due: float
    finish: Callable[[], dict[str, Any] | None]
    error: dict[str, Any] | None = None
    done: bool = False
    document: dict[str, Any] = field(default_factory=dict)


class GceError(Exception):
    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


def error_answer(status: int, reason: str, message: str) -> Answer:
    """As the service answers a call that failed."""
    detail = {"message": message, "domain": "global", "reason": reason}
    return json_answer(status, {"error": {"code": status, "message": message, "errors": [detail]}})


class FakeGce(FakeCloud):
    """One project, one zone, one VPC network.

    instances: by name. denied: IAM permissions that the service account lacks. scopes: its instance's. quota: routes that
    the project may have; late_quota: told by the operation and not by the call. operation_time: seconds a change takes.
    """

    def __init__(self, *, quota: int = 100, operation_time: float = 0.1) -> None:
        super().__init__()
        self.quota, self.operation_time, self.late_quota = quota, operation_time, False
        self.instances: dict[str, Instance] = {}
        self.denied: set[str] = set()
        self.scopes = ["https://www.googleapis.com/auth/compute"]
        self.table: dict[str, dict[str, Any]] = {}
        self.tokens: set[str] = set()
        self.operations: dict[str, Operation] = {}
        self._ids = itertools.count(1)
        self.insert(
            "default-route-1", "0.0.0.0/0", nextHopGateway=f"{_API}/projects/{PROJECT}/global/gateways/internet"
        )
        self.insert("default-route-2", "10.99.0.0/24", nextHopNetwork=network_url())

    def add_instance(self, name: str, address: str, *, can_ip_forward: bool = True) -> None:
        self.instances[name] = Instance(address, can_ip_forward)
        self.addresses[address] = name

    def insert(self, name: str, destination: str, **more: Any) -> dict[str, Any]:
        """Put a route there as the console would."""
        self.table[name] = {
            "kind": "compute#route",
            "id": str(next(self._ids)),
            "name": name,
            "destRange": destination,
            "network": network_url(),
            "priority": 1000,
            "selfLink": f"{_API}/projects/{PROJECT}/global/routes/{name}",
        } | more
        return self.table[name]

    def routes(self) -> dict[str, str]:
        """The routes to instances: instance by destination."""
        with self.lock:
            self._settle()
            return {
                route["destRange"]: route["nextHopInstance"].rpartition("/")[2]
                for route in self.table.values()
                if "nextHopInstance" in route
            }

    def answer(self, call: Call) -> Answer:
        if call.path.startswith("/computeMetadata/"):
            return self._metadata(call)
        try:
            with self.lock:
                self._settle()
                self._authenticate(call)
                for action, method, pattern, handler in self._calls():  # noqa: B007  # used after the break
                    found = re.fullmatch(f"/compute/v1/projects/{PROJECT}/?{pattern}", call.path)
                    if found and call.method == method:
                        break
                else:
                    raise GceError(404, "notFound", f"The resource {call.path} was not found")
                self.actions.append(action)
                fault = self.fault(action)
                if fault:
                    return fault
                permission = f"compute.{action}"
                if permission in self.denied:
                    raise GceError(403, "forbidden", f"Required '{permission}' permission for '{call.path[12:]}'")
                document = handler(call, *found.groups())
            self.after(action)
        except GceError as error:
            return error_answer(error.status, error.reason, error.message)
        return json_answer(200, document)

    def _calls(self) -> list[tuple[str, str, str, Callable[..., dict[str, Any]]]]:
        return [
            ("routes.create", "POST", "global/routes", self._create),
            ("routes.list", "GET", "global/routes", self._list),
            ("routes.get", "GET", "global/routes/([^/]+)", self._get),
            ("routes.delete", "DELETE", "global/routes/([^/]+)", self._delete),
            ("globalOperations.get", "GET", "global/operations/([^/]+)", self._operation),
            ("instances.get", "GET", f"zones/{ZONE}/instances/([^/]+)", self._instance),
            ("instances.list", "GET", "aggregated/instances", self._instances),
            ("projects.get", "GET", "", self._project),
        ]

    def _metadata(self, call: Call) -> Answer:
        if call.headers.get("metadata-flavor") != "Google" or "x-forwarded-for" in call.headers:
            return Answer(403, b"Missing Metadata-Flavor:Google header.")
        if call.instance not in self.instances:
            return Answer(404, b"")
        instance = self.instances[call.instance]
        text = {"Metadata-Flavor": "Google", "Content-Type": "application/text"}
        interface = {"ip": instance.address, "network": f"projects/{NUMBER}/networks/{instance.network}", "mtu": 1460}
        items: dict[str, Answer] = {
            "project/project-id": Answer(200, PROJECT.encode(), text),
            "instance/name": Answer(200, call.instance.encode(), text),
            "instance/zone": Answer(200, f"projects/{NUMBER}/zones/{ZONE}".encode(), text),
            "instance/service-accounts/default/scopes": Answer(200, "\n".join(self.scopes).encode(), text),
        }
        path = call.path.removeprefix("/computeMetadata/v1/")
        if path == "instance/network-interfaces/" and call.query.get("recursive") == "true":
            return json_answer(200, [interface], **{"Metadata-Flavor": "Google"})
        if path == "instance/service-accounts/default/token":
            with self.lock:
                token = f"ya29.{len(self.tokens)}-{next(self._ids)}"
                self.tokens.add(token)
            document = {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}
            return json_answer(200, document, **{"Metadata-Flavor": "Google"})
        return items.get(path, Answer(404, b""))

    def _authenticate(self, call: Call) -> None:
        kind, _, token = call.headers.get("authorization", "").partition(" ")
        if kind != "Bearer" or token not in self.tokens:
            raise GceError(401, "authError", "Request had invalid authentication credentials.")
        if not any(scope.endswith(("/auth/compute", "/auth/cloud-platform")) for scope in self.scopes):
            raise GceError(403, "insufficientPermissions", "Request had insufficient authentication scopes.")

    def _create(self, call: Call) -> dict[str, Any]:
        if call.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise GceError(400, "parseError", "This API does not support parsing form-encoded input.")
        route = call.json()
        for name in route:
            if name not in _ROUTE_KEYS:
                raise GceError(400, "invalid", f'Invalid JSON payload received. Unknown name "{name}"')
        self._check_route(route)
        name = route["name"]
        if name in self.table or any(op.target == name and not op.done for op in self.operations.values()):
            raise GceError(
                409, "alreadyExists", f"The resource 'projects/{PROJECT}/global/routes/{name}' already exists"
            )
        full = f"Quota 'ROUTES' exceeded.  Limit: {self.quota}.0 globally."
        if len(self.table) >= self.quota and not self.late_quota:
            raise GceError(403, "quotaExceeded", full)

        def finish() -> dict[str, Any] | None:
            if len(self.table) >= self.quota:
                return {"code": "QUOTA_EXCEEDED", "message": full}
            self.insert(
                name, route["destRange"], **{key: route[key] for key in route if key not in {"name", "destRange"}}
            )
            return None

        return self._start("insert", name, finish)

    def _check_route(self, route: dict[str, Any]) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", route.get("name", "")):
            raise GceError(400, "invalid", f"Invalid value for field 'resource.name': '{route.get('name')}'.")
        try:
            ipaddress.ip_network(route.get("destRange", ""))
        except ValueError:
            raise GceError(400, "invalid", "Invalid value for field 'resource.destRange'.") from None
        if route.get("network", "").partition("/projects/")[2] != f"{PROJECT}/global/networks/{NETWORK}":
            raise GceError(400, "invalid", f"Invalid value for field 'resource.network': '{route.get('network')}'.")
        if not isinstance(route.get("priority", 1000), int):
            raise GceError(400, "invalid", "Invalid value for field 'resource.priority'.")
        place, _, instance = route.get("nextHopInstance", "").partition("/projects/")[2].rpartition("/")
        if place != f"{PROJECT}/zones/{ZONE}/instances" or instance not in self.instances:
            raise GceError(400, "invalid", "Invalid value for field 'resource.nextHopInstance'.")

    def _list(self, call: Call) -> dict[str, Any]:
        size = int(call.query.get("maxResults", "500"))
        if not 0 <= size <= 500:
            raise GceError(400, "invalid", "Invalid value for field 'maxResults'.")
        start = int(call.query.get("pageToken", "0"))
        names = sorted(self.table)
        page = {"kind": "compute#routeList", "items": [self._get(call, name) for name in names[start : start + size]]}
        return page | ({"nextPageToken": str(start + size)} if start + size < len(names) else {})

    def _get(self, call: Call, name: str) -> dict[str, Any]:
        if name not in self.table:
            raise GceError(404, "notFound", f"The resource 'projects/{PROJECT}/global/routes/{name}' was not found")
        route = dict(self.table[name])
        if "nextHopInstance" in route and route["nextHopInstance"].rpartition("/")[2] not in self.instances:
            message = f"Next hop instance {route['nextHopInstance']!r} does not exist."
            route["warnings"] = [{"code": "NEXT_HOP_INSTANCE_NOT_FOUND", "message": message}]
        return route

    def _delete(self, call: Call, name: str) -> dict[str, Any]:
        self._get(call, name)
        return self._start("delete", name, lambda: self.table.pop(name, {}) and None)

    def _operation(self, call: Call, name: str) -> dict[str, Any]:
        operation = self.operations.get(name)
        if operation is None:
            raise GceError(404, "notFound", f"The resource 'projects/{PROJECT}/global/operations/{name}' was not found")
        return self._shown(operation)

    def _instance(self, call: Call, name: str) -> dict[str, Any]:
        if name not in self.instances:
            raise GceError(404, "notFound", f"The resource '{call.path[12:]}' was not found")
        return self._shown_instance(name)

    def _instances(self, call: Call) -> dict[str, Any]:
        shown = [self._shown_instance(name) for name in sorted(self.instances)]
        empty = {"warning": {"code": "NO_RESULTS_ON_PAGE", "message": "There are no results for scope on this page."}}
        return {
            "kind": "compute#instanceAggregatedList",
            "items": {f"zones/{ZONE}": {"instances": shown}, "zones/us-east1-b": empty},
        }

    def _shown_instance(self, name: str) -> dict[str, Any]:
        instance = self.instances[name]
        network = network_url().removesuffix(NETWORK) + instance.network
        return {
            "kind": "compute#instance",
            "name": name,
            "status": "RUNNING",
            "canIpForward": instance.can_ip_forward,
            "networkInterfaces": [{"name": "nic0", "network": network, "networkIP": instance.address}],
        }

    def _project(self, call: Call) -> dict[str, Any]:
        quotas = [
            {"metric": "SNAPSHOTS", "limit": 1000.0, "usage": 1.0},
            {"metric": "ROUTES", "limit": float(self.quota), "usage": float(len(self.table))},
        ]
        return {"kind": "compute#project", "name": PROJECT, "quotas": quotas}

    def _start(self, kind: str, target: str, finish: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        name = f"operation-1553-{next(self._ids)}"
        operation = Operation(name, kind, target, time.monotonic() + self.operation_time, finish)
        self.operations[name] = operation
        return self._shown(operation)

    def _shown(self, operation: Operation) -> dict[str, Any]:
        shown = {
            "kind": "compute#operation",
            "name": operation.name,
            "operationType": operation.kind,
            "targetLink": f"{_API}/projects/{PROJECT}/global/routes/{operation.target}",
            "status": "DONE" if operation.done else "RUNNING",
            "progress": 100 if operation.done else 0,
            "selfLink": f"{_API}/projects/{PROJECT}/global/operations/{operation.name}",
        }
        if operation.error:
            failed = {"error": {"errors": [operation.error]}, "httpErrorStatusCode": 403}
            return shown | failed | {"httpErrorMessage": "FORBIDDEN"}
        return shown

    def _settle(self) -> None:
        """Finish the operations whose time has come."""
        now = time.monotonic()
        for operation in self.operations.values():
            if not operation.done and operation.due <= now:
                operation.error, operation.done = operation.finish(), True


def network_url() -> str:
    return f"{_API}/projects/{PROJECT}/global/networks/{NETWORK}"
