"""T0: the acceptance rules keep the target's law exactly. Enumeration in float64, nothing is sampled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from exact import (
    BLOCK,
    REJECTION,
    Batch,
    Forced,
    Parts,
    Tree,
    chain,
    committed,
    draft_batch,
    filtered_tree,
    numbers,
    one_hot_tree,
    paths,
    random_tree,
    sparse_tree,
)
from specdec.draft import Draft
from specdec.sampling import Randomness, SamplingParams, race
from specdec.verify import (
    RULES,
    Rule,
    block,
    block_chances,
    block_survival,
    coupled,
    leading,
    next_law,
    rejection,
)

BOUND = 1e-12
RULE_PARTS: dict[str, tuple[Rule, Parts]] = {"rejection": (rejection, REJECTION), "block": (block, BLOCK)}
SIZES = [(3, 0), (3, 1), (3, 2), (3, 3), (3, 4), (4, 1), (4, 2), (4, 3), (4, 4), (5, 1), (5, 2), (5, 3), (5, 4)]
both_rules = pytest.mark.parametrize("rule", list(RULE_PARTS))
every_rule = pytest.mark.parametrize("rule", list(RULES))
sizes = pytest.mark.parametrize(("vocab_size", "depth"), SIZES, ids=lambda value: str(value))


def error(rule: Rule | Parts, parts: Parts, target: Tree, batch: Batch) -> float:
    """The largest deviation of a committed text's probability from the target's, over texts and groups."""
    return float((committed(rule, parts, target, batch).law - chain(target)).abs().max())


def equal_pair(vocab_size: int, depth: int) -> tuple[Tree, Tree]:
    target = random_tree(vocab_size, depth + 1, 1)
    return target, [level.clone() for level in target[:depth]]


PAIRS: dict[str, Callable[[int, int], tuple[Tree, Tree]]] = {
    "unrelated": lambda v, k: (random_tree(v, k + 1, 2), random_tree(v, k, 3)),
    "equal": equal_pair,
    "disjoint": lambda v, k: (random_tree(v, k + 1, 4, support=[0]), random_tree(v, k, 5, support=range(1, v))),
    "narrow draft": lambda v, k: (random_tree(v, k + 1, 6), random_tree(v, k, 7, support=[0, v - 1])),
    "narrow target": lambda v, k: (random_tree(v, k + 1, 8, support=[0, 1]), random_tree(v, k, 9)),
    "zeros in both": lambda v, k: (sparse_tree(v, k + 1, 10), sparse_tree(v, k, 11)),
    "certain draft": lambda v, k: (random_tree(v, k + 1, 12), one_hot_tree(v, k, 13)),
    "certain target": lambda v, k: (one_hot_tree(v, k + 1, 14), random_tree(v, k, 15)),
    "both certain": lambda v, k: (one_hot_tree(v, k + 1, 16), one_hot_tree(v, k, 17)),
}


@both_rules
@sizes
@pytest.mark.parametrize("pair", list(PAIRS))
def test_committed_tokens_follow_the_targets_law(rule: str, vocab_size: int, depth: int, pair: str) -> None:
    """For every draft length from 0 to K, all in one batch."""  # CASES 1, 5, 10, 12, 17; the bar: T0
    target, draft = PAIRS[pair](vocab_size, depth)
    assert error(*RULE_PARTS[rule], target, draft_batch(target, draft)) <= BOUND


@both_rules
@sizes
def test_a_certain_proposal_keeps_the_law_whatever_it_is(rule: str, vocab_size: int, depth: int) -> None:
    """Without stored laws every single draft is a drafter of its own, and must be lossless alone."""  # CASES 9
    for target in (random_tree(vocab_size, depth + 1, 20), sparse_tree(vocab_size, depth + 1, 21)):
        assert error(*RULE_PARTS[rule], target, draft_batch(target)) <= BOUND


@both_rules
def test_a_certain_proposal_may_be_stored_as_none_or_as_a_one_hot_law(rule: str) -> None:
    target, drawn = random_tree(4, 4, 22), one_hot_tree(4, 3, 23)
    with_laws = draft_batch(target, drawn)
    without = replace(with_laws, draft=replace(with_laws.draft, probs=None))
    one, other = (committed(*RULE_PARTS[rule], target, batch) for batch in (with_laws, without))
    assert torch.equal(one.law, other.law) and torch.equal(one.accepted, other.accepted)


_FILTERS = itertools.product((0, 2), (1.0, 0.8), (0.0, 0.2), (1.0, 1.5), (0, 2))
FILTERS = [
    dict(zip(("top_k", "top_p", "min_p", "repetition_penalty", "min_new_tokens"), f, strict=True)) for f in _FILTERS
]


@both_rules
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("filtered_draft", [True, False], ids=["same filters", "raw draft"])
def test_every_combination_of_filters_keeps_the_filtered_law(
    rule: str, temperature: float, filtered_draft: bool
) -> None:
    """The draft may be filtered as the target is, or not at all, as long as its law is the one reported."""
    # CASES 3, 5, 6, 8, 11, 53, 54
    vocab_size, depth = 4, 2
    logits, draft_logits = ([level.log() for level in random_tree(vocab_size, depth + 1, seed)] for seed in (30, 31))
    for settings in FILTERS:
        params = SamplingParams(temperature=temperature, **settings)
        target = filtered_tree(logits, params, prompt=[1, 3], eos=[0])
        draft_params = params if filtered_draft else SamplingParams(temperature=1.0)
        draft = filtered_tree(draft_logits[:depth], draft_params, prompt=[1, 3], eos=[0])
        assert error(*RULE_PARTS[rule], target, draft_batch(target, draft)) <= BOUND, params


@pytest.mark.parametrize(("vocab_size", "depth"), [(3, 1), (3, 2), (3, 4), (4, 3), (5, 3)])
def test_block_accepts_at_least_as_much_as_rejection(vocab_size: int, depth: int) -> None:
    strictly = 0
    for seed in range(8):
        target, draft = random_tree(vocab_size, depth + 1, 100 + seed), random_tree(vocab_size, depth, 200 + seed)
        batch = draft_batch(target, draft)
        by_block, by_rejection = (
            committed(*RULE_PARTS[rule], target, batch).accepted for rule in ("block", "rejection")
        )
        assert bool((by_block >= by_rejection - BOUND).all())
        assert torch.allclose(by_block[:2], by_rejection[:2], atol=BOUND, rtol=0)  # one token: the same rule
        strictly += int((by_block > by_rejection + 1e-3).any())
    assert strictly > 0 or depth < 2


def test_block_gains_nothing_for_certain_proposals() -> None:
    target = random_tree(3, 5, 40)
    batch = draft_batch(target)
    by_block, by_rejection = (committed(*RULE_PARTS[rule], target, batch).accepted for rule in ("block", "rejection"))
    assert torch.allclose(by_block, by_rejection, atol=BOUND, rtol=0)


def test_the_toy_pair_of_the_block_verification_paper() -> None:
    """Sun et al. 2024, section 2: target (1/3, 2/3), draft (2/3, 1/3), two tokens: 10/9 becomes 11/9."""
    target = [torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64).repeat(2**t, 1) for t in range(3)]
    draft = [torch.tensor([[2 / 3, 1 / 3]], dtype=torch.float64).repeat(2**t, 1) for t in range(2)]
    batch = draft_batch(target, draft)
    accepted = {rule: float(committed(*RULE_PARTS[rule], target, batch).accepted[2]) for rule in RULE_PARTS}
    assert accepted == pytest.approx({"rejection": 10 / 9, "block": 11 / 9}, abs=BOUND)


def test_expected_acceptance_of_one_token_is_the_overlap_of_the_laws() -> None:
    target, draft = random_tree(5, 2, 41), random_tree(5, 1, 42)
    overlap = torch.minimum(target[0], draft[0]).sum()
    for parts in RULE_PARTS.values():
        assert torch.allclose(committed(*parts, target, draft_batch(target, draft)).accepted[1], overlap, atol=BOUND)


# Negative controls: the same check must notice every published way to get it wrong.


def draws_from_target(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    return target_probs[torch.arange(len(accepted)), accepted]


def draws_from_draft(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    assert draft.probs is not None
    rows = torch.arange(len(accepted))
    again = draft.probs[rows, accepted.clamp(max=draft.probs.shape[1] - 1)]
    return torch.where((accepted < draft.lengths).unsqueeze(1), again, target_probs[rows, accepted])


def forgets_to_renormalise(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    """What inverting a cumulative sum does with a law that lacks mass: the last token gets the rest."""
    assert draft.probs is not None
    rows = torch.arange(len(accepted))
    refused_at = accepted.clamp(max=draft.probs.shape[1] - 1)
    residual = (target_probs[rows, accepted] - draft.probs[rows, refused_at]).clamp(min=0)
    residual[:, -1] += 1 - residual.sum(-1)
    return torch.where((accepted < draft.lengths).unsqueeze(1), residual, target_probs[rows, accepted])


def draws_one_row_late(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    return REJECTION.next_law(
        target_probs, draft, accepted.add(1).clamp(max=draft.tokens.shape[1]).minimum(draft.lengths)
    )


def scale_omitted(target_probs: Tensor, draft: Draft, accepted: Tensor) -> Tensor:
    return next_law(target_probs, draft, accepted, torch.ones(len(accepted), dtype=torch.float64))


def first_token_unverified(target_probs: Tensor, draft: Draft) -> Tensor:
    chances = REJECTION.chances(target_probs, draft)
    return torch.cat([(draft.lengths > 0).double().unsqueeze(1), chances[:, 1:]], dim=1)


def all_accepted(target_probs: Tensor, draft: Draft) -> Tensor:
    return draft.is_drafted.double()


WRONG_RULES = {
    "rejection: draws from the target": replace(REJECTION, next_law=draws_from_target),
    "rejection: residual not renormalised": replace(REJECTION, next_law=forgets_to_renormalise),
    "rejection: residual omitted": replace(REJECTION, next_law=draws_from_draft),
    "rejection: correction one row late": replace(REJECTION, next_law=draws_one_row_late),  # CASES 12
    "rejection: first token unverified": replace(REJECTION, chances=first_token_unverified),  # CASES 10
    "rejection: everything accepted": replace(REJECTION, chances=all_accepted),  # CASES 1
    "block: stops at the first failure": replace(BLOCK, count=leading),
    "block: scale omitted": replace(BLOCK, next_law=scale_omitted),
    "block: draws from the target": replace(BLOCK, next_law=draws_from_target),
    "block: rejection's coins": replace(BLOCK, chances=REJECTION.chances),
}


@pytest.mark.parametrize("name", list(WRONG_RULES))
def test_the_check_notices_wrong_rules(name: str) -> None:
    target, draft = random_tree(4, 4, 50), random_tree(4, 3, 51)
    wrong = WRONG_RULES[name]
    assert error(wrong, wrong, target, draft_batch(target, draft)) > 1e-3


@both_rules
def test_the_check_notices_a_rule_that_differs_from_its_parts(rule: str) -> None:
    """A coin that succeeds at u == chance, and a law that is off by 1e-6, are told apart from the right ones."""
    right, parts = RULE_PARTS[rule]
    target, draft = random_tree(4, 3, 52), random_tree(4, 2, 53)
    batch = draft_batch(target, draft)
    tilt = 1 + torch.tensor([1e-6, 0, 0, 0], dtype=torch.float64)
    tilted = replace(parts, next_law=lambda t, d, a: parts.next_law(t, d, a) * tilt)
    assert error(right, parts, target, batch) <= BOUND
    assert error(tilted, parts, target, batch) > 1e-3
    assert error(replace(parts, wins=torch.le), parts, target, batch) > 1e-3  # CASES 19


@both_rules
def test_the_check_notices_laws_that_are_not_the_drafts(rule: str) -> None:
    # CASES 2, 3, 5, 9
    logits = [level.log() for level in random_tree(4, 3, 54)]
    target = random_tree(4, 4, 55)
    raw, processed, certain = (
        filtered_tree(logits, params, prompt=[0])
        for params in (SamplingParams(1.0), SamplingParams(0.7, top_k=2), SamplingParams(0.0))
    )
    parts = RULE_PARTS[rule]
    assert error(*parts, target, draft_batch(target, processed)) <= BOUND
    assert error(*parts, target, draft_batch(target, raw, drawn_from=processed)) > 1e-3
    assert error(*parts, target, draft_batch(target, raw, drawn_from=certain)) > 1e-3


@both_rules
def test_the_check_notices_another_rows_laws(rule: str) -> None:
    """Target laws of a neighbour, and draft laws of a neighbour."""  # CASES 17
    mine, neighbours = random_tree(4, 4, 56), random_tree(4, 4, 57)
    draft, others = random_tree(4, 3, 58), random_tree(4, 3, 59)
    wrong_target = replace(draft_batch(mine, draft), target_probs=draft_batch(neighbours, draft).target_probs)
    assert error(*RULE_PARTS[rule], mine, wrong_target) > 1e-3
    assert error(*RULE_PARTS[rule], mine, draft_batch(mine, others, drawn_from=draft)) > 1e-3


# Single steps, by hand.


def one_step(target: list[list[float]], draft: list[list[float]] | None, tokens: list[int]) -> tuple[Tensor, Draft]:
    probs = None if draft is None else torch.tensor([draft], dtype=torch.float64)
    return (
        torch.tensor([target], dtype=torch.float64),
        Draft(torch.tensor([tokens]), torch.tensor([len(tokens)]), probs),
    )


@both_rules
def test_a_token_the_target_forbids_is_refused_even_at_zero(rule: str) -> None:
    # CASES 19
    target, draft = one_step([[0.0, 1.0], [0.5, 0.5]], [[0.5, 0.5]], [0])
    zero = Forced(torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64))
    verdict = RULES[rule](target, draft, zero)  # type: ignore[arg-type]
    assert verdict.accepted.tolist() == [0] and verdict.next_token.tolist() == [1]


@both_rules
@pytest.mark.parametrize("refused", [0, 1, 2])
def test_a_refusal_draws_the_correction_from_its_own_position(rule: str, refused: int) -> None:
    """Refusal forced at every position; each position's law allows one other token only."""  # CASES 1, 10, 12
    target = [[0.5, 0.5, 0, 0, 0], [0.5, 0, 0.5, 0, 0], [0.5, 0, 0, 0.5, 0], [0, 0, 0, 0, 1.0]]
    probs, draft = one_step(target, [[1.0, 0, 0, 0, 0]] * 3, [0, 0, 0])
    uniforms = torch.full((1, 3), 0.999, dtype=torch.float64)
    uniforms[0, :refused] = 0.0
    verdict = RULES[rule](probs, draft, Forced(uniforms, torch.ones(1, 5, dtype=torch.float64)))  # type: ignore[arg-type]
    assert verdict.accepted.tolist() == [refused] and verdict.next_token.tolist() == [refused + 1]


