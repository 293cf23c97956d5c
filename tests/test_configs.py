"""Everything under conf composes and builds; each experiment's first comment is the command that runs it."""

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from shrunk import SHRUNK

from hydra_plugins import viditq_grid
from viditq.config import check_overrides
from viditq.errors import UserError
from viditq.experiment import build
from viditq.quant.description.quant_spec import QuantSpec
from viditq.quant.execution.model_linears import linear_names
from viditq.quant.setting import QuantSetting
from viditq.run_name import run_name, shorten
from viditq.runner import described
from viditq.shown_config import shown_config

ROOT = Path(__file__).parents[1]
Configure = Callable[..., DictConfig]


def options(group: str) -> list[str]:
    """Names of the yaml files of a group."""
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


METHODS = [
    name for name in options("experiment") if name != "bench" and not re.match(r"w\d|best$|fp16|smoke|tune", name)
]
PRESETS = [name for name in options("quant") if name != "base"]
LAYERS = ["blocks.0.to_q", "blocks.0.ff"]
SHIPPED_MODELS = ["tiny_image", "tiny_video", "tiny_i2v"]  # the hard ones are of the same classes


@pytest.mark.parametrize(
    "overrides",
    [
        [*SHRUNK, "seed=3", "~metric.psnr", "+quant.rules=[{pattern: x, keep_float: true}]"],
        ["quant/format@quant.weight=int4_group64", "name=x", "++model.path=a", "metric=[psnr]", "quant.weight.bits=8"],
    ],
)
def test_what_tests_compose_is_what_hydra_composes(overrides: list[str], configure: Configure) -> None:
    """They put values on top of files that are composed once."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        wanted = compose("config", overrides)
    for _ in range(2):
        found = configure(*overrides)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(wanted) and found == wanted
        assert OmegaConf.is_struct(found) and OmegaConf.get_type(found) is OmegaConf.get_type(wanted)
        found.name = "of one test"


@pytest.mark.parametrize("name", options("experiment"))
def test_experiment_builds(name: str, configure: Configure, tmp_path: Path) -> None:
    cfg = configure(f"experiment={name}", f"cache_dir='{tmp_path}'")
    experiment = build(cfg)
    assert experiment.name == name
    linears = linear_names(experiment.adapter.build_denoiser())
    assert set(experiment.plan.layers) <= set(linears)
    quantized = cfg.quant.weight is not None or cfg.quant.activation is not None or name == "best"
    assert bool(experiment.plan.layers) == quantized
    assert (experiment.plan.edges == (0.0, 1.0)) != (
        "_ts_" in name or name in ("best", "smoke", "tune_alpha") or "_mp" in name
    )
    roles = experiment.adapter.linear_roles(linears)
    if quantized:
        assert set(experiment.plan.layers) == {layer for layer, role in roles.items() if role != "float"}
    assert experiment.make_metrics()


# Every method takes one width, and one method every width: what a width changes is the same for all.
@pytest.mark.parametrize(
    ("name", "bits"), [*((name, "w4a8") for name in METHODS), *(("viditq", bits) for bits in options("bits"))]
)
def test_every_method_takes_every_width(name: str, bits: str, configure: Configure) -> None:
    quant: QuantSetting = instantiate(configure(f"experiment={name}", f"bits={bits}").quant, _convert_="all")
    plan = quant.plan(LAYERS, [])
    found = {(s.weight.bits, s.activation.bits) for s in plan.schemes.values() if s.weight and s.activation}
    assert found == {tuple(int(digit) for digit in re.findall(r"\d", bits))}


def test_bench_is_every_method_at_every_width(tmp_path: Path) -> None:
    """The command line narrows every key but the experiment, which names the sweep itself."""
    params = OmegaConf.load(ROOT / "conf/experiment/bench.yaml").hydra.sweeper.params
    methods = params.experiment.split(",")
    assert params.bits.split(",") == ["w8a8", "w6a6", "w4a8", "w4a4"]
    assert sorted(methods) == sorted(METHODS)
    grid = importlib.reload(viditq_grid).Grid  # Hydra's scan for plugins executes the base class's module anew
    sweeper, jobs = grid(max_batch_size=None, params=dict(params)), []
    sweeper.launcher = SimpleNamespace(launch=lambda batch, initial_job_idx: jobs.extend(batch) or [])
    sweeper.config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}, "overrides": {"hydra": []}}})
    sweeper.hydra_context = SimpleNamespace(config_loader=None)
    sweeper.validate_batch_is_legal = lambda batch: None
    sweeper.sweep(["experiment=bench", "model=tiny_image", "bits=w4a4,w4a8", "seed=7"])
    both = {"model=tiny_image", "seed=7", "data.num_prompts=32", "diagnosis.num_prompts=0"}
    wanted = [both | {f"experiment={m}", f"bits={b}"} for m in methods for b in ("w4a4", "w4a8")]
    assert [set(job) for job in jobs] == wanted
    assert sweeper.config.hydra.overrides.hydra == ["hydra.mode=MULTIRUN"], "jobs leave records only in a sweep"


@pytest.mark.parametrize("name", options("experiment"))
def test_first_comment_is_the_command(name: str) -> None:
    lines = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert re.fullmatch(rf"# python run\.py experiment={name}( .*)?", lines[1])
    assert lines[2].startswith("# ") and lines[2].endswith(".")
    assert len(lines) <= 20


# Each with one of the models, in turn: what a preset asks of a model is the same for all.
@pytest.mark.parametrize(("name", "model"), zip(PRESETS, cycle(SHIPPED_MODELS), strict=False))
def test_preset_builds(name: str, model: str, configure: Configure) -> None:
    experiment = build(configure(f"quant={name}", f"model={model}", "name=preset"))
    bits = [int(digit) for digit in re.findall(r"\d", name.partition("_")[0])]
    schemes = experiment.plan.schemes.values()
    assert all([s.bits for s in (scheme.weight, scheme.activation) if s] == bits for scheme in schemes)
    assert bool(schemes) == bool(bits)
    assert experiment.adapter.name == model


@pytest.mark.parametrize("name", options("quant/smoothing"))
def test_smoothing_composes(name: str, configure: Configure) -> None:
    quant: QuantSetting = instantiate(configure(f"quant/smoothing={name}", "name=x").quant, _convert_="all")
    assert bool(quant.recipe.smoothing) == (name != "none")


@pytest.mark.parametrize("name", options("quant/text_encoder"))
def test_text_encoder_composes(name: str, configure: Configure) -> None:
    experiment = build(configure("quant=none", f"quant/text_encoder={name}", "name=x"))
    schemes = [scheme for plan in experiment.encoder_plans.values() for scheme in plan.schemes.values()]
    assert {f"w{scheme.weight.bits}" for scheme in schemes if scheme.weight} == {name} - {"none"}
    assert {*experiment.encoder_plans} == ({"text_encoder"} if name != "none" else set())


@pytest.mark.parametrize("name", options("quant/rounding"))
def test_rounding_composes(name: str, configure: Configure) -> None:
    schemes = build(configure("quant=w8a8_naive", f"quant/rounding={name}", "name=x")).plan.schemes.values()
    assert {scheme.rounding.name for scheme in schemes} == {name.removesuffix("_lsq")}


@pytest.mark.parametrize("name", options("quant/ranges"))
def test_ranges_compose(name: str, configure: Configure) -> None:
    overrides = [f"quant/ranges={name}", f"quant/ranges@quant.activation_ranges={name}", "name=x", "quant=w8a8_naive"]
    schemes = build(configure(*overrides)).plan.schemes.values()
    assert {scheme.ranges.name for scheme in schemes} == {scheme.activation_ranges.name for scheme in schemes} == {name}


def test_low_rank_composes(configure: Configure) -> None:
    plan = build(configure("quant.low_rank=8", "quant/smoothing=scale_rotate", "name=x")).plan
    assert list(plan.schemes) == ["w4a8_smooth_rotate_rank8"]


def test_parts_of_a_chain_are_overridden_by_name(configure: Configure) -> None:
    plan = build(configure("quant/smoothing=scale_rotate", "quant.smoothing.scale.alpha=0.7", "name=x")).plan
    (scheme,) = plan.schemes.values()
    assert [part.to_dict().get("alpha") for part in scheme.transforms] == [0.7, None]


@pytest.mark.parametrize("name", options("quant/policy"))
def test_policy_composes(name: str, configure: Configure, tmp_path: Path) -> None:
    overrides = [f"quant/policy={name}", "name=x"]
    if name == "plan_file":
        (tmp_path / "plan.json").write_text(build(configure("name=x", "quant=w6a6")).plan.to_json())
        overrides.append(f"quant.policy.path='{tmp_path}/plan.json'")
    if name == "artifact":
        (tmp_path / "plan.json").write_text(build(configure("name=x", "quant=w6a6")).plan.to_json())
        (tmp_path / "meta.json").write_text('{"format_version": 3, "sha256": {"meta.json": "x"}}')
        overrides.append(f"quant.policy.path='{tmp_path}'")
    if name == "treatments":  # whose start has the widest of its own formats
        overrides.append("quant=none")
    experiment = build(configure(*overrides))
    wanted = {"plan_file": 6, "artifact": 6, "treatments": 8}.get(name, 4)
    assert {scheme.weight.bits for scheme in experiment.plan.schemes.values() if scheme.weight} == {wanted}


@pytest.mark.parametrize("name", options("quant/format"))
def test_format_composes(name: str, configure: Configure) -> None:
    side = "activation" if "token" in name or "tensor" in name else "weight"
    cfg = configure("quant=w8a8", f"quant/format@quant.{side}={name}", "name=x")
    spec = instantiate(cfg.quant[side])
    label = f"fp{spec.bits}_{spec.label}" if spec.label == spec.number else f"int{spec.label}"
    assert isinstance(spec, QuantSpec) and name.startswith(spec.label if spec.block_scale else label)
    quant: QuantSetting = instantiate(cfg.quant, _convert_="all")
    assert quant.plan(LAYERS, []).layers


# Slow: three of four yamls of models, which their families' tests compose too, and metrics, which tests/metrics builds.
@pytest.mark.parametrize(
    ("group", "part"),
    [
        *((group, slice(None)) for group in ("data", "logger", "trainer")),
        ("model", slice(0, None, 4)),
        *(pytest.param(group, slice(None), marks=pytest.mark.slow) for group in ("metric", "model")),
    ],
)
def test_group_composes(group: str, part: slice, configure: Configure) -> None:
    for name in options(group)[part]:
        node = configure(f"{group}={name}", "name=x")[group]
        assert node is None or OmegaConf.is_dict(node)


def test_metrics_compose_one_by_one_and_together(configure: Configure) -> None:
    assert set(configure("metric=[psnr,ssim]", "name=x").metric) == {"psnr", "ssim"}
    assert set(configure("metric=fvd", "name=x").metric) == {"fvd"}


def test_command_line_of_the_issue(configure: Configure) -> None:
    """quant=w4a8 quant/smoothing=timestep_aware quant.smoothing.alpha=[0.3,0.2]"""
    alpha = "quant.smoothing.alpha=[0.3,0.2]"
    plan = build(configure("quant=w4a8", "quant/smoothing=timestep_aware", alpha, "name=x")).plan
    low, high = next(iter(plan.layers.values()))
    assert plan.edges == (0.0, 0.5, 1.0)
    assert [plan.schemes[str(name)].transforms[0].to_dict()["alpha"] for name in (low, high)] == [0.3, 0.2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["quant/smoothing", "timestep_aware", "w4a8_ts_smooth", "name: w4a8\n", "video_length: 8\n"]),
        (["--cfg", "job", "experiment=w4a8_ts_smooth"], ["name: w4a8_ts_smooth", "bits: 4", "per_segment: true"]),
    ],
)
def test_help_and_cfg(arguments: list[str], words: list[str]) -> None:
    command = [sys.executable, "run.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    assert all(word in done.stdout for word in words), done.stdout
    assert "--cfg" in arguments or "${" not in done.stdout


def test_what_help_shows_of_values_that_only_the_user_can_give(configure: Configure) -> None:
    """They are no reason to show nothing; `$` is doubled for the template, which reads it."""
    shown = shown_config(_root_=configure("model=flux_dev/turbo_8", "quant/policy=plan_file", "cache_dir='a$b'"))
    assert "denoiser_path: '??? (flux_dev_turbo_8 is " in shown and "cache_dir: a$$b\n" in shown
    assert "    path: ???\n" in shown and "max_sequence_length: 512" in shown and "hydra:" not in shown


def test_names_that_are_too_long_stay_distinct() -> None:
    """Folders take 255 bytes, W&B groups 128 characters."""
    long = ["a" * 200 + end for end in "xy"]
    short = [shorten(text, 120) for text in long]
    assert [len(text) for text in short] == [120, 120] and short[0] != short[1]
    assert shorten("a" * 120, 120) == "a" * 120


def test_names_of_runs_are_readable_and_plain() -> None:
    assert run_name("w8a8", "quant=w8a8") == "w8a8" and run_name("mine", "name=mine") == "mine"
    lists = "quant.smoothing.alpha=[0.3,0.2],quant.weight.bits=3,seed=1"
    assert re.fullmatch(r"w8a8-seed_1-alpha_0\.3_0\.2-bits_3-[0-9a-f]{8}", run_name("w8a8", lists))
    odd = run_name("a b,c", "data.path='/x/y [1]',+quant.rules=[{pattern:x*}]")
    assert re.fullmatch(r"[\w.-]+", odd) and odd.startswith("a_b_c-path_x_y_1-rules_pattern_x-")
    alike = run_name("grün & käse", 'data.num_prompts=6,name="grün & käse",noise_floor.num_prompts=0')
    assert re.fullmatch(r"grün_käse-data_num_prompts_6-noise_floor_num_prompts_0-[0-9a-f]{8}", alike)
    sides = [run_name("x", f"quant.{side}.bits=3") for side in ("weight", "activation")]
    assert sides[0][:-8] == sides[1][:-8] and sides[0] != sides[1], "the hash is of the whole"
    long = [run_name("x", f"data.path={'a' * 200}{end},seed=4") for end in "xy"]
    assert long[0] != long[1] and {len(name) for name in long} == {100} and long[0].startswith("x-seed_4-path_a")


def test_a_run_keeps_the_name_that_an_earlier_version_gave_it(tmp_path: Path) -> None:
    given = ("w8a8", "quant=w8a8,seed=1,data.path=a/b")
    old, new = tmp_path / "w8a8,seed=1,data.path=a.b", tmp_path / run_name(*given, str(tmp_path))
    assert new.name.startswith("w8a8-seed_1-path_a_b-")
    old.mkdir()
    assert run_name(*given, str(tmp_path)) == new.name, "it holds no run"
    (old / "run.json").write_text("{}")
    assert run_name(*given, str(tmp_path)) == old.name
    new.mkdir()
    (new / "run.json").write_text("{}")
    assert run_name(*given, str(tmp_path)) == new.name


@pytest.mark.parametrize(
    "word", ["bits=w4a4", "quant.weight.bits=3", "+quant.rules=[]", "quant/format@quant.weight=int8_token"]
)
def test_a_plan_file_takes_no_other_bits(word: str) -> None:
    """They would change nothing, so they are refused; what a plan does not say may be given."""
    allowed = ["quant=w8a8", "quant/policy=plan_file", "quant.policy.path=p", "quant.correction=ptqd", "seed=1"]
    allowed += ["quant/text_encoder=w4", "quant.text_encoder.group_size=32"]
    with pytest.raises(UserError, match=re.escape(word.split("=")[0].lstrip("+")) + ": .*would change nothing"):
        check_overrides("viditq.quant.description.policy.PlanFile", [*allowed, word])
    check_overrides("viditq.quant.description.policy.PlanFile", allowed)
    check_overrides("viditq.quant.description.policy.Uniform", [word])


def test_a_plan_does_not_run_under_the_name_of_an_experiment() -> None:
    words = ["experiment=w4a8_ts_smooth", "quant/policy=plan_file", "quant.policy.path=p"]
    with pytest.raises(UserError, match="Name the run, such as name=my_plan"):
        check_overrides("viditq.quant.description.policy.PlanFile", words)
    check_overrides("viditq.quant.description.policy.PlanFile", [*words, "name=mine"])
    check_overrides("viditq.quant.description.policy.PlanFile", ["experiment=w4a8_mp", "quant.policy.path=p"])


def test_what_a_plan_leaves_in_float_is_told(configure: Callable[..., DictConfig]) -> None:
    plan = ["quant/policy=plan_file", "name=x"]
    other = build(configure("model=tiny_video", *plan, "quant.policy.path=shipped:tiny_image/w4a8_mp"))
    assert re.search(
        r"shipped:tiny_image/w4a8_mp leaves \d+ more in float, such as temporal_transformer_blocks", described(other)
    )
    own = build(configure("model=tiny_video", *plan, "quant.policy.path=shipped:tiny_video/w4a8_mp"))
    assert described(own).count("\n") == 0
