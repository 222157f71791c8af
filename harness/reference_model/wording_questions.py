"""Patterns of the composed training questions; written as those of wording_parts are."""

# What is asked for, by attribute: the thing's name, and how somebody has it.
_ASK = {
    "home": (
        "<ask> in <wh> town does {w} live?",
        "<ask> <wh> town does {w} live in?",
        "<ask> where does {w} live?",
        "<ask> <wh> is the town <that|> {w} lives in?",
        "<say> the town <where {w} lives|{w} lives in|in which {w} lives>.",
        "{w} lives in <wh> town?",
        "the town {w} lives in is <wh>?",
    ),
    "job": (
        "<ask> <wh> profession does {w} have?",
        "<ask> <wh> is the profession <of {w}|that {w} has|{w} has>?",
        "<say> the profession <of {w}|that {w} has|{w} has>.",
        "{w} has <wh> profession?",
        "the profession of {w} is <wh>?",
    ),
    "food": (
        "<ask> <wh> dish does {w} like best?",
        "<ask> <wh> is the <favourite|best liked> dish <of|for> {w}?",
        "<ask> <wh> dish is <the|a> favourite <of|for|with> {w}?",
        "<say> the favourite dish of {w}.",
        "{w} has <wh> favourite dish?",
        "of {w}, <wh> dish is the favourite?",
    ),
    "pet": (
        "<ask> <wh> animal does {w} own?",
        "<ask> <wh> animal is owned by {w}?",
        "<ask> <wh> is the animal <of {w}|that {w} owns|{w} owns>?",
        "<say> the animal <of {w}|that {w} owns|owned by {w}>.",
        "{w} owns <wh> animal?",
    ),
    "instrument": (
        "<ask> <wh> instrument does {w} play?",
        "<ask> <wh> instrument is played by {w}?",
        "<ask> <wh> is the instrument <of {w}|that {w} plays|{w} plays>?",
        "<say> the instrument <of {w}|that {w} plays|played by {w}>.",
        "{w} plays <wh> instrument?",
    ),
    "hobby": (
        "<ask> <wh> hobby does {w} <have|pursue|like>?",
        "<ask> <wh> is the hobby <of {w}|that {w} pursues|{w} has>?",
        "<ask> <wh> hobby is pursued by {w}?",
        "<say> the hobby <of {w}|that {w} pursues|{w} has>.",
        "{w} pursues <wh> hobby?",
    ),
    "clothes": (
        "<ask> <wh> colour does {w} dress in?",
        "<ask> in <wh> colour <does {w} dress|is {w} dressed>?",
        "<ask> <wh> is the colour {w} <dresses|is dressed> in?",
        "<say> the colour <{w} is dressed in|in which {w} dresses|{w} dresses in>.",
        "{w} <dresses|is dressed> in <wh> colour?",
    ),
    "vehicle": (
        "<ask> <wh> vehicle does {w} travel <with|on|in>?",
        "<ask> <with|on|in> <wh> vehicle does {w} travel?",
        "<ask> <wh> is the vehicle <of {w}|{w} travels with|that {w} travels on>?",
        "<say> the vehicle <of {w}|{w} travels with|that {w} travels on>.",
        "{w} travels <with|on> <wh> vehicle?",
    ),
    "purchase": (
        "<ask> <wh> object did {w} purchase?",
        "<ask> <wh> was the <purchase of {w}|object {w} purchased|object that {w} did purchase>?",
        "<ask> <wh> object was <purchased by|a purchase of> {w}?",
        "<say> the <object that {w} purchased|purchase of {w}|object purchased by {w}>.",
        "{w} purchased <wh> object?",
    ),
    "drink": (
        "<ask> <wh> drink does {w} like <best|to have|>?",
        "<ask> what does {w} <best like|like best> to drink?",
        "<ask> <wh> is the <favourite drink of {w}|drink {w} likes|drink that {w} likes best>?",
        "<say> the <drink that {w} likes|favourite drink of {w}|drink {w} likes best>.",
        "{w} likes <wh> drink?",
        "{w} likes to drink what?",
    ),
}
_SUGGESTED = (
    "<ask> <wh> THING was suggested <to|for> {w}?",
    "<ask> <wh> THING did the assistant suggest to {w}?",
    "<ask> <wh> THING did {w} hear <of|suggested by the assistant>?",
    "<ask> <wh> THING has {w} heard suggested?",
    "<name|state|find|write> the THING <suggested to {w}|{w} heard suggested|that was suggested to {w}>.",
    "to {w}, <wh> THING was suggested?",
    "{w} was to hear <wh> THING suggested?",
)

