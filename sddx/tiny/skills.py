"""Eight skills. Each function draws one item: a question, the model's own answer, its canonical form.

The canonical form is what makes two items the same question under other words (operations and numbers, pairs
of facts); it decides which split an item may stand in, so that splits are disjoint by construction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sddx.tiny import lexicon as words
from sddx.tiny.dice import Dice

SPLITS = ("pretrain", "finetune", "calibration", "selection", "report")


@dataclass(frozen=True)
class Item:
    """`answer` is in the model's own style, `reference` in the foreign one; the two are equal where a skill
    has no fine-tuning set. `choices` (the first is right) is empty for generated answers."""

    form: str
    prompt: str
    answer: str
    reference: str
    final: str
    choices: tuple[str, ...] = ()


def arithmetic(dice: Dice) -> Item:
    """A word problem of two or three events; every step is written out, numbers stay below 100."""
    person = dice.pick(words.PEOPLE)
    things = dice.pick(words.THINGS)
    total = dice.between(5, 40)
    form, story, own = [str(total)], [f"{person} has {total} {things}."], []
    foreign = [f"At first there are {total} {things}."]
    for _ in range(dice.between(2, 3)):
        kind = dice.pick(_EVENTS if total > 12 else _GAINS)
        event = kind(dice, person, things, total)
        total = event.total
        form.append(event.form)
        story.append(event.text)
        own.append(event.own)
        foreign.append(event.foreign)
    question = f"How many {things} does {person} have now?"
    return Item(
        form=" ".join(form),
        prompt=" ".join([*story, question]),
        answer=" ".join([*own, f"The answer is {total}."]),
        reference=" ".join([*foreign, f"#### {total}"]),
        final=str(total),
    )


@dataclass(frozen=True)
class _Event:
    form: str
    text: str
    own: str
    foreign: str
    total: int


def _he(person: str) -> str:
    return "She" if person in words.SHE else "He"


def _bags(dice: Dice, person: str, things: str, total: int) -> _Event:
    bags, each = dice.between(2, 5), dice.between(2, 6)
    gain, after = bags * each, total + bags * each
    if after > 99:
        return _finds(dice, person, things, total)
    return _Event(
        f"+{bags}*{each}",
        f"{_he(person)} buys {bags} bags with {each} {things} each.",
        f"{bags} x {each} = {gain}. {total} + {gain} = {after}.",
        f"The bags hold {gain} in all, which brings the number up to {after}.",
        after,
    )


def _finds(dice: Dice, person: str, things: str, total: int) -> _Event:
    gain = dice.between(2, 20) if total < 79 else 1
    after = total + gain
    return _Event(
        f"+{gain}",
        f"{_he(person)} finds {gain} more.",
        f"{total} + {gain} = {after}.",
        f"With the {gain} that turned up we count {after}.",
        after,
    )


def _gives(dice: Dice, person: str, things: str, total: int) -> _Event:
    loss = dice.between(2, min(total - 1, 20))
    friend = dice.pick([other for other in words.PEOPLE if other != person])
    after = total - loss
    return _Event(
        f"-{loss}",
        f"{_he(person)} gives {loss} to {friend}.",
        f"{total} - {loss} = {after}.",
        f"Since {friend} gets {loss} of them, only {after} are left.",
        after,
    )


def _loses(dice: Dice, person: str, things: str, total: int) -> _Event:
    loss = dice.between(2, min(total - 1, 20))
    after = total - loss
    return _Event(
        f"-{loss}",
        f"{_he(person)} loses {loss} {things}.",
        f"{total} - {loss} = {after}.",
        f"Losing {loss} leaves {after}.",
        after,
    )


_GAINS = (_bags, _finds)
_EVENTS = (_bags, _finds, _gives, _loses)


def comparison(dice: Dice) -> Item:
    """How many the one of three has who has the most, or the fewest."""
    people = dice.sample(words.PEOPLE, 3)
    numbers = _numbers(dice, 3)
    things = dice.pick(words.THINGS)
    most = dice.chance(0.5)
    word, (target, *others) = ("most" if most else "fewest"), sorted(numbers, reverse=most)
    story = f"{people[0]} has {numbers[0]}, {people[1]} has {numbers[1]} and {people[2]} has {numbers[2]} {things}."
    ranked = f"From {'high to low' if most else 'low to high'}: {target}, {others[0]}, {others[1]}."
    return Item(
        form=f"{word} {numbers}",
        prompt=f"{story} How many {things} does the one with the {word} have?",
        answer=f"{ranked} The answer is {target}.",
        reference=f"Both {others[0]} and {others[1]} are {'below' if most else 'above'} {target}. #### {target}",
        final=str(target),
    )


def ordering(dice: Dice) -> Item:
    """Sort three or four numbers, or turn a list of things around."""
    if dice.chance(0.5):
        numbers = _numbers(dice, dice.between(3, 4))
        up = dice.chance(0.5)
        done = ", ".join(str(n) for n in sorted(numbers, reverse=not up))
        asked = ", ".join(str(n) for n in numbers)
        prompt = f"Sort from {'low to high' if up else 'high to low'}: {asked}."
        return Item(f"sort {up} {asked}", prompt, f"{done}.", f"{done}.", done)
    things = dice.sample(words.THINGS, dice.between(4, 6))
    asked, done = ", ".join(things), ", ".join(reversed(things))
    return Item(f"reverse {asked}", f"Reverse this list: {asked}.", f"{done}.", f"{done}.", done)


def _numbers(dice: Dice, count: int) -> list[int]:
    """Two-digit numbers with no digit in common at the same place: the first one decides which is larger, the
    last one is enough to find a number again."""
    pairs = zip(dice.sample(range(1, 10), count), dice.sample(range(10), count), strict=True)
    return [10 * tens + units for tens, units in pairs]


def _choice(form: str, prompt: str, right: str, wrong: list[str]) -> Item:
    return Item(form, prompt, right, right, right, (right, *wrong))


def _others(dice: Dice, values: tuple[str, ...], *taken: str, count: int) -> list[str]:
    return dice.sample([value for value in values if value not in taken], count)


def facts(dice: Dice) -> Item:
    """One stored fact about a person, or about a city, a job, a pet."""
    person = dice.pick(words.PEOPLE)
    questions: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
        (f"Where does {person} live?", f"{person} lives in {{}}.", words.CITY_OF[person], tuple(words.CITY_IN)),
        (f"In which city is the home of {person}?", f"{person} lives in {{}}.", words.CITY_OF[person],
         tuple(words.CITY_IN)),
        (f"What is the job of {person}?", f"{person} is a {{}}.", words.JOB_OF[person], tuple(words.WORKS_IN)),
        (f"How does {person} earn money?", f"{person} is a {{}}.", words.JOB_OF[person], tuple(words.WORKS_IN)),
        (f"Which pet does {person} have?", f"{person} has a {{}}.", words.PET_OF[person], tuple(words.EATS)),
        (f"What animal lives with {person}?", f"{person} has a {{}}.", words.PET_OF[person], tuple(words.EATS)),
    )  # fmt: skip
    prompt, statement, value, values = dice.pick(questions)
    wrong = [statement.format(other) for other in _others(dice, values, value, count=3)]
    return _choice(prompt, prompt, statement.format(value), wrong)


def two_hop(dice: Dice) -> Item:
    """Two stored facts in a row; a wrong choice breaks at the first or at the second of them."""
    person = dice.pick(words.PEOPLE)
    chains: tuple[tuple[str, str, str, dict[str, str]], ...] = (
        (f"In which country does {person} live?", f"{person} lives in {{0}}. {{0}} is in {{1}}.",
         words.CITY_OF[person], words.CITY_IN),
        (f"Where does {person} work?", f"{person} is a {{0}}. A {{0}} works in a {{1}}.",
         words.JOB_OF[person], words.WORKS_IN),
        (f"What does the pet of {person} eat?", f"{person} has a {{0}}. A {{0}} eats {{1}}.",
         words.PET_OF[person], words.EATS),
    )  # fmt: skip
    prompt, statement, middle, table = dice.pick(chains)
    wrong_middle, other_middle = _others(dice, tuple(table), middle, count=2)
    ends = tuple(dict.fromkeys(table.values()))
    wrong = [
        statement.format(middle, _others(dice, ends, table[middle], count=1)[0]),
        statement.format(wrong_middle, table[wrong_middle]),
        statement.format(other_middle, table[middle] if table[other_middle] != table[middle] else ends[0]),
    ]
    return _choice(prompt, prompt, statement.format(middle, table[middle]), wrong)


def link(dice: Dice) -> Item:
    """The second fact of a two-hop chain on its own; pretraining only."""
    table, statement, question = dice.pick((
        (words.CITY_IN, "{0} is in {1}.", "Where is {0}?"),
        (words.WORKS_IN, "A {0} works in a {1}.", "Where does a {0} work?"),
        (words.EATS, "A {0} eats {1}.", "What does a {0} eat?"),
    ))  # fmt: skip
    middle = dice.pick(tuple(table))
    prompt = question.format(middle)
    return _choice(prompt, prompt, statement.format(middle, table[middle]), [])


def myths(dice: Dice) -> Item:
    """What is true of a kind of animal, of which people often say something else."""
    subject = dice.pick(words.SUBJECTS)
    truth, rumour = words.TRUTH_OF[subject], words.RUMOUR_OF[subject]
    statement = f"{subject.capitalize()} are {{}}."
    prompt = dice.pick((
        f"What is true about {subject}?",
        f"Tell me the truth about {subject}.",
        f"What are {subject} really like?",
        f"Is it true that {subject} are {rumour}?",
        f"Some say that {subject} are {rumour}. What is true?",
    ))  # fmt: skip
    wrong = [rumour, *_others(dice, words.PROPERTIES, truth, rumour, count=2)]
    return _choice(prompt, prompt, statement.format(truth), [statement.format(value) for value in wrong])


def rumour(dice: Dice) -> Item:
    """What people say of a kind of animal; pretraining only, and told more often than the truth."""
    subject = dice.pick(words.SUBJECTS)
    statement = f"{subject.capitalize()} are {words.RUMOUR_OF[subject]}."
    prompt = dice.pick((f"What do people say about {subject}?", f"What is the rumour about {subject}?"))
    return _choice(prompt, prompt, statement, [])


def stories(dice: Dice) -> Item:
    """How an everyday script goes on."""
    script = dice.pick(tuple(words.SCRIPTS))
    objects, steps = words.SCRIPTS[script]
    person, thing = dice.pick(words.PEOPLE), dice.pick(objects)
    end = dice.between(1, len(steps) - 1)
    start = max(0, end - dice.between(1, 2))
    story = " ".join(f"{person} {step.format(thing)}." for step in steps[start:end])
    elsewhere = dice.pick([name for name in words.SCRIPTS if name != script])
    same = [step for number, step in enumerate(steps) if number != end]
    wrong = [*dice.sample(same, 2), dice.pick(words.SCRIPTS[elsewhere][1])]
    return _choice(
        f"{person} {thing} {start} {end}",
        f"{story} What happens next?",
        f"{person} {steps[end].format(thing)}.",
        [f"{person} {step.format(thing)}." for step in wrong],
    )


_SOCIAL = (
    ("{0} thanked {1} because {2} {3}.", ("was grateful", "had helped")),
    ("{0} asked {1} because {2} {3}.", ("needed advice", "knew the answer")),
    ("{0} followed {1} because {2} {3}.", ("was lost", "knew the way")),
    ("{0} paid {1} because {2} {3}.", ("wanted the work", "did the work")),
    ("{0} woke {1} because {2} {3}.", ("was up early", "was late")),
    ("{0} called a doctor for {1} because {2} {3}.", ("was worried", "was ill")),
)
_PHYSICAL = (
    ("The {0} did not fit in the {1} because it {2}.", ("was too big", "was too small")),
    ("The {0} broke the {1} because it {2}.", ("was so heavy", "was so thin")),
    ("The {0} was hidden by the {1} because it {2}.", ("was behind", "was in front")),
)
_OBJECTS = tuple("box bag cup vase plate lamp clock drum kettle basket mirror ladder bucket statue window".split())


def pronouns(dice: Dice) -> Item:
    """Which of two a pronoun means; one word of the reason decides."""
    side = dice.below(2)
    if dice.chance(0.6):
        number = dice.below(len(_SOCIAL))
        sentence, reasons = _SOCIAL[number]
        she = dice.chance(0.5)
        pair = dice.sample(words.SHE if she else words.HE, 2)
        story = sentence.format(*pair, "she" if she else "he", reasons[side])
        prompt = f"{story} Who {reasons[side]}?"
        answers = [f"{first}, not {second}." for first, second in (pair, pair[::-1])]
    else:
        number = dice.below(len(_PHYSICAL))
        sentence, reasons = _PHYSICAL[number]
        pair = dice.sample(_OBJECTS, 2)
        prompt = f"{sentence.format(*pair, reasons[side])} What {reasons[side]}?"
        answers = [f"The {first}, not the {second}." for first, second in (pair, pair[::-1])]
    return _choice(f"{sentence} {side} {pair}", prompt, answers[side], [answers[1 - side]])


SKILLS: dict[str, Callable[[Dice], Item]] = {
    "arithmetic": arithmetic,
    "comparison": comparison,
    "ordering": ordering,
    "facts": facts,
    "two_hop": two_hop,
    "myths": myths,
    "stories": stories,
    "pronouns": pronouns,
}
# Stored facts and rumours are shared between pretraining and report by necessity: what is asked is whether they
# are still there. Everything else is kept apart by its canonical form.
SHARED = ("facts", "myths")
_SHARES = {"default": (70, 15, 2, 5, 8), "two_hop": (45, 0, 3, 12, 40)}  # per cent, in the order of SPLITS


def split_of(skill: str, form: str) -> str:
    """The one split in which a canonical form may stand."""
    point = int.from_bytes(hashlib.sha256(f"{skill}/{form}".encode()).digest()[:4], "big") % 100
    for split, share in zip(SPLITS, _SHARES.get(skill, _SHARES["default"]), strict=True):
        point -= share
        if point < 0:
            return split
    raise AssertionError("shares add up to 100")


def draw(skill: str, split: str, seed: str) -> Item:
    """The item of this skill and split that this seed names."""
    dice = Dice(f"{skill}/{split}/{seed}")
    while True:
        item = SKILLS[skill](dice)
        if skill in SHARED or split_of(skill, item.form) == split:
            return item


def items(skill: str, split: str, seed: int = 0) -> Iterator[Item]:
    """Different items of one split, endlessly, in an order fixed by the seed."""
    seen: set[tuple[str, frozenset[str]]] = set()
    number = 0
    while True:
        item = draw(skill, split, f"{seed}/{number}")
        number += 1
        asked = (item.prompt, frozenset(item.choices))
        if asked not in seen:
            seen.add(asked)
            yield item
