"""The names of each model's original release, by diffusers' class of its denoiser."""

from __future__ import annotations

from viditq.errors import UserError
from viditq.export.release_names import LAST, Joined, ReleaseNames

QKV, ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
SINGLE = Joined(r"single_transformer_blocks\.\d+", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), "linear1")
MODULATION = r"^final_layer\.adaLN_modulation\.1\."

PIXART = ReleaseNames(
    joined=(
        Joined(r"transformer_blocks\.\d+\.attn1", QKV, "qkv"),
        Joined(r"transformer_blocks\.\d+\.attn2", ("to_k", "to_v"), "kv_linear"),
    ),
    renames=(
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        (r"^adaln_single\.emb\.timestep_embedder\.", "t_embedder."),
        (r"^adaln_single\.emb\.resolution_embedder\.", "csize_embedder."),
        (r"^adaln_single\.emb\.aspect_ratio_embedder\.", "ar_embedder."),
        (r"_embedder\.linear_1\.", "_embedder.mlp.0."),
        (r"_embedder\.linear_2\.", "_embedder.mlp.2."),
        (r"^adaln_single\.linear\.", "t_block.1."),
        (r"^caption_projection\.linear_([12])\.", r"y_embedder.y_proj.fc\1."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^scale_shift_table$", "final_layer.scale_shift_table"),
        (r"^transformer_blocks\.", "blocks."),
        (r"\.attn2\.to_q\.", ".attn2.q_linear."),
        (r"\.(attn[12])\.to_out\.0\.", r".\1.proj."),
        (r"\.attn1\.", ".attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.ff\.net\.0\.proj\.", ".mlp.fc1."),
        (r"\.ff\.net\.2\.", ".mlp.fc2."),
    ),
)
WAN = ReleaseNames(
    renames=(
        (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
        (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.0\.proj\.", "img_emb.proj.1."),
        (r"^condition_embedder\.image_embedder\.ff\.net\.2\.", "img_emb.proj.3."),
        (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
        (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"\.scale_shift_table$", ".modulation"),
        (r"\.attn1\.", ".self_attn."),
        (r"\.attn2\.", ".cross_attn."),
        (r"\.to_out\.0\.", ".o."),
        (r"\.to_([qkv])\.", r".\1."),
        (r"\.add_([kv])_proj\.", r".\1_img."),
        (r"\.norm_added_k\.", ".norm_k_img."),
        (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
        (r"\.ffn\.net\.2\.", ".ffn.2."),
        (r"^(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    ),
)
FLUX = ReleaseNames(
    joined=(
        Joined(r"transformer_blocks\.\d+\.attn", QKV, "qkv"),
        Joined(r"transformer_blocks\.\d+\.attn", ADDED_QKV, "added_qkv"),
        SINGLE,
    ),
    renames=(
        (r"^time_text_embed\.timestep_embedder\.", "time_in."),
        (r"^time_text_embed\.text_embedder\.", "vector_in."),
        (r"^time_text_embed\.guidance_embedder\.", "guidance_in."),
        (r"^(time|vector|guidance)_in\.linear_1\.", r"\1_in.in_layer."),
        (r"^(time|vector|guidance)_in\.linear_2\.", r"\1_in.out_layer."),
        (r"^context_embedder\.", "txt_in."),
        (r"^x_embedder\.", "img_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^(single_transformer_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.lin."),
        (r"^(single_transformer_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
        (r"^single_transformer_blocks\.(\d+)\.(attn\.)?", r"single_blocks.\1."),
        (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"double_blocks.\1.img_mod.lin."),
        (r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.", r"double_blocks.\1.txt_mod.lin."),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.", r"double_blocks.\1.img_mlp."),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.", r"double_blocks.\1.txt_mlp."),
        (r"_mlp\.0\.proj\.", "_mlp.0."),
        (r"^transformer_blocks\.(\d+)\.attn\.added_qkv\.", r"double_blocks.\1.txt_attn.qkv."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_added_", r"double_blocks.\1.txt_attn.norm_"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_blocks.\1.txt_attn.proj."),
        (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"double_blocks.\1.img_attn.proj."),
        (r"^transformer_blocks\.(\d+)\.attn\.", r"double_blocks.\1.img_attn."),
        (r"\.norm_q\.weight$", ".norm.query_norm.scale"),
        (r"\.norm_k\.weight$", ".norm.key_norm.scale"),
    ),
    swapped=(MODULATION,),
)
SD3 = ReleaseNames(
    joined=(
        Joined(r"transformer_blocks\.\d+\.attn2?", QKV, "qkv"),
        Joined(r"transformer_blocks\.\d+\.attn", ADDED_QKV, "added_qkv"),
    ),
    renames=(
        (r"^pos_embed\.pos_embed$", "pos_embed"),
        (r"^pos_embed\.proj\.", "x_embedder.proj."),
        (r"^time_text_embed\.timestep_embedder\.", "t_embedder."),
        (r"^time_text_embed\.text_embedder\.", "y_embedder."),
        (r"^([ty]_embedder)\.linear_1\.", r"\1.mlp.0."),
        (r"^([ty]_embedder)\.linear_2\.", r"\1.mlp.2."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"joint_blocks.\1.x_block.adaLN_modulation.1."),
        (r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.", r"joint_blocks.\1.context_block.adaLN_modulation.1."),
        (r"^transformer_blocks\.(\d+)\.ff\.net\.", r"joint_blocks.\1.x_block.mlp."),
        (r"^transformer_blocks\.(\d+)\.ff_context\.net\.", r"joint_blocks.\1.context_block.mlp."),
        (r"\.mlp\.0\.proj\.", ".mlp.fc1."),
        (r"(_block\.mlp)\.2\.", r"\1.fc2."),
        (r"^transformer_blocks\.(\d+)\.attn\.added_qkv\.", r"joint_blocks.\1.context_block.attn.qkv."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_added_", r"joint_blocks.\1.context_block.attn.norm_"),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"joint_blocks.\1.context_block.attn.proj."),
        (r"^transformer_blocks\.(\d+)\.attn", r"joint_blocks.\1.x_block.attn"),
        (r"\.to_out\.0\.", ".proj."),
        (r"\.norm_([qk])\.", r".ln_\1."),
    ),
    swapped=(MODULATION, rf"^joint_blocks\.{LAST}\.context_block\.adaLN_modulation\.1\."),
)
QWEN_IMAGE = ReleaseNames()
Z_IMAGE = ReleaseNames(
    joined=(Joined(r"\w+\.\d+\.attention", QKV, "qkv"),),
    renames=(
        (r"^all_x_embedder\.2-1\.", "x_embedder."),
        (r"^all_final_layer\.2-1\.", "final_layer."),
        (r"\.attention\.to_out\.0\.", ".attention.out."),
        (r"\.attention\.norm_([qk])\.", r".attention.\1_norm."),
    ),
)
HUNYUAN_VIDEO = ReleaseNames(
    joined=(
        Joined(r"transformer_blocks\.\d+\.attn", QKV, "qkv"),
        Joined(r"transformer_blocks\.\d+\.attn", ADDED_QKV, "added_qkv"),
        Joined(r"context_embedder\.token_refiner\.refiner_blocks\.\d+\.attn", QKV, "qkv"),
        SINGLE,
    ),
    renames=(
        (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_1\.", "txt_in.t_embedder.mlp.0."),
        (r"^context_embedder\.time_text_embed\.timestep_embedder\.linear_2\.", "txt_in.t_embedder.mlp.2."),
        (r"^context_embedder\.time_text_embed\.text_embedder\.", "txt_in.c_embedder."),
        (r"^context_embedder\.proj_in\.", "txt_in.input_embedder."),
        (r"^context_embedder\.token_refiner\.refiner_blocks\.", "txt_in.individual_token_refiner.blocks."),
        (r"^(txt_in\..*)\.norm_out\.linear\.", r"\1.adaLN_modulation.1."),
        (r"^(txt_in\..*)\.attn\.qkv\.", r"\1.self_attn_qkv."),
        (r"^(txt_in\..*)\.attn\.to_out\.0\.", r"\1.self_attn_proj."),
        (r"^(txt_in\..*)\.ff\.", r"\1.mlp."),
        (r"^time_text_embed\.timestep_embedder\.linear_1\.", "time_in.mlp.0."),
        (r"^time_text_embed\.timestep_embedder\.linear_2\.", "time_in.mlp.2."),
        (r"^time_text_embed\.guidance_embedder\.linear_1\.", "guidance_in.mlp.0."),
        (r"^time_text_embed\.guidance_embedder\.linear_2\.", "guidance_in.mlp.2."),
        (r"^time_text_embed\.text_embedder\.linear_1\.", "vector_in.in_layer."),
        (r"^time_text_embed\.text_embedder\.linear_2\.", "vector_in.out_layer."),
        (r"^x_embedder\.", "img_in."),
        (r"^proj_out\.", "final_layer.linear."),
        (r"^norm_out\.linear\.", "final_layer.adaLN_modulation.1."),
        (r"^(single_transformer_blocks\.\d+)\.norm\.linear\.", r"\1.modulation.linear."),
        (r"^(single_transformer_blocks\.\d+)\.proj_out\.", r"\1.linear2."),
        (r"^(single_transformer_blocks\.\d+)\.attn\.norm_([qk])\.", r"\1.\2_norm."),
        (r"^single_transformer_blocks\.", "single_blocks."),
        (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"double_blocks.\1.img_mod.linear."),
        (r"^transformer_blocks\.(\d+)\.norm1_context\.linear\.", r"double_blocks.\1.txt_mod.linear."),
        (r"^transformer_blocks\.(\d+)\.ff\.", r"double_blocks.\1.img_mlp."),
        (r"^transformer_blocks\.(\d+)\.ff_context\.", r"double_blocks.\1.txt_mlp."),
        (r"mlp\.net\.0\.proj\.", "mlp.fc1."),
        (r"mlp\.net\.2\.", "mlp.fc2."),
        (r"^transformer_blocks\.(\d+)\.attn\.added_qkv\.", r"double_blocks.\1.txt_attn_qkv."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])\.", r"double_blocks.\1.txt_attn_\2_norm."),
        (r"^transformer_blocks\.(\d+)\.attn\.to_add_out\.", r"double_blocks.\1.txt_attn_proj."),
        (r"^transformer_blocks\.(\d+)\.attn\.norm_([qk])\.", r"double_blocks.\1.img_attn_\2_norm."),
        (r"^transformer_blocks\.(\d+)\.attn\.to_out\.0\.", r"double_blocks.\1.img_attn_proj."),
        (r"^transformer_blocks\.(\d+)\.attn\.qkv\.", r"double_blocks.\1.img_attn_qkv."),
    ),
    swapped=(MODULATION,),
)
LTX = ReleaseNames(
    renames=(
        (r"^proj_in\.", "patchify_proj."),
        (r"^time_embed\.", "adaln_single."),
        (r"\.norm_([qk])\.", r".\1_norm."),
    ),
)
RELEASES = {
    "FluxTransformer2DModel": FLUX,
    "HunyuanVideoTransformer3DModel": HUNYUAN_VIDEO,
    "LTXVideoTransformer3DModel": LTX,
    "PixArtTransformer2DModel": PIXART,
    "QwenImageTransformer2DModel": QWEN_IMAGE,
    "SD3Transformer2DModel": SD3,
    "WanTransformer3DModel": WAN,
    "ZImageTransformer2DModel": Z_IMAGE,
}


def release_of(denoiser: str) -> ReleaseNames:
    """The names of the release that a class of denoisers comes from; UserError for one whose names are not known."""
    if denoiser not in RELEASES:
        raise UserError(
            f"the original release's names are known for {', '.join(sorted(RELEASES))}, not for {denoiser}. "
            "Load the artifact with viditq.load_quantized, or export it with --to diffusers."
        )
    return RELEASES[denoiser]
