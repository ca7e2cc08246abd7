#!/usr/bin/env bash
# STaR-GATE, from nothing to the tables (Algorithm 1).
#
#   bash run.sh           three iterations and the ablations in the embedded world: two CPU cores, no key, no GPU
#   bash run.sh smoke     every step once: one iteration, two minutes
#   bash run.sh small     a real Questioner of .5B on one card of 24 GB, 20 tasks x 10 people: docs/scale.md
#   bash run.sh paper     the published settings: needs GPUs, servers and an API key; read the variables below first
#   bash run.sh benchmark MODEL     any untrained Questioner (folder, hub name, openai:MODEL@URL) against Q_BASE on the
#                         test split: one more line in the table of runs/benchmark
#
#   DRY_RUN=1    says how many calls, trainings and gigabytes that would be, and ends
#   ORACLE=openai:MODEL  ROLEPLAYER=openai:MODEL@URL  WRITER=  JUDGE=      who plays whom. Several Roleplayers, with
#                blanks between, share the pairs. TEST_ROLEPLAYER= answers instead in evaluations, OTHER_ROLEPLAYER=
#                (one after the other) in `other_user`. In the embedded world these are names of toy/server.py
#   RUN=folder   where the output goes            SEED=n            of all randomness
#   SPLIT=dev    evaluate on another split        ITERATIONS=n      of expert iteration
#   VARIANTS="main base_answers other_user no_reg gold random permuted base_questions hidden turns"
#                which; README's "The ablations" says what
#   LIMIT=n      a seeded sample of n (task, persona) pairs of each split: a trial before a large run
#   SAMPLES=n    conversations for each pair      TEST_SAMPLES=n    the same on the split that is evaluated
#   TASKS=file  TASKS_PER_SPLIT=n  PERSONAS=file  PERSONA_SPLITS=A=50,B=50,test=10  EXAMPLES=file      data of your own
#   GOLD=file    gold responses of your own       TEST_GOLD=file    those of the evaluated split, if in another file
#   BASE=folder  another Q_BASE                   GPUS=n            to work on; or LAUNCH= and LAUNCH_TRAINING=command
#   SERVE="vllm serve"           serves each Q_t while it asks and answers: any command that takes a folder and --port
#   PERSONA_FLAGS, GOLD_FLAGS, SIMULATE_FLAGS, SELECT_FLAGS, TRAIN_FLAGS, EVALUATE_FLAGS     more flags for these stages
#   REPORT_FLAGS --published draws the paper's values beside the run's
#   SERVER_FLAGS more flags for all stages that ask a server: --concurrency, --timeout, --prices, --max-refused
#   EXTRA=JSON   more arguments of all requests but the Roleplayer's
#   STALE=remove removes what a changed variable has made stale, and makes it anew
#   WAIT_HOURS=n that a stage waits for a server that is away (12)
#   FAULTS=JSON  how often the embedded world's server fails (python toy/server.py --help)
#
# A run that was interrupted goes on where it stopped: start it again with the same words.
set -eo pipefail
cd "$(dirname "$0")"

MODE=${1:-toy}
RUN=${RUN:-runs/$MODE${LIMIT:+-$LIMIT}}          # a trial has a folder of its own: a model is not prolonged
RUN=${RUN%/} RUN=${RUN#./}                       # as the stages write their --output
SEED=${SEED:-42} SPLIT=${SPLIT:-test} EXTRA=${EXTRA:-"{}"}
K=3                                              # the most questions in a conversation: simulate.py's --max-turns
[[ ! $SIMULATE_FLAGS =~ --max-turns[\ =]([0-9]+) ]] || K=${BASH_REMATCH[1]}
MODEL=() ANSWER=() TALK=() SCORE=() LEARN=() measured='' toy='' ask=''   # what a mode adds to the stages' flags

refuse() {
    echo "run.sh: $*" >&2
    exit 2
}

# ---------------------------------------------------------------- settings

for name in ITERATIONS LIMIT SAMPLES TEST_SAMPLES TASKS_PER_SPLIT GPUS WAIT_HOURS; do
    case ${!name} in
    [!1-9]* | *[!0-9]*) refuse "$name=${!name} is not a whole number above 0" ;;
    esac
done

