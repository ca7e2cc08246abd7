"""Plumbing that the six stages share: rows on disk, chats as token ids, and the models. No algorithm.

    rows      read_tasks, read_personas, read_gold, read_conversations, all_pairs, Rows
    chats     response_form, prompt_ids, training_examples, scored_ids
    models    "mistralai/Mistral-7B-Instruct-v0.2"     a folder or hub name: Hugging Face, on this machine
              "openai:gpt-5@https://my.server/v1"      any OpenAI-compatible server ("@URL" is optional)
              "human"                                  you, at the terminal
    stages    answer_all asks a model, save_blocks saves conversations, score_all asks Q_BASE for log-probabilities

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
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from glob import escape, glob
from pathlib import Path
from threading import Lock
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from tqdm import tqdm


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
    except OSError as error:                                    # a server's failure is one, too: ConnectionError
        what = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        fail(f"{' '.join(what.split())[:500]}. Correct that (a missing file is written by an earlier stage) and start "
             "again with the same flags: what is done is kept.", status=75 if type(error) is ConnectionError else 2)
    except KeyboardInterrupt:
        tqdm.write("interrupted. What is done is kept: start again with the same flags.", file=sys.stderr)
        os._exit(130)                                           # Python would wait for all requests that are under way


def printable(text):
    """A text without what would steer a terminal: models and servers wrote it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]", "?", text)


def seed_for(*parts):
    """A number below 2**31 that depends on its parts alone: the same in any order, on any process, after a restart."""
    return int(hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8], 16) >> 1


# ---------------------------------------------------------------- rows: one JSON object a line

PAIR = {"task_id": str, "persona_id": str}                      # the fields that tell rows apart, and their values
SAMPLE = {**PAIR, "sample": int}
pair_of, key_of = operator.itemgetter(*PAIR), operator.itemgetter(*SAMPLE)


