"""Laws: the filters are Hugging Face's in their order, rows do not mix, and bad settings are refused with a reason."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import LogitsProcessorList

from specdec import sampling
from specdec.draft import Draft
from specdec.errors import ConfigError
from specdec.sampling import (
    LEAST_TEMPERATURE,
    SamplingParams,
    filters,
    is_law,
    laws,
    prefix_processors,
    same_filters,
    warpers,
)
from specdec.sequences import Request, Row, Sequences


def law(logits: Tensor, params: SamplingParams) -> Tensor:
    return sampling.law(logits, filters(params))


VOCAB, EOS, PROMPT = 37, 5, [3, 9, 9, 20]
CPU = torch.device("cpu")
VALUES: dict[str, list[Any]] = {
    "temperature": [0.0, 0.7, 1.0, 1.8],
    "top_k": [0, 1, 6],
    "top_p": [1.0, 0.75],
    "min_p": [0.0, 0.15],
    "repetition_penalty": [1.0, 1.4],
    "min_new_tokens": [0, 2],
}
COMBINATIONS = [SamplingParams(*values) for values in itertools.product(*VALUES.values())]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def hf_settings(params: SamplingParams) -> dict[str, Any]:
    """The arguments of Hugging Face's ``generate`` that mean the same; greedy is ``do_sample=False`` there."""
    prefix = {"repetition_penalty": params.repetition_penalty, "min_new_tokens": params.min_new_tokens}
    if params.greedy:
        return {"do_sample": False, **prefix}
    drawing = {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return {"do_sample": True, **drawing, **prefix}


def hf_processors(model: LlamaForCausalLM, params: SamplingParams, prompt_length: int) -> LogitsProcessorList:
    """What ``generate`` itself builds."""
    config = GenerationConfig(eos_token_id=EOS, pad_token_id=0, bos_token_id=1, **hf_settings(params))
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=CPU)
    return model._get_logits_processor(config, input_ids_seq_length=prompt_length, device="cpu")


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def chain(drafted: Tensor) -> Draft:
    """All of ``drafted`` [B, K], proposed with certainty."""
    return Draft(drafted, torch.full((len(drafted),), drafted.shape[1]))


def laws_of(batch: Sequences, logits: Tensor, draft: Draft) -> Tensor:
    """Every row's laws [B, K+1, V]."""
    return laws(batch.process(logits, draft), batch.filters)


def batch_of(params: Sequence[SamplingParams], texts: Sequence[Sequence[int]], new: int = 0) -> Sequences:
    """Live rows whose last ``new`` tokens were generated."""
    batch = Sequences(vocab_size=VOCAB, context=64, device=CPU, coupled=False, logprobs=False)
    for index, (settings, text) in enumerate(zip(params, texts, strict=True)):
        prompt = tuple(text[: len(text) - new])
        row = Row(Request(prompt, 64, settings, eos_ids=frozenset([EOS])), index, None, CPU)
        row.tokens.extend(text[len(prompt) :])
        batch.rows.append(row)
    batch.begin_step()
    return batch


def test_filters_run_in_hugging_faces_order(llama: LlamaForCausalLM) -> None:
    """The same classes, in the order in which ``generate`` puts them, for every combination of settings."""
    for params in COMBINATIONS:
        ours = [*prefix_processors(params, len(PROMPT), [EOS], CPU), *warpers(params)]
        theirs = [p for p in hf_processors(llama, params, len(PROMPT)) if getattr(p, "min_p", 1) != 0]
        assert [type(p) for p in ours] == [type(p) for p in theirs], params


