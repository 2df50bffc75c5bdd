"""Models spread over devices, offloaded, quantized, or on another device than their draft."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import PreTrainedModel

import specdec
from specdec.lm.cache import RaggedCache
from specdec.lm.hf import hf_lm

pytestmark = pytest.mark.filterwarnings("ignore::specdec.errors.FallbackWarning")

NAMES = ["Llama", "Gemma3", "Qwen3-Next"]  # ragged, ragged with windows, row by row
PROMPTS = families.PROMPTS[:3]
NEW = 24


def check(target: PreTrainedModel, name: str, **options: Any) -> None:
    options = {"draft": families.model(name), **options}
    output = specdec.generate(target, PROMPTS, max_new_tokens=NEW, **options)
    assert output.token_ids == [text[:NEW] for text in families.texts(name)[:3]]
    assert output.stats.num_accepted_tokens > 0


@pytest.mark.parametrize("name", NAMES)
def test_dispatched_by_a_device_map(name: str) -> None:
    model = copy.deepcopy(families.model(name))
    check(dispatch_model(model, device_map={"": "cpu"}, force_hooks=True), name)


@pytest.mark.parametrize("name", NAMES)
def test_layers_offloaded_to_disk(name: str, tmp_path: Path) -> None:
    model = copy.deepcopy(families.model(name))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    model = dispatch_model(model, device_map=places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(weight.is_meta for weight in model.parameters())
    check(model, name)


def test_everything_offloaded(tmp_path: Path) -> None:
    check(cpu_offload(copy.deepcopy(families.model("Llama"))), "Llama")
    check(disk_offload(copy.deepcopy(families.model("Llama")), tmp_path), "Llama")


@pytest.mark.parametrize("name", NAMES)
def test_target_and_draft_of_different_dtypes(name: str) -> None:
    check(families.model(name), name, draft=copy.deepcopy(families.model(name)).to(torch.bfloat16))


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Mamba2"])
def test_int8_weights(name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(families.model(name))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = []
    for prompt in PROMPTS:
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        expected.append(whole[0, len(prompt) :].tolist())
    for draft in (None, families.model(name), model):
        output = specdec.generate(model, PROMPTS, draft=draft, max_new_tokens=NEW)
        assert output.token_ids == expected


def test_cached_layers_live_where_their_keys_do() -> None:
    cache = RaggedCache(torch.float32, torch.device("cpu"))
    cache.reserve(2, 8)
    cache.begin([0, 0], 3, 0)
    cache.update(0, torch.zeros(2, 2, 3, 4), torch.zeros(2, 2, 3, 4))
    cache.update(1, torch.zeros(2, 2, 3, 4, device="meta"), torch.zeros(2, 2, 3, 4, device="meta"))
    assert [cache.layers[layer][0].device.type for layer in (0, 1)] == ["cpu", "meta"]


CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@CUDA
@pytest.mark.parametrize("name", NAMES)
def test_layers_on_two_devices(name: str) -> None:
    model = copy.deepcopy(families.model(name))
    places: dict[str, Any] = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu", "model.norm": 0}
    places |= {"model.rotary_emb": 0, "lm_head": 0}
    check(dispatch_model(model, device_map=places, main_device=0), name)


@CUDA
@pytest.mark.parametrize("name", NAMES)
def test_target_and_draft_on_different_devices(name: str) -> None:
    on_gpu = copy.deepcopy(families.model(name)).cuda()
    check(families.model(name), name, draft=on_gpu)
    assert hf_lm(on_gpu).device.type == "cuda"
    output = specdec.generate(on_gpu, PROMPTS, draft=families.model(name), max_new_tokens=NEW)
    plain = specdec.generate(on_gpu, PROMPTS, max_new_tokens=NEW)
    assert output.token_ids == plain.token_ids
