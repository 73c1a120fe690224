#!/usr/bin/env bash
# Tests and measures this checkout on a GPU: bash bench/gpu_report.sh [OUT.json] [-- OPTIONS OF bench.gpu]
#
# Installs the checkout into a throw-away environment, runs `pytest -m gpu`, then `python -m bench.gpu`, and writes both
# into OUT.json (default bench/results/gpu-<device>.json). Under 8 minutes and offline: python3 must have torch, triton,
# pytest, and to build scikit-build-core, pybind11, cmake and ninja. Exit status 0: all tests passed, all was measured.
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
if ! limited 60 "$python" -m pip --disable-pip-version-check install --quiet --no-index --no-build-isolation --no-deps \
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
limited 160 "$python" -m pytest -c "$root/pyproject.toml" --rootdir "$root" -o addopts= -p no:cacheprovider \
  -ra --strict-markers --tb=short --durations=5 -m gpu --junitxml="$scratch/tests.xml" "$root/tests/test_gpu.py" >&2
tests=$?

section "figures"
if $on_cpu; then export TRITON_INTERPRET=1; fi
limited 210 "$python" -m bench.gpu --out "$out" --tests "$scratch/tests.xml" "$@"
figures=$?

section "done: tests $tests, figures $figures, $out"
[ "$tests" -eq 0 ] && [ "$figures" -eq 0 ]
