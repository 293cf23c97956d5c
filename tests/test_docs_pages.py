"""The documentation's site: what is drawn from code is whole, and no link is broken."""

import subprocess
import sys

from tests.forked import ROOT
from tests.scripts.test_scripts import load


def test_every_key_and_option_is_in_the_reference():
    page = load("docs/pages.py").config_page()
    for path in (ROOT / "conf").rglob("*.yaml"):
        group = path.parent.relative_to(ROOT / "conf").as_posix()
        if not group.startswith((".", "hydra")) and not group.endswith("base"):
            section = page.split(f"\n## {group}=\n")[1].split("\n## ")[0]
            assert f"| `{path.stem}` | " in section, path
    for key, default in (("batch_size", "8"), ("calibration.num_buckets", "20"), ("gate", "None")):
        assert f"| `{key}` | `{default}` | " in page
    assert "| `psnr` | PSNR |" in page  # a yaml without a comment
    assert "| `fp16` | `python run.py experiment=fp16`: The float model in half precision" in page
    assert not [
        line
        for line in page.splitlines()
        if line.startswith("| `") and line.endswith("` |  |") and line.count("|") == 3
    ]


def test_links_of_the_first_page_hold_from_docs():
    at_home = load("docs/pages.py").at_home
    text = (
        "[a](docs/a.md#b) [docs/g_h.md](docs/g_h.md) [c](CHANGELOG.md) [d](https://x.y/docs/) ![e](docs/e.gif) [f](#g)"
    )
    assert at_home(text) == "[a](a.md#b) [g_h](g_h.md) [c](changes.md) [d](https://x.y/docs/) ![e](e.gif) [f](#g)"


def test_arguments_in_sentences_become_a_table():
    arguments = load("docs/arguments.py")
    text = "Do it.\n\na: of a <run>, or `<b>`. b, c (new):\n    such as 1: 2; d: else. Raises UserError.\n\nbd: none."
    sections = [
        "Do it.",
        "Args:\n    a: of a &lt;run>, or `<b>`.\n    b, c: (new) such as 1: 2\n    d: else.",
        "Raises UserError.",
    ]
    assert arguments.tabled(arguments.plain(text), ["a", "b", "c", "d"]) == "\n\n".join([*sections, "bd: none."])


def test_the_site_builds_and_no_link_is_broken(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "reference" / "api.html").read_text().count("load_quantized") > 2
    assert "an artifact (&lt;run&gt;/quantized)" in (tmp_path / "site" / "reference" / "api.html").read_text()
    notebook = (tmp_path / "site" / "notebook.html").read_text()
    assert "data:image/gif;base64," in notebook and "%%sh" not in notebook and "dB" in notebook
