"""Draft lengths are chosen by what passes cost and how drafts fare, and what was measured is remembered."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from specdec import Engine, Settings, choice, experience, ledger, pacing
from specdec.control import Adaptive
from specdec.costs import Costs, read_costs, write_costs
from specdec.draft import Outlook, Prices
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError
from specdec.experience import MOST_DRAFT_TOKENS, Experience
from specdec.ledger import Account
from specdec.sequences import Step
from toys import TableLM, native, noisy, random_table, tiny_gpt

pytestmark = pytest.mark.chosen


class World:
    """A machine with given costs and a drafter with a given chance of acceptance; time is counted, not spent.

    A plain step takes 1 second; others ``token`` more for each further token of a pass, ``draft`` for drafting each,
    and ``book`` for what is done besides; to begin a step that drafts takes ``begin_seconds``. A draft model takes
    ``reading`` for every token that it has not read; rows end after 256 new ones. Times are disturbed by a factor of
    about 1 +- ``noise``.
    """

    def __init__(
        self, *, rows: int = 1, accepted: float = 0.7, draft: float = 0.05, token: float = 0.02, book: float = 0.0,
        reading: float = 0.0, noise: float = 0.0, begin_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self.accepted, self.draft, self.token, self.book = accepted, draft, token, book
        self.reading, self.noise, self.begin_seconds = reading, noise, begin_seconds
        self.controller = Adaptive(Costs())
        self.random = np.random.default_rng(0)
        self.sequences: Any = SimpleNamespace(draft_limits=lambda: [100] * rows)
        self.ids = itertools.count()
        self.begin(rows)
        self.seconds, self.tokens = 0.0, 0
        self.lengths: list[int] = []

    def begin(self, rows: int) -> None:
        """New rows, of which the draft model has read nothing."""
        self.rows, self.unread = rows, 128 * rows
        self.sequences.rows = [SimpleNamespace(id=next(self.ids), tokens=[0] * 128, remaining=256) for _ in range(rows)]

    def pass_seconds(self, drafted: int) -> float:
        """Of a pass that checks so many tokens of all rows together."""
        return 1.0 + self.token * drafted + self.book * (drafted > 0)

    def step(self) -> None:
        lengths = self.controller.choose(self.sequences, SimpleNamespace())  # type: ignore[arg-type]
        assert all(0 <= length <= MOST_DRAFT_TOKENS for length in lengths)
        is_drafted = np.arange(max(lengths)) < np.array(lengths)[:, None]
        survives = np.zeros(is_drafted.shape, dtype=bool)
        survives[is_drafted] = self.random.random(sum(lengths)) < self.accepted
        accepted = survives.cumprod(axis=1).sum(axis=1).tolist()
        width = max(lengths)
        done = SimpleNamespace(
            rows=self.sequences.rows,
            drafted=lengths,
            accepted=accepted,
            committed=[n + 1 for n in accepted],
            finished=[],
            passes=1,
            is_first=False,
        )
        drafting, verifying = width * self.draft, self.pass_seconds(sum(lengths))
        drafting += self.reading * self.unread * (width > 0)
        self.unread = 0 if width else self.unread + self.rows
        disturbed = np.exp(self.noise * self.random.standard_normal() - self.noise**2 / 2)
        beginning = self.begin_seconds * (width > 0)
        self.controller.observe([done], drafting * disturbed, verifying * disturbed, beginning)  # type: ignore[arg-type]
        self.seconds += (drafting + verifying) * disturbed + beginning
        self.tokens += sum(done.committed)
        self.lengths.append(width)
        for row, count in zip(self.sequences.rows, done.committed, strict=True):
            row.tokens += [0] * count
            row.remaining -= count if self.reading else 0  # without it rows go on for ever
        if self.reading and min(row.remaining for row in self.sequences.rows) <= 0:
            self.begin(self.rows)

    def run(self, steps: int) -> float:
        """Tokens per second of the last ``steps`` steps."""
        self.seconds, self.tokens, self.lengths = 0.0, 0, []
        for _ in range(steps):
            self.step()
        return self.tokens / self.seconds

    def fixed(self, length: int) -> float:
        """Tokens per second that a draft length is worth."""
        gained = sum(self.accepted**i for i in range(1, length + 1))
        seconds = length * self.draft + self.pass_seconds(self.rows * length)
        return self.rows * (1 + gained) / (seconds + self.reading * 128 * self.rows * (1 + gained) / 256 * (length > 0))

    @property
    def best(self) -> float:
        """Tokens per second of the best length."""
        return max(self.fixed(length) for length in range(MOST_DRAFT_TOKENS + 1))


@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("accepted", [0.05, 0.5, 0.8, 0.95])
@pytest.mark.parametrize(("draft", "token"), [(0.02, 0.01), (0.2, 0.02), (0.05, 0.2)])
def test_no_fixed_length_is_much_faster(rows: int, accepted: float, draft: float, token: float) -> None:
    world = World(rows=rows, accepted=accepted, draft=draft, token=token)
    world.run(200)
    assert world.run(1600 if rows == 1 else 600) > 0.95 * world.best
    assert world.run(600) > 0.97 * world.fixed(0)  # never slower than plain decoding


SMALL = {  # what a draft costs on a small model, in plain steps: drafting a token, checking it, and all the rest
    "cheap": {"draft": 0.05, "token": 0.01, "book": 0.1, "reading": 0.001},
    "usual": {"draft": 0.2, "token": 0.05, "book": 0.3, "reading": 0.001},
    "costly": {"draft": 0.45, "token": 0.1, "book": 0.5, "reading": 0.002},
}


def from_the_first_step(rows: int, accepted: float, machine: str, noise: float) -> tuple[float, float]:
    """2,000 steps on a machine of which nothing is known, measured by plain decoding and by the best fixed length.

    The mean of several such machines, as drafts are lucky or not.
    """
    rates = []
    for seed in range(4):
        world = World(rows=rows, accepted=accepted, noise=noise, **SMALL[machine])
        world.random = np.random.default_rng(seed)
        rates.append(world.run(2000))
    rate = float(np.mean(rates))
    return rate / world.fixed(0), rate / world.best


@pytest.mark.parametrize("noise", [0.0, 0.15])
@pytest.mark.parametrize("rows", [1, 8, 32])
@pytest.mark.parametrize("accepted", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("machine", list(SMALL))
def test_small_models_are_never_slower_from_the_first_step(
    machine: str, accepted: float, rows: int, noise: float
) -> None:
    of_plain, of_best = from_the_first_step(rows, accepted, machine, noise)
    assert of_plain > 0.97 and of_best > (0.95 if noise == 0 else 0.9)


def test_a_controller_that_believes_in_every_draft_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: acceptance is not learned; a useless draft then costs."""
    monkeypatch.setattr(Experience, "count_chains", lambda *given: None)
    world = World(accepted=0.05, draft=0.2)
    assert world.run(100) < 0.9 * world.fixed(0)


