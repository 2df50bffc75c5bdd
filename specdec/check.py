"""Is the text really unchanged? A pair's greedy, seeded and sampled texts and its log-probabilities, against the target.

What is believed is the target alone: plain decoding for texts, one pass over each whole text for laws and logits, within
what rounding may do in its precision. Sampled tokens, pairs and texts are held against their laws by chi-square tests.
These are repeated with a drafter that reports a wrong law: a test that does not notice says nothing, and does not pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdec.checkpoints import ModelLike, TokenizerLike
from specdec.draft import Draft, Drafter
from specdec.drafting import DraftLike
from specdec.encoded import encoded_requests
from specdec.engine import Engine
from specdec.errors import ConfigError, SpecDecError
from specdec.lm.probe import tolerance
from specdec.load import load
from specdec.output import Output
from specdec.requests import Prompts, Settings, build_requests, token_lists
from specdec.sampling import Randomness, SamplingParams, filters, law, one_hot
from specdec.scoring import LEAST_EXPECTED, ChiSquare, Text, pair_test, pearson, rank_test, scored
from specdec.sequences import Request, Sequences, Step

if TYPE_CHECKING:
    from rich.table import Table

ALPHA = 1e-6  # a right pair fails a test once in a million
LEAST_SAMPLES, LEAST_TEXTS = 100, 32  # of a tested law; of a prompt, whose every token is tested
LAW_PROMPTS, LAW_TOKENS, LAW_ENTROPY = 3, 3, 1.5  # prompts, new tokens, and nats at which a law has much to get wrong
RULES = ("block", "rejection")
TEMPERATURE_ONE, FILTERED = SamplingParams(1.0), SamplingParams(0.7, top_p=0.9)
PROMPTS = (
    "def read_lines(path, encoding='utf-8'):\n    with open(path, encoding=encoding) as file:\n        ",
    "class Queue:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        ",
    '{"name": "first", "size": 1, "tags": []}\n{"name": "second", "size": 2, "tags": []}\n{"name": ',
    "import os\nimport sys\nimport json\n\nfor name in sorted(os.listdir(sys.argv[1])):\n    ",
    "The ship left the harbour at dawn. The captain looked at the sea, and the sea looked ",
    "Question: how many days are there in a week? Answer: seven. Question: how many months are there in ",
    "One, two, three, four. One, two, three, four. Now the other way round: four, ",
    "# Notes\n\n- what we know: little\n- what we measured: more\n- what comes next: ",
)


@dataclass(frozen=True)
class Finding:
    """One question and its answer; ``figures`` are for programs. What was not tested has not passed."""

    name: str
    passed: bool
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)
    tested: bool = True

    @property
    def answer(self) -> str:
        """For the terminal."""
        if not self.tested:
            return "[yellow]not tested[/]"
        return "[green]yes[/]" if self.passed else "[bold red]NO[/]"


@dataclass(frozen=True)
class CheckReport:
    """What ``check`` found, and how it asked."""

    findings: list[Finding]
    settings: dict[str, Any]

    @property
    def passed(self) -> bool:
        """Whether every question was tested and answered well."""
        return all(finding.passed for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"passed": self.passed, **asdict(self)}

    def table(self, title: str = "Is the text unchanged?") -> Table:
        """The findings, one a row, for the terminal."""
        from rich.table import Table

        table = Table("question", "", "what was found", title=title)
        for finding in self.findings:
            table.add_row(finding.name, finding.answer, finding.detail)
        if not all(finding.tested for finding in self.findings):
            table.caption = (
                "what was not tested has not passed: take prompts that the drafter has guesses for, or more new tokens"
            )
        return table


def check(
    target: ModelLike | Engine,
    *,
    draft: DraftLike = None,
    prompts: Prompts | None = None,
    tokenizer: TokenizerLike | None = None,
    dtype: str = "auto",
    device: str = "auto",
    num_draft_tokens: int = 4,
    max_new_tokens: int = 64,
    samples: int = 2000,
    seed: int = 0,
) -> CheckReport:
    """Check that ``draft`` changes no text of ``target``; these, ``tokenizer``, ``dtype`` and ``device``: see ``load``.

    target: may be an ``Engine`` that has a drafter. prompts: text or token ids (default: eight short texts).
    num_draft_tokens: drafted per step. max_new_tokens: of the compared texts. samples: of every tested law.

    Raises ``ConfigError`` for a setting outside its range or without a drafter, and what ``load`` raises.
    """
    if samples < LEAST_SAMPLES:
        raise ConfigError(f"samples must be at least {LEAST_SAMPLES}, for laws to be told apart, got {samples}")
    if num_draft_tokens < 1:
        raise ConfigError(
            f"num_draft_tokens must be at least 1, for there to be something to check, got {num_draft_tokens}"
        )
    if not isinstance(target, Engine):
        target = load(target, draft=draft, tokenizer=tokenizer, dtype=dtype, device=device)
    if target.drafter is None:
        raise ConfigError('there is no drafter to check; pass draft= a model or "suffix"')
    subject = Subject(target, num_draft_tokens, min(max_new_tokens, target.limits.context // 3), seed)
    texts = subject.read(prompts)
    findings = [greedy_texts(subject, texts), seeded_texts(subject, texts), logprobs(subject, texts)]
    findings += _laws(subject, subject.telling(texts), samples)
    settings = {
        "dtype": str(target.target.dtype).removeprefix("torch."), "drafter": type(target.drafter).__name__,
        "prompts": len(texts), "num_draft_tokens": num_draft_tokens, "max_new_tokens": subject.max_new_tokens,
        "samples": samples, "seed": seed, "alpha": ALPHA,
    }  # fmt: skip
    return CheckReport(findings, settings)


class Subject:
    """An engine with a drafter, and how it is asked to generate."""

    def __init__(self, engine: Engine, num_draft_tokens: int, max_new_tokens: int, seed: int) -> None:
        self.engine, self.seed = engine, seed
        self.num_draft_tokens, self.max_new_tokens = num_draft_tokens, max_new_tokens

    def lying(self) -> Subject:
        """The same with a drafter that reports wrong laws."""
        engine = self.engine
        assert engine.drafter is not None
        liar = Engine(engine.target, WrongLaw(engine.drafter), vocab_size=engine.limits.vocab_size)
        return Subject(liar, self.num_draft_tokens, self.max_new_tokens, self.seed)

    @property
    def room(self) -> int:
        """The most tokens that a prompt may have."""
        return self.engine.limits.context - self.max_new_tokens - 1

    def read(self, prompts: Prompts | None) -> list[list[int]]:
        """Prompts as token ids; those that leave no room for new tokens lose their beginning."""
        tokenizer = self.engine.tokenizer
        if prompts is None and tokenizer is None:
            random = torch.Generator().manual_seed(self.seed)
            prompts = torch.randint(self.engine.limits.vocab_size, (len(PROMPTS), 24), generator=random)
        read: list[list[int]] = []
        for tokens in token_lists(list(PROMPTS) if prompts is None else prompts, None, tokenizer):
            if isinstance(tokens, SpecDecError):
                raise tokens
            read.append(tokens[-self.room :])
        return read

    def telling(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of the prompts, each followed by its own beginning so that lookups guess, those with the most telling laws."""
        longer = [[*prompt, *prompt[: len(prompt) // 2]][-self.room :] for prompt in prompts]
        _, texts = self.generate(longer, max_new_tokens=1, num_draft_tokens=0)
        entropies = [float(torch.special.entr(logits.softmax(-1)).sum()) for logits in self.scored(texts)]
        order = sorted(range(len(longer)), key=lambda i: abs(entropies[i] - LAW_ENTROPY))
        return [longer[i] for i in order[:LAW_PROMPTS]]

    def generate(self, prompts: Sequence[Sequence[int]], **settings: Any) -> tuple[Output, list[Text]]:
        """What the engine writes, end of text or not, and the same as texts that can be scored."""
        given = Settings.of({
            "max_new_tokens": self.max_new_tokens, "num_draft_tokens": self.num_draft_tokens, "eos_token_id": None,
            "seed": self.seed, "max_batch_size": 64, **settings,
        })  # fmt: skip
        engine, sources = self.engine, (prompts, None, given, self.engine.limits, self.engine.tokenizer)
        found = encoded_requests(*sources, engine.target) if engine.target.encodes else build_requests(*sources)
        requests: list[Request] = []
        for request in found:
            if isinstance(request, SpecDecError):
                raise request
            requests.append(replace(request, processing=None))  # tokens that a model's settings force have no law
        call = engine.call(list(requests), given)
        call.quietly()
        output = call.output()
        for error in output.errors:
            if error is not None:
                raise error
        rows = zip(requests, output.token_ids, strict=True)
        return output, [Text(request.prompt, new, request.source) for request, new in rows]

    def scored(self, texts: Sequence[Text]) -> Iterator[Tensor]:
        """The target's logits [T, V] of each text, in one pass over all of it."""
        return scored(self.engine.target, texts, self.engine.limits.vocab_size)

    def rounding(self, logits: Tensor) -> Tensor:
        """How far two logits of [T, V] may move against each other between two passes, [T]."""
        finite = torch.where(logits.isfinite(), logits, 0.0)
        return 2 * tolerance(self.engine.target) * (finite - finite.mean(-1, keepdim=True)).square().mean(-1).sqrt()


# --- Texts


def greedy_texts(subject: Subject, prompts: Sequence[Sequence[int]]) -> Finding:
    """Greedy texts against plain decoding; where they part, and how near the two best tokens were there."""
    plain, _ = subject.generate(prompts, num_draft_tokens=0)
    output, texts = subject.generate(prompts)
    sums = ((logits, logits) for logits in subject.scored(texts))
    return _compared("greedy text is plain decoding's", subject, plain, output, texts, sums)


def seeded_texts(subject: Subject, prompts: Sequence[Sequence[int]]) -> Finding:
    """Texts sampled by the coupled rule against plain sampling with the same seeds.

    Both take the largest of logits plus the same noise, so where they part the two largest sums must be near.
    """
    given = {"rule": "coupled", "temperature": 1.0}
    plain, _ = subject.generate(prompts, num_draft_tokens=0, **given)
    output, texts = subject.generate(prompts, **given)

    def sums() -> Iterator[tuple[Tensor, Tensor]]:
        for text, seed, logits in zip(texts, output.seeds, subject.scored(texts), strict=True):
            seeds, starts = torch.tensor([[seed], [len(text.prompt)]], device=logits.device)
            places = torch.arange(len(text.new), device=logits.device)[None]
            noise = Randomness(seeds, starts).target(places, logits.shape[-1])
            yield logits, logits - noise[0].log()

    return _compared("seeded text is plain sampling's", subject, plain, output, texts, sums())


def _compared(
    name: str, subject: Subject, plain: Output, output: Output, texts: Sequence[Text], sums: Iterator[tuple[Tensor, Tensor]]
) -> Finding:  # fmt: skip
    """Texts against plain ones; ``sums``: logits [T, V] and what every token must be the largest of, but for rounding.

    What follows the first difference cannot be compared with the plain text any more; it is held to that all the same.
    """
    partings, shortfall, allowed = [], 0.0, True
    for text, expected, (logits, scores) in zip(texts, plain.token_ids, sums, strict=True):
        limit = subject.rounding(logits)
        chosen = scores.gather(1, torch.tensor(text.new, device=scores.device)[:, None])[:, 0]
        short = scores.max(-1).values - chosen
        shortfall, allowed = max(shortfall, float(short.max())), allowed and bool((short <= limit).all())
        at = next((i for i, pair in enumerate(zip(text.new, expected, strict=True)) if pair[0] != pair[1]), None)
        if at is not None:
            best, second = scores[at].topk(2).values.tolist()
            apart = abs(float(scores[at, expected[at]] - chosen[at]))
            is_tie = apart <= float(limit[at])
            partings.append({"position": at, "gap": best - second, "limit": float(limit[at]), "is_tie": is_tie})
            allowed &= is_tie
    same, stats = len(texts) - len(partings), output.stats
    detail = f"{same} of {len(texts)} equal; {_accepted(output)}"
    for p in partings[:3]:
        why = f"a tie, as rounding may move them {p['limit']:.2g}" if p["is_tie"] else "NOT a tie"
        detail += f"; one parts at token {p['position']}, where the best two are {p['gap']:.2g} apart: {why}"
    if not allowed:
        detail += f"; a token is {shortfall:.2g} below the best, more than rounding"
    figures = {"rows": len(texts), "equal": same, "partings": partings, "shortfall": shortfall}
    figures |= {"drafted": stats.num_draft_tokens, "acceptance_rate": stats.acceptance_rate}
    drafted = stats.num_draft_tokens > 0
    return Finding(name, allowed and drafted, detail, figures, tested=drafted or not allowed)


def logprobs(subject: Subject, prompts: Sequence[Sequence[int]]) -> Finding:
    """The engine's log-probabilities against those of one full pass over each finished text."""
    output, texts = subject.generate(prompts, temperature=1.0, rule="block", logprobs=True)
    assert output.logprobs is not None
    worst, allowed, count = 0.0, True, 0
    for text, told, logits in zip(texts, output.logprobs, subject.scored(texts), strict=True):
        chosen = torch.tensor(text.new, device=logits.device)[:, None]
        found = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        apart = (found - torch.tensor(told, device=logits.device)).abs()
        worst, count = max(worst, float(apart.max())), count + len(apart)
        allowed &= bool((apart <= subject.rounding(logits)).all())
    detail = f"{count} tokens, at most {worst:.2g} nats apart" + ("" if allowed else ", more than rounding")
    return Finding("log-probabilities are one full pass's", allowed, detail, {"tokens": count, "largest": worst})


def _accepted(output: Output) -> str:
    stats = output.stats
    if not stats.num_draft_tokens:
        return "nothing was drafted, so nothing was tested"
    return f"{stats.acceptance_rate:.0%} of {stats.num_draft_tokens} guesses accepted"


# --- Laws


def _laws(subject: Subject, prompts: Sequence[Sequence[int]], samples: int) -> list[Finding]:
    """Every test under every rule, those of tokens with filters too, and their controls."""
    findings = []
    for rule in RULES:
        findings += [*table_tests(subject, prompts, samples, rule), text_test(subject, prompts, samples, rule)]
    if subject.engine.target.dtype in (
        torch.float32,
        torch.float64,
    ):  # else rounding moves tokens across filters' edges
        findings += table_tests(subject, prompts, samples, RULES[0], FILTERED)
    liar = subject.lying()
    for test in (*table_tests(liar, prompts, samples, RULES[0]), text_test(liar, prompts, samples, RULES[0])):
        noticed = test.figures["p_value"] < ALPHA
        detail = f"p = {test.figures['p_value']:.2g}" if noticed else f"not noticed: take more samples; {test.detail}"
        detail = detail if test.tested else test.detail
        name = f"a wrong law is noticed: {test.name.split(' (')[0]}"
        findings.append(Finding(name, noticed, detail, test.figures, test.tested))
    return findings


def table_tests(
    subject: Subject, prompts: Sequence[Sequence[int]], samples: int, rule: str, params: SamplingParams = TEMPERATURE_ONE
) -> list[Finding]:  # fmt: skip
    """First tokens, and pairs of the first two, of many samples against tables of their laws."""
    given = {"temperature": params.temperature, "top_p": params.top_p, "rule": rule, "max_batch_size": 256}
    output, texts = subject.generate(prompts, n=samples, max_new_tokens=LAW_TOKENS, **given)
    singles, pairs = ChiSquare(), ChiSquare()
    for i in range(0, len(texts), samples):
        text, drawn = texts[i], torch.tensor([text.new[:2] for text in texts[i : i + samples]])
        first_law = law(next(subject.scored([text._replace(new=[0])]))[0], filters(params)).cpu()
        common = (samples * first_law >= LEAST_EXPECTED).nonzero()[:, 0].tolist()
        continued = subject.scored([text._replace(new=[first, 0]) for first in common])
        seconds = {x: law(logits[1], filters(params)).cpu() for x, logits in zip(common, continued, strict=True)}
        singles = singles.plus(pearson(drawn[:, 0].bincount(minlength=len(first_law)), samples * first_law))
        pairs = pairs.plus(pair_test(drawn, first_law, seconds))
    name = rule if params == TEMPERATURE_ONE else f"{rule}, T={params.temperature:g}, top-p {params.top_p:g}"
    return [_law_finding(f"{what} keep the law ({name})", test, output) for what, test in
            (("first tokens", singles), ("pairs of tokens", pairs))]  # fmt: skip


def text_test(subject: Subject, prompts: Sequence[Sequence[int]], samples: int, rule: str) -> Finding:
    """Whole sampled texts, every token by its rank in its own law."""
    count = max(LEAST_TEXTS, samples // subject.max_new_tokens)
    output, texts = subject.generate(prompts, n=count, temperature=1.0, rule=rule)
    test = rank_test(texts, (logits.softmax(-1) for logits in subject.scored(texts)))
    return _law_finding(f"ranks in texts keep the law ({rule})", test, output)


def _law_finding(name: str, test: ChiSquare, output: Output) -> Finding:
    detail = f"p = {test.p_value:.2g}, chi-square {test.statistic:.0f} on {test.freedom}; {_accepted(output)}"
    if not test.freedom:
        detail += "; the laws leave nothing to chance, so nothing was tested"
    allowed, says = test.p_value >= ALPHA, output.stats.num_draft_tokens > 0 and test.freedom > 0
    figures = {**test._asdict(), "p_value": test.p_value}
    return Finding(name, allowed and says, detail, figures, tested=says or not allowed)


class WrongLaw:
    """Guesses as ``drafter`` does and reports another law: the negative control, never to be decoded with.

    A law is reported sharper than it was, and a certain guess as one of half certainty.
    """

    def __init__(self, drafter: Drafter) -> None:
        self.drafter = drafter

    def reserve(self, rows: int, length: int) -> None:
        self.drafter.reserve(rows, length)

    def propose(self, sequences: Sequences, lengths: list[int]) -> Draft:
        draft = self.drafter.propose(sequences, lengths)
        if not draft.tokens.shape[1]:
            return draft
        probs = one_hot(draft.tokens, sequences.vocab_size) if draft.probs is None else draft.probs
        sharper = probs.square() / probs.square().sum(-1, keepdim=True)
        is_certain = probs.amax(-1, keepdim=True) == 1
        return replace(draft, probs=torch.where(is_certain, (probs + 1 / probs.shape[-1]) / 2, sharper))

    def observe(self, step: Step) -> None:
        self.drafter.observe(step)

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.drafter.copy(source, target, length)

    def free(self, rows: int) -> None:
        self.drafter.free(rows)
