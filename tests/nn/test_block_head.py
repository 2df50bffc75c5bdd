"""The block drafter's module: what a block may look at, what its loss is, and that nothing of it is lost on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig

from block_toys import block_head, features_of
from specdec.errors import CheckpointError, ConfigError
from specdec.nn import block
from specdec.nn.block import BlockConfig, BlockHead
from toys import noisy, tiny_gpt

TARGET = tiny_gpt(0, layers=3)
SIZE, LENGTH = 4, 20
STARTS = torch.tensor([[3, 0, 15], [7, 8, 1]])
TOKENS = torch.randint(0, 61, (2, LENGTH), generator=torch.Generator().manual_seed(3))


def hidden_of(head: BlockHead, tokens: Tensor, features: Tensor) -> Tensor:
    """[B, A, K, H]."""
    hidden, places = head.hidden_at(STARTS, tokens, features)
    return hidden.view(*places.shape, -1)


def changed(before: Tensor, after: Tensor) -> Tensor:
    """Which places [B, A, K] are not the same."""
    return (before - after).abs().amax(-1) > 1e-5


def test_a_block_sees_its_anchor_its_masks_and_features_strictly_before_the_anchor() -> None:
    head = block_head(TARGET, SIZE)
    features, _ = features_of(TARGET, head.layers, TOKENS)
    usual = hidden_of(head, TOKENS, features)
    for place in range(LENGTH):
        other = features.clone()
        other[:, place] += 1
        expected = (place < STARTS).unsqueeze(-1).expand(-1, -1, SIZE)
        assert torch.equal(changed(usual, hidden_of(head, TOKENS, other)), expected)
        tokens = TOKENS.clone()
        tokens[:, place] = (tokens[:, place] + 1) % 61
        expected = (place == STARTS).unsqueeze(-1).expand(-1, -1, SIZE)
        assert torch.equal(changed(usual, hidden_of(head, tokens, features)), expected)


def test_places_of_a_block_see_each_other_both_ways() -> None:
    head = block_head(TARGET, SIZE)
    features, _ = features_of(TARGET, head.layers, TOKENS)
    usual = hidden_of(head, TOKENS, features)
    with torch.no_grad():
        head.masks[-1] += 1
    assert changed(usual, hidden_of(head, TOKENS, features)).all()


def test_blocks_of_a_row_do_not_see_each_other() -> None:
    head = block_head(TARGET, SIZE)
    features, _ = features_of(TARGET, head.layers, TOKENS)
    together = hidden_of(head, TOKENS, features)
    for anchor in range(STARTS.shape[1]):
        alone, _ = head.hidden_at(STARTS[:, anchor : anchor + 1], TOKENS, features)
        torch.testing.assert_close(together[:, anchor], alone)


def test_the_loss_is_that_of_every_place_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    head = noisy(block_head(TARGET, SIZE))  # no term of it is zero
    features, logits = features_of(TARGET, head.layers, TOKENS)
    hidden = hidden_of(head, TOKENS, features)
    total = weights = length = 0.0
    for b in range(2):
        for a, start in enumerate(STARTS[b].tolist()):
            survival = 1.0
            for k in range(SIZE):
                before = head.markov_in(TOKENS[b, start + k])
                h = hidden[b, a, k]
                guess = (TARGET.lm_head(h) + before @ head.markov_out.weight.T).softmax(-1)
                law = logits[b, start + k].softmax(-1)
                alpha = float(torch.minimum(law, guess).sum().detach())
                both = torch.cat([head.confidence.weight[0], head.markov_confidence.weight[0]])
                confidence = torch.cat([h, before]) @ both + head.confidence.bias[0]
                known = torch.tensor(alpha)
                error = -known * confidence.sigmoid().log() - (1 - known) * (1 - confidence.sigmoid()).log()
                entropy = -float((law * guess.log()).sum().detach())
                weight = 2.718281828459045 ** (-k / 4)
                total += weight * (
                    0.1 * entropy + 0.9 * float((law - guess).abs().sum().detach()) + float(error.detach())
                )
                weights += weight
                survival *= alpha
                length += survival
    loss, figures = head.loss_at(STARTS, TOKENS, features, logits)
    assert loss.item() == pytest.approx(total / weights, rel=1e-5)
    assert figures["mean_acceptance_length"] == pytest.approx(1 + length / 6, rel=1e-5)
    loss.backward()
    gradients = {name: weight.grad for name, weight in head.named_parameters()}
    head.zero_grad()
    monkeypatch.setattr(block, "_LOGITS_AT_ONCE", 5 * 61)
    in_parts, _ = head.loss_at(STARTS, TOKENS, features, logits)
    in_parts.backward()
    torch.testing.assert_close(in_parts, loss)
    for name, weight in head.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name])
        assert weight.grad.abs().sum() > 0, name


def test_anchors_are_as_many_as_asked_for_and_never_too_near_the_end() -> None:
    head = block_head(TARGET, SIZE, anchors=1000)
    features, logits = features_of(TARGET, head.layers, TOKENS)
    drawn: list[Tensor] = []
    loss_at = head.loss_at
    head.loss_at = lambda starts, *given: drawn.append(starts) or loss_at(starts, *given)  # type: ignore[method-assign]
    loss, _ = head.loss(TOKENS, features, logits)
    assert loss.isfinite() and drawn[0].sort(-1).values.tolist() == [list(range(LENGTH - SIZE))] * 2
    head.loss(TOKENS, features, logits, 7)  # what comes before is read and not learned from
    assert drawn[1].sort(-1).values.tolist() == [list(range(7, LENGTH - SIZE))] * 2
    with pytest.raises(ConfigError, match="longer than a block of 4 tokens, got 4"):
        head.loss(TOKENS[:, :SIZE], features[:, :SIZE], logits[:, :SIZE])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    head = noisy(block_head(TARGET, SIZE)).to(dtype)
    head.save(tmp_path / "head")
    again = BlockHead.load(tmp_path / "head")
    assert again.config == head.config and again.layers == head.layers
    state, found = head.state_dict(), again.state_dict()
    assert state.keys() == found.keys() and all(torch.equal(state[name], found[name]) for name in state)
    assert all(found[name].dtype == dtype for name in found)
    assert not any("embed_tokens" in name or "lm_head" in name for name in state)


def test_what_is_missing_or_damaged_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        BlockHead.load(tmp_path)
    block_head(TARGET, SIZE).save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    weights = (tmp_path / "model.safetensors").read_bytes()
    for wrong, said in (
        ({"specdec_drafter": "eagle3"}, "kind 'eagle3', not 'block'"),
        ({"block_size": 5}, "size mismatch for masks"),
        ({"unknown": 1}, "unexpected keyword argument 'unknown'"),
        ({"block_size": 0}, "must be positive, got 0"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**described, **wrong}))
        with pytest.raises(CheckpointError, match=said):
            BlockHead.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="train it again"):
        BlockHead.load(tmp_path)


def test_sizes_come_from_the_target_or_are_refused() -> None:
    found = BlockConfig.for_target(TARGET.config)
    assert (found.hidden_size, found.vocab_size, found.layers) == (32, 61, (1,))
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (4, 2, 8)
    wide = BlockConfig.for_target(GPT2Config(n_embd=48, n_head=4, n_layer=12, vocab_size=100), num_hidden_layers=1)
    assert (wide.head_dim, wide.intermediate_size, wide.layers, wide.num_hidden_layers) == (12, 192, (1, 6, 10), 1)
    with pytest.raises(ConfigError, match="block_size of a block drafter must be positive, got 0"):
        BlockConfig.for_target(LlamaConfig(), block_size=0)
    with pytest.raises(ConfigError, match="layers of a block drafter must be positive"):
        BlockConfig.for_target(LlamaConfig(), layers=())
    with pytest.raises(ConfigError, match="4 query heads cannot share 3"):
        BlockConfig.for_target(TARGET.config, num_key_value_heads=3)
