"""The web page of people/server.py --page. Who opens it gives a name, and gets what is asked of this name, or of
"anyone" (a model's name that begins so): nothing that another has before him, nor the same messages twice. A link has
its token behind the "#", which a browser keeps to itself: no request line and no log shows it."""
import asyncio
import json
import os
import re
import socket
import string
from collections import defaultdict
from math import inf
from pathlib import Path
from secrets import compare_digest, token_urlsafe
from time import monotonic as now

from aiohttp import web

from common import fail, printable, read_prompts, write_whole
from people.server import read_answers, row_of
from toy.server import completion

ROLES = {                                                       # what a person is told to do
    "roleplayer": "Answer the last question as this person. Do not answer the request: you want help with it.",
    "judge": "Which answer fits this person better?",
    "oracle": "Answer the request for this person, in ten sentences at most."}
TITLES = {"persona": "The person", "task": "The request", "conversation": "The conversation so far",
          "response_a": "Answer A", "response_b": "Answer B"}


def read_fields(template, text):
    """{field: its text} where `text` is the template, filled in. None where it is not, or where what stands between
    two fields stands in a field, too: a model's text that looks like the prompt moves no border."""
    names = [name for _, name, *_ in string.Formatter().parse(template) if name]
    first, *marks, last = template.format(**dict.fromkeys(names, "\0")).split("\0")
    parts = re.split("|".join(map(re.escape, marks)), text[len(first):len(text) - len(last)])
    fields = dict(zip(names, parts))
    return fields if len(parts) == len(marks) + 1 and template.format(**fields) == text else None


def said(row):
    return tuple(message["content"] for message in row["messages"])


