"""Muon on master weights: which weights it updates, how, and that a run goes on from its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.nn.block import BlockHead
from specdec.nn.eagle3 import Eagle3Head
from specdec.nn.gpt import GPT
from specdec.training.optimizer import MasterAdamW, MasterMuon
from toys import tiny_gpt

RATE = 0.01


def model() -> GPT:
    return tiny_gpt(0).requires_grad_(True)


def inner(weights: dict[str, Tensor]) -> set[str]:
    return {name for name, weight in weights.items() if name.startswith("layers") and weight.ndim == 2}


def steps(optimizer: MasterAdamW, first: int, last: int) -> None:
    """Updates with gradients that depend on their number."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for weight in optimizer.model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)
        optimizer.step(RATE, optimizer.gather_gradients(), clip=1.0)


def test_matrices_inside_the_model_are_muons_and_all_else_is_adamws() -> None:
    muon, adamw = (kind(model(), torch.float32, weight_decay=0.1) for kind in (MasterMuon, MasterAdamW))
    steps(muon, 0, 3)
    steps(adamw, 0, 3)
    same = {name for name in muon.masters if torch.equal(muon.masters[name], adamw.masters[name])}
    assert same == muon.masters.keys() - inner(muon.masters)
    assert {"embed_tokens.weight", "lm_head.weight", "norm.weight"} <= same


@pytest.mark.parametrize("ratio", [1.0, 1e-3])
def test_rare_directions_are_learned_as_fast_as_frequent_ones(ratio: float) -> None:
    """A gradient of two directions, one much weaker: AdamW follows the strong one, Muon both."""
    found = {}
    for kind in (MasterMuon, MasterAdamW):
        optimizer = kind(model(), torch.float32, weight_decay=0.0)
        name = "layers.0.mlp.down_proj.weight"
        before, weight = optimizer.masters[name].clone(), optimizer.model.get_parameter(name)
        generator = torch.Generator().manual_seed(0)
        left, right = (torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q for n in weight.shape)
        weight.grad = left @ torch.diag(torch.tensor([1.0, ratio])) @ right.T
        optimizer.step(RATE, optimizer.gather_gradients(), clip=0.0)
        update = left.T @ (before - optimizer.masters[name]) @ right
        found[kind] = (update[1, 1] / update[0, 0]).item()
        if kind is MasterMuon:
            largest = RATE * 0.2 * max(weight.shape) ** 0.5
            assert 0.5 * largest < update[0, 0] < 1.3 * largest
    assert 0.5 < found[MasterMuon] < 2
    if ratio < 1:
        assert found[MasterAdamW] < 0.3


def test_matrices_decay_and_vectors_do_not() -> None:
    optimizer = MasterMuon(model(), torch.float32, weight_decay=0.5)
    for weight in optimizer.model.parameters():
        weight.grad = torch.zeros_like(weight)
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    optimizer.step(0.1, optimizer.gather_gradients(), clip=1.0)
    for name, master in optimizer.masters.items():
        torch.testing.assert_close(master, before[name] * (0.95 if master.ndim == 2 else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_from_its_state_as_if_it_had_not_stopped(dtype: torch.dtype) -> None:
    whole, stopped, other = (MasterMuon(model(), dtype, weight_decay=0.1) for _ in range(3))
    steps(whole, 0, 5)
    steps(stopped, 0, 3)
    other.load({name: tensor.clone() for name, tensor in stopped.state().items()})
    steps(other, 3, 5)
    for name, master in whole.masters.items():
        assert torch.equal(master, other.masters[name]), name
    forgetful = MasterMuon(model(), dtype, weight_decay=0.1)
    forgetful.load({name: tensor for name, tensor in stopped.state().items() if "momentum" not in name})
    steps(forgetful, 3, 5)
    changed = {name for name, master in whole.masters.items() if not torch.equal(master, forgetful.masters[name])}
    assert changed == inner(whole.masters)


def test_of_heads_too_what_has_a_row_per_token_is_left_to_adamw() -> None:
    target = tiny_gpt(0, layers=4)
    for head in (Eagle3Head.for_target(target), Eagle3Head.for_target(target, width=16), BlockHead.for_target(target)):
        optimizer = MasterMuon(head, torch.float32, weight_decay=0.0)
        names = {name for group in optimizer.muon.param_groups for name, master in optimizer.masters.items()
                 if any(master is one for one in group["params"])}  # fmt: skip
        assert names and not any(61 in optimizer.masters[name].shape for name in names)
        assert {name.split(".")[0] for name in names} <= {"fc", "fuse", "to_context", "block", "blocks"}
        assert all(optimizer.masters[name].shape[0] > 1 for name in names)
