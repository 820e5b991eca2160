"""Sentences of the speaking base's domain: announcements, numbers, times, names, short everyday sentences.

A seeded grammar over `words.txt`. A part in braces is a category of words or a rule of its own; the same part twice in
a template gives two independent draws.

    python examples/speaking_base/sentences.py --count 12000 --output sentences.jsonl
"""

import argparse
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

HELD_OUT = 200
SEED_HELD_OUT, SEED_TRAIN = 1, 2
SHORTEST, LONGEST = 14, 64  # characters; about 1 to 4 seconds

TEMPLATES: dict[str, tuple[str, ...]] = {
    "telephone": (
        "Please hold while I try that extension.",
        "Your {object} has been {done}.",
        "Your {object} has not been {done} yet.",
        "Press {digit} to {action}.",
        "Press {digit} to {action} or {digit} to {action}.",
        "To {action}, press {digit}.",
        "If you want to {action}, please press {digit}.",
        "Please enter your {object} followed by the {pound} key.",
        "Please enter the {object} {now}.",
        "You have {count} new {message_kind}.",
        "You have no more {message_kind}.",
        "There are {count} people in the conference.",
        "The {object} you have {dialled} is not {valid}.",
        "That is not a valid {object}, please try again.",
        "Sorry, I did not understand your {object}.",
        "{name} is on the phone.",
        "{name} is not available right now.",
        "{name} has {joined} the conference.",
        "Please leave a message for {name} after the tone.",
        "The conference is {now_state}.",
        "You are caller number {number} in the line.",
        "Thank you for calling {name}.",
        "Thank you for your {object}.",
        "Goodbye and thank you for {activity} with us.",
        "The extension of {name} is {digits}.",
        "Your call to {city} cannot be completed as dialed.",
        "All our agents are busy, please stay on the line.",
        "The person at extension {digits} is unavailable.",
    ),
    "number": (
        "The number is {digits}.",
        "The code is {digits}.",
        "My telephone number is {digits}.",
        "Account {digits} has been {done}.",
        "That will be {number} {money}.",
        "The {adjective} {thing} costs {number} {money}.",
        "It weighs {number} pounds.",
        "Room number {number} is on the {ordinal} floor.",
        "{number} and {number} make {number}.",
        "He lives at {number} {last_name} Street.",
        "Please turn to page {number}.",
        "Extension {digits} is {now_state}.",
        "It is {number} {unit} from here to {city}.",
        "We waited for {number} {unit}.",
        "{first_name} counted {number} {animals} and {number} {animals}.",
    ),
    "time": (
        "It is {time}.",
        "The time is now {time}.",
        "The {transport} to {city} leaves at {time}.",
        "The {transport} from {city} arrives at {time}.",
        "The {place} opens at {time}.",
        "The {place} is closed on {weekday}.",
        "See you on {weekday} at {time}.",
        "Today is {weekday}, the {ordinal} of {month}.",
        "My birthday is on the {ordinal} of {month}.",
        "We meet every {weekday} in {month}.",
        "The meeting on {weekday} starts at {time}.",
        "Wake me up at {time}, please.",
        "{first_name} will be back in {count} {unit}.",
        "The {month} meeting was moved to {weekday}.",
        "It happened on a {weather} {weekday} in {month}.",
    ),
    "travel": (
        "The {transport} to {city} is {count} minutes late.",
        "The next stop is {city}.",
        "The next station is {last_name} Street.",
        "This is the {ordinal} {transport} to {city}.",
        "{transport} number {number} departs from gate {number}.",
        "Please mind the {thing} near the {place}.",
        "Passengers for {city}, please go to platform {digit}.",
        "Please do not leave your {thing} in the {place}.",
        "How far is it to the {place}?",
        "Turn {side} at the {place} and go straight on.",
        "The {place} is next to the {place}.",
        "{first_name} {went} to {city} by {transport}.",
        "They {went} from {city} to {city}.",
        "I would like to visit {country} in {month}.",
        "Have you ever been to {country}?",
        "The {job} comes from {country}.",
        "We flew over {country} and {country}.",
    ),
    "weather": (
        "It is {weather} and {weather} in {city}.",
        "Tomorrow will be {weather} in {country}.",
        "We expect {weather_noun} and {weather_noun} on {weekday}.",
        "There was {weather_noun} in {city} last {weekday}.",
        "The {weather} weather in {month} was {adjective}.",
        "The temperature in {city} is {number} degrees.",
    ),
    "everyday": (
        "Please put the {adjective} {thing} on the {colour} {thing}.",
        "The {thing} is under the {adjective} {thing}.",
        "{first_name} {verb_past} the {adjective} {thing}.",
        "{first_name} {verb_past} a {colour} {thing} in the {place}.",
        "The {job} {verb_past} the {thing} {adverb}.",
        "My {relative} {verb_past} {first_name}'s {thing}.",
        "Did you {verb_now} the {thing} in the {place}?",
        "Can you {verb_now} this {adjective} {thing} for me?",
        "Please {verb_now} the {thing} {adverb}.",
        "Where is the {colour} {thing}?",
        "I cannot {verb_now} my {thing}.",
        "She wants to {verb_now} a {thing} and a {thing}.",
        "Why did the {job} {verb_now} your {thing}?",
        "Never {verb_now} a {thing} without a {thing}.",
        "We need a {thing}, a {thing} and a {thing}.",
        "The {colour} {thing} {sense} {adjective}.",
        "His {thing} was {adjective} and {adjective}.",
        "Is this your {colour} {thing} or mine?",
        "You should {verb_now} the {thing} before {weekday}.",
        "Somebody {verb_past} our {thing} last {month}.",
        "A {thing} fell on the {job}'s {body}.",
    ),
    "people": (
        "{first_name} is {person_adjective} today.",
        "The {job} was {person_adjective} and {person_adjective}.",
        "{name} is a {person_adjective} {job}.",
        "Her {relative} is a {job} in {city}.",
        "My {relative} is {number} years old.",
        "{first_name} and {first_name} are {activity} in the {place}.",
        "{first_name} likes {activity} and {activity}.",
        "I hurt my {body} while {activity}.",
        "The {job} has a pain in the {body}.",
        "Why are you so {person_adjective}?",
        "We are {adverb} {person_adjective}.",
        "The {job} talked to the {job} about {subject}.",
        "{first_name} studies {subject} in {city}.",
        "Hello {first_name}, this is {first_name} speaking.",
        "Good {daypart}, {name}.",
        "May I introduce {name}?",
        "The {group} was {person_adjective}.",
        "{first_name} was {activity} when the {job} called.",
        "Tell {first_name} that the {job} is here.",
    ),
    "food": (
        "I would like {food} and {food}, please.",
        "The {food} {sense} {adjective}.",
        "We had {food} with {food} for {meal}.",
        "{first_name} does not eat {food}.",
        "Would you like some {food} or some {food}?",
        "Add the {food} and the {food} {adverb}.",
        "There is no {food} in the {thing}.",
        "{first_name} bought {number} pounds of {food}.",
        "Who ate the last {food}?",
        "This {food} needs more {food}.",
        "My {relative} made {food} and {food}.",
    ),
    "animals": (
        "The {adjective} {animal} chased the {colour} {animal}.",
        "A {animal} sat on the {thing}.",
        "The {job} has {count} {animals}.",
        "{first_name} saw a {colour} {animal} near the {place}.",
        "The {animal} is {activity} in the {place}.",
        "Do {animals} like {food}?",
        "{animals} are bigger than {animals}.",
        "We heard an animal, perhaps a {animal}.",
    ),
    "ideas": (
        "That is a {adjective} {abstract}.",
        "{first_name} {reporting} it was a {adjective} {abstract}.",
        "The {group} {reporting} there was no {abstract}.",
        "What is the {abstract} of this {abstract}?",
        "I have a {adjective} {abstract} about the {place}.",
        "Every {abstract} has its {abstract}.",
        "They {reporting} that {first_name} was {person_adjective}.",
        "It was not my {abstract}.",
        "{adverb} the {abstract} became {adjective}.",
    ),
}
SHARES = {"telephone": 5, "number": 4, "time": 4, "travel": 3, "weather": 1, "everyday": 5, "people": 4, "food": 2}
SHARES |= {"animals": 2, "ideas": 2}
WORDS = (  # of a dictionary, for the sounds that the domain's own words have not
    "{word}, {word}.",
    "{word}, {word}, {word}.",
    "The word is {word}.",
    "Please say {word} again.",
    "{word} is not {word}.",
    "You said {word} and {word}.",
    "The {word} of {word}.",
)
WORDS_SHARE = 0.15
CHOICES: dict[str, tuple[str, ...]] = {
    "pound": ("pound", "hash", "star"),
    "now": ("now", "again", "after the tone", "and press star"),
    "message_kind": ("messages", "calls", "orders", "letters"),
    "dialled": ("dialed", "entered", "chosen", "requested"),
    "valid": ("valid", "in service", "available", "correct", "in use"),
    "joined": ("joined", "left", "entered", "started"),
    "now_state": ("full", "muted", "closed", "locked", "now open", "being recorded", "busy", "not available"),
    "money": ("dollars", "euros", "pounds", "cents"),
    "side": ("left", "right"),
    "relative": ("mother", "father", "brother", "sister", "uncle", "aunt", "cousin", "daughter", "son", "grandmother",
                 "grandfather", "husband", "wife", "nephew", "niece", "friend"),
    "daypart": ("morning", "evening", "afternoon", "night"),
    "meal": ("breakfast", "lunch", "dinner", "supper"),
}  # fmt: skip
UNCHANGED_PLURALS = {"sheep": "sheep", "deer": "deer", "moose": "moose", "mouse": "mice", "goose": "geese"}
PLURALS = UNCHANGED_PLURALS | {"wolf": "wolves", "butterfly": "butterflies", "dragonfly": "dragonflies"}
PLURALS |= {"donkey": "donkeys", "monkey": "monkeys", "turkey": "turkeys", "fish": "fish"}


