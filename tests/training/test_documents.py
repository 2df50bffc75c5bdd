"""Packed documents: each is computed as if it stood alone, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig

from specdec.nn.documents import Documents
from specdec.nn.gpt import GPT
from specdec.training.objective import Pair, pair_losses

VOCABULARY, END = 40, 0


def model(seed: int, heads: int) -> GPT:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=heads, num_key_value_heads=1,
        intermediate_size=24, initializer_range=0.3,
    )  # fmt: skip
    return GPT(config)


@pytest.fixture
def pair() -> Pair:
    return Pair(model(0, 2), model(1, 1), distillation=0.6)


def packed(lengths: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Rows of documents of these lengths, the end included, and the documents; a row's last has no end."""
    generator = torch.Generator().manual_seed(2)
    rows, documents = [], []
    for row in lengths:
        texts = [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in row]
        for text in texts[:-1]:
            text[-1] = END
        documents += texts
        rows.append(torch.cat(texts))
    return torch.stack(rows), documents


def test_every_document_is_trained_as_if_alone(pair: Pair) -> None:
    tokens, documents = packed([[5, 1, 2, 9], [17], [8, 9]])
    weights = list(pair.parameters())
    losses = pair(tokens, END)
    found = torch.autograd.grad(losses.sum(), weights)
    counts = [len(document) - 1 for document in documents]
    alone = [
        torch.stack(pair_losses(pair.target, pair.draft, document[None], distillation=0.6)) * (len(document) - 1)
        for document in documents
        if len(document) > 1
    ]
    expected = torch.stack(alone).sum(0) / sum(counts)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(found, torch.autograd.grad(expected.sum(), weights), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_other_documents_change_nothing(pair: Pair) -> None:
    tokens, _ = packed([[6, 11]])
    other = tokens.clone()
    other[0, :5] = 7
    with torch.no_grad():
        one, two = (pair.target(rows, documents=Documents(rows, END))[0, 6:] for rows in (tokens, other))
        assert torch.equal(one, two)
        assert not torch.allclose(pair.target(tokens)[0, 6:], pair.target(other)[0, 6:])


def test_a_row_without_an_end_is_one_document(pair: Pair) -> None:
    tokens, _ = packed([[17], [17]])
    torch.testing.assert_close(pair(tokens, END), pair(tokens))


def test_positions_restart_and_ends_are_not_learned() -> None:
    documents = Documents(torch.tensor([[3, END, 4, 5, END], [END, END, 6, 7, 8]]), END)
    assert documents.positions.tolist() == [[0, 1, 0, 1, 2], [0, 0, 0, 1, 2]]
    assert documents.sizes == [2, 3, 1, 1, 3]
    assert documents.learned.tolist() == [[True, False, True, True, False], [False, False, True, True, True]]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()"))]
)
def test_attention_is_that_of_a_mask(device: str) -> None:
    """On a GPU this runs FlexAttention, compiled."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (2, 64), generator=generator).to(device)
    documents = Documents(tokens, END)
    queries, keys, values = (torch.randn(2, 64, n, 16, generator=generator).to(device) for n in (4, 2, 2))
    mask = (documents.ids[:, None, :, None] == documents.ids[:, None, None, :]).tril()
    transposed = (x.transpose(1, 2) for x in (queries, keys, values))
    expected = F.scaled_dot_product_attention(*transposed, mask, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(documents.attend(queries, keys, values, 0.0), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        documents._attend_masked(queries, keys, values, 1e-30), expected, rtol=1e-4, atol=1e-5
    )  # what a GPU does when there is dropout
