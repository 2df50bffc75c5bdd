"""How much of a draft survives: laws of the target's logits, and the rule over them."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from specdec import tree, verify
from specdec.draft import Draft
from specdec.graphs import Graphs, Results
from specdec.sampling import Filters, Randomness, is_law, largest, law, laws
from specdec.sequences import Sequences
from specdec.verify import Rule, Verdict


def judge(sequences: Sequences, rule: Rule, logits: Tensor, draft: Draft, graphs: Graphs) -> tuple[Verdict, Tensor]:
    """The verdict over a chain, and which rows' laws are sound [B]; logits [B, K + 1, V]."""
    scores = sequences.process(logits, draft)
    if sequences.greedy:  # laws of large vocabularies are large, and one-hot ones say no more than their tokens
        found = graphs.run(("greedy", scores.shape), _greedy, scores, draft.tokens, draft.lengths)
    elif graphs.records and (by := _only(sequences.filters)) is not None and by.never_waits:
        given = [scores, draft.tokens, draft.lengths, *sequences.keys_here]
        given += [] if draft.probs is None else [draft.probs]
        function = partial(_drawn, rule, by, sequences.coupled)
        found = graphs.run((rule, by, sequences.coupled, scores.shape, len(given)), function, *given)
    else:
        target_laws = laws(scores, sequences.filters)
        return rule(target_laws, draft, sequences.randomness), is_law(target_laws).all(-1)
    return Verdict(found[0], found[1]), found[2]


def judge_tree(sequences: Sequences, logits: Tensor, draft: Draft) -> tuple[tree.Path, tree.Tree, Tensor]:
    """The path that survives, the nodes it leads through, and which rows' laws are sound; logits by node."""
    nodes = tree.Tree.of(draft.parents or [], logits.device)
    scores = sequences.process(logits, draft)
    if sequences.greedy:
        tokens = largest(scores)
        return tree.follow(tokens.clamp(min=0), nodes, draft), nodes, (tokens >= 0).all(-1)
    target_laws = laws(scores, sequences.filters)
    rule = tree.coupled if sequences.coupled else tree.rejection
    return rule(target_laws, nodes, draft, sequences.randomness), nodes, is_law(target_laws).all(-1)


def _only(groups: dict[Filters, list[int]]) -> Filters | None:
    """The filters of all rows, if they have the same; others are told rows apart by numbers that are not on the device."""
    return next(iter(groups)) if len(groups) == 1 else None


def _greedy(scores: Tensor, tokens: Tensor, lengths: Tensor) -> Results:
    """Accepted and next token, and whether there are any; [B] each."""
    likeliest = largest(scores)
    accepted, following = verify.greedy(likeliest.clamp(min=0), Draft(tokens, lengths))
    return accepted, following, (likeliest >= 0).all(-1)


def _drawn(
    rule: Rule,
    by: Filters,
    coupled: bool,
    scores: Tensor,
    tokens: Tensor,
    lengths: Tensor,
    seeds: Tensor,
    text_lengths: Tensor,
    probs: Tensor | None = None,
) -> Results:
    """The same of rows that draw."""
    target_laws = law(scores, by)
    verdict = rule(target_laws, Draft(tokens, lengths, probs), Randomness(seeds, text_lengths, coupled=coupled))
    return verdict.accepted, verdict.next_token, is_law(target_laws).all(-1)
