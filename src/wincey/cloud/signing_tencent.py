"""How Tencent Cloud wants its requests signed: TC3-HMAC-SHA256, "Signature v3" of its API 3.0 documentation. Pure.

The secret never travels. A key for one day and one service is derived from it; that key signs a digest of the request.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from datetime import UTC, datetime

ALGORITHM = "TC3-HMAC-SHA256"


def authorization(
    *, secret_id: str, secret_key: str, service: str, headers: Mapping[str, str], body: bytes, timestamp: int
) -> str:
    """The Authorization header of a POST to `/`. timestamp: seconds since the epoch, as sent in X-TC-Timestamp.

    headers: those to sign, with lower-case names; `host` and `content-type` must be among them, as they are sent.
    """
    names = sorted(headers)
    signed = ";".join(names)
    lines = "".join(f"{name}:{headers[name].strip().lower()}\n" for name in names)
    request = "\n".join(("POST", "/", "", lines, signed, hashlib.sha256(body).hexdigest()))
    day = datetime.fromtimestamp(timestamp, UTC).strftime("%Y-%m-%d")
    scope = f"{day}/{service}/tc3_request"
    text = "\n".join((ALGORITHM, str(timestamp), scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"TC3{secret_key}".encode()
    for part in (day, service, "tc3_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.new(key, text.encode(), "sha256").hexdigest()
    return f"{ALGORITHM} Credential={secret_id}/{scope}, SignedHeaders={signed}, Signature={signature}"
