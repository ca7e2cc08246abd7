"""Make the base chatbot of ALOE's embedded world: a Mistral of 0.2 M parameters, from scratch, on one thread.

    python aloe/toy/pretrain.py --output aloe/toy/base      # the base that is shipped; 776 s on a busy core

It writes a Hugging Face folder (weights, tokenizer, chat template) and abilities.json. Tokenizer, model and training
loop are those of toy/pretrain.py. The documents are chats of the world. Four phases, whose order matters:

    1. copy one fact       "My pet is dog."  ->  "your pet is dog."
    2. adapt               short chats in which every reply fits what was shown, or what a hint says
    3. copy many facts     up to eight at once, and chats of all lengths, still adapting
    4. the base            the real mixture; at its end the learning rate falls to zero

The latent skill: in the real mixture a fifth of the replies fit what the user has shown; the others are as the crowd
likes them, and use no fact. So is the base, but it can produce every manner. Of the hinted replies, --obey heed the
hint: with 1 they would leave DPO nothing to gain. Half of the hints describe somebody else, so that the hint is read
and not the chat. The words of the hint are there from phase 2 on: when they came last, they undid the copying. In
phase 4 copying has to be asked for (docs/NOTES.md says why).
"""
import random
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root; first, since PyPI has an "aloe", too
from aloe import simulate  # noqa: E402
from aloe.toy import world  # noqa: E402
from toy import pretrain  # noqa: E402

HINT = simulate.PROMPTS["aloe_hint"]
K = 10
FULL_HINT = 0.1  # share of the hints in all their words; the others are abridged
REPEAT = "Repeat that."  # tells copying from a chat
ADAPTS = 0.2  # share of the replies that fit: the latent skill
INVENTED = 0.1  # share of the crowd's replies that use a fact which nobody has told


# ---- the documents: lists of messages ----

def with_hint(text, known, rng, full=FULL_HINT):
    """A user's message with a hint of what is known, as the stages append it."""
    prompt = HINT if rng.random() < full else pretrain.abridged(HINT, rng)
    return text + "\n" + prompt.format(revealed=world.hint(*world.sentences(known, rng)))


def echo(rng, most, asked=""):
    """Facts in, as messages or as a hint; phrases that use them out, in another order: copying in its purest form."""
    persona, slots = world.draw_persona(rng), rng.sample(list(world.SLOTS), rng.randint(1, most))
    said = asked + " ".join(world.FACT.format(slot, persona[slot]) for slot in slots)
    if most > 1 and rng.random() < 0.5:
        said = with_hint(asked + rng.choice(world.SMALL_TALK), {slot: persona[slot] for slot in slots}, rng)
    rng.shuffle(slots)
    return [{"role": "user", "content": said},
            {"role": "assistant", "content": " ".join(world.USE.format(slot, persona[slot]) for slot in slots)}]


def reply(known, rng, adapts):
    """A reply of somebody who adapts with this probability, and otherwise is one of the crowd."""
    if rng.random() < adapts:
        return world.reply(known, rng)
    slot = rng.choice(list(world.SLOTS))
    return world.reply({slot: rng.choice(world.SLOTS[slot])} if rng.random() < INVENTED else {}, rng)


def draw_messages(persona, rng, rounds, mute=False):
    """What a user writes in so many rounds (texts)."""
    said = []
    for _ in range(rounds):
        said.append(world.message(persona, world.revealed(said), rng, mute))
    return said


def chat(rng, longest, adapts, obey, mute):
    """A chat of 1 to `longest` rounds. Half end under a hint, and half of these hints describe somebody else."""
    persona = world.draw_persona(rng)
    said, messages = draw_messages(persona, rng, rng.randint(1, longest), rng.random() < mute), []
    for k, text in enumerate(said):
        known = world.revealed(said[:k + 1])
        hinted = k == len(said) - 1 and rng.random() < 0.5
        if hinted:
            if rng.random() < 0.5:
                known = world.revealed(draw_messages(world.draw_persona(rng), rng, rng.randint(0, K)))
            text = with_hint(text, known, rng)
        messages += [{"role": "user", "content": text},
                     {"role": "assistant", "content": reply(known, rng, obey if hinted else adapts)}]
    return messages


