"""Inside Hugging Face's ``generate``: the call's own processors, criteria, streamer and outputs, in a batch."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

import specdec
from specdec.checkpoints import load_lm
from specdec.drafters.model import ModelDrafter
from specdec.errors import CheckpointError, ConfigError, PromptError, VocabularyError

VOCAB, PAD, EOS, NEW = 50, 0, 3, 24
SHAPE = {"vocab_size": VOCAB, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 1, "initializer_range": 0.4}


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def draft(target: LlamaForCausalLM) -> LlamaForCausalLM:
    return disturbed(target)


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **shape, "max_position_embeddings": 128, **changes})).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SHAPE, n_embd=16, n_layer=2, n_head=2, n_positions=128)).eval()


def disturbed(model: Any) -> Any:
    """A draft that is right some of the time."""
    result = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    for weight in result.parameters():
        weight.data += 0.03 * torch.randn(weight.shape, generator=generator)
    return result


def batch(rows: int, side: str = "left") -> dict[str, Tensor]:
    """Prompts of unequal lengths, padded on one side."""
    generator = torch.Generator().manual_seed(rows)
    texts = [torch.randint(4, VOCAB, (3 + 5 * b % 11,), generator=generator) for b in range(rows)]
    width = max(map(len, texts))
    ids, mask = torch.full((rows, width), PAD), torch.zeros(rows, width, dtype=torch.long)
    for b, text in enumerate(texts):
        place = slice(width - len(text), width) if side == "left" else slice(0, len(text))
        ids[b, place], mask[b, place] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def both(model: PreTrainedModel, inputs: dict[str, Tensor], door: dict[str, Any], **settings: Any) -> tuple[Any, Any]:
    """The same call by transformers and through the door."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    theirs = model.generate(**inputs, **copy.deepcopy(settings))
    return theirs, model.generate(**inputs, **settings, custom_generate=specdec.plugin.generate, **door)


@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", ["assistant_model", "draft", "prompt_lookup_num_tokens", "both"])
def test_greedy_calls_return_what_transformers_returns(rows: int, kind: str, how: str) -> None:
    # CASES 20, 22, 43, 44, 46, 47
    model = llama() if kind == "llama" else gpt2()
    given = {"assistant_model": disturbed(model), "draft": disturbed(model), "prompt_lookup_num_tokens": 5}
    door = {name: given[name] for name in (("assistant_model", "prompt_lookup_num_tokens") if how == "both" else [how])}
    theirs, ours = both(model, batch(rows), door)
    assert torch.equal(ours, theirs)
    stats = specdec.plugin.generate.stats
    assert stats is not None and stats.num_draft_tokens > 0


def test_the_draft_is_used_and_right_only_sometimes(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    both(target, batch(8), {"assistant_model": draft}, eos_token_id=None)
    stats = specdec.plugin.generate.stats
    assert stats is not None and 0.1 < stats.acceptance_rate < 0.95
    both(target, batch(8), {"assistant_model": target}, eos_token_id=None)
    stats = specdec.plugin.generate.stats
    assert stats is not None and stats.acceptance_rate == 1


def test_right_padding_is_no_different(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    """New tokens come after the padding; they are those of each row alone."""
    inputs = batch(5, "right")
    ours = target.generate(
        **inputs, max_new_tokens=NEW, custom_generate=specdec.plugin.generate, assistant_model=draft, do_sample=False
    )
    width = inputs["input_ids"].shape[1]
    assert torch.equal(ours[:, :width], inputs["input_ids"])
    for b in range(5):
        alone = inputs["input_ids"][b][inputs["attention_mask"][b].bool()][None]
        theirs = target.generate(alone, max_new_tokens=NEW, do_sample=False)[0, alone.shape[1] :].tolist()
        assert ours[b, width:].tolist()[: len(theirs)] == theirs
        assert set(ours[b, width + len(theirs) :].tolist()) <= {PAD}


PROCESSED: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 1.3},
    "bias": {"sequence_bias": {(7,): 4.0, (5, 9): 9.0}},
    "no_repeat_ngram": {"no_repeat_ngram_size": 2},
    "bad words, least length": {"bad_words_ids": [[5], [7, 8]], "min_new_tokens": 6},
    "forced end": {"forced_eos_token_id": EOS},
    "length penalty": {"exponential_decay_length_penalty": (4, 1.2)},
    "constraint by row": {"prefix_allowed_tokens_fn": lambda row, text: [1 + row, 10 + row, 20 + len(text) % 9, EOS]},
    "suppressed": {"suppress_tokens": [9, 10, 11], "begin_suppress_tokens": [12]},
}