def test_block_goes_on_after_a_failed_coin() -> None:
    target, draft = one_step([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5]], [[0.8, 0.2], [0.3, 0.7]], [0, 0])
    chances = block_chances(target, draft, block_survival(target, draft))
    uniforms = torch.tensor([[chances[0, 0], 0.0]], dtype=torch.float64)
    assert block(target, draft, Forced(uniforms, torch.ones(1, 2))).accepted.tolist() == [2]  # type: ignore[arg-type]


@both_rules
@pytest.mark.parametrize("vocab_size", [3, 5, 61])
def test_a_residual_of_zero_falls_back_to_the_targets_law(rule: str, vocab_size: int) -> None:
    """Equal laws cannot be refused, except by rounding; forced here."""  # CASES 18, 19
    law = random_tree(vocab_size, 1, 60)[0]
    target_probs, tokens = law.expand(vocab_size, 2, -1), torch.zeros(vocab_size, 1, dtype=torch.long)
    draft = Draft(tokens, torch.ones(vocab_size, dtype=torch.long), law.expand(vocab_size, 1, -1))
    nobody = torch.zeros(vocab_size, dtype=torch.long)
    assert torch.equal(next_law(target_probs, draft, nobody, torch.ones(vocab_size)), law.expand(vocab_size, -1))
    noise = torch.full((vocab_size, vocab_size), 1e6).fill_diagonal_(1e-6)
    verdict = RULES[rule](target_probs, draft, Forced(torch.full((vocab_size, 1), 1.0), noise))  # type: ignore[arg-type]
    assert verdict.accepted.tolist() == [0] * vocab_size
    assert verdict.next_token.tolist() == list(range(vocab_size))


