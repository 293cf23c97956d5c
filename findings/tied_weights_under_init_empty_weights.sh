#!/usr/bin/env bash
# accelerate: init_empty_weights unties weights that a transformers model shares, without a word.
#
# Expected: a T5 encoder built under init_empty_weights still has one embedding table reached by two names, as it has when it is
# built for real.
# Seen with accelerate 1.15.0, transformers 5.23.0, torch 2.13.0: the two names hold two parameters, since each registration makes a new
# one on the meta device. Whoever counts parameters or bytes from such a skeleton counts the table twice, and whoever assigns
# tensors to it has to give both. model.tie_weights() afterwards makes them one again.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 accelerate==1.15.0 transformers==5.23.0 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import accelerate
import torch
import transformers
from accelerate import init_empty_weights
from transformers import T5Config, T5EncoderModel

print("accelerate", accelerate.__version__, "transformers", transformers.__version__, "torch", torch.__version__)
config = T5Config(vocab_size=100, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)


def told(model):
    shared = model.shared.weight is model.encoder.embed_tokens.weight
    return shared, sum(p.numel() for p in model.parameters())


with init_empty_weights():
    skeleton = T5EncoderModel(config)
real, empty = told(T5EncoderModel(config)), told(skeleton)
skeleton.tie_weights()
print("one table, parameters: real", real, "skeleton", empty, "skeleton after tie_weights", told(skeleton))
assert real[0] and not empty[0] and empty[1] == real[1] + 1600 and told(skeleton) == real, "the behaviour has changed"
PY
