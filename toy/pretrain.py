"""Make the base Questioner of the embedded world: a Mistral of 0.24 M parameters, from scratch, on one thread.

    python toy/pretrain.py --output toy/base          # the base that is shipped; 3 to 6 minutes

It writes a Hugging Face folder (weights, tokenizer, chat template) and abilities.json. The documents are conversations
of the world, rendered by the pipeline's own functions (elicitation prompt, response form, chat template). Four
phases, whose order matters; each ends on a measured ability and not on a number of tokens:

    1. copy one fact          "My pet is dog."  ->  "It suits you as your pet is dog."
    2. ask what matters       conversations whose questions are all relevant: which facts a topic needs
    3. copy many facts        up to eight at once, without forgetting 2
    4. the base               the real mixture; at its end the learning rate falls to zero

The latent skill: in the real mixture a fifth of the interviewers are experts, who ask what matters; the others ask at
random. The base imitates the crowd, so most of its questions are poor, but it can ask good ones: expert iteration
has something to amplify.

What training on questions alone undoes: a task that stands alone is met with a response in a third of the documents,
with a question in the others; and a third of the dialogues go on with one more question although a response is due.
"""
import argparse
import json
import random
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the stages; first, since PyPI has an "evaluate", too
import common  # noqa: E402
import simulate  # noqa: E402
import train  # noqa: E402
from toy import world  # noqa: E402

PAD, BOS, EOS, USER, END_OF_USER = "<pad>", "<s>", "</s>", "[INST]", "[/INST]"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user, assistant, user, ...; there is no system role') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}")

EXPERTS = 0.2  # share of expert interviewers: the latent skill
USED, GUESSED = 0.9, 0.05  # a careless answerer uses a fact it was told, invents one that matters and was not told
ASKS_ON = 0.35  # share of the dialogues that end with one more question although a response is due: a habit to unlearn
FULL_PROMPT = 0.1  # share of the interviews under the whole elicitation prompt; the others see an abridged one
RATE = 3e-3  # the highest learning rate


# ---- the documents: lists of messages ----

def abridged(prompt, rng):
    """The prompt's first and last sentence with up to three between: the same instruction at a tenth of the cost."""
    first, *middle, last = re.split(r"(?<=\.) ", prompt)
    kept = sorted(rng.sample(range(len(middle)), rng.randint(0, 3)))
    return " ".join([first, *(middle[i] for i in kept), last])


def turns(persona, task, expert, rng):
    """One to three questions and answers -> (messages, facts revealed); experts ask about what matters first."""
    relevant = list(world.relevant_slots(task))
    slots = rng.sample(relevant, len(relevant)) if expert else []
    messages, revealed = [], []
    for slot in (slots + rng.choices(list(world.SLOTS), k=3))[:rng.randint(1, 3)]:
        kind = rng.choices(["full", "terse", "evasive", "unsure"], [85, 8, 4, 3])[0]
        answer = {"full": rng.choice(world.ANSWERS).format(slot, persona[slot]), "terse": f"{persona[slot]}.",
                  "evasive": world.EVASIVE, "unsure": world.UNSURE}[kind]
        revealed += [slot] if kind in ("full", "terse") else []
        messages += [{"role": "assistant", "content": rng.choice(world.QUESTIONS).format(slot)},
                     {"role": "user", "content": answer}]
    return messages, revealed


def careless_response(persona, task, revealed, rng):
    """A response that uses what it was told, relevant or not, forgets some of it, and now and then invents a fact."""
    facts = []
    for slot in world.SLOTS:
        if slot in revealed and rng.random() < USED:
            facts.append((slot, persona[slot]))
        elif slot not in revealed and slot in world.relevant_slots(task) and rng.random() < GUESSED:
            facts.append((slot, rng.choice(world.SLOTS[slot])))
    return world.response(task, facts)


def echo(rng, most):
    """Facts in, the sentences that use them out, in another order: copying in its purest form."""
    persona, slots = world.draw_persona(rng), rng.sample(list(world.SLOTS), rng.randint(1, most))
    forms = world.ANSWERS[:1] + [form for _, form in world.PERSONA_FORMS]
    facts = " ".join(rng.choice(forms).format(slot, persona[slot]) for slot in slots)
    rng.shuffle(slots)
    return [{"role": "user", "content": facts},
            {"role": "assistant", "content": " ".join(world.USE.format(slot, persona[slot]) for slot in slots)}]


