"""What a run will do, before it does it: checks, stale outputs, and how many calls, trainings and gigabytes.

    DRY_RUN=1 bash run.sh paper

run.sh goes through its stages once without running them, and gives their commands to this program. Each is read by its
stage's own parser, so that no flag is described twice. It writes nothing, unless it is told to remove what is stale.
"""
import argparse
import importlib.util
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from functools import lru_cache
from pathlib import Path

import common
from common import (all_pairs, fail, fingerprint, key_of, pair_of, read_gold, read_personas, read_rows, read_settings,
                    read_tasks, response_form, run, served_model, unfinished)
from users import read_users, user_of

# Flags that are settings of this stage alone, and flags that are no settings of it (its Rows say so).
SETTINGS = {"train": {"limit", "batch_size"}}
PROMPTS = {"generate_personas": ["SYSTEM_PROMPT", "PROMPT"], "gold": ["SYSTEM_PROMPT", "PROMPT"],
           "simulate": ["ELICITATION_PROMPT", "ROLEPLAYER_SYSTEM_PROMPT", "ROLEPLAYER_PROMPT"],
           "evaluate": ["JUDGE_SYSTEM_PROMPT", "JUDGE_PROMPT"]}
NO_SETTINGS = {"generate_personas": {"splits", "attempts"}, "gold": {"split"}, "evaluate": {"roleplayer"}}
# Estimates, in tokens of four characters. Prompts are measured, with such texts in them.
TOKENS = {"persona": 170, "gold": 250, "question": 50, "answer": 60, "response": 250, "verdict": 150}
TEXT = {what: "word" * tokens for what, tokens in TOKENS.items()}
TASK, QUESTION = "How do I start a small herb garden?", "What should I know about you?"
TALK = [{"role": "assistant", "content": TEXT["question"]}, {"role": "user", "content": TEXT["answer"]}]


