"""What evaluate.py cannot know: how well the questions and responses of an iteration fit the embedded world.

    relevant_share   of the questions asked: about a fact that matters for the task, and that was not asked for before
    coverage         facts that matter and that the user told, true ones, over the most that so many questions could
                     bring: above 1 where a user tells what nobody asked for
    question_share   of the responses: another question, that is, with a question mark
    used_facts       per response: facts of the persona that matter for the task, and that the response states
    invented_facts   per response: values of the world in it, each once, that occur in no user turn of the conversation
                     it answers and not in the task

It reads conversations (simulate.py) and responses (evaluate.py), and adds a row for each metric to the results file:

    python toy/measure.py --variant main --iteration 1 --split test \\
        --conversations runs/smoke/main/1/test.jsonl --responses runs/smoke/main/1/test/responses.jsonl \\
        --tasks runs/smoke/tasks.jsonl --personas runs/smoke/personas.jsonl --results runs/smoke/results.jsonl

    {"variant": "main", "iteration": 1, "metric": "relevant_share", "condition": "", "roleplayer": "roleplayer",
     "split": "test", "mean": 0.78, "sem": 0.02, "interval_95": [0.73, 0.83], "n": 192}

All means are over (task, persona) pairs; the samples of a pair are averaged first.
"""
import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
from common import SAMPLE, fail, key_of, read_conversations, read_personas, read_rows, read_tasks, run  # noqa: E402
from evaluate import by_pair, roleplayer_label, summary, write_results  # noqa: E402
from toy import world  # noqa: E402

TITLES = {"relevant_share": "Questions about a fact that matters, each fact once (share)",
          "coverage": "Facts that matter and were told, of those possible (share)",
          "question_share": "Responses that are another question (share)",
          "used_facts": "Facts of the persona that matter, in a response",
          "invented_facts": "Invented facts in a response"}


def relevant_share(conversation, task):
    """Share of the conversation's questions that are about a slot that matters for the task; a slot counts once."""
    slots = [world.question_slot(turn["content"]) for turn in conversation if turn["role"] == "assistant"]
    return len(set(slots) & set(world.relevant_slots(task))) / len(slots)


def coverage(conversation, task, persona):
    """Facts that matter for the task and that the user told, over the most that so many questions can bring."""
    told = world.facts_in(" ".join(turn["content"] for turn in conversation if turn["role"] == "user"))
    true, relevant = told & world.facts_in(persona), world.relevant_slots(task)
    return sum(slot in relevant for slot, _ in true) / min(len(conversation) // 2, len(relevant))


def invented_facts(response, conversation, task):
    """How many facts the response states that neither the user nor the task mentioned."""
    told = [turn["content"] for turn in conversation if turn["role"] == "user"]
    return len(world.facts_in(response) - world.facts_in(" ".join([task, *told])))


def used_facts(response, task, persona):
    """How many facts of the persona that matter for the task the response states."""
    matter = world.relevant_slots(task)
    return sum(slot in matter for slot, _ in world.facts_in(response) & world.facts_in(persona))


def measure(conversations, responses, tasks, personas):
    """Rows of both files, {task_id: task row}, {persona_id: its row} -> {metric: {(task_id, persona_id): mean over the
    pair's samples}}; empty where there are no responses."""
    talks = {key_of(row): row["conversation"] for row in conversations}

    def means(rows, of):
        return by_pair([{**row, "value": of(row, tasks[row["task_id"]]["task"], personas[row["persona_id"]]["persona"])}
                        for row in rows], "value")

    return {
        "relevant_share": means(conversations, lambda row, task, persona: relevant_share(row["conversation"], task)),
        "coverage": means(conversations, lambda row, task, persona: coverage(row["conversation"], task, persona)),
        "question_share": means(responses, lambda row, task, persona: float("?" in row["response"])),
        "used_facts": means(responses, lambda row, task, persona: used_facts(row["response"], task, persona)),
        "invented_facts": means(responses, lambda row, task, persona: invented_facts(
            row["response"], talks[key_of(row)], task))}


def measure_parser(manual):
    """The flags that run.sh gives to this command, and to people/measure.py."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="main", help="main, no_reg, random, or a name of yours")
    parser.add_argument("--iteration", type=int, required=True, help="t; 0 is Q_BASE")
    parser.add_argument("--roleplayer", metavar="NAME", help="label; default: as --conversations' settings say")
    parser.add_argument("--split", default="test", help="of the tasks and personas")
    parser.add_argument("--conversations", required=True, help="Q_t's conversations on the split (JSONL)")
    parser.add_argument("--tasks", required=True, help="tasks (JSONL)")
    parser.add_argument("--personas", required=True, help="personas (JSONL)")
    parser.add_argument("--results", required=True, help="gets a row for each metric; a rerun replaces it")
    return parser


def main():
    parser = measure_parser(__doc__)
    parser.add_argument("--responses", help="the responses to them (JSONL); a run without a judge has none")
    args = parser.parse_args()
    tasks, personas = read_tasks(args.tasks), read_personas(args.personas)
    conversations = [row for row in read_conversations(args.conversations, tasks, personas)
                     if tasks[row["task_id"]]["split"] == args.split and not row.get("refused")]
    responses = [row for row in read_rows(args.responses, SAMPLE, {"turns": int, "response": str})
                 if not row.get("refused")] if args.responses else []
    if not set(map(key_of, responses)) <= set(map(key_of, conversations)):
        fail(f"{args.responses}: answers conversations that are not in {args.conversations}. Give the file behind it.")
    rows, roleplayer = [], roleplayer_label(args.conversations, args.roleplayer)
    for metric, pairs in measure(conversations, responses, tasks, personas).items():
        if not pairs:
            continue
        rows.append({"variant": args.variant, "iteration": args.iteration, "metric": metric, "condition": "",
                     "roleplayer": roleplayer, "split": args.split, "title": TITLES[metric], **summary(pairs)})
    write_results(args.results, rows)
    print(f"{args.results}: {len(rows)} means, from {len(conversations)} conversations, {len(responses)} responses")


if __name__ == "__main__":
    run(main)
