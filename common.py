"""Plumbing that the six stages share: rows on disk, chats as token ids, and the models. No algorithm.

    rows      read_tasks, read_personas, read_gold, read_conversations, all_pairs, Rows
    chats     read_prompts, response_form, prompt_ids, last_turn, scored_ids
    models    "mistralai/Mistral-7B-Instruct-v0.2"     a folder or hub name: Hugging Face, on this machine
              "openai:gpt-5@https://my.server/v1"      any OpenAI-compatible server ("@URL" is optional)
    stages    answer_all asks a model, score_all asks Q_BASE for log-probabilities; both save what is there

torch and transformers are imported where they are needed, so that --help and bad input answer at once.
"""
import argparse
import fcntl
import hashlib
import json
import operator
import os
import re
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from functools import lru_cache
from glob import escape, glob
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
from tqdm import tqdm

PROMPTS = Path(__file__).parent / "prompts"


def fail(message, status=2):
    """One line that says where, what is wrong, and what to do. Exit status 2: bad input; 1: a bad outcome; 75: a server
    is away, and the same command may succeed later."""
    tqdm.write(printable(f"{Path(sys.argv[0]).name}: error: {message}"), file=sys.stderr)      # on a line beside a bar
    if status == 75 and "AWAY_FILE" in os.environ:              # for run.sh: accelerate launch ends with 1
        Path(os.environ["AWAY_FILE"]).touch()
    raise SystemExit(status)


def run(main):
    """Runs a stage's main: a wrong path, a full disk, a server's failure or Ctrl-C is one line, and no traceback."""
    try:
        main()
    except BrokenPipeError:                                     # `| head` has read enough
        os._exit(141)
    except OSError as error:                                    # a server's failure is one, too: ConnectionError
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        hint = " (an earlier stage writes it)" if isinstance(error, FileNotFoundError) else ""
        fail(f"{' '.join(what.split())[:500]}. Correct that{hint} and start again with the same flags: what is done is "
             "kept.", status=75 if type(error) is ConnectionError else 2)
    except KeyboardInterrupt:
        tqdm.write("interrupted. What is done is kept: start again with the same flags.", file=sys.stderr)
        os._exit(130)                                           # Python would wait for all requests that are under way


def printable(text):
    """A text without what would steer a terminal, or what it cannot show: models and servers wrote it."""
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", "?", text)
    return text.encode(encoding := sys.stdout.encoding or "utf-8", "replace").decode(encoding)


def seed_for(*parts):
    """A number below 2**31 that depends on its parts alone: the same in any order, on any process, after a restart."""
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8], 16) >> 1


# ---------------------------------------------------------------- rows: one JSON object a line

PAIR = {"task_id": str, "persona_id": str}                      # the fields that tell rows apart, and their values
SAMPLE = {**PAIR, "sample": int}
pair_of, key_of = operator.itemgetter(*PAIR), operator.itemgetter(*SAMPLE)


