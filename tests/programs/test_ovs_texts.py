"""The database's stream and the flows' texts, without an Open vSwitch."""

import json

import pytest

from wincey.model.address import parse_mac
from wincey.model.ovs import OvsFlow
from wincey.programs.openvswitch.flows import read, to_put, to_remove
from wincey.programs.openvswitch.jsonrpc import Splitter, as_list, as_map, uuids

MESSAGES = [{"a": 'brace } and "quote" and \\ {'}, {"b": {"c": [{}, {"d": "\\"}]}}, {}, {"e": "ü€"}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_stream_is_cut_wherever_its_pieces_end(size):
    stream = "".join(json.dumps(each, ensure_ascii=False) for each in MESSAGES).encode()
    splitter, found = Splitter(), []
    for at in range(0, len(stream), size):
        found += splitter.feed(stream[at : at + size])
    assert found == MESSAGES


def test_values():
    assert as_map(["map", [["a", "b"]]]) == {"a": "b"}
    assert (as_list(["set", []]), as_list(7), as_list(["set", [1, 2]])) == ([], [7], [1, 2])
    assert uuids(["uuid", "x"]) == uuids(["set", [["uuid", "x"]]]) == ["x"]


PEER, OWN, OTHER = (parse_mac(f"02:00:00:00:00:0{digit}") for digit in "123")
DUMP = """NXST_FLOW reply (xid=0x4):
 cookie=0x77696e636579, priority=200,in_port=LOCAL,dl_dst=02:00:00:00:00:01 actions=output:v0000010a630002
 cookie=0x77696e636579, priority=100,dl_dst=02:00:00:00:00:02 actions=LOCAL
 cookie=0x77696e636579, priority=200,in_port=LOCAL,dl_dst=02:00:00:00:00:03 actions={actions}
 cookie=0x77, priority=100,dl_dst=02:00:00:00:00:09 actions=LOCAL
 cookie=0x0, priority=0 actions=NORMAL
"""


@pytest.mark.parametrize("actions", ["drop", "output:99", "output:eth1", "NORMAL", "LOCAL"])
def test_only_our_flows_are_read_and_what_they_do_counts(actions):
    found = read("br", DUMP.format(actions=actions).splitlines())
    wanted = [OvsFlow("br", PEER, "v0000010a630002"), OvsFlow("br", OWN, ""), OvsFlow("br", OTHER, "?")]
    assert found == {flow.key: flow for flow in wanted}


def test_two_flows_for_one_address_are_not_as_wanted():
    line = " cookie=0x77696e636579, priority=100,dl_dst=02:00:00:00:00:01 actions=LOCAL"
    found = read("br", [*DUMP.splitlines(), line])
    assert found[OvsFlow("br", PEER, "v0000010a630002").key].port == "?"


def test_a_flow_takes_the_place_of_whatever_we_had_for_its_address():
    *removed, added = to_put(OvsFlow("br", PEER, "v0000010a630002"))
    assert removed == to_remove(OvsFlow("br", PEER, "?"))
    assert all("cookie=0x77696e636579/-1" in line for line in removed)
    assert (
        added
        == "add cookie=0x77696e636579,priority=200,in_port=LOCAL,dl_dst=02:00:00:00:00:01,actions=output:v0000010a630002"
    )
