"""Plumbing that the six stages share: rows on disk, seeds, chats, and the two kinds of model. No algorithm is in here.

    rows      read_rows, read_tasks, read_personas, read_gold, read_conversations, all_pairs, Rows, write_results
    chats     response_form, prompt_ids, training_examples, scored_ids
    models    open_model("mistralai/Mistral-7B-Instruct-v0.2")   a folder or hub name: Hugging Face, on this machine
              open_model("openai:gpt-5@https://my.server/v1")    any OpenAI-compatible server ("@URL" is optional)

Both kinds of model have `generate(requests)`, which yields replies in the order in which they are done; the local
kind also has `score(examples)`, the one log-probability function of the project.
torch and transformers are imported where they are needed: `--help` and bad input answer at once.
"""
import argparse
import asyncio
import atexit
import fcntl
import gc
import hashlib
import json
import os
import re
import signal
import socket
import sys
from collections import Counter, defaultdict
from contextlib import contextmanager
from glob import glob, escape
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np


def interrupted(kind, error, trace):
    """Says on Ctrl-C how to go on, instead of a traceback."""
    if kind is not KeyboardInterrupt:
        return sys.__excepthook__(kind, error, trace)
    print("\nInterrupted. Rows that are done are kept: start again with the same flags.", file=sys.stderr, flush=True)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)                          # ends as Ctrl-C ends a program, and at once


if not hasattr(sys, "ps1"):                                     # a stage, and nobody at a prompt
    sys.excepthook = interrupted


def fail(message, status=2):
    """One line that says where, what is wrong, and what to do; exit status 2 for bad input, 1 for a bad outcome."""
    from tqdm import tqdm
    tqdm.write(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)     # on a line of its own beside a bar
    raise SystemExit(status)


def digest(*parts):
    """Eight hex digits of a hash of texts, numbers, and lists of them."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]


def seed_for(*parts):
    """A number below 2**31 that depends on its parts alone: the same row gets the same randomness in any order of
    work, on any number of processes, before and after a restart."""
    return int(digest(*parts), 16) >> 1


# ---------------------------------------------------------------- rows: one JSON object a line

def conversation_error(turns):
    """What is wrong with a conversation (question first, answer last, in turn), or None."""
    if type(turns) is not list or not all(type(turn) is dict and type(turn.get("content")) is str and
                                          turn.get("role") in ("assistant", "user") for turn in turns):
        return 'is not a list of {"role": "assistant" or "user", "content": text}'
    if not turns or [turn["role"] for turn in turns] != ["assistant", "user"] * (len(turns) // 2):
        return "does not go question (assistant), answer (user), in turn, from a question to an answer"


def not_json(constant):
    raise ValueError(f"{constant} is no JSON number")


def field_error(value, kind):
    """What is wrong with a field's value, or None. kind: a type, a tuple of types, or a function that says so."""
    if callable(kind) and not isinstance(kind, type):
        return kind(value)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) not in kinds or type(value) in (int, float) and not abs(value) < 2 ** 53:
        return f"is {json.dumps(value)[:40]}, not {' or '.join(k.__name__ for k in kinds)}"


