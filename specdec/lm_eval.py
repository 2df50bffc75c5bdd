"""lm-eval (EleutherAI's evaluation harness) on our engine: tasks generate with speculation, and score the same.

    python -m specdec.lm_eval --model specdec --model_args pretrained=DIR,draft=DIR --tasks gsm8k --batch_size 8

is lm-eval's own command line with this model in it; lm-eval finds no models of other packages by itself. In Python,
``import specdec.lm_eval`` makes ``lm_eval.simple_evaluate(model="specdec", ...)`` know it. Install with
``pip install specdec[lm-eval]``; nothing else of specdec imports this module.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from specdec.checkpoints import ModelLike, TokenizerLike, tokenizer_of
from specdec.draft import Drafter
from specdec.engine import Engine
from specdec.errors import ConfigError, PromptError
from specdec.lm.base import CachedLM
from specdec.load import load
from specdec.output import Piece
from specdec.requests import Settings
from specdec.stats import Stats

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"specdec.lm_eval needs lm-eval ({error}); install it: pip install 'specdec[lm-eval]'") from error

SCORED_TOKENS = 2048  # tokens of one scoring pass; bounds the memory of its logits [rows, tokens, vocabulary]
SAMPLING = ("top_k", "top_p", "min_p")  # what tasks may leave in their settings though they decode greedily

Pair = tuple[list[int], list[int]]  # context and continuation
Scored = tuple[float, bool]  # log-probability of a continuation, and whether it is the greedy one

logger = logging.getLogger(__name__)


@register_model("specdec")
class SpecDecLM(TemplateLM):
    """An lm-eval model that generates through an ``Engine`` and scores through its target.

    pretrained, draft, tokenizer, dtype, device: those of ``specdec.load``; ``pretrained`` may be an ``Engine``.
    batch_size: rows at a time, "auto" for the engine's default. max_length: the
    model's own context by default. max_gen_toks: where a task names none. add_bos_token, prefix_token_id: as in
    lm-eval's ``hf``. seed: of the first request that samples, the next ones count on from it. ``settings`` are fields
    of ``specdec.Settings`` (num_draft_tokens, rule, ...), defaults that a task's generation settings override.

    Raises ``ConfigError`` for what it does not know, before anything is loaded, and what ``specdec.load`` raises.
    """

    def __init__(
        self,
        pretrained: ModelLike | Engine,
        draft: ModelLike | Drafter | None = None,
        tokenizer: TokenizerLike | None = None,
        dtype: str = "auto",
        device: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        seed: int = 1234,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._rows = _rows(batch_size, max_batch_size)
        self._settings = {**settings, "seed": seed, "max_batch_size": self._rows}
        Settings.of(self._settings)  # what is wrong is said before a model is loaded
        tokenizer = tokenizer_of(tokenizer)
        if isinstance(pretrained, Engine):
            self.engine = pretrained
        else:
            place = _device(device)
            self.engine = load(pretrained, draft=draft, tokenizer=tokenizer, dtype=dtype, device=place)
        self.tokenizer: Any = tokenizer or self.engine.tokenizer
        if self.tokenizer is None:
            raise ConfigError("lm-eval's tasks are text, and this model came without a tokenizer; pass tokenizer=")
        context = self.engine.limits.context
        if max_length is not None and not 1 < max_length <= context:
            raise ConfigError(f"max_length must be from 2 to the model's context of {context}, got {max_length}")
        self.max_length, self.max_gen_toks = max_length or context, max_gen_toks
        self._add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self._device = self.engine.target.device
        self.stats = Stats()

    @property
    def batch_size(self) -> int:
        """Rows generated or scored at a time."""
        return self._rows

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is scored after: as given, or the tokenizer's beginning or end of text."""
        found = self._first_token()
        if found is None:
            raise ConfigError(
                "a text without context is scored after a first token, and this tokenizer has neither a beginning nor "
                "an end of text; pass prefix_token_id="
            )
        return found

    def _first_token(self) -> int | None:
        known = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return next((token for token in known if token is not None), None)

    @property
    def tokenizer_name(self) -> str:
        """By which lm-eval tells caches of tokenized requests apart."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text; special tokens as the tokenizer adds them, unless the text begins with one already."""
        if add_special_tokens is None:
            first = self._first_token()
            begun = first is not None and string.startswith(self.tokenizer.decode([first]))
            add_special_tokens = False if begun else self._add_bos_token
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **given))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A dialogue as the text that the tokenizer's template makes of it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes next to its results: how much speculation there was."""
        return {
            "acceptance_rate": self.stats.acceptance_rate,
            "mean_acceptance_length": self.stats.mean_acceptance_length,
            "tokens_per_second": self.stats.tokens_per_second,
        }

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each request's context, up to its stop strings; requests of equal settings together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as bar:
            for group in groups.values():
                self._generate([requests[i] for i in group], group, texts, bar)
        if requests:
            logger.info("%s", self.stats)
        return texts

    def _generate(self, requests: list[Instance], places: list[int], texts: list[str], bar: tqdm) -> None:
        """Generate for requests of equal settings, and enter what they got at their places in ``texts``."""
        stop, settings = self._generation_settings(requests[0].args[1])
        room = self.max_length - settings["max_new_tokens"]
        if room < 1:
            raise ConfigError(
                f"max_gen_toks must be less than the model's context of {self.max_length} tokens, "
                f"got {settings['max_new_tokens']}"
            )
        prompts = [(self.tok_encode(request.args[0]) or [self.prefix_token_id])[-room:] for request in requests]
        # Rows that join together are read together, so prompts of similar length come one after the other.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))

        def count(piece: Piece) -> None:
            bar.update(piece.finish_reason is not None)

        output = self.engine.generate([prompts[i] for i in order], on_piece=count, stop=stop, **settings)
        self.stats = self.stats + output.stats
        # An end-of-text token ends a row by its id; where its text is made of other tokens, the text is cut like hf's.
        stop = handle_stop_sequences(list(stop), self.tokenizer.eos_token)
        for i, tokens in zip(order, output.token_ids, strict=True):
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
            texts[places[i]] = postprocess_generated_text(text, stop, None)
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[places[i]])

    def _generation_settings(self, given: dict[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """Stop strings and engine settings of a task's ``generation_kwargs``; unknown ones are errors."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        stop = tuple(text for text in settings.pop("until") if text)
        settings["max_new_tokens"] = settings.pop("max_gen_toks")
        if settings.pop("do_sample"):
            settings.setdefault("temperature", 1.0)
        else:
            settings["temperature"] = 0.0
            settings = {name: value for name, value in settings.items() if name not in SAMPLING}
        return stop, {**self._settings, **settings}

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each whole text, in windows of the model's context where it is longer."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        totals = [0.0] * len(requests)
        for owner, (score, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Scored]:
        """Scores of (what to cache it as, context ids, continuation ids); contexts lose their beginning where too long."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        found: list[Scored] = [(0.0, True)] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for begin in range(0, len(order), self._rows):
                chunk = order[begin : begin + self._rows]
                for i, scored in zip(chunk, score(self.engine.target, [pairs[i] for i in chunk]), strict=True):
                    found[i] = scored
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], scored)
                bar.update(len(chunk))
        return found

    def _fit(self, context: list[int], continuation: list[int]) -> Pair:
        """The pair, the context cut from the left so that all but the last token fit into the model."""
        if not 0 < len(continuation) <= self.max_length:
            raise PromptError(
                f"a continuation to score must have 1 to {self.max_length} tokens (the model's context), "
                f"got {len(continuation)}"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation


@torch.inference_mode()
def score(lm: CachedLM, pairs: Sequence[Pair]) -> list[Scored]:
    """For every (context, continuation) the continuation's log-probability, and whether it is the greedy one.

    The contexts, one token or more, are read without logits; then come the tokens whose logits are needed, in passes
    of bounded size. Each token is read once. Raises ``ConfigError`` while a stream is open on this model.
    """
    if any(lm.lengths):
        raise ConfigError("this model is in the middle of a stream; finish or close it before scoring")
    contexts = [context[:-1] for context, _ in pairs]
    unread = [[context[-1], *continuation[:-1]] for context, continuation in pairs]
    wanted = [continuation for _, continuation in pairs]
    totals, greedy = [0.0] * len(pairs), [True] * len(pairs)
    try:
        lm.reserve(len(pairs), max(len(context) + len(continuation) for context, continuation in pairs))
        if any(contexts):
            lm.fill(contexts)
        width = max(1, SCORED_TOKENS // len(pairs))
        for begin in range(0, max(map(len, unread)), width):
            tokens, counts = _padded([row[begin : begin + width] for row in unread], lm.device)
            targets, _ = _padded([row[begin : begin + width] for row in wanted], lm.device)
            logits = lm.append(tokens, counts).float()
            scores = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
            hits = logits.argmax(-1) == targets
            lm.keep(counts)
            for row, count in enumerate(counts):
                totals[row] += float(scores[row, :count].double().sum())
                greedy[row] &= bool(hits[row, :count].all())
    finally:
        lm.free(0)
    return list(zip(totals, greedy, strict=True))


def _padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, list[int]]:
    """Rows [B, T], filled up on the right with zeros, and their lengths."""
    counts = [len(row) for row in rows]
    width = max(counts)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device), counts


def _rows(batch_size: int | str, most: int | None) -> int:
    """Rows at a time of lm-eval's batch size: a number, "auto" or "auto:N"."""
    text = str(batch_size)
    if text.split(":")[0] == "auto":
        default = Settings().max_batch_size
        return min(default, most) if most else default
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f'batch_size must be an integer >= 1 or "auto", got {batch_size!r}')
    return int(text)


def _device(given: str) -> str:
    """lm-eval's command line says "cuda:0" when nobody said anything; like its own models, go without a GPU then."""
    if given.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device is %r, but torch sees no GPU here; running on the CPU", given)
        return "cpu"
    return given


if __name__ == "__main__":
    cli_evaluate()
