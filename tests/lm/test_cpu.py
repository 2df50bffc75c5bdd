"""The compiled pass: the same bits whatever is read together, blocks that rows share and give back, and its fall-backs."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ragged import Checked, random_walk
from torch import Tensor

from specdec import Engine
from specdec import compiled as compiler
from specdec.drafters.model import ModelDrafter
from specdec.errors import FallbackWarning, PromptError
from specdec.lm.base import CachedLM
from specdec.lm.cpu import MOST_TOKENS, CpuLM
from specdec.lm.native import NativeLM, native_lm
from specdec.lm.paged import BLOCK, PagedCache
from specdec.machine import instructions
from specdec.nn import cpu, onednn
from specdec.nn.compiled import VARIANTS
from specdec.nn.gpt import GPT
from toys import tiny_gpt

CONTEXT = 512


def model(dtype: torch.dtype = torch.bfloat16, heads: tuple[int, int] = (4, 2)) -> GPT:
    """A tiny GPT whose rotary frequencies stay float32, as ``load`` leaves them."""
    gpt = tiny_gpt(0, context=CONTEXT, heads=heads)
    for weight in gpt.parameters():
        weight.data = weight.data.to(dtype)
    return gpt


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(seed))


def one_by_one(lm: CachedLM, tokens: Tensor) -> Tensor:
    """Logits [T, V] of a text [1, T] read token by token."""
    lm.reserve(1, tokens.shape[1])
    found = []
    for i in range(tokens.shape[1]):
        found.append(lm.append(tokens[:, i : i + 1])[0, 0])
        lm.keep([1])
    lm.free(0)
    return torch.stack(found)


@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (7, 1)])  # a token's queries of a group are multiplied together
@pytest.mark.parametrize("dtype", VARIANTS)
def test_logits_are_the_same_bits_however_tokens_are_read(dtype: torch.dtype, heads: tuple[int, int]) -> None:
    lm, tokens = CpuLM(model(dtype, heads)), text(2 * BLOCK + 9)
    alone = one_by_one(lm, tokens)

    lm.reserve(3, CONTEXT)
    at_once = lm.append(tokens)[0]
    lm.free(0)
    assert torch.equal(at_once, alone)
    for count in range(2, 34):  # tokens share a reading of the weights in other groups
        assert torch.equal(lm.append(tokens[:, :count])[0], alone[:count]), count
        lm.free(0)

    others = [text(n, seed=n)[0].tolist() for n in (5, 90)]
    lm.fill([others[0], tokens[0, :70].tolist(), others[1]])
    padded = torch.cat([text(3, seed=1), tokens[:, 70:73], text(3, seed=2)])
    assert torch.equal(lm.append(padded, [1, 3, 2])[1], alone[70:73])


@pytest.mark.parametrize("dtype", VARIANTS)
def test_threads_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also more of them than there are processors; each pass is read several times, as a race is seldom lost."""
    lm, tokens = CpuLM(model(dtype)), text(2 * BLOCK + 9)

    def logits(rows: int, count: int) -> Tensor:
        found = lm.append(tokens[:, :count].expand(rows, -1))
        lm.keep([0] * rows)
        return found

    lm.reserve(3, CONTEXT)
    passes = ((1, 1), (1, 5), (3, 40))
    alone = [logits(*read) for read in passes]
    for threads in (2, 3, 7):
        monkeypatch.setattr(cpu, "threads_for", lambda multiplications, threads=threads: threads)
        for read, expected in zip(passes, alone, strict=True):
            assert all(torch.equal(logits(*read), expected) for _ in range(20)), (threads, read)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}])
