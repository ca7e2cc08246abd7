#!/usr/bin/env bash
# STaR-GATE, from nothing to the tables: Algorithm 1 as a loop over the stages.
#   bash run.sh           three iterations and the ablations in the embedded world: two CPU cores, no key, no GPU
#   bash run.sh smoke     every step once: one iteration, three minutes
#   bash run.sh laptop    a pretrained Questioner of 135M, a user by rule: two CPU cores, no key (docs/laptop.md)
#   bash run.sh paper     the published settings; needs ORACLE and ROLEPLAYER, as `small` does, for one card of 24 GB
# Each command is printed before it runs. It can be copied and run alone. A run that was interrupted goes on where it
# stopped: start it again with the same words. If a setting has changed, a stage says what to delete.
#   PRINT=1               prints all commands and runs none; | python report/cost.py --prices IN OUT adds them up
#   LIMIT=6 ITERATIONS=1  a rehearsal: everything, with six (task, persona) pairs of each split, in a folder of its own
# settings/MODE.sh says what a mode sets. docs/scale.md lists the variables, such as SEED=1 VARIANTS="main no_reg".
cd "$(dirname "$0")"
. settings/stage.sh

# ---------------------------------------------------------------- settings; what is not said is a stage's default
MODE=${1:-toy} KNOWN="main no_reg gold random permuted hidden base_answers base_questions other_user turns models"
[[ -e settings/$MODE.sh && " gpus serve stage " != *" $MODE "* ]] ||
    refuse "no mode $MODE: toy smoke laptop small paper"
for name in $VARIANTS; do [[ " $KNOWN " = *" $name "* ]] || refuse "no variant $name; there are: $KNOWN"; done
default RUN="runs/$MODE${LIMIT:+-$LIMIT}" SEED=42 SPLIT=test
. "settings/$MODE.sh"
for name in ORACLE ROLEPLAYER; do [ -n "${!name}" ] || refuse "set $name to a model, such as openai:MODEL"; done
default ITERATIONS=3 SAMPLES=10 TEST_SAMPLES=10 TASKS=data/tasks.jsonl PERSONA_SPLITS=A=50,B=50,test=10 LAUNCH=python \
    BASE=mistralai/Mistral-7B-Instruct-v0.2 OTHER_ROLEPLAYER=mistralai/Mistral-7B-Instruct-v0.2 \
    WRITER="$ORACLE" TEST_ROLEPLAYER="$ROLEPLAYER" LAUNCH_TRAINING="${LAUNCH:-python}"
JUDGE=${JUDGE-$ORACLE}          # JUDGE= (empty): log-probabilities alone
[[ " $VARIANTS " != *" models "* || -n $MODELS ]] || refuse "VARIANTS=models: set MODELS, such as \"Qwen/Qwen3-8B\""
[[ " $VARIANTS " != *" base_"* || -n $JUDGE ]] || refuse "VARIANTS: base_answers and base_questions need a JUDGE"
[[ ! " ${VARIANTS%%main*} " =~ \ (base_.*|other_user|turns)\  || -d $RUN/main ]] || refuse "VARIANTS: main comes first"
twice=$(for user in $TEST_ROLEPLAYER $OTHER_ROLEPLAYER; do echo "${user%@http*}"; done | sort | uniq -d | tr '\n' ' ')
[[ " $VARIANTS " != *" other_user "* || -z $twice ]] || refuse "${twice}is there twice among TEST_ and OTHER_ROLEPLAYER"
T=$(seq 1 "$ITERATIONS") splits=$(cut -d ' ' -f "1-$ITERATIONS" <<< "A B")      # whose golds are bought
[ "$VARIANTS" != models ] || splits=''
gold_of() { [ -n "$GOLD" ] && [ "${2:-gold}" = gold ] && echo "$GOLD" || echo "$RUN/${2:-gold}-$1.jsonl"; }
people=${PERSONAS:-$RUN/personas.jsonl} test_gold=${TEST_GOLD:-$(gold_of "$SPLIT")}
DATA=(--tasks "$TASKS" --personas "$people" --seed "$SEED" ${TASKS_PER_SPLIT:+--tasks-per-split "$TASKS_PER_SPLIT"}
      ${LIMIT:+--limit "$LIMIT"})
