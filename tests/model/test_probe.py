"""What echo requests tell of a way."""

import re

import pytest

from wincey.model.probe import WINDOW, Probed, Target, Window

INNER, OUTER = (b"\n\x05\x01\0", b"\n\x05\x02\0"), (b"\nc\0\1", b"\nc\0\2")
THROUGH = Target(INNER, OUTER, 1450, 1500)
PLAIN = Target(None, OUTER, 1500, 1500)


def probed(inner="", outer="", mtu=None, refusal=""):
    """A letter a request: `.` answered, `x` lost."""
    made = Probed()
    for window, letters in ((made.inner, inner), (made.outer, outer)):
        for letter in letters:
            window.add(0.001 if letter == "." else None, refusal if letter == "x" else "")
    made.mtu = mtu
    return made


def test_a_window_forgets():
    window = Window()
    for number in range(WINDOW + 5):
        window.add(None if number < 5 else number / 1000)
    assert (window.asked, window.loss) == (WINDOW, 0.0)
    assert window.rtt == pytest.approx((5 + WINDOW + 4) / 2000)
    assert Window().rtt is None
    assert not Window().silent


@pytest.mark.parametrize(
    ("known", "target", "words"),
    [
        (probed("....", ".", 1450), THROUGH, None),
        (probed("..x." * 2, "."), THROUGH, None),  # too few to tell
        (probed("..x." * 5, "."), THROUGH, "25% of the last 20 requests were lost"),
        (probed("...xxx", "..."), THROUGH, r"not through the network: is a firewall between\? \(packets go in X\)"),
        (probed("...xxx", ".xxx"), THROUGH, "does not answer: its host is down"),
        (probed("xxx", "xxx", refusal="host unreachable"), THROUGH, r"does not answer \(host unreachable\)"),
        (probed("....", ".", 1350), THROUGH, "larger than 1350 bytes don't get there, and containers may send 1450"),
        (probed("", "....", 1500), PLAIN, None),
        (probed("", "xxx"), PLAIN, "does not answer"),
        (probed("", "....", 1400), PLAIN, "larger than 1400"),
    ],
)
def test_what_it_means(known, target, words):
    found = known.troubles(target, "in X")
    assert len(found) == (words is not None)
    if words:
        assert re.search(words, found[0]), found