def read_rows(path, key, fields):
    """Yields the rows of a JSONL file; the first bad line ends the program. key: {name: type} of the fields that tell
    rows apart; fields: of the others. A row with `refused` (a model declined) needs its key alone; the caller leaves it
    out."""
    if unfinished(path):
        fail(f"{path}: not finished. Start the stage that writes it again: it goes on.")
    seen = {}                                                   # where each row stands
    for number, line in enumerate(open(path, "rb"), 1):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()          # no NaN, no half of a character
            for name, kind in (key if row.get("refused") else {**key, **fields}).items():
                if not isinstance(row[name], kind):
                    raise ValueError(f"{name} is {json.dumps(row[name])[:40]}, not {getattr(kind, '__name__', kind)}")
                if name == "conversation" and [(turn["role"], type(turn["content"])) for turn in row[name]] != [
                        ("assistant", str), ("user", str)] * max(1, len(row[name]) // 2):
                    raise ValueError("a conversation is a list of questions (assistant) and answers (user) in turn")
            first = seen.setdefault(tuple(row[name] for name in key), number)
            if first != number:
                raise ValueError(f"the same {', '.join(key)} as on line {first}")
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = f"no field {error}" if isinstance(error, KeyError) else error
            fail(f"{path}, line {number}: {why}. Each line is a JSON object; docs/data.md lists its fields.")
        yield row


def read_tasks(path, per_split=None):
    """{task_id: row} with `task_id`, `split`, `task`; of each split the first `per_split`, or all."""
    splits = defaultdict(list)
    for row in read_rows(path, {"task_id": str}, {"split": str, "task": str}):
        splits[str(row.get("split"))].append(row)
    return {row["task_id"]: row for rows in splits.values() for row in rows[:per_split]}


def read_personas(path):
    """{persona_id: row} with `persona_id`, `split`, `name`, `persona`; where it has one task alone, `task_id`."""
    fields = dict.fromkeys(("split", "name", "persona"), str)
    return {row["persona_id"]: row for row in read_rows(path, {"persona_id": str}, fields)}


def read_gold(path, pairs=()):
    """{(task_id, persona_id): gold response}; None where it was refused, or is empty. All of `pairs` must be there."""
    golds = {pair_of(row): None if row.get("refused") else row["gold"].strip() or None
             for row in read_rows(path, PAIR, {"gold": str})}
    for pair in pairs:
        if pair not in golds:
            fail(f"{path}: no gold response for {pair}. Run gold.py on that split, with simulate.py's --limit, --seed.")
    return golds


def read_conversations(path, tasks, personas, **more):
    """The rows `task_id`, `persona_id`, `sample`, `conversation` (and `more` fields) in order; also the refused ones.
    An id that is not in `tasks` or `personas` ends the program."""
    rows = sorted(read_rows(path, SAMPLE, {"conversation": list, **more}), key=key_of)
    for row in rows:
        if row["task_id"] not in tasks or row["persona_id"] not in personas:
            fail(f"{path}: {pair_of(row)} is not among the given --tasks and --personas. Give those it was made from.")
    return rows


def all_pairs(tasks, personas, split, limit=None, seed=0):
    """The (task_id, persona_id) of a split: the full product, or a seeded sample of `limit` of them. A persona that
    names its task (`task_id`) has that one alone."""
    pairs = [(i, j) for i in tasks for j in personas
             if tasks[i]["split"] == personas[j]["split"] == split and personas[j].get("task_id", i) == i]
    return sample_pairs(pairs, limit, seed) if pairs else fail(
        f"--split {split}: no task has this split, or no persona. Name another one.")


def sample_pairs(pairs, limit, seed):
    """Sorted (task_id, persona_id): all, or a seeded sample of `limit`, in which smaller samples are contained."""
    return sorted(sorted(set(pairs), key=lambda pair: (seed_for(seed, "limit", *pair), pair))[:limit])


# ---------------------------------------------------------------- settings: what an output was made with

# Flags that change no row (of --prompts the texts count). All others are settings; so is a flag that a fork adds.
NEUTRAL = {"output", "results", "limit", "metrics", "batch_size", "concurrency", "timeout", "max_refused", "prompts",
           "scores"}


def fingerprint(value):
    """A flag's value as a setting. A file or model folder: its name and a hash of its content, so that a model that was
    trained anew is another one. A served model: without its URL; if it is named by a folder, that folder's content."""
    if isinstance(value, list):
        return [fingerprint(part) for part in value] if len(value) > 1 else fingerprint(*value)
    if isinstance(value, str) and value.startswith("openai:"):
        return "openai:" + fingerprint(served_model(value)[0])
    if not isinstance(value, str) or not Path(value).exists():
        return value
    content = hashlib.sha256()
    for file in filter(Path.is_file, sorted(Path(value).glob("*")) or [Path(value)]):
        weights = file.suffix in (".safetensors", ".bin")                   # by size: log.jsonl tells the rest
        content.update(file.name.encode() + (str(file.stat().st_size).encode() if weights else file.read_bytes()))
    return f"{Path(value).resolve().name} ({content.hexdigest()[:12]})"


def name_of(model):
    """A model's name without URL and hash: "mixtral" of "openai:mixtral@http://host/v1"."""
    return re.sub(r"^openai:| \(\w{12}\)$", "", fingerprint(model))


def settings_of(args, without=(), **more):
    """{name: value} of all that decides a stage's rows: its flags but those of `without`, and `more`."""
    flags = {name: value if name in ("split", "variant") else fingerprint(value)             # these name no file
             for name, value in vars(args).items() if name not in NEUTRAL | {*without}}
    return json.loads(json.dumps({**flags, **more}))


def read_settings(output):
    """The settings with which a stage wrote an output; {} for files from elsewhere."""
    try:
        return dict(json.loads(Path(f"{output}.settings.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def take_output(output, settings):
    """Writes OUTPUT.settings.json, or refuses what is there: made with other settings, or by somebody else. Keeps other
    programs out of OUTPUT as long as the returned file is open."""
    path, there = Path(f"{output}.settings.json"), Path(output).exists() or unfinished(output)
    remove = f"Give another --output, or delete {output}, its .part-* and {path.name}."
    if there and not read_settings(output):
        fail(f"{output}: not written by this stage. {remove}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{output}: another run is writing it. Wait for that, or give another --output.")
    old = {**{name: value for name, value in settings.items() if not value}, **read_settings(output)}    # absent: empty
    differ = [f"{name}: {str(old.get(name))[:60]!r} there, {str(settings.get(name))[:60]!r} now"
              for name in sorted({**old, **settings}) if old.get(name) != settings.get(name)]
    if there and differ:
        fail(f"{output}: made with other settings: {'; '.join(differ)}. {remove}")
    if not there:
        lock.truncate(0)
        print(json.dumps(settings, indent=1, ensure_ascii=False), file=lock, flush=True)
    return lock


def unfinished(output):
    """The files of a stage that was interrupted, or is still running."""
    return sorted(glob(escape(str(output)) + ".part-" + 32 * "[0-9a-f]"))


def write_whole(path, text):
    """Writes a file beside its place and renames it: readers see the old file or the new one, never half of one."""
    Path(f"{path}.new").write_text(text, encoding="utf-8")
    os.replace(f"{path}.new", path)


class Rows(dict):
    """A stage's output {key: row}. PATH appears when the stage is finished, sorted by key. Until then each process adds
    what it has done to a PATH.part-* of its own; a stage that was killed reads its parts and goes on.

    key: the names that tell rows apart; without: flags that these rows do not depend on; more: further settings."""

    def __init__(self, args, path, key, processes, without=(), **more):
        self.args, self.path, self.key, self.processes = args, path, key, processes
        self.part = f"{path}.part-{uuid4().hex}"
        self.share = slice(processes.process_index, None, processes.num_processes)      # of the work: this process's
        if processes.is_main_process:
            self.lock = take_output(path, settings_of(args, without, **more))
        self._read()

    def _read(self):
        """Reads what all processes have written, while none of them writes."""
        self.processes.wait_for_everyone()
        for file in filter(os.path.exists, (self.path, *unfinished(self.path))):
            for number, line in enumerate(open(file, "rb"), 1):
                try:
                    row = json.loads(line)
                    self[tuple(row[name] for name in self.key)] = row
                except (ValueError, KeyError, TypeError):
                    if line.endswith(b"\n"):                    # else a kill has torn it
                        fail(f"{file}, line {number}: not as this stage writes it. Remove that line.")
        self.processes.wait_for_everyone()

    def add(self, row):
        """Saves a row at once."""
        with open(self.part, "a", encoding="utf-8") as part:
            print(json.dumps(row, ensure_ascii=False), file=part)
        self[tuple(row[name] for name in self.key)] = row
        if len(self) % 100 == 0:                                # before thousands more are paid for
            self.limit_refusals()

    def finish(self):
        """Joins the parts of all processes into PATH, which is there then, if only as an empty file."""
        self._read()
        if self.processes.is_main_process:
            write_whole(self.path, "".join(json.dumps(self[k], ensure_ascii=False) + "\n" for k in sorted(self)))
            for part in unfinished(self.path):
                os.remove(part)
        self.processes.wait_for_everyone()
        self.limit_refusals()

    def limit_refusals(self):
        """Ends the program with status 1 where more than --max-refused of the rows are refusals."""
        refused = [row["refused"] for row in self.values() if row.get("refused")]
        if len(refused) > self.args.max_refused * len(self):
            fail(f"{self.path}: {len(refused)} of {len(self)} were refused (the last: {refused[-1][:200]}), more than "
                 f"--max-refused {self.args.max_refused:g}. Try another model, --extra or --max-tokens, with another "
                 '--output. To ask again, remove the lines with "refused"; to go on, raise the flag.', status=1)

    def summary(self):
        """ "PATH: 500 rows, 3 refused, 2 cut at --max-tokens": the beginning of a stage's last line."""
        refused, cut = (sum(bool(row.get(mark)) for row in self.values()) for mark in ("refused", "cut"))
        again = len(ServerModel.repeated)
        return f"{self.path}: {len(self)} rows, {refused} refused, {cut} cut at --max-tokens" + (
            f", {again} requests sent again (time-outs? --timeout, --concurrency)" if again else "")


# ---------------------------------------------------------------- chats: lists of messages until the tokenizer

def read_prompts(*names, folder=PROMPTS):
    """{NAME: text} of the paper's prompts, word for word: FOLDER/NAME.txt, or prompts/NAME.txt where that is not there.
    The stages fill in fields such as {task}; one that the paper's prompt does not have ends the program."""
    texts = {}
    for name in names if Path(folder).is_dir() else fail(f"--prompts {folder}: there is no such folder."):
        path, paper = Path(folder, f"{name}.txt"), PROMPTS / f"{name}.txt"
        texts[name], fields = read_text(path if path.exists() else paper), re.findall(r"{(\w+)}", read_text(paper))
        try:
            texts[name].format(**dict.fromkeys(fields, ""))
        except (LookupError, ValueError) as error:
            fail(f"{path}: {error!r}. Its fields are {fields}; a brace that is no field is written twice.")
    return texts


def read_text(path):
    """A file's text, without the line feed at its end."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as error:
        fail(f"{path}: {error}. Save it as UTF-8.")


FORM = read_prompts("response", "response_persona")             # figure 17


def response_form(name, task, conversation, persona=None, prompt=None, form=FORM):
    """Figure 17: the conversation without the elicitation prompt, the task repeated at the end of the last answer, to
    ask for a response and not for another question. `select`, `train` and `evaluate` see a conversation in this form.

    No conversation: the negative control. A persona in the first turn: the positive control. A prompt stands first.
    """
    first = form["response" if persona is None else "response_persona"].format(name=name, task=task, persona=persona)
    chat = [{"role": "user", "content": f"{prompt}\n\n{first}" if prompt else first}, *map(dict, conversation)]
    if conversation:
        chat[-1]["content"] += f"\n\n{task}"
    return chat


# Llama 3.2's template and others write today's date, and log-probabilities would change overnight.
SAME_DAY = "{% macro strftime_now(format) %}{{ format" + "".join(
    f"|replace('%{code}', '{date(2024, 7, 26):%{code}}')" for code in "aAbBdeFHIjmMpSxyY") + " }}{% endmacro %}"


def render(tokenizer, chat, **more):
    """A chat by its template, as text; on the same day forever."""
    template = tokenizer.get_chat_template()
    more = {"tokenize": False, **getattr(tokenizer, "chat_template_kwargs", {}), **more}
    return tokenizer.apply_chat_template(
        chat, chat_template=SAME_DAY * ("strftime_now" in template) + template, **more)


@lru_cache
def knows_system(tokenizer):
    """Whether a chat template has a place for a system text. Gemma's and Mistral's refuse it, others drop it."""
    try:
        chat = [{"role": "system", "content": "SYSTEM TEXT"}, {"role": "user", "content": "Hi"}]
        return "SYSTEM TEXT" in render(tokenizer, chat)
    except Exception:               # jinja2's errors, of many kinds
        return False


def fold_system(chat):
    """Puts a system text into the first user message, for models that know no system role."""
    first, *rest = chat
    return chat if first["role"] != "system" else [
        {"role": "user", "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]


@lru_cache
def template_marks(tokenizer):
    """The tokens that a template alone may write: special ones, and added ones that its text has, such as DeepSeek's
    <｜User｜> and Qwen3's <think>, which no file marks as special."""
    chat = [{"role": role, "content": ""} for role in ("system", "user", "assistant")[not knows_system(tokenizer):]]
    added, template = tokenizer.added_tokens_decoder.values(), f"{tokenizer.chat_template}{render(tokenizer, chat)}"
    return [*tokenizer.all_special_tokens, *(token.content for token in added if token.special or
                                             token.content in template and re.search(r"[^\w\s]", token.content))]


def plain(tokenizer, chat):
    """A chat for a template: each of its marks that a text spells is broken by a blank ("</s>" becomes "< /s>"), or a
    text could open and close turns. The assistant's texts are stripped, as by most templates."""
    spelled = "|".join(map(re.escape, template_marks(tokenizer)))
    chat = [{**message, "content": re.sub(spelled, lambda mark: f"{mark[0][0]} {mark[0][1:]}", message["content"])}
            for message in (chat if knows_system(tokenizer) else fold_system(chat))]
    return [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in chat]


def prompt_ids(tokenizer, chat):
    """The ids of a chat that ends with the user, ready for the assistant to go on."""
    return render(tokenizer, plain(tokenizer, chat), add_generation_prompt=True, tokenize=True, return_dict=False)


def last_turn(tokenizer, chat):
    """(ids, first, end, close) of a chat that ends with the assistant, whose text is ids[first:end], and with the mark
    that ends its turn, if there is one, ids[first:close]. Found by characters: tokenizers merge across the border of a
    turn."""
    *before, answer = plain(tokenizer, chat)
    said, mark = answer["content"], f"({seed_for(chat)})"                           # the mark: a text that no chat has
    invited, text = render(tokenizer, before, add_generation_prompt=True), render(tokenizer, [*before, answer])
    start = render(tokenizer, [*before, {**answer, "content": mark}]).find(mark)    # after a thought, in some templates
    stop = start + len(said)
    open_thought = re.search(rf"({THOUGHT})\s*$", invited, re.IGNORECASE)   # a reply cut in it would be an answer
    if open_thought or not text.startswith(invited) or start < len(invited) or text[start:stop] != said:
        fail(f"{tokenizer.name_or_path}: its chat template invites the assistant to another beginning than it shows of "
             """the answer, a thought perhaps. If so: --chat-template-kwargs '{"enable_thinking": false}'.""")
    if not text[len(invited):start].strip():
        start = len(invited)                                    # a blank before the text belongs to the turn
    for after in ([], [{"role": "user", "content": mark}]):     # GLM's turn ends with the mark that opens the next one
        text = render(tokenizer, [*before, answer, *after]) if after else text
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, (begins, ends) = encoded["input_ids"], zip(*encoded["offset_mapping"])
        first = sum(e <= start for e in ends)
        end = max(first, sum(b < stop for b in begins)) if said else first
        close = next((t for t in range(end, len(ids)) if text[begins[t]:ends[t]].strip()), end)
        if close < len(ids) and tokenizer.convert_ids_to_tokens(ids[close]) in template_marks(tokenizer):
            return ids[:close + 1] if after else ids, first, end, close + 1
    return ids[:end], first, end, end


def scored_ids(tokenizer, chat):
    """(ids, n) for `score`: ids end with the last token of the last assistant turn's text, of which there are n; the
    end-of-turn token is not counted (the published run counted neither BOS nor EOS)."""
    ids, first, end, _ = last_turn(tokenizer, chat)
    return ids[:end], end - first


# ---------------------------------------------------------------- models

class Request(NamedTuple):
    chat: list                      # messages; ends with the user
    seed: int = 0                   # the randomness of this one reply
    group: Any = None               # requests of one group begin alike: what they share is computed once


class Reply(NamedTuple):
    text: str
    refused: str = None             # why there is no answer: a row to record, not an error
    cut: bool = False               # ran into max_tokens


# What begins a thought and what ends it: Qwen's, Magistral's, Command's, gpt-oss's and Gemma's.
THOUGHT = r"<(\w+:)?(think(ing)?|thought|reasoning)>|\[think\]|<\|start_thinking\|>|<\|channel\|?>"
ANSWER = r"</(?:\w+:)?(?:think(?:ing)?|thought|reasoning)>|\[/think\]|<\|end_thinking\|>|final<\|message\|>|<channel\|>"


def reply_of(text, cut):
    """A model's text -> Reply, without a thought before it. A thought that has no end is a refusal."""
    text = re.split(ANSWER, text, flags=re.IGNORECASE)[-1].strip()
    if re.match(THOUGHT, text, re.IGNORECASE):
        return Reply("", "a thought without an answer: raise --max-tokens, or switch thinking off")
    return Reply(text, cut=cut)


def start_processes():
    """Accelerate's view of this process: one of those that `accelerate launch` or torchrun has started, or alone."""
    from datetime import timedelta
    from accelerate import Accelerator, InitProcessGroupKwargs
    from torch.backends import mps
    return Accelerator(cpu=mps.is_available(),                  # Apple's GPUs have no float64
                       kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])


def open_model(spec, args, processes):
    """A model by its string: "openai:MODEL", "openai:MODEL@URL", a local folder or a hub name."""
    return ServerModel(spec, args) if spec.startswith("openai:") else LocalModel(spec, args, processes.device)


def served_model(spec):
    """"openai:MODEL@URL" -> (MODEL, URL); without a URL it is None."""
    name, *url = re.split("@(?=https?://)", spec.removeprefix("openai:"), maxsplit=1, flags=re.IGNORECASE)
    return name, url[0] if url else None


# A 429 that no waiting helps. ("billing" stands in OpenAI's and Gemini's limits of a minute, too.)
FOR_EVER = "insufficient.(quota|balance)|exceeded_current_quota|available credits"
GOOD_ENDS = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete")


class ServerModel:
    """A model behind an OpenAI-compatible server. OPENAI_API_KEY goes to OpenAI, or to OPENAI_BASE_URL; SERVER_API_KEY
    goes to a server that is named by its URL. A key is neither printed nor stored, though a server may repeat it. The
    client itself repeats a call after 429, 5xx, dropped connections and time-outs, 8 times."""
    repeated = []                       # one entry for each request that was sent again

    def __init__(self, spec, args):
        from openai import DefaultHttpxClient, OpenAI
        (self.name, url), self.spec, self.args = served_model(spec), spec, args
        if url and ("@" in url or "?" in url):
            fail(f"openai:{self.name}: a password or key in a URL would be shown. Set SERVER_API_KEY to it.")
        variable = "SERVER_API_KEY" if url else "OPENAI_API_KEY"
        self.key = os.environ.get(variable, "").strip()
        self.failure, self.pool = None, ThreadPoolExecutor(args.concurrency)   # one pool, of simulate.py's two threads
        self.client = OpenAI(base_url=url, timeout=args.timeout, max_retries=8, api_key=self.key or f"set {variable}",
                             http_client=DefaultHttpxClient(event_hooks={"response": [self._look]}))

    def _look(self, response):
        """Tells the client what a status does not: an error inside a 200 is one; without money no waiting helps."""
        response.read()
        if response.request.headers.get("x-stainless-retry-count", "0") != "0":
            self.repeated.append(response.request)
        if response.status_code == 429 and re.search(FOR_EVER, response.text):
            response.headers["x-should-retry"] = "false"
        if response.status_code == 200 and not re.search(r'"finish_reason": ?"', response.text) and re.search(
                r'"choices": ?null|"error": ?[{"]', response.text):                             # OpenRouter's
            code = re.search(r'"code": ?([45]\d\d)\b', response.text)
            response.status_code = int(code[1]) if code else 502

    def _mask(self, text):
        """A server's text without the key, and without halves of a character."""
        text = text.encode("utf-8", "replace").decode()
        return text.replace(self.key, "***") if self.key else text

    def _reply(self, answer):
        """A chat completion -> Reply. A filtered, declined, broken or empty answer is a refusal."""
        if not answer.choices:
            raise ValueError("no choices")
        message, end = answer.choices[0].message, answer.choices[0].finish_reason
        content = message.content if isinstance(message.content, list) else [{"text": message.content or ""}]
        text = "".join(part.get("text", "") for part in content)            # Mistral sends a thought as another part
        text, refusal = (self._mask(part.strip()) for part in (text, message.refusal or ""))
        cut = end in ("length", "max_tokens", "MAX_TOKENS", "model_length")
        if refusal or not cut and (end or "stop").lower() not in GOOD_ENDS:
            return Reply("", refusal or f"{end} (answer)")
        reply = reply_of(text, cut)
        return reply if reply.text or reply.refused else Reply("", f"empty (finish_reason {end})")

    def _ask(self, request, temperature, top_p, max_tokens):
        """The Reply; None after an error, which is kept in self.failure, and ends all that is not under way yet."""
        from openai import APIStatusError, OpenAIError
        chat = fold_system(request.chat) if self.args.system == "fold" else request.chat
        more = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": request.seed,
                **self.args.extra}                              # {"max_tokens": null} takes an argument away
        try:
            return None if self.failure else self._reply(self.client.chat.completions.create(
                model=self.name, messages=chat, extra_body={k: v for k, v in more.items() if v is not None}))
        except OpenAIError as error:
            status = error.status_code if isinstance(error, APIStatusError) else 503            # no answer at all
            why = f"{status} {error.response.text}" if isinstance(error, APIStatusError) else str(error)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            status, why = 400, f"sends no chat completion ({error})"
        hi = request._replace(chat=[{**message, "content": "Hi"} for message in request.chat])
        if status in (400, 403, 413, 422) and hi != request and self._ask(hi, temperature, top_p, max_tokens):
            return Reply("", f"{self._mask(why)[:200]} (prompt)")           # its own: the same with other words is none
        away = (status >= 500 or status in (408, 409, 429)) and not re.search(FOR_EVER, why)
        self.failure = self.failure or (ConnectionError if away else OSError)(
            f"{self.spec}: {self._mask(why)} (does its URL end in /v1? --extra, --system change what is sent)")

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
        """{key: Request} -> yields (key, Reply) as answers arrive, with at most --concurrency requests under way.
        `skip`: keys that need no reply; `share`: which of the others are this process's. After an error, what is under
        way, and paid for, still comes."""
        asked = {self.pool.submit(self._ask, requests[key], temperature, top_p, max_tokens): key
                 for key in [key for key in requests if key not in skip][share]}
        try:
            yield from ((asked[future], reply) for future in as_completed(asked) if (reply := future.result()))
        finally:
            for future in asked:
                future.cancel()
        if self.failure:
            raise self.failure


class LocalModel:
    """A Hugging Face causal language model with its tokenizer, on this process's device."""
    one_at_a_time = Lock()              # simulate.py's two threads share the device

    def __init__(self, path, args, device):
        self.name, self.batch_size = path, args.batch_size
        self.model, self.tokenizer = load_model(path, args.dtype), load_tokenizer(path, args)
        self.model.to(device).eval().requires_grad_(False)
        self.room = getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or np.inf     # tokens
        # What ends an answer: the checkpoint's tokens, the tokenizer's, and the template's end of turn.
        own, hi = self.model.generation_config.eos_token_id, [{"role": "user", "content": "Hi"}]
        ids, _, end, close = last_turn(self.tokenizer, [*hi, {**hi[0], "role": "assistant"}])
        self.stops = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *ids[end:close][-1:]}
        self.checked = False            # whether a cache gives what no cache gives

    def _left_pad(self, rows):
        """Lists of ids -> ids and mask, each (B, L), padded on the left: rows end in the last column. The mask hides
        the padding, so that any id will do for it."""
        import torch
        width = max(map(len, rows))
        ids = torch.tensor([[-1] * (width - len(row)) + row for row in rows], device=self.model.device).long()
        return ids.clamp(min=0), (ids >= 0).long()

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
        """{key: Request} -> yields (key, Reply), batch by batch; `skip`, `share` as in ServerModel. Batches are cut
        from all requests, so that a restart computes the same matrices. A prompt that is too long is refused."""
        prompts = {key: prompt_ids(self.tokenizer, request.chat) for key, request in requests.items()}
        order = sorted(prompts, key=lambda key: -len(prompts[key]))
        too_long = sum(len(ids) + max_tokens > self.room for ids in prompts.values())
        for key in order[:too_long][share]:
            yield key, Reply("", f"too long: {len(prompts[key])} + {max_tokens} tokens, room for {self.room}")
        batches = [order[i:i + self.batch_size] for i in range(too_long, len(order), self.batch_size)]
        for batch in [batch for batch in batches if not all(key in skip for key in batch)][share]:
            draws = [np.random.default_rng(requests[key].seed).random(max_tokens) for key in batch]
            groups = [requests[key].group or key for key in batch]
            with self.one_at_a_time:
                said = self._answer([prompts[key] for key in batch], groups, np.stack(draws), temperature, top_p)
            for key, tokens in zip(batch, said):
                cut = tokens[-1] not in self.stops
                text, bare = (self.tokenizer.decode(tokens[:None if cut else -1], skip_special_tokens=skip).strip()
                              for skip in (False, True))
                reply = reply_of(text, cut)     # where a special token marks a thought
                yield key, reply_of(bare, cut) if reply.text == text else reply

    def _prefill(self, prompts, groups):
        """B lists of ids -> (cache, ids (B, L), mask): ids are what the cache does not hold yet, at least one a row.
        What all prompts of a group begin with (a pair's samples: persona, task, elicitation) is computed once."""
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
        cache = DynamicCache(config=self.model.config)
        kinds = {type(layer) for layer in cache.layers}
        if getattr(self.model, "_is_stateful", False) or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            fail(f"{self.name}: padding would change the state of its layers (as Mamba's). Serve it: openai:MODEL@URL.")
        # Sharing puts padding inside a row. Rotary positions skip it; sliding windows, ALiBi and others count it.
        if kinds != {DynamicLayer} or not getattr(self.model.config.get_text_config(), "rope_parameters", None):
            groups = range(len(prompts))
        opening = {g: os.path.commonprefix([p[:-1] for p, of in zip(prompts, groups) if of == g]) for g in groups}
        ids, mask = self._left_pad(opening.values())                                        # (U, H): U openings
        self.model(ids, attention_mask=mask, position_ids=positions(mask), cache=cache, logits_to_keep=1)
        row_of = torch.tensor([list(opening).index(g) for g in groups], device=ids.device)
        cache.batch_select_indices(row_of)                                                  # from U rows to B
        ids, rest_mask = self._left_pad([p[len(opening[g]):] for p, g in zip(prompts, groups)])
        return cache, ids, torch.cat([mask[row_of], rest_mask], 1)

    def _answer(self, prompts, groups, draws, temperature, top_p):
        """B lists of ids -> B lists of at most T new tokens, drawn by draws (B, T). A row leaves when it ends."""
        import torch
        cache, ids, mask = self._prefill(prompts, groups)
        draws, said, rows = torch.tensor(draws, device=ids.device), [[] for _ in prompts], list(range(len(prompts)))
        for t in tqdm(range(draws.shape[1]), "tokens", delay=10, leave=False, disable=bool(ids.device.index)):
            logits = self.model(ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1]:],
                                cache=cache, logits_to_keep=1).logits[:, -1]                # (B, V)
            if not self.checked:            # every forward takes **kwargs: a renamed argument would be ignored
                plain = self.model(torch.tensor(prompts[-1:], device=ids.device)).logits[:, -1]
                off = ((logits[-1] - plain).std() / plain.std()).item()         # of the row with the most padding
                self.checked = off < (0.01 if plain.dtype == torch.float32 else 0.1) or fail(
                    f"{self.name}: a cache changes its logits by {off:.0%}. Take another version of transformers.")
            tokens = next_tokens(logits, draws[rows, t], temperature, top_p)                # (B,)
            for row, token in zip(rows, tokens.tolist()):
                said[row].append(token)
            going = [b for b, row in enumerate(rows) if said[row][-1] not in self.stops]
            if not going:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(torch.tensor(going, device=ids.device))
            rows, ids = [rows[b] for b in going], tokens[going, None]
            mask = torch.cat([mask[going], torch.ones_like(ids)], 1)
        return said

    def score(self, examples, skip=(), share=slice(None)):
        """{key: (ids, n)} -> yields (key, log-probability in nats): the sum over the last n tokens of ids.

        Sorted by length, in batches of at most 256 tokens times --batch-size. Left padding lets all scored tokens end
        in the last column, so that logits are computed for the last max(n) + 1 positions alone."""
        import torch
        order, batches = sorted(examples, key=lambda key: -len(examples[key][0])), []
        while order:
            longest = len(examples[order[0]][0])
            if longest > self.room:
                fail(f"{self.name}: {longest} tokens are to be scored, it has room for {self.room}. Use another model.")
            size = max(1, 256 * self.batch_size // longest)
            batches.append(order[:size])
            order = order[size:]
        for batch in [batch for batch in batches if not all(key in skip for key in batch)][share]:
            ids, mask = self._left_pad([examples[key][0] for key in batch])                           # (B, L)
            n = torch.tensor([examples[key][1] for key in batch], device=ids.device)
            keep = int(n.max())
            logits = self.model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
                                logits_to_keep=keep + 1).logits[:, -keep - 1:-1].float()              # (B, keep, V)
            # (B, keep): log p(g_t | context, g_<t); columns left of a row's own n tokens belong to its context
            golds = ids[:, -keep:]
            log_p = -torch.nn.functional.cross_entropy(logits.flatten(0, 1), golds.flatten(), reduction="none")
            own = torch.arange(keep, 0, -1, device=ids.device) <= n[:, None]
            yield from zip(batch, torch.where(own, log_p.view_as(golds).double(), 0.0).sum(1).tolist())


