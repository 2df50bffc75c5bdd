"""Names, paths and models become an engine; the only file that knows every drafter and every way to run a model."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from specdec.control import DEFAULT_DRAFT_TOKENS
from specdec.draft import Drafter
from specdec.drafters.hybrid import HybridDrafter
from specdec.drafters.model import ModelDrafter
from specdec.drafters.ngram import NgramDrafter
from specdec.engine import Engine
from specdec.errors import CheckpointError, ConfigError, ModelError, VocabularyError
from specdec.limit import weight_bytes
from specdec.lm.base import CachedLM
from specdec.lm.hf import hf_lm
from specdec.lm.native import native_lm
from specdec.machine import cache_directory, machine
from specdec.nn.gpt import GPT, Config, state_from_hf, why_unsupported
from specdec.tuned import TunedEngine, tuned_for

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMED_DRAFTERS: dict[str, Callable[[], Drafter]] = {"ngram": NgramDrafter}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")

ModelLike = str | Path | nn.Module | CachedLM
DraftLike = ModelLike | Drafter | Sequence[ModelLike | Drafter] | None


def load(
    target: ModelLike,
    *,
    draft: DraftLike = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> Engine:
    """Load a target, and perhaps a drafter, into an ``Engine`` that keeps them.

    target: a directory, a Hugging Face hub id, a ``PreTrainedModel``, a ``GPT`` or a ``CachedLM``.
    draft: any of these, the name of a drafter that needs no model ("ngram"), a ``Drafter``, or None for plain decoding;
        a model and "ngram" in a list: the lookup where the text repeats itself, the model elsewhere; "tuned" or a .json
        file: what ``specdec tune`` found best, draft lengths too where a call leaves them open.
    dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own. device: "cpu", "cuda", or "auto".
    Neither applies to models that come as objects: those are run as they are.

    Raises ``CheckpointError`` (missing or damaged), ``ModelError`` (weights not finite, cannot be run exactly),
    ``VocabularyError`` (target and draft differ), ``ConfigError`` (unknown dtype, device or drafter).
    """
    place = _device(device)
    wanted = _dtype(dtype)
    tuned = tuned_for(draft, target, checkpoint_directory)
    if tuned is not None:
        draft = tuned.draft if len(tuned.draft) > 1 else next(iter(tuned.draft), None)
    target_lm = load_lm(target, dtype=wanted, device=place)
    tokenizer = tokenizer or find_tokenizer(target)
    vocab_size = _real_vocab_size(target_lm, tokenizer)
    drafter = _load_drafter(draft, target_lm, tokenizer, wanted, place, vocab_size)
    make = Engine if tuned is None else partial(TunedEngine, tuned)
    return make(
        target_lm, drafter, tokenizer=tokenizer, eos_ids=_eos_ids(target, target_lm), vocab_size=vocab_size,
        costs_file=costs_file(target_lm, drafter),
    )  # fmt: skip


def costs_file(target: CachedLM, drafter: Drafter | None) -> Path:
    """Where measurements of these models on this machine are kept."""
    drafting = getattr(drafter, "model", drafter)
    found = [machine(), _description(target), type(drafter).__name__, _description(getattr(drafting, "lm", None))]
    name = hashlib.sha256(json.dumps(found, default=str).encode()).hexdigest()[:16]
    return cache_directory() / "costs" / f"{name}.json"


def _description(lm: CachedLM | None) -> list[Any]:
    """What the cost of a model's passes depends on."""
    if lm is None:
        return []
    model = getattr(lm, "model", lm)
    config = getattr(model, "config", None)
    shape = config.to_dict() if config is not None else None
    return [type(model).__name__, lm.mechanism, lm.vocab_size, str(lm.dtype), str(lm.device), shape]