@pytest.mark.parametrize("name", PROCESSED)
def test_processors_see_what_they_would_have_seen(name: str, target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    # CASES 53, 54, 55
    for door in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        theirs, ours = both(target, batch(3), door, **PROCESSED[name])
        assert torch.equal(ours, theirs)


class Remembers(LogitsProcessor):
    """Forbids what it has allowed before, call by call; a refused draft that it remembers shows in the text."""

    def __init__(self) -> None:
        self.calls = 0
        self.seen: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        scores = scores.clone()
        scores[:, self.seen[-6:]] -= 5.0
        scores[:, self.calls % VOCAB] += 2.0
        self.seen.append(int(scores[0].argmax()))
        return scores


class Places(LogitsProcessor):
    """Knows the rows of its batch apart, and looks at the last two tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        for row in range(len(scores)):
            scores[row, 4 + row] += 3.0
            scores[row, (input_ids[row, -1] + input_ids[row, -2]) % VOCAB] += 2.0
        return scores


def test_a_processor_that_remembers_forgets_what_was_refused(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    # CASES 56
    for door in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        theirs, ours = both(target, batch(1), door, logits_processor=LogitsProcessorList([Remembers()]))
        assert torch.equal(ours, theirs)


def test_the_users_processor_is_left_as_it_was(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    processor = Remembers()
    target.generate(
        **batch(3),
        max_new_tokens=NEW,
        logits_processor=LogitsProcessorList([processor]),
        custom_generate=specdec.plugin.generate,
        assistant_model=draft,
    )
    assert processor.calls == 0 and processor.seen == []


def test_a_processor_that_knows_the_rows_apart(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    theirs, ours = both(target, batch(5), {"assistant_model": draft}, logits_processor=LogitsProcessorList([Places()]))
    assert torch.equal(ours, theirs)


class AfterSum(StoppingCriteria):
    """Ends a row when its latest three tokens add up to a multiple of ``number``; counts its calls."""

    def __init__(self, number: int) -> None:
        self.number, self.calls = number, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return input_ids[:, -3:].sum(-1) % self.number == 0


@pytest.mark.parametrize("number", [2, 5, 9])
def test_criteria_are_asked_inside_the_accepted_block(
    number: int, target: LlamaForCausalLM, draft: LlamaForCausalLM
) -> None:
    # CASES 24, 25
    for door in ({"assistant_model": draft}, {"assistant_model": target, "num_draft_tokens": 8}):
        theirs, ours = both(target, batch(4), door, stopping_criteria=StoppingCriteriaList([AfterSum(number)]))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("new_tokens", [1, 2, 3])
def test_no_token_too_many(new_tokens: int, target: LlamaForCausalLM) -> None:
    # CASES 22
    theirs, ours = both(target, batch(3), {"assistant_model": target}, max_new_tokens=new_tokens)
    assert torch.equal(ours, theirs)


def test_without_end_of_text(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    # CASES 23
    model = llama(eos_token_id=None)
    for door in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 4}):
        theirs, ours = both(model, batch(3), door)
        assert torch.equal(ours, theirs) and ours.shape[1] == batch(3)["input_ids"].shape[1] + NEW


class Listener:
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.given.append(value.tolist())

    def end(self) -> None:
        self.given.append("end")


@pytest.mark.parametrize("rows", [1, 4])
def test_a_streamer_is_given_what_it_would_have_been_given(
    rows: int, target: LlamaForCausalLM, draft: LlamaForCausalLM
) -> None:
    theirs, ours = Listener(), Listener()
    target.generate(**batch(rows), max_new_tokens=NEW, do_sample=False, streamer=theirs)
    target.generate(
        **batch(rows), max_new_tokens=NEW, do_sample=False, streamer=ours, custom_generate=specdec.plugin.generate,
        assistant_model=draft,
    )  # fmt: skip
    assert ours.given == theirs.given and ours.given[-1] == "end"


def test_the_dictionary_holds_scores_and_logits(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    theirs, ours = both(target, batch(4), {"assistant_model": draft}, **wanted, repetition_penalty=1.2)
    assert torch.equal(ours.sequences, theirs.sequences) and type(ours) is type(theirs)
    width = batch(4)["input_ids"].shape[1]
    for name in ("scores", "logits"):
        assert len(ours[name]) == len(theirs[name]) == ours.sequences.shape[1] - width
        for t, (one, other) in enumerate(zip(ours[name], theirs[name], strict=True)):
            live = (theirs.sequences[:, width : width + t] != EOS).all(-1)
            assert torch.allclose(one[live], other[live], atol=1e-4)


SAMPLING = {"do_sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.95, "min_p": 0.01, "eos_token_id": None}


def sample(model: PreTrainedModel, door: dict[str, Any], **settings: Any) -> Any:
    door = {"custom_generate": specdec.plugin.generate, "rule": "coupled", "seed": 7, **door}
    return model.generate(**batch(3), **{"max_new_tokens": NEW, **SAMPLING, **settings}, **door)


def test_coupled_sampling_equals_plain_sampling_of_the_seed(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    plain = sample(target, {"num_draft_tokens": 0}, num_return_sequences=2)
    assert plain.shape[0] == 6 and len({tuple(row) for row in plain.tolist()}) == 6
    for door in ({"draft": draft}, {"draft": target}, {"num_draft_tokens": 7}):
        assert torch.equal(sample(target, door, num_return_sequences=2), plain)
    assert not torch.equal(sample(target, {"seed": 8}, num_return_sequences=2), plain)


@pytest.mark.parametrize("rule", ["block", "rejection", "coupled"])
def test_sampled_scores_are_those_of_the_text(rule: str, target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    """Reading the text once more and processing its logits as transformers does gives the scores that were drawn from."""
    out = sample(
        target, {"draft": draft, "rule": rule}, return_dict_in_generate=True, output_scores=True, repetition_penalty=1.3
    )
    inputs, width = batch(3), batch(3)["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, NEW, dtype=torch.long)], dim=1)
    with torch.inference_mode():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = target(out.sequences, attention_mask=mask, position_ids=positions).logits
    captured: list[LogitsProcessorList] = []

    def look(model: Any, input_ids: Tensor, logits_processor: LogitsProcessorList, **rest: Any) -> Tensor:
        captured.append(logits_processor)
        return input_ids

    target.generate(**inputs, **SAMPLING, max_new_tokens=NEW, repetition_penalty=1.3, custom_generate=look)
    for t in range(NEW):
        expected = captured[0](out.sequences[:, : width + t], logits[:, width + t - 1])
        drawn = out.sequences[:, width + t, None]
        assert torch.allclose(out.scores[t].softmax(-1), expected.softmax(-1), atol=1e-4)
        assert bool((expected.gather(1, drawn) > -torch.inf).all())


@pytest.mark.chosen
@pytest.mark.parametrize("door", [{}, {"rule": "block", "num_draft_tokens": 4}])
def test_torchs_seed_repeats_a_call(target: LlamaForCausalLM, draft: LlamaForCausalLM, door: dict[str, Any]) -> None:
    """Whatever draft lengths are chosen on the way; another rule needs a length of its own."""
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(sample(target, {"seed": None, "draft": draft, **door}).tolist())
    assert found[0] == found[1] != found[2]


def test_a_call_changes_nothing_of_the_users(target: LlamaForCausalLM) -> None:
    # CASES 62
    assistant = disturbed(target)
    assistant.generation_config.num_assistant_tokens = 5
    config = copy.deepcopy(target.generation_config)
    config.update(max_new_tokens=NEW, do_sample=False)
    before = [part.to_dict() for part in (config, target.config, assistant.config, assistant.generation_config)]
    cache = DynamicCache(config=target.config)
    training = [module.training for module in assistant.modules()]
    target.generate(
        **batch(2), generation_config=config, past_key_values=cache, custom_generate=specdec.plugin.generate,
        assistant_model=assistant,
    )  # fmt: skip
    after = [part.to_dict() for part in (config, target.config, assistant.config, assistant.generation_config)]
    assert before == after and cache.get_seq_length() == 0
    assert training == [module.training for module in assistant.modules()]
    stats = specdec.plugin.generate.stats
    assert stats is not None and max(stats.num_draft_tokens_per_position) > 0
    assert len(stats.num_draft_tokens_per_position) == 5


def test_a_partial_call_may_carry_the_draft(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    door = functools.partial(specdec.plugin.generate, draft=draft, num_draft_tokens=3)
    ours = target.generate(**batch(3), max_new_tokens=NEW, custom_generate=door, do_sample=False)
    assert torch.equal(ours, target.generate(**batch(3), max_new_tokens=NEW, do_sample=False))


def test_a_draft_may_be_whatever_load_takes(target: LlamaForCausalLM, draft: LlamaForCausalLM, tmp_path: Path) -> None:
    draft.save_pretrained(tmp_path)
    lm = load_lm(disturbed(target))
    for given in (
        str(tmp_path),
        tmp_path,
        "suffix",
        lm,
        ModelDrafter(lm),
        [str(tmp_path), "suffix"],
        [draft, "suffix"],
    ):
        for lookup in ({}, {"prompt_lookup_num_tokens": 4}):
            theirs, ours = both(target, batch(3), {"draft": given, **lookup})
            assert torch.equal(ours, theirs)
            stats = specdec.plugin.generate.stats
            assert stats is not None and stats.num_draft_tokens > 0


def test_a_draft_that_is_none_is_refused(target: LlamaForCausalLM) -> None:
    for given, match in (
        (3, "draft must be a path, a hub id, a model, a Drafter, None or one of.*suffix.*got 3"),
        (ModelDrafter, "got the class ModelDrafter; pass an object of it"),
        (["suffix", "suffix"], "a list of drafters"),
        ("tuned", "tuned settings hold for the checkpoint"),
        (t5(), "draft is an encoder-decoder and the target is not"),
    ):
        with pytest.raises(ConfigError, match=match):
            target.generate(**batch(1), max_new_tokens=4, custom_generate=specdec.plugin.generate, draft=given)
    with pytest.raises(CheckpointError, match="nowhere"):
        target.generate(**batch(1), max_new_tokens=4, custom_generate=specdec.plugin.generate, draft="./nowhere")
    with pytest.raises(ConfigError, match="draft_tokenizer must be a transformers tokenizer.*got 3"):
        target.generate(
            **batch(1), max_new_tokens=4, custom_generate=specdec.plugin.generate, draft=target, draft_tokenizer=3
        )


def test_penalty_alpha_that_transformers_ignores_is_no_reason(target: LlamaForCausalLM) -> None:
    assert sample(target, {}, penalty_alpha=0.6).shape[0] == 3  # contrastive search is greedy


def test_what_cannot_be_honoured_is_refused(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> None:
    def refuse(kind: type[Exception], match: str, model: PreTrainedModel = target, **settings: Any) -> None:
        inputs = {**batch(2), **{name: settings.pop(name) for name in ("position_ids",) if name in settings}}
        with pytest.raises(kind, match=match):
            model.generate(**inputs, **{"max_new_tokens": 4, **settings}, custom_generate=specdec.plugin.generate)

    refuse(ConfigError, "num_beams", num_beams=2)
    refuse(ConfigError, r"penalty_alpha with top_k \(contrastive search\)", penalty_alpha=0.6, top_k=4)
    refuse(ConfigError, "dola_layers", dola_layers="low")
    refuse(ConfigError, "output_attentions", output_attentions=True, return_dict_in_generate=True)
    refuse(ConfigError, "output_hidden_states", output_hidden_states=True, return_dict_in_generate=True)
    refuse(
        ConfigError, "position_ids", position_ids=torch.arange(13).expand(2, -1)[:, : batch(2)["input_ids"].shape[1]]
    )
    refuse(PromptError, "reads 128", max_new_tokens=400)
    refuse(VocabularyError, "50 entries and the draft.s 49", draft=llama(vocab_size=49))
    cache = DynamicCache(config=target.config)
    cache.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8), 0)
    with pytest.raises(ConfigError, match="past_key_values"):
        specdec.plugin.generate(
            target, torch.tensor([[4], [5]]), LogitsProcessorList(), StoppingCriteriaList(), target.generation_config,
            past_key_values=cache,
        )  # fmt: skip


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    shape = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config = T5Config(**shape, vocab_size=VOCAB, decoder_start_token_id=PAD, pad_token_id=PAD, eos_token_id=EOS)
    model = T5ForConditionalGeneration(config).eval()
    for weight in model.parameters():
        weight.data *= 1.5
    return model


@pytest.mark.parametrize("settings", [{}, {"encoder_repetition_penalty": 1.4}, {"encoder_no_repeat_ngram_size": 2}])
def test_an_encoder_decoder_speculates(settings: dict[str, Any]) -> None:
    model = t5()
    for door in ({"assistant_model": disturbed(model)}, {"prompt_lookup_num_tokens": 4}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it runs row by row
            theirs, ours = both(model, batch(3, "right"), door, **settings)
        assert torch.equal(ours, theirs) and ours.shape[1] > 5


def test_a_draft_with_a_narrower_head(target: LlamaForCausalLM) -> None:
    """Both heads are padded beyond the tokenizer, by different amounts; ids that the draft lacks are harmless."""
    # CASES 71
    narrow = llama(vocab_size=48)
    drafter = ModelDrafter(load_lm(narrow))
    theirs, ours = both(target, batch(4), {"draft": drafter}, eos_token_id=None)
    assert torch.equal(ours, theirs) and int(ours.max()) >= 48


# On a trained pair, with its tokenizer.


@pytest.fixture(scope="module")
def trained(tiny_pair: Path) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    models = [
        AutoModelForCausalLM.from_pretrained(tiny_pair / part, dtype="float32").eval() for part in ("target", "draft")
    ]
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair / "target", padding_side="left")
    return models[0], models[1], tokenizer


PROMPTS = ["def main(", "import os\n\n\nclass", "    return self.", "for i in range("]


def test_stop_strings_with_an_assistant(trained: Any) -> None:
    # CASES 28: transformers raises here, because it loses the tokenizer
    target, draft, tokenizer = trained
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    width = inputs["input_ids"].shape[1]
    texts = tokenizer.batch_decode(target.generate(**inputs, max_new_tokens=40, do_sample=False)[:, width:])
    stops = [text[place : place + 3] for text, place in zip(texts, itertools.count(20, 5), strict=False)]
    for door in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 6}, {"draft": target}):
        settings = {"stop_strings": stops, "tokenizer": tokenizer, "max_new_tokens": 40}
        theirs = target.generate(**inputs, **settings, do_sample=False)
        ours = target.generate(**inputs, **settings, do_sample=False, custom_generate=specdec.plugin.generate, **door)
        assert torch.equal(ours, theirs)
        assert ours.shape[1] < width + 40


def test_a_drafts_path_brings_the_tokenizers(trained: Any, tmp_path: Path) -> None:
    """Heads of different widths are told apart by them."""
    target, draft, tokenizer = trained
    wider = copy.deepcopy(draft)
    wider.resize_token_embeddings(draft.config.vocab_size + 8)
    for part in (wider, tokenizer):
        part.save_pretrained(tmp_path)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    theirs, ours = both(target, inputs, {"draft": str(tmp_path)})
    assert torch.equal(ours, theirs)
    stats = specdec.plugin.generate.stats
    assert stats is not None and stats.num_accepted_tokens > 0


def test_a_pipeline_goes_through_the_door(trained: Any) -> None:
    target, draft, tokenizer = trained
    generator = pipeline("text-generation", model=target, tokenizer=tokenizer)
    settings = {"max_new_tokens": 20, "do_sample": False, "batch_size": 4}
    theirs = generator(PROMPTS, **settings)
    ours = generator(PROMPTS, **settings, custom_generate=specdec.plugin.generate, assistant_model=draft)
    assert ours == theirs
    stats = specdec.plugin.generate.stats
    assert stats is not None and stats.num_requests == 4 and stats.num_accepted_tokens > 0
