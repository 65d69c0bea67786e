#!/usr/bin/env bash
# Everything that wants a GPU, in parts that can be run again and go on where they stopped:
#   benchmarks/gpu.sh check            GPU tests, kernel and step timings
#   benchmarks/gpu.sh queue            the experiments by the value of their answer, and what is left of them
#   benchmarks/gpu.sh train SECONDS    as many of them as fit, in that order; the same command goes on where it stopped
# A run looks at the clock after each epoch, and compiles once for all of its seeds before its first: leave it 100 s between SECONDS and what would kill it.
# Settings: DATA (ImageFolder or its archive), RUNS (checkpoints), OUT (results), JOBS (runs at once).
set -uo pipefail
cd "$(dirname "$0")/.."
DATA=${DATA:-.data/cifar10-jpeg.tar.xz} RUNS=${RUNS:-/tmp/runs} JOBS=${JOBS:-1}
OUT=${OUT:-$RUNS/out}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor}
mkdir -p "$RUNS" "$OUT"

case ${1:-} in
check)
    python3 -m pytest -q -p no:cacheprovider --tb=short tests/test_gpu.py 2>&1 | tail -n 40
    python3 benchmarks/gpu.py --output "$OUT/gpu.json"
    ;;
queue)
    python3 examples/experiments.py examples/experiments.toml --queue all --results "$RUNS/results"
    ;;
train)
    # Checkpoints and finished runs stay in RUNS; what to keep is the JSON files.
    end=$((SECONDS + $2))
    for profile in $(python3 examples/experiments.py examples/experiments.toml --queue names --results "$RUNS/results"); do
        [ $((end - SECONDS)) -gt 60 ] || break
        python3 examples/experiments.py examples/experiments.toml --profile "$profile" --jobs "$JOBS" --time-limit $((end - SECONDS)) \
            --data-dir "$DATA" --work "$RUNS/work" --results "$RUNS/results" --report "$RUNS/report/results-$profile.md" \
            --checkpoint-every 20 --evaluate-every 5 >>"$OUT/experiments.log" 2>&1
        tail -n 2 "$OUT/experiments.log"
    done
    python3 examples/experiments.py examples/experiments.toml --queue all --results "$RUNS/results"
    (cd "$RUNS" && find . -name '*.json' -o -name '*.csv' -o -name '*.md' -o -name '*.png' | tar czf "$OUT/runs.tar.gz" -T -)
    ;;
*)
    sed -n '2,6p' "$0"
    exit 2
    ;;
esac
