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

import common
from conftest import ROOT, read_lines, write_rows

README = (ROOT / "forks/README.md").read_text()


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """Applies a fork to a copy of the tree, in tmp_path, and yields those of its modules that are named."""
    def apply(name, *stages):
        shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", ".git"))
        subprocess.run(["git", "apply", f"forks/{name}.diff"], cwd=tmp_path, check=True)
        for stage in stages:
            spec = importlib.util.spec_from_file_location(f"{stage}_fork", tmp_path / f"{stage}.py")
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
            monkeypatch.setitem(sys.modules, "common" if stage == "common" else spec.name, module)  # for the next ones
            yield module
    return apply


def read_out(world, *key):
    """From select.py: {pair: its kept row}, {pair: {a tuple of the other fields of the key: log-probability}}."""
    scores = defaultdict(dict)
    for row in read_lines(world.path("out.scores.jsonl")):
        scores[common.pair_of(row)][tuple(map(row.get, key))] = row["log_prob"]
    return {common.pair_of(row): row for row in read_lines(world.path("out.jsonl"))}, scores


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "forks").glob("*.diff")))
def test_a_fork_fits_a_screen_and_says_how_it_is_run(name):
    idea, source, command, diff = (ROOT / f"forks/{name}.diff").read_text().split("\n", 3)
    changed = len(re.findall(r"^(?:-(?!--)|\+(?!\+\+))", diff, re.M))
    assert idea and source and command.endswith("bash run.sh") and changed <= 40
    assert re.search(rf"^\| `{name}` \|.*\| {changed} \|$", README, re.M) and f"**`{name}`**" in README, changed


def test_run_sh_runs_a_fork_in_a_copy_and_an_older_copy_is_refused(tmp_path):
    shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", ".git"))
    script = ("bash forks/run.sh margin; echo >> forks/margin.diff; bash forks/run.sh margin || echo REFUSED $?; "
              + re.search("^sed .*", README, re.M)[0] + "; ITERATIONS=2 bash from_previous.sh smoke")
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PRINT": "1"}
    printed = subprocess.check_output(["bash", "-c", script], cwd=tmp_path, env=env, text=True)
    fork, previous = printed.split("REFUSED 2")
    assert "--margin 3" in fork and "--tasks-per-split 8 " in fork and "no_reg" not in fork
    assert "margin" in (tmp_path / "runs/forks/margin/select.py").read_text()
    assert re.findall(r" train.py .*--base (\S+)", previous)[:2] == ["toy/base", "runs/smoke/main/1/model"]


@pytest.mark.filterwarnings("ignore::FutureWarning")            # peft's
def test_lora_saves_the_base_plus_a_product_of_thin_matrices(fork, run, world, tiny):
    pytest.importorskip("peft", reason="pip install -r forks/requirements.txt")
    run(*fork("lora", "train"), *world.command("train", tiny), "--rank", 1, "--lr", 0.1)
    base, saved = (common.load_model(path, "float32") for path in (tiny, world.path("out")))
    for (name, before), after in zip(base.named_parameters(), saved.parameters()):
        thin = "proj" in name                                   # B A of rank 1; all else is the base's
        assert not thin or (torch.linalg.svdvals(after - before)[:2] > 1e-4).tolist() == [True, False], name
        assert thin or torch.equal(before, after), name


def test_dpo_begins_at_ln_2_and_prefers_the_best(fork, run, world, tiny):
    select, train = fork("dpo", "select", "train")
    write_rows(world.path("talks.jsonl"), world.conversations("A", n=3))
    run(select, *world.command("select", tiny))
    run(train, *world.command("train", tiny, output="model"), "--selected", world.path("out.jsonl"), "--epochs", 3,
        "--lr", 1e-3, "--warmup", 0, "--dtype", "bfloat16")     # where other batches would give other log-probabilities
    log = [row for row in read_lines(world.path("model/log.jsonl")) if "step" in row]
    assert log[0]["loss"] == pytest.approx(np.log(2), abs=1e-6) and log[0]["margin"] == 0 < log[-1]["margin"]
    examples, _ = train.read_examples(train.parse_args(), tokenizer := common.load_tokenizer(tiny))
    for pair, p in read_out(world, "sample")[1].items():
        best, worst = (tokenizer.decode(ids) for ids in examples[pair][0][::2])
        assert f"Number {max(p, key=p.get)[0]} of" in best and f"Number {min(p, key=p.get)[0]} of" in worst


def test_reward_weighted_weights_follow_exp_log_p_and_sum_to_one(fork, run, world, tiny):
    train, = fork("reward_weighted", "train")
    weight = train.weights({4: -3.0, 7: -1.0}, 2)
    assert weight[7] / weight[4] == pytest.approx(np.e) and sum(weight.values()) == pytest.approx(1)
    write_rows(world.path("chosen.jsonl"), [{**row, "gold_log_prob": -2 * row["sample"], "response": "Say it."}
                                            for row in world.conversations("A")])
    run(train, *world.command("train", tiny), "--temperature", 4)
    examples, _ = train.read_examples(train.parse_args(), common.load_tokenizer(tiny))
    pairs = [[example[2] for example in of] for of in examples.values()]
    assert all(w / v == pytest.approx(np.exp(0.5)) and w + v == pytest.approx(sum(pairs[0])) for w, v in pairs)
    model, ((a, b), *_) = common.load_model(tiny, "float32"), examples.values()
    alone = [train.sum_loss(model, *train.collate([example[:2]])).item() * example[2] for example in (a, b)]
    assert train.weighted_loss(model, [a, b], "cpu").item() == pytest.approx(sum(alone), rel=1e-5)


