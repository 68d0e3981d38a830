#!/bin/sh
# Trains on a TPU slice that may be taken back at any time. Requests the slice, installs the last
# commit, trains, and begins again after each preemption: the run resumes from its bucket. Run it
# where it can stay for days, such as tmux on a small VM, from the repository's root:
#   ZONE=us-east5-a TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 sh docs/queued_tpu.sh NAME \
#       'LSJAX_CACHE=gs://BUCKET/cache python train.py --config ... --workdir gs://BUCKET/runs/x'
# Ends with the command, or after five failures on one slice, and deletes the slice. PAUSE: seconds
# between two looks at its state.
set -u
name=$1 command=$2 failures=0 ready=

tpu() {
    gcloud compute tpus "$@"
}

on_workers() {
    tpu tpu-vm ssh "$name" --zone "$ZONE" --worker=all --command "$1" -- \
        -o ServerAliveInterval=30 -o ServerAliveCountMax=4
}

delete() {
    tpu queued-resources delete "$name" --zone "$ZONE" --force --quiet
}

failed() {
    failures=$((failures + 1))
    [ "$failures" -lt 5 ] || { delete; exit 1; }
}

install() {
    git archive --format tar.gz -o "${TMPDIR:-/tmp}/lsjax.tar.gz" HEAD &&
        tpu tpu-vm scp "${TMPDIR:-/tmp}/lsjax.tar.gz" "$name:" --zone "$ZONE" --worker=all &&
        on_workers "rm -rf lsjax && mkdir lsjax && tar xzf lsjax.tar.gz -C lsjax && cd lsjax &&
            python3 -m pip install -q uv && python3 -m uv venv -q --python 3.12 &&
            python3 -m uv pip install -q -c constraints/py3.12.txt -e '.[tpu,gcs]'"
}

while true; do
    state=$(tpu queued-resources describe "$name" --zone "$ZONE" \
        --format='value(state.state)' 2>&1) || case $state in
    *NOT_FOUND*) state=NONE ;;
    *) echo "$state" >&2 && failed ;;
    esac
    case $state in
    NONE)
        ready=
        tpu queued-resources create "$name" --node-id "$name" --zone "$ZONE" \
            --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot || failed
        ;;
    ACTIVE)
        # A trainer whose connection broke still holds the run: SIGTERM lets it save and end.
        on_workers "pkill -TERM -f '[t]rain.py'; while pgrep -f '[t]rain.py'; do sleep 2; done" ||
            true
        [ -n "$ready" ] || { install && ready=yes; }
        if [ -n "$ready" ] && on_workers "cd lsjax && . .venv/bin/activate && $command"; then
            delete
            exit 0
        fi
        failed
        ;;
    FAILED | SUSPENDED)
        failures=0
        delete
        ;;
    esac
    sleep "${PAUSE:-60}"
done
