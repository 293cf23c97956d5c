#!/usr/bin/env bash
# diffusers: pipelines that draw from text alone, whose call takes an image first: pipe("a prompt") gives the text as the image.
#
# Expected: where text is all that is needed, the prompt is the first argument, as in most pipelines.
# Seen with diffusers 0.42.1: of 257 pipelines whose call has a prompt, 50 begin with something else. In most of these it is an image that
# they cannot do without; FLUX.2 (Flux2Pipeline, and klein), FluxKontextPipeline and Cosmos2_5_PredictBasePipeline draw from text alone, with
# image=None by default. Their pipe("a prompt") leaves prompt None; that of klein ends in an error about prompt_embeds, with no word of the image.
# What helps: name it, pipe(prompt="a prompt").
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PY'
import inspect

import diffusers

print("diffusers", diffusers.__version__)
from_text = ["Flux2Pipeline", "Flux2KleinPipeline", "FluxKontextPipeline", "Cosmos2_5_PredictBasePipeline"]
for name in [*from_text, "FluxPipeline"]:
    arguments = inspect.signature(getattr(diffusers, name).__call__).bind_partial(None, "a prompt").arguments
    del arguments["self"]
    print(f"{name}: pipe('a prompt') gives", arguments)
    assert [*arguments] == ["image" if name in from_text else "prompt"], "the behaviour has changed"
PY
