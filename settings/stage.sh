# What run.sh and aloe/run.sh share: `stage COMMAND ...` prints a command and runs it; `default` sets variables.
set -eo pipefail
trap 'kill $running $server 2> /dev/null || true' EXIT
trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM
refuse() { echo "run.sh: $*" >&2; exit 2; }
default() {     # NAME=VALUE ...: unless the environment says otherwise
    local it name
    for it; do name=${it%%=*}; [ -n "${!name}" ] || printf -v "$name" %s "${it#*=}"; done
}
stage() {       # COMMAND ...: printed, run, and run again where a server was away
    printf '%q ' "$@"; echo
    export AWAY_FILE=$RUN/away                                  # tells of status 75, of which accelerate makes 1
    local status waited=0
    while [ -z "$PRINT" ]; do
        mkdir -p "$RUN" && rm -f "$AWAY_FILE"
        "$@" < /dev/null & running=$!                           # in the background, so that a signal ends it at once
        wait $running && return || status=$?
        [ -e "$AWAY_FILE" ] && [ $((waited += 5)) -le $((${WAIT_HOURS:-12} * 60)) ] || exit $status
        echo "run.sh: a server is away; again in 5 minutes" >&2
        sleep 300 & running=$!; wait $running
    done
}