def positions(mask):
    """Position ids (B, L): `forward` does not derive them from the mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def next_tokens(logits, draws, temperature, top_p):
    """Tokens (B,) from logits (B, V): the likeliest at temperature 0, else from the nucleus, the smallest set of tokens
    that reaches top_p. Row b depends on its own draws[b], uniform on [0, 1), alone: inverse transform sampling."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = (logits.float() / temperature).softmax(-1).sort(descending=True, stable=True)
    p[p.cumsum(-1) - p >= top_p] = 0
    cdf = p.double().cumsum(-1)
    return token.gather(1, (cdf <= draws[:, None] * cdf[:, -1:]).sum(-1, keepdim=True))[:, 0]


def load(auto_class, path, **more):
    """`from_pretrained`, whose errors are of many kinds: no such folder, torn weights, sizes that do not fit."""
    from transformers.utils import logging
    (logging.disable_progress_bar if os.path.isdir(path) else logging.enable_progress_bar)()    # a bar of downloads
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **more)
    except Exception as error:
        fail(f"{path}: cannot be loaded ({' '.join(str(error).split())[:300]}). Give a model folder or a hub name.")


def load_model(path, dtype, **more):
    """A causal language model by folder or hub name, in `dtype` ("float32", "bfloat16")."""
    from transformers import AutoModelForCausalLM
    model, loaded = load(AutoModelForCausalLM, path, dtype=dtype, output_loading_info=True, **more)
    if loaded["missing_keys"]:                                  # transformers would draw them at random
        fail(f"{path}: weights are missing, such as {min(loaded['missing_keys'])}. The folder is incomplete.")
    return model


