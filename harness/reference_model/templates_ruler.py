"""Wording of the training documents for vt, cwe and fwe. No evaluation template is among it (a test holds this).

Slots: ``{x}`` a new name, ``{y}`` the name it copies, ``{v}`` a number, ``{tag}`` the word before a name, ``{n}`` how
many are asked for.
"""

import string

from kvscope.tasks.draws import Draws

TAGS = (
    "SET",
    "LET",
    "DEF",
    "REG",
    "KEY",
    "REF",
    "CELL",
    "SLOT",
    "let",
    "set",
    "def",
    "key",
    "cell",
    "reg",
    "name",
    "field",
)

# (the line that gives a number, the line that copies a name)
CHAIN_FORMS = (
    ("{tag} {x} = {v}\n", "{tag} {x} = {tag} {y}\n"),
    ("{tag} {x} = {v}\n", "{tag} {x} = {y}\n"),
    ("{x} = {v}\n", "{x} = {y}\n"),
    ("{tag} {x} := {v}.\n", "{tag} {x} := {tag} {y}.\n"),
    ("{tag} {x} is {v}.\n", "{tag} {x} is {tag} {y}.\n"),
    ("{x} holds {v}.\n", "{x} holds what {y} holds.\n"),
    ("Put {v} into {x}.\n", "Copy {y} into {x}.\n"),
    ("{tag} {x} gets {v}\n", "{tag} {x} gets {tag} {y}\n"),
)
CHAIN_HEADS = (
    "Some names in these lines are given numbers, others copy a name. Follow who holds what.\n",
    "Follow each {tag} through the lines below.\n",
    "The lines below hand numbers from name to name.\n\n",
    "Watch the {tag}s in this document, you will be asked which of them share a number.\n\n",
)
# (question, beginning of the answer); the answer lists every name of the chain in the order of the text.
CHAIN_QUESTIONS = (
    ("Which names hold the number {v}?", " {n} names hold the number {v}:"),
    ("List each {tag} that ends up with {v}.", " Following the lines above, the {n} that end up with {v} are:"),
    (
        "Question: Who has {v} in the lines above?",
        " Answer: Going by the lines above, {v} is held by {n} names, which are:",
    ),
    ("Name every {tag} with {v}.", " In all, {n} have {v}, namely:"),
    ("What are the names that were given {v}, straight or through another name?", " They are"),
    ("Who shares the number {v}?", " {v}:"),
)
# More tags and questions than the tokenizer's corpus holds: with few, the model learned the wording instead of the task
# and answered none of evaluation's questions.
MORE_TAGS = ("var", "variable", "item", "box", "node", "point", "Cell", "Slot", "Item", "Name")
# A tag of evaluation's, in forms that are not evaluation's.
TAGGED_FORMS = (
    ("VAR {x} := {v}\n", "VAR {x} := VAR {y}\n"),
    ("VAR {x} is {v}.\n", "VAR {x} is {y}.\n"),
    ("VAR {x} holds {v}.\n", "VAR {x} holds what VAR {y} holds.\n"),
    ("set VAR {x} to {v}\n", "set VAR {x} to VAR {y}\n"),
)
_ASK = {
    "find": ("Find", "List", "Name", "Give", "Tell me", "Look for", "Write down"),
    "all": ("all", "all the", "each of the", "the {n}", "every one of the"),
    "things": ("variables", "names", "cells", "entries", "{tag}s", "fields", "items"),
    "with": (
        "with", "that have", "that hold", "that were assigned", "that are given", "holding", "that share",
        "assigned to", "that end up with",
    ),
    "value": ("the value {v}", "the number {v}", "{v}", "value {v}", "the figure {v}"),
    "where": ("", " in the lines above", " in the text above", " above", " in this document", " in the text you read"),
    "by": (
        "", " According to the lines above,", " According to the assignments in the text above,",
        " Going by the chain,", " By the chains in the text above,", " As the document says,",
        " Following the chain(s) of assignments above,",
    ),
    "have": ("have", "hold", "share", "were assigned", "are given", "end up with", "got"),
    "are": (", they are:", ", namely:", ", which are:", ":", " and they are:", ". These are:", ", that is"),
}  # fmt: skip


