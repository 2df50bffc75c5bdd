"""Names and paths become models and tokenizers: checkpoints load whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specdec.errors import CheckpointError, ConfigError, ModelError
from specdec.limit import weight_bytes
from specdec.lm.base import CachedLM
from specdec.lm.cpu import CpuLM
from specdec.lm.hf import hf_lm
from specdec.lm.native import native_lm
from specdec.machine import fast_dtype
from specdec.nn.gpt import GPT, Config, state_from_hf, why_unsupported
from specdec.nn.lstm import LSTM, holds_lstm

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")

ModelLike = str | Path | nn.Module | CachedLM
TokenizerLike: TypeAlias = str | Path | PreTrainedTokenizerBase


def load_lm(model: ModelLike, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> CachedLM:
    """A model with a cache: ours for every checkpoint it can run, Hugging Face's own code for all others."""
    if isinstance(model, CachedLM):
        return model
    return lm_of(load_module(model, dtype=dtype, device=device), in_bytes=is_rounded(model, dtype))


def is_rounded(model: ModelLike, dtype: torch.dtype | None) -> bool:
    """Whether ``dtype`` asks for weights in bytes; models that come as objects stay as they are."""
    return dtype is torch.int8 and isinstance(model, str | Path)


def lm_of(model: nn.Module, *, in_bytes: bool = False) -> CachedLM:
    """``model`` with a cache; ``in_bytes`` rounds its weights to a byte each, which may change ``model``."""
    check_finite(model)
    size = weight_bytes(model)
    lm = _in_bytes(model) if in_bytes else _as_it_is(model)
    lm.weight_bytes, lm.in_bytes = size // next(model.parameters()).itemsize if in_bytes else size, in_bytes
    return lm


def _as_it_is(model: nn.Module) -> CachedLM:
    if isinstance(model, GPT | LSTM):
        return native_lm(model)
    if isinstance(model, PreTrainedModel):
        return hf_lm(model)
    raise _no_model(model)


def _in_bytes(model: nn.Module) -> CachedLM:
    """Compiled where that is possible, else by torchao."""
    if isinstance(model, GPT):
        try:
            return CpuLM(model, in_bytes=True)
        except LookupError:
            pass
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ConfigError(
            f"dtype 'int8' for a {type(model).__name__} on {next(model.parameters()).device} needs torchao: "
            "pip install 'specdec[quantized]', or take another dtype"
        ) from error
    quantize_(model, Int8WeightOnlyConfig())
    return _as_it_is(model)


def load_module(
    model: str | Path | nn.Module, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> nn.Module:
    """A model's weights, from a checkpoint or as they are given; None for a dtype is the checkpoint's own."""
    if isinstance(model, nn.Module):
        return model
    if not isinstance(model, str | Path):
        raise _no_model(model)
    device = device or torch.device("cpu")
    dtype = fast_dtype(device) if dtype is torch.int8 else dtype  # what is not rounded
    return _load_model(checkpoint_directory(str(model)), dtype).to(device)


def load_model(
    name: str | Path, *, dtype: str = "auto", device: str = "auto"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A checkpoint's model, without a cache, and its tokenizer; arguments and errors are those of ``load``."""
    wanted = dtype_named(dtype)
    if wanted is torch.int8:
        raise ConfigError("dtype 'int8' is for decoding; take float32 or bfloat16 here")
    model = _load_model(checkpoint_directory(str(name)), wanted).to(device_named(device))
    check_finite(model)
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer next to its weights; save it there (tokenizer.json)")
    return model, tokenizer


def _no_model(given: object) -> ConfigError:
    return ConfigError(
        "a model must be a path, a hub id, a transformers PreTrainedModel, a specdec GPT or a CachedLM, "
        f"got {type(given).__name__}"
    )


def load_gpt(directory: Path, config: Config, dtype: torch.dtype | None = None) -> GPT:
    """Our GPT with the weights of a checkpoint; every weight must be there, and no other."""
    state: dict[str, torch.Tensor] = {}
    for file in _weight_files(directory):
        try:
            state.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error}); restore it from its source") from error
    with torch.device("meta"):
        model = GPT(config)
    try:
        model.load_state_dict(state_from_hf(state, config), assign=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{directory} does not hold the weights that its config.json describes: {error}"
        ) from error
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.requires_grad_(False)
    return model.to(dtype) if dtype is not None else model


