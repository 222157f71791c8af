"""Needle rows: keys and values among filler, then many questions about them."""

from kvscope.harness.reference_model.curriculum import Phase, Row, Shape
from kvscope.harness.reference_model.pieces import Ids, Pieces, Slot, listing
from kvscope.harness.reference_model.templates import HEADS, NEEDLES, QUESTIONS_MANY, QUESTIONS_ONE, TYPES
from kvscope.harness.reference_model.tokenizer import BOS_ID, EOS_ID
from kvscope.tasks.draws import Draws


class NeedleRows:
    """Makes needle rows; deterministic in the draws it is given."""

    def __init__(self, pieces: Pieces, fillers: list[Ids]) -> None:
        self.pieces = pieces
        self._fillers = fillers

    def key(self, kind: str, draws: Draws, near: "list[tuple[str, str]]") -> Slot:
        """Draw a key; ``near`` holds the word pairs drawn before, and grows."""
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
        return self.value(kind, draws)

    def value(self, kind: str, draws: Draws) -> Slot:
        """Draw a value."""
        pieces = self.pieces
        if kind == "uuids":
            ids = pieces.uuid(draws, " ")
            return Slot(ids[1:], ids)
        if kind == "numbers":
            digits = draws.digits(7 if draws.unit() < 0.7 else draws.between(3, 9))
            return Slot(pieces.number(digits, ""), pieces.number(digits, " "))
        noun = draws.pick(pieces.nouns)
        return Slot(list(pieces.word(noun, "")), list(pieces.word(noun, " ")))

    def kinds(self, draws: Draws) -> tuple[str, str]:
        """Draw what a row's keys and values are."""
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

    def make(self, phase: Phase, shape: Shape, draws: Draws) -> Row | None:
        """Return one row; None where not even one needle and its question fit."""
        pieces, tokens = self.pieces, shape.tokens
        more = phase.more_uuids > 0 and draws.unit() < phase.more_uuids
        key_kind, value_kind = ("uuids", "uuids") if more else self.kinds(draws)
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
                key = self.key(key_kind, draws, near)
                if tuple(key.spaced) not in seen:
                    break
            seen.add(tuple(key.spaced))
            many = draws.between(2, 5) if multi_value and draws.unit() < 0.7 else 1
            return key, [self.value(value_kind, draws) for _ in range(many)]

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
        if not groups:
            return None

        order = list(range(len(lines)))
        draws.shuffle(order)
        place = {line: at for at, line in enumerate(order)}
        questions = self._questions(shape, draws, groups, place, type_name, multi_query, tokens - len(ids) - body)
        if not questions:
            return None
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
                return [self.pieces.any_token(draws) for _ in range(24)]

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