@every_rule
def test_padding_is_never_accepted_and_never_read(rule: str) -> None:
    """Rows of lengths 0 .. K; cells beyond them hold NaN and the likeliest token."""
    target = random_tree(3, 4, 61)
    batch = draft_batch(target, random_tree(3, 3, 62))
    rows = len(batch.weights)
    verdict = RULES[rule](batch.target_probs, batch.draft, Randomness(torch.arange(rows), torch.zeros(rows).long()))
    assert bool((verdict.accepted <= batch.draft.lengths).all())
    assert bool(((verdict.next_token >= 0) & (verdict.next_token < 3)).all())
    assert bool((verdict.accepted == batch.draft.lengths).any())


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rules_change_none_of_their_inputs(rule: str, dtype: torch.dtype) -> None:
    # CASES 7
    generator = torch.Generator().manual_seed(63)
    target_probs = torch.rand(40, 4, 7, generator=generator, dtype=dtype).softmax(-1)
    probs = torch.rand(40, 3, 7, generator=generator, dtype=dtype).softmax(-1)
    drafts = [
        Draft(torch.randint(7, (40, 3), generator=generator), torch.arange(40) % 4, given) for given in (probs, None)
    ]
    randomness = Randomness(torch.arange(40), torch.arange(40) * 3)
    for draft in drafts:
        inputs = [target_probs, draft.tokens, draft.lengths, randomness.seeds, randomness.text_lengths]
        inputs += [] if draft.probs is None else [draft.probs]
        before = [tensor.clone() for tensor in inputs]
        first = RULES[rule](target_probs, draft, randomness)
        assert all(map(torch.equal, inputs, before))
        again = RULES[rule](target_probs, draft, randomness)  # CASES 61
        assert torch.equal(first.accepted, again.accepted) and torch.equal(first.next_token, again.next_token)


