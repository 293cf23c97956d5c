"""scripts/leaderboard.py on runs written here: rows, intervals, verdicts, and files that can be opened."""

import base64
import csv
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LABELS = {
    "psnr": {"label": "PSNR", "unit": "dB", "higher_is_better": True},
    "flicker": {"label": "flicker (8 frames)", "unit": "", "higher_is_better": None},
}
Leaderboard = Callable[..., Path]


def write_run(folder: Path, experiment: str, seed: int, psnr: float | None, **changes: Any) -> Path:
    """A finished run with what the leaderboard reads of one; `config` goes into run.json, `reference` names samples."""
    config = {"name": experiment, "seed": seed, "inputs": {"prompts": "p"}, **changes.pop("config", {})}
    reference = f"/cache/{changes.pop('reference', config['inputs']['prompts'])}-{seed}"
    speed = changes.pop("speed", None)
    prompts = [f"{config['inputs']['prompts']} {i}" for i in range(4)]
    metrics = {"model": "m", "experiment": experiment, "seed": seed, "prompts": 4, "labels": LABELS}
    metrics |= {"metrics": {"psnr": psnr, "flicker": 0.25}, "standard_errors": {"psnr": 0.5, "flicker": None}}
    metrics |= {"float_metrics": {"flicker": 0.2}, "average_weight_bits": 4.5, "average_activation_bits": 8.5}
    metrics |= {"size_bytes": 2_000_000, "seconds": {"generate": 3.0}, **changes}
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps(config))
    if speed is not None:
        (folder / "speed.json").write_text(json.dumps(speed))
    values = {"prompts": prompts, "metrics": {}, "reference": reference}
    (folder / "per_prompt.json").write_text(json.dumps(values))
    return folder


def speed(milliseconds: float, backend: str = "native", threads: int = 1, float_milliseconds: float = 60.0) -> Any:
    """speed.json of a run whose backend computed everything."""

    def took(median: float, dtype: str) -> dict[str, Any]:
        spread = {"median": median / 1e3, "low": median / 2e3, "high": median / 1e3}
        return {"dtype": dtype, "compiled": False, "seconds": spread, "weights_bytes": 1000, "step_bytes": None}

    machine = {"cpu": "c", "cores": 2, "threads": threads, "isa": ["avx2"], "gpu": None, "torch": "2"}
    candidates = {"float": took(float_milliseconds, "float32"), "quantized": took(milliseconds, "float32")}
    ran = {"requested": backend, "layers": {backend: 4}}
    return {"backend": ran, "batch_size": 8, "rounds": 5, "machine": machine, "candidates": candidates}


def verdict(word: str, interval: list[float] | None = None) -> dict[str, Any]:
    judged = {"difference_interval": [-1.0, 1.0], "warning": None}
    flicker = {"verdict": "equal within noise", "difference_interval": None, "warning": "nothing can be told"}
    return {"psnr": {"verdict": word, "interval": interval, **judged}, "flicker": {"interval": None, **flicker}}


def undrawn(*given: Any) -> list[Path]:
    """Files where a picture's would be, which takes most of the time of a leaderboard."""
    files = [given[-1].with_name(f"{given[-1].name}.{kind}") for kind in ("png", "svg")]
    files[0].parent.mkdir(exist_ok=True)
    for file in files:
        file.write_text("<svg/>")
    return files


@pytest.fixture
def drawn_leaderboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leaderboard:
    """Arguments -> what its files begin with."""
    return make_leaderboard(tmp_path, monkeypatch)


@pytest.fixture
def leaderboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leaderboard:
    """The same, where a test does not look at pictures."""
    return make_leaderboard(tmp_path, monkeypatch, pareto_picture=undrawn, widths_picture=undrawn)