def read_rows(path, fields, key, may_refuse=False):
    """Yields the rows of a JSONL file, checked; the first bad line ends the program.

    fields: {name: kind, see field_error}; key: the names that tell rows apart. may_refuse: a row with `refused` needs
    its key alone: a model or server declined it, and the caller leaves it out.
    """
    path, seen = Path(path), {}
    if unfinished(path):
        fail(f"{path}: not finished: the stage that writes it was interrupted, or is still running. Start that stage "
             "again; it goes on.")
    try:
        file = open(path, "rb")
    except (OSError, ValueError) as error:                      # ValueError: a path with a zero byte
        fail(f"{path}: {getattr(error, 'strerror', error)}. Run the stage that writes this file first, or correct the "
             "path.")
    with file:
        for number, line in enumerate(file, 1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"), parse_constant=not_json)
                if b"\\ud" in line.lower():                      # half of a character can be written, but not sent
                    json.dumps(row, ensure_ascii=False).encode("utf-8")
            except UnicodeError:
                fail(f"{where}: not UTF-8, or half a surrogate pair. Save the file as UTF-8.")
            except (ValueError, RecursionError) as error:
                fail(f"{where}: not JSON ({error}). Each line must be one JSON object.")
            if type(row) is not dict:
                fail(f"{where}: a JSON {type(row).__name__} where an object is expected. Each line must be one object.")
            refused = may_refuse and "refused" in row
            for name, kind in {**fields, **({"refused": str} if refused else {})}.items():
                if refused and name not in (*key, "refused"):
                    continue
                if name not in row:
                    fail(f"{where}: no field {name!r}. The README lists the fields of each file.")
                wrong = field_error(row[name], kind)
                if wrong:
                    fail(f"{where}: field {name!r} {wrong}. Correct that line.")
            identity = tuple(row[name] for name in key)
            if identity in seen:
                fail(f"{where}: the same {', '.join(key)} as on line {seen[identity]}: {identity}. Remove one of them.")
            seen[identity] = number
            yield row


def read_tasks(path):
    """{task_id: row} with `task_id`, `split`, `task`."""
    return {row["task_id"]: row for row in read_rows(path, {"task_id": str, "split": str, "task": str}, ("task_id",))}


def read_personas(path):
    """{persona_id: row} with `persona_id`, `split`, `name`, `persona`."""
    fields = {"persona_id": str, "split": str, "name": str, "persona": str}
    return {row["persona_id"]: row for row in read_rows(path, fields, ("persona_id",))}


def read_gold(path):
    """{(task_id, persona_id): gold response}; None where the Oracle refused. An empty gold is a refusal."""
    fields = {"task_id": str, "persona_id": str, "gold": str}
    return {pair_of(row): None if "refused" in row else row["gold"].strip() or None
            for row in read_rows(path, fields, ("task_id", "persona_id"), may_refuse=True)}


def read_conversations(path, **more):
    """Yields the rows `task_id`, `persona_id`, `sample`, `conversation` (and `more` fields); also the refused ones."""
    fields = {"task_id": str, "persona_id": str, "sample": int, "conversation": conversation_error, **more}
    return read_rows(path, fields, ("task_id", "persona_id", "sample"), may_refuse=True)


def known(row, tasks, personas, path):
    """(task row, persona row) of a row's ids; an id that is in neither file ends the program."""
    if row["task_id"] not in tasks or row["persona_id"] not in personas:
        fail(f"{path}: task {row['task_id']!r} or persona {row['persona_id']!r} is not among the given --tasks and "
             f"--personas. Give the files from which {path} was made.")
    return tasks[row["task_id"]], personas[row["persona_id"]]


def pair_of(row):
    return row["task_id"], row["persona_id"]


def key_of(row):
    return row["task_id"], row["persona_id"], row["sample"]


def all_pairs(tasks, personas, split, limit=None, seed=0):
    """The (task row, persona row) pairs of a split: the full product, or a seeded sample of `limit` of them.

    Samples are nested: the pairs of --limit 10 are among those of --limit 20, so that a short run can be prolonged.
    """
    for what, rows in (("task", tasks.values()), ("persona", personas.values())):
        if not any(row["split"] == split for row in rows):
            found = ", ".join(sorted({row["split"] for row in rows})) or "none"
            fail(f"--split {split}: no {what} has this split (there are: {found}). Name one of those.")
    pairs = [(task, persona) for task in tasks.values() if task["split"] == split
             for persona in personas.values() if persona["split"] == split]
    ids = [(task["task_id"], persona["persona_id"]) for task, persona in pairs]
    kept = set(sample_pairs(ids, limit, seed))
    return [pair for pair, pair_ids in zip(pairs, ids) if pair_ids in kept]


def sample_pairs(ids, limit, seed):
    """A seeded sample of `limit` of some (task_id, persona_id); all of them if limit is None."""
    return ids if limit is None else sorted(ids, key=lambda pair: (seed_for(seed, "limit", *pair), pair))[:limit]


def rotation(persona_ids, task_id, seed):
    """{persona: another persona} for one task, by a seeded rotation of 1..P-1 places, so that nobody meets itself and
    each is met once. Empty where there are fewer than two. (Q-Random, and the control `select.py --pick permuted`.)"""
    P = len(persona_ids)
    shift = 1 + seed_for(seed, "rotation", task_id) % (P - 1) if P > 1 else 0
    return {persona_ids[j]: persona_ids[(j + shift) % P] for j in range(P)} if shift else {}


def unfinished(path):
    """The part files of a stage that was interrupted, or is still running."""
    return sorted(glob(escape(str(path)) + ".part-*[0-9]"))


def fingerprint(path):
    """Twelve hex digits that change with a file or a model's folder; None for a name that is no path here.

    A file: a hash of its content. A folder that train.py wrote: of its settings, which hold a hash of the examples.
    Other folders: of the .json and .jinja files, and of the names and sizes of all.
    """
    path, settings = Path(path), Path(f"{path}.settings.json")
    if path.is_dir() and settings.exists():
        content = settings.read_bytes()
    elif path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        content = b"".join(f"{file.name} {file.stat().st_size}\n".encode() +
                           (file.read_bytes() if file.suffix in (".json", ".jinja") else b"") for file in files)
    elif path.is_file():
        content = path.read_bytes()
    else:
        return None
    return hashlib.sha256(content).hexdigest()[:12]


def how_to_remove(output):
    """The end of a sentence; not "OUTPUT*", which would name its neighbours, too."""
    return f"delete {output}, {output}.part-* and {output}.settings.json"


def claim(output, settings):
    """Takes an output for this program: returns a file handle that keeps other programs out as long as it is open.

    OUTPUT.settings.json, beside the output, holds whatever changes the content of all rows (models, prompts,
    temperatures, n, seed; not the limit, batch size, device, URL or concurrency). What was made with other settings is
    not added to.
    """
    path, settings = Path(f"{output}.settings.json"), json.loads(json.dumps(settings))
    has_rows = Path(output).exists() or unfinished(output)
    if has_rows and not path.exists():
        fail(f"{output} exists without {path.name}, so this stage did not write it. Give another --output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = open(path, "a+", encoding="utf-8")
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"{output}: another run is writing this output. Wait for it, or give another --output.")
    except OSError as error:
        fail(f"{output}: {error.strerror}. Give an --output in a folder that can be written.")
    if has_rows:
        handle.seek(0)
        try:
            old = dict(json.load(handle))
        except (ValueError, TypeError):
            fail(f"{path}: not as a stage writes it. Give another --output, or {how_to_remove(output)}.")
        differ = [f"{k}: {str(old.get(k))[:60]!r} there, {str(settings.get(k))[:60]!r} now"
                  for k in sorted({*old, *settings}) if old.get(k) != settings.get(k)]
        if differ:
            fail(f"{output} was made with other settings ({'; '.join(differ)}). Give another --output, or "
                 f"{how_to_remove(output)}.")
    else:
        with writing(path):
            handle.truncate(0)
            handle.write(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            handle.flush()
    return handle


@contextmanager
def writing(path, *errors):
    """A full disk, a quota or a folder that turned read-only ends the program with a clear line."""
    try:
        yield
    except (OSError, *errors) as error:
        fail(f"{path}: {getattr(error, 'strerror', None) or error}. What was done before is kept: make room, or make "
             "the folder writable, and start again with the same flags.")


def write_whole(path, text):
    """Writes a file beside its place and renames it: readers see the old file or the new one, never half of one."""
    path = os.path.realpath(path)                               # a link stays a link
    temporary = Path(f"{path}.unfinished")
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


class Rows:
    """The output of a stage. PATH holds finished rows in canonical order; while a stage runs, process r adds the rows
    that it has done to PATH.part-r. A killed run leaves its parts, and the next run takes them up: `key in rows`.

    A row carries `inputs`, a hash of the texts that it was made from: see `check`."""

    def __init__(self, path, key, settings, processes, max_refused=None):
        self.path, self.key, self.processes, self.max_refused = Path(path), key, processes, max_refused
        if self.path.is_dir():
            fail(f"{path}: a folder. Give the path of a file as --output.")
        if processes.is_main_process:
            self.claim = claim(path, settings)
            if unfinished(path):
                self._merge(unfinished(path), f"{path}.part-0")
        processes.wait_for_everyone()
        self._load(self.path, f"{path}.part-0")
        processes.wait_for_everyone()
        self.part = self.bar = None
        self.limit_refusals(100)

    def _identity(self, line):
        try:
            row = json.loads(line)
            key = tuple(row[name] for name in self.key)
            if not all(type(part) in (str, int) for part in key) or type(row.get("refused", "")) is not str:
                raise TypeError
            Counter(row.get("usage")).total()                   # raises where they are no numbers
            return key, row
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{self.path}: holds a line that this stage did not write: {line[:60]!r}. Remove it, or give another "
                 "--output.")

    def _load(self, *files):
        self.done, self.refused = {}, {}                        # key -> inputs; key -> why
        for file in filter(os.path.exists, files):
            with open(file, "rb") as lines:
                for line in lines:
                    self._note(*self._identity(line))

    def _note(self, key, row):
        self.done[key] = row.get("inputs")
        if "refused" in row:
            self.refused[key] = row["refused"]

    def __contains__(self, key):
        return key in self.done

    def check(self, keys, inputs):
        """Refuses to go on where a row that is there was made from other texts: another task, persona, gold response,
        conversation or response than now stands in the files that are read. inputs: a hash for each key."""
        for key, now in zip(keys, inputs):
            if self.done.get(key, now) != now:
                fail(f"{self.path}: its row {key} was made from other inputs than those that are given now: a file "
                     f"that this stage reads has changed. Give another --output, or {how_to_remove(self.path)}.")

    def add(self, rows):
        """Saves rows at once; those that are there already are left as they are."""
        new = {key: row for key, row in ((tuple(row[name] for name in self.key), row) for row in rows)
               if key not in self.done}
        with writing(self.path):
            self.part = self.part or open(f"{self.path}.part-{self.processes.process_index}", "ab", buffering=0)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new.values()).encode("utf-8")
            while lines:                                        # a disk that is nearly full takes a part of them
                lines = lines[self.part.write(lines):]
        for key, row in new.items():
            self._note(key, row)
        self.limit_refusals(100)                                # before thousands more are paid for

    def limit_refusals(self, least=1):
        """Ends the program with status 1 where more than --max-refused of at least so many rows are refusals."""
        if (self.max_refused is not None and len(self.done) >= least and
                len(self.refused) > self.max_refused * len(self.done)):
            why = ", ".join(f"{count} {reason[:80]}" for reason, count in Counter(self.refused.values()).most_common(3))
            fail(f"{self.path}: {len(self.refused)} of {len(self.done)} were refused ({why}), more than --max-refused "
                 f"{self.max_refused:g}. Try another model, --extra or --max-tokens, with another --output. To ask the "
                 f"same again, take the lines with \"refused\" out of {self.path}*; to go on without, raise the flag.",
                 status=1)

    def _merge(self, sources, target):
        """Sorts the lines of all sources by key into target. A part's line that a kill has torn has no end: it goes."""
        lines = {}
        for source in sources:
            with open(source, "rb") as file:
                for line in file:
                    if line.endswith(b"\n") or Path(source) == self.path:
                        lines.setdefault(self._identity(line)[0], line.decode("utf-8").rstrip("\n") + "\n")
        write_whole(target, "".join(lines[key] for key in sorted(lines)))
        for source in sources:
            if Path(source) not in (Path(target), self.path):
                os.remove(source)

    def plan(self, keys, inputs, what):
        """Takes the rows that are wanted and returns the set of indices that are done already.

        keys: one a row; inputs: a hash of what each is made from; what: for the progress bar.
        """
        self.check(keys, inputs)
        self.keys, self.inputs, self.what = keys, inputs, what
        return {i for i, key in enumerate(keys) if key in self}

    def save(self, i, fields):
        """Saves row i of the plan, with its key and inputs. Returns True for the first one, as a sample to show."""
        first = self.bar is None
        if first:
            done = sum(key in self for key in self.keys)
            self.bar = progress(len(self.keys), self.what, self.processes, done)
        advance(self.bar, self.keys[i] not in self, self.processes)
        self.add([{**dict(zip(self.key, self.keys[i])), **fields, "inputs": self.inputs[i]}])
        return first

    def read(self):
        """Yields all rows that are saved, in canonical order once the stage is finished."""
        for file in (self.path, *map(Path, unfinished(self.path))):
            if file.exists():
                with open(file, encoding="utf-8") as lines:
                    yield from map(json.loads, lines)

    def tally(self, *fields):
        """(number of rows, number of rows that have field, ..., tokens that servers counted in them)."""
        rows, counts, usage = 0, Counter(), Counter()
        for row in self.read():
            rows += 1
            counts.update(field for field in fields if field in row)
            usage.update(row.get("usage", {}))
        return rows, *(counts[field] for field in fields), usage

    def finish(self):
        """Joins the parts of all processes into PATH, which is there then, if only as an empty file."""
        if self.bar:
            self.bar.close()
        if self.part:
            self.part.close()
        self.part = self.bar = None
        self.processes.wait_for_everyone()
        if self.processes.is_main_process and (unfinished(self.path) or not self.path.exists()):
            self._merge([file for file in (self.path, *unfinished(self.path)) if Path(file).exists()], self.path)
        self.processes.wait_for_everyone()
        if self.processes.num_processes > 1:
            self._load(self.path)                               # the others' rows, too

    def withdraw(self):
        """Leaves nothing behind where nothing was saved: for --dry-run."""
        if self.processes.is_main_process and not (self.path.exists() or unfinished(self.path)):
            os.remove(f"{self.path}.settings.json")


