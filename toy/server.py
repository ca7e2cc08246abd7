"""The people of the embedded world, behind an OpenAI-compatible server on loopback.

Persona writer, Oracle, Roleplayers and judge answer the paper's own prompts, by rule. Who is asked is read from the
system text (a system message, or folded into the first user message); the fields of a prompt are read by turning
the stage's own template around, so a changed prompt is refused and not guessed at. Stateless: an answer depends on
the model, the prompt and the request's `seed` alone.

    python toy/server.py --port 8765        # prints "serving on http://127.0.0.1:8765/v1"; port 0: any free one
    python toy/server.py --faults '{"429": 0.1, "dropped": 0.1}'            # some requests fail

    model              answers with
    persona-writer     a random user: "I'm Anna. My pet is dog. ..."
    oracle             the gold response
    roleplayer         the true fact to a recognised question, "My pet is dog.", or "I am not sure what you mean."
    roleplayer-terse   the bare value: "dog."
    roleplayer-evasive one time in four "I would rather not say."
    roleplayer-chatty  adds two facts that nobody asked for
    roleplayer-erring  a wrong value one time in ten; the true one when it is asked again
    judge              "Final Response: A" or "B": the higher score wins, where
                       score = relevant true facts used - facts about the user that are wrong;
                       ties by a hash of the prompt. No other clause: questions, length and order count for nothing.
"""
import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
import evaluate  # noqa: E402
import generate_personas  # noqa: E402
import gold  # noqa: E402
import simulate  # noqa: E402
from toy import world  # noqa: E402


class Refused(ValueError):
    """A request that this server does not answer; the text says why."""


def write_persona(examples, rng, model):
    return world.persona_text(world.draw_persona(rng), rng)


def answer_task(persona, task, rng, model):
    return world.gold_response(world.read_persona(persona), task)


def roleplay(persona, task, conversation, rng, model):
    *before, slot = [world.question_slot(said) for said in conversation.split("AI Assistant: ")[1:]]
    if slot is None:
        return world.UNSURE
    person, form = world.read_persona(persona), rng.choice(world.ANSWERS)
    told, manner = [slot], model.removeprefix("roleplayer-")
    if manner == "terse":
        return f"{person[slot]}."
    if manner == "evasive" and rng.random() < 0.25:
        return world.EVASIVE
    if manner == "chatty":
        told += rng.sample([other for other in world.SLOTS if other != slot], 2)
    if manner == "erring" and slot not in before and rng.random() < 0.1:
        person[slot] = rng.choice([value for value in world.SLOTS[slot] if value != person[slot]])
    return " ".join(form.format(each, person[each]) for each in told)


def judge(persona, task, response_a, response_b, rng, model):
    scores = [world.judge_score(text, world.read_persona(persona), task) for text in (response_a, response_b)]
    verdict = "A" if scores[0] > scores[1] else "B" if scores[1] > scores[0] else rng.choice("AB")
    return f"Comparison: response A scores {scores[0]}, response B scores {scores[1]}.\n\nFinal Response: {verdict}"


def as_pattern(template):
    """The template turned around: each {field} becomes a named group that matches any text."""
    return re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.*)", re.escape(template)), re.DOTALL)


USERS = ["roleplayer", "roleplayer-terse", "roleplayer-evasive", "roleplayer-chatty", "roleplayer-erring"]
ROLES = {  # system text -> (pattern of the user message, who answers, the models that may be asked)
    generate_personas.PROMPTS["persona_system"]:
        (as_pattern(generate_personas.PROMPTS["persona_user"] + "\n\n{examples}"), write_persona, ["persona-writer"]),
    gold.PROMPTS["gold_system"]: (as_pattern(gold.PROMPTS["gold_user"]), answer_task, ["oracle"]),
    simulate.PROMPTS["roleplayer_system"]: (as_pattern(simulate.PROMPTS["roleplayer_user"]), roleplay, USERS),
    evaluate.PROMPTS["judge_system"]: (as_pattern(evaluate.PROMPTS["judge_user"]), judge, ["judge"]),
}


def read_messages(messages):
    """Chat messages -> (system text, user text); a folded system text is unfolded."""
    match messages:
        case [{"role": "system", "content": str(system)}, {"role": "user", "content": str(user)}]:
            return system, user
        case [{"role": "user", "content": str(text)}]:
            for system in ROLES:
                if text.startswith(system + "\n\n"):
                    return system, text[len(system) + 2:]
            raise Refused("no role: the message opens with none of the known system texts")
    raise Refused("messages must be a system and a user message, or one user message that holds both")


def model_and_seed(request):
    """A chat completion request (parsed JSON) -> its model and seed, if this kind of server can answer it."""
    if not isinstance(request, dict):
        raise Refused("the request must be a JSON object")
    if request.get("stream") or request.get("n", 1) not in (1, None):
        raise Refused("this server gives one answer a request: no stream, n = 1")
    return request.get("model"), request.get("seed") or 0


