#!/usr/bin/env bash
# STaR-GATE, from nothing to the tables (Algorithm 1).
#
#   bash run.sh smoke     every step on a real, tiny language model: two CPU cores, no key, no hub, under two minutes
#   bash run.sh paper     the published settings: needs GPUs, servers and an API key; read the variables below first
#
#   RUN=folder   where the output goes            SEED=n            of all randomness
#   SPLIT=dev    evaluate on another split        VARIANTS=main     only these variants
#   LIMIT=n      a seeded sample of n (task, persona) pairs of each split: a trial before a large run
#   SIMULATE_FLAGS, SELECT_FLAGS, TRAIN_FLAGS, EVALUATE_FLAGS     more flags for these stages
#
# A run that was interrupted goes on where it stopped: start it again with the same words.
set -eo pipefail
cd "$(dirname "$0")"

MODE=${1:-}
RUN=${RUN:-runs/$MODE${LIMIT:+-$LIMIT}}          # a trial has a folder of its own: a model is not prolonged
SEED=${SEED:-42}
SPLIT=${SPLIT:-test}

case $MODE in
smoke)                                          # the embedded world (toy/): its users, Oracle and judge answer by rule
    VARIANTS=${VARIANTS:-main no_reg}
    ITERATIONS=1
    mkdir -p "$RUN"
    rm -f "$RUN/server.url"
    python toy/server.py --port 0 --port-file "$RUN/server.url" --end-with-parent &
    server=$!
    trap 'kill $server 2>/dev/null || true' EXIT
    trap 'exit 130' INT TERM
    until [ -s "$RUN/server.url" ]; do kill -0 $server; sleep 0.1; done
    url=$(cat "$RUN/server.url")
    python toy/world.py --output "$RUN/tasks.jsonl" --tasks-per-split 8

    BASE=toy/base
    WRITER=openai:persona-writer@$url
    ORACLE=openai:oracle@$url
    ROLEPLAYER=openai:roleplayer@$url
    JUDGE=openai:judge@$url
    EXTRA="{}"
    TASKS=$RUN/tasks.jsonl
    PERSONA_SPLITS=A=8,dev=8,test=8             # 8 tasks x 8 personas = 64 pairs a split
    GOLD_SPLITS=A
    SAMPLES=8
    LAUNCH=python
    LAUNCH_TRAINING=python
    MODEL=(--dtype float32)
    ANSWER=(--max-tokens 64)
    LEARN=(--lr 1.5e-3 --batch-size 8 --micro-batch-size 8 --epochs 8)
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    ;;
paper)                                          # the published run's settings are the stages' defaults
    VARIANTS=${VARIANTS:-main no_reg gold}
    ITERATIONS=3
    # Q_BASE: a local folder or a name on the hub. It is scored with, answers, and is trained: always Hugging Face.
    BASE=${BASE:-mistralai/Mistral-7B-Instruct-v0.2}
    # The Oracle writes 110 personas, 2 x 250 x 50 + 50 x 10 = 25,500 gold responses, and judges 300 pairs for each
    # variant and iteration. The published run asked gpt-4-0613, which is no more: name a current model. Any server
    # with OpenAI's interface will do: openai:MODEL@http://host:port/v1. Keys come from OPENAI_API_KEY.
    ORACLE=${ORACLE:?set ORACLE to the model that plays Oracle and judge, such as openai:MODEL}
    WRITER=${WRITER:-$ORACLE}
    JUDGE=${JUDGE:-$ORACLE}
    # Arguments of their requests, as JSON; null takes one away. Some models refuse max_tokens or temperature:
    # EXTRA='{"max_tokens": null, "temperature": null, "max_completion_tokens": 900}'
    EXTRA=${EXTRA:-"{}"}
    # The Roleplayer answers some 2 questions in each of 250 x 50 x 10 = 125,000 conversations an iteration, 250,000
    # answers. Mixtral does not fit beside the Questioner on one card: serve it elsewhere, for example with
    # `vllm serve mistralai/Mixtral-8x7B-Instruct-v0.1 --tensor-parallel-size 2`.
    ROLEPLAYER=${ROLEPLAYER:?set ROLEPLAYER, such as openai:mistralai/Mixtral-8x7B-Instruct-v0.1@http://host:8000/v1}
    TASKS=${TASKS:-data/tasks.jsonl}
    PERSONA_SPLITS=${PERSONA_SPLITS:-A=50,B=50,test=10}
    GOLD_SPLITS="A B"
    SAMPLES=10
    # simulate, select and evaluate keep a copy of the model on each GPU; train deals one model's weights, gradients and
    # optimizer state to all of them. On a single GPU set both to "python", and TRAIN_FLAGS=--gradient-checkpointing.
    LAUNCH=${LAUNCH:-accelerate launch --config_file configs/ddp.yaml}
    LAUNCH_TRAINING=${LAUNCH_TRAINING:-accelerate launch --config_file configs/fsdp.yaml}
    SIMULATE_FLAGS=${SIMULATE_FLAGS:---system fold}                 # Mixtral's chat template knows no system role
    grep -q "\"split\": \"$SPLIT\"" "$TASKS" || { echo "run.sh: no task of split $SPLIT in $TASKS" >&2; exit 2; }
    ;;
*)
    sed -n '2,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

