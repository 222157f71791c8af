"""Training examples and the phases they come in.

Mixture after the measured recipe: random-period copying and one-token associative recall teach the circuits, the needle
forms their use. A row is a haystack followed by many questions; only answer tokens carry loss. Lengths grow phase by
phase (long rows from the start do not learn).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kvscope.harness.reference_model.documents import DocumentMaker
from kvscope.harness.reference_model.pieces import Ids, Pieces, Slot, listing
from kvscope.harness.reference_model.templates import HEADS, NEEDLES, QUESTIONS_MANY, QUESTIONS_ONE, TYPES
from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID, SPECIAL_TOKENS
from kvscope.tasks.draws import Draws


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One batch shape of a phase.

    Attributes:
        tokens: row length.
        rows: rows a step.
        questions: most questions a needle row asks.
        share: share of the phase's steps with this shape.
    """

    tokens: int
    rows: int
    questions: int
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One stretch of training.

    Attributes:
        shapes: batch shapes; each step draws one.
        steps: optimizer steps.
        lr: learning rate at the start and the end of the phase (linear between).
        copy_share, recall_share: share of random-period copying and of one-token recall; the rest are needle rows.
        multi_value_share, multi_query_share: share of needle rows with several values a key, and with questions about
            several keys at once.
        more_uuids: share of needle rows that hold UUIDs under UUIDs, beside the fifth that does anyway.
        documents: share of rows by document family (a key of ``RowMaker.documents``); needle rows give way.
        warmup_steps: steps over which the learning rate rises, where the phase is a run's first.
    """

    name: str
    shapes: tuple[Shape, ...]
    steps: int
    lr: tuple[float, float]
    copy_share: float = 0.0
    recall_share: float = 0.0
    multi_value_share: float = 0.3
    multi_query_share: float = 0.15
    more_uuids: float = 0.0
    documents: tuple[tuple[str, float], ...] = ()
    warmup_steps: int = 200

    def shape_of(self, draws: Draws) -> Shape:
        """Draw a step's shape."""
        at = draws.unit() * sum(shape.share for shape in self.shapes)
        for shape in self.shapes:
            at -= shape.share
            if at < 0:
                return shape
        return self.shapes[-1]


@dataclass(frozen=True)
class Row:
    """One training row: ``ids`` of the phase's length; the token after each position in ``answer_at`` is scored."""

    ids: Ids
    answer_at: list[int]
    family: str = "needles"


