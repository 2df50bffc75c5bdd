"""T4: random numbers are right by themselves, and a row's depend on its seed and positions alone.

Every number is a pure function of (seed, position, purpose), so nothing here is random: a test that passes once
passes always. With random seeds each statistical check would raise a false alarm once in a million runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chi2, kstest, norm
from torch import Tensor

from specdec import Draft, Drafter, Engine, Output, draws, sampling
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.sampling import Randomness, quantile, race
from specdec.sequences import Sequences
from specdec.verify import RULES
from toys import TableLM, random_table

ALPHA = 1e-6
VOCAB = 6
Numbers = Callable[[Tensor, Tensor], Tensor]  # seeds, text_lengths -> numbers [B, 8]


def accept(seeds: Tensor, text_lengths: Tensor) -> Tensor:
    return Randomness(seeds, text_lengths).accept(8)


def target(seeds: Tensor, text_lengths: Tensor) -> Tensor:
    return torch.exp(-Randomness(seeds, text_lengths).target(torch.zeros_like(seeds), 8).double())


def draft(seeds: Tensor, text_lengths: Tensor) -> Tensor:
    """The uniforms behind the draft's draws."""
    return Randomness(seeds, text_lengths)._accept_and_draft[1, :, :8]


PURPOSES: dict[str, Numbers] = {"accept": accept, "target": target, "draft": draft}
COUNT = 20_000
KEYS = {
    "neighbouring seeds": (torch.arange(COUNT), torch.full((COUNT,), 5)),
    "neighbouring positions": (torch.full((COUNT,), 3), torch.arange(COUNT)),
    "distant seeds": (torch.arange(COUNT) * (2**60 // COUNT), torch.zeros(COUNT, dtype=torch.long)),
    "seeds 2**48 apart": (torch.arange(COUNT) << 45, torch.ones(COUNT, dtype=torch.long)),
}
every_purpose = pytest.mark.parametrize("purpose", list(PURPOSES))
every_key = pytest.mark.parametrize("keys", list(KEYS))


def correlation_alarm(one: Tensor, other: Tensor) -> float:
    """p-value of the correlation between two columns of numbers."""
    score = float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) * one.numel() ** 0.5
    return float(2 * norm.sf(abs(score)))


def pair_alarm(one: Tensor, other: Tensor, cells: int = 16) -> float:
    """p-value of a chi-square test that pairs of uniforms fill the unit square evenly."""
    places = (one.flatten() * cells).long() * cells + (other.flatten() * cells).long()
    counts = places.bincount(minlength=cells * cells).double()
    expected = counts.sum() / cells**2
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), cells**2 - 1))


def independent(one: Tensor, other: Tensor) -> bool:
    return min(correlation_alarm(one, other), pair_alarm(one, other)) > ALPHA


@every_purpose
@every_key
def test_numbers_are_uniform_and_inside_the_open_interval(purpose: str, keys: str) -> None:
    numbers = PURPOSES[purpose](*KEYS[keys])
    assert bool(((numbers > 0) & (numbers < 1)).all())
    assert kstest(numbers.flatten().numpy(), "uniform").pvalue > ALPHA
    for column in numbers.unbind(1):
        assert kstest(column.numpy(), "uniform").pvalue > ALPHA


@every_purpose
@every_key
def test_numbers_of_different_rows_positions_and_draws_are_independent(purpose: str, keys: str) -> None:
    numbers = PURPOSES[purpose](*KEYS[keys])
    for lag in (1, 2, 7, 64):  # along seeds or positions
        assert independent(numbers[lag:], numbers[:-lag])
        assert independent(numbers[lag:, 1:], numbers[:-lag, :-1])  # and diagonally
    for i, j in itertools.combinations(range(8), 2):  # within a row
        assert independent(numbers[:, i], numbers[:, j])