def load_tokenizer(path, args=None):
    """The tokenizer of a model folder; one without a chat template, or that loses a text's blanks, is refused."""
    from transformers import AutoTokenizer
    tokenizer = load(AutoTokenizer, path)
    tokenizer.chat_template_kwargs = args.chat_template_kwargs if hasattr(args, "chat_template_kwargs") else {}
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        fail(f"{path}: its tokenizer has no chat template, no eos token or no offsets. Use an instruction-tuned model.")
    read = tokenizer.decode(tokenizer("Which tea?", add_special_tokens=False)["input_ids"])
    if len(read.split()) != 2:
        fail(f"{path}: its tokenizer makes {read!r} of \"Which tea?\". Take another version of transformers.")
    return tokenizer


# ---------------------------------------------------------------- the two loops of the stages

def answer_all(rows, requests, spec, sampling, what, fields):
    """Asks the model `spec` for each row that is not there yet, and saves its reply.

    requests: {key: Request}; sampling: (temperature, top_p, max_tokens); what: for the bar; fields: a function from a
    key and its Reply to what the row says of it. Whether it was refused or cut is added."""
    replies = ()
    if not all(key in rows for key in requests):
        replies = open_model(spec, rows.args, rows.processes).generate(requests, *sampling, rows, rows.share)
    save_all(rows, requests, ((key, {**fields(key, reply), **{
        name: mark for name, mark in reply._asdict().items() if mark and name != "text"}})
        for key, reply in replies), what)