def read_words(path: Path) -> dict[str, tuple[str, ...]]:
    """The categories of a word list."""
    lists: dict[str, list[str]] = {}
    category = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            category = line.strip("[]")
        elif line and not line.startswith("#"):
            lists.setdefault(category, []).extend(word.replace("_", " ") for word in line.split())
    return {name: tuple(dict.fromkeys(words)) for name, words in lists.items()}


class Grammar:
    """Draws sentences with a random generator of its own."""

    def __init__(self, seed: int, dictionary: Sequence[str] = ()) -> None:
        self.random = random.Random(seed)
        self.words = CHOICES | read_words(Path(__file__).with_name("words.txt"))
        if dictionary:
            self.words["word"] = tuple(dictionary)
        self.rules: dict[str, Callable[[], str]] = {
            "digits": self.digits, "number": self.number, "count": self.count, "time": self.time, "name": self.name,
            "animals": self.animals,
        }  # fmt: skip

    def sentence(self) -> str:
        """One sentence."""
        kinds = list(SHARES)
        kind = self.random.choices(kinds, [SHARES[name] for name in kinds])[0]
        with_dictionary = "word" in self.words and self.random.random() < WORDS_SHARE
        template = self.random.choice(WORDS if with_dictionary else TEMPLATES[kind])
        text = re.sub(r"\{(\w+)\}", lambda match: self.part(match.group(1)), template)
        text = re.sub(r"\b([Aa])(?= [aeiouAEIOU])(?! (?:use|uni|Eu|one))", r"\1n", text)
        return text[0].upper() + text[1:]

    def part(self, name: str) -> str:
        """What stands for a part in braces."""
        return self.rules[name]() if name in self.rules else self.random.choice(self.words[name])

    def digits(self) -> str:
        """Some digits, spoken one by one."""
        return " ".join(self.random.choices(self.words["digit"], k=self.random.choice((3, 4, 4, 5))))

    def number(self) -> str:
        """A whole number up to some thousands, in words."""
        draw = self.random.random()
        if draw < 0.2:
            return self.part("teen")
        tens = self.part("tens") + self.random.choice(("", *(f"-{d}" for d in self.words["digit"][:9])))
        if draw < 0.7:
            return tens
        front = self.random.choice(self.words["digit"][:9])
        if draw < 0.9:
            return f"{front} hundred" + self.random.choice(("", f" and {self.part('teen')}", f" {tens}"))
        hundreds = self.random.choice(self.words["digit"][1:9])
        return f"{front} thousand" + self.random.choice(("", f" {hundreds} hundred"))

    def count(self) -> str:
        """A small number of more than one."""
        return self.random.choice((*self.words["digit"][1:9], *self.words["teen"]))

    def time(self) -> str:
        """A time of day."""
        hour = self.random.choice((*self.words["digit"][:9], "ten", "eleven", "twelve"))
        minutes = self.random.choice((*self.words["teen"], *self.words["tens"][:4], "forty-five", "twenty-five"))
        daypart = self.random.choice(CHOICES["daypart"][:3])
        forms = (f"{hour} o'clock", f"half past {hour}", f"a quarter to {hour}", f"a quarter past {hour}",
                 f"{hour} {minutes}", f"{minutes} past {hour}", f"{hour} in the {daypart}",
                 f"{hour} {minutes}")  # fmt: skip
        return self.random.choice((*forms, "noon", "midnight") if self.random.random() < 0.2 else forms)

    def name(self) -> str:
        """A person's name."""
        if self.random.random() < 0.3:
            return f"{self.random.choice(('Mister', 'Missus', 'Doctor'))} {self.part('last_name')}"
        return f"{self.part('first_name')} {self.part('last_name')}"

    def animals(self) -> str:
        """Animals of one kind."""
        word = self.part("animal")
        return PLURALS.get(word) or word + ("es" if word.endswith(("s", "sh", "ch", "x", "fox")) else "s")

    def different(self, count: int, taken: set[str]) -> list[str]:
        """Sentences of a fitting length that are in `taken` neither before nor, each but once, after."""
        drawn: list[str] = []
        while len(drawn) < count:
            text = self.sentence()
            if SHORTEST <= len(text) <= LONGEST and text.lower() not in taken:
                taken.add(text.lower())
                drawn.append(text)
        return drawn


def held_out_sentences() -> list[str]:
    """The sentences that no clip of the training data says."""
    return Grammar(SEED_HELD_OUT).different(HELD_OUT, set())


def training_sentences(count: int, dictionary: Sequence[str] = ()) -> list[str]:
    """Different sentences, the held-out ones not among them; a part of them with words of a dictionary."""
    return Grammar(SEED_TRAIN, dictionary).different(count, {text.lower() for text in held_out_sentences()})


def vocabulary(sentences: Sequence[str]) -> set[str]:
    """The words of sentences, in small letters."""
    return {word for text in sentences for word in re.findall(r"[a-z']+", text.lower())}


def main() -> None:
    """Write training and held-out sentences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=12_000)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    train, held = training_sentences(arguments.count), held_out_sentences()
    rows = [{"set": "train", "text": text} for text in train] + [{"set": "held_out", "text": text} for text in held]
    arguments.output.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words, new = vocabulary(train), vocabulary(held) - vocabulary(train)
    print(f"{len(train)} sentences, {len(words)} words; {len(held)} held out, words only there: {sorted(new)}")


if __name__ == "__main__":
    main()
