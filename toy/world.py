"""The embedded world: small enough to read in five minutes, rich enough that asking the right question pays.

A user has eight facts (a city, a job, ... a pet). A task is about a topic, and two or three of the eight facts
matter for it. So a good Questioner asks about those, and a good response uses the answers:

    task     Can you help me with a simple dinner?          (relevant: diet, budget)
    asks     What is your diet?      ->  My diet is vegan.
    gold     Here is my advice for a simple dinner. It suits you as your diet is vegan.
             It suits you as your budget is tiny. Good luck!

Everything in here is a pure function; toy/server.py speaks for the users, toy/pretrain.py makes a Questioner that
knows the words, toy/measure.py counts. This command writes the tasks file of the pipeline:

    python toy/world.py --output runs/toy/tasks.jsonl --tasks-per-split 56

    {"task_id": "A000", "split": "A", "task": "Can you help me with a simple dinner?"}
"""
import argparse
import json
import re
from pathlib import Path

# Every value is one English word that stands for one fact only, and no word of any task or template is a value:
# a fact can be found in a text by its word.
SLOTS = {
    "city": "Paris Tokyo Cairo Lima Oslo Delhi Boston Sydney Rome Seoul".split(),
    "job": "nursing teaching farming flying baking plumbing painting acting welding banking".split(),
    "diet": "vegan vegetarian pescatarian kosher halal keto paleo organic carnivore Mediterranean".split(),
    "music": "jazz rock opera blues techno folk reggae metal soul salsa".split(),
    "sport": "tennis hiking climbing sailing cycling golf boxing rowing karate surfing".split(),
    "colour": "red blue green yellow purple orange pink black white silver".split(),
    "budget": "tiny modest moderate average generous lavish huge tight strict unlimited".split(),
    "pet": "dog cat parrot rabbit turtle hamster snake pony goldfish ferret".split(),
}
SLOT_OF = {value.lower(): (slot, value) for slot, values in SLOTS.items() for value in values}

TOPICS = {  # topic -> the slots that matter for it, in the order of SLOTS, in which every response names them
    "dinner": ("diet", "budget"),
    "trip": ("city", "sport", "budget"),
    "party": ("diet", "music", "colour"),
    "workout": ("job", "sport"),
    "gift": ("music", "colour"),
    "sofa": ("colour", "budget", "pet"),
    "picnic": ("diet", "pet"),
    "flat": ("city", "job", "pet"),
    "holiday": ("sport", "budget"),
    "coat": ("city", "colour"),
    "concert": ("city", "music"),
    "course": ("job", "music", "budget"),
    "schedule": ("job", "sport", "pet"),
    "wedding": ("diet", "music", "colour"),
}

# Each split has adjectives and wordings of its own: no object and no wording of a split stands in another.
ADJECTIVES = {
    "A": "simple special short modern".split(),
    "B": "quiet perfect cosy casual".split(),
    "dev": "pretty proper bold bright".split(),
    "test": "classic relaxed decent clever".split(),
}
WORDINGS = {
    "A": ["Can you help me with {}?", "I need advice about {}.", "Please give me ideas for {}.",
          "How should I go about {}?"],
    "B": ["I am thinking about {}.", "What would make {} work?", "Tell me how to find {}.", "I would like {}."],
    "dev": ["Where do I start with {}?", "Help me plan {}.", "My wish is {}.", "Do you have tips for {}?"],
    "test": ["I am looking for {}.", "Which way leads to {}?", "Could you suggest {}?", "I have to sort out {}."],
}

QUESTIONS = ["What is your {}?", "May I ask about your {}?", "Could you tell me your {}?"]
ANSWERS = ["My {} is {}.", "Well, my {} is {}."]
UNSURE = "I am not sure what you mean."
EVASIVE = "I would rather not say."
PERSONA_FORMS = [("I'm {}.", "My {} is {}."), ("Meet {}.", "Their {} is {}.")]
OPENING, USE, CLOSING = "Here is my advice for {}.", "It suits you as your {} is {}.", "Good luck!"

