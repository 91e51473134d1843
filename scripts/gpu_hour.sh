#!/usr/bin/env bash
# What an hour of a CUDA machine is for: the benchmark beside auto_LiRPA, epochs of the authors' own code, and the
# CIFAR-10 run at 8/255 in what remains of the hour. Started again, it goes on with the run.
#
#   bash scripts/gpu_hour.sh CIFAR AUTHORS [section.key=value...]
#
# CIFAR holds torchvision's cifar-10-batches-py; AUTHORS is a checkout of the authors' repository; HOUR=1800 for half.
set -euo pipefail
cifar=$(realpath "$1") authors=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
results=docs/results

[[ -e $results/benchmark-cuda.json ]] || uv run python scripts/benchmark.py --device cuda --batch 128 --rounds 30 --grow
[[ -e $results/authors-epochs-cuda.json ]] || uv run python scripts/authors_epochs.py --repo "$authors" --data "$cifar" ||
    echo "the authors' code did not run here; going on without"
uv run python scripts/reproduce.py cifar10_8_255 "data.root=$cifar" "$@" --device cuda \
    --budget $((${HOUR:-3600} - SECONDS)) || [[ $? == 75 ]] # out of time, to be continued
uv run python scripts/tables.py
