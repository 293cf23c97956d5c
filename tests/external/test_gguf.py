"""quant=external/gguf: a denoiser's GGUF file, of a model whose class diffusers reads from single files."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from diffusers import FluxTransformer2DModel
from shrunk import compose_config

sys.path.append(str(Path(__file__).parents[1] / "models"))
from zoo import images
from zoo.saving import save

from viditq.errors import UserError
from viditq.memory import set_aside
from viditq.runner import run

SMALL = [
    *("model.num_steps=2", "model.height=32", "model.width=32", "model.dtype=float32", "data.num_prompts=2"),
    *("data.num_calibration_prompts=2", "noise_floor.num_prompts=0", "metric=[psnr]", "logger=none", "name=gguf"),
]


def flux_of_64_channels() -> Any:
    """GGUF's blocks have 32 weights."""
    pipeline = images.flux_dev()
    config = {**pipeline.transformer.config, "attention_head_dim": 32, "axes_dims_rope": (8, 12, 12)}
    pipeline.register_modules(transformer=FluxTransformer2DModel.from_config(config))
    return pipeline


def write_gguf(transformer: Any, path: Path, kind: str) -> None:
    """The blocks' matrices in `kind`, the rest in float32."""
    import gguf

    writer, of = gguf.GGUFWriter(str(path), "flux"), gguf.GGMLQuantizationType[kind]
    for name, tensor in transformer.state_dict().items():
        values = tensor.float().numpy()
        if "blocks." in name and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(values, of), raw_dtype=of)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(
    find_spec("gguf") is None, reason='needs gguf: pip install --constraint constraints.txt --editable ".[rivals]"'
)
@pytest.mark.parametrize(("kind", "bits", "psnr"), [("Q8_0", 8.5, 55), ("Q4_0", 4.5, 35)])
def test_a_file_is_judged(kind: str, bits: float, psnr: float, tmp_path: Path) -> None:
    model, file = tmp_path / "model", tmp_path / f"{kind}.gguf"
    save(flux_of_64_channels, model)
    write_gguf(FluxTransformer2DModel.from_pretrained(model / "transformer"), file, kind)
    of_model = ["model=flux_dev", f"model.path='{model}'", f"cache_dir='{tmp_path}/cache'"]
    of_file = ["quant=external/gguf", f"quant.policy.path='{file}'", "stages=[prompts,reference,generate,evaluate]"]
    set_aside()
    metrics = run(compose_config(*of_model, *of_file, *SMALL), tmp_path / "run")
    told = json.loads((tmp_path / "run" / "external.json").read_text())
    assert told["plan"]["schemes"]["gguf"] == {"weight": {"bits": round(bits)}, "activation": None}
    assert metrics is not None and metrics["metrics"]["psnr"] > psnr
    assert metrics["size_bytes"] == file.stat().st_size
    assert len(told["quantized"]) == 40 and not told["left_in_float"]


def test_of_a_class_that_diffusers_reads_no_single_files_of_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    given = ["quant=external/gguf", f"quant.policy.path='{tmp_path}/x.gguf'", "quant.policy.requires=[]", "name=x"]
    for model in ("tiny_image", "tiny_video"):
        with pytest.raises(UserError, match=r"diffusers reads no GGUF files of (PixArt|Latte)Transformer"):
            run(compose_config(f"model={model}", *given), tmp_path / "run")
