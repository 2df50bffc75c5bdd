"""Whether a model still has the weights that were packed: training goes on, a checkpoint is loaded into it."""

from __future__ import annotations

import weakref

from torch import nn


class PackedFrom:
    """The model that weights were taken from; it is kept by others, or gone."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._stamp = weakref.ref(model), _stamp(model)

    @property
    def has_changed(self) -> bool:
        """Whether any weight was written to, or is another tensor; not what was written through ``.data``."""
        model = self._model()
        return model is not None and _stamp(model) != self._stamp


def _stamp(model: nn.Module) -> list[tuple[int, int]]:
    """Where each weight is, and how often it was written to as autograd counts."""
    return [(p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()]
