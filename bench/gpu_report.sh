#!/usr/bin/env bash
# Tests and measures this checkout on a GPU: bash bench/gpu_report.sh [OUT.json] [-- OPTIONS OF bench.gpu]
#
# Installs the checkout into a throw-away environment, runs `pytest -m gpu` and meanwhile a few of these tests under
# compute-sanitizer, where that is found, then `python -m bench.gpu`, and writes all into OUT.json (default
# bench/results/gpu-<device>.json). Under 8 minutes and offline: python3 must have torch, triton, pytest, and to build
# scikit-build-core, pybind11, cmake and ninja. Exit status 0: all tests passed, no sanitizer failed, all was measured.
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
section() { printf '\n=== %s\n' "$*" >&2; }
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
cd "$scratch" || exit 1
if ! "$python" -c 'import sys, nexus_fused; sys.exit(not nexus_fused.__file__.startswith(sys.prefix))'; then
  echo "nexus_fused is not imported from $site, where it was installed" >&2
  exit 1
fi
"$python" -m nexus_fused >&2
if [ -z "$out" ]; then
  name=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")')
  out=$root/bench/results/gpu-$(tr '[:upper:] ' '[:lower:]-' <<< "$name" | tr -cd '[:alnum:]-').json
else
  case $out in /*) ;; *) out=$OLDPWD/$out ;; esac
fi

section "tests"
# No plugins, and none of pyproject.toml's options for them: only pytest itself is needed.
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1
pytest=("$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -o addopts= -p no:cacheprovider
  --strict-markers --tb=short -m gpu "$root/tests/test_gpu.py")

# sanitized TOOL [OPTIONS]: the outcome of a few of the CUDA kernels' tests under a tool of compute-sanitizer, on stdout.
# It watches our kernels alone: PyTorch's would take long.
nvcc=$(command -v nvcc)
sanitizer=$(PATH=$PATH:$(dirname "${nvcc:-/usr/local/cuda/bin/nvcc}") command -v compute-sanitizer)
sanitized() {
  if $on_cpu || [ -z "$sanitizer" ]; then
    echo "not found"
    return
  fi
  limited 120 "$sanitizer" --tool "$@" --kernel-name kns=nexus --error-exitcode 99 "${pytest[@]}" -q \
    -k "cuda and (test_who_takes_part or test_many_chunks or test_two_runs)" > "$scratch/$1.log" 2>&1
  case $? in
    0) echo passed ;;
    124 | 137) echo "timed out" ;;
    *) echo failed ;;
  esac
}
# Beside the tests, which nobody times. Without the allocator's cache each tensor is an allocation that memcheck knows;
# calls of CUDA that fail, and are meant to, are no errors: libraries ask so for what there is.
PYTORCH_NO_CUDA_MEMORY_CACHING=1 sanitized memcheck --report-api-errors no > "$scratch/memcheck" &
sanitized racecheck > "$scratch/racecheck" &
limited 150 "${pytest[@]}" -ra --durations=5 --junitxml="$scratch/tests.xml" >&2
tests=$?
wait
sanitizers=()
unsound=0
for tool in memcheck racecheck; do
  outcome=$(cat "$scratch/$tool")
  sanitizers+=("$tool=$outcome")
  printf '%s: %s\n' "$tool" "$outcome" >&2
  case $outcome in passed | "not found") ;; *) tail -n 30 "$scratch/$tool.log" >&2 ;; esac
  if [ "$outcome" = failed ]; then unsound=1; fi
done

section "figures"
if $on_cpu; then export TRITON_INTERPRET=1; fi
limited 210 "$python" -m bench.gpu --out "$out" --tests "$scratch/tests.xml" --sanitizers "${sanitizers[@]}" "$@"
figures=$?

section "done: tests $tests, figures $figures, $out"
[ "$tests" -eq 0 ] && [ "$unsound" -eq 0 ] && [ "$figures" -eq 0 ]