RESULT_KEY = ("variant", "iteration", "metric", "condition", "roleplayer", "split")


def read_results(path):
    """Rows of results.jsonl: RESULT_KEY + `mean`, `sem`, `n`."""
    number = (int, float, type(None))
    fields = {**dict.fromkeys(RESULT_KEY, str), "iteration": int, "mean": number, "sem": number, "n": int}
    return list(read_rows(path, fields, RESULT_KEY)) if Path(path).exists() else []


def write_results(path, rows):
    """Adds rows to results.jsonl; a row for the same combination of RESULT_KEY is replaced. Returns all rows."""
    if os.path.exists(path) and not os.path.isfile(path):
        fail(f"{path}: not a file. Give the path of one as --results.")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(f"{path}.lock", "a") as lock:                 # evaluations may run side by side
            fcntl.flock(lock, fcntl.LOCK_EX)
            results = {tuple(row[k] for k in RESULT_KEY): row for row in [*read_results(path), *rows]}
            write_whole(path, "".join(json.dumps(results[key]) + "\n" for key in sorted(results)))
    except OSError as error:
        fail(f"{path}: {error.strerror}. Give --results in a folder that can be written.")
    return [results[key] for key in sorted(results)]


# ---------------------------------------------------------------- chats: lists of messages until the tokenizer

def response_form(name, task, conversation, persona=None):
    """Figure 17: the conversation without the elicitation prompt, the task repeated at the end of the last answer, to
    ask for a response and not for another question. `select`, `train` and `evaluate` see a conversation in this form.

    With no conversation it is the negative control; with a persona in the first turn, the positive control.
    """
    about = f" Here is some information about me:\n\n{persona}" if persona is not None else ""
    chat = [{"role": "user", "content": f"My name is {name}.{about}\n\n{task}"}, *map(dict, conversation)]
    if conversation:
        chat[-1]["content"] += f"\n\n{task}"
    return chat


def fold_system(chat):
    """Puts a system text into the first user message: Gemma and Mistral know no system role."""
    if chat[0]["role"] != "system":
        return chat
    return [{"role": "user", "content": chat[0]["content"] + "\n\n" + chat[1]["content"]}, *chat[2:]]


class Rendered(NamedTuple):
    text: str                       # the chat template's output
    hostile: list                   # character spans in which a message spells a special token: "</s>", "[INST]"


