# The embedded world: its server plays everybody but the Questioner, by rule. Two CPU cores, no key, no GPU.
default VARIANTS="main base_answers other_user no_reg gold" TEST_SAMPLES=4 EPOCHS=3 BASE=toy/base LAUNCH=python \
    TASKS_PER_SPLIT=28 PERSONA_SPLITS=A=28,B=28,dev=8,test=8 ROLEPLAYER=roleplayer OTHER_ROLEPLAYER=roleplayer-terse
default TRAIN_PAIRS=224         # of 28 x 28: many personas and few epochs, or it learns by heart
toy=yes MEASURE=toy/measure.py TASKS=$RUN/tasks.jsonl ASK="--dtype float32 --max-tokens 64"
TALK="--temperature 1 --top-p 1"        # at the paper's .9 and .9 even --pick random gained 1.1 nats: docs/NOTES.md
LEARN="--dtype float32 --lr 2e-3 --batch-size 8 --micro-batch-size 8 --epochs $EPOCHS"
SERVER_FLAGS="--concurrency 8 $SERVER_FLAGS"                    # answers by rule come at once: more only wait for it
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false no_proxy=127.0.0.1
export MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=33554432        # glibc keeps what a cache outgrows
stage python toy/world.py --output "$TASKS" --tasks-per-split "$TASKS_PER_SPLIT"
. toy/serve.sh python toy/server.py ${FAULTS:+--faults "$FAULTS"}
ROLEPLAYER=$(players $ROLEPLAYER) OTHER_ROLEPLAYER=$(players $OTHER_ROLEPLAYER)
TEST_ROLEPLAYER=$(players $TEST_ROLEPLAYER) JUDGE=$(players ${JUDGE-judge})
ORACLE=openai:oracle@$url WRITER=openai:persona-writer@$url
