"""Patterns of the composed training wording (kvscope.harness.reference_model.wording_composed).

``<a|b|>`` is one of its alternatives, ``<name>`` an alternative of the part of that name; slots are those of Wording.
None of these strings goes into the tokenizer's corpus: the shipped tokenizer was made before them.
"""

# Words around a fact. They mean little and hold no cue, so that only the cue tells what a sentence is about.
PARTS = {
    "adv": "||||always|just|still|also|gladly|soon|now and again|quite simply|by now",
    "pre": "||||||these days|at last|every evening|by now|with delight|until midnight|in the end|so far|as ever|again",
    "tail": "||||||by now|these days|with delight|every evening|every morning|until midnight|most of the time|at last"
    "|again|this morning|as ever|so far|for a while|in the end|after all|for an hour|today|at noon|without a word|, always"
    "|in front of everyone|with the rest of them|, so {p} says|, as {p} says|, {p} told them",
    "det": "|||the|the|a|some|that|this|one more|only",
    "heard": "I heard|I noted|we wrote down|we noted|they say|it is known|it says here|somebody said|no one doubts|"
    "everybody knows|they told us|we were told|I was told|it was said|it turned out|the talk was",
    "plant_tree": "Plant {v}|You could plant {v} <there|instead|>|I would <take|plant> {v}|Then plant <some|> {v}"
    "|{v} <gives|is for> shade <and shelter|>|The one to plant is {v}|{v} <it is|would do|is the one>|Take {v} as a shelter"
    "|Against the wind, {v}",
    "give_flower": "Take <some|> {v}|<some|> {v} would do <well|>|{v}, I would think|Put <some|> {v} in <it|there>|Put in some {v}"
    "|A bouquet <needs|wants|likes> {v}|{v} is never wrong <in a bouquet|>|A <good|better> bouquet is <one of|made of|> {v}"
    "|Give {v}|With {v} <it|you> will never <be|go> wrong|Then give <a bouquet of|> {v}",
    "add_herb": "Try <some|a pinch of|a little> {v}|{v} <goes well|would do|is better>|With <a pinch of|some|> {v}"
    "|It needs <some|a pinch of|a little> {v}|<the soup|it> <would need|wants|could do with> {v} <, a pinch|, just a little|>"
    "|{v}, <a pinch|just a pinch|only a little>|I would try {v}|What it needs is {v}",
    "say": "say|name|give|tell us|write|find|state",
    "first": "say|name|give|first|first say|first name|first give|tell",
    "then": ", then|, then|, and then|, then say|, then give|, after that|; then|, and|, and finally",
    "mid": ",|,|, then|, after that|and",
    "alldates": "the dates|all dates|each date|each of the dates|the date of each",
    "many": "how often|how many times|the number of times|how many times it was|how many times in all",
    "wh": "what|which",
    "ask": "||||||going by the notes,|please answer:|from the sessions:|as written,|according to the notes,",
}