def make_leaderboard(folder: Path, monkeypatch: pytest.MonkeyPatch, **others: Callable[..., Any]) -> Leaderboard:
    spec = importlib.util.spec_from_file_location("leaderboard", ROOT / "scripts/leaderboard.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name, function in others.items():
        assert callable(getattr(script, name))
        monkeypatch.setattr(script, name, function)

    def run(*arguments: Path | str) -> Path:
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", *map(str, arguments), "--out", str(folder / "out/board")])
        script.main()
        return folder / "out" / "board"

    return run


def table(board: Path) -> dict[str, list[str]]:
    """Experiment -> the other cells, of the markdown table."""
    lines = [line for line in Path(f"{board}.md").read_text().splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[1:]]
    return {row[0].strip(): row[1:] for row in rows}


def test_where_takes_the_runs_whose_command_had_these_words(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of folders are cut, so that patterns of them find not all; words are those of run.json."""
    for name, words in {"a": ["bits=w4a8", "seed=0"], "b": ["bits=w8a8"], "c": []}.items():
        write_run(tmp_path / "runs" / name, name, 0, 30.0, config={"overrides": words})
    assert list(table(leaderboard(f"{tmp_path}/runs/*", "--where", "bits"))) == ["a", "b"]
    assert list(table(leaderboard(f"{tmp_path}/runs/*", "--where", "bits=w4a8", "seed"))) == ["a"]
    both = [write_run(tmp_path / "same" / str(i), "s", i, 30.0, config={"overrides": [f"seed={i}"]}) for i in (0, 1)]
    assert len(table(leaderboard(*both))) == 1, "the words are no part of the configuration"
    with pytest.raises(SystemExit, match="--where bits=w2a2: none of these runs was made by such a command"):
        leaderboard(f"{tmp_path}/runs/*", "--where", "bits=w2a2")


def test_rows_and_their_order(leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Means over seeds in a table of their own; single seeds, best first; what was not measured last."""
    for seed in range(3):
        word = "worse" if seed else "equal within noise"
        write_run(tmp_path / f"runs/good{seed}", "good", seed, 40.0 + seed, verdict=verdict(word))
    write_run(tmp_path / "runs/judged", "judged", 0, 30.0, verdict=verdict("worse", [28.0, 33.0]))
    write_run(tmp_path / "runs/old", "old", 0, 20.0)
    write_run(tmp_path / "runs/undefined", "undefined", 0, None)
    (tmp_path / "runs/unfinished").mkdir()
    board = leaderboard(f"{tmp_path}/runs/*")
    rows = table(board)
    assert list(rows) == ["judged", "old", "undefined", "experiment", "good"]
    assert rows["good"] == [
        "1 differ by seed; 1 cannot be told",
        "3",
        "4",
        "4.50",
        "8.50",
        "2.00",
        "not measured",
        *rows["good"][7:],
    ]
    assert rows["good"][7] == "41.00 ± 0.58"  # stdev 1 of three seeds
    assert rows["judged"][7] == "30.0 [28.0, 33.0]" and rows["judged"][0] == "worse: PSNR; 1 cannot be told"
    assert rows["old"][7] == "20.00 [19.02, 20.98]" and rows["old"][0] == "-"  # 1.96 standard errors
    assert rows["old"][8] == "0.2500" and rows["judged"][8] == "0.2500*"
    assert rows["undefined"][6:8] == ["not measured", "-"]
    captured = capsys.readouterr()
    assert "* flicker (8 frames): nothing can be told" in captured.out
    assert captured.out.startswith("### m (4 pairs a seed)") and "Float model: flicker (8 frames) 0.2" in captured.out
    assert "left out: " in captured.err and "unfinished holds no run (no run.json)" in captured.err


def test_csv(leaderboard: Leaderboard, tmp_path: Path) -> None:
    write_run(tmp_path / "a0", "a", 0, 40.0)
    write_run(tmp_path / "a1", "a", 1, 42.0)
    write_run(tmp_path / "b", "b, |c|", 0, 30.0, verdict=verdict("worse", [28.0, 33.0]))  # fewer seeds: last
    board = leaderboard(tmp_path / "a0", tmp_path / "a1", tmp_path / "b")
    with open(f"{board}.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["inputs"], second["inputs"]) == ("1", "2")
    assert (first["seeds"], float(first["psnr"]), float(first["psnr_error"])) == ("0 1", 41.0, 1.0)
    assert (second["experiment"], second["psnr_error"], second["psnr_verdict"]) == ("b, |c|", "", "worse")
    assert (float(second["psnr_low"]), float(second["psnr_high"]), second["bytes"]) == (28.0, 33.0, "2000000")
    assert "b, \\|c\\|" in Path(f"{board}.md").read_text()


def test_rows_are_configurations_not_names(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sweep over bits has one name; the same run given twice counts once; models have tables of their own."""
    for bits in (4, 6):
        for seed in (0, 1):
            config = {"quant": {"weight": {"bits": bits}, "segments": [0.0, 1.0]}}
            write_run(tmp_path / f"w{bits},seed={seed}", "smoke", seed, bits * 5.0, config=config)
    shutil.copytree(tmp_path / "w4,seed=0", tmp_path / "copy")
    write_run(tmp_path / "other", "smoke", 0, 10.0, model="n")
    runs = [tmp_path / name for name in ("w4,seed=0", "w4,seed=0/.", "copy")]
    board = leaderboard(*runs, f"{tmp_path}/w*", tmp_path / "other", tmp_path)  # of a folder, what lies in it
    assert list(table(board)) == ["smoke quant.weight.bits=6", "smoke quant.weight.bits=4", "experiment", "smoke"]
    assert [cells[1] for cells in table(board).values()] == ["2", "2", "seeds", "1"]
    assert capsys.readouterr().err.count("left out: ") == 1
    assert {path.name for path in board.parent.iterdir()} == {
        *("board.html", "board.md", "board.csv", "board_m.png", "board_m.svg", "board_n.png", "board_n.svg")
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere does not exist"),
        ([__file__], ".*test_leaderboard.py: a file, where the folder of a run is needed"),
        (["empty"], "None of these folders holds a finished run"),
        (["run", "--metric", "fvd"], "--metric fvd was not measured. Choose one of flicker, psnr"),
        (["run", "--metric", "flicker"], "flicker: no metric that ranks runs.* Choose one of psnr"),
    ],
)
def test_bad_input(
    arguments: list[str], words: str, leaderboard: Leaderboard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "run", "a", 0, 40.0)
    with pytest.raises(SystemExit, match=f"error: {words}"):
        leaderboard(*arguments)


def test_page(drawn_leaderboard: Leaderboard, tmp_path: Path) -> None:
    """Self-contained, escaped, with links to the runs' reports."""
    run = write_run(tmp_path / "a b", "<script>alert(1)</script>", 0, 40.0)
    (run / "report.html").write_text("report")
    board = drawn_leaderboard(run)
    page = Path(f"{board}.html").read_text()
    assert "alert(1)" in page and "<script>alert" not in page and page.count("<script") == 1
    links = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert [link.split(",")[0] for link in links if link[0] != "#"] == [
        *("../a%20b/report.html", "data:image/svg+xml;base64")
    ]
    assert "Content-Security-Policy" in page and "default-src &#39;none&#39;" in page and "samples not kept" in page
    with Image.open(board.with_name("board_m.png")) as picture:
        assert picture.width > 1500


def test_a_real_run(drawn_leaderboard: Leaderboard, finished_run: Path) -> None:
    """Its worst pair, float and quantized, leads to its report."""
    metrics = json.loads((finished_run / "metrics.json").read_text())
    values = json.loads((finished_run / "per_prompt.json").read_text())["metrics"]["psnr"]
    (name, cells), *others = table(drawn_leaderboard(finished_run)).items()
    assert name == "smoke" and not others
    assert cells[2:6] == ["2", "5.61", "8.81", f"{metrics['size_bytes'] / 1e6:.2f}"]
    assert float(cells[7].rstrip("*")) == pytest.approx(metrics["metrics"]["psnr"], abs=0.01)
    assert "x float" in cells[6]
    page = Path(f"{drawn_leaderboard(finished_run)}.html").read_text()
    (pair,) = re.findall(
        r'<a class="two" href="([^"]*)" title="([^"]*)"><img src="([^"]*)"[^>]*><img src="([^"]*)"', page
    )
    assert pair[0].endswith("/report.html#pairs") and f"PSNR {min(values):.3g} dB" in pair[1]
    shown = [Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) for data in pair[2:]]
    files = [
        Path(folder) / f"{values.index(min(values)):06d}.png"
        for folder in (reference_of(finished_run), finished_run / "samples")
    ]
    assert [one.tobytes() for one in shown] == [Image.open(file).tobytes() for file in files]


def reference_of(run: Path) -> str:
    return str(json.loads((run / "per_prompt.json").read_text())["reference"])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("clicks", "order"), [(0, "cba"), (1, "abc"), (2, "cba")])
def test_a_click_sorts(clicks: int, order: str, leaderboard: Leaderboard, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, name, 0, psnr) for name, psnr in (("a", 9.5), ("b", 10.0), ("c", 100.0))]
    click = "document.querySelector('[data-column=\"PSNR dB\"] button').click();"
    dom = after(Path(f"{leaderboard(*runs)}.html"), click * clicks)
    assert "".join(re.findall(r'class="name" data-key="(\w)"', dom)) == order
    assert ("aria-sort" in dom.split("<script>")[0].split("<thead>")[1]) == bool(clicks)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_an_order_is_best_first(leaderboard: Leaderboard, tmp_path: Path) -> None:
    """Most dB first, fewest bytes first, whichever way a number gets better."""
    sizes = {"a": 3_000_000, "b": 1_000_000, "c": 2_000_000}
    runs = [
        write_run(tmp_path / name, name, 0, psnr, size_bytes=sizes[name])
        for name, psnr in (("a", 9.5), ("b", 10.0), ("c", 100.0))
    ]
    script = """const orders = ["PSNR dB", "MB on disk", ""].map((label) => {
      order.value = label;
      order.dispatchEvent(new Event("change"));
      return [...document.querySelectorAll("tbody .name")].map((cell) => cell.dataset.key).join("");
    });
    document.title = orders.join(" ");"""
    assert "<title>cba bca cba</title>" in after(Path(f"{leaderboard(*runs)}.html"), script)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
@pytest.mark.parametrize(("words", "most", "hidden"), [("", "", ""), ("W4 c", "", "ab"), ("w", "1.5", "ac")])
def test_words_and_bytes_filter(words: str, most: str, hidden: str, leaderboard: Leaderboard, tmp_path: Path) -> None:
    sizes = {"a w4": 2_000_000, "b w8": 1_500_000, "c w4": 3_000_000}
    runs = [write_run(tmp_path / name, name, 0, 10.0, size_bytes=size) for name, size in sizes.items()]
    script = f'words.value = "{words}"; most.value = "{most}"; words.dispatchEvent(new Event("input"));'
    dom = after(Path(f"{leaderboard(*runs)}.html"), script)
    rows = re.findall(r'<tr data-megabytes="[^"]*"( hidden="")?>.*?class="name" data-key="(\w)', dom)
    assert "".join(name for gone, name in rows if gone) == hidden
    assert f"{3 - len(hidden)} of 3 shown" in dom


def after(page: Path, script: str) -> str:
    """What a browser makes of a page once the script has run."""
    text = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())  # which allows no other
    page = page.with_name("after.html")
    page.write_text(text.replace("</body>", f"<script>{script}</script></body>"))
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", page.as_uri()]
    home = {**os.environ, "HOME": str(page.parent)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=home).stdout


