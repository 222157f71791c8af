"""Chains of variables in many forms: syntaxes, names, values, one chain or many, whole chains or single steps asked."""

import string
from collections.abc import Callable
from dataclasses import dataclass, field

from kvscope.harness.reference_model.forms.noise import fresh_word
from kvscope.harness.reference_model.forms.problem import Asked, Problem, Tools
from kvscope.harness.reference_model.templates_ruler import CHAIN_FORMS, MORE_TAGS, TAGGED_FORMS, TAGS
from kvscope.harness.reference_model.wording_composed import expand
from kvscope.tasks.draws import Draws
from kvscope.tasks.words import words

_MOST_HOPS = 6
_MOST_CHAINS = 160
# (gives a value, copies a name): {x} new, {y} old, {v} value, {tag} a word before names. Never evaluation's own line.
_SYNTAX = (
    *((give.rstrip(), copy.rstrip()) for give, copy in (*CHAIN_FORMS, *TAGGED_FORMS)),
    ("let {x} be {v}", "let {x} be {y}"),
    ("let {x} be {v}.", "let {x} be equal to {y}."),
    ("{x} := {v}", "{x} := {y}"),
    ("{x}={v}", "{x}={y}"),
    ("{x} = {v};", "{x} = {y};"),
    ("{x} <- {v}", "{x} <- {y}"),
    ("{x} == {v}", "{x} == {y}"),
    ("{v} -> {x}", "{y} -> {x}"),
    ("{x}: {v}", "{x}: {y}"),
    ("set {x} to {v}", "set {x} to {y}"),
    ("{tag} {x} = {v} ", "{tag} {x} = {tag} {y} "),
    ("{tag} {x} = {v} ", "{tag} {x} = {y} "),
    ("{tag} {x} <- {v}", "{tag} {x} <- {tag} {y}"),
    ("{tag} {x}: {v}", "{tag} {x}: {tag} {y}"),
    ("{tag} {x} takes {v}", "{tag} {x} takes {tag} {y}"),
    ("ASSIGN {v} TO {x}", "ASSIGN {y} TO {x}"),
    ("MOV {x}, {v}", "MOV {x}, {y}"),
    ("const {x} = {v};", "const {x} = {y};"),
    ("int {x} = {v}", "int {x} = {y}"),
    ("{x} is set to {v}.", "{x} is set to {y}."),
    ("The value of {x} is {v}.", "The value of {x} is that of {y}."),
    ("{x} equals {v},", "{x} equals {y},"),
    ("{x} got {v} first.", "{x} took over from {y}."),
    ("Give {x} the number {v}.", "Give {x} whatever {y} has."),
)
_MORE_TAGS = (
    "var",
    "Var",
    "VARS",
    "VAL",
    "val",
    "PARAM",
    "FIELD",
    "VBL",
    "V",
    "$",
    "symbol",
    "register",
    "NODE",
    "PTR",
)
_HEADS = (
    "<Follow|Trace|Watch|Keep track of> <how|where> <values|numbers> <go|pass|are handed on|move> from <name to name|one name to the next> in <the text|this text|what follows|the passage> <below|that comes next|>.",
    "<Somewhere|Scattered|Spread out> in the <text|lines|passage> below, <names|variables|letters> are <set|given values|bound>. <Remember|Note|Keep in mind> <which|who> <copies whom|gets what|has which value>.",
    "<The|This> <text|passage|note|page> <contains|holds|has> <assignments|chains of copies|definitions> between <other|unrelated> <lines|sentences>. <Read|Study> it <closely|with care|to the end>.",
    "<Read|Study> <the|this> <text|passage|listing> and <tell|work out|answer> <which names|who> <end up with|share|have> <a|the asked|some> value.",
    "<Variables|Names> are <assigned|defined|set> in <this|the> <text|document>; <a question|questions> <about them|> <comes|follow> <at the end|afterwards|later>.",
    "Task: <chain|variable|name> <tracing|following|lookup>.",
)  # fmt: skip
_WHOLE = (
    "<Which|What> <names|variables|{tag}s|symbols> <hold|have|carry|end up with|got|are worth|stand for> {v}<, directly or not| in the end|, straight or by copying|>?",
    "<List|Name|Give|State|Write> <all|every one of the|the|each of the> {n} <names|variables|symbols> <whose value is|equal to|bound to|set to|that lead to|tied to> {v}.",
    "<Who|What> <has|shares|holds|carries> <the value|the number|> {v}<, counting copies of copies|, copies included|>?",
    "<Find|Collect|Gather> <everything|all names|all> <that got|that holds|bound to|which equals> {v}<, step by step|, link by link|>.",
    "<Starting from|Beginning with|From> {v}, which <names|variables> <come one after the other|does the value reach|are reached|get it>?",
)  # fmt: skip
_WHOLE_BEGIN = (
    "<The|In order, the|Altogether the> <names|variables|{tag}s> <are|would be>",
    "<Those|The ones|The {n}> <with|holding|worth|bound to> {v} are:",
    "<{n}|Exactly {n}|In total {n}> <names|variables> <hold|have|carry|reach> {v}:",
    "<Tracing|Following|Walking> <the copies|the links|the text|it> <from {v}|back|down|through>, <we get|one finds|these come up|I find>:",
    "{v} <is held by|belongs to|goes to|reached>",
    "",
)
_COPY = (
    ("<Whose value|What|Which name> did {x} <take|copy|take over>?", "{x} took it from"),
    ("<Where|From whom> <did|does> {x} get its value<| from>?", "From"),
)
_VALUE = (
    ("<What|Which value|Which number> was {x} <set to|given|assigned>?", "{x} was <set to|given>"),
    ("<Give|State|Tell me> the value of {x}.", "The value of {x} is"),
)


