"""What clients are told by a server that keeps the cloud's route tables."""

import json

import pytest

from support.server import put_config, serving

CONFIG = """{"Network": "10.5.0.0/16", "Backend": {"Type": "ali-vpc", "accesskeyid": "id", "AccessKeySecret": "hush", "RouteTableID": "vtb-1"}}"""


@pytest.mark.parametrize(("flags", "kept"), [((), None), (("--cloud-routes",), "kept")])
def test_keys_to_the_cloud_stay_on_the_server(tmp_path, monkeypatch, flags, kept):
    monkeypatch.setenv("WINCEY_ALI_METADATA", "http://127.0.0.1:1")
    store = put_config(tmp_path / "s.db", CONFIG)
    with serving(tmp_path / "log", f"--store={store}", *flags) as server:
        connection = server.open()
        connection.request("GET", "/v1/_/config")
        answer = connection.getresponse()
        body = answer.read().decode()
        connection.close()
        assert answer.getheader("Wincey-Cloud-Routes") == kept
        backend = json.loads(body)["Backend"]
        assert backend["Type"] == "ali-vpc"
        assert backend["RouteTableID"] == "vtb-1"
        assert ("hush" in body) == (kept is None)
        assert "accesskeyid" not in backend or kept is None
        assert "hush" not in server.log
