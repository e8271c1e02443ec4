"""Where this host is in AWS, from the instance metadata service (compatibility reference, section 6.7).

Version 2 (a session token first), or version 1 where the service knows no tokens. `AWS_EC2_METADATA_SERVICE_ENDPOINT` stands
for another service, as with AWS's own tools.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from wincey.http.client import HttpClient, HttpError
from wincey.model.errors import NotJoinable

ENDPOINT = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
_DEFAULT = "http://169.254.169.254"
_HOPS = "of an instance with version 2 alone the answer is lost where HttpPutResponseHopLimit is too low"


async def ask_host() -> Mapping[str, str]:
    """`instance` and `region` of this host. Raises NotJoinable when it does not run in EC2, or can't see the service."""
    url = os.environ.get(ENDPOINT) or _DEFAULT
    try:
        found = await _ask(url)
    except (HttpError, ValueError) as error:
        raise NotJoinable(
            f"the backend aws-vpc needs the instance metadata service at {url}, which does not answer ({error}): it works on"
            f" EC2 instances with the service enabled ({_HOPS})"
        ) from None
    if not found.get("instance") or not found.get("region"):
        raise NotJoinable(
            f"the backend aws-vpc needs instance-id and region of this host, and the metadata service at {url} does not tell"
            " them: see that instance metadata is enabled for this instance"
        )
    return found


async def ask_server() -> Mapping[str, str]:
    """The region of a server that runs in EC2; nothing elsewhere, where boto3's configuration has to say it."""
    try:
        found = await _ask(os.environ.get(ENDPOINT) or _DEFAULT)
    except (HttpError, ValueError):
        return {}
    return {key: value for key, value in found.items() if key == "region"}


async def _ask(url: str) -> dict[str, str]:
    client = HttpClient(url, connect_timeout=2.0)
    try:
        answer = await client.request(
            "PUT", "/latest/api/token", headers={"x-aws-ec2-metadata-token-ttl-seconds": "60"}, timeout=3.0
        )
        # A service of version 1 alone knows no PUT.
        headers = {"x-aws-ec2-metadata-token": answer.body.decode("latin-1")} if answer.status == 200 else {}

        async def get(path: str) -> str:
            answer = await client.request("GET", f"/latest/meta-data/{path}", headers=headers, timeout=3.0)
            return answer.body.decode("latin-1").strip() if answer.status == 200 else ""

        region = await get("placement/region")
        if not region:  # services older than that path; a zone is a region and a letter
            region = (await get("placement/availability-zone"))[:-1]
        found = {"instance": await get("instance-id"), "region": region}
    finally:
        await client.close()
    return {key: value for key, value in found.items() if value}
