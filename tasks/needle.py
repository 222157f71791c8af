"""Needle-in-a-haystack tasks after RULER (arXiv 2404.06654, appendix B), with generators of our own.

Where RULER falls short, these differ: prompts have exactly the length asked for, the needle's depth is stratified over
deciles instead of drawn from one fixed seed, and every sample logs its evidence spans. The queried words never occur
in the training data of the reference model (kvscope.tasks.words).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvscope.errors import UsageError
from kvscope.paths import user_path
from kvscope.results.reading import parse_json, read_regular
from kvscope.tasks import prose
from kvscope.tasks.assembly import assemble
from kvscope.tasks.base import Sample, Task, Tokenizer, contains_all_score, text_sha256
from kvscope.tasks.draws import Draws, stratified_depth
from kvscope.tasks.words import words

Haystack = Literal["noise", "needle", "prose", "essay"]
Kind = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# The last, shorter filler line is cut from these: plain words without punctuation are one token each in nearly every
# vocabulary, so any length can be met.
TRIM_WORDS = tuple(("There we go and there and back again and " * 12).split())
NEW_TOKENS = 128
MOST_ESSAY_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class NeedleSpec:
    """RULER's parameters of one NIAH variant."""

    haystack: Haystack
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1


SPECS: dict[str, NeedleSpec] = {
    "niah_single_1": NeedleSpec(haystack="noise"),
    "niah_single_2": NeedleSpec(haystack="essay"),
    "niah_single_3": NeedleSpec(haystack="essay", value_kind="uuids"),
    "niah_multikey_1": NeedleSpec(haystack="essay", n_keys=4),
    "niah_multikey_2": NeedleSpec(haystack="needle"),
    "niah_multikey_3": NeedleSpec(haystack="needle", key_kind="uuids", value_kind="uuids"),
    "niah_multivalue": NeedleSpec(haystack="prose", n_values=4),
    "niah_multiquery": NeedleSpec(haystack="prose", n_keys=4, n_queries=4),
}


def _draw(draws: Draws, kind: Kind) -> str:
    if kind == "numbers":
        return draws.digits(7)
    if kind == "uuids":
        return draws.uuid()
    lists = words("eval")
    return f"{draws.pick(lists.adjectives)}-{draws.pick(lists.nouns)}"


def _needle(key: str, value: str, kind: Kind) -> str:
    return f"One of the special magic {kind} for {key} is: {value}.\n"


def _listing(keys: Sequence[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]


def _data_lines(path: Path) -> tuple[str, ...]:
    """Read an essay file: plain text, or RULER's JSON ``{"text": ...}``; one line a sentence group."""
    data = read_regular(
        user_path(path, what="data"), most_bytes=MOST_ESSAY_BYTES, mend="Pass a text file with data=PATH."
    )
    if data is None:
        raise UsageError(
            f"Cannot read the essay file '{path}' (No such file or directory): pass an existing text file with "
            "data=PATH."
        )
    try:
        raw = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"The essay file '{path}' is not UTF-8 text: convert it, or pass another one.") from error
    if path.suffix == ".json":
        try:
            raw = parse_json(raw)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"The essay file '{path}' is not JSON with a 'text' field, as RULER's is.") from error
        if not isinstance(raw, str):
            raise UsageError(f"The 'text' of the essay file '{path}' is not text.")
    lines = tuple(" ".join(part.split()) + "\n" for part in raw.splitlines() if part.strip())
    if not lines:
        raise UsageError(f"The essay file '{path}' holds no text: pass one with at least one line.")
    return lines


