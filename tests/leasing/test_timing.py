"""When to renew."""

import random

from hypothesis import given
from hypothesis import strategies as st

from wincey.leasing.timing import RETRY_MOST, renew_in, retry_in


@given(st.floats(1, 86400), st.floats(60, 86340), st.integers())
def test_renewal_is_before_the_margin_and_spread(left, margin, seed):
    pause = renew_in(left, margin, random.Random(seed))
    assert 0 <= pause <= left / 2
    assert pause <= max(0, left - margin)


def test_renewals_of_a_cluster_are_spread_over_hours():
    times = [renew_in(86400, 3600, random.Random(seed)) for seed in range(500)]
    assert max(times) - min(times) > 2 * 3600


@given(st.integers(1, 10_000), st.integers())
def test_retries_grow_to_a_bound(failures, seed):
    assert 0 < retry_in(failures, random.Random(seed)) <= RETRY_MOST
