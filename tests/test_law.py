"""T1: what the real engine samples follows the target's law.

G-tests of single tokens, of pairs and of whole texts, on tabular models whose law is computed exactly. Each alarm
level is 1e-6 and seeds are fixed, so a test that passes once passes always; with random seeds the file (about 250
p-values) would raise a false alarm once in 4,000 runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from torch import Tensor

from exact import BLOCK, REJECTION, chain, committed, draft_batch, table_tree
from specdec import Draft, Drafter, Engine, Output, draws
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree import TreeDrafter
from specdec.sampling import Randomness, SamplingParams
from specdec.sequences import Sequences, Step
from specdec.verify import RULES
from toys import TableLM, random_table

ALPHA = 1e-6
VOCAB, LENGTH, SAMPLES = 4, 5, 20_000
TARGET = random_table(VOCAB, seed=3)
OTHER = 0.6 * TARGET + random_table(VOCAB, seed=4, spread=1.0)  # agrees with the target about half the time
every_rule = pytest.mark.parametrize("rule", list(RULES))


class Guess:
    """A drafter without a model: what ``propose_row`` says of a row's tokens, with certainty."""

    def __init__(self, propose_row: Callable[[list[int], int], list[int]]) -> None:
        self.propose_row = propose_row

    def reserve(self, rows: int, length: int) -> None: ...

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        rows = zip(sequences.rows, lengths, strict=True)
        found = [self.propose_row(row.tokens, limit)[:limit] for row, limit in rows]
        width = max(map(len, found))
        tokens = torch.tensor([guess + [0] * (width - len(guess)) for guess in found], dtype=torch.long)
        return Draft(tokens.view(len(found), width), torch.tensor(list(map(len, found))))

    def observe(self, step: Step) -> None: ...

    def copy(self, source: int, target: int, length: int | None = None) -> None: ...

    def free(self, rows: int) -> None: ...