class NeedleTask(Task):
    """One NIAH variant.

    Args:
        name: a key of ``SPECS``.
        data: text file for the essay haystack; ``niah_multivalue`` and ``niah_multiquery`` use the built-in prose
            without it.
    """

    source = "RULER, arXiv 2404.06654, appendix B"

    def __init__(self, name: str, *, data: str | None = None) -> None:
        self.name = name
        self.spec = SPECS[name]
        self.max_new_tokens = NEW_TOKENS
        self.question_types = (name.removeprefix("niah_"),)
        self.data = Path(data) if data is not None else None
        if self.spec.haystack in ("noise", "needle") and self.data is not None:
            raise UsageError(f"{name} takes no data file: its haystack is fixed. Remove data=.")
        if self.spec.haystack == "essay" and self.data is None:
            raise UsageError(
                f"{name} hides its needle in essays, which kvscope does not ship: pass a text file (or RULER's "
                f"PaulGrahamEssays.json) as {name}:data=PATH."
            )
        # Read once: every prompt of a run comes from the same text.
        self._essay = () if self.data is None else _data_lines(self.data)
        self.data_sha256 = text_sha256("".join(self._essay)) if self._essay else None

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the answer room plus twice the tokens of a sample's fixed parts, in steps of 64."""
        kind, n_needles = self.spec.value_kind, self.spec.n_keys * self.spec.n_values
        sample = Draws("min", self.name)
        keys = [_draw(sample, self.spec.key_kind) for _ in range(max(self.spec.n_queries, 1))]
        fixed = self._head() + _needle(keys[0], _draw(sample, kind), kind) * n_needles + self._tail(keys)
        tokens = 2 * len(tokenizer(fixed, add_special_tokens=True)["input_ids"])
        return self.max_new_tokens + -(-tokens // 64) * 64

    def _head(self) -> str:
        kind = self.spec.value_kind
        one = self.spec.n_values * self.spec.n_queries == 1
        first = f"A special magic {kind[:-1]} is" if one else f"Some special magic {kind} are"
        asked = kind[:-1] if one else kind
        return (
            f"{first} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {asked} afterwards.\n"
        )

    def _tail(self, queries: Sequence[str]) -> str:
        kind, listed = self.spec.value_kind, _listing(queries)
        if self.spec.n_values * self.spec.n_queries == 1:
            about = f"special magic {kind[:-1]} for {listed} mentioned in the provided text"
            return f"What is the {about}? The {about} is"
        about = f"special magic {kind} for {listed} mentioned in the provided text"
        return f"What are all the {about}? The {about} are"

    def _fillers(self, draws: Draws, taken: set[str]) -> Callable[[int], str]:
        if self.spec.haystack == "noise":
            return lambda _: NOISE + "\n"
        if self.data is not None:
            lines = self._essay
            start = draws.below(len(lines))
            return lambda i: lines[(start + i) % len(lines)]
        if self.spec.haystack == "prose":
            return lambda _: prose.line(draws)

        def distractor(_: int) -> str:
            key = _draw(draws, self.spec.key_kind)
            while key in taken:
                key = _draw(draws, self.spec.key_kind)
            value = _draw(draws, self.spec.value_kind)
            while value in taken:  # an answer that stands in the filler could be hit by luck
                value = _draw(draws, self.spec.value_kind)
            taken.add(key)
            return _needle(key, value, self.spec.value_kind)

        return distractor

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Build one sample (see Task.build). The first queried needle's depth is stratified over deciles."""
        spec = self.spec
        draws = Draws("needle", self.name, seed, length_tokens, sample)
        keys: list[str] = []
        while len(keys) < spec.n_keys:
            key = _draw(draws, spec.key_kind)
            if key not in keys:
                keys.append(key)
        values: list[str] = []
        while len(values) < spec.n_keys * spec.n_values:
            value = _draw(draws, spec.value_kind)
            if value not in values:
                values.append(value)
        lines = [
            _needle(key, values[i * spec.n_values + j], spec.value_kind)
            for i, key in enumerate(keys)
            for j in range(spec.n_values)
        ]
        n_evidence = spec.n_queries * spec.n_values
        first_depth = stratified_depth(self.name, seed=seed, length_tokens=length_tokens, sample=sample)
        depths = [first_depth, *(draws.unit() for _ in lines[1:])]
        tail = self._tail(keys[: spec.n_queries])
        made = assemble(
            tokenizer,
            what=f"{self.name} at length {length_tokens}",
            head=self._head(),
            lines=lines,
            place=lambda count: [int(depth * (count + 1)) for depth in depths],
            fillers=self._fillers(draws, {*keys, *values}),
            trim_words=TRIM_WORDS,
            tail=tail,
            prompt_tokens=length_tokens - self.max_new_tokens,
        )
        return made.sample(
            self,
            question_type=self.question_types[0],
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=sorted(made.line_spans[:n_evidence]),
            targets=values[:n_evidence],
        )

    def score(self, sample: Sample, output: str) -> float:
        """Share of the queried values found in the output (RULER's string_match_all)."""
        return contains_all_score(sample.targets, output)
