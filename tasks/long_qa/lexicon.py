"""Every name and thing a long_qa story draws on, split so that training and evaluation share none of them.

A word is a possible key or answer, so the reference model must never have been trained on evaluation's words. Months
and numbers are closed classes and shared. The split is by hash of the word, so it does not depend on its neighbours.
"""

import hashlib
from functools import cache
from types import MappingProxyType

from kvscope.tasks.words import Split, words

EVAL_SHARE_PERCENT = 40

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
# February has 28 days: the story's years are not leap years.
MONTH_DAYS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)

_LISTS = {
    "person": """
        Aaron Abel Adele Agnes Aidan Alan Albert Alfred Alice Alma Alvin Amos Andrew Anita Anton Arlene Arnold Arthur
        Astrid Audrey Barbara Basil Beatrice Benjamin Bernard Bertha Bettina Boris Brenda Brian Bridget Bruno Calvin
        Camilla Carmen Caspar Cecil Celia Cedric Charles Clara Claude Clement Clifford Colin Conrad Cora Cornelius
        Craig Curtis Cynthia Cyril Damian Daniel Daphne Darius Deborah Delia Denise Dennis Derek Desmond Diana Dolores
        Dominic Donald Dora Doreen Dorothy Douglas Duncan Edgar Edith Edmund Edwin Eileen Elaine Eleanor Elias Eliza
        Elmer Elsa Emil Emma Enid Eric Ernest Esther Ethel Eugene Eunice Evelyn Fabian Felix Fiona Flora Franklin
        Freda Gareth Gavin Geoffrey Gerald Gerda Gilbert Gladys Glenda Gloria Gordon Graham Gregory Greta Gustav
        Hannah Harold Harriet Hazel Hector Hedwig Helen Henry Herbert Hilda Horace Howard Hubert Hugo Ida Ignatius
        Imogen Ingrid Irene Irma Isaac Isabel Ivan Ivor Jacob Janet Jeremy Jerome Jessica Joan Joel Jonas Joseph Joyce
        Judith Julian Karen Karl Katrina Keith Kenneth Kirsten Klaus Lambert Laura Lavinia Lawrence Leah Leland Leona
        Leopold Leslie Lester Lewis Lionel Lorenz Louise Lucas Lucy Luther Lydia Mabel Magnus Malcolm Marcel Margot
        Marion Martha Marvin Matilda Maurice Melvin Meredith Michael Mildred Milton Minerva Miriam Mona Monica Morris
        Muriel Myra Nadia Naomi Nathan Nelson Nigel Nina Nora Norbert Norman Octavia Odette Oliver Olga Orson Oscar
        Oswald Otto Patrick Paula Percy Petra Philip Phoebe Priscilla Quentin Rachel Ralph Ramona Raymond Rebecca
        Regina Reuben Rhoda Richard Rita Robert Roderick Roland Rosalind Rowena Rudolf Rupert Ruth Sabina Samuel
        Sandra Sebastian Selma Sheila Sibyl Sidney Silas Simon Sonia Sophie Stanley Stella Sylvia Tabitha Tamara
        Teresa Thelma Theodore Thomas Timothy Tobias Trevor Ulrich Ursula Valerie Vera Vernon Victor Vincent Viola
        Vivian Wallace Walter Wanda Warren Wendy Wilbur Wilfred Willem Winifred Xavier Yolanda Yvonne Zelda
    """,
    "town": """
        Aachen Aberdeen Adelaide Alicante Ankara Antwerp Ascona Athens Auckland Avignon Baden Basel Belfast Belgrade
        Bergen Berlin Bilbao Bologna Bordeaux Boston Bremen Brighton Bristol Brno Brussels Bucharest Budapest Cadiz
        Cairo Calais Cardiff Chicago Coimbra Cologne Corfu Cork Cracow Dakar Dallas Debrecen Delft Denver Dover
        Dresden Dublin Dundee Durban Edinburgh Exeter Faro Fargo Galway Gdansk Geneva Genoa Ghent Glasgow Granada Graz
        Haifa Halifax Hamburg Hanoi Havana Helsinki Houston Innsbruck Istanbul Jaipur Kassel Kyoto Lagos Leeds Leipzig
        Lille Lima Lisbon Liverpool Lucerne Lugano Lyon Madrid Malmo Manila Marseille Memphis Milan Minsk Montreal
        Mumbai Munich Nairobi Nantes Naples Odense Omaha Orleans Osaka Oslo Ottawa Oxford Padua Palermo Parma Perth
        Pisa Plovdiv Porto Poznan Prague Quito Ravenna Reno Riga Rimini Rotterdam Salzburg Santiago Seattle Seoul
        Seville Siena Sofia Stockholm Stuttgart Tallinn Tampere Tartu Toledo Toronto Toulouse Trento Trieste Tucson
        Tunis Turin Utrecht Valencia Verona Vienna Vilnius Warsaw Zagreb Zurich
    """,
    "job": """
        accountant actor architect baker barber blacksmith bookbinder botanist brewer bricklayer broker butcher
        carpenter cartoonist cashier chemist clown cobbler conductor cook courier dancer dentist designer detective
        diver driver editor electrician engineer farmer firefighter fisherman florist forester gardener geologist
        glazier goldsmith guard hairdresser historian hunter illustrator interpreter jeweller joiner journalist judge
        juggler lawyer lecturer librarian lifeguard locksmith magician mason mechanic merchant midwife miller miner
        model musician notary nurse optician painter pharmacist photographer physicist pilot plumber poet porter
        potter printer publisher ranger receptionist reporter roofer sailor salesman sculptor secretary shepherd
        singer soldier surgeon tailor tanner translator undertaker vet waiter watchmaker weaver welder writer
        zoologist
    """,
    "food": """
        apricots asparagus bacon bananas beans biscuits bread broccoli burgers cabbage cake carrots cauliflower celery
        cereal cheese cherries chestnuts chicken chocolate cucumber curry doughnuts dumplings eggs falafel fennel figs
        fudge garlic gnocchi grapes ham herring hummus kale kebab lamb lasagna leeks lemons lentils lobster mangoes
        melons meringue muesli muffins mushrooms mussels noodles oatmeal olives omelettes onions oranges pancakes
        papayas parsnips pasta peaches peanuts pears peas peppers pickles pineapple pizza plums polenta popcorn
        porridge potatoes prawns pretzels pumpkin quiche radishes raisins ravioli rice risotto salad salami salmon
        sardines sausages scones spaghetti spinach steak stew strawberries sushi tacos toffee tofu tomatoes trout tuna
        turnips waffles walnuts yoghurt
    """,
    "animal": """
        alpaca badger beagle budgie bulldog camel canary cat chameleon chinchilla cockatoo collie cow crab dachshund
        dog donkey duck ferret finch fox frog gecko gerbil goat goldfish goose greyhound hamster hare hedgehog hen
        horse hound iguana kitten lizard llama lobster magpie mouse mule newt otter owl ox parakeet parrot peacock
        pheasant pig pigeon pony poodle porcupine puppy quail rabbit ram rat raven rooster salamander sheep skunk
        snail snake spaniel spider squirrel stork swan terrier toad tortoise turkey turtle weasel
    """,
    "instrument": """
        accordion bagpipe balalaika banjo bassoon bongo bugle castanets cello clarinet clavichord concertina cornet
        cymbals didgeridoo dulcimer euphonium fiddle flugelhorn flute glockenspiel gong guitar harmonica harmonium
        harp harpsichord horn kazoo lute lyre mandolin maracas marimba oboe ocarina organ piano piccolo recorder
        saxophone shamisen sitar tabla tambourine trombone trumpet tuba ukulele vibraphone viola violin whistle
        xylophone zither
    """,
    "hobby": """
        acrobatics aerobics algebra angling archery astrology astronomy badminton ballet baseball basketball
        beekeeping billiards bowling boxing calligraphy canoeing carpentry chess climbing cricket croquet crochet
        crosswords cycling darts dominoes drawing embroidery fencing fishing football gardening genealogy golf
        gymnastics handball hiking hockey hurling jogging judo juggling karate kayaking knitting lacrosse macrame
        meditation mosaics netball origami paintball photography pilates poetry poker polo pottery puzzles quilting
        rafting rowing rugby running sailing sculpture sewing skating skiing snooker snorkelling squash stargazing
        sudoku surfing swimming taxidermy tennis trampolining volleyball weaving weightlifting whittling wrestling
        yoga
    """,
    "colour": """
        amber apricot aqua azure beige black blue bronze brown burgundy cerise charcoal chartreuse copper coral cream
        crimson cyan ebony emerald fuchsia golden green grey indigo ivory jade khaki lavender lilac lime magenta
        mahogany maroon mauve mustard navy ochre olive orange orchid pearl periwinkle pink plum purple red ruby russet
        rust saffron sapphire scarlet silver tan taupe teal terracotta turquoise ultramarine umber vermilion violet
        white yellow
    """,
    "vehicle": """
        ambulance balloon barge bicycle boat bus cab canoe caravan carriage catamaran ferry glider gondola helicopter
        hovercraft jeep kayak limousine lorry minibus moped motorbike motorboat pickup plane raft rickshaw
        rollerskates scooter skateboard sled sledge speedboat steamer submarine taxi tractor train tram tricycle
        trolleybus truck underground unicycle van wagon yacht
    """,
    "object": """
        anvil apron armchair axe backpack barometer basket bathtub beaker bench binoculars blanket blender bookcase
        bottle bracelet broom brooch bucket calculator camera candle carpet chandelier chisel clock comb compass
        cradle crayon cupboard curtain cushion desk dice doll doormat earring easel envelope eraser fan flask fork
        freezer funnel globe goblet hammer hammock handbag heater helmet hourglass jug kettle kite ladder lamp lantern
        loom magnet mattress medal megaphone microscope mirror mug napkin necklace notebook oven paddle parasol pencil
        pillow plate pliers pram printer purse rake rope ruler saddle saucepan saw scarf scissors screwdriver shovel
        sieve sofa spade spoon stapler statue stool suitcase sundial syringe tablecloth teapot telescope tent
        thermometer thimble toaster torch tripod trolley trowel typewriter umbrella vase wallet wardrobe wheelbarrow
        wig wrench
    """,
    "drink": """
        absinthe ale brandy buttermilk champagne cider cocoa coffee cognac cola cordial espresso gin grog kefir
        kombucha lassi latte lemonade liqueur macchiato malt mead milk mocha ouzo punch rum sake schnapps sherry
        smoothie soda sorbet stout tea tequila tonic vermouth vodka water whisky wine
    """,
    "event": """
        anniversary audition auction ball banquet barbecue baptism bazaar birthday breakfast carnival ceremony
        christening cleanup concert conference contest debate demonstration derby dinner dissertation engagement exam
        excursion exhibition fair feast festival funeral gala graduation harvest hearing housewarming inspection
        interview jubilee lecture lunch marathon masquerade match meeting opera operation pageant parade party picnic
        pilgrimage procession quiz raffle recital reception regatta rehearsal retreat reunion rodeo safari seminar
        sleepover summit symposium tournament trial tutorial vaccination wedding workshop
    """,
    "place": """
        abbey airport aquarium arcade arena bakery bank beach bookshop bridge cafeteria canteen casino castle
        cathedral cave cemetery chapel cinema circus clinic college courthouse dock embassy factory farmhouse fort
        fountain gallery garage gym harbour hospital hostel hotel kiosk laboratory laundrette library lighthouse mall
        market mill monastery mosque motel museum nursery observatory orchard orphanage palace park pharmacy pier
        planetarium playground pool prison pub quarry racecourse restaurant school shipyard spa square stadium station
        studio supermarket synagogue temple theatre tower university vineyard warehouse windmill zoo
    """,
    "tree": """
        acacia alder ash aspen baobab beech birch boxwood catalpa cedar chestnut cypress dogwood elder elm eucalyptus
        fir ginkgo hawthorn hazel hemlock hickory holly hornbeam juniper larch laurel linden magnolia maple mimosa
        mulberry myrtle oak palm pine poplar redwood rowan sequoia spruce sycamore tamarisk walnut willow yew
    """,
    "flower": """
        agapanthus alyssum amaryllis anemone aster azalea begonia bluebell buttercup camellia carnation chrysanthemum
        clematis columbine cornflower crocus cyclamen daffodil dahlia daisy delphinium edelweiss forsythia foxglove
        freesia gardenia gentian geranium gladiolus heather hibiscus hollyhock honeysuckle hyacinth hydrangea iris
        jasmine lily lotus lupin marigold narcissus nasturtium oleander orchids pansy peony petunia phlox poppy
        primrose rhododendron rose snapdragon snowdrop sunflower thistle tulip verbena wisteria zinnia
    """,
    "herb": """
        aniseed basil borage camomile caraway cardamom chervil chives cinnamon cloves comfrey coriander cress cumin
        dandelion dill ginger ginseng horseradish hyssop lemongrass liquorice lovage marjoram mint nettle nutmeg
        oregano paprika parsley pepper rosemary sage sorrel spearmint tarragon thyme turmeric valerian vanilla
        wormwood yarrow
    """,
}


