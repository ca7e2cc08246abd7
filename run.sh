#!/usr/bin/env bash
# STaR-GATE, from nothing to the tables (Algorithm 1).
#
#   bash run.sh           three iterations and the ablations in the embedded world: two CPU cores, no key, no GPU
#   bash run.sh smoke     every step once: one iteration, a minute
#   bash run.sh paper     the published settings: needs GPUs, servers and an API key; read the variables below first
#
#   RUN=folder   where the output goes            SEED=n            of all randomness
#   SPLIT=dev    evaluate on another split        ITERATIONS=n      of expert iteration
#   VARIANTS="main base_answers other_user no_reg gold random permuted"        which; README's "The ablations" says what
#   LIMIT=n      a seeded sample of n (task, persona) pairs of each split: a trial before a large run
#   BASE=folder  another Q_BASE
#   SERVE="vllm serve"           serves each Q_t while it asks and answers: any command that takes a folder and --port
#   SIMULATE_FLAGS, SELECT_FLAGS, TRAIN_FLAGS, EVALUATE_FLAGS     more flags for these stages
#   SERVER_FLAGS more flags for all stages that ask a server: --concurrency, --timeout, --prices, --max-refused
#   FAULTS=JSON  how often the embedded world's server fails (python toy/server.py --help)
#
# A run that was interrupted goes on where it stopped: start it again with the same words.
set -eo pipefail
cd "$(dirname "$0")"

MODE=${1:-toy}
RUN=${RUN:-runs/$MODE${LIMIT:+-$LIMIT}}          # a trial has a folder of its own: a model is not prolonged
SEED=${SEED:-42}
SPLIT=${SPLIT:-test}

refuse() {
    echo "run.sh: $*" >&2
    exit 2
}

case $MODE in
toy | smoke)                                    # the embedded world (toy/): its users, Oracle and judge answer by rule
    if [ "$MODE" = toy ]; then
        VARIANTS=${VARIANTS:-main base_answers other_user no_reg gold}
        ITERATIONS=${ITERATIONS:-3}
        TASKS_PER_SPLIT=28
        PERSONA_SPLITS=A=28,B=28,dev=8,test=8   # 28 tasks x 8 personas = 224 pairs to evaluate on
        TRAIN_PAIRS=${LIMIT:-224}               # of 28 x 28: many personas and few epochs, or it learns by heart
        SAMPLES=10
        TEST_SAMPLES=4
        LEARN=(--lr 2e-3 --batch-size 8 --micro-batch-size 8 --epochs 3)
    else
        VARIANTS=${VARIANTS:-main no_reg}
        ITERATIONS=${ITERATIONS:-1}
        TASKS_PER_SPLIT=8
        PERSONA_SPLITS=A=28,B=28,dev=8,test=8
        TRAIN_PAIRS=${LIMIT:-64}
        SAMPLES=8
        TEST_SAMPLES=8
        LEARN=(--lr 2e-3 --batch-size 8 --micro-batch-size 8 --epochs 8)
    fi
    BASE=${BASE:-toy/base}
    LAUNCH=python
    LAUNCH_TRAINING=python
    MODEL=(--dtype float32)
    ANSWER=(--max-tokens 64)
    # The Questioner asks from its own distribution. At the paper's .9 and .9 it is sharper than that, and training on
    # such samples sharpens it further: then even --pick random gained 1.1 nats (NOTES.md), and was no control.
    SIMULATE_FLAGS="--temperature 1 --top-p 1 $SIMULATE_FLAGS"
    SERVER_FLAGS="--concurrency 8 $SERVER_FLAGS"                # answers by rule come at once: more only wait for it
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    # glibc keeps the memory that it has: a cache grows with each token, and would be fetched from the system each time.
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1000000000}
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}       # the largest that all versions accept
    ;;
