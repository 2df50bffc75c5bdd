"""What training computes in compiled code is what torch computes, forward and backward, whatever the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, Qwen3Config

from specdec.errors import FallbackWarning
from specdec.nn import train
from specdec.nn.attention import Window
from specdec.nn.gpt import GPT, rotate
from specdec.training.objective import Pair

END = 0
SIZES = [1, 5, 64, 65, 130, 23]  # of documents: 288 tokens in one row


@pytest.fixture(autouse=True)
def compiled() -> None:
    """These tests are of the compiled code: without it they would compare torch with itself."""
    assert train.library(torch.float32) is not None, "no C compiler"


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns the compiled code off and on."""
    library = train.library
    return lambda off: monkeypatch.setattr(train, "library", (lambda dtype: None) if off else library)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def results(function: Callable[..., Tensor], *inputs: Tensor, compiled: bool) -> list[Tensor]:
    """What ``function`` returns, and its gradients; whether compiled code made them is checked."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*leaves)
    assert isinstance(found.grad_fn, torch.autograd.function.BackwardCFunction) == compiled
    return [found.detach(), *torch.autograd.grad(found, leaves, random(*found.shape, seed=9).to(found.dtype))]


def compare(ours: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Equal in float32; in bfloat16 as near to float32's as torch's own are."""
    exact = results(reference, *inputs, compiled=False)
    for found, expected in zip(results(ours, *inputs, compiled=True), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    rounded = [x.bfloat16() for x in inputs]
    exact = results(reference, *(x.float() for x in rounded), compiled=False)
    own, theirs = results(ours, *rounded, compiled=True), results(reference, *rounded, compiled=False)
    for found, other, expected in zip(own, theirs, exact, strict=True):
        assert found.dtype == torch.bfloat16
        error, usual = (float((x.float() - expected).norm() / expected.norm()) for x in (found, other))
        assert error < 1.5 * usual + 1e-3, (error, usual)


def test_norm() -> None:
    def run(kind: type[nn.RMSNorm]) -> Callable[[Tensor, Tensor], Tensor]:
        norm = kind(48, eps=1e-3)
        return lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x)

    compare(run(train.RMSNorm), run(nn.RMSNorm), 0.3 * random(3, 50, 48), random(48))


def test_swiglu() -> None:
    def reference(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    compare(train.swiglu, reference, 4 * random(3, 7, 96))


def dense(qkv: Tensor, groups: int, cosines: Tensor, sines: Tensor, sizes: list[int]) -> Tensor:
    """Attention with a mask, all cells computed."""
    document = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).view(len(qkv), -1)
    mask = (document[:, None, :, None] == document[:, None, None, :]).tril()
    turned, values = qkv[:, :, :-groups], qkv[:, :, -groups:]
    turned = rotate(turned, cosines, sines)
    queries, keys, values = (x.transpose(1, 2) for x in (turned[:, :, :-groups], turned[:, :, -groups:], values))
    return F.scaled_dot_product_attention(queries, keys, values, mask, enable_gqa=True).transpose(1, 2)


def rope(rows: int, length: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = 3 * random(rows, length, 1, size // 2, seed=1)
    angles = torch.cat([angles, angles], -1)
    return (1.5 * angles.cos()).to(dtype), (1.5 * angles.sin()).to(dtype)


def needs_wide_vectors() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        if not train.library(dtype).wide():  # type: ignore[union-attr]
            pytest.skip("this processor's attention is torch's")


@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 2, 64), (3, 1, 32), (2, 2, 96)])
@pytest.mark.parametrize("packed", [True, False])
def test_attention(heads: int, groups: int, size: int, packed: bool) -> None:
    needs_wide_vectors()
    rows, sizes = (1, SIZES) if packed else (2, [144, 144])
    length = sum(sizes) // rows

    def ours(qkv: Tensor) -> Tensor:
        given = rope(rows if packed else 1, length, size, qkv.dtype)
        found = train.attention(qkv, groups, given, sizes if packed else None)
        assert found is not None
        return found

    def reference(qkv: Tensor) -> Tensor:
        return dense(qkv, groups, *rope(rows if packed else 1, length, size, qkv.dtype), sizes)

    compare(ours, reference, random(rows, length, heads + 2 * groups, size))


@pytest.mark.parametrize("vocabulary", [50, 64])
@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_losses(vocabulary: int, weight: float) -> None:
    labels = torch.arange(33) % vocabulary
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3)):
        logits = [(4 * random(33, vocabulary, seed=i)).to(dtype) for i in range(2)]
        target, draft = leaves = [x.float().requires_grad_() for x in logits]
        teacher = target.detach().log_softmax(-1)
        divergence = F.kl_div(draft.log_softmax(-1), teacher, log_target=True, reduction="none").sum(-1)
        own, its = (F.cross_entropy(x, labels, reduction="none") for x in leaves)
        expected = torch.stack([own, (1 - weight) * its + weight * divergence])
        gradients = torch.autograd.grad(0.25 * expected.sum(), leaves)
        alone = logits[0].clone()
        found = train.losses_and_gradients(logits, labels, weight, 0.25)
        assert found is not None
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for gradient, wanted in zip(logits, gradients, strict=True):
            torch.testing.assert_close(gradient.float(), wanted, rtol=tolerance, atol=tolerance / 10)
        first = train.losses_and_gradients([alone], labels, weight, 0.25)
        assert first is not None
        assert torch.equal(first, found[:1])
        assert torch.equal(alone, logits[0])


