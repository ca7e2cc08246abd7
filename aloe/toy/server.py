"""The people of ALOE's embedded world, behind an OpenAI-compatible server on loopback.

Persona writer, user, inducer and judge answer the paper's own prompts, by rule (aloe/toy/world.py). The fields of a
prompt are read by turning its template around, so a changed prompt is refused and not guessed at. What a user says
depends on the persona, the round and the request's integer `seed`, never on the replies: all models meet the same
messages. Stateless, as toy/server.py, from which the server, its flags and its faults are.

    python aloe/toy/server.py --port 8766        # prints "serving on http://127.0.0.1:8766/v1"; port 0: any free one

    model                  answers with
    aloe-writer            20 random profiles or personalities, one a line
    aloe-user              a message: "Hiya. My pet is dog."
    aloe-user-mute         control: small talk alone, "It rains again."; nothing is revealed
    aloe-inducer           the persona's sentences that the user's messages have shown: "Profile: My pet is dog. ..."
    aloe-inducer-foreign   control: what the same messages would have shown of somebody else, the same in all rounds
    aloe-judge             1 to 5 = 1 + manners that fit + 1 if a true fact is used - wrong facts, at least 1
"""
import random
import re
import sys
from functools import partial
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the root; first, since PyPI has an "aloe", too
from aloe.toy import world  # noqa: E402
from common import read_prompts  # noqa: E402
from toy import server as toy  # noqa: E402
from toy.server import Refused  # noqa: E402


def write(which, examples, seed, model, **_):
    rng = random.Random(f"{seed} {examples}")
    return "\n".join(world.sentences(world.draw_persona(rng), rng)[which] for _ in range(20))


def say_next(profile, personality, seed, model, history):
    persona, mine = world.read_persona(profile, personality), [turn["content"] for turn in history[::2]]
    rng = random.Random(f"{seed} {len(mine)} {profile} {personality}")
    return world.message(persona, world.revealed(mine), rng, mute=model == "aloe-user-mute")


def induce(conversation, profile, personality, seed, model, **_):
    world.read_persona(profile, personality)
    shown = world.revealed(re.findall(r"^A: (.*)", conversation, re.MULTILINE))
    if model == "aloe-inducer-foreign":
        rng = random.Random(f"{profile} {personality}")
        profile, personality = world.sentences(world.draw_persona(rng), rng)
    return world.hint(*(" ".join(sentence for sentence in re.findall(r"\w[^.]*\.", text)
                                 if world.read_sentences(sentence).keys() & shown) for text in (profile, personality)))


def judge(profile, personality, message, response, seed, model, **_):
    return str(world.judge_score(response, world.read_persona(profile, personality)))


def pattern_of(name):
    return toy.as_pattern(*read_prompts(f"aloe_{name}").values())


ROLES = {  # model -> [(pattern of its prompt, who answers)]
    "aloe-writer": [(pattern_of("profiles"), partial(write, 0)), (pattern_of("personalities"), partial(write, 1))],
    "aloe-user": [(pattern_of("roleplay"), say_next)],
    "aloe-user-mute": [(pattern_of("roleplay"), say_next)],
    "aloe-inducer": [(pattern_of("induction"), induce)],
    "aloe-inducer-foreign": [(pattern_of("induction"), induce)],
    "aloe-judge": [(pattern_of("judge"), judge)],
}


def reply(request):
    """A chat completion request (parsed JSON) -> the text of the answer; Refused, with the reason, otherwise."""
    model, seed = toy.model_and_seed(request)
    if model not in ROLES:
        raise Refused(f"no model {model!r}; there are: {', '.join(ROLES)}")
    messages = request.get("messages")  # prompt, own message, chatbot's reply, ...
    if not isinstance(messages, list) or len(messages) % 2 == 0 or not all(
            isinstance(turn, dict) and turn.get("role") == role and isinstance(turn.get("content"), str)
            for role, turn in zip(cycle(["user", "assistant"]), messages)):
        raise Refused("messages must be texts of user, assistant, user, ..., and end with the user")
    if len(messages) > 1 and not model.startswith("aloe-user"):
        raise Refused(f"{model} answers one message")
    for pattern, answer in ROLES[model]:
        if fields := pattern.fullmatch(messages[0]["content"]):
            try:
                return answer(**fields.groupdict(), seed=seed, model=model, history=messages[1:])
            except ValueError as error:  # a persona from elsewhere
                raise Refused(str(error)) from error
    raise Refused(f"this is not the prompt of the role that {model!r} plays: {messages[0]['content'][:80]!r}")


class Server(toy.Server):
    reply = staticmethod(reply)


if __name__ == "__main__":
    toy.main(toy.server_parser(__doc__), Server)
