"""scripts/search_plan.py: what it takes, and what its messages name. tests/test_search.py runs it."""

import errno
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from viditq.cli import user_message
from viditq.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "search_plan.py"


def load_script() -> ModuleType:
    """The script as a module, the configuration registered."""
    spec = importlib.util.spec_from_file_location("search_plan", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.config.register()
    return module


def test_search_plan_names_its_own_folder(tmp_path: Path) -> None:
    """Messages name --out, and what the script would ignore is refused."""
    script = load_script()
    refused = {
        "hydra.run.dir=x": "with --out FOLDER",
        "hydra/launcher=joblib": "nothing is swept",
        "launcher=joblib": "nothing is swept",
        "stages=[search]": "[prompts,calibrate,search]",
        "quant/policy=uniform": "the policy is sensitivity",
    }
    for override, words in refused.items():
        with pytest.raises(UserError, match=re.escape(f"does not take {override}. ")) as error:
            script.search_all([override], [], tmp_path)
        assert words in str(error.value)
    folder = tmp_path / "tiny_image" / "plan"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"name": "other"}')
    with pytest.raises(UserError, match="--out FOLDER") as error:
        script.search_all(["model=tiny_image"], [], tmp_path)
    assert "hydra.run.dir" not in str(error.value)
    taken = OSError(errno.ENOTDIR, "Not a directory", "there")
    assert (user_message(taken, script.CHOICE) or "").endswith("Choose another with --out FOLDER.")
