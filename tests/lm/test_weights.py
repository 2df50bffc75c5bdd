"""An engine that has a copy of a model's weights notices when the model goes on without it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from specdec.errors import ModelError
from specdec.lm.hf import HFLM
from toys import noisy, tiny_gpt, tiny_lstm

PROMPT = [3, 1, 4, 1, 5]


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"gpt": tiny_gpt, "lstm": tiny_lstm, "llama": tiny_llama}


def an_optimizer_step(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    torch.optim.AdamW(model.parameters(), lr=0.5).step()


def a_checkpoint_loaded(model: nn.Module) -> None:
    model.load_state_dict(noisy(model, scale=0.5).state_dict())


def a_layer_exchanged(model: nn.Module) -> None:
    name, layer = next((name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear))
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, noisy(layer, scale=0.5))


def tokens(engine: specdec.Engine) -> list[int]:
    return engine.generate(PROMPT, max_new_tokens=12, eos_token_id=None).token_ids[0]


@pytest.mark.parametrize("change", [an_optimizer_step, a_checkpoint_loaded, a_layer_exchanged])
@pytest.mark.parametrize("kind", MODELS)
def test_changed_weights_are_an_error_until_the_model_is_loaded_again(
    kind: str, change: Callable[[nn.Module], None]
) -> None:
    model = MODELS[kind]()
    engine = specdec.load(model)
    before = tokens(engine)
    change(model)
    with pytest.raises(ModelError, match=r"weights have changed.*load again"):
        tokens(engine)
    after = tokens(specdec.load(model))
    assert after == tokens(specdec.load(copy.deepcopy(model)))
    assert after != before, "the change must show, or this test says nothing"


@pytest.mark.parametrize("kind", MODELS)
def test_what_changes_no_weight_is_no_error(kind: str) -> None:
    model = MODELS[kind]()
    engine = specdec.load(model)
    before = tokens(engine)
    model.requires_grad_(True).train()
    torch.stack([(weight**2).sum() for weight in model.parameters()]).sum().backward()  # gradients, not applied
    assert tokens(engine) == before


def test_an_engine_that_runs_the_model_itself_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specdec.lm.hf.packed_copy", lambda model: model)
    model = tiny_llama()
    engine = specdec.load(model)
    assert isinstance(engine.target, HFLM) and not engine.target.packed
    before = tokens(engine)
    a_checkpoint_loaded(model)
    after = tokens(engine)
    assert after == tokens(specdec.load(model)) and after != before


def test_a_model_that_is_gone_changes_no_more() -> None:
    engine = specdec.load(tiny_gpt())
    assert tokens(engine) == tokens(specdec.load(tiny_gpt()))


def test_weights_made_in_inference_mode_have_no_count_of_writes() -> None:
    with torch.inference_mode():
        model = tiny_gpt()
    weight: Tensor = next(model.parameters())
    assert weight.is_inference()
    engine = specdec.load(model)
    assert tokens(engine) == tokens(engine)