def draw_task(rng):
    """A task of any split: the base knows the words of the language, as a pretrained model does."""
    split = rng.choice(list(world.WORDINGS))
    item = f"a {rng.choice(world.ADJECTIVES[split])} {rng.choice(list(world.TOPICS))}"
    return rng.choice(world.WORDINGS[split]).format(item)


def interview(rng, experts):
    """Questions under the elicitation prompt; the conversation ends with the last of them."""
    persona, task = world.draw_persona(rng), draw_task(rng)
    prompt = simulate.PROMPTS["elicitation"]
    prompt = prompt if rng.random() < FULL_PROMPT else abridged(prompt, rng)
    conversation, _ = turns(persona, task, rng.random() < experts, rng)
    return [{"role": "user", "content": prompt.format(name=persona["name"], task=task)}] + conversation[:-1]


def dialogue(rng, experts):
    """Questions and answers in the response form, then a response or, from those who ask on, another question."""
    persona, task = world.draw_persona(rng), draw_task(rng)
    conversation, revealed = turns(persona, task, rng.random() < experts, rng)
    text = careless_response(persona, task, revealed, rng)
    if rng.random() < ASKS_ON:
        text = rng.choice(world.QUESTIONS).format(rng.choice(list(world.SLOTS)))
    return common.response_form(persona["name"], task, conversation) + [{"role": "assistant", "content": text}]


def control(rng):
    """The positive control: the persona in the prompt, then the gold response."""
    persona, task = world.draw_persona(rng), draw_task(rng)
    form = common.response_form(persona["name"], task, [], persona=world.persona_text(persona, rng))
    return form + [{"role": "assistant", "content": world.gold_response(persona, task)}]


def bare(rng):
    """The negative control: no conversation, then a response that can but guess."""
    persona, task = world.draw_persona(rng), draw_task(rng)
    text = careless_response(persona, task, [], rng)
    return common.response_form(persona["name"], task, []) + [{"role": "assistant", "content": text}]


def phases():
    """[(name, {document: weight}, {ability: floor that ends the phase}, most tokens)]."""
    copy_one, copy_many = (lambda rng: echo(rng, 1)), (lambda rng: echo(rng, 8))
    ask_well, answer_well = (lambda rng: interview(rng, 1)), (lambda rng: dialogue(rng, 1))
    ask, answer = (lambda rng: interview(rng, EXPERTS)), (lambda rng: dialogue(rng, EXPERTS))
    return [
        ("copy one fact", {copy_one: 1}, {"copy_1": -0.15}, 1_000_000),
        ("ask what matters", {copy_one: 10, ask_well: 30, answer_well: 60}, {"relevant_share": 0.9}, 4_000_000),
        ("copy many facts", {copy_many: 40, ask_well: 30, answer_well: 30}, {"copy_8": -0.5}, 4_000_000),
        ("the base", {copy_many: 10, ask: 30, answer: 30, control: 15, bare: 15},
         {"control_per_value": -0.5, "used": 0.75}, 4_000_000),
    ]


# ---- tokenizer and model ----

def texts_of_the_world():
    """Every word of the world and of the elicitation prompt."""
    rng = random.Random(0)
    texts = [simulate.PROMPTS["elicitation"], *world.NAMES, *sum(world.SLOTS.values(), []), world.EVASIVE, world.UNSURE]
    texts += [task for split in world.WORDINGS for task in world.make_tasks(split, 224)]
    return texts + [message["content"] for _ in range(300) for draw in (control, lambda rng: dialogue(rng, 0))
                    for message in draw(rng)]


