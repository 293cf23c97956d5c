"""`python -m viditq`: hand a quantized model to another program (export), take one from it (import), tell which of
finished runs to use (which), or describe a pipeline that has no yaml (describe).
"""

import argparse
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from viditq.cli import guarded
from viditq.errors import UserError
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
        raise UserError(f"{folder} {what}: give the folder of a run whose stage quantize is done, or its {ARTIFACT}")
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
            shlex.join(["python", "run.py", *model.split(" ", 1), *args.set, f"++model.denoiser_path={out}"]),
        )
        return
    imported = ImportedModel(adapter, files)
    print(imported.told())
    imported.write(out)
    artifact_card(out, shlex.join(["python", "-m", "viditq", *args.words]), adapter).write()
    print(out)


def advise(args: argparse.Namespace) -> None:
    """Print which of finished runs to use."""
    from viditq.export.exact import exact_targets  # torch and diffusers take seconds
    from viditq.sweeps.which import which

    print(which(args.runs, args.metric, exact_targets), end="")


def describe(args: argparse.Namespace) -> None:
    """Print the yaml of a pipeline that has none."""
    from viditq.describe import describe as text_of  # torch and diffusers take seconds
    from viditq.importing.float_model import float_model

    print(text_of(float_model(args.model, args.set), args.name), end="")


def main(words: list[str] | None = None) -> int:
    """The exit status."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser("python -m viditq", description="Hand a quantized model to another program.")
    commands = parser.add_subparsers(required=True, metavar="export, import, which or describe")
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
    of_model = "the float model it was made from: a folder, an id on the hub, or the name of a yaml of conf/model"
    command.add_argument("--model", required=True, help=of_model)
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as model.path=FOLDER")
    command.add_argument("--out", required=True, help="the folder to write")
    command.set_defaults(work=bring)
    command = commands.add_parser("which", help="tell which of finished runs to use")
    command.add_argument("runs", metavar="RUN", nargs="+", help="folders of runs, of a model's runs, or of a sweep")
    command.add_argument("--metric", help="what ranks them (the first of the runs' metrics)")
    command.set_defaults(work=advise)
    command = commands.add_parser("describe", help="print a yaml of what is guessed and measured of a pipeline")
    command.add_argument("model", metavar="MODEL", help="a folder in diffusers' layout, or an id on the hub")
    command.add_argument("--name", default="my_model", help="of the model")
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="such as model.num_frames=81")
    command.set_defaults(work=describe)
    args = parser.parse_args(words)
    args.words = words
    return guarded(DictConfig({"debug": False}), lambda: args.work(args), choice="--out PLACE")


if __name__ == "__main__":
    sys.exit(main())
