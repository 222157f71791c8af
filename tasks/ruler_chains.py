"""Variable tracking after RULER (arXiv 2404.06654, appendix B): one chain of four hops, asked by its number.

RULER's vt hides a single chain, so every variable in the text is an answer and copying names scores. Here three chains
over other numbers stand beside the one that is asked, no in-context example is given, lengths are exact, and the
chain's mean depth is stratified over deciles.
"""

import string
from itertools import pairwise

from kvscope.tasks.assembly import assemble
from kvscope.tasks.base import Sample, Task, Tokenizer, contains_all_score
from kvscope.tasks.draws import Draws, stratified_depth
from kvscope.tasks.needle import NOISE, TRIM_WORDS

HOPS = 4
CHAINS = 4
NAME_LETTERS = 5
VALUE_DIGITS = 5
# RULER leaves 30, which ends the answer early where a name takes a token a letter. " VAR ABCDE," five times is 55
# tokens even for a tokenizer of single characters.
NEW_TOKENS = 60
HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"


def tail(value: str) -> str:
    """Return the question and the beginning of its answer."""
    return (
        f"Question: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
        f"chain(s) of variable assignment in the text above, {HOPS + 1} variables are assigned the value {value}, they "
        "are:"
    )


def chain_lines(names: list[str], value: str) -> list[str]:
    """Return a chain's statements: the first name is given the value, every other copies the one before it."""
    copies = [f"VAR {new} = VAR {old}\n" for old, new in pairwise(names)]
    return [f"VAR {names[0]} = {value}\n", *copies]


def spread(depths: list[float], mean: float) -> list[float]:
    """Return ascending depths moved towards the nearer end of [0, 1] so that their mean is ``mean``."""
    was = sum(depths) / len(depths)
    if mean <= was:
        return sorted(depth * mean / was for depth in depths)
    return sorted(1 - (1 - depth) * (1 - mean) / (1 - was) for depth in depths)


class VariableTrackingTask(Task):
    """RULER's vt."""

    source = "RULER, arXiv 2404.06654, appendix B"

    def __init__(self, name: str) -> None:
        self.name = name
        self.max_new_tokens = NEW_TOKENS
        self.question_types = ("variable_tracking",)

    def min_length_tokens(self, tokenizer: Tokenizer) -> int:
        """Return the answer room plus 1.25 times the tokens of a sample's fixed parts, in steps of 64."""
        chains, values = self._chains(Draws("min", self.name))
        lines = [line for names, value in zip(chains, values, strict=True) for line in chain_lines(names, value)]
        fixed = HEAD + "".join(lines) + (NOISE + "\n") * 2 + tail(values[0])
        tokens = 5 * len(tokenizer(fixed, add_special_tokens=True)["input_ids"]) // 4
        return self.max_new_tokens + -(-tokens // 64) * 64

    def _chains(self, draws: Draws) -> tuple[list[list[str]], list[str]]:
        names: dict[str, None] = {}
        while len(names) < CHAINS * (HOPS + 1):
            names["".join(draws.pick(string.ascii_uppercase) for _ in range(NAME_LETTERS))] = None
        values: dict[str, None] = {}
        while len(values) < CHAINS:
            values[draws.digits(VALUE_DIGITS)] = None
        flat = list(names)
        return [flat[i : i + HOPS + 1] for i in range(0, len(flat), HOPS + 1)], list(values)

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Build one sample (see Task.build)."""
        draws = Draws("vt", self.name, seed, length_tokens, sample)
        chains, values = self._chains(draws)
        lines, depths = list[str](), list[float]()
        for index, (names, value) in enumerate(zip(chains, values, strict=True)):
            lines += chain_lines(names, value)
            at = sorted(draws.unit() for _ in names)
            if index == 0:
                wanted = stratified_depth(self.name, seed=seed, length_tokens=length_tokens, sample=sample)
                at = spread(at, wanted)
            depths += at
        made = assemble(
            tokenizer,
            what=f"{self.name} at length {length_tokens}",
            head=HEAD,
            lines=lines,
            place=lambda count: [int(depth * (count + 1)) for depth in depths],
            fillers=lambda _: NOISE + "\n",
            trim_words=TRIM_WORDS,
            tail=tail(values[0]),
            prompt_tokens=length_tokens - self.max_new_tokens,
        )
        evidence = made.line_spans[: HOPS + 1]
        assert evidence == sorted(evidence), "a name must be given its number before it is copied"
        return made.sample(
            self,
            question_type=self.question_types[0],
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=evidence,
            targets=chains[0],
            stop=(),
        )

    def score(self, sample: Sample, output: str) -> float:
        """Share of the chain's names found in the output (RULER's string_match_all)."""
        return contains_all_score(sample.targets, output)