# The judge's arguments would be a served Q_t's, too, and not Q_BASE's, which nobody judges: unlike would be compared.
[ -z "$SERVE" ] || [ "$EXTRA" = "{}" ] || refuse "EXTRA would change the served Questioner's requests, too: leave out one"
[ -z "$GPUS" ] || [ -z "$LAUNCH" ] || refuse "GPUS=$GPUS is of no use beside LAUNCH=$LAUNCH: give one of them"

case $MODE in
toy | smoke)                                    # the embedded world (toy/): its users, Oracle and judge answer by rule
    if [ "$MODE" = toy ]; then
        VARIANTS=${VARIANTS:-main base_answers other_user no_reg gold} ITERATIONS=${ITERATIONS:-3}
        SAMPLES=${SAMPLES:-10} TEST_SAMPLES=${TEST_SAMPLES:-4} TASKS_PER_SPLIT=${TASKS_PER_SPLIT:-28}
        TRAIN_PAIRS=${LIMIT:-224}               # of 28 x 28: many personas and few epochs, or it learns by heart
        LEARN=(--lr 2e-3 --batch-size 8 --micro-batch-size 8 --epochs 3)
    else
        VARIANTS=${VARIANTS:-main no_reg} ITERATIONS=${ITERATIONS:-1}
        SAMPLES=${SAMPLES:-8} TEST_SAMPLES=${TEST_SAMPLES:-8} TASKS_PER_SPLIT=${TASKS_PER_SPLIT:-8}
        TRAIN_PAIRS=${LIMIT:-64}
        LEARN=(--lr 2e-3 --batch-size 8 --micro-batch-size 8 --epochs 8)
    fi
    PERSONA_SPLITS=${PERSONA_SPLITS:-A=28,B=28,dev=8,test=8}     # 28 tasks x 8 personas = 224 pairs to evaluate on
    toy=yes
    ROLEPLAYER=${ROLEPLAYER:-roleplayer} OTHER_ROLEPLAYER=${OTHER_ROLEPLAYER:-roleplayer-terse}
    players=$ROLEPLAYER testers=${TEST_ROLEPLAYER:-$ROLEPLAYER} others=$OTHER_ROLEPLAYER    # the server has no address yet
    [[ $players$testers$others != *openai:* ]] ||
        refuse "in the embedded world a Roleplayer is a name of toy/server.py, such as roleplayer-terse"
    BASE=${BASE:-toy/base}
    LAUNCH=python LAUNCH_TRAINING=python
    MODEL=(--dtype float32)
    ANSWER=(--max-tokens 64)
    # The Questioner asks from its own distribution. At the paper's .9 and .9 it is sharper than that, and training on
    # such samples sharpens it further: then even --pick random gained 1.1 nats (NOTES.md), and was no control.
    TALK=(--temperature 1 --top-p 1)
    SERVER_FLAGS="--concurrency 8 $SERVER_FLAGS"                # answers by rule come at once: more only wait for it
    export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    # glibc keeps the memory that it has: a cache grows with each token, and would be fetched from the system each time.
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1000000000}
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-33554432}       # the largest that all versions accept
    ;;
