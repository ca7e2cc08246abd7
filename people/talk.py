"""Talk with a Questioner about a request of your own, and read its answer. Nothing is written.

    python people/talk.py --questioner toy/base --dtype float32 --max-tokens 64
    > Can you help me with a simple dinner?

An empty line ends what you type; Ctrl-C or Ctrl-D ends the talk.
"""
import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
from common import (HelpFormatter, Request, add_model_flags, amount, fail, natural, nucleus, number,  # noqa: E402
                    open_model, printable, response_form, run, seed_for, start_processes)
from people.server import type_text  # noqa: E402
from simulate import questioner_chat  # noqa: E402


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--questioner", required=True, metavar="MODEL", help="asks, and answers in the end")
    parser.add_argument("--name", default="User", help="your first name, which the Questioner is told")
    parser.add_argument("--max-turns", type=natural, default=3, metavar="K", help="questions")
    parser.add_argument("--temperature", type=amount, default=0.9, help="of the questions; the answer is greedy")
    parser.add_argument("--top-p", type=nucleus, default=0.9, help="mass of the nucleus")
    parser.add_argument("--max-tokens", type=natural, default=700, help="length of a question, and of the answer")
    parser.add_argument("--seed", type=number(int, 0), default=42, help="of all randomness")
    add_model_flags(parser, batch_size=1)
    return parser.parse_args()


def talk(args):
    model, conversation = open_model(args.questioner, args, start_processes()), []
    print("What would you like help with?\n")
    task = type_text("> ")

    def say(form, temperature):
        """Prints what the Questioner says to form(name, task, conversation), and returns it."""
        request = Request(form(args.name, task, conversation), seed_for(args.seed, "talk", len(conversation)))
        (_, reply), = model.generate({0: request}, temperature, args.top_p, args.max_tokens)
        print("", printable(reply.text or fail(f"{args.questioner}: {reply.refused}", status=1)), "", sep="\n")
        return reply.text

    for _ in range(args.max_turns):
        conversation.append({"role": "assistant", "content": say(questioner_chat, args.temperature)})
        conversation.append({"role": "user", "content": type_text("> ")})
    say(response_form, 0.0)


def main():
    args = parse_args()
    try:
        talk(args)
    except KeyboardInterrupt:                                   # `run` speaks of rows; a request may be under way
        os._exit(130)


if __name__ == "__main__":
    run(main)
