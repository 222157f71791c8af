"""Wording of the rows of many forms: patterns whose parts are put together anew for every row (``expand``).

``<a|b|>`` is one of its alternatives; slots in braces are filled afterwards. None of it is RULER's or evaluation's.
"""

from kvscope.harness.reference_model.templates_ruler import CHAIN_FORMS, TAGGED_FORMS

# Short sentences, for haystacks that say the same few over and over.
SHORT_SENTENCES = (
    "<The|A|This|That|My|Our|Your|Her|His> {noun} <is|was|looks|seems|stays|feels|grew|turned> <so |very |quite |too |>{adj}.",
    "<The|Some|These|Those|Most|All> {noun}s <are|were|look|seem> {adj}.",
    "<The|A> {adj} {noun} <stands|lies|waits|sits|sleeps|hangs> <here|there|outside|still|again|by the {noun2}>.",
    "<Off|On|Up|Down|Out|Home|In> <we|they|you|I> <went|ran|come|walk|march|run>.",
    "<Round|Over|Up|Down|Left|Out> and <round|over|down|up|right|in> <it|she|he|we> <goes|went|turns|turned>.",
    "<Nothing|Something|Little|Much|No one> <else |>is <new|left|lost|here|missing>.",
    "<Look|Listen|Wait|Rest|Sing|Read|Count> <once more|a while|again|and see|with me>.",
    "<I|We|They|You> <like|want|need|see|have|keep|carry> <the|a|one> {noun}.",
)
# Longer ones, for haystacks like essays.
PROSE = (
    "<Most|Many|Some|Few|A few> <people|of us|readers|writers|towns> <think|believe|assume|say|hope> <that |>{a} {noun} <would|could|might|should|can> <make|become|turn into|replace|need> {a2} {noun2}.",
    "<When|If|Because|Since|Although|While> <you|we|they|people|I> <look at|work on|write about|wait for|talk to> {a} {noun}, <it|everything|the rest|the {noun2}> <starts to seem|looks|becomes|turns out> {adj}.",
    "<What|The thing that|All that> <matters|counts|surprised me|worried them|helps> <most |>is <not |>the {adj} {noun} <but|and not only|as much as> the {noun2}.",
    "<I|We|You|They> <used to|did not|never|often|always|hardly> <know|see|mind|understand|like> <how|why|that|when> {adj} {a} {noun} <was|could be|must have been>.",
    "<In|During|After|Before|Around|Long before> <those|these|such|the old|the early> <days|years|weeks|times>, {a} {noun} <was|seemed|meant|cost> <no more than|less than|more than|nearly|about> {a2} {noun2}.",
    "<So|But|And|Then|Still|Yet|Perhaps|Of course>, <the|this|every|each> {noun} <has|had|needs|wanted|gets> <its|a|some|no> {noun2} <now and then|in the end|at least|for a reason|anyway>.",
    "<It|That> <is|was|may be|would be> <hard|easy|tempting|foolish|wise|natural> to <say|ask|decide|explain|guess> <whether|why|how|if> {a} {noun} is {adj}.",
    "<One|Another|The first|The last|The best> <reason|problem|idea|question|lesson> is that {noun}s, <unlike|like|as well as> {noun2}s, <do|do not|rarely|usually> <stay|get|become|seem> {adj}.",
    "<Who|How|What|Why> <would|could|should|did> <want|make|explain|build|sell|trust> {a} {noun} <with|without|from|near|instead of> {a2} {adj} {noun2}?",
    "{Word} <said|wrote|claimed|told me|found> that the {noun} <of|from|in|near> {Word2} was {adj}, <and|but|though> <nobody|everyone|the {noun2}> <agreed|knew|cared|left>.",
    "<There|Here> <are|were> {small} {noun}s <and|or|but only|for every> {small2} {noun2}s<, more or less|, all of them {adj}|, as far as I know|>.",
    "<Once|Twice|Every day|At night|In spring|On Mondays> <she|he|the {noun2}|an old man|the child> <put|left|forgot|carried|painted|dropped> {a} {adj} {noun} <on|under|behind|beside|near> the {noun2}.",
)  # fmt: skip
RECORDS = (
    "{h}:{m} {noun} {adj}",
    "<INFO|WARN|DEBUG|NOTE> {noun} <is|was|stays|went> {adj}",
    "{h}:{m} <INFO|OK|SKIP> <opened|closed|moved|checked|read> {noun}",
    "<item|row|step|page> {small}, {noun}, {adj}, {noun2}",
)
# (gives a value, copies a name): {x} new, {y} old, {v} value, {tag} a word before names. Never evaluation's own line.
CHAIN_SYNTAX = (
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
CHAIN_TAGS = (
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
CHAIN_HEADS = (
    "<Follow|Trace|Watch|Keep track of> <how|where> <values|numbers> <go|pass|are handed on|move> from <name to name|one name to the next> in <the text|this text|what follows|the passage> <below|that comes next|>.",
    "<Somewhere|Scattered|Spread out> in the <text|lines|passage> below, <names|variables|letters> are <set|given values|bound>. <Remember|Note|Keep in mind> <which|who> <copies whom|gets what|has which value>.",
    "<The|This> <text|passage|note|page> <contains|holds|has> <assignments|chains of copies|definitions> between <other|unrelated> <lines|sentences>. <Read|Study> it <closely|with care|to the end>.",
    "<Read|Study> <the|this> <text|passage|listing> and <tell|work out|answer> <which names|who> <end up with|share|have> <a|the asked|some> value.",
    "<Variables|Names> are <assigned|defined|set> in <this|the> <text|document>; <a question|questions> <about them|> <comes|follow> <at the end|afterwards|later>.",
    "Task: <chain|variable|name> <tracing|following|lookup>.",
)  # fmt: skip
CHAIN_WHOLE = (
    "<Which|What> <names|variables|{tag}s|symbols> <hold|have|carry|end up with|got|are worth|stand for> {v}<, directly or not| in the end|, straight or by copying|>?",
    "<List|Name|Give|State|Write> <all|every one of the|the|each of the> {n} <names|variables|symbols> <whose value is|equal to|bound to|set to|that lead to|tied to> {v}.",
    "<Who|What> <has|shares|holds|carries> <the value|the number|> {v}<, counting copies of copies|, copies included|>?",
    "<Find|Collect|Gather> <everything|all names|all> <that got|that holds|bound to|which equals> {v}<, step by step|, link by link|>.",
    "<Starting from|Beginning with|From> {v}, which <names|variables> <come one after the other|does the value reach|are reached|get it>?",
)  # fmt: skip
CHAIN_WHOLE_BEGIN = (
    "<The|In order, the|Altogether the> <names|variables|{tag}s> <are|would be>",
    "<Those|The ones|The {n}> <with|holding|worth|bound to> {v} are:",
    "<{n}|Exactly {n}|In total {n}> <names|variables> <hold|have|carry|reach> {v}:",
    "<Tracing|Following|Walking> <the copies|the links|the text|it> <from {v}|back|down|through>, <we get|one finds|these come up|I find>:",
    "{v} <is held by|belongs to|goes to|reached>",
    "",
)
CHAIN_COPY = (
    ("<Whose value|What|Which name> did {x} <take|copy|take over>?", "{x} took it from"),
    ("<Where|From whom> <did|does> {x} get its value<| from>?", "From"),
)
CHAIN_VALUE = (
    ("<What|Which value|Which number> was {x} <set to|given|assigned>?", "{x} was <set to|given>"),
    ("<Give|State|Tell me> the value of {x}.", "The value of {x} is"),
)
NEEDLE_TYPES = ("key", "password", "phone number", "address", "price", "score", "seat", "locker", "hint", "answer")
# Beside those of the first phases: statements with words before, between and behind.
NEEDLE_SAID = (
    "<People|Some|They|Travellers> <said|say|know|found|wrote> that the {type} <of|for|belonging to> {key} <is|was> {value}<, and left it at that|, as far as one knows|>.",
    "<Do not forget|Keep in mind|Please note|Listen>: <the {type} <of|for> |>{key} <is|has|-> {value}.",
    "<A|The> {type} <known|listed|filed|kept> under {key}<, namely|:| -> | is> {value}<, was found|>.",
    "<By the way,|Also,|Here,|Incidentally,> {key} <has|uses|got|was given> <the {type}|> {value}<.|!|>",
    "{key} -> {value}",
    "{key} | {value}",
    "({key}, {value})",
    '"{key}": "{value}",',
    "<{key}> {value}".replace("<", "[").replace(">", "]"),
    "{type} {key} {value}",
    "<If|Should> <anyone|someone|you> <ask|asks|wonder> <for|about> {key}, <say|answer|tell them|write> {value}.",
    "{value} <belongs to|goes with|stands for|is kept for|was noted for> {key}.",
    "<Secret|Hidden|Special|Private> {type} <for|of> {key}<:| is| was> {value}.",
)  # fmt: skip
NEEDLE_HEADS = (
    "<Somewhere|Scattered|Tucked away> in <this|the> <text|passage|page> <there is|is> <a|one> {type}<, or more than one|>. <You will need|Look for> it <later|at the end>.",
    "<The|This> <text|passage|document|log> <holds|names|mentions> <some|a few|one or more> {type}s. <Read it all|Read on|Read closely>, <then answer|then reply|a question follows>.",
    "<Find|Look up|Search for> <what is asked|the right {type}> in the <text|passage|lines> <below|that follows>.",
    "<I|We> <hid|put|left> <a {type}|some {type}s> <among|between|in> <these|the following> <lines|sentences>. <Which|What> it is, <I|we> <ask|will ask> <afterwards|at the end>.",
    "Task: <lookup|retrieval|search|reading>.",
    "<Reference|Context|Text|Document>:",
)  # fmt: skip
NEEDLE_ONE = (
    ("<What|Which> {type} <did|does> the <text|passage|document> <give|name|have> for {key}?", "<The {type} of|For|As for> {key}<, it is| is|:>"),
    ("<What|Which {type}> <belongs to|goes with|is kept for|was noted for> {key}?", "<It is|That is|>"),
    ("<Give|State|Return|Recall|Find> the {type} <of|for|under> {key}.", "<{key}:|The {type}:|>"),
    ("{key}?", "<{key} ->|{key}:|>"),
    ("<Complete|Fill in>: the {type} for {key} is ...", "the {type} for {key} is"),
)  # fmt: skip
NEEDLE_MANY = (
    ("<What|Which> {type}s <did|does> the <text|passage|document> <give|name|have> for {key}?", "<The {type}s of|For|As for> {key}<, they are| are|:>"),
    ("<Give|State|Return|Recall|Find> <all|every one of the|the {n}> {type}s <of|for|under> {key}.", "<{key}:|The {n} {type}s:|>"),
    ("<How|With what> <is|was> {key} <listed|marked|recorded>? <Name|Give> all {n}.", "<All {n}:|>"),
)  # fmt: skip
NEEDLE_KEYED = (
    ("<Give|State|Return|Recall|Find> the {type}s <of|for|under> {key}.", "<The {type}s are|Here they are:|>"),
    ("<What|Which> {type}s <belong to|go with> {key}?", "<They are|These:|>"),
)
COMMON_HEADS = (
    "<Words|The words|Many words> <stand|are written|come> <below|in this list|here>, <some|a few of them|several> <again and again|more than the others|many times>.",
    "<Go|Read> through <the|this> list and <notice|note|mark> which words <are repeated|recur|come back> <most|the most>.",
    "<In the list|In what follows>, <a few|some> words are <frequent|common> and <the rest|the others|most> are <rare|seldom seen>.",
    "List:",
    "Task: <word count|tally|counting words>.",
)  # fmt: skip
COMMON_ASKED = (
    ("<Which|What> {n} <words|entries> <occur|are repeated|come|show up> <most|the most|more than the rest>?", "<The {n} words are|These {n}:|Most repeated:|>"),
    ("<Name|Give|State|Find> the {n} <words|entries> <with the most repeats|that recur most|of highest frequency|you met most>.", "<Here are the {n}:|They are|The {n}:|>"),
    ("<Count|Tally> the <list|words>: <which|what> {n} <lead|win|are ahead>?", "<In the lead|Ahead>:"),
)  # fmt: skip
CODED_HEADS = (
    "<Below is|Here is|What follows is> a <stream|run|series> of <made-up|invented|meaningless> words. <Some|A few> <recur|come back> <far more|more> than <others|the rest>.",
    "<Tally|Count|Keep score of> the <strings|invented words|letter groups> <in this text|below>.",
    "<Read|Scan> the <strings|letter groups> and <remember|note> <how many times|how frequently> each <one |>comes up.",
    "Stream:",
    "Task: <frequency count|tally of strings>.",
)  # fmt: skip
CODED_ASKED = (
    ("<Leave out|Skip|Never mind> the {gap} signs<.|, please.> <Which|What> {n} <strings|words|letter groups> <recur|come up|occur> <most|the most>?", "<The leading {n}:|The {n} are|>"),
    ("<Name|Give|State> the {n} <strings|words|letter groups> <seen most|with the highest tally|of highest frequency>, <most frequent first|from the top|in falling order>.", "<From the top|In falling order|Top {n}>:"),
    ("<Which|What> {n} <strings|words> <lead|are ahead> (<not counting|without> {gap})?", "<In the lead|Ahead>:"),
)  # fmt: skip
COMPARED = (
    ("<Which|What> <comes up|stands there|occurs> more <often|frequently>, {x} or {y}?", "<More often|It is|>"),
    ("{x} or {y}: <which|what> <recurs|comes> more?", ""),
)