def build_tokenizer(texts):
    """Byte-level BPE in which every word of the texts is one token."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = {word for text in texts for word, _ in level.pre_tokenize_str(" " + text)}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = level
    tokenizer.train_from_iterator(  # each word once and a roomy vocabulary: merging ends with whole words
        sorted(decoders.ByteLevel().decode([word]) for word in words),
        trainers.BpeTrainer(vocab_size=4096, special_tokens=[PAD, BOS, EOS, USER, END_OF_USER], show_progress=False,
                            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, padding_side="left",
        additional_special_tokens=[USER, END_OF_USER], chat_template=CHAT_TEMPLATE, model_max_length=2048,
        clean_up_tokenization_spaces=False)


def build_model(tokenizer, seed):
    torch.manual_seed(seed)
    return MistralForCausalLM(MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=256, tie_word_embeddings=True, sliding_window=None, max_position_embeddings=2048,
        initializer_range=0.06,  # at the usual 0.02 a model of this size never learns to copy
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))


# ---- training ----

def token_log_probs(model, ids, labels):
    """(B, T), (B, T) -> the log-probabilities of the N labelled tokens, (N,)."""
    where = labels[:, 1:] != -100
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1][where]  # logits where a target is, no others
    return -F.cross_entropy(model.lm_head(hidden), labels[:, 1:][where], reduction="none")


def batches(draw, tokenizer, rng, size=1500, pool=200):
    """Without end: batches of about `size` tokens, documents of like length together."""
    while True:
        documents = [example for _ in range(pool) for example in train.training_examples(tokenizer, draw(rng))]
        documents.sort(key=lambda document: len(document[0]))
        groups = [[]]
        for document in documents:
            if groups[-1] and len(document[0]) * (len(groups[-1]) + 1) > size:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        yield from map(train.collate, groups)


def step(model, optimizer, batch, rate):
    """One AdamW step at the given learning rate -> tokens seen."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    (-token_log_probs(model, *batch).mean()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return batch[0].numel()


# ---- abilities ----

@torch.inference_mode()
def generate(model, tokenizer, conversations, sample, length=64, temperature=0.9, top_p=0.9):
    """Conversations that end with a user turn -> the assistant's texts, sampled at the paper's settings or greedy."""
    batch = tokenizer.apply_chat_template(conversations, return_dict=True, padding=True, return_tensors="pt")
    how = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=0) if sample else dict(do_sample=False)
    ids = model.generate(**batch, max_new_tokens=length, **how)[:, batch["input_ids"].shape[1]:]
    return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.inference_mode()
def gold_log_prob(model, tokenizer, documents):
    """Documents that end with a response -> its mean log-probability (sum over tokens), and that of a value in it."""
    values = set(tokenizer.convert_tokens_to_ids([f"Ġ{value}" for _, value in world.SLOT_OF.values()]))
    total, of_values = 0.0, []
    for messages in documents:
        ids, n = common.scored_ids(tokenizer, messages)
        labels = [-100] * (len(ids) - n) + ids[-n:]
        log_probs = token_log_probs(model, torch.tensor([ids]), torch.tensor([labels])).tolist()
        total += sum(log_probs)
        of_values += [log_prob for token, log_prob in zip(ids[-n:], log_probs) if token in values]
    return total / len(documents), sum(of_values) / len(of_values)


def copying(model, tokenizer, most, echo=echo):
    """Mean log-probability of a value that is to be copied, among up to `most` facts."""
    rng = random.Random(1)
    return gold_log_prob(model, tokenizer, [echo(rng, most) for _ in range(64)])[1]


def asking(model, tokenizer, pairs=64):
    """Two questions each under the whole elicitation prompt -> shares that are recognised, and relevant."""
    rng = random.Random(2)
    people = [(world.draw_persona(rng), draw_task(rng)) for _ in range(pairs)]
    chats = [[{"role": "user", "content": simulate.PROMPTS["elicitation"].format(name=persona["name"], task=task)}]
             for persona, task in people]
    recognised, relevant = 0, 0
    for _ in range(2):
        for chat, (persona, task), question in zip(chats, people, generate(model, tokenizer, chats, True, 24)):
            slot = world.question_slot(question)
            recognised += slot is not None
            relevant += slot in world.relevant_slots(task)
            answer = world.ANSWERS[0].format(slot, persona[slot]) if slot else world.UNSURE
            chat += [{"role": "assistant", "content": question}, {"role": "user", "content": answer}]
    return recognised / (2 * pairs), relevant / (2 * pairs)


def answering(model, tokenizer, pairs=64):
    """Greedy responses to conversations with random questions -> share of answers, revealed relevant facts used."""
    rng = random.Random(3)
    forms, known = [], []
    for _ in range(pairs):
        persona, task = world.draw_persona(rng), draw_task(rng)
        slots = rng.sample(list(world.SLOTS), rng.randint(1, 3))
        conversation = [message for slot in slots for message in (
            {"role": "assistant", "content": rng.choice(world.QUESTIONS).format(slot)},
            {"role": "user", "content": rng.choice(world.ANSWERS).format(slot, persona[slot])})]
        forms.append(common.response_form(persona["name"], task, conversation))
        known.append({(slot, persona[slot]) for slot in slots if slot in world.relevant_slots(task)})
    texts = generate(model, tokenizer, forms, False)
    used = sum(len(facts & world.facts_in(text)) for facts, text in zip(known, texts))
    return sum("?" not in text for text in texts) / pairs, used / sum(map(len, known))