FACTS: dict[str, tuple[str, ...] | dict[str, tuple[str, ...]]] = {
    "heads": (
        "<notes|here are notes|these are notes|the notes> <of|from> 2031, <in their order|session by session>. <all the|the|all> "
        "appointments are for 2032, <and|> <all|the|all the> visits were in 2030. <when|if> the notes <do not tell|say nothing>, "
        "<say|answer|the answer is>: not mentioned.\n",
        "<all the|the|all> visits were in 2030 and the appointments are for 2032. <read on|the sessions follow>, <questions come|"
        "the questions are> <at the end|last|afterwards>.\n",
    ),
    "clauses": {
        "home": (
            "<pre> {p} <adv> <has|made|found|has found|has chosen|chose|keeps|has set up> <a|the|some|one more> home in {v} <tail>",
            "<pre> the home <of {p}|{p} has|that {p} has made|{p} found|{p} chose> is <adv> in {v} <tail>",
            "<pre> {p} <made|has made> <det> {v} a home <tail>",
            "<pre> {v} is <adv> where {p} <has|made|chose|has made> <a|the> home <tail>",
            "home, for {p}, is <adv> {v} <tail>",
            "{p} is <adv> at home in {v} <tail>",
            "<pre> {p} calls {v} <a|the> home <tail>",
        ),
        "job": (
            "<pre> {p} <adv> earns <money|a wage|enough|good money|something|a little> as <a|the|> {v} <tail>",
            "<pre> {p} <is|was|has been|will be|gets> <adv> hired <on> as <a|the|> {v} <tail>",
            "<pre> as <a|the|> {v}, {p} <adv> earns <enough|money|a wage> <tail>",
            "they <adv> hired {p} as <a|the|> {v} <tail>",
            "the <money|wage> {p} <adv> earns as {v} is <good|enough|little> <tail>",
            "hired as {v}, {p} <adv> earns <money|a wage|enough> <tail>",
        ),
        "food": (
            "<pre> {p} <adv> eats <up|||a lot of|plenty of|nothing but> <det> {v} <tail>",
            "<pre> {v} is what {p} <adv> eats <up|first|> <tail>",
            "<with delight|at noon|at last|every evening> {p} <adv> eats <up|> <det> {v}",
            "<det> {v}, <and only that|again and again|most of the time>, is what {p} eats <up|> <tail>",
            "{p} never leaves <the|any|> {v} but eats <it|them> <up|> <tail>",
        ),
        "pet": (
            "<pre> {p} <adv> feeds <the|a|that|one|its> {v} <tail>",
            "<pre> {p} <adv> looks after <the|a|that> {v} <tail>",
            "{p} <adv> feeds and <brushes|looks after|walks> <the|a|that> {v} <tail>",
            "<the|a> {v} that {p} <adv> <feeds|looks after> is <well|fine|tired> <tail>",
            "<the|that> {v} is <fed|looked after> by {p} <tail>",
            "{p} gets up and feeds <the|a> {v} <tail>",
        ),
        "instrument": (
            "<pre> {p} <adv> practises <hard|a song|||> <on> <the|a|that> {v} <tail>",
            "<pre> on <the|a|that> {v} {p} <adv> practises <hard|a song|> <tail>",
            "the {v} is what {p} <adv> practises <hard|on|> <tail>",
            "<hard|for an hour|with delight>, {p} practises <on> <the|a> {v} <tail>",
            "{p} took <the|a> {v} and practises <hard|a lot|> <tail>",
        ),
        "hobby": (
            "<pre> {p} <adv> <spends|fills|keeps> <all|the|most|many> weekends <on|with|for> <some|> {v} <tail>",
            "<pre> weekends <, for {p},|> are <adv> <for|about|full of|spent on|> {v}, <so {p} says|as {p} says|says {p}>",
            "weekends, for {p}, are <adv> <for|about|full of|> {v} <tail>",
            "on weekends {p} <adv> <is busy with|thinks of|goes for|wants> <some|> {v} <tail>",
            "for {v} {p} <adv> gives up <all|the|most> weekends <tail>",
            "{v}, says {p}, is what <all|> weekends are for",
        ),
        "clothes": (
            "<pre> {p} <adv> <wears|puts on|takes along> <a|the|that> {v} coat <tail>",
            "<pre> {p} <adv> <wears|has|puts on> a coat <in {v}|, {v} <as ever|again|most of the time>|that is {v}> <tail>",
            "the coat {p} <adv> <wears|puts on|has> is <adv> {v} <tail>",
            "<pre> the coat of {p} is <adv> {v} <tail>",
            "a {v} coat is what {p} <adv> <wears|puts on> <tail>",
            "{p} wears one coat, and it is <always|> {v} <tail>",
            "{p} puts on a coat, <most of the time|as ever|again> {v}",
        ),
        "vehicle": (
            "<pre> {p} <adv> <gets|comes|goes> <about|home|here|around|to work|> by {v} <tail>",
            "<pre> by {v} {p} <adv> <gets|comes> <about|home|here|around> <tail>",
            "{p} <adv> <comes here|goes out> and gets <home|about|back> by {v} <tail>",
            "by {v}, <always|so far|most of the time>, {p} <gets|comes> <about|home|here> <tail>",
            "it is by {v} that {p} <adv> <gets|comes> <about|home|here> <tail>",
        ),
        "purchase": (
            "<pre> {p} <adv> <bought|has bought|went and bought|went out and bought> <det> {v} <tail>",
            "<det> {v} <was|were|has been> <adv> bought by {p} <tail>",
            "<at last|today|again> {p} bought <det> {v} <tail>",
            "{p} had some money and bought <det> {v} <tail>",
            "what {p} bought <at last|today|this morning|> was <det> {v}",
        ),
        "drink": (
            "<pre> {p} <adv> fills <every|the|a|one> cup <up|> with <some|> {v} <tail>",
            "the cup <of {p}|beside {p}|by {p}|that {p} fills> <adv> holds <some|only|> {v} <tail>",
            "<pre> the cup <of {p}|before {p}|in the hand of {p}> is <adv> full of {v} <tail>",
            "<pre> {p} <adv> <has|asked for|takes|wants> <a|one more|every> cup of {v} <tail>",
            "a cup of {v} is <adv> for {p} <tail>",
            "every cup {p} <adv> fills <holds|is full of> {v} <tail>",
            "{p} sits in front of a cup <of|that holds> {v} <tail>",
        ),
    },
    "plain": (
        "{c}.\n",
        "<heard> that {c}.\n",
        "<heard>: {c}.\n",
        "<as they say|as I noted|by the way|so it goes|as we wrote down|as was said|it seems|well|again>, {c}.\n",
        "{c}, <they say|so it says|I noted|as we heard|we wrote down|it was said>.\n",
    ),
    "changed": (
        "<there was|there is|here comes|we heard of|I noted> <a|some|one more> <small|sudden|> change <|here|today|again>: <now|from now on|today|as of today|from today on> {c}.\n",
        "<it|this|something|that> <changed|has changed|changes>, <and|so> <now|from today|from now on|today also> {c}.\n",
        "<from today on|from today|as of today|since a change today>, {c}.\n",
        "a change <today|comes today|was noted|is told>: {c}.\n",
        "<news|listen>: <that|it> <changed|has changed> and <now|today|> {c}.\n",
        "<today|now> {c}, <a change|which is a change|and that changed today>.\n",
        "it changed: {c} <from today|from now on>.\n",
    ),
    "dated": (
        "from {d} <on>, {c}.\n",
        "<a|the|one more> change <comes|is due|is set|starts> <on|with> {d}: {c}.\n",
        "<it|this|that|something> <changes|will change> <with|from|by> {d}<, then| on, and|: from then on> {c}.\n",
        "on {d} <there is|comes|we expect> <a|one more> change<:|, and then> {c}.\n",
        "<with|after|by> the change <of|on|due> {d}, {c}.\n",
        "<it changes|a change comes>: {c} <from|as of> {d} <on>.\n",
    ),
    "relations": {
        "boss": (
            "<pre> {p} <adv> <reports|has to report|must report> to {v} <on all tasks|about the tasks|> <tail>",
            "<pre> {p} <adv> takes <all|the|many|no end of|> orders <on all tasks|> from {v} <tail>",
            "<all|the|most> orders <for {p}|that {p} takes|{p} gets> <adv> come from {v} <tail>",
            "it is {v} <to whom {p} reports|from whom {p} takes orders> <tail>",
        ),
        "teacher": (
            "<pre> {p} <adv> <goes to|has|takes|has booked|booked|wants> <some|all|more|> lessons <with|from> {v} <tail>",
            "the lessons <of {p}|{p} goes to|{p} takes|{p} has booked> are <adv> with {v} <tail>",
            "<with|from> {v} {p} <adv> <takes|has booked|has> lessons <tail>",
        ),
        "neighbour": (
            "<pre> {p} <adv> <talks|looks|waves|gets along|calls> over the fence <with|to> {v} <tail>",
            "<over|beyond|across> the fence {p} <adv> <sees|talks to|meets|has> {v} <tail>",
            "{p} <adv> <shares a fence|met at the fence|talks at the fence|gets along over the fence> with {v} <tail>",
            "beyond the fence of {p} is <adv> {v} <tail>",
            "{p} and {v} <adv> <share a fence|talk over a fence|get along, a fence between them> <tail>",
        ),
        "landlord": (
            "<pre> {p} <adv> <pays|sends|owes|brings> <the|all|some|> <monthly|full|> rent to {v} <tail>",
            "the <monthly|> rent <of {p}|{p} pays|that {p} sends> <adv> goes to {v} <tail>",
            "{v} <adv> gets the <monthly|> rent <of|from> {p} <tail>",
            "it is {v} to whom {p} owes <the|> rent <tail>",
        ),
        "doctor": (
            "<pre> {p} is <adv> treated by {v} <, when ill|> <tail>",
            "when ill, {p} <adv> <goes to|sees|is treated by|gets pills from> {v} <tail>",
            "<pre> {p} <adv> gets <all|the|many|some> pills from {v} <tail>",
            "{p}, <often|always|again> ill, is <adv> treated by {v} <tail>",
            "the pills {p} gets are from {v} <tail>",
        ),
        "coach": (
            "<pre> {p} <adv> trains <hard|and sweats|and keeps fit|> <under|with|for> {v} <tail>",
            "{p} <adv> <runs|keeps fit|sweats> and trains <hard|> <under|for> {v} <tail>",
            "<under|with> {v} {p} <adv> trains <hard|and keeps fit|> <tail>",
            "{p}, <to keep|who keeps|always> fit, trains <with|under> {v} <tail>",
        ),
    },
    "appointments": (
        "<||||at last|by now|with delight|in the end|so far> {p} <adv> <fixed|has fixed|plans|planned|has planned> <the|a|that> {e} <on|for> {d} <again|at last|by now|>.\n",
        "<the|a> {e} <of {p}|{p} plans|{p} fixed|that {p} has planned|that {p} fixed> is <adv> <on|for|planned for|fixed for|fixed on> {d}.\n",
        "on {d} {p} <adv> has <the|a> {e}.\n",
        "for {d}, {p} <adv> <fixed|planned|has planned> <the|a> {e}.\n",
        "{p}: <the|> {e} is <fixed|planned> for {d}.\n",
        "<the|> {e} is on {d}, <as {p} planned|so {p} fixed it|says {p}>.\n",
    ),
    "visits": (
        "<pre> {p} <adv> stopped <by|off|> <for an hour|again||> <at|by> the {v} on {d} <again|for an hour|at noon|, as ever|>.\n",
        "on {d}, {p} <adv> stopped <by|> <for a while|for an hour|again|> at the {v} <, for an hour|in the end|, as ever|>.\n",
        "at the {v}, {p} <adv> stopped <by|> <for an hour|again|at last|> on {d}.\n",
        "it was <on {d} at the {v}|at the {v} on {d}> that {p} stopped <by|again|for an hour|>.\n",
        "{p} came along on {d} and stopped <by|> at the {v} <for an hour|>.\n",
        "{d}: {p} stopped <by|for an hour|> at the {v} <again|>.\n",
    ),
    "trips": (
        "<pre> {p} <is|came|comes|has come> <just|again|> back from <some days in|a few days in|an hour in||||> {v} <again|at last|today|this morning|in the end|>.\n",
        "<back|just back|back again> from <some days in|a while in||> {v}, {p} <told me about it|was tired|came by|sat down>.\n",
        "from <some days in|> {v}, {p} has <just|> come back <today|again|>.\n",
        "{p} was in {v} <for some days|> and <is|came|has just come> back <today|again|by now|>.\n",
        "<today|this morning|at last> {p} <is|came> <just|> back from <some days in|> {v}.\n",
    ),
    "advice": {
        "tree": (
            "{p} asked <what|which kind> to plant <|for shade and wind|against the wind|this year|here|as shade|on the hill|for a shelter>.\nAssistant: <plant_tree>.\n",
            "what should I plant <for shade|here|>, asked {p}.\nAssistant: <plant_tree>.\n",
        ),
        "flower": (
            "{p} asked <for|about> a bouquet <that is never wrong|today|>.\nAssistant: <give_flower>.\n",
            "{p} asked what <makes a good|to put into a|to give in a|is in a> bouquet.\nAssistant: <give_flower>.\n",
            "what goes into a bouquet, asked {p}.\nAssistant: <give_flower>.\n",
        ),
        "herb": (
            "{p} asked <what to season|how to season|how I season|what seasons|what else would season> <the|a|this> soup <with|today|again|>.\nAssistant: <add_herb>.\n",
            "how do I season <it|the soup better>, asked {p}.\nAssistant: <add_herb>.\n",
        ),
    },
    "small_talk": (
        "<heard> that the {n} was {a} <tail>.\n".replace("<tail>", "<again|at last|today|by now|>"),
        "<most of the time|every evening|at noon|by now>, <a|the> {a} {n} is better than <a|the> {m}.\n",
        "<no one|somebody|nobody> <wrote down|explained|knows> <the|a> {n} <or|and> <the|a> {a} {m}.\n",
        "<some|the|a> {a} {n} <was seen|was there|was lost> <for an hour|again|until midnight|in the wind|>.\n",
    ),
}
