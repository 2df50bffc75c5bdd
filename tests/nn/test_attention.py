"""Every pattern computes what its dense reference says, whole or token by token, and lets nothing see the future."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdec.lm.native import NativeLM, native_lm
from specdec.nn.attention import (
    BLOCK,
    Axial,
    BigBird,
    Full,
    Hierarchical,
    Linear,
    LowRank,
    Pattern,
    Pooled,
    Window,
)  # fmt: skip
from specdec.nn.gpt import GPT
from toys import tiny_gpt

HEAD = 16
MAKERS: dict[str, Callable[[], Pattern]] = {
    "full": Full,
    "window": lambda: Window(40, sinks=3),
    "longer window": lambda: Window(150, sinks=70),
    "no sinks": lambda: Window(64, sinks=0),
    "bigbird": lambda: BigBird(70, sinks=10, random=2),
    "axial": lambda: Axial(24),
    "pooled": lambda: Pooled(8),
    "low rank": lambda: LowRank(4),
    "hierarchical": lambda: Hierarchical(2),
    "linear": lambda: Linear("elu", head_size=HEAD),
    "random features": lambda: Linear("random", size=32, head_size=HEAD),
}
every_pattern = pytest.mark.parametrize("name", list(MAKERS))


def tensors(length: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, length, HEAD, generator=generator, requires_grad=True) for _ in range(3)]


def positions(length: int) -> Tensor:
    return torch.arange(length).expand(2, -1)


@every_pattern
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_whole_texts_are_the_dense_reference(name: str, length: int) -> None:
    pattern, given = MAKERS[name](), tensors(length)
    found, expected = pattern.attend(*given), pattern.reference(*given, positions(length))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * weights).sum(), given)
    theirs = torch.autograd.grad((expected * weights).sum(), given)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@every_pattern
def test_tokens_that_come_one_by_one_see_the_same(name: str) -> None:
    pattern = MAKERS[name]()
    queries, keys, values = (x.detach() for x in tensors(200))
    whole = pattern.attend(queries, keys, values)
    for end in (1, 64, 65, 129, 200):
        last = pattern.reference(
            queries[:, :, end - 1 : end], keys[:, :, :end], values[:, :, :end], torch.full((2, 1), end - 1)
        )
        torch.testing.assert_close(last[:, :, 0], whole[:, :, end - 1], rtol=1e-4, atol=1e-5)


@every_pattern
def test_nothing_sees_the_future(name: str) -> None:
    pattern = MAKERS[name]()
    first, other = ([x.detach() for x in tensors(200, seed)] for seed in (0, 1))
    mixed = [torch.cat([a[:, :, :130], b[:, :, 130:]], dim=2) for a, b in zip(first, other, strict=True)]
    torch.testing.assert_close(pattern.attend(*mixed)[:, :, :130], pattern.attend(*first)[:, :, :130])


def test_a_leak_is_seen() -> None:
    """The negative control: means over the whole text, as in an encoder, change with what comes later."""

    class Leaky(Pooled):
        def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            return super().attend(queries, keys, values + values.mean(2, keepdim=True))

    first, other = ([x.detach() for x in tensors(200, seed)] for seed in (0, 1))
    mixed = [torch.cat([a[:, :, :130], b[:, :, 130:]], dim=2) for a, b in zip(first, other, strict=True)]
    assert (Leaky().attend(*mixed)[:, :, :130] - Leaky().attend(*first)[:, :, :130]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["linear", "random features"])
def test_a_state_is_all_that_linear_attention_remembers(name: str) -> None:
    pattern = MAKERS[name]()
    assert isinstance(pattern, Linear)
    queries, keys, values = (x.detach() for x in tensors(100))
    state = torch.zeros(2, 3, pattern.map(keys).shape[-1], HEAD + 1)
    whole = pattern.attend(queries, keys, values)
    for i in range(100):
        state, found = pattern.step(state, queries[:, :, i], keys[:, :, i], values[:, :, i])
        torch.testing.assert_close(found, whole[:, :, i], rtol=1e-3, atol=1e-4)


def test_random_features_approach_softmax() -> None:
    given = [x.detach() * 0.5 for x in tensors(60)]
    expected = Full().attend(*given)
    errors = [float((Linear("random", size, HEAD).attend(*given) - expected).abs().mean()) for size in (4, 2048)]
    assert errors[1] < 0.5 * errors[0]


@every_pattern
def test_scores_grow_more_slowly_than_those_of_full_attention(name: str) -> None:
    pattern = MAKERS[name]()
    ratio = pattern.scores(32 * BLOCK) / pattern.scores(8 * BLOCK)
    if name == "full":
        assert ratio == pytest.approx(16, rel=0.01)
    else:
        assert ratio < 12 and pattern.scores(64 * BLOCK) < Full().scores(64 * BLOCK)


@every_pattern
@torch.inference_mode()
def test_a_gpt_with_a_pattern_decodes_what_it_computes_whole(name: str) -> None:
    """Token by token, in drafts that are refused, through the cache of the engine."""
    pattern = Linear("elu", head_size=8) if "linear" in name or "random" in name else MAKERS[name]()
    torch.manual_seed(0)
    model = GPT(tiny_gpt(0).config, pattern=pattern).eval()
    lm, text = native_lm(model), [(7 * i) % 61 for i in range(140)]
    assert isinstance(lm, NativeLM)
    expected = model.lm_head(model(torch.tensor([text])))[0]
    lm.reserve(1, 160)
    lm.fill([text[:126]])
    lm.append(torch.tensor([[1, 2, 3, 4]]))
    lm.keep([0])
    found = [lm.append(torch.tensor([text[126:131]]))[0]]
    lm.keep([5])
    found.append(lm.append(torch.tensor([text[131:]]))[0])
    torch.testing.assert_close(torch.cat(found), expected[126:], rtol=1e-3, atol=2e-4)
