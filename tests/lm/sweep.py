"""The sweep: every class of transformers' causal-LM mapping, tiny, against its own ``generate``.

    python tests/lm/sweep.py [--jobs N] [Class ...]

builds a tiny model of each class mechanically, speculates greedily with a noisy draft and with suffix decoding on three
rows of different lengths, beyond the model's windows, and compares every token with transformers. Without class names
it writes what it found to docs/models.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.utils import GenerationMixin
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import families

from specdec import Engine
from specdec.drafters.model import ModelDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import FallbackWarning, ModelError
from specdec.lm import hf
from specdec.lm.hf import hf_lm
from toys import noisy

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 15]]
NEW = 24
MOST_WEIGHTS = 3_000_000
SECONDS = 120  # for one class
BATCH = 3

# What a tiny model's configuration says, wherever the class has a field of that name.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "text_vocab_size"], 61),
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embedding_size", "embed_dim", "dim", "dim_model"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "d_ff", "dim_ff", "ffn_hidden_size"], 64),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "intermediate_size_mlp", "dff"], 64),
    **dict.fromkeys(["dense_intermediate_size", "shared_intermediate_size", "mlp_hidden_size", "d_inner"], 64),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "expert_intermediate_size"], 16),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"], 16),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_blocks"], 2),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["num_global_key_value_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["linear_num_value_heads", "swa_num_attention_heads", "index_n_heads"], 4),
    **dict.fromkeys(["head_dim", "global_head_dim", "linear_key_head_dim", "linear_value_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "index_head_dim", "kv_channels", "attention_head_dim"], 8),
    **dict.fromkeys(["swa_head_dim", "swa_v_head_dim", "qk_head_dim"], 8),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank"], 16),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"], 128),
    **dict.fromkeys(["context_length", "seq_length", "max_sequence_length"], 128),
    **dict.fromkeys(["sliding_window", "window_size", "attention_chunk_size", "sliding_window_size"], 8),
    **dict.fromkeys(["local_attention", "attention_window_size"], 8),
    **dict.fromkeys(
        ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"], 4
    ),
    **dict.fromkeys(["num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"], 2),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "num_shared_experts"], 1),
    **dict.fromkeys(["initializer_range", "init_std", "initializer_std"], 0.3),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["mamba_n_heads", "n_mamba_heads", "mamba_num_heads"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim", "mamba_headdim"], 16),
    **dict.fromkeys(["mamba_n_groups", "n_groups", "mamba_ngroups"], 1),
    **dict.fromkeys(["chunk_size", "mamba_chunk_size"], 8),
    **dict.fromkeys(["dropout", "attention_dropout", "hidden_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop"], 0.0),
    **dict.fromkeys(["bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id"], None),
    "pad_token_id": 0,
    "num_attention_groups": 2,
    "is_decoder": True,
    "tie_word_embeddings": False,  # tied ones make random models repeat a token
    "first_k_dense_replace": 1,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0,
    "lru_width": 32,
    "rotary_dim": 4,
}
# What single classes need besides, by the field's name.
SPECIAL: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "JambaForCausalLM": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "RecurrentGemmaForCausalLM": {"block_types": ["recurrent", "attention"]},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention"]},
    "RoCBertForCausalLM": {"pronunciation_vocab_size": 61, "shape_vocab_size": 61},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "ReformerModelWithLMHead": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xLSTMForCausalLM": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "ZambaForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid"]},
    "ZayaForCausalLM": {"num_experts_per_tok": 1},
}


@dataclass(frozen=True)
class Result:
    """What became of one class: "equal", "wrong", "refused" or "not built"; how it ran, or why not."""

    name: str
    outcome: str
    mechanism: str = ""
    reason: str = ""
    variety: int = 0  # different tokens in the texts that were compared


def tiny_config(kind: type[PreTrainedConfig], special: dict[str, Any]) -> PreTrainedConfig:
    """A configuration of this class with every size that it has made small."""
    default = kind()
    fields = {**default.to_dict(), **{name: True for name in default.attribute_map}}
    given = {name: value for name, value in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:
        given["num_key_value_heads"] = 4  # latent attention has one key per query head
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(fields.get(name), list):
            given[name] = last_two_kinds(fields[name])
    for name in ("q_lora_rank", "n_inner"):
        if fields.get(name) is None:
            given.pop(name, None)
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            given[name] = tiny_config(type(part), {}).to_dict()
    given.update(special)
    for _ in range(8):
        try:
            return kind(**given)
        except StrictDataclassFieldValidationError as error:  # None where a number must be, and the like
            wrong = re.findall(r"field '(\w+)'", str(error))[0]
            if wrong.endswith("_token_id"):
                given[wrong] = 1
            else:
                given.pop(wrong)
    return kind(**given)


def last_two_kinds(types: list[str]) -> list[str]:
    """Two layers, of as many kinds as there are."""
    kinds = sorted(set(types), key=types.index)
    return (kinds * 2)[:2]


def build(name: str) -> PreTrainedModel:
    """A tiny random model of the class."""
    configs = {model.__name__: kind for kind, model in pairs()}
    torch.manual_seed(0)
    config = tiny_config(configs[name], SPECIAL.get(name, {}))
    made = {model.__name__: model for _, model in pairs()}[name]
    with torch.device("meta"):
        size = sum(weight.numel() for weight in made(config).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size} weights even when made small")
    torch.manual_seed(0)
    model = made(config).eval()
    model.generation_config = GenerationConfig(pad_token_id=0)
    for weight in model.parameters():
        if weight.dim() > 1 and 0 < float(weight.detach().std()) < 0.1:  # a class that draws its weights in its own way
            weight.data.mul_(0.2 / float(weight.detach().std()))
    return model.requires_grad_(False)


def pairs() -> list[tuple[type[PreTrainedConfig], type[PreTrainedModel]]]:
    """Configuration and model classes of the mapping, each model once."""
    found: dict[str, tuple[Any, Any]] = {}
    for kind, models in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model in models if isinstance(models, (tuple, list)) else [models]:
            own = model.config_class or kind
            found.setdefault(model.__name__, (own if isinstance(own, type) else kind, model))
    return list(found.values())


def transformers_texts(model: PreTrainedModel, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What the class's own ``generate`` says to each prompt alone."""
    texts = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        whole = GenerationMixin.generate(
            model, tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new
        )
        texts.append(whole[0, len(prompt) :].tolist())
    return texts


