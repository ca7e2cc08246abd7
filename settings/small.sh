# A real Questioner of half a billion parameters on one card of 24 GB: docs/scale.md, "A small run", says why so.
default VARIANTS="main no_reg" ITERATIONS=2 TEST_SAMPLES=4 TASKS_PER_SPLIT=20 PERSONA_SPLITS=A=10,B=10,test=10 GPUS=1 \
    BASE=Qwen/Qwen2.5-0.5B-Instruct
ASK="--max-tokens 300" TALK="--system fold"
SCORE="--batch-size 32"         # 150,000 words: at 64 the logits alone could have 20 GB
LEARN="--dtype float32 --batch-size 8 --micro-batch-size 2 --epochs 2"
. settings/gpus.sh
