"""The block drafter: the text keeps its law, and its passes are those of training, however rows come and go."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from block_toys import FeatureTable, block_head, disturbed, features_of
from specdec import Draft, Engine, Output, load
from specdec.drafters.block import BlockDrafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import ConfigError
from specdec.lm import blocks
from specdec.lm.base import CachedLM
from specdec.lm.blocks import TorchBlocks
from specdec.lm.cpu import Tokens
from specdec.lm.hf import HFLM
from specdec.lm.native import NativeLM
from specdec.nn.block import BlockHead
from specdec.nn.cpu import kernels
from specdec.nn.gpt import GPT, state_to_hf
from specdec.sequences import Sequences
from specdec.verify import RULES, leading
from test_law import ALPHA, ONE, TARGET, UNEQUAL, Kind, alarm
from toys import TableLM, native, random_table, tiny_gpt

SIZE, SAMPLES = 5, 4000
PROMPTS = [[1, 2, 3], [4], list(range(40)), [5, 6, 0], [7] * 9, [8, 9], [10], [2, 4, 6, 8]]
BUDGETS = [20, 9, 31, 14, 25, 3, 40, 1]


@cache
def gpt() -> GPT:
    return tiny_gpt(0, layers=3)


@cache
def trained() -> BlockHead:
    """A head that has learned a little of the target's own text."""
    torch.manual_seed(0)
    prompts = [[token] for token in range(61)]
    written = Engine(native(gpt())).generate(prompts, max_new_tokens=40, temperature=1.0, seed=1)
    tokens = torch.tensor(written.token_ids)
    head = block_head(gpt(), SIZE, num_hidden_layers=1, anchors=8)
    with torch.no_grad():
        for weight in head.parameters():
            weight.mul_(0.3 if weight.dim() > 1 else 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    features, logits = features_of(gpt(), head.layers, tokens)
    for step in range(60):
        some = torch.arange(step % 3, len(tokens), 3)
        optimizer.zero_grad()
        head.loss(tokens[some], features[some], logits[some])[0].backward()
        optimizer.step()
    return head


def hf() -> CachedLM:
    model = LlamaForCausalLM(gpt().config)
    model.load_state_dict(state_to_hf(gpt()), strict=False)
    return HFLM(model.eval())


TARGETS: dict[str, Callable[[], CachedLM]] = {
    "compiled or torch": lambda: native(gpt()),
    "torch": lambda: NativeLM(gpt()),
    "Hugging Face": hf,
}


class Recording(BlockDrafter):
    """Notes every block with the text it was made for, as far as the target has it in its window."""

    def __init__(self, head: BlockHead, target: CachedLM, **settings: Any) -> None:
        super().__init__(head, target, **settings)
        self.records: list[tuple[list[int], Tensor]] = []

    def _block(self, sequences: Sequences) -> Tensor:
        hidden = super()._block(sequences)
        for slot, row in enumerate(sequences.rows):
            self.records.append((row.tokens[self.target.starts[slot] :], hidden[slot].clone()))
        return hidden


# What the engine writes.


@pytest.mark.parametrize("target", ["compiled or torch", "Hugging Face"])
def test_greedy_text_is_the_targets_own(target: str) -> None:
    lm = TARGETS[target]()
    engine = Engine(lm, BlockDrafter(trained(), lm))
    plain = Engine(TARGETS[target]()).generate(PROMPTS, max_new_tokens=BUDGETS)
    for size, length in ((1, 4), (3, 1), (3, 9), (8, 4)):
        output = engine.generate(PROMPTS, max_new_tokens=BUDGETS, max_batch_size=size, num_draft_tokens=length)
        assert output.token_ids == plain.token_ids
        assert 0 < output.stats.num_accepted_tokens < output.stats.num_draft_tokens
    lookup = HybridDrafter(BlockDrafter(trained(), lm), SuffixDrafter())
    assert Engine(lm, lookup).generate(PROMPTS, max_new_tokens=BUDGETS).token_ids == plain.token_ids
    assert not any(lm.lengths)


def test_training_raises_the_mean_acceptance_length() -> None:
    lengths = []
    for head in (disturbed(block_head(gpt(), SIZE, num_hidden_layers=1)), trained()):
        lm = native(gpt())
        engine = Engine(lm, BlockDrafter(head, lm, least_survival=0))
        output = engine.generate(PROMPTS, max_new_tokens=60, temperature=1.0, seed=5)
        lengths.append(output.stats.mean_acceptance_length)
    assert lengths[0] < 1.3 and lengths[1] > 1.45


def test_samples_of_the_coupled_rule_are_plain_samples() -> None:
    given = {"max_new_tokens": BUDGETS, "temperature": [0.7, 1.0, 0.0, 1.3] * 2, "seed": 3, "rule": "coupled"}
    plain = Engine(native(gpt())).generate(PROMPTS, **given)
    for least_survival in (0.0, 0.3):
        lm = native(gpt())
        output = Engine(lm, BlockDrafter(trained(), lm, least_survival=least_survival)).generate(
            PROMPTS, max_batch_size=3, **given
        )
        assert output.token_ids == plain.token_ids and output.stats.num_accepted_tokens > 0


# Passes are those of training.


def engine_of(lm: CachedLM, **settings: Any) -> tuple[Engine, Recording]:
    drafter = Recording(trained(), lm, **settings)
    return Engine(lm, drafter), drafter


def furthest(records: list[tuple[list[int], Tensor]]) -> float:
    """The largest difference between a recorded block and that of one training pass over its text."""
    worst = 0.0
    head = trained()
    for text, hidden in records:
        tokens = torch.tensor([text])
        features, _ = features_of(gpt(), head.layers, tokens)
        features[:, -1] = 1e3  # of the last token nothing may be known
        expected, _ = head.hidden_at(torch.tensor([[len(text) - 1]]), tokens, features)
        worst = max(worst, float((expected[0] - hidden).detach().abs().max()))
    return worst


def run(engine: Engine, records: list[tuple[list[int], Tensor]]) -> list[tuple[list[int], Tensor]]:
    """Rows come, go, move into holes, share prompts and are drafted for at times only."""
    given = {"max_batch_size": 3, "temperature": 1.0, "seed": 2}
    engine.generate(PROMPTS, max_new_tokens=BUDGETS, num_draft_tokens=3, **given)
    engine.generate(PROMPTS[2:3], n=4, max_new_tokens=[12], num_draft_tokens=4, **given)
    return records


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_drafting_pass_is_a_training_pass(target: str) -> None:
    engine, drafter = engine_of(TARGETS[target]())
    records = run(engine, drafter.records)
    assert len(records) > 60 and len({len(text) for text, _ in records}) > 30
    assert furthest(records) < 1e-4


class Resting(Recording):
    """Drafts at every third step: features of several steps come at once."""

    turn = 0

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        self.turn += 1
        return super().propose(sequences, lengths if self.turn % 3 == 0 else [0] * len(lengths))


def test_windows_that_slide_and_pauses_leave_nothing_behind() -> None:
    lm = NativeLM(tiny_gpt(0, layers=3, context=24))
    for kind in (Recording, Resting):
        drafter = kind(trained(), lm)
        given = {"max_new_tokens": 60, "context": "slide"}
        output = Engine(lm, drafter).generate(PROMPTS[:4], max_batch_size=3, num_draft_tokens=4, **given)
        assert output.token_ids == Engine(lm).generate(PROMPTS[:4], **given).token_ids
        assert max(len(text) for text, _ in drafter.records) <= 24
        assert furthest(drafter.records) < 1e-4


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads run on torch, as on machines where nothing is compiled."""

    def refuse(head: BlockHead) -> None:
        raise LookupError

    monkeypatch.setattr(blocks, "CompiledBlocks", refuse)


def test_a_pass_on_torch_is_a_training_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler(monkeypatch)
    engine, drafter = engine_of(NativeLM(gpt()))
    assert isinstance(drafter.blocks, TorchBlocks)
    assert furthest(run(engine, drafter.records)) < 1e-4


def shifted_block(self: Any, cache: Any) -> None:
    right_pass(self, cache)
    self.positions = self.positions + 1


def causal_block(self: Any, cache: Any) -> None:
    right_pass(self, cache)
    self.bias = cache.bias


def blind_block(self: Any, cache: Any) -> None:
    right_pass(self, cache)
    self.bias = self.bias.clone()
    self.bias[..., 0] = -torch.inf


def late_features(self: BlockDrafter, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> None:
    right_read(self, sequences, taken, [begin + 1 for begin in begins], first)


def causal_tokens(*parts: Any) -> Tokens:
    tokens = Tokens(*parts)
    return tokens._replace(seen=None)


def shifted_tokens(*parts: Any) -> Tokens:
    tokens = Tokens(*parts)
    return tokens if tokens.seen is None else tokens._replace(positions=tokens.positions + 1)


def no_copy(self: BlockDrafter, source: int, target: int, length: int | None = None) -> None: ...


right_pass, right_read = blocks._BothWays.__init__, BlockDrafter._read
WRONG: dict[str, tuple[object, str, Callable[..., object]]] = {
    "positions on torch": (blocks._BothWays, "__init__", shifted_block),
    "mask of the block on torch": (blocks._BothWays, "__init__", causal_block),
    "mask of the context on torch": (blocks._BothWays, "__init__", blind_block),
    "places of the features on torch": (BlockDrafter, "_read", late_features),
    "rows that move on torch": (BlockDrafter, "copy", no_copy),
    "positions": (blocks, "Tokens", shifted_tokens),
    "mask of the block": (blocks, "Tokens", causal_tokens),
    "places of the features": (BlockDrafter, "_read", late_features),
    "rows that move": (BlockDrafter, "copy", no_copy),
}


@pytest.mark.parametrize("wrong", list(WRONG))
def test_the_test_notices_a_wrong_pass(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if wrong.endswith("on torch"):
        without_compiler(monkeypatch)
    elif kernels(torch.float32) is None:
        pytest.skip("nothing is compiled here")
    monkeypatch.setattr(*WRONG[wrong])
    engine, drafter = engine_of(NativeLM(gpt()))
    assert furthest(run(engine, drafter.records)) > 1e-2


class Counting(Recording):
    """Notes how many tokens' features are read."""

    def _read(self, sequences: Sequences, taken: list[Tensor], begins: list[int], first: int) -> None:
        self.read = [*getattr(self, "read", []), sum(map(len, taken))]
        super()._read(sequences, taken, begins, first)


def test_a_pass_reads_nothing_twice_and_does_not_depend_on_the_length_asked_for() -> None:
    found = []
    for length in (1, 5):
        lm = NativeLM(gpt())
        drafter = Counting(trained(), lm, least_survival=0)
        text = Engine(lm, drafter).generate([PROMPTS[2]], max_new_tokens=30, num_draft_tokens=length).token_ids
        assert sum(drafter.read) <= len(PROMPTS[2]) + 30 and sum(drafter.read[:2]) == len(PROMPTS[2]) - 1
        found.append((text, drafter.records[0][1]))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])


