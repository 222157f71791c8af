"""Rows of training: copying, recall, documents and needles, as a phase mixes them."""

from collections.abc import Mapping

from kvscope.harness.reference_model.curriculum import Phase, Row, Shape
from kvscope.harness.reference_model.documents import DocumentMaker
from kvscope.harness.reference_model.form_rows import FAMILIES, FormRows
from kvscope.harness.reference_model.needle_rows import NeedleRows
from kvscope.harness.reference_model.pieces import Ids, Pieces
from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID
from kvscope.tasks.draws import Draws


class RowMaker:
    """Makes rows of any phase; deterministic in the draws it is given."""

    def __init__(self, pieces: Pieces, documents: Mapping[str, DocumentMaker] | None = None) -> None:
        self.pieces = pieces
        self.documents = dict(documents or {})
        bank = Draws("filler-bank")
        self._fillers = [pieces.filler_line(bank) for _ in range(4000)]
        self.needle_rows = NeedleRows(pieces, self._fillers)
        self.form_rows = FormRows(pieces, self._fillers)

    def make(self, phase: Phase, shape: Shape, draws: Draws) -> Row:
        """Return one row."""
        share = draws.unit()
        if share < phase.copy_share:
            return self._copying(shape.tokens, draws)
        if share < phase.copy_share + phase.recall_share:
            return self._recall(shape.tokens, draws)
        share -= phase.copy_share + phase.recall_share
        for name, part in phase.documents:
            if share < part:
                if name in FAMILIES:
                    return self.form_rows.make(name, shape, draws) or self._needles(phase, shape, draws)
                return self._document(name, phase, shape, draws)
            share -= part
        return self._needles(phase, shape, draws)

    def _document(self, name: str, phase: Phase, shape: Shape, draws: Draws) -> Row:
        """A document and its questions; filler before it makes up the length."""
        encode, tokens = self.pieces.encode, shape.tokens
        room = int(tokens * (0.5 + 0.45 * draws.unit())) - 48
        document = self.documents[name](
            draws, room_tokens=room, n_questions=shape.questions, count=lambda text: len(encode(text))
        )
        lines = [i for line in document.lines for i in encode(line)]
        left = tokens - 1 - len(lines)
        questions: Ids = []
        answer_at: list[int] = []
        for question in document.questions:
            asked, answer = encode(question.prompt), (*encode(question.answer), EOS_ID)
            if len(questions) + len(asked) + len(answer) > left:
                break
            questions += asked
            answer_at += range(len(questions) - 1, len(questions) + len(answer) - 1)
            questions += answer
        if not answer_at:  # a short row and a long question
            return self._needles(phase, shape, draws)
        filler: Ids = []
        missing = left - len(questions)
        while len(filler) < missing:
            filler += draws.pick(self._fillers)[: missing - len(filler)]
        if filler:
            filler[-1] = encode("\n")[0]  # where the last line was cut
        start = 1 + missing + len(lines)
        return Row([BOS_ID, *filler, *lines, *questions], [start + at for at in answer_at], name)

    def _copying(self, tokens: int, draws: Draws) -> Row:
        period = draws.between(6, tokens // 2 - 1)
        block = [self.pieces.any_token(draws) for _ in range(period)]
        ids = [BOS_ID, *(block * (tokens // period + 1))[: tokens - 1]]
        return Row(ids, list(range(tokens // 2, tokens - 1)), "copying")

    def _recall(self, tokens: int, draws: Draws) -> Row:
        """``k v`` pairs of single tokens, then keys asked again in another order."""
        mark, end = self.pieces.any_token(draws), self.pieces.any_token(draws)
        n_pairs = draws.between(2, max(2, tokens // 9))
        keys: Ids = []
        while len(keys) < n_pairs:
            key = self.pieces.any_token(draws)
            if key not in keys:
                keys.append(key)
        values = {key: self.pieces.any_token(draws) for key in keys}
        ids: Ids = [BOS_ID]
        for key in keys:
            ids += (key, mark, values[key], end)
        answer_at: list[int] = []
        while len(ids) + 4 <= tokens:
            key = draws.pick(keys)
            ids += (key, mark, values[key], end)
            answer_at.append(len(ids) - 3)
        ids += [end] * (tokens - len(ids))
        return Row(ids[:tokens], [at for at in answer_at if at < tokens - 1], "recall")

    def _needles(self, phase: Phase, shape: Shape, draws: Draws) -> Row:
        row = self.needle_rows.make(phase, shape, draws)
        # Where not even one needle fits, a short row teaches recall instead.
        return row or self._recall(shape.tokens, draws)
