"""Wording of the training data. None of these strings is an evaluation template (a test holds this).

``{key}`` and ``{value}`` stand for a needle's two halves, ``{type}`` for what a value is called, ``{a}`` and ``{b}`` for
two random adjectives of the training split, ``{listed}`` for the queried key or keys.
"""

from kvscope.tasks.needle import NOISE

TYPES = (
    "code",
    "entry",
    "label",
    "tag",
    "record",
    "secret",
    "number",
    "value",
    "uuid",
    "id",
    "mark",
    "token",
    "figure",
)

NEEDLES = (
    "One of the {a} {b} {type}s for {key} is: {value}.\n",
    "One of the {b} {type}s for {key} is: {value}.\n",
    "One of the {a} {type}s of {key} was {value}.\n",
    "The {a} {type} for {key} is {value}.\n",
    "A {a} {b} {type} that goes with {key} is: {value}.\n",
    "Remember that {key} goes with {value}.\n",
    "For {key} the {type} is {value}.\n",
    "Note: the {type} given to {key} was {value}.\n",
    "In the book, {key} has the {a} {type} {value}.\n",
    "Under {key} you will find: {value}.\n",
    "{key}: {value}\n",
    "{key} = {value}\n",
    "The {type} kept for {key} reads: {value}.\n",
    "They wrote {value} next to {key}.\n",
    "{value} is the {type} of {key}.\n",
)

HEADS = (
    "A few {type}s are hidden in the text below. Read it with care, questions about the {type}s follow.\n",
    "Some {a} {type}s stand in this text. Keep them in mind. I will ask you about the {type}s later.\n",
    "A {a} {b} {type} is hidden within the lines below. Try to remember it. You will be asked about the {type} afterwards.\n",
    "Some {a} {b} {type}s are hidden within this document. Memorize them. You will be asked about the {type}s in the end.\n",
    "Read the following text.\n",
    "Here is a list of {type}s.\n",
)

# (question, beginning of the answer): the answer follows the second part directly.
QUESTIONS_ONE = (
    ("What is the {a} {b} {type} for {listed} mentioned in the text above?", " The {a} {b} {type} for {listed} mentioned in the text above is"),
    ("What is the {a} {type} for {listed} in the given text?", " The {a} {type} for {listed} in the given text is"),
    ("What is the {type} of {listed}?", " The {type} of {listed} is"),
    ("Which {type} goes with {listed}?", " The {type} that goes with {listed} is"),
    ("Which {a} {type} did the text give for {listed}?", " For {listed} the text gave"),
    ("Tell me the {type} for {listed} as written in this document.", " The {type} for {listed} as written in this document is"),
    ("Look up {listed}.", " {listed}:"),
    ("What did you read about {listed}?", " It is"),
    ("What is the {b} {type} for {listed} that was hidden in the lines?", " The {b} {type} for {listed} that was hidden in the lines is"),
)  # fmt: skip
QUESTIONS_MANY = (
    ("What are all the {a} {b} {type}s for {listed} mentioned in the text above?", " The {a} {b} {type}s for {listed} mentioned in the text above are"),
    ("What are the {a} {type}s for {listed} in the given text?", " The {a} {type}s for {listed} in the given text are"),
    ("Name every {type} of {listed}.", " The {type}s of {listed} are"),
    ("Which {type}s go with {listed}?", " The {type}s that go with {listed} are"),
    ("List each {b} {type} for {listed} as written in this document.", " The {b} {type}s for {listed} as written in this document are"),
    ("What are all the {type}s for {listed} hidden in the lines?", " The {type}s for {listed} hidden in the lines are"),
)  # fmt: skip


# Training filler, worded unlike the evaluation haystack of kvscope.tasks.prose.
FILLERS = (
    "My {a} {noun} was lost and found again by the {noun2}.",
    "We drove past one {noun} after another until every {noun2} seemed {a}.",
    "Is the {noun} {a} or only {b}?",
    "Someone left a {noun}, a {noun2} and a {a} hat at the door.",
    "If you ask me, no {noun} should ever be so {a}.",
    "They talked about the {a} {noun} for hours and then about the {b} {noun2}.",
    "Our {noun} is made of {noun2}, which makes it rather {a}.",
    "With a {noun} in each hand she walked to the {a} {noun2}.",
    "The water is cold. The bread is warm. The road is long. Off we go. Up and down the hill.",
    "The paper is white. The coal is black. The snow is soft. Where to next. Round and round it goes.",
)


def all_static_text() -> str:
    """Return every template and the tasks' fixed wording, for the tokenizer's corpus."""
    pairs = [part for pair in QUESTIONS_ONE + QUESTIONS_MANY for part in pair]
    fixed = (
        f"{NOISE}\nSome special magic numbers are hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the numbers afterwards. A special magic uuids uuid words word mentioned in the provided text?"
    )
    return "\n".join((*TYPES, *NEEDLES, *HEADS, *FILLERS, *pairs, fixed)).translate(str.maketrans("{}", "  "))
