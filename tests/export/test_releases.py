"""Key maps there and back: what diffusers' own converters make of the release's names is the model again, to the bit.

Only the first axis matters to them, so tensors have one column; widths are the real ones where a converter knows
no others.
"""

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from diffusers.loaders import single_file_utils as converters
from torch import Tensor

from viditq.errors import UserError
from viditq.export.release_names import Joined, Origin, ReleaseNames
from viditq.export.releases import RELEASES, release_of
from viditq.models.official_pixart import pixart_names

SMALL = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
WIDE = {"num_attention_heads": 24, "attention_head_dim": 128}
ROPE = {"rope_axes_dim": (16, 56, 56)}
WAN_SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "freq_dim": 16, "text_dim": 16}
FLUX_SMALL = {**WIDE, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16}
SD3_SMALL = {**SMALL, "joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 16}
Z_SMALL = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "axes_dims": [2, 2, 4], "axes_lens": [8, 8, 8]}
Convert = Callable[..., Mapping[str, Tensor]]

CASES: dict[str, tuple[str, dict[str, Any], Convert]] = {
    "pixart": ("PixArtTransformer2DModel", {**SMALL, "use_additional_conditions": True}, pixart_names),
    "pixart_sigma": ("PixArtTransformer2DModel", {**SMALL, "use_additional_conditions": False}, pixart_names),
    "wan": ("WanTransformer3DModel", {**WAN_SMALL, "num_layers": 2}, converters.convert_wan_transformer_to_diffusers),
    "wan_i2v": (
        "WanTransformer3DModel",
        {**WAN_SMALL, "num_layers": 2, "image_dim": 16, "added_kv_proj_dim": 24},
        converters.convert_wan_transformer_to_diffusers,
    ),
    "flux_dev": (
        "FluxTransformer2DModel",
        {**FLUX_SMALL, "guidance_embeds": True},
        converters.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "flux_schnell": ("FluxTransformer2DModel", FLUX_SMALL, converters.convert_flux_transformer_checkpoint_to_diffusers),
    "sd35_large": (
        "SD3Transformer2DModel",
        {**SD3_SMALL, "qk_norm": "rms_norm"},
        converters.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "sd35_medium": (
        "SD3Transformer2DModel",
        {**SD3_SMALL, "qk_norm": "rms_norm", "dual_attention_layers": (0,)},
        converters.convert_sd3_transformer_checkpoint_to_diffusers,
    ),
    "qwen_image": (
        "QwenImageTransformer2DModel",
        {**SMALL, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)},
        lambda checkpoint: checkpoint,
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {**Z_SMALL, "n_refiner_layers": 1, "cap_feat_dim": 16},
        converters.convert_z_image_transformer_checkpoint_to_diffusers,
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {**WIDE, **ROPE, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2, "text_embed_dim": 16},
        converters.convert_hunyuan_video_transformer_to_diffusers,
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {**SMALL, "cross_attention_dim": 16, "caption_channels": 16},
        converters.convert_ltx_transformer_checkpoint_to_diffusers,
    ),
}


def numbered(cls: str, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of each tensor of the model one number a row, all different."""
    with init_empty_weights():
        state = getattr(diffusers, cls)(**config).state_dict()
    start, out = 0, dict[str, Tensor]()
    for name, tensor in state.items():
        rows = len(tensor) if tensor.ndim else 1
        out[name] = torch.arange(start, start + rows, dtype=torch.float64)[:, None]
        start += rows
    return out


def as_released(names: ReleaseNames, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, origin in names.origins(state).items():
        rows = torch.cat([state[part] for part in origin.names])
        out[name] = torch.cat(rows.chunk(2)[::-1]) if origin.swapped else rows
    return out


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("case", CASES)
def test_diffusers_reads_the_release_s_names_back(case: str, prefix: str) -> None:
    cls, config, convert = CASES[case]
    if prefix and case.startswith(("pixart", "hunyuan", "qwen")):
        return  # their converters know none
    state = numbered(cls, config)
    released = as_released(release_of(cls), state)
    assert case == "qwen_image" or released.keys() != state.keys()
    back = convert({prefix + name: tensor for name, tensor in released.items()})
    assert back.keys() == state.keys()
    wrong = [name for name in state if not torch.equal(back[name], state[name])]
    assert not wrong


def test_what_diffusers_does_not_read_of_a_first_and_last_frame_model() -> None:
    """Its converter leaves the image embedder's positions under the release's name."""
    name = "condition_embedder.image_embedder.pos_embed"
    assert list(release_of("WanTransformer3DModel").origins([name])) == ["img_emb.emb_pos"]


def test_every_release_is_tried() -> None:
    assert {cls for cls, _, _ in CASES.values()} == RELEASES.keys()


def test_a_model_without_a_known_release_is_refused() -> None:
    with pytest.raises(UserError, match="not for LatteTransformer3DModel"):
        release_of("LatteTransformer3DModel")


def test_parts_are_joined_in_their_order_and_halves_swapped() -> None:
    names = ReleaseNames(
        (Joined(r"b\.\d+", ("q", "k"), "qk"),), ((r"^b\.", "blocks."), (r"^out\.", "final.")), (r"^final\.",)
    )
    found = names.origins(["b.0.k.weight", "b.0.q.weight", "out.weight", "b.0.q.bias", "b.0.k.bias"])
    assert found == {
        "blocks.0.qk.weight": Origin(("b.0.q.weight", "b.0.k.weight")),
        "blocks.0.qk.bias": Origin(("b.0.q.bias", "b.0.k.bias")),
        "final.weight": Origin(("out.weight",), swapped=True),
    }
    with pytest.raises(UserError, match=r"would lack a part: there is .*q.weight alone"):
        names.origins(["b.0.q.weight"])
    with pytest.raises(UserError, match=r"would both be called final\.weight"):
        names.origins(["out.weight", "final.weight"])
