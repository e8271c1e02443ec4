"""What a cloud's API can refuse, one class per kind. A dialect raises these and nothing else (CloudForeign is the pure decision's).

The message is one line: what was refused, in the API's own words, and what to do. `action` of CloudDenied is the exact
permission to grant.
"""

from __future__ import annotations

from wincey.model.errors import WinceyError


class CloudError(WinceyError):
    """The cloud's API could not do what it was asked to. Base of all kinds, and the kind for what is none of them."""


class CloudDenied(CloudError):
    """No credentials, or these may not do it. The message names the permission to grant."""


class CloudThrottled(CloudError):
    """Too many calls: calling again later, and less often, is right."""


class CloudUnavailable(CloudError):
    """No answer in time, or the API is out of order: calling again later is right."""


class CloudFull(CloudError):
    """A quota is reached; says which, how much of it is used, and how to have it raised."""


class CloudConflict(CloudError):
    """The table is not any more as it was when it was read: read it again."""


class CloudNotInstalled(CloudError):
    """The library for the cloud's API is missing; says how to install it."""


class CloudForeign(CloudError):
    """A leased destination has a route that somebody put by hand; says which and what to do."""
