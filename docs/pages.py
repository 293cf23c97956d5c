"""Pages of the documentation's site that are drawn from other files; a hook of mkdocs (`make docs`).

index.md is README.md, changes.md is CHANGELOG.md, notebook.md is examples/quickstart.ipynb. reference/config.md is
written from conf/: each group's options with what their first comment says, and every key of the configuration with
its default and its comment.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
LINK = re.compile(r"\]\((?!https?://|#)([^)]+)\)")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs with the pages that it found in docs/."""
    from mkdocs.structure.files import File

    pages = {
        "index.md": at_home((ROOT / "README.md").read_text()),
        "changes.md": at_home((ROOT / "CHANGELOG.md").read_text()),
        "notebook.md": notebook_page((ROOT / "examples" / "quickstart.ipynb").read_text()),
        "reference/config.md": config_page(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def at_home(text: str) -> str:
    """Links of a page of the repository's root as they are from docs/."""
    homes = {"CHANGELOG.md": "changes.md", "README.md": "index.md", "examples/quickstart.ipynb": "notebook.md"}
    text = re.sub(r"\[docs/([\w/]+)\.md\]", r"[\1]", text)  # a link that is called by its file
    return LINK.sub(lambda m: f"]({homes.get(m[1], m[1].removeprefix('docs/'))})", text)


def notebook_page(text: str) -> str:
    """Text, code and outputs of a notebook's cells, its pictures inside."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        shell = source.startswith("%%sh\n")
        parts.append(f"```{'sh' if shell else 'python'}\n{source.removeprefix('%%sh' + chr(10))}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            for kind in ("image/gif", "image/png"):
                if kind in output.get("data", {}):
                    picture = "".join(output["data"][kind]).replace("\n", "")
                    parts.append(f'<img alt="{output["data"]["text/plain"][0]}" src="data:{kind};base64,{picture}">')
    return "\n\n".join(parts) + "\n"


def config_page() -> str:
    """Every key of conf/config.yaml, and every group with its options."""
    root = (CONF / "config.yaml").read_text().partition("\nhydra:")[0]
    lines = ["# Configuration", "", "Drawn from `conf/`. `viditq --cfg job` prints it whole for a command line.", ""]
    lines += ["## Keys of a run", "", "| key | default | |", "|---|---|---|"]
    lines += [row(*found) for found in keys(root)]
    for folder in sorted({path.parent for path in CONF.rglob("*.yaml")} - {CONF}):
        group = folder.relative_to(CONF).as_posix()
        if group.startswith("hydra") or group.endswith("base"):
            continue
        lines += ["", f"## {group}=", "", "| option | |", "|---|---|"]
        lines += [
            f"| `{path.stem}` | {cell(as_code(said(path.read_text())))} |" for path in sorted(folder.glob("*.yaml"))
        ]
    return "\n".join(lines) + "\n"


def keys(text: str) -> list[tuple[str, str, str]]:
    """Key, default and comment of each line of a yaml that holds a value."""
    found, path = list[tuple[str, str, str]](), list[str]()
    for line in text.partition("defaults:")[2].splitlines()[1:]:
        match = re.match(r"^( *)([\w.]+):(.*)$", line)
        if not match or line.lstrip().startswith("-"):
            continue
        path = [*path[: len(match[1]) // 2], match[2]]
        value, _, comment = match[3].partition(" #")
        if value.strip():
            found.append(
                (
                    ".".join(path),
                    str(yaml.safe_load(value.replace("${", "$ {")) if "${" not in value else value),
                    comment,
                )
            )
    return found


def row(key: str, default: str, comment: str) -> str:
    return f"| `{key}` | `{default.strip()}` | {cell(comment.strip())} |"


def first_comment(text: str) -> str:
    """The comment that a file begins with, after its @package line."""
    lines = [line for line in text.splitlines() if not line.startswith("# @package")]
    kept = []
    for line in lines:
        if not line.startswith("#"):
            break
        kept.append(line.lstrip("# "))
    return " ".join(kept)


def said(text: str) -> str:
    """A file's first comment; of a metric, which has none where docs/metrics.md tells all, what tables call it."""
    name = re.search(r"^name: (.+)$", text, re.MULTILINE)
    comment = first_comment(text)
    return comment or (name[1] if name and "_target_: viditq.metrics" in text else "")


def as_code(comment: str) -> str:
    """A comment that begins with the command of an experiment: that command (its words with =) as code."""
    return re.sub(r"^(python run\.py(?: [\w./]+=\S+)+)", r"`\1`:", comment)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")