small | paper | benchmark)
    ask=--ask
    if [ "$MODE" = small ]; then                # the method on one card: docs/scale.md, "A small run", says why so
        VARIANTS=${VARIANTS:-main no_reg} ITERATIONS=${ITERATIONS:-2} TEST_SAMPLES=${TEST_SAMPLES:-4}
        TASKS_PER_SPLIT=${TASKS_PER_SPLIT:-20} PERSONA_SPLITS=${PERSONA_SPLITS:-A=10,B=10,test=10}
        BASE=${BASE:-Qwen/Qwen2.5-0.5B-Instruct} GPUS=${GPUS:-1}
        ANSWER=(--max-tokens 300)
        SCORE=(--batch-size 32)                 # 150,000 words: at 64 the logits alone could have 20 GB
        # 190 examples: two epochs of small batches are 48 steps; at 64 and one epoch it would be 3
        LEARN=(--dtype float32 --batch-size 8 --micro-batch-size 2 --epochs 2)
    elif [ "$MODE" = benchmark ]; then
        [ -n "$2" ] || refuse "benchmark: name the model, such as bash run.sh benchmark Qwen/Qwen3-8B"
        measured=$2 VARIANTS='' TEST_SAMPLES=${TEST_SAMPLES:-10} PERSONA_SPLITS=${PERSONA_SPLITS:-$SPLIT=10}
        BASE=${BASE:-mistralai/Mistral-7B-Instruct-v0.2}
    else                                        # the published run's settings are the stages' defaults
        VARIANTS=${VARIANTS:-main base_answers no_reg gold} ITERATIONS=${ITERATIONS:-3} TEST_SAMPLES=${TEST_SAMPLES:-10}
        # Q_BASE: a local folder or a name on the hub. It is scored with, and is trained: always Hugging Face.
        BASE=${BASE:-mistralai/Mistral-7B-Instruct-v0.2}
        PERSONA_SPLITS=${PERSONA_SPLITS:-A=50,B=50,test=10}
        LEARN=(--rounding stochastic)           # to nearest, as published, bfloat16 loses most steps: docs/precision.md
    fi
    SAMPLES=${SAMPLES:-10}
    TASKS=${TASKS:-data/tasks.jsonl}
    [ -z "$DRY_RUN" ] || ORACLE=${ORACLE:-openai:ORACLE} ROLEPLAYER=${ROLEPLAYER:-openai:ROLEPLAYER}
    # The Oracle writes personas and gold responses, and judges. The published run asked gpt-4-0613, which is no more:
    # name a current model. Any server with OpenAI's interface will do: openai:MODEL@http://host:port/v1.
    [ -n "$ORACLE" ] || refuse "set ORACLE to the model that plays Oracle and judge, such as openai:MODEL"
    WRITER=${WRITER:-$ORACLE} JUDGE=${JUDGE:-$ORACLE}
    # The Roleplayer answers all questions. Mixtral does not fit beside the Questioner on one card: serve it elsewhere.
    [ -n "$ROLEPLAYER" ] ||
        refuse "set ROLEPLAYER, such as openai:mistralai/Mixtral-8x7B-Instruct-v0.1@http://host:8000/v1"
    OTHER_ROLEPLAYER=${OTHER_ROLEPLAYER:-mistralai/Mistral-7B-Instruct-v0.2}    # for VARIANTS=other_user
    TALK=(--system fold)                         # Mixtral's chat template knows no system role
    # simulate, select and evaluate keep a copy of the model on each GPU; train deals one model's weights, gradients and
    # optimizer state to all of them.
    if [ -z "$LAUNCH" ]; then
        here=$(nvidia-smi -L 2> /dev/null | grep -c ^GPU) || here=0
        GPUS=${GPUS:-$here}
        [ -n "$DRY_RUN" ] || [ "$here" -gt 0 ] || refuse "no GPU here (nvidia-smi -L). Without one: LAUNCH=python"
        [ -n "$DRY_RUN" ] || [ "$GPUS" -le "$here" ] || refuse "GPUS=$GPUS, but there are $here here (nvidia-smi -L)"
        if [ "$GPUS" -gt 1 ]; then
            LAUNCH="accelerate launch --config_file configs/ddp.yaml --num_processes $GPUS"
            LAUNCH_TRAINING=${LAUNCH_TRAINING:-accelerate launch --config_file configs/fsdp.yaml --num_processes $GPUS}
        fi
    fi
    LAUNCH=${LAUNCH:-python}
    LAUNCH_TRAINING=${LAUNCH_TRAINING:-$LAUNCH}
    ;;
*)
    sed -n '2,/^# A run that/s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac

for variant in $VARIANTS; do
    case $variant in
    main | no_reg | gold | random | permuted) ;;
    hidden) ;;
    base_answers | other_user | base_questions | turns)         # they need main's models
        [[ " ${VARIANTS%%"$variant"*} " = *" main "* || -d $RUN/main ]] || refuse "VARIANTS: $variant comes after main" ;;
    *)
        refuse "no variant $variant; there are: main base_answers other_user no_reg gold random permuted base_questions hidden turns" ;;
    esac
done
TEST_ROLEPLAYER=${TEST_ROLEPLAYER:-$ROLEPLAYER} users=' '
for user in $TEST_ROLEPLAYER $OTHER_ROLEPLAYER; do      # the tables tell users apart by name alone
    [[ " $VARIANTS " != *" other_user "* || $users != *" ${user%@http*} "* ]] ||
        refuse "OTHER_ROLEPLAYER: ${user%@http*} is the same model as ROLEPLAYER or TEST_ROLEPLAYER, or there twice"
    users+="${user%@http*} "
