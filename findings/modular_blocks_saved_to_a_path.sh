#!/usr/bin/env bash
# diffusers: ModularPipeline.save_pretrained takes a string alone, though it says that it takes os.PathLike.
#
# Expected: save_pretrained(Path(...)) saves, as that of DiffusionPipeline does and as the signature (str | os.PathLike) says.
# Seen with diffusers 0.42.1: AttributeError: 'PosixPath' object has no attribute 'split', since a name on the hub is guessed from the folder
# also where nothing is pushed there. What helps: save_pretrained(str(folder)).
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 2>/dev/null
HF_HUB_OFFLINE=1 FOLDER="$folder" "$folder/venv/bin/python" - <<'PY'
import os
from pathlib import Path

import diffusers

print("diffusers", diffusers.__version__)
pipeline, folder = diffusers.Flux3ModularPipeline(), Path(os.environ["FOLDER"]) / "saved"


def outcome(place):
    try:
        pipeline.save_pretrained(place, overwrite_modular_index=True)
        return sorted(path.name for path in folder.iterdir())
    except AttributeError as error:
        return f"AttributeError: {error}"


found = [outcome(folder), outcome(str(folder))]
print(*found, sep="\n")
assert "has no attribute 'split'" in found[0], "the behaviour has changed"
assert found[1] == ["modular_model_index.json"], "the behaviour has changed"
PY