def _split_of(word: str) -> Split:
    bucket = int.from_bytes(hashlib.sha256(f"long_qa {word}".encode()).digest()[:4], "big") % 100
    return "eval" if bucket < EVAL_SHARE_PERCENT else "train"


def _unique() -> dict[str, tuple[str, ...]]:
    """Drop a word from every category after its first: an answer must belong to one category alone."""
    seen: set[str] = {month.lower() for month in MONTHS}
    lists: dict[str, tuple[str, ...]] = {}
    for category, text in _LISTS.items():
        fresh = [word for word in text.split() if word.lower() not in seen]
        seen.update(word.lower() for word in fresh)
        lists[category] = tuple(fresh)
    return lists


ALL: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(_unique())
CATEGORIES = tuple(ALL)


@cache
def lexicon(split: Split) -> MappingProxyType[str, tuple[str, ...]]:
    """Return category -> words of one split, in alphabetical order."""
    return MappingProxyType(
        {category: tuple(sorted(word for word in ALL[category] if _split_of(word) == split)) for category in ALL}
    )


@cache
def category_of() -> MappingProxyType[str, str]:
    """Return lower-case word -> category, of both splits."""
    return MappingProxyType({word.lower(): category for category, listed in ALL.items() for word in listed})


@cache
def chatter(split: Split) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (adjectives, nouns) for small talk: no word of these can be a key or an answer of a story."""
    taken = {part for word in category_of() for part in word.split("-")}
    taken |= {month.lower() for month in MONTHS} | {"not", "mentioned", "days", "times"}
    plain = words(split)
    return (
        tuple(word for word in plain.adjectives if word not in taken),
        tuple(word for word in plain.nouns if word not in taken),
    )


def date_text(day: int) -> str:
    """Return day 0-364 of a year as ``3 June``."""
    for month, days in zip(MONTHS, MONTH_DAYS, strict=True):
        if day < days:
            return f"{day + 1} {month}"
        day -= days
    raise ValueError("a day of the year is 0 to 364")


@cache
def _days() -> dict[str, int]:
    return {date_text(day): day for day in range(sum(MONTH_DAYS))}


def day_of_date(text: str) -> int:
    """Return the day of the year, 0-364, of ``3 June``."""
    return _days()[text]