def composed_question(draws: Draws) -> tuple[str, str]:
    """Return a chain question and the beginning of its answer, put together from parts.

    The parts are everyday words: now and then up to eight in a row of a question, and seven of an answer's beginning,
    are evaluation's, too (a test holds it to that). Its sentences are not among what comes out.
    """
    part = {slot: draws.pick(options) for slot, options in _ASK.items()}
    question = "{find} {all} {things} {with} {value}{where}.".format_map(part)
    answer = "{by} {{n}} {things} {have} {value}{are}".format_map(part)
    if draws.unit() < 0.6:
        return "Question: " + question, " Answer:" + answer
    return question, answer


# Single steps, so that the row teaches what a chain is made of.
COPY_QUESTIONS = (
    ("What did {x} copy?", " {x} copied"),
    ("Where does {x} have its number from?", " From"),
)
VALUE_QUESTIONS = (
    ("Which number does {x} hold?", " {x} holds"),
    ("What is the number behind {x}?", " It is"),
)

COMMON_HEADS = (
    "Here are many words with numbers before them. A few of them come again and again.\n",
    "The list below repeats some words more than the rest. Keep track of those.\n",
    "Count the words of this list.\n\n",
)
COMMON_QUESTIONS = (
    ("Which {n} words stand most often in the list?", " The {n} words that stand most often in the list are:"),
    ("Question: Name the {n} words repeated most.", " Answer: The {n} words repeated most are:"),
    ("Give the {n} words with the highest counts.", " The {n} words with the highest counts are"),
    ("Which {n} words came again and again?", " Again and again came:"),
)

CODED_HEADS = (
    "The text below is written in code words, some of them common and most of them rare. Count them.\n",
    "These made-up words do not mean anything, but some come up far more than others.\n",
    "Keep a count of each code word.\n\n",
)
# (one word asked, several asked); dots fill the gaps between code words and are not words.
CODED_QUESTIONS_ONE = (
    ("Which code word comes up most, dots aside?", " Dots aside, the code word that comes up most is:"),
    ("What is the commonest code word?", " The commonest code word is"),
)
CODED_QUESTIONS_MANY = (
    ("Which {n} code words come up most, dots aside?", " Dots aside, the {n} code words that come up most are:"),
    (
        "Question: Leave out the dots. What are the {n} commonest code words?",
        " Answer: The {n} commonest code words are:",
    ),
    ("Name the top {n} code words, the commonest first.", " From the commonest down:"),
)

# What vt, cwe and fwe always say: the tokenizer should know the words, training rows never hold the sentences.
_FIXED = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\nVAR = VAR\n"
    "Question: Find all variables that are assigned the value in the text above. Answer: According to the chain(s) of "
    "variable assignment in the text above, 5 variables are assigned the value, they are:\n"
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\nQuestion: What are the 10 most common words in the above list? Answer: The top 10 words that "
    "appear most often in the list are:\n"
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
    "appeared coded words. ... ... ... ...\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? Answer: According to the coded text "
    "above, the three most frequently appeared words are:\n"
)


def static_text() -> str:
    """Return every template and the tasks' fixed wording, for the tokenizer's corpus.

    It holds no names and no code words: those are random, and a corpus that repeats some would make tokens of them.
    ``random_text`` gives fresh ones.
    """
    pairs = (
        *CHAIN_FORMS, *CHAIN_QUESTIONS, *COPY_QUESTIONS, *VALUE_QUESTIONS, *COMMON_QUESTIONS, *CODED_QUESTIONS_ONE,
        *CODED_QUESTIONS_MANY,
    )  # fmt: skip
    parts = (*TAGS, *CHAIN_HEADS, *COMMON_HEADS, *CODED_HEADS, *(part for pair in pairs for part in pair), _FIXED)
    return "\n".join(parts).translate(str.maketrans("{}", "  "))


def name(draws: Draws, letters: int) -> str:
    """Return a random upper-case name."""
    return "".join(draws.pick(string.ascii_uppercase) for _ in range(letters))


def coded_word(draws: Draws, letters: int) -> str:
    """Return a random lower-case word."""
    return "".join(draws.pick(string.ascii_lowercase) for _ in range(letters))


def random_text(draws: Draws) -> str:
    """Return lines of names as vt has them and of code words among dots as fwe has them, for the tokenizer's corpus."""
    lines = [f"VAR {name(draws, 5)} = VAR {name(draws, 5)}, {name(draws, 5)}" for _ in range(40)]
    lines += [" ".join(coded_word(draws, 6) if draws.unit() < 0.4 else "..." for _ in range(40)) for _ in range(10)]
    return "\n".join(lines) + "\n"
