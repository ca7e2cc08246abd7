# A pretrained Questioner on two CPU cores, without key, GPU or judge: docs/laptop.md says what came out.
default VARIANTS="main random permuted no_reg" ITERATIONS=1 SAMPLES=10 TEST_SAMPLES=2 TRAIN_PAIRS=48 EPOCHS=3 \
    BASE=HuggingFaceTB/SmolLM2-135M-Instruct EMBEDDER=sentence-transformers/all-MiniLM-L6-v2 \
    DETAILS=data/details.jsonl PROMPTS=prompts/short LAUNCH=python
JUDGE='' ORACLE=rule ASK="--prompts $PROMPTS --dtype float32" SCORE="--batch-size 8 --max-tokens 60"
TALK="--max-turns 2 --max-tokens 40 --batch-size 36 --temperature 0.9"
LEARN="--prompts $PROMPTS --dtype float32 --lr 1e-4 --batch-size 8 --epochs $EPOCHS"
if [ -z "$GOLD" ]; then         # else golds, PERSONAS and TASKS are yours, and no line is known to matter
    stage python data/in3.py "$DETAILS" --output "$RUN/data" --seed "$SEED"
    TASKS=$RUN/data/tasks.jsonl PERSONAS=$RUN/data/personas.jsonl GOLD=$RUN/data/gold.jsonl MEASURE=people/measure.py
fi
. toy/serve.sh python people/nearest.py --embedder "$EMBEDDER" --prompts "$PROMPTS"
ROLEPLAYER=$(players nearest)
