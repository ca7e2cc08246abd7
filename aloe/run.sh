#!/usr/bin/env bash
# ALOE, from seeds to the table: personas, conversations, SFT, DPO, evaluation, ablations and controls.
#
#   bash aloe/run.sh           the embedded world (aloe/toy/): two CPU cores, no key, no GPU
#   bash aloe/run.sh smoke     every step once, with few personas
#   bash aloe/run.sh paper     the published settings: needs GPUs and an API key; read the variables below first
#
#   DRY_RUN=1    counts the calls and trainings, and ends
#   ORACLE=openai:MODEL   who writes, plays the user, induces, replies and judges; the paper: GPT-4o. Or one by one:
#   WRITER=  ROLEPLAYER=  INDUCER=  TEACHER=  JUDGE=             TEACHER writes the preferred and the rejected replies
#   BASE=folder  the model that is trained        RUN=folder        where the output goes
#   SEED=n       of all randomness                SPLIT=dev         evaluate on another split
#   VARIANTS="sft sft_dpo rejected coin foreign mute"               which; base is always there
#   TEMPERATURES="0 1"    of the evaluated replies; 0: greedy       LIMIT=n      conversations to train on
#   GPUS=n       to work on; or LAUNCH= and LAUNCH_TRAINING=command
#   PERSONA_FLAGS, SIMULATE_FLAGS, SFT_FLAGS, DPO_FLAGS, EVALUATE_FLAGS          more flags for these stages
#   SERVER_FLAGS more flags for all stages that ask a server: --concurrency, --prices, --max-refused, --extra
#   FAULTS=JSON  how often the embedded world's server fails (python aloe/toy/server.py --help)
#
# A run that was interrupted goes on where it stopped: start it again with the same words.
set -eo pipefail
cd "$(dirname "$0")/.."

MODE=${1:-toy}
RUN=${RUN:-runs/aloe/$MODE} RUN=${RUN%/} SEED=${SEED:-42} SPLIT=${SPLIT:-test} toy='' K=10
MODEL=() TALK=() LEARN=() SFT=() DPO=()         # what a mode adds to the stages' flags

refuse() {
    echo "run.sh: $*" >&2
    exit 2
}

case $MODE in
toy | smoke)
    toy=yes BASE=${BASE:-aloe/toy/base} LAUNCH=python LAUNCH_TRAINING=python TEMPERATURES=${TEMPERATURES:-0 1}
    if [ "$MODE" = toy ]; then
        VARIANTS=${VARIANTS:-sft sft_dpo rejected coin foreign mute} LIMIT=${LIMIT:-150} TEST=100
    else
        VARIANTS=${VARIANTS:-sft sft_dpo} LIMIT=${LIMIT:-60} TEST=24 K=6
    fi
    SPLITS=train=$LIMIT,dev=$TEST,test=$TEST
    # The world's texts are of one form: two different users are as similar as two paraphrases elsewhere.
    PERSONA=(--embedder ngrams --similarity 0.9 --rounds 8 --held-out 30 20 --profiles "$RUN/seeds/profiles.jsonl"
             --personalities "$RUN/seeds/personalities.jsonl")
    MODEL=(--dtype float32) TALK=(--max-tokens 32)
    LEARN=(--dtype float32 --micro-batch-size 16)
    SFT=(--lr 1e-3) DPO=(--lr 3e-4)             # for 0.2 M parameters; chosen on dev
    SERVER_FLAGS="--concurrency 8 $SERVER_FLAGS"
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    ;;
paper)                                          # the published settings are the stages' defaults
    VARIANTS=${VARIANTS:-sft sft_dpo rejected} LIMIT=${LIMIT:-3000} TEST=100 TEMPERATURES=${TEMPERATURES:-0}
    BASE=${BASE:-Qwen/Qwen2-7B-Instruct} SPLITS=train=3310,dev=$TEST,test=$TEST PERSONA=()
    [ -z "$DRY_RUN" ] || ORACLE=${ORACLE:-openai:ORACLE}
    [ -n "$ORACLE$DRY_RUN" ] || refuse "set ORACLE to the model that plays all parts, such as openai:MODEL"
    WRITER=${WRITER:-$ORACLE} ROLEPLAYER=${ROLEPLAYER:-$ORACLE} INDUCER=${INDUCER:-$ORACLE}
    TEACHER=${TEACHER:-$ORACLE} JUDGE=${JUDGE:-$ORACLE}
    LEARN=(--rounding stochastic)               # to nearest, bfloat16 loses most steps of 1e-5: docs/precision.md
    if [ "${GPUS:-1}" -gt 1 ]; then
        LAUNCH=${LAUNCH:-accelerate launch --config_file configs/ddp.yaml --num_processes $GPUS}
        LAUNCH_TRAINING=${LAUNCH_TRAINING:-accelerate launch --config_file configs/fsdp.yaml --num_processes $GPUS}
    fi
    LAUNCH=${LAUNCH:-python} LAUNCH_TRAINING=${LAUNCH_TRAINING:-${LAUNCH:-python}}
    ;;
*)
    sed -n '2,/^# A run that/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

for variant in $VARIANTS; do
    case $variant in
    sft | rejected | coin) ;;
    foreign | mute) [ -n "$toy" ] || refuse "VARIANTS: $variant is a control of the embedded world" ;;
    sft_dpo) [[ " ${VARIANTS%%sft_dpo*}" = *" sft "* ]] || refuse "VARIANTS: sft_dpo comes after sft" ;;
    *) refuse "no variant $variant; there are: sft sft_dpo rejected coin foreign mute" ;;
    esac