@every_key
def test_numbers_of_different_purposes_are_independent(keys: str) -> None:
    for one, other in itertools.combinations(PURPOSES.values(), 2):
        a, b = one(*KEYS[keys]), other(*KEYS[keys])
        for shift in range(-3, 4):  # at equal and at neighbouring positions, seeds and draws
            assert independent(a.roll(shift, 0), b)
            assert independent(a.roll(shift, 1), b)


def test_no_two_keys_share_numbers() -> None:
    """Over seeds x positions x purposes x draws: 3 * 300 * 300 * 8 numbers of 52 bits, no two alike."""
    seeds, text_lengths = (
        grid.flatten() for grid in torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    )
    numbers = torch.cat([Randomness(seeds, text_lengths).accept(8), draft(seeds, text_lengths)])
    noise = sampling._uniforms(Randomness(seeds, text_lengths)._key(sampling._TARGET, text_lengths), 8)
    everything = torch.cat([numbers, noise]).flatten()
    # by the birthday bound fewer than 0.01 coincidences are expected
    assert len(everything.unique()) == len(everything)


def test_the_tests_of_independence_notice_shared_numbers() -> None:
    # CASES 58
    seeds, text_lengths = KEYS["neighbouring seeds"]
    numbers = accept(seeds, text_lengths)
    assert not independent(numbers, numbers)
    assert not independent(numbers, 1 - numbers)
    half_shared = torch.where(torch.arange(COUNT).unsqueeze(1) % 8 == 0, numbers, draft(seeds, text_lengths))
    assert not independent(numbers, half_shared)
    assert kstest((numbers**1.05).flatten().numpy(), "uniform").pvalue < ALPHA


def test_target_noise_is_exponential() -> None:
    noise = Randomness(*KEYS["neighbouring seeds"]).target(torch.arange(3).expand(COUNT, 3), 8)
    assert noise.shape == (COUNT, 3, 8) and noise.dtype == torch.float32
    assert float(noise.min()) > 0
    assert kstest(noise.flatten().numpy(), "expon").pvalue > ALPHA