@lru_cache
def load_stage(name):
    """A stage as a module. (`import select` would be the standard library's.)"""
    if name != "select":
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(f"{name}_stage", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_commands(path):
    """run.sh's commands, each a number and so many words, all ended by NUL -> [(stage, its parsed flags, words)]; the
    stage is None for other programs, such as the toy's."""
    words = Path(path).read_text().split("\0")[:-1]
    while words:
        count, own = int(words[0]) + 1, sys.argv
        command, words = words[2:count], words[count:]
        at = next(i for i, word in enumerate(command) if word.endswith(".py"))
        stage = command[at].removesuffix(".py")
        if "/" in stage or stage in ("shorten", "report"):
            yield None, None, command
        else:
            sys.argv = command[at:]                             # so a bad flag's message names the stage
            yield stage, load_stage(stage).parse_args(), command
            sys.argv = own


# ---------------------------------------------------------------- outputs

def files_of(stage, args):
    """The files (or model folder) that a stage writes, each with FILE.settings.json beside it."""
    if stage == "evaluate":
        wanted = {"log_probs": "log_prob" in args.metrics, "responses": "win_rate" in args.metrics, "verdicts": args.judge}
        return [f"{args.output}/{name}.jsonl" for name in wanted if wanted[name]]
    beside = {"generate_personas": "replies", "select": "scores"}.get(stage)
    return [args.output, *([f"{args.output.removesuffix('.jsonl')}.{beside}.jsonl"] if beside else [])]


GONE = set()                                                    # stale outputs, for a plan that makes them anew


def begun(path):
    return path not in GONE and (os.path.exists(path) or bool(unfinished(path)))


def finished(path):
    return path not in GONE and os.path.exists(path) and not unfinished(path)


def rows_of(path):
    """The rows of an output, finished or not; none of a line that a kill has torn."""
    for file in filter(os.path.exists, (path, *unfinished(path)) if begun(path) else ()):
        for line in open(file, "rb"):
            try:
                yield json.loads(line)
            except ValueError:
                pass


def path_in(value):
    """What a flag's value may name as a file: itself, or the folder of a served model."""
    return served_model(value)[0] if str(value).startswith("openai:") else value


def differences(stage, args):
    """["temperature: 0.9 there, 1.0 now", ...] between the settings of a stage's output and its flags."""
    leave_out = common.NEUTRAL - SETTINGS.get(stage, set()) | NO_SETTINGS.get(stage, set())
    now = {name: fingerprint(value) for name, value in vars(args).items() if name not in leave_out}
    if stage in PROMPTS:
        now["prompts"] = [getattr(load_stage(stage), name) for name in PROMPTS[stage]]
    found = {}
    for file in filter(begun, files_of(stage, args)):
        there = read_settings(file)
        for name, value in json.loads(json.dumps(now)).items():
            if name in there and there[name] != value:
                same = len(os.path.commonprefix([str(there[name]), str(value)])) // 60 * 60     # of a long prompt
                found[name] = f"{name}: {str(there[name])[same:][:60]} there, {str(value)[same:][:60]} now"
    return list(found.values())


class Plan:
    """Goes through the commands in order, and adds up what they leave to do."""

    def __init__(self, commands):
        self.state = {}                                         # output -> "done", "stale", or what is the matter
        self.stale, self.why = [], []                           # [(stage, args)]; a reason for the first of each chain
        self.people, self.talks = {}, {}                        # what will be in a file of personas, of conversations
        self.calls, self.asked = defaultdict(Counter), {}       # (role, model) -> calls, tokens; -> (stage, args)
        self.work, self.models = Counter(), []                  # done by this machine; (Q_BASE, dtype) of each training
        self.here = {}                                          # models that are opened on this machine, in order
        for stage, args, command in commands:
            if stage:
                self.add(stage, args)
            elif "--output" in command:                         # as good as what it is made from, and at most as long
                states = [self.state[word] for word in command if word in self.state]
                self.talks.update({command[command.index("--output") + 1]: self.talks[word]
                                   for word in command if word in self.talks})
                self.state[command[command.index("--output") + 1]] = max(states, key=lambda state: state != "done", default="done")

    def add(self, stage, args):
        if args.output in self.state:                           # variants share Q_BASE's conversations
            return
        for name in ("tasks", "personas", "gold", "examples", "conversations", "selected", "response_prompt"):
            path = getattr(args, name, None)
            read = path and (name != "gold" or getattr(args, "target", "gold") == "gold")
            if read and path not in self.state and not os.path.isfile(path):
                fail(f"{path}: there is no such file (--{name.replace('_', '-')} of {stage}.py)")
        if getattr(args, "dry_run", False):
            fail(f"--dry-run of {stage}.py: nothing would be made that the next stage could read. Say DRY_RUN=1")
        for file in filter(begun, files_of(stage, args)):
            if not os.path.exists(f"{file}.settings.json"):     # somebody's own: not to be taken over, nor removed
                fail(f"{file}: not written by {stage}.py. Move it away, or give another RUN.")
        left, files = getattr(self, stage)(args), files_of(stage, args)
        values = [v for value in vars(args).values() for v in (value if isinstance(value, list) else [value])]
        inputs = [path for path in map(path_in, values) if isinstance(path, str) and path != args.output]
        bad = [path for path in inputs if self.state.get(path, "done") != "done"]
        there = any(map(begun, files))
        differ = there and not bad and differences(stage, args)
        if there and (bad or differ):
            self.stale.append((stage, args))
            if differ or self.state[bad[0]] != "stale":
                self.why.append(f"{args.output} ({'; '.join(differ or [f'{bad[0]} {self.state[bad[0]]}'])})")
            self.state[args.output] = "stale"
        else:
            self.state[args.output] = ("done" if not left else f"would grow by {left:,} rows" if all(map(finished, files))
                                       else "is not finished")
        self.work.update(outputs=1, done=self.state[args.output] == "done")
        for name in ("base", "questioner", "model", "oracle", "roleplayer", "judge"):
            given = getattr(args, name, None) or []
            for spec in given if isinstance(given, list) else [given]:
                if spec == "human":
                    fail(f"--{name} human: the stages of run.sh have no terminal. Run {stage}.py by itself.")
                if self.state[args.output] != "done" and spec not in self.state and not spec.startswith("openai:"):
                    self.here[spec] = name

    # What a stage leaves to do. It returns the number of rows (or models) that are not there.

    def generate_personas(self, args):
        there = {row["persona_id"]: row for row in rows_of(args.output)}
        self.people[args.output] = {**{i: {"split": split} for i, split in args.splits[:args.limit]}, **there}
        left = len(self.people[args.output]) - len(there)
        if left and len(list(read_rows(args.examples, {"persona_id": str}, {"persona": str}))) < 2:
            fail(f"{args.examples}: each prompt shows two personas. Add some.")
        chat = load_stage("generate_personas").persona_request([TEXT["persona"]] * 2, 0).chat
        self.ask("persona writer", args.model, args, left, chat, "persona", args.max_tokens)
        return left

    def gold(self, args):
        there = {pair_of(row) for row in rows_of(args.output)}
        left = sum(pair not in there for split in args.split for pair in self.pairs(args, split))
        self.ask("Oracle", args.oracle, args, left, load_stage("gold").oracle_chat(TEXT["persona"], TASK), "gold",
                 args.max_tokens)
        return left

    def simulate(self, args):
        pairs, there = self.pairs(args, args.split), {key_of(row) for row in rows_of(args.output)}
        self.talks[args.output] = pairs, args.samples
        stage = load_stage("simulate")
        users, turns = read_users(args, stage.ROLEPLAYER_PROMPT), Counter()
        left = {pair: sum((*pair, sample) not in there for sample in range(args.samples)) for pair in pairs}
        for pair in left:
            turns[user_of(users, args.seed, *pair)] += left[pair] * (args.max_turns + 1)     # twice the mean of 1..K
        self.work["conversations"] += sum(left.values())
        self.ask("Questioner", args.questioner, args, turns.total() // 2, stage.questioner_chat("June", TASK, TALK),
                 "question", args.max_tokens)
        for user in turns:
            self.ask("Roleplayer", user.model, args, turns[user] // 2,
                     stage.roleplayer_chat(TEXT["persona"], TASK, TALK, user.prompt), "answer", args.max_tokens)
        return sum(left.values())

    def select(self, args):
        pairs, samples = self.talked(args)
        output, scores = files_of("select", args)
        if finished(output):
            return 0
        self.work["scores"] += max(0, len(pairs) * samples - sum(1 for _ in rows_of(scores)))
        left = max(1, len(pairs) * args.k - sum(1 for _ in rows_of(output)))
        if not args.no_response:
            self.ask("Questioner", args.questioner, args, left, response_form("June", TASK, TALK * 2), "response",
                     args.max_tokens)
        return left

    def train(self, args):
        left = not finished(args.output)
        self.work["trainings"] += left
        self.models += [(args.base, args.dtype)] * left
        return left

    def evaluate(self, args):
        pairs, samples = self.talked(args)
        left = {Path(file).stem: not finished(file) for file in files_of("evaluate", args)}
        judged = min(args.win_pairs, len(pairs))
        self.work["evaluations"] += any(left.values())
        if left.get("log_probs"):                               # Q-Experimental and Q-Random; Q_BASE's have the controls
            self.work["scores"] += 2 * len(pairs) * (samples + (args.iteration == 0))
        if left.get("responses"):
            self.ask("Questioner", args.questioner, args, judged, response_form("June", TASK, TALK * 2), "response",
                     args.max_tokens)
        if left.get("verdicts"):
            chat = load_stage("evaluate").judge_chat(TEXT["persona"], TASK, TEXT["response"], TEXT["response"], "ours_first")
            self.ask("judge", args.judge, args, judged * (1 + args.both_orders), chat, "verdict", args.judge_max_tokens)
        return sum(left.values())

    def pairs(self, args, split):
        personas = self.people.get(args.personas) or read_personas(args.personas)
        return all_pairs(read_tasks(args.tasks), personas, split, args.limit, args.seed)

    def talked(self, args):
        """(pairs, samples) of a file of conversations; golds of one's own must have these pairs."""
        if args.conversations not in self.talks:                # of another run.sh: VARIANTS without main
            samples = Counter(pair_of(row) for row in rows_of(args.conversations))
            self.talks[args.conversations] = sorted(samples), max(samples.values(), default=0)
        pairs, samples = self.talks[args.conversations]
        if args.gold not in self.state:
            read_gold(args.gold, pairs)
        return pairs, samples

    def ask(self, role, spec, args, calls, chat, what, max_tokens):
        """Counts calls with prompts like `chat` and answers like a `what`."""
        model = spec if role != "Questioner" else "with SERVE" if spec.startswith("openai:") else "on this machine"
        most = int(args.extra.get("max_completion_tokens") or max_tokens)
        length, answer = sum(len(message["content"]) for message in chat) // 4, min(TOKENS[what], most)
        dollars = (args.prices[0] * length + args.prices[1] * answer) / 1e6 if args.prices else 0
        if calls:
            self.calls[role, model].update(calls=calls, tokens_in=calls * length, tokens_out=calls * answer,
                                           most=calls * most, dollars=calls * dollars)
            self.asked.setdefault((role, spec), args)


# ---------------------------------------------------------------- what is said, asked and removed

def model_bytes(base, dtype):
    """The size of a model that is trained from `base`; None for a hub name that has not been downloaded yet."""
    from huggingface_hub import snapshot_download
    try:
        folder = Path(base if os.path.isdir(base) else snapshot_download(base, local_files_only=True))
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):                               # LocalEntryNotFoundError is both
        return None
    stored = 4 if config.get("dtype", config.get("torch_dtype")) == "float32" else 2
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors")) * (4 if dtype == "float32" else 2) // stored


