#!/usr/bin/env bash
# triton: a process that has called gc.freeze() ends with some thirty lines of leaked instances, types and functions on its standard error.
#
# Expected: gc.freeze(), which Python documents for servers and forks, changes nothing of what a process prints.
# Seen with triton 3.9.0 and Python 3.11 (no GPU, no torch): with it the end of the process prints "nanobind: leaked N instances!" and lists of types and
# functions; without it, or with gc.unfreeze() at exit, nothing. What is frozen is not collected at the interpreter's end, and the bindings (nanobind) take that for
# leaks. torch imports triton wherever it is installed, so that programs see it that never touch triton. The exit status stays 0.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.9.0 2>/dev/null
python="$folder/venv/bin/python"
"$python" -c 'import triton; print("triton", triton.__version__)'
for line in "pass" "gc.freeze()" "gc.freeze(); atexit.register(gc.unfreeze)"; do
  count=$("$python" -c "import atexit, gc, triton; $line" 2>&1 | grep -c . || true)
  printf '%-46s %s lines at the end\n' "$line" "$count"
  counts+=("$count")
done
[[ ${counts[0]} == 0 && ${counts[1]} -gt 10 && ${counts[2]} == 0 ]] || { echo "the behaviour has changed"; exit 1; }
