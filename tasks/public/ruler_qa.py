"""RULER's question answering (arXiv 2404.06654, appendix B): a question's own documents among others of its data set.

As in lm-eval's ``ruler_qa_squad`` and ``ruler_qa_hotpot``, documents are added by tens, as many as the first question
holds at a length, and a prompt that they make too long loses ten after ten. Other than there, the draw and the order of
documents are each sample's own (lm-eval shuffles every prompt by one seed, so that a question's own paragraph always
has the same place), the beginning of the answer counts towards the length, and the score is that of the best wording.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvscope.tasks.answers import contains_any_score
from kvscope.tasks.base import Sample, Tokenizer
from kvscope.tasks.draws import Draws
from kvscope.tasks.public.built import Parts, built, encoded
from kvscope.tasks.public.lm_eval_files import lm_eval_constants, no_prompt
from kvscope.tasks.public.ruler_qa_data import READERS, Question
from kvscope.tasks.public.task import BenchmarkTask
from kvscope.units import Tokens

STEP_DOCUMENTS = 10
NEW_TOKENS = 32
_FILE = Path("tasks", "ruler", "qa_utils.py")
_MARK = "\0context\0"


class _Wording(NamedTuple):
    """lm-eval's words: of the prompt ({context}, {query}), of a document ({i}, {document}), where the answer begins."""

    prompt: str
    document: str
    answer: str


