#!/usr/bin/env bash
# transformers: T5EncoderModel asked for float16 keeps the mlps' second projections in float32, even where the weights given are float16.
#
# Expected: dtype=torch.float16 with a float16 state dict gives a float16 model that shares its memory (dtype=torch.bfloat16 does).
# Seen with transformers 5.23.0: every `wo` comes out as float32, a copy of twice its size: 4 GB more for T5-XXL, as large as most of the
# models that it writes prompts for. Nothing in the file or the arguments asks for it. Estimates of memory have to know.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 transformers==5.23.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY' 2>/dev/null
from collections import Counter

import torch
import transformers
from transformers import T5Config, T5EncoderModel

print("torch", torch.__version__, "transformers", transformers.__version__)
config = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
found = {}
for dtype in (torch.float16, torch.bfloat16):
    state = T5EncoderModel(config).to(dtype).state_dict()
    model = T5EncoderModel.from_pretrained(None, config=config, state_dict=dict(state), dtype=dtype)
    loaded = model.state_dict()
    found[dtype] = Counter((".wo." in name, str(tensor.dtype)) for name, tensor in loaded.items())
    copied = [name for name, tensor in loaded.items() if ".wo." in name and tensor.dtype != state[name].dtype]
    print(f"asked for {dtype}, given {dtype}: {len(copied)} of {config.num_layers} wo changed their type")
assert found[torch.float16][True, "torch.float32"] == 2, "the behaviour has changed"
assert found[torch.bfloat16][True, "torch.float32"] == 0, "the behaviour has changed"
PY
