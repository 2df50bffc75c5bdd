"""It is decided seldom where deciding takes long beside a step, and where drafts do not pay."""

from __future__ import annotations

from specdec.pacing import LONGEST_STAY, DecisionCost, PlainBackoff


def cost(share: float) -> DecisionCost:
    found = DecisionCost()
    found.share = share
    return found


def rests(share: float, promise: float, count: int, *, may_change: bool = False) -> list[int]:
    """How long a number of them in a row are."""
    rest, found = PlainBackoff(), []
    for _ in range(count):
        rest.begin(cost(share), promise, None, may_change=may_change)
        found.append(rest.left)
        rest.add(rest.left)
        assert not rest.left
    return found


def test_rests_grow_while_drafts_do_not_pay() -> None:
    assert rests(0.01, 0.9, 6) == [3, 7, 15, 31, 63, 63]


def test_where_any_token_may_change_the_verdict_rests_are_as_short_as_deciding_allows() -> None:
    assert rests(0.04, 0.9, 4, may_change=True) == [3, 7, 8, 8]
    assert rests(0.01, 0.9, 3, may_change=True) == [2, 2, 2]
    assert rests(0.001, 0.9, 3, may_change=True) == [0, 0, 0]
    assert rests(0.06, 0.9, 6, may_change=True) == rests(0.06, 0.9, 6), "costly"


def test_where_deciding_is_costly_rests_are_long_at_once_and_longer_where_the_verdict_is_clear() -> None:
    unclear, clear = rests(1.0, 0.95, 6), rests(1.0, 0.5, 6)
    assert unclear[0] < clear[0] < 64 and unclear == sorted(unclear) and clear[-1] == 200
    assert sum(clear[:3]) > 300, "a decision of every hundred steps at most"
    assert rests(100.0, 0.5, 8)[-1] == 1023


def test_drafts_that_pay_end_rests() -> None:
    rest = PlainBackoff()
    for _ in range(3):
        rest.begin(cost(0.01), 0.9, None, may_change=False)
    rest.end()
    assert not rest.left
    rest.begin(cost(0.01), 0.9, None, may_change=False)
    assert rest.left == 3


def test_a_verdict_at_a_rows_end_says_nothing_of_the_next() -> None:
    rest = PlainBackoff()
    rest.begin(cost(1.0), 0.1, 5, may_change=False)
    assert rest.left == 5
    rest.begin(cost(0.01), 0.9, None, may_change=False)
    assert rest.left == 3


def test_what_deciding_takes_is_spread_over_long_stays() -> None:
    found = DecisionCost()
    for _ in range(40):
        found.add(1.0)
        assert found.spread(LONGEST_STAY) == 1.0
    assert abs(found.upkeep * LONGEST_STAY - 1.0) < 0.01
    upkeep = found.upkeep
    found.add(100.0)
    assert found.spread(4) == 100.0 and found.upkeep == upkeep, "lengths are tried, which does not go on"
    found.add(100.0)
    assert found.spread(0) == 100.0 and found.spread(LONGEST_STAY) == 0.0 and found.upkeep < upkeep
