"""Mangled files: every reader takes a file or ends with one line and status 2; no traceback, whatever the bytes."""
import json
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir

import common
import evaluate

set_hypothesis_home_dir(tempfile.mkdtemp())                       # leaves nothing in the checkout

TURNS = [{"role": "assistant", "content": "Which tea?"}, {"role": "user", "content": "Green."}]
READERS = {
    common.read_tasks: {"task_id": "A0", "split": "A", "task": "Tea?"},
    common.read_personas: {"persona_id": "A0", "split": "A", "name": "Ann", "persona": "I'm Ann."},
    common.read_gold: {"task_id": "A0", "persona_id": "A0", "split": "A", "gold": "Sencha."},
    common.read_conversations: {"task_id": "A0", "persona_id": "A0", "sample": 0, "split": "A", "conversation": TURNS},
    evaluate.read_responses: {"task_id": "A0", "persona_id": "A0", "sample": 0, "turns": 1, "response": "Sencha."},
    common.read_results: {"variant": "main", "iteration": 1, "metric": "win_rate", "condition": "", "roleplayer": "r",
                          "split": "test", "mean": 0.5, "sem": None, "n": 3},
}
ANY = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                   lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                   max_leaves=4)


@st.composite
def mangled(draw):
    """(reader, bytes): a good file in which up to three things are wrong: fields, whole lines, bytes."""
    reader, rarely = draw(st.sampled_from(list(READERS))), st.sampled_from([False, False, False, True])
    rows = [json.loads(json.dumps(READERS[reader])) for _ in range(draw(st.integers(1, 3)))]
    for i, row in enumerate(rows):                               # ids differ, unless mangled
        row.update({name: f"A{i}" for name in ("task_id", "persona_id", "variant") if name in row})
    for _ in range(draw(st.integers(0, 2))):
        target = draw(st.sampled_from(rows))
        field = draw(st.sampled_from([*READERS[reader], "role", "refused"]))
        if isinstance(target.get("conversation"), list) and draw(st.booleans()):
            target = draw(st.sampled_from([target, *[turn for turn in target["conversation"] if isinstance(turn, dict)]]))
        if draw(st.booleans()):
            target.pop(field, None)
        else:
            target[field] = draw(ANY)
    lines = [json.dumps(row) for row in rows]
    if draw(rarely):
        lines.insert(draw(st.integers(0, len(lines))), draw(st.text(max_size=20) | ANY.map(json.dumps)))
    content = bytearray("\n".join(lines).encode("utf-8", "surrogatepass"))
    if draw(rarely):
        at = draw(st.integers(0, len(content)))
        content[at:at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return reader, bytes(content)


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=mangled())
def test_readers_never_end_in_a_traceback(case, tmp_path_factory, capsys):
    reader, content = case
    path = tmp_path_factory.getbasetemp() / "mangled.jsonl"
    path.write_bytes(content)
    try:
        rows = list(reader(path))
        assert capsys.readouterr().err == "" and len(rows) <= content.count(b"\n") + 1
    except SystemExit as end:
        said = capsys.readouterr().err
        assert end.code == 2 and str(path) in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("reader", READERS)
def test_the_readers_take_what_is_right(reader, tmp_path):
    (tmp_path / "x").write_text(json.dumps(READERS[reader]) + "\n")
    assert len(list(reader(tmp_path / "x"))) == 1
