"""The laws of the house: who may import whom, how much is where, what is documented. Read off the source, not run."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGES = ("bench", "costs", "diffusion", "evaluations", "lab", "runtime", "stores")
FILES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])
MODELS = ("models", "models_ard", "models_pixart")
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def module_name(path: Path) -> str:
    """The dotted name of a file of ours; a package's is that of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


OURS = {module_name(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, at its top or within a function."""
    found = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports by full names"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (members & OURS.keys()) or {node.module}
    return found & OURS.keys()


def is_script(path: Path) -> bool:
    """Whether a file is there to be run by its path: at the root, with a last block for it."""
    return path.parent == ROOT and any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in TREES[path].body
    )


def definitions(path: Path, *kinds: type) -> list[tuple]:
    """Every function or class of a file, with the class or function or module around it."""
    nested = [(parent, node) for parent in ast.walk(TREES[path]) for node in ast.iter_child_nodes(parent)]
    return [(parent, node) for parent, node in nested if isinstance(node, kinds)]


@pytest.mark.parametrize(
    "package, allowed",
    [
        ("runtime", {"runtime", "models"}),
        ("stores", {"stores", "runtime", "diffusion", *MODELS}),
        ("costs", {"costs", "stores", "runtime", "diffusion", "discriminator", "losses", "presets", *MODELS}),
        ("evaluations", {"evaluations", "sampler", "stores", "runtime", "models_ard"}),
    ],
)
def test_a_lower_floor_knows_nothing_of_the_floors_above(package, allowed):
    for name, path in OURS.items():
        if name.split(".")[0] == package:
            assert {other.split(".")[0] for other in imports(path)} <= allowed, name


def test_no_module_imports_a_script():
    scripts = {module_name(path) for path in FILES if is_script(path)}
    assert {"demo", "train_ARD", "sample_ARD"} <= scripts and "trainer" not in scripts
    for path in FILES:
        assert not imports(path) & scripts, path


def test_imports_have_no_cycle():
    left = {name: imports(path) for name, path in OURS.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


def test_the_root_holds_twenty_files_of_python_at_most():
    """``pipeline_ard.py`` and ``app.py`` are there because people who only use a student look for them there."""
    assert len(list(ROOT.glob("*.py"))) <= 20


@pytest.mark.parametrize("files, most", [("train*.py", 300), ("sample*.py", 170), ("models_ard.py", 300)])
def test_verbs_and_the_method_stay_short(files, most):
    for path in ROOT.glob(files):
        if path.name not in ("trainer.py", "sampler.py"):
            assert len(path.read_text().splitlines()) <= most, path


def test_what_a_script_does_is_read_on_a_page():
    for path in FILES:
        for parent, node in definitions(path, ast.FunctionDef):
            if is_script(path) and isinstance(parent, ast.Module) and node.name == "run":
                assert node.end_lineno - node.lineno < 70, path


def test_every_module_and_every_public_class_and_function_says_what_it_does():
    """``build_parser``, ``run`` and the ``run_...`` of a command are told by their parser's description.

    A method of a class with bases may leave it to the method that it replaces.
    """
    for path, tree in TREES.items():
        assert ast.get_docstring(tree), path
        for parent, node in definitions(path, ast.FunctionDef, ast.ClassDef):
            public = not node.name.startswith("_") and not isinstance(parent, ast.FunctionDef)
            told = node.name in ("build_parser", "run") or node.name.startswith("run_")
            command = isinstance(parent, ast.Module) and told
            if public and not command and not inherits(path, parent, node):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def inherits(path: Path, parent: ast.AST, method: ast.AST) -> bool:
    """Whether a class of this file that is a base of ``parent`` has this method, with a docstring."""
    bases = {ast.unparse(base) for base in parent.bases} if isinstance(parent, ast.ClassDef) else set()
    return any(
        isinstance(owner, ast.ClassDef) and owner.name in bases and node.name == method.name and ast.get_docstring(node)
        for owner, node in definitions(path, ast.FunctionDef)
    )


def test_options_as_a_namespace_end_where_the_command_line_ends():
    """What is below a script, or below a command of a library, takes keyword arguments."""
    for path in FILES:
        if is_script(path) or path == ROOT / "runtime/cli.py":
            continue
        for _, node in definitions(path, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotations = [ast.unparse(argument.annotation) for argument in arguments if argument.annotation]
            takes = any("Namespace" in text for text in annotations) or "args" in {a.arg for a in arguments}
            commands = ("verify", "export", "slim", "run")
            assert not takes or node.name in commands or node.name.startswith("run_"), f"{path}: {node.name}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_the_main_block_comes_last(path):
    """What is defined after it does not exist yet when the file is run."""
    assert "__name__ == '__main__'" not in "".join(map(ast.unparse, TREES[path].body[:-1]))


def test_tests_lie_where_their_sources_lie():
    """A test file in a folder belongs to a file of that package; its name is unique, as pytest needs it.

    ``faults`` mirrors nothing: what lies there damages and kills whatever is read and written by any package.
    """
    tests = list((ROOT / "tests").rglob("test_*.py"))
    assert len({path.name for path in tests}) == len(tests)
    for path in tests:
        folder = path.parent.relative_to(ROOT / "tests")
        if folder not in (Path(), Path("faults")):
            assert (ROOT / folder / path.name.removeprefix("test_")).is_file(), path


def test_tests_import_the_real_packages():
    for package in PACKAGES:
        assert Path(__import__(package).__file__) == ROOT / package / "__init__.py"
        assert not (ROOT / "tests" / package / "__init__.py").exists()