def load_lm(model: ModelLike, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> CachedLM:
    """A model with a cache: ours for every checkpoint it can run, Hugging Face's own code for all others."""
    if isinstance(model, CachedLM):
        return model
    if isinstance(model, nn.Module):
        found = model
    elif not isinstance(model, str | Path):
        raise _no_model(model)
    else:
        found = _load_model(checkpoint_directory(str(model)), dtype)
        found = found.to(device or torch.device("cpu"))
    check_finite(found)
    if isinstance(found, GPT):
        lm: CachedLM = native_lm(found)
    elif isinstance(found, PreTrainedModel):
        lm = hf_lm(found)
    else:
        raise _no_model(found)
    lm.weight_bytes = weight_bytes(found)
    return lm


def load_model(
    name: str | Path, *, dtype: str = "auto", device: str = "auto"
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """A checkpoint's model, without a cache, and its tokenizer; arguments and errors are those of ``load``."""
    model = _load_model(checkpoint_directory(str(name)), _dtype(dtype)).to(_device(device))
    check_finite(model)
    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise CheckpointError(f"{name} has no tokenizer next to its weights; save it there (tokenizer.json)")
    return model, tokenizer


def accepted_length(target: GPT, draft: GPT, prompts: list[list[int]], new_tokens: int) -> float:
    """Tokens per target pass when ``draft`` always proposes four: a greedy decode of all prompts as one batch."""
    device = target.embed_tokens.weight.device
    if draft.embed_tokens.weight.device != device:
        draft = copy.deepcopy(draft).to(device)
    engine = Engine(native_lm(target), ModelDrafter(native_lm(draft)))
    output = engine.generate(
        prompts, max_new_tokens=new_tokens, num_draft_tokens=DEFAULT_DRAFT_TOKENS, max_batch_size=len(prompts),
        eos_token_id=None,
    )  # fmt: skip
    return output.stats.mean_acceptance_length


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


def _load_drafter(
    draft: DraftLike,
    target: CachedLM,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype | None,
    device: torch.device,
    vocab_size: int,
) -> Drafter | None:
    if draft is None:
        return None
    if isinstance(draft, Sequence) and not isinstance(draft, str):
        return _hybrid([_load_drafter(part, target, tokenizer, dtype, device, vocab_size) for part in draft])
    if isinstance(draft, str) and draft in NAMED_DRAFTERS:
        return NAMED_DRAFTERS[draft]()
    if not isinstance(draft, str | Path | nn.Module | CachedLM):
        if hasattr(draft, "propose") and hasattr(draft, "observe"):
            return draft
        raise ConfigError(
            f"draft must be a path, a hub id, a model, a Drafter, None or one of {', '.join(NAMED_DRAFTERS)}, got {draft!r}"
        )
    lm = load_lm(draft, dtype=dtype, device=device)
    if lm is target:
        raise ConfigError("target and draft are the same CachedLM object, and so the same cache; make a second one")
    check_same_vocabulary(target, lm, tokenizer, find_tokenizer(draft), vocab_size)
    return ModelDrafter(lm)


def _hybrid(parts: list[Drafter | None]) -> Drafter:
    lookups = [part for part in parts if isinstance(part, NgramDrafter)]
    others = [part for part in parts if part is not None and not isinstance(part, NgramDrafter)]
    if len(parts) != 2 or len(lookups) != 1 or len(others) != 1:
        raise ConfigError('a list of drafters must be one model and "ngram", for example draft=["./draft", "ngram"]')
    return HybridDrafter(others[0], lookups[0])


def check_same_vocabulary(
    target: CachedLM,
    draft: CachedLM,
    target_tokenizer: PreTrainedTokenizerBase | None,
    draft_tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
) -> None:
    """Raise ``VocabularyError`` unless an id means the same text to both models.

    With both tokenizers at hand every id is compared, and logits of different widths are padding; without them only
    equal widths are accepted.
    """
    if target_tokenizer is not None and draft_tokenizer is not None:
        ours, theirs = target_tokenizer.get_vocab(), draft_tokenizer.get_vocab()
        if ours == theirs:
            return
        by_id = [*sorted(ours, key=ours.__getitem__), *sorted(theirs, key=theirs.__getitem__)]
        token = next(token for token in by_id if ours.get(token) != theirs.get(token))
        raise VocabularyError(
            f"target and draft have different vocabularies: token {token!r} is id {ours.get(token)} in the target's "
            f"({len(ours)} tokens) and {theirs.get(token)} in the draft's ({len(theirs)} tokens). "
            "Use a draft that was trained with the target's tokenizer"
        )
    if target.vocab_size != draft.vocab_size:
        raise VocabularyError(
            f"the target's logits have {target.vocab_size} entries and the draft's {draft.vocab_size}, and without both "
            "tokenizers it cannot be told whether they share a vocabulary. Save the tokenizers next to the models"
        )


def _real_vocab_size(lm: CachedLM, tokenizer: PreTrainedTokenizerBase | None) -> int:
    """Ids that may be generated: heads are often padded beyond the tokenizer's last id."""
    if tokenizer is None:
        return lm.vocab_size
    last = max(tokenizer.get_vocab().values())
    return min(lm.vocab_size, last + 1)


def _eos_ids(target: ModelLike, lm: CachedLM) -> frozenset[int]:
    """The target's end-of-text ids, from its generation config or its config."""
    config: Any = getattr(target, "generation_config", None)
    if isinstance(target, str | Path):
        directory = checkpoint_directory(str(target))
        if (directory / "generation_config.json").is_file():
            config = GenerationConfig.from_pretrained(directory)
        else:
            config = AutoConfig.from_pretrained(directory)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = getattr(getattr(target, "config", None), "eos_token_id", None)
    found = [ids] if isinstance(ids, int) else (ids or [])
    return frozenset(i for i in found if 0 <= i < lm.vocab_size)


def _dtype(name: str) -> torch.dtype | None:
    if name == "auto":
        return None
    if name not in DTYPES:
        raise ConfigError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {name!r}")
    return DTYPES[name]


def _device(name: str) -> torch.device:
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