def test_laws_are_hugging_faces_for_every_combination_of_filters(llama: LlamaForCausalLM) -> None:
    """Bit for bit, before and after min_new_tokens; greedy is the largest of the processed logits."""
    # CASES 5, 6, 8, 11, 15, 53
    scores = random_logits(6, VOCAB)
    for params, length in itertools.product(COMBINATIONS, (len(PROMPT), len(PROMPT) + 2)):
        texts = torch.randint(VOCAB, (6, length), generator=torch.Generator().manual_seed(length))
        processed = hf_processors(llama, params, len(PROMPT))(texts, scores.clone())
        ours = law(prefix_processors(params, len(PROMPT), [EOS], CPU)(texts, scores.clone()), params)
        if params.greedy:
            assert torch.equal(ours, torch.nn.functional.one_hot(processed.argmax(-1), VOCAB).float()), params
        else:
            assert torch.equal(ours, processed.softmax(-1)), params


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(0.0, repetition_penalty=1.3, min_new_tokens=6),
        SamplingParams(1.0),
        SamplingParams(0.8, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, min_new_tokens=6),
        SamplingParams(1.5, top_p=0.7, repetition_penalty=0.8),
    ],
    ids=str,
)
def test_a_verified_block_has_the_laws_of_generate_token_by_token(
    llama: LlamaForCausalLM, params: SamplingParams
) -> None:
    """``generate`` writes ten tokens; verifying them as one drafted block, from any point on, must give its laws.

    So processors see the text and exactly the drafted tokens before a position: none early, none twice, not the last
    one only.
    """
    # CASES 53, 54, 55
    torch.manual_seed(1)
    settings = {"min_new_tokens": 0, **hf_settings(params)}
    done = llama.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=10,
        return_dict_in_generate=True,
        output_logits=True,
        output_scores=True,
        **settings,
    )
    text = done.sequences[0].tolist()
    logits, scores = torch.stack(done.logits, dim=1), torch.stack(done.scores, dim=1)
    expected = (
        scores.softmax(-1) if not params.greedy else torch.nn.functional.one_hot(scores.argmax(-1), VOCAB).float()
    )
    for new in range(len(text) - len(PROMPT)):
        batch = batch_of([params], [text[: len(PROMPT) + new]], new)
        drafted = torch.tensor([text[len(PROMPT) + new : -1]], dtype=torch.long)
        found = laws_of(batch, logits[:, new:], chain(drafted))
        assert torch.equal(found, expected[:, new:])
        for at in range(drafted.shape[1]):  # as a drafter asks, one position at a time
            one = batch.draft_laws(logits[:, new + at, None], drafted[:, :at])
            assert torch.equal(one[:, 0], expected[:, new + at])


def test_the_penalty_counts_prompt_and_drafted_tokens_once_each() -> None:
    """At penalty 2 a token seen any number of times has its logit halved (or doubled below 0), others are untouched."""
    # CASES 54, 55, 56
    batch = batch_of([SamplingParams(1.0, repetition_penalty=2.0)], [[1, 2, 2]], new=1)
    logits = torch.full((1, 3, VOCAB), 3.0)
    logits[..., 4] = -3.0
    found = laws_of(batch, logits, chain(torch.tensor([[4, 2]])))
    for t, seen in enumerate([[1, 2], [1, 2, 4], [1, 2, 4]]):
        expected = logits[0, t].clone()
        expected[seen] = torch.tensor([1.5, 1.5, -6.0])[: len(seen)]
        assert torch.equal(found[0, t], expected.softmax(-1))
    assert batch.rows[0].tokens == [1, 2, 2]
    assert bool((logits[..., 0] == 3.0).all())  # and again gives the same: nothing was recorded
    assert torch.equal(laws_of(batch, logits, chain(torch.tensor([[4, 2]]))), found)


def test_min_new_tokens_counts_tokens_and_not_steps() -> None:
    # CASES 54
    batch = batch_of([SamplingParams(1.0, min_new_tokens=3)], [[1, 2, 7]], new=1)
    found = laws_of(batch, random_logits(1, 4, VOCAB), chain(torch.tensor([[3, 4, 6]])))
    assert (found[0, :, EOS] > 0).tolist() == [False, False, True, True]


def test_rows_with_different_settings_keep_to_themselves() -> None:
    """A batch of every combination gives each row what it gets alone, and leaves the logits as they were."""
    # CASES 6, 7, 13
    generator = torch.Generator().manual_seed(2)
    texts = torch.randint(VOCAB, (len(COMBINATIONS), 6), generator=generator).tolist()
    drafted = torch.randint(VOCAB, (len(COMBINATIONS), 2), generator=generator)
    logits = random_logits(len(COMBINATIONS), 3, VOCAB, seed=3)
    before = logits.clone()
    together = laws_of(batch_of(COMBINATIONS, texts, new=1), logits, chain(drafted))
    assert torch.equal(logits, before)
    for b, params in enumerate(COMBINATIONS):
        alone = laws_of(batch_of([params], [texts[b]], new=1), logits[b : b + 1], chain(drafted[b : b + 1]))
        assert torch.equal(together[b], alone[0]), params