def test_what_a_target_remembers_of_a_prompt_it_reads_again_for_its_features() -> None:
    lm = native(gpt())
    prompt = (torch.arange(150) * 7 % 61).tolist()
    Engine(lm).generate([prompt], max_new_tokens=2)
    for _ in range(2):
        drafter = Counting(trained(), lm)
        Engine(lm, drafter).generate([prompt], max_new_tokens=4, num_draft_tokens=2)
        assert sum(drafter.read[:2]) == len(prompt) - 1 and furthest(drafter.records) < 1e-4


class Drafting(Recording):
    """Notes every draft with the rows' last tokens and what was asked for."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        self.drafts = [*getattr(self, "drafts", []), (sequences.last_tokens.clone(), lengths, draft)]
        return draft


@pytest.mark.parametrize("least_survival", [0.0, 0.2])
def test_a_draft_is_what_training_makes_likely_and_ends_where_its_confidence_does(least_survival: float) -> None:
    lm, head = native(gpt()), copy.deepcopy(trained())
    with torch.no_grad():
        head.markov_confidence.weight.mul_(20)  # the token before a guess matters for its confidence
    drafter = Drafting(head, lm, least_survival=least_survival)
    Engine(lm, drafter).generate(PROMPTS, max_new_tokens=12, temperature=1.0, seed=3, num_draft_tokens=SIZE)
    begin = cut = 0
    for last, lengths, draft in drafter.drafts:
        if max(lengths) == 0:
            continue
        hidden = torch.stack([found for _, found in drafter.records[begin : begin + len(last)]])
        begin += len(last)
        if draft.probs is None:
            assert not draft.lengths.any()
            continue
        before = torch.cat([last, draft.tokens], dim=1)[:, : draft.tokens.shape[1]]
        hidden = hidden[:, : draft.tokens.shape[1]]
        law = (gpt().lm_head(hidden) + head.markov_out(head.markov_in(before))).softmax(-1)
        torch.testing.assert_close(draft.probs, law.detach(), rtol=1e-4, atol=1e-6)
        confidence = head.confidence(hidden) + head.markov_confidence(head.markov_in(before))
        survival = confidence.sigmoid().squeeze(-1).cumprod(-1)
        expected = (survival >= least_survival).sum(-1).minimum(torch.tensor(lengths))
        assert torch.equal(draft.lengths, expected)
        cut += int((torch.tensor(lengths) - expected).sum())
    assert begin > 30 and (cut > 30) == (least_survival > 0)


# Laws.


def sample(
    drafter: type[BlockDrafter] | Callable[..., BlockDrafter], kinds: list[Kind], samples: int, **settings: Any
) -> Output:
    lm = FeatureTable(TARGET)
    least_survival = settings.pop("least_survival", 0.3)
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    columns = {name: [getattr(kind.params, name) for kind in kinds] for name in names}
    return Engine(lm, drafter(lm.head(4), lm, least_survival=least_survival)).generate(
        [kind.prompt for kind in kinds],
        n=samples,
        max_new_tokens=[kind.length for kind in kinds],
        **{"seed": 0, "max_batch_size": 2048, "num_draft_tokens": 4, **columns, **settings},
    )


@pytest.mark.parametrize("rule", list(RULES))
def test_samples_follow_the_targets_law(rule: str) -> None:
    """n = 4,000 texts of 5 tokens, drafts cut by the confidence; one false alarm in 200,000 runs of random seeds."""
    output = sample(BlockDrafter, ONE, SAMPLES, rule=rule)
    uncut = sample(BlockDrafter, ONE, 200, rule=rule, least_survival=0.0)
    assert 0.05 < output.stats.acceptance_rate < 0.95
    drafted = [o.stats.num_draft_tokens / o.stats.num_row_steps for o in (output, uncut)]
    assert 0.2 < drafted[0] < 0.9 * drafted[1]
    assert alarm(output, ONE, SAMPLES) > ALPHA


def test_unequal_rows_in_one_batch_follow_their_own_laws() -> None:
    """Prompts, filters and lengths differ, rows join and leave: one false alarm in 66,000 runs."""
    output = sample(BlockDrafter, UNEQUAL, 2500, rule="block", max_batch_size=1000)
    assert output.stats.num_accepted_tokens > 500
    assert alarm(output, UNEQUAL, 2500) > ALPHA


class CutsByWhatWasDrawn(BlockDrafter):
    """Ends the draft before the first token that its own law makes unlikely."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        if draft.probs is None:
            return draft
        own = draft.probs.gather(-1, draft.tokens.unsqueeze(-1)).squeeze(-1)
        return replace(draft, lengths=draft.lengths.minimum(leading(own > 0.3)))