def read_rows(path, key, fields):
    """Yields the rows of a JSONL file, checked; the first bad line ends the program.

    key: {name: type} of the fields that tell rows apart; fields: {name: type} of the other fields. A row with
    `refused` (a model declined) needs its key alone; the caller leaves it out.
    """
    seen = {}
    if unfinished(path):
        fail(f"{path}: not finished. Start the stage that writes it again: it goes on.")
    for number, line in enumerate(open(path, "rb"), 1):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False, allow_nan=False).encode()          # no NaN, no half of a character
            for name, kind in (key if "refused" in row else {**key, **fields}).items():
                if not isinstance(row[name], kind):
                    wanted = getattr(kind, "__name__", kind)
                    raise ValueError(f"field {name!r} is {json.dumps(row[name])[:40]}, not {wanted}")
                if name == "conversation" and [(turn["role"], type(turn["content"])) for turn in row[name]] != [
                        ("assistant", str), ("user", str)] * max(1, len(row[name]) // 2):
                    raise ValueError('a conversation is a list of {"role": "assistant" or "user", "content": text}, '
                                     "question and answer in turn")
            identity = tuple(row[name] for name in key)
            if identity in seen:
                raise ValueError(f"the same {', '.join(key)} as on line {seen[identity]}")
        except KeyError as error:
            fail(f"{path}, line {number}: no field {error}. docs/data.md lists the fields of each file.")
        except (ValueError, TypeError, RecursionError) as error:
            fail(f"{path}, line {number}: {error}. Each line is a JSON object; docs/data.md lists its fields.")
        seen[identity] = number
        yield row


def read_prompt(name):
    """One of the paper's prompts, word for word: prompts/NAME.txt. The stages fill in {task}, {persona} ..."""
    return (Path(__file__).parent / f"prompts/{name}.txt").read_text(encoding="utf-8").removesuffix("\n")


def read_text(path):
    """A file's text, without blanks around it."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        fail(f"{path}: {error}. Save it as UTF-8.")


def read_tasks(path):
    """{task_id: row} with `task_id`, `split`, `task`."""
    return {row["task_id"]: row for row in read_rows(path, {"task_id": str}, {"split": str, "task": str})}


def read_personas(path):
    """{persona_id: row} with `persona_id`, `split`, `name`, `persona`."""
    fields = {"split": str, "name": str, "persona": str}
    return {row["persona_id"]: row for row in read_rows(path, {"persona_id": str}, fields)}


def read_gold(path, pairs=()):
    """{(task_id, persona_id): gold response}; None where it was refused, or is empty. All of `pairs` must be there."""
    golds = {pair_of(row): None if "refused" in row else row["gold"].strip() or None
             for row in read_rows(path, PAIR, {"gold": str})}
    for pair in pairs:
        if pair not in golds:
            fail(f"{path}: no gold response for {pair}. Run gold.py on that split, with simulate.py's --limit and --seed.")
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
    """The (task_id, persona_id) of a split: the full product, or a seeded sample of `limit` of them."""
    pairs = [(i, j) for i in tasks for j in personas if tasks[i]["split"] == personas[j]["split"] == split]
    return sample_pairs(pairs, limit, seed) if pairs else fail(
        f"--split {split}: no task has this split, or no persona. Name another one.")


def sample_pairs(pairs, limit, seed):
    """Sorted (task_id, persona_id): all, or a seeded sample of `limit`, in which smaller samples are contained."""
    return sorted(sorted(set(pairs), key=lambda pair: (seed_for(seed, "limit", *pair), pair))[:limit])


# ---------------------------------------------------------------- settings: what an output was made with

# Flags that change no row, but where it goes, how many there are, how fast they come and what they may cost. All other
# flags are settings; so is a flag that a fork adds.
NEUTRAL = {"output", "results", "limit", "metrics", "batch_size", "concurrency", "timeout", "max_refused", "prices",
           "dry_run"}


def fingerprint(value):
    """A flag's value as a setting. A file or model folder: its name and a hash of its content, so that a model that was
    trained anew is another one. A served model: without its URL; if it is named by a folder, that folder's content."""
    if isinstance(value, list):
        return [fingerprint(part) for part in value] if len(value) > 1 else fingerprint(*value)
    if isinstance(value, str) and value.startswith("openai:"):
        return "openai:" + fingerprint(served_model(value)[0])
    if not isinstance(value, str) or not Path(value).exists():
        return value
    files = [Path(value)] if Path(value).is_file() else sorted(filter(Path.is_file, Path(value).iterdir()))
    content = hashlib.sha256()
    for file in [file for file in files if file.name != "README.md"]:       # weights by size: log.jsonl tells the rest
        weights = file.suffix in (".safetensors", ".bin")
        content.update(file.name.encode() + (str(file.stat().st_size).encode() if weights else file.read_bytes()))
    return f"{Path(value).resolve().name} ({content.hexdigest()[:12]})"


def settings_of(args, **more):
    """{name: value} of all that decides a stage's rows: its flags, its source, and `more`, such as prompts."""
    flags = {name: value if name in ("split", "variant", "task") else fingerprint(value)     # these name no file
             for name, value in vars(args).items() if name not in NEUTRAL}
    return json.loads(json.dumps({"source": [fingerprint(sys.argv[0]), fingerprint(__file__)], **flags, **more}))


def read_settings(output):
    """The settings with which a stage wrote an output; {} for files from elsewhere."""
    path = Path(f"{output}.settings.json")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (ValueError, TypeError):
        fail(f"{path}: not as a stage writes it. Remove it, and what it belongs to.")


def take_output(output, settings):
    """Refuses what was made with other settings, or by somebody else; keeps other programs out of OUTPUT as long as the
    returned file is open. OUTPUT.settings.json tells the settings."""
    path, there = Path(f"{output}.settings.json"), Path(output).exists() or unfinished(output)
    remove = f"Give another --output, or delete {output}, its .part-* and {path.name}."
    if there and not path.exists():
        fail(f"{output}: not written by this stage. {remove}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{output}: another run is writing it. Wait for that, or give another --output.")
    if not there:
        lock.truncate(0)
        print(json.dumps(settings, indent=1, ensure_ascii=False), file=lock, flush=True)
    old = read_settings(output)
    differ = [f"{name}: {str(old.get(name))[:60]!r} there, {str(settings.get(name))[:60]!r} now"
              for name in sorted({**old, **settings}) if old.get(name) != settings.get(name) and name != "source"]
    if differ:
        fail(f"{output}: made with other settings: {'; '.join(differ)}. {remove}")
    if old["source"] != settings["source"]:
        tqdm.write(f"warning: {output} was made by another version of {settings['source'][0].split()[0]} or common.py. "
                   f"If that matters: {remove}", file=sys.stderr)
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

    key: the names that tell rows apart; more: settings beside the flags. No dry run writes anything.
    """

    def __init__(self, args, path, key, processes, **more):
        self.args, self.path, self.key, self.processes = args, path, key, processes
        self.part = f"{path}.part-{uuid4().hex}"
        self.share = slice(processes.process_index, None, processes.num_processes)      # of the work: this process's
        if processes.is_main_process and not args.dry_run:
            self.lock = take_output(path, settings_of(args, **more))
        processes.wait_for_everyone()
        self._read()
        processes.wait_for_everyone()                           # all have read before one of them adds

    def _read(self):
        self.clear()
        for file in filter(os.path.exists, (self.path, *unfinished(self.path))):
            for number, line in enumerate(open(file, "rb"), 1):
                try:
                    row = json.loads(line)
                    self[tuple(row[name] for name in self.key)] = row
                except (ValueError, KeyError, TypeError):
                    if line.endswith(b"\n"):                    # else a kill has torn it
                        fail(f"{file}, line {number}: not as this stage writes it. Remove that line.")

    def add(self, row):
        """Saves a row at once."""
        with open(self.part, "a", encoding="utf-8") as part:
            print(json.dumps(row, ensure_ascii=False), file=part)
        self[tuple(row[name] for name in self.key)] = row
        if len(self) % 100 == 0:                                # before thousands more are paid for
            self.limit_refusals()

    def finish(self):
        """Joins the parts of all processes into PATH, which is there then, if only as an empty file."""
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            self._read()
            write_whole(self.path, "".join(json.dumps(self[k], ensure_ascii=False) + "\n" for k in sorted(self)))
            for part in unfinished(self.path):
                os.remove(part)
        self.processes.wait_for_everyone()
        self._read()
        self.limit_refusals()

    def limit_refusals(self):
        """Ends the program with status 1 where more than --max-refused of the rows are refusals."""
        refused = [row["refused"] for row in self.values() if "refused" in row]
        if len(refused) > self.args.max_refused * len(self):
            fail(f"{self.path}: {len(refused)} of {len(self)} were refused (the last: {refused[-1][:200]}), more than "
                 f"--max-refused {self.args.max_refused:g}. Try another model, --extra or --max-tokens, with another "
                 '--output. To ask again, remove the lines with "refused"; to go on, raise the flag.', status=1)

    def summary(self):
        """ "PATH: 500 rows, 3 refused, 2 cut at --max-tokens": the beginning of a stage's last line."""
        refused, cut = (sum(mark in row for row in self.values()) for mark in ("refused", "cut"))
        return f"{self.path}: {len(self)} rows, {refused} refused, {cut} cut at --max-tokens"


# ---------------------------------------------------------------- chats: lists of messages until the tokenizer

def response_form(name, task, conversation, persona=None, prompt=None):
    """Figure 17: the conversation without the elicitation prompt, the task repeated at the end of the last answer, to
    ask for a response and not for another question. `select`, `train` and `evaluate` see a conversation in this form.

    No conversation: the negative control. A persona in the first turn: the positive control. A prompt stands first.
    """
    about = f" Here is some information about me:\n\n{persona}" if persona is not None else ""
    before = f"{prompt}\n\n" if prompt else ""
    chat = [{"role": "user", "content": f"{before}My name is {name}.{about}\n\n{task}"}, *map(dict, conversation)]
    if conversation:
        chat[-1]["content"] += f"\n\n{task}"
    return chat


@lru_cache
def knows_system(tokenizer):
    """Whether a chat template has a place for a system text. Gemma's and Mistral's refuse it, others drop it."""
    try:
        chat = [{"role": "system", "content": "SYSTEM TEXT"}, {"role": "user", "content": "Hi"}]
        return "SYSTEM TEXT" in tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception:               # jinja2's errors, of many kinds
        return False


def fold_system(chat):
    """Puts a system text into the first user message, for models that know no system role."""
    if chat[0]["role"] != "system":
        return chat
    return [{"role": "user", "content": chat[0]["content"] + "\n\n" + chat[1]["content"]}, *chat[2:]]


@lru_cache
def special_tokens(tokenizer):
    """{token: id}: those that the tokenizer names, and those that only its file marks as special: some ends of turn."""
    marked = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**marked, **dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))}