def render(tokenizer, chat, ask=False):
    """A chat as text; `ask` ends it with the template's invitation to the assistant."""
    special = sorted(set(tokenizer.all_special_tokens), key=len, reverse=True)
    spelled = re.compile("|".join(map(re.escape, special)) or "(?!)")
    # While the template runs, each spelled special token is one private character, so that we know where it ends up.
    letters = {letter for message in chat for letter in message["content"]}
    free = (chr(code) for code in range(0xF0000, 0xFFFFE) if chr(code) not in letters)
    stand_in = dict(zip(special, free))
    quiet = [{**m, "content": spelled.sub(lambda m: stand_in[m.group()], m["content"])} for m in fold_system(chat)]
    try:
        text = tokenizer.apply_chat_template(quiet, tokenize=False, add_generation_prompt=ask)
    except Exception as error:      # templates raise jinja2's errors of many kinds
        fail(f"{tokenizer.name_or_path}: its chat template cannot render the conversation ({error}). "
             "Use an instruction-tuned model with a chat template.")
    meant = {private: token for token, private in stand_in.items()}
    pieces, hostile, length = re.split(f"([{''.join(meant)}])" if meant else "(?!)", text), [], 0
    for i, piece in enumerate(pieces):
        if piece in meant:
            pieces[i] = piece = meant[piece]
            hostile.append((length, length + len(piece)))
        length += len(piece)
    return Rendered("".join(pieces), hostile)


def tokenize(tokenizer, rendered):
    """(ids, character spans) of a rendered chat; BOS stands once, and text that spells a special token stays text."""
    encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)   # the template has BOS
    ids, spans = encoded["input_ids"], encoded["offset_mapping"]
    for start, end in reversed(rendered.hostile):
        at = [i for i, (a, b) in enumerate(spans) if a <= start and end <= b and ids[i] in tokenizer.all_special_ids]
        for i in at:
            spelled = tokenizer(rendered.text[start:end], add_special_tokens=False, split_special_tokens=True)
            ids[i:i + 1], spans[i:i + 1] = spelled["input_ids"], [(start, end)] * len(spelled["input_ids"])
    assert ids[:2] != [tokenizer.bos_token_id] * 2, "BOS stands twice"
    return ids, spans


def prompt_ids(tokenizer, chat):
    """The ids of a chat that ends with the user, ready for the assistant to go on."""
    return tokenize(tokenizer, render(tokenizer, chat, ask=True))[0]


class RewrittenHistory(ValueError):
    """A chat template shows an assistant turn otherwise in the whole chat than when the turn was to be said."""


def assistant_turns(tokenizer, chat, last_only=False):
    """ids of a whole chat and, for each assistant turn (or the last alone), the token range (first, end of its text,
    end with its end-of-turn token). Works on character spans, for every template: token prefixes would fail where a
    tokenizer merges across the border of a turn, and nearly no real template marks its assistant turns."""
    chat = fold_system(chat)
    whole = render(tokenizer, chat)
    ids, spans = tokenize(tokenizer, whole)
    turns = []
    # A turn's text begins where a mark in its place would stand: after a blank, or after an empty thought.
    mark = next(chr(code) for code in range(0xFFFFD, 0xF0000, -1) if chr(code) not in whole.text)
    for i in [i for i, message in enumerate(chat) if message["role"] == "assistant"][-1 if last_only else 0:]:
        before = render(tokenizer, chat[:i], ask=True).text
        start = render(tokenizer, [*chat[:i], {**chat[i], "content": mark}, *chat[i + 1:]]).text.find(mark)
        content = chat[i]["content"].strip()                    # half of the templates strip it
        stop = whole.text.find(content, start) + len(content)
        if not whole.text.startswith(before) or start < len(before) or stop < start + len(content):
            raise RewrittenHistory
        if not whole.text[len(before):start].strip():
            start = len(before)                                 # a blank before the text belongs to the turn
        first = next((t for t, (a, b) in enumerate(spans) if b > start), len(ids))
        end = next((t for t, (a, b) in enumerate(spans) if a >= stop and t >= first), len(ids))
        close = next((t for t in range(end, len(ids)) if whole.text[slice(*spans[t])].strip()), len(ids))
        closes = close < len(ids) and ids[close] in tokenizer.all_special_ids
        turns.append((first, end, close + 1 if closes else end))
    return ids, turns


def supervised_ids(tokenizer, chat, last_only=False):
    """(ids, labels) of a training example: labels are the ids on every assistant turn (or the last alone) with its
    end-of-turn token, and -100 elsewhere. Both are lists of T integers."""
    ids, turns = assistant_turns(tokenizer, chat, last_only)
    labels = [-100] * len(ids)
    for first, _, end in turns:
        labels[first:end] = ids[first:end]
    return ids, labels


def training_examples(tokenizer, chat):
    """[(ids, labels)] of a chat: one example with all assistant turns. Where a template rewrites what came before
    (thinking models drop or add thoughts), an example for each turn, in the form in which the model meets it."""
    try:
        return [supervised_ids(tokenizer, chat)]
    except RewrittenHistory:
        turns = [i for i, message in enumerate(chat) if message["role"] == "assistant"]
        return [last_turn(supervised_ids, tokenizer, chat[:i + 1]) for i in turns]


def last_turn(function, tokenizer, chat):
    """function(tokenizer, chat, last_only=True), or an end with a clear word where not even that turn can be found."""
    try:
        return function(tokenizer, chat, last_only=True)
    except RewrittenHistory:
        fail(f"{tokenizer.name_or_path}: its chat template invites the assistant to another beginning than it shows of "
             "the answer, a thought perhaps. Use a template without one.")


def scored_ids(tokenizer, chat):
    """(ids, n) for `score`: ids end with the last token of the last assistant turn's text, of which there are n; the
    end-of-turn token is not counted (the published run counted neither BOS nor EOS)."""
    ids, turns = last_turn(assistant_turns, tokenizer, chat)
    first, end, _ = turns[-1]
    return ids[:end], end - first


# ---------------------------------------------------------------- models

class Request(NamedTuple):
    chat: list                      # messages; ends with the user
    seed: int = 0                   # the randomness of this one reply


class Reply(NamedTuple):
    text: str
    refused: str = None             # why a server gave no answer: a row to record, not an error
    cut: bool = False               # ran into max_tokens
    usage: dict = None              # {"prompt_tokens": ..., "completion_tokens": ...}, as a server counts

    def marks(self):
        """What a row says of a reply beside its text, where there is something to say."""
        return {name: value for name, value in self._asdict().items() if name != "text" and value}


class OneProcess:
    """Stands for Accelerate's Accelerator in a stage that holds no model."""
    process_index, num_processes, is_main_process = 0, 1, True

    def wait_for_everyone(self):
        pass


@contextmanager
def lasting_imports():
    """For imports of torch, transformers and openai: a million objects that stay. Python's garbage collector would look
    through them again and again, and once more at the end: 1.6 of the 3.9 seconds that it takes a process to come and
    go."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def start_processes(*models):
    """The Accelerator of this process if one of the models is local, else OneProcess."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if all(model is None or model.startswith("openai:") for model in models):
        processes = OneProcess()
    else:
        from datetime import timedelta
        with lasting_imports():
            from accelerate import Accelerator, InitProcessGroupKwargs
        processes = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))])
    if world != processes.num_processes:                        # or every one of them would write the same rows
        fail(f"WORLD_SIZE is {world}, but this process is one of {processes.num_processes}. On CPUs start with "
             "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2; a stage without a local model runs as one process.")
    return processes


