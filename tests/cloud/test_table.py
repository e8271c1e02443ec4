"""What is decided of a table, without any cloud."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.cloud.backoff import FIRST, MOST, Backoff
from wincey.cloud.errors import CloudForeign, CloudFull
from wincey.cloud.table import (
    CloudHost,
    Held,
    Patience,
    Step,
    Table,
    TableRoute,
    by_destination,
    check_room,
    nearly_full,
    put_into,
    stale,
    steps,
    without,
)
from wincey.model.address import Subnet


def net(text):
    return Subnet.parse(text)


NETWORK = net("10.3.0.0/16")
ME = CloudHost(("eni-1", "i-1"), forwards=True)
TO = net("10.3.1.0/24")


def route(destination="10.3.1.0/24", hop=("eni-1",), state="active", table="t", **more):
    return TableRoute(table, net(destination), hop, state, **more)


def tables(*routes, **more):
    return [Table("t", tuple(routes), len(routes), **more)]


def needed(*routes):
    found = tables(*routes)
    return steps(found, by_destination(found).get(TO, {}), TO, ME)


@pytest.mark.parametrize(
    "there",
    [
        route(),
        route(hop=("i-1",)),  # as EC2 shows routes that were put with the instance
        route(state="pending"),
    ],
)
def test_a_route_that_is_as_it_must_be_is_left_alone(there):
    assert needed(there) == []


@pytest.mark.parametrize(
    "old", [None, route(hop=("eni-2",)), route(state="blackhole"), route(hop=("eni-2",), state="pending")]
)
def test_a_route_that_is_not_is_put(old):
    assert needed(*filter(None, [old, route("10.3.1.0/25"), route("10.3.0.0/16")])) == [Step("t", TO, ME, old)]


@pytest.mark.parametrize("state", ["active", "blackhole"])
def test_a_route_to_what_is_no_host_is_nobodys_to_replace(state):
    with pytest.raises(CloudForeign, match=r"t has a route 10.3.1.0/24 to what is no host"):
        needed(route(hop=(), state=state))


def held(*leased, ours=("eni-1", "eni-2")):
    return Held([net(each) for each in leased], set(ours), [NETWORK])


@pytest.mark.parametrize(
    "there",
    [
        route(hop=("eni-2",)),
        route(hop=("eni-9",), state="blackhole"),
        route(hop=("eni-9",), marked=True),
        route("10.3.77.0/28", hop=("eni-2", "i-2")),
    ],
)
def test_stale(there):
    assert stale(tables(there), held("10.3.2.0/24")) == [there]
    assert stale(tables(there), held(str(there.destination))) == []


@pytest.mark.parametrize(
    "there",
    [
        route("10.4.1.0/24"),  # outside the cluster network
        route("10.0.0.0/8"),
        route(hop=("eni-9",)),  # to a host that is none of ours
        route(hop=()),
        route(hop=(), state="blackhole"),  # of a peering that is gone
        route(state="pending"),
        route("10.3.2.0/25"),  # part of a lease
        route("10.3.0.0/16"),  # around one
        route("10.3.2.0/24", state="blackhole"),  # its owner replaces it
    ],
)
def test_not_stale(there):
    assert stale(tables(there), held("10.3.2.0/24")) == []


@given(
    st.lists(st.tuples(st.integers(0, 255), st.integers(8, 32)), max_size=12),
    st.tuples(st.integers(0, 255), st.integers(8, 32)),
)
def test_overlap_with_a_lease_protects_whatever_the_lengths(leases, other):
    def subnet(value):
        return Subnet(bytes([10, 3, value[0], value[0]]), value[1]).masked()

    leased, asked = [subnet(each) for each in leases], subnet(other)
    found = stale(tables(TableRoute("t", asked, ("eni-1",))), Held(leased, {"eni-1"}, [net("0.0.0.0/0")]))
    assert bool(found) == (not any(each.overlaps(asked) for each in leased))


def test_only_an_unbroken_time_makes_ripe():
    patience, there = Patience(30.0), route(hop=("eni-2",))
    assert patience.ripe([there], 0.0) == []
    assert patience.ripe([there], 29.0) == []
    assert patience.ripe([there], 30.0) == [there]
    assert patience.ripe([], 40.0) == []
    assert patience.ripe([there], 50.0) == []
    assert patience.ripe([route(hop=("eni-2",), state="blackhole")], 90.0) == [], "another state is another route"
    patience.ripe([there], 100.0)
    patience.forget()
    assert patience.ripe([there], 200.0) == []


def test_quota():
    step = Step("t", TO, ME, None)
    full = [Table("t", (), used=50, limit=50)]
    with pytest.raises(CloudFull, match=r"t holds 50 routes, which is its quota \(50\): no route for 10.3.1.0/24"):
        check_room(full, step)
    check_room(full, Step("t", TO, ME, route(hop=("eni-2",))))  # what is replaced takes no room
    check_room([Table("t", (), used=50)], step)
    assert nearly_full(Table("t", (), used=44, limit=50)) == ""
    assert nearly_full(Table("t", (), used=45, limit=50)).startswith("t holds 45 routes and its quota is 50")
    assert "the usual one is 50" in nearly_full(Table("t", (), used=45, usual=50))
    assert nearly_full(Table("t", (), used=450, limit=1000, usual=50)) == ""


def test_a_listing_is_kept_up_to_date_without_another_look():
    old = route(hop=("eni-2",))
    after = put_into(tables(old, limit=9), Step("t", TO, ME, old))
    assert after == (Table("t", (route(hop=ME.next_hop),), 1, 9),)
    after = put_into(after, Step("t", net("10.3.2.0/24"), ME, None))
    assert after[0].used == 2
    assert without(after, route(hop=ME.next_hop))[0].routes == (route("10.3.2.0/24", hop=ME.next_hop),)


def test_pauses_grow_to_minutes_and_begin_anew(caplog):
    backoff, now = Backoff(random.Random(7)), 0.0
    pauses = []
    for _ in range(14):
        backoff.failed("no", now)
        start = now
        while backoff.waiting(now):
            now += 0.25
        pauses.append(now - start)
    assert FIRST / 2 <= pauses[0] <= FIRST + 0.25
    assert MOST / 2 <= pauses[-1] <= MOST + 0.25
    assert len(caplog.records) == 1
    backoff.failed("another reason", now)
    assert len(caplog.records) == 2
    backoff.worked("it")
    assert not backoff.waiting(now)
    backoff.failed("no", now)
    assert not backoff.waiting(now + FIRST)
