"""The draft that is chosen is the best of all that there are, by trying them all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from specdec.plans import Plans

DRAW = np.random.default_rng(0)


def some(rows: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Survival, costs of passes and of drafts, and which rows ask a model; some rows can propose less."""
    survival = DRAW.random((rows, width)).cumprod(1)
    survival[np.arange(width) >= DRAW.integers(0, width + 1, rows)[:, None]] = 0
    passes = 1 + DRAW.random(rows * width + 1).cumsum() * DRAW.choice([0.01, 0.3])
    drafts = np.concatenate([[0], DRAW.random(width).cumsum() * DRAW.choice([0.01, 0.3])])
    return survival, passes, drafts, DRAW.random(rows) < 0.7


def taken(
    lengths: tuple[int, ...], survival: np.ndarray, passes: np.ndarray, drafts: np.ndarray, asks: np.ndarray
) -> float:
    """Seconds for what a plain step brings, of a draft with these lengths."""
    gained = sum(float(row[:length].sum()) for row, length in zip(survival, lengths, strict=True)) / len(lengths)
    depth = max((length for length, model in zip(lengths, asks, strict=True) if model), default=0)
    return float(passes[sum(lengths)] + drafts[depth]) / (1 + gained)


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (1, 6), (2, 4), (3, 3), (4, 2)])
def test_no_draft_is_better_than_the_one_that_is_chosen(rows: int, width: int) -> None:
    chosen = 0
    for _ in range(60):
        survival, passes, drafts, asks = some(rows, width)
        limits = (survival > 0).sum(1)
        every = list(itertools.product(*(range(limit + 1) for limit in limits)))
        # A draft that asks no model costs no drafting; whoever plans without it sees rows that ask none.
        least = min((taken(n, survival, passes, drafts, asks) for n in every if any(n)), default=None)
        free = Plans(survival * ~asks[:, None], passes, drafts * 0, np.zeros_like(asks))
        plans = [(made, plan) for made in (free, Plans(survival, passes, drafts, asks)) if (plan := made.best())]
        if least is None:
            assert not plans
            continue
        made, plan = min(plans, key=lambda found: found[1].seconds)
        lengths = made.lengths(plan)
        assert plan.seconds == pytest.approx(least) and sum(lengths) == plan.tokens
        assert taken(tuple(lengths), survival, passes, drafts, asks) <= plan.seconds + 1e-9
        assert made.like(plan.depth, plan.tokens) == plan
        chosen += 1
    assert chosen > 20


def test_passes_of_unknown_cost_are_left_out() -> None:
    plans = Plans(np.full((4, 3), 0.9), np.array([1.0, 1.1, 1.2]), np.zeros(4), np.ones(4, dtype=bool))
    plan = plans.best()
    assert plan is not None and plan.tokens == 2 and plans.like(3, 99) is None and plans.like(1, 0) is None


def test_a_plan_by_other_acceptance_is_noticed() -> None:
    """Negative control: rows are mistaken for each other."""
    survival = np.array([[0.9, 0.8, 0.7], [0.1, 0.01, 0.001]])
    costs = (1 + 0.3 * np.arange(7), np.zeros(4), np.zeros(2, dtype=bool))
    right, wrong = (Plans(given, *costs) for given in (survival, survival[::-1]))
    best, mistaken = right.best(), wrong.best()
    assert best is not None and mistaken is not None
    lengths = tuple(wrong.lengths(mistaken))
    assert taken(lengths, survival, *costs) > 1.2 * best.seconds