def model_name(spec):
    """What settings record of a model: its name without the URL; a folder's own name with its fingerprint, so that a
    model trained anew is another one, and one in a folder that was moved is the same."""
    if spec.startswith("openai:"):
        return spec.removeprefix("openai:").split("@http")[0]
    return f"{Path(spec).resolve().name} ({fingerprint(spec)})" if fingerprint(spec) else spec


def open_model(spec, args, processes):
    """A model by its string: "openai:MODEL", "openai:MODEL@URL", a local folder or a hub name."""
    return ServerModel(spec, args) if spec.startswith("openai:") else LocalModel(spec, args, processes)


class ServerError(Exception):
    """A server's lasting failure: what it does, and what to do."""


def read_completion(answer):
    """A chat completion -> Reply. A filtered, declined or empty answer is a refusal; what is no completion raises."""
    choice, usage = answer.choices[0], getattr(answer, "usage", None)
    text = (choice.message.content or "").strip().encode("utf-8", "replace").decode("utf-8")    # no half surrogates
    cut = choice.finish_reason == "length"
    refused = ("content_filter (answer)" if choice.finish_reason == "content_filter" else
               getattr(choice.message, "refusal", None) or
               (None if text else "empty, cut before it began: raise the limit of tokens" if cut else "empty"))
    if refused:
        refused = " ".join(str(refused).encode("utf-8", "replace").decode("utf-8").split())
    counted = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    known_usage = all(type(count) is int for count in counted.values())
    return Reply("" if refused else text, refused, cut and not refused, counted if known_usage else None)


def words(error):
    """What a server says of its own error, on one line; the client's message leaves most servers' words out."""
    return " ".join(error.response.text.split())[:300] or "nothing more."


