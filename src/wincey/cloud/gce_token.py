"""Access tokens for Google's APIs.

On an instance the metadata server gives them for the asking, and no library is needed: one GET, a JSON object, a lifetime.
With a service account's key file (GOOGLE_APPLICATION_CREDENTIALS, as in all of Google's tools) an RSA signature is, and that
is what the extra `gce` (google-auth) is loaded for, then and no earlier. It only signs; our own client does the exchange
(RFC 7523, section 2.1).
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import msgspec

from wincey.cloud.errors import CloudDenied, CloudNotInstalled, CloudUnavailable
from wincey.cloud.rest import Metadata
from wincey.http.client import HttpClient, HttpError
from wincey.model.errors import UNREADABLE, NotJoinable

METADATA, KEY_FILE = "GCE_METADATA_HOST", "GOOGLE_APPLICATION_CREDENTIALS"
CLOUD = "Compute Engine"
SCOPE = "https://www.googleapis.com/auth/compute"
_EARLY = 120.0  # seconds before its end that a token is not used any more
_LIFE = 3600


def metadata() -> Metadata:
    """The metadata server. GCE_METADATA_HOST names another one, as for Google's own libraries."""
    return Metadata(METADATA, "169.254.169.254", CLOUD, {"metadata-flavor": "Google"})


class _Answer(msgspec.Struct):
    access_token: str
    expires_in: float


class Tokens:
    """Gives a token that is valid for a while yet."""

    def __init__(self) -> None:
        self._token, self._until = "", 0.0

    async def get(self) -> str:
        """Raises CloudDenied, CloudUnavailable, CloudNotInstalled."""
        if time.monotonic() >= self._until:
            path = os.environ.get(KEY_FILE)
            answer = await (_by_key_file(Path(path)) if path else _by_metadata())
            self._token, self._until = answer.access_token, time.monotonic() + answer.expires_in - _EARLY
        return self._token

    def drop(self) -> None:
        """This one was refused."""
        self._until = 0.0


async def _by_metadata() -> _Answer:
    async with metadata() as server:
        try:
            return _read(await server.get("/computeMetadata/v1/instance/service-accounts/default/token"))
        except NotJoinable as error:
            raise CloudDenied(
                f"no access token: {error}. Give the instance a service account with the scope compute-rw, or set {KEY_FILE}"
            ) from error


async def _by_key_file(path: Path) -> _Answer:
    try:
        account: dict[str, Any] = json.loads(await asyncio.to_thread(path.read_bytes))
        uri, assertion = account["token_uri"], await asyncio.to_thread(_assertion, account, int(time.time()))
        parts = urlsplit(uri)
        client = HttpClient(f"{parts.scheme}://{parts.netloc}", connect_timeout=5.0)
    except (OSError, ValueError, KeyError, TypeError) as error:
        # The error of a parser may quote the file, and the file is a secret.
        why = error.strerror if isinstance(error, OSError) else "it is not a service account's key (JSON)"
        raise CloudDenied(f"{KEY_FILE}={path} can't be used: {why}") from None
    form = {"grant_type": "urn:ietf:params:oauth:grant-type:jwt-bearer", "assertion": assertion}
    try:
        response = await client.request(
            "POST",
            parts.path or "/",
            headers={"host": parts.netloc, "content-type": "application/x-www-form-urlencoded"},
            body=urlencode(form).encode(),
            timeout=8.0,
        )
    except HttpError as error:
        raise CloudUnavailable(f"{CLOUD}: no access token: {error}") from error
    finally:
        await client.close()
    if response.status != 200:
        raise CloudDenied(
            f"{CLOUD}: {parts.netloc} gives no access token for {account.get('client_email')} (status {response.status}):"
            f" is the key in {path} still valid, and the host's clock right?"
        )
    return _read(response.body)


def _assertion(account: Mapping[str, Any], now: int) -> str:
    try:
        from google.auth import crypt, jwt  # noqa: PLC0415  # an extra, and 20 MB that an instance's own token does not cost
    except ImportError:
        raise CloudNotInstalled(
            f"{KEY_FILE} is set, and service account keys need google-auth: pip install 'wincey[gce]', or unset it to use"
            " the instance's own service account"
        ) from None
    signer = crypt.RSASigner.from_service_account_info(account)  # type: ignore[no-untyped-call]  # google-auth has no types
    claims = {
        "iss": account["client_email"],
        "scope": SCOPE,
        "aud": account["token_uri"],
        "iat": now,
        "exp": now + _LIFE,
    }
    signed: bytes = jwt.encode(signer, claims)  # type: ignore[no-untyped-call]  # likewise
    return signed.decode()


def _read(body: bytes) -> _Answer:
    try:
        return msgspec.json.decode(body, type=_Answer)
    except UNREADABLE:
        raise CloudUnavailable(f"{CLOUD}: what should be an access token is none") from None
