"""Whether two servers, or a model here and a server, give the same greedy answers to the same prompts.

An engine's change that should change nothing (KV offload, another attention backend) is tried so: one server with it,
one without. No server is quite deterministic, so A is asked twice, and what B changes is held against what A changes by
itself: McNemar's exact test on the prompts, paired.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd

from kvscope.errors import EnvironmentProblem, UsageError, shown
from kvscope.harness.passes.config import RunConfig, make_config
from kvscope.harness.passes.served_facts import served_tokenizer
from kvscope.harness.passes.served_keys import SERVED_KEYS
from kvscope.harness.passes.sweep import as_progress, run
from kvscope.harness.served.address import is_url
from kvscope.paths import user_path
from kvscope.results.comparisons import PAIR_KEY
from kvscope.results.frames import Run, records
from kvscope.results.statistics import Interval, PairedDifference, mean_interval, paired_difference
from kvscope.units import format_length

SameVerdict = Literal["same", "within noise", "inconclusive", "different"]
RUNS = ("a", "a_again", "b")
"""Folders of the three runs, in the order in which they are measured."""
RESULT_FILE = "same_answers.json"
_MOST_LISTED = 5
_SHOWN_CHARACTERS = 60


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A prompt that A and B answered otherwise.

    Attributes:
        first_token: index of the first token that differs, by our tokenizer.
        a, b: the answers from there on.
        a_repeats: whether A gave its answer twice.
    """

    task: str
    length_tokens: int
    sample: int
    first_token: int
    a: str
    b: str
    a_repeats: bool

    def lines(self) -> list[str]:
        """Return it for a terminal."""
        where = f"{self.task} {format_length(self.length_tokens)} sample {self.sample}, token {self.first_token}"
        again = "" if self.a_repeats else " (A again says otherwise)"
        return [
            f"         {where}:",
            f"           A {shown(self.a[:_SHOWN_CHARACTERS])}{again}",
            f"           B {shown(self.b[:_SHOWN_CHARACTERS])}",
        ]


