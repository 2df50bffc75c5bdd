"""Make a trained Llama checkpoint wider without changing what it computes: a large model's cost, a small one's text.

python -m specdec.widen SOURCE_DIR OUT_DIR --hidden-size 2048 --intermediate-size 8704

Speed of a large model can so be measured honestly where none can be downloaded: every weight is read and multiplied,
the text and therefore the acceptance of drafts are those of the trained pair. Added channels of the residual stream
hold zeros; added heads and MLP channels are computed and then multiplied by zeros. RMSNorm averages over all channels,
so its weights shrink by sqrt(h / H) and its epsilon by h / H for h channels that became H.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from specdec.errors import ConfigError

Layout = tuple[int, int, int]  # groups, heads in each group, channels of each head


@dataclass(frozen=True)
class Width:
    """The sizes of a widened model; the default makes about 520 M parameters of the demo's target.

    heads and groups None: heads of the source's size, as many as fill ``hidden_size``, about four to a
    key/value head.
    """

    hidden_size: int = 2048
    intermediate_size: int = 8704
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None

    def of(self, source: LlamaConfig) -> LlamaConfig:
        """``source`` with these sizes. Raises ``ConfigError`` where it would have to shrink."""
        heads = self.num_attention_heads or max(source.num_attention_heads, self.hidden_size // source.head_dim)
        ratio = source.num_attention_heads // source.num_key_value_heads
        possible = [n for n in range(source.num_key_value_heads, heads // ratio + 1) if heads % n == 0]
        nearest = min(possible, key=lambda n: abs(heads / n - 4), default=source.num_key_value_heads)
        groups = self.num_key_value_heads or nearest
        shrink = self.hidden_size / source.hidden_size
        config = LlamaConfig.from_dict(source.to_dict())
        config.update(
            {
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_attention_heads": heads,
                "num_key_value_heads": groups,
                "head_dim": source.head_dim,
                "rms_norm_eps": source.rms_norm_eps / shrink,
            }
        )
        _check(source, config)
        return config


def _check(source: LlamaConfig, wide: LlamaConfig) -> None:
    for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
        least, given = getattr(source, name), getattr(wide, name)
        if given < least:
            raise ConfigError(f"{name} must be at least the source's {least}, got {given}; widening cannot shrink")
    heads, groups = wide.num_attention_heads, wide.num_key_value_heads
    least = source.num_attention_heads // source.num_key_value_heads
    if heads % groups or heads // groups < least:
        raise ConfigError(
            f"num_attention_heads must be a multiple of num_key_value_heads, and at least {least} times as many, "
            f"as in the source; got {heads} and {groups}"
        )
    if source.attention_bias or source.mlp_bias:
        raise ConfigError("widening is for checkpoints without biases in attention or MLP, and this one has some")


def widen_state(
    state: dict[str, Tensor], source: LlamaConfig, wide: LlamaConfig, *, rescale_norms: bool = True, seed: int = 0
) -> dict[str, Tensor]:
    """The ``LlamaForCausalLM`` state dict ``state`` of ``source`` in the sizes of ``wide``: the same logits.

    Without ``rescale_norms`` they differ; that is for tests to see.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = math.sqrt(source.hidden_size / wide.hidden_size) if rescale_norms else 1.0
    result = {}
    for name, old in state.items():
        if name.endswith("rotary_emb.inv_freq"):  # of old checkpoints; the configuration determines it
            continue
        if name.endswith("norm.weight"):
            new = torch.full((wide.hidden_size,), scale, dtype=old.dtype)
            new[: len(old)] = old * scale
        else:
            new = _widen_matrix(name, old, source, wide, generator)
        result[name] = new
    return result


def _widen_matrix(name: str, old: Tensor, source: LlamaConfig, wide: LlamaConfig, generator: torch.Generator) -> Tensor:
    """``old`` in a larger matrix. Added rows and columns are random, or zero where something could come through."""
    rows, columns = (_places(size, name, source, wide) for size in ("out", "in"))
    new = torch.empty(rows[1], columns[1], dtype=old.dtype).normal_(std=source.initializer_range, generator=generator)
    if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
        # They write to the residual stream: nothing goes into added channels, nothing comes from added heads.
        new.zero_()
    new[rows[0].unsqueeze(1), columns[0]] = old
    return new


