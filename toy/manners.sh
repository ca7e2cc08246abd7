#!/usr/bin/env bash
# Users that a model has never met: trained with one simulated user, with several, or with all; tested with each.
#
#   SEED=100 bash toy/manners.sh            seven runs of run.sh, in runs/manners-100: about an hour on one core
#   python toy/manners.py runs/manners-*    the tables of docs/manners.md
#
# plain: trained with `roleplayer` alone. all: with all five. not-NAME: with all but that one, and tested with it.
# ITERATIONS, SPLIT and most other variables of run.sh work here, too; RUN is the folder of all seven.
set -e
cd "$(dirname "$0")/.."
export SEED=${SEED:-42} ITERATIONS=${ITERATIONS:-2} TEST_SAMPLES=${TEST_SAMPLES:-2} SPLIT=${SPLIT:-test}
export TEST_ROLEPLAYER=roleplayer
there=${RUN:-runs/manners-$SEED}
others="roleplayer-terse roleplayer-evasive roleplayer-chatty roleplayer-erring"

# train NAME "USER ..." "USER ...": with the first, tested with `roleplayer` and with the second
train() {
    echo "== $1: trained with $2"
    local to=$there/$1 new=$there/new name
    if [ "$1" != plain ] && [ ! -e "$to" ] && [ -z "$PRINT" ]; then       # people, golds and Q_BASE are the same
        rm -rf "$new"
        mkdir -p "$new/base"
        cp "$there"/plain/{tasks.jsonl,personas.*,gold*} "$new"
        cp -r "$there/plain/base/$SPLIT"* "$new/base"
        for name in $3; do
            mkdir -p "$new/other_user/$name"
            cp -r "$there/plain/other_user/$name/base" "$new/other_user/$name"
        done
        mv "$new" "$to"
    fi
    RUN=$to ROLEPLAYER=$2 OTHER_ROLEPLAYER=$3 VARIANTS="main${3:+ other_user}" bash run.sh
}

train plain roleplayer "$others"
train all "roleplayer $others" "$others"
train not-roleplayer "$others" ""
for user in $others; do
    train "not-$user" "roleplayer ${others/$user/}" "$user"
done
