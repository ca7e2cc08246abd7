"""People in the place of a model: an OpenAI-compatible server on loopback, whose answers are typed at this terminal.

    python people/server.py --answers runs/people.jsonl            # prints "serving on http://127.0.0.1:8000/v1, ..."
    python simulate.py --roleplayer openai:anna@http://127.0.0.1:8000/v1 --timeout 86400 --batch-size 1 ...

Run the second line in another terminal. Any stage and any role will do. The model's name is the person's. An empty
line ends an answer. Ctrl-C or Ctrl-D ends the server. Nobody is asked the same messages twice, even after a restart.

With --page people answer in a browser, several at a time: --page --role judge (docs/people.md has the commands).
"""
import argparse
import hashlib
import json
import readline
import sys
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
from common import PROMPTS, HelpFormatter, amount, fail, number, printable, read_rows, run  # noqa: E402
from toy.server import Handler, Refused, Server, model_and_seed  # noqa: E402


def type_text(prompt):
    """What is typed at the terminal until an empty line, which begins no text. Ctrl-D is Ctrl-C."""
    text = ""
    while not text.endswith("\n\n"):
        try:
            text = f"{text}{input(prompt).encode().decode().rstrip()}\n".lstrip()
        except UnicodeError:
            print("This line is not UTF-8: type it again.")
        except EOFError:
            raise KeyboardInterrupt from None
    return text.strip()


def row_of(request):
    """A chat completion request (parsed JSON) -> its row: {"request": a hash, "model": a name, "messages": [...]}."""
    name, _ = model_and_seed(request)
    try:
        chat = [{part: message[part] for part in ("role", "content")} for message in request["messages"]]
        said = "\0".join([name, *(text for message in chat for text in message.values())])
    except (KeyError, TypeError):
        raise Refused("not a model and messages with role and content, all of them texts") from None
    return {"request": hashlib.sha256(said.encode()).hexdigest(), "model": name, "messages": chat}


def read_answers(path):
    """The rows that an earlier server has written, and the file, open for more."""
    file = open(path, "ab", buffering=0)
    file.truncate(Path(path).read_bytes().rfind(b"\n") + 1)     # a kill may have torn the last line
    return list(read_rows(path, {"request": str}, {"answer": str})), file


class People(Server):
    """Any model name is a person's. answers: {request: Future of a text}; waiting: the rows that lack their answer."""

    def __init__(self, port, path):
        self.answers, self.waiting, (rows, self.file) = {}, SimpleQueue(), read_answers(path)
        for row in rows:
            self.answers.setdefault(row["request"], Future()).set_result(row["answer"])
        super().__init__(("127.0.0.1", port), Handler)

    def reply(self, request):
        """A chat completion request (parsed JSON) -> the answer, once it is there; in a thread of its own."""
        row, new = row_of(request), Future()
        if self.answers.setdefault(row["request"], new) is new:  # whoever gave up, and asks again, is not shown again
            self.waiting.put(row)
        return self.answers[row["request"]].result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--answers", default="runs/people.jsonl", metavar="FILE", help="answers are kept here (JSONL)")
    parser.add_argument("--port", type=number(int, 0, 65535), default=8000, help="0: any free one")
    page = parser.add_argument_group("a web page, in the place of the terminal")
    page.add_argument("--page", action="store_true", help="serve it")
    page.add_argument("--role", choices="roleplayer judge oracle free".split(), default="free", help="that is shown")
    page.add_argument("--prompts", default=PROMPTS, metavar="FOLDER", help="the script's: they tell what is what")
    page.add_argument("--host", default="127.0.0.1", help="another one lets others in, who need a token")
    page.add_argument("--hold", type=amount, default=900, metavar="S", help="seconds until another may get a request")
    page.add_argument("--undo", type=amount, default=5, metavar="S", help="seconds in which an answer can be corrected")
    args = parser.parse_args()
    Path(args.answers).parent.mkdir(parents=True, exist_ok=True)
    if args.page:
        try:
            from people.page import serve
        except ImportError as error:
            fail(f"--page: {error}. Run: pip install -r people/requirements.txt")
        return serve(args)
    defaults = [parser.get_default(flag) for flag in ("role", "prompts", "host", "hold", "undo")]
    if [args.role, args.prompts, args.host, args.hold, args.undo] != defaults:
        parser.error("--role, --prompts, --host, --hold and --undo belong to --page")
    server = People(args.port, args.answers)
    print(f"serving on http://127.0.0.1:{server.server_port}/v1, {len(server.answers)} answers kept", flush=True)
    Thread(target=server.serve_forever, daemon=True).start()
    readline.parse_and_bind("set enable-bracketed-paste on")    # the paragraphs of a paste are one line
    for row in iter(server.waiting.get, None):                  # in the main thread, where Ctrl-C is heard
        said = map("{role}: {content}".format_map, row["messages"])
        print("\n" + 80 * "-", *map(printable, said), sep="\n\n", end="\n\n")
        row["answer"] = type_text(f"{printable(row['model'])}> ")
        server.file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        server.answers[row["request"]].set_result(row["answer"])


if __name__ == "__main__":
    run(main)