@both_rules
def test_a_broken_draft_law_is_refused_in_favour_of_the_targets(rule: str) -> None:
    """NaN as the last drafted law (a drafter ends a draft there): nothing of it is accepted, nothing is NaN."""
    # CASES 63, 64, 66
    target_probs = random_tree(4, 1, 64)[0].expand(4, 2, -1)
    draft = Draft(torch.arange(4).unsqueeze(1), torch.ones(4, dtype=torch.long), torch.full((4, 1, 4), torch.nan))
    nobody = torch.zeros(4, dtype=torch.long)
    assert torch.equal(next_law(target_probs, draft, nobody, torch.ones(4)), target_probs[:, 0])
    for uniform in (0.0, 0.5, 1.0):
        noise = torch.full((4, 4), 1e6).fill_diagonal_(1e-6)
        verdict = RULES[rule](target_probs, draft, Forced(torch.full((4, 1), uniform), noise))  # type: ignore[arg-type]
        assert verdict.accepted.tolist() == [0] * 4 and verdict.next_token.tolist() == [0, 1, 2, 3]


@both_rules
def test_nothing_behind_a_broken_draft_law_is_accepted(rule: str) -> None:
    """NaN inside a draft: not even the luckiest numbers carry the text past it."""
    # CASES 66
    target_probs = random_tree(4, 3, 65)[0].expand(4, 4, -1)
    laws = random_tree(4, 2, 66)[0].expand(4, 3, -1).clone()
    laws[:, 1] = math.nan
    draft = Draft(torch.arange(4).unsqueeze(1).expand(-1, 3), torch.full((4,), 3), laws)
    verdict = RULES[rule](target_probs, draft, Forced(torch.zeros(4, 3), torch.ones(4, 4)))  # type: ignore[arg-type]
    assert verdict.accepted.max() <= 1


