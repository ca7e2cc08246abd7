"""A person in the place of a model, at the terminal: the model string `human`.

    python simulate.py --roleplayer human --samples 1 --limit 1 ...     answers the Questioner, as one of the personas
    python evaluate.py --judge human ...                                judges blind: a hash deals the answers to A, B
    python gold.py --oracle human --limit 5 ...                         writes gold responses
"""
import readline  # noqa: F401  (a terminal's own lines end at 4,095 characters)

from common import Reply, fail, printable


class Human:
    """Shows the last message of each chat; the answer is what is typed until an empty line. Ctrl-D ends the stage, as
    Ctrl-C does: finished rows are kept, and the same command goes on. (A conversation in the middle begins anew.)"""

    def __init__(self, processes):
        if processes.num_processes > 1:
            fail("human: one person answers one process. Start it with python, without accelerate launch.")

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
        """{key: Request} -> yields (key, Reply), one after the other. Temperature and the like are not a person's."""
        for key in [key for key in requests if key not in skip][share]:
            print(f"\n{printable(requests[key].chat[-1]['content'])}")
            text = ""
            while not text.endswith("\n\n"):                    # an empty line ends an answer, and begins none
                try:
                    line = input("> ").encode().decode()
                    text = f"{text}{line.rstrip()}\n".lstrip()
                except EOFError:
                    raise KeyboardInterrupt from None
                except UnicodeError:
                    print("This line is not UTF-8: type it again.")
            yield key, Reply(text.strip())
