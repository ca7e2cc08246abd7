"""Evaluate a model: how well its replies fit a user whom it comes to know, round by round (ALOE, section 3).

    AL(k)    mean score of a judge, who sees the persona, of the replies of round k; 1 to 5
    IR       slope b of the least-squares line  b k + a  through AL(1), ..., AL(K)                      (eq. 3)
    N-IR     the same slope through  (AL(k) - min AL) / (max AL - min AL)                               (eq. 4)
    R2       of either line

The model sees the chat alone: no persona, no hint. An answer of the judge that is no whole number from 1 to 5 is
unreadable: counted and left out. Intervals: 95 %, a bootstrap over personas.
--second-judge scores the same replies, or some (section 5.4): the share of equal scores, and Cohen's kappa. It may be a
person (people/server.py), and added later, to an evaluation that is there.

    reads   --personas      {"persona_id": "test0000", "split": "test", "profile": "...", "personality": "..."}
    writes  --output FOLDER     conversations.jsonl  {"persona_id", "split", "profile", "personality",
                                                      "rounds": [{"user": "...", "reply": "..."}]}
                                scores.jsonl         {"persona_id", "round": 0, "score": 4, "raw": "4"}
                                scores-NAME.jsonl    the second judge's
            --results       {"variant": "sft", "iteration": 0, "metric": "AL", "condition": "T=0", "roleplayer":
                             "aloe-user", "split": "test", "mean": 4.57, "sem": 0.04, "n": 100, "interval_95": [...],
                             "by_round": [4.12, ...]}      and rows of IR, N-IR and R2

Its command, on a laptop and at the paper's scale (100 x 10 x 2 calls): PRINT=1 bash aloe/run.sh [paper]
"""
import re
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # first: there, too, is an evaluate.py
from aloe.simulate import cuts, read_people, roleplayer_chat, talk, talk_parser, walked  # noqa: E402
from common import (Request, Rows, answer_all, fail, fingerprint, name_of, natural, read_prompts, run,  # noqa: E402
                    sample_pairs, say, seed_for, start_processes)
from evaluate import roleplayer_label, summary, write_results  # noqa: E402
from report.stats import kappa  # noqa: E402

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
    """{"AL": average, "IR", "N-IR", "R2"} of curves AL(1..K), of shape (..., K). One of one height or point has NaN."""
    al, k = np.asarray(al, float), np.arange(1, np.shape(al)[-1] + 1)
    height, dk = np.ptp(al, -1), k - k.mean()
    d = np.where(height[..., None] == 0, 0, al - al.mean(-1, keepdims=True))       # not a rest of rounding
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = d @ dk / (dk @ dk)                              # eq. 3: argmin over b, a of sum (b k + a - AL(k))^2
        return {"AL": al.mean(-1), "IR": slope, "N-IR": slope / height,                                         # eq. 4
                "R2": (d @ dk) ** 2 / ((dk @ dk) * (d * d).sum(-1))}


def mean_sem(values):
    """{"mean", "sem", "n"} of one value a person. People are independent: the plain standard error, None for one."""
    n = len(values)
    return {"mean": float(np.mean(values)), "sem": float(np.std(values, ddof=1) / n ** 0.5) if n > 1 else None, "n": n}


def bootstrap(scores, seed, baseline=None, draws=2000):
    """{name: [low, high]}: 95 % intervals of `improvement`, and of the curve's points ("by_round"), over personas drawn
    with replacement. With a baseline: of the difference to it, of the same people. scores, baseline: (N, K), NaN where
    the judge's answer was unreadable. A draw without any score in a round has no part in it."""
    people = np.random.default_rng(seed).integers(len(scores), size=(draws, len(scores)))               # (draws, N)

    def drawn(of):
        known = ~np.isnan(of[people])
        with np.errstate(invalid="ignore"):
            curves = np.where(known, of[people], 0).sum(1) / known.sum(1)                               # (draws, K)
        return {**improvement(curves), "by_round": curves}

    found, theirs = drawn(scores), {} if baseline is None else drawn(baseline)
    found = {name: values - theirs.get(name, 0) for name, values in found.items()}
    return {name: np.nanpercentile(values, (2.5, 97.5), axis=0).T.tolist() for name, values in found.items()
            if len(scores) > 1 and not np.isnan(values).all(0).any()}


def by_person(rows):
    """{persona_id: K scores, NaN for an unreadable one} of the rows of scores.jsonl; not of people without any."""
    people = defaultdict(dict)
    for row in rows:
        people[row["persona_id"]][row["round"]] = row.get("score") or np.nan
    people = {who: np.array([scores[k] for k in sorted(scores)]) for who, scores in people.items()}
    return {who: scores for who, scores in people.items() if not np.isnan(scores).all()}


