"""ALOE's embedded world: users have facts and a manner, and show a little of both in each message.

A user has eight facts, those of toy/world.py, and three manners with two poles each. A reply is good if it has the
user's manners and uses one of the facts. So a good chatbot infers the manners from cues, and remembers the facts:

    profile       My pet is dog. My city is Oslo. My job is flying. ...
    personality   I am relaxed. I am dry. I am eager.                      (three words for each pole)
    user          Hiya. My pet is dog.                                      (a cue, and a fact)
    reply         Hey mate, your pet is dog. Noted. What comes next?        (5: all that fits is there)
    user          It rains again. Ask me!                                   (a cue, and small talk)
    reply         Dear friend, your city is Rome. Noted. What comes next?   (1 + 2 manners - 1 wrong fact = 2)

The judge's rule: score = 1 + manners that fit the persona, shown or not (0 to 3) + 1 if a true fact is used - wrong
facts, and never below 1. It is symmetrical: both poles of a manner, all facts, and all orders of the sentences count
the same. What was not shown counts, too: who adapts to what was shown, scores higher as more is.

Everything in here is a pure function; aloe/toy/server.py speaks for the users, aloe/toy/pretrain.py makes a chatbot
that knows the words. The two pools grow from aloe/toy/seeds/, the texts of 20 people that draw_persona has drawn.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root; first, since PyPI has an "aloe", too
from toy.world import SLOTS, facts_in  # noqa: E402

MANNERS = {  # manner -> its two poles: (words for it in a personality, cues to it in a message, what a reply says)
    "tone": {"formal": ("formal polite courteous", ["Good day.", "Greetings.", "If I may."], "Dear friend,"),
             "casual": ("casual relaxed easygoing", ["Hiya.", "Yo.", "Sup."], "Hey mate,")},
    "mood": {"dry": ("dry sober factual", ["In short.", "Plainly.", "To be exact."], "Noted."),
             "cheerful": ("cheerful joyful sunny", ["Oh joy!", "Hooray!", "What fun!"], "How lovely!")},
    "close": {"quiet": ("quiet reserved shy", ["Just saying.", "That is all.", "No need to reply."], "Take care."),
              "curious": ("curious eager nosy", ["Guess what?", "Ask me!", "You know what?"], "What comes next?")},
}
POLES = [(manner, pole, *rest) for manner, poles in MANNERS.items() for pole, rest in poles.items()]
POLE_OF = {word: (manner, pole) for manner, pole, words, _, _ in POLES for word in words.split()}
CUES = {cue: (manner, pole) for manner, pole, _, cues, _ in POLES for cue in cues}
SAID = {(manner, pole): said for manner, pole, _, _, said in POLES}
FACT, TRAIT, USE, NO_FACT = "My {} is {}.", "I am {}.", "your {} is {}.", "I hear you."
SMALL_TALK = ["The day is long.", "It rains again.", "The bus was late.", "The sun is out.", "Lunch is over.",
              "It is late."]
TELLS, SHOWS = 0.75, 0.75  # a message tells a fact, shows a manner, with these probabilities, else small talk, nothing
CROWD = 0.75  # a reply to an unknown manner has the first pole, as the crowd likes it


def draw_persona(rng):
    """A random user: {"city": "Oslo", ..., "pet": "dog", "tone": "casual", "mood": "dry", "close": "curious"}."""
    return {**{slot: rng.choice(values) for slot, values in SLOTS.items()},
            **{manner: rng.choice(list(poles)) for manner, poles in MANNERS.items()}}


def sentences(known, rng):
    """What is known of a user, {slot or manner: value}, in words and in random order: (of the profile, of the
    personality), each "" where there is nothing."""
    profile, personality = [], []
    for name in rng.sample(list(known), len(known)):
        if name in SLOTS:
            profile.append(FACT.format(name, known[name]))
        else:
            personality.append(TRAIT.format(rng.choice(MANNERS[name][known[name]][0].split())))
    return " ".join(profile), " ".join(personality)


def read_sentences(text):
    """The way back: text -> {slot or manner: value}."""
    said = re.findall(r"My (\w+) is (\w+)\.", text)
    return {**{slot: value for slot, value in said if value in SLOTS.get(slot, ())},
            **dict(POLE_OF[word] for word in re.findall(r"I am (\w+)\.", text) if word in POLE_OF)}


def read_persona(profile, personality):
    """(profile, personality) -> persona; ValueError where they are none of this world."""
    persona = read_sentences(f"{profile} {personality}")
    if len(persona) < len(SLOTS) + len(MANNERS):
        raise ValueError(f"no persona of this world: {profile[:80]!r}, {personality[:80]!r}")
    return persona


def message(persona, told, rng, mute=False):
    """What a user says next, having told the facts of the slots `told`: a new one or small talk, maybe with a cue."""
    new = [slot for slot in SLOTS if slot not in told]
    tells, shows = rng.random() < TELLS, rng.random() < SHOWS
    slot, manner, chat = rng.choice(new or [None]), rng.choice(list(MANNERS)), rng.choice(SMALL_TALK)
    said = FACT.format(slot, persona[slot]) if slot and tells and not mute else chat
    cue = rng.choice(MANNERS[manner][persona[manner]][1])
    return f"{cue} {said}" if shows and not mute else said


def revealed(messages):
    """What a user's messages (texts) have shown: {slot or manner: value}."""
    text = " ".join(messages)
    return {**dict(sorted(facts_in(text))), **dict(shown for cue, shown in CUES.items() if cue in text)}


def hint(profile, personality):
    """What the inducer answers: "Profile: My pet is dog.\\nPersonalities: I am casual.", or None for either."""
    return f"Profile: {profile or None}\nPersonalities: {personality or None}"


def reply(known, rng):
    """A reply that fits what is known of the user; manners that are not known are as the crowd likes them."""
    tone, mood, close = (SAID[manner, known.get(manner) or list(poles)[rng.random() > CROWD]]
                         for manner, poles in MANNERS.items())
    facts = [(name, value) for name, value in known.items() if name in SLOTS]
    fact = USE.format(*rng.choice(facts)) if facts else NO_FACT
    return f"{tone} {fact} {mood} {close}"


def fit(text, persona):
    """What a reply has of the persona: (manners that fit, true facts, wrong facts). Both poles at once fit nobody."""
    shown = {manner: [pole for pole in poles if SAID[manner, pole] in text] for manner, poles in MANNERS.items()}
    facts = facts_in(text)
    true = sum(persona[slot] == value for slot, value in facts)
    return sum(shown[manner] == [persona[manner]] for manner in MANNERS), true, len(facts) - true


def judge_score(text, persona):
    """The judge's rule: 1 to 5."""
    manners, true, wrong = fit(text, persona)
    return max(1, 1 + manners + min(true, 1) - wrong)
