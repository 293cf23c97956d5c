#!/usr/bin/env bash
# torch: a hook added to a module that came from a pickle can silently take the place of one that came with it.
#
# Expected: register_forward_hook adds a hook beside those a module already has.
# Seen with torch 2.13.0: hooks are kept by numbers that each process counts from 0. A module pickled with a hook of number n, loaded in
# another process, loses that hook to the (n + 1)-th one registered there, without a word. Here the new process is played by setting the
# counter back. What helps: register anew, after loading, whatever a module's behaviour hangs on, and drop what came along.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import operator
import pickle

import torch
from torch.utils.hooks import RemovableHandle

print("torch", torch.__version__)
RemovableHandle.next_id = 0
module = torch.nn.Linear(1, 1)
module.register_forward_hook(print)
saved = pickle.dumps(module)

RemovableHandle.next_id = 0  # what another process begins with
loaded = pickle.loads(saved)
assert list(loaded._forward_hooks.values()) == [print]
loaded.register_forward_hook(operator.index)
print("hooks after loading one and adding one:", [hook.__name__ for hook in loaded._forward_hooks.values()])
assert list(loaded._forward_hooks.values()) == [operator.index], "the behaviour has changed: both are there"
PY
