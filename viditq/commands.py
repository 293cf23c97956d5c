"""The commands beside runs: hand a quantized model to another program (export), take one from it (import), judge what
somebody else quantized (judge), hold an artifact's bytes against their digests (verify), tell which of finished runs
to use (which), what a run would quantize (layers), or describe a pipeline that has no yaml (describe).
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from viditq.cli import guarded
from viditq.config import COMMANDS, OUTPUTS, program
from viditq.errors import UserError, close_names
from viditq.export.targets import TARGETS, Target, target_of

ARTIFACT, META = "quantized", "meta.json"


def export(args: argparse.Namespace) -> None:
    """Everything that can be seen without torch is checked before the target's module is imported."""
    target = target_of(args.to)
    artifact = _artifact(args.run)
    if args.requantize and not target.requantizes:
        raise UserError(f"--requantize changes nothing: --to {args.to} takes every artifact as it is, or not at all.")
    out = _place(args.out, artifact, args.to, target)
    print(f"viditq: exporting {artifact} to {args.to}", flush=True)
    module = target.load()
    if target.requantizes:
        module.export(artifact, out, args.requantize)
    else:
        module.export(artifact, out)
    from viditq.card import export_card  # torch is there by now

    card = export_card(artifact, out, args.to)
    card.write()
    print(*card.files, sep="\n")


def _artifact(run: str) -> Path:
    """The artifact of a run's folder, or itself."""
    folder = Path(run).expanduser()
    found = folder / ARTIFACT if (folder / ARTIFACT).is_dir() else folder
    if not (found / META).is_file():
        what = "holds no quantized model" if folder.is_dir() else "is no folder"
        beside = [place.parent.name for place in folder.parent.glob(f"*/{ARTIFACT}") if (place / META).is_file()]
        there = f". In {folder.parent} such runs: {close_names(folder.name, beside)}" if beside else ""
        raise UserError(
            f"{folder} {what}: give the folder of a run whose stage quantize is done, or its {ARTIFACT}{there}"
        )
    return found


def _place(out: str | None, artifact: Path, name: str, target: Target) -> Path:
    """What is written; beside the artifact unless told."""
    place = artifact.parent / "exports" / f"{name}{target.suffix}" if out is None else _given(out)
    if target.suffix and (place.suffix != target.suffix or place.is_dir()):
        raise UserError(f"--out {place}: --to {name} writes one file, whose name ends in {target.suffix}")
    if not target.suffix and place.is_file():
        raise UserError(f"--out {place}: --to {name} writes a folder, and this is a file")
    if artifact.resolve() in (place.resolve(), *place.resolve().parents):
        raise UserError(f"--out {place} lies in the artifact, which an export does not change; choose another place")
    return place


def _given(out: str) -> Path:
    """What --out names; a link stands for its target, which can be replaced as a whole."""
    place = Path(out).expanduser()
    if place.name in ("", ".."):
        raise UserError(f"--out {out} has no name of its own: give that of a new one, such as ./quantized_model")
    return place.resolve() if place.is_symlink() else place


def bring(args: argparse.Namespace) -> None:
    """Write an artifact of another program's file; of float weights, the denoiser's folder."""
    out = _given(args.out)
    files = [Path(file).expanduser() for file in args.files]
    for path in files:
        if not path.exists():
            raise UserError(f"{path} does not exist. Give a file or folder here; of the hub: `hf download USER/NAME`.")
        if out.resolve() in (path.resolve(), *path.resolve().parents):
            raise UserError(f"--out {out} holds {path}, which an import does not change; choose another place")
    print(f"viditq: importing {', '.join(map(str, files))} as {args.model}", flush=True)
    from viditq.card import artifact_card  # torch and diffusers take seconds
    from viditq.importing.artifact import ImportedModel, places
    from viditq.importing.float_file import holds_floats, write_float
    from viditq.importing.float_model import float_model, names_yaml

    adapter = float_model(args.model, args.set)
    found = places(adapter, files)
    if all(holds_floats(path) for path in found):
        told = write_float(adapter, found, out)
        model = f"model={args.model}" if names_yaml(args.model) else f"model=diffusers model.path={args.model}"
        print("; ".join(["float weights", *told]), out, sep="\n")
        print(
            "to quantize them:",
            shlex.join([*program(), *model.split(" ", 1), *args.set, f"++model.denoiser_path={out}"]),
        )
        return
    imported = ImportedModel(adapter, files)
    print(imported.told())
    imported.write(out)
    artifact_card(out, shlex.join(["viditq", *args.words]), adapter).write()
    print(out)


def loading(what: str) -> None:
    """A first line, before torch and diffusers take seconds; not among what is printed, which may go into a file."""
    print(f"viditq: {what} (loading takes some 10 s)", file=sys.stderr, flush=True)


def advise(args: argparse.Namespace) -> None:
    """Print which of finished runs to use."""
    loading(f"reading the runs of {', '.join(args.runs)}")
    from viditq.export.exact import exact_targets  # torch and diffusers take seconds
    from viditq.sweeps.which import which

    print(which(args.runs, args.metric, exact_targets, args.where), end="")


def describe(args: argparse.Namespace) -> None:
    """Print the yaml of a pipeline that has none."""
    loading(f"trying out the pipeline of {args.model}")
    from viditq.describe import describe as text_of  # torch and diffusers take seconds
    from viditq.importing.float_model import float_model

    print(text_of(float_model(args.model, args.set), args.name), end="")