for variant in $VARIANTS; do
    case $variant in
    main | no_reg | gold) ;;
    *) echo "run.sh: no variant $variant; there are: main no_reg gold" >&2; exit 2 ;;
    esac
done

DATA=(--tasks "$TASKS" --personas "$RUN/personas.jsonl" --seed "$SEED" ${LIMIT:+--limit "$LIMIT"})
SIMULATE=($LAUNCH simulate.py "${DATA[@]}" "${MODEL[@]}" "${ANSWER[@]}" --roleplayer "$ROLEPLAYER" --samples $SAMPLES
          $SIMULATE_FLAGS)
SELECT=($LAUNCH select.py "${DATA[@]}" "${MODEL[@]}" "${ANSWER[@]}" --gold "$RUN/gold.jsonl" --base "$BASE"
        $SELECT_FLAGS)
TRAIN=($LAUNCH_TRAINING train.py "${DATA[@]}" "${MODEL[@]}" "${LEARN[@]}" --gold "$RUN/gold.jsonl" --base "$BASE"
       $TRAIN_FLAGS)
EVALUATE=($LAUNCH evaluate.py "${DATA[@]}" "${MODEL[@]}" "${ANSWER[@]}" --gold "$RUN/gold.jsonl" --base "$BASE"
          --split "$SPLIT" --results "$RUN/results.jsonl" $EVALUATE_FLAGS)

# evaluate VARIANT ITERATION MODEL FOLDER: conversations on the test split, gold log-probabilities, win rate
evaluate() {
    "${SIMULATE[@]}" --questioner "$3" --split "$SPLIT" --output "$4/$SPLIT.jsonl"
    against=()
    [ "$2" = 0 ] || against=(--baseline "$RUN/base/$SPLIT" --judge "$JUDGE" --extra "$EXTRA")
    "${EVALUATE[@]}" --variant "$1" --iteration "$2" --questioner "$3" --conversations "$4/$SPLIT.jsonl" \
        "${against[@]}" --output "$4/$SPLIT"
    if [ "$MODE" = smoke ]; then                # only the embedded world can be asked what matters
        python toy/measure.py --variant "$1" --iteration "$2" --split "$SPLIT" --conversations "$4/$SPLIT.jsonl" \
            --responses "$4/$SPLIT/responses.jsonl" --tasks "$TASKS" --personas "$RUN/personas.jsonl" \
            --results "$RUN/results.jsonl"
    fi
}

# Line 1, the input: personas U and gold responses G. (The tasks T are there.)
python generate_personas.py --model "$WRITER" --extra "$EXTRA" --splits $PERSONA_SPLITS --seed "$SEED" \
    --output "$RUN/personas.jsonl"
python gold.py "${DATA[@]}" --oracle "$ORACLE" --extra "$EXTRA" --split $GOLD_SPLITS "$SPLIT" --output "$RUN/gold.jsonl"
evaluate main 0 "$BASE" "$RUN/base"

for variant in $VARIANTS; do
    questioner=$BASE                            # Q_0 is Q_BASE
    for t in $(seq $ITERATIONS); do             # line 2
        split=A
        [ $((t % 2)) = 1 ] || split=B           # A, B, A
        here=$RUN/$variant/$t
        from=$here
        [ "$t" -gt 1 ] || from=$RUN/base        # Q_0 is the same for all variants: they share its conversations

        # Line 3: n conversations for each (task, persona) pair between Q_{t-1} and the Roleplayer.
        "${SIMULATE[@]}" --questioner "$questioner" --split $split --output "$from/conversations.jsonl"

        # Lines 4 and 5: keep the one that makes the gold most probable under Q_BASE; Q_{t-1} responds to it.
        respond=()
        [ "$variant" = main ] || [ "$t" = 1 ] || respond=(--no-response)    # the others train on none
        "${SELECT[@]}" --questioner "$questioner" --conversations "$from/conversations.jsonl" "${respond[@]}" \
            --output "$from/selected.jsonl"

        # Line 6: fine-tune Q_BASE on the conversation and the response, the question alone, or the gold response.
        case $variant in no_reg) target=none ;; gold) target=gold ;; *) target=response ;; esac
        "${TRAIN[@]}" --selected "$from/selected.jsonl" --target $target --output "$here/model"

        questioner=$here/model
        evaluate "$variant" "$t" "$questioner" "$here"
    done                                        # line 7
done
