"""The desired state by owner: whatever the order, it is what the owners ask for."""

from hypothesis import given
from hypothesis import strategies as st

from wincey.agent.desired import DesiredState
from wincey.model.address import Subnet
from wincey.model.state import Changes, Route

A, B = Subnet.parse("10.3.1.0/24"), Subnet.parse("10.3.2.0/24")


def test_a_change_is_told_once_and_what_comes_and_goes_not_at_all():
    state = DesiredState()
    state.put("a", [Route(A, "flannel.1")])
    assert state.take_changes() == Changes(put=[Route(A, "flannel.1")])
    assert not state.take_changes()
    state.put("b", [Route(B, "flannel.1")])
    state.put("b", [])
    assert not state.take_changes()


def test_a_replaced_object_is_put_and_not_deleted():
    state = DesiredState()
    state.put("a", [Route(A, "flannel.1")])
    state.take_changes()
    state.put("a", [Route(A, "eth0")])
    assert state.take_changes() == Changes(put=[Route(A, "eth0")])


def test_what_two_ask_for_goes_with_the_last():
    state = DesiredState()
    device = Route(A, "flannel.9")
    state.put("a", [device])
    state.put("b", [device])
    state.put("a", [])
    assert list(state.objects.values()) == [device]
    state.put("b", [])
    assert not state.objects


objects = st.lists(
    st.builds(Route, st.sampled_from([A, B]), st.sampled_from(["x", "y"])), max_size=3, unique_by=lambda o: o.key
)


@given(st.lists(st.tuples(st.sampled_from("abcd"), objects), max_size=40))
def test_changes_applied_in_turn_give_the_state_and_every_wish_is_met(steps):
    state, applied, wishes = DesiredState(), {}, {}
    for owner, wanted in steps:
        state.put(owner, wanted)
        wishes[owner] = wanted
        changes = state.take_changes()
        for gone in changes.delete:
            assert applied.pop(gone.key) == gone
        applied.update({new.key: new for new in changes.put})
        assert applied == state.objects
        asked = {item.key: [] for items in wishes.values() for item in items}
        for items in wishes.values():
            for item in items:
                asked[item.key].append(item)
        assert applied.keys() == asked.keys()
        assert all(applied[key] in candidates for key, candidates in asked.items())
