# A server that answers by rule, for as long as a run: COMMAND ... is its program; `url` is where it is then.
url=http://127.0.0.1:${port:-8765}/v1                           # of the same program in another terminal
if [ -z "$PRINT" ]; then
    mkdir -p "$RUN" && rm -f "$RUN/server.url"
    "$@" --port 0 --port-file "$RUN/server.url" --end-with-parent &
    server=$!
    until [ -s "$RUN/server.url" ]; do kill -0 $server; sleep 0.1; done
    url=$(cat "$RUN/server.url")
fi
players() { local it; for it; do [[ $it = openai:* ]] && echo "$it" || echo "openai:$it@$url"; done; }     # or people
