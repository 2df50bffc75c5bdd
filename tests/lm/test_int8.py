"""Weights in a byte each: another model of half the size, near the first, whose own text drafts never change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from specdec import ConfigError, load
from specdec.checkpoints import load_lm, load_model
from specdec.drafters.model import ModelDrafter
from specdec.lm.cpu import CpuLM
from toys import tiny_gpt

PROMPTS = [[5, 9, 2, 40, 7, 7, 1], [11], [3, 3, 44, 20]]


def read(lm: CpuLM, text: list[int], width: int) -> torch.Tensor:
    """Logits [T, V] of a text, read ``width`` tokens at a time."""
    lm.reserve(1, len(text))
    found = []
    for begin in range(0, len(text), width):
        part = text[begin : begin + width]
        found.append(lm.append(torch.tensor([part]))[0])
        lm.keep([len(part)])
    lm.free(0)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_near_the_model_and_the_same_bits_however_tokens_are_read(dtype: torch.dtype) -> None:
    gpt = tiny_gpt(0, context=512)
    for weight in gpt.parameters():
        weight.data = weight.data.to(dtype)
    whole, rounded = CpuLM(gpt), CpuLM(gpt, in_bytes=True)
    text = torch.randint(61, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    alone = read(rounded, text, 1)
    for width in (4, 9, 30, 150):
        assert torch.equal(read(rounded, text, width), alone)
    expected = read(whole, text, 150)
    error = (alone - expected).norm() / expected.norm()
    assert 0.001 < error < 0.2  # steps of a 63rd of each row's largest weight, in a model with large ones


def test_a_checkpoint_in_bytes(tiny_pair: Path) -> None:
    names = str(tiny_pair / "target"), str(tiny_pair / "draft")
    plain = load(names[0], draft=None, dtype="int8")
    half = load(names[0], draft=None, dtype="bfloat16")
    assert plain.target.in_bytes and plain.target.weight_bytes * 2 == half.target.weight_bytes
    expected = plain.generate(PROMPTS, max_new_tokens=40, eos_token_id=None).token_ids
    for draft, draft_dtype in ((names[1], None), (names[1], "bfloat16"), ("self", None), ("suffix", None)):
        engine = load(names[0], draft=draft, dtype="int8", draft_dtype=draft_dtype)
        output = engine.generate(PROMPTS, max_new_tokens=40, eos_token_id=None, num_draft_tokens=3)
        assert output.token_ids == expected


def test_a_draft_in_bytes(tiny_pair: Path) -> None:
    names = str(tiny_pair / "target"), str(tiny_pair / "draft")
    engine = load(names[0], draft=names[1], dtype="float32", draft_dtype="int8")
    assert isinstance(engine.drafter, ModelDrafter)
    assert engine.drafter.lm.in_bytes and not engine.target.in_bytes
    expected = load(names[0], draft=None, dtype="float32").generate(PROMPTS, max_new_tokens=40).token_ids
    output = engine.generate(PROMPTS, max_new_tokens=40, num_draft_tokens=3)
    assert output.token_ids == expected and output.stats.num_accepted_tokens > 0


def test_models_given_as_objects_stay_as_they_are() -> None:
    assert not load(tiny_gpt(0), draft=None, dtype="int8").target.in_bytes


@pytest.mark.parametrize("missing", [True, False])
def test_other_models_need_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    model.save_pretrained(tmp_path)
    if missing:
        monkeypatch.setitem(sys.modules, "torchao.quantization", None)
        with pytest.raises(ConfigError, match=r"needs torchao: pip install 'specdec\[quantized\]'"):
            load_lm(tmp_path, dtype=torch.int8)
        return
    pytest.importorskip("torchao.quantization")
    assert load_lm(tmp_path, dtype=torch.int8).in_bytes


def test_int8_is_not_for_training(tiny_pair: Path) -> None:
    with pytest.raises(ConfigError, match="int8"):
        load_model(tiny_pair / "target", dtype="int8")