def plain(tokenizer, chat):
    """A chat for a template: each special token that a text spells is broken by a blank ("</s>" becomes "< /s>"), or a
    text could open and close turns. The assistant's texts are stripped, as by most templates."""
    spelled = "|".join(map(re.escape, special_tokens(tokenizer)))
    chat = [{**message, "content": re.sub(spelled, lambda mark: f"{mark[0][0]} {mark[0][1:]}", message["content"])}
            for message in (chat if knows_system(tokenizer) else fold_system(chat))]
    return [{**m, "content": m["content"].strip()} if m["role"] == "assistant" else m for m in chat]


def render(tokenizer, chat, ask=False):
    """A chat as its template writes it; `ask` ends it with the invitation to the assistant."""
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)
    except Exception as error:      # templates raise jinja2's errors of many kinds
        fail(f"{tokenizer.name_or_path}: its chat template cannot render a conversation ({error}). Use another model.")


def encode(tokenizer, text):
    """(ids, [(first, end) characters of each]) of a rendered chat, in which the template has written BOS."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"][:2] == [tokenizer.bos_token_id] * 2:
        fail(f"{tokenizer.name_or_path}: BOS stands twice at the beginning of a chat. Correct its chat template.")
    return encoded["input_ids"], encoded["offset_mapping"]


def prompt_ids(tokenizer, chat):
    """The ids of a chat that ends with the user, ready for the assistant to go on."""
    return encode(tokenizer, render(tokenizer, plain(tokenizer, chat), ask=True))[0]


def assistant_turns(tokenizer, chat, last_only=False):
    """The ids of a whole chat and, for each assistant turn (or the last alone), its range of tokens: (first, end of its
    text, end with its end-of-turn token).

    Found by characters: tokenizers merge across the border of a turn. None where a template shows a turn otherwise in
    the whole chat than when it was to be said (thinking models drop or add thoughts); of the last turn an error.
    """
    chat, mark, turns = plain(tokenizer, chat), f"({seed_for(chat)})", []       # a text that no chat has
    text = render(tokenizer, chat)
    ids, spans = encode(tokenizer, text)
    begins, ends = zip(*spans)
    for i in [i for i, message in enumerate(chat) if message["role"] == "assistant"][-1 if last_only else 0:]:
        said, marked = chat[i]["content"], [*chat[:i], {"role": "assistant", "content": mark}]
        before = render(tokenizer, chat[:i], ask=True)
        start = render(tokenizer, [*marked, *chat[i + 1:]]).find(mark)      # where the text begins, after a thought
        stop = start + len(said)
        if not text.startswith(before) or start < len(before) or text[start:stop] != said:
            return None if not last_only else fail(
                f"{tokenizer.name_or_path}: its chat template invites the assistant to another beginning than it shows "
                "of the answer, a thought perhaps. Use a template without one.")
        if not text[len(before):start].strip():
            start = len(before)                                 # a blank before the text belongs to the turn
        first = bisect_right(ends, start)
        end = max(first, bisect_left(begins, stop)) if said else first
        close = next((t for t in range(end, len(ids)) if text[slice(*spans[t])].strip()), end)
        has_end = render(tokenizer, marked).partition(mark)[2].strip()      # some templates have no end of turn
        ended = has_end and close < len(ids) and ids[close] in special_tokens(tokenizer).values()
        turns.append((first, end, close + 1 if ended else end))
    return ids, turns


def training_examples(tokenizer, chat):
    """[(ids, labels)] of a chat: one example, in which labels are the ids on every assistant turn with its end-of-turn
    token, and -100 elsewhere. Where a template rewrites what came before, an example for each turn, as it was said."""
    whole = assistant_turns(tokenizer, chat)
    examples = [whole] if whole else [assistant_turns(tokenizer, chat[:i + 1], last_only=True)
                                      for i, message in enumerate(chat) if message["role"] == "assistant"]
    return [(ids, [token if any(first <= t < close for first, _, close in turns) else -100
                   for t, token in enumerate(ids)]) for ids, turns in examples]


def scored_ids(tokenizer, chat):
    """(ids, n) for `score`: ids end with the last token of the last assistant turn's text, of which there are n; the
    end-of-turn token is not counted (the published run counted neither BOS nor EOS)."""
    ids, ((first, end, _),) = assistant_turns(tokenizer, chat, last_only=True)
    return ids[:end], end - first


# ---------------------------------------------------------------- models

class Request(NamedTuple):
    chat: list                      # messages; ends with the user
    seed: int = 0                   # the randomness of this one reply


class Reply(NamedTuple):
    text: str
    refused: str = None             # why there is no answer: a row to record, not an error
    cut: bool = False               # ran into max_tokens


def start_processes():
    """Accelerate's view of this process: one of those that `accelerate launch` or torchrun has started, or alone."""
    from datetime import timedelta
    from accelerate import Accelerator, InitProcessGroupKwargs
    return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])


