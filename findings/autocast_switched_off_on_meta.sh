#!/usr/bin/env bash
# torch: autocast that is switched off fails on the meta device, which it would change nothing on.
#
# Expected: torch.autocast(device_type=x.device.type, enabled=False) does nothing, whatever device x lies on, as models write it around what
# must stay in float32.
# Seen with torch 2.13.0 (CPU): on the meta device it ends in "RuntimeError: unsupported scalarType". So rotary embeddings of models of
# transformers and diffusers that switch it off (Cosmos 3, OmniGen: by the device of their inputs) cannot be followed on meta for shapes alone.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6 2>/dev/null
"$folder/venv/bin/python" - <<'PY'
import torch

print("torch", torch.__version__)


def outcome(device):
    x = torch.ones(2, 2, device=device)
    try:
        with torch.autocast(device_type=x.device.type, enabled=False):
            return f"{tuple((x @ x).shape)}"
    except RuntimeError as error:
        return f"RuntimeError: {error}"


found = {device: outcome(device) for device in ("cpu", "meta")}
print(found)
assert found == {"cpu": "(2, 2)", "meta": "RuntimeError: unsupported scalarType"}, "the behaviour has changed"
PY