def examine(name: str) -> Result:
    """Build, run, compare."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return _examine(name)
    except TimeoutError:
        return Result(name, "not built", reason=f"took more than {SECONDS} s")
    finally:
        signal.alarm(0)


def _examine(name: str) -> Result:
    try:
        model = build(name)
        expected = transformers_texts(model, PROMPTS, NEW)
    except TimeoutError:
        raise
    except Exception as error:  # noqa: BLE001 -- whatever a class raises on a mechanical config
        return Result(name, "not built", reason=f"{type(error).__name__}: {error}".splitlines()[0][:150])
    try:
        mechanism, why = mechanism_and_reason(model)
        target, draft = hf_lm(model), hf_lm(noisy(model, 0.02))
    except ModelError as error:
        return Result(name, "refused", reason=str(error))
    for drafter in (SuffixDrafter(), ModelDrafter(draft)):
        found = Engine(target, drafter).generate(PROMPTS, max_new_tokens=NEW, max_batch_size=BATCH).token_ids
        if found != expected:
            at = [
                next((i for i, (a, b) in enumerate(zip(f, e, strict=True)) if a != b), -1)
                for f, e in zip(found, expected, strict=True)
            ]
            return Result(name, "wrong", mechanism, f"first differences at {at} with {type(drafter).__name__}")
    return Result(name, "equal", mechanism, why, len(set().union(*expected)))


def mechanism_and_reason(model: PreTrainedModel) -> tuple[str, str]:
    """How the model is run, and why not in a faster way."""
    hf._said.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        mechanism = hf_lm(model).mechanism
    fallbacks = [str(warning.message) for warning in said if issubclass(warning.category, FallbackWarning)]
    return mechanism, fallbacks[0].partition("all rows (")[2].removesuffix(")") if fallbacks else ""


def _too_long(*_: Any) -> None:
    raise TimeoutError


def sweep(names: list[str], jobs: int) -> list[Result]:
    """All results, in the order of the names; every class in a process of its own."""
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    results = []
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=20) as pool:
        for result in pool.imap(examine, names):
            print(
                result.outcome.ljust(10),
                result.name.ljust(40),
                result.mechanism,
                result.variety,
                result.reason,
                flush=True,
            )
            results.append(result)
    return results


DOCUMENT = Path(__file__).parents[2] / "docs/models.md"
SPEED = {
    "ragged": "full speed",
    "row by row": "exact fall-back",
    "token by token": "exact fall-back",
    "whole rows": "exact fall-back",
}
INTRODUCTION = """# Hugging Face models