class Uneven(ModelDrafter):
    """Drafts a different number of tokens, zero included, for every row and step."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        rows = zip(sequences.rows, lengths, strict=True)
        return super().propose(sequences, [min(k, (row.index + len(row.tokens)) % 4) for row, k in rows])


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "model": lambda: ModelDrafter(TableLM(OTHER)),
    "uneven": lambda: Uneven(TableLM(OTHER)),
    "short context": lambda: ModelDrafter(TableLM(OTHER, context=6)),
    "suffix": SuffixDrafter,
    "hybrid": lambda: HybridDrafter(ModelDrafter(TableLM(OTHER)), SuffixDrafter()),
    "tree": lambda: TreeDrafter(TableLM(OTHER)),
    "always 2": lambda: Guess(lambda tokens, limit: [2] * limit),
    "repeats": lambda: Guess(lambda tokens, limit: tokens[-1:] * (limit if tokens[-1] % 2 else 1)),
}


@dataclass(frozen=True)
class Kind:
    """One prompt and the settings of its samples."""

    prompt: tuple[int, ...]
    params: SamplingParams
    length: int = LENGTH

    def law(self) -> Tensor:
        """Of whole texts, [V**length]."""
        return chain(table_tree(TARGET, self.prompt, self.length, self.params))


ONE = [Kind((1, 2), SamplingParams(1.0))]
UNEQUAL = [
    Kind((1, 2), SamplingParams(0.6, top_p=0.95), length=3),
    Kind((3,), SamplingParams(1.0), length=3),
    Kind((0, 2, 2, 1, 3, 0, 1), SamplingParams(1.8, top_k=3, min_p=0.1), length=2),
]


def sample(drafter: Drafter | None, kinds: list[Kind], samples: int = SAMPLES, **settings: Any) -> Output:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    columns = {name: [getattr(kind.params, name) for kind in kinds] for name in names}
    return Engine(TableLM(TARGET), drafter).generate(
        [kind.prompt for kind in kinds],
        n=samples,
        max_new_tokens=[kind.length for kind in kinds],
        **{"seed": 0, "max_batch_size": 2048, **columns, **settings},
    )


def p_value(counts: Tensor, law: Tensor) -> float:
    """Of a G-test; cells with fewer than 5 expected counts are pooled. A token of probability 0 is an alarm."""
    if float(counts[law == 0].sum()) > 0:
        return 0.0
    expected = law * counts.sum()
    common = expected >= 5
    observed, expected = (torch.cat([x[common], x[~common].sum()[None]]) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    if float(observed[expected < 1e-9].sum()) > 0:
        return 0.0
    terms = torch.where(observed > 0, observed * (observed / expected).log(), 0.0)
    return float(chi2.sf(2 * float(terms.sum()), len(observed) - 1)) if len(observed) > 1 else 1.0


def alarm(output: Output, kinds: list[Kind], samples: int = SAMPLES) -> float:
    """The least p-value over the kinds: of the first and the last token, of pairs (1, 2) and last, of whole texts."""
    least = 1.0
    for index, kind in enumerate(kinds):
        texts = torch.tensor(output.token_ids[index * samples : (index + 1) * samples])
        places = texts @ VOCAB ** torch.arange(kind.length - 1, -1, -1)
        shape = [VOCAB] * kind.length
        counts = places.bincount(minlength=VOCAB**kind.length).double().view(shape)
        law = kind.law().view(shape)
        last = kind.length - 1
        for kept in ([0], [last], [0, 1], [last - 1, last], list(range(kind.length))):
            dropped = [i for i in range(kind.length) if i not in kept]
            marginals = [x.sum(dropped) if dropped else x for x in (counts, law)]
            least = min(least, p_value(marginals[0].flatten(), marginals[1].flatten()))
    return least


@every_rule
@pytest.mark.parametrize(
    ("drafter", "num_draft_tokens"),
    [("model", 1), ("model", 4), ("suffix", 3), ("repeats", 3), ("hybrid", 4), ("tree", 3), ("tree", 12)],
)
def test_samples_follow_the_targets_law(rule: str, drafter: str, num_draft_tokens: int) -> None:
    """n = 20,000 texts of 5 tokens; one false alarm in 200,000 runs each if seeds were random."""
    # CASES 1, 2, 9, 10, 12; the bar: T1
    output = sample(DRAFTERS[drafter](), ONE, rule=rule, num_draft_tokens=num_draft_tokens)
    assert 0.05 < output.stats.acceptance_rate < 0.95
    assert alarm(output, ONE) > ALPHA


@pytest.mark.parametrize(
    ("rule", "drafter"),
    [
        ("rejection", "uneven"),
        ("block", "uneven"),
        ("coupled", "uneven"),
        ("block", "short context"),
    ],
)
def test_unequal_rows_in_one_batch_follow_their_own_laws(rule: str, drafter: str) -> None:
    """Prompts, filters and lengths differ, rows join and leave: one false alarm in 66,000 runs each."""
    # CASES 5, 6, 8, 11, 17
    output = sample(DRAFTERS[drafter](), UNEQUAL, rule=rule, num_draft_tokens=3, max_batch_size=1000)
    assert alarm(output, UNEQUAL) > ALPHA
    assert output.stats.acceptance_rate > 0.1


def test_plain_samples_follow_the_targets_law() -> None:
    assert alarm(sample(None, ONE), ONE) > ALPHA


def test_a_penalty_on_repetition_follows_its_own_law() -> None:
    """Its laws depend on every drafted token before."""  # CASES 53, 54, 55
    penalised = [Kind((2, 1), SamplingParams(1.0, repetition_penalty=1.5), length=2)]
    output = sample(DRAFTERS["model"](), penalised, num_draft_tokens=1)
    assert alarm(output, penalised) > ALPHA
    assert alarm(output, [replace(penalised[0], params=SamplingParams(1.0))]) < ALPHA


def test_a_drawn_token_may_be_passed_off_as_certain() -> None:
    """However a token was found: given as certain, it is accepted as often as the target says it."""
    output = sample(Misreports(lambda draft: replace(draft, probs=None)), ONE, rule="block")
    assert alarm(output, ONE) > ALPHA


@every_rule
def test_a_drafter_that_is_the_target_is_always_accepted(rule: str) -> None:
    """Its laws go through the same filters, after the same tokens, as the target's."""  # CASES 3, 5, 6, 54
    kinds = [*UNEQUAL, Kind((2, 1), SamplingParams(1.0, repetition_penalty=1.5), length=3)]
    output = sample(ModelDrafter(TableLM(TARGET)), kinds, 1000, rule=rule)
    assert output.stats.acceptance_rate > 0.999
    assert alarm(output, kinds, 1000) > ALPHA


