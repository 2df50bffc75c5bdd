"""The acceptance rules: pure functions on tensors, no model in sight.

Glossary. *drafted* tokens are proposed by the drafter; *accepted* ones survive verification; the *bonus* is the extra
token of a fully accepted draft, the *correction* the one drawn where a draft was refused; *committed* = accepted + 1.
Shapes: B rows, K draft tokens, V vocabulary. ``target_probs`` [B, K+1, V]: the target's law after the row's text and
the first i draft tokens. Every rule keeps exactly the target's law; greedy is a one-hot law in all three.

- rejection: Leviathan, Kalman, Matias 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318)
- block: Sun et al. 2024 (arXiv 2403.10444), never fewer accepted tokens than rejection
- coupled: Daliri, Musco, Suresh 2024 (arXiv 2408.07978), the text of a seed equals plain sampling with that seed
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from specdec import draws
from specdec.draft import Draft
from specdec.sampling import Randomness, one_hot, race


class Verdict(NamedTuple):
    """accepted [B]: how many draft tokens survive; next_token [B]: the bonus or correction that follows them."""

    accepted: Tensor
    next_token: Tensor


Rule = Callable[[Tensor, Draft, Randomness], Verdict]


def _compiled_first(rule: Rule) -> Rule:
    """The same rule, by draws.c where that is sure to find what ``rule`` does."""

    @wraps(rule)
    def judge(target_probs: Tensor, draft: Draft, randomness: Randomness) -> Verdict:
        if isinstance(randomness, Randomness) and not randomness.constant:
            given = (draft.tokens, draft.lengths, draft.probs, randomness.seeds, randomness.text_lengths)
            found = draws.verdict(rule.__name__, target_probs, *given)
            if found is not None:
                return Verdict(*found)
        return rule(target_probs, draft, randomness)

    return judge


@_compiled_first
def rejection(target_probs: Tensor, draft: Draft, randomness: Randomness) -> Verdict:
    """Accept each token with probability min(1, target / draft); stop at the first refusal."""
    if not draft.tokens.shape[1]:
        return _plain(target_probs, randomness)
    chances = rejection_chances(target_probs, draft)
    accepted = leading(randomness.accept(chances.shape[1]) < chances)
    scale = torch.ones(len(accepted), dtype=target_probs.dtype, device=target_probs.device)
    return _close(target_probs, draft, randomness, accepted, scale)


@_compiled_first
def block(target_probs: Tensor, draft: Draft, randomness: Randomness) -> Verdict:
    """Accept the longest prefix whose own coin succeeds; a failed coin does not end the search."""
    if not draft.tokens.shape[1]:
        return _plain(target_probs, randomness)
    survival = block_survival(target_probs, draft)
    chances = block_chances(target_probs, draft, survival)
    accepted = trailing(randomness.accept(chances.shape[1]) < chances)
    scale = survival.gather(1, accepted.unsqueeze(1)).squeeze(1)
    return _close(target_probs, draft, randomness, accepted, scale)


@_compiled_first
def coupled(target_probs: Tensor, draft: Draft, randomness: Randomness) -> Verdict:
    """Draw every position as plain sampling would, with its own noise; keep the draft while it agrees."""
    rows, positions, vocab_size = target_probs.shape
    offsets = torch.arange(positions, device=target_probs.device).expand(rows, -1)
    drawn = race(target_probs, randomness.target(offsets, vocab_size))
    accepted = leading((drawn[:, :-1] == draft.tokens) & draft.is_drafted)
    return Verdict(accepted, drawn.gather(1, accepted.unsqueeze(1)).squeeze(1))


def greedy(largest: Tensor, draft: Draft) -> Verdict:
    """What all rules do with one-hot laws, given their tokens [B, K+1]: keep the draft while it is what they say."""
    if not draft.tokens.shape[1]:
        return Verdict(torch.zeros_like(largest[:, 0]), largest[:, 0])
    found = draws.greedy(draft.tokens, draft.lengths, largest)
    if found is not None:
        return Verdict(*found)
    accepted = leading((largest[:, :-1] == draft.tokens) & draft.is_drafted)
    return Verdict(accepted, largest.gather(1, accepted.unsqueeze(1)).squeeze(1))


RULES: dict[str, Rule] = {"rejection": rejection, "block": block, "coupled": coupled}


def rejection_chances(target_probs: Tensor, draft: Draft) -> Tensor:
    """min(1, target / draft) of each drafted token, [B, K]; 0 where nothing was drafted."""
    return ratios(target_probs, draft).clamp(max=1.0)


def block_survival(target_probs: Tensor, draft: Draft) -> Tensor:
    """P_i = min(1, P_{i-1} * target / draft), P_0 = 1, [B, K+1]; 0 where nothing was drafted."""
    quotients = ratios(target_probs, draft)
    survival = [torch.ones(len(quotients), dtype=target_probs.dtype, device=target_probs.device)]
    for quotient in quotients.unbind(1):
        survival.append((survival[-1] * quotient).clamp_(max=1.0))
    return torch.stack(survival, dim=1)


def block_chances(target_probs: Tensor, draft: Draft, survival: Tensor) -> Tensor:
    """h_i of block verification (Sun et al. 2024, section 4), [B, K]: the chance that position i's coin succeeds.

    Inside the block h_i = R / (R + 1 - P_i), with R the mass that the target has left beyond the draft's next law;
    at a row's last drafted token h_i = P_i. 0 / 0 is 1: nothing is left to correct.
    """
    reached = survival[:, 1:]
    if reached.shape[1] == 0:
        return reached
    left = _excess(target_probs[:, 1:-1], _draft_probs(draft, slice(1, None), target_probs), reached[:, :-1]).sum(-1)
    refused = left + (1 - reached[:, :-1])
    inner = torch.where(refused == 0, 1.0, left / refused)  # NaN never accepts
    chances = torch.cat([inner, reached[:, -1:]], dim=1)
    last = torch.arange(reached.shape[1], device=reached.device) == draft.lengths.unsqueeze(1) - 1
    return torch.where(last, reached, torch.where(draft.is_drafted, chances, 0.0))


def next_law(target_probs: Tensor, draft: Draft, accepted: Tensor, scale: Tensor) -> Tensor:
    """The law of the token after ``accepted`` [B] draft tokens, [B, V].

    The target's own law after a whole draft; after a refusal what the draft did not cover,
    max(scale * target - draft, 0) renormalised. Equal laws leave a residual of zero by rounding: then the target's.
    """
    rows = torch.arange(len(accepted), device=accepted.device)
    target_law = target_probs[rows, accepted]
    if draft.tokens.shape[1] == 0:
        return target_law
    refused_at = accepted.clamp(max=draft.tokens.shape[1] - 1)
    residual = _excess(target_law, _draft_probs(draft, (rows, refused_at), target_probs), scale)
    mass = residual.sum(-1, keepdim=True)
    is_residual = (accepted < draft.lengths).unsqueeze(-1) & (mass > 0)
    return torch.where(is_residual, residual / mass, target_law)


def ratios(target_probs: Tensor, draft: Draft) -> Tensor:
    """target / draft probability of each drafted token, [B, K]; 0 where nothing was drafted."""
    tokens = draft.tokens.unsqueeze(-1)
    quotients = target_probs[:, :-1].gather(-1, tokens).squeeze(-1)
    if draft.probs is not None:
        quotients = quotients / draft.probs.gather(-1, tokens).squeeze(-1)
    return torch.where(draft.is_drafted, quotients, 0.0)


def leading(hits: Tensor) -> Tensor:
    """How many of ``hits`` [B, K] come before the first miss, [B]."""
    return hits.long().cumprod(-1).sum(-1)


def trailing(hits: Tensor) -> Tensor:
    """One past the last hit of ``hits`` [B, K], 0 where there is none, [B]; K >= 1."""
    places = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    return (hits * places).amax(-1)


def _plain(target_probs: Tensor, randomness: Randomness) -> Verdict:
    """Nothing was drafted: the draw of ``coupled``, whatever the rule."""
    nothing = torch.zeros(len(target_probs), dtype=torch.long, device=target_probs.device)
    return Verdict(nothing, race(target_probs[:, 0], randomness.target(nothing, target_probs.shape[-1])))


def _close(target_probs: Tensor, draft: Draft, randomness: Randomness, accepted: Tensor, scale: Tensor) -> Verdict:
    """Draw the bonus or correction that follows the accepted tokens."""
    law = next_law(target_probs, draft, accepted, scale)
    return Verdict(accepted, race(law, randomness.target(accepted, law.shape[-1])))


def _excess(target_law: Tensor, draft_law: Tensor, scale: Tensor) -> Tensor:
    """max(scale * target - draft, 0) for laws [..., V] and scale [...]."""
    return (target_law * scale.unsqueeze(-1)).sub_(draft_law).clamp_(min=0)


def _draft_probs(draft: Draft, index: slice | tuple[Tensor, Tensor], like: Tensor) -> Tensor:
    """The draft's laws at ``index`` (a slice of positions, or one position per row); one-hot where none are stored."""
    chosen = (slice(None), index) if isinstance(index, slice) else index
    if draft.probs is not None:
        return draft.probs[chosen]
    return one_hot(draft.tokens[chosen], like.shape[-1]).to(like.dtype)
