"""Evaluation's wording. Training has its own (kvscope.harness.reference_model.documents_long_qa_templates)."""

from kvscope.tasks.long_qa.wording import Wording

EVAL_WORDING = Wording(
    heads=(
        "These notes were taken in 2031, session by session. Every appointment is for 2032, every visit was in 2030. "
        "Questions come at the end; if the notes do not tell, the answer is: not mentioned.\n",
    ),
    sessions=("Session of {d} 2031.\n",),
    clauses={
        "home": ("{p} has made a home in {v} by now", "the home that {p} chose is in {v}"),
        "job": ("{p} earns money as {v} these days", "{p} is hired as {v}"),
        "food": ("{p} eats {v} with delight", "{p} always eats up the {v}"),
        "pet": ("{p} looks after the {v} and feeds it", "{p} feeds the {v} every evening"),
        "instrument": ("{p} practises hard on the {v}", "{p} practises the {v} until midnight"),
        "hobby": ("{p} fills all weekends with {v}", "weekends are for {v}, so {p} says"),
        "clothes": ("{p} puts on a {v} coat most of the time", "{p} wears a coat, always {v}"),
        "vehicle": ("{p} gets about by {v}", "{p} comes and gets home by {v}"),
        "purchase": ("{p} bought the {v} at last", "{p} went and bought some {v}"),
        "drink": ("{p} fills every cup with {v}", "the cup in front of {p} holds {v}"),
    },
    plain=("We wrote down that {c}.\n", "I noted that {c}.\n", "As they say, {c}.\n"),
    changed=("There is a change: from today {c}.\n", "That changed, and today {c}.\n"),
    dated=("With a change on {d}, {c}.\n", "It changes on {d}: {c}.\n"),
    relations={
        "boss": ("{p} reports to {v} on all tasks", "{p} takes all orders from {v}"),
        "teacher": ("{p} goes to lessons with {v}", "{p} has booked lessons with {v}"),
        "neighbour": ("{p} talks over the fence with {v}", "{p} and, beyond the fence, {v} get along"),
        "landlord": ("{p} sends the rent to {v}", "{p} owes the monthly rent to {v}"),
        "doctor": ("{p}, when ill, is treated by {v}", "{p} gets pills from {v}"),
        "coach": ("{p} keeps fit and trains with {v}", "{p} trains and sweats under {v}"),
    },
    appointments=(
        "{p} has fixed the {e} for {d}.\n",
        "The {e} that {p} planned is on {d}.\n",
    ),
    visits=("{p} stopped by at the {v} on {d}.\n", "On {d}, {p} stopped for an hour at the {v}.\n"),
    trips=("{p} has just come back from {v}.\n", "{p} is back from some days in {v}.\n"),
    advice={
        "tree": (
            "{p} asked what to plant as a shelter from the wind.\nAssistant: Then I would plant {v}.\n",
            "{p} asked what to plant for shade.\nAssistant: {v} is the one to plant.\n",
        ),
        "flower": (
            "{p} asked what to give for a bouquet.\nAssistant: A bouquet of {v} is never wrong.\n",
            "{p} asked what goes into a bouquet.\nAssistant: Put in {v}.\n",
        ),
        "herb": (
            "{p} asked what would season the soup.\nAssistant: It needs {v}, a pinch.\n",
            "{p} asked how to season the soup better.\nAssistant: Try {v}.\n",
        ),
    },
    small_talk=(
        "We talked for a while about the {a} {n}.\n",
        "No one could explain the {n} or the {a} {m}.\n",
        "Some {a} {n} was seen by somebody.\n",
        "The weather was {a}, and there was no news of the {n}.\n",
        "It was quiet except for a {n} and a {m}.\n",
        "First came the {n}, then something {a}, then another {m}.\n",
        "They laughed a lot at the {a} {n}.\n",
    ),
    ask={
        "home": ("In what town does {w} live?", "Which town does {w} live in?"),
        "job": ("What profession does {w} have?", "Which is the profession of {w}?"),
        "food": ("What is the favourite dish of {w}?", "Which dish is the favourite of {w}?"),
        "pet": ("What animal does {w} own?", "Which animal is owned by {w}?"),
        "instrument": ("What instrument does {w} play?", "Which instrument is played by {w}?"),
        "hobby": ("What is the hobby of {w}?", "Which hobby does {w} pursue?"),
        "clothes": ("What colour does {w} dress in?", "In which colour is {w} dressed?"),
        "vehicle": ("What vehicle does {w} travel with?", "Which vehicle does {w} travel on?"),
        "purchase": ("What object did {w} purchase?", "Which object was the purchase of {w}?"),
        "drink": ("What does {w} like to drink?", "Which drink does {w} like?"),
    },
    now=("At present: {q}", "{q} Answer for the present."),
    as_of=("As of {d}: {q} Say the date that matters, then the answer.",),
    via_one=("{q} Name the person, then the answer.",),
    via_two=("{q} Name both persons, then the answer.",),
    order=(
        "Which event is earlier for {w}, the {one} or the {two}? Say both dates, the earlier one, then the event.",
        "What comes earlier for {w}: the {one} or the {two}? Say both dates, the earlier date, then the event.",
    ),
    between=("How many days lie between the {one} and the {two} of {w}? Say both dates, then the days.",),
    count=(
        "How many times did {w} visit the {v}? Say each date, then how many times.",
        "How often has {w} paid the {v} a visit? Say the dates, then how many times.",
    ),
    listing=("Which towns did {w} journey to? List all.", "List all towns that {w} made a journey to."),
    suggested={
        "tree": ("What tree was suggested to {w}?", "Which tree did {w} hear suggested?"),
        "flower": ("What flower was suggested to {w}?", "Which flower did {w} hear suggested?"),
        "herb": ("What herb was suggested to {w}?", "Which herb did {w} hear suggested?"),
    },
    choice=("{q} Choose: (A) {one} (B) {two} (C) {three} (D) {four}. Say the word, then its letter.",),
    note=("Assume that {c}. {q}", "Only for this question, {c}. {q}"),
    request=("User: Please write some lines about the {v}.\nAssistant: ",),
    repeat=("Repeat word for word the {i} reply about the {v}.",),
)
