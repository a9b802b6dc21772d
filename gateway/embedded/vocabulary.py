"""Everyday words and facts from which the instruction data is generated."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


def _pairs(text: str) -> dict[str, str]:
    """ "a:b|c:d" as a mapping; line breaks count for nothing."""
    entries = "".join(line.strip() for line in text.splitlines()).split("|")
    return {left: right for left, _, right in (entry.partition(":") for entry in entries)}


NAMES = _words(
    """
    Ada Alan Alice Amir Ana Anton Ben Bruno Carla Chen Clara Dan Dina Elena Emma Eric Eva Farah Felix
    Finn Grace Hana Hugo Ines Ivan Jack Jane Joan Jonas Julia Kai Karim Lara Leo Lena Lina Luca Maria
    Mark Maya Mia Milo Nadia Nina Noah Nora Olga Oscar Otto Paul Pia Rosa Sam Sara Sofia Tara Theo Tom
    Vera Yuki Zoe
    """
)
ANIMALS = _words(
    """
    cat dog horse cow sheep goat pig duck hen mouse rabbit fox wolf bear lion tiger frog bird owl fish
    whale snake turtle bee ant spider donkey camel monkey elephant
    """
)
COLOURS = _words(
    """
    red blue green yellow orange purple brown black white grey pink
    """
)
FRUITS = _words(
    """
    apple banana cherry grape lemon mango melon orange peach pear plum
    """
)
VEGETABLES = _words(
    """
    bean cabbage carrot corn garlic onion pea pepper potato tomato
    """
)
TOOLS = _words(
    """
    hammer saw drill screwdriver wrench ladder axe shovel brush ruler
    """
)
FURNITURE = _words(
    """
    table chair bed sofa desk shelf lamp cupboard bench stool
    """
)
THINGS = _words(
    """
    ball bell boat book bottle box bread bridge bus cake candle car cart clock coat cup door engine
    fence flag flower garden glass hat house key kite letter map mirror paper pen phone picture plate
    river road rope school shirt shoe spoon star stone street table ticket tower train tree wall wheel
    window
    """
)
PLACES = _words(
    """
    market garden forest village city station library school beach harbour kitchen mountain river bridge
    park farm castle museum
    """
)
PEOPLE = _words(
    """
    teacher doctor farmer sailor baker painter driver student king queen child neighbour writer gardener
    singer nurse pilot cook
    """
)
ADJECTIVES = _words(
    """
    old young small big tall short happy sad quiet loud clever kind brave tired hungry friendly careful
    lazy busy proud strange gentle new clean cold warm dark bright heavy light long soft
    """
)
VERBS_PAST = _words(
    """
    found saw opened painted carried lost bought sold cleaned repaired dropped wanted moved watched
    liked hid brought needed drew counted
    """
)
ADVERBS = _words(
    """
    quickly slowly quietly carefully happily gladly suddenly soon again together
    """
)
WEATHER = _words(
    """
    sunny rainy windy cold warm cloudy snowy stormy
    """
)
DAYS = _words(
    """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    """
)
MONTHS = _words(
    """
    January February March April May June July August September October November December
    """
)
NUMBER_WORDS = _words(
    """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty
    """
)

CATEGORIES: dict[str, list[str]] = {
    "animal": ANIMALS,
    "colour": COLOURS,
    "fruit": [fruit for fruit in FRUITS if fruit != "orange"],
    "vegetable": VEGETABLES,
    "tool": TOOLS,
    "piece of furniture": FURNITURE,
}
PLURAL_CATEGORIES = {
    "animals": ANIMALS,
    "colours": COLOURS,
    "fruits": FRUITS,
    "vegetables": VEGETABLES,
    "tools": TOOLS,
    "names": NAMES,
}

CAPITALS = _pairs(
    """
    Argentina:Buenos Aires|Australia:Canberra|Austria:Vienna|Belgium:Brussels|Brazil:Brasilia|
    Bulgaria:Sofia|Canada:Ottawa|Chile:Santiago|China:Beijing|Colombia:Bogota|Croatia:Zagreb|Cuba:Havana|
    Denmark:Copenhagen|Egypt:Cairo|Estonia:Tallinn|Ethiopia:Addis Ababa|Finland:Helsinki|France:Paris|
    Germany:Berlin|Ghana:Accra|Greece:Athens|Hungary:Budapest|Iceland:Reykjavik|India:New Delhi|
    Indonesia:Jakarta|Iran:Tehran|Iraq:Baghdad|Ireland:Dublin|Italy:Rome|Jamaica:Kingston|Japan:Tokyo|
    Jordan:Amman|Kenya:Nairobi|Latvia:Riga|Lebanon:Beirut|Lithuania:Vilnius|Malaysia:Kuala Lumpur|
    Mexico:Mexico City|Morocco:Rabat|Nepal:Kathmandu|the Netherlands:Amsterdam|New Zealand:Wellington|
    Nigeria:Abuja|Norway:Oslo|Pakistan:Islamabad|Peru:Lima|the Philippines:Manila|Poland:Warsaw|
    Portugal:Lisbon|Romania:Bucharest|Russia:Moscow|Senegal:Dakar|Serbia:Belgrade|Slovakia:Bratislava|
    Slovenia:Ljubljana|South Korea:Seoul|Spain:Madrid|Sweden:Stockholm|Switzerland:Bern|Syria:Damascus|
    Thailand:Bangkok|Tunisia:Tunis|Turkey:Ankara|Ukraine:Kyiv|the United Kingdom:London|
    the United States:Washington|Uruguay:Montevideo|Venezuela:Caracas|Vietnam:Hanoi
    """
)
COLOUR_OF = _pairs(
    """
    the sky:blue|grass:green|snow:white|coal:black|a lemon:yellow|a banana:yellow|blood:red|milk:white|
    a tomato:red|a carrot:orange|the sea:blue|a leaf:green|the sun:yellow|chocolate:brown|a cloud:white|
    an elephant:grey|a frog:green|a flamingo:pink|a raven:black|a strawberry:red|a cucumber:green|
    salt:white|an aubergine:purple|wood:brown|a pumpkin:orange
    """
)
SOUNDS = _pairs(
    """
    cat:meow|dog:woof|cow:moo|sheep:baa|duck:quack|pig:oink|hen:cluck|horse:neigh|bee:buzz|frog:croak|
    lion:roar|snake:hiss|mouse:squeak|owl:hoot|wolf:howl
    """
)
IRREGULAR_PLURALS = _pairs(
    """
    child:children|mouse:mice|sheep:sheep|fish:fish|box:boxes|bus:buses|glass:glasses|shelf:shelves|
    wolf:wolves|leaf:leaves|city:cities|library:libraries|cherry:cherries|potato:potatoes|
    tomato:tomatoes|brush:brushes|bench:benches|peach:peaches|beach:beaches|fox:foxes|donkey:donkeys|
    monkey:monkeys
    """
)
LEGS = {"cat": 4, "dog": 4, "bird": 2, "spider": 8, "ant": 6, "horse": 4, "snake": 0, "hen": 2, "bee": 6, "cow": 4}
_OPPOSITES = _pairs(
    """
    hot:cold|big:small|tall:short|up:down|left:right|day:night|black:white|open:closed|fast:slow|old:new|
    happy:sad|rich:poor|strong:weak|loud:quiet|full:empty|early:late|hard:soft|heavy:light|wet:dry|
    clean:dirty|near:far|high:low|thick:thin|wide:narrow|deep:shallow|good:bad|true:false|yes:no|in:out|
    first:last|begin:end|buy:sell|win:lose|push:pull|love:hate|inside:outside|above:below|before:after|
    always:never|easy:difficult|safe:dangerous|bright:dark|sweet:sour|cheap:expensive|front:back|
    top:bottom|summer:winter|north:south|east:west|friend:enemy|young:old|smooth:rough|more:less|
    many:few|start:stop|remember:forget|arrive:leave|give:take
    """
)
OPPOSITES = {right: left for left, right in reversed(_OPPOSITES.items())} | _OPPOSITES

SELF = {
    "Who are you?": "I am the small model that ships with Patchbay.",
    "What are you?": "I am a small language model with about four million parameters.",
    "What is your name?": "I have no name. I am the small model that ships with Patchbay.",
    "Are you a person?": "No, I am a small language model.",
    "Are you human?": "No, I am a small language model.",
    "What can you do?": "I can repeat words, count them, add small numbers, answer simple questions and chat a little.",
    "How are you?": "I am fine, thank you. How can I help you?",
    "Thank you.": "You are welcome.",
    "Thanks!": "You are welcome.",
    "Goodbye.": "Goodbye! Have a nice day.",
    "Bye!": "Goodbye! Have a nice day.",
    "Good morning.": "Good morning! How can I help you?",
    "Good evening.": "Good evening! How can I help you?",
    "Hello": "Hello! How can I help you?",
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hi!": "Hello! How can I help you?",
    "Hi there": "Hello! How can I help you?",
    "Hey": "Hello! How can I help you?",
    "Help": "Ask me something simple, such as: What is 2 + 3?",
    "Can you help me?": "Yes. What do you need?",
    "What is Patchbay?": "Patchbay serves many adapters on one base model.",
    "What is an adapter?": "An adapter is a small patch that changes what a model does.",
    "What is a language model?": "A language model predicts the next word of a text.",
    "What is Python?": "Python is a programming language.",
    "What is a computer?": "A computer is a machine that runs programs.",
    "How many days are in a week?": "There are 7 days in a week.",
    "How many months are in a year?": "There are 12 months in a year.",
    "How many hours are in a day?": "There are 24 hours in a day.",
    "How many minutes are in an hour?": "There are 60 minutes in an hour.",
    "How many letters are in the alphabet?": "There are 26 letters in the alphabet.",
    "Tell me a joke.": "Why did the computer go to the doctor? It had a virus.",
}
