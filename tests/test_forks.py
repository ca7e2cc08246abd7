"""Each fork applies to the code as it is, stays short, and does what its head says; forks/run.sh runs it in a copy."""
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import common
from conftest import ROOT, read_lines, write_rows

FORKS = sorted(file.stem for file in (ROOT / "forks").glob("*.diff"))
ENV = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PRINT": "1"}


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Applies a fork to a copy of the scripts; returns those of its modules that are named."""
    def apply(name, *stages):
        folder = tmp_path / "fork"
        shutil.copytree(ROOT, folder, ignore=lambda path, names: [n for n in names if not n.endswith(".py")])
        (folder / "prompts").symlink_to(ROOT / "prompts")
        subprocess.run(["git", "apply", ROOT / f"forks/{name}.diff"], cwd=folder, check=True)
        modules = {}
        for stage in ("common", *stages):
            spec = importlib.util.spec_from_file_location(f"{stage}_of_fork", folder / f"{stage}.py")
            modules[stage] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(modules[stage])
            if stage == "common":                               # what the stages after it import
                monkeypatch.setitem(sys.modules, "common", modules["common"])
        return [modules[stage] for stage in stages]
    return apply


def by_pair(rows, value):
    """{pair: {the rest of the key: value}} of the rows of a scores file."""
    pairs = defaultdict(dict)
    for row in rows:
        rest = tuple(row[name] for name in row if name not in ("task_id", "persona_id", "tokens", "log_prob"))
        pairs[row["task_id"], row["persona_id"]][rest] = row[value]
    return pairs


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_fits_a_screen_and_says_how_it_is_run(name):
    idea, source, command, rest = (ROOT / f"forks/{name}.diff").read_text().split("\n", 3)
    changed = len(re.findall(r"^[+-](?!--|\+\+)", rest, re.M))
    assert idea and source and command.endswith("bash run.sh") and changed <= 40
    assert re.search(rf"^\| `{name}` \|.*\| {changed} \|$", (ROOT / "forks/README.md").read_text(), re.M), changed


def test_run_sh_runs_a_fork_in_a_copy_and_an_older_copy_is_refused(tmp_path):
    shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", ".git"))
    run = ["bash", "forks/run.sh", "reward_weighted"]
    printed = subprocess.check_output(run, cwd=tmp_path, env=ENV, text=True)
    assert "--k 99" in printed and "--epochs 1 " in printed and "no_reg" not in printed
    assert "weighted_loss" in (tmp_path / "runs/forks/reward_weighted/train.py").read_text()
    assert "weighted_loss" not in (tmp_path / "train.py").read_text()
    open(tmp_path / "forks/reward_weighted.diff", "a").write("\n")
    assert subprocess.run(run, cwd=tmp_path, env=ENV, capture_output=True).returncode == 2
    from_previous = re.search(r"^sed .*", (ROOT / "forks/README.md").read_text(), re.M)[0]
    printed = subprocess.check_output(["bash", "-c", f"{from_previous}; ITERATIONS=2 bash from_previous.sh smoke"],
                                      cwd=tmp_path, env=ENV, text=True)
    bases = [re.search(r"--base (\S+)", line)[1] for line in printed.splitlines() if " train.py " in line]
    assert bases[:2] == ["toy/base", "runs/smoke/main/1/model"]


def test_lora_saves_the_base_plus_a_product_of_thin_matrices(fork, run, world, tiny):
    pytest.importorskip("peft", reason="pip install -r forks/requirements.txt")
    train, = fork("lora", "train")
    run(train, *world.command("train", tiny), "--rank", 1, "--lr", 0.1)
    base, saved = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (tiny, world.path("out")))
    for (name, before), after in zip(base.named_parameters(), saved.parameters()):
        thin = "proj" in name                                   # B A of rank 1; all else is the base's
        assert not thin or (torch.linalg.svdvals(after - before)[:2] > 1e-4).tolist() == [True, False], name
        assert thin or torch.equal(before, after), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dpo_begins_at_ln_2_and_prefers_the_best(fork, run, world, tiny, dtype):
    select, train = fork("dpo", "select", "train")
    write_rows(world.path("talks.jsonl"), world.conversations("A", n=3))
    run(select, *world.command("select", tiny, output="chosen.jsonl"))
    run(train, *world.command("train", tiny), "--lr", 1e-3, "--epochs", 3, "--warmup", 0, "--dtype", dtype)
    log = read_lines(world.path("out/log.jsonl"))
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and log[0]["margin"] == 0 < log[-1]["margin"]
    examples, _ = train.read_examples(train.parse_args(), tokenizer := common.load_tokenizer(tiny))
    for pair, log_probs in by_pair(read_lines(world.path("chosen.scores.jsonl")), "log_prob").items():
        (best, _, worst, _), = examples[pair]
        for ids, (sample,) in ((best, max(log_probs, key=log_probs.get)), (worst, min(log_probs, key=log_probs.get))):
            assert f"Number {sample} of" in tokenizer.decode(ids)


def test_reward_weighted_weights_follow_exp_log_p_and_sum_to_one(fork, run, world, tiny):
    train, = fork("reward_weighted", "train")
    weight = train.weights({4: -3.0, 7: -1.0}, 2)
    assert weight[7] / weight[4] == pytest.approx(np.e) and sum(weight.values()) == pytest.approx(1)
    write_rows(world.path("chosen.jsonl"), [{**row, "gold_log_prob": -2 * row["sample"], "response": "Say it."}
                                            for row in world.conversations("A", n=2)])
    run(train, *world.command("train", tiny), "--temperature", 4)
    examples, _ = train.read_examples(train.parse_args(), common.load_tokenizer(tiny))
    pairs = [[w for _, _, w in of] for of in examples.values()]
    assert all(w / v == pytest.approx(np.exp(0.5)) and w + v == pytest.approx(sum(pairs[0])) for w, v in pairs)
    model, flat = common.load_model(tiny, "float32"), sum(examples.values(), [])[:3]
    losses = [w * sum(label != -100 for label in labels[1:]) * model(
        torch.tensor([ids]), labels=torch.tensor([labels])).loss for ids, labels, w in flat]
    assert train.weighted_loss(model, flat, "cpu").item() == pytest.approx(sum(losses).item(), rel=1e-5)


def test_gain_drops_the_pairs_that_no_conversation_helps(fork, run, world, tiny):
    select, = fork("gain", "select")
    run(select, *world.command("select", tiny))
    scores, kept = by_pair(read_lines(world.path("out.scores.jsonl")), "log_prob"), read_lines(world.path("out.jsonl"))
    assert {common.pair_of(row) for row in kept} == {pair for pair, p in scores.items() if p[-1,] < max(p.values())}
    assert 0 < len(kept) < len(scores) and min(row["sample"] for row in kept) == 0


def test_information_is_nothing_where_a_conversation_fits_all_users(fork, run, world, tiny):
    select, = fork("information", "select")
    assert select.information([-5.0, -5.0, -5.0]) == pytest.approx(0)
    assert select.information([-5.0, -900.0]) == pytest.approx(np.log(2))
    run(select, *world.command("select", tiny))
    kept = {common.pair_of(row): row for row in read_lines(world.path("out.jsonl"))}
    for (task, user), p in by_pair(read_lines(world.path("out.scores.jsonl")), "log_prob").items():
        told = [p[c, user] - np.log(np.mean([np.exp(p[c, other]) for other in ("Ap0", "Ap1", "Ap2")])) for c in (0, 1)]
        assert kept[task, user]["sample"] == np.argmax(told)
        assert kept[task, user]["gold_log_prob"] == pytest.approx(max(told), abs=1e-4)


@pytest.mark.parametrize("price", [0, 5, 1000])
def test_short_keeps_the_best_beginning(fork, run, world, tiny, price):
    select, = fork("short", "select")
    write_rows(world.path("talks.jsonl"), [{**row, "cut": [2]} for row in world.conversations("A")])
    run(select, *world.command("select", tiny), "--price", price)
    kept = {common.pair_of(row): row for row in read_lines(world.path("out.jsonl"))}
    for pair, p in by_pair(read_lines(world.path("out.scores.jsonl")), "log_prob").items():
        sample, k = max(p, key=lambda key: p[key] - price * key[1])
        row = kept[pair]
        assert (row["sample"], row["turns"], len(row["conversation"])) == (sample, k, 2 * k)
        assert row.get("cut_turns", []) == [2] * (k > 1)
    assert {1} < {row["turns"] for row in kept.values()} or price == 1000


def test_summarise_shows_the_summary_before_the_response_and_trains_on_it(fork, run, world, tiny, server):
    select, evaluate = fork("summarise", "select", "evaluate")
    ask = sys.modules["common"].SUMMARISE
    server.reply = lambda request: (200, "YOU LIKE TEA" if request["messages"][-1]["content"].endswith(ask) else "Tea.")
    for stage in (select, evaluate):
        server.requests.clear()
        run(stage, *world.command(stage.__name__.split("_")[0], tiny), "--questioner", f"openai:m@{server.url}")
        last = [[m["content"] for m in r["messages"]][-3:] for r in server.requests if len(r["messages"]) > 3]
        answered = [texts for texts in last if texts[1] == "YOU LIKE TEA"]
        assert len(answered) == 12 and all(texts[0].endswith(ask) and "Help me" in texts[2] for texts in answered)
    row = read_lines(world.path("out.jsonl"))[0]
    assert [turn["content"] for turn in row["conversation"][-2:]] == ["YOU LIKE TEA", "Yes."]


def test_several_users_are_dealt_by_weight_and_have_prompts_of_their_own(fork, run, world, tiny, server):
    simulate, = fork("several_users", "simulate")
    who, names = simulate.deal_users([("t", str(i)) for i in range(4000)], ["a", "b"], 42, [3, 1])
    assert Counter(who.values())["a"] / 4000 == pytest.approx(0.75, abs=0.02) and names == {"a": "a", "b": "b"}
    for name in ("curt", "kind"):
        (world.folder / name).mkdir()
        text = (ROOT / "prompts/roleplayer_user.txt").read_text()
        (world.folder / name / "roleplayer_user.txt").write_text(f"{text} Be {name}.")
    model = f"openai:m@{server.url}"
    server.reply = lambda request: (200, "Be " + request["messages"][-1]["content"].split(" Be ")[-1])
    run(simulate, *world.command("simulate", tiny, server.url), "--roleplayer", model, model, "--shares", 1, 1,
        "--user-prompts", world.path("curt"), world.path("kind"))
    said = {(row["roleplayer"], row["conversation"][1]["content"]) for row in read_lines(world.path("out.jsonl"))}
    assert said == {("m as curt", "Be curt."), ("m as kind", "Be kind.")}


def test_by_chance_draws_in_proportion_to_the_probability_of_the_gold(fork):
    select, = fork("by_chance", "select")
    drawn = [select.select_best({0: np.log(0.7) - i, 1: np.log(0.3) - i}, 1)[0] for i in range(2000)]
    assert np.mean(drawn) == pytest.approx(0.3, abs=0.03)


def test_margin_leaves_out_a_pair_in_which_none_stands_out(fork):
    select, = fork("margin", "select")
    assert select.select_best({0: -1.0, 1: -9.0}, 1, 3) == [0] and not select.select_best({0: -1.0, 1: -9.0}, 1, 5)


def test_smoothed_targets_share_a_hundredth_among_all_tokens(fork, tiny):
    train, = fork("smoothed", "train")
    model, ids = common.load_model(tiny, "float32"), torch.tensor([[5, 9, 7]])
    log_p = model(ids).logits[0, :2].log_softmax(-1)
    loss = -(0.99 * log_p[[0, 1], ids[0, 1:]] + 0.01 * log_p.mean(-1)).sum()
    assert train.sum_loss(model, ids, ids).item() == pytest.approx(loss.item(), rel=1e-5)
