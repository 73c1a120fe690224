#!/usr/bin/env bash
# Tests and measures this checkout on a GPU: bash bench/gpu_report.sh [OUT.json] [-- OPTIONS OF bench.gpu]
#
# Installs the checkout into a throw-away environment, compiles Triton's kernels, runs `pytest -m gpu`, measures with
# `python -m bench.gpu` whatever the tests say, and then runs a few tests under compute-sanitizer, where that is found.
# All of it goes into OUT.json (default bench/results/gpu-<device>.json), logs into files beside it. Offline, and within
# 8 minutes on 16 cores: python3 must have torch, triton, pytest, and to build scikit-build-core, pybind11, cmake and
# ninja; pytest-xdist is used where it is there. Exit status 0: all tests passed, all was measured, no sanitizer found
# a fault (one may have run out of time, which OUT.json says).
#
# Without a GPU, `bash bench/gpu_report.sh out.json -- --device cpu --quick --compile-limit 0` goes through the motions.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=
if [ $# -gt 0 ] && [ "$1" != -- ]; then
  out=$1
  shift
fi
if [ $# -gt 0 ]; then
  if [ "$1" != -- ]; then
    echo "usage: bash bench/gpu_report.sh [OUT.json] [-- OPTIONS OF bench.gpu]" >&2
    exit 2
  fi
  shift
fi
on_cpu=false
case " $* " in *" --device cpu "* | *" --device=cpu "*) on_cpu=true ;; esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
section() { printf '\n=== %s (%s s)\n' "$*" "$SECONDS" >&2; }
# limited SECONDS COMMAND: interrupted as by Ctrl-C, so that pytest still writes its report, and killed if that is ignored.
limited() { timeout --signal=INT --kill-after=10 "$1" env --default-signal=INT "${@:2}"; }

section "install"
# --system-site-packages alone shows the packages of the Python that python3's own environment was made from, if it is in
# one, not that environment's. A line in a .pth file shows a folder without running its .pth files, such as that of an
# editable install of another checkout.
if ! python3 -m venv --system-site-packages --without-pip "$scratch/venv"; then
  echo "python3 -m venv failed: install Python's venv module" >&2
  exit 1
fi
python=$scratch/venv/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
python3 -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' > "$site/parent.pth"
if ! limited 80 "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-build-isolation --no-deps \
  --force-reinstall "$root"; then
  echo "the checkout could not be installed: python3 needs pip, scikit-build-core, pybind11, cmake and ninja; see above" >&2
  exit 1
fi

# From a folder with the checkout's tests and bench but not its nexus_fused, which lacks what the build puts there.
ln -s "$root/bench" "$scratch/bench"
case ${out:=-} in /*) ;; *) out=$PWD/$out ;; esac
cd "$scratch" || exit 1
if ! "$python" -c 'import sys, nexus_fused; sys.exit(not nexus_fused.__file__.startswith(sys.prefix))'; then
  echo "nexus_fused is not imported from $site, where it was installed" >&2
  exit 1
fi
if [ "${out##*/}" = - ]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')
  out=$root/bench/results/gpu-$(tr '[:upper:] ' '[:lower:]-' <<< "$name" | tr -cd '[:alnum:]-').json
fi
beside=${out%.json}
mkdir -p "$(dirname "$out")"

section "Triton's kernels, compiled for seven pairs of dtypes at a time, of parameters and of displacements"
if ! $on_cpu; then
  for dtypes in float64,float64 {float32,bfloat16,float16},{bfloat16,float32}; do
    limited 90 "$python" -c "import torch; from nexus_fused import backends
dtypes = [getattr(torch, name) for name in '$dtypes'.split(',')]
reason = backends.why_not('triton', torch.device('cuda', 0), *dtypes)
if reason: print('triton cannot run:', reason)" >&2 &
  done
  wait
fi

section "tests"
# No plugins but one, and none of pyproject.toml's options for them. A torch or Triton of another day may warn at import.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
export OMP_NUM_THREADS=1  # of each of several processes
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -o addopts= -o filterwarnings=default
  -p no:cacheprovider --strict-markers --tb=short -q -m gpu "$root/tests/test_gpu.py")
workers=()
if "$python" -c 'import xdist' 2> /dev/null; then workers=(-p xdist -n "$(($(nproc) > 10 ? 8 : 2))"); fi
# First what needs most of the memory, alone.
limited 60 "${pytest[@]}" -k int32 --junitxml="$scratch/large.xml" > "$beside-tests.log" 2>&1
large=$?
limited 120 "${pytest[@]}" -k 'not int32' "${workers[@]}" -ra --durations=5 --junitxml="$scratch/others.xml" \
  >> "$beside-tests.log" 2>&1
tests=$?
grep -hE '^(FAILED|ERROR)|passed|failed|skipped' "$beside-tests.log" | cut -c1-200 >&2
"$python" - "$scratch/large.xml" "$scratch/others.xml" "$beside-tests.xml" << 'PYTHON'
import sys
from xml.etree import ElementTree

both = ElementTree.Element("testsuites")
for path in sys.argv[1:3]:
    try:
        both.extend(ElementTree.parse(path).getroot())
    except (OSError, ElementTree.ParseError) as error:
        print(f"no report of the tests: {error}", file=sys.stderr)
ElementTree.ElementTree(both).write(sys.argv[3])
PYTHON

section "figures"
unset OMP_NUM_THREADS
if $on_cpu; then export TRITON_INTERPRET=1; fi
limited 270 "$python" -m bench.gpu --out "$out" --tests "$beside-tests.xml" "$@"
figures=$?

section "sanitizers"
# A few of the CUDA kernels' tests. Our kernels alone are watched: PyTorch's would take long. Without the allocator's
# cache each tensor is an allocation that memcheck knows; calls of CUDA that fail, and are meant to, are no errors:
# libraries ask so for what there is.
nvcc=$(command -v nvcc)
sanitizer=$(PATH=$PATH:$(dirname "${nvcc:-/usr/local/cuda/bin/nvcc}") command -v compute-sanitizer)
sanitized() {
  limited 60 "$sanitizer" --tool "$1" --report-api-errors no --kernel-name kns=nexus --error-exitcode 99 "${pytest[@]}" \
    -k 'cuda and (who_takes or many_chunks) and (float32 or bfloat16)' > "$beside-$1.log" 2>&1
  case $? in
    0) echo passed ;;
    124 | 137) echo "timed out" ;;
    *) echo failed ;;
  esac
}
outcomes=()
if ! $on_cpu && [ -n "$sanitizer" ]; then
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitized memcheck > "$scratch/memcheck" &
  sanitized racecheck > "$scratch/racecheck" &
  wait
  for tool in memcheck racecheck; do outcomes+=("$tool=$(cat "$scratch/$tool")"); done
fi
"$python" - "$out" "$SECONDS" "${outcomes[@]}" << 'PYTHON'
import json, sys
from pathlib import Path

out, seconds, *outcomes = sys.argv[1:]
result = json.loads(Path(out).read_text())
result["sanitizers"] = dict(outcome.split("=") for outcome in outcomes)
result["seconds"]["the whole report"] = int(seconds)
Path(out).write_text(json.dumps(result, indent=2) + "\n")
PYTHON

section "done: tests $large and $tests, figures $figures, sanitizers ${outcomes[*]:-not found}, $out"
[ "$large" -eq 0 ] && [ "$tests" -eq 0 ] && [ "$figures" -eq 0 ] && [[ "${outcomes[*]:-}" != *failed* ]]