class ServerModel:
    """A model behind an OpenAI-compatible server. The key comes from OPENAI_API_KEY, the URL from the model's string or
    OPENAI_BASE_URL. The client itself repeats a call after 429, 5xx, dropped connections and timeouts, 8 times."""

    def __init__(self, spec, args):
        with lasting_imports():
            from openai import AsyncOpenAI
        self.name, _, url = spec.removeprefix("openai:").partition("@http")
        if re.search(r"@[\w.-]*(:\d|/)", self.name):
            fail(f"{spec}: what follows @ looks like a URL without http:// or https://. Write openai:MODEL@http://...")
        url = "http" + url if url else os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or ("none" if url else fail(
            f"{spec}: no key. Set OPENAI_API_KEY, or name a server of your own: {spec}@http://127.0.0.1:8000/v1"))
        self.url, self.args = url or "https://api.openai.com/v1", args
        if not getproxies():                                    # find a wrong URL now, not after 8 patient repetitions
            try:
                address = urlsplit(self.url)
                port = address.port or (443 if address.scheme == "https" else 80)
                socket.create_connection((address.hostname, port), timeout=10).close()
            except (OSError, ValueError) as error:
                fail(f"{spec}: no server at {self.url} ({error}). Start the server, or correct the URL.")
        self.loop = asyncio.new_event_loop()
        self.client = AsyncOpenAI(base_url=url, api_key=key, max_retries=8, timeout=args.timeout)
        atexit.register(lambda: self.loop.run_until_complete(self.client.close()))

    async def _ask(self, index, request, temperature, top_p, max_tokens, attempts=5):
        import openai
        chat = fold_system(request.chat) if self.args.system == "fold" else request.chat
        usual = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": request.seed}
        extra = self.args.extra                                 # {"max_tokens": null} takes an argument away
        try:
            answer = await asyncio.wait_for(self.client.chat.completions.create(
                model=self.name, messages=chat, **{k: v for k, v in usual.items() if k not in extra},
                extra_body={k: v for k, v in extra.items() if v is not None}), 9 * (self.args.timeout + 60))
            return index, read_completion(answer)
        except openai.BadRequestError as error:
            if error.code in ("content_filter", "invalid_prompt"):      # a filter on prompts: Azure's, OpenAI's
                return index, Reply("", f"{error.code} (prompt)")
            raise ServerError(f"refuses the request: {words(error)} Correct the model's name; if it is about an "
                              "argument, --extra changes it, if about the system text, --system fold")
        except openai.APIStatusError as error:
            advice = ("Lower --concurrency" if error.status_code == 429 else
                      "Look at the server's log, or try --system fold" if error.status_code >= 500 else
                      "Correct the key, the model's name or the URL (if it is about an argument, --extra)")
            raise ServerError(f"answers {error.status_code}: {words(error)} {advice}")
        except (openai.APIConnectionError, asyncio.TimeoutError) as error:      # the latter: bytes come, but no end
            raise ServerError(f"does not answer ({str(error) or 'it never ends'}). Start the server, or correct the "
                              "URL or --timeout")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            if attempts == 1:
                raise ServerError(f"sends what is no chat completion ({type(error).__name__}: {error}). Correct the "
                                  "URL")
            await asyncio.sleep(0.2)                            # the client repeats errors, but not torn JSON
            return await self._ask(index, request, temperature, top_p, max_tokens, attempts - 1)

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=OneProcess, block=False):
        """Yields (index, Reply) as answers arrive, with at most --concurrency requests under way. `skip`: indices that
        need no reply. `share`: the processes among which the requests are dealt. `block`: see LocalModel."""
        todo = [i for i in range(len(requests)) if i not in skip][share.process_index::share.num_processes]
        waiting, running = iter(todo), set()
        try:
            while True:
                for i in islice(waiting, self.args.concurrency - len(running)):
                    running.add(self.loop.create_task(self._ask(i, requests[i], temperature, top_p, max_tokens)))
                if not running:
                    return
                done, running = self.loop.run_until_complete(
                    asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
                yield from (task.result() for task in done if not task.exception())
                for error in filter(None, (task.exception() for task in done)):
                    if not isinstance(error, ServerError):
                        raise error
                    fail(f"openai:{self.name} at {self.url} {error}, and start again: what is done is kept.")
        finally:
            for task in running:
                task.cancel()
            if running:                                         # else asyncio reports them at exit, with tracebacks
                self.loop.run_until_complete(asyncio.gather(*running, return_exceptions=True))


def group_size(rows, batch_size):
    """How many of `rows` texts are generated as a group, in which ended rows make room for others: four batches, so
    that few steps run nearly empty. But a group is what a kill may lose, and what processes are dealt: no more than a
    fortieth of the work, or one batch."""
    return max(batch_size, min(rows // 40, 4 * batch_size))


def elastic(cache):
    """Whether each layer of a cache keeps all columns. A sliding window counts columns, padding too, and drops others:
    rows of other widths cannot stand beside its own, and there must be no padding inside of a row."""
    return all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


class Batch:
    """Rows that are generated side by side: ids and mask (B, L), padded on the left, and a cache of their first columns
    (of the shared opening, before `generate` has run; of all but the last one after it)."""

    def __init__(self, ids, mask, cache):
        self.ids, self.mask, self.cache, self.elastic = ids, mask, cache, elastic(cache)

    def join(self, other, pad):
        """Takes in another batch's rows, and returns itself; all are as wide as the widest then."""
        import torch
        from torch.nn.functional import pad as widen
        L = max(self.ids.shape[1], other.ids.shape[1])
        self.ids = torch.cat([widen(batch.ids, (L - batch.ids.shape[1], 0), value=pad) for batch in (self, other)])
        self.mask = torch.cat([widen(batch.mask, (L - batch.mask.shape[1], 0)) for batch in (self, other)])
        for ours, theirs in zip(self.cache.layers, other.cache.layers):
            ours.keys, ours.values = (                          # (B, heads, L - 1, d)
                torch.cat([widen(x, (0, 0, L - 1 - x.shape[2], 0)) for x in both])
                for both in ((ours.keys, theirs.keys), (ours.values, theirs.values)))
        return self

    def go_on(self, ids, rows):
        """Takes over what `generate` has made of it, ids (B, L + T), for some of the rows; leaves out the columns in
        which none of them has a token."""
        import torch
        mask = torch.cat([self.mask, self.mask.new_ones(len(ids), ids.shape[1] - self.ids.shape[1])], 1)[rows]
        first = int(mask.any(0).int().argmax()) if self.elastic else 0
        self.ids, self.mask = ids[rows, first:], mask[:, first:]
        self.cache.batch_select_indices(torch.tensor(rows, device=ids.device))
        for layer in self.cache.layers if first else ():
            layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]


class LocalModel:
    """A Hugging Face causal language model with its tokenizer, on this process's device."""

    def __init__(self, path, args, processes):
        self.model, self.tokenizer = load_model(path, args.dtype), load_tokenizer(path)
        self.model.to(processes.device).eval()
        self.name, self.batch_size = path, args.batch_size
        self.room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)      # tokens
        if len(self.tokenizer) > self.model.get_input_embeddings().num_embeddings:
            fail(f"{path}: the tokenizer has {len(self.tokenizer)} tokens, more than the model's "
                 f"{self.model.get_input_embeddings().num_embeddings} embeddings. They do not belong together.")
        if not all(weight.isfinite().all() for weight in self.model.parameters()):
            fail(f"{path}: its weights are not all finite numbers: the training that made them went astray.")
        # A checkpoint's own generation_config may carry top_k or a repetition penalty: only the caller's words count.
        from transformers import GenerationConfig
        self.stops = stop_ids(self.tokenizer, self.model.generation_config)
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.stops[0]
        self.model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=self.pad)

    def _left_pad(self, rows):
        """Lists of ids -> ids (B, L) and mask (B, L), padded on the left: all rows end in the last column."""
        import torch
        ids, mask = np.full((len(rows), max(map(len, rows))), self.pad), np.zeros((len(rows), max(map(len, rows))), int)
        for b, row in enumerate(rows):
            ids[b, -len(row):], mask[b, -len(row):] = row, 1    # from lengths: pad may well be a real token (EOS)
        return torch.from_numpy(ids).to(self.model.device), torch.from_numpy(mask).to(self.model.device)

    def fits(self, tokens):
        """Ends the program where a text of so many tokens does not fit the model's context."""
        if self.room and tokens > self.room:
            fail(f"{self.name}: {tokens} tokens are needed, but the model has room for {self.room}. "
                 "Shorten the texts, lower the flag for the longest answer, or use a model with a longer context.")

    def generate(self, requests, temperature, top_p, max_tokens, skip=(), share=OneProcess, block=False):
        """Yields (index, Reply) as answers end. `skip` and `share` as in ServerModel. `block`: the requests are a block
        of conversations, generated as one group, and a prompt that is too long for the context is refused; else it ends
        the program.

        Groups depend on the whole list, not on what is done already: with the same batch size, a restart that finds a
        group unfinished generates it once more from the very same matrices.
        """
        prompts = [prompt_ids(self.tokenizer, request.chat) for request in requests]
        if not block:
            self.fits(max(map(len, prompts), default=0) + max_tokens)
        long = {i for i, prompt in enumerate(prompts) if self.room and len(prompt) + max_tokens > self.room}
        for i in [i for i in sorted(long) if i not in skip][share.process_index::share.num_processes]:
            yield i, Reply("", f"{len(prompts[i])} + {max_tokens} tokens, the model has room for {self.room}")
        # Longest first; but what has the same opening stays together, since that is computed once (_prefill).
        opening, longest = [request.chat[0]["content"] for request in requests], Counter()
        for i, prompt in enumerate(prompts):
            longest[opening[i]] = max(longest[opening[i]], len(prompt))
        order = sorted(set(range(len(prompts))) - long,
                       key=lambda i: (-longest[opening[i]], opening[i], -len(prompts[i]), prompts[i], i))
        size = max(1, len(order)) if block else group_size(len(order), self.batch_size)
        groups = [order[i:i + size] for i in range(0, len(order), size)]
        groups = [group for group in groups if any(i not in skip for i in group)]
        for group in groups[share.process_index::share.num_processes]:
            requested = [(i, requests[i].chat, prompts[i], requests[i].seed) for i in group]
            yield from self._replies(requested, temperature, top_p, max_tokens)

    def _prefill(self, chats, prompts, whole):
        """B chats with their ids -> a Batch. What the samples of a pair have in common (in the first turn all but the
        last token, later the elicitation prompt and the task) is computed once for each opening message, and its cache
        is copied. The rest of a row is left to `generate`, or, to make it `whole`, computed here."""
        import torch
        from transformers import DynamicCache
        cache = DynamicCache(config=self.model.config)
        opening = [chat[0]["content"] for chat in chats] if elastic(cache) else range(len(chats))
        together = defaultdict(list)                            # opening message -> prompts
        for row, prompt in enumerate(prompts):
            together[opening[row]].append(prompt)
        heads = {key: os.path.commonprefix(those)[:min(map(len, those)) - 1] for key, those in together.items()}
        place = [list(heads).index(key) for key in opening]
        tails = [prompt[len(heads[key]):] for key, prompt in zip(opening, prompts)]
        head_ids, head_mask = self._left_pad(list(heads.values()))                              # (U, H), U <= B
        tail_ids, tail_mask = self._left_pad(tails)                                             # (B, L - H)
        ids, mask = torch.cat([head_ids[place], tail_ids], 1), torch.cat([head_mask[place], tail_mask], 1)
        H = head_ids.shape[1]
        with torch.inference_mode():
            self.model(head_ids, attention_mask=head_mask, position_ids=positions(head_mask), past_key_values=cache,
                       use_cache=True, logits_to_keep=1)
            if len(heads) < len(prompts):
                cache.batch_select_indices(torch.tensor(place, device=ids.device))
            if whole and H < ids.shape[1] - 1:
                self.model(tail_ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions(mask)[:, H:-1],
                           past_key_values=cache, use_cache=True, logits_to_keep=1)
        return Batch(ids, mask, cache)

    def _replies(self, requested, temperature, top_p, max_tokens):
        """(index, chat, ids, seed) of some requests -> (index, Reply) as answers end, by plain `generate`, 32 tokens at
        a time: rows that have ended then leave the batch, and others take their places. (Were batches to wait for their
        longest answer, which is 3-5 times the mean, most steps would run nearly empty.)"""
        import torch
        waiting, batch, alive = list(requested), None, []       # alive: (index, random numbers, tokens said) of a row
        while waiting or alive:
            free = self.batch_size - len(alive)
            if waiting and (not alive or batch.elastic and free >= self.batch_size / 4):
                indices, chats, prompts, seeds = zip(*waiting[:free])
                new, waiting = self._prefill(chats, prompts, whole=bool(alive)), waiting[free:]
                batch = batch.join(new, self.pad) if alive else new
                alive += [(i, np.random.default_rng(seed), []) for i, seed in zip(indices, seeds)]
            L, steps = batch.ids.shape[1], min(32, max_tokens - max(len(said) for _, _, said in alive))
            sampling = []
            if temperature > 0:
                draws = np.stack([random.random(steps) for _, random, _ in alive])
                draws = torch.from_numpy(draws).to(batch.ids.device, torch.float32)
                sampling = [nucleus_sampling(draws, temperature, top_p, L)]
            ids = self.model.generate(
                batch.ids, attention_mask=batch.mask, past_key_values=batch.cache, max_new_tokens=steps,
                do_sample=False, logits_processor=sampling)
            going = []
            for row, ((i, _, said), tokens) in enumerate(zip(alive, ids[:, L:].tolist())):
                stop = next((t for t, token in enumerate(tokens) if token in self.stops), len(tokens))
                said += tokens[:stop]
                if stop == len(tokens) and len(said) < max_tokens:
                    going.append(row)
                else:
                    text = self.tokenizer.decode(said, skip_special_tokens=True).strip()
                    yield i, Reply(text, None, len(said) == max_tokens)
            alive = [alive[row] for row in going]
            if alive:
                batch.go_on(ids, going)

    def score(self, examples, tokens_per_batch, skip=(), share=OneProcess):
        """Yields (index, log-probability in nats): the sum over the last n tokens of ids, for examples (ids, n).

        Examples are sorted by length and batched under a token budget. Left padding lets all scored tokens end in the
        last column, so that logits are computed for the last max(n) + 1 positions alone.
        """
        import torch
        import torch.nn.functional as F
        self.fits(max((len(ids) for ids, _ in examples), default=0))
        batches = [b for b in budget_batches([len(ids) for ids, _ in examples], tokens_per_batch)
                   if any(i not in skip for i in b)]
        for batch in batches[share.process_index::share.num_processes]:
            ids, mask = self._left_pad([examples[i][0] for i in batch])
            n = torch.tensor([examples[i][1] for i in batch], device=ids.device)
            keep = int(n.max())
            with torch.inference_mode():
                logits = self.model(ids, attention_mask=mask, position_ids=positions(mask),
                                    logits_to_keep=keep + 1).logits[:, -keep - 1:-1].float()          # (B, keep, V)
                # log p(g_t | context, g_<t); columns left of a row's own n tokens belong to its context
                log_p = -F.cross_entropy(logits.transpose(1, 2), ids[:, -keep:], reduction="none")    # (B, keep)
                ours = torch.arange(keep, 0, -1, device=ids.device) <= n[:, None]
                sums = torch.where(ours, log_p.double(), 0.0).sum(1)
            yield from zip(batch, sums.tolist())