def test_it_notices_when_drafting_pays_again() -> None:
    world = World(accepted=0.0, draft=0.1)
    world.run(1500)
    assert world.tokens / world.seconds > 0.97 * world.fixed(0) and world.controller.decisions.probes > 0
    world.accepted = 0.9
    world.run(1500)
    assert world.run(200) > 0.9 * world.best


def test_a_slow_first_measurement_is_forgotten() -> None:
    """As passes of shapes that were never run are slow."""
    world = World(accepted=0.8)
    usual = world.pass_seconds
    world.pass_seconds = lambda drafted: 3.0 if drafted and world.tokens < 30 else usual(drafted)  # type: ignore[method-assign]
    world.run(1500)
    assert world.run(600) > 0.9 * world.best


@pytest.mark.parametrize("believed", [0.4, 1.0, 2.5])
def test_what_another_program_measured_of_plain_decoding_is_measured_again(believed: float) -> None:
    """The machine was busy then, or is now: drafts that lose 10 % seemed to pay, or such that gain none to."""
    for accepted, pays in ((0.1, False), (0.8, True)):
        known = World(rows=8, accepted=accepted, token=0.02, book=0.3)
        known.run(400)
        costs = Costs.from_dict(known.controller.costs.as_dict())
        costs._passes[8][0].latest.clear()
        for _ in range(3):
            costs._passes[8][0].latest.append((0, believed))
        assert costs.knows(8, 0) and not costs.is_fresh(8)
        world = World(rows=8, accepted=accepted, token=0.02, book=0.3)
        world.controller = Adaptive(costs)
        world.run(3)
        assert world.lengths[0] == 0 and costs.is_fresh(8)
        assert world.run(400) > 0.93 * world.best and pays == (np.median(world.lengths) > 0)


