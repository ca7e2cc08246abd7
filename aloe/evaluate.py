"""Evaluate a model: how well its replies fit a user whom it comes to know, round by round (ALOE, section 3).

    AL(k)    mean score of a judge, who sees the persona, of the replies of round k; 1 to 5
    IR       slope b of the least-squares line  b k + a  through AL(1), ..., AL(K)                      (eq. 3)
    N-IR     the same slope through  (AL(k) - min AL) / (max AL - min AL)                               (eq. 4)
    R2       of either line

The model sees the chat alone: no persona, no hint. An answer of the judge that is no whole number from 1 to 5 is
unreadable: counted and left out. Intervals: 95 %, a bootstrap over personas.

    reads   --personas      {"persona_id": "test0000", "split": "test", "profile": "...", "personality": "..."}
    writes  --output FOLDER     conversations.jsonl  {"persona_id", "split", "profile", "personality",
                                                      "rounds": [{"user": "...", "reply": "..."}]}
                                scores.jsonl         {"persona_id", "round": 0, "score": 4, "raw": "4"}
            --results       {"variant": "sft", "iteration": 0, "metric": "AL", "condition": "T=0", "roleplayer":
                             "aloe-user", "split": "test", "mean": 4.57, "sem": 0.04, "n": 100, "interval_95": [...],
                             "by_round": [4.12, ...]}      and rows of IR, N-IR and R2

On a laptop, with the embedded world's server (aloe/toy/server.py) running:
    python aloe/evaluate.py --model runs/am --variant sft --roleplayer openai:aloe-user@http://127.0.0.1:8766/v1 \\
        --judge openai:aloe-judge@http://127.0.0.1:8766/v1 --dtype float32 --max-tokens 32 --personas runs/ap.jsonl \\
        --output runs/ae --results runs/ar.jsonl
The paper's scale, 100 x 10 x 2 calls (the paper: GPT-4o plays the user and judges):
    python aloe/evaluate.py --model runs/aloe/dpo --variant sft_dpo --roleplayer openai:MODEL --judge openai:MODEL \\
        --personas runs/aloe/personas.jsonl --output runs/aloe/eval/dpo --results runs/aloe/results.jsonl
"""
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is an evaluate.py
from aloe.simulate import read_people, talk, talk_parser, user_speaker, walked  # noqa: E402
from common import (Request, Rows, answer_all, fail, fingerprint, natural, read_prompts, run,  # noqa: E402
                    say, seed_for, start_processes)
from evaluate import read_results, roleplayer_label, write_results  # noqa: E402

PROMPTS = read_prompts("aloe_judge")


def judge_chat(person, message, response, prompts=PROMPTS):
    """The judge's prompt: the persona, the user's message and the reply to it."""
    return [{"role": "user", "content": prompts["aloe_judge"].format(
        profile=person["profile"], personality=person["personality"], message=message, response=response)}]


def read_score(raw):
    """1 to 5, or None if the answer is anything but that number ("4", "**4**", "Score: 4."): never a guess."""
    match = re.fullmatch(r"(?:score\s*[:=]?\s*)?([1-5])\.?", raw.strip("*_`'\" \n"), re.IGNORECASE)
    return int(match[1]) if match else None


def improvement(al):
    """{"AL": average, "IR", "N-IR", "R2"} of AL(1..K), floats; NaN where a curve of one height or point has none."""
    al, k = np.array(al, float), np.arange(1, len(al) + 1)
    dk, d = k - k.mean(), al - al.mean()
    if np.ptp(al) == 0:
        d = d * 0                                               # not a rest of rounding
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (dk @ d) / (dk @ dk)                            # eq. 3: argmin over b, a of sum (b k + a - AL(k))^2
        return {"AL": float(al.mean()), "IR": float(slope), "N-IR": float(slope / np.float64(np.ptp(al))),  # eq. 4
                "R2": float((dk @ d) ** 2 / ((dk @ dk) * (d @ d)))}


def mean_sem(values):
    """{"mean", "sem", "n"} of one value a person. People are independent: the plain standard error, None for one."""
    n = len(values)
    return {"mean": float(np.mean(values)), "sem": float(np.std(values, ddof=1) / n ** 0.5) if n > 1 else None, "n": n}


def bootstrap(scores, seed, draws=2000):
    """{name: [low, high]}: 95 % intervals of `improvement` over personas drawn with replacement. scores: (N, K), NaN
    where the judge's answer was unreadable."""
    chance, drawn = np.random.default_rng(seed), []
    for _ in range(draws if len(scores) > 1 else 0):
        sample = scores[chance.integers(len(scores), size=len(scores))]
        if not np.isnan(sample).all(0).any():
            drawn.append(improvement(np.nanmean(sample, 0)))
    return {name: [float(np.nanpercentile([one[name] for one in drawn], q)) for q in (2.5, 97.5)]
            for name in (drawn[0] if drawn else ()) if not np.isnan([one[name] for one in drawn]).all()}


