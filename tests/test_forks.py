"""Each fork applies to the code as it is, stays short, and does what its head says; forks/run.sh runs it in a copy."""
import importlib.util
import re
import shutil
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch

import common
from conftest import ROOT, read_lines, write_rows

README = (ROOT / "forks/README.md").read_text()


@pytest.fixture
def fork(tmp_path, monkeypatch):
    """fork(name, *stages): applies it to a copy of the tree, in tmp_path, and yields these modules of it."""
    def apply(name, *stages):
        shutil.copytree(ROOT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("runs", ".git"))
        subprocess.run(["git", "apply", f"forks/{name}.diff"], cwd=tmp_path, check=True)
        for stage in stages:
            spec = importlib.util.spec_from_file_location(f"{stage}_fork", tmp_path / f"{stage}.py")
            spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
            monkeypatch.setitem(sys.modules, "common" if stage == "common" else spec.name, module)  # for the next ones
            yield module
    return apply


def chosen(run, world, tiny, select, *flags):
    """Runs select.py: {pair: (its kept row or None, {what else tells the pair's scores apart: log-probability})}"""
    run(select, *world.command("select", tiny), *flags)
    kept, scores = {common.pair_of(row): row for row in read_lines(world.path("out.jsonl"))}, defaultdict(dict)
    for task, user, *more, _, log_prob in map(dict.values, read_lines(world.path("out.scores.jsonl"))):
        scores[task, user][tuple(more)] = log_prob
    return {pair: (kept.get(pair), p) for pair, p in scores.items()}


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
    env = {"PATH": f"{sys.prefix}/bin:/usr/bin:/bin", "PRINT": "1"}
    printed = subprocess.check_output(["bash", "-c", script], cwd=tmp_path, env=env, text=True)
    fork, previous = printed.split("REFUSED 2")
    assert "--margin 3" in fork and "--tasks-per-split 8 " in fork and "no_reg" not in fork
    assert "margin" in (tmp_path / "runs/forks/margin/select.py").read_text()
    assert re.findall(r" train.py .*--base (\S+)", previous)[:2] == ["toy/base", "runs/smoke/main/1/model"]


@pytest.mark.filterwarnings("ignore::FutureWarning")            # peft's
def test_lora_saves_the_base_plus_a_product_of_thin_matrices(fork, run, world, tiny):
    run(*fork("lora", "train"), *world.command("train", tiny), "--rank", 1, "--lr", 0.1)
    base, saved = (common.load_model(path, "float32") for path in (tiny, world.path("out")))
    for (name, before), after in zip(base.named_parameters(), saved.parameters()):
        rank = torch.linalg.matrix_rank(torch.atleast_2d(after - before), atol=1e-4)    # of B A: 1; of the rest: 0
        assert rank == ("proj" in name), name


def test_dpo_begins_at_ln_2_and_prefers_the_best(fork, run, world, tiny):
    select, train = fork("dpo", "select", "train")
    write_rows(world.path("talks.jsonl"), world.conversations("A", n=3))
    found = chosen(run, world, tiny, select)
    run(train, *world.command("train", tiny, output="model"), "--selected", world.path("out.jsonl"), "--epochs", 3,
        "--lr", 1e-3, "--warmup", 0, "--dtype", "bfloat16")     # where other batches would give other log-probabilities
    first, *_, last, _, _ = read_lines(world.path("model/log.jsonl"))               # (two are held_out)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["margin"] == 0 < last["margin"]
    examples, _ = train.read_examples(train.parse_args(), tokenizer := common.load_tokenizer(tiny))
    for pair, (_, p) in found.items():
        best, worst = (tokenizer.decode(ids) for ids in examples[pair][0][::2])
        assert f"Number {max(p, key=p.get)[0]} of" in best and f"Number {min(p, key=p.get)[0]} of" in worst


def test_reward_weighted_weights_follow_exp_log_p_and_sum_to_one(fork, run, world, tiny):
    train, = fork("reward_weighted", "train")
    write_rows(world.path("chosen.jsonl"), [{**row, "gold_log_prob": -i, "response": "Say it."}
                                            for i, row in enumerate(world.conversations("A"))])
    run(train, *world.command("train", tiny), "--temperature", 2)
    examples, _ = train.read_examples(train.parse_args(), common.load_tokenizer(tiny))
    pairs = [[example[2] for example in of] for of in examples.values()]
    assert all(w / v == pytest.approx(np.exp(0.5)) and w + v == pytest.approx(sum(pairs[0])) for w, v in pairs)
    model, ((a, b), *_) = common.load_model(tiny, "float32"), examples.values()
    alone = [train.sum_loss(model, *train.collate([example[:2]])).item() * example[2] for example in (a, b)]
    assert train.weighted_loss(model, [a, b], "cpu").item() == pytest.approx(sum(alone), rel=1e-5)


