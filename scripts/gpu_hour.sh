#!/usr/bin/env bash
# What an hour of a CUDA machine is for, most important first (docs/gpu_hour.md). Started again, it goes on where it was.
#
#   bash scripts/gpu_hour.sh CIFAR [AUTHORS] [section.key=value...]      HOUR=1800 for half of one
#   bash scripts/gpu_hour.sh --rehearse CIFAR [AUTHORS]                  the same on a CPU, everything small
#
# CIFAR holds torchvision's cifar-10-batches-py; AUTHORS is a checkout of the authors' repository. A part that fails or takes
# too long is named, and the next one begins; in a rehearsal it is an error. A rehearsal writes nothing into docs.
set -euo pipefail

hour=${HOUR:-3600} device=cuda results=docs/results runs=runs rehearsal=
benchmark=(--batch 128 --rounds 30) growth=(--batch 128 --rounds 3) setting=() resumed=(training.epochs=12 epsilon.warmup_epochs=8 'optimizer.milestones=[]')
if [[ ${1:-} == --rehearse ]]; then
    shift
    device=cpu rehearsal=1 hour=${HOUR:-600}
    results=$(mktemp -d) runs=$results/runs
    benchmark=(--width 4 --batch 8 --rounds 2) growth=(--width 4 --batch 8 --rounds 1)
    setting=(model.options.width=2 model.options.linear_width=16 data.limit=256 training.epochs=4 epsilon.warmup_epochs=2
        'optimizer.milestones=[3]' training.batch_size=32 verification.limit=64 verification.pgd_steps=2)
fi
cifar=$(realpath "$1") authors=
shift
[[ -d ${1:-} ]] && authors=$(realpath "$1") && shift
setting+=("data.root=$cifar" "$@")
cd "$(dirname "$0")/.."

# part NAME SHARE COMMAND...: what leaves NAME behind in the results, in at most SHARE hundredths of the hour.
part() {
    local name=$1 seconds=$(($2 * hour / 100))
    shift 2
    [[ -e $results/$name ]] && return
    echo "== $name, at most $seconds s, ${SECONDS} s gone"
    if ! timeout --signal=INT --kill-after=60 "$seconds" "$@"; then
        echo "== $name: failed, or out of time; going on without"
        [[ -z $rehearsal ]]
    fi
}

certtrain=(uv run python -m certtrain)
# 1. It works: what a CPU proves, the GPU proves as well.
part devices.json 5 uv run python scripts/compare_devices.py --device "$device" --out "$results/devices.json"
# 2. A step, beside the natural one and auto_LiRPA's; eager, compiled, tf32, bf16; and its memory.
part "benchmark-$device.json" 15 uv run python scripts/benchmark.py --device "$device" "${benchmark[@]}" --out "$results/benchmark-$device.json"
# 3. The run itself, in what is left but for the parts behind it; again, it goes on.
left=$((hour * 80 / 100 - SECONDS))
uv run python scripts/reproduce.py cifar10_8_255 "${setting[@]}" --device "$device" --runs "$runs" \
    --results "$results/reproduce.jsonl" --budget $((rehearsal ? left / 2 : left)) || [[ $? == 75 ]] # out of time, to be continued
# 4. How time grows with batch, width and classes.
part "growth-$device.json" 10 uv run python scripts/benchmark.py --device "$device" "${growth[@]}" --grow --out "$results/growth-$device.json"
# 5. The authors' own code, here.
if [[ -n $authors ]]; then
    part "authors-epochs-$device.json" 10 uv run python scripts/authors_epochs.py --repo "$authors" --data "$cifar" --device "$device" \
        --out "$results/authors-epochs-$device.json"
fi
