"""A client and a server of flannel 0.5, written from its API's description (compatibility reference, section 5) alone.

The server is as simple as flannel's: one event an answer, no revisions, renewals that overwrite whatever is there, and in
the earlier form (`version` 0.5.3) no single leases, no DELETE, and null for the attributes of what is gone.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

from wincey.http.server import HttpServer, Response

JSON = "application/json; charset=utf-8"


class OldServer:
    """flannel's server over a store of its own. It can be cut off and come back, or share its store with a second one."""

    def __init__(self, config, version="0.5.6", twin=None):
        self.version = version
        self.config = config
        self.leases = twin.leases if twin else {}
        self.events = twin.events if twin else []
        self.news = twin.news if twin else asyncio.Condition()
        self.index = twin.index if twin else itertools.count(5)
        self.requests = []
        self.port = 0
        self._server = None

    async def start(self):
        self._server = HttpServer(self.handle)
        self.port = await self._server.listen_tcp("127.0.0.1", self.port)
        return self

    async def stop(self):
        if self._server:
            await self._server.close(0)
            self._server = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}"

    async def put(self, key, attrs):
        index = next(self.index)
        self.leases[key] = {
            "Subnet": key.replace("-", "/"),
            "Attrs": attrs,
            "Expiration": (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%S.%f") + "789Z",
        }
        await self._tell(index, {"type": "added", "lease": self.leases[key]})
        return self.leases[key]

    async def remove(self, key):
        del self.leases[key]
        attrs = {"PublicIP": "0.0.0.0"} if self.version == "0.5.6" else None
        lease = {"Subnet": key.replace("-", "/"), "Attrs": attrs, "Expiration": "0001-01-01T00:00:00Z"}
        await self._tell(next(self.index), {"type": "removed", "lease": lease})

    async def forget(self):
        """The store's event history is gone."""
        async with self.news:
            self.events.clear()
            self.events.append((next(self.index), None))
            self.news.notify_all()

    async def _tell(self, index, event):
        async with self.news:
            self.events.append((index, event))
            self.news.notify_all()

    async def handle(self, request):
        self.requests.append((request.method, request.path, dict(request.query), request.body))
        parts = request.path.strip("/").split("/")
        match request.method, parts:
            case "GET", ["v1", network, "config"] if network != "_":
                return _error(f"100: Key not found (/coreos.com/network/{network}/config) [4]")
            case "GET", ["v1", "_", "config"]:
                return (
                    _json(self.config) if self.config else _error("100: Key not found (/coreos.com/network/config) [4]")
                )
            case "POST", ["v1", "_", "leases"]:
                return await self._acquire(json.loads(request.body))
            case "PUT", ["v1", "_", "leases", key]:
                return _json(await self.put(key, json.loads(request.body)["Attrs"]))
            case "GET", ["v1", "_", "leases"]:
                return await self._watch(request.query.get("next"), None)
            case "GET", ["v1", "_", "leases", key] if self.version == "0.5.6":
                if key not in self.leases:
                    return _error(f"100: Key not found (/coreos.com/network/subnets/{key}) [9]")
                return await self._watch(request.query.get("next"), key)
            case "DELETE", ["v1", "_", "leases", key] if self.version == "0.5.6":
                await self.remove(key)
                return Response(200)
        return Response(404, b"404 page not found\n")

    async def _acquire(self, attrs):
        for key, lease in self.leases.items():
            if lease["Attrs"]["PublicIP"] == attrs["PublicIP"]:
                return _json(await self.put(key, attrs))
        free = next((key for key in (f"10.5.{n}.0-24" for n in range(40, 60)) if key not in self.leases), None)
        return _json(await self.put(free, attrs)) if free else _error("out of subnets")

    async def _watch(self, cursor, only):
        if cursor is not None:
            async with self.news:
                while True:
                    after = [(index, event) for index, event in self.events if index > int(cursor)]
                    if any(event is None for _, event in after):
                        break
                    for index, event in after:
                        if only is None or event["lease"]["Subnet"].replace("/", "-") == only:
                            return _json({"events": [event], "snapshot": None, "cursor": str(index)})
                    await self.news.wait()
        leases = [lease for key, lease in self.leases.items() if only in {None, key}]
        last = self.events[-1][0] if self.events else 4
        return _json({"events": None, "snapshot": leases or None, "cursor": str(last)})


class OldClient:
    """flannel's client: what it asks, and what it makes of the answers. It fails on any status but 200."""

    def __init__(self, port, network="_", version="0.5.6"):
        self.port, self.network, self.version = port, network, version
        self.subnets = set()
        self.cursor = None

    def ask(self, method, path, message=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            body = None if message is None else json.dumps(message)
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, f"/v1/{self.network}{path}", body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {text}")
            return json.loads(text) if text else None
        finally:
            connection.close()

    def config(self):
        return self.ask("GET", "/config")

    def acquire(self, address, mac="aa:bb:cc:00:00:01"):
        attrs = {"PublicIP": address, "BackendType": "vxlan", "BackendData": {"VtepMAC": mac}}
        lease = self.ask("POST", "/leases", attrs)
        assert set(lease) == {"Subnet", "Attrs", "Expiration"}
        assert lease["Attrs"] == attrs
        datetime.fromisoformat(lease["Expiration"][:19] + "+00:00")
        return lease

    def renew(self, lease):
        return self.ask("PUT", f"/leases/{lease['Subnet'].replace('/', '-')}", lease)

    def watch(self):
        """One step of the watch: the subnets known after it."""
        answer = self.ask("GET", "/leases" + (f"?next={self.cursor}" if self.cursor else ""))
        assert isinstance(answer["cursor"], str)
        self.cursor = answer["cursor"]
        if answer["events"]:
            assert len(answer["events"]) == 1
            for event in answer["events"]:
                assert event["lease"]["Subnet"]
                {"added": self.subnets.add, "removed": self.subnets.discard}[event["type"]](event["lease"]["Subnet"])
        elif answer["snapshot"] or self.version == "0.5.6":
            self.subnets = {lease["Subnet"] for lease in answer["snapshot"] or ()}
        return self.subnets


def _json(message):
    return Response(200, json.dumps(message, separators=(",", ":")).encode() + b"\n", JSON)


def _error(text):
    return Response(500, text.encode() + b"\n")


@asynccontextmanager
async def old_server(config=None, **options):
    server = await OldServer(config or {"Network": "10.5.0.0/16", "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.255.0",
                                        "SubnetLen": 24, "Backend": {"Type": "vxlan"}}, **options).start()  # fmt: skip
    try:
        yield server
    finally:
        await server.stop()
