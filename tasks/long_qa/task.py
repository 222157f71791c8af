"""long_qa, long_qa_no_context and long_qa_mrcr: prompts of an exact length around one question each.

The offline stand-in for LongMemEval (arXiv 2410.10813) and LongBench-v2 (arXiv 2412.15204): dated sessions, and a
question at the end that only they can answer.
"""

from collections.abc import Sequence
from functools import cache

from kvscope.errors import UsageError, did_you_mean
from kvscope.tasks.assembly import PieceEncoder, assemble
from kvscope.tasks.base import Sample, Task, Tokenizer
from kvscope.tasks.draws import Draws
from kvscope.tasks.long_qa.lexicon import lexicon
from kvscope.tasks.long_qa.plan import Author, Plan
from kvscope.tasks.long_qa.questions import PLANNERS, POOLED
from kvscope.tasks.long_qa.render import line
from kvscope.tasks.long_qa.score import score_answer
from kvscope.tasks.long_qa.sessions import SESSION_LINES, Sessions
from kvscope.tasks.long_qa.templates import EVAL_WORDING
from kvscope.tasks.long_qa.wording import FRAME
from kvscope.tasks.long_qa.world import DAYS, World

# Evidence stays out of the first tokens (attention sinks) and of the last ones (what a recency window keeps).
SINK_TOKENS = 64
RECENCY_TOKENS = 128
RECENCY_DIVISOR = 64
DEPTH_PARTS = 10
NEW_TOKENS = 32
# Room for a reply of 20 word pairs: longer than the 64 steps between two selections.
REPLY_NEW_TOKENS = 224
TRIM_WORDS = tuple(("so it went on and on and then on again " * 14).split())
_PEOPLE = (8, 100)
_LINES_PER_PERSON = 6
_PROBES = 24


