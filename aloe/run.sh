#!/usr/bin/env bash
# ALOE, from seeds to the table: personas, conversations, SFT, DPO, evaluation, ablations and controls.
#   bash aloe/run.sh           the embedded world (aloe/toy/): two CPU cores, no key, no GPU
#   bash aloe/run.sh smoke     every step once, with few personas
#   bash aloe/run.sh paper     the published settings; needs ORACLE, who plays all parts
# Each command is printed before it runs. It can be copied and run alone. A run that was interrupted goes on where it
# stopped: start it again with the same words. If a setting has changed, a stage says what to delete.
#   PRINT=1   prints all commands and runs none; | python report/cost.py --prices IN OUT adds them up
#   LIMIT=6   a rehearsal: everything, with six personas of each split, in a folder of its own
#   ORACLE=openai:MODEL WRITER= ROLEPLAYER= INDUCER= TEACHER= (who writes both replies of a pair) JUDGE= SECOND_JUDGE=
#   VARIANTS="sft sft_dpo rejected coin foreign mute"    base is always there; the last three are controls
#   VARIANTS=models MODELS="FOLDER openai:MODEL"         other models under this benchmark, such as STaR-GATE's
#   TEMPERATURES="0 1" of the evaluated replies; CONVERSATIONS=n to train on; PERSONA_SPLITS=train=3310,dev=100,test=100
#   RUN=folder SEED= SPLIT=dev ROUNDS= BASE=folder GPUS= LAUNCH= LAUNCH_TRAINING= WAIT_HOURS= EXTRA= SERVE="vllm serve"
#   PERSONA_FLAGS= SIMULATE_FLAGS= SFT_FLAGS= DPO_FLAGS= EVALUATE_FLAGS= SERVER_FLAGS= FAULTS=JSON (of toy/server.py)
cd "$(dirname "$0")/.."
. settings/stage.sh

# ---------------------------------------------------------------- settings; what is not said is a stage's default

MODE=${1:-toy} KNOWN="sft sft_dpo rejected coin models"
default RUN="runs/aloe/$MODE${LIMIT:+-$LIMIT}" SEED=42 SPLIT=test
case $MODE in
toy | smoke)
    [ $MODE = toy ] || default VARIANTS="sft sft_dpo" PERSONA_SPLITS=train=60,dev=24,test=24 ROUNDS=6
    default VARIANTS="sft sft_dpo rejected coin foreign mute" PERSONA_SPLITS=train=150,dev=100,test=100 \
        BASE=aloe/toy/base LAUNCH=python TEMPERATURES="0 1"
    toy=yes KNOWN="$KNOWN foreign mute"
    # The world's texts are of one form: two different users are as similar as two paraphrases elsewhere.
    PERSONA=(--embedder ngrams --similarity 0.9 --rounds 8 --held-out 30 20
             --profiles aloe/toy/seeds/profiles.jsonl --personalities aloe/toy/seeds/personalities.jsonl)
    TALK="--dtype float32 --max-tokens 32 --batch-size 128" LEARN="--dtype float32 --micro-batch-size 16"
    SFT_FLAGS="--lr 1e-3 $SFT_FLAGS" DPO_FLAGS="--lr 3e-4 $DPO_FLAGS"           # for 0.2 M parameters; chosen on dev
    SERVER_FLAGS="--concurrency 8 $SERVER_FLAGS"
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false no_proxy=127.0.0.1 ;;
paper)
    [ -n "$ORACLE" ] || refuse "set ORACLE to the model that plays all parts, such as openai:MODEL"
    default VARIANTS="sft sft_dpo rejected" PERSONA_SPLITS=train=3310,dev=100,test=100 CONVERSATIONS=3000 \
        BASE=Qwen/Qwen2-7B-Instruct TEMPERATURES=0
    LEARN="--rounding stochastic"                               # to nearest, bfloat16 loses most steps of 1e-5
    . settings/gpus.sh ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' aloe/run.sh >&2; exit 2 ;;
esac
for name in $VARIANTS; do [[ " $KNOWN " = *" $name "* ]] || refuse "no variant $name in $MODE; there are: $KNOWN"; done
[[ ! " ${VARIANTS%%sft *} " = *" sft_dpo "* || -d $RUN/sft/model ]] || refuse "VARIANTS: sft_dpo comes after sft"
default LAUNCH=python
default LAUNCH_TRAINING="$LAUNCH"
if [ -n "$toy" ]; then          # its server plays everybody but the model
    [ -n "$PRINT" ] && echo "# in another terminal: python aloe/toy/server.py --port 8766" || mkdir -p "$RUN"
    port=8766
    . toy/serve.sh python aloe/toy/server.py ${FAULTS:+--faults "$FAULTS"}
    WRITER=openai:aloe-writer@$url ROLEPLAYER=openai:aloe-user@$url INDUCER=openai:aloe-inducer@$url
    JUDGE=openai:aloe-judge@$url TEACHER=$BASE