@dataclass(frozen=True, kw_only=True)
class SameAnswers:
    """What came of it.

    Attributes:
        a, b: the models as asked for.
        n_prompts: prompts asked for; n_compared: those that all three runs answered.
        compared: what of the answers: ``whole texts``, or ``up to the stop string``.
        same: share of prompts with the same answer of A and B; noise: of A and A again.
        agreement: the paired difference of those two: B against A, minus A against A.
        accuracy_a, accuracy_b: mean scores; accuracy: their paired difference, B minus A.
        differing: the prompts that A and B answered otherwise, in order.
    """

    a: str
    b: str
    n_prompts: int
    n_compared: int
    compared: str
    same: Interval
    noise: Interval
    agreement: PairedDifference
    accuracy_a: float
    accuracy_b: float
    accuracy: PairedDifference
    differing: tuple[Differing, ...]

    @property
    def verdict(self) -> SameVerdict:
        """``different`` where B changes more answers than A does by itself, at 5 %.

        Prompts that were not answered in all three runs leave the rest open: a server that fails may fail on those
        that it would have answered otherwise.
        """
        enough = self.agreement.pairs_for_6_discordant is None
        if self.differing and enough and self.agreement.p_value < 0.05 and self.agreement.lost > self.agreement.won:
            return "different"
        if self.n_unanswered:
            return "inconclusive"
        if not self.differing:
            return "same"
        return "within noise" if enough else "inconclusive"

    @property
    def n_unanswered(self) -> int:
        """Prompts that were not answered in all three runs."""
        return self.n_prompts - self.n_compared

    @property
    def sentence(self) -> str:
        """The verdict with what it rests on."""
        paired, n = self.agreement, self.n_compared
        changed = f"B changes {len(self.differing)} of {n} answers, A itself {round(n * (1 - self.noise.mean))}"
        if self.verdict == "same":
            return f"same: all {n} answers of B are those of A"
        if self.verdict == "inconclusive" and self.n_unanswered:
            return (
                f"inconclusive: {self.n_unanswered} of {self.n_prompts} prompts were not answered in all three runs; "
                f"of the others {changed}"
            )
        if paired.pairs_for_6_discordant is not None:
            return (
                f"inconclusive: {changed}; {paired.discordant} prompts tell the two apart, at least 6 are needed: "
                f"about {paired.pairs_for_6_discordant} prompts would do"
            )
        p = "p < 0.0001" if paired.p_value < 1e-4 else f"p = {paired.p_value:.2g}"
        return f"{self.verdict}: {changed} ({p}, {paired.test})"

    def plain(self) -> dict[str, Any]:
        """Return it as JSON values."""
        firsts = sorted(each.first_token for each in self.differing)
        return {
            **{key: value for key, value in asdict(self).items() if key != "differing"},
            "first_differing_token": {"least": firsts[0], "median": firsts[len(firsts) // 2]} if firsts else None,
            "verdict": self.verdict,
            "sentence": self.sentence,
            "differing": [asdict(each) for each in self.differing],
        }

    def text(self) -> str:
        """Return it for a terminal."""
        lines = [
            f"A        {self.a}",
            f"B        {self.b}",
            f"prompts  {self.n_compared} of {self.n_prompts}, answered in all three runs; compared: {self.compared}",
            f"same     {_percent(self.same)} of B's answers are A's; of A's own, asked again, {_percent(self.noise)}",
        ]
        if self.differing:
            firsts = sorted(each.first_token for each in self.differing)
            lines.append(f"differ   first at token {firsts[len(firsts) // 2]} (median), {firsts[0]} (least)")
        difference = self.accuracy.difference
        ends = "" if difference.low is None else f" [{100 * difference.low:+.1f}, {100 * (difference.high or 0):+.1f}]"
        lines.append(
            f"accuracy A {100 * self.accuracy_a:.1f} %, B {100 * self.accuracy_b:.1f} %: "
            f"{100 * difference.mean:+.1f}{ends} points, paired; {self.accuracy.lost} lost, {self.accuracy.won} won"
        )
        for each in self.differing[:_MOST_LISTED]:
            lines += each.lines()
        if len(self.differing) > _MOST_LISTED:
            lines.append(f"         and {len(self.differing) - _MOST_LISTED} more")
        return "\n".join([*lines, self.sentence])


def same_answers(
    a: str,
    b: str,
    *,
    served_model_a: str | None = None,
    served_model_b: str | None = None,
    values: Mapping[str, Any],
    progress: bool = True,
) -> SameAnswers:
    """Ask A, A again and B the same prompts, and compare the answers.

    Args:
        a, b: a server's URL each, or one of them a model as of ``kvscope run --model``, which answers densely here.
        served_model_a, served_model_b: the names that the servers know the model by.
        values: further keys of a configuration, for all three runs; ``out`` is the folder of the three.

    Raises:
        UsageError: bad input, prompts that are not the same, or no prompt that all three answered.
        EnvironmentProblem: a server is gone. With ``out`` the same call continues.
    """
    if not (is_url(a) or is_url(b)):
        raise UsageError("Neither of the two is a server's URL: kvscope run compares methods on a model of its own.")
    given = dict(values)
    tokenizer = given.pop("tokenizer", None) or next((each for each in (a, b) if not is_url(each)), None)
    if tokenizer is None:
        raise UsageError("tokenizer: say which the servers' model has: --tokenizer FOLDER, reference or an id.")
    out = given.pop("out", None)
    served = {"a": served_model_a, "a_again": served_model_a, "b": served_model_b}
    with _folder(out) as folder:
        configs = {
            name: _config(a if name != "b" else b, tokenizer, served[name], given, folder / name) for name in RUNS
        }
        runs = {}
        for name, config in configs.items():
            bars = as_progress(progress)
            bars.note(f"{name.replace('_', ' ')}: {config.model}")
            runs[name] = run(config, progress=bars)
        found = compare(runs, a=a, b=b, tokenizer=served_tokenizer(tokenizer)[0])
        if out is not None:
            _write(folder / RESULT_FILE, found)
    return found


def compare(runs: Mapping[str, Run], *, a: str, b: str, tokenizer: Any) -> SameAnswers:
    """Compare the rows of three runs (see ``RUNS``).

    Raises:
        UsageError: prompts are not the same, or none was answered in all three.
    """
    whole = all(each.info.served for each in runs.values())
    tables = [_answers(runs[name], name, whole=whole) for name in RUNS]
    both = tables[0].merge(tables[1], on=PAIR_KEY).merge(tables[2], on=PAIR_KEY)
    for column in ("prompt_sha256", "prompt_tokens"):
        if not (both[f"{column}_a"] == both[f"{column}_b"]).all():
            raise UsageError(
                "A and B were asked different prompts (another tokenizer or chat template): give both the same "
                "--tokenizer and --chat-template."
            )
    if both.empty:
        reasons = [str(reason) for each in runs.values() for reason in each.samples["reason"].dropna().head(1)]
        raise UsageError(f"No prompt was answered in all three runs: {'; '.join(reasons) or 'there are no rows'}.")
    rows = records(both)
    same = [float(row["text_a"] == row["text_b"]) for row in rows]
    repeats = [float(row["text_a"] == row["text_a_again"]) for row in rows]
    scores_a, scores_b = both["score_a"].to_numpy(float), both["score_b"].to_numpy(float)
    return SameAnswers(
        a=a,
        b=b,
        n_prompts=max(len(each.samples) for each in runs.values()),
        n_compared=len(rows),
        compared="whole texts" if whole else "answers up to the stop string",
        same=mean_interval(same),
        noise=mean_interval(repeats),
        agreement=paired_difference(same, repeats),
        accuracy_a=float(scores_a.mean()),
        accuracy_b=float(scores_b.mean()),
        accuracy=paired_difference(scores_b, scores_a),
        differing=tuple(_differing(row, tokenizer) for row, equal in zip(rows, same, strict=True) if not equal),
    )


def first_difference(tokenizer: Any, a: str, b: str) -> tuple[int, str, str]:
    """Return (index of the first token that differs, both texts from there on); the tokens are our tokenizer's.

    Texts whose common beginning has all of one of them differ where that ends.
    """
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (a, b)]
    first = next((at for at, (left, right) in enumerate(zip(*ids, strict=False)) if left != right), min(map(len, ids)))
    return first, *(str(tokenizer.decode(each[first:])) for each in ids)  # type: ignore[return-value]


def _config(model: str, tokenizer: str, served_model: str | None, values: Mapping[str, Any], folder: Path) -> RunConfig:
    """Return the configuration of one of the runs; each has the keys that mean something of it."""
    if is_url(model):
        own = {key: value for key, value in values.items() if key not in ("device", "dtype")}
        named = {} if served_model is None else {"served_model": served_model}
        return make_config({**own, **named, "model": model, "tokenizer": tokenizer, "out": str(folder)})
    if served_model is not None:
        raise UsageError(f"{shown(model)} is no server, so it has no name there: leave its --served-model out.")
    own = {key: value for key, value in values.items() if key not in SERVED_KEYS}
    return make_config({**own, "model": model, "methods": ["dense"], "footprint": False, "out": str(folder)})


def _answers(run: Run, name: str, *, whole: bool) -> pd.DataFrame:
    """Return the answered prompts of a run: PAIR_KEY; text, score, hash and tokens of the prompt end in ``_NAME``."""
    ok = run.samples[run.samples["status"] == "ok"]
    texts = [
        str(output) + (served["after_stop"] if whole else "")
        for output, served in zip(ok["output"], ok["served"], strict=True)
    ]
    kept = ok[[*PAIR_KEY, "score", "prompt_sha256", "prompt_tokens"]].assign(text=texts)
    return kept.rename(columns={key: f"{key}_{name}" for key in kept.columns if key not in PAIR_KEY})


def _differing(row: Mapping[str, Any], tokenizer: Any) -> Differing:
    first, a, b = first_difference(tokenizer, row["text_a"], row["text_b"])
    return Differing(
        task=row["task"],
        length_tokens=row["length_tokens"],
        sample=row["sample"],
        first_token=first,
        a=a,
        b=b,
        a_repeats=row["text_a"] == row["text_a_again"],
    )


def _percent(share: Interval) -> str:
    ends = "" if share.low is None else f" [{100 * share.low:.1f}, {100 * (share.high or 0):.1f}]"
    return f"{100 * share.mean:.1f} %{ends}"


@contextmanager
def _folder(out: Any) -> Iterator[Path]:
    """Give the folder of the runs: the one asked for, or one that is gone afterwards."""
    if out is not None:
        yield user_path(out, what="out")
        return
    with TemporaryDirectory(prefix="kvscope-") as folder:
        yield Path(folder)


def _write(path: Path, found: SameAnswers) -> None:
    try:
        path.write_text(json.dumps(found.plain(), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}.") from error