def check_finite(model: nn.Module) -> None:
    """Raise ``ModelError`` naming the first weight that holds NaN or infinity.

    Weights that are elsewhere (offloaded) or whose type cannot be asked (quantized) are left to the probe.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not tensor.is_meta and not _is_finite(tensor.detach()):
            raise ModelError(
                f"weight {name!r} holds NaN or infinity; expected finite numbers. "
                "The checkpoint is broken or was converted to a dtype too narrow for it: load another one"
            )


def _is_finite(tensor: torch.Tensor) -> bool:
    try:
        return bool(torch.isfinite(tensor.sum(dtype=torch.float32))) or bool(torch.isfinite(tensor).all())
    except NotImplementedError:  # by a tensor of another library
        return True


def find_tokenizer(model: object) -> PreTrainedTokenizerBase | None:
    """The tokenizer next to a model's weights; None when there is none."""
    name = str(model) if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    if not name:
        return None
    try:
        directory = checkpoint_directory(name)
    except CheckpointError:
        return None  # a model without a tokenizer is fine: prompts then come as token ids
    return _tokenizer_in(directory)


def tokenizer_of(given: TokenizerLike | None, setting: str = "tokenizer") -> PreTrainedTokenizerBase | None:
    """The tokenizer that ``given`` is or names, None for None; ``setting`` is what it was given as.

    Raises ``ConfigError`` for what can be neither, ``CheckpointError`` where there is no tokenizer.
    """
    if isinstance(given, str | Path):
        path = Path(given).expanduser()
        directory = path if path.is_dir() else checkpoint_directory(str(given))  # of a tokenizer alone, too
        found = _tokenizer_in(directory)
        if found is None:
            raise CheckpointError(
                f"{setting}={str(given)!r} holds no tokenizer that can be read; expected tokenizer.json, as "
                "save_pretrained writes it. Save it there, or pass the tokenizer itself"
            )
        return found
    if given is not None and not (hasattr(given, "get_vocab") and callable(given)):
        raise ConfigError(
            f"{setting} must be a transformers tokenizer, a directory or hub id that has one, or None, got {given!r}"
        )
    return given


def _tokenizer_in(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; None where there is none."""
    if not any(file.name in TOKENIZER_FILES or file.suffix == ".model" for file in directory.iterdir()):
        return None  # asked all the same, transformers would make up one that knows special tokens only
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory)
        return found
    except Exception as error:  # the tokenizers library raises bare ones
        if not (directory / "tokenizer.json").is_file():
            return None
        raise CheckpointError(
            f"{directory}/tokenizer.json cannot be read: {error}; restore it, or remove it"
        ) from error


def _load_model(directory: Path, dtype: torch.dtype | None) -> nn.Module:
    if holds_lstm(directory):
        return LSTM.load(directory, dtype)
    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers checks fields with exceptions of many kinds
        raise CheckpointError(f"{directory}/config.json cannot be read as a model configuration: {error}") from error
    if why_unsupported(config) is None:
        return load_gpt(directory, config, dtype or _config_dtype(config))
    loader: Any = AutoModelForCausalLM
    if config.is_encoder_decoder:
        reads_text = type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
        loader = AutoModelForSeq2SeqLM if reads_text else AutoModelForSpeechSeq2Seq
    try:
        model: nn.Module = loader.from_pretrained(directory, dtype=dtype or "auto", use_safetensors=True)
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded as a language model: {error}") from error
    return model.eval()


def _config_dtype(config: Config) -> torch.dtype | None:
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else None


def checkpoint_directory(name: str) -> Path:
    """The directory of a checkpoint: the path itself, or the hub's download (or cached copy) of that id."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path} has no config.json; expected a checkpoint as save_pretrained writes it")
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise CheckpointError(f"no checkpoint at {path}: the directory does not exist")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client raises its own, its HTTP library's and OS errors
        raise CheckpointError(
            f"{name!r} is neither a local directory nor a hub model that can be reached from here "
            f"({type(error).__name__}: {error}). Check the spelling, or the network, or pass a local path"
        ) from error


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged ({error!r}); restore it from its source") from error
    else:
        names = ["model.safetensors"]
    files = [directory / name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{directory} lacks {', '.join(missing)}; weights must be safetensors (nothing is unpickled)"
        )
    return files


def dtype_named(name: str) -> torch.dtype | None:
    """The dtype of that name; None for "auto", the checkpoint's own."""
    if name == "auto":
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def device_named(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU when there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        known = device.type in ("cpu", "cuda")
    except (RuntimeError, TypeError):
        known = False
    if not known:
        raise ConfigError(f"device must be 'auto', 'cpu' or 'cuda', got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no GPU here; use 'cpu' or 'auto'")
    return device