def test_gain_drops_the_pairs_that_no_conversation_helps(fork, run, world, tiny):
    run(*fork("gain", "select"), *world.command("select", tiny))
    kept, scores = read_out(world, "sample")
    assert {*kept} == {pair for pair, p in scores.items() if p[-1,] < max(p.values())}
    assert 0 < len(kept) < len(scores) and min(row["sample"] for row in kept.values()) == 0
    chat = common.response_form("Ann", world.tasks[0]["task"], [])
    chat.append({"role": "assistant", "content": world.gold[0]["gold"]})
    ids, n = common.scored_ids(common.load_tokenizer(tiny), chat)
    log_p = common.load_model(tiny, "float32")(torch.tensor([ids])).logits[0, -n - 1:-1].log_softmax(-1)
    assert scores["A0", "Ap0"][-1,] == pytest.approx(log_p[range(n), ids[-n:]].sum().item(), abs=1e-3)


def test_information_is_nothing_where_a_conversation_fits_all_users(fork, run, world, tiny):
    select, = fork("information", "select")
    assert select.information([-5.0, -5.0, -5.0]) == pytest.approx(0)
    run(select, *world.command("select", tiny))
    kept, scores = read_out(world, "sample", "gold_of")
    for (task, user), p in scores.items():
        told = [p[c, user] - np.log(np.mean([np.exp(p[c, f"Ap{i}"]) for i in range(3)])) for c in (0, 1)]
        row = kept[task, user]
        assert (row["sample"], row["gold_log_prob"]) == (np.argmax(told), pytest.approx(max(told), abs=1e-4))


@pytest.mark.parametrize("price", [0, 1000])
def test_short_keeps_the_best_beginning(fork, run, world, tiny, price):
    write_rows(world.path("talks.jsonl"), [{**row, "cut": [2]} for row in world.conversations("A")])
    run(*fork("short", "select"), *world.command("select", tiny), "--price", price)
    kept, scores = read_out(world, "sample", "turns")
    for pair, p in scores.items():
        row, (sample, k) = kept[pair], max(p, key=lambda key: p[key] - price * key[1])
        assert (row["sample"], row["turns"], len(row["conversation"])) == (sample, k, 2 * k)
        assert row.get("cut_turns", []) == [2] * (k > 1)
    assert ({1} < {row["turns"] for row in kept.values()}) == (price == 0)


def test_summarise_shows_the_summary_before_the_response_and_trains_on_it(fork, run, world, tiny, server):
    changed, *stages = fork("summarise", "common", "select", "evaluate")
    server.reply = lambda request: (
        200, "YOU LIKE TEA" if request["messages"][-1]["content"].endswith(changed.SUMMARISE) else "Tea.")
    for name, stage in zip(("select", "evaluate"), stages):
        server.requests.clear()
        run(stage, *world.command(name, tiny), "--questioner", f"openai:m@{server.url}")
        last = [[turn["content"] for turn in request["messages"][-2:]] for request in server.requests]
        assert sum(said == "YOU LIKE TEA" and "Help me" in task for said, task in last) == 12
    turns = [turn["content"] for turn in read_out(world)[0]["A0", "Ap0"]["conversation"]]
    assert turns[-3].endswith(changed.SUMMARISE) and turns[-2:] == ["YOU LIKE TEA", "Yes."]


def test_several_users_are_dealt_by_weight_and_have_prompts_of_their_own(fork, run, world, tiny, server):
    simulate, = fork("several_users", "simulate")
    who, names = simulate.deal_users([("t", str(i)) for i in range(4000)], ["a", "b"], 42, [3, 1])
    assert Counter(who.values())["a"] / 4000 == pytest.approx(0.75, abs=0.02) and names == {"a": "a", "b": "b"}
    for name in ("curt", "kind"):
        (world.folder / name).mkdir()
        (world.folder / name / "roleplayer_user.txt").write_text(f"{{persona}} {{task}} {{conversation}} Be {name}.")
    server.reply = lambda request: (200, request["messages"][-1]["content"][-8:])
    run(simulate, *world.command("simulate", tiny, server.url), "--roleplayer", *2 * [f"openai:m@{server.url}"],
        "--shares", 1, 1, "--user-prompts", world.path("curt"), world.path("kind"))
    said = {(row["roleplayer"], row["conversation"][1]["content"]) for row in read_lines(world.path("out.jsonl"))}
    assert said == {("m as curt", "Be curt."), ("m as kind", "Be kind.")}
    server.reply = lambda request: (200, "Yes.")
    run(simulate, *world.command("simulate", tiny, server.url, output="alone.jsonl"), "--shares", 3)
    assert read_lines(world.path("alone.jsonl"))[0]["roleplayer"] == "m as prompts"


def test_by_chance_draws_by_probability_margin_wants_one_that_stands_out_smoothed_shares_a_hundredth(fork, tiny):
    select, = fork("by_chance", "select")
    drawn = [select.select_best({c: np.log(p) - i for c, p in enumerate((0.6, 0.3, 0.1))}, 1)[0] for i in range(4000)]
    assert np.bincount(drawn) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    select, = fork("margin", "select")
    assert select.select_best({0: -1.0, 1: -9.0}, 1, 3) == [0] and not select.select_best({0: -1.0, 1: -9.0}, 1, 5)
    train, = fork("smoothed", "train")
    model, ids = common.load_model(tiny, "float32"), torch.tensor([[5, 9, 7]])
    log_p = model(ids).logits[0, :2].log_softmax(-1)
    loss = -(0.99 * log_p[[0, 1], ids[0, 1:]] + 0.01 * log_p.mean(-1)).sum()
    assert train.sum_loss(model, ids, ids).item() == pytest.approx(loss.item(), rel=1e-5)