def score_all(rows, keys, chat_of, spec):
    """Saves `log_prob` (nats; None if not finite) and `tokens` of the last turn of chat_of(key), for keys not there."""
    if spec.startswith("openai:"):
        fail(f"--base {spec}: gives no log-probabilities of a gold response. Give a folder or a hub name.")
    scores = ()
    if not all(key in rows for key in keys):
        model = open_model(spec, rows.args, rows.processes)
        examples = {key: scored_ids(model.tokenizer, chat_of(key)) for key in keys}
        scores = model.score(examples, rows, rows.share)
    save_all(rows, keys, ((key, {"tokens": examples[key][1], "log_prob": round(p, 6) if np.isfinite(p) else None})
                          for key, p in scores), "gold log-probabilities")


def save_all(rows, keys, results, what):
    """Saves results, (key, fields of the row), as they come, under a progress bar."""
    left = len([key for key in keys if key not in rows][rows.share])
    for key, fields in tqdm(results, what, left, unit="", disable=not (left and rows.processes.is_main_process)):
        if key not in rows:                                     # it may be there: its batch was half done
            rows.add({**dict(zip(rows.key, key)), **fields})
    rows.finish()


def say(processes, *lines):
    """Prints on the main process alone. A line is a text, or a turn of a conversation."""
    if processes.is_main_process:
        for line in lines:
            print(printable(line if isinstance(line, str) else f"{line['role']}: {line['content']}"), flush=True)


