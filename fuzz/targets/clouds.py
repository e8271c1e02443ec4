"""Answers of cloud APIs and metadata servers. JSON that is none of the API's must rest the calls, and end nothing."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from fuzz.target import Cut, chosen, pieces, play, target
from fuzz.targets.clients import Server, _answer
from wincey.cloud import ali, aws_metadata, gce, gce_token, rest, tencent
from wincey.cloud.calls import Calls
from wincey.cloud.errors import CloudError
from wincey.cloud.gce_token import Tokens
from wincey.http.client import HttpClient
from wincey.model.address import Subnet, parse_address
from wincey.model.cloud import CloudTable, HostRef
from wincey.model.errors import NotJoinable

_ALI = (
    '{"Vpcs":{"Vpc":[{"VRouterId":"vrt-1"}]}}',
    '{"TotalCount":1,"RouteTables":{"RouteTable":[{"RouteTableId":"vtb-1","RouteTableType":"System","RouteEntrys":{"RouteEntry":[{"DestinationCidrBlock":"10.3.5.0/24","Type":"Custom","NextHopType":"Instance","InstanceId":"i-1","Status":"Available"}]}}]}}',
)
_TENCENT = (
    '{"Response":{"RouteTableSet":[{"RouteTableId":"rtb-1","RouteSet":[{"DestinationCidrBlock":"10.3.5.0/24","GatewayType":"NORMAL_CVM","GatewayId":"192.0.2.2","RouteId":4,"Enabled":true}]}],"TotalCount":1}}',
    '{"Response":{"VpcLimitSet":[{"LimitType":"x","LimitValue":50}]}}',
)
_GCE = (
    '{"items":[{"name":"flannel-10-3-5-0-24","destRange":"10.3.5.0/24","network":"https://x/n","nextHopInstance":"https://x/zones/z/instances/h","priority":1000}]}',
    '{"items":[{"name":"h","networkInterfaces":[{"network":"https://x/n","networkIP":"192.0.2.2"}],"canIpForward":true,"selfLink":"https://x/h"}]}',
    '{"quotas":[{"metric":"ROUTES","limit":200,"usage":3}]}',
)
_REFUSAL = '{"Code":"Throttling.User","Message":"slow down","error":{"message":"m","errors":[{"reason":"rateLimitExceeded"}]},"Response":{"Error":{"Code":"AuthFailure","Message":"m"}}}'


def _table(provider: str, tables: tuple[str, ...] = ()) -> CloudTable:
    secrets = (("AccessKeyID", "k"), ("AccessKeySecret", "s"))
    settings = (("region", "r"), ("vpc", "v"), ("project", "p"), ("network", "https://x/n"), ("zone", "z"))
    return CloudTable(provider, Subnet.parse("10.3.0.0/16"), tables, settings, secrets)


def _tried(dialect_of: Callable[[CloudTable], Any], provider: str, data: bytes) -> None:
    cut = Cut(data)
    named = ("vtb-1",) if cut.number(2) else ()
    server = Server(cut)

    async def scene() -> None:
        table = _table(provider, named)
        calls = Calls(random.Random(1), asyncio.get_running_loop().time, dialect_of)
        await calls.use(table)
        dialect = calls.dialect
        for each in vars(dialect).values():
            if isinstance(each, rest.Rest):
                each._client = server  # type: ignore[assignment]  # the network is pretended
            if isinstance(each, Tokens):
                each._token, each._until = "t", 1e18
        hosts: dict[Any, Any] = {}

        async def look() -> None:
            hosts.update(await dialect.hosts([HostRef("i-1", parse_address("192.0.2.2"))]))
            for each in await dialect.tables(hosts):
                assert each.name
                for route in each.routes:
                    assert str(route)

        why = await calls.attempt("look", look)
        assert why or hosts is not None
        await calls.close()

    play(scene)


_LOOKS: dict[str, tuple[Callable[[CloudTable], Any], tuple[str, ...]]] = {
    "ali-vpc": (ali.AliDialect, _ALI),
    "tencent-vpc": (tencent.TencentDialect, _TENCENT),
    "gce": (gce.GceDialect, _GCE),
}


def _seeds(answers: tuple[str, ...]) -> list[bytes]:
    whole = b"".join(_answer(text) for text in answers)
    return [b"\0" + whole, b"\1" + whole, b"\0" + _answer(_REFUSAL, 4), b"\0" + _answer(answers[-1])]


@target("cloud-ali", seeds=_seeds(_ALI))
def cloud_ali(data: bytes) -> None:
    """Alibaba Cloud."""
    _tried(*_looks("ali-vpc"), data)


@target("cloud-tencent", seeds=_seeds(_TENCENT))
def cloud_tencent(data: bytes) -> None:
    """Tencent Cloud."""
    _tried(*_looks("tencent-vpc"), data)


@target("cloud-gce", seeds=[*_seeds(_GCE), *_seeds(_GCE[::-1])])
def cloud_gce(data: bytes) -> None:
    """Compute Engine."""
    _tried(*_looks("gce"), data)


def _looks(provider: str) -> tuple[Callable[[CloudTable], Any], str]:
    return _LOOKS[provider][0], provider


@target("cloud-metadata", NotJoinable, CloudError, seeds=(
    b"\0" + _answer("token") + _answer("r") + _answer("v") + _answer("i"), b"\1" + _answer("mac") * 3,
    b"\2" + _answer("p") * 6, b"\3" + _answer("t") + _answer("r") + _answer("i-1"), b"\4" + pieces('{"access_token":"t","expires_in":3599,"token_type":"Bearer"}'),
))  # fmt: skip
def cloud_metadata(data: bytes) -> None:
    """What an instance's metadata server says."""
    cut = Cut(data)
    what = cut.number(5)
    server = Server(cut)

    async def scene() -> None:
        if what == 4:
            gce_token._read(cut.piece())
            return
        ask = chosen(
            Cut(bytes([what])), (ali.ask_host, tencent.ask_host, lambda: gce.ask_host("h"), aws_metadata.ask_host)
        )
        before = rest.HttpClient, aws_metadata.HttpClient
        rest.HttpClient = aws_metadata.HttpClient = lambda *_, **__: server  # type: ignore[assignment, misc]  # likewise
        try:
            found = await ask()
        finally:
            rest.HttpClient, aws_metadata.HttpClient = before  # type: ignore[misc]  # as it was
        assert all(isinstance(value, str) for value in found.values())

    assert rest.HttpClient is HttpClient
    play(scene)
