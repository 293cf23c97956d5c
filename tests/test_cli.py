"""The command line: what is said first and what is not imported for it, Ctrl-C, folders, quotes."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from viditq import checks, cli, ending
from viditq.config import RANKS
from viditq.errors import quoting
from viditq.quant.description import registry

ROOT = Path(__file__).parents[1]
FIRST = "viditq: reading the configuration\n"
SLOW = ("diffusers", "lightning", "torchmetrics", "transformers", "wandb")
# Bad values of every part; of the first ones it is said whether torch may be imported for them.
BAD = {
    "seed=-1": False,
    "+model.foo=1": False,
    "+metric.psnr.foo=1": False,
    "trainer.devices=-3": False,
    "cache_dir=/": False,
    "metric.psnr=null": False,
    "calibration.num_buckets=1000000": False,
    "model.dtype=float8": False,
    "model.path=/no/such/folder": False,
    "gate={nope: '> 1'}": False,
    "model.keep_float=[nope]": False,
    "quant.rules=[{pattern: nope, keep_float: true}]": False,
    "model.pipeline=PixArtAlphaPipelin": False,
    "model.pipeline=PixArtTransformer2DModel": False,
    "model.pipeline=StableDiffusion3Pipeline": False,
    "model.pipeline=FluxImg2ImgPipeline": False,
    "backend=nope": False,
    "trainer.accelerator=nope": False,
    "trainer.devices=x": False,
    "quant.weight.bits=17": True,
    "quant.segments=[0,0.5]": True,
    "data.num_prompts=0": True,
}
REFUSE = """
import sys
sys.path.insert(0, {tests!r})
from shrunk import SHRUNK, compose_config
from viditq.cli import guarded_run
from pathlib import Path
for override, torch in {bad!r}.items():
    try:
        guarded_run(compose_config(*SHRUNK, override), Path({folder!r}))
    except SystemExit as error:
        print(override, error.code, [name for name in {slow!r} if name in sys.modules], torch or "torch" in sys.modules)
"""


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k not in ("HYDRA_FULL_ERROR", "RANK", "SLURM_PROCID")}


def run_py(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "run.py"), *arguments]
    env = environment() | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_bad_values_are_refused_before_what_takes_long_is_imported(tmp_path: Path) -> None:
    names = {"tests": str(ROOT / "tests"), "bad": BAD, "folder": str(tmp_path / "run"), "slow": SLOW}
    done = subprocess.run(
        [sys.executable, "-c", REFUSE.format(**names)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    told = [line for line in done.stdout.splitlines() if not line.startswith("viditq: loading torch")]
    assert told == [f"{override} 2 [] {torch}" for override, torch in BAD.items()], done.stderr
    assert not (tmp_path / "run").exists()


def test_backends_that_are_known_without_torch_are_all() -> None:
    assert tuple(sorted(checks.BACKENDS)) == tuple(sorted(registry.BACKENDS.names()))


def test_a_first_line_and_none_where_others_read_the_output() -> None:
    assert run_py("experiment=smoke", "foo=1").stdout == FIRST
    assert run_py("experiment=smoke", "--cfg", "job").stdout.startswith("name: smoke\n")


@pytest.mark.parametrize("words", [("-m", "--cfg", "job", "quant=w8a8,w4a8"), ("-m", "--help", "quant=w8a8,w4a8")])
def test_what_shows_one_configuration_says_so_of_a_sweep(words: tuple[str, ...]) -> None:
    done = run_py(*words)
    assert done.returncode == 2 and "show one configuration: leave -m out" in done.stderr
    assert "Traceback" not in done.stderr and "add --multirun" not in done.stderr


def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    for launched, name in RANKS.items():
        monkeypatch.delenv(launched, raising=False)
        monkeypatch.setenv(name, "1")
    assert cli.first_process(), "a rank of nobody's"
    for launched, name in RANKS.items():
        for rank, first in (("0", True), ("1", False)):
            with monkeypatch.context() as patch:
                patch.setenv(launched, "4")
                patch.setenv(name, rank)
                assert cli.first_process() is first


# Ctrl-C ---------------------------------------------------------------------------------------------------------------

STOPPED_IN = {
    "a loop": "while True: time.sleep(0.01)",
    "a destructor": "while True: Slow()",
    "an except that takes all exceptions": """
while True:
    try: time.sleep(0.01)
    except Exception: pass
""",
}
LOOP = """
import signal, sys, time
from viditq import checks, cli, ending
class Slow:
    def __del__(self): time.sleep(0.05)