def per_prompt(folder: Path, psnr: list[float]) -> None:
    """A prompt that recurs stands for two."""
    file = folder / "per_prompt.json"
    values = {**json.loads(file.read_text()), "prompts": ["a", "b", "a", "c", "d", "e"], "metrics": {"psnr": psnr}}
    file.write_text(json.dumps(values))


def test_paired_differences(leaderboard: Leaderboard, tmp_path: Path) -> None:
    """Common noise cancels: the order is certain though the ± overlap; not where seeds differ or nothing is paired."""
    shared, offset = [[10.0, 50.0, 20.0, 40.0, 30.0, 60.0], [60.0, 30.0, 10.0, 20.0, 50.0, 40.0]], [0, 1, 2, 0, 1, 2]
    for seed, values in enumerate(shared):
        better = [value + 2 + extra for value, extra in zip(values, offset, strict=True)]
        per_prompt(write_run(tmp_path / f"good{seed}", "good", seed, sum(better) / 6), better)
        per_prompt(write_run(tmp_path / f"fair{seed}", "fair", seed, sum(values) / 6), values)
        write_run(tmp_path / f"poor{seed}", "poor", seed, 20.0 + seed)
    rows = table(leaderboard(f"{tmp_path}/good*", f"{tmp_path}/fair*", f"{tmp_path}/poor*"))
    difference, low, high = map(float, re.findall(r"[+-][\d.]+", rows["fair"][7]))
    assert difference == pytest.approx(-3, abs=0.01) and -4.5 < low < -3 < high < -1.5
    assert rows["good"][7] == rows["poor"][7] == "-"
    with open(tmp_path / "out/board.csv", newline="") as file:
        lines = {line["experiment"]: line for line in csv.DictReader(file)}
    assert float(lines["fair"]["above"]) == pytest.approx(difference, abs=0.01)
    assert float(lines["fair"]["above_low"]) == pytest.approx(low, abs=0.01) and not lines["good"]["above"]