class RulerQATask(BenchmarkTask[Question]):
    """Questions of SQuAD or HotpotQA, in the order of the file, among as many documents as the length holds.

    The prompt is that of the installed lm-eval. An answer counts where one of the accepted wordings is in it; lm-eval
    averages over them.

    Args:
        data: JSON file as SQuAD 2.0 or HotpotQA (distractor) have it; none: what ``kvscope tasks fetch`` brought.
        new_tokens: room left for an answer.
    """

    fills_length = True
    stop = ()
    source = "RULER, arXiv 2404.06654, appendix B; prompt of lm-eval; score of the best accepted wording"

    def __init__(self, name: str, *, data: str | None = None, new_tokens: Tokens = NEW_TOKENS) -> None:
        corpus = READERS[name](name, data)
        self._documents = corpus.documents
        self._type = name.removeprefix("ruler_")
        self._counts: tuple[Tokenizer, dict[tuple[int, int], int]] | None = None
        none = f"The data of {name} has no question with an answer."
        super().__init__(name, corpus.questions, data_sha256=corpus.sha256, new_tokens=new_tokens, none=none)

    def parts(self, question: Question) -> Parts:
        """Return the prompt with the question's own documents alone."""
        return self._parts(question, question.own)

    def type_of(self, question: Question) -> str:
        """Return the data set."""
        return self._type

    def targets_of(self, question: Question) -> tuple[str, ...]:
        """Return every accepted wording."""
        return question.answers

    def least_length_tokens(self, tokenizer: Tokenizer, *, samples: int) -> int:
        """Return the length that the own documents of each of the first questions fit into, and an answer."""
        # In another order, documents may join their neighbours in other tokens: one more for each.
        return self.max_new_tokens + max(
            len(encoded(tokenizer, self.parts(question).text)) + len(question.own)
            for question in self._questions[:samples]
        )

    def build(self, tokenizer: Tokenizer, *, length_tokens: int, sample: int, seed: int) -> Sample:
        """Return question ``sample`` among documents that the seed draws for it (see Task.build)."""
        question = self._questions[sample]
        room_tokens = length_tokens - self.max_new_tokens
        least = len(question.own)
        most = max(self._count(tokenizer, room_tokens=room_tokens, seed=seed), least)
        parts = self.parts(question)
        for count in (*range(most, least, -STEP_DOCUMENTS), least):
            parts = self._parts(question, self._drawn(question, count, sample=sample, seed=seed))
            if len(encoded(tokenizer, parts.text)) <= room_tokens:
                break
        what = f"Question {sample + 1} of {self.name} with its own documents alone"
        made = built(tokenizer, parts, room_tokens=room_tokens, cuts=False, what=what)
        return made.assembled.sample(
            self,
            question_type=self._type,
            length_tokens=length_tokens,
            sample=sample,
            seed=seed,
            evidence=made.evidence,
            targets=question.answers,
            stop=self.stop,
        )

    def score(self, sample: Sample, output: str) -> float:
        """Return 1 where an accepted wording is in the output, case ignored."""
        return contains_any_score(sample.targets, output)

    def _count(self, tokenizer: Tokenizer, *, room_tokens: int, seed: int) -> int:
        """Return the documents that prompts of a length begin with: what the first question holds, by tens."""
        counts = self._counts
        if counts is None or counts[0] is not tokenizer:
            self._counts = counts = tokenizer, {}
        known = counts[1]
        if (room_tokens, seed) not in known:
            known[room_tokens, seed] = self._first_count(tokenizer, room_tokens=room_tokens, seed=seed)
        return known[room_tokens, seed]

    def _first_count(self, tokenizer: Tokenizer, *, room_tokens: int, seed: int) -> int:
        question = self._questions[0]
        # RULER measures the first question with its answers behind it, as Python writes a list.
        answers = f" {list(question.answers)}"

        def fits(steps: int) -> bool:
            drawn = self._drawn(question, steps * STEP_DOCUMENTS, sample=0, seed=seed)
            return len(encoded(tokenizer, self._parts(question, drawn).text + answers)) <= room_tokens

        all_steps = max(1, len(self._documents) // STEP_DOCUMENTS)
        beyond = 1
        while beyond <= all_steps and fits(beyond):
            beyond *= 2
        if beyond > all_steps and fits(all_steps):
            return len(self._documents)
        low, high = beyond // 2, min(beyond, all_steps)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return max(1, low * STEP_DOCUMENTS)

    def _drawn(self, question: Question, count: int, *, sample: int, seed: int) -> list[int]:
        """Return the documents of a prompt in their order: its own, then of its article, then any.

        More documents hold the fewer ones, at whatever length.
        """
        if count >= len(self._documents):
            found = list(range(len(self._documents)))
        else:
            draws = Draws("ruler_qa", self.name, seed, sample)
            near = [index for index in question.article if index not in question.own]
            draws.shuffle(near)
            found = [*question.own, *near][: max(count, len(question.own))]
            taken = {*question.own, *near}
            while len(found) < count:
                index = draws.below(len(self._documents))
                if index not in taken:
                    taken.add(index)
                    found.append(index)
        Draws("ruler_qa-order", self.name, seed, sample, count).shuffle(found)
        return found

    def _parts(self, question: Question, drawn: "list[int] | tuple[int, ...]") -> Parts:
        wording = _wording()
        texts, evidence, at = [], [], 0
        for number, index in enumerate(drawn, start=1):
            text = wording.document.format(i=number, document=self._documents[index])
            if index in question.evidence:
                evidence.append((at, at + len(text)))
            texts.append(text)
            at += len(text) + 2
        head, _, tail = wording.prompt.format(context=_MARK, query=question.text).partition(_MARK)
        # As lm-eval joins a prompt and the beginning of its answer.
        between = "" if tail[-1:].isspace() or wording.answer[:1].isspace() else " "
        return Parts(head=head, context="\n\n".join(texts), tail=tail + between + wording.answer, evidence=evidence)


@cache
def _wording() -> _Wording:
    """Return lm-eval's words of both tasks.

    Raises:
        EnvironmentProblem: the installed lm-eval has none.
    """
    constants = lm_eval_constants(_FILE)
    config = constants.get("CONFIG")
    config = config if isinstance(config, dict) else {}
    found = (config.get("template"), constants.get("DOCUMENT_PROMPT"), config.get("answer_prefix"))
    needed = (("{context}", "{query}"), ("{i}", "{document}"), ())
    for text, fields in zip(found, needed, strict=True):
        if not isinstance(text, str) or not all(field in text for field in fields):
            raise no_prompt("ruler_qa_squad")
    return _Wording(*map(str, found))