def recency_tokens(prompt_tokens: int) -> int:
    """Return how many of the last prompt tokens hold no evidence."""
    return max(RECENCY_TOKENS, prompt_tokens // RECENCY_DIVISOR)


class LongQATask(Task):
    """Questions about a story of dated sessions.

    Options:
        types: question types joined by ``+`` (default: all nine of long_qa), e.g. ``types=single_fact+hops_2``.
    """

    source = "own design, after LongMemEval (arXiv 2410.10813), LongBench-v2 (arXiv 2412.15204) and OpenAI's MRCR"

    def __init__(self, name: str, *, types: str | None = None) -> None:
        self.name = name
        own = {"long_qa_no_context": ("no_context",), "long_qa_mrcr": ("mrcr",)}.get(name, POOLED)
        self.question_types = own if types is None else tuple(types.split("+"))
        for kind in self.question_types:
            if kind not in own:
                raise UsageError(f"Task {name} has no question type '{kind}' (types=a+b).{did_you_mean(kind, own)}")
        if len(set(self.question_types)) < len(self.question_types):
            raise UsageError(f"Task {name} was given a question type twice: types={types}.")
        self.max_new_tokens = REPLY_NEW_TOKENS if self.question_types == ("mrcr",) else NEW_TOKENS

    def question_type_of(self, *, length_tokens: int, sample: int, seed: int) -> tuple[str, int]:
        """Return a sample's type and its number within the type: every block of samples has each type once."""
        types = list(self.question_types)
        block, place = divmod(sample, len(types))
        Draws("long_qa-types", self.name, seed, length_tokens, block).shuffle(types)
        return types[place], block

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return a length for the longest of some plans of every type, with slack for a longer one."""
        encoder, most = PieceEncoder(tokenizer), 0
        for kind in self.question_types:
            for k in range(_PROBES):
                plan, lines = self._plan(kind, k, _PEOPLE[0], "long_qa-probe", k)
                tail = FRAME.format(q=plan.asked[0].question)
                most = max(most, sum(len(encoder.line(text)) for text in (*lines, tail)))
        head = len(encoder.head(max(EVAL_WORDING.heads, key=len)))
        return self.max_new_tokens + -(-(head + most * 5 // 4 + RECENCY_TOKENS) // 64) * 64

    def _plan(self, kind: str, k: int, people: int, *parts: str | int) -> tuple[Plan, list[str]]:
        author = self._author(people, *parts)
        plan = PLANNERS[kind](author, k)
        return plan, [line(EVAL_WORDING, author.words, fact) for fact in plan.facts]

    @staticmethod
    def _author(people: int, *parts: str | int) -> Author:
        facts = Draws("long_qa-facts", *parts)
        names = list(lexicon("eval")["person"])
        facts.shuffle(names)
        world = World(names[:people], lexicon("eval"), unique=True)
        return Author(world, EVAL_WORDING, facts, Draws("long_qa-question", *parts), "eval")

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Build one sample (see Task.build). The deciding evidence's depth is stratified over deciles by type."""
        kind, k = self.question_type_of(length_tokens=length_tokens, sample=sample, seed=seed)
        parts = (self.name, kind, seed, length_tokens, sample)
        prompt_tokens = length_tokens - self.max_new_tokens
        lines_expected = prompt_tokens / line_tokens(tokenizer)
        people = min(_PEOPLE[1], max(_PEOPLE[0], int(lines_expected / _LINES_PER_PERSON)))
        author = self._author(people, *parts)
        plan = PLANNERS[kind](author, k)
        lines = [line(EVAL_WORDING, author.words, fact) for fact in plan.facts]
        head = author.words.pick(EVAL_WORDING.heads)
        tail = FRAME.format(q=plan.asked[0].question)
        sessions = lines_expected / (sum(SESSION_LINES) / 2 + 1) + 1
        fillers = Sessions(
            author.world,
            EVAL_WORDING,
            split="eval",
            draws=Draws("long_qa-filler", *parts),
            day_of=lambda session: int(DAYS * session / (1.1 * sessions)),
        )
        encoder = PieceEncoder(tokenizer)
        depths = _depths(plan, self._depth(kind, seed, length_tokens, k), author.facts)

        def place(count: int) -> Sequence[int]:
            low, high = _allowed(encoder, fillers, count, head=head, tail=tail, prompt_tokens=prompt_tokens)
            return [low + int(depth * (high - low + 1)) for depth in depths]

        made = assemble(
            tokenizer,
            what=f"{self.name} at length {length_tokens}",
            head=head,
            lines=lines,
            place=place,
            fillers=fillers,
            trim_words=TRIM_WORDS,
            tail=tail,
            prompt_tokens=prompt_tokens,
        )
        return made.sample(
            self,
            question_type=kind,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=sorted(made.line_spans[i] for i in plan.evidence),
            targets=plan.asked[0].answer,
        )

    def _depth(self, kind: str, seed: int, length_tokens: int, k: int) -> float:
        parts = list(range(DEPTH_PARTS))
        Draws("long_qa-depth", self.name, kind, seed, length_tokens, k // DEPTH_PARTS).shuffle(parts)
        inside = Draws("long_qa-depth-in", self.name, kind, seed, length_tokens, k).unit()
        return (parts[k % DEPTH_PARTS] + inside) / DEPTH_PARTS

    def score(self, sample: Sample, output: str) -> float:
        """Score one answer (see kvscope.tasks.long_qa.score)."""
        return score_answer(sample.question_type, sample.targets, output)


def _depths(plan: Plan, depth: float, draws: Draws) -> list[float]:
    """Return a depth in [0, 1) for every fact; the deciding one is at ``depth``, ordered ones keep their order."""
    key = plan.evidence[0] if plan.evidence else 0
    if not plan.ordered:
        return [depth if i == key else draws.unit() for i in range(len(plan.facts))]
    before = sorted(depth * draws.unit() for _ in range(key))
    after = sorted(depth + (1 - depth) * draws.unit() for _ in range(len(plan.facts) - key - 1))
    return [*before, depth, *after]


def _allowed(
    encoder: PieceEncoder, fillers: Sessions, count: int, *, head: str, tail: str, prompt_tokens: int
) -> tuple[int, int]:
    """Return the first and last number of filler lines before evidence that keep it out of sink and recency window."""
    low, high = 0, count
    tokens = len(encoder.head(head))
    while low < count and (low == 0 or tokens < SINK_TOKENS):
        tokens += len(encoder.line(fillers(low), keep=True))
        low += 1
    tokens = len(encoder.line(tail))
    while high > 0 and tokens < recency_tokens(prompt_tokens):
        high -= 1
        tokens += len(encoder.line(fillers(high), keep=True))
    # A prompt too short for both windows: anywhere after the first session's header.
    return (low, high) if low <= high else (min(1, count), count)


def line_tokens(tokenizer: Tokenizer) -> float:
    """Return the mean tokens of a filler line for a tokenizer, from a fixed stretch of filler."""
    encoder = PieceEncoder(tokenizer)
    return sum(len(encoder.line(text, keep=True)) for text in _probe_lines()) / len(_probe_lines())


@cache
def _probe_lines() -> tuple[str, ...]:
    names = lexicon("eval")["person"]
    world = World(names, lexicon("eval"), unique=True)
    fillers = Sessions(world, EVAL_WORDING, split="eval", draws=Draws("long_qa-line-probe"), day_of=lambda s: 10 * s)
    return tuple(fillers(i) for i in range(120))