class RowMaker:
    """Makes rows of one phase; deterministic in the draws it is given."""

    def __init__(self, pieces: Pieces, documents: Mapping[str, DocumentMaker] | None = None) -> None:
        self.pieces = pieces
        self.documents = dict(documents or {})
        self.vocab_tokens = pieces.vocab_tokens
        bank = Draws("filler-bank")
        self._fillers = [pieces.filler_line(bank) for _ in range(4000)]

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

    def _any_token(self, draws: Draws) -> int:
        low = len(SPECIAL_TOKENS)
        return low + draws.below(self.vocab_tokens - low)

    def _copying(self, tokens: int, draws: Draws) -> Row:
        period = draws.between(6, tokens // 2 - 1)
        block = [self._any_token(draws) for _ in range(period)]
        ids = [BOS_ID, *(block * (tokens // period + 1))[: tokens - 1]]
        return Row(ids, list(range(tokens // 2, tokens - 1)), "copying")

    def _recall(self, tokens: int, draws: Draws) -> Row:
        """``k v`` pairs of single tokens, then keys asked again in another order."""
        mark, end = self._any_token(draws), self._any_token(draws)
        n_pairs = draws.between(2, max(2, tokens // 9))
        keys: Ids = []
        while len(keys) < n_pairs:
            key = self._any_token(draws)
            if key not in keys:
                keys.append(key)
        values = {key: self._any_token(draws) for key in keys}
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

    # -- needle rows

    def _key(self, kind: str, draws: Draws, near: "list[tuple[str, str]]") -> Slot:
        pieces = self.pieces
        if kind == "words":
            adjective, noun = draws.pick(pieces.adjectives), draws.pick(pieces.nouns)
            if near and draws.unit() < 0.4:  # distractors share a half with an earlier key
                other = draws.pick(near)
                adjective, noun = (other[0], noun) if draws.unit() < 0.5 else (adjective, other[1])
            near.append((adjective, noun))
            second = pieces.word(noun, "-")
            return Slot([*pieces.word(adjective, ""), *second], [*pieces.word(adjective, " "), *second])
        if kind == "pieces":
            ids = [draws.pick(pieces.open_tokens) for _ in range(draws.between(2, 7))]
            return Slot(ids, ids)
        return self._value(kind, draws)

    def _value(self, kind: str, draws: Draws) -> Slot:
        pieces = self.pieces
        if kind == "uuids":
            ids = pieces.uuid(draws, " ")
            return Slot(ids[1:], ids)
        if kind == "numbers":
            digits = draws.digits(7 if draws.unit() < 0.7 else draws.between(3, 9))
            return Slot(pieces.number(digits, ""), pieces.number(digits, " "))
        noun = draws.pick(pieces.nouns)
        return Slot(list(pieces.word(noun, "")), list(pieces.word(noun, " ")))

    def _kinds(self, draws: Draws) -> tuple[str, str]:
        share = draws.unit()
        if share < 0.45:
            return "words", "numbers"
        if share < 0.60:
            return "pieces", "numbers"
        if share < 0.80:
            return "uuids", "uuids"
        if share < 0.88:
            return "words", "uuids"
        if share < 0.94:
            return "words", "nouns"
        return "uuids", "numbers"

    def _needles(self, phase: Phase, shape: Shape, draws: Draws) -> Row:
        pieces, tokens = self.pieces, shape.tokens
        more = phase.more_uuids > 0 and draws.unit() < phase.more_uuids
        key_kind, value_kind = ("uuids", "uuids") if more else self._kinds(draws)
        type_name = draws.pick(TYPES)
        form = draws.pick(NEEDLES)
        one_form = draws.unit() < 0.7
        ids: Ids = [BOS_ID]
        if draws.unit() < 0.8:
            ids += pieces.render(draws.pick(HEADS), draws, kind=type_name, fill={})

        near: list[tuple[str, str]] = []
        seen: set[tuple[int, ...]] = set()

        def group() -> tuple[Slot, list[Slot]]:
            while True:
                key = self._key(key_kind, draws, near)
                if tuple(key.spaced) not in seen:
                    break
            seen.add(tuple(key.spaced))
            many = draws.between(2, 5) if multi_value and draws.unit() < 0.7 else 1
            return key, [self._value(value_kind, draws) for _ in range(many)]

        def needle(key: Slot, value: Slot) -> Ids:
            wording = form if one_form else draws.pick(NEEDLES)
            return pieces.render(wording, draws, kind=type_name, fill={"key": key, "value": value})

        style = draws.unit()
        multi_value = style < phase.multi_value_share
        multi_query = not multi_value and style < phase.multi_value_share + phase.multi_query_share
        question_room = int(tokens * (0.5 if tokens <= 512 else 0.35))
        body_room = tokens - len(ids) - question_room
        lines: list[Ids] = []
        body = 0
        groups: list[tuple[Slot, list[Slot], list[int]]] = []
        only_needles = draws.unit() < 0.4
        wanted, most = tokens, 2 * shape.questions
        if not only_needles:
            share = draws.unit()
            # Log-uniform: a lone needle in a long haystack is as familiar as a hundred.
            wanted = round(most**share)
        while len(groups) < wanted:
            key, values = group()
            made = [needle(key, value) for value in values]
            size = sum(map(len, made))
            if body + size > body_room:
                break
            groups.append((key, values, list(range(len(lines), len(lines) + len(made)))))
            lines += made
            body += size
        if not groups:  # not even one needle fits: a short row teaches recall instead
            return self._recall(tokens, draws)

        order = list(range(len(lines)))
        draws.shuffle(order)
        place = {line: at for at, line in enumerate(order)}
        questions = self._questions(shape, draws, groups, place, type_name, multi_query, tokens - len(ids) - body)
        if not questions:
            return self._recall(tokens, draws)
        asked = sum(len(q) for q, _ in questions)
        filler_room = tokens - len(ids) - body - asked
        ids += self._body([lines[i] for i in order], filler_room, draws)
        answer_at: list[int] = []
        for question, answer in questions:
            ids += question
            answer_at += range(len(ids) - answer - 1, len(ids) - 1)
        return Row(ids, answer_at)

    def _questions(
        self,
        shape: Shape,
        draws: Draws,
        groups: "list[tuple[Slot, list[Slot], list[int]]]",
        place: dict[int, int],
        type_name: str,
        multi_query: bool,
        room: int,
    ) -> list[tuple[Ids, int]]:
        """Return (ids of question and answer, answer length) until the room or the wish is used up."""
        pieces = self.pieces
        comma, colon = list(pieces.encode(",")), list(pieces.encode(":"))
        out: list[tuple[Ids, int]] = []
        wanted = 1 if draws.unit() < 0.1 else shape.questions
        for _ in range(wanted):
            n_keys = min(draws.between(2, 4), len(groups)) if multi_query else 1
            picked: list[tuple[Slot, list[Slot], list[int]]] = []
            while len(picked) < n_keys:
                one = draws.pick(groups)
                if one not in picked:
                    picked.append(one)
            answer: Ids = []
            if n_keys == 1:
                # In the order of the text: a fixed order is a learnable target.
                spoken = [
                    value for _, value in sorted(zip((place[i] for i in picked[0][2]), picked[0][1], strict=True))
                ]
                for i, value in enumerate(spoken):
                    answer += (comma if i else []) + value.spaced
            else:
                for i, (key, values, _) in enumerate(picked):
                    answer += (comma if i else []) + key.spaced + colon + values[0].spaced
            answer.append(EOS_ID)
            many = n_keys > 1 or len(picked[0][1]) > 1
            ask, begin = draws.pick(QUESTIONS_MANY if many else QUESTIONS_ONE)
            listed = listing(pieces, [key for key, _, _ in picked])
            adjectives = (draws.pick(pieces.adjectives), draws.pick(pieces.adjectives))
            fill = {"listed": listed}
            for name, word in zip("ab", adjectives, strict=True):
                fill[name] = Slot(list(pieces.word(word, "")), list(pieces.word(word, " ")))
            question = [
                *pieces.render(ask, draws, kind=type_name, fill=fill),
                *pieces.render(begin, draws, kind=type_name, fill=fill),
                *answer,
            ]
            if len(question) > room:
                break
            room -= len(question)
            out.append((question, len(answer)))
        return out

    def _body(self, lines: list[Ids], filler_room: int, draws: Draws) -> Ids:
        """Spread filler of exactly ``filler_room`` tokens among the needle lines."""
        share = draws.unit()
        if share < 0.25:
            same = draws.pick(self._fillers)

            def next_filler() -> Ids:
                return same

        elif share < 0.35:

            def next_filler() -> Ids:
                return [self._any_token(draws) for _ in range(24)]

        else:

            def next_filler() -> Ids:
                return draws.pick(self._fillers)

        fillers: list[Ids] = []
        while filler_room:
            line = next_filler()[:filler_room]
            fillers.append(line)
            filler_room -= len(line)
        at = sorted(draws.between(0, len(fillers)) for _ in lines)
        out: Ids = []
        done = 0
        for position, line in zip(at, lines, strict=True):
            for k in range(done, position):
                out += fillers[k]
            done = max(done, position)
            out += line
        for k in range(done, len(fillers)):
            out += fillers[k]
        return out
