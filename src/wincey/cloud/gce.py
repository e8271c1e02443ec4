"""Google Compute Engine: static routes of a VPC network, by REST v1 (compatibility reference, section 6.8).

A network has one table for all its instances. Routes are named as flannel's (`flannel-10-5-34-0-24`), so those of a cluster
that changes over are known as what they are. What names them is not their destination: there may be several to one
destination, and the lowest priority number wins. Those which lose against ours (priority above 1000), or are for some
instances only (tags), are none of our business and are not listed.

A change is an operation that takes seconds. It is awaited for as long as a call may take; a route that is still being made
then is listed as pending, which is the one thing that is remembered here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn
from urllib.parse import urlencode

import msgspec

from wincey.cloud.errors import (
    CloudConflict,
    CloudDenied,
    CloudError,
    CloudFull,
    CloudThrottled,
    CloudUnavailable,
)
from wincey.cloud.gce_token import CLOUD, Tokens, metadata
from wincey.cloud.rest import Rest
from wincey.cloud.table import CloudHost, Hosts, Step, Table, TableRoute
from wincey.model.address import Subnet, format_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import UNREADABLE, BadAddress, NotJoinable

ENDPOINT = "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE"
"""What gcloud calls it."""

PRIORITY = 1000
_PREFIX = "flannel-"
_NAMES = "https://www.googleapis.com/compute/v1"  # how resources are named, whatever host the API is reached at
_PAGE = 500
_PATIENCE = 10.0  # seconds for the operations of one call
_POLL_FIRST, _POLL_MOST = 0.1, 2.0

_REASONS: dict[str, type[CloudError]] = {
    "rateLimitExceeded": CloudThrottled,
    "userRateLimitExceeded": CloudThrottled,
    "quotaExceeded": CloudFull,
    "limitExceeded": CloudFull,
    "QUOTA_EXCEEDED": CloudFull,
    "LIMIT_EXCEEDED": CloudFull,
    "RATE_LIMIT_EXCEEDED": CloudThrottled,
    "alreadyExists": CloudConflict,
    "RESOURCE_ALREADY_EXISTS": CloudConflict,
    "resourceNotReady": CloudConflict,
    "RESOURCE_NOT_READY": CloudConflict,
    "notFound": CloudConflict,
    "RESOURCE_NOT_FOUND": CloudConflict,
}
_STATUSES: dict[int, type[CloudError]] = {401: CloudDenied, 403: CloudDenied, 409: CloudConflict, 429: CloudThrottled}


async def ask_host(own: str) -> dict[str, str]:
    """What only the instance can tell: `project`, `network`, and `instance` (zone/name). own: an address of this host's,
    for the interface with it; one that none has means the first interface. Raises NotJoinable."""
    async with metadata() as server:
        items = "/computeMetadata/v1"
        interfaces = await server.get(f"{items}/instance/network-interfaces/?recursive=true")
        zone = _last(await server.text(f"{items}/instance/zone"))
        name = await server.text(f"{items}/instance/name")
        project = await server.text(f"{items}/project/project-id")
    try:
        found = msgspec.json.decode(interfaces, type=list[_Interface])
        interface = next((each for each in found if each.ip == own), found[0])
    except (*UNREADABLE, IndexError):
        raise NotJoinable(f"the {CLOUD} metadata server names no network interface of this instance") from None
    return {"project": project, "network": _last(interface.network), "instance": f"{zone}/{name}"}


async def ask_server() -> dict[str, str]:
    """The same for a server that keeps the routes for others: `project`, `network`. Raises NotJoinable."""
    return {name: value for name, value in (await ask_host("")).items() if name != "instance"}


def route_name(destination: Subnet) -> str:
    """As flannel names the route of a lease."""
    return _PREFIX + str(destination).replace(".", "-").replace("/", "-")


class _Interface(msgspec.Struct):
    network: str
    ip: str = ""


class GceDialect:
    """See wincey.cloud.table.Dialect. settings: `project`, `network`."""

    provider: ClassVar[str] = "gce"

    def __init__(self, table: CloudTable) -> None:
        settings = dict(table.settings)
        self._project, self._network = settings.get("project", ""), settings.get("network", "")
        self._tokens = Tokens()
        self._rest = Rest(ENDPOINT, "https://compute.googleapis.com/compute/v1", CLOUD)
        self._pending: dict[str, tuple[str, TableRoute]] = {}
        self._sees_quota = True

    async def hosts(self, wanted: Sequence[HostRef]) -> Hosts:
        if not wanted:
            return {}
        if len(wanted) == 1 and wanted[0].instance:
            zone, _, name = wanted[0].instance.partition("/")
            try:
                found = [await self._call("instances.get", "GET", f"/zones/{zone}/instances/{name}")]
            except CloudConflict:  # there is no such instance
                return {}
            instances = {wanted[0].instance: found[0]}
        else:
            instances = {}
            for page in await self._pages("instances.list", "/aggregated/instances"):
                for place, scope in page.get("items", {}).items():
                    for each in scope.get("instances", ()):
                        instances[f"{_last(place)}/{each['name']}"] = each
        by_address = {
            interface.get("networkIP"): (name, bool(each.get("canIpForward")))
            for name, each in instances.items()
            for interface in each.get("networkInterfaces", ())
            if _last(interface.get("network", "")) == self._network
        }
        hosts: dict[HostRef, CloudHost] = {}
        for host in wanted:
            address = format_address(host.address) if host.address else ""
            name, forwards = by_address.get(address, ("", False))
            if name and host.instance in {"", name}:
                hosts[host] = CloudHost((name, address), forwards)
        return hosts

    async def tables(self, hosts: Hosts) -> Sequence[Table]:
        pages = await self._pages("routes.list", "/global/routes")
        listed = [each for page in pages for each in page.get("items", ()) if _last(each["network"]) == self._network]
        routes = [route for each in listed if (route := _route(self._network, each))]
        # Of several to one destination the one with our name is the one that we see to.
        routes.sort(key=lambda route: route.marked)
        routes += await self._still_pending({route.handle for route in routes})
        used, limit = await self._quota()
        return [Table(self._network, tuple(routes), used or len(listed), limit)]

    async def put(self, step: Step) -> None:
        zone, _, instance = step.host.next_hop[0].partition("/")
        name, deadline = route_name(step.destination), _now() + _PATIENCE
        if step.old:
            await self._remove(step.old.handle, deadline)
        body = {
            "name": name,
            "description": "flannel subnet, kept by wincey",
            "network": f"{_NAMES}/projects/{self._project}/global/networks/{self._network}",
            "destRange": str(step.destination),
            "priority": PRIORITY,
            "nextHopInstance": f"{_NAMES}/projects/{self._project}/zones/{zone}/instances/{instance}",
        }
        operation = await self._call("routes.create", "POST", "/global/routes", body)
        if not await self._done("routes.create", operation, deadline):
            made = TableRoute(self._network, step.destination, step.host.next_hop, "pending", name, marked=True)
            self._pending[name] = operation["name"], made

    async def delete(self, route: TableRoute) -> None:
        try:
            await self._remove(route.handle, _now() + _PATIENCE)
        except CloudConflict:  # it is gone, or going
            return

    async def allow_forwarding(self, host: CloudHost) -> None:
        """No call of the API does that to an instance that runs."""
        zone, _, name = host.next_hop[0].partition("/")
        place = f"{name} --project={self._project} --zone={zone}"
        raise CloudDenied(
            f"{CLOUD} drops what instance {name} forwards for containers: it was made without IP forwarding. Make it anew with"
            f" --can-ip-forward; or gcloud compute instances export {place} --destination=vm.yaml, set canIpForward: true in"
            f" it, and gcloud compute instances update-from-file {place} --source=vm.yaml"
            " --most-disruptive-allowed-action=RESTART"
        )

    async def close(self) -> None:
        await self._rest.close()

    async def _remove(self, name: str, deadline: float) -> None:
        """Delete a route and wait until it is gone."""
        self._pending.pop(name, None)
        operation = await self._call("routes.delete", "DELETE", f"/global/routes/{name}")
        if not await self._done("routes.delete", operation, deadline):
            raise CloudUnavailable(f"{CLOUD} is still deleting the route {name} after {_PATIENCE:.0f} s")

    async def _still_pending(self, there: set[str]) -> list[TableRoute]:
        """The routes whose making was not awaited to its end; those that failed are forgotten."""
        for name, (operation, _) in list(self._pending.items()):
            if name in there or await self._ended(operation):
                del self._pending[name]
        return [route for _, route in self._pending.values()]

    async def _ended(self, operation: str) -> bool:
        try:
            shown = await self._call("globalOperations.get", "GET", f"/global/operations/{operation}")
        except CloudConflict:  # operations are kept for some days only
            return True
        return bool(shown.get("status") == "DONE")

    async def _done(self, action: str, operation: dict[str, Any], deadline: float) -> bool:
        """Wait for an operation; False when the time is over. Raises what it failed with."""
        pause = _POLL_FIRST
        while operation.get("status") != "DONE":
            if _now() + pause > deadline:
                return False
            await asyncio.sleep(pause)
            pause = min(_POLL_MOST, 2 * pause)
            operation = await self._call("globalOperations.get", "GET", f"/global/operations/{operation['name']}")
        if failed := operation.get("error", {}).get("errors"):
            self._refused(action, 0, str(failed[0].get("code")), str(failed[0].get("message")))
        return True

    async def _quota(self) -> tuple[int | None, int | None]:
        """Routes in use and allowed in the project; None where we may not know."""
        if self._sees_quota:
            try:
                project = await self._call("projects.get", "GET", "")
            except CloudDenied:
                self._sees_quota = False
            else:
                for quota in project.get("quotas", ()):
                    if quota.get("metric") == "ROUTES":
                        return int(quota["usage"]), int(quota["limit"])
        return None, None

    async def _pages(self, action: str, target: str) -> list[dict[str, Any]]:
        query, pages = {"maxResults": str(_PAGE)}, []
        while True:
            page = await self._call(action, "GET", f"{target}?{urlencode(query)}")
            pages.append(page)
            if not (token := page.get("nextPageToken")):
                return pages
            query["pageToken"] = token

    async def _call(self, action: str, method: str, target: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        content = msgspec.json.encode(body) if body else b""
        for last in (False, True):
            headers = {"authorization": f"Bearer {await self._tokens.get()}"}
            if body:
                headers["content-type"] = "application/json"
            status, document = await self._rest.call(method, f"/projects/{self._project}{target}", headers, content)
            if status != 401 or last:
                break
            self._tokens.drop()
        if status >= 300:
            error = document.get("error", {})
            details = error.get("errors") or [{}]
            self._refused(
                action, status, str(details[0].get("reason", "")), str(error.get("message", f"status {status}"))
            )
        return document

    def _refused(self, action: str, status: int, reason: str, message: str) -> NoReturn:
        usual = CloudUnavailable if status >= 500 else _STATUSES.get(status, CloudError)
        kind = _REASONS.get(reason, usual)
        text = f"{CLOUD} refuses {action}: {' '.join(message.split()).rstrip('.')}" + f" ({reason})" * bool(reason)
        if kind is CloudFull:
            text += "; delete routes that are not needed, or have the quota raised"
        elif reason == "insufficientPermissions":
            text += (
                "; the instance's access scopes lack compute: stop it and"
                " gcloud compute instances set-service-account NAME --scopes=compute-rw"
            )
        elif reason == "accessNotConfigured":
            text += f"; gcloud services enable compute --project={self._project}"
        elif kind is CloudDenied:
            text += f"; grant the service account compute.{action} (roles/compute.networkAdmin has what routes need)"
        raise kind(text)


def _route(network: str, document: dict[str, Any]) -> TableRoute | None:
    """None for what has no IPv4 destination or does not count (see above)."""
    if document.get("tags") or document.get("priority", PRIORITY) > PRIORITY:
        return None
    try:
        destination = Subnet.parse(document.get("destRange") or "")
    except BadAddress:
        return None
    if len(destination.address) != 4:
        return None
    next_hop: tuple[str, ...] = ()
    if url := document.get("nextHopInstance"):
        zone, _, name = url.partition("/zones/")[2].partition("/instances/")
        next_hop = (f"{zone}/{name}",)
    elif address := document.get("nextHopIp"):
        next_hop = (address,)
    codes = {warning.get("code") for warning in document.get("warnings", ())}
    gone = codes & {"NEXT_HOP_INSTANCE_NOT_FOUND", "NEXT_HOP_ADDRESS_NOT_ASSIGNED"}
    name = document["name"]
    return TableRoute(
        network, destination, next_hop, "blackhole" if gone else "active", name, marked=name.startswith(_PREFIX)
    )


def _last(url: str) -> str:
    return url.rpartition("/")[2]


def _now() -> float:
    return asyncio.get_running_loop().time()