def open_model(spec, args, processes):
    """A model by its string: "openai:MODEL", "openai:MODEL@URL", "human", a local folder or a hub name."""
    if spec == "human":
        from human import Human
        return Human(processes)
    return ServerModel(spec, args) if spec.startswith("openai:") else LocalModel(spec, args, processes.device)


def read_completion(answer):
    """A chat completion -> Reply. A filtered, declined or empty answer is a refusal; what is no completion raises."""
    if not answer.choices:
        raise ValueError(getattr(answer, "error", None) or "no choices")
    choice = answer.choices[0]
    text, refusal = ((said or "").strip().encode("utf-8", "replace").decode()               # no half of a character
                     for said in (choice.message.content, choice.message.refusal))
    refused = refusal or ("content_filter (answer)" if choice.finish_reason == "content_filter" else
                          f"empty (finish_reason {choice.finish_reason})" if not text else None)
    return Reply("" if refused else text, refused, choice.finish_reason == "length" and not refused)


def served_model(spec):
    """"openai:MODEL@URL" -> (MODEL, URL); without a URL it is None."""
    name, *url = re.split("@(?=https?://)", spec.removeprefix("openai:"), maxsplit=1, flags=re.IGNORECASE)
    return name, url[0] if url else None


class ServerModel:
    """A model behind an OpenAI-compatible server. OPENAI_API_KEY goes to OpenAI, or to OPENAI_BASE_URL; SERVER_API_KEY
    goes to a server that is named by its URL. A key is neither printed nor stored, though a server may repeat it. The
    client itself repeats a call after 429, 5xx, dropped connections and time-outs, 8 times."""

    def __init__(self, spec, args):
        from openai import OpenAI
        (self.name, url), self.spec, self.args = served_model(spec), spec, args
        if url and ("@" in url or "?" in url):
            fail(f"openai:{self.name}: a password or key in a URL would be shown. Set SERVER_API_KEY to it.")
        variable = "SERVER_API_KEY" if url else "OPENAI_API_KEY"
        self.key = os.environ.get(variable, "").strip()
        no_proxy = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        os.environ["no_proxy"] = f"{no_proxy},127.0.0.1,localhost"          # loopback does not go through a proxy
        self.pool = ThreadPoolExecutor(args.concurrency)        # one, though simulate.py has two threads that ask
        self.client = OpenAI(base_url=url, timeout=args.timeout, max_retries=8, api_key=self.key or f"set {variable}")

    def _mask(self, text):
        return text.replace(self.key, "***") if text and self.key else text

    def _ask(self, request, temperature, top_p, max_tokens):
        from openai import APIConnectionError, OpenAIError
        chat = fold_system(request.chat) if self.args.system == "fold" else request.chat
        more = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": request.seed,
                **self.args.extra}                              # {"max_tokens": null} takes an argument away
        try:
            reply = read_completion(self.client.chat.completions.create(
                model=self.name, messages=chat, extra_body={k: v for k, v in more.items() if v is not None}))
            return reply._replace(text=self._mask(reply.text), refused=self._mask(reply.refused))
        except OpenAIError as error:
            if getattr(error, "code", None) in ("content_filter", "invalid_prompt"):       # Azure's and OpenAI's
                return Reply("", f"{error.code} (prompt)")
            status = getattr(error, "status_code", 0)
            away = isinstance(error, APIConnectionError) or status == 429 or status >= 500
            said = f"{status} {error.response.text}" if status else error
            raise (ConnectionError if away else OSError)(self._mask(
                f"{self.spec}: {said} (--extra changes a request's arguments, --system fold its system text; lower "
                "--concurrency if there are too many)"))
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise OSError(self._mask(f"{self.spec}: sends what is no chat completion ({error}); is the URL right?"))

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
        """{key: Request} -> yields (key, Reply) as answers arrive, with at most --concurrency requests under way.
        `skip`: keys that need no reply; `share`: which of the others are this process's. After an error, what is under
        way, and paid for, still comes."""
        asked, failures = {}, []

        def ask(request):
            try:
                return None if failures else self._ask(request, temperature, top_p, max_tokens)
            except OSError as error:
                failures.append(error)

        try:
            asked = {self.pool.submit(ask, requests[key]): key
                     for key in [key for key in requests if key not in skip][share]}
            for future in as_completed(asked):
                if future.result():
                    yield asked[future], future.result()
        finally:
            for future in asked:
                future.cancel()
        if failures:
            raise failures[0]


