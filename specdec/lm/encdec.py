"""Hugging Face encoder-decoders: each row's input is encoded once, when the row joins; the decoder speculates."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from specdec.errors import PromptError
from specdec.lm import probe
from specdec.lm.rowwise import RowState, RowwiseLM


@dataclass(frozen=True)
class Encoded:
    """What the encoder made of one row's input, and what the decoder must be told of that input besides."""

    outputs: Any
    others: dict[str, Tensor]


class EncoderDecoderLM(RowwiseLM):
    """The decoder of a ``PreTrainedModel`` whose encoder reads a row's source; see ``RowwiseLM`` for the rest.

    ``enter`` takes a dict of keyword tensors for one row, such as {"input_ids": [1, S], "attention_mask": [1, S]} or
    {"input_features": [1, ...]}, or {"encoder_outputs": ...} if it is encoded already.
    """

    encodes = True

    def enter(self, slot: int, source: Any) -> None:
        given = self._given(source)
        others = {name: given[name] for name in ("attention_mask",) if name in given and name in self._accepted}
        self._rows[slot].source = Encoded(self.encode(source), others)

    def free(self, rows: int) -> None:
        super().free(rows)
        for row in self._rows[rows:]:
            row.source = None

    @torch.inference_mode()
    def encode(self, source: Any) -> Any:
        """What the encoder makes of a source, or made: it may be there already. Raises ``PromptError`` for no source."""
        given = self._given(source)
        outputs = given.pop("encoder_outputs", None)
        if outputs is None:
            encoder = self.model.get_encoder()
            accepted = inspect.signature(encoder.forward).parameters
            anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
            inputs = {name: value for name, value in given.items() if anything or name in accepted}
            with self.clock.timed(), probe.evaluating(self.model):
                return encoder(**inputs, return_dict=True)
        if isinstance(outputs, Mapping):
            return outputs
        return BaseModelOutput(last_hidden_state=outputs if isinstance(outputs, Tensor) else outputs[0])

    def _given(self, source: Any) -> dict[str, Any]:
        if not isinstance(source, Mapping) or not source:
            raise PromptError(
                f"{type(self.model).__name__} reads a source: a dict of tensors of one row, such as "
                f"{{'{self.model.main_input_name}': ...}} or {{'encoder_outputs': ...}}; got {type(source).__name__}"
            )
        return {name: self._placed(value) for name, value in source.items()}

    def _placed(self, value: Any) -> Any:
        """A tensor on the model's device and, if it holds numbers and not ids, in its dtype."""
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def _inputs(self, row: RowState, tokens: Tensor, position: int) -> dict[str, Any]:
        if row.source is None:
            raise PromptError(f"{type(self.model).__name__} reads a source, and this row was given none; see enter()")
        return {"decoder_input_ids": tokens, "encoder_outputs": row.source.outputs, **row.source.others}

    def _admit(self) -> None:
        """The probe, with two rows whose encoded sources are random numbers: the encoder itself runs as it is."""
        generator = torch.Generator().manual_seed(0)
        sources = []
        for length in (5, 3):
            states = torch.randn(1, length, self._encoder_width(), generator=generator)
            mask = torch.ones(1, length, dtype=torch.long)
            sources.append({"encoder_outputs": states, "attention_mask": mask})
        self.reserve(2, 1)
        for slot, source in enumerate(sources):
            self.enter(slot, source)

        def plain(text: Tensor, row: int) -> Tensor:
            given = self._inputs(self._rows[row], text[None], 0)
            with probe.evaluating(self.model):
                logits: Tensor = self.model(**given, use_cache=False, return_dict=True).logits
            return logits[0].to(text.device)

        probe.admit(self, self.model, plain)

    def _encoder_width(self) -> int:
        config = self.model.config
        found = getattr(config.get_text_config(encoder=True), "hidden_size", None)
        return int(found or getattr(config, "hidden_size", None) or config.encoder.hidden_size)
