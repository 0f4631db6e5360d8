"""`pip install -e .` puts a clone on the path of an environment: its modules are found from any folder, and are its."""

import os
import shutil
import subprocess
import sysconfig
import venv

from helpers import ROOT


def test_an_editable_installation_finds_the_clones_modules(tmp_path):
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".*", "results", "assets", "tests", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=ignored)
    venv.create(tmp_path / "environment", with_pip=False)
    python = tmp_path / "environment" / "bin" / "python"
    # Offline: setuptools and pip are this environment's.
    environment = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"]}
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "-e", clone]
    installed = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    code = "import importlib.util as u, sys; print([u.find_spec(name).origin for name in sys.argv[1:]])"
    names = sorted(
        {path.stem for path in ROOT.glob("models*.py")} | {"pipeline_ard", "trainer", "lab.report", "stores"}
    )
    found = subprocess.run([python, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.count(str(clone)) == len(names), found.stdout


def test_every_module_and_package_is_named_in_the_project():
    tables = (ROOT / "pyproject.toml").read_text()
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("[a-z]*/**/__init__.py")}
    modules = {path.stem for path in ROOT.glob("*.py") if "if __name__" not in path.read_text()} | {"pipeline_ard"}
    for name in (packages | modules) - {"docs", "tests"}:
        assert f'"{name}"' in tables, name