def test_gain_drops_the_pairs_that_no_conversation_helps(fork, run, world, tiny):
    found = chosen(run, world, tiny, *fork("gain", "select"))
    assert all((row is not None) == (p[-1,] < max(p.values())) for row, p in found.values())
    assert {row and row["sample"] for row, _ in found.values()} == {None, 0, 1}
    chat = common.response_form("Ann", world.tasks[0]["task"], [])
    chat.append({"role": "assistant", "content": world.gold[0]["gold"]})
    ids, n = common.scored_ids(common.load_tokenizer(tiny), chat)
    log_p = common.load_model(tiny, "float32")(torch.tensor([ids])).logits[0, -n - 1:-1].log_softmax(-1)
    assert found["A0", "Ap0"][1][-1,] == pytest.approx(log_p[range(n), ids[-n:]].sum().item(), abs=1e-3)


def test_information_is_nothing_where_a_conversation_fits_all_users(fork, run, world, tiny):
    for (_, user), (row, p) in chosen(run, world, tiny, *fork("information", "select")).items():
        told = [p[c, user] - np.log(np.mean([np.exp(p[c, f"Ap{i}"]) for i in range(3)])) for c in (0, 1)]
        best = np.argmax(told), pytest.approx(max(told), abs=1e-4), 6           # 6: each of three golds is another
        assert (row["sample"], row["gold_log_prob"], len({*p.values()})) == best


def test_short_keeps_the_best_beginning(fork, run, world, tiny):
    write_rows(world.path("talks.jsonl"), [{**row, "cut": [2]} for row in world.conversations("A")])
    found = chosen(run, world, tiny, *fork("short", "select"), "--price", 1.5)
    for row, p in found.values():
        sample, k = max(p, key=lambda key: p[key] - 1.5 * key[1])
        assert (row["sample"], row["turns"], len(row["conversation"])) == (sample, k, 2 * k)
        assert row.get("cut_turns", []) == [2] * (k > 1)
    assert {row["turns"] for row, _ in found.values()} == {1, 3}


def test_summarise_shows_the_summary_before_the_response_and_trains_on_it(fork, run, world, tiny, server):
    changed, *stages = fork("summarise", "common", "select", "evaluate")
    server.reply = lambda r: (200, "LIKES TEA" if r["messages"][-1]["content"].endswith(changed.SUMMARISE) else "Tea.")
    for name, stage in zip(("select", "evaluate"), stages):
        run(stage, *world.command(name, tiny), "--questioner", f"openai:m@{server.url}")
    last = [[turn["content"] for turn in request["messages"][-2:]] for request in server.requests]
    assert sum(said == "LIKES TEA" and "Help me" in task for said, task in last) == 12 + 12
    turns = [turn["content"] for turn in read_lines(world.path("out.jsonl"))[0]["conversation"]]
    assert turns[-3].endswith(f" of Ap0.\n\n{changed.SUMMARISE}") and turns[-2:] == ["LIKES TEA", "Yes."]


def test_several_users_are_dealt_by_weight_and_have_prompts_of_their_own(fork, run, world, tiny, server):
    simulate, = fork("several_users", "simulate")
    who, names = simulate.deal_users([("t", str(i)) for i in range(4000)], ["a", "b"], 42, [3, 1])
    assert [*who.values()].count("a") / 4000 == pytest.approx(0.75, abs=0.02) and names == {"a": "a", "b": "b"}
    (world.folder / "curt").mkdir()
    (world.folder / "curt/roleplayer_user.txt").write_text("{persona} {task} {conversation} Be curt.")
    server.reply = lambda request: (200, str("Be curt." in request["messages"][-1]["content"]))
    two = ["--roleplayer", *2 * [f"openai:m@{server.url}"], "--shares", 1, 1, "--user-prompts", world.path("curt")]
    curt, plain = ("m as curt", "True"), ("m as prompts", "False")
    for name, flags, users in (("two", [*two, common.PROMPTS], {curt, plain}), ("one", ["--shares", 3], {plain})):
        run(simulate, *world.command("simulate", tiny, server.url, output=name), *flags)
        assert {(row["roleplayer"], row["conversation"][1]["content"]) for row in read_lines(world.path(name))} == users


def test_by_chance_draws_by_probability_margin_wants_one_that_stands_out_smoothed_shares_a_hundredth(fork, tiny):
    select, = fork("by_chance", "select")
    drawn = [select.select_best({c: np.log(p) - i for c, p in enumerate((0.6, 0.3, 0.1))}, 1)[0] for i in range(4000)]
    assert np.bincount(drawn) / 4000 == pytest.approx([0.6, 0.3, 0.1], abs=0.02)
    select, = fork("margin", "select")
    assert select.select_best({0: -1.0, 1: -9.0}, 1, 3) == [0] and not select.select_best({0: -1.0, 1: -9.0}, 1, 5)
    train, = fork("smoothed", "train")
    model, ids = common.load_model(tiny, "float32"), torch.tensor([[5, 9]])
    log_p = model(ids).logits[0, 0].log_softmax(-1)
    assert train.sum_loss(model, ids, ids).item() == pytest.approx(-(0.99 * log_p[9] + 0.01 * log_p.mean()).item())