paper)                                          # the published run's settings are the stages' defaults
    VARIANTS=${VARIANTS:-main base_answers no_reg gold}
    ITERATIONS=${ITERATIONS:-3}
    # Q_BASE: a local folder or a name on the hub. It is scored with, answers, and is trained: always Hugging Face.
    BASE=${BASE:-mistralai/Mistral-7B-Instruct-v0.2}
    # The Oracle writes 110 personas, 2 x 250 x 50 + 50 x 10 = 25,500 gold responses, and judges 300 pairs for each
    # variant and iteration. The published run asked gpt-4-0613, which is no more: name a current model. Any server
    # with OpenAI's interface will do: openai:MODEL@http://host:port/v1. Keys come from OPENAI_API_KEY.
    ORACLE=${ORACLE:?set ORACLE to the model that plays Oracle and judge, such as openai:MODEL}
    WRITER=${WRITER:-$ORACLE}
    JUDGE=${JUDGE:-$ORACLE}
    # Arguments of their requests, as JSON: the README's "Which arguments".
    EXTRA=${EXTRA:-"{}"}
    # The Roleplayer answers some 2 questions in each of 250 x 50 x 10 = 125,000 conversations an iteration, 250,000
    # answers. Mixtral does not fit beside the Questioner on one card: serve it elsewhere (README).
    ROLEPLAYER=${ROLEPLAYER:?set ROLEPLAYER, such as openai:mistralai/Mixtral-8x7B-Instruct-v0.1@http://host:8000/v1}
    OTHER_ROLEPLAYER=${OTHER_ROLEPLAYER:-mistralai/Mistral-7B-Instruct-v0.2}    # for VARIANTS=other_user
    TASKS=${TASKS:-data/tasks.jsonl}
    PERSONA_SPLITS=${PERSONA_SPLITS:-A=50,B=50,test=10}
    SAMPLES=10
    TEST_SAMPLES=10
    # simulate, select and evaluate keep a copy of the model on each GPU; train deals one model's weights, gradients and
    # optimizer state to all of them. On a single GPU set both to "python", and TRAIN_FLAGS=--gradient-checkpointing.
    LAUNCH=${LAUNCH:-accelerate launch --config_file configs/ddp.yaml}
    LAUNCH_TRAINING=${LAUNCH_TRAINING:-accelerate launch --config_file configs/fsdp.yaml}
    SIMULATE_FLAGS=${SIMULATE_FLAGS:---system fold}                 # Mixtral's chat template knows no system role
    grep -q "\"split\": \"$SPLIT\"" "$TASKS" || refuse "no task of split $SPLIT in $TASKS"
    ;;
*)
    sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

case $ITERATIONS in
'' | *[!0-9]* | 0*) refuse "ITERATIONS=$ITERATIONS is not a whole number above 0" ;;
esac
for variant in $VARIANTS; do
    case $variant in
    main | no_reg | gold | random | permuted) ;;
    base_answers | other_user)                  # they need main's models; and the tables tell users apart by name alone
        [[ " ${VARIANTS%%"$variant"*} " = *" main "* || -d $RUN/main ]] || refuse "VARIANTS: $variant comes after main"
        [ "$MODE" != paper ] || [ "${OTHER_ROLEPLAYER%@http*}" != "${ROLEPLAYER%@http*}" ] ||
            refuse "OTHER_ROLEPLAYER is the same model as ROLEPLAYER" ;;
    *)
        refuse "no variant $variant; there are: main base_answers other_user no_reg gold random permuted" ;;
    esac
done

mkdir -p "$RUN"
server='' serving='' serving_model='' SERVE_PORT=${SERVE_PORT:-8811}
trap 'kill $server $serving 2> /dev/null || true' EXIT
trap 'exit 130' INT TERM
if [ "$MODE" != paper ]; then
    rm -f "$RUN/server.url"
    python toy/server.py --port 0 --port-file "$RUN/server.url" --end-with-parent ${FAULTS:+--faults "$FAULTS"} &
    server=$!
    until [ -s "$RUN/server.url" ]; do kill -0 $server; sleep 0.1; done
    url=$(cat "$RUN/server.url")
    python toy/world.py --output "$RUN/tasks.jsonl" --tasks-per-split $TASKS_PER_SPLIT

    WRITER=openai:persona-writer@$url
    ORACLE=openai:oracle@$url
    ROLEPLAYER=openai:roleplayer@$url
    OTHER_ROLEPLAYER=openai:roleplayer-terse@$url
    JUDGE=openai:judge@$url
    EXTRA="{}"
    TASKS=$RUN/tasks.jsonl
