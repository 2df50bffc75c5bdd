"""Whatever model is behind it, a ``CachedLM`` gives every row the logits that the model gives that row alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from ragged import Checked, random_walk
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from specdec.lm import base
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.cuda import CudaLM
from specdec.lm.hf import HFLM
from specdec.lm.native import NativeLM
from specdec.lm.paged import PagedLM
from specdec.lm.recurrent import RecurrentLM, RowState
from specdec.nn.gpt import GPT
from toys import tiny_gpt, tiny_lstm

CONTEXT = 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the kernels, which triton interprets on a processor
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,  # large, so that every token of the past has a visible effect
}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "gpt2": lambda: GPT2Config(
        vocab_size=61, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=8),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=8),  # soft caps, every other layer has a window
}
HF = [
    "llama sdpa",
    "llama eager",
    "gpt2 sdpa",
    "gpt2 eager",
    "mistral sdpa",
    "mistral eager",
    "qwen3 sdpa",
    "gemma2 eager",
]
OURS = {"native": NativeLM, "compiled": CpuLM, "kernels": CudaLM}
MODELS = [*OURS, "recurrent", *HF]


def logits_of(model: GPT, text: list[int]) -> Tensor:
    """[T, V] of a text that is read at once, without a cache."""
    tokens = torch.tensor([text], device=model.embed_tokens.weight.device)
    return model.lm_head(model(tokens))[0]


def build(name: str) -> Checked:
    if name in OURS:
        gpt = tiny_gpt(0, context=CONTEXT).to(DEVICE if name == "kernels" else "cpu")
        return Checked(OURS[name](gpt), lambda text: logits_of(gpt, text))
    if name == "recurrent":
        lstm = tiny_lstm(0, context=CONTEXT)
        return Checked(RecurrentLM(lstm), lambda text: lstm.lm_head(lstm(torch.tensor([text])))[0])
    family, attention = name.split()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), attn_implementation=attention)
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    return Checked(HFLM(model), lambda text: reference(torch.tensor([text]), use_cache=False).logits[0])


@pytest.fixture(params=MODELS)
def checked(request: pytest.FixtureRequest) -> Checked:
    return build(request.param)


def poison(lm: CachedLM, slot: int) -> None:
    """Fill the slot's cache with NaN."""
    assert isinstance(lm, NativeLM | PagedLM | HFLM | RecurrentLM)
    with torch.inference_mode():
        if isinstance(lm, RecurrentLM):
            lm._rows[slot] = RowState({n: state * math.nan for n, state in lm._rows[slot].states.items()})
            return
        if isinstance(lm, PagedLM):
            for block in lm.cache.rows[slot]:
                block.fill_(math.nan)
            return
        for pair in lm.cache.layers.values():
            for buffer in pair:
                buffer[slot] = math.nan


def some_tokens(rows: int, width: int, seed: int = 5) -> Tensor:
    return torch.randint(61, (rows, width), generator=torch.Generator().manual_seed(seed))


def test_rows_get_the_logits_that_they_get_alone(checked: Checked) -> None:
    assert (checked.lm.vocab_size, checked.lm.context, checked.lm.dtype) == (61, CONTEXT, torch.float32)
    for seed in range(1 if isinstance(checked.lm, CudaLM) else 2):  # kernels are slow where they are interpreted
        random_walk(checked, steps=40, seed=seed)
        checked.free(0)


def test_the_check_notices_one_wrong_token_of_the_past(checked: Checked) -> None:
    checked.reserve(2, 12)
    checked.fill([[1, 2, 3, 4, 5], [6, 7]])
    checked.texts[0][1] = 9
    with pytest.raises(AssertionError):
        checked.append(some_tokens(2, 2))


def test_a_text_is_read_in_passes_of_bounded_size(checked: Checked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "FILL_TOKENS", 12)
    checked.reserve(3, 30)
    texts = some_tokens(3, 20).tolist()
    checked.fill([texts[0], texts[1][:7], []])
    checked.append(some_tokens(3, 3))


