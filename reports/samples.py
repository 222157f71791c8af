"""Prompts of a run with what each method answered: which to show, as text and as plain values."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvscope.errors import UsageError, did_you_mean
from kvscope.reports.units import length_text, number
from kvscope.results.frames import Run, records
from kvscope.results.plain_text import shortened, visible
from kvscope.terminal import folded
from kvscope.units import parse_length

_COLUMNS = [
    "task", "length_tokens", "sample", "seed", "question_type", "depth", "context_id", "prompt_sha256", "prompt_tokens",
    "targets",
]  # fmt: skip
_ANSWER_COLUMNS = ["method_label", "status", "reason", "score", "output", "stop_reason", "tie"]
_MOST_OUTPUT_CHARS = 400
_AROUND_CHARS = 160
_MARKS = (">>>", "<<<")

Evidence = Sequence[tuple[int, int]]
Segment = Literal["text", "evidence", "gap"]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Which prompts to show.

    Attributes:
        methods: labels; none: all. A prompt is shown where one of them is as the rest asks.
        tasks, lengths: none: all.
        failed: answers without full score, or none at all.
        differs_from: answers whose score is not that of this label.
    """

    methods: Sequence[str] = ()
    tasks: Sequence[str] = ()
    lengths: Sequence[str] = ()
    failed: bool = False
    differs_from: str | None = None


def found_prompts(run: Run, wanted: Wanted) -> list[dict[str, Any]]:
    """Return the prompts that are wanted, each with `answers`: one mapping a method, in the run's order.

    Raises:
        UsageError: a method, task or length that the run does not have.
    """
    info = run.info
    labels = [method.label for method in info.methods]
    shown = _known(wanted.methods, labels, "method", run) or labels
    if wanted.differs_from is not None:
        _known([wanted.differs_from], labels, "method", run)
    tasks = _known(wanted.tasks, info.tasks, "task", run) or list(info.tasks)
    known = [length_text(length) for length in info.lengths_tokens]
    lengths = _known([length_text(parse_length(text)) for text in wanted.lengths], known, "length", run) or known
    answers = {label for label in labels if label in shown or label == wanted.differs_from}
    rows = run.samples[run.samples["method_label"].isin(answers) & run.samples["task"].isin(tasks)]
    rows = rows[[length_text(length) in lengths for length in rows["length_tokens"]]]
    prompts: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in records(rows[[*_COLUMNS, *_ANSWER_COLUMNS]]):
        key = (info.tasks.index(row["task"]), row["length_tokens"], row["sample"])
        prompt = prompts.setdefault(key, {name: row[name] for name in _COLUMNS} | {"answers": []})
        prompt["answers"].append({name: row[name] for name in _ANSWER_COLUMNS})
    for prompt in prompts.values():
        prompt["answers"].sort(key=lambda answer: labels.index(answer["method_label"]))
    return [prompt for _, prompt in sorted(prompts.items()) if _is_wanted(prompt, shown, wanted)]


def _known(asked: Sequence[str], known: Sequence[str], what: str, run: Run) -> list[str]:
    for name in asked:
        if name not in known:
            raise UsageError(f"{run.folder} has no {what} {name!r}.{did_you_mean(name, known)}")
    return list(dict.fromkeys(asked))


def _is_wanted(prompt: dict[str, Any], shown: Sequence[str], wanted: Wanted) -> bool:
    scores = {answer["method_label"]: answer["score"] for answer in prompt["answers"]}
    other = wanted.differs_from
    if other is not None and other not in scores:
        return False
    return any(
        (not wanted.failed or scores[label] is None or scores[label] < 1)
        and (other is None or scores[label] != scores[other])
        for label in shown
        if label in scores
    )