@pytest.mark.parametrize("damage", [math.nan, math.inf, "all -inf"])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(1.0), SamplingParams(0.7, 3, 0.9, 0.1)], ids=str)
def test_where_no_token_can_be_drawn_there_is_no_law(params: SamplingParams, damage: float | str) -> None:
    # CASES 63, 64, 66
    logits = random_logits(2, 3, VOCAB)
    logits[0, 1] = -math.inf
    logits[0, 1, 0] = -math.inf if isinstance(damage, str) else damage
    logits[1, 0, : VOCAB - 1] = -math.inf  # one token is enough
    found = law(logits, params)
    assert is_law(found).tolist() == [[True, False, True], [True, True, True]]
    assert torch.allclose(found[is_law(found)].sum(-1), torch.ones(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_laws_are_float32_whatever_the_logits_are(dtype: torch.dtype) -> None:
    logits = random_logits(3, 2, VOCAB).to(dtype)
    params = [SamplingParams(), SamplingParams(0.8, top_p=0.9), SamplingParams(1.0, repetition_penalty=1.2)]
    for settings in (params, params[:1] * 3, params[1:2] * 3):
        found = laws(logits, same_filters([filters(params) for params in settings]))
        assert found.dtype == torch.float32
        assert torch.allclose(found.sum(-1), torch.ones(3, 2), atol=1e-6)
    assert torch.equal(law(logits, params[1]), law(logits.float(), params[1]))


@pytest.mark.parametrize("temperature", [1e-6, 1e-20, LEAST_TEMPERATURE])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_a_tiny_temperature_is_the_largest_logit_and_finite(temperature: float, scale: float) -> None:
    # CASES 14
    logits = random_logits(50, VOCAB, scale=scale)
    logits[:, 3] = -math.inf
    gap = logits.topk(2).values.diff(dim=-1).abs()
    logits.scatter_add_(1, logits.argmax(-1, keepdim=True), (gap < 1e-3).float())
    assert torch.equal(law(logits, SamplingParams(temperature)), law(logits, SamplingParams(0.0)))


def test_a_huge_temperature_is_uniform() -> None:
    found = law(random_logits(4, VOCAB), SamplingParams(1e38))
    assert torch.allclose(found, torch.full_like(found, 1 / VOCAB))


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0, [7, 20]], logits[1, [36, 0]] = 1.0, 1.0
    assert law(logits, SamplingParams()).argmax(-1).tolist() == [7, 0]


def test_filters_keep_ties_as_hugging_face_does(llama: LlamaForCausalLM) -> None:
    """top-k keeps every token tied with the k-th; top-p cuts inside a tie by Hugging Face's own sort."""
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 11, 30]] = 4.0
    assert law(logits, SamplingParams(1.0, top_k=1)).nonzero()[:, 1].tolist() == [2, 11, 30]
    for params in COMBINATIONS:
        processed = hf_processors(llama, params, 4)(torch.tensor([[2, 2, 11, 1]]), logits.clone())
        ours = law(prefix_processors(params, 4, [EOS], CPU)(torch.tensor([[2, 2, 11, 1]]), logits.clone()), params)
        same = processed.softmax(-1) if not params.greedy else law(processed, SamplingParams())
        assert torch.equal(ours, same)


def test_top_k_comes_before_top_p_on_renormalised_mass() -> None:
    """0.5 + 0.2 of the top two is 0.71 + 0.29 after renormalising, so top_p = 0.7 then needs the first alone.

    The joint reading (both masks from the same law) would keep the second token.
    """
    # CASES 15
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.15]]).log()
    assert law(logits, SamplingParams(1.0, top_k=2, top_p=0.7))[0].tolist() == pytest.approx([1, 0, 0, 0])
    assert law(logits, SamplingParams(1.0, top_p=0.7))[0, 1] > 0.2


def test_the_narrowest_filters_leave_one_token() -> None:
    # CASES 16
    logits = random_logits(20, VOCAB)
    for params in [
        SamplingParams(0.01, top_k=1, top_p=0.8),
        SamplingParams(1.0, top_k=1, top_p=1e-6, min_p=1.0),
        SamplingParams(1.0, top_p=1e-30),
        SamplingParams(1.0, min_p=1.0),
    ]:
        assert torch.equal(law(logits, params), law(logits, SamplingParams())), params


def test_top_k_beyond_the_vocabulary_keeps_everything() -> None:
    logits = random_logits(2, VOCAB)
    assert torch.equal(law(logits, SamplingParams(1.0, top_k=10 * VOCAB)), logits.softmax(-1))


BAD = {
    "temperature": [-0.1, 1e-38, 5e-324, math.nan, math.inf, "hot", None],
    "top_k": [-1, 2.5, True, None],
    "top_p": [0.0, -0.5, 1.0001, math.nan, None],
    "min_p": [-0.01, 1.5, math.nan, "x"],
    "repetition_penalty": [0.0, -1.0, math.inf, math.nan, None],
    "min_new_tokens": [-1, 1.5, None],
}
ALLOWED = {
    "temperature": f"0 (greedy) or a finite number >= {LEAST_TEMPERATURE}",
    "top_k": ">= 0",
    "top_p": "(0, 1]",
    "min_p": "[0, 1]",
    "repetition_penalty": "> 0",
    "min_new_tokens": ">= 0",
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_setting_is_refused_with_its_value_and_what_is_allowed(name: str, value: object) -> None:
    """Also a temperature by which logits would overflow float32: its law would be NaN."""  # CASES 14, 53
    with pytest.raises(ConfigError) as caught:
        SamplingParams(**{name: value})  # type: ignore[arg-type]
    message = str(caught.value)
    assert name in message and repr(value) in message and ALLOWED[name] in message