@pytest.mark.parametrize("pace", [0.5, 1.0])
def test_what_another_program_measured_of_drafts_follows_plain_decoding(pace: float) -> None:
    """Else a machine that is faster by now would seem to make drafts dear, and nobody would try them."""
    before = Costs()
    for drafted, seconds in ((0, 2.0), (4, 2.2), (8, 2.4)) * 3:
        before.count_pass(1, drafted, seconds)
    costs = Costs.from_dict(before.as_dict())
    assert costs.passes(1, 8)[[0, 4, 8]].tolist() == pytest.approx([2.0, 2.2, 2.4])
    costs.count_pass(1, 0, pace * 2.0)
    assert costs.passes(1, 8)[[0, 4, 8]].tolist() == pytest.approx([pace * 2.0, pace * 2.2, pace * 2.4])


def test_drafts_that_cost_nothing_are_made_where_a_models_do_not_pay() -> None:
    """Two rows: a lookup is sure of the first, a model's slow passes would serve the second."""

    class Both:
        def outlook(self, sequences: Any, most: list[int], prices: Prices) -> Outlook:
            assert min(prices) >= 0
            return Outlook(np.array([[0.9, 0.8, 0.7], [0.5, 0.25, 0.12]]), np.array([False, True]))

        propose = None

    world = World(rows=2)
    costs = world.controller.costs
    for seconds, drafted in ((1.0, 0), (1.05, 2), (1.1, 6)):
        for _ in range(2):
            costs.count_pass(2, drafted, seconds)
    costs.count_draft(2, 1, 5.0)
    assert world.controller.choose(world.sequences, Both()) == [3, 0]  # type: ignore[arg-type]
    cheap = World(rows=2)
    cheap.controller = Adaptive(Costs.from_dict(costs.as_dict()))
    cheap.controller.costs.count_pass(2, 0, 1.0)
    for _ in range(5):
        cheap.controller.costs.count_draft(2, 1, 0.001)
    assert cheap.controller.choose(cheap.sequences, Both()) == [3, 3]  # type: ignore[arg-type]
    alone = World(rows=2)
    alone.controller = Adaptive(Costs.from_dict(costs.as_dict()))
    alone.controller.costs.count_pass(2, 0, 1.0)
    alone.controller._deciding.count_alone(
        100.0
    )  # a step with lookups cannot run with others, which takes as long as that
    assert alone.controller.choose(alone.sequences, Both()) == [0, 0]  # type: ignore[arg-type]