class Page:
    """asked: {request: its row, once answered with "by", "seconds" and "answer"}; due: {request: when the script gets
    the answer, 0 once it has it}; held: {request: (who has it, since when)}; drafts: {request: what was taken back}."""

    def __init__(self, args, token):
        rows, self.file = read_answers(args.answers)
        self.asked, self.due = {row["request"]: row for row in rows}, {row["request"]: 0 for row in rows}
        self.args, self.token, self.held, self.drafts = args, token, defaultdict(lambda: (None, -inf)), {}
        names = [args.role.replace("oracle", "gold") + part for part in ("_system", "_user") if args.role in ROLES]
        self.template = "\n\n".join(read_prompts(*names, folder=args.prompts).values())

    @web.middleware
    async def guard(self, request, handler):
        """Turns away who may not come in, and what is wrong, in one line each. From a foreign site a browser sends no
        JSON; a foreign name that leads to this machine (DNS rebinding) is not this server's."""
        told = request.headers.get("Authorization", "").encode("utf-8", "replace")
        try:
            if self.token and request.path != "/" and not compare_digest(told, f"Bearer {self.token}".encode()):
                raise web.HTTPUnauthorized(text="No token, or a wrong one. Open the whole link; set SERVER_API_KEY.")
            if not self.token and not re.fullmatch(r"(127\.0\.0\.1|localhost)(:\d+)?", request.host):
                raise web.HTTPForbidden(text="This server is called 127.0.0.1, and nothing else.")
            if request.method == "POST" and request.content_type != "application/json":
                raise web.HTTPUnsupportedMediaType(text="Content-Type must be application/json.")
            response = await handler(request)
        except (web.HTTPException, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            why = {"message": getattr(error, "text", f"Not as it should be: {error}")}
            response = web.json_response({"error": why}, status=getattr(error, "status", 400))
        response.headers.update({"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"})
        return response

    async def show(self, request):
        html, nonce = Path(__file__).with_suffix(".html").read_text(encoding="utf-8"), token_urlsafe()
        return web.Response(text=html.replace("NONCE", nonce), content_type="text/html", headers={
            "Content-Security-Policy": f"default-src 'self' 'nonce-{nonce}'; base-uri 'none'; frame-ancestors 'none'"})

    async def complete(self, request):
        """OpenAI's endpoint. A client that gave up, and asks again, gets what was said meanwhile."""
        row = row_of(body := await request.json())
        key = self.asked.setdefault(row["request"], row)["request"]
        while now() < self.due.get(key, inf):
            await asyncio.sleep(0.2)
        self.due[key] = 0
        return web.json_response(completion(body, self.asked[key]["answer"]))

    def view(self, row):
        """What to do, the [title, text] of each part, whether A or B is the answer, and what to begin with."""
        fields = self.template and read_fields(self.template, "\n\n".join(said(row)))    # --system fold joins them so
        parts = [[title, fields[name]] for name, title in TITLES.items() if name in fields] if fields else [
            list(message.values()) for message in row["messages"]]
        return {"ask": ROLES[self.args.role] if fields else "Answer this.", "judge": "response_a" in (fields or ()),
                "parts": [list(map(printable, part)) for part in parts], "draft": self.drafts.get(row["request"], "")}

    async def work(self, request):
        """{"name", "has": the request on the page} -> the request to show, all of it if it is another. With "answer":
        to `has`; it is kept at once, and the script gets it after --undo seconds. With "back": his last one reopens."""
        body = await request.json()
        name, has = body["name"].strip().casefold(), body["has"]
        if "answer" in body:
            holder, since = self.held[has]
            if holder != name or has in self.due or not body["answer"].strip():
                raise web.HTTPConflict(text="Nobody waits for this answer now, or somebody else has the question.")
            self.asked[has] |= {"by": name, "seconds": round(now() - since, 1), "answer": body["answer"].strip()}
            self.file.write(json.dumps(self.asked[has], ensure_ascii=False).encode() + b"\n")
            self.due[has] = now() + self.args.undo
        if "back" in body:
            mine = [key for key, due in self.due.items() if due and self.asked[key]["by"] == name]
            if not mine:
                raise web.HTTPConflict(text="Too late: the script has your answer.")
            row = self.asked.pop(key := max(mine, key=self.due.get))
            self.asked, self.drafts[key] = {key: row_of(row), **self.asked}, row["answer"]
            del self.due[key]
            rows = [json.dumps(self.asked[key], ensure_ascii=False) for key in self.due]
            write_whole(self.args.answers, "".join(f"{row}\n" for row in rows))
            self.file = open(self.args.answers, "ab", buffering=0)
        mine, shown = [key for key in self.due if self.asked[key].get("by") == name], None
        seen = {said(self.asked[key]) for key in mine}
        free = [key for key, row in self.asked.items() if key not in self.due
                and (self.held[key][0] == name or now() > self.held[key][1] + self.args.hold)
                and (row["model"].casefold() == name or row["model"].startswith("anyone") and said(row) not in seen)]
        if free:
            key = min(free, key=lambda key: self.held[key][0] != name)                 # what he has, or else the first
            self.held[key] = name, self.held[key][1] if self.held[key][0] == name else now()
            shown = {"request": key, **({} if key == has else self.view(self.asked[key]))}
        progress = f"You: {len(mine)} done, {len(free)} to do. All: {len(self.due)} of {len(self.asked)} done."
        return web.json_response({"item": shown, "progress": progress, "back": any(map(self.due.get, mine))})


def serve(args):
    """Serves until Ctrl-C."""
    token = None if args.host == "127.0.0.1" else os.environ.get("SERVER_API_KEY", "")
    if token is not None and not re.fullmatch(r"[\w-]{20,}", token, re.ASCII):
        fail(f"--host {args.host} lets others in. Set SERVER_API_KEY, here and for the scripts, to 20 letters or more "
             'that nobody guesses: export SERVER_API_KEY=$(python -c "import secrets; print(secrets.token_urlsafe())")')
    page, sock = Page(args, token), socket.create_server((args.host, args.port))
    app = web.Application(middlewares=[page.guard], client_max_size=2 ** 24)
    app.add_routes([web.get("/", page.show), web.post("/work", page.work),
                    web.post("/v1/chat/completions", page.complete)])
    url, secret = f"http://{args.host}:{sock.getsockname()[1]}", "#SERVER_API_KEY" if token else ""
    print(f"serving on {url}/v1, {len(page.due)} answers kept; the page: {url}/{secret}", flush=True)
    web.run_app(app, sock=sock, print=None, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