def _capitals(low: int, high: int) -> Callable[[Draws], str]:
    return lambda draws: "".join(draws.pick(string.ascii_uppercase) for _ in range(draws.between(low, high)))


# How names look, in the share they have. The same look in the whole problem.
_NAMES: tuple[tuple[Callable[[Draws], str], float], ...] = (
    (_capitals(5, 5), 0.42),
    (_capitals(3, 3), 0.08),
    (_capitals(4, 7), 0.08),
    (lambda draws: draws.pick("abcdefghijkmnpqrstuvwxyz") + str(draws.between(1, 999)), 0.08),
    (lambda draws: draws.pick("ABCDEFGHKMNPQRSTUVWXYZ") + str(draws.between(10, 99)), 0.04),
    (lambda draws: draws.pick(words("train").nouns), 0.1),
    (lambda draws: fresh_word(draws).capitalize(), 0.06),
    (lambda draws: f"{draws.pick(words('train').adjectives)}_{draws.pick(words('train').nouns)}", 0.06),
    (lambda draws: "".join(draws.pick(string.ascii_lowercase) for _ in range(draws.between(4, 6))), 0.05),
    (lambda draws: "".join(draws.pick(string.ascii_letters + string.digits) for _ in range(5)), 0.03),
)


def _names(draws: Draws) -> Callable[[Draws], str]:
    at = draws.unit()
    for make, share in _NAMES:
        at -= share
        if at < 0:
            return make
    return _NAMES[0][0]


@dataclass
class ChainWording:
    """One row's wording of variable chains (see ``Wording``)."""

    draws: Draws
    head: str = field(init=False)

    def __post_init__(self) -> None:
        draws = self.draws
        self.tag = draws.pick((*TAGS, *MORE_TAGS, *_MORE_TAGS))
        self.head = expand(draws.pick(_HEADS), draws)
        self.syntax = draws.pick(_SYNTAX) if draws.unit() < 0.85 else None
        self.name, self.small_name = _names(draws), _names(draws)
        if draws.unit() < 0.6:
            self.small_name = self.name
        self.digits = 5 if draws.unit() < 0.6 else draws.between(2, 8)
        self.hops = draws.between(1, _MOST_HOPS) if draws.unit() < 0.5 else None
        self.whole = self._pair()
        self.one_whole = draws.unit() < 0.7
        self.steps_share = 0.25 if draws.unit() < 0.5 else 0.0

    def _pair(self) -> tuple[str, str]:
        draws = self.draws
        begin = expand(draws.pick(_WHOLE_BEGIN), draws)
        return expand(draws.pick(_WHOLE), draws), begin

    def problem(self, draws: Draws, tools: Tools, *, room_tokens: int, n_questions: int, small: bool) -> Problem:
        """Return chains in noise (see ``Wording``)."""
        name = self.small_name if small else self.name
        taken: set[str] = {*TAGS, *MORE_TAGS, *_MORE_TAGS}
        # One chain alone, or as many as questions and room allow, each order of magnitude as often.
        most = (
            1 if draws.unit() < 0.3 else round(min(_MOST_CHAINS, max(2, room_tokens / 60)) ** draws.unit() ** 0.7) + 1
        )
        if small:
            most = min(most, 3)
        groups: list[list[str]] = []
        chains: list[tuple[str, list[str]]] = []
        room = room_tokens * 0.6
        while len(chains) < most:
            value = _fresh(taken, lambda: draws.digits(self.digits))
            hops = self.hops if self.hops is not None else draws.between(1, _MOST_HOPS)
            names = [_fresh(taken, lambda: name(draws)) for _ in range(hops + 1)]
            said = self._statements(draws, names, value)
            # A chain's question costs about as much as the chain.
            room -= 2.2 * sum(tools.size("said", text) + 1 for text in said)
            if room < 0 and chains:
                break
            groups.append(said)
            chains.append((value, names))
        asked = self._asked(draws, chains, n_questions)
        body = tools.haystack(draws, groups, room_tokens - tools.asked_tokens(asked))
        return Problem(body, asked)

    def _statements(self, draws: Draws, names: list[str], value: str) -> list[str]:
        said = []
        for i, new in enumerate(names):
            give, copy = self.syntax or draws.pick(_SYNTAX)
            said.append((copy if i else give).format(tag=self.tag, x=new, y=names[i - 1], v=value))
        return said

    def _asked(self, draws: Draws, chains: list[tuple[str, list[str]]], n_questions: int) -> list[Asked]:
        order = list(chains)
        draws.shuffle(order)
        asked = []
        for value, names in order[: max(1, int(n_questions * (1 - self.steps_share)))]:
            question, begin = self.whole if self.one_whole else self._pair()
            fill = {"v": value, "tag": self.tag, "n": str(len(names))}
            asked.append(Asked(question.format_map(fill), begin.format_map(fill), tuple(names)))
        steps: set[str] = set()
        for _ in range(int(n_questions * self.steps_share)):
            value, names = draws.pick(chains)
            copy = draws.unit() < 0.6
            at = draws.between(1, len(names) - 1) if copy else 0
            if names[at] not in steps:
                steps.add(names[at])
                question, begin = (
                    expand(part, draws).format(x=names[at]) for part in draws.pick(_COPY if copy else _VALUE)
                )
                asked.append(Asked(question, begin, (names[at - 1] if copy else value,)))
        draws.shuffle(asked)
        return asked


def _fresh(taken: set[str], make: Callable[[], str]) -> str:
    while (made := make()) in taken:
        pass
    taken.add(made)
    return made
