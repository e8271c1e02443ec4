"""The fake clouds behind one face, so that what must hold on every one of them is tested in one way."""

from __future__ import annotations

from support import fake_ali, fake_gce, fake_tencent
from support.fake_ali import FakeAli
from support.fake_cloud import FakeCloud
from support.fake_gce import FakeGce
from support.fake_tencent import FakeTencent
from wincey.backends.alivpc import AliVpcBackend
from wincey.backends.cloud import CloudBackend
from wincey.backends.gce import GceBackend
from wincey.backends.tencentvpc import TencentVpcBackend
from wincey.cloud import ali, gce, tencent

FOREIGN_IN, FOREIGN_OUT = "10.5.250.0/24", "172.20.0.0/16"
"""Destinations of routes that somebody made by hand: inside the cluster network and outside of it."""


class Cloud:
    """One fake. writes: its actions that change the table, create first. denial: what names the permission to grant.

    settling: seconds that a change takes.
    """

    backend: type[CloudBackend]
    fake: FakeCloud
    writes: tuple[str, ...]
    look: str
    denial: str
    secret = ""
    settling = 0.0

    def environment(self, metadata: str, api: str) -> dict[str, str]:
        """For a daemon: where the cloud is, and its keys."""
        raise NotImplementedError

    async def look_around(self, address: str) -> dict[str, str]:
        raise NotImplementedError

    def add(self, name: str, address: str) -> str:
        """A new instance; returns its name as `routes` shows it."""
        self.fake.add_instance(name, address)
        return name

    def remove(self, name: str) -> None:
        """The instance is gone, with nobody asked."""
        address = next(address for address, each in self.fake.addresses.items() if each == name)
        del self.fake.addresses[address], self.fake.instances[name]

    def routes(self) -> dict[str, str]:
        """The routes to instances, without those made by hand."""
        return {to: by for to, by in self.fake.routes().items() if to not in {FOREIGN_IN, FOREIGN_OUT}}

    def foreign(self) -> list[str]:
        """What the routes made by hand look like."""
        raise NotImplementedError

    def by_hand(self, destination: str, name: str) -> None:
        """Somebody makes a route to an instance."""
        raise NotImplementedError

    def throttle(self, action: str, times: int = 1) -> None:
        raise NotImplementedError

    def set_quota(self, routes: int | None) -> None:
        """Allow so many more routes than there are; None for plenty."""
        raise NotImplementedError

    def deny(self, *actions: str) -> None:
        self.fake.denied = set(actions)

    def _stranger(self) -> None:
        self.add("bystander", "10.99.0.200")
        self.by_hand(FOREIGN_IN, "bystander")
        self.by_hand(FOREIGN_OUT, "bystander")


class Gce(Cloud):
    backend, writes, look = GceBackend, ("routes.create", "routes.delete"), "routes.list"
    denial = "compute.routes.create"
    settling = 0.1

    def __init__(self) -> None:
        self.fake = FakeGce(operation_time=self.settling)
        self._stranger()

    def environment(self, metadata: str, api: str) -> dict[str, str]:
        return {
            "GCE_METADATA_HOST": metadata.removeprefix("http://"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{api}/compute/v1/",
        }

    async def look_around(self, address: str) -> dict[str, str]:
        return await gce.ask_host(address)

    def by_hand(self, destination: str, name: str) -> None:
        place = f"projects/{fake_gce.PROJECT}/zones/{fake_gce.ZONE}/instances/{name}"
        self.fake.insert(
            f"by-hand-{len(self.fake.table)}", destination, nextHopInstance=f"https://x/compute/v1/{place}"
        )

    def foreign(self) -> list[str]:
        return sorted(str(route) for name, route in self.fake.table.items() if not name.startswith("flannel-"))

    def throttle(self, action: str, times: int = 1) -> None:
        self.fake.faults[action] = [fake_gce.error_answer(403, "rateLimitExceeded", "Rate Limit Exceeded")] * times

    def set_quota(self, routes: int | None) -> None:
        self.fake.quota = 100 if routes is None else len(self.fake.table) + routes

    def deny(self, *actions: str) -> None:
        self.fake.denied = {f"compute.{action}" for action in actions}


class Tencent(Cloud):
    backend, writes, look = TencentVpcBackend, ("CreateRoutes", "DeleteRoutes"), "DescribeRouteTables"
    denial, secret = "vpc:CreateRoutes", "tencent-secret-key"

    def __init__(self) -> None:
        self.fake = FakeTencent(secret_key=self.secret)
        self._stranger()

    def environment(self, metadata: str, api: str) -> dict[str, str]:
        keys = {"ACCESS_KEY_ID": self.fake.secret_id, "ACCESS_KEY_SECRET": self.secret}
        return {"WINCEY_TENCENT_METADATA": metadata, "WINCEY_TENCENT_ENDPOINT": api, **keys}

    async def look_around(self, address: str) -> dict[str, str]:
        return await tencent.ask_host()

    def add(self, name: str, address: str) -> str:
        super().add(name, address)
        return address

    def by_hand(self, destination: str, name: str) -> None:
        self.fake.insert(fake_tencent.TABLE, destination, "NORMAL_CVM", self.fake.instances[name])

    def foreign(self) -> list[str]:
        return sorted(str(each) for each in self.fake.tables[fake_tencent.TABLE] if not each["RouteDescription"])

    def throttle(self, action: str, times: int = 1) -> None:
        answer = fake_tencent.error_answer(
            "RequestLimitExceeded", "The number of requests exceeds the frequency limit."
        )
        self.fake.faults[action] = [answer] * times

    def set_quota(self, routes: int | None) -> None:
        used = sum(each["RouteType"] == "USER" for each in self.fake.tables[fake_tencent.TABLE])
        self.fake.quota = 50 if routes is None else used + routes


class Ali(Cloud):
    backend, writes, look = AliVpcBackend, ("CreateRouteEntry", "DeleteRouteEntry"), "DescribeRouteTables"
    denial, secret = "vpc:CreateRouteEntry", "ali-secret-key"
    settling = 0.1

    def __init__(self) -> None:
        self.fake = FakeAli(key_secret=self.secret, settling=self.settling)
        self._stranger()

    def environment(self, metadata: str, api: str) -> dict[str, str]:
        keys = {"ACCESS_KEY_ID": self.fake.key_id, "ACCESS_KEY_SECRET": self.secret}
        return {
            "WINCEY_ALI_METADATA": metadata,
            "WINCEY_ALI_ENDPOINT": api,
            "WINCEY_ALI_ECS_ENDPOINT": api,
            **keys,
        }

    async def look_around(self, address: str) -> dict[str, str]:
        return await ali.ask_host()

    def by_hand(self, destination: str, name: str) -> None:
        self.fake.insert(destination, name)

    def foreign(self) -> list[str]:
        return sorted(str(each) for each in self.fake.entries if not each["RouteEntryName"])

    def throttle(self, action: str, times: int = 1) -> None:
        answer = fake_ali.error_answer(400, "Throttling.User", "Request was denied due to user flow control.")
        self.fake.faults[action] = [answer] * times

    def set_quota(self, routes: int | None) -> None:
        used = sum(each["Type"] == "Custom" for each in self.fake.entries)
        self.fake.quota = 48 if routes is None else used + routes


CLOUDS: dict[str, type[Cloud]] = {"gce": Gce, "tencent-vpc": Tencent, "ali-vpc": Ali}
