#!/usr/bin/env bash
# The runs of docs/open_questions.md, in the embedded world: each differs from `main` in one setting.
#   bash report/sweep.sh              all of them, one after another: two hours of one core
#   bash report/sweep.sh main k       two questions; all need main
# A run is in runs/sweep/QUESTION-VALUE-SEED. What it shares with main of its seed is copied: personas, golds, Q_BASE's
# test. Its log has the output, seconds the processor time of the rest. What was interrupted goes on where it stopped
# (its time until then is not counted).
set -eo pipefail
cd "$(dirname "$0")/.."
export VARIANTS=main TIMEFORMAT='%U %S' ITERATIONS=1 SEED
run() {         # NAME VARIABLE=VALUE ...: run.sh with one setting changed. SAME: what else of main's base/ is copied
    local there=runs/sweep/$1-$SEED main=runs/sweep/main-$SEED
    [ ! -e "$there/seconds" ] || return 0
    echo "$there"
    if [ ! -d "$there" -a "$1" != main ]; then
        [ -e "$main/base/scores-gold.jsonl" ] || {
            echo "report/sweep.sh: $main is not there: bash report/sweep.sh main" >&2; exit 2; }
        rm -rf "$there.new" && mkdir -p "$there.new/base"
        cp -r "$main"/{personas,gold}* "$there.new"
        (cd "$main/base" && cp -r test* $SAME "$OLDPWD/$there.new/base")
        mv "$there.new" "$there"
    fi
    mkdir -p "$there"
    { time env RUN="$there" "${@:2}" bash run.sh >> "$there/log" 2>&1; } 2>> "$there/time" || {
        echo "report/sweep.sh: $there/log says why it ended" >&2; exit 1; }
    mv "$there/time" "$there/seconds"                           # user and system, without the server's
}
for question in ${*:-main seeds k n calls pairs oracle}; do
    SEED=100 SAME=''
    case $question in
    main) for SEED in 100 101 102; do run main ITERATIONS=5; done ;;                # N = 1 to 5
    seeds) for SEED in 103 104 105; do run main; done ;;                            # six trainings, with main's
    k) SAME="conversations* scores*"
        for SEED in 100 101 102; do for k in 3 5; do run k-$k SELECT_FLAGS="--k $k"; done; done ;;
    n) for n in 2 5 20; do run n-$n SAMPLES=$n; done ;;                             # 224 pairs each
    calls) run calls-2 SAMPLES=2 TRAIN_PAIRS=560; run calls-20 SAMPLES=20 TRAIN_PAIRS=56 ;;     # 1,120 conversations
    pairs) for pairs in 28 56 112 448; do run pairs-$pairs TRAIN_PAIRS=$pairs; done ;;
    oracle) SAME="conversations*"                                                   # selected by golds that err
        for share in 0.1 0.3 1; do
            wrong=runs/sweep/wrong-$share.jsonl main=runs/sweep/main-$SEED
            python toy/permute.py --gold $main/gold-A.jsonl --share $share --seed $SEED --output $wrong
            run oracle-$share GOLD=$wrong TEST_GOLD=$main/gold-test.jsonl
        done ;;
    *) echo "report/sweep.sh: no question $question; there are: main seeds k n calls pairs oracle" >&2; exit 2 ;;
    esac
done