# Negative controls: the same test must notice what is wrong, and from a quarter of the samples.

FEW = SAMPLES // 4


class Misreports(ModelDrafter):
    """Draws from one law, reports another."""

    def __init__(self, report: Callable[[Draft], Draft]) -> None:
        super().__init__(TableLM(OTHER))
        self.report = report

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        return self.report(super().propose(sequences, lengths))


def probs_of(draft: Draft) -> Tensor:
    assert draft.probs is not None
    return draft.probs


def sharpened(draft: Draft) -> Draft:
    probs = probs_of(draft) ** 2
    return replace(draft, probs=probs / probs.sum(-1, keepdim=True))


WRONG_DRAFTS: dict[str, Callable[[Draft], Draft]] = {
    "argmax drawn, softmax reported": lambda draft: replace(draft, tokens=probs_of(draft).argmax(-1)),  # CASES 2, 9
    "another temperature reported": sharpened,  # CASES 3
    "a neighbour's law reported": lambda draft: replace(draft, probs=probs_of(draft).roll(1, 0)),  # CASES 17
    "the next position's law reported": lambda draft: replace(draft, probs=probs_of(draft).roll(-1, 1)),  # CASES 12
}


@pytest.mark.usefixtures("believed")
@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize("wrong", list(WRONG_DRAFTS))
def test_the_test_notices_a_drafter_that_misreports_its_law(wrong: str, rule: str) -> None:
    output = sample(Misreports(WRONG_DRAFTS[wrong]), UNEQUAL[:2], FEW, rule=rule, num_draft_tokens=3)
    assert alarm(output, UNEQUAL[:2], FEW) < ALPHA


