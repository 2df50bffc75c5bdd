"""The LSTM and its files: steps are the whole pass, what is saved comes back bit for bit, what is damaged is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specdec.errors import CheckpointError, ConfigError
from specdec.nn.lstm import LSTM, Cells, LSTMConfig, holds_lstm
from toys import tiny_lstm

TOKENS = torch.tensor([[5, 9, 60, 0, 7, 7], [1, 2, 3, 4, 5, 6]])


def test_steps_are_the_whole_pass() -> None:
    model = tiny_lstm(layers=3)
    state, hidden = torch.zeros(3, 2, 2, 24), []
    for x in model.embed_tokens(TOKENS).unbind(1):
        state = Cells(model)(x, state)
        hidden.append(state[-1, 0])
    torch.testing.assert_close(torch.stack(hidden, dim=1), model(TOKENS))


def test_a_state_depends_on_all_tokens_before_it_and_on_none_after() -> None:
    model, other = tiny_lstm(), TOKENS.clone()
    other[0, 2] += -1
    changed = (model(TOKENS) != model(other)).any(-1)
    assert changed.tolist() == [[False] * 2 + [True] * 4, [False] * 6]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_comes_back(tmp_path: Path, tied: bool, dtype: torch.dtype) -> None:
    model = LSTM(LSTMConfig(61, 24, 2, tie_word_embeddings=tied, eos_token_id=3)).to(dtype)
    model.save(tmp_path)
    assert holds_lstm(tmp_path)
    found = LSTM.load(tmp_path)
    assert torch.equal(found(TOKENS), model.eval()(TOKENS)) and found.embed_tokens.weight.dtype == dtype
    assert (found.lm_head.weight is found.embed_tokens.weight) is tied and found.config.eos_token_id == 3
    assert LSTM.load(tmp_path, torch.float32).lm_head.weight.dtype == torch.float32


def test_what_is_damaged_is_named(tmp_path: Path) -> None:
    assert not holds_lstm(tmp_path)
    tiny_lstm().save(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"hidden_size": 0}, {"hidden_size": 25}, {"specdec_model": "gru"}):
        (tmp_path / "config.json").write_text(json.dumps(described | wrong))
        with pytest.raises(CheckpointError, match="(?s)does not hold an LSTM .*restore it"):
            LSTM.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="does not hold an LSTM"):
        LSTM.load(tmp_path)
    with pytest.raises(ConfigError, match="num_hidden_layers of an LSTM must be an integer >= 1, got 0"):
        LSTMConfig(61, 24, 0)


@pytest.mark.parametrize("tied", [False, True])
def test_a_given_number_of_parameters(tied: bool) -> None:
    for wanted in (20_000, 1_835_776):
        config = LSTMConfig.with_parameters(wanted, 2048 if wanted > 1e6 else 61, tie_word_embeddings=tied)
        found = sum(weight.numel() for weight in LSTM(config).parameters())
        assert wanted <= found < 1.1 * wanted and config.hidden_size % 2 == 0
