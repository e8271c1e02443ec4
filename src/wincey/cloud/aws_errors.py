"""What boto3 raises, as wincey.cloud.errors has it. Error codes: Amazon EC2 API Reference, "Error codes"."""

from __future__ import annotations

from botocore import exceptions  # type: ignore[import-untyped]  # it has no types

from wincey.cloud.errors import (
    CloudConflict,
    CloudDenied,
    CloudError,
    CloudFull,
    CloudThrottled,
    CloudUnavailable,
)

_DENIED = {
    "AccessDenied",
    "AccessDeniedException",
    "AuthFailure",
    "Blocked",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidClientTokenId",
    "OptInRequired",
    "PendingVerification",
    "RequestExpired",
    "SignatureDoesNotMatch",
    "UnauthorizedOperation",
    "UnrecognizedClientException",
}
_CREDENTIALS = {"AuthFailure", "InvalidClientTokenId", "SignatureDoesNotMatch", "UnrecognizedClientException"}
_THROTTLED = {
    "EC2ThrottledException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
}
_CHANGED = {"InvalidRoute.NotFound", "RouteAlreadyExists"}
_NO_TABLE = {"InvalidRouteTableID.NotFound", "InvalidRouteTableId.Malformed"}


def translate(error: Exception, action: str, what: str) -> CloudError:
    """action: the permission that the call takes, such as `ec2:CreateRoute`. what: the object it was about."""
    if isinstance(error, exceptions.ClientError):
        return _refused(error, action, what)
    if isinstance(error, exceptions.NoRegionError):
        return CloudDenied("aws-vpc: no region is known: set AWS_REGION, or run where the instance metadata tells it")
    if isinstance(
        error,
        exceptions.NoCredentialsError
        | exceptions.PartialCredentialsError
        | exceptions.CredentialRetrievalError
        | exceptions.ProfileNotFound,
    ):
        return CloudDenied(
            f"aws-vpc: {action} needs credentials ({error}): give the instance a role (instance profile), or set"
            " AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if isinstance(error, exceptions.HTTPClientError | exceptions.ConnectionError):
        return CloudUnavailable(f"aws-vpc: {action}: no answer from the API ({error})")
    return CloudError(f"aws-vpc: {action} on {what}: {error}")


def _refused(error: exceptions.ClientError, action: str, what: str) -> CloudError:
    about = error.response.get("Error", {})
    code, message = str(about.get("Code", "")), " ".join(str(about.get("Message", "")).split())[:300]
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    said = f"{code}: {message}" if message else code
    for applies, kind, text in (
        (
            code in _CREDENTIALS,
            CloudDenied,
            f"{action} is refused ({said}): the credentials are wrong, or of another account",
        ),
        (
            code in _DENIED or status == 403,
            CloudDenied,
            f"{action} is refused ({said}): allow {action} on {what} to the role of these credentials",
        ),
        (code in _THROTTLED, CloudThrottled, f"{action} is throttled ({said})"),
        (
            code == "RouteLimitExceeded",
            CloudFull,
            f"{what} is full ({said}): have its quota raised (Service Quotas, VPC, L-93826ACB), or delete routes that are"
            " not needed",
        ),
        (code in _CHANGED or "no route defined" in message, CloudConflict, f"{action} on {what}: {said}"),
        (
            code in _NO_TABLE,
            CloudError,
            f"there is no {what} in this region ({said}): correct RouteTableID in the network config",
        ),
        (status >= 500, CloudUnavailable, f"{action}: the API is out of order ({said})"),
    ):
        if applies:
            return kind(f"aws-vpc: {text}")
    return CloudError(f"aws-vpc: {action} on {what}: {said}")