# Greedy: one-hot laws.


@every_rule
@pytest.mark.parametrize("stored", [True, False], ids=["one-hot laws", "no laws"])
@pytest.mark.parametrize(("vocab_size", "depth"), [(3, 4), (5, 3)])
def test_greedy_keeps_the_draft_while_it_is_the_argmax(rule: str, stored: bool, vocab_size: int, depth: int) -> None:
    """Every draft of every length; no random number matters, so none is computed."""
    target = one_hot_tree(vocab_size, depth + 1, 70)
    batch = draft_batch(target)
    tokens, lengths = batch.draft.tokens, batch.draft.lengths
    probs = torch.nn.functional.one_hot(tokens, vocab_size).double() if stored else None
    seeds = torch.arange(len(tokens))
    greedy_text: list[int] = []
    for level in target:
        place = int(numbers(torch.tensor([greedy_text], dtype=torch.long), vocab_size)[0])
        greedy_text.append(int(level[place].argmax()))
    for constant in (True, False):
        randomness = Randomness(seeds, seeds, coupled=rule == "coupled", constant=constant)
        verdict = RULES[rule](batch.target_probs, Draft(tokens, lengths, probs), randomness)
        for row in range(len(tokens)):
            accepted, draft = int(verdict.accepted[row]), tokens[row].tolist()
            text = [*draft[:accepted], int(verdict.next_token[row])]
            assert text == greedy_text[: accepted + 1]
            assert accepted == int(lengths[row]) or draft[accepted] != greedy_text[accepted]


# The coupled rule and the race.