def test_widths(drawn_leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table per pair of widths and one of methods; bold is what the best does not surely beat."""
    noise = [3.0, -1.0, 0.5, -2.0, 1.0, -1.5]
    quality = {("a", 8): 50.0, ("b", 8): 40.0, ("c", 8): 49.9, ("a", 4): 30.0, ("b", 4): 20.0}
    for place, ((name, bits), psnr) in enumerate(quality.items()):
        widths = {"weight": {"bits": bits}, "activation": {"bits": 8}}
        run = write_run(tmp_path / f"{name}{bits}", name, 0, psnr, config={"quant": widths})
        per_prompt(run, [psnr + value * (1 + place / 10) for value in noise])
    board = drawn_leaderboard(f"{tmp_path}/??", "--widths")
    text = Path(f"{board}.md").read_text()
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in text.splitlines()[2:7]}
    assert cells["method"] == ["W4A8", "W8A8"]
    assert [cell.startswith("**") for name in "abc" for cell in cells[name]] == [True, True, False, False, False, True]
    assert cells["c"][0] == "-" and list(cells)[2:] == ["a", "c", "b"]
    assert "### m W4A8 (4 pairs a seed)" in text and "### m W8A8" in text and text.count("± is the standard") == 1
    for name in ("board_m_widths.png", "board_m.png"):
        with Image.open(board.with_name(name)) as picture:
            assert picture.width > 800
    assert Path(f"{board}.html").read_text().count("<img ") == 2
    with open(f"{board}.csv", newline="") as file:
        assert [line["width"] for line in csv.DictReader(file)] == ["W4A8", "W4A8", "W8A8", "W8A8", "W8A8"]
    whole = drawn_leaderboard(f"{tmp_path}/??")
    assert "a W4A8" in table(whole)


def test_runs_with_other_inputs_are_neither_repeats_nor_seeds(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of prompts that was edited in between."""
    runs = [write_run(tmp_path / name, "w4a8", 0, 30.0) for name in ("before", "again")]
    edited = {"inputs": {"prompts": "others"}}
    runs += [write_run(tmp_path / f"after{s}", "w4a8", s, 20.0, config=edited) for s in (0, 1)]
    text = leaderboard(*runs).with_suffix(".md").read_text()
    assert "again repeats" in capsys.readouterr().err
    assert "inputs.prompts=p" in text and "inputs.prompts=others" in text


def test_too_few_prompts_have_no_interval(leaderboard: Leaderboard, tmp_path: Path) -> None:
    text = (
        leaderboard(write_run(tmp_path / "r", "w4a8", 0, 42.7, verdict=verdict("worse"))).with_suffix(".md").read_text()
    )
    assert "42.7" in text and "[" not in text.split("42.7", 1)[1].splitlines()[0]


def test_seeds_that_found_plans_of_their_own_have_their_mean_size(leaderboard: Leaderboard, tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{s}", "search", s, 30.0, size_bytes=2_000_000 + s * 1_000_000) for s in (0, 1)]
    with leaderboard(*runs).with_suffix(".csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["bytes"] == "2500000"


def test_a_damaged_file_leaves_out_its_run_alone(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, name, 0, 30.0) for name in ("whole", "cut")]
    (runs[1] / "metrics.json").write_text('{"model": "m", "exp')
    text = leaderboard(*runs).with_suffix(".md").read_text()
    assert "| whole |" in text and "| cut |" not in text
    assert "left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "policy", ["viditq.quant.description.policy.PlanFile", "viditq.quant.search.policy.SensitivitySearch"]
)
def test_a_plan_is_not_filed_under_the_width_of_its_recipe(
    leaderboard: Leaderboard, tmp_path: Path, policy: str
) -> None:
    bits = {"weight": {"bits": 4}, "activation": {"bits": 8}}
    uniform = write_run(tmp_path / "uniform", "uniform", 0, 30.0, config={"quant": bits})
    mixed = {"quant": {**bits, "policy": {"_target_": policy}}}
    planned = write_run(tmp_path / "planned", "planned", 0, 35.0, config=mixed)
    text = leaderboard(uniform, planned, "--widths").with_suffix(".md").read_text()
    assert "| planned |" not in text.split("m W4A8", 1)[1].split("###", 1)[0]


@pytest.mark.parametrize(
    ("weight", "activation", "width"), [(8, 8, "W8A8"), (4.0, 8, "W4A8"), (4, 16, ""), (None, 8, "")]
)
def test_another_library_is_filed_under_the_width_that_it_counts_as(
    leaderboard: Leaderboard, tmp_path: Path, weight: float | None, activation: float, width: str
) -> None:
    ours = {"quant": {"weight": {"bits": 8}, "activation": {"bits": 8}}}
    theirs = {"quant": {"policy": {"weight_bits": weight, "activation_bits": activation}}}
    first = write_run(tmp_path / "ours", "ours", 0, 30.0, config=ours)
    second = write_run(tmp_path / "theirs", "external/theirs", 0, 35.0, config=theirs)
    parts = leaderboard(first, second, "--widths").with_suffix(".md").read_text().split("### ")
    of_theirs = [part for part in parts if "| external/theirs |" in part][-1]
    assert of_theirs.startswith(f"m {width} (" if width else "m (")


OTHERS: dict[str, dict[str, Any]] = {  # how the title of their table names them -> what such a run has
    "seed 1": {"seed": 1},
    "other prompts": {"config": {"inputs": {"prompts": "others"}}},
    "other float samples": {"reference": "half the steps"},
}


# Slow: the other pairs of the two.
@pytest.mark.parametrize(
    ("apart", "widths"),
    [
        pytest.param(apart, widths, marks=[pytest.mark.slow] * (bool(widths) != (apart == "seed 1")))
        for apart in OTHERS
        for widths in ([], ["--widths"])
    ],
)
def test_rows_with_other_inputs_have_a_table_of_their_own(
    apart: str,
    widths: list[str],
    drawn_leaderboard: Leaderboard,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """However good, they are neither first nor bold nor in plots; most rows make the board."""
    bits = {"weight": {"bits": 4}, "activation": {"bits": 8}}
    given = {"seed": 0, "psnr": 50.0, **OTHERS[apart]}
    given["config"] = {**given.get("config", {}), "quant": bits}
    runs = [write_run(tmp_path / "lucky", "lucky", **given)]
    runs += [write_run(tmp_path / n, n, 0, psnr, config={"quant": bits}) for n, psnr in (("a", 30.0), ("b", 20.0))]
    board = drawn_leaderboard(*runs, *widths)
    picture = board.with_name("board_m.svg").read_bytes()
    text, width = Path(f"{board}.md").read_text(), " W4A8" if widths else ""
    first, second = text.split(f"### m{width} (4 pairs a seed)")[1].split(f"### m{width}, inputs 2: {apart} (4 pairs")
    assert re.findall(r"^\| (\w+) \| -", first, re.MULTILINE) == ["a", "b"] and "| lucky" in second
    assert "only beside rows of the same inputs" in second and "lucky" not in text.split("### m" + width)[0]
    page = Path(f"{board}.html").read_text()
    assert page.count("<table class") == 2 and f"<h2>m{width}, inputs 2: {apart}</h2>" in page
    assert page.index("<img ") < page.index(f"inputs 2: {apart}</h2>") and page.count("<img ") == 1 + len(widths)
    with open(f"{board}.csv", newline="") as file:
        assert [(line["inputs"], line["experiment"]) for line in csv.DictReader(file)] == [
            *(("1", "a"), ("1", "b"), ("2", "lucky"))
        ]
    alone = drawn_leaderboard(*runs[1:], *widths)
    assert picture == alone.with_name("board_m.svg").read_bytes()


def test_runs_without_a_metric_that_ranks_are_named(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They end nothing where other inputs have one."""
    labels = {"flicker": LABELS["flicker"]}
    runs = [write_run(tmp_path / "a", "a", 0, 30.0), write_run(tmp_path / "b", "b", 1, None, labels=labels)]
    text = leaderboard(*runs).with_suffix(".md").read_text()
    assert "| a |" in text and "| b |" not in text
    assert "left out: b of m has no metric that ranks runs" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"seed": 0'])
@pytest.mark.parametrize("name", ["run.json", "metrics.json", "per_prompt.json"])
def test_a_file_that_is_no_run_s_is_left_out(
    name: str, content: str, leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [write_run(tmp_path / name, name, 0, 30.0) for name in ("whole", "other")]
    (runs[1] / name).write_text(content)
    assert list(table(leaderboard(*runs))) == ["whole"]
    assert f"left out: {runs[1] / name} is" in capsys.readouterr().err


def test_steps_are_measured_never_those_of_an_emulation(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plot and the order of the column know measured integers alone; sampling seconds count for nothing."""
    write_run(tmp_path / "slow", "slow", 0, 40.0, seconds={"generate": 1.0}, speed=speed(40.0))
    write_run(tmp_path / "quick", "quick", 0, 30.0, seconds={"generate": 9.0}, speed=speed(20.0))
    write_run(tmp_path / "fake", "fake", 0, 20.0, speed=speed(10.0, "fake"))
    write_run(tmp_path / "none", "none", 0, 10.0)
    board = leaderboard(*(tmp_path / name for name in ("slow", "quick", "fake", "none")))
    steps = [cells[6] for cells in table(board).values()]
    assert steps == ["40 ms, 1.50x float", "20 ms, 3.00x float", "10 ms, 6.00x float, emulated", "not measured"]
    html = Path(f"{board}.html").read_text()
    cells = re.findall(r'data-key="([^"]*)" data-label="step"', html)
    assert cells == ["40.0", "20.0", "nan", "nan"] and "<small>6.00x float, emulated</small>" in html
    assert "measured step, ms" in html and "different conditions" not in html
    with open(f"{board}.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["step_seconds"] for line in lines] == ["0.04", "0.02", "0.01", ""]
    assert [line["step_emulated"] for line in lines] == ["0", "0", "1", ""]
    assert [line["memory_bytes"] for line in lines] == ["1000", "1000", "1000", ""]
    assert "not plotted" not in capsys.readouterr().err


def test_a_row_of_seeds_has_one_step_and_other_threads_are_told(leaderboard: Leaderboard, tmp_path: Path) -> None:
    for seed, milliseconds in enumerate((10.0, 20.0, 90.0)):
        write_run(tmp_path / f"a{seed}", "a", seed, 40.0, speed=speed(milliseconds) if seed else None)
        write_run(tmp_path / f"b{seed}", "b", seed, 30.0, speed=speed(30.0, threads=2))
    board = leaderboard(f"{tmp_path}/a*", f"{tmp_path}/b*")
    assert [cells[6] for cells in table(board).values()] == ["55 ms, 1.83x float", "30 ms, 2.00x float"]
    text = Path(f"{board}.md").read_text()
    assert "different conditions" in text and "1 thread on" in text and "2 threads on" in text


def test_a_plot_that_no_run_has_is_named(
    leaderboard: Leaderboard, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a", "a", 0, 40.0, speed=speed(10.0, "fake"))
    leaderboard(tmp_path / "a")
    assert "not plotted against measured step, ms: no run has a step" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no run has a step that was measured without emulation"):
        leaderboard(tmp_path / "a", "--costs", "step")