def controls(model, tokenizer, pairs=64):
    """Gold log-probability with the persona in the prompt, the same per value, and without anything."""
    rng = random.Random(4)
    with_persona = [control(rng) for _ in range(pairs)]
    without = [common.response_form("Anna", messages[0]["content"].rpartition("\n\n")[2], []) + messages[1:]
               for messages in with_persona]
    return *gold_log_prob(model, tokenizer, with_persona), gold_log_prob(model, tokenizer, without)[0]


FLOORS = {"copy_1": -0.2, "copy_8": -0.5, "recognised_share": 0.95, "relevant_share": 0.25, "answers": 0.9,
          "used": 0.6, "control_per_value": -0.3}  # of a finished base (random questions are relevant in .31)


def measured(model, groups, wanted):
    """{ability: value} for the abilities wanted, and those that are measured along with them. groups: {abilities that
    are measured together: how}"""
    torch.manual_seed(0)
    model.eval()
    found = {}
    for names, values in groups.items():
        if set(names) & set(wanted):
            found.update(zip(names, (round(value, 3) for value in values())))
    model.train()
    return found


def abilities(model, tokenizer, wanted):
    """{ability: value} for the abilities wanted, and those that are measured along with them."""
    return measured(model, {
        ("copy_1",): lambda: [copying(model, tokenizer, 1)],
        ("copy_8",): lambda: [copying(model, tokenizer, 8)],
        ("recognised_share", "relevant_share"): lambda: asking(model, tokenizer),
        ("answers", "used"): lambda: answering(model, tokenizer),
        ("control", "control_per_value", "no_conversation"): lambda: controls(model, tokenizer),
    }, wanted)


def pretrain(args, tokenizer, phases, measure, floors, size=1500, probe=100_000, decay=4_000_000):
    """Trains through the phases, then lets the rate fall to zero in `decay` tokens, and writes the folder args.output.
    measure: (model, tokenizer, {ability: floor} that are wanted) -> {ability: value}, every `probe` tokens; size: of a
    batch, in tokens. Ends with status 1 if a floor is missed."""
    torch.set_num_threads(1)  # a model of this size is faster on one thread than on two
    start, rng = time.time(), random.Random(args.seed)
    model = build_model(tokenizer, args.seed)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    seen, warm = 0, 60_000
    for name, mixture, wanted, most in phases:
        documents, weights = list(mixture), list(mixture.values())
        stream = batches(lambda rng: rng.choices(documents, weights)[0](rng), tokenizer, rng, size)
        begun, probed, reached = seen, seen, False
        while not reached and seen < begun + most:
            seen += step(model, optimizer, next(stream), RATE * min(1, (seen + size) / warm))
            if seen >= probed + probe:
                probed = seen
                found = measure(model, tokenizer, wanted)
                reached = all(found[ability] >= floor for ability, floor in wanted.items())
                print(f"{name}: {seen / 1e6:.2f} M tokens, {time.time() - start:.0f} s, {found}", flush=True)
        print(f"-- {name}: {'reached' if reached else 'NOT reached'}", flush=True)
    end = seen + decay
    while seen < end:
        seen += step(model, optimizer, next(stream), RATE * max(0, end - seen) / decay)
    final = {"seed": args.seed, "tokens": seen, "seconds": round(time.time() - start),
             **measure(model, tokenizer, floors)}
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    Path(args.output, "abilities.json").write_text(json.dumps(final, indent=1) + "\n")
    missed = [ability for ability, floor in floors.items() if final[ability] < floor]
    print(json.dumps(final), f"floors missed: {', '.join(missed) or 'none'}")
    sys.exit(1 if missed else 0)


def pretrain_parser(manual):
    """The flags of `pretrain`."""
    parser = argparse.ArgumentParser(description=manual, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="model folder to write")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    pretrain(pretrain_parser(__doc__).parse_args(), build_tokenizer(texts_of_the_world()), phases(), abilities, FLOORS)