Written by `python tests/lm/sweep.py`; do not edit.

No list says which model may be used. A model is admitted by a probe: some passes as speculation makes them, on the
loaded model itself, are compared with plain passes over whole rows; the fastest way that is exact is taken, and
`engine.target.mechanism` names it. Where it is not the first, a `FallbackWarning` says so, once per class.

| mechanism | what a step costs |
|---|---|
| ragged | one pass for all rows: full speed |
| row by row | a pass per row, with the model's own cache; recurrent states are snapshots, and kept tokens are read again |
| token by token | a pass per token, for models that go on from a state with single tokens only: no gain from drafts |
| whole rows | a pass per row over all of its text, for models without a cache |
"""


def family_table() -> str:
    """The families of ``families.py``, which tests hold equal to transformers row by row."""
    lines = [
        "## Families that every test run covers",
        "",
        "Greedy text equal to `generate`, row by row, in batches of 1, 3 and 8 with ragged prompts, 64 new tokens, drafts",
        "by a disturbed copy and by suffix decoding; samples under `coupled` equal to plain sampling with the seed.",
        "",
        "| family | what is special | speed | mechanism |",
        "|---|---|---|---|",
    ]
    for family in families.FAMILIES:
        mechanism = mechanism_and_reason(families.model(family.name))[0]
        lines.append(f"| {family.name} | {family.about} | {SPEED[mechanism]} | {mechanism} |")
    return "\n".join(lines) + "\n"


def sweep_table(results: list[Result]) -> str:
    """All classes of the mapping."""
    count = {outcome: sum(r.outcome == outcome for r in results) for outcome in ("equal", "refused", "not built")}
    lines = [
        "## Every class of transformers' causal-LM mapping",
        "",
        f"transformers {transformers.__version__}, tiny models made mechanically, greedy, batches of {BATCH}, beyond their",
        f"windows, with a disturbed copy and with suffix decoding: {count['equal']} classes equal `generate` token by token,",
        f"{count['refused']} are refused, {count['not built']} could not be built or run by transformers itself this way.",
        "",
        "| class | speed | mechanism | why |",
        "|---|---|---|---|",
    ]
    for r in results:
        reason = re.sub(
            r"differ by \S+ from those of each row alone, allowed \S+", "differ from those of each row alone", r.reason
        )
        reason = reason.partition("in any way. ")[2].removesuffix(f" {REMEDY}") if r.outcome == "refused" else reason
        reason = " ".join(reason.replace("|", "/").split())
        speed = SPEED[r.mechanism] if r.outcome == "equal" else r.outcome
        lines.append(f"| {r.name} | {speed} | {r.mechanism} | {reason} |")
    return "\n".join(lines) + "\n"


REMEDY = "What specdec cannot run, transformers' own generate can"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="classes to look at; none: all, and docs/models.md is written")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--families", action="store_true", help="write the table of families only")
    options = parser.parse_args()
    if options.families:
        kept = DOCUMENT.read_text(encoding="utf-8").partition("## Every class")
        DOCUMENT.write_text("\n".join([INTRODUCTION, family_table(), kept[1] + kept[2]]), encoding="utf-8")
        return
    results = sweep(options.names or sorted(model.__name__ for _, model in pairs()), options.jobs)
    for outcome in ("equal", "wrong", "refused", "not built"):
        print(outcome, sum(result.outcome == outcome for result in results))
    if not options.names and not any(result.outcome == "wrong" for result in results):
        DOCUMENT.write_text("\n".join([INTRODUCTION, family_table(), sweep_table(results)]), encoding="utf-8")


if __name__ == "__main__":
    main()