def reply(request):
    """A chat completion request (parsed JSON) -> the text of the answer; Refused, with the reason, otherwise."""
    model, seed = model_and_seed(request)
    system, user = read_messages(request.get("messages"))
    if system not in ROLES:
        raise Refused(f"no role has this system text: {system[:80]!r}")
    pattern, answer, models = ROLES[system]
    if model not in models:
        raise Refused(f"model {model!r} does not play this role; known for it: {', '.join(models)}")
    fields = pattern.fullmatch(user)
    if not fields:
        raise Refused(f"this is not the prompt of the role that {model!r} plays: {user[:80]!r}")
    rng = random.Random(hashlib.sha256(f"{seed}\n{system}\n{user}".encode()).digest())
    try:
        return answer(**fields.groupdict(), rng=rng, model=model)
    except ValueError as error:  # a persona or a task from elsewhere
        raise Refused(str(error)) from error


def completion(request, text):
    """The answer object of POST /v1/chat/completions."""
    return {"id": "chatcmpl", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}]}


FAULTS = ("429", "500", "dropped", "stalled")                    # gone when the request is repeated, as a rule


def fault_shares(text):
    """JSON -> {kind: share}."""
    value = json.loads(text)
    if (type(value) is not dict or set(value) - {*FAULTS} or
            not all(type(share) in (int, float) and share >= 0 for share in value.values()) or sum(value.values()) > 1):
        raise argparse.ArgumentTypeError(f"{text[:80]} is no JSON object with shares of {', '.join(FAULTS)}")
    return value


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive: one connection serves many requests
    disable_nagle_algorithm = True  # header and body are two writes; Nagle would hold the second for 40 ms
    timeout = 600

    def do_POST(self):
        if self.path != "/v1/chat/completions":
            return self.refuse(404, f"unknown path {self.path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.delay)
        fault = self.server.faults and self.server.fault(body)
        if fault == "stalled":
            time.sleep(30)
        if fault in ("stalled", "dropped"):
            self.close_connection = True
        elif fault == "429":
            self.refuse(429, "too many requests", {"Retry-After": "1"})
        elif fault == "500":
            self.refuse(500, "something went wrong")
        else:
            try:
                request = json.loads(body)
                answer = completion(request, self.server.reply(request))
            except ValueError as error:  # Refused, or no JSON
                return self.refuse(400, str(error))
            self.send(200, answer)

    def refuse(self, status, reason, headers=()):
        self.send(status, {"error": {"message": reason, "type": "invalid_request_error"}}, headers)

    def send(self, status, content, headers=()):
        body = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **dict(headers)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Quiet: thousands of requests a run."""


class Server(ThreadingHTTPServer):
    request_queue_size = 256  # clients open their connections all at once
    faults, delay = {}, 0  # {kind: share of the requests}, seconds
    lock = threading.Lock()
    reply = staticmethod(reply)  # of this world; aloe/toy/server.py has another

    def fault(self, body):
        """The fault that a request (bytes) meets now, or None: a seeded draw, by the request and how often it came."""
        request = hashlib.sha256(body).hexdigest()
        with self.lock:
            times = self.asked[request] = self.asked.get(request, -1) + 1
        u = random.Random(f"0 {request} {times}").random()
        for kind in FAULTS:
            u -= self.faults.get(kind, 0)
            if u < 0:
                return kind

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hangs up is no news
            super().handle_error(request, client_address)


def end_with(parent):
    """Ends this process once it has another parent, which happens when the first was killed."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def server_parser(manual):
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8765, help="0: any free port")
    parser.add_argument("--port-file", help="the URL is written here once the server listens")
    parser.add_argument("--faults", type=fault_shares, default={}, metavar="JSON",
                        help=f"shares of the requests that fail; a repetition is a new draw: {', '.join(FAULTS)}")
    parser.add_argument("--delay", type=float, default=0, help="seconds before each answer, as a real model takes")
    parser.add_argument("--end-with-parent", action="store_true", help="end when the program that started it is gone")
    return parser


def main(parser=server_parser(__doc__), server_class=Server):
    args = parser.parse_args()
    for ending in (signal.SIGINT, signal.SIGTERM):              # at once, even in the middle of a request
        signal.signal(ending, lambda *_: os._exit(0))
    server = server_class(("127.0.0.1", args.port), Handler)
    server.faults, server.asked, server.delay, server.args = args.faults, {}, args.delay, args
    url = f"http://127.0.0.1:{server.server_port}/v1"
    if args.port_file:  # atomically: a reader sees the whole URL or no file
        Path(args.port_file + ".new").write_text(url + "\n")
        os.replace(args.port_file + ".new", args.port_file)
    if args.end_with_parent:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    print(f"serving on {url}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