class CutsOneTooLate(BlockDrafter):
    """Judges a token by the confidence of the one after it, which depends on the token itself."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        return replace(draft, lengths=(draft.lengths - 1).clamp(min=0))


class Misreports(BlockDrafter):
    """Reports another law than it draws from."""

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = super().propose(sequences, lengths)
        return draft if draft.probs is None else replace(draft, probs=draft.probs.roll(1, -1))


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        (CutsByWhatWasDrawn, "rejection"),
        (CutsByWhatWasDrawn, "block"),
        (CutsOneTooLate, "rejection"),
        (Misreports, "block"),
    ],
)
def test_the_test_notices_a_cut_that_knows_what_was_drawn(wrong: type[BlockDrafter], rule: str) -> None:
    output = sample(wrong, ONE, SAMPLES, rule=rule)
    assert output.stats.num_draft_tokens > 1000
    assert alarm(output, ONE, SAMPLES) < ALPHA


def test_no_cut_can_bias_the_coupled_rule() -> None:
    output = sample(CutsByWhatWasDrawn, ONE, 4000, rule="coupled", least_survival=0.0)
    assert alarm(output, ONE, 4000) > ALPHA


# Bad input.


def test_a_head_of_another_target_is_refused() -> None:
    head = block_head(gpt(), SIZE)
    with pytest.raises(ConfigError, match="feature_size 32, this one has 0"):
        BlockDrafter(head, TableLM(random_table(61, 0)))
    with pytest.raises(ConfigError, match="vocab_size 61, this one has 62"):
        BlockDrafter(head, native(tiny_gpt(0, vocab_size=62, layers=3)))
    with pytest.raises(ConfigError, match="least_survival must be in"):
        BlockDrafter(head, native(gpt()), least_survival=1.0)
    with pytest.raises(ConfigError, match="0 to 0"):
        BlockDrafter(head, native(tiny_gpt(0, layers=2)))


def test_the_given_head_is_left_alone(tmp_path: Path) -> None:
    head = block_head(gpt(), SIZE)
    before = {name: weight.clone() for name, weight in head.state_dict().items()}
    lm = native(gpt())
    Engine(lm, BlockDrafter(head, lm)).generate(PROMPTS[:2], max_new_tokens=5)
    assert head.training and all(weight.requires_grad for weight in head.parameters())
    assert head.state_dict().keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in head.state_dict().items())
    head.save(tmp_path)
    again = BlockDrafter(BlockHead.load(tmp_path), lm)
    first, second = (
        Engine(lm, drafter).generate(PROMPTS, max_new_tokens=9, temperature=1.0, seed=1, num_draft_tokens=3)
        for drafter in (BlockDrafter(head, lm), again)
    )
    assert first.token_ids == second.token_ids and first.from_draft == second.from_draft


def test_a_saved_head_is_loaded_by_its_folder(tmp_path: Path) -> None:
    trained().save(tmp_path)
    engine = load(gpt(), draft=tmp_path)
    assert isinstance(engine.drafter, BlockDrafter)
    output = engine.generate(PROMPTS, max_new_tokens=BUDGETS)
    assert output.token_ids == Engine(native(gpt())).generate(PROMPTS, max_new_tokens=BUDGETS).token_ids
    assert output.stats.num_accepted_tokens > 0