def test_logits_of_the_last_real_token(checked: Checked) -> None:
    checked.reserve(3, 20)
    checked.fill([[1, 2, 3], [4], [5, 6]])
    checked.append_last(some_tokens(3, 4), [2, 4, 1])
    checked.append_last(some_tokens(3, 1), [1, 1, 1])
    checked.keep([3, 1, 2])
    checked.append(some_tokens(3, 2))


def test_padding_is_invisible_whatever_it_is(checked: Checked) -> None:
    checked.reserve(2, 20)
    checked.fill([[1, 2, 3], [4]])
    tokens, counts = some_tokens(2, 5), [2, 5]
    real = torch.arange(5) < torch.tensor(counts).unsqueeze(1)
    found = []
    for padding in (0, 60, 7):
        found.append(checked.append(torch.where(real, tokens, padding), counts)[real])
        checked.keep([0, 0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_refused_tokens_leave_no_trace(checked: Checked) -> None:
    checked.reserve(2, 20)
    checked.fill([[1, 2, 3], [4]])
    tokens = some_tokens(2, 3)
    never = checked.append(tokens)
    checked.keep([0, 0])
    for seed in range(3):
        checked.append(some_tokens(2, 3, seed))
        checked.keep([0, 0])
    assert torch.equal(checked.append(tokens), never)


def test_padding_may_lie_past_the_context(checked: Checked) -> None:
    checked.reserve(2, CONTEXT)
    checked.fill([some_tokens(1, CONTEXT - 2)[0].tolist(), [4]])
    checked.append(some_tokens(2, 6), [2, 6])  # row 0 is full now
    checked.keep([2, 6])
    checked.append(some_tokens(2, 3), [0, 3])
    checked.keep([0, 3])


def test_what_is_broken_in_a_freed_slot_does_not_leak(checked: Checked) -> None:
    checked.reserve(3, 20)
    checked.fill([[1, 2, 3], [4, 5, 6, 7, 8], [9]])
    poison(checked.lm, 1)
    checked.append(some_tokens(1, 2))  # neighbours do not notice
    checked.append(some_tokens(1, 2), first=2)
    checked.keep([1])
    checked.keep([1], first=2)
    checked.copy(2, 1)  # the last row takes the slot
    checked.free(2)
    checked.append(some_tokens(2, 3))
    checked.keep([1, 1])

    poison(checked.lm, 1)
    checked.lm.forget(1)
    checked.restart(1)
    checked.fill([[7]], first=1)
    checked.append(some_tokens(2, 3))

    checked.keep([0, 0])
    poison(checked.lm, 1)
    checked.restart(1)  # forgets the row, and does not clean up, unless its blocks or states go
    assert (
        isinstance(checked.lm, PagedLM | RecurrentLM)
        or not torch.isfinite(checked.lm.append(some_tokens(2, 3))[1]).all()
    )
    checked.lm.keep([0, 0])


def test_tokens_that_were_read_and_never_kept_do_not_leak(checked: Checked) -> None:
    checked.reserve(2, 20)
    checked.append(some_tokens(2, 3))
    poison(checked.lm, 0)
    poison(checked.lm, 1)
    checked.free(0)
    checked.fill([[1, 2, 3, 4, 5, 6], [7]])
    checked.append(some_tokens(2, 2))


def test_buffers_grow_without_losing_what_they_hold(checked: Checked) -> None:
    checked.reserve(1, 1)
    checked.fill([[1, 2, 3]])
    for rows in (2, 4):
        checked.reserve(rows, 4)
        checked.append(some_tokens(rows, 7), [4] * rows)
        checked.keep([4] * rows)


def test_a_slot_may_forget_what_it_has_committed(checked: Checked) -> None:
    checked.reserve(3, 30)
    checked.fill([[1, 2, 3], [4, 5, 6, 7, 8], [9]])
    for left in (4, 2, 0):
        checked.copy(1, 1, left)
        checked.append(some_tokens(3, 3, seed=left))
        checked.keep([1, 2, 0])
    checked.append(some_tokens(3, 3))
