"""Which subnet a host gets: the pure decision."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wincey.leasing.allocate import Identity, Pool, decide, losers
from wincey.model.address import Subnet, parse_address
from wincey.model.config import NetworkConfig
from wincey.model.errors import OutOfSubnets
from wincey.model.lease import Lease, LeaseAttrs, LeaseKey

V4 = NetworkConfig.parse(b'{"Network": "10.3.0.0/16"}')
DUAL = NetworkConfig.parse(b'{"Network": "10.3.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}')
ME = Identity(parse_address("10.99.0.1"), None)


def lease(key: str, ip: str, *, permanent: bool = False, created: int = 1) -> Lease:
    return Lease(LeaseKey.parse(key), LeaseAttrs(parse_address(ip)), created, created, permanent=permanent)


def pick(config, leases, previous=(), blocked=(), seed=1, identity=ME):
    return decide(
        config,
        leases,
        identity,
        previous=[Subnet.parse(text) for text in previous],
        blocked=[Subnet.parse(text) for text in blocked],
        rng=random.Random(seed),
    )


def test_own_lease_is_reused():
    mine = lease("10.3.7.0-24", "10.99.0.1")
    decision = pick(V4, [lease("10.3.8.0-24", "10.99.0.2"), mine])
    assert (decision.reuse, decision.take, decision.drop) == (mine, None, ())


def test_the_lease_that_is_held_stays_ours_whatever_somebody_changed_of_it_while_our_address_changed():
    held = lease("10.3.6.0-24", "192.0.2.77")
    meddled = msgspec.structs.replace(held, attrs=LeaseAttrs(held.attrs.public_ip, backend_type="host-gw"), created=9)
    decision = decide(V4, [meddled], ME, previous=[], held=held, rng=random.Random(1))
    assert decision.reuse == meddled
    taken = lease("10.3.6.0-24", "192.0.2.78")
    assert decide(V4, [taken], ME, previous=[], held=held, rng=random.Random(1)).take


def test_who_runs_keeps_its_lease_beside_a_reservation_until_it_starts_anew():
    held = lease("10.3.6.0-24", "10.99.0.1")
    reserved = lease("10.3.9.0-24", "10.99.0.1", permanent=True)
    for now, best in ((held, held), (None, reserved)):
        decision = decide(V4, [reserved, held], ME, previous=[held.key.v4], held=now, rng=random.Random(1))
        assert (decision.reuse, decision.drop) == (best, ())


def test_own_reservation_wins_over_an_ordinary_lease():
    reserved = lease("10.3.9.0-24", "10.99.0.1", permanent=True, created=5)
    assert pick(V4, [lease("10.3.7.0-24", "10.99.0.1"), reserved]).reuse == reserved


def test_own_lease_outside_of_a_changed_config_is_dropped_for_one_inside():
    stale = lease("10.4.7.0-24", "10.99.0.1")
    decision = pick(V4, [stale])
    assert decision.drop == (stale,)
    assert V4.allows(decision.take)


def test_a_reservation_that_does_not_fit_is_left_to_the_administrator():
    assert pick(V4, [lease("10.4.7.0-24", "10.99.0.1", permanent=True)]).drop == ()


def test_previous_subnet_is_taken_when_free_and_left_when_not():
    assert str(pick(V4, [], previous=["10.3.7.0/24"]).take) == "10.3.7.0-24"
    assert str(pick(V4, [lease("10.3.7.0-24", "10.99.0.2")], previous=["10.3.7.0/24"]).take) != "10.3.7.0-24"
    assert pick(V4, [], previous=["10.9.7.0/24"]).take.v4 != Subnet.parse("10.9.7.0/24")
    assert pick(V4, [], previous=["10.3.7.0/25"]).take.v4.length == 24


def test_a_network_that_becomes_dual_stack_keeps_its_ipv4_subnets():
    old = lease("10.3.7.0-24", "10.99.0.1")
    decision = pick(DUAL, [old, lease("10.3.8.0-24", "10.99.0.2")])
    assert str(decision.take.v4) == "10.3.7.0/24"
    assert decision.take.v6.length == 64
    assert decision.drop == (old,)


def test_ipv6_only_is_told_apart_by_the_ipv6_address():
    config = NetworkConfig.parse(b'{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:3::/48"}')
    me = Identity(None, parse_address("fd00:99::1"))
    other = Lease(LeaseKey.parse("0.0.0.0-0&fd00:3:0:5::-64"), LeaseAttrs(None, parse_address("fd00:99::2")))
    decision = pick(config, [other], identity=me)
    assert decision.reuse is None
    assert decision.take.v4 is None
    assert decision.take.v6 != other.key.v6


def test_every_free_subnet_is_a_candidate():
    """Flannel knows only the first 100."""
    takes = {pick(V4, [], seed=seed).take.v4 for seed in range(2000)}
    assert len(takes) > 240


def test_exhaustion_says_how_many():
    leases = [lease(f"10.3.{i}.0-24", f"10.99.1.{i}") for i in range(1, 256)]
    with pytest.raises(OutOfSubnets, match=r"all 255 subnets from 10.3.1.0/24 to 10.3.255.0/24 .*255 leases"):
        pick(V4, leases)
    config = NetworkConfig.parse(b'{"Network": "10.3.0.0/16", "SubnetMin": "10.3.9.0", "SubnetMax": "10.3.5.0"}')
    with pytest.raises(OutOfSubnets, match="SubnetMin is above SubnetMax"):
        pick(config, [])


def test_a_key_with_an_unreadable_value_is_not_given_away():
    config = NetworkConfig.parse(b'{"Network": "10.3.0.0/16", "SubnetMin": "10.3.5.0", "SubnetMax": "10.3.6.0"}')
    assert {pick(config, [], blocked=["10.3.5.0/24"], seed=seed).take.v4 for seed in range(20)} == {
        Subnet.parse("10.3.6.0/24")
    }


def test_of_two_overlapping_leases_the_older_one_stands():
    mine = lease("10.3.7.0-24", "10.99.0.1", created=7)
    assert losers(mine, [lease("10.3.6.0-23", "10.99.0.2", created=6)], ME)
    assert not losers(mine, [lease("10.3.6.0-23", "10.99.0.2", created=8)], ME)
    assert not losers(mine, [lease("10.3.8.0-24", "10.99.0.2", created=6)], ME)


subnets = st.builds(
    lambda index, length: Subnet((0x0A030000 + index * 16).to_bytes(4, "big"), length).masked(),
    st.integers(0, 4095),
    st.integers(20, 28),
)


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(subnets, max_size=60), st.integers(20, 28), st.integers(0, 10**6))
def test_a_pick_never_overlaps_and_fails_only_when_all_is_taken(leased, length, seed):
    config = NetworkConfig.parse(f'{{"Network": "10.3.0.0/16", "SubnetLen": {length}}}')
    leases = [Lease(LeaseKey(subnet), LeaseAttrs(parse_address("10.99.0.9"))) for subnet in leased]
    pool = Pool.of_v4(config)
    free = [i for i in range(pool.count) if not any(pool.at(i).overlaps(subnet) for subnet in leased)]
    if not free:
        with pytest.raises(OutOfSubnets):
            pick(config, leases, seed=seed)
        return
    decision = pick(config, leases, seed=seed)
    assert pool.index(decision.take.v4) in free
    assert config.allows(decision.take)


def test_pool_at_the_end_of_the_address_space_does_not_wrap():
    config = NetworkConfig.parse(b'{"Network": "255.255.0.0/16"}')
    pool = Pool.of_v4(config)
    assert str(pool.at(pool.count - 1)) == "255.255.255.0/24"
    assert pool.count == 255