done

if [ -n "$LIMIT" ]; then                        # n pairs have at most n personas
    limited=''
    for part in ${PERSONA_SPLITS//,/ }; do
        [[ $part =~ ^[^=]+=[1-9][0-9]{0,8}$ ]] || refuse "PERSONA_SPLITS: $part is not as A=50"
        [ "${part#*=}" -le "$LIMIT" ] || part=${part%=*}=$LIMIT
        limited=$limited,$part
    done
    PERSONA_SPLITS=${limited#,}
fi

# ---------------------------------------------------------------- the run

. ./stage.sh                                    # stage, serve: how a command is run, waited for and ended

# test_talk MODEL ROLEPLAYER FOLDER: Q_t's conversations on the evaluated split
test_talk() {
    serve "$1" "$3/$SPLIT.jsonl"
    "${SIMULATE[@]}" --questioner "$served" --roleplayer $2 --split "$SPLIT" --samples "$TEST_SAMPLES" \
        --output "$3/$SPLIT.jsonl" $SIMULATE_FLAGS
}

# evaluate VARIANT ITERATION MODEL CONVERSATIONS FOLDER ...: gold log-probabilities, responses, verdicts
evaluate() {
    serve "$3" "$5/$SPLIT/responses.jsonl"
    "${EVALUATE[@]}" --variant "$1" --iteration "$2" --questioner "$served" --conversations "$4/$SPLIT.jsonl" \
        --output "$5/$SPLIT" "${@:6}" $EVALUATE_FLAGS
    [ -z "$toy" ] || [[ " $* " = *" log_prob "* ]] ||           # only the embedded world can be asked what matters
        stage measure python toy/measure.py --variant "$1" --iteration "$2" --split "$SPLIT" --tasks "$TASKS" \
            --conversations "$4/$SPLIT.jsonl" --responses "$5/$SPLIT/responses.jsonl" --personas "$personas" \
            --results "$RUN/results.jsonl"
}

# expert_iteration VARIANT: Algorithm 1, lines 2 to 7, with an evaluation of each Q_t
expert_iteration() {
    questioner=$BASE                            # Q_0 is Q_BASE
    for ((t = 1; t <= ITERATIONS; t++)); do     # line 2
        what="$1 t=$t"
        split=A
        [ $((t % 2)) = 1 ] || split=B           # A, B, A
        here=$RUN/$1/$t
        talk=$here selected=$here target=response rule=()
        case $1 in
        no_reg) target=none ;;
        gold) target=gold ;;
        random) rule=(--pick random) ;;                         # controls: the selection must matter
        hidden) rule=(--response-prompt prompts/personalisation.txt) ;;
        permuted) rule=(--gold "$RUN/permuted.jsonl")           # by golds that were written for others
            stage permute python toy/permute.py --gold "$gold" --seed "$SEED" --output "$RUN/permuted.jsonl" ;;
        esac
        if [ "$t" = 1 ]; then                   # Q_0 is the same for all variants: they share its conversations, and,
            talk=$RUN/base                      # where the rule is the same, the selection
            [ ${#rule[@]} -gt 0 ] || selected=$RUN/base
        elif [ $target != response ]; then
            rule=(--no-response)                # nobody would read them
        fi

        # Line 3: n conversations for each (task, persona) pair between Q_{t-1} and the Roleplayer.
        serve "$questioner" "$talk/conversations.jsonl"
        "${SIMULATE[@]}" --questioner "$served" --roleplayer $ROLEPLAYER --split $split --samples "$SAMPLES" \
            ${TRAIN_PAIRS:+--limit "$TRAIN_PAIRS"} --output "$talk/conversations.jsonl" $SIMULATE_FLAGS

        # Lines 4 and 5: keep the one that makes the gold most probable under Q_BASE; Q_{t-1} responds to it.
        serve "$questioner" "$selected/selected.jsonl"
        "${SELECT[@]}" --questioner "$served" --conversations "$talk/conversations.jsonl" "${rule[@]}" \
            --output "$selected/selected.jsonl" $SELECT_FLAGS

        # Line 6: fine-tune Q_BASE on the conversation and the response, the questions alone, or the gold response.
        serve ""                                # a server holds memory that training needs
        "${TRAIN[@]}" --selected "$selected/selected.jsonl" --target $target --output "$here/model" $TRAIN_FLAGS

        questioner=$here/model
        test_talk "$questioner" "$TEST_ROLEPLAYER" "$here"
        evaluate "$1" "$t" "$questioner" "$here" "$here" "${JUDGED[@]}" "$RUN/base/$SPLIT"
    done                                        # line 7
}

everything() {
    DATA=(--tasks "$TASKS" --personas "$personas" --seed "$SEED" ${LIMIT:+--limit "$LIMIT"})
    ORACLES=(stage gold $LAUNCH gold.py "${DATA[@]}" --oracle "$ORACLE" --extra "$EXTRA" $SERVER_FLAGS)
    SIMULATE=(stage simulate $LAUNCH simulate.py "${DATA[@]}" "${MODEL[@]}" "${ANSWER[@]}" "${TALK[@]}" $SERVER_FLAGS)
    SELECT=(stage select $LAUNCH select.py "${DATA[@]}" --gold "$gold" --base "$BASE" "${MODEL[@]}" "${ANSWER[@]}"
            "${SCORE[@]}" $SERVER_FLAGS)
    TRAIN=(stage train $LAUNCH_TRAINING train.py "${DATA[@]}" --gold "$gold" --base "$BASE" "${MODEL[@]}" "${LEARN[@]}")
    EVALUATE=(stage evaluate $LAUNCH evaluate.py "${DATA[@]}" --gold "$test_gold" --base "$BASE" "${MODEL[@]}"
              "${ANSWER[@]}" "${SCORE[@]}" --split "$SPLIT" --results "$RUN/results.jsonl" $SERVER_FLAGS)
    JUDGED=(--judge "$JUDGE" --extra "$EXTRA" --baseline)       # the folder of Q_BASE's evaluation follows

    # Line 1, the input: personas U and gold responses G. (The tasks T are there.)
    [ -n "$PERSONAS" ] || stage personas $LAUNCH generate_personas.py --model "$WRITER" --extra "$EXTRA" --seed "$SEED" \
        --splits "$PERSONA_SPLITS" ${EXAMPLES:+--examples "$EXAMPLES"} --output "$personas" $SERVER_FLAGS $PERSONA_FLAGS
    # The evaluated split's have a file of their own: another SPLIT changes nothing that was made from the others.
    [ -n "$GOLD$measured" ] || "${ORACLES[@]}" --split A B --output "$gold" $GOLD_FLAGS
    [ -n "$GOLD$TEST_GOLD" ] || "${ORACLES[@]}" --split "$SPLIT" --output "$test_gold" $GOLD_FLAGS

    what="Q_BASE on $SPLIT"
    test_talk "$BASE" "$TEST_ROLEPLAYER" "$RUN/base"
    evaluate main 0 "$BASE" "$RUN/base" "$RUN/base"

    if [ -n "$measured" ]; then                 # the model of `benchmark`
        name=${measured#openai:} name=${name%@http*} name=${name%/}
        what=$name there=$RUN/models/${name//\//-}/1
        test_talk "$measured" "$TEST_ROLEPLAYER" "$there"
        evaluate "$name" 1 "$measured" "$there" "$there" "${JUDGED[@]}" "$RUN/base/$SPLIT"
    fi

    for variant in $VARIANTS; do
        case $variant in
        hidden)                                 # the released code's prompt: before training, and trained into the weights
            what="base_hidden t=1"
            evaluate base_hidden 1 "$BASE" "$RUN/base" "$RUN/base_hidden/1" --metrics win_rate \
                --response-prompt prompts/personalisation.txt "${JUDGED[@]}" "$RUN/base/$SPLIT"
            expert_iteration hidden ;;
        turns)                                  # the gold's log-probability after 1, 2, ... questions
            for ((t = 0; t <= ITERATIONS; t++)); do
                talk=$RUN/main/$t model=$RUN/main/$t/model against=(--baseline "$RUN/base/$SPLIT")
                [ "$t" != 0 ] || talk=$RUN/base model=$BASE against=()
                for ((k = 1; k < K; k++)); do
                    what="main t=$t after $k questions" cut=$RUN/main-after-$k/$t
                    stage shorten python shorten.py --conversations "$talk/$SPLIT.jsonl" --turns $k --output "$cut/$SPLIT.jsonl"
                    evaluate "main-after-$k" "$t" "$model" "$cut" "$cut" --metrics log_prob "${against[@]}"
                done
            done ;;
        base_answers | base_questions)          # one of the two is Q_BASE's: what questions, what answers alone gain
            for ((t = 1; t <= ITERATIONS; t++)); do
                what="$variant t=$t" talk=$RUN/main/$t answers=$BASE
                [ "$variant" = base_answers ] || talk=$RUN/base answers=$RUN/main/$t/model
                evaluate "$variant" "$t" "$answers" "$talk" "$RUN/$variant/$t" --metrics win_rate \
                    "${JUDGED[@]}" "$RUN/base/$SPLIT"
            done ;;
        other_user)                             # at test time somebody answers with whom nobody has trained
            for user in $OTHER_ROLEPLAYER; do
                name=${user#openai:} name=${name%@http*}
                what="Q_BASE with $name" there=$RUN/other_user/${name//\//-}
                test_talk "$BASE" "$user" "$there/base"
                evaluate main 0 "$BASE" "$there/base" "$there/base"
                for ((t = 1; t <= ITERATIONS; t++)); do
                    what="main t=$t with $name"
                    test_talk "$RUN/main/$t/model" "$user" "$there/$t"
                    evaluate main "$t" "$RUN/main/$t/model" "$there/$t" "$there/$t" "${JUDGED[@]}" "$there/base/$SPLIT"
                done
            done ;;
        *)
            expert_iteration "$variant" ;;
        esac
    done
    what=''
    found=()
    if [ -n "$toy" ]; then                      # which of the paper's findings hold
        stage check python toy/check.py "$RUN" --split "$SPLIT" --output "$RUN/check.txt"
        found=(--notes "$RUN/check.txt")
    fi
    stage report python report.py "$RUN" --split "$SPLIT" --tasks "$TASKS" --personas "$personas" --gold "$test_gold" \
        "${found[@]}" $REPORT_FLAGS
}