fi

DATA=(--tasks "$TASKS" --personas "$RUN/personas.jsonl" --seed "$SEED" ${LIMIT:+--limit "$LIMIT"})
GOLD=(--gold "$RUN/gold.jsonl" --base "$BASE")
SIMULATE=($LAUNCH simulate.py "${DATA[@]}" "${MODEL[@]}" "${ANSWER[@]}" $SERVER_FLAGS $SIMULATE_FLAGS)
SELECT=($LAUNCH select.py "${DATA[@]}" "${GOLD[@]}" "${MODEL[@]}" "${ANSWER[@]}" $SERVER_FLAGS $SELECT_FLAGS)
TRAIN=($LAUNCH_TRAINING train.py "${DATA[@]}" "${GOLD[@]}" "${MODEL[@]}" "${LEARN[@]}" $TRAIN_FLAGS)
EVALUATE=($LAUNCH evaluate.py "${DATA[@]}" "${GOLD[@]}" "${MODEL[@]}" "${ANSWER[@]}" --split "$SPLIT"
          --results "$RUN/results.jsonl" $SERVER_FLAGS $EVALUATE_FLAGS)
JUDGED=(--judge "$JUDGE" --extra "$EXTRA" --baseline)       # the folder of Q_BASE's evaluation follows

# serve MODEL FILE: sets `served` to the string by which stages name a Questioner. With SERVE that is a server of the
# model's folder, started in the place of the one before unless FILE, for which it is needed, is there. The server's name
# for the model is the folder, so that settings record what lies in it.
serve() {
    served=$1
    [ -n "$SERVE" ] || return 0
    served=openai:$1@http://127.0.0.1:$SERVE_PORT/v1
    [ "$1" != "$serving_model" ] && [ ! -e "$2" ] || return 0
    if [ -n "$serving" ]; then
        kill "$serving" 2> /dev/null || true
        wait "$serving" 2> /dev/null || true
    fi
    serving='' serving_model=$1
    [ -n "$1" ] || return 0
    $SERVE "$1" --port "$SERVE_PORT" > "$RUN/serve.log" 2>&1 &
    serving=$!
    until python -c "from urllib.request import *; urlopen('http://127.0.0.1:$SERVE_PORT/v1/models', timeout=5)" 2> /dev/null
    do
        kill -0 "$serving" 2> /dev/null || refuse "SERVE ended: see $RUN/serve.log"
        sleep 1
    done
}

# test_talk MODEL ROLEPLAYER FOLDER: Q_t's conversations on the test split
test_talk() {
    serve "$1" "$3/$SPLIT.jsonl"
    "${SIMULATE[@]}" --questioner "$served" --roleplayer "$2" --split "$SPLIT" --samples $TEST_SAMPLES \
        --output "$3/$SPLIT.jsonl"
}

# evaluate VARIANT ITERATION MODEL CONVERSATIONS FOLDER ...: gold log-probabilities, responses, verdicts, tables
evaluate() {
    serve "$3" "$5/$SPLIT/responses.jsonl"
    "${EVALUATE[@]}" --variant "$1" --iteration "$2" --questioner "$served" --conversations "$4/$SPLIT.jsonl" \
        --output "$5/$SPLIT" "${@:6}"
    if [ "$MODE" != paper ]; then               # only the embedded world can be asked what matters
        python toy/measure.py --variant "$1" --iteration "$2" --split "$SPLIT" --conversations "$4/$SPLIT.jsonl" \
            --responses "$5/$SPLIT/responses.jsonl" --tasks "$TASKS" --personas "$RUN/personas.jsonl" \
            --results "$RUN/results.jsonl"
    fi
}