def test_the_default_dtype_of_torch_changes_nothing(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    engine = Engine(CpuLM(model()), ModelDrafter(CpuLM(model(heads=(4, 4)))))

    def found() -> list[list[list[int]]]:
        given = {"max_new_tokens": 24, **settings}
        return [engine.generate([[5, 9], [3]], num_draft_tokens=count, **given).token_ids for count in (0, 3)]

    expected = found()
    torch.set_default_dtype(dtype)
    try:
        assert found() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_other_decoder_does_not_give_the_same_bits() -> None:
    """Otherwise the equalities above would prove nothing."""
    lm, tokens = NativeLM(model(torch.float32)), text(2 * BLOCK + 9)
    lm.reserve(1, CONTEXT)
    at_once = lm.append(tokens)[0]
    lm.free(0)
    assert not torch.equal(one_by_one(lm, tokens), at_once)


def test_more_tokens_than_one_pass_takes_are_read_in_several() -> None:
    lm, tokens = CpuLM(model()), text(MOST_TOKENS + 100)
    lm.reserve(2, CONTEXT)
    at_once = lm.append(tokens.expand(2, -1), [MOST_TOKENS + 100, MOST_TOKENS - 1])
    lm.free(0)
    alone = one_by_one(lm, tokens)
    assert torch.equal(at_once[0], alone) and torch.equal(at_once[1, : MOST_TOKENS - 1], alone[: MOST_TOKENS - 1])


def test_memory_is_what_lengths_sum_up_to() -> None:
    lm = CpuLM(model())
    lm.reserve(4, CONTEXT)
    lengths = (3 * BLOCK, 1, BLOCK + 1, 10)
    lm.fill([text(n)[0].tolist() for n in lengths])
    assert [len(row) for row in lm.cache.rows] == [-(-n // BLOCK) for n in lengths]
    lm.copy(3, 0)
    lm.free(3)
    assert [len(row) for row in lm.cache.rows] == [1, 1, 2, 0]


def test_rows_share_full_blocks_and_write_only_into_their_own() -> None:
    tokens = text(2 * BLOCK + 5)
    lm = CpuLM(model())
    expected = one_by_one(lm, tokens)
    lm.reserve(3, CONTEXT)
    lm.fill([tokens[0, :-1].tolist()])
    lm.copy(0, 1, 2 * BLOCK)  # a sample of the same prompt, which goes on differently
    lm.copy(0, 2)
    assert all(lm.cache.rows[0][i] is lm.cache.rows[2][i] for i in (0, 1))
    assert lm.cache.rows[0][2] is not lm.cache.rows[2][2]
    lm.append(text(3, seed=9).expand(3, -1))
    lm.keep([0, 3, 3])
    lm.restart(2, 0)
    lm.fill([text(2 * BLOCK, seed=8)[0].tolist()], first=2)  # anew, over what it shared
    assert torch.equal(lm.append(tokens[:, -1:])[0, 0], expected[-1])


def test_a_row_that_forgets_committed_tokens_leaves_alone_what_is_remembered() -> None:
    tokens = text(2 * BLOCK + 5)
    lm = CpuLM(model())
    expected = one_by_one(lm, tokens)
    lm.reserve(2, CONTEXT)
    lm.fill([tokens[0, :-1].tolist()])
    lm.remember(0, tokens[0].tolist())
    lm.copy(0, 0, BLOCK + 3)
    lm.append(text(9, seed=9))
    lm.keep([9])
    lm.recall(1, tokens[0, :-1].tolist())
    assert torch.equal(lm.append(tokens[:, 2 * BLOCK :], first=1)[0, -1], expected[-1])
    lm.copy(0, 0, BLOCK + 3)
    assert torch.equal(lm.append(tokens[:, BLOCK + 3 :])[0, -1], expected[-1])


def test_a_text_that_was_read_before_is_not_read_again() -> None:
    tokens = text(2 * BLOCK + 20)
    lm = CpuLM(model())
    expected = one_by_one(lm, tokens)
    lm.reserve(1, CONTEXT)
    lm.fill([tokens[0, :-1].tolist()])
    lm.remember(0, tokens[0].tolist())
    lm.free(0)
    assert lm.lengths == [0]

    lm.recall(0, tokens[0, :-1].tolist())
    assert lm.lengths == [2 * BLOCK]
    assert torch.equal(lm.append(tokens[:, 2 * BLOCK :])[0, -1], expected[-1])
    lm.free(0)

    other = tokens.clone()
    other[0, BLOCK + 1] = (other[0, BLOCK + 1] + 1) % 61
    lm.recall(0, other[0].tolist())
    assert lm.lengths == [BLOCK]
    lm.free(0)
    lm.recall(0, text(2 * BLOCK, seed=3)[0].tolist())
    assert lm.lengths == [0]


def test_what_is_remembered_is_bounded_and_the_longest_unused_goes_first() -> None:
    cache = PagedCache(8, torch.float32, remembered_bytes=3 * 8 * 4)
    cache.reserve(1)
    texts = [[seed] * BLOCK for seed in range(4)]
    for number, tokens in enumerate(texts):
        cache.extend(0, BLOCK)
        cache.remember(0, tokens)
        cache.drop(0)
        if number == 2:
            assert len(cache.recall(0, texts[0])) == 1  # used again
            cache.drop(0)
    assert [len(cache.recall(0, tokens)) for tokens in texts] == [1, 0, 1, 1]


def test_products_of_onednn_give_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    gpt = model(torch.float32)
    monkeypatch.setattr(onednn, "LEAST_TIMED", 0)
    monkeypatch.setattr(onednn, "_crossover", lambda library, linear: 2)
    lm = CpuLM(gpt)
    assert lm._others is not None
    checked = Checked(lm, lambda row: gpt.lm_head(gpt(torch.tensor([row])))[0], tolerance=1e-5)
    random_walk(checked, steps=20, seed=0)

    lm.free(0)
    calls = []
    monkeypatch.setattr(lm._others, "forward", lambda *given: calls.append(given))
    lm.append(text(1))
    assert not calls
    lm.append(text(2))
    assert calls


def test_onednn_is_used_where_it_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = torch.nn.Linear(64, 64, bias=False)
    library = cpu.kernels(torch.float32)
    assert library is not None
    for others, expected in ((0.9, None), (0.5, onednn.TRIED_TOKENS[0])):
        seconds = iter([1.0, others] * len(onednn.TRIED_TOKENS))
        monkeypatch.setattr(onednn, "_seconds", lambda function, seconds=seconds: next(seconds))
        assert onednn._crossover(library, linear) == expected


NEEDED = {
    "x86-64": set(),
    "haswell": {"avx2", "fma"},
    "skylake-avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
LANES = {"x86-64": 4, "haswell": 8, "skylake-avx512": 16}


@pytest.fixture(params=NEEDED)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What is compiled is compiled for an older processor than this one."""
    name = request.param
    if platform.machine() != "x86_64" or not NEEDED[name] <= set(instructions().split()):
        pytest.skip(f"this processor cannot do what {name} can")
    flags = (flag for flag in compiler.FLAGS if not flag.startswith("-march"))
    monkeypatch.setattr(compiler, "FLAGS", (*flags, f"-march={name}"))
    cpu.kernels.cache_clear()
    yield name
    cpu.kernels.cache_clear()


@pytest.mark.parametrize("in_bytes", (False, True))
@pytest.mark.parametrize("dtype", VARIANTS)
def test_registers_of_any_width_give_the_same_logits(dtype: torch.dtype, in_bytes: bool, processor: str) -> None:
    tokens, few = text(2 * BLOCK + 9), (2, 3, 5, 6, 7, 12, 13, 31)
    lm = CpuLM(model(dtype), in_bytes=in_bytes)
    found = one_by_one(lm, tokens)
    assert lm._library.lanes() == LANES[processor]
    for count in few:
        assert torch.equal(lm.append(tokens[:, :count])[0], found[:count]), count
        lm.free(0)

    torch_reads = NativeLM(rounded(model(dtype)) if in_bytes else model(dtype).float())
    torch_reads.reserve(1, CONTEXT)
    expected = torch_reads.append(tokens)[0]
    close = {"rtol": 0.0, "atol": 1e-4 if dtype == torch.float32 else 0.6}
    torch.testing.assert_close(found, expected, **close)

    lm._packed.struct.layer[0].o.weight = lm._packed.struct.layer[1].o.weight  # the control
    with pytest.raises(AssertionError):
        torch.testing.assert_close(one_by_one(lm, tokens), expected, **close)


def rounded(gpt: GPT) -> GPT:
    """In float32, with every product's weight rounded as bytes round it."""
    gpt = gpt.float()
    for module in gpt.modules():
        if isinstance(module, torch.nn.Linear):
            scale = module.weight.detach().abs().amax(dim=1, keepdim=True) / 63
            module.weight.data = (module.weight / scale).round() * scale
    return gpt


def test_an_unknown_token_is_refused_before_anything_is_read() -> None:
    lm = CpuLM(model())
    lm.reserve(1, 8)
    for token in (61, -1):
        with pytest.raises(PromptError, match="from 0 to 60"):
            lm.append(torch.tensor([[3, token]]))


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has compiled nothing, on a machine that has kept nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu.kernels.cache_clear()
    yield
    cpu.kernels.cache_clear()


@pytest.mark.usefixtures("no_library")
def test_without_a_compiler_torch_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert isinstance(native_lm(model()), NativeLM)


@pytest.mark.usefixtures("no_library")
def test_a_compiler_that_fails_is_said_and_torch_runs_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.warns(FallbackWarning, match="false cannot compile"):
        assert isinstance(native_lm(model()), NativeLM)


@pytest.mark.usefixtures("no_library")
def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(native_lm(model()), CpuLM)
    assert len(list((tmp_path / "specdec/kernels").iterdir())) == 1
    cpu.kernels.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # not asked again
    assert isinstance(native_lm(model()), CpuLM)


def test_dtypes_that_are_not_compiled_run_on_torch() -> None:
    assert isinstance(native_lm(model(torch.float16)), NativeLM)