done

. ./stage.sh                                    # stage: how a command is run, waited for and ended

# evaluate NAME MODEL: with the user of the moment
evaluate() {
    for T in $TEMPERATURES; do
        stage "evaluate $1 T=$T" $LAUNCH aloe/evaluate.py "${DATA[@]}" "${MODEL[@]}" "${TALK[@]}" --variant "$1" \
            --model "$2" --split "$SPLIT" --temperature "$T" --roleplayer $user --judge "$JUDGE" \
            --output "$RUN/$1/$SPLIT-T$T" --results "$RUN/results.jsonl" $SERVER_FLAGS $EVALUATE_FLAGS
        [ -z "$toy" ] ||                        # only the embedded world can count facts
            stage "measure $1 T=$T" python aloe/toy/measure.py --variant "$1" --evaluation "$RUN/$1/$SPLIT-T$T" \
                --results "$RUN/results.jsonl"
    done
}

# simulate FILE INDUCER: preference pairs, which the trainings after it learn from
simulate() {
    pairs=$1
    stage "simulate $(basename "$1")" $LAUNCH aloe/simulate.py "${DATA[@]}" "${MODEL[@]}" "${TALK[@]}" \
        --limit "$LIMIT" --model "$TEACHER" --roleplayer $user --inducer "$2" --output "$1" $SERVER_FLAGS \
        $SIMULATE_FLAGS
}

# sft NAME FLAGS ..., dpo NAME SFT_NAME FLAGS ...: a model from the pairs of the moment, and its evaluation
sft() {
    stage "sft $1" $LAUNCH_TRAINING aloe/train.py --stage sft --base "$BASE" --conversations "$pairs" --seed "$SEED" \
        "${LEARN[@]}" "${SFT[@]}" --output "$RUN/$1/model" "${@:2}" $SFT_FLAGS
    evaluate "$1" "$RUN/$1/model"
}
dpo() {
    stage "dpo $1" $LAUNCH_TRAINING aloe/train.py --stage dpo --base "$RUN/$2/model" --conversations "$pairs" \
        --seed "$SEED" "${LEARN[@]}" "${DPO[@]}" --output "$RUN/$1/model" "${@:3}" $DPO_FLAGS
    evaluate "$1" "$RUN/$1/model"
}

everything() {
    DATA=(--personas "$RUN/personas.jsonl" --seed "$SEED" --rounds $K)
    [ -z "$toy" ] || stage seeds python aloe/toy/world.py --seed 42 --output "$RUN/seeds"
    stage personas $LAUNCH aloe/generate_personas.py --model "$WRITER" --seed "$SEED" --splits "$SPLITS" \
        "${PERSONA[@]}" --output "$RUN/personas.jsonl" $SERVER_FLAGS $PERSONA_FLAGS
    user=$ROLEPLAYER
    simulate "$RUN/conversations.jsonl" "$INDUCER"
    evaluate base "$BASE"
    for variant in $VARIANTS; do
        user=$ROLEPLAYER pairs=$RUN/conversations.jsonl
        case $variant in
        sft) sft sft ;;
        sft_dpo) dpo sft_dpo sft ;;
        rejected) sft rejected --target rejected ;;
        coin)                                   # control: chance says which reply was preferred
            sft coin --pairs coin
            dpo coin_dpo coin --pairs coin ;;
        foreign)                                # control: the hints are about somebody else
            simulate "$RUN/foreign.jsonl" "$FOREIGN"
            sft foreign
            dpo foreign_dpo foreign ;;
        mute)                                   # control: a world in which nothing is revealed
            user=$MUTE
            evaluate mute_base "$BASE"
            simulate "$RUN/mute.jsonl" "$INDUCER"
            sft mute
            dpo mute_dpo mute ;;
        esac
    done
    stage report python aloe/report.py "$RUN" --split "$SPLIT"
}

embedded_world() {                              # URL: its server plays everybody but the model
    WRITER=openai:aloe-writer@$1 ROLEPLAYER=openai:aloe-user@$1 INDUCER=openai:aloe-inducer@$1
    JUDGE=openai:aloe-judge@$1 FOREIGN=openai:aloe-inducer-foreign@$1 MUTE=openai:aloe-user-mute@$1 TEACHER=$BASE
}

count() {                                       # STAGE: how often it runs
    tr '\0' '\n' < "$notes/commands" | grep -c "^aloe/$1.py$"
}

everything                                      # a first pass counts
if [ -n "$DRY_RUN" ]; then
    echo "$RUN: personas $SPLITS: some 30 calls of 20 texts, at most 200"
    echo "  pairs: $LIMIT conversations x $K rounds x 4 (user, inducer, two replies) x $(count simulate) =" \
        "$((LIMIT * K * 4 * $(count simulate))) calls"
    echo "  trainings: $(count train), each on about $((LIMIT * K)) rounds, from $BASE"
    echo "  evaluations: $(count evaluate) x $TEST cases x $K rounds x 2 (user, judge) =" \
        "$(($(count evaluate) * TEST * K * 2)) calls, and as many replies as rounds"
    echo "  Each stage's --dry-run tells tokens and dollars."
    exit 0
fi
mkdir -p "$RUN"
take_run
[ -z "$toy" ] || start_world aloe/toy/server.py
planning='' total=$n n=0
everything