def main():
    print("ready", flush=True)
{body}
sys.argv = ["run.py", "--quiet"]
ending.leave(lambda: cli.guarded_main(main))
"""


@pytest.mark.parametrize(
    ("where", "number"), zip(STOPPED_IN, (signal.SIGINT, signal.SIGINT, signal.SIGTERM), strict=True)
)
def test_ctrl_c_and_sigterm_are_one_line_and_a_status(where: str, number: signal.Signals) -> None:
    body = "\n".join(f"    {line}" for line in STOPPED_IN[where].splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.format(body=body)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    by = ending.SIGNALS[number]
    assert err.strip() == f"stopped by {by}. Finished work is kept: the same command goes on from there."


# The end of the process -----------------------------------------------------------------------------------------------

END = """
import atexit, sys, threading, time
from viditq import ending
class Lasting:
    def __del__(self): print("taken apart")
kept = Lasting()
atexit.register(print, "registered")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
def main():
    print("main")
    {end}
{before}
ending.leave(main)
"""


@pytest.mark.parametrize(
    ("before", "end", "status", "words"),
    [
        ("", "return 3", 3, ["main", "thread", "registered"]),
        ("", "sys.exit(4)", 4, ["main", "thread", "registered"]),
        ("", "raise KeyError", 1, ["main", "thread", "registered", "taken apart"]),
        (
            "import cProfile; cProfile.Profile().enable()",
            "return 3",
            3,
            ["main", "thread", "registered", "taken apart"],
        ),
    ],
)
def test_a_process_leaves_without_taking_everything_apart(before: str, end: str, status: int, words: list[str]) -> None:
    """What waits for the end is done: threads, what is registered, what is printed; also where somebody profiles."""
    code = END.format(before=before, end=end)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=60
    )
    assert (done.returncode, done.stdout.split("\n")[:-1]) == (status, words), done.stderr


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, where commands start: a folder of somebody's files in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("")
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hydra.run.dir=/"], ["'/'", "hydra.run.dir=FOLDER"]),
        (["hydra.run.dir=photos/../../../../../../../../../.."], ["no folder to write to"]),
        (["hydra.run.dir="], ["''", "hydra.run.dir=FOLDER"]),
        (["hydra.run.dir=photos"], ["photos holds files that are of no run", "holiday.jpg"]),
        (["hydra.run.dir='~/photos'"], ["photos holds files that are of no run"]),
        (["hydra.run.dir=."], ["holds files that are of no run", "file"]),
        (["hydra.run.dir=file/run"], ["file/run", "a file is where a folder has to be"]),
        (["name=.."], ["name='..'"]),
        (["model.name=../../x"], ["model.name='../../x'"]),
        (["seed=0,1", "hydra.sweep.dir=/", "-m"], ["'/'", "hydra.sweep.dir=FOLDER"]),
    ],
)
def test_folders_that_no_run_may_take(overrides: list[str], words: list[str], home: Path) -> None:
    before = sorted(home.rglob("*"))
    done = run_py("experiment=smoke", *overrides, cwd=home)
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert sorted(home.rglob("*")) == before, "nothing is written"


def test_home_is_expanded(home: Path) -> None:
    """As far as the prompts, which are missing: Hydra has made the folder in the right place, which stays, empty."""
    (here := home / "elsewhere").mkdir()
    where = ['hydra.run.dir="~/my run, (1) ü"', 'cache_dir="~/cache"', "data=prompt_file"]
    done = run_py("experiment=smoke", *where, 'data.path="~/no such file.txt"', cwd=here)
    assert done.returncode == 2 and "no such file.txt" in done.stderr
    assert (home / "my run, (1) ü").is_dir() and not [*here.iterdir()]


@pytest.mark.parametrize(
    "value",
    ["/a b/c.txt", "/a,b", "/a (1)", "~/x", "/über", "/it's", '/so "called"', "/back\\slash", "/end\\", "{a}[b]"],
)
def test_quoted_as_the_message_says_a_path_arrives(value: str) -> None:
    shell = quoting(f"data.path={value}").partition("shell: ")[2]
    word = subprocess.run(["sh", "-c", f"printf %s {shell}"], capture_output=True, text=True, check=True).stdout
    (parsed,) = OverridesParser.create().parse_overrides([word])
    assert (parsed.key_or_group, parsed.value()) == ("data.path", value)


def test_a_message_names_the_quotes(configure: Callable) -> None:
    done = run_py("experiment=smoke", "data=prompt_file", "data.path=/my prompts (1), new.txt")
    assert done.returncode == 2 and """'data.path="/my prompts (1), new.txt"'""" in done.stderr
    assert re.search(r"^error: ", done.stderr, re.MULTILINE)
