"""The EAGLE-3 drafter: the text keeps its law, and its passes are those of training, however rows come and go."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from test_block import BUDGETS, PROMPTS, TARGETS, gpt
from torch import Tensor

from block_toys import FeatureTable, features_of
from eagle3_toys import eagle3_head, table_head, trained_head
from specdec import Draft, Engine, Output
from specdec.drafters.eagle3 import Eagle3Drafter, usual_layers
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError
from specdec.lm import fused
from specdec.lm.base import CachedLM
from specdec.lm.cpu import Tokens
from specdec.lm.fused import CompiledFused, FusedLM, TorchFused, fused_lm
from specdec.lm.native import NativeLM
from specdec.nn.cpu import kernels
from specdec.nn.eagle3 import Eagle3Head
from specdec.sequences import Sequences
from test_law import ALPHA, ONE, TARGET, UNEQUAL, VOCAB, Kind, alarm
from toys import native, tiny_gpt

STEPS, SAMPLES = 4, 4000
IDS = torch.arange(0, 61, 2)


@cache
def written() -> Tensor:
    """The target's own text, [30, 40]."""
    prompts = [[token] for token in range(30)]
    return torch.tensor(Engine(native(gpt())).generate(prompts, max_new_tokens=40, temperature=1.0, seed=1).token_ids)


@cache
def trained() -> Eagle3Head:
    return trained_head(gpt(), written(), 40, steps=STEPS)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any) -> None:
        raise LookupError("planted")

    monkeypatch.setattr(fused, "CompiledFused", refuse)


WAYS = ["compiled", "torch"]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the head is run."""
    if request.param == "torch":
        without_compiler(monkeypatch)
    elif kernels(torch.float32) is None:
        pytest.skip("nothing is compiled here")
    return str(request.param)


class Recording(Eagle3Drafter):
    """Notes every draft: the window's text with what was drafted, how much of it, and the laws."""

    def __init__(self, head: Eagle3Head, target: CachedLM) -> None:
        super().__init__(head, target)
        self.records: list[tuple[list[int], int, Tensor]] = []

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        for slot, row in enumerate(sequences.rows):
            if draft.probs is not None and draft.lengths[slot]:
                text = row.tokens[self.target.starts[slot] :] + draft.tokens[slot].tolist()
                self.records.append((text, draft.tokens.shape[1], draft.probs[slot]))
        return draft


# What the engine writes.


@pytest.mark.parametrize("target", list(TARGETS))
def test_greedy_text_is_the_targets_own(target: str, way: str) -> None:
    lm = TARGETS[target]()
    engine = Engine(lm, Eagle3Drafter(trained(), lm))
    plain = Engine(TARGETS[target]()).generate(PROMPTS, max_new_tokens=BUDGETS)
    for size, length in ((1, 4), (3, 1), (8, 4)):
        output = engine.generate(PROMPTS, max_new_tokens=BUDGETS, max_batch_size=size, num_draft_tokens=length)
        assert output.token_ids == plain.token_ids
        assert 0 < output.stats.num_accepted_tokens < output.stats.num_draft_tokens
        assert output.stats.draft_seconds > 0
    lookup = HybridDrafter(Eagle3Drafter(trained(), lm), SuffixDrafter())
    assert Engine(lm, lookup).generate(PROMPTS, max_new_tokens=BUDGETS).token_ids == plain.token_ids
    assert not any(lm.lengths)


def test_samples_of_the_coupled_rule_are_plain_samples(way: str) -> None:
    given = {"max_new_tokens": BUDGETS, "temperature": [0.7, 1.0, 0.0, 1.3] * 2, "seed": 3, "rule": "coupled"}
    plain = Engine(native(gpt())).generate(PROMPTS, **given)
    lm = native(gpt())
    for head in (trained(), eagle3_head(gpt(), draft_ids=IDS)):
        output = Engine(lm, Eagle3Drafter(head, lm)).generate(PROMPTS, max_batch_size=3, **given)
        assert output.token_ids == plain.token_ids and output.stats.num_accepted_tokens > 0


