"""Roles of a denoiser's Linears: which part of a block each one is, by the patterns of the yaml or by its name."""

import fnmatch
import re
from collections.abc import Mapping, Sequence

from viditq.errors import UserError

FLOAT = "float"
"""The role of Linears that are never quantized."""
USUAL = (
    *("self_attention", "spatial_attention", "temporal_attention", "cross_attention", "joint_attention"),
    *("mlp", "text_refiner", "sound"),
)
"""Roles that conf/model and `guess` give; a model's own configuration may name others."""
IN_EMBEDDER = re.compile(r"emb|ada_?ln|modulation|_mod\.|norm|time|guidance|gate|beta_|^proj_|router")
OF_SOUND = re.compile(r"(^|\.)(audio_(?!to_video)|video_to_audio|av_)")
GATED = ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
"""What the Linears of a feed-forward with a gate are called side by side; a gate without the others modulates."""
OF_FEED_FORWARD = re.compile(r"(^|[._])(ff|ffn|mlp|feed_forward)([._]|$)|proj_mlp|ff_context")


def by_patterns(names: Sequence[str], patterns: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Linear -> role, for those that a pattern covers; the last role that matches wins."""
    return {
        name: role
        for name in names
        for role, globs in patterns.items()
        if any(fnmatch.fnmatchcase(name, glob) for glob in globs)
    }


def of_linears(
    model: str, names: Sequence[str], patterns: Mapping[str, Sequence[str]], keep_float: Sequence[str], guessed: bool
) -> dict[str, str]:
    """Linear -> role, FLOAT for those of `keep_float`; guessed: those that no pattern covers by their names.

    Raises UserError naming Linears that nothing covers, and, where nothing is guessed, patterns that cover none.
    """
    found = by_patterns(names, {**patterns, FLOAT: keep_float})
    if guessed:
        found = guess(names) | found
    else:
        check_keep_float(model, keep_float, names)
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"Model {model}: {len(missing)} Linears belong to no role, first {missing[:3]}. Add a pattern to "
            "model.roles, or to model.keep_float to leave them in float."
        )
    return found


def without(roles: Mapping[str, str], left: Sequence[str]) -> dict[str, str]:
    """The same with FLOAT for Linears of the roles in `left`; raises UserError for one that no Linear has."""
    if odd := [role for role in left if role not in roles.values()]:
        found = dict.fromkeys(role for role in roles.values() if role != FLOAT)
        raise UserError(f"model.float_roles has {odd[0]!r}, which no Linear has; the roles are {', '.join(found)}.")
    return {name: FLOAT if role in left else role for name, role in roles.items()}


def check_keep_float(model: str, keep_float: Sequence[str], names: Sequence[str]) -> None:
    """Raises UserError for the first pattern that matches none of these Linears."""
    for glob in keep_float:
        if not by_patterns(names, {FLOAT: [glob]}):
            raise UserError(f"Model {model}: the pattern {glob!r} of model.keep_float matches no Linear.")


def guess(names: Sequence[str]) -> dict[str, str]:
    """Linear -> role as its name suggests; what lies outside of blocks, or is not understood, stays float."""
    # a query of its own: keys and values alone are those of an image that is only looked at (Wan 2.1 I2V)
    joint = {_split(name)[0] for name in names if re.search(r"\.add_q|to_add_out|\.to_q_t$|txt_attn_q", name)}
    alone = "spatial_attention" if any("temporal" in name for name in names) else "self_attention"
    experts = {name.split(".shared_expert")[0] for name in names if ".shared_expert" in name}
    routers = {f"{mlp}.gate" for mlp in experts}  # it says which expert takes a token, and is no feed-forward
    gated = _gated(names)
    return {
        name: FLOAT if name in routers else _guess(*_split(name), joint, alone, is_mlp=name in gated) for name in names
    }


def _gated(names: Sequence[str]) -> set[str]:
    """The Linears of feed-forwards that are known by their parts alone (PRX has them in the block itself)."""
    parts: dict[str, set[str]] = {}
    for name in names:
        inside, _, own = name.rpartition(".")
        parts.setdefault(inside, set()).add(own)
    whole = {inside: kind for inside, own in parts.items() for kind in GATED if kind <= own}
    return {f"{inside}.{own}" for inside, kind in whole.items() if not IN_EMBEDDER.search(inside) for own in kind}


def _split(name: str) -> tuple[str, str]:
    """The list of blocks that a Linear is in, and its name within its block; ("", name) outside of blocks."""
    blocks, number, rest = (*re.split(r"\.(\d+)\.", name, maxsplit=1), "", "")[:3]
    return (blocks, rest) if number else ("", name)


def _guess(blocks: str, rest: str, joint: set[str], alone: str, is_mlp: bool) -> str:
    if not blocks:
        return FLOAT
    kind = "mlp" if is_mlp else _kind(rest, single_stream="single" in blocks)
    if kind == FLOAT:
        return FLOAT
    if OF_SOUND.search(f"{blocks}.0.{rest}"):
        return "sound"
    if blocks.startswith("text_") or ("refiner" in blocks and re.search("context|token|text|caption", blocks)):
        return "text_refiner"
    if kind == "mlp":
        return kind
    if "temporal" in blocks or "temp" in rest:
        return "temporal_attention"
    if blocks in joint:
        return "joint_attention" if "attn2" not in rest else alone
    if re.search(r"attn2|cross|_to_[a-z]+_attn", rest):
        return "cross_attention"
    return "joint_attention" if "single" in blocks else alone


def _kind(rest: str, single_stream: bool) -> str:
    """mlp, attention or float; a single-stream block's last one takes the attention's and the feed-forward's output."""
    if OF_FEED_FORWARD.search(rest) or (single_stream and rest in ("proj_out", "attn.to_out")):
        return "mlp"
    if IN_EMBEDDER.search(rest):
        return FLOAT
    return "attention" if "att" in rest else FLOAT


def counts(roles: Mapping[str, str]) -> str:
    """One line that says how many Linears each role has."""
    quantizable = [role for role in dict.fromkeys(roles.values()) if role != FLOAT]
    parts = [f"{role} {sum(r == role for r in roles.values())}" for role in quantizable]
    kept = sum(role == FLOAT for role in roles.values())
    return f"{len(roles)} Linears: {', '.join([*parts, f'kept in float {kept}'])}"


def of_sound(roles: Mapping[str, str], made: bool) -> str:
    """One line on the Linears that make a clip's sound; empty where there are none. made: whether there will be any."""
    mine = [name for name in roles if OF_SOUND.search(name)]
    if not mine:
        return ""
    kept = [name for name in mine if roles[name] == FLOAT]
    such = f", such as {kept[0]}" if kept else ""
    judged = "kept beside the clips, judged by metric=sound" if made else "none is made"
    return f"sound: {judged}; {len(kept)} of its {len(mine)} Linears stay in float{such}"


def summary(roles: Mapping[str, str]) -> str:
    """Role: the patterns of its Linears, one line each, to correct a guess with."""
    return "\n".join(f"  {role}: {', '.join(names)}" for role, names in patterns(roles).items())


def patterns(roles: Mapping[str, str]) -> dict[str, list[str]]:
    """Role -> the names of its Linears with the first number as `*`."""
    globs: dict[str, dict[str, None]] = {}
    for name, role in roles.items():
        globs.setdefault(role, {})[re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)] = None
    return {role: [*names] for role, names in globs.items()}