def table(results):
    """Lines of the paper's table 1, for the rows of a split: a line a model and temperature, a column a round."""
    users = {row["roleplayer"] for row in results}
    rows = {(f"{row['variant']} {row['condition']}" + f" ({row['roleplayer']})" * (len(users) > 1), row["metric"]): row
            for row in results}
    K, width = max(len(row.get("by_round", ())) for row in results), max(len(who) for who, _ in rows)
    lines = [" " * width + "".join(f"{f'k={k}':>6}" for k in range(1, K + 1)) + "".join(
        f"{name:>8}" for name in ("Average", "IR", "N-IR", "R2"))]
    for (who, metric), row in rows.items():
        if metric == "AL":
            means = [rows[who, name]["mean"] for name in ("IR", "N-IR", "R2")]
            lines.append(f"{who:<{width}}" + "".join(f"{al:6.2f}" for al in row["by_round"]).ljust(6 * K)
                         + f"{row['mean']:8.2f}" + "".join("       -" if m is None else f"{m:8.3f}" for m in means))
    return lines


def parse_args():
    parser = talk_parser(__doc__, "folder of the conversations and scores", "test")
    parser.add_argument("--judge", required=True, help="gives 1 to 5; the paper: GPT-4o")
    parser.add_argument("--judge-max-tokens", type=natural, default=16, help="length of a score")
    parser.add_argument("--results", default="runs/aloe/results.jsonl", help="gets four rows; a rerun replaces them")
    parser.add_argument("--variant", required=True, help="the model's name in the table: base, sft, rejected, sft_dpo")
    return parser.parse_args()


def main():
    args = parse_args()
    people = read_people(args.personas, args.split, args.limit, args.seed)
    roleplay, judging = (read_prompts(name, folder=args.prompts) for name in ("aloe_roleplay", "aloe_judge"))
    speakers = {"user": user_speaker(args, people, roleplay),
                "reply": (lambda _: args.model, args.temperature, lambda _, said, now: said)}
    path, processes = f"{args.output}/conversations.jsonl", start_processes()
    output = Rows(args, path, ("persona_id",), processes, ("variant", "judge", "judge_max_tokens"), **roleplay)
    talk(output, people, [["user"], ["reply"]], speakers, lambda *_: {}, "conversations")

    scores = Rows(args, f"{args.output}/scores.jsonl", ("persona_id", "round"), processes, ("variant",), **judging,
                  conversations=fingerprint(path))              # those that are made again make the scores stale
    whole = [key for key in people if "refused" not in output[key]]                        # the N people who count
    requests = {(*key, k): Request(judge_chat(people[key], r["user"], r["reply"], judging),
                                   seed_for(args.seed, "judge", *key, k))
                for key in whole for k, r in enumerate(output[key]["rounds"])}

    def score_row(key, reply):
        score = read_score(reply.text)
        return {"score": score, "raw": reply.text, **({} if score else {"refused": "unreadable"})}

    answer_all(scores, requests, args.judge, (0.0, args.top_p, args.judge_max_tokens), "scores", score_row)
    matrix = np.array([[scores[(*key, k)]["score"] or np.nan for k in range(args.rounds)] for key in whole])   # (N, K)
    matrix = matrix[~np.isnan(matrix).all(1)] if len(matrix) else matrix
    if not len(matrix) or np.isnan(matrix).all(0).any():
        fail(f"{args.output}: a round without any readable score. Look at scores.jsonl, try another --judge.", status=1)
    by_round = np.nanmean(matrix, 0)                                                            # AL(1..K)
    means, intervals = improvement(by_round), bootstrap(matrix, args.seed)
    spread = {**mean_sem(np.nanmean(matrix, 1).tolist()), "by_round": [round(float(al), 6) for al in by_round]}
    common_fields = {"variant": args.variant, "iteration": 0, "condition": f"T={args.temperature:g}",
                     "roleplayer": roleplayer_label(path, None), "split": args.split}
    if processes.is_main_process:
        write_results(args.results, [{**common_fields, "metric": name, **(spread if name == "AL" else {"sem": None}),
                                      "mean": None if np.isnan(mean) else mean, "n": len(matrix),
                                      "interval_95": intervals.get(name)} for name, mean in means.items()])
        say(processes, "", *walked(output[whole[0]]["rounds"]), "",
            *table([row for row in read_results(args.results) if row["split"] == args.split]))
    say(processes, f"{scores.summary()}; {sum(row['score'] is None for row in scores.values())} unreadable; "
                   f"{len(people) - len(whole)} of {len(people)} conversations refused")


if __name__ == "__main__":
    run(main)
