"""A twin with packed weights computes what the model computes, changes nothing of it, and is never out of date."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec import Engine
from specdec.checkpoints import load_lm
from specdec.lm.hf import HFLM
from specdec.nn import packed
from specdec.nn.compiled import VARIANTS
from specdec.nn.cpu import CompiledLinear
from specdec.nn.packed import PackedLinear, can_pack, packed_copy

pytestmark = pytest.mark.skipif(not can_pack(nn.Linear(8, 8)), reason="oneDNN packs nothing here")
TOKENS = torch.arange(12)[None]


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**shape, vocab_size=50, eos_token_id=None, initializer_range=0.4, **changes)
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_it_computes_the_same_and_shares_its_tensors() -> None:
    model = llama(tie_word_embeddings=True)
    before, modules = logits(model), [type(module) for module in model.modules()]
    twin = packed_copy(model)
    assert twin is not model and any(isinstance(module, PackedLinear) for module in twin.modules())
    assert torch.allclose(logits(twin), before, atol=1e-5)
    assert [type(module) for module in model.modules()] == modules
    assert twin.config is model.config and twin.get_input_embeddings().weight is model.get_input_embeddings().weight
    assert not any(isinstance(module, nn.Linear) for module in twin.modules())
    assert packed_copy(model) is twin


@pytest.mark.parametrize("dtype", VARIANTS)
def test_where_onednn_does_not_take_a_dtype_compiled_products_do(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "can_pack", lambda module: False)
    model = llama(attention_bias=True).to(dtype)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)  # transformers begins with zeros, of which no error would be seen
        nn.init.normal_(layer.self_attn.o_proj.bias)
    twin = packed_copy(model)
    assert sum(isinstance(module, CompiledLinear) for module in twin.modules()) == 2 * 7 + 1
    found, expected = logits(twin), logits(model)
    assert found.dtype == expected.dtype == dtype
    close = {"rtol": 0.0, "atol": 1e-5 if dtype == torch.float32 else 0.1}
    torch.testing.assert_close(found, expected, **close)
    assert not torch.allclose(logits(llama(attention_bias=True, hidden_act="gelu").to(dtype)), expected, **close)
    for wrong in (torch.zeros(1, 16, dtype=torch.float16), torch.zeros(1, 15, dtype=dtype)):
        with pytest.raises(RuntimeError, match="takes 16 inputs"):
            twin.lm_head(wrong)


def test_a_change_of_the_model_makes_a_new_twin() -> None:
    model = llama()
    for change in (
        lambda: model.lm_head.weight.data[3].mul_(2.0),  # behind the back of autograd's counter
        lambda: setattr(model, "lm_head", nn.Linear(16, 50, bias=False)),
        lambda: model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: out * 1.5),
        lambda: model.load_state_dict(llama().state_dict()),
    ):
        twin = packed_copy(model)
        change()
        newer = packed_copy(model)
        assert newer is not twin and torch.allclose(logits(newer), logits(model), atol=1e-5)


def test_layers_that_are_more_than_linear_stay_as_they_are() -> None:
    model = llama()
    model.lm_head.register_forward_hook(lambda module, inputs, out: out + 1)
    gate = model.model.layers[0].mlp.gate_proj
    gate.forward = lambda x: nn.functional.linear(x, gate.weight) * 2
    twin = packed_copy(model)
    assert isinstance(twin.lm_head, nn.Linear) and isinstance(twin.model.layers[1].mlp.gate_proj, PackedLinear)
    assert torch.allclose(logits(twin), logits(model), atol=1e-5)


def test_a_twin_goes_with_its_model() -> None:
    model = llama()
    twin = weakref.ref(packed_copy(model))
    del model
    gc.collect()
    assert twin() is None


class Peeks(LlamaForCausalLM):
    """Looks what kind of layer its head is: a twin of it would be wrong."""

    def forward(
        self, input_ids: Any = None, position_ids: Any = None, past_key_values: Any = None, **rest: Any
    ) -> CausalLMOutputWithPast:
        output = super().forward(input_ids, position_ids=position_ids, past_key_values=past_key_values, **rest)
        if isinstance(self.lm_head, PackedLinear):
            output.logits = output.logits * 1.1
        return output


def test_a_twin_that_the_probe_finds_wrong_is_not_used() -> None:
    model = llama()
    model.__class__ = Peeks
    lm = HFLM(model)
    assert not lm.packed and lm.model is model and lm.mechanism == "ragged"
    expected = llama().generate(TOKENS, max_new_tokens=10, do_sample=False)[0, 12:].tolist()
    assert Engine(load_lm(model)).generate(TOKENS, max_new_tokens=10).token_ids == [expected]