def chat(person, rounds, K, prompts):
    """A conversation of K rounds, as steps for aloe/simulate.py's engine: the user, the model."""
    for _ in range(K):
        rounds.append({})
        yield {"user": roleplayer_chat(person, walked(rounds), prompts)}
        yield {"reply": walked(rounds)}


def judgements(args, processes, judge, name, requests, **settings):
    """The rows of one judge's scores, {(persona_id, round): row}."""
    def score_row(_, reply):
        score = read_score(reply.text)
        return {"score": score, "raw": reply.text, **({} if score else {"refused": "unreadable"})}

    rows = Rows(args, f"{args.output}/{name}.jsonl", ("persona_id", "round"), processes, ("variant", "second_judge",
                "second_cases"), **settings, judge=fingerprint(judge))
    answer_all(rows, requests, judge, (0.0, args.top_p, args.judge_max_tokens), name, score_row)
    return rows


def parse_args():
    parser = talk_parser(__doc__, "folder of the conversations and scores", "test")
    parser.add_argument("--judge", required=True, help="gives 1 to 5; the paper: GPT-4o")
    parser.add_argument("--judge-max-tokens", type=natural, default=16, help="length of a score")
    parser.add_argument("--second-judge", metavar="MODEL", help="scores the same replies: agreement, and Cohen's kappa")
    parser.add_argument("--second-cases", type=natural, metavar="N", help="some N of a round (the paper, people: 5)")
    parser.add_argument("--results", default="runs/aloe/results.jsonl", help="gets four rows; a rerun replaces them")
    parser.add_argument("--variant", required=True, help="the model's name in the table: base, sft, rejected, sft_dpo")
    return parser.parse_args()


def main():
    args = parse_args()
    people = read_people(args.personas, args.split, args.limit, args.seed)
    roleplay, judging = (read_prompts(name, folder=args.prompts) for name in ("aloe_roleplay", "aloe_judge"))
    path, processes = f"{args.output}/conversations.jsonl", start_processes()
    output = Rows(args, path, ("persona_id",), processes, ("variant", "judge", "judge_max_tokens", "second_judge",
                  "second_cases"), **roleplay)
    talk(output, people, lambda key, rounds: chat(people[key], rounds, args.rounds, roleplay),
         {"reply": (args.model, args.temperature)})

    whole = [key for key in people if not output[key].get("refused")]                        # the N people who count
    requests = {(*key, k): Request(judge_chat(people[key], r["user"], r["reply"], judging),
                                   seed_for(args.seed, "judge", *key, k))
                for key in whole for k, r in enumerate(output[key]["rounds"])}
    # Conversations that are made again make the scores stale.
    judged = partial(judgements, args, processes, **judging, conversations=fingerprint(path))
    scores = judged(args.judge, "scores", requests)

    def add_results(metrics):
        if processes.is_main_process:
            of = {"variant": args.variant, "iteration": 0, "condition": f"T={args.temperature:g}",
                  "roleplayer": roleplayer_label(path, None), "split": args.split}
            write_results(args.results, [{**of, "metric": metric, **fields} for metric, fields in metrics.items()],
                          "{variant}")

    matrix = np.array(list(by_person(scores[key] for key in requests).values()))                            # (N, K)
    if not len(matrix) or np.isnan(matrix).all(0).any():
        fail(f"{args.output}: a round without any readable score. Look at scores.jsonl, try another --judge.", status=1)
    by_round, intervals = np.nanmean(matrix, 0), bootstrap(matrix, args.seed)                   # AL(1..K)
    found = {name: {"mean": None if np.isnan(mean) else float(mean), "sem": None, "n": len(matrix),
                    "interval_95": intervals.get(name)} for name, mean in improvement(by_round).items()}
    found["AL"] |= {**mean_sem(np.nanmean(matrix, 1).tolist()), "by_round": by_round.round(6).tolist(),
                    "interval_by_round": intervals.get("by_round")}
    say(processes, "", *walked(output[whole[0]]["rounds"]), "")
    add_results(found)
    if args.second_judge:
        few = [key for k in range(args.rounds) for key in sample_pairs(
            [key for key in requests if key[1] == k and scores[key]["score"]], args.second_cases, args.seed)]
        name = name_of(args.second_judge)
        second = judged(args.second_judge, "scores-" + name.replace("/", "-"), {key: requests[key] for key in few})
        ours, theirs = ({key: rows[key]["score"] for key in few if second[key]["score"]} for rows in (scores, second))
        equal = {key: float(ours[key] == theirs[key]) for key in ours}
        add_results({f"{metric} with {name}": summary(values)
                     for metric, values in (("agreement", equal), ("kappa", kappa(ours, theirs)))})
        say(processes, f"{second.summary()}; {len(few) - len(ours)} unreadable")
    say(processes, f"{output.summary()} ({cuts(output.values())}); {len(people) - len(whole)} refused",
        f"{scores.summary()}; {sum(row['score'] is None for row in scores.values())} unreadable")


if __name__ == "__main__":
    run(main)