def phases(obey):
    """[(name, {document: weight}, {ability: floor that ends the phase}, most tokens)]."""
    copy_one, copy_many = (lambda rng: echo(rng, 1)), (lambda rng: echo(rng, 8))
    one_round, short = (lambda rng: chat(rng, 1, 1, 1, 0.05)), (lambda rng: chat(rng, 3, 1, 1, 0.05))
    long, crowd = (lambda rng: chat(rng, K, 1, 1, 0.05)), (lambda rng: chat(rng, K, ADAPTS, obey, 0.1))
    return [
        ("copy one fact", {copy_one: 1}, {"copy_1": -0.15}, 1_000_000),
        ("adapt", {copy_one: 15, one_round: 25, short: 60},
         {"hint_manners": 0.93, "hint_facts": 0.6, "manners": 0.85, "facts": 0.6}, 4_000_000),
        ("copy many facts", {copy_many: 40, long: 60}, {"hint_facts": 0.92, "facts": 0.9}, 4_000_000),
        ("the base", {lambda rng: echo(rng, 8, REPEAT + " "): 10, crowd: 90}, {"hint_manners": 0.6, "manners": 0.5},
         1_000_000),
    ]


# ---- abilities ----

copying = partial(pretrain.copying, echo=echo)


def adapting(model, tokenizer, hinted, chats=128):
    """Sampled replies, T = 1 -> share of the known manners that fit, of the replies with a true fact (where one is
    known), and wrong facts a reply."""
    rng = random.Random(2)
    people = [(persona, draw_messages(persona, rng, rng.randint(1, K)))
              for persona in (world.draw_persona(rng) for _ in range(chats))]
    asked = []
    for _, said in people:
        messages = [{"role": role, "content": text} for k, user in enumerate(said) for role, text in (
            ("user", user), ("assistant", reply(world.revealed(said[:k + 1]), rng, 0.5)))][:-1]
        if hinted:
            messages[-1]["content"] = with_hint(said[-1], world.revealed(said), rng, full=1)
        asked.append(messages)
    manners = fitting = known_facts = true = wrong = 0
    for (persona, said), text in zip(people, pretrain.generate(model, tokenizer, asked, True, 32, 1.0, 1.0)):
        known = world.revealed(said)
        shown = [name for name in known if name in world.MANNERS]
        other = {**persona, **{name: None for name in world.MANNERS if name not in known}}
        fits, facts, errors = world.fit(text, other)
        manners, fitting = manners + len(shown), fitting + fits
        known_facts, true = known_facts + (len(known) > len(shown)), true + (facts > 0 and len(known) > len(shown))
        wrong += errors
    return fitting / manners, true / known_facts, wrong / chats


FLOORS = {"copy_1": -0.2, "copy_8": -0.5, "hint_manners": 0.6, "hint_facts": 0.3, "manners": 0.5, "facts": 0.1}


def abilities(model, tokenizer, wanted):
    """{ability: value} for the abilities wanted, and those that are measured along with them."""
    return pretrain.measured(model, {
        ("copy_1",): lambda: [copying(model, tokenizer, 1)],
        ("copy_8",): lambda: [copying(model, tokenizer, 8)],
        ("hint_manners", "hint_facts", "hint_wrong"): lambda: adapting(model, tokenizer, True),
        ("manners", "facts", "wrong"): lambda: adapting(model, tokenizer, False),
    }, wanted)


def texts_of_the_world():
    """Every word of the world and of the hint."""
    rng = random.Random(0)
    return [HINT, REPEAT] + [message["content"] for _ in range(2000)
                     for draw in (lambda rng: chat(rng, K, 0.5, 0.5, 0.2), lambda rng: echo(rng, 8))
                     for message in draw(rng)]


def main():
    parser = pretrain.pretrain_parser(__doc__)
    parser.add_argument("--obey", type=float, default=0.4, help="share of the hinted replies that heed the hint")
    args = parser.parse_args()
    pretrain.pretrain(args, pretrain.build_tokenizer(texts_of_the_world()), phases(args.obey), abilities, FLOORS,
                      size=3000, probe=200_000, decay=3_000_000)


if __name__ == "__main__":
    main()
