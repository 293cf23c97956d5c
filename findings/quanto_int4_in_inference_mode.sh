#!/usr/bin/env bash
# optimum-quanto: weights in int4 (qint4) compute under torch.no_grad, and raise under torch.inference_mode; int8 does both.
#
# Expected: a module that computes without gradients does so in either mode.
# Seen with optimum-quanto 0.2.7 and torch 2.13.0 (CPU): RuntimeError "Cannot set version_counter for inference tensor". So
# nothing quantized by it to 4 bits runs in a loop that uses inference mode, such as Lightning's predict by default. Needs
# a C++ compiler (quanto builds its unpacking at the first use).
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 optimum-quanto==0.2.7 ninja==1.13.2 setuptools 2>/dev/null
PATH="$folder/venv/bin:$PATH" "$folder/venv/bin/python" - <<'PY'
import torch
from optimum.quanto import freeze, qint4, qint8, quantize

seen = {}
for kind in (qint8, qint4):
    model = torch.nn.Sequential(torch.nn.Linear(128, 128))
    quantize(model, weights=kind)
    freeze(model)
    for mode in (torch.no_grad, torch.inference_mode):
        try:
            with mode():
                seen[kind.name, mode.__name__] = str(tuple(model(torch.ones(1, 128)).shape))
        except RuntimeError as error:
            seen[kind.name, mode.__name__] = str(error)
for (kind, mode), what in seen.items():
    print(kind, mode, what)
assert "version_counter" in seen.pop(("qint4", "inference_mode")), "the behaviour has changed"
assert set(seen.values()) == {"(1, 128)"}, "the behaviour has changed"
PY