def test_a_race_is_won_exactly_where_the_exponential_identity_says() -> None:
    """Token j wins iff every other noise exceeds noise_j * p_i / p_j, which has probability p_j.

    Given noise_j = t the others lose with probability prod_i exp(-t p_i / p_j) = exp(-t (1 - p_j) / p_j), and the
    integral of that against exp(-t) is p_j. The thresholds are checked through ``race``, the integral numerically.
    """
    generator = torch.Generator().manual_seed(80)
    for law in torch.rand(20, 5, generator=generator, dtype=torch.float64):
        law /= law.sum()
        for j in range(5):
            times = torch.empty(200, dtype=torch.float64).exponential_(generator=generator)
            thresholds = times.unsqueeze(1) * law / law[j]
            losing = thresholds * (1 + 1e-12)
            losing[:, j] = times
            assert bool((race(law.expand(200, -1), losing) == j).all())
            for i in (i for i in range(5) if i != j):
                beaten = losing.clone()
                beaten[:, i] = thresholds[:, i] * (1 - 1e-12)
                assert bool((race(law.expand(200, -1), beaten) == i).all())
            steps = torch.linspace(0, 40, 100_001, dtype=torch.float64) * law[j]
            density = torch.exp(-steps) * torch.exp(-steps * (1 - law[j]) / law[j])
            assert float(torch.trapezoid(density, steps)) == pytest.approx(float(law[j]), rel=1e-6)


def test_a_race_never_gives_a_token_of_probability_zero() -> None:
    law = sparse_tree(5, 5, 81)[4]
    randomness = Randomness(torch.arange(len(law)), torch.zeros(len(law), dtype=torch.long))
    for offset in range(50):
        winners = race(law.float(), randomness.target(torch.full((len(law),), offset), 5))
        assert bool((law.gather(1, winners.unsqueeze(1)) > 0).all())


def plain_text(target: Tree, randomness: Randomness) -> Tensor:
    """Plain decoding along a tree: one race per position with that position's noise, [B, K+1]."""
    vocab_size = target[0].shape[-1]
    text = torch.zeros(len(randomness.seeds), 0, dtype=torch.long)
    for t, level in enumerate(target):
        noise = randomness.target(torch.full((len(text),), t), vocab_size)
        text = torch.cat([text, race(level[numbers(text, vocab_size)], noise).unsqueeze(1)], dim=1)
    return text


@pytest.mark.parametrize(("vocab_size", "depth"), [(3, 4), (4, 3), (5, 2), (5, 0)])
def test_coupled_commits_the_text_of_plain_decoding_token_by_token(vocab_size: int, depth: int) -> None:
    """Whatever is drafted: every possible draft of every length is verified with the same noise."""
    target = random_tree(vocab_size, depth + 1, 82)
    batch = draft_batch(target)
    rows = len(batch.weights)
    for seed in range(20):
        randomness = Randomness(torch.full((rows,), seed), torch.full((rows,), 7), coupled=True)
        text = plain_text(target, randomness)
        verdict = coupled(batch.target_probs.nan_to_num(0.0), batch.draft, randomness)
        for row in range(rows):
            accepted = int(verdict.accepted[row])
            expected = text[row, : accepted + 1].tolist()
            assert [*batch.draft.tokens[row, :accepted].tolist(), int(verdict.next_token[row])] == expected
            agrees = batch.draft.tokens[row, accepted : accepted + 1] == text[row, accepted]
            assert accepted == int(batch.draft.lengths[row]) or not bool(agrees)


def test_coupled_drafters_agree_as_often_as_the_race_formula_says() -> None:
    """P(both laws' races on the same noise have one winner) = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i).

    200,000 draws with fixed seeds, 5 standard deviations: 1 alarm in 1.7 million if the seeds were random.
    """
    target, draft = random_tree(5, 1, 83)[0][0], random_tree(5, 1, 84)[0][0]
    count = 200_000
    randomness = Randomness(torch.arange(count), torch.full((count,), 3), coupled=True)
    drawn = race(target.expand(count, -1), randomness.target(torch.zeros(count, dtype=torch.long), 5))
    agree = randomness.draft(0, draft.expand(count, 1, -1)).squeeze(1) == drawn
    ratios = torch.maximum(target / target.unsqueeze(1), draft / draft.unsqueeze(1))
    expected = float((1 / ratios.sum(1)).sum())
    distance = float((target - draft).abs().sum() / 2)
    assert expected >= (1 - distance) / (1 + distance)
    assert abs(float(agree.double().mean()) - expected) < 5 * (expected * (1 - expected) / count) ** 0.5


def test_paths_and_numbers_are_each_others_inverse() -> None:
    for vocab_size, length in [(3, 0), (3, 4), (5, 2)]:
        assert numbers(paths(vocab_size, length), vocab_size).tolist() == list(range(vocab_size**length))
