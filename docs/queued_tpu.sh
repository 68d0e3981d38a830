#!/bin/sh
# Trains on a TPU slice that may be taken back at any time. Requests the slice, installs, trains,
# and begins again after each preemption: the run resumes from its bucket. Run it where it can stay
# for days, such as tmux on a small VM, from the repository's root:
#   ZONE=us-east5-a TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 sh docs/queued_tpu.sh NAME \
#       'LSJAX_CACHE=gs://BUCKET/cache python train.py --config ... --workdir gs://BUCKET/runs/x'
# Ends with the command, or after it has failed five times on one slice. PAUSE: seconds of a wait.
set -u
name=$1 command=$2 failures=0

tpu() {
    gcloud compute tpus "$@" --zone "$ZONE"
}

on_workers() {
    tpu tpu-vm ssh "$name" --worker=all --command "$1"
}

prepare() {
    tpu tpu-vm scp --recurse "$PWD" "$name:lsjax" --worker=all &&
        on_workers "cd lsjax && python3 -m pip install -q uv && python3 -m uv venv -q --clear \
            --python 3.12 && python3 -m uv pip install -q -c constraints/py3.12.txt -e '.[tpu,gcs]'"
}

while true; do
    state=$(tpu queued-resources describe "$name" --format='value(state.state)' 2>/dev/null)
    case $state in
    '')
        failures=0 ready=
        tpu queued-resources create "$name" --node-id "$name" --accelerator-type "$TYPE" \
            --runtime-version "$RUNTIME" --spot
        ;;
    ACTIVE)
        # A trainer whose connection broke still holds the run: SIGTERM lets it save and end.
        on_workers "while pkill -TERM -f '[t]rain.py'; do sleep 2; done" || true
        [ -n "${ready:-}" ] || { prepare && ready=yes; }
        on_workers "cd lsjax && . .venv/bin/activate && $command" && exit 0
        failures=$((failures + 1))
        [ "$failures" -lt 5 ] || exit 1
        ;;
    FAILED | SUSPENDED)
        tpu queued-resources delete "$name" --force --quiet
        ;;
    esac
    sleep "${PAUSE:-60}"
done
