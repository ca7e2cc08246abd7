#!/usr/bin/env bash
# A fork's run: bash forks/run.sh NAME [smoke | toy | ...] copies the tree to runs/forks/NAME, applies the diff there,
# and runs the command in the diff's third line, with the pairs and seeds of `bash run.sh smoke`. SEED=43 has others.
set -eo pipefail
cd "$(dirname "$0")/.."
diff=forks/$1.diff there=runs/forks/$1${SEED:+-$SEED}
refuse() { echo "forks/run.sh: $*" >&2; exit 2; }
[ -f "$diff" ] || refuse "no fork '$1'; there are: $(cd forks && echo *.diff)"
if [ ! -d "$there" ]; then
    rm -rf "$there.new" && mkdir -p "$there.new"
    tar -cf - --exclude ./runs --exclude ./.git --exclude ./.venv --exclude ./venv . | tar -xf - -C "$there.new"
    git apply --directory "$there.new" "$diff"
    mv "$there.new" "$there"
fi
cmp -s "$diff" "$there/$diff" || refuse "$there was made with another $diff. Delete it."
export VARIANTS=${VARIANTS:-main}
cd "$there" && eval "$(sed -n 3p "$diff")" "${2:-smoke}"
