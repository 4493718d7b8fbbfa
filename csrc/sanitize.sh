#!/usr/bin/env bash
# Builds the native backend with the address and undefined-behaviour sanitizers, beside the normal one, and runs its
# tests on every instruction set of this machine. Needs GCC, and pytest and torch in the Python that is named.
#
#     csrc/sanitize.sh            # PYTHON=.venv/bin/python by default if it exists, else python
#     csrc/sanitize.sh -k strided # arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

flags="-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
CFLAGS=$flags LDFLAGS=$flags "$python" setup.py -q build_ext --build-temp "$copy/objects" --build-lib "$copy"
[ -e "$copy/rpo_kernels/_native.so" ] || { echo "the instrumented library was not built" >&2; exit 1; }
mv "$copy/rpo_kernels/_native.so" "$copy/instrumented.so"
cp -r rpo_kernels "$copy" && mv "$copy/instrumented.so" "$copy/rpo_kernels/_native.so"

export PYTHONPATH=$copy PYTHONSAFEPATH=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1
preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
isas=$(LD_PRELOAD=$preload "$python" -c 'from rpo_kernels.kernels import native; print(*native.instruction_sets())')
for isa in $isas; do
  echo "== $isa"
  RPO_KERNELS_NATIVE_ISA=$isa LD_PRELOAD=$preload \
    "$python" -m pytest -q -p no:cacheprovider tests/test_row*.py tests/test_native.py -k native "$@"
done

# The LM head's kernels: the tests cover the bfloat16 units, where this machine has them, and their emulation.
LD_PRELOAD=$preload "$python" -m pytest -q -p no:cacheprovider tests/test_head_cpu.py "$@"