def score_rows(rows, chats, base, args, done, answer=0):
    """Adds `tokens` and `log_prob` (nats; None where it is not finite) to the planned rows that are not done.

    chats: a function from a row's index to its chat: 125,000 are built one at a time, and kept as arrays of ids.
    answer: how many tokens must fit in the place of what is scored.
    """
    examples = [(np.array(ids, np.int32), n) for ids, n in (
        scored_ids(base.tokenizer, chats(i)) for i in range(len(rows.keys)))]
    base.fits(max(len(ids) - n for ids, n in examples) + answer)
    for i, log_prob in base.score(examples, args.score_tokens, done, rows.processes):
        rows.save(i, {"tokens": examples[i][1], "log_prob": round(log_prob, 6) if np.isfinite(log_prob) else None})


def load_model(path, dtype):
    """A causal language model by folder or hub name, in `dtype` ("float32", "bfloat16")."""
    with lasting_imports():
        import torch
        import transformers.modeling_utils                      # noqa: F401  (what each model's code imports)
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    logging.disable_progress_bar()                              # the stages have their own
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype),
                                                             output_loading_info=True)
    except Exception as error:      # of many kinds: no such folder, torn weights, sizes that do not fit
        fail(f"{path}: no model to load ({' '.join(str(error).split())[:300]}). Give a model folder or a hub name.")
    if loaded["missing_keys"]:
        fail(f"{path}: weights are missing, such as {min(loaded['missing_keys'])}. The folder is incomplete.")
    return model


def load_tokenizer(path):
    """The tokenizer of a model folder; one without a chat template is refused."""
    from transformers import AutoTokenizer
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:      # of many kinds, as above
        fail(f"{path}: no tokenizer to load ({' '.join(str(error).split())[:300]}). Give a model folder or a hub name.")
    if tokenizer.chat_template is None or tokenizer.eos_token_id is None:
        missing = "chat template" if tokenizer.chat_template is None else "eos token"
        fail(f"{path}: its tokenizer has no {missing}. Use an instruction-tuned model.")
    return tokenizer


def stop_ids(tokenizer, generation_config):
    """The ids that end an answer: the checkpoint's, the tokenizer's, and the chat template's end-of-turn token."""
    own = generation_config.eos_token_id
    ids, ((_, end, close),) = last_turn(assistant_turns, tokenizer, [{"role": "user", "content": "Hi"},
                                                                     {"role": "assistant", "content": "Hi"}])
    return list(dict.fromkeys([tokenizer.eos_token_id, *(own if isinstance(own, list) else [own] if own is not None
                                                        else []), *ids[close - 1:close if close > end else 0]]))


