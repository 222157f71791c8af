"""Training wording of the long_qa documents: the cue words of evaluation in other sentences (a test holds this)."""

from dataclasses import replace

from kvscope.tasks.long_qa.lexicon import MONTHS, lexicon
from kvscope.tasks.long_qa.wording import FRAME, NOT_MENTIONED, ORDINALS, Wording

TRAIN_WORDING = Wording(
    heads=(
        "Notes from 2031 in the order of the sessions. All appointments are for 2032. When the notes do not tell, answer: not mentioned.\n",
        "Here are the sessions of 2031. Questions about them follow; if they do not tell, say: not mentioned.\n",
        "Read these notes from the sessions. Appointments are for 2032. Questions come afterwards.\n",
        "The notes of many sessions come first, the questions at the end.\n",
    ),
    sessions=("Session of {d}.\n", "{d} 2031, a session.\n", "The session of {d} 2031:\n", "Notes of {d} 2031.\n"),
    clauses={
        "home": (
            "{p} has a home in {v}",
            "{p} made {v} a home",
            "the home of {p} is in {v}",
            "{p} chose a home in {v}",
            "{v} is where {p} has a home",
            "home, for {p}, is {v} now",
        ),
        "job": (
            "{p} earns a wage as {v}",
            "{p} was hired as {v}",
            "as {v}, {p} earns enough",
            "they hired {p} as {v}",
            "the money {p} earns as {v} is good",
        ),
        "food": (
            "{p} eats {v} at noon",
            "{p} eats a lot of {v}",
            "{v} is what {p} eats first",
            "with delight {p} eats {v}",
            "{p} always eats {v}",
        ),
        "pet": (
            "{p} feeds the {v}",
            "{p} feeds a {v} at home",
            "the {v} that {p} feeds is well",
            "every morning {p} feeds the {v}",
            "{p} looks after a {v}",
        ),
        "instrument": (
            "{p} practises the {v}",
            "{p} practises on the {v}",
            "on the {v} {p} practises a song",
            "every evening {p} practises the {v}",
            "the {v} is what {p} practises",
        ),
        "hobby": (
            "{p} spends all weekends on {v}",
            "weekends, for {p}, are {v}",
            "{p} fills the weekends with {v}",
            "on weekends {p} is busy with {v}",
            "for {v} {p} gives up the weekends",
        ),
        "clothes": (
            "{p} wears a {v} coat",
            "the coat {p} wears is {v}",
            "{p} puts on a {v} coat",
            "{p} has a coat in {v}",
            "a {v} coat is what {p} wears",
        ),
        "vehicle": (
            "{p} gets home by {v}",
            "{p} gets to work by {v}",
            "by {v} {p} gets about",
            "{p} comes by {v}",
            "{p} always gets here by {v}",
        ),
        "purchase": (
            "{p} bought a {v}",
            "{p} bought the {v}",
            "the {v} was bought by {p}",
            "{p} has bought some {v}",
            "{p} went out and bought {v}",
        ),
        "drink": (
            "{p} fills the cup with {v}",
            "the cup of {p} is full of {v}",
            "{p} has a cup of {v}",
            "{p} asked for a cup of {v}",
            "a cup of {v} is for {p}",
        ),
    },
    plain=(
        "{c}.\n",
        "I heard that {c}.\n",
        "By the way, {c}.\n",
        "They say that {c}.\n",
        "It is known that {c}.\n",
        "We noted: {c}.\n",
        "{c}, they say.\n",
    ),
    changed=(
        "It changed: {c} from today.\n",
        "There was a change, and now {c}.\n",
        "From today {c}.\n",
        "A change today: {c}.\n",
        "News: that changed and {c}.\n",
    ),
    dated=(
        "From {d} on {c}.\n",
        "A change comes on {d}: {c}.\n",
        "It changes with {d}, then {c}.\n",
        "On {d} there is a change: {c}.\n",
    ),
    relations={
        "boss": ("{p} reports to {v}", "{p} has to report to {v}", "{p} takes orders from {v}", "orders for {p} come from {v}"),
        "teacher": ("{p} has lessons with {v}", "{p} takes lessons from {v}", "the lessons of {p} are with {v}"),
        "neighbour": ("{p} shares a fence with {v}", "over the fence {p} sees {v}", "{p} met at the fence with {v}"),
        "landlord": ("{p} pays rent to {v}", "the rent of {p} goes to {v}", "{p} owes rent to {v}"),
        "doctor": ("{p} is treated by {v}", "when ill, {p} goes to {v}", "{p} gets all pills from {v}"),
        "coach": ("{p} trains under {v}", "{p} trains with {v}", "{p} runs and trains for {v}"),
    },
    appointments=(
        "{p} fixed the {e} on {d}.\n",
        "The {e} of {p} is planned for {d}.\n",
        "{p} plans the {e} for {d}.\n",
        "On {d} {p} has the {e}.\n",
        "{p}: the {e} is fixed for {d}.\n",
    ),
    visits=(
        "{p} stopped at the {v}.\n",
        "{p} stopped by at the {v} today.\n",
        "This morning {p} stopped at the {v}.\n",
        "At the {v}, {p} stopped for an hour.\n",
    ),
    trips=(
        "{p} came back from {v}.\n",
        "{p} is back from {v}.\n",
        "Back from {v}, {p} told me about it.\n",
        "From {v}, {p} has just come back.\n",
    ),
    advice={
        "tree": (
            "{p} asked what to plant.\nAssistant: Plant {v}.\n",
            "{p} asked what to plant this year.\nAssistant: You could plant {v}.\n",
            "What should I plant, asked {p}.\nAssistant: I would say {v}.\n",
        ),
        "flower": (
            "{p} asked for a bouquet.\nAssistant: Take {v}.\n",
            "{p} asked what makes a good bouquet.\nAssistant: Some {v} would do.\n",
            "What goes into a bouquet, asked {p}.\nAssistant: {v}, I would say.\n",
        ),
        "herb": (
            "{p} asked how to season a soup.\nAssistant: Try some {v}.\n",
            "{p} asked what to season the soup with.\nAssistant: {v} goes well.\n",
            "How do I season it, asked {p}.\nAssistant: With a pinch of {v}.\n",
        ),
    },
    small_talk=(
        "The {a} {n} was the topic of the hour.\n",
        "Then we talked about a {n} and about the {m}.\n",
        "Somebody had seen a {a} {n}.\n",
        "It was a {a} morning, and no {n} was seen.\n",
        "There was no news, only a {n}.\n",
        "Nobody knows what the {n} and the {m} are for.\n",
        "Someone laughed at the {a} {n}, then at the {m}.\n",
        "The weather stays {a}.\n",
        # Words that evaluation uses and no other training sentence would show.
        "It was quiet, except for a {n} that someone put in the wind until midnight, so it says.\n",
        "The {a} {n} holds better than most, and it is hard to explain why it was taken along.\n",
        "Something in front of the {n} needs time, a shelter and shade, but never the {m}.\n",
        "At last the {n} gives in while another {m} keeps fit, sweats and talks beyond its tasks.\n",
        "They were wrong to get a {n} that someone sends monthly. They booked it, wrote it down and hear of it.\n",
        "To pursue the {m} and to give it away is not an appointment.\n",
    ),
    ask={
        "home": ("Where does {w} live?", "In which town does {w} live?", "What is the town {w} lives in?", "Name the town where {w} lives."),
        "job": ("What is the profession of {w}?", "Which profession does {w} have?", "Name the profession of {w}.", "{w} has what profession?"),
        "food": ("Which is the favourite dish of {w}?", "What dish does {w} like best?", "Name the favourite dish of {w}.", "{w} has what favourite dish?"),
        "pet": ("Which animal does {w} own?", "What animal is owned by {w}?", "Name the animal of {w}.", "{w} owns what animal?"),
        "instrument": ("Which instrument does {w} play?", "What instrument is played by {w}?", "Name the instrument of {w}.", "{w} plays what instrument?"),
        "hobby": ("Which is the hobby of {w}?", "What hobby does {w} have?", "Name the hobby of {w}.", "{w} has what hobby?"),
        "clothes": ("Which colour does {w} dress in?", "In what colour does {w} dress?", "Name the colour {w} is dressed in.", "{w} dresses in what colour?"),
        "vehicle": ("Which vehicle does {w} travel with?", "What vehicle does {w} travel on?", "Name the vehicle of {w}.", "{w} travels with what vehicle?"),
        "purchase": ("Which object did {w} purchase?", "What was the purchase of {w}?", "Name the object that {w} purchased.", "{w} purchased what object?"),
        "drink": ("Which drink does {w} like best?", "What is the favourite drink of {w}?", "Name the drink that {w} likes.", "{w} likes what drink?"),
    },
    now=("{q} Say what is true now.", "Now, at present: {q}", "After the change: {q}", "For the present: {q}"),
    as_of=(
        "On {d}: {q} Say the date that matters and the answer.",
        "As of {d}, first the date that matters, then the answer: {q}",
        "{q} Answer as of {d}, after the date that matters.",
    ),
    via_one=("{q} First the person, then the answer.", "Name the person, then answer: {q}", "{q} Name one person, then the answer."),
    via_two=("{q} First both persons, then the answer.", "Name both persons, then answer: {q}", "{q} Name two persons, then the answer."),
    order=(
        "Which is earlier for {w}, the {one} or the {two}? First both dates, then the event.",
        "Does {w} have the {one} or the {two} earlier? Say both dates, then the event.",
        "For {w}, which event is earlier: the {one} or the {two}? Dates, then the event.",
    ),
    between=(
        "For {w}, how many days lie between the {one} and the {two}? First both dates, then the days.",
        "How many days are between the {one} and the {two} of {w}? Dates, then days.",
    ),
    count=("How many times was the {v} visited by {w}?", "How often did {w} visit the {v}?", "Say how many times {w} paid a visit to the {v}."),
    listing=("What towns did {w} journey to?", "List the towns of each journey of {w}.", "To which towns did {w} journey? Name all."),
    suggested={
        "tree": ("Which tree was suggested to {w}?", "What tree did the assistant suggest to {w}?", "Name the tree suggested to {w}."),
        "flower": ("Which flower was suggested to {w}?", "What flower did the assistant suggest to {w}?", "Name the flower suggested to {w}."),
        "herb": ("Which herb was suggested to {w}?", "What herb did the assistant suggest to {w}?", "Name the herb suggested to {w}."),
    },
    choice=(
        "{q} (A) {one} (B) {two} (C) {three} (D) {four} Say the word and its letter.",
        "{q} Choose one: (A) {one}, (B) {two}, (C) {three}, (D) {four}. The word, then its letter.",
        "Choose (A) {one} (B) {two} (C) {three} or (D) {four}, the word and then its letter: {q}",
    ),
    note=("Let us say that {c}. {q}", "Assume {c}. {q}", "In this question {c}. {q}", "If {c}: {q}"),
    request=("User: Write about the {v}.\nAssistant: ", "User: Some lines about the {v}, please.\nAssistant: "),
    repeat=("Repeat the {i} reply about the {v}.", "Say again, word for word, the {i} reply about the {v}."),
)  # fmt: skip


# What the tokenizer was trained on: its file stays as it is when a template changes.
CORPUS_AS_OF = (
    "On {d}: {q} Say when it changed, then the answer.",
    "As of {d}, say when it changed, then the answer: {q}",
    "{q} Answer as of {d}, after the date of the change.",
)


def static_text() -> str:
    """Return the fixed wording and half of the training words, for the tokenizer's corpus.

    Every second word only: the rest is spelled in pieces during training, as every evaluation word will be.
    """
    words = [word for listed in lexicon("train").values() for word in listed[::2]]
    fixed = [
        *replace(TRAIN_WORDING, as_of=CORPUS_AS_OF).strings(),
        FRAME,
        NOT_MENTIONED,
        " ".join(MONTHS),
        " ".join(ORDINALS),
        "(A) (B) (C) (D), A, B, C, D 1 times, 2 times 3 days, 20 days",
    ]
    return " ".join((*fixed, *words)).translate(str.maketrans("{}", "  "))
