"""What the dialects that speak REST have in common: one origin, JSON answers, keys, and the instance's metadata server.

Libraries of the clouds would cost more memory than the daemon itself has, and each brings HTTP and retries of its own. What
these backends need of an API is five calls, and the signing of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from wincey.cloud.errors import CloudDenied, CloudUnavailable
from wincey.http.client import HttpClient, HttpError, Interrupted, Response
from wincey.model.cloud import CloudTable
from wincey.model.errors import UNREADABLE, NotJoinable

ANSWER = 8.0
"""Seconds to wait for an answer."""

_TRIES, _BETWEEN = 3, 0.5  # of the metadata server, which is there before we are but now and then is restarted


class Keys:
    """An access key. The secret is in no representation."""

    def __init__(self, key_id: str, secret: str) -> None:
        self.key_id, self.secret = key_id, secret

    @classmethod
    def of(cls, table: CloudTable, cloud: str) -> Keys:
        """Out of the config, or where it has none out of the environment, as in flannel; raises CloudDenied."""
        given = dict(table.secrets)
        key_id = given.get("AccessKeyID") or os.environ.get("ACCESS_KEY_ID", "")
        secret = given.get("AccessKeySecret") or os.environ.get("ACCESS_KEY_SECRET", "")
        if not key_id or not secret:
            raise CloudDenied(
                f"{cloud} asks for an access key and there is none: set ACCESS_KEY_ID and ACCESS_KEY_SECRET in the daemon's"
                " environment, or AccessKeyID and AccessKeySecret in the config's Backend"
            )
        return cls(key_id, secret)


class Rest:
    """One origin of an API. variable: of the environment, holds another URL than the usual one."""

    def __init__(self, variable: str, usual: str, cloud: str) -> None:
        url = os.environ.get(variable) or usual
        try:
            self._client = HttpClient(url.rstrip("/"), connect_timeout=5.0)
        except ValueError as error:
            raise CloudUnavailable(f"{variable} is {url!r}: {error}") from None
        self._cloud = cloud
        origin = self._client.origin
        # Signatures are over the Host header, and a usual port is not part of it.
        usual_port = 443 if origin.tls else 80
        self.host = origin.authority.removesuffix(f":{usual_port}")

    async def call(
        self, method: str, target: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> tuple[int, dict[str, Any]]:
        """Status and JSON object; raises CloudUnavailable without an answer, or with one that is not the API's."""
        fields = {"host": self.host, "accept": "application/json", **(headers or {})}
        try:
            response = await self._client.request(method, target, headers=fields, body=body, timeout=ANSWER)
        except HttpError as error:
            raise CloudUnavailable(f"{self._cloud} does not answer: {error}") from error
        try:
            return response.status, msgspec.json.decode(response.body or b"{}", type=dict[str, Any])
        except UNREADABLE:
            raise CloudUnavailable(
                f"{self._cloud}: {self.host} answers with status {response.status} and no JSON; is it the API?"
            ) from None

    async def close(self) -> None:
        """End connections."""
        await self._client.close()


class Metadata:
    """The metadata server of the instance that we run on. Use it as a context manager."""

    def __init__(self, variable: str, usual: str, cloud: str, headers: Mapping[str, str]) -> None:
        url = os.environ.get(variable) or usual
        try:
            self._client = HttpClient(url if "://" in url else f"http://{url}", connect_timeout=2.0)
        except ValueError as error:
            raise NotJoinable(f"{variable} is {url!r}: {error}") from None
        self._cloud, self.headers = cloud, dict(headers)

    async def __aenter__(self) -> Metadata:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def get(self, path: str) -> bytes:
        """An item; raises NotJoinable when it can't be had."""
        response = await self.request("GET", path)
        if response.status != 200:
            raise NotJoinable(
                f"the {self._cloud} metadata server answers {response.status} for {path}: the backend works on an instance"
                f" of {self._cloud} only, and needs that item"
            )
        return response.body.strip()

    async def text(self, path: str) -> str:
        """An item that is one word; raises NotJoinable."""
        return (await self.get(path)).decode(errors="replace")

    async def request(self, method: str, path: str, headers: Mapping[str, str] | None = None) -> Response:
        """One exchange, tried again when there is no answer or the server is out of order; raises NotJoinable."""
        for attempt in range(1, _TRIES + 1):
            try:
                response = await self._client.request(
                    method, path, headers=self.headers | dict(headers or {}), timeout=5.0
                )
            except Interrupted as error:
                reason = str(error)
            except HttpError as error:  # there is no such server: it will not be there half a second later
                reason = str(error)
                break
            else:
                if response.status < 500:
                    return response
                reason = f"it answers {response.status}"
            if attempt < _TRIES:
                await asyncio.sleep(_BETWEEN)
        raise NotJoinable(
            f"no {self._cloud} metadata server: {reason}; the backend works on an instance of {self._cloud} only"
        )