def positions(mask):
    """Position ids (B, L) under left padding: `forward` does not derive them from the mask."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def budget_batches(lengths, tokens_per_batch):
    """Indices in batches of similar length, longest first, each of at most tokens_per_batch tokens with padding."""
    order, batches = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), []
    while order:
        size = max(1, tokens_per_batch // max(1, lengths[order[0]]))
        batches.append(order[:size])
        order = order[size:]
    return batches


def nucleus_sampling(draws, temperature, top_p, start):
    """Temperature and top-p sampling as a logits processor, with each row's own random numbers.

    draws: (B, T) uniform on [0, 1); start: the length of the padded prompt. `generate` has one random generator for the
    whole batch, so that a row would depend on its neighbours; here row b takes token t by draws[b, t] alone (inverse
    transform sampling), whatever the batch, the number of processes or the restart. Used with do_sample=False.
    """
    import torch

    def choose(ids, scores):                                    # (B, L), (B, V) -> (B, V): all but one are -inf
        p, token = (scores.float() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        cdf = p.cumsum(-1)
        last = (cdf < top_p).sum(-1, keepdim=True).clamp(max=p.shape[1] - 1)   # the smallest set that reaches top_p
        draw = draws[:, ids.shape[1] - start, None] * cdf.gather(1, last)
        rank = (cdf <= draw).sum(-1, keepdim=True).clamp(max=last)
        return torch.full_like(scores, -torch.inf).scatter(1, token.gather(1, rank), 0.0)
    return choose


# ---------------------------------------------------------------- statistics

def mean_sem(values):
    """(mean, standard error of the mean, n) of one value a pair; the SEM of fewer than two values is None."""
    n = len(values)
    return (float(np.mean(values)) if n > 0 else None,
            float(np.std(values, ddof=1) / n ** 0.5) if n > 1 else None, n)


def by_pair(rows, value):
    """{(task_id, persona_id): mean over its samples}: a pair's samples are not independent of one another."""
    groups = defaultdict(list)
    for row in rows:
        groups[pair_of(row)].append(row[value])
    return {pair: float(np.mean(group)) for pair, group in groups.items()}


# ---------------------------------------------------------------- command line

def positive(text):
    value = int(text)
    if not 1 <= value < 2 ** 31:
        raise argparse.ArgumentTypeError(f"{text[:40]} is not a whole number from 1 to 2**31 - 1")
    return value


def fraction(text):
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def from_0_to_1(text):
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value


def not_negative(text):
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 up")
    return value


def temperature(text):
    value = float(text)
    if value != 0 and not 0.01 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is neither 0 (greedy) nor a number from 0.01 up")
    return value


def seed(text):
    value = int(text)
    if not 0 <= value < 2 ** 32:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2**32 - 1")
    return value


def local_model(text):
    if text.startswith("openai:"):
        raise argparse.ArgumentTypeError(f"{text}: a folder or hub name is needed: this model is scored or trained")
    return text


def output_path(text):
    if os.path.normpath(text or "/") in ("/", ".", "..") or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path for an output")
    return os.path.normpath(text)


def json_object(text):
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False)
    except RecursionError:
        value = None
    if type(value) is not dict:
        raise argparse.ArgumentTypeError(f'{text[:80]} is not a JSON object such as {{"max_tokens": null}}')
    for name in {"max_tokens", "max_completion_tokens"} & set(value):
        if value[name] is not None and (type(value[name]) is not int or value[name] < 1):
            raise argparse.ArgumentTypeError(f"{name} in {text[:80]} is neither null nor a whole number above 0")
    return value


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def stage_parser(manual, output, limit="work on a seeded sample of N pairs"):
    """The parser of a stage, with the flags that all stages have. manual: the stage's docstring."""
    sys.stdout.reconfigure(errors="replace")                    # a terminal without an "é" is no reason to stop
    parser = argparse.ArgumentParser(description=manual, formatter_class=HelpFormatter)
    parser.add_argument("--output", required=True, type=output_path, metavar="PATH", help=output)
    parser.add_argument("--seed", type=seed, default=42, help="of all randomness")
    parser.add_argument("--limit", type=positive, metavar="N", help=limit)
    return parser


def add_dtype_flag(parser):
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights")


def add_local_flags(parser, batch_size):
    group = parser.add_argument_group("local models (Hugging Face)")
    add_dtype_flag(group)
    group.add_argument("--batch-size", type=positive, default=batch_size, help="texts generated side by side")


def add_server_flags(parser):
    group = parser.add_argument_group("servers (openai:MODEL or openai:MODEL@URL; key from OPENAI_API_KEY)")
    group.add_argument("--system", choices=("role", "fold"), default="role",
                       help="send a system text as its own message, or fold it into the first user message")
    group.add_argument("--concurrency", type=positive, default=64, help="requests under way at a time")
    group.add_argument("--timeout", type=positive, default=120, help="seconds before a request is repeated")
    group.add_argument("--extra", type=json_object, default={}, metavar="JSON",
                       help='more request arguments; null takes one away: '
                            '{"max_tokens": null, "max_completion_tokens": 900}')
    group.add_argument("--max-refused", type=from_0_to_1, default=0.05, metavar="SHARE",
                       help="of answers that are refused, filtered or empty; above it the stage stops with status 1")
    group.add_argument("--prices", type=not_negative, nargs=2, metavar=("IN", "OUT"),
                       help="dollars for a million tokens: tells what the calls cost")
    group.add_argument("--dry-run", action="store_true",
                       help="say how many calls would be made, and the most that they cost, and stop")


def announce(processes, args, spec, lengths, max_tokens, outputs, more=""):
    """Says before the first paid call how many calls a server will get, and the most that they may cost; ends here on
    --dry-run, with nothing written.

    lengths: for each call, the characters of its prompt; a token is taken to have four, which is about right for
    English. max_tokens: of an answer. outputs: the Rows that are open. more: what may come on top.
    """
    if not spec.startswith("openai:"):
        text = "runs on this machine: no paid calls"
    else:
        sent = {"max_tokens": max_tokens, **args.extra}
        limit = sent.get("max_completion_tokens") or sent["max_tokens"]
        tokens = sum(lengths) // 4, len(lengths) * limit if limit else None
        text = (f"{len(lengths):,} calls, at most about {tokens[0]:,} tokens in and " +
                ("answers of any length out" if limit is None else f"{tokens[1]:,} out") + cost(args, *tokens) + more)
    if lengths or args.dry_run:
        say(processes, f"{spec}: {text}")
    if args.dry_run:
        for rows in outputs:
            rows.withdraw()
        raise SystemExit(0)


def letters(chat):
    """The number of characters of a chat."""
    return sum(len(message["content"]) for message in chat)


def cost(args, tokens_in, tokens_out):
    """": $12.34" with --prices, else nothing."""
    if not args.prices or tokens_out is None:
        return ""
    return f": ${(args.prices[0] * tokens_in + args.prices[1] * tokens_out) / 1e6:,.2f}"


def spent(args, usage):
    """The end of a summary line: the tokens that servers counted, and their price."""
    if not usage:
        return ""
    tokens = usage["prompt_tokens"], usage["completion_tokens"]
    return f"; servers counted {tokens[0]:,} tokens in and {tokens[1]:,} out{cost(args, *tokens)}"


def progress(total, what, processes, done=0):
    """A progress bar, on the main process alone."""
    from tqdm import tqdm
    return tqdm(total=total, initial=done, desc=what, unit="", disable=not processes.is_main_process,
                dynamic_ncols=True, file=sys.stderr)


def advance(bar, count, processes):
    """Moves the bar by `count` rows of this process, and as many of each other one, which are about as far."""
    bar.update(min(count * processes.num_processes, bar.total - bar.n))


def say(processes, *text, **more):
    """Prints on the main process alone. Whoever stops to listen (`| head`) does not stop the work."""
    if processes.is_main_process:
        try:
            print(*text, flush=True, **more)
        except OSError:
            sys.stdout = open(os.devnull, "w")