def _places(size: str, name: str, source: LlamaConfig, wide: LlamaConfig) -> tuple[Tensor, int]:
    """Where the old rows ("out") or columns ("in") of a weight go in the new one, and how many the new one has."""
    kind = name.split(".")[-2]
    axes = {
        "embed_tokens": ("vocabulary", "hidden"), "lm_head": ("vocabulary", "hidden"),
        "q_proj": ("heads", "hidden"), "k_proj": ("groups", "hidden"), "v_proj": ("groups", "hidden"),
        "o_proj": ("hidden", "heads"), "gate_proj": ("inner", "hidden"), "up_proj": ("inner", "hidden"),
        "down_proj": ("hidden", "inner"),
    }  # fmt: skip
    if kind not in axes:
        raise ConfigError(f"weight {name!r} is none of a Llama's; widening knows {', '.join(axes)} and norms")
    axis = axes[kind][0 if size == "out" else 1]
    if axis == "vocabulary":
        return torch.arange(source.vocab_size), source.vocab_size
    if axis == "hidden":
        return torch.arange(source.hidden_size), wide.hidden_size
    if axis == "inner":
        return torch.arange(source.intermediate_size), wide.intermediate_size
    old, new = _layout(source, axis), _layout(wide, axis)
    # Query heads stay with the key/value head that they had.
    return torch.arange(math.prod(new)).view(new)[: old[0], : old[1]].flatten(), math.prod(new)


def _layout(config: LlamaConfig, axis: str) -> Layout:
    groups = config.num_key_value_heads
    return groups, (config.num_attention_heads // groups if axis == "heads" else 1), config.head_dim


def widen(source: Path, out: Path, width: Width | None = None, *, dtype: str = "bfloat16") -> int:
    """Write the checkpoint ``source`` widened to the folder ``out``, tokenizer included; its number of parameters.

    Raises ``ConfigError`` for sizes smaller than the source's, and for checkpoints that are not a plain Llama's.
    """
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError(f"the widened checkpoint must go to another folder than its source {source}")
    config = LlamaConfig.from_pretrained(source)
    if config.model_type != "llama":
        raise ConfigError(f"{source} is a checkpoint of type {config.model_type!r}; widening knows 'llama'")
    wide = (width or Width()).of(config)
    wide.dtype = dtype
    state: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        state.update(load_file(file))
    new = {name: tensor.to(getattr(torch, dtype)) for name, tensor in widen_state(state, config, wide).items()}
    out.mkdir(parents=True, exist_ok=True)
    for file in (*source.glob("token*"), *source.glob("special_tokens*"), *source.glob("generation_config.json")):
        shutil.copy(file, out)
    save_file(new, out / "model.safetensors", metadata={"format": "pt"})
    # Last, because a folder with a configuration is taken for a whole checkpoint.
    wide.save_pretrained(out)
    return sum(tensor.numel() for tensor in new.values())


def wide_pair(pair: Path, width: Width | None = None) -> tuple[Path, Path]:
    """Directories of the pair's target, widened (made on the first call), and of its draft as it is."""
    width = width or Width()
    sizes = width.of(LlamaConfig.from_pretrained(pair / "target"))
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    target = pair / ("wide-" + "-".join(str(getattr(sizes, name)) for name in names))
    if not (target / "config.json").is_file():
        widen(pair / "target", target, width)
    return target, pair / "draft"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("source", type=Path, metavar="SOURCE_DIR")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    parser.add_argument("--hidden-size", type=int, default=Width.hidden_size)
    parser.add_argument("--intermediate-size", type=int, default=Width.intermediate_size)
    parser.add_argument("--num-attention-heads", type=int)
    parser.add_argument("--num-key-value-heads", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    given = parser.parse_args()
    sizes = (given.hidden_size, given.intermediate_size, given.num_attention_heads, given.num_key_value_heads)
    try:
        parameters = widen(given.source, given.out, Width(*sizes), dtype=given.dtype)
    except ConfigError as error:
        parser.error(str(error))
    sys.stdout.write(json.dumps({"out": str(given.out), "parameters": parameters}) + "\n")


if __name__ == "__main__":
    main()
