#!/usr/bin/env bash
# torch: marking a function with torch.compiler.assume_constant_result imports all of torch's compiler at once.
#
# Expected: a decorator that only marks a function for a compiler which may never be used costs nothing.
# Seen with torch 2.13.0 (CPU): the first use imports torch._dynamo, about as much again as `import torch` itself (some two
# seconds), in programs that never compile. All that it sets is one attribute of the function.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import sys
import time

import torch

print("torch", torch.__version__)
before, start = len(sys.modules), time.process_time()
assert "torch._dynamo" not in sys.modules


@torch.compiler.assume_constant_result
def marked():
    return 1


print(f"modules imported by the mark: {len(sys.modules) - before}, {time.process_time() - start:.1f} s; it sets {vars(marked)}")
assert "torch._dynamo" in sys.modules and len(sys.modules) - before > 100, "the behaviour has changed"
assert vars(marked) == {"_dynamo_marked_constant": True}, "the behaviour has changed"
PY
