#!/usr/bin/env bash
# An engine generates. This serves the Questioner (--questioner; ALOE: --model) of a stage while the stage runs.
#   SERVE="vllm serve --gpu-memory-utilization 0.5" bash settings/serve.sh python simulate.py \
#       --questioner runs/paper/main/1/model --split test --output runs/paper/main/1/test.jsonl
# starts `$SERVE FOLDER --port 8811` (SERVE_PORT), runs the command with openai:FOLDER@http://127.0.0.1:8811/v1 and ends
# both. OUTPUT.serve.log has what the server says. No server is started where nobody would ask it.
refuse() { echo "serve.sh: $*" >&2; exit 2; }
up() { no_proxy=127.0.0.1 python -c "import urllib.request as u; u.urlopen('$url/models', timeout=5)" 2> /dev/null; }
start() { set -m; "$@" < /dev/null & set +m; }  # in a process group, with which all is ended that it starts
end() {
    trap '' HUP INT TERM
    kill -- $groups 2> /dev/null                # TERM, since torchrun ends its workers then; KILL for the deaf
    for i in $(seq 200); do kill -0 -- $groups 2> /dev/null || return; sleep 0.1; done
    kill -KILL -- $groups 2> /dev/null
}

port=${SERVE_PORT:-8811} url=http://127.0.0.1:${SERVE_PORT:-8811}/v1 command=() last='' output='' folder=''
for word; do
    case $last in
    --output) output=${word%/} ;;
    --questioner | --model) [[ $word = openai:* ]] || folder=$word word=openai:$word@$url ;;
    esac
    command+=("$word") last=$word
done
for file in "$output" "$output/responses.jsonl" "$output/conversations.jsonl"; do       # a folder: an evaluation's
    [[ -n $folder && ! -f $file && " $* " != *" --no-response "* && " $* " != *" log_prob "* ]] || exec "${command[@]}"
done
[ -n "$SERVE" ] && ! up || refuse "SERVE='$SERVE': set it, such as SERVE='vllm serve'; or $url is taken: set SERVE_PORT"
mkdir -p "$(dirname "$output")"
trap end EXIT; trap 'exit 129' HUP; trap 'exit 130' INT; trap 'exit 143' TERM
start $SERVE "$folder" --port "$port" > "$output.serve.log" 2>&1; groups=-$! server=$!
until up; do kill -0 $server 2> /dev/null || refuse "the server has ended: $output.serve.log says why"; sleep 1; done
start "${command[@]}"; groups+=" -$!"
wait $!
