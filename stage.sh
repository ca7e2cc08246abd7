# How run.sh runs a command: alone in RUN, in a process group of its own, again when a server was away, and ended when
# run.sh is. Nothing here is about the method.

# In a first pass `stage` only notes its commands, for plan.py to check and to count; in the second it runs them.
planning=yes taken='' n=0 total=0 what='' running='' serving='' serving_model='' SERVE_PORT=${SERVE_PORT:-8811}
notes=$(mktemp -d)                              # the first pass writes nothing into RUN
trap 'end "$running"; end "$serving"; rm -rf "$notes"; kill $server 2> /dev/null || true' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# start FILE COMMAND ...: in a process group of its own, with which all is ended that COMMAND starts. FILE tells its
# number, and COMMAND holds it open, with run.sh's lock on it, for as long as it runs.
start() {
    set -m
    sh -c 'echo $$ "$(uname -n)" > "$0"; exec "$@"' "$@" < /dev/null 9>&- &
    set +m
}

run_group() {                                   # start, and wait for its end; the status is the command's
    local status=0
    start "$@" 7>&-
    running=$!
    wait $running || status=$?
    running=''
    return $status
}

end() {                                         # GROUP: TERM, since torchrun ends its workers then; KILL for the deaf
    [ -n "$1" ] && kill -TERM -- "-$1" 2> /dev/null || return 0
    for ((i = 0; i < 400; i++)); do
        sleep 0.1
        kill -0 -- "-$1" 2> /dev/null || return 0
    done
    kill -KILL -- "-$1" 2> /dev/null || true
}

lock() {                                        # the file that is open as descriptor $1. (macOS has no flock command.)
    python -c "import fcntl; fcntl.flock($1, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2> /dev/null
}

# orphan DESCRIPTOR FILE: ends what a run.sh that was killed has left running. It still holds the lock.
orphan() {
    local group='' host=''
    lock "$1" && return
    read -r group host < "$2" || true
    [ "$host" != "$(uname -n)" ] || end "$group"
    lock "$1" || refuse "what an earlier run has started in $RUN still runs, on $host: end it there"
}

take_run() {                                    # one run.sh at a time works in RUN
    [ -z "$taken" ] || return 0                 # to open it again would let go of it
    exec 9>> "$RUN/run.lock" 8>> "$RUN/run.stage" 7>> "$RUN/run.serve"
    lock 9 || refuse "another run is at work in $RUN"
    orphan 8 "$RUN/run.stage"
    orphan 7 "$RUN/run.serve"
    taken=yes
}

# stage NAME COMMAND ...: one command of the run. A server that is away (status 75) is waited for.
stage() {
    n=$((n + 1))
    if [ -n "$planning" ]; then
        printf '%s\0' "$#" "$@" >> "$notes/commands"
        return
    fi
    echo "$n/$total $1${what:+ $what}"
    local status pause=60 waited=0
    export AWAY_FILE=$RUN/run.away              # a stage leaves it beside status 75, of which accelerate makes 1
    while true; do
        status=0
        rm -f "$AWAY_FILE"
        run_group "$RUN/run.stage" "${@:2}" || status=$?
        [ $status != 0 ] || return 0
        [ $status = 75 ] || [ -e "$AWAY_FILE" ] || exit $status
        [ $waited -lt $((${WAIT_HOURS:-12} * 3600)) ] || exit 75
        echo "run.sh: a server is away; again in $pause seconds" >&2
        run_group "$RUN/run.stage" sleep $pause
        waited=$((waited + pause)) pause=$((pause < 300 ? 2 * pause : 600))
    done
}

# start_world PROGRAM: the embedded world's server, which ends with run.sh, plays everybody but the model.
start_world() {
    rm -f "$RUN/server.url"
    python "$1" --port 0 --port-file "$RUN/server.url" --end-with-parent ${FAULTS:+--faults "$FAULTS"} \
        7>&- 8>&- 9>&- &
    server=$!
    until [ -s "$RUN/server.url" ]; do kill -0 $server; sleep 0.1; done
    embedded_world "$(cat "$RUN/server.url")"
}

# serve MODEL FILE: sets `served` to the string by which stages name a Questioner. With SERVE that is a server of the
# model's folder, started in the place of the one before unless FILE, for which it is needed, is there. The server's name
# for the model is the folder, so that settings record what lies in it.
serve() {
    served=$1
    [ -n "$SERVE" ] || return 0
    served=openai:$1@http://127.0.0.1:$SERVE_PORT/v1
    [ -z "$planning" ] && [ "$1" != "$serving_model" ] && [ ! -e "$2" ] || return 0
    end "$serving"
    serving='' serving_model=$1
    [ -n "$1" ] || return 0
    start "$RUN/run.serve" $SERVE "$1" --port "$SERVE_PORT" > "$RUN/serve.log" 2>&1 8>&-
    serving=$!
    until no_proxy=127.0.0.1 python -c "from urllib.request import *
urlopen('http://127.0.0.1:$SERVE_PORT/v1/models', timeout=5)" 2> /dev/null
    do
        kill -0 $serving 2> /dev/null || refuse "SERVE ended: see $RUN/serve.log"
        sleep 1
    done
}