@pytest.mark.parametrize("bits", [0, -1, 1 << 62, -(1 << 63), (1 << 63) - 1, -2])
def test_the_extreme_words_stay_inside_the_open_interval(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform of 1 would be noise of 0, and 0 / 0 wins a race for a token of probability zero."""
    monkeypatch.setattr(draws, "library", lambda: None)
    monkeypatch.setattr(sampling, "_mix", lambda x: torch.full_like(x, bits))
    randomness = Randomness(torch.arange(2), torch.arange(2))
    uniforms, noise = randomness.accept(3), randomness.target(torch.zeros(2, dtype=torch.long), 4)
    assert bool(((uniforms > 0) & (uniforms < 1)).all())
    assert bool((torch.isfinite(noise) & (noise > 0)).all())
    law = torch.tensor([[0.0, 0.25, 0.75, 0.0]]).expand(2, -1)
    assert set(race(law, noise).tolist()) <= {1, 2}
    assert set(quantile(law, uniforms[:, :1]).tolist()) <= {1, 2}
    assert set(randomness.draft(0, law.unsqueeze(1)).flatten().tolist()) <= {1, 2}


@pytest.mark.parametrize("draw", ["race", "quantile"])
def test_drafts_are_drawn_from_their_laws(draw: str) -> None:
    """G-tests of both ways to draw, with zero-probability tokens at both ends; 50,000 draws each."""
    count = 50_000
    for law in (torch.tensor([0.0, 0.4, 0.05, 0.0, 0.55, 0.0]), torch.tensor([0.9, 0.0, 0.0, 0.0, 0.0, 0.1])):
        randomness = Randomness(torch.arange(count), torch.full((count,), 9), coupled=draw == "race")
        for offset in (0, 1, 5):
            counts = randomness.draft(offset, law.expand(count, 1, -1)).flatten().bincount(minlength=VOCAB).double()
            assert float(counts[law == 0].sum()) == 0
            observed, expected = counts[law > 0], law[law > 0].double() * count
            assert chi2.sf(2 * float((observed * (observed / expected).log()).sum()), len(observed) - 1) > ALPHA


def test_quantile_inverts_the_distribution_function() -> None:
    law = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    edges = {1e-300: 1, 0.2499: 1, 0.25: 3, 0.7499: 3, 0.75: 4, 1 - 2**-53: 4}
    for uniform, token in edges.items():
        assert quantile(law, torch.tensor([[uniform]], dtype=torch.float64)).tolist() == [token]


def test_one_key_gives_one_number_whatever_the_batch() -> None:
    """Neighbours, order, how many numbers are asked for, and how a position is addressed do not matter."""
    seeds, text_lengths = torch.tensor([4, 9, 4, 2**50, 0]), torch.tensor([3, 3, 8, 100, 0])
    whole, order = Randomness(seeds, text_lengths), torch.tensor([3, 0, 4, 2, 1])
    shuffled = Randomness(seeds[order], text_lengths[order])
    law = torch.rand(5, 1, VOCAB, generator=torch.Generator().manual_seed(0)).softmax(-1)
    offsets = torch.arange(5) % 3
    assert torch.equal(shuffled.accept(4), whole.accept(4)[order])
    assert torch.equal(whole.accept(9)[:, :4], whole.accept(4))
    assert torch.equal(shuffled.draft(2, law[order]), whole.draft(2, law)[order])
    assert torch.equal(shuffled.target(offsets[order], VOCAB), whole.target(offsets, VOCAB)[order])
    for b in range(5):
        alone = Randomness(seeds[b : b + 1], text_lengths[b : b + 1])
        assert torch.equal(alone.accept(4)[0], whole.accept(4)[b])
        assert torch.equal(alone.draft(1, law[b : b + 1])[0], whole.draft(1, law)[b])
        later = Randomness(seeds[b : b + 1], text_lengths[b : b + 1] + 2)  # position = start + offset
        ahead = whole.target(torch.tensor([[2, 3]]).expand(5, -1), VOCAB)
        assert torch.equal(later.target(torch.tensor([[0, 1]]), VOCAB)[0], ahead[b])


def test_a_batch_of_certain_laws_needs_no_numbers() -> None:
    certain = Randomness(torch.arange(3), torch.arange(3), constant=True)
    law = torch.eye(VOCAB)[[2, 0, 5]]
    assert race(law, certain.target(torch.zeros(3, dtype=torch.long), VOCAB)).tolist() == [2, 0, 5]
    assert certain.draft(0, law.unsqueeze(1)).tolist() == [[2], [0], [5]]
    assert bool(((certain.accept(2) > 0) & (certain.accept(2) < 1)).all())


# Through the engine.

TARGET, OTHER = random_table(VOCAB, seed=1), random_table(VOCAB, seed=2)
PROMPTS = [[1], [2, 3, 4], [5, 0, 5, 0, 5], [3, 3], [4, 1, 2, 0, 2, 2, 1], [0], [2, 3, 4]]
SEEDS = [11, 5, 900, 3, 2**59, 0, 12]
SETTINGS: dict[str, Any] = {
    "temperature": [1.0, 0.7, 1.5, 1.0, 2.0, 0.9, 1.0],
    "top_p": [1.0, 0.9, 1.0, 0.8, 1.0, 1.0, 1.0],
    "repetition_penalty": [1.0, 1.0, 1.2, 1.0, 1.0, 1.0, 1.0],
    "max_new_tokens": [20, 3, 14, 1, 20, 9, 20],
}
every_rule = pytest.mark.parametrize("rule", list(RULES))


class Sparse(ModelDrafter):
    """Leaves all rows but those with an even prompt length without a draft."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        rows = zip(sequences.rows, lengths, strict=True)
        return super().propose(sequences, [k if len(row.request.prompt) % 2 == 0 else 0 for row, k in rows])


DRAFTERS: dict[str, Callable[[], Drafter | None]] = {
    "none": lambda: None,
    "model": lambda: ModelDrafter(TableLM(OTHER)),
    "suffix": SuffixDrafter,
    "hybrid": lambda: HybridDrafter(ModelDrafter(TableLM(OTHER)), SuffixDrafter()),
    "sparse": lambda: Sparse(TableLM(OTHER)),
}


def engine(drafter: str) -> Engine:
    return Engine(TableLM(TARGET), DRAFTERS[drafter]())


def texts(drafter: str, rows: Sequence[int], settings: dict[str, Any] = SETTINGS, **more: Any) -> list[list[int]]:
    """The texts of some of the prompts, in the order of ``rows``."""
    chosen = {name: [column[i] for i in rows] for name, column in settings.items()}
    seeds = [SEEDS[i] for i in rows]
    given = {"num_draft_tokens": 4, **chosen, **more}
    return engine(drafter).generate([PROMPTS[i] for i in rows], seed=seeds, **given).token_ids


def depends_on_its_neighbours(drafter: str, rule: str) -> bool:
    """Whether any row's text changes with the batch it is in: alone, in any order, with room for 1 to 7 rows."""
    alone = [texts(drafter, [i], rule=rule)[0] for i in range(7)]
    for order in ([0, 1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1, 0], [3, 1, 5], [4, 0]):
        for size in (1, 2, 3, 7):
            if texts(drafter, order, rule=rule, max_batch_size=size) != [alone[i] for i in order]:
                return True
    return False


@every_rule
@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_a_rows_text_does_not_depend_on_its_neighbours(drafter: str, rule: str) -> None:
    """Nor on their order, their finishing early, their drafts or having none, or when it joins."""
    # CASES 48, 57, 59; the bar: T4
    assert not depends_on_its_neighbours(drafter, rule)


@every_rule
def test_a_row_without_a_draft_shifts_nobody(rule: str) -> None:
    """Rows that are drafted for give the same text whether or not the others are drafted for too."""
    # CASES 59
    drafted = [i for i, prompt in enumerate(PROMPTS) if len(prompt) % 2 == 0]
    assert drafted
    among_drafted, among_plain = texts("model", range(7), rule=rule), texts("sparse", range(7), rule=rule)
    plain = texts("none", range(7))
    for i in range(7):
        assert among_plain[i] == (among_drafted if i in drafted else plain)[i]


def test_a_shared_stream_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: one generator for the whole batch, as most implementations have it."""
    # CASES 58, 59
    generator = torch.Generator().manual_seed(0)

    def shared(key: Tensor, count: int) -> Tensor:
        return torch.rand(*key.shape, count, generator=generator, dtype=torch.float64)

    monkeypatch.setattr(draws, "library", lambda: None)
    monkeypatch.setattr(sampling, "_uniforms", shared)
    for drafter, rule in itertools.product(("none", "model"), RULES):
        assert depends_on_its_neighbours(drafter, rule)


def test_numbers_keyed_by_slot_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: a stream per place in the batch; a row that moves or stands elsewhere gets another's."""
    # CASES 58
    right = Randomness._key

    def by_slot(self: Randomness, purpose: int, position: Tensor) -> Tensor:
        slots = torch.arange(len(self.seeds)).view(-1, *[1] * (position.dim() - 1))
        return right(self, purpose, position) + slots

    monkeypatch.setattr(draws, "library", lambda: None)
    monkeypatch.setattr(Randomness, "_key", by_slot)
    assert depends_on_its_neighbours("model", "block")


@pytest.mark.parametrize("drafter", ["model", "suffix", "hybrid", "sparse"])
@pytest.mark.parametrize("num_draft_tokens", [1, 2, 5])
def test_coupled_text_equals_plain_text_for_a_seed(drafter: str, num_draft_tokens: int) -> None:
    plain = texts("none", range(7))
    assert texts(drafter, range(7), rule="coupled", num_draft_tokens=num_draft_tokens, max_batch_size=4) == plain


@pytest.mark.chosen
@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_with_a_seed_chosen_draft_lengths_change_nothing(drafter: str) -> None:
    """Nobody named a rule: the text is plain decoding's, however long the drafts were, in any batch, again and again."""
    plain = texts("none", range(7))
    found = engine(drafter)
    for size in (1, 3, 7, 3):
        chosen = {name: list(column) for name, column in SETTINGS.items()}
        assert found.generate(PROMPTS, seed=SEEDS, max_batch_size=size, **chosen).token_ids == plain


@every_rule
def test_without_drafts_every_rule_gives_the_plain_text(rule: str) -> None:
    assert texts("model", range(7), rule=rule, num_draft_tokens=0) == texts("none", range(7))


@every_rule
@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_the_same_seed_gives_the_same_text_again(drafter: str, rule: str) -> None:
    """Also the second call of one engine."""  # CASES 57, 61
    found = engine(drafter)
    settings: dict[str, Any] = {"seed": 7, "n": 3, "rule": rule, "temperature": 1.0, "max_new_tokens": 16}
    settings |= {"num_draft_tokens": 4}
    first, second = (found.generate(PROMPTS, **settings).token_ids for _ in range(2))
    assert first == second == engine(drafter).generate(PROMPTS, **settings).token_ids
    assert first != found.generate(PROMPTS, **{**settings, "seed": 1000}).token_ids


def unseeded(**settings: Any) -> Output:
    return engine("model").generate([[1], [1], [1]], n=2, temperature=1.0, max_new_tokens=30, **settings)


def samples_repeat() -> bool:
    """Whether any two of 12 unseeded samples of one prompt, from two calls, are alike; 30 tokens of 6 kinds each."""
    samples = [tuple(ids) for _ in range(2) for ids in unseeded().token_ids]
    return len(set(samples)) < len(samples)


def test_unseeded_calls_and_samples_differ() -> None:
    # CASES 60
    assert not samples_repeat()


def test_one_stream_for_unseeded_requests_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # CASES 58, 60
    monkeypatch.setattr("specdec.requests.secrets.randbits", lambda bits: 0)
    assert samples_repeat()


def test_ignored_seeds_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # CASES 57, 58
    right = Randomness._key

    def seedless(self: Randomness, purpose: int, position: Tensor) -> Tensor:
        return right(Randomness(torch.zeros_like(self.seeds), self.text_lengths), purpose, position)

    monkeypatch.setattr(draws, "library", lambda: None)
    monkeypatch.setattr(Randomness, "_key", seedless)
    assert samples_repeat()


@every_rule
def test_reported_seeds_replay_a_call(rule: str) -> None:
    """``Output.seeds`` has one seed per output; as the seeds of as many prompts they give the same texts."""
    output = unseeded(rule=rule)
    assert len(set(output.seeds)) == 6
    again = engine("model").generate([[1]] * 6, seed=output.seeds, temperature=1.0, max_new_tokens=30, rule=rule)
    assert again.token_ids == output.token_ids and again.seeds == output.seeds


@every_rule
@pytest.mark.parametrize("drafter", list(DRAFTERS))
def test_greedy_and_sampled_rows_share_a_batch(drafter: str, rule: str) -> None:
    """Each as it is in a batch of its own kind; greedy rows are the argmax whatever the seed."""
    # CASES 13
    temperatures = [0.0, 1.0, 0.0, 0.8, 1.3, 0.0, 0.0]
    settings = {"temperature": temperatures, "max_new_tokens": [12] * 7}
    mixed = texts(drafter, range(7), settings, rule=rule, max_batch_size=5)
    for kind in (True, False):
        rows = [i for i in range(7) if (temperatures[i] == 0) == kind]
        assert texts(drafter, rows, settings, rule=rule) == [mixed[i] for i in rows]
    for i in (i for i in range(7) if temperatures[i] == 0):
        before, last = ([0, *PROMPTS[i]])[-2:]
        for token in mixed[i]:
            assert token == int(TARGET[before, last].argmax())
            before, last = last, token
