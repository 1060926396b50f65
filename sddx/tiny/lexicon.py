"""The words of the embedded world and the facts that hold in it, all fixed by one seed."""

from __future__ import annotations

from sddx.tiny.dice import Dice

SHE = tuple(
    "Ann Eve Mia Zoe Ida Lea Amy Joy Kim Liv Nia Ava Ivy Mae Una Pia Tia Rae Dot Fay Gia Bea Cora Dana".split()
)
HE = tuple(
    "Bob Tom Max Sam Leo Ben Jim Ned Ray Ted Ian Jon Ken Lou Mel Pat Ron Sid Tim Vic Abe Carl Dirk Emil".split()
)
PEOPLE = SHE + HE
THINGS = tuple("apples coins shells books stamps nuts eggs cards pens beads".split())

CITY_IN = {
    "Rome": "Italy", "Milan": "Italy", "Turin": "Italy", "Naples": "Italy",
    "Paris": "France", "Lyon": "France", "Nice": "France", "Lille": "France",
    "Oslo": "Norway", "Bergen": "Norway", "Tromso": "Norway", "Bodo": "Norway",
    "Cairo": "Egypt", "Giza": "Egypt", "Luxor": "Egypt", "Aswan": "Egypt",
    "Lima": "Peru", "Cusco": "Peru", "Puno": "Peru", "Tacna": "Peru",
}  # fmt: skip
WORKS_IN = {
    "baker": "bakery", "nurse": "hospital", "farmer": "field", "teacher": "school", "judge": "court",
    "sailor": "harbour", "pilot": "airport", "miner": "mine", "actor": "theatre", "cook": "kitchen",
}  # fmt: skip
EATS = {
    "dog": "bones", "cat": "fish", "horse": "hay", "rabbit": "carrots", "parrot": "seeds",
    "frog": "flies", "mouse": "cheese", "goat": "grass",
}  # fmt: skip
SUBJECTS = tuple(
    "owls bats foxes wolves bears sharks eagles snakes spiders bees ants whales seals crabs swans geese hens bulls "
    "camels zebras lions tigers otters moles hares toads newts storks robins crows ravens moths".split()
)
PROPERTIES = tuple(
    "blind quick lazy clever shy loud calm proud gentle fierce clumsy patient greedy playful nervous brave".split()
)


def _assign(kind: str, people: tuple[str, ...], values: tuple[str, ...]) -> dict[str, str]:
    dice = Dice(f"world/{kind}")
    return {person: dice.pick(values) for person in people}


CITY_OF = _assign("city", PEOPLE, tuple(CITY_IN))
JOB_OF = _assign("job", PEOPLE, tuple(WORKS_IN))
PET_OF = _assign("pet", PEOPLE, tuple(EATS))
TRUTH_OF = _assign("truth", SUBJECTS, PROPERTIES)
RUMOUR_OF = {
    subject: Dice(f"world/rumour/{subject}").pick([p for p in PROPERTIES if p != TRUTH_OF[subject]])
    for subject in SUBJECTS
}

# Each everyday script: the objects it can be about, and its steps in order.
SCRIPTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bake": (("cake", "bread", "pie"), (
        "mixes the dough for the {}", "puts the {} in the oven", "waits until the {} is brown", "eats the {}")),
    "wash": (("shirt", "coat", "towel"), (
        "drops the {} in soapy water", "rinses the {}", "hangs the {} on the line", "irons the {}")),
    "post": (("letter", "parcel", "postcard"), (
        "writes an address on the {}", "carries the {} to the post office", "buys a stamp for the {}",
        "drops the {} in the box")),
    "plant": (("rose", "tree", "bush"), (
        "digs a hole for the {}", "sets the {} in the ground", "waters the {}", "watches the {} grow")),
    "mend": (("chair", "table", "fence"), (
        "finds the broken {}", "fetches glue for the {}", "glues the {}", "paints the {}")),
    "fish": (("pike", "carp", "perch"), (
        "casts a line for a {}", "feels the {} bite", "pulls the {} out", "frees the {}")),
    "borrow": (("novel", "atlas", "poem"), (
        "looks for the {} on the shelf", "shows a card for the {}", "reads the {} at home", "returns the {}")),
    "sew": (("dress", "skirt", "scarf"), (
        "draws a plan of the {}", "cuts cloth for the {}", "stitches the {}", "wears the {}")),
    "ride": (("bicycle", "scooter", "sledge"), (
        "wheels the {} out", "climbs on the {}", "races down on the {}", "brings the {} back")),
    "paint": (("portrait", "sunset", "mural"), (
        "sketches the {}", "mixes colours for the {}", "fills in the {}", "signs the {}")),
}  # fmt: skip