ONE_DEVICE = Lock()                 # simulate.py's two threads share it


class LocalModel:
    """A Hugging Face causal language model with its tokenizer, on this process's device."""

    def __init__(self, path, args, device):
        self.name, self.batch_size = path, args.batch_size
        self.model, self.tokenizer = load_model(path, args.dtype), load_tokenizer(path)
        self.model.to(device).eval().requires_grad_(False)
        self.room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)      # tokens
        # What ends an answer: the checkpoint's tokens, the tokenizer's, and the template's end of turn.
        own, hi = self.model.generation_config.eos_token_id, [{"role": "user", "content": "Hi"}]
        ids, ((_, end, close),) = assistant_turns(self.tokenizer, [*hi, {**hi[0], "role": "assistant"}], last_only=True)
        self.stops = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own]), *ids[end:close][-1:]}

    def _left_pad(self, rows):
        """Lists of ids -> ids and mask, each (B, L), padded on the left: rows end in the last column. The mask hides
        the padding, so that any id will do for it."""
        import torch
        from torch.nn.utils.rnn import pad_sequence
        rows = [torch.tensor(row, dtype=torch.long) for row in rows]
        return [pad_sequence(part, batch_first=True, padding_side="left").to(self.model.device)
                for part in (rows, [torch.ones_like(row) for row in rows])]

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=slice(None)):
        """{key: Request} -> yields (key, Reply), batch by batch; `skip`, `share` as in ServerModel. Batches are cut
        from all requests, so that a restart computes the same matrices. A prompt that is too long is refused."""
        import torch
        prompts = {key: prompt_ids(self.tokenizer, request.chat) for key, request in requests.items()}
        opening = {key: request.chat[0]["content"] for key, request in requests.items()}       # the same stay together
        order = sorted(prompts, key=lambda key: (-len(opening[key]), opening[key], -len(prompts[key])))
        batches = [order[i:i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        for batch in [batch for batch in batches if not all(key in skip for key in batch)][share]:
            fitting = [key for key in batch if not self.room or len(prompts[key]) + max_tokens <= self.room]
            for key in set(batch) - set(fitting):
                yield key, Reply("", f"too long: {len(prompts[key])} + {max_tokens} tokens, room for {self.room}")
            if fitting:
                draws = np.stack([np.random.default_rng(requests[key].seed).random(max_tokens) for key in fitting])
                with ONE_DEVICE:
                    answers = self._answer([prompts[key] for key in fitting], [opening[key] for key in fitting],
                                           torch.from_numpy(draws).to(self.model.device), temperature, top_p)
                for key, tokens in zip(fitting, answers):
                    cut = tokens[-1] not in self.stops
                    text = self.tokenizer.decode(tokens[:None if cut else -1], skip_special_tokens=True)
                    yield key, Reply(text.strip(), cut=cut)

    def _prefill(self, prompts, openings):
        """B lists of ids -> (cache, ids (B, L), mask): ids are what the cache does not hold yet, at least one a row.
        What prompts with one opening share (a pair's samples: elicitation prompt and task) is computed once."""
        import torch
        from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
        cache = DynamicCache(config=self.model.config)
        kinds = {type(layer) for layer in cache.layers}
        if getattr(self.model, "_is_stateful", False) or not kinds <= {DynamicLayer, DynamicSlidingWindowLayer}:
            fail(f"{self.name}: padding would change the state of its layers (Mamba, linear attention). Serve it: "
                 "openai:MODEL@URL.")
        # Sharing puts padding inside a row, between opening and rest. Rotary positions skip it; a sliding window, ALiBi
        # and learned local attention count its columns.
        if kinds != {DynamicLayer} or not getattr(self.model.config.get_text_config(), "rope_parameters", None):
            openings = range(len(prompts))
        shared = {o: os.path.commonprefix([prompt[:-1] for prompt, other in zip(prompts, openings) if other == o])
                 for o in openings}
        ids, mask = self._left_pad(list(shared.values()))                                    # (U, H): U openings
        self.model(ids, attention_mask=mask, position_ids=positions(mask), past_key_values=cache, logits_to_keep=1)
        opening_of = torch.tensor([list(shared).index(o) for o in openings], device=ids.device)
        cache.batch_select_indices(opening_of)                                              # from U rows to B
        ids, rest_mask = self._left_pad([p[len(shared[o]):] for p, o in zip(prompts, openings)])
        return cache, ids, torch.cat([mask[opening_of], rest_mask], 1)

    def _answer(self, prompts, openings, draws, temperature, top_p):
        """B lists of ids -> B lists of at most T new tokens, drawn by draws (B, T). A row leaves when it ends."""
        import torch
        import torch.nn.functional as F
        cache, ids, mask = self._prefill(prompts, openings)
        said, rows = [[] for _ in prompts], list(range(len(prompts)))
        for t in range(draws.shape[1]):                                                     # rows: those that go on
            logits = self.model(ids, attention_mask=mask, position_ids=positions(mask)[:, -ids.shape[1]:],
                                past_key_values=cache, logits_to_keep=1).logits[:, -1]      # (B, V)
            tokens = next_tokens(logits, draws[rows, t], temperature, top_p)                # (B,)
            for row, token in zip(rows, tokens.tolist()):
                said[row].append(token)
            going = [b for b, row in enumerate(rows) if said[row][-1] not in self.stops]
            if not going:
                break
            if len(going) < len(rows):
                cache.batch_select_indices(torch.tensor(going, device=ids.device))
            rows, ids, mask = [rows[b] for b in going], tokens[going, None], F.pad(mask[going], (0, 1), value=1)
        return said

    def score(self, examples, skip=(), share=slice(None)):
        """{key: (ids, n)} -> yields (key, log-probability in nats): the sum over the last n tokens of ids.

        Sorted by length, in batches of at most 256 tokens times --batch-size. Left padding lets all scored tokens end
        in the last column, so that logits are computed for the last max(n) + 1 positions alone.
        """
        import torch
        import torch.nn.functional as F
        order, batches = sorted(examples, key=lambda key: -len(examples[key][0])), []
        while order:
            longest = len(examples[order[0]][0])
            if self.room and longest > self.room:
                fail(f"{self.name}: {longest} tokens are to be scored, but the model has room for {self.room}. Use "
                     "shorter texts, or a model with a longer context.")
            size = max(1, 256 * self.batch_size // longest)
            batches.append(order[:size])
            order = order[size:]
        for batch in [batch for batch in batches if not all(key in skip for key in batch)][share]:
            ids, mask = self._left_pad([examples[key][0] for key in batch])                           # (B, L)
            n = torch.tensor([examples[key][1] for key in batch], device=ids.device)
            keep = int(n.max())
            logits = self.model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False,
                                logits_to_keep=keep + 1).logits[:, -keep - 1:-1].float()              # (B, keep, V)
            # log p(g_t | context, g_<t); columns left of a row's own n tokens belong to its context
            log_p = -F.cross_entropy(logits.transpose(1, 2), ids[:, -keep:], reduction="none")        # (B, keep)
            own = torch.arange(keep, 0, -1, device=ids.device) <= n[:, None]
            yield from zip(batch, torch.where(own, log_p.double(), 0.0).sum(1).tolist())


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
    try:
        return auto_class.from_pretrained(path, trust_remote_code=False, **more)
    except Exception as error:
        fail(f"{path}: cannot be loaded ({' '.join(str(error).split())[:300]}). Give a model folder or a hub name.")


def load_model(path, dtype):
    """A causal language model by folder or hub name, in `dtype` ("float32", "bfloat16")."""
    import torch
    from transformers import AutoModelForCausalLM
    model, loaded = load(AutoModelForCausalLM, path, dtype=getattr(torch, dtype), output_loading_info=True)
    if loaded["missing_keys"]:                                  # transformers would draw them at random
        fail(f"{path}: weights are missing, such as {min(loaded['missing_keys'])}. The folder is incomplete.")
    return model


def load_tokenizer(path):
    """The tokenizer of a model folder; one without a chat template is refused."""
    from transformers import AutoTokenizer
    tokenizer = load(AutoTokenizer, path)
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None or not tokenizer.is_fast:
        fail(f"{path}: its tokenizer has no chat template, no eos token or no offsets. Use an instruction-tuned model.")
    return tokenizer


# ---------------------------------------------------------------- the two loops of the stages

def answer_all(rows, requests, spec, sampling, what, fields):
    """Asks the model `spec` for each row that is not there yet, and saves its reply.

    requests: {key: Request}; sampling: (temperature, top_p, max_tokens); what: for the bar; fields: a function from a
    key and its Reply to what the row says of it. Whether it was refused or cut is added.
    """
    todo, replies = [request.chat for key, request in requests.items() if key not in rows], ()
    announce(rows, (spec, todo, sampling[-1]))
    if todo:
        replies = open_model(spec, rows.args, rows.processes).generate(requests, *sampling, rows, rows.share)
    save_all(rows, requests, ((key, {**fields(key, reply), **{
        name: mark for name, mark in reply._asdict().items() if mark and name != "text"}})
        for key, reply in replies), what)


def score_all(rows, keys, chat_of, spec):
    """Saves `log_prob` (nats; None if not finite) and `tokens` of the last turn of chat_of(key), for keys not there."""
    if spec == "human" or spec.startswith("openai:"):
        fail(f"--base {spec}: gives no log-probabilities of a gold response. Give a folder or a hub name.")
    scores = ()
    if not all(key in rows for key in keys):
        model = open_model(spec, rows.args, rows.processes)
        examples = {key: scored_ids(model.tokenizer, chat_of(key)) for key in keys}
        scores = model.score(examples, rows, rows.share)
    save_all(rows, keys, ((key, {"tokens": examples[key][1], "log_prob": round(p, 6) if np.isfinite(p) else None})
                          for key, p in scores), "gold log-probabilities")


def save_blocks(rows, keys, blocks, work, what):
    """Saves what work(block), a list of (key, fields), has for each block. Two blocks are under way: while a server
    answers one, the other asks. A person answers one after the other, in this thread, where Ctrl-C is heard."""
    pool, blocks = ThreadPoolExecutor(2), blocks[rows.share]
    done = map(work, blocks) if has_human(rows.args) else (
        block.result() for block in as_completed([pool.submit(work, block) for block in blocks]))
    try:
        save_all(rows, keys, (row for block in done for row in block), what)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def save_all(rows, keys, results, what):
    """Saves results, (key, fields of the row), as they come, under a progress bar."""
    left, no_bar = len([key for key in keys if key not in rows][rows.share]), has_human(rows.args)
    for key, fields in tqdm(results, what, left, unit="", disable=no_bar or not rows.processes.is_main_process):
        if key not in rows:                                     # it may be there: its batch was half done
            rows.add({**dict(zip(rows.key, key)), **fields})
    rows.finish()


def has_human(args):
    """Whether a person plays a role: then no bar stands in the way, and one question comes after the other."""
    models = [vars(args).get(role) for role in ("questioner", "model", "oracle", "judge", "inducer")]
    users = vars(args).get("roleplayer")                        # models; of evaluate.py a label
    return "human" in models or isinstance(users, list) and "human" in users


def announce(rows, *asked):
    """Says before the first paid call how many there will be, and what they may cost; --dry-run ends here. asked:
    (model, prompts, max_tokens). Four characters are taken for a token, which is about right for English."""
    for spec, chats, max_tokens in asked:
        if chats and spec == "human":
            say(rows.processes, f"human: {len(chats):,} answers; an empty line ends one, Ctrl-D the stage, which keeps "
                                "what is finished")
        if chats and spec.startswith("openai:"):
            tokens = (sum(len(message["content"]) for chat in chats for message in chat) // 4,
                      len(chats) * int(rows.args.extra.get("max_completion_tokens") or max_tokens))
            dollars = rows.args.prices and sum(map(operator.mul, rows.args.prices, tokens)) / 1e6
            say(rows.processes, f"openai:{served_model(spec)[0]}: {len(chats):,} calls, about {tokens[0]:,} tokens in "
                                f"and at most {tokens[1]:,} out" + (f": ${dollars:,.2f}" if dollars else ""))
    if rows.args.dry_run:
        raise SystemExit(0)


def lines_of(conversation):
    """A conversation as lines of text."""
    return [f"{turn['role']}: {turn['content']}" for turn in conversation]


def say(processes, *lines):
    """Prints on the main process alone."""
    if processes.is_main_process:
        print(*map(printable, lines), sep="\n", flush=True)


# ---------------------------------------------------------------- command line

def number(kind, low, high=2 ** 32 - 1):
    """An argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value
    parse.__name__ = kind.__name__                              # for argparse's message
    return parse


natural, fraction, amount, nucleus = number(int, 1), number(float, 0, 1), number(float, 0), number(float, 0.01, 1)


def json_object(text):
    """An argparse type: {"name": value, ...}. Settings are stored: no place for a key or a password."""
    if re.search('api.?key|token"|authorization|secret|password', text, re.IGNORECASE):
        raise argparse.ArgumentTypeError("keys belong in OPENAI_API_KEY, or SERVER_API_KEY for a server by URL")
    return {**json.loads(text)}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def stage_parser(manual, output, limit="work on a seeded sample of N pairs"):
    """The parser of a stage, with the flags that all stages have. manual: the stage's docstring."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, type=os.path.normpath, metavar="PATH", help=output)
    parser.add_argument("--seed", type=number(int, 0), default=42, help="of all randomness")
    parser.add_argument("--limit", type=natural, metavar="N", help=limit)
    return parser


def add_data_flags(parser):
    parser.add_argument("--tasks", default="data/tasks.jsonl", help="tasks (JSONL)")
    parser.add_argument("--personas", default="runs/personas.jsonl", help="personas (JSONL)")


def add_model_flags(parser, batch_size):
    group = parser.add_argument_group("local models (Hugging Face)")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")
    group.add_argument("--batch-size", type=natural, default=batch_size, help="texts generated side by side")
    group = parser.add_argument_group("servers (openai:MODEL, key from OPENAI_API_KEY, or openai:MODEL@URL, "
                                      "key from SERVER_API_KEY)")
    group.add_argument("--system", choices=("role", "fold"), default="role",
                       help="send a system text as its own message, or fold it into the first user message")
    group.add_argument("--concurrency", type=natural, default=64, help="requests under way at a time, of each process")
    group.add_argument("--timeout", type=natural, default=120, help="seconds before a request is repeated")
    group.add_argument("--extra", type=json_object, default={}, metavar="JSON",
                       help='more request arguments; null takes one away: '
                            '{"max_tokens": null, "max_completion_tokens": 900}')
    group.add_argument("--max-refused", type=fraction, default=0.05, metavar="SHARE",
                       help="of answers refused, empty, or (a judge's) unreadable; above it the stage ends with 1")
    group.add_argument("--prices", type=amount, nargs=2, metavar=("IN", "OUT"),
                       help="dollars for a million tokens: tells what the calls cost")
    group.add_argument("--dry-run", action="store_true", help="say how many calls, and their highest cost, and stop")