NAMES = """
Aaron Abigail Adam Adele Agnes Ahmed Alan Albert Alex Alice Amanda Amir Amy Andrea Andrew Angela Anna Anton Arthur
Astrid Barbara Beatrice Bella Ben Bernard Beth Boris Brenda Brian Bruno Camille Carla Carlos Caroline Cecilia Charles
Chloe Clara Claude Colin Cora Craig Dana Daniel Daphne David Deborah Dennis Diana Diego Dmitri Donald Doris Dylan Edgar
Edith Edward Elena Elias Elliot Elsa Emil Emma Enzo Erica Ernest Esther Eva Fabian Fatima Felix Fiona Flora Francis
Frank Fred Frida Gabriel Gareth Gemma George Gerald Gilbert Gina Gloria Gordon Greta Gustav Hana Hannah Harold Harriet
Harvey Hassan Hector Helen Henry Hilda Howard Hugo Ian Ibrahim Ida Igor Imogen Ingrid Irene Isaac Isabel Ivan Ivy Jack
Jacob James Janet Jasper Jean Jerome Joan Joel Johanna Joseph Joyce Judith Julia Karen Karl Katya Keith Kenji Kevin
Kurt Lara Laura Lea Leo Liam Linda Lionel Lotte Louis Lucas Lydia Mabel Magnus Maria Marion Martin Mateo Maurice Megan
Mei Michael Mila Miriam Mona Muriel Nadia Naomi Nathan Nelson Nina Nora Norman Olga Oscar Otto Pamela Patrick Paula
Pedro Peter Philip Phoebe Priya Quentin Rachel Rahim Ralph Raymond Rebecca Rita Robert Rosa Rupert Ruth Samuel Sarah
Sofia Stella Sven Tara Theo Thomas Tina Tomas Ursula Vera Victor Walter Wendy Yara Yusuf Zara Zoe
""".split()


def draw_persona(rng):
    """A random user: {"name": "Anna", "city": "Oslo", ..., "pet": "dog"}."""
    return {"name": rng.choice(NAMES), **{slot: rng.choice(values) for slot, values in SLOTS.items()}}


def persona_text(persona, rng):
    """The persona in words, its eight facts in random order: "I'm Anna. My pet is dog. My city is Oslo. ..."."""
    opening, fact = rng.choice(PERSONA_FORMS)
    slots = rng.sample(list(SLOTS), len(SLOTS))
    return " ".join([opening.format(persona["name"])] + [fact.format(slot, persona[slot]) for slot in slots])


def read_persona(text):
    """The way back: text -> {"name": ..., slot: value, ...}; ValueError where it is no persona of this world."""
    opening, facts = re.match(r"(?:I'm|Meet) (\w+)\.", text), facts_in(text)
    if not opening or sorted(slot for slot, _ in facts) != sorted(SLOTS):
        raise ValueError(f"no persona of this world: {text[:80]!r}")
    return {"name": opening[1], **dict(facts)}


def make_tasks(split, count):
    """The first `count` of the split's 14 x 4 x 4 tasks; topics take turns, then adjectives, then wordings."""
    adjectives, wordings, topics = ADJECTIVES[split], WORDINGS[split], list(TOPICS)
    rounds = [(adjectives[i % 4], wordings[(i + i // 4) % 4]) for i in range(16)]  # a Latin square: each pair once
    return [wording.format(f"a {adjective} {topic}") for adjective, wording in rounds for topic in topics][:count]


def read_task(task):
    """task -> (object, topic), as in ("a simple dinner", "dinner"); ValueError where it is no task of this world."""
    found = re.search(rf"\ba \w+ ({'|'.join(TOPICS)})\b", task)
    if not found:
        raise ValueError(f"no task of this world: {task[:80]!r}")
    return found[0], found[1]


def relevant_slots(task):
    """The slots that matter for the task: ("diet", "budget")."""
    return TOPICS[read_task(task)[1]]


def question_slot(question):
    """The one slot that a question asks about, or None where it names none or several, or asks nothing."""
    named = [slot for slot in SLOTS if re.search(rf"\b{slot}\b", question)]
    return named[0] if len(named) == 1 and "?" in question else None


def facts_in(text):
    """The facts that a text states, each once: {("pet", "dog"), ("city", "Oslo")}."""
    return {SLOT_OF[word] for word in re.findall(r"\w+", text.lower()) if word in SLOT_OF}


def response(task, facts):
    """A response that uses the facts [(slot, value), ...]: opening, a sentence for each, closing."""
    return " ".join([OPENING.format(read_task(task)[0])] + [USE.format(*fact) for fact in facts] + [CLOSING])


def gold_response(persona, task):
    """What the Oracle says: every fact that matters for the task, and nothing else about the user."""
    return response(task, [(slot, persona[slot]) for slot in relevant_slots(task)])


def judge_score(text, persona, task):
    """The judge's rule: relevant true facts used, minus facts about the user that are wrong."""
    facts = facts_in(text)
    used = sum(persona[slot] == value and slot in relevant_slots(task) for slot, value in facts)
    return used - sum(persona[slot] != value for slot, value in facts)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="tasks file to write (JSONL)")
    parser.add_argument("--tasks-per-split", type=int, default=56, choices=range(1, 225), metavar="N",
                        help="at most 224; 56 = four rounds of 14 topics")
    return parser.parse_args()


def main():
    args = parse_args()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    rows = [{"task_id": f"{split}{i:03d}", "split": split, "task": task}
            for split in ADJECTIVES for i, task in enumerate(make_tasks(split, args.tasks_per_split))]
    Path(args.output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} tasks in {len(ADJECTIVES)} splits -> {args.output}; the first: {rows[0]['task']}")


if __name__ == "__main__":
    main()