ASKED=(${EXTRA:+--extra "$EXTRA"} $SERVER_FLAGS) SERVED=(${SERVE:+bash settings/serve.sh})
JUDGED=(--judge "$JUDGE" ${EXTRA:+--judge-extra "$EXTRA"} --baseline) METRICS=()                # its folder follows
[ -n "$JUDGE" ] || JUDGED=(--baseline) METRICS=(--metrics log_prob)

# ---------------------------------------------------------------- the stages
talk() {        # MODEL ROLEPLAYER SPLIT SAMPLES FILE FLAGS ...: conversations
    stage "${SERVED[@]}" $LAUNCH simulate.py "${DATA[@]}" $ASK $TALK --questioner "$1" --roleplayer $2 --split "$3" \
        --samples "$4" --output "$5" $SERVER_FLAGS "${@:6}" $SIMULATE_FLAGS
}
evaluate() {    # VARIANT t MODEL TALKS FOLDER FLAGS ...: gold log-probabilities, responses, verdicts
    stage "${SERVED[@]}" $LAUNCH evaluate.py "${DATA[@]}" --gold "$test_gold" --base "$BASE" $ASK $SCORE \
        --split "$SPLIT" --variant "$1" --iteration "$2" --questioner "$3" --conversations "$4/$SPLIT.jsonl" \
        --output "$5/$SPLIT" --results "$RUN/results.jsonl" $SERVER_FLAGS "${METRICS[@]}" "${@:6}" $EVALUATE_FLAGS
    [[ -z $MEASURE || " $* " = *" log_prob "* ]] || stage python $MEASURE --variant "$1" --iteration "$2" \
        --conversations "$4/$SPLIT.jsonl" --tasks "$TASKS" --personas "$people" --split "$SPLIT" \
        ${JUDGE:+--responses "$5/$SPLIT/responses.jsonl"} --results "$RUN/results.jsonl"    # what is known to matter
}
test_with() {   # ROLEPLAYER VARIANT t MODEL FOLDER FLAGS ...: conversations on the evaluated split, and what they bring
    talk "$4" "$1" "$SPLIT" "$TEST_SAMPLES" "$5/$SPLIT.jsonl"
    evaluate "$2" "$3" "$4" "$5" "$5" "${@:6}"
}
expert_iteration() {    # VARIANT TARGET GOLDS FLAGS ...: Algorithm 1; train.py's target, select.py's golds and flags
    local variant=$1 target=$2 golds=$3 q=$BASE t split here talked selected; shift 3
    for t in $T; do                                                                                     # line 2
        split=$([ $((t % 2)) = 1 ] && echo A || echo B) here=$RUN/$variant/$t       # A, B, A
        talked=$here selected=$here
        if [ $t = 1 ]; then                                     # Q_0 is Q_BASE: all variants share what it said
            talked=$RUN/base
            [ "$golds$*" != gold ] || selected=$RUN/base
        elif [ "$target" != response ]; then
            set -- --no-response                                # nobody would read them
        fi
        talk "$q" "$ROLEPLAYER" $split "$SAMPLES" "$talked/conversations.jsonl" \
            ${TRAIN_PAIRS:+--limit "${LIMIT:-$TRAIN_PAIRS}"}                                            # line 3
        stage "${SERVED[@]}" $LAUNCH select.py "${DATA[@]}" --gold "$(gold_of $split $golds)" --base "$BASE" \
            --questioner "$q" $ASK $SCORE --conversations "$talked/conversations.jsonl" "$@" $SERVER_FLAGS \
            --scores "$talked/scores-$golds.jsonl" --output "$selected/selected.jsonl" $SELECT_FLAGS    # lines 4, 5
        stage $LAUNCH_TRAINING train.py "${DATA[@]}" --gold "$(gold_of $split)" --base "$BASE" $LEARN \
            --target "$target" --selected "$selected/selected.jsonl" --output "$here/model" $TRAIN_FLAGS    # line 6
        q=$here/model
        test_with "$TEST_ROLEPLAYER" "$variant" $t "$q" "$here" "${JUDGED[@]}" "$RUN/base/$SPLIT"
    done                                                                                                # line 7
}