# expert_iteration VARIANT: Algorithm 1, lines 2 to 7, with an evaluation of each Q_t
expert_iteration() {
    questioner=$BASE                            # Q_0 is Q_BASE
    for ((t = 1; t <= ITERATIONS; t++)); do     # line 2
        split=A
        [ $((t % 2)) = 1 ] || split=B           # A, B, A
        here=$RUN/$1/$t
        talk=$here selected=$here target=response rule=()
        case $1 in
        no_reg) target=none ;;
        gold) target=gold ;;
        random) rule=(--pick random) ;;                         # controls: the selection must matter
        permuted) rule=(--gold "$RUN/permuted.jsonl")           # by golds that were written for others
            python toy/permute.py --gold "$RUN/gold.jsonl" --seed "$SEED" --output "$RUN/permuted.jsonl" ;;
        esac
        if [ "$t" = 1 ]; then                   # Q_0 is the same for all variants: they share its conversations, and,
            talk=$RUN/base                      # where the rule is the same, the selection
            [ ${#rule[@]} -gt 0 ] || selected=$RUN/base
        elif [ $target != response ]; then
            rule=(--no-response)                # nobody would read them
        fi

        # Line 3: n conversations for each (task, persona) pair between Q_{t-1} and the Roleplayer.
        serve "$questioner" "$talk/conversations.jsonl"
        "${SIMULATE[@]}" --questioner "$served" --roleplayer "$ROLEPLAYER" --split $split --samples $SAMPLES \
            ${TRAIN_PAIRS:+--limit "$TRAIN_PAIRS"} --output "$talk/conversations.jsonl"

        # Lines 4 and 5: keep the one that makes the gold most probable under Q_BASE; Q_{t-1} responds to it.
        serve "$questioner" "$selected/selected.jsonl"
        "${SELECT[@]}" --questioner "$served" --conversations "$talk/conversations.jsonl" "${rule[@]}" \
            --output "$selected/selected.jsonl"

        # Line 6: fine-tune Q_BASE on the conversation and the response, the questions alone, or the gold response.
        serve ""                                # a server holds memory that training needs
        "${TRAIN[@]}" --selected "$selected/selected.jsonl" --target $target --output "$here/model"

        questioner=$here/model
        test_talk "$questioner" "$ROLEPLAYER" "$here"
        evaluate "$1" "$t" "$questioner" "$here" "$here" "${JUDGED[@]}" "$RUN/base/$SPLIT"
    done                                        # line 7
}

# Line 1, the input: personas U and gold responses G. (The tasks T are there.)
$LAUNCH generate_personas.py --model "$WRITER" --extra "$EXTRA" --splits $PERSONA_SPLITS --seed "$SEED" \
    --output "$RUN/personas.jsonl" $SERVER_FLAGS
$LAUNCH gold.py "${DATA[@]}" --oracle "$ORACLE" --extra "$EXTRA" --split A B "$SPLIT" \
    --output "$RUN/gold.jsonl" $SERVER_FLAGS

test_talk "$BASE" "$ROLEPLAYER" "$RUN/base"
evaluate main 0 "$BASE" "$RUN/base" "$RUN/base"

for variant in $VARIANTS; do
    case $variant in
    base_answers)                               # Q_BASE answers on Q_t's conversations: what the questions alone gain
        for ((t = 1; t <= ITERATIONS; t++)); do
            evaluate base_answers "$t" "$BASE" "$RUN/main/$t" "$RUN/base_answers/$t" --metrics win_rate \
                "${JUDGED[@]}" "$RUN/base/$SPLIT"
        done ;;
    other_user)                                 # at test time somebody answers with whom nobody has trained
        test_talk "$BASE" "$OTHER_ROLEPLAYER" "$RUN/other_user/base"
        evaluate main 0 "$BASE" "$RUN/other_user/base" "$RUN/other_user/base"
        for ((t = 1; t <= ITERATIONS; t++)); do
            test_talk "$RUN/main/$t/model" "$OTHER_ROLEPLAYER" "$RUN/other_user/$t"
            evaluate main "$t" "$RUN/main/$t/model" "$RUN/other_user/$t" "$RUN/other_user/$t" \
                "${JUDGED[@]}" "$RUN/other_user/base/$SPLIT"
        done ;;
    *)
        expert_iteration "$variant" ;;
    esac
done
[ "$MODE" = paper ] || python toy/report.py "$RUN" --split "$SPLIT"
