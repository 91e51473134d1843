#!/usr/bin/env bash
# What an hour of a CUDA machine is for, most important first (docs/gpu_hour.md). Started again, it goes on where it was.
#
#   bash scripts/gpu_hour.sh CIFAR [AUTHORS [CTRAIN]] [section.key=value...]   HOUR=1800 for half of one
#   bash scripts/gpu_hour.sh --rehearse CIFAR [AUTHORS [CTRAIN]]               the same on a CPU, everything small
#
# CIFAR holds torchvision's cifar-10-batches-py, or train.npz and test.npz of the same images; AUTHORS is a checkout of the
# authors' repository, CTRAIN one of CTRAIN's, which is compared as well. A part that fails or takes too long is named, and the next one begins; in a rehearsal it
# is an error. A rehearsal writes nothing into docs, but into RESULTS, a new folder if not given. PYTHON is the
# interpreter, where it is not uv's.
set -euo pipefail

read -ra python <<<"${PYTHON:-uv run python}"
hour=${HOUR:-3600} device=cuda results=docs/results runs=runs rehearsal=
benchmark=(--batch 128 --rounds 30) growth=(--batch 128 --rounds 3) setting=()
beside=(--epochs 4 --warmup-epochs 2 --milestones 3)
search=(verification.search.timeout=20 verification.limit=1000)
if [[ ${1:-} == --rehearse ]]; then
    shift
    device=cpu rehearsal=1
    results=${RESULTS:-$(mktemp -d)} runs=$results/runs
    benchmark=(--width 4 --batch 8 --rounds 2 --no-memory) growth=(--width 4 --batch 8 --rounds 1 --no-memory)
    search=(verification.search.timeout=2 verification.limit=64)
    beside+=(--width 2 --linear-width 16 --images 512)
    setting=(model.options.width=2 model.options.linear_width=16 data.limit=256 training.epochs=4 epsilon.warmup_epochs=2
        'optimizer.milestones=[3]' training.batch_size=32 verification.limit=64 verification.pgd_steps=2)
fi
cifar=$(realpath "$1") authors=
shift
[[ -d ${1:-} ]] && authors=$(realpath "$1") && shift
[[ -n $authors && -d ${1:-} ]] && beside+=(--ctrain "$(realpath "$1")") && shift
if [[ -e $cifar/train.npz ]]; then
    setting+=(data.name=npz "data.path=$cifar" 'data.mean=[0.4914, 0.4822, 0.4465]' 'data.std=[0.2023, 0.1994, 0.2010]')
else
    setting+=("data.root=$cifar")
fi
setting+=("$@")
cd "$(dirname "$0")/.."
mkdir -p "$results"

# failed WHAT: a rehearsal ends with it.
failed() {
    echo "== $1: failed, or out of time; going on without"
    [[ -z $rehearsal ]]
}

# part NAME SECONDS SCRIPT ARGUMENTS...: what leaves NAME behind in the results when it has come to its end; until then
# what it has is in NAME.part, with which it may go on. Not begun where less than half of its seconds are left.
part() {
    local name=$1 seconds=$2 left=$((hour - SECONDS))
    shift 2
    [[ -e $results/$name ]] && return
    ((left >= seconds / 2)) || return 0
    ((seconds > left)) && seconds=$left
    echo "== $name, at most $seconds s, ${SECONDS} s gone"
    if timeout --signal=INT --kill-after=10 "$seconds" "${python[@]}" "$@" --device "$device" --out "$results/$name.part"; then
        mv "$results/$name.part" "$results/$name"
    else
        failed "$name"
    fi
}

# reproduce SHARE SETTING ARGUMENTS...: train and verify, until SHARE hundredths of the hour are over; to be continued.
reproduce() {
    local budget=$(($1 * hour / 100 - SECONDS)) setting_name=$2 code=0
    shift 2
    ((budget >= 10)) || return 0
    echo "== $setting_name, at most $budget s, ${SECONDS} s gone"
    "${python[@]}" scripts/reproduce.py "$setting_name" "${setting[@]}" --device "$device" --runs "$runs" \
        --results "$results/reproduce.jsonl" --budget "$budget" "$@" || code=$?
    case $code in
        0 | 75) ;; # done, or out of time: to be continued
        130) exit 130 ;;
        *) failed "$setting_name" ;;
    esac
}

# 1. Right: bounds, gradients and runs are those of a CPU.
part "devices-$device.json" 180 scripts/compare_devices.py
# 2. A step, beside the natural one and auto_LiRPA's; eager, compiled, tf32, bf16; and its memory.
part "benchmark-$device.json" 420 scripts/benchmark.py "${benchmark[@]}"
# 3. The run itself, in what the parts behind it leave.
reproduce 80 cifar10_8_255
# 4. How time grows with batch, width and classes.
part "growth-$device.json" 300 scripts/benchmark.py "${growth[@]}" --grow
# 5. The authors' own code, here, and CTRAIN's.
if [[ -n $authors ]]; then
    part "beside-authors-$device.json" 420 scripts/beside_authors.py --repo "$authors" --data "$cifar" "${beside[@]}"
fi
# 6. A network at 2/255, and what branch and bound proves of a thousand images.
reproduce 95 cifar10_2_255 verification.method=ibp,crown-ibp,alpha-crown,branch-and-bound "${search[@]}"
# 7. More seeds.
reproduce 95 cifar10_8_255 --seeds 1 2
# 8. The pages, from what was measured.
[[ -n $rehearsal ]] || "${python[@]}" scripts/tables.py
echo "== done after $SECONDS s; results in $results"