def test_what_came_last_counts_most_and_rows_differ() -> None:
    experience = Experience([0.5] * 4)
    assert experience.rates([7]).tolist() == [[0.5] * 4]
    for _ in range(100):
        experience.count_chain(1, 4, 4)
        experience.count_chain(2, 4, 0)  # one token was tried and refused, three were never looked at
    good, bad, new = experience.rates([1, 2, 3])
    assert good.min() > 0.8 and bad[0] < 0.25 and 0.4 < new[0] < 0.6 and new[1] > 0.9
    assert experience.rates([3], pooled=False).tolist() == [[0.5] * 4]
    for _ in range(60):
        experience.count_chain(1, 4, 0)
    assert experience.rates([1])[0, 0] < 0.2
    experience.count_chain(1, 0, 0)
    experience.forget([1, 2, 99])
    assert list(experience) == []


def test_rows_that_ended_are_forgotten() -> None:
    gpt = tiny_gpt(0)
    engine = Engine(native(gpt), ModelDrafter(native(noisy(gpt, 0.01))))
    engine.generate([[i % 7] for i in range(60)], max_new_tokens=[1 + i % 9 for i in range(60)], max_batch_size=4)
    controller = engine.controller("auto", greedy=True)
    assert isinstance(controller, Adaptive) and list(controller._lessons.experience) == []


def test_costs_are_interpolated_and_kept(tmp_path: Path) -> None:
    costs = Costs()
    assert not costs.knows(8, 0) and costs.drafts(8, 2).tolist() == [0, 0, 0]
    for seconds in (5.0, 1.0, 1.1, 1.0):  # the first was disturbed
        costs.count_pass(8, 0, seconds)
    for _ in range(2):
        costs.count_pass(7, 4, 1.5)  # 7 rows count as 8
        costs.count_pass(8, 8, 2.0)
        costs.count_draft(8, 2, 0.5)
    assert costs.knows(8, 0) and costs.most_drafted(8) == 8 and not costs.knows(1, 0)
    checks = [1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875, 2.0, 2.125]  # more than a line from plain decoding says
    assert costs.passes(8, 9).tolist() == [1.0, *checks]
    assert costs.drafts(8, 3).tolist() == costs.drafts(1000, 3).tolist() == [0.0, 0.25, 0.5, 0.75]
    file = tmp_path / "costs" / "x.json"
    write_costs(file, {"greedy": costs})
    again = read_costs(file)["greedy"]
    assert again.passes(8, 8).tolist() == costs.passes(8, 8).tolist() and again.drafts(8, 1)[1] == 0.25
    for damage in ("", "{", "[]", '{"greedy": 3}', '{"greedy": {"passes": {"a": 1}}}'):
        file.write_text(damage)
        assert read_costs(file) == {}
    assert read_costs(tmp_path / "none.json") == {}


@pytest.mark.parametrize("drafter", ["model", "suffix"])
def test_an_engine_learns_writes_and_explains(tmp_path: Path, drafter: str) -> None:
    file = tmp_path / "costs.json"
    gpt = tiny_gpt(0)
    drafters = {"model": lambda: ModelDrafter(native(noisy(gpt, 0.01))), "suffix": SuffixDrafter}
    engine = Engine(native(gpt), drafters[drafter](), costs_file=file)
    plain = engine.generate([[1, 2, 3], [4]], max_new_tokens=60, num_draft_tokens=0)
    assert not file.exists() and plain.stats.control.lengths == {0: 60}
    output = engine.generate([[1, 2, 3], [4]], max_new_tokens=60)
    assert output.token_ids == plain.token_ids
    assert sum(output.stats.control.lengths.values()) == output.stats.num_target_passes
    assert "draft lengths" in str(output.stats) and "plain expected" in str(output.stats.control)
    assert read_costs(file)["greedy"].knows(2, 0)
    fixed = engine.generate([[1, 2, 3], [4]], max_new_tokens=60, num_draft_tokens=2)
    assert set(fixed.stats.control.lengths) <= {0, 1, 2} and fixed.token_ids == plain.token_ids
    total = (fixed.stats + plain.stats).control
    assert total.lengths[0] == fixed.stats.control.lengths.get(0, 0) + 60