def check(args: argparse.Namespace) -> None:
    """Read every byte of artifacts, after a copy say: loading checks a tensor when it is first read."""
    folders = [_artifact(run) for run in args.runs]
    from viditq.quant.artifact import verify  # torch takes seconds

    for folder in folders:
        print(f"{folder}: {verify(folder) / 1e6:,.2f} MB, all as written", flush=True)


def tell_layers(args: argparse.Namespace) -> None:
    """Print what a run would quantize."""
    loading("looking at the model's layers, without weights")
    from viditq.layer_table import print_layers  # torch and diffusers take seconds

    own = [] if args.config_dir is None else [f"hydra.searchpath=['file://{_given(args.config_dir).resolve()}']"]
    print_layers([*own, *args.overrides], args.all)


def judging(path: str) -> list[str]:
    """The overrides of a run that judges what lies at `path` as it is. Raises UserError where nothing is quantized."""
    place = Path(path).expanduser()
    if not place.exists():
        raise UserError(f"{path} does not exist. Give a folder or file here; of the hub: `hf download USER/NAME`.")
    quoted = f'"{place}"'
    if place.is_file():
        if place.suffix == ".gguf":
            return ["quant=external/gguf", f"quant.policy.path={quoted}"]
        raise UserError(
            f"{path} is a single file, of which .gguf alone is judged as it is: import it first (viditq import {path} "
            "--model MODEL --out FOLDER), and judge FOLDER."
        )
    if any((folder / META).is_file() for folder in (place, place / ARTIFACT)):
        return ["quant/policy=artifact", f"quant.policy.path={quoted}"]
    return ["quant=external/folder", f"quant.policy.path={quoted}"]


def main(words: list[str]) -> int | list[str]:
    """The exit status, or the words of the run that `judge` is. words: of the command line, the command first."""
    parser = argparse.ArgumentParser("viditq", description="Beside runs (viditq --help).")
    commands = parser.add_subparsers(required=True, metavar=", ".join(COMMANDS))
    command = commands.add_parser("export", help="write another program's format")
    command.add_argument("run", metavar="RUN", help="a run's folder, or its artifact (RUN/quantized)")
    known = "; ".join(f"{name}: {target.what}" for name, target in TARGETS.items())
    command.add_argument("--to", required=True, metavar="TARGET", help=known)
    command.add_argument("--out", help="the file or folder to write; without it, one in the run's folder `exports`")
    command.add_argument("--requantize", action="store_true", help="convert what the target cannot hold exactly")
    command.set_defaults(work=export)
    command = commands.add_parser(
        "import", help="write an artifact of another program's file, or a folder of float weights"
    )
    what = "a ComfyUI file, float or quantized, or a folder that diffusers saved with torchao; one for each denoiser"
    command.add_argument("files", metavar="FILE", nargs="+", help=what)
    of_model = (
        "the float model it was made from: a folder, an id on the hub, the name of a yaml of conf/model (MODEL), "
    )
    of_model += "or of another checkpoint of it (MODEL/NAME)"
    command.add_argument("--model", required=True, help=of_model)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as model.path=FOLDER")
    command.add_argument("--out", required=True, help="the folder to write")
    command.set_defaults(work=bring)
    command = commands.add_parser("which", help="tell which of finished runs to use")
    what = f"folders of runs, of a model's runs, or of a sweep (default: {OUTPUTS})"
    command.add_argument("runs", metavar="RUN", nargs="*", default=[OUTPUTS], help=what)
    command.add_argument("--metric", help="what ranks them (the first of the runs' metrics)")
    what = "only runs whose command had this word: bits=w4a8, or bits with any value"
    command.add_argument("--where", nargs="+", default=[], metavar="WORD", help=what)
    command.set_defaults(work=advise)
    command = commands.add_parser("describe", help="print a yaml of what is guessed and measured of a pipeline")
    command.add_argument("model", metavar="MODEL", help="a folder in diffusers' layout, or an id on the hub")
    command.add_argument("--name", default="my_model", help="of the model")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as model.num_frames=81")
    command.set_defaults(work=describe)
    command = commands.add_parser("verify", help="hold every byte of artifacts against the digests written with them")
    command.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, or artifacts (RUN/quantized)")
    command.set_defaults(work=check)
    command = commands.add_parser("layers", help="tell what a run would quantize, and how, without weights")
    command.add_argument(
        "overrides", metavar="KEY=VALUE", nargs="*", help="as a run takes them: model=flux_dev quant=w4a8"
    )
    command.add_argument("--all", action="store_true", help="a line for each Linear, not for those that are alike")
    command.add_argument("--config-dir", metavar="DIR", help="of yamls of one's own, as a run takes it")
    command.set_defaults(work=tell_layers)
    command = commands.add_parser("judge", help="sample, measure and report what somebody else quantized")
    what = "a folder that diffusers saved quantized, a .gguf file, or an artifact of viditq"
    command.add_argument("path", metavar="PATH", help=what)
    command.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="of the run: model=flux_dev, metric=video")
    args = parser.parse_args(words)
    args.words = words
    if words[0] == "judge":
        run = list[str]()
        status = _guarded(lambda: run.extend(judging(args.path)))
        return status or [*run, *args.overrides]
    return _guarded(lambda: args.work(args))


def _guarded(work: Callable[[], None]) -> int:
    return guarded(DictConfig({"debug": False}), work, choice="--out PLACE")