# ---------------------------------------------------------------- the run
[ -n "$PERSONAS" ] || stage $LAUNCH generate_personas.py --model "$WRITER" --splits "$PERSONA_SPLITS" --seed "$SEED" \
    ${LIMIT:+--limit "$LIMIT"} ${EXAMPLES:+--examples "$EXAMPLES"} --output "$people" "${ASKED[@]}" $PERSONA_FLAGS
for split in $splits $SPLIT; do                                 # line 1, the input: personas U and gold responses G
    [ -n "$GOLD" ] || [ $split = "$SPLIT" -a -n "$TEST_GOLD" ] || stage $LAUNCH gold.py "${DATA[@]}" \
        --oracle "$ORACLE" --split $split --output "$(gold_of $split)" "${ASKED[@]}" $GOLD_FLAGS
done
test_with "$TEST_ROLEPLAYER" main 0 "$BASE" "$RUN/base"         # Q_BASE, with which all is compared
against=("${JUDGED[@]}" "$RUN/base/$SPLIT")
for variant in $VARIANTS; do
    case $variant in
    main) expert_iteration main response gold ;;
    no_reg) expert_iteration no_reg none gold ;;                # trained on the questions alone
    gold) expert_iteration gold gold gold ;;                    # ... and the Oracle's response
    random) expert_iteration random response gold --pick random ;;      # control: kept at random
    permuted) for split in $splits; do                          # control: by golds for others
            stage python toy/permute.py --gold "$(gold_of $split)" --seed "$SEED" --output "$(gold_of $split permuted)"
        done
        expert_iteration permuted response permuted ;;
    hidden) hint=(--response-prompt prompts/personalisation.txt)        # the released code's: alone, and trained in
        [ -z "$JUDGE" ] || evaluate base_hidden 1 "$BASE" "$RUN/base" "$RUN/base_hidden/1" --metrics win_rate \
            "${hint[@]}" "${against[@]}"
        expert_iteration hidden response gold "${hint[@]}" ;;
    base_answers | base_questions) for t in $T; do              # Q_t asks and Q_BASE answers, or the reverse
            who=$BASE talks=$RUN/main/$t
            [ $variant = base_answers ] || who=$RUN/main/$t/model talks=$RUN/base
            evaluate $variant $t "$who" "$talks" "$RUN/$variant/$t" --metrics win_rate "${against[@]}"
        done ;;
    other_user) for user in $OTHER_ROLEPLAYER; do               # a user answers whom training has not met
            name=${user#openai:} name=${name%@http*} there=$RUN/other_user/${name//\//-}
            test_with "$user" main 0 "$BASE" "$there/base"
            for t in $T; do
                test_with "$user" main $t "$RUN/main/$t/model" "$there/$t" "${JUDGED[@]}" "$there/base/$SPLIT"
            done
        done ;;
    turns) [[ $SIMULATE_FLAGS =~ --max-turns[\ =]([0-9]+) ]] && K=${BASH_REMATCH[1]} || K=3
        for ((k = 1; k < K; k++)); do for t in 0 $T; do                     # log p(gold) after k of K questions
            q=$RUN/main/$t/model talks=$RUN/main/$t flags=(--metrics log_prob --turns $k --baseline "$RUN/base/$SPLIT")
            [ $t != 0 ] || q=$BASE talks=$RUN/base flags=(--metrics log_prob --turns $k)
            evaluate main-after-$k $t "$q" "$talks" "$RUN/main-after-$k/$t" "${flags[@]}"
        done; done ;;
    models) for model in $MODELS; do                            # untrained models ask and answer
            name=${model#openai:} name=${name%@http*}
            test_with "$TEST_ROLEPLAYER" "$name" 1 "$model" "$RUN/models/${name//\//-}" "${against[@]}"
        done ;;
    esac
done
[ -z "$toy" ] || stage python toy/check.py "$RUN" --split "$SPLIT" --output "$RUN/check.txt"    # the paper's findings
stage python report/report.py "$RUN" --split "$SPLIT" --tasks "$TASKS" --personas "$people" --gold "$test_gold" \
    ${toy:+--notes "$RUN/check.txt"} $REPORT_FLAGS