def test_a_disk_that_takes_nothing_costs_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = Engine(native(tiny_gpt(0)), SuffixDrafter(), costs_file=tmp_path / "file" / "costs.json")
    with pytest.warns(UserWarning, match="measured costs are not kept"):
        output = engine.generate([[1, 2, 3]], max_new_tokens=8)
    assert len(output.token_ids[0]) == 8


def test_a_word_that_is_no_length_is_refused() -> None:
    for wrong in ("0 to 64", "4", "AUTO", ""):
        with pytest.raises(ConfigError, match='from 0 to 64 or "auto"'):
            Settings(num_draft_tokens=wrong)


def test_guesses_that_were_not_proposed_are_judged_too() -> None:
    """So that a lookup which does not pay is noticed when it begins to."""
    drafter = SuffixDrafter()
    engine = Engine(TableLM(random_table(6, seed=3), context=512), drafter)
    controller: Any = engine.controller("auto", greedy=True)
    controller._chooser.choose = lambda given, before: before.given_up(1)
    output = engine.generate([[1, 2, 1, 2]], max_new_tokens=200)
    assert output.stats.num_draft_tokens == 0
    assert drafter.experience.rates([-1])[0].max() > 0.9


def test_a_probe_may_meet_a_number_of_rows_of_which_nothing_is_known() -> None:
    controller = Adaptive(Costs())
    rows = [SimpleNamespace(id=number, tokens=[0]) for number in range(6)]
    controller._lessons.since = 5  # the draft model has to catch up, so this step tells nothing of costs
    for _ in range(2):  # the first one is always slow
        controller.observe([Step(rows, [2] * 6, [0] * 6, [1] * 6)], 0.01, 0.01)
    controller._end_spell()
    assert controller.decisions.probes == 1 and not controller.costs.knows(6, 0)


def test_rows_may_leave_while_it_tries() -> None:
    """Of the fewer rows that are left nothing is known, not even what a plain step takes."""
    world = World(rows=4)
    while not world.controller._choice.is_try:
        world.step()
    world.begin(3)
    world.sequences.draft_limits = lambda: [100] * 3
    world.step()
    assert world.lengths[-1] == 0 and world.run(300) > world.fixed(0)


def test_rows_may_join_while_a_choice_is_kept() -> None:
    """Nothing is learned between, so steps of different batches must not be taken for one."""
    world = World(rows=2, accepted=0.9)
    for rows in (5, 3, 8):
        world.run(101)
        while not world.controller._lessons._spell:
            world.step()
        gone = [row.id for row in world.sequences.rows]
        world.begin(rows)
        world.sequences.draft_limits = lambda rows=rows: [100] * rows
        world.step()
        assert not set(gone).intersection(world.controller._lessons.experience)
    assert world.run(500) > world.fixed(0)


