#!/usr/bin/env bash
# diffusers: LongCatImagePipeline documents prompt_embeds, and no call with them gets through.
#
# Expected: pipe(prompt_embeds=..., negative_prompt_embeds=...) samples, as its docstring says and its check demands (prompt and prompt_embeds
# exclude each other).
# Seen with diffusers 0.42.1 and transformers 5.23.0: its encode_prompt takes len(prompt) before it looks at the embeddings, TypeError:
# "object of type 'NoneType' has no len()". What helps: encode_prompt replaced by one that returns the embeddings.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 ftfy==6.3.1 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import diffusers
import torch
import transformers

print("diffusers", diffusers.__version__, "transformers", transformers.__version__)
try:
    diffusers.LongCatImagePipeline.encode_prompt(None, prompt=None, prompt_embeds=torch.zeros(1, 2, 3))
except TypeError as error:
    print("LongCatImagePipeline.encode_prompt(prompt=None, prompt_embeds=...):", error)
    assert "has no len()" in str(error), "the behaviour has changed"
else:
    raise AssertionError("the behaviour has changed")
PY