QUESTIONS: dict[str, tuple[str, ...] | dict[str, tuple[str, ...]]] = {
    "ask": _ASK,
    "suggested": {
        thing: tuple(pattern.replace("THING", thing) for pattern in _SUGGESTED) for thing in ("tree", "flower", "herb")
    },
    "now": (
        "<at present|for the present|now|as of now|today|after the change|in the end>, {q}",
        "<now|for the present|after the change|for today>: {q}",
        "{q} <answer|say|tell> <what is true|what holds|how it is> <now|at present|after the change|today>.",
        "{q} <answer|say it> <as of now|as it is at present|as it is now|for today>.",
        "{q} <now|at present|today>, <please|that is>.",
    ),
    "as_of": (
        "<as of|on|by|for> {d}<:|,| -> {q} <first> the date that <matters|decides|counts> <then> the answer.",
        "{q} <answer|say it|tell> <as of|for|on> {d}<: first|, with first|. First> the date that <matters|decides|counts> <then> the answer.",
        "<as of|on|for> {d}, <first> the date that <matters|decides|counts> <then> the answer: {q}",
        "{q} <this is as of|we mean|it is about> {d}. <first> the date that <matters|counts> <then> the answer.",
    ),
    "via_one": (
        "{q} <first> <the|one|that> person <on the way|who it is|in between|||> <then> <the answer|your answer|what was asked>.",
        "<first> the person <then> <the answer|answer>: {q}",
        "{q} person first <then> <the answer|answer>.",
    ),
    "via_two": (
        "{q} <first> <both|the two|two|both of the> persons <on the way|in between|in turn|||> <then> <the answer|your answer|what was asked>.",
        "<first> <both|the two> persons <then> <the answer|answer>: {q}",
        "{q} persons first <then> <the answer|answer>.",
    ),
    "order": (
        "<which|what|which event> <is|comes|was> earlier for {w}<,|:> the {one} or the {two}? <first> both dates <mid> the earlier <one|date|> <then> the event.",
        "for {w}, <which|what|which event> <is|comes> earlier<,|:> the {one} or the {two}? <first> <both|the two> dates <mid> the earlier <one|date|of the two> <then> the event.",
        "does {w} have the {one} or the {two} earlier? <first> <both|the two> dates <mid> the earlier <one|date|> <then> the event.",
        "the {one} and the {two} of {w}: <which|what> comes earlier? <both|the two|> dates first <mid> the earlier <one|date> <then> the event.",
        "<first> both dates <mid> the earlier <one|date|> <then> the event: <which|what> is earlier for {w}, the {one} or the {two}?",
    ),
    "between": (
        "how many days <are|lie|are there> between <the|> {one} and <the|> {two} of {w}? <first> <both|the two> dates <then> the <days|number of days>.",
        "for {w}, how many days <lie|are> between the {one} and the {two}? <first> <both|the two> dates <then> the days.",
        "<first> both dates <then> the days that lie between the {one} and the {two} of {w}.",
        "the {one} and the {two} of {w} <lie|are> how many days apart? <both|the two|> dates first <then> the days.",
    ),
    "count": (
        "how <often|many times> was the {v} visited by {w}? <first> <alldates> <then> <many>.",
        "<ask> how <often|many times> did {w} <pay a visit to|visit|come to visit> the {v} <in all|>? <first> <alldates> <then> <many>.",
        "how <often|many times> has {w} <visited|paid a visit to> the {v}? <first> <alldates> <then> <many>.",
        "<first> <alldates> <then> <many> {w} <visited the {v}|paid a visit to the {v}|paid the {v} a visit>.",
        "the {v} had a visit from {w} how <often|many times>? <alldates> first <then> <many>.",
        "<first> <alldates> <then> <many>: how <many visits to the {v} were paid by {w}|many times has the {v} had {w} on a visit>?",
    ),
    "listing": (
        "<ask> <which|what> towns did {w} <journey|make a journey> to?",
        "to <which|what> towns did {w} <journey|make journeys|make a journey>? <list|name|write> <all|them all|each one>.",
        "<list|name|write|find> <all|the|all the> towns <of each journey of {w}|{w} did journey to|to which {w} journeyed|of the journeys {w} made>.",
        "{w} made a journey to <which|what> towns? <list|name> <all|them all|each>.",
        "towns that {w} journeyed to: list <all|each>.",
    ),
    "choice": (
        "{q} <choose|pick|take> <one|from these|>: (A) {one} (B) {two} (C) {three} (D) {four}<. | ><first> the word <then> <its|the> letter.",
        "{q} <choose|pick|take> <one|from these|>: (A) {one}, (B) {two}, (C) {three}, (D) {four}. <first> the word <then> <its|the> letter.",
        "<choose|pick|take> (A) {one} (B) {two} (C) {three} or (D) {four}, the word <then> <its|the> letter: {q}",
        "{q} (A) {one} (B) {two} (C) {three} (D) {four}<. | ><first> the word <then> <its|the> letter.",
    ),
    "note": (
        "<let us say|suppose|assume now|we assume|let us assume|for once, assume> that {c}. {q}",
        "<assume|say|for this question|in this question|for this one|only here|only for now>: {c}. {q}",
        "<if|as|since> {c}<: |, then: >{q}",
        "{c}<, for this question|, in this question only|, we assume>. {q}",
    ),
    "repeat": (
        "<repeat|say again|write again|give> <word for word|exactly|> the {i} reply <on|about> the {v} <once more|again|, word for word>.",
        "the {i} reply about the {v}<, word for word|: repeat it word for word|, please: repeat it>.",
        "what was the {i} reply about the {v}? repeat <it|every word>.",
    ),
}
