#!/usr/bin/env bash
# Everything that wants a GPU, in parts that can be run again and go on where they stopped:
#   benchmarks/gpu.sh check                    GPU tests, kernel and step timings
#   benchmarks/gpu.sh float EPOCHS SECONDS     float models, one process a seed
#   benchmarks/gpu.sh qat EPOCHS SECONDS       STE, EWGS and PEGE from them, one process each
# Settings: DATA (ImageFolder or its archive), RUNS (checkpoints), OUT (results), SEEDS, CASES.
set -uo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-.data/cifar10-jpeg.tar.xz} RUNS=${RUNS:-/tmp/runs} SEEDS=${SEEDS:-0 1 2} CASES=${CASES:-ste ewgs pege}
OUT=${OUT:-$RUNS/out}
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
mkdir -p "$RUNS" "$OUT"

cifar10() { python3 examples/cifar10.py --data-dir "$DATA" --cache "$RUNS/cache" "$@"; }

collect() { # results and logs without checkpoints, in one file
    (cd "$RUNS" && find . -name results.json -o -name '*.log' | tar czf "$OUT/results.tar.gz" -T -)
    (cd "$RUNS" && for f in */*.log; do echo "$f: $(tail -n 1 "$f" | cut -c1-150)"; done)
}

case ${1:-} in
check)
    cifar10 --output "$RUNS/decode" --epochs 0 --float-epochs 0 >"$RUNS/decode.log" 2>&1 &
    python3 -m pytest -q -p no:cacheprovider tests/test_gpu.py 2>&1 | tail -n 40
    wait
    tail -n 1 "$RUNS/decode.log"
    python3 benchmarks/gpu.py --output "$OUT/gpu.json"
    ;;
float)
    mkdir -p "$RUNS/float"
    for seed in $SEEDS; do
        cifar10 --output "$RUNS/float" --seed "$seed" --epochs 0 --float-epochs "$2" --time-limit "$3" \
            >"$RUNS/float/$seed.log" 2>&1 &
    done
    wait
    collect
    ;;
qat)
    # A case is ESTIMATOR, or ESTIMATOR:OPTION=VALUE:OPTION=VALUE,VALUE with options of examples/cifar10.py.
    for case in $CASES; do
        name=$(echo "$case" | tr ':=,.' '----')
        options=$(echo "$case" | tr ':' '\n' | sed -n 's/^\([a-z-]*\)=\(.*\)$/--\1 \2/p' | tr ',\n' '  ')
        mkdir -p "$RUNS/$name"
        for seed in $SEEDS; do
            # shellcheck disable=SC2086
            cifar10 --output "$RUNS/$name" --seed "$seed" --estimator "${case%%:*}" --epochs "$2" --time-limit "$3" \
                --float-checkpoint "$RUNS/float/seed{seed}/float.pt" --match $options >"$RUNS/$name/$seed.log" 2>&1 &
        done
    done
    wait
    collect
    ;;
*)
    sed -n '2,6p' "$0"
    exit 2
    ;;
esac