embedded_world() {                              # URL: its server plays everybody but the Questioner
    WRITER=openai:persona-writer@$1 ORACLE=openai:oracle@$1 JUDGE=openai:judge@$1
    ROLEPLAYER=$(printf "openai:%s@$1 " $players) OTHER_ROLEPLAYER=$(printf "openai:%s@$1 " $others)
    TEST_ROLEPLAYER=$(printf "openai:%s@$1 " $testers)
}

personas=${PERSONAS:-$RUN/personas.jsonl}
gold=${GOLD:-$RUN/gold.jsonl}
test_gold=${TEST_GOLD:-${GOLD:-$RUN/gold-$SPLIT.jsonl}}

# The first pass: nothing is written into RUN before the whole plan is good.
if [ -n "$toy" ]; then
    embedded_world http://127.0.0.1:1/v1
    TASKS=$notes/tasks.jsonl
    python toy/world.py --output "$TASKS" --tasks-per-split "$TASKS_PER_SPLIT" > /dev/null
elif [ -n "$TASKS_PER_SPLIT" ]; then
    awk -v n="$TASKS_PER_SPLIT" 'match($0, /"split": *"[^"]*"/) && seen[substr($0, RSTART, RLENGTH)]++ < n' \
        "$TASKS" > "$notes/tasks.jsonl"
    TASKS=$notes/tasks.jsonl
fi
everything
[ "$TASKS" != "$notes/tasks.jsonl" ] || [ ! -e "$RUN/tasks.jsonl" ] || [ -e "$RUN/run.lock" ] ||
    refuse "$RUN/tasks.jsonl: there before the run, which writes tasks of its own there. Give another RUN"
[ -n "$DRY_RUN" ] || [ ! -d "$RUN" ] || take_run
run_group "$notes/plan" python plan.py "$RUN" --commands "$notes/commands" ${STALE:+--stale "$STALE"} \
    ${DRY_RUN:+--dry-run} $ask 8>&- || exit $?
[ -z "$DRY_RUN" ] || exit 0

# The second pass
mkdir -p "$RUN"
take_run
if [ "$TASKS" = "$notes/tasks.jsonl" ]; then
    TASKS=$RUN/tasks.jsonl
    cp "$notes/tasks.jsonl" "$TASKS"
fi
[ -z "$toy" ] || start_world toy/server.py
planning='' total=$n n=0
everything
