"""Trees in one pass: every node gets the logits of its own path, and the path that is kept goes on as if read alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from test_contract import CONFIGS, DEVICE, OURS, logits_of
from torch import Tensor
from transformers import AutoModelForCausalLM

from specdec.errors import ConfigError
from specdec.lm.base import CachedLM
from specdec.lm.hf import HFLM
from specdec.tree import MOST_NODES, Branches
from toys import tiny_gpt

PARENTS = [-1, 0, 0, 1, 2, 2, 4, 5, 3]  # the last committed token's successor, and two branches
KINDS = [*OURS, "llama sdpa", "llama eager", "mistral sdpa", "qwen3 sdpa", "gemma2 eager"]
Plain = Callable[[list[int]], Tensor]


def model_of(kind: str) -> tuple[CachedLM, Plain]:
    """A model with a cache, and its logits [T, V] of a text alone."""
    if kind in OURS:
        model = tiny_gpt(61, layers=3, context=200).to(DEVICE if kind == "kernels" else "cpu")
        return OURS[kind](model), lambda text: logits_of(model, text)
    name, attention = kind.split()
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()
    return HFLM(found), lambda text: found(torch.tensor([text])).logits[0]


def paths(parents: Sequence[int]) -> list[list[int]]:
    """Places from the root to each node."""
    found: list[list[int]] = []
    for place, parent in enumerate(parents):
        found.append([*(found[parent] if parent >= 0 else []), place])
    return found


def worst(lm: CachedLM, plain: Plain, texts: list[list[int]], parents: list[list[int]], kept: list[list[int]]) -> float:
    """The largest error of a tree's logits and of what follows the kept path, rows together."""
    generator = torch.Generator().manual_seed(1)
    nodes = [torch.randint(61, (len(own),), generator=generator).tolist() for own in parents]
    width = max(map(len, nodes))
    lm.reserve(len(texts), 60)
    lm.fill(texts)
    padded = torch.tensor([[*own, *[0] * (width - len(own))] for own in nodes])
    logits = lm.append(padded, [len(own) for own in nodes], parents=parents)
    errors = []
    for b, text in enumerate(texts):
        for place, path in enumerate(paths(parents[b])):
            expected = plain(text + [nodes[b][i] for i in path])[-1]
            errors.append((logits[b, place] - expected).abs().max())
    lm.keep([len(path) for path in kept], paths=kept)
    after = lm.append(torch.tensor([[7, 8]] * len(texts)))
    for b, text in enumerate(texts):
        expected = plain([*text, *(nodes[b][i] for i in kept[b]), 7, 8])[-2:]
        errors.append((after[b] - expected).abs().max())
    return float(max(errors))


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_nodes_and_what_follows_the_kept_path(kind: str) -> None:
    lm, plain = model_of(kind)
    assert lm.reads_trees
    texts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11]]
    parents = [PARENTS, [-1, 0, 1, 0], PARENTS[:6]]
    assert worst(lm, plain, texts, parents, [[0, 2, 5, 7], [0, 3], [0]]) < 3e-4


@torch.inference_mode()
def test_a_tree_over_the_border_of_two_blocks() -> None:
    for length in (60, 63, 64):
        lm, plain = model_of("compiled")
        assert (
            worst(lm, plain, [list(range(length % 61)) + [5] * (length - length % 61)], [PARENTS], [[0, 2, 4, 6]])
            < 3e-4
        )


@pytest.mark.parametrize("planted", ["parent", "path"])
@torch.inference_mode()
def test_a_wrong_parent_or_path_is_seen(planted: str) -> None:
    """The negative control: one index that is off by one."""
    lm, plain = model_of("compiled")
    read, keep = lm.append, lm.keep
    if planted == "parent":
        lm.append = (
            lambda tokens, *rest, parents=None: read(  # type: ignore[method-assign]
                tokens, *rest, parents=None if parents is None else [[*parents[0][:-1], parents[0][-1] - 1]]
            )
        )
    else:
        lm.keep = (
            lambda counts, first=0, paths=None: keep(  # type: ignore[method-assign]
                counts, first=first, paths=None if paths is None else [[*paths[0][:-1], paths[0][-1] - 1]]
            )
        )
    assert worst(lm, plain, [[1, 2, 3]], [PARENTS], [[0, 2, 5, 7]]) > 1e-2


@pytest.mark.parametrize("kind", [*OURS, "llama sdpa"])
@torch.inference_mode()
def test_trees_grow_in_several_passes_behind_a_chain(kind: str) -> None:
    lm, plain = model_of(kind)
    lm.reserve(1, 40)
    lm.append(torch.tensor([[3, 4]]))
    lm.append(torch.tensor([[5, 6]]), parents=[[1, 1]])
    logits = lm.append(torch.tensor([[7, 8]]), parents=[[3, 2]])
    torch.testing.assert_close(logits[0, 0], plain([3, 4, 6, 7])[-1], rtol=1e-4, atol=3e-4)
    torch.testing.assert_close(logits[0, 1], plain([3, 4, 5, 8])[-1], rtol=1e-4, atol=3e-4)


@pytest.mark.parametrize("kind", [*OURS, "llama sdpa"])
@torch.inference_mode()
def test_features_are_those_of_committed_tokens(kind: str) -> None:
    lm, _ = model_of(kind)
    layers = lm.feature_layers
    lm.tap(range(layers))
    lm.reserve(2, 60)
    lm.fill([[1, 2, 3, 4], [5]])
    lm.append(torch.tensor([[6, 7, 8], [9, 10, 11]]))
    lm.keep([2, 1])
    lm.append(torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), [4, 2], parents=[[-1, 0, 0, 2], [-1, -1]])
    lm.keep([3, 1], paths=[[0, 2, 3], [1]])
    texts = [[1, 2, 3, 4, 6, 7, 1, 3, 4], [5, 9, 2]]
    for slot, text in enumerate(texts):
        found = lm.take_features(slot)
        again, _ = model_of(kind)
        again.tap(range(layers))
        again.reserve(1, 60)
        again.fill([text])
        expected = again.take_features(0)
        assert found.shape == (len(text), layers * lm.feature_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert not len(lm.take_features(slot))


@torch.inference_mode()
def test_features_follow_rows() -> None:
    lm, _ = model_of("compiled")
    lm.tap([0, 1])
    lm.reserve(3, 20)
    lm.fill([[1, 2, 3]])
    lm.copy(0, 2, 2)
    lm.copy(0, 1)
    assert [len(lm.take_features(slot)) for slot in (0, 1, 2)] == [3, 3, 2]
    lm.fill([[4]])
    lm.restart(0, 0)
    assert len(lm.take_features(0)) == 0


@torch.inference_mode()
def test_features_of_layers_are_those_of_hugging_face() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]()).eval()
    lm = HFLM(model)
    lm.tap([0])
    lm.reserve(1, 10)
    lm.fill([[1, 2, 3]])
    expected = model(torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[1][0]
    torch.testing.assert_close(lm.take_features(0), expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_tapped_is_said() -> None:
    lm, _ = model_of("compiled")
    for wrong in ([], [2], [-1]):
        with pytest.raises(ConfigError, match="0 to 1; got"):
            lm.tap(wrong)


def test_a_tree_has_an_end() -> None:
    with pytest.raises(AssertionError, match="at most 63"):
        Branches().grow([-1] * (MOST_NODES + 1))
