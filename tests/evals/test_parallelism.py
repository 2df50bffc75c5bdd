"""The study of parallelism counts what really runs, and compares forms that compute the same."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from specdec.nn.gpt import GPT
from specdec.nn.lstm import LSTM, Trainable
from toys import noisy

sys.path.append(str(Path(__file__).parents[2] / "evals"))
import parallelism
import parallelism_picture

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = parallelism.Sizes(lengths=(4, 8), tokens=16, text=6, new_tokens=12, rounds=1)


@pytest.fixture(scope="module")
def both() -> dict[str, Trainable]:
    return parallelism.models(SHAPE, parallelism.VOCABULARY, 64)


@pytest.fixture(scope="module")
def found() -> Mapping[str, Any]:
    config = LlamaConfig(
        **SHAPE, num_key_value_heads=2, vocab_size=61, max_position_embeddings=64, initializer_range=0.3
    )
    torch.manual_seed(0)
    target = GPT(config).eval().requires_grad_(False)
    return parallelism.measure(target, noisy(target, 0.01), [1, 2, 3, 4], SIZES, SHAPE)


def test_both_have_as_many_parameters(both: Mapping[str, Trainable]) -> None:
    gpt, lstm = (parallelism.parameters(model) for model in both.values())
    assert gpt <= lstm < 1.1 * gpt


def test_steps_are_counted_where_they_happen(both: Mapping[str, Trainable]) -> None:
    for length in (1, 5, 9):
        tokens = parallelism.random_rows(2, length)[:, 1:]
        assert parallelism.serial_steps(both["LSTM"], tokens) == length
        assert parallelism.serial_steps(both["GPT"], tokens) == 1
    tokens = parallelism.random_rows(1, 7)
    with parallelism.calls({"model": both["GPT"]}) as counts:  # the counter counts: a GPT can be read serially too
        parallelism.learn_by_position(both["GPT"], tokens)
    assert counts == {"model": 7}
    parallelism.learn_whole(both["GPT"], tokens)
    assert counts == {"model": 7}  # hooks are gone


def test_the_steps_that_are_counted_are_those_of_the_fused_kernel(both: Mapping[str, Trainable]) -> None:
    lstm, tokens = both["LSTM"], parallelism.random_rows(2, 5)
    assert isinstance(lstm, LSTM)
    torch.testing.assert_close(parallelism.read_in_steps(lstm, tokens), lstm(tokens))


@pytest.mark.parametrize("name", ["GPT", "LSTM"])
def test_both_ways_to_learn_have_one_gradient(
    both: Mapping[str, Trainable], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = parallelism.random_rows(2, 6)
    assert parallelism.gradient_difference(both[name], tokens) < 1e-4
    # A model that saw the future when it reads the whole text would learn something else.
    whole = both[name].forward
    monkeypatch.setattr(both[name], "forward", lambda x, **more: whole(x.flip(1), **more).flip(1))
    assert parallelism.gradient_difference(both[name], tokens) > 1e-2


def test_a_block_in_parts_is_the_block(both: Mapping[str, Trainable], monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallelism.compare_block(both["GPT"], SIZES)["difference"] < 1e-4
    monkeypatch.setattr(parallelism, "fused_block", lambda block, x, rope: block(x, rope, None, None) + x)
    assert parallelism.compare_block(both["GPT"], SIZES)["difference"] > 0.1


def test_one_core_is_what_is_measured() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with parallelism.single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)


def test_layouts_hold_the_same_tokens() -> None:
    assert parallelism.layouts(64) == [(64, 1), (16, 4), (4, 16), (1, 64)]


def test_decoding_is_serial_until_it_speculates(found: Mapping[str, Any]) -> None:
    ways = found["decoding"]
    assert ways["without a cache"]["passes_per_token"] == ways["with a cache"]["passes_per_token"] == 1
    assert 1 / (parallelism.DRAFTED + 1) <= ways["speculating"]["passes_per_token"] < 1
    assert ways["without a cache"]["text"] == ways["with a cache"]["text"] == ways["speculating"]["text"]


def test_an_encoder_reads_at_once_and_a_decoder_writes_in_steps(found: Mapping[str, Any]) -> None:
    steps = {name: way["steps"] for name, way in found["encoder_decoder"].items()}
    assert steps == {"encoder reads": 1, "decoder scores": 1, "decoder writes": SIZES.text}


def test_what_was_measured_is_shown(found: Mapping[str, Any], tmp_path: Path) -> None:
    steps = parallelism_picture.steps_of(found, SIZES.text)
    assert steps["LSTM learns"] == SIZES.text and steps["GPT learns"] == 1
    assert [table.row_count for table in parallelism_picture.tables(found, SIZES.text)] == [8, 2 + 3 + 3, 9, 3]
    parallelism_picture.draw(found, SIZES.text, tmp_path / "parallelism.png")
    assert (tmp_path / "parallelism.png").stat().st_size > 10_000