fi
default WRITER="$ORACLE" ROLEPLAYER="$ORACLE" INDUCER="$ORACLE" TEACHER="$ORACLE" JUDGE="$ORACLE"
ASKED=(${EXTRA:+--extra "$EXTRA"} $SERVER_FLAGS) SERVED=(${SERVE:+bash settings/serve.sh}) user=$ROLEPLAYER
TALKS=(--personas "$RUN/personas.jsonl" --seed "$SEED" ${ROUNDS:+--rounds "$ROUNDS"} ${LIMIT:+--limit "$LIMIT"} $TALK)

# ---------------------------------------------------------------- the stages

simulate() {    # NAME INDUCER: conversations of preference pairs, with the user of the moment
    stage "${SERVED[@]}" $LAUNCH aloe/simulate.py "${TALKS[@]}" ${CONVERSATIONS:+--limit "${LIMIT:-$CONVERSATIONS}"} \
        --model "$TEACHER" --roleplayer $user --inducer "$2" --output "$RUN/$1.jsonl" "${ASKED[@]}" $SIMULATE_FLAGS
    measure "teacher_$1" "$RUN/$1.jsonl"
}
measure() {     # NAME CONVERSATIONS: only the embedded world can count facts
    [ -z "$toy" ] || stage python aloe/toy/measure.py --variant "$1" --conversations "$2" --results "$RUN/results.jsonl"
}
evaluate() {    # NAME MODEL
    for T in $TEMPERATURES; do
        stage "${SERVED[@]}" $LAUNCH aloe/evaluate.py "${TALKS[@]}" --variant "$1" --model "$2" --split "$SPLIT" \
            --temperature "$T" --roleplayer $user --judge "$JUDGE" ${SECOND_JUDGE:+--second-judge "$SECOND_JUDGE"} \
            --output "$RUN/$1/$SPLIT-T$T" --results "$RUN/results.jsonl" "${ASKED[@]}" $EVALUATE_FLAGS
        measure "$1" "$RUN/$1/$SPLIT-T$T/conversations.jsonl"
    done
}
learn() {       # NAME STAGE BASE PAIRS FLAGS ...: a model, and its evaluation
    stage $LAUNCH_TRAINING aloe/train.py --stage "$2" --base "$3" --conversations "$RUN/$4.jsonl" --seed "$SEED" \
        --output "$RUN/$1/model" $LEARN "${@:5}"
    evaluate "$1" "$RUN/$1/model"
}
sft() { learn "$1" sft "$BASE" "$2" "${@:3}" $SFT_FLAGS; }                              # NAME PAIRS FLAGS ...
dpo() { learn "$1" dpo "$RUN/$3/model" "$2" "${@:4}" $DPO_FLAGS; }                      # NAME PAIRS SFT FLAGS ...
both() { sft "$@"; dpo "$1_dpo" "$2" "$1" "${@:3}"; }                                   # NAME PAIRS FLAGS ...

# ---------------------------------------------------------------- the run

stage $LAUNCH aloe/generate_personas.py --model "$WRITER" --seed "$SEED" --splits "$PERSONA_SPLITS" "${PERSONA[@]}" \
    ${LIMIT:+--limit "$LIMIT"} --output "$RUN/personas.jsonl" "${ASKED[@]}" $PERSONA_FLAGS
simulate conversations "$INDUCER"
evaluate base "$BASE"
for variant in $VARIANTS; do
    case $variant in
    sft) sft sft conversations ;;
    sft_dpo) dpo sft_dpo conversations sft ;;
    rejected) sft rejected conversations --target rejected ;;
    coin) both coin conversations --pairs coin ;;       # control: chance says which reply was preferred
    foreign)                                            # control: the hints are about somebody else
        simulate foreign "openai:aloe-inducer-foreign@$url"
        both foreign foreign ;;
    mute)                                               # control: a world in which nothing is revealed
        user=openai:aloe-user-mute@$url
        evaluate mute_base "$BASE"
        simulate mute "$INDUCER"
        both mute mute
        user=$ROLEPLAYER ;;
    models) for model in $MODELS; do
            name=${model#openai:} name=${name%@http*}
            evaluate "${name//\//-}" "$model"
        done ;;
    esac
done
stage python aloe/report.py "$RUN" --split "$SPLIT"
