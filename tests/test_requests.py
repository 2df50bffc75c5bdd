"""Every bad input gets its own error, which says what was given and what is allowed, before any model runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import specdec
from specdec import ConfigError, Engine, PromptError, SpecDecError
from specdec.drafters.model import ModelDrafter
from specdec.requests import Settings, token_lists
from toys import TableLM, random_table

VOCAB, CONTEXT = 11, 16
GOOD = [[1, 2], [3], [4, 5, 6]]


class Counting(TableLM):
    """Counts its forward passes."""

    passes = 0

    def _forward(self, tokens: Tensor, lengths: list[int], first: int, *, needs_logits: bool) -> Tensor:
        self.passes += 1
        return super()._forward(tokens, lengths, first, needs_logits=needs_logits)


@pytest.fixture
def engine() -> Engine:
    table = random_table(VOCAB, seed=0)
    return Engine(Counting(table, CONTEXT), ModelDrafter(Counting(table, CONTEXT)))


def refuse(engine: Engine, kind: type[SpecDecError], parts: list[str], prompts: Any, **settings: Any) -> None:
    """The call raises exactly ``kind``, its message has all ``parts``, and neither model has run."""
    for call in (engine.generate, engine.stream):
        with pytest.raises(SpecDecError) as caught:
            call(prompts, **settings)
        assert type(caught.value) is kind and isinstance(caught.value, ValueError)
        for part in parts:
            assert part in str(caught.value), f"{part!r} is not in: {caught.value}"
    assert isinstance(engine.drafter, ModelDrafter)
    assert engine.target.passes == engine.drafter.lm.passes == 0  # type: ignore[attr-defined]
    engine.generate([[1]], max_new_tokens=2)  # and the engine still works
    assert engine.target.passes > 0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompts", "parts"),
    [
        ([], ["no prompts", "at least one"]),
        (torch.zeros(0, 4, dtype=torch.long), ["no prompts", "at least one"]),
        ([[]], ["prompt 0 is empty", "at least one token"]),
        ([[1], [], [2]], ["prompt 1 is empty"]),
        (torch.zeros(2, 0, dtype=torch.long), ["prompt 0 is empty"]),
        ([[1, 11]], ["prompt 0", "token id 11", "0 to 10"]),
        ([[1], [-1]], ["prompt 1", "token id -1", "0 to 10"]),
        ([[1], [2**40]], ["prompt 1", str(2**40), "0 to 10"]),
        ([[1] * 16], ["prompt 0 has 16 tokens", "reads 16", "slide"]),
        ([[1], [1] * 99], ["prompt 1 has 99 tokens", "reads 16"]),
        (None, ["prompts must be", "NoneType"]),
        (7, ["prompts must be", "int"]),
        ({1, 2}, ["prompts must be", "set"]),
        ([1, None], ["token ids"]),
        ([[1, 2.5]], ["integer token ids", "2.5"]),
        ([[1, None]], ["integer token ids", "None"]),
        ([[True, False]], ["integer token ids", "True"]),
        ([[[1, 2]]], ["integer token ids"]),
        (torch.ones(2, 3), ["integers", "float32", "[2, 3]"]),
        (torch.ones(2, 3, dtype=torch.bool), ["integers", "bool"]),
        (torch.ones(2, 3, 4, dtype=torch.long), ["[rows, tokens]", "[2, 3, 4]"]),
        ({"attention_mask": torch.ones(1, 2)}, ["input_ids"]),
    ],
)
def test_a_bad_prompt_is_refused(engine: Engine, prompts: Any, parts: list[str]) -> None:
    refuse(engine, PromptError, parts, prompts)


@pytest.mark.parametrize(
    ("mask", "parts"),
    [
        (torch.ones(2, 4), ["attention_mask", "[2, 4]", "[2, 3]"]),
        (torch.ones(3, 2), ["attention_mask", "[3, 2]", "[2, 3]"]),
        (torch.ones(6), ["attention_mask", "[2, 3]"]),
        (torch.tensor(1), ["attention_mask", "[2, 3]"]),
        ([[1, 1, 1]] * 2, ["attention_mask", "tensor", "list"]),
    ],
)
def test_a_mask_of_another_shape_is_refused(engine: Engine, mask: Any, parts: list[str]) -> None:
    refuse(engine, PromptError, parts, torch.ones(2, 3, dtype=torch.long), attention_mask=mask)


def test_a_mask_goes_with_a_tensor_only(engine: Engine) -> None:
    refuse(engine, ConfigError, ["attention_mask", "tensor"], [[1, 2]], attention_mask=torch.ones(1, 2))


def test_a_mask_beside_a_mapping_is_used_and_two_are_refused(engine: Engine) -> None:
    tokens, mask = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 1]])
    refuse(
        engine, ConfigError, ["attention_mask was given twice"], {"input_ids": tokens, "attention_mask": mask},
        attention_mask=mask,
    )  # fmt: skip
    assert token_lists({"input_ids": tokens}, mask, None) == [[1, 2]]


@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("max_new_tokens", 0, [">= 1", "got 0"]),
        ("max_new_tokens", -3, [">= 1", "got -3"]),
        ("max_new_tokens", 2.0, ["integer", "got 2.0"]),
        ("max_new_tokens", True, ["integer", "got True"]),
        ("max_new_tokens", None, ["integer", "got None"]),
        ("max_new_tokens", [1, 2], ["one per prompt (3)", "got 2"]),
        ("max_new_tokens", [1, 2, 0], [">= 1", "got 0"]),
        ("temperature", -0.1, ["0 (greedy)", "got -0.1"]),
        ("temperature", float("inf"), ["finite", "got inf"]),
        ("temperature", float("nan"), ["finite", "got nan"]),
        ("temperature", "hot", ["number", "got 'hot'"]),
        ("temperature", None, ["number", "got None"]),
        ("temperature", [0.5, 1.0], ["one per prompt (3)", "got 2"]),
        ("top_p", 0, ["(0, 1]", "got 0"]),
        ("top_p", 1.5, ["(0, 1]", "got 1.5"]),
        ("top_p", -0.5, ["(0, 1]", "got -0.5"]),
        ("top_p", float("nan"), ["(0, 1]", "got nan"]),
        ("top_p", "most", ["(0, 1]", "got 'most'"]),
        ("top_p", [0.5] * 4, ["one per prompt (3)", "got 4"]),
        ("top_k", -1, [">= 0", "got -1"]),
        ("top_k", 1.5, ["integer", "got 1.5"]),
        ("top_k", "5", ["integer", "got '5'"]),
        ("min_p", 1.1, ["[0, 1]", "got 1.1"]),
        ("min_p", -0.1, ["[0, 1]", "got -0.1"]),
        ("repetition_penalty", 0, ["> 0", "got 0"]),
        ("repetition_penalty", float("inf"), ["finite", "got inf"]),
        ("min_new_tokens", -1, [">= 0", "got -1"]),
        ("min_new_tokens", 0.5, ["integer", "got 0.5"]),
        ("num_draft_tokens", -1, ["got -1"]),
        ("num_draft_tokens", 2.5, ["integer", "got 2.5"]),
        ("num_draft_tokens", None, ["integer", "got None"]),
        ("num_draft_tokens", 10**6, ["integer", f"got {10**6}"]),
        ("max_batch_size", 0, [">= 1", "got 0"]),
        ("n", 0, [">= 1", "got 0"]),
        ("n", [1, 2, 3], ["integer", "got [1, 2, 3]"]),
        ("seed", -1, ["0 to 2**60 - 1", "got -1"]),
        ("seed", 2**60, ["0 to 2**60 - 1"]),
        ("seed", "lucky", ["integer", "got 'lucky'"]),
        ("seed", 1.5, ["integer", "got 1.5"]),
        ("seed", [1, 2], ["one per prompt (3)", "got 2"]),
        ("rule", "lossy", ["'block'", "'rejection'", "'coupled'", "got 'lossy'"]),
        ("rule", None, ["'block'", "got None"]),
        ("context", "wrap", ["'stop'", "'slide'", "got 'wrap'"]),
        ("on_error", "ignore", ["'raise'", "'return'", "got 'ignore'"]),
        ("eos_token_id", 11, ["0 to 10", "got 11"]),
        ("eos_token_id", [1, -1], ["0 to 10", "got [1, -1]"]),
        ("eos_token_id", "</s>", ["0 to 10", "got '</s>'"]),
        ("eos_token_id", 1.5, ["0 to 10", "got 1.5"]),
        ("stop", "", ["non-empty", "got ''"]),
        ("stop", ["a", ""], ["non-empty", "got ['a', '']"]),
        ("stop", ["a", 3], ["string", "got ['a', 3]"]),
        ("stop", 5, ["string", "got 5"]),
        ("stop", None, ["string", "got None"]),
        ("stop", "###", ["tokenizer"]),
        ("logprobs", "yes", ["True or False", "got 'yes'"]),
        ("logprobs", 5, ["True or False", "got 5"]),
    ],
)
def test_a_setting_out_of_range_is_refused(engine: Engine, setting: str, value: Any, parts: list[str]) -> None:
    refuse(engine, ConfigError, [*parts, setting], GOOD, **{setting: value})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("max_tokens", "max_new_tokens"), ("temprature", "temperature"), ("top-k", "top_k"), ("stops", "stop"),
     ("do_sample", "allowed"), ("num_beams", "allowed")],
)  # fmt: skip
def test_an_unknown_argument_is_refused_with_a_suggestion(engine: Engine, name: str, hint: str) -> None:
    # CASES 53: a setting that does nothing is an error, never silence
    refuse(engine, ConfigError, [f"unknown argument {name!r}", hint], GOOD, **{name: 1})


def test_text_without_a_tokenizer_is_refused(engine: Engine) -> None:
    for prompts in ("hello", ["hello", "you"], [[1], "hello"]):
        refuse(engine, ConfigError, ["tokenizer"], prompts)
        engine.target.passes = engine.drafter.lm.passes = 0  # type: ignore[attr-defined, union-attr]


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("prompt", "kind"), [([], PromptError), ([99], PromptError), ([1] * 16, PromptError), ([-1], PromptError)]
)
def test_one_bad_prompt_among_many_fails_alone(
    engine: Engine, prompt: list[int], kind: type[SpecDecError], index: int
) -> None:
    settings: dict[str, Any] = {"max_new_tokens": 6, "temperature": 1.0, "max_batch_size": 2}
    expected = engine.generate(GOOD, seed=[5, 6, 7], **settings)
    prompts = [*GOOD[:index], prompt, *GOOD[index:]]
    seeds = [5, 6, 7][:index] + [0] + [5, 6, 7][index:]
    output = engine.generate(prompts, seed=seeds, on_error="return", logprobs=True, n=1, **settings)
    assert type(output.errors.pop(index)) is kind and output.errors == [None] * 3
    assert output.logprobs is not None and output.logprobs[index] == []
    assert (output.token_ids.pop(index), output.finish_reasons.pop(index)) == ([], "error")
    assert output.token_ids == expected.token_ids and output.finish_reasons == expected.finish_reasons
    assert output.stats.num_requests == 3
    reasons = {p.index: p.finish_reason for p in engine.stream(prompts, seed=seeds, on_error="return", **settings)}
    assert reasons == {i: "error" if i == index else "length" for i in range(4)}
    with pytest.raises(kind):
        engine.generate(prompts, seed=seeds, **settings)


@pytest.mark.parametrize(
    ("setting", "good", "bad"),
    [("temperature", 1.0, -1.0), ("top_p", 0.9, 0.0), ("top_k", 3, -1), ("max_new_tokens", 4, 0), ("min_p", 0.1, 2.0)],
)
def test_one_bad_setting_among_many_fails_alone(engine: Engine, setting: str, good: float, bad: float) -> None:
    for index in range(3):
        values = [good] * 3
        values[index] = bad
        output = engine.generate(GOOD, **{setting: values}, n=2, seed=4, on_error="return")
        expected = engine.generate(GOOD, **{setting: good}, n=2, seed=4)
        for i in range(6):
            if i // 2 == index:
                assert isinstance(output.errors[i], ConfigError) and f"got {bad}" in str(output.errors[i])
            else:
                assert output.errors[i] is None and output.token_ids[i] == expected.token_ids[i]


def test_when_all_are_bad_no_model_runs(engine: Engine) -> None:
    output = engine.generate([[], [99]], on_error="return")
    assert output.finish_reasons == ["error"] * 2 and output.token_ids == [[], []]
    assert engine.target.passes == 0 and output.stats.num_target_passes == 0  # type: ignore[attr-defined]


def test_every_form_of_prompts_means_the_same(engine: Engine) -> None:
    np = pytest.importorskip("numpy")
    expected = engine.generate([[1, 2], [3, 4]], max_new_tokens=5).token_ids
    tokens = torch.tensor([[1, 2], [3, 4]])
    for prompts in (
        ((1, 2), (3, 4)), tokens, tokens.to(torch.int32), list(tokens), [np.array([1, 2]).tolist(), [np.int64(3), 4]],
        {"input_ids": tokens}, {"input_ids": tokens, "attention_mask": torch.ones(2, 2, dtype=torch.bool)},
    ):  # fmt: skip
        assert engine.generate(prompts, max_new_tokens=5).token_ids == expected
    for single in ([1, 2], tokens[0], (1, 2), range(1, 3)):
        assert engine.generate(single, max_new_tokens=5).token_ids == expected[:1]


def test_the_longest_prompt_that_fits_gets_one_token(engine: Engine) -> None:
    # CASES 52
    output = engine.generate([[1] * 15], max_new_tokens=50)
    assert len(output.token_ids[0]) == 1 and output.finish_reasons == ["length"]


def test_a_prompt_of_the_wrong_kind_fails_alone(engine: Engine) -> None:
    output = engine.generate([[1], [1.5], [2]], max_new_tokens=3, on_error="return")
    assert [type(error) for error in output.errors] == [type(None), PromptError, type(None)]
    assert output.token_ids[::2] == engine.generate([[1], [2]], max_new_tokens=3).token_ids


def test_no_two_outputs_of_a_call_share_a_seed(engine: Engine) -> None:
    # CASES 60
    for n in (1, 3):
        assert engine.generate(GOOD, n=n, seed=7, max_new_tokens=1).seeds == list(range(7, 7 + 3 * n))
        unseeded = engine.generate(GOOD, n=n, max_new_tokens=1).seeds
        assert len(set(unseeded)) == 3 * n


def test_settings_are_checked_when_made() -> None:
    assert Settings() == Settings.of({}) and Settings(stop="a").stop == ("a",)
    with pytest.raises(ConfigError, match="rule"):
        Settings(rule="fast")


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        ([np.array([1, 2, 3])], [[1, 2, 3]]),
        ([np.int64(1), np.int64(2)], [[1, 2]]),
        ({"input_ids": [[1, 2], [3]], "attention_mask": [[1, 1], [1]]}, [[1, 2], [3]]),
        ({"input_ids": [[0, 2], [3, 4]], "attention_mask": [[0, 1], [1, 1]]}, [[2], [3, 4]]),
        ({"input_ids": [1, 2, 3], "attention_mask": [0, 1, 1]}, [[2, 3]]),
    ],
)
def test_numbers_of_other_libraries_and_lists_of_tokenizers(prompts: Any, expected: list[list[int]]) -> None:
    assert token_lists(prompts, None, None) == expected


@pytest.mark.parametrize("prompts", [b"def", bytearray(b"def"), [b"def"]])
def test_bytes_are_no_token_ids(engine: Engine, prompts: Any) -> None:
    refuse(
        engine, PromptError, ["token ids", "b'def'" if isinstance(prompts, list) else type(prompts).__name__], prompts
    )


def test_numbers_to_be_added_to_scores_are_no_mask(engine: Engine) -> None:
    mask = torch.tensor([[0.0, 0.0, -1e9]])
    refuse(engine, PromptError, ["1 for tokens and 0 for padding"], torch.tensor([[1, 2, 3]]), attention_mask=mask)


def test_ends_of_text_may_be_an_array() -> None:
    table = random_table(VOCAB, seed=0)
    output = Engine(TableLM(table, CONTEXT)).generate([[1, 2]], max_new_tokens=6, eos_token_id=np.arange(VOCAB))
    assert output.finish_reasons == ["eos"]


@pytest.mark.parametrize(
    ("given", "said"),
    [({"temperature": -1}, "temperature"), ({"top_k": -1}, "top_k"), ({"max_new_tokens": 0}, "max_new_tokens"),
     ({"draft_tokenizers": None}, "draft_tokenizer"), ({"eos": 1}, "eos")],
)  # fmt: skip
def test_settings_are_checked_before_a_model_is_looked_for(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        specdec.generate("/nowhere", "def", **given)


def test_what_belongs_to_load_is_said(engine: Engine) -> None:
    refuse(engine, ConfigError, ["unknown argument 'draft'", "specdec.load"], GOOD, draft="suffix")
