"""How Alibaba Cloud wants the requests of its RPC-style APIs signed: HMAC-SHA1 over the sorted parameters. Pure.

SHA-1 is what this generation of the API asks for; its weakness (collisions) does not reach an HMAC.
"""

from __future__ import annotations

import base64
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime
from urllib.parse import quote


def encode(text: str) -> str:
    """Percent-encode as RFC 3986 has it: all but letters, digits and `-_.~`; a blank is %20, an asterisk %2A."""
    return quote(text, safe="-_.~")


def signed_query(
    parameters: Mapping[str, str], *, key_id: str, key_secret: str, now: float, nonce: str, method: str = "GET"
) -> str:
    """The query of a request with these parameters of its own; the common ones and the signature are added.

    now: seconds since the epoch, within 15 minutes of the service's clock. nonce: new for every request, repeats included.
    """
    common = {
        "AccessKeyId": key_id,
        "Format": "JSON",
        "SignatureMethod": "HMAC-SHA1",
        "SignatureNonce": nonce,
        "SignatureVersion": "1.0",
        "Timestamp": datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    query = "&".join(f"{encode(name)}={encode(value)}" for name, value in sorted((common | dict(parameters)).items()))
    text = f"{method}&{encode('/')}&{encode(query)}"
    digest = hmac.digest(f"{key_secret}&".encode(), text.encode(), "sha1")
    return f"{query}&Signature={encode(base64.b64encode(digest).decode())}"