def test_training_raises_the_mean_acceptance_length() -> None:
    lengths = []
    for head in (eagle3_head(gpt(), steps=STEPS), trained()):
        lm = native(gpt())
        output = Engine(lm, Eagle3Drafter(head, lm)).generate(PROMPTS, max_new_tokens=60, temperature=1.0, seed=5)
        lengths.append(output.stats.mean_acceptance_length)
    assert lengths[0] < 1.3 and lengths[1] > 1.5


# Passes are those of training.


def furthest(records: list[tuple[list[int], int, Tensor]]) -> float:
    """The largest difference between recorded laws and those of one training pass over the text."""
    worst = 0.0
    head = trained()
    for text, drafted, laws in records:
        count = len(text) - drafted - 1  # places whose features are known
        tokens = torch.tensor([[*text, *[0] * STEPS][: count + STEPS]])
        features, _ = features_of(gpt(), head.layers, tokens)
        features[:, count:] = 1e3  # of the last token nothing may be known
        with torch.no_grad():
            expected = torch.stack([head.logits(step[0, -1]).softmax(-1) for step in head.unrolled(tokens, features)])
        worst = max(worst, float((expected[:drafted] - laws).abs().max()))
    return worst


def run(lm: CachedLM) -> list[tuple[list[int], int, Tensor]]:
    """Rows come, go, move into holes, share prompts and are drafted for at times only."""
    drafter = Recording(trained(), lm)
    engine, given = Engine(lm, drafter), {"max_batch_size": 3, "temperature": 1.0, "seed": 2}
    engine.generate(PROMPTS, max_new_tokens=BUDGETS, num_draft_tokens=3, **given)
    engine.generate(PROMPTS[2:3], n=4, max_new_tokens=[12], num_draft_tokens=4, **given)
    return drafter.records


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_drafting_pass_is_a_training_pass(target: str, way: str) -> None:
    records = run(TARGETS[target]())
    assert len(records) > 60 and len({len(text) for text, _, _ in records}) > 25
    assert furthest(records) < 1e-4


