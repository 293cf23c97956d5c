"""For a Python that has SDNQ and diffusers, which loads a folder of ours through it; viditq is not needed there.

python sdnq_run.py FOLDER DTYPE CALLS OUT: CALLS and OUT are safetensors files of inputs and outputs.
"""

import sys

import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file, save_file


@torch.no_grad()
def main(folder: str, dtype: str, calls: str, out: str) -> None:
    model = PixArtTransformer2DModel.from_pretrained(folder, dtype=getattr(torch, dtype))
    inputs = load_file(calls)
    text = inputs["text"].to(model.dtype)
    outputs = [
        model(latents.to(model.dtype), encoder_hidden_states=text, timestep=timestep, return_dict=False)[0]
        for latents, timestep in zip(inputs["latents"], inputs["timesteps"], strict=True)
    ]
    kinds = {type(module).__name__ for module in model.modules() if hasattr(module, "sdnq_dequantizer")}
    save_file({"outputs": torch.stack(outputs)}, out, metadata={"kinds": " ".join(sorted(kinds))})


if __name__ == "__main__":
    main(*sys.argv[1:])
