"""Does vLLM draft with an EAGLE-3 head of ours as we do? Mean acceptance lengths of greedy decodes must be within 5 %.

python benchmarks/eagle3_vllm.py TARGET HEAD --python VLLM_PYTHON [-k 4]

HEAD is what `specdec train TARGET --drafter eagle3 --out HEAD` writes; VLLM_PYTHON an interpreter that has vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 8, 64, 96
TOLERANCE = 0.05  # batching, rounding of near-ties, and drafts past the end of a text, which vLLM counts


def ours(target: str, head: str, drafted: int, dtype: str) -> tuple[list[list[int]], list[list[int]], float]:
    """Prompts, the tokens that follow them, and the mean acceptance length."""
    from specdec.load import load
    from specdec.training.data import gather, held_out_prompts

    engine = load(target, draft=head, dtype=dtype)
    prompts = held_out_prompts(engine.tokenizer, gather("stdlib"), count=PROMPTS, tokens=PROMPT_TOKENS)
    output = engine.generate(prompts, max_new_tokens=NEW_TOKENS, num_draft_tokens=drafted, eos_token_id=None)
    return prompts, output.token_ids, output.stats.mean_acceptance_length


def theirs(job: dict) -> dict:
    """The same in vLLM; runs in its interpreter."""
    import vllm

    speculation = {"model": job["head"], "method": "eagle3", "num_speculative_tokens": job["drafted"]}
    engine = vllm.LLM(
        model=job["target"], dtype=job["dtype"], speculative_config=speculation, enable_prefix_caching=False,
        disable_log_stats=False, enforce_eager=True,
    )  # fmt: skip
    params = vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    results = engine.generate(prompts, params, use_tqdm=False)
    counters = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    drafts, accepted = (counters[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    return {"tokens": [list(one.outputs[0].token_ids) for one in results], "length": 1 + accepted / drafts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target")
    parser.add_argument("head")
    parser.add_argument("--python", required=True, help="an interpreter that has vLLM")
    parser.add_argument("-k", type=int, default=4, help="tokens per draft")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    prompts, tokens, length = ours(given.target, given.head, given.k, given.dtype)
    job = {"target": given.target, "head": given.head, "drafted": given.k, "dtype": given.dtype, "prompts": prompts}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [given.python, __file__, "--inside"], input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=True,
        env={**settings, **os.environ},
    )  # fmt: skip
    found = json.loads(process.stdout)
    same = sum(
        a == b for row, other in zip(tokens, found["tokens"], strict=True) for a, b in zip(row, other, strict=True)
    )
    print(f"mean acceptance length: specdec {length:.3f}, vLLM {found['length']:.3f}")
    print(f"the same token at {same / (len(tokens) * NEW_TOKENS):.1%} of all places")
    return int(abs(found["length"] / length - 1) > TOLERANCE)


if __name__ == "__main__":
    if sys.argv[1:] == ["--inside"]:
        answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # vLLM's processes write what they like to standard output
        answers.write(json.dumps(theirs(json.load(sys.stdin))))
        answers.close()
    else:
        sys.exit(main())