@pytest.mark.parametrize("seed", range(4))
def test_plain_steps_that_follow_drafts_are_not_taken_for_usual_ones(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take twice as long here, as weights have left the caches; believing them, drafts that lose would pay."""
    monkeypatch.setattr(ledger, "_SETTLE_SECONDS", math.inf)  # steps take seconds here, and settle nothing by that
    world, plain = World(accepted=0.3, draft=0.3), 0
    world.random = np.random.default_rng(seed)

    def seconds(drafted: int) -> float:
        nonlocal plain
        plain = 0 if drafted else plain + 1
        return 1.0 if plain > 4 else 2.0

    world.pass_seconds = seconds  # type: ignore[method-assign]
    world.run(500)
    assert world.controller.costs.passes(1, 0)[0] == pytest.approx(1.0)
    assert world.run(500) > 0.97


def test_what_drafts_lose_is_bounded_whatever_they_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance is not learned, so that a useless draft promises to pay for ever; then nobody keeps the account either."""
    monkeypatch.setattr(Experience, "count_chains", lambda *given: None)
    world = World(accepted=0.05, draft=0.2)
    assert world.run(3000) > 0.97 * world.fixed(0)
    monkeypatch.setattr(Account, "book", lambda *given: None)
    world = World(accepted=0.05, draft=0.2)
    assert world.run(3000) < 0.9 * world.fixed(0)


def test_what_it_takes_to_decide_and_to_begin_is_lost_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes and drafts alone would pay, and what else steps take is not learned, but the account is kept."""
    monkeypatch.setattr(pacing, "_MANY", 1 << 30)
    world = World(accepted=0.6, begin_seconds=1.3)
    assert World(accepted=0.6).fixed(2) > 1.5 * world.fixed(0)
    assert world.run(3000) > 0.97 * world.fixed(0)
    monkeypatch.setattr(Account, "book", lambda *given: None)
    world = World(accepted=0.6, begin_seconds=1.3)
    assert world.run(3000) < 0.9 * world.fixed(0)


def test_a_machine_that_slows_down_is_no_loss_of_drafts() -> None:
    """Another program takes half of it while drafts are made; plain decoding was last measured before that."""
    world = World(accepted=0.8, noise=0.15)
    world.run(500)
    usual = world.pass_seconds
    world.draft, world.pass_seconds = 2 * world.draft, lambda drafted: 2 * usual(drafted)  # type: ignore[method-assign]
    assert world.run(1000) > 0.9 * world.best


def test_what_was_measured_a_while_ago_is_scaled_by_what_was_measured_beside_it() -> None:
    """The machine slows down while drafts of 4 are made; those of 2 were measured just before them, those of 1 long before."""
    costs = Costs()
    for drafted, seconds, times in ((1, 1.05, 7), (0, 1.0, 20), (2, 1.1, 7), (4, 1.2, 12), (2, 1.1, 12), (4, 1.8, 12)):
        for _ in range(times):
            costs.count_pass(1, drafted, seconds)
            if drafted:
                costs.count_draft(1, drafted, 0.1 * drafted * seconds)
    costs._curves.clear()
    assert costs.passes(1, 4).tolist() == pytest.approx([1.0, 1.05, 1.1 * 1.5, 1.725, 1.8])  # not plain ones
    assert costs.drafts(1, 4)[[1, 2, 4]].tolist() == pytest.approx([0.105, 0.22 * 1.5, 0.72])
    costs.count_pass(1, 2, 1.1)  # it is measured again
    costs._curves.clear()
    assert costs.passes(1, 4)[2] == pytest.approx(1.1)


@pytest.mark.parametrize("lends", [True, False])
def test_a_batch_that_shrinks_near_its_end_goes_on_drafting(lends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three rows nothing was measured, and too little is left to try it; four rows say what it costs."""
    if not lends:
        monkeypatch.setattr(Costs, "_lender", lambda self, size: size)
    world = World(rows=4, accepted=0.8)
    world.run(300)
    world.begin(3)
    world.sequences.draft_limits = lambda: [20] * 3
    for row in world.sequences.rows:
        row.remaining = 20
    world.run(12)
    assert (sum(length > 0 for length in world.lengths) >= 8) == lends


def test_costs_of_rows_of_which_little_is_known_are_those_of_others() -> None:
    costs = Costs()
    for rows, drafted, seconds in ((4, 0, 1.0), (4, 8, 1.5), (8, 0, 2.0), (8, 8, 2.1), (3, 0, 0.8)):
        for _ in range(7):
            costs.count_pass(rows, drafted, seconds)
    assert costs.most_drafted(3) == 8 and not costs.knows(3, 8)
    assert costs.passes(3, 8)[[0, 8]].tolist() == pytest.approx([0.8, 0.8 * 1.5])
    for _ in range(7):
        costs.count_pass(3, 8, 0.9)
    costs._curves.clear()
    assert costs.passes(3, 8)[8] == pytest.approx(0.9)


def test_neighbours_of_a_choice_are_measured_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    oldest = []
    for every in (choice._ASIDE, 1 << 30):
        monkeypatch.setattr(choice, "_ASIDE", every)
        ages = []
        for seed in range(4):
            world = World(accepted=0.8, draft=0.05, token=0.02)
            world.random = np.random.default_rng(seed)
            world.run(1500)
            for _ in range(6):
                world.run(500)
                depth = world.controller._chooser.kept[0]
                ages.append(min(world.controller.costs.age(1, near) for near in (depth // 2, 2 * depth)))
            assert world.run(600) > 0.95 * world.best
        oldest.append(np.median(ages))
    assert oldest[0] < 0.3 * oldest[1], oldest


def test_refusals_that_are_to_be_expected_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of all drafts are refused at once, so three in a row say little."""
    decided = []
    decide = Adaptive._decide
    monkeypatch.setattr(Adaptive, "_decide", lambda self, *given: (decided.append(1), decide(self, *given))[1])
    counts = []
    for unlikely in (choice._UNLIKELY, 0.999):
        monkeypatch.setattr(choice, "_UNLIKELY", unlikely)
        world = World(accepted=0.5, draft=0.02)
        world.run(500)
        decided.clear()
        world.run(1000)
        counts.append(len(decided))
    assert counts[0] < 0.7 * counts[1]


class Moody(World):
    """One row of eight, one after another, has hardly a draft accepted; the others nearly all."""

    served = 0

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self.served += 1
        self.accepted = 0.05 if self.served % 8 == 4 else 0.97


def served(steps: int = 4000) -> float:
    rates = []
    for seed in range(4):
        world = Moody(draft=0.06, token=0.07, book=0.4, reading=0.002, noise=0.05)
        world.random = np.random.default_rng(seed)
        rates.append(world.run(steps))
    return float(np.mean(rates))


def test_drafts_that_one_row_made_too_costly_are_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries show that the next rows accept them; without that, time alone must pay back what was lost."""
    monkeypatch.setattr(experience, "_WORSE", 0.0)  # the row is believed to be as good as the others for long
    usual = served()
    monkeypatch.setattr(Account, "book_try", lambda *given: None)
    assert usual > 1.2 * served()


def test_a_row_that_fares_worse_at_first_is_not_believed_to_fare_well_further_on() -> None:
    experience = Experience.of_positions()
    for _ in range(50):
        experience.count_chain(1, 15, 15)
    for _ in range(3):
        experience.count_chain(2, 15, 1)  # its second token is refused, the others are never looked at
    good, bad, new = experience.rates([1, 2, 3])
    assert good.min() > 0.9 and new.min() > 0.7 and bad[2:].max() < 0.8 * new[2:].min()


def test_a_drafted_token_is_priced_as_one_of_a_usual_draft_by_what_steps_bring_now() -> None:
    """Most of a draft's cost may be its beginning; and a step that drafts takes longer than a plain one."""
    world = World(accepted=1.0, draft=0.1, token=0.02)
    world.run(300)
    step = 15 * 0.1 + 1.0 + 15 * 0.02
    assert world.controller._prices().token == pytest.approx(0.1 * 16 / step, rel=0.05)
    for _ in range(8):
        world.controller.costs.count_draft(1, 1, 0.4)  # one token alone
    assert world.controller._prices().token < 0.2 * 16 / step


def test_what_is_told_of_costs_can_be_changed_without_changing_them() -> None:
    costs = Costs()
    for drafted in (0, 0, 2, 2, 4, 4):
        costs.count_pass(1, drafted, 1.0 + drafted)
        costs.count_draft(1, drafted or 1, 0.1)
    passes, drafts = costs.passes(1, 4), costs.drafts(1, 4)
    before = passes.tolist(), drafts.tolist()
    passes += 1
    drafts += 1
    assert (costs.passes(1, 4).tolist(), costs.drafts(1, 4).tolist()) == before
