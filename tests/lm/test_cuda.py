"""The GPU's decoder: kernels against the model they are made of, recorded passes against passes that are not.

Without a GPU triton interprets the kernels on the processor; what only a GPU has is tested where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ragged import Checked
from test_contract import DEVICE, logits_of
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from specdec import Engine, Output
from specdec.drafters.model import ModelDrafter
from specdec.lm import cuda as lm_cuda
from specdec.lm.base import CachedLM
from specdec.lm.cuda import SIZES, CudaLM
from specdec.lm.native import NativeLM, native_lm
from specdec.lm.paged import BLOCK
from specdec.nn import cuda as nn_cuda
from specdec.nn.cuda import FEW
from specdec.nn.gpt import GPT, Config
from toys import noisy, tiny_gpt

on_gpu = pytest.mark.skipif(DEVICE != "cuda", reason="there is no GPU")
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 700,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, Config] = {
    "heads of 20 channels": LlamaConfig(**SHAPE, head_dim=20),
    "biases": LlamaConfig(**SHAPE, head_dim=8, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
}


def model_of(config: Config, dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():  # biases and norms begin as zeros and ones, which hide mistakes
        if weight.dim() == 1:
            weight.copy_(torch.rand_like(weight) + 0.5 * ("norm" in name))
        weight.data = weight.data.to(DEVICE, dtype)
    return model


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("few", [FEW, 4])  # of more tokens torch makes the products
@torch.inference_mode()
def test_every_family(name: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn_cuda, "FEW", few)
    model = model_of(CONFIGS[name])
    checked = Checked(CudaLM(model), lambda text: logits_of(model, text), tolerance=5e-5)
    checked.reserve(2, 30)
    checked.fill(texts(9, 3))
    for _ in range(3):  # the third of a kind is a recorded one
        checked.append(torch.tensor(texts(3, 3)), [3, 2])
        checked.keep([2, 1])


@torch.inference_mode()
def test_a_cache_of_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lm_cuda, nn_cuda):
        monkeypatch.setattr(module, "CHUNK", BLOCK)
    model = model_of(CONFIGS["qwen3"])
    checked = Checked(CudaLM(model), lambda text: logits_of(model, text), tolerance=5e-5)
    checked.reserve(2, 4 * BLOCK)
    checked.fill(texts(BLOCK - 2, 5))
    for _ in range(3):  # the first crosses into a second chunk
        checked.append(torch.tensor(texts(3, 3)))
        checked.keep([3, 3])


@torch.inference_mode()
def test_whole_drafts_are_what_single_passes_find() -> None:
    lm = CudaLM(tiny_gpt(0, context=200).to(DEVICE))
    lm.reserve(3, 60)
    begun, unread, counts = texts(5, 1, 12), torch.tensor(texts(2, 2, 2), device=DEVICE), [1, 2, 2]
    for choices in (61, 40):
        found = []
        for guess in (CachedLM.guess, *[CudaLM.guess] * (3 if DEVICE == "cuda" else 1)):  # the third is a recorded one
            lm.fill(begun)
            found.append(guess(lm, unread, counts, 4, choices).clone())
            lm.keep([count + 3 for count in counts])
            after = lm.append(found[-1][:, -1:])
            lm.free(0)
            assert torch.equal(found[0], found[-1])
            assert int(found[0].max()) < choices
            assert after.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}, {"temperature": 0.8, "rule": "coupled"}])
def test_an_engine_gives_the_texts_of_torch(settings: dict[str, Any]) -> None:
    target, draft = tiny_gpt(0).to(DEVICE), noisy(tiny_gpt(0)).to(DEVICE)
    prompts = texts(5, 9)

    def generated(kind: Callable[[GPT], CachedLM]) -> Output:
        engine = Engine(kind(target), ModelDrafter(kind(draft)))
        return engine.generate(prompts, max_new_tokens=10, seed=1, num_draft_tokens=3, **settings)

    found = generated(CudaLM)
    assert found.token_ids == generated(NativeLM).token_ids
    assert found.stats.num_accepted_tokens > 0


@torch.inference_mode()
def test_any_number_of_rows() -> None:
    lm = CudaLM(tiny_gpt(0, layers=1).to(DEVICE))
    most = SIZES[-1]
    lm.reserve(most + 1, 2)
    for rows in (5, 65, most, most + 1):
        shape = lm._shape(rows, 1, 2)
        assert shape.rows >= rows and (shape.rows in SIZES) == (rows <= most)
    tokens = torch.arange(5, device=DEVICE).unsqueeze(1)  # a sixth row makes up the number
    logits = lm.append(tokens)
    assert logits.shape == (5, 1, 61)
    expected = [logits_of(tiny_gpt(0, layers=1).to(DEVICE), [token])[0] for token in range(5)]
    torch.testing.assert_close(logits[:, 0], torch.stack(expected), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_tapped_layers_are_those_of_torch() -> None:
    found = []
    for kind in (CudaLM, NativeLM):
        lm = kind(tiny_gpt(0, layers=3).to(DEVICE))
        lm.tap((0, 1))
        lm.reserve(2, 20)
        lm.fill(texts(9, 3))
        found.append([lm.take_features(slot) for slot in range(2)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_head_reads_slices() -> None:
    lm, hidden = CudaLM(tiny_gpt(0).to(DEVICE)), torch.randn(3, 4, 32, device=DEVICE)
    for count in (1, 2):
        part = hidden[:, :count]
        torch.testing.assert_close(
            lm.project(part), NativeLM(tiny_gpt(0).to(DEVICE)).project(part), rtol=1e-4, atol=1e-4
        )


@torch.inference_mode()
def test_a_tree_behind_nothing() -> None:
    lm = CudaLM(tiny_gpt(0).to(DEVICE))
    lm.reserve(1, 20)
    assert 7 not in SIZES, "so they are read beside padding"
    logits = lm.append(torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), parents=[[-1, 0, 0, 1, 2, 3, 4]])
    expected = logits_of(tiny_gpt(0).to(DEVICE), [5, 6, 8])
    torch.testing.assert_close(logits[0, [0, 1, 3]], expected, rtol=1e-4, atol=1e-4)


def test_models_without_kernels_are_refused() -> None:
    with pytest.raises(LookupError, match="no kernels for torch.float64"):
        CudaLM(tiny_gpt(0).to(DEVICE, torch.float64))


@on_gpu
def test_a_gpu_runs_kernels_where_there_are_some() -> None:
    assert isinstance(native_lm(tiny_gpt(0).to(DEVICE)), CudaLM)
    assert isinstance(native_lm(tiny_gpt(0).to(DEVICE, torch.float64)), NativeLM)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_logits_do_not_depend_on_what_else_is_read(dtype: torch.dtype) -> None:
    lm = CudaLM(model_of(CONFIGS["qwen3"], dtype))
    text = texts(40)[0]
    lm.reserve(8, 64)
    alone = []
    for token in text:
        alone.append(lm.append(torch.tensor([[token]], device=DEVICE))[0, 0].clone())
        lm.keep([1])
    lm.free(0)
    assert FEW >= 8 * 4  # of many tokens torch makes the products, in an order of its own
    for rows in (2, 8):
        for slot, begun in enumerate([text[:1], *texts(*[30] * (rows - 1))]):
            lm.fill([begun], first=slot)
        for place in (1, 5, 9):
            logits = lm.append(torch.tensor([text[place : place + 4], *texts(*[4] * (rows - 1))], device=DEVICE))
            assert torch.equal(logits[0], torch.stack(alone[place : place + 4])), (rows, place)
            lm.keep([4, *[1] * (rows - 1)])
        lm.free(0)


@on_gpu
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_step_waits_once(temperature: float) -> None:
    engine = Engine(native_lm(tiny_gpt(0).to(DEVICE)), ModelDrafter(native_lm(tiny_gpt(1, layers=1).to(DEVICE))))
    prompts = texts(5, 9)
    expected = engine.generate(prompts, max_new_tokens=30, temperature=temperature, num_draft_tokens=3, seed=1)
    call = engine._call(
        prompts, None, {"max_new_tokens": 30, "temperature": temperature, "num_draft_tokens": 3, "seed": 1},
        streaming=False,
    )  # fmt: skip
    waits = []
    tolist = Tensor.tolist

    def counted(self: Tensor) -> object:
        waits.append(self.is_cuda)
        return tolist(self)

    steps = call.steps()
    next(steps)  # with the prompts
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Tensor, "tolist", counted)
        taken = sum(1 for _ in steps)
    assert sum(waits) == taken
    assert call.output().token_ids == expected.token_ids


@on_gpu
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "rule": "coupled"}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_drafts_change_no_text(settings: dict[str, Any], dtype: torch.dtype) -> None:
    """In bfloat16 neither, since sums have one order; twice, for the second call runs what the first has recorded."""
    config = LlamaConfig(**{**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2}, head_dim=16)
    target, draft = model_of(config, dtype), noisy(model_of(config, dtype))
    prompts = texts(5, 130, 9, 40)
    plain, spec = Engine(CudaLM(target)), Engine(CudaLM(target), ModelDrafter(CudaLM(draft)))
    for _ in range(2):
        expected = plain.generate(prompts, max_new_tokens=200, seed=1, **settings)
        for count in (1, 4):
            found = spec.generate(prompts, max_new_tokens=200, seed=1, num_draft_tokens=count, **settings)
            assert found.token_ids == expected.token_ids, count
            assert found.stats.num_accepted_tokens > 0
