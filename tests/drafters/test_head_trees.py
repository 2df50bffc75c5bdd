"""Trees of EAGLE-3 and block heads: the text keeps its law, and every node is guessed from its own way through the tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_block
import test_eagle3
import torch
from test_block import BUDGETS, PROMPTS, TARGETS, gpt
from torch import Tensor

from block_toys import features_of
from specdec import Draft, Engine, load
from specdec.drafters.block import BlockDrafter, BlockTreeDrafter
from specdec.drafters.eagle3 import Eagle3Drafter, Eagle3TreeDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError
from specdec.lm import base
from specdec.lm.base import CachedLM
from specdec.lm.cache import RaggedCache
from specdec.lm.cpu import Tokens
from specdec.lm.features import Features
from specdec.lm.fused import CompiledFused, FusedLM
from specdec.lm.native import NativeLM
from specdec.nn.cpu import kernels
from specdec.sequences import Sequences, Step
from specdec.tree import Branches
from test_law import ALPHA, ONE, UNEQUAL, alarm
from toys import native

KINDS: dict[str, Callable[[CachedLM], Eagle3TreeDrafter | BlockTreeDrafter]] = {
    "eagle3": lambda lm: Eagle3TreeDrafter(test_eagle3.trained(), lm),
    "block": lambda lm: BlockTreeDrafter(test_block.trained(), lm),
}
CHAINS: dict[str, Callable[[CachedLM], Eagle3Drafter | BlockDrafter]] = {
    "eagle3": lambda lm: Eagle3Drafter(test_eagle3.trained(), lm),
    "block": lambda lm: BlockDrafter(test_block.trained(), lm, least_survival=0),
}
SAMPLES = 4000


# What the engine writes.


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "top_p": 0.9, "seed": 3}])
@pytest.mark.parametrize("target", list(TARGETS))
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_text_is_that_of_plain_decoding_and_more_survives(kind: str, target: str, settings: dict[str, Any]) -> None:
    lm = TARGETS[target]()
    plain = Engine(TARGETS[target]()).generate(PROMPTS, max_new_tokens=BUDGETS, **settings)
    chain = Engine(lm, CHAINS[kind](lm)).generate(PROMPTS, max_new_tokens=BUDGETS, num_draft_tokens=4, **settings)
    for size in (1, 3, 8):
        found = Engine(lm, KINDS[kind](lm)).generate(
            PROMPTS, max_new_tokens=BUDGETS, max_batch_size=size, num_draft_tokens=16, **settings
        )
        assert found.token_ids == plain.token_ids == chain.token_ids
        assert found.stats.mean_acceptance_length > 1.05 * chain.stats.mean_acceptance_length
    assert not any(lm.lengths)


@pytest.mark.parametrize("kind", list(KINDS))
def test_chosen_sizes_processors_and_windows(kind: str) -> None:
    """Sizes grow and shrink with ``auto``; rows with processors draft chains; windows slide."""
    lm = native(gpt())
    engine = Engine(lm, KINDS[kind](lm))
    for settings in (
        {},
        {"repetition_penalty": 1.2, "num_draft_tokens": 6},
        {"max_new_tokens": 1, "num_draft_tokens": 9},
    ):
        given: dict[str, Any] = {"max_new_tokens": 40, **settings}
        plain = {name: value for name, value in given.items() if name != "num_draft_tokens"}
        assert engine.generate(PROMPTS, **given).token_ids == Engine(native(gpt())).generate(PROMPTS, **plain).token_ids
    short = NativeLM(test_block.tiny_gpt(0, layers=3, context=24))
    given = {"max_new_tokens": 60, "context": "slide", "max_batch_size": 3}
    found = Engine(short, KINDS[kind](short)).generate(PROMPTS[:4], num_draft_tokens=9, **given)
    assert found.token_ids == Engine(short).generate(PROMPTS[:4], **given).token_ids


# Every node is guessed from its own way through the tree.


class Watched:
    """Keeps sampled trees with the texts they hang from, as far as the target has them in its window."""

    def __init__(self, drafter: Eagle3TreeDrafter | BlockTreeDrafter) -> None:
        self.trees: list[tuple[list[int], list[int], list[int], Tensor]] = []  # text, tokens, parents, laws
        propose = drafter.propose

        def watched(sequences: Sequences, lengths: list[int]) -> Draft:
            draft = propose(sequences, lengths)
            if draft.parents is not None and draft.probs is not None:
                for slot, (row, parents) in enumerate(zip(sequences.rows, draft.parents, strict=True)):
                    text = row.tokens[drafter.target.starts[slot] :]
                    self.trees.append((text, draft.tokens[slot].tolist(), parents, draft.probs[slot]))
            return draft

        drafter.propose = watched  # type: ignore[method-assign]


def law_after(kind: str, text: list[int], way: list[int]) -> Tensor:
    """What the head, in one training pass over the text, says of the token after ``way``."""
    head: Any = test_eagle3.trained() if "eagle3" in kind else test_block.trained()
    count = len(text) - 1  # places whose features are known
    rest = [*way, *[0] * 8]
    if "eagle3" in kind:
        tokens = torch.tensor([[*text, *rest][: count + test_eagle3.STEPS]])
        features, _ = features_of(gpt(), head.layers, tokens)
        features[:, count:] = 1e3  # of the last token nothing may be known
        return head.logits(head.unrolled(tokens, features)[len(way)][0, -1]).softmax(-1)
    tokens = torch.tensor([text])
    features, _ = features_of(gpt(), head.layers, tokens)
    features[:, -1] = 1e3
    hidden, _ = head.hidden_at(torch.tensor([[count]]), tokens, features)
    return (gpt().lm_head(hidden[0, len(way)]) + head.correction(torch.tensor([*text, *way][-1]))).softmax(-1)


def furthest(kind: str, watched: Watched) -> tuple[float, int]:
    """The largest difference of a node's law from that of a training pass, and how many nodes behind others were seen."""
    worst, seen = 0.0, 0
    for text, tokens, parents, laws in watched.trees:
        first: set[int] = set()
        for node, parent in enumerate(parents):
            way, place = [], parent
            while place >= 0:
                way, place = [tokens[place], *way], parents[place]
            if parent in first or len(way) >= test_eagle3.STEPS:
                continue  # the law of a later child leaves out those before it
            first.add(parent)
            with torch.no_grad():
                worst = max(worst, float((law_after(kind, text, way) - laws[node]).abs().max()))
            seen += parent >= 0
    return worst, seen