@pytest.mark.parametrize(
    "changes", [{"norm_before_residual": False}, {"norm_before_fc": True}, {"norm_output": True}, {"width": 16}]
)
def test_every_variant_drafts_as_it_is_trained(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    head = trained_head(gpt(), written(), 20, steps=STEPS, **changes)
    monkeypatch.setattr(sys.modules[__name__], "trained", lambda: head)
    records = run(native(gpt()))
    assert (
        isinstance(fused_lm(copy.deepcopy(head).share(*sharing()), native(gpt())), TorchFused)
        == head.config.norm_output
    )
    assert len(records) > 60 and furthest(records) < 1e-4


def sharing() -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return gpt().embed_tokens, gpt().lm_head


class Resting(Recording):
    """Drafts at every third step: features of several steps come at once."""

    turn = 0

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        self.turn += 1
        return super().propose(sequences, lengths if self.turn % 3 == 0 else [0] * len(lengths))


def slide(kind: type[Recording]) -> list[tuple[list[int], int, Tensor]]:
    """Rows outgrow the context, so that the target reads them anew."""
    lm = NativeLM(tiny_gpt(0, layers=3, context=24))
    drafter = kind(trained(), lm)
    given = {"max_new_tokens": 60, "context": "slide", "temperature": 1.0, "seed": 1, "rule": "coupled"}
    output = Engine(lm, drafter).generate(PROMPTS[:4], max_batch_size=3, num_draft_tokens=4, **given)
    assert output.token_ids == Engine(lm).generate(PROMPTS[:4], **given).token_ids
    return drafter.records


@pytest.mark.parametrize("kind", [Recording, Resting])
def test_windows_that_slide_and_pauses_leave_nothing_behind(kind: type[Recording], way: str) -> None:
    records = slide(kind)
    assert len(records) > 30 and max(len(text) - count for text, count, _ in records) <= 24
    assert furthest(records) < 1e-4


def late_tokens(self: FusedLM, tokens: Tensor, *given: Any, **named: Any) -> Any:
    """The token of a place is the one after the right one."""
    return right_append(self, tokens.roll(-1, 1) if tokens.shape[1] > 1 else tokens, *given, **named)


def shifted_places(self: FusedLM, tokens: Tensor, lengths: list[int], first: int, **named: Any) -> Tensor:
    """A place that is drafted comes one too late."""
    late = [length + (self._given is None) for length in lengths]
    return right_forward(self, tokens, late, first, **named)


def forgetful(self: FusedLM, states: Tensor, *, is_first: bool) -> None:
    """A draft begins anew at every token: what was put out is not read."""
    right_put_out(self, states * 0, is_first=is_first)


def late_states(self: FusedLM, hidden: Tensor) -> None:
    right_give(self, hidden.roll(1, 1))


def shifted_states(self: CompiledFused, read: Tokens, first: int) -> None:
    """States come one token too late."""
    right_enter(self, read, first)
    self._scratch[0][: len(read.ids)] = self._scratch[0][: len(read.ids)].roll(1, 0)


def no_end(self: FusedLM, source: int, target: int, length: int | None = None) -> None:
    """What a slot holds stays when its row is read anew."""
    if source != target:
        right_copy(self, source, target, length)


def no_copy(self: Eagle3Drafter, source: int, target: int, length: int | None = None) -> None: ...


right_append, right_forward, right_put_out = FusedLM.append, TorchFused._forward, FusedLM._put_out
right_give, right_copy, right_enter = FusedLM.give, FusedLM.copy, CompiledFused._enter
WRONG: dict[str, tuple[list[str], Any, str, Callable[..., Any]]] = {
    "tokens beside features": (["torch"], FusedLM, "append", late_tokens),
    "places of a draft": (["torch"], TorchFused, "_forward", shifted_places),
    "hidden states fed back": (["torch"], FusedLM, "_put_out", forgetful),
    "features beside tokens": (WAYS, FusedLM, "give", late_states),
    "states of a compiled pass": (["compiled"], CompiledFused, "_enter", shifted_states),
    "rows that are read anew": (WAYS, FusedLM, "copy", no_end),
    "rows that move": (WAYS, Eagle3Drafter, "copy", no_copy),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_the_test_notices_a_wrong_pass(wrong: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ways, *planted = WRONG[wrong]
    if way not in ways:
        pytest.skip(f"not done when {way}")
    monkeypatch.setattr(*planted)
    assert furthest(slide(Recording) if "anew" in wrong else run(NativeLM(gpt()))) > 1e-2


def test_long_prompts_are_read_in_parts(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, prompt = native(gpt()), (torch.arange(150) * 7 % 61).tolist()
    drafter = Recording(trained(), lm)
    monkeypatch.setattr("specdec.drafters.features._PART", 40)
    given = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0}
    Engine(lm, drafter).generate([prompt, prompt[:100]], num_draft_tokens=3, **given)
    assert len(drafter.records) > 3 and furthest(drafter.records) < 1e-4


# Laws.


def sample(
    drafter: type[Eagle3Drafter], kinds: list[Kind], samples: int, draft_ids: Tensor | None = None, **settings: Any
) -> Output:
    lm = FeatureTable(TARGET)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    columns = {name: [getattr(kind.params, name) for kind in kinds] for name in names}
    return Engine(lm, drafter(table_head(lm, VOCAB, draft_ids), lm)).generate(
        [kind.prompt for kind in kinds],
        n=samples,
        max_new_tokens=[kind.length for kind in kinds],
        **{"seed": 0, "max_batch_size": 2048, "num_draft_tokens": 3, **columns, **settings},
    )


SOME = torch.tensor([0, 2])


@pytest.mark.parametrize(("rule", "draft_ids"), [("rejection", None), ("block", SOME), ("coupled", SOME)])
def test_samples_follow_the_targets_law(rule: str, draft_ids: Tensor | None) -> None:
    """n = 4,000 texts of 5 tokens, with all tokens drafted or half of them; one false alarm in 200,000 runs each."""
    output = sample(Eagle3Drafter, ONE, SAMPLES, draft_ids, rule=rule)
    assert 0.05 < output.stats.acceptance_rate < 0.95
    assert alarm(output, ONE, SAMPLES) > ALPHA


def test_unequal_rows_in_one_batch_follow_their_own_laws() -> None:
    """Prompts, filters and lengths differ, rows join and leave: one false alarm in 66,000 runs."""
    output = sample(Eagle3Drafter, UNEQUAL, 2000, rule="block", max_batch_size=1000)
    assert output.stats.num_accepted_tokens > 1000
    assert alarm(output, UNEQUAL, 2000) > ALPHA


class Misreports(Eagle3Drafter):
    """Reports another law than it draws from."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        return draft if draft.probs is None else replace(draft, probs=draft.probs.roll(1, -1))


def test_the_test_notices_a_draft_that_misreports_its_law() -> None:
    assert alarm(sample(Misreports, ONE, SAMPLES, rule="rejection"), ONE, SAMPLES) < ALPHA


class Seen(Eagle3Drafter):
    """Keeps its drafts."""

    def __init__(self, head: Eagle3Head, target: CachedLM) -> None:
        super().__init__(head, target)
        self.drafts: list[Draft] = []

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        self.drafts.append(super().propose(sequences, lengths))
        return self.drafts[-1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_tokens_outside_a_trimmed_vocabulary_are_never_guessed(temperature: float) -> None:
    lm = native(gpt())
    drafter = Seen(eagle3_head(gpt(), draft_ids=IDS), lm)
    Engine(lm, drafter).generate(PROMPTS, max_new_tokens=20, temperature=temperature, seed=1)
    drafts = [draft for draft in drafter.drafts if draft.tokens.shape[1]]
    guessed = torch.cat([draft.tokens[draft.is_drafted] for draft in drafts])
    assert len(guessed) > 100 and bool((guessed % 2 == 0).all())
    for draft in drafts:
        if temperature:
            assert draft.probs is not None and bool((draft.probs[..., 1::2] == 0).all())
            torch.testing.assert_close(draft.probs.sum(-1), torch.ones(draft.tokens.shape))
        else:
            assert draft.probs is None


# Heads and targets that do not go together.


def test_a_head_for_another_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size 61, this one has 50"):
        Eagle3Drafter(trained(), native(tiny_gpt(0, vocab_size=50, layers=3)))
    with pytest.raises(ConfigError, match="feature_size 16, this one has 32"):
        Eagle3Drafter(table_head(FeatureTable(TARGET), VOCAB), native(gpt()))
    with pytest.raises(ConfigError, match="layers whose outputs can be read here: 0 to 1"):
        Eagle3Drafter(eagle3_head(tiny_gpt(0, layers=6)), native(gpt()))


def test_layers_that_a_checkpoint_does_not_name_are_the_usual_ones() -> None:
    assert usual_layers(32) == (1, 15, 28)
    target = tiny_gpt(0, layers=8)
    head = eagle3_head(target, layers=(1, 3, 4))
    lm = native(target)
    told = Engine(lm, Eagle3Drafter(head, lm)).generate(PROMPTS, max_new_tokens=30).stats
    head.layers = ()
    guessed = Engine(lm, Eagle3Drafter(head, lm)).generate(PROMPTS, max_new_tokens=30).stats
    assert lm.tapped == (1, 3, 4) and told.num_accepted_tokens == guessed.num_accepted_tokens > 0


def test_past_its_own_context_a_head_guesses_nothing() -> None:
    head = trained_head(gpt(), written(), 1, steps=STEPS)
    head.config.decoder.max_position_embeddings = 20
    lm = native(gpt())
    drafter = Recording(head, lm)
    given = {"max_new_tokens": 60, "temperature": 1.0, "seed": 0, "rule": "coupled"}
    output = Engine(lm, drafter).generate(PROMPTS[:2], num_draft_tokens=4, **given)
    assert output.token_ids == Engine(native(gpt())).generate(PROMPTS[:2], **given).token_ids
    assert 15 < max(len(text) - count for text, count, _ in drafter.records) <= 20