def pair(dtype: torch.dtype) -> Pair:
    """A Qwen3 model, whose heads have norms, and a draft of odd sizes that only parts of the compiled code can do."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 90, "num_hidden_layers": 2, "initializer_range": 0.2, "head_dim": 32}
    target = Qwen3Config(
        **shape, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96
    )  # fmt: skip
    draft = LlamaConfig(**shape, hidden_size=40, num_attention_heads=2, num_key_value_heads=1, intermediate_size=56)
    found = Pair(GPT(target), GPT(draft), distillation=0.6)
    for weight in found.parameters():
        weight.data = weight.data.to(dtype)
    return found


def gradients(dtype: torch.dtype) -> list[Tensor]:
    """Losses, then the gradients of all weights."""
    model = pair(dtype)
    tokens = torch.randint(1, 90, (2, 140), generator=torch.Generator().manual_seed(3))
    tokens[0, [3, 90]] = END
    losses = model(tokens, END)
    return [losses.detach(), *(x.float() for x in torch.autograd.grad(losses.sum(), list(model.parameters())))]


def test_a_model_learns_the_same(torch_alone: Callable[[bool], None]) -> None:
    full, half = gradients(torch.float32), gradients(torch.bfloat16)
    torch_alone(True)
    expected, usual = gradients(torch.float32), gradients(torch.bfloat16)
    assert any(not torch.equal(found, wanted) for found, wanted in zip(full, expected, strict=True))
    for i, wanted in enumerate(expected):
        torch.testing.assert_close(full[i], wanted, rtol=1e-3, atol=1e-5)
        own, theirs = (float((x[i] - wanted).norm() / wanted.norm()) for x in (half, usual))
        assert own < 1.5 * theirs + 0.01, (i, own, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "WORTH_A_THREAD", 1)
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        try:
            qkv = random(1, sum(SIZES), 6, 32).to(dtype).requires_grad_()
            x, weight = (random(*shape).to(dtype).requires_grad_() for shape in ((200, 64), (64,)))
            norm = torch.func.functional_call(train.RMSNorm(64, eps=1e-6), {"weight": weight}, x)
            mixed = train.attention(qkv, 1, rope(1, sum(SIZES), 32, dtype), SIZES)
            outputs = [norm, train.swiglu(x)] + ([] if mixed is None else [mixed])
            leaves = [qkv, x, weight][mixed is None :]
            found.append([*outputs, *torch.autograd.grad([(y * y).sum() for y in outputs], leaves)])
        finally:
            torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_what_is_not_a_number_stays_so() -> None:
    logits = [random(2, 50), random(2, 50)]
    logits[1][1, 7] = float("nan")
    found = train.losses_and_gradients(logits, torch.tensor([1, 2]), 0.5, 1.0)
    assert found is not None
    assert found.isnan().tolist() == [[False, False], [False, True]]
    x = random(2, 64).requires_grad_()
    x.data[1, 3] = float("nan")
    assert train.swiglu(x).isnan().sum() == 1
    assert train.RMSNorm(64, eps=1e-6)(x).isnan().sum(1).tolist() == [0, 64]
    qkv = random(1, 6, 6, 32).requires_grad_()
    qkv.data[0, 3, 5] = float("nan")  # a value, seen from there on
    mixed = train.attention(qkv, 1, rope(1, 6, 32, torch.float32), None)
    assert mixed is None or mixed[:, 3:].isnan().all()


def test_torch_does_what_the_compiled_code_cannot() -> None:
    assert not isinstance(
        train.swiglu(random(2, 40).requires_grad_()).grad_fn, torch.autograd.function.BackwardCFunction
    )
    assert train.attention(random(1, 4, 3, 16).requires_grad_(), 1, rope(1, 4, 16, torch.float32), None) is None
    assert train.attention(random(1, 4, 3, 32), 1, rope(1, 4, 32, torch.float32), None) is None  # nothing to learn
    half = [x.half() for x in (random(2, 50), random(2, 50))]
    assert train.losses_and_gradients(half, torch.tensor([1, 2]), 0.5, 1.0) is None


def test_patterns_of_attention_are_kept() -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, initializer_range=0.5,
    )  # fmt: skip
    model = GPT(config, pattern=Window(4, sinks=0))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected = model(tokens)
    torch.testing.assert_close(model(tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has compiled nothing, on a machine that has kept nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    train.library.cache_clear()
    yield
    train.library.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_without_a_compiler_torch_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert train.library(torch.float32) is None
    assert all(x.isfinite().all() for x in gradients(torch.float32))


@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiler_that_fails_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.warns(FallbackWarning, match="training on CPU is slower: false cannot compile") as said:
        gradients(torch.float32)
    assert len([x for x in said if x.category is FallbackWarning]) == 1
