#!/usr/bin/env bash
# diffusers: LongCatImagePipeline documents prompt_embeds, and no call with them gets through; PRXPipeline does not load what it saves.
#
# Expected: pipe(prompt_embeds=..., negative_prompt_embeds=...) samples, as its docstring says and its check demands (prompt and prompt_embeds
# exclude each other); PRXPipeline.from_pretrained(folder) loads the folder that save_pretrained wrote.
# Seen with diffusers 0.42.1 and transformers 5.23.0: LongCat's encode_prompt takes len(prompt) before it looks at the embeddings, TypeError:
# "object of type 'NoneType' has no len()". PRX's text encoder (T5GemmaEncoder) is no public name of transformers; diffusers sets it on the module
# object that its own import gave, which is another one than sys.modules holds by then, where from_pretrained looks: ValueError "has no class".
# What helps: encode_prompt replaced by one that returns the embeddings; PRX's text encoder given to from_pretrained.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 ftfy==6.3.1 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import sys

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

diffusers.PRXPipeline  # its module is imported here
ours, listed = hasattr(transformers, "T5GemmaEncoder"), hasattr(sys.modules["transformers"], "T5GemmaEncoder")
print("T5GemmaEncoder: of the module imported first", ours, "of sys.modules", listed)
assert (ours, listed) == (True, False), "the behaviour has changed"
PY
