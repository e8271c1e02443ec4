"""Request signatures against the examples that the clouds' own documentation works through."""

from datetime import UTC, datetime
from urllib.parse import parse_qs

from wincey.cloud.signing_ali import encode, signed_query
from wincey.cloud.signing_tencent import authorization

TENCENT_BODY = rb'{"Limit": 1, "Filters": [{"Values": ["\u672a\u547d\u540d"], "Name": "instance-name"}]}'
# The documentation's keys, which end in EXAMPLE; none that opens anything.
TENCENT_ID, TENCENT_KEY = "AKIDz8krbsJ5yKBZQpn74WFkmLPx3EXAMPLE", "Gu5t9xGARNpq86cd98joQYCN3EXAMPLE"


def tencent(**changes):
    request = {
        "secret_id": TENCENT_ID,
        "secret_key": TENCENT_KEY,
        "service": "cvm",
        "headers": {"content-type": "application/json; charset=utf-8", "host": "cvm.tencentcloudapi.com"},
        "body": TENCENT_BODY,
        "timestamp": 1551113065,
    }
    return authorization(**(request | changes))


def test_tencent_documentation_example():
    assert tencent() == (
        f"TC3-HMAC-SHA256 Credential={TENCENT_ID}/2019-02-25/cvm/tc3_request, SignedHeaders=content-type;host,"
        " Signature=72e494ea809ad7a8c8f7a4507b9bddcbaa8e581f516e8da2f66e2c5a96525168"
    )


def test_tencent_signs_names_and_values_in_lower_case_and_in_order():
    headers = {
        "x-tc-action": " DescribeInstances",
        "host": "cvm.tencentcloudapi.com",
        "content-type": "application/json; charset=utf-8",
    }
    assert "SignedHeaders=content-type;host;x-tc-action," in tencent(headers=headers)
    lower = {name: value.strip().lower() for name, value in sorted(headers.items())}
    assert tencent(headers=headers) == tencent(headers=lower)


def test_tencent_dates_the_key_in_utc():
    midnight = int(datetime(2020, 1, 1, tzinfo=UTC).timestamp())
    assert "/2020-01-01/" in tencent(timestamp=midnight)
    assert "/2019-12-31/" in tencent(timestamp=midnight - 1)


def test_ali_documentation_example():
    query = signed_query(
        {"Action": "DescribeRegions", "Version": "2014-05-26", "Format": "XML"},
        key_id="testid",
        key_secret="testsecret",
        now=datetime(2016, 2, 23, 12, 46, 24, tzinfo=UTC).timestamp(),
        nonce="3ee8c1b8-83d3-44af-a94f-4e0ad82fd6cf",
    )
    assert parse_qs(query)["Signature"] == ["OLeaidS1JvxuMvnyHOwuJ+uX5qY="]
    assert query.endswith("&Signature=OLeaidS1JvxuMvnyHOwuJ%2BuX5qY%3D")


def test_ali_encodes_what_quoting_for_urls_often_leaves():
    assert encode("a b!'()*~") == "a%20b%21%27%28%29%2A~"
    assert encode("10.3.1.0/24") == "10.3.1.0%2F24"
