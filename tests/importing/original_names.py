"""Names of original releases that diffusers converts and viditq.export has no table of: its converters backwards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import Tensor
from zoo import families, guided, images, text, unlisted, videos_2026

from viditq.export.release_names import Joined, ReleaseNames
from viditq.export.releases import ADDED_QKV, FLUX, QKV, WAN

HEADS = {"num_attention_heads": 24, "attention_head_dim": 128}  # what some converters take for granted
BOTH_QKV = (
    Joined(r"transformer_blocks\.\d+\.attn1?", QKV, "qkv"),
    Joined(r"transformer_blocks\.\d+\.attn1?", ADDED_QKV, "added_qkv"),
)
FINAL = (
    (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out\.", "final_layer.linear."),
)
FLUX2 = ReleaseNames(
    joined=BOTH_QKV,
    renames=(
        (r"^x_embedder\.", "img_in."),
        (r"^context_embedder\.", "txt_in."),
        (r"^time_guidance_embed\.timestep_embedder\.", "time_in."),
        (r"^time_guidance_embed\.guidance_embedder\.", "guidance_in."),
        (r"_in\.linear_1\.", "_in.in_layer."),
        (r"_in\.linear_2\.", "_in.out_layer."),
        (r"^(\w+_stream_modulation\w*)\.linear\.", r"\1.lin."),
        *FINAL,
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_qkv_mlp_proj\.", r"single_blocks.\1.linear1."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.", r"single_blocks.\1.linear2."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.", r"single_blocks.\1."),
        (r"^transformer_blocks\.(\d+)\.attn\.(?:added_|norm_added_)", r"double_blocks.\1.txt_attn.norm_"),
        (r"txt_attn\.norm_qkv\.", "txt_attn.qkv."),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_blocks.\1.txt_attn.proj."),
        (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"double_blocks.\1.img_attn.proj."),
        (r"^transformer_blocks\.(\d+)\.attn\.", r"double_blocks.\1.img_attn."),
        (r"^transformer_blocks\.(\d+)\.ff\.", r"double_blocks.\1.img_mlp."),
        (r"^transformer_blocks\.(\d+)\.ff_context\.", r"double_blocks.\1.txt_mlp."),
        (r"_mlp\.linear_in\.", "_mlp.0."),
        (r"_mlp\.linear_out\.", "_mlp.2."),
        (r"\.norm_q\.weight$", ".norm.query_norm.scale"),
        (r"\.norm_k\.weight$", ".norm.key_norm.scale"),
    ),
    swapped=(r"^final_layer\.adaLN_modulation\.",),
)
CHROMA = ReleaseNames(
    joined=FLUX.joined,
    renames=(
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_1\.", r"\1.in_layer."),
        (r"^(distilled_guidance_layer\.layers\.\d+)\.linear_2\.", r"\1.out_layer."),
        (r"^(distilled_guidance_layer\.norms\.\d+)\.weight$", r"\1.scale"),
        *FLUX.renames,
    ),
)
OF_WAN = (*WAN.renames, (r"^(vace_blocks\.\d+)\.norm2\.", r"\1.norm3."))
VACE = ReleaseNames(
    renames=(
        (r"^(vace_blocks\.\d+)\.proj_in\.", r"\1.before_proj."),
        (r"^(vace_blocks\.\d+)\.proj_out\.", r"\1.after_proj."),
        *OF_WAN,
    )
)
CONVS = "motion_encoder.enc.net_app.convs."
ANIMATE = ReleaseNames(
    joined=(Joined(r"face_adapter\.\d+", ("to_k", "to_v"), "linear1_kv"),),
    renames=(
        (r"^face_adapter\.(\d+)\.to_q\.", r"face_adapter.\1.linear1_q."),
        (r"^face_adapter\.(\d+)\.to_out\.", r"face_adapter.\1.linear2."),
        (r"^face_adapter\.(\d+)\.norm_([qk])\.", r"face_adapter.\1.\2_norm."),
        (r"^face_adapter\.", "face_adapter.fuser_blocks."),
        (r"^face_encoder\.(conv\w+)\.", r"face_encoder.\1.conv."),
        (r"^motion_encoder\.motion_synthesis_weight$", "motion_encoder.dec.direction.weight"),
        (r"^motion_encoder\.motion_network\.", "motion_encoder.enc.fc."),
        (r"^motion_encoder\.conv_in\.weight$", f"{CONVS}0.0.weight"),
        (r"^motion_encoder\.conv_in\.act_fn\.", f"{CONVS}0.1."),
        (r"^motion_encoder\.conv_out\.", f"{CONVS}8."),
        (r"^motion_encoder\.res_blocks\.1\.", f"{CONVS}2."),
        (r"^motion_encoder\.res_blocks\.0\.", f"{CONVS}1."),
        (r"\.conv1\.act_fn\.", ".conv1.1."),
        (r"\.conv1\.weight$", ".conv1.0.weight"),
        (r"\.conv2\.act_fn\.", ".conv2.2."),
        (r"(convs\.\d\.conv2)\.weight$", r"\1.1.weight"),
        (r"\.conv_skip\.", ".skip.1."),
        *OF_WAN,
    ),
)
MOCHI = ReleaseNames(
    joined=BOTH_QKV,
    renames=(
        (r"^patch_embed\.", "x_embedder."),
        (r"^time_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^time_embed\.pooler\.", "t5_y_embedder."),
        (r"^time_embed\.caption_proj\.", "t5_yproj."),
        (r"^norm_out\.linear\.", "final_layer.mod."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.norm1\.linear\.", ".mod_x."),
        (r"\.norm1_context\.linear(_1)?\.", ".mod_y."),
        (r"\.attn1\.added_qkv\.", ".attn.qkv_y."),
        (r"\.attn1\.qkv\.", ".attn.qkv_x."),
        (r"\.attn1\.norm_added_([qk])\.", r".attn.\1_norm_y."),
        (r"\.attn1\.norm_([qk])\.", r".attn.\1_norm_x."),
        (r"\.attn1\.to_out\.0\.", ".attn.proj_x."),
        (r"\.attn1\.to_add_out\.", ".attn.proj_y."),
        (r"\.ff\.", ".mlp_x."),
        (r"\.ff_context\.", ".mlp_y."),
        (r"\.net\.0\.proj\.", ".w1."),
        (r"\.net\.2\.", ".w2."),
    ),
    swapped=(r"^final_layer\.mod\.", r"\.w1\.weight$"),
)
AURA_FLOW = ReleaseNames(
    renames=(
        (r"^pos_embed\.pos_embed$", "positional_encoding"),
        (r"^pos_embed\.proj\.", "init_x_linear."),
        (r"^context_embedder\.", "cond_seq_linear."),
        (r"^time_step_proj\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_step_proj\.linear_2\.", "t_embedder.mlp.2."),
        (r"^norm_out\.linear\.", "modF.1."),
        (r"^proj_out\.", "final_linear."),
        (r"^joint_transformer_blocks\.(\d+)\.attn\.add_([qkv])_proj\.", r"double_layers.\1.attn.w1\2."),
        (r"^joint_transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_layers.\1.attn.w1o."),
        (r"^joint_transformer_blocks\.(\d+)\.attn\.to_([qkv])\.", r"double_layers.\1.attn.w2\2."),
        (r"^joint_transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"double_layers.\1.attn.w2o."),
        (r"^joint_transformer_blocks\.(\d+)\.", r"double_layers.\1."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_([qkv])\.", r"single_layers.\1.attn.w1\2."),
        (r"^single_transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"single_layers.\1.attn.w1o."),
        (r"^single_transformer_blocks\.(\d+)\.norm1\.linear\.", r"single_layers.\1.modCX.1."),
        (r"^single_transformer_blocks\.(\d+)\.ff\.", r"single_layers.\1.mlp."),
        (r"\.norm1\.linear\.", ".modX.1."),
        (r"\.norm1_context\.linear\.", ".modC.1."),
        (r"\.ff\.", ".mlpX."),
        (r"\.ff_context\.", ".mlpC."),
        (r"\.linear_1\.", ".c_fc1."),
        (r"\.linear_2\.", ".c_fc2."),
        (r"\.out_projection\.", ".c_proj."),
    ),
    swapped=(r"^modF\.",),
)
LUMINA2 = ReleaseNames(
    joined=(Joined(r"\w+\.\d+\.attn", QKV, "qkv"),),
    renames=(
        (r"^time_caption_embed\.caption_embedder\.", "cap_embedder."),
        (r"^time_caption_embed\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_caption_embed\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^norm_out\.linear_1\.", "final_layer.adaLN_modulation.1."),
        (r"^norm_out\.linear_2\.", "final_layer.linear."),
        (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
        (r"\.norm1\.norm\.", ".attention_norm1."),
        (r"\.norm1\.", ".attention_norm1."),
        (r"\.norm2\.", ".attention_norm2."),
        (r"\.attn\.to_out\.0\.", ".attention.out."),
        (r"\.attn\.norm_([qk])\.", r".attention.\1_norm."),
        (r"\.attn\.", ".attention."),
        (r"\.linear_([123])\.", r".w\1."),
    ),
)
SANA = ReleaseNames(
    joined=(
        Joined(r"transformer_blocks\.\d+\.attn1", QKV, "qkv"),
        Joined(r"transformer_blocks\.\d+\.attn2", ("to_k", "to_v"), "kv_linear"),
    ),
    renames=(
        (r"^patch_embed\.", "x_embedder."),
        (r"^time_embed\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
        (r"^time_embed\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
        (r"^time_embed\.linear\.", "t_block.1."),
        (r"^caption_projection\.linear_([12])\.", r"y_embedder.y_proj.fc\1."),
        (r"^caption_norm\.", "attention_y_norm."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^scale_shift_table$", "final_layer.scale_shift_table"),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.attn2\.to_q\.", ".attn2.q_linear."),
        (r"\.(attn[12])\.to_out\.0\.", r".\1.proj."),
        (r"\.attn1\.", ".attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.ff\.conv_(\w+)\.", r".mlp.\1_conv.conv."),
    ),
)
COSMOS2 = ReleaseNames(
    renames=(
        (r"^patch_embed\.proj\.", "x_embedder.proj.1."),
        (r"^time_embed\.t_embedder\.", "t_embedder.1."),
        (r"^time_embed\.norm\.", "t_embedding_norm."),
        (r"^norm_out\.linear_([12])\.", r"final_layer.adaln_modulation.\1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.norm1\.linear_([12])\.", r".adaln_modulation_self_attn.\1."),
        (r"\.norm2\.linear_([12])\.", r".adaln_modulation_cross_attn.\1."),
        (r"\.norm3\.linear_([12])\.", r".adaln_modulation_mlp.\1."),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_([qkv])\.", r".\1_proj."),
        (r"\.to_out\.0\.", ".output_proj."),
        (r"\.norm_([qk])\.", r".\1_norm."),
        (r"\.ff\.net\.0\.proj\.", ".mlp.layer1."),
        (r"\.ff\.net\.2\.", ".mlp.layer2."),
        (r"^", "net."),
    ),
)
QWEN_IMAGE21 = ReleaseNames(joined=(Joined(r".*\.img_mlp", ("gate_layer", "proj"), "gate_up"),))
KREA2 = ReleaseNames(
    renames=(
        (r"^img_in\.", "first."),
        (r"^time_embed\.linear_1\.", "tmlp.0."),
        (r"^time_embed\.linear_2\.", "tmlp.2."),
        (r"^time_mod_proj\.", "tproj.1."),
        (r"^txt_in\.norm\.weight$", "txtmlp.0.scale"),
        (r"^txt_in\.linear_1\.", "txtmlp.1."),
        (r"^txt_in\.linear_2\.", "txtmlp.3."),
        (r"^text_fusion\.", "txtfusion."),
        (r"^transformer_blocks\.", "blocks."),
        (r"^final_layer\.linear\.", "last.linear."),
        (r"^final_layer\.norm\.weight$", "last.norm.scale"),
        (r"^final_layer\.scale_shift_table$", "last.modulation.lin"),
        (r"\.scale_shift_table$", ".mod.lin"),
        (r"\.attn\.to_([qkv])\.", r".attn.w\1."),
        (r"\.attn\.to_out\.0\.", ".attn.wo."),
        (r"\.attn\.to_gate\.", ".attn.gate."),
        (r"\.attn\.norm_([qk])\.weight$", r".attn.qknorm.\1norm.scale"),
        (r"\.ff\.", ".mlp."),
        (r"\.norm1\.weight$", ".prenorm.scale"),
        (r"\.norm2\.weight$", ".postnorm.scale"),
    ),
)
LTX2 = ReleaseNames(
    renames=(
        (r"^(audio_)?proj_in\.", r"\1patchify_proj."),
        (r"^(audio_)?time_embed\.", r"\1adaln_single."),
        (r"^av_cross_attn_(video|audio)_scale_shift\.", r"av_ca_\1_scale_shift_adaln_single."),
        (r"^av_cross_attn_video_a2v_gate\.", "av_ca_a2v_gate_adaln_single."),
        (r"^av_cross_attn_audio_v2a_gate\.", "av_ca_v2a_gate_adaln_single."),
        (r"\.(video|audio)_a2v_cross_attn_scale_shift_table$", r".scale_shift_table_a2v_ca_\1"),
        (r"\.norm_([qk])\.", r".\1_norm."),
    )
)
ReShape = Callable[[str, Tensor], Tensor]


def _krea2(name: str, tensor: Tensor) -> Tensor:
    """The six vectors of a block are one."""
    return tensor.flatten() if name.endswith(".mod.lin") else tensor


def _animate(name: str, tensor: Tensor) -> Tensor:
    """Biases of the motion encoder have four axes."""
    return tensor.view(1, -1, 1, 1) if name.startswith(CONVS) and name.endswith(".bias") else tensor


# what a file has beside, which the class does not keep
BESIDE: dict[str, tuple[str, ...]] = {
    "sana": ("pos_embed", "y_embedder.y_embedding"),
    "lumina2": ("norm_final.weight",),
    "cosmos2": ("net.pos_embedder.seq", "net.accum_iteration"),
    "ltx2": ("video_embeddings_connector.learnable_registers",),
    "wan_animate": (f"{CONVS}1.conv2.0.kernel",),
    "skyreels_v2": ("blocks.0.cross_attn.norm_added_q.weight",),
}
SHAPES: dict[str, ReShape] = {"krea2": _krea2, "wan_animate": _animate}
ORIGINALS: dict[str, tuple[ReleaseNames, Callable[[], Any]]] = {
    "flux2": (FLUX2, lambda: families.flux2_dev().transformer),
    "flux2_klein": (FLUX2, lambda: families.flux2_klein().transformer),
    "chroma": (
        CHROMA,
        lambda: diffusers.ChromaTransformer2DModel(**unlisted.FLUX_LIKE | HEADS | {"axes_dims_rope": (16, 56, 56)}),
    ),
    "wan_vace": (VACE, lambda: videos_2026.wan_vace().transformer),
    "wan_animate": (ANIMATE, lambda: videos_2026.wan_animate().transformer),
    "skyreels_v2": (WAN, lambda: unlisted.skyreels_v2().transformer),
    "chrono_edit": (WAN, lambda: diffusers.ChronoEditTransformer3DModel(**videos_2026.WAN, num_layers=2)),
    "mochi": (MOCHI, lambda: diffusers.MochiTransformer3DModel(num_attention_heads=2, attention_head_dim=8)),
    "aura_flow": (AURA_FLOW, lambda: images.aura_flow().transformer),
    "lumina2": (
        LUMINA2,
        lambda: diffusers.Lumina2Transformer2DModel(num_layers=2, cap_feat_dim=text.WIDTH),
    ),
    "sana": (SANA, lambda: images.sana().transformer),
    "hidream": (ReleaseNames(), lambda: families.hidream().transformer),
    "cosmos2": (
        COSMOS2,
        lambda: diffusers.CosmosTransformer3DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, text_embed_dim=16, extra_pos_embed_type=None
        ),
    ),
    "qwen_image21": (
        QWEN_IMAGE21,
        lambda: diffusers.QwenImage21Transformer2DModel(
            num_layers=2, attention_head_dim=8, num_attention_heads=2, context_in_dim=16, axes_dims_rope=(2, 2, 4)
        ),
    ),
    "krea2": (KREA2, lambda: guided.krea2().transformer),
    "ltx2": (LTX2, lambda: videos_2026.ltx2().transformer),
}


@functools.cache
def on_meta(name: str) -> Any:
    """A denoiser without weights, of the sizes that its converter knows."""
    with init_empty_weights(include_buffers=False):
        return ORIGINALS[name][1]()


def as_released(names: ReleaseNames, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' names under those of a release (tests/export checks our own tables of them)."""
    released = {}
    for target, origin in names.origins(state).items():
        rows = torch.cat([state[part] for part in origin.names]) if origin.names[1:] else state[origin.names[0]]
        released[target] = torch.cat(rows.chunk(2)[::-1]) if origin.swapped else rows
    return released


def original(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of diffusers' names as the release has them, and what it has beside."""
    reshape = SHAPES.get(name, lambda _, tensor: tensor)
    released = {target: reshape(target, tensor) for target, tensor in as_released(ORIGINALS[name][0], state).items()}
    return released | {beside: torch.ones(4) for beside in BESIDE.get(name, ())}