def tell(plan, folder):
    """Prints the plan; fails if its models do not fit on the disk."""
    work = plan.work
    print(f"{folder}: {work['done']} of {work['outputs']} outputs are done. Left: {work['conversations']:,} conversations, "
          f"{work['scores']:,} scores, {work['trainings']} trainings, {work['evaluations']} evaluations")
    for (role, model), count in plan.calls.items():
        print(f"  {role}, {model.split('@http')[0]}: {count['calls']:,} calls (about {count['tokens_in']:,} tokens in, "
              f"{count['tokens_out']:,} out, at most {count['most']:,})"
              + (f": ${count['dollars']:,.2f}" if model.startswith("openai:") and count["dollars"] else ""))
    dollars = sum(count["dollars"] for (_, model), count in plan.calls.items() if model.startswith("openai:"))
    if plan.calls:
        print("  Tokens are estimates" + (f", and so is the price: ${dollars:,.2f} in all" if dollars else "."))
    sizes = [model_bytes(*model) for model in plan.models]
    place = next(parent for parent in (Path(folder).resolve(), *Path(folder).resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if None in sizes:
        print(f"  {len(sizes)} models of unknown size: {plan.models[0][0]} is not here yet; {free / 1e9:.1f} GB are free")
    elif sizes:
        print(f"  {len(sizes)} models: {sum(sizes) / 1e9:.1f} GB; {free / 1e9:.1f} GB are free")
    return free - sum(filter(None, sizes))


def open_first(plan):
    """Tokenizer and configuration of each model that is opened here, as its stage would: a wrong name is found now."""
    for path in plan.here:
        from transformers import AutoConfig
        common.load_tokenizer(path)
        common.load(AutoConfig, path)


def ask_first(plan):
    """One real question to each server that the plan asks, as its stage would: before hours of work, not after."""
    persona, response = None, "Here is a general answer that would suit anybody."
    for (role, spec), args in plan.asked.items():
        if not spec.startswith("openai:") or role == "Questioner":
            continue
        task = next(iter(read_tasks(args.tasks).values()))["task"] if "tasks" in args else TASK
        if not persona:
            examples = [row["persona"] for row in read_rows(
                args.examples if role == "persona writer" else args.personas, {"persona_id": str}, {"persona": str})]
            persona = examples[0]
        if role == "persona writer":
            chat = load_stage("generate_personas").persona_request(examples, args.seed).chat
        elif role == "Oracle":
            chat = load_stage("gold").oracle_chat(persona, task)
        elif role == "Roleplayer":
            chat = load_stage("simulate").roleplayer_chat(persona, task, [{"role": "assistant", "content": QUESTION}])
        else:
            chat = load_stage("evaluate").judge_chat(persona, task, response, "I do not know.", "ours_first")
        temperature = 0.0 if role == "judge" else getattr(args, "roleplayer_temperature", getattr(args, "temperature"))
        max_tokens = args.judge_max_tokens if role == "judge" else args.max_tokens
        request = common.Request(chat, args.seed)
        try:
            (_, reply), = common.ServerModel(spec, args).generate({0: request}, temperature, args.top_p, max_tokens)
        except OSError as error:
            error.args = (f"the {role}, {error}",)
            raise
        said = " ".join((reply.text or reply.refused).split())
        if reply.refused or role == "judge" and not load_stage("evaluate").read_verdict(reply.text, "ours_first"):
            fail(f"the {role}, {spec}, was asked one question, and its answer cannot be used: {said[-200:]!r}. Name "
                 f"another model, or change its requests (EXTRA, docs/servers.md).")
        print(f"asked the {role}, {spec}: {said[:60]!r} ...", flush=True)
        persona, response = (reply.text if role == "persona writer" else persona,
                             reply.text if role == "Oracle" else response)


def remove(stale):
    """Removes stale outputs, and nothing else; from the results, all rows of their split. A variant that is not run now
    may be as stale. Each that is run writes its rows again."""
    for stage, args in stale:
        for file in files_of(stage, args):
            for path in (file, *unfinished(file), f"{file}.settings.json"):
                shutil.rmtree(path) if os.path.isdir(path) else Path(path).unlink(missing_ok=True)
        print(f"removed, since it was stale: {args.output}")
    for results, split in {(args.results, args.split) for stage, args in stale if stage == "evaluate"}:
        if os.path.exists(results):
            common.write_whole(results, "".join(json.dumps(row) + "\n" for row in rows_of(results) if row["split"] != split))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="RUN", help="the run's folder")
    parser.add_argument("--commands", required=True, help="the file that run.sh's first pass has written")
    parser.add_argument("--stale", choices=("remove",), help="remove what is stale")
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do, refuse nothing")
    parser.add_argument("--ask", action="store_true", help="ask each server one question")
    args = parser.parse_args()
    argparse.ArgumentParser.error = lambda _, message: fail(message)       # of the stages: a line, and no usage
    GONE.clear()
    plan = Plan(commands := list(read_commands(args.commands)))
    stale = plan.stale
    problem = stale and (
        f"{args.folder}: stale, by a changed setting or file: {', '.join(plan.why)}; with what was made from that, in all: "
        f"{', '.join(old.output for _, old in stale)}. STALE=remove removes these; or undo the change, or give "
        "another RUN.").replace(f"{args.folder}/", "")
    if problem and not args.dry_run and not args.stale:
        fail(problem)
    if stale:                                                   # count what is left once they are removed
        GONE.update(file for old in stale for file in files_of(*old))
        plan = Plan(commands)
    room = tell(plan, args.folder) + sum(file.stat().st_size for path in GONE for file in Path(path).rglob("*"))
    if problem and args.dry_run:
        print(f"  This counts what is stale as not there. {problem}")
    if room < 0 and not args.dry_run:
        fail(f"{args.folder}: the models to come need {-room / 1e9:.1f} GB more than are free. Make room, or give "
             "another RUN.")
    if not args.dry_run:
        open_first(plan)
        if args.ask:
            ask_first(plan)
        remove(stale)


if __name__ == "__main__":
    run(main)