# ---------------------------------------------------------------- command line

def number(kind, low, high=2 ** 32 - 1):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        if low <= kind(text) <= high:
            return kind(text)
        raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
    parse.__name__ = kind.__name__                              # for argparse's message
    return parse


natural, fraction, amount, nucleus = number(int, 1), number(float, 0, 1), number(float, 0), number(float, 0.01, 1)


def json_object(text):
    """An argparse type: {"name": value, ...}. Settings are stored: no place for a key or a password."""
    if re.search(r'api.?key|(?<!os_)token"\s*:\s*"|authorization|secret|passw|credential|private.?key', text, re.I):
        raise argparse.ArgumentTypeError("keys belong in OPENAI_API_KEY, or SERVER_API_KEY for a server by URL")
    return {**json.loads(text)}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def stage_parser(manual, output, limit="work on a seeded sample of N pairs", prompts=PROMPTS):
    """The parser of a stage, with the flags of all stages. manual: its docstring; prompts: None where it reads none."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, type=os.path.normpath, metavar="PATH", help=output)
    parser.add_argument("--seed", type=number(int, 0), default=42, help="of all randomness")
    parser.add_argument("--limit", type=natural, metavar="N", help=limit)
    parser.add_argument("--chat-template-kwargs", type=json_object, default={}, metavar="JSON",
                        help='for local models\' templates: {"enable_thinking": false}')
    if prompts:
        parser.add_argument("--prompts", default=prompts, metavar="FOLDER", help="of other texts for some of prompts/")
    return parser


def add_data_flags(parser):
    parser.add_argument("--tasks", default="data/tasks.jsonl", help="tasks (JSONL)")
    parser.add_argument("--tasks-per-split", type=natural, metavar="N", help="the first N tasks of each split alone")
    parser.add_argument("--personas", default="runs/personas.jsonl", help="personas (JSONL)")


def add_model_flags(parser, batch_size):
    group = parser.add_argument_group("local models (Hugging Face)")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    group.add_argument("--batch-size", type=natural, default=batch_size, help="texts generated side by side")
    group = parser.add_argument_group("servers (openai:MODEL, with OPENAI_API_KEY; openai:MODEL@URL, SERVER_API_KEY)")
    group.add_argument("--system", choices=("role", "fold"), default="role",
                       help="send a system text as its own message, or fold it into the first user message")
    group.add_argument("--concurrency", type=natural, default=64, help="requests under way at a time, of each process")
    group.add_argument("--timeout", type=natural, default=120, help="seconds before a request is repeated")
    group.add_argument("--extra", type=json_object, default={}, metavar="JSON",
                       help='more arguments, or (null) fewer: {"max_tokens": null, "max_completion_tokens": 900}')
    group.add_argument("--max-refused", type=fraction, default=0.05, metavar="SHARE",
                       help="of answers refused, empty, or (a judge's) unreadable; above it the stage ends with 1")
