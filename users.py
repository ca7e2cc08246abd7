"""Who plays the user: one Roleplayer, or several that share the pairs.

    --roleplayer openai:mixtral@http://host/v1 openai:llama@http://host/v1 --roleplayer-weights 2 1     two models
    --roleplayer openai:mixtral@http://host/v1 --roleplayer-prompt brief.txt chatty.txt        one under two prompts
"""
import re
from pathlib import Path
from random import Random
from typing import NamedTuple

from common import fail, fingerprint, number, read_settings, read_text, seed_for


class User(NamedTuple):
    """A Roleplayer: a model under a prompt."""
    name: str
    model: str
    prompt: str


def add_user_flags(parser, **more):
    parser.add_argument("--roleplayer", nargs="+", metavar="MODEL", **more)
    parser.add_argument("--roleplayer-weights", nargs="+", type=number(float, 0.001), metavar="W",
                        help="the shares of several Roleplayers; without it they are equal")
    parser.add_argument("--roleplayer-prompt", nargs="+", metavar="FILE",
                        help="in the place of prompts/roleplayer_user.txt (ALOE: aloe_roleplay.txt); several make "
                             "several Roleplayers")


def read_users(args, prompt):
    """{User: weight} of these flags. prompt: the paper's; a file's must have the same {fields}."""
    given = args.roleplayer, args.roleplayer_prompt or [None], args.roleplayer_weights or [1.0]
    n, users, fields = max(map(len, given[:2])), {}, set(re.findall(r"{\w+}", prompt))
    if not {1, n} >= set(map(len, given)):
        fail(f"{len(given[0])} --roleplayer, {len(given[1])} --roleplayer-prompt and {len(given[2])} "
             "--roleplayer-weights: give as many of each, or one for all.")
    for model, file, weight in zip(*(values * (n // len(values)) for values in given)):
        name, text = name_of(model), prompt
        if file:
            name, text = f"{name} ({Path(file).name})", read_text(file)
            if set(re.findall(r"{\w*}|[{}]", text)) != fields:
                fail(f"{file}: a Roleplayer's prompt has {', '.join(sorted(fields))}, and no other braces.")
        user = User(name, model, text)
        if user not in users and name in {other.name for other in users}:
            fail(f"Two Roleplayers are called {name}. Rename a folder or a file: rows tell them apart by name.")
        users[user] = users.get(user, 0) + weight
    return users


def user_of(users, seed, *key):
    """Who answers, by weight and by a hash of the key: the same for every model and iteration."""
    return Random(seed_for(seed, "roleplayer", *key)).choices(list(users), list(users.values()))[0]


def name_of(model):
    """A model's name without URL and hash: "mixtral" of "openai:mixtral@http://host/v1"."""
    return re.sub(r"^openai:| \(\w{12}\)$", "", fingerprint(model))


def users_setting(args, users):
    """{"users": names} for `roleplayer_label`; {} for one Roleplayer under the paper's prompt."""
    names = [f"{users[user]:g} {user.name}" if args.roleplayer_weights else user.name for user in users]
    return {"users": names} if len(args.roleplayer) > 1 or args.roleplayer_prompt else {}


def roleplayer_label(conversations, given):
    """Who played the user in a file of conversations: the name given, or its settings', such as "mixtral", "A + B"."""
    settings = read_settings(conversations)
    return given or " + ".join(settings.get("users", [])) or name_of(settings.get("roleplayer") or fail(
        f"--roleplayer: {conversations}.settings.json is not there to say who played the user. Give a name."))
