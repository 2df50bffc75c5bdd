"""The EAGLE-3 module: what a guess may look at, what its loss is, and that nothing of it is lost on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, Qwen3Config

from block_toys import features_of
from eagle3_toys import disturbed, eagle3_head
from specdec.errors import CheckpointError, ConfigError
from specdec.lm.cache import RaggedCache
from specdec.nn import eagle3
from specdec.nn.divergences import lk_hybrid
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.eagle3_config import Eagle3Config
from toys import noisy, tiny_gpt

TARGET = tiny_gpt(0, layers=4)
LENGTH, STEPS = 14, 3
TOKENS = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(3))
IDS = torch.arange(0, 61, 2)
VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": False, "draft_ids": IDS},
    {"norm_before_fc": True},
    {"fc_norm": True, "norm_output": True},
    {"width": 16, "draft_ids": IDS},
]


def step_by_step(head: Eagle3Head, tokens: Tensor, features: Tensor, start: int) -> list[Tensor]:
    """Hidden states [H] of the draft that begins at place ``start`` of one row, as a decoder with a cache makes them."""
    cache = RaggedCache(torch.float32, torch.device("cpu"))
    cache.begin([0], start + 1, 0)
    rope = head.rope(cache.positions)
    hidden = head(head.embed(tokens[None, 1 : start + 2]), head.fuse(features[None, : start + 1]), rope, cache)[:, -1:]
    states = [hidden[0, 0]]
    for step in range(1, head.config.steps):
        cache.begin([start + step], 1, 0)
        hidden = head(head.embed(tokens[None, start + 1 + step, None]), hidden, head.rope(cache.positions), cache)
        states.append(hidden[0, 0])
    return states


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_the_unrolled_pass_is_drafting_from_every_place(changes: dict[str, Any]) -> None:
    head = eagle3_head(TARGET, steps=STEPS, **changes)
    features, _ = features_of(TARGET, head.layers, TOKENS)
    states = head.unrolled(TOKENS, features)
    assert [state.shape for state in states] == [(2, LENGTH - STEPS, changes.get("width", 32))] * STEPS
    for row in range(2):
        for start in range(LENGTH - STEPS):
            expected = step_by_step(head, TOKENS[row], features[row], start)
            for state, hidden in zip(states, expected, strict=True):
                torch.testing.assert_close(state[row, start], hidden, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_guess_sees_no_features_after_its_draft_begins() -> None:
    head = eagle3_head(TARGET, steps=STEPS)
    features, _ = features_of(TARGET, head.layers, TOKENS)
    usual = head.unrolled(TOKENS, features)
    for place in range(LENGTH - STEPS):
        other = features.clone()
        other[:, place] += 1
        for before, after in zip(usual, head.unrolled(TOKENS, other), strict=True):
            seen = (before - after).abs().amax((0, 2)) > 1e-6
            assert torch.equal(seen, torch.arange(LENGTH - STEPS) >= place)


@torch.no_grad()
def test_what_comes_before_is_read_and_not_learned_from() -> None:
    head = eagle3_head(TARGET, steps=STEPS)
    features, logits = features_of(TARGET, head.layers, TOKENS)
    usual = float(head.loss(TOKENS, features, logits, 6)[0])
    for place in range(LENGTH - 1):  # whose logits say what follows token number ``place``
        other = logits.clone()
        other[:, place] = other[:, place].roll(1, -1)
        assert (float(head.loss(TOKENS, features, other, 6)[0]) != usual) == (place >= 6)
    other = features.clone()
    other[:, 0] += 1
    assert float(head.loss(TOKENS, other, logits, 6)[0]) != usual
    with pytest.raises(ConfigError, match="longer than 3 tokens, got 3"):
        head.loss(TOKENS, features, logits, LENGTH - STEPS)


@pytest.mark.parametrize("draft_ids", [None, IDS])
def test_the_loss_is_that_of_every_guess_by_itself(draft_ids: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    head = eagle3_head(TARGET, steps=STEPS, draft_ids=draft_ids)
    features, logits = features_of(TARGET, head.layers, TOKENS)
    ids = torch.arange(61) if draft_ids is None else draft_ids
    total, length = torch.zeros(()), 0.0
    with torch.no_grad():
        for row in range(2):
            for start in range(LENGTH - STEPS):
                survival = 1.0
                for step, hidden in enumerate(step_by_step(head, TOKENS[row], features[row], start)):
                    p = logits[row, start + step + 1].softmax(-1)
                    q = head.logits(hidden).softmax(-1)
                    assert float(q[ids].sum()) == pytest.approx(1.0)
                    total += 0.8**step * lk_hybrid(p[ids], q[ids])
                    survival *= float(torch.minimum(p, q).sum())
                    length += survival
    count = 2 * (LENGTH - STEPS)
    loss, figures = head.loss(TOKENS, features, logits)
    assert float(loss.detach()) == pytest.approx(float(total) / count / (1 + 0.8 + 0.64), rel=1e-4)
    assert figures["mean_acceptance_length"] == pytest.approx(1 + length / count, rel=1e-4)
    loss.backward()
    gradients = {name: weight.grad for name, weight in head.named_parameters()}
    head.zero_grad()
    monkeypatch.setattr(eagle3, "_LOGITS_AT_ONCE", 5 * 61)
    monkeypatch.setattr(eagle3, "_LOGITS_KEPT", 0)
    head.loss(TOKENS, features, logits)[0].backward()
    for name, weight in head.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name])
        assert weight.grad.abs().sum() > 0, name
    with pytest.raises(ConfigError, match="longer than 3 tokens, got 3"):
        head.loss(TOKENS[:, :STEPS], features[:, :STEPS], logits[:, :STEPS])


def test_a_new_head_begins_with_the_targets_output_matrix() -> None:
    head = Eagle3Head.for_target(TARGET, IDS)
    assert torch.equal(head.lm_head.weight, TARGET.lm_head.weight[IDS])
    assert head.layers == (1, 2) and not any("embed_tokens" in name for name, _ in head.named_parameters())
    assert len(Eagle3Head.for_target(tiny_gpt(0, layers=6)).layers) == 3


@pytest.mark.parametrize("draft_ids", [None, IDS])
def test_a_narrower_head_begins_with_what_matters_most_of_the_target(draft_ids: Tensor | None) -> None:
    head = Eagle3Head.for_target(TARGET, draft_ids, width=16)
    assert head.embed_tokens is not None and head.embed_tokens.weight.requires_grad
    layer = head.config.decoder
    assert (layer.hidden_size, layer.intermediate_size, layer.head_dim) == (16, 32, 8)
    assert (layer.num_attention_heads, layer.num_key_value_heads, head.config.target_hidden_size) == (2, 2, 32)
    weights = [(head.embed_tokens, TARGET.embed_tokens.weight), (head.lm_head, TARGET.lm_head.weight)]
    for (ours, whole), ids in zip(weights, (slice(None), slice(None) if draft_ids is None else draft_ids), strict=True):
        theirs = torch.linalg.svdvals(whole[ids])
        torch.testing.assert_close(torch.linalg.svdvals(ours.weight.detach()), theirs[:16], rtol=1e-3, atol=1e-3)
    assert Eagle3Config.for_target(LlamaConfig(num_key_value_heads=8), width=1280).decoder.num_key_value_heads == 2


@pytest.mark.parametrize("width", [7, -16, 48])
def test_a_width_that_cannot_be_is_refused(width: int) -> None:
    with pytest.raises(ConfigError, match=f"multiple of 16, up to the target's 32, or 0, got {width}"):
        Eagle3Head.for_target(TARGET, width=width)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(changes: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    head = eagle3_head(TARGET, steps=STEPS, **changes).to(dtype)
    head.save(tmp_path / "head")
    again = Eagle3Head.load(tmp_path / "head")
    assert again.config.described("") == head.config.described("") and again.layers == head.layers
    assert torch.equal(again.draft_ids, head.draft_ids)
    state, found = head.state_dict(), again.state_dict()
    assert state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in state)
    assert all(found[name].dtype == dtype for name in found)
    features, _ = features_of(TARGET, head.layers, TOKENS)
    again.share(TARGET.embed_tokens, TARGET.lm_head)
    with torch.no_grad():
        for one, other in zip(head.unrolled(TOKENS, features), again.unrolled(TOKENS, features), strict=True):
            assert torch.equal(head.logits(one), again.logits(other))


def test_files_are_those_of_the_speculators_library(tmp_path: Path) -> None:
    eagle3_head(TARGET, steps=STEPS, draft_ids=IDS, verifier="some/target", architectures=("LlamaForCausalLM",)).save(
        tmp_path
    )
    state = load_file(tmp_path / "model.safetensors")
    layer = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    layer += ["hidden_norm", "input_layernorm", "post_attention_layernorm"]
    names = {f"layers.0.{name}.weight" for name in layer} | {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    assert set(state) == names
    assert state["layers.0.self_attn.q_proj.weight"].shape == (32, 64)
    assert state["fc.weight"].shape == (32, 64) and state["lm_head.weight"].shape == (31, 32)
    assert torch.equal(state["d2t"] + torch.arange(31), IDS) and torch.equal(state["t2d"].nonzero().flatten(), IDS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["speculators_model_type"] == config["speculators_config"]["algorithm"] == "eagle3"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == STEPS
    verifier = {"name_or_path": "some/target", "architectures": ["LlamaForCausalLM"]}
    assert config["speculators_config"]["verifier"] == verifier
    assert config["eagle_aux_hidden_state_layer_ids"] == [2, 3]  # there, layers are numbered by what they read
    assert config["transformer_layer_config"]["vocab_size"] == 61 and config["draft_vocab_size"] == 31
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1 and config["norm_before_residual"] is True


def test_a_checkpoint_of_an_older_writer_with_an_embedding_of_its_own_is_read(tmp_path: Path) -> None:
    """Rotary settings as transformers 4 named them, Qwen3's norms of heads, and no word about layers."""
    decoder = Qwen3Config(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    head = disturbed(Eagle3Head(Eagle3Config(decoder, (1, 2, 3), 32, 61, has_embedding=True)))
    head.save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    layer = described["transformer_layer_config"]
    del layer["rope_parameters"], described["eagle_aux_hidden_state_layer_ids"]
    layer["rope_theta"], layer["rope_scaling"] = 500.0, None
    (tmp_path / "config.json").write_text(json.dumps(described))
    again = Eagle3Head.load(tmp_path)
    assert again.layers == () and again.embed_tokens is not None and not again.embed_tokens.weight.requires_grad
    features = torch.randn(2, LENGTH, 96, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for one, other in zip(head.unrolled(TOKENS, features), again.unrolled(TOKENS, features), strict=True):
            assert torch.equal(one, other)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Eagle3Head.load(tmp_path)
    noisy(eagle3_head(TARGET)).save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    layer = described["transformer_layer_config"]
    for wrong, said in (
        ({"speculators_model_type": "dflash"}, "is 'dflash', not 'eagle3'"),
        ({"draft_vocab_size": 62}, "from 1 to vocab_size 61, got 62"),
        ({"target_hidden_size": 16}, "size mismatch for fc"),
        ({"transformer_layer_config": {**layer, "num_hidden_layers": 2}}, "1 layer here, got 2"),
        ({"transformer_layer_config": {**layer, "model_type": "gpt2"}}, "model_type 'gpt2'; allowed are llama, qwen3"),
        ({"transformer_layer_config": {**layer, "hidden_act": "gelu"}}, "activation is 'gelu'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**described, **wrong}))
        with pytest.raises(CheckpointError, match=said):
            Eagle3Head.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described))
    state = load_file(tmp_path / "model.safetensors")
    del state["fc.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="fc.weight"):
        Eagle3Head.load(tmp_path)
    with pytest.raises(ConfigError, match="steps of an EAGLE-3 head must be >= 1, got 0"):
        Eagle3Config.for_target(LlamaConfig(), steps=0)