def samples_text(
    prompts: Sequence[dict[str, Any]],
    *,
    n_found: int,
    prompt_of: Callable[[dict[str, Any]], tuple[str, Evidence]] | None = None,
    width: int | None = None,
) -> str:
    """Return prompts as text.

    Args:
        prompts: of `found_prompts`, those to show.
        n_found: how many there are.
        prompt_of: gives a prompt's text and where its evidence stands; None: texts are not shown.
        width: columns of a line; None for any.
    """
    if not n_found:
        return "No prompt of the run is like that."
    parts = []
    for prompt in prompts:
        parts.append("\n".join(_lines(prompt, width)))
        if prompt_of is not None:
            parts[-1] += "\n" + folded(marked(*prompt_of(prompt)), width)
    return "\n\n".join([*parts, f"{len(prompts)} of {n_found} prompts are shown."])


def _lines(prompt: dict[str, Any], width: int | None) -> list[str]:
    facts = [
        prompt["task"],
        length_text(prompt["length_tokens"]),
        f"sample {prompt['sample']}",
        f"seed {prompt['seed']}",
    ]
    if prompt["question_type"] != prompt["task"]:
        facts.append(prompt["question_type"])
    if prompt["depth"] is not None:
        facts.append(f"depth {prompt['depth']:.2f}")
    facts.append(f"{prompt['prompt_tokens']:,} tokens, hash {prompt['prompt_sha256'][:12]}")
    targets = ", ".join(_quoted(target) for target in prompt["targets"])
    room = max(len("targets"), *(len(answer["method_label"]) for answer in prompt["answers"]))
    lines = [folded(", ".join(facts), width), folded(f"  {'targets':<{room}}        {targets}", width)]
    for answer in prompt["answers"]:
        score = answer["status"] if answer["score"] is None else number(answer["score"])
        said = answer["reason"] if answer["output"] is None else _quoted(answer["output"])
        tie = " (a tie: steps of its own may give another)" if answer["tie"] else ""
        lines.append(folded(f"  {answer['method_label']:<{room}}  {score:<5} {said}{tie}", width))
    return lines


def _quoted(text: str) -> str:
    return f'"{shortened(visible(text), most=_MOST_OUTPUT_CHARS)}"'


def marked(text: str, evidence: Evidence) -> str:
    """Return a prompt's start, end and evidence (between `>>>` and `<<<`) with what stands around; gaps are counted."""
    parts = []
    for kind, part in segments(text, evidence):
        if isinstance(part, int):
            parts.append(f"\n[{part:,} characters]\n")
        else:
            parts.append(f"{_MARKS[0]}{part}{_MARKS[1]}" if kind == "evidence" else part)
    return "".join(parts)


def segments(text: str, evidence: Evidence) -> list[tuple[Segment, str | int]]:
    """Return a prompt's start, end and evidence with what stands around, in order: texts, or a gap's characters."""
    keep = [(0, _AROUND_CHARS), (len(text) - _AROUND_CHARS, len(text))]
    keep += [(start - _AROUND_CHARS, end + _AROUND_CHARS) for start, end in evidence]
    cuts = sorted({place for span in evidence for place in span})
    parts: list[tuple[Segment, str | int]] = []
    at = 0
    for first, last in sorted((max(0, start), min(len(text), end)) for start, end in keep):
        if first > at:
            parts.append(("gap", first - at))
            at = first
        for place in [*(cut for cut in cuts if at < cut < last), last]:
            if place > at:
                inside = any(start <= at and place <= end for start, end in evidence)
                parts.append(("evidence" if inside else "text", text[at:place]))
                at = place
    return parts


def samples_values(
    prompts: Sequence[dict[str, Any]],
    *,
    n_found: int,
    prompt_of: Callable[[dict[str, Any]], tuple[str, Evidence]] | None = None,
) -> dict[str, Any]:
    """Return the same as plain values; a prompt's `text` is whole, `evidence` counts its characters."""
    values = []
    for prompt in prompts:
        texts = {}
        if prompt_of is not None:
            text, evidence = prompt_of(prompt)
            texts = {"text": text, "evidence": [list(span) for span in evidence]}
        values.append({**prompt, "targets": list(prompt["targets"]), **texts})
    return {"n_found": n_found, "prompts": values}
