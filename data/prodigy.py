"""PRODIGy's characters as example personas: the 21 that the authors picked as free of violence and profanity.

    python data/prodigy.py characters.json > examples.jsonl
    python generate_personas.py --examples examples.jsonl --model openai:MODEL --output runs/paper/personas.jsonl
"""
import json
import sys

IDS = ("u0 u9 u498 u838 u861 u1106 u1172 u1273 u1323 u1456 u1767 u2563 u2585 u2746 u3105 u3125 u3171 u3283 u3321 u3667 "
       "u3681").split()

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        characters = json.load(open(sys.argv[1], encoding="utf-8"))
        people = [(i, characters[i]["character_name"], " ".join(characters[i]["biography"])) for i in IDS]
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{sys.argv[1]}: not PRODIGy's file of characters ({type(error).__name__}: {error})", file=sys.stderr)
        sys.exit(2)
    for i, name, about in people:
        print(json.dumps({"persona_id": i, "name": name, "persona": f"I'm {name}. {about}"}, ensure_ascii=False))
