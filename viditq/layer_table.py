"""`viditq layers`: what a command would quantize, Linear by Linear, before anything runs and without weights."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from viditq import config
from viditq.checks import check
from viditq.conf_folder import CONF
from viditq.models.adapter import ModelAdapter
from viditq.models.roles import FLOAT
from viditq.plans import denoiser_plan
from viditq.quant.description.plan import QuantPlan
from viditq.quant.execution.model_linears import shapes_of
from viditq.report.model_card import scheme_words

HEADINGS = ("role", "Linears", "out x in", "weights", "layers", "treatment")


def print_layers(overrides: Sequence[str], every: bool) -> None:
    """Print the table. overrides: of a run. every: a line for each Linear, not for those that are alike.

    Raises UserError and Hydra's own errors, as a run does.
    """
    config.register()
    # The name of a run is its experiment's or quant's, which only Hydra's own command line knows.
    named = any(word.startswith("name=") for word in overrides)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*overrides, *([] if named else ["name=layers"])])
    quant = check(cfg).quant
    adapter: ModelAdapter = instantiate(cfg.model, _convert_="all")
    plan, roles = denoiser_plan(adapter, quant)
    print(*lines_of(adapter.name, plan, roles, shapes_of(adapter.build_denoiser()), every), sep="\n")


def lines_of(
    model: str, plan: QuantPlan, roles: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], every: bool
) -> list[str]:
    """Linears of one role, shape, treatment and kind of block share a line, unless `every`. Lines are not wrapped."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for layer, role in roles.items():
        block, _, rest = re.sub(r"\.\d+\.", ".*.", layer, count=1).rpartition("*.")
        place = layer if every else f"{block}*.{rest.partition('.')[0]}" if block else rest.partition(".")[0]
        groups[(role, " x ".join(map(str, shapes[layer])), place, treatment(plan, layer))].append(layer)
    weights = {layer: shapes[layer][0] * shapes[layer][1] for layer in roles}
    quantized = [layer for layer, role in roles.items() if role != FLOAT]
    share = sum(weights[layer] for layer in quantized) / max(sum(weights.values()), 1)
    rows = [HEADINGS]
    for (role, shape, place, how), layers in groups.items():
        total = f"{sum(weights[layer] for layer in layers):,}"
        rows.append((role, str(len(layers)), shape, total, place + _ends(place, layers), how))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head = f"{model}: {len(quantized)} of {len(roles)} Linears, {100 * share:.0f} % of their weights, are quantized"
    pad = (str.ljust, str.rjust, str.ljust, str.rjust, str.ljust, str.ljust)
    return [
        head,
        "",
        *("  ".join(f(cell, w) for f, cell, w in zip(pad, row, widths, strict=True)).rstrip() for row in rows),
    ]


def _ends(place: str, layers: Sequence[str]) -> str:
    """How the names of those that share a place go on, each once."""
    depth = place.count(".") + 1
    ends = dict.fromkeys(".".join(layer.split(".")[depth:]) for layer in layers)
    return f": {' '.join(ends)}" if any(ends) else ""


def treatment(plan: QuantPlan, layer: str) -> str:
    """Of each range of noise levels, once where they are alike."""
    schemes = [plan.scheme(layer, segment) for segment in range(plan.num_segments)]
    words = [scheme_words(None if scheme is None else scheme.to_dict()) for scheme in schemes]
    if len({*words}) == 1:
        own = any(scheme is not None and scheme.per_segment for scheme in schemes)
        return words[0] + (f", for each of {len(words)} ranges of noise levels" if own and len(words) > 1 else "")
    spans = zip(words, plan.edges, plan.edges[1:], strict=False)
    return "; ".join(f"{what} at noise levels {low:g} to {high:g}" for what, low, high in spans)