@every_rule
def test_the_test_notices_swapped_rows(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is verified with the target's laws of its neighbour."""  # CASES 17
    right = Sequences.process

    def swapped(self: Sequences, logits: Tensor, draft: Draft) -> Tensor:
        return right(self, logits, draft).roll(1, 0)

    monkeypatch.setattr(Sequences, "process", swapped)
    output = sample(DRAFTERS["model"](), ONE, FEW, rule=rule, num_draft_tokens=3)
    assert alarm(output, ONE, FEW) < ALPHA


def reused_within_a_step(self: Randomness, count: int) -> Tensor:
    return _accept(self, 1).expand(-1, count)


def reused_between_steps(self: Randomness, count: int) -> Tensor:
    """Keyed by the position a number speaks of: a position drafted again meets the number it met before."""
    again = [_accept(Randomness(self.seeds, self.text_lengths + i), 1) for i in range(count)]
    return torch.cat(again, dim=1) if again else _accept(self, 0)


def reused_from_the_draft(self: Randomness, count: int) -> Tensor:
    return self._accept_and_draft[1, :, :count]


_accept = Randomness.accept


@pytest.mark.parametrize(
    ("rule", "drafter", "reused"),
    [
        ("rejection", "model", reused_within_a_step),
        ("block", "model", reused_within_a_step),
        ("block", "always 2", reused_between_steps),  # harmless for rejection, which looks no further than it goes
        ("rejection", "model", reused_from_the_draft),
        ("block", "model", reused_from_the_draft),
    ],
)
def test_the_test_notices_reused_accept_uniforms(
    rule: str, drafter: str, reused: Callable[[Randomness, int], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draws, "library", lambda: None)
    monkeypatch.setattr(Randomness, "accept", reused)
    output = sample(DRAFTERS[drafter](), ONE, FEW, rule=rule, num_draft_tokens=3)
    assert alarm(output, ONE, FEW) < ALPHA


def test_the_test_notices_the_targets_noise_in_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right for the coupled rule, wrong for the others: a correction would be drawn with the draft's own numbers."""
    monkeypatch.setattr("specdec.engine.Sequences", lambda **given: Sequences(**{**given, "coupled": True}))
    assert alarm(sample(DRAFTERS["model"](), ONE, rule="block", num_draft_tokens=4), ONE) < ALPHA


# Acceptance.


def first_acceptances(output: Output) -> Tensor:
    """How many tokens the first step accepted, per row: the one after them never comes from the draft."""
    return torch.tensor([(flags + [False]).index(False) for flags in output.from_draft]).double()


@pytest.mark.parametrize("rule", ["rejection", "block"])
@pytest.mark.parametrize(("drafter", "num_draft_tokens"), [("model", 1), ("model", 3), ("always 2", 3)])
def test_as_many_drafts_are_accepted_as_enumeration_says(rule: str, drafter: str, num_draft_tokens: int) -> None:
    """5 standard errors: one false alarm in 1.7 million runs if the seed were random."""
    params = SamplingParams(0.8, top_p=0.97)
    kinds = [Kind((1, 2), params, length=num_draft_tokens + 1)]
    found = first_acceptances(sample(DRAFTERS[drafter](), kinds, rule=rule, num_draft_tokens=num_draft_tokens))
    tree = table_tree(TARGET, (1, 2), num_draft_tokens + 1, params)
    proposals = table_tree(OTHER, (1, 2), num_draft_tokens, params)
    if drafter == "always 2":
        proposals = [torch.eye(VOCAB, dtype=torch.float64)[2:3].expand(len(level), -1) for level in proposals]
    parts = {"rejection": REJECTION, "block": BLOCK}[rule]
    expected = float(committed(RULES[rule], parts, tree, draft_batch(tree, proposals)).accepted[-1])
    if num_draft_tokens == 1:
        assert expected == pytest.approx(float(torch.minimum(tree[0], proposals[0]).sum()))
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / len(found) ** 0.5


def test_coupled_acceptance_is_the_races_agreement() -> None:
    """sum_i 1 / sum_j max(p_j / p_i, q_j / q_i) of the first drafted tokens, within 5 standard errors."""
    kinds = [Kind((1, 2), SamplingParams(1.0), length=2)]
    found = first_acceptances(sample(DRAFTERS["model"](), kinds, rule="coupled", num_draft_tokens=1))
    p, q = (table_tree(table, (1, 2), 1, SamplingParams(1.0))[0][0] for table in (TARGET, OTHER))
    expected = float((1 / torch.maximum(p / p.unsqueeze(1), q / q.unsqueeze(1)).sum(1)).sum())
    assert abs(float(found.mean()) - expected) < 5 * float(found.std()) / len(found) ** 0.5


def test_counters_agree_with_the_texts() -> None:
    """Accepted and generated tokens in ``Stats`` are those marked in ``from_draft``; one token per step is not."""
    output = sample(DRAFTERS["model"](), UNEQUAL, samples=500, num_draft_tokens=3, max_batch_size=64)
    stats, flags = output.stats, [flag for row in output.from_draft for flag in row]
    assert stats.num_generated_tokens == len(flags) == sum(map(len, output.token_ids))
    assert stats.num_accepted_tokens == sum(flags)
    assert stats.num_row_steps == len(flags) - sum(flags)
