"""The difference is what makes actual into desired, and nothing more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wincey.kernel.diff import diff
from wincey.model.address import Subnet
from wincey.model.state import Key, Neighbor, Object, Route, Sysctl

objects = st.one_of(
    st.builds(
        Neighbor,
        device=st.sampled_from(["a", "b"]),
        address=st.sampled_from([bytes(4), b"\1\1\1\1", bytes(16)]),
        mac=st.sampled_from([bytes(6), b"\2" * 6]),
    ),
    st.builds(
        Route,
        destination=st.builds(Subnet, st.sampled_from([bytes(4), b"\n\3\0\0"]), st.integers(8, 10)),
        device=st.sampled_from(["a", "b"]),
        gateway=st.sampled_from([None, b"\1\1\1\1"]),
    ),
    st.builds(Sysctl, path=st.sampled_from(["x", "y"]), value=st.sampled_from(["0", "1"])),
)
states = st.lists(objects).map(lambda items: {item.key: item for item in items})


@given(states, states)
def test_applied_it_makes_actual_into_desired(desired: dict[Key, Object], actual: dict[Key, Object]) -> None:
    changes = diff(desired, actual)
    result = dict(actual)
    for item in changes.delete:
        del result[item.key]
    for item in changes.put:
        result[item.key] = item
    assert result == desired


@given(states, states)
def test_it_touches_only_what_differs(desired: dict[Key, Object], actual: dict[Key, Object]) -> None:
    changes = diff(desired, actual)
    assert all(actual.get(item.key) != item for item in changes.put)
    assert all(item.key not in desired for item in changes.delete)
    assert len({item.key for item in (*changes.put, *changes.delete)}) == len(changes.put) + len(changes.delete)


@given(states)
def test_nothing_to_do_is_false(state: dict[Key, Object]) -> None:
    assert not diff(state, dict(state))


def test_something_surplus_beside_the_desired_object_goes_alone() -> None:
    wanted = Route(Subnet(b"\n\3\2\0", 24), "a", b"\1\1\1\1")
    beside = Route(Subnet(b"\n\3\2\0", 24), "a", b"\2\2\2\2")
    changes = diff({wanted.key: wanted}, {wanted.key: wanted, (*wanted.key, beside): beside})
    assert (changes.put, changes.delete) == ([], [beside])
