# shellcheck shell=bash
# Sourced by run_local.sh and run_8xh100.sh, after tools/setup.sh. Bash 3.2 (macOS) must run it.
# Gives: supervise, check_supervision. Needs: fail, note.
#
#   MAX_RESTARTS=3     restarts of a run that died or hung, each from its latest checkpoint; none after two deaths at the
#                      same step
#   MAX_COST_USD, PRICE_PER_HOUR=...   what this machine costs an hour in USD: a run is told to save and end
#   COST_RESERVE_SECONDS=60            so long before it has cost MAX_COST_USD, counted from the script's start

# check_supervision: the variables make sense; COST_SECONDS is when the run must have ended, or empty.
check_supervision() {
    MAX_RESTARTS=${MAX_RESTARTS:-3} COST_RESERVE_SECONDS=${COST_RESERVE_SECONDS:-60} COST_SECONDS=""
    case $MAX_RESTARTS$COST_RESERVE_SECONDS in
        *[!0-9]*) fail "found MAX_RESTARTS=$MAX_RESTARTS, COST_RESERVE_SECONDS=$COST_RESERVE_SECONDS, expected whole numbers" ;;
    esac
    if [ -n "${MAX_COST_USD:-}" ]; then
        COST_SECONDS=$(awk -v most="$MAX_COST_USD" -v price="${PRICE_PER_HOUR:-}" 'BEGIN {
            if (most + 0 > 0 && price + 0 > 0) printf "%d", most / price * 3600 }')
        [ -n "$COST_SECONDS" ] || fail "found MAX_COST_USD=$MAX_COST_USD, PRICE_PER_HOUR=${PRICE_PER_HOUR:-},\
 expected two numbers above 0; PRICE_PER_HOUR is what this machine costs"
        [ "$COST_SECONDS" -gt "$((SECONDS + COST_RESERVE_SECONDS))" ] || fail "MAX_COST_USD=$MAX_COST_USD pays\
 for $COST_SECONDS s at PRICE_PER_HOUR=$PRICE_PER_HOUR, of which COST_RESERVE_SECONDS=$COST_RESERVE_SECONDS are for saving;\
 raise it"
    fi
}

# mark FOLDER TEXT: a line for whoever watches, and in the run's one log.
mark() {
    note "$2"
    if [ -f "$1/train.log" ]; then printf '%s\n' "$2" >>"$1/train.log"; fi
}

# reached FOLDER: the last step that the run told of in its heartbeat.
reached() {
    local step
    step=$(sed -n 's/.*"step": \([0-9]*\),.*/\1/p' "$1/heartbeat_rank0.json" 2>/dev/null) || true
    printf '%s' "${step:-0}"
}

# run_once COMMAND...: CODE is how it ended. SIGTERM and SIGINT are passed on as one SIGTERM; so is the end of the money.
run_once() {
    local timer=""
    "$@" &
    child=$!
    if [ -n "$COST_SECONDS" ]; then
        (
            trap 'kill "$nap" 2>/dev/null' TERM
            sleep "$((COST_SECONDS - COST_RESERVE_SECONDS - SECONDS))" &
            nap=$!
            wait "$nap" && kill -TERM "$child"
        ) >/dev/null 2>&1 &
        timer=$!
    fi
    while :; do # a signal ends `wait` before the child has ended
        CODE=0
        wait "$child" || CODE=$?
        kill -0 "$child" 2>/dev/null || break
    done
    if [ -n "$timer" ]; then
        kill -TERM "$timer" 2>/dev/null || true
        wait "$timer" 2>/dev/null || true
    fi
}

# supervise FOLDER COMMAND...: runs it, again if it dies, and returns its last exit code.
supervise() {
    local folder=$1 restarts=0 before="" step place
    shift
    child="" stopping=""
    # torchrun turns every failure into exit code 1; the program leaves its own here.
    export EXIT_CODE_FILE="$folder.exit"
    trap 'stopping=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM INT
    mkdir -p "$(dirname "$folder")"
    while :; do
        rm -f "$EXIT_CODE_FILE"
        run_once "$@"
        if [ -s "$EXIT_CODE_FILE" ]; then CODE=$(cat "$EXIT_CODE_FILE"); fi
        step=$(reached "$folder")
        case $CODE in
            0 | 2 | 3 | 4) break ;; # complete, a mistake of the user's, over the budget, a failed audit
            130 | 143) stopping=1 ;;
        esac
        if [ -n "$stopping" ]; then
            if [ "$CODE" = 1 ]; then CODE=143; fi # torchrun's, whose workers had not begun to train
            break
        fi
        place="exit code $CODE at step $step"
        if [ "$step" = "$before" ]; then
            mark "$folder" "giving up: $place, as the time before"
            break
        fi
        if [ "$restarts" -ge "$MAX_RESTARTS" ]; then
            mark "$folder" "giving up: $place, after MAX_RESTARTS=$MAX_RESTARTS"
            break
        fi
        before=$step restarts=$((restarts + 1))
        # Before the first checkpoint, one that the user named is still the place to begin.
        if [ -e "$folder/checkpoints/latest" ] || [ -z "${RESUME:-}" ]; then export RESUME=auto; fi
        mark "$folder" "restart $restarts of $MAX_RESTARTS: $place; continuing from $(latest_of "$folder")"
    done
    if [ -n "$COST_SECONDS" ] && [ "$SECONDS" -ge "$((COST_SECONDS - COST_RESERVE_SECONDS))" ]; then
        mark "$folder" "ended by MAX_COST_USD=$MAX_COST_USD after $SECONDS s at PRICE_PER_HOUR=$PRICE_PER_HOUR"
    fi
    rm -f "$EXIT_CODE_FILE"
    trap - TERM INT
    return "$CODE"
}

# latest_of FOLDER: the checkpoint that RESUME=auto takes.
latest_of() {
    cat "$1/checkpoints/latest" 2>/dev/null || printf 'the beginning'
}
