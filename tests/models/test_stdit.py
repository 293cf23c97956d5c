"""STDiT against the outputs of Open-Sora v1.0's own code (tests/data/golden/stdit.safetensors)."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.torch import load_file
from torch import Tensor, nn

from viditq.models.official_opensora import opensora_names
from viditq.models.positions import spatial_table, temporal_table, timestep_features
from viditq.models.stdit import STDiT
from viditq.models.stdit_blocks import SelfAttention

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "golden" / "stdit.safetensors")
CONFIG = {"sample_size": 16, "num_frames": 4, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 16}
CONFIG |= {"caption_channels": 32, "max_caption_tokens": 12}
MODULES = ["x_embedder", "t_embedder", "t_block", "y_embedder", "blocks.0.attn", "blocks.0.attn_temp"]
MODULES += ["blocks.0.cross_attn", "blocks.0.mlp", "blocks.1", "final_layer"]


def io(name: str) -> Tensor:
    return GOLDEN[f"io/{name}"]


def worst(ours: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest reference value."""
    assert ours.shape == reference.shape
    return ((ours - reference).abs().max() / reference.abs().max()).item()


@pytest.fixture(scope="module")
def model() -> STDiT:
    """The small model with the original's weights."""
    stored = {k.removeprefix("weights/"): v for k, v in GOLDEN.items() if k.startswith("weights/")}
    model = STDiT(**CONFIG)
    model.load_state_dict(opensora_names(stored))
    return model.eval().requires_grad_(False)


def run(model: STDiT, timestep: Tensor, mask: Tensor | None) -> Tensor:
    return model(io("x"), io("y")[:, 0], timestep=timestep, encoder_attention_mask=mask, return_dict=False)[0]


@pytest.mark.parametrize(
    ("timestep", "mask", "output"),
    [
        ("timestep", "mask", "masked/out"),
        ("timestep", None, "nomask/out"),
        ("timestep", "mask1", "mask_repeat/out"),
        ("timestep_same", "mask", "same_t/out"),
    ],
)
def test_output_is_the_originals(model: STDiT, timestep: str, mask: str | None, output: str) -> None:
    out = run(model, io(timestep), None if mask is None else io(mask))
    assert worst(out, io(output)) < 1e-4
    assert worst(run(model, io(timestep) // 2, None if mask is None else io(mask)), io(output)) > 1e-2


def test_every_part_gives_what_the_originals_gives(model: STDiT) -> None:
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen[name] = (args[0], out)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(record(name)) for name in MODULES]
    run(model, io("timestep"), io("mask"))
    for handle in handles:
        handle.remove()
    named = {"blocks.1": "block1_out"} | {n: n.replace("blocks.0", "block0") + "_out" for n in MODULES if ".0." in n}
    for name, (_, out) in seen.items():
        reference = io("masked/" + named.get(name, name))
        assert worst(out, reference.reshape(out.shape)) < 1e-4, name
    for name in ("attn", "attn_temp"):
        assert worst(seen[f"blocks.0.{name}"][0], io(f"masked/block0.{name}_in")) < 1e-4, name


def test_caption_is_packed_without_padding_to_the_same_effect(model: STDiT) -> None:
    """The pipeline hands over captions cut to their tokens and no mask."""
    masked = run(model, io("timestep"), io("mask"))
    for i, length in enumerate(io("mask").sum(dim=1).tolist()):
        one = slice(i, i + 1)
        alone = model(io("x")[one], io("y")[one, 0, :length], timestep=io("timestep")[one]).sample
        assert worst(alone, masked[one]) < 1e-4


def test_position_tables_are_the_originals() -> None:
    for name, grid, scale in (("16x512x512", 32, 1.0), ("16x256x256", 16, 0.5)):
        table = spatial_table(grid, grid, 1152, scale)[0]
        rows = table[[0, 1, 33, len(table) - 1]]
        torch.testing.assert_close(rows, GOLDEN[f"table/{name}/pos_embed_rows_0_1_33_last"], atol=2e-5, rtol=0)
        temporal = temporal_table(16, 1152, 1.0)[0]
        torch.testing.assert_close(temporal, GOLDEN[f"table/{name}/pos_embed_temporal"], atol=2e-5, rtol=0)


@pytest.mark.parametrize("channels", [32, 256])
def test_timestep_features_are_the_originals_to_the_bit(model: STDiT, channels: int) -> None:
    """diffusers computes them as DiT and Open-Sora do; rounded otherwise, those of t = 950 differ by 5.5e-5."""
    timesteps = torch.tensor([0, 1, 52, 500, 731, 950, 999])
    wanted = get_timestep_embedding(timesteps, channels, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_features(timesteps, channels), wanted)
    assert torch.equal(timestep_features(timesteps.half(), channels), wanted)
    embedded = model.t_embedder(io("timestep"), torch.float32)
    assert worst(embedded, io("masked/t_embedder")) < 3e-6  # 4.5e-6 with frequencies in float64


def test_other_sizes_take_tables_of_their_own(model: STDiT) -> None:
    """A square of the configured size made on the spot equals the stored table; other shapes work; odd ones do not."""
    x = io("x")
    small = STDiT(**CONFIG | {"sample_size": 8, "num_frames": 2}).eval()
    small.load_state_dict(model.state_dict())
    arguments = {"encoder_hidden_states": io("y")[:, 0], "timestep": io("timestep")}
    assert torch.equal(small(x, **arguments).sample, model(x, **arguments).sample)
    assert model(x[:, :, :3, :8, :12], **arguments).sample.shape == (2, 8, 3, 8, 12)
    with pytest.raises(ValueError, match="15 x 16 does not divide into patches of 2 x 2"):
        model(x[..., :15, :], **arguments)


def test_is_a_diffusers_model(model: STDiT, tmp_path: Path) -> None:
    assert isinstance(model, ModelMixin)
    model.save_pretrained(tmp_path)
    again = STDiT.from_pretrained(tmp_path)
    assert torch.equal(run(again.eval(), io("timestep"), io("mask")), run(model, io("timestep"), io("mask")))
    model.set_attention_backend("_native_math")
    backends = [m.processor._attention_backend for m in model.modules() if isinstance(m, SelfAttention)]
    assert len(backends) == 4 and {b.value for b in backends} == {"_native_math"}
    assert worst(run(model, io("timestep"), io("mask")), io("masked/out")) < 1e-4
    model.set_attention_backend("native")


def test_linears_bear_the_originals_names(model: STDiT) -> None:
    """The original's 13 per block, whose plans say `model.` before them; beside them only what stays in float."""
    block = [f"{attention}.{part}" for attention in ("attn", "attn_temp") for part in ("q", "k", "v", "proj")]
    block += ["cross_attn.q_linear", "cross_attn.kv_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"]
    wanted = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = {"t_embedder.mlp.0", "t_embedder.mlp.2", "t_block.1", "final_layer.linear"}
    assert linears - wanted == kept | {"y_embedder.y_proj.fc1", "y_embedder.y_proj.fc2"}
    assert wanted <= linears