def run(kind: str) -> Watched:
    """Rows come, go, move into holes and share prompts."""
    if kind in ("eagle3", "block") and kernels(torch.float32) is None:
        pytest.skip("nothing is compiled here")
    lm, kind = native(gpt()), kind.removesuffix(" on torch")
    drafter = KINDS[kind](lm)
    watched, engine = Watched(drafter), Engine(lm, drafter)
    given = {"max_batch_size": 3, "temperature": 1.0, "seed": 2, "rule": "rejection"}
    engine.generate(PROMPTS, max_new_tokens=BUDGETS, num_draft_tokens=9, **given)
    engine.generate(PROMPTS[2:3], n=4, max_new_tokens=[12], num_draft_tokens=7, **given)
    return watched


@pytest.mark.parametrize("kind", [*KINDS, "eagle3 on torch"])
def test_a_node_is_guessed_as_in_training(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind.endswith("on torch"):
        test_eagle3.without_compiler(monkeypatch)
    worst, seen = furthest(kind, run(kind))
    assert worst < 1e-4 and seen > 100


class WrongBranches(Branches):
    """A node hangs from the one beside its parent."""

    def grow(self, parents: Iterable[int]) -> None:
        super().grow([max(-1, parent - 1) for parent in parents])


def _wrong_positions(cache: RaggedCache, *given: Any, **named: Any) -> None:
    right_begin(cache, *given, **named)
    if cache.key_positions is not None:
        cache.positions = cache.positions + 1


def _wrong_depths(lm: CompiledFused, read: Tokens, lengths: Any, first: int) -> Tokens:
    found = right_nodes(lm, read, lengths, first)
    return found._replace(positions=found.positions + 1)


def _wrong_path(features: Features, slot: int, path: Any) -> None:
    right_keep(features, slot, range(len(path)))


def _wrong_states(lm: FusedLM, rows: int, width: int) -> Tensor:
    return right_beside(lm, rows, width).roll(1, 1)


def _wrong_tokens(head: Any, before: Tensor) -> Tensor:
    found: Tensor = right_correction(head, before.roll(1, -1))
    return found


right_begin, right_keep, right_nodes = RaggedCache.begin, Features.keep, CompiledFused._as_nodes
right_beside, right_correction = FusedLM._beside, test_block.BlockHead.correction
WRONG: list[tuple[str, Any, str, Callable[..., Any]]] = [
    ("eagle3", base, "Branches", WrongBranches),
    ("eagle3", CompiledFused, "_as_nodes", _wrong_depths),
    ("eagle3 on torch", base, "Branches", WrongBranches),
    ("eagle3 on torch", RaggedCache, "begin", _wrong_positions),
    ("eagle3", FusedLM, "_beside", _wrong_states),
    ("eagle3", Features, "keep", _wrong_path),
    ("block", Features, "keep", _wrong_path),
    ("block", test_block.BlockHead, "correction", _wrong_tokens),
]


@pytest.mark.parametrize(("kind", "owner", "name", "wrong"), WRONG)
def test_a_wrong_tree_is_seen(
    kind: str, owner: Any, name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as planted:
        if kind.endswith("on torch"):
            test_eagle3.without_compiler(planted)
        planted.setattr(owner, name, wrong)
        watched = run(kind)
    assert furthest(kind, watched)[0] > 1e-2


# Laws.


@pytest.mark.parametrize("rule", ["rejection", "coupled"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_samples_follow_the_targets_law(kind: str, rule: str) -> None:
    """n = 4,000 texts of 5 tokens; one false alarm in 200,000 runs each."""
    for kinds, samples in ((ONE, SAMPLES), (UNEQUAL, 2000)):
        if kind == "eagle3":
            output = test_eagle3.sample(Eagle3TreeDrafter, kinds, samples, rule=rule, num_draft_tokens=7)
        else:
            output = test_block.sample(BlockTreeDrafter, kinds, samples, rule=rule, num_draft_tokens=7)
        assert output.stats.num_accepted_tokens > 1000
        assert alarm(output, kinds, samples) > ALPHA


class Misreports(Eagle3TreeDrafter):
    """Reports another law than it draws from."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        return draft if draft.probs is None else replace(draft, probs=draft.probs.roll(1, -1))


def test_the_test_notices_a_tree_that_misreports_its_law() -> None:
    output = test_eagle3.sample(Misreports, ONE, SAMPLES, rule="rejection", num_draft_tokens=7)
    assert alarm(output, ONE, SAMPLES) < ALPHA


# How they are asked for.


def test_tree_is_for_heads_too(tmp_path: Path) -> None:
    test_eagle3.trained().save(tmp_path / "eagle3")
    test_block.trained().save(tmp_path / "block")
    expected = Engine(native(gpt())).generate(PROMPTS, max_new_tokens=20).token_ids
    for name, kind in (("eagle3", Eagle3TreeDrafter), ("block", BlockTreeDrafter)):
        engine = load(gpt(), draft=tmp_path / name, tree=True)
        assert isinstance(engine.drafter, kind)
        found = engine.generate(PROMPTS, max_new_tokens=20, num_draft_tokens=12)
        assert found.token_ids == expected
        assert max(found.stats.num_draft_tokens_per_position) and found.stats.num_accepted_tokens
    with pytest.raises(ConfigError, match="SuffixDrafter"):
        load(gpt(), draft=SuffixDrafter(), tree=True)


def test_what_is_known_of_rows_goes_with_them() -> None:
    lm = native(gpt())
    drafter = KINDS["block"](lm)
    Engine(lm, drafter).generate(PROMPTS, max_new_tokens=BUDGETS, num_draft_tokens=9)
    assert list(drafter.trees.experience) == []
    drafter.observe(Step([], [], [], []))
