"""T2: greedy text in float32 is Hugging Face's, row by row, over decoders, drafts, rules, batches and draft lengths."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

from specdec import Drafter, Engine
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.drafters.tree import TreeDrafter
from specdec.lm.base import CachedLM
from specdec.lm.hf import HFLM
from specdec.nn.gpt import state_to_hf
from specdec.verify import RULES
from toys import native, noisy, tiny_gpt

VOCAB, NEW = 61, 64
BATCHES, DRAFT_LENGTHS = (1, 2, 3, 7, 16), (0, 1, 2, 5, 8)
DRAFTS = ("self", "noisy", "unrelated", "lookup", "hybrid", "tree")
DECODERS = ("our GPT", "HF Llama", "HF GPT-2")


def make_prompts() -> list[list[int]]:
    """Ragged prompts of 1 to 20 tokens."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 21, (max(BATCHES),), generator=generator).tolist()
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = make_prompts()


@dataclass(frozen=True)
class Family:
    """A target, a disturbed copy of it, and Hugging Face's model of the same weights."""

    target: CachedLM
    same: CachedLM
    disturbed: CachedLM
    reference: PreTrainedModel

    def drafter(self, name: str) -> Drafter:
        models = {"self": self.same, "noisy": self.disturbed, "unrelated": native(tiny_gpt(9, layers=1))}
        if name == "tree":
            return TreeDrafter(self.disturbed)
        if name == "hybrid":
            return HybridDrafter(ModelDrafter(self.disturbed), SuffixDrafter())
        return ModelDrafter(models[name]) if name in models else SuffixDrafter()


@cache
def family(decoder: str) -> Family:
    gpt = tiny_gpt(0)
    if decoder == "HF GPT-2":
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        model: PreTrainedModel = GPT2LMHeadModel(config).eval()
    else:
        model = LlamaForCausalLM(gpt.config).eval()
        model.load_state_dict(state_to_hf(gpt))
    if decoder == "our GPT":
        return Family(native(gpt), native(gpt), native(noisy(gpt, 0.015)), model)
    return Family(HFLM(model), HFLM(model), HFLM(noisy(model, 0.015)), model)


@cache
def engine(decoder: str, draft: str) -> Engine:
    return Engine(family(decoder).target, family(decoder).drafter(draft))


@cache
def texts(decoder: str) -> list[list[int]]:
    """What Hugging Face's generate says to each prompt alone."""
    made = []
    for prompt in PROMPTS:
        tokens = torch.tensor([prompt])
        whole = family(decoder).reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        made.append(whole[0, len(prompt) :].tolist())
    assert all(len(text) == NEW for text in made) and len(set(map(tuple, made))) == len(made)
    return made


def check(decoder: str, draft: str, rule: str, batch: int, k: int) -> None:
    output = engine(decoder, draft).generate(PROMPTS[:batch], max_new_tokens=NEW, num_draft_tokens=k, rule=rule)
    assert output.token_ids == texts(decoder)[:batch], f"{decoder}, {draft}, {rule}, batch {batch}, k {k}"
    assert output.finish_reasons == ["length"] * batch


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_text_is_hugging_faces(decoder: str, draft: str, rule: str) -> None:
    # CASES 43, 44, 47: every batch size and draft length here, all their pairs over the combinations of a decoder,
    # everything with everything in the slow test.
    shift = DRAFTS.index(draft) * len(RULES) + list(RULES).index(rule)
    for i, batch in enumerate(BATCHES):
        check(decoder, draft, rule, batch, DRAFT_LENGTHS[(i + shift) % len(DRAFT_LENGTHS)])


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_greedy_text_is_hugging_faces_in_every_combination(decoder: str) -> None:
    for draft, rule, batch, k in itertools.product(DRAFTS, RULES, BATCHES, DRAFT_LENGTHS):
        check(decoder, draft, rule, batch, k)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_drafts_are_right_always_sometimes_and_never(decoder: str) -> None:
    rates = {}
    for draft in DRAFTS:
        stats = engine(decoder, draft).generate(PROMPTS, max_new_tokens=NEW, num_draft_tokens=3).stats
        assert stats.num_draft_tokens > 100
        rates[draft] = stats.acceptance_rate
    assert rates["self"] == 1 and 0.1 < rates["noisy"] < 0.9 and rates["unrelated"] < 0.1 and rates["lookup"] < 0.8
