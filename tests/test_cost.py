"""report/cost.py: what commands will ask and compute, against numbers worked out by hand."""
import re

import gold
from conftest import run_stage

PEOPLE = "python generate_personas.py --model openai:w --splits A=50,B=50,test=10 --output r/p.jsonl\n"
PAPER = PEOPLE + r"""# python gold.py --oracle openai:nobody --output r/comment.jsonl
python gold.py --oracle openai:o --personas r/p.jsonl --split A B test --output r/g.jsonl
accelerate launch simulate.py --roleplayer openai:a@http://h/v1 openai:b --personas r/p.jsonl --output r/c.jsonl
bash settings/serve.sh python select.py --questioner q --conversations r/c.jsonl --output r/s.jsonl
python toy/measure.py --output r/s.jsonl
accelerate launch --num_processes 8 train.py --selected r/s.jsonl --output r/1/model
python train.py --selected r/s.jsonl --output r/1/model
python simulate.py --roleplayer openai:a --personas r/p.jsonl --split test --samples 4 --max-turns 2 --output r/t
python evaluate.py --iteration 0 --conversations r/t --output r/0
python evaluate.py --baseline r/0 --judge openai:j --both-orders --conversations r/t --extra \{\"a\":\ 1\} --output r/1
"""


def cost(lines, *flags, status=0):
    """({(role, model): [calls, tokens in, tokens out, dollars]}, all that it says)"""
    said = "".join(run_stage("report/cost.py", *flags, status=status, input=lines))
    rows = re.findall(r"(\S+) +(\S.*?) +(\S+) calls +(\S+) tokens in +(\S+) out +(\S+) \$\n", said)
    return {row[:2]: [float(cell.replace(",", "")) for cell in row[2:]] for row in rows}, said


def test_the_papers_scale():
    """12,500 pairs of split A with 10 conversations of 2 questions; 500 of test, here with 4 of 1 or 2."""
    rows, said = cost(PAPER, "--prices", "1", "10")
    assert {who: row[0] for who, row in rows.items()} == {
        ("writer", "openai:w"): 110, ("Oracle", "openai:o"): 2 * 250 * 50 + 50 * 10, ("judge", "openai:j"): 2 * 300,
        ("Roleplayer", "openai:a"): 125_000 + 3_000, ("Roleplayer", "openai:b"): 125_000,
        ("Questioner", "on this machine"): 250_000 + 12_500 + 3_000 + 300 + 300}
    n = len("".join(m["content"] for m in gold.oracle_chat("word" * 170, "How do I start a small herb garden?"))) // 4
    assert rows["Oracle", "openai:o"][1:] == [25_500 * n, 25_500 * 250, round(25_500 * (n + 2_500) / 1e6, 2)]
    assert rows["Questioner", "on this machine"][3] == 0
    assert "\n1 trainings, 127,000 conversations, 134,000 scores, " in said, "125,000 + 2 x 500 x 5 + 2 x 500 x 4"


def test_limits_a_worlds_tasks_and_files_of_ones_own(world):
    limited = "gold.py --oracle openai:o --personas r/p.jsonl --split A --limit 7 --max-tokens 99 --output g"
    assert cost(PEOPLE + limited)[0]["Oracle", "openai:o"][::2] == [7, 693]
    unwritten = "simulate.py --personas r/p.jsonl --tasks no.jsonl --tasks-per-split 28 --split test --output c"
    assert "0 trainings, 2,800 conversations" in cost(PEOPLE + unwritten)[1]
    talks, served = world.path("talks.jsonl"), f"openai:{world.folder}@http://h"        # a folder: it's served here
    rows, said = cost(f"select.py --conversations {talks} --questioner {served} --output s", "--prices", 1, 1)
    assert "24 scores" in said and rows["Questioner", "on this machine"][::3] == [12, 0]
    own = " ".join(world.flags("personas", "tasks"))
    assert "48 conversations" in cost(f"simulate.py {own} --samples 4 --output c")[1]


def test_aloe():
    """3,000 conversations of 10 rounds; 100 people are evaluated."""
    talk = "--personas r/p.jsonl --roleplayer openai:u --rounds 10"
    rows, said = cost(f"""
python aloe/generate_personas.py --model openai:w --splits train=3310,test=100 --output r/p.jsonl
python aloe/simulate.py --model openai:t --inducer openai:i {talk} --limit 3000 --output r/c.jsonl
python aloe/train.py --stage sft --base m --conversations r/c.jsonl --output r/sft
python aloe/evaluate.py --model r/sft --variant sft --judge openai:j {talk} --output r/e""")
    assert {who: row[0] for who, row in rows.items()} == {
        ("writer", "openai:w"): 30, ("Roleplayer", "openai:u"): 31_000, ("model", "openai:t"): 60_000,
        ("inducer", "openai:i"): 30_000, ("model", "on this machine"): 1_000, ("judge", "openai:j"): 1_000}
    assert "\n1 trainings, 3,100 conversations, 0 scores" in said


def test_bad_input_is_one_line():
    for line, why in (("echo", "no command of a stage"), ("gold.py --frob", "gold.py: error: "),
                      ("gold.py --oracle o --personas no.jsonl --output g", "no.jsonl: No such file")):
        assert re.fullmatch(f".*{why}.*\n", cost(line, status=2)[1])
