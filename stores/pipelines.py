"""A saved pipeline (pipeline_ard.py) without its weights: the code that it needs, and the names of its classes.

The code is one file of the few parts of this repository that drawing a sample takes, each copied as it stands.
``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)`` of diffusers runs it, without this repository on
Python's path and whatever other ``models.py`` there is.
"""

import ast
import json
from pathlib import Path

from runtime.cli import UserError
from runtime.files import read_lines

ROOT = Path(__file__).resolve().parent.parent
# The names taken from each of our files, in an order in which each finds its imports; None is the whole file.
PARTS: dict[str, tuple[str, ...] | None] = {
    "models.py": None,
    "models_ard.py": None,
    "models_pixart.py": None,
    "runtime/errors.py": ("UserError",),
    "runtime/cli.py": ("FETCHING",),
    "runtime/files.py": ("quiet_hub", "cached_snapshot"),
    "runtime/paths.py": None,
    "runtime/precision.py": ("DTYPES",),
    "runtime/provenance.py": ("weights_hash",),
    "runtime/randomness.py": ("STREAMS", "generator", "noise"),
    "runtime/text.py": (
        *("WORDS", "T5", "T5_FILES", "EXPECTED", "VOCABULARY", "clean", "WordEncoder", "T5Encoder", "_is_folder"),
        *("caption_encoder", "encode"),
    ),
    "runtime/vae.py": ("IMAGES_AT_ONCE", "decode_latents"),
    "stores/images.py": ("to_uint8",),
    "pipeline_ard.py": ("STRICT", "MODULE", "CARD", "ARDTransformer", "ARDPipeline"),
}
HEAD = '''"""A student of ARD as a pipeline of diffusers; its parts are copied from the repository that made it.

    pipe = diffusers.DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
"""
'''
TAIL = """
CODE = __import__("pathlib").Path(__file__).read_text()  # for a pipeline that is saved again
"""


def portable_code() -> str:
    """The source of the file."""
    trees = {name: ast.parse((ROOT / name).read_text()) for name in PARTS}
    ours = {Path(name).stem for name in PARTS} | {path.name for path in ROOT.iterdir() if path.is_dir()}
    imports, bodies = [], []
    for name, wanted in PARTS.items():
        lines = (ROOT / name).read_text().splitlines()
        for node in trees[name].body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                imports += [node] if (module or "").split(".")[0] not in ours else []
            elif defined(node) and (wanted is None or defined(node) & set(wanted)):
                first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))])
                bodies.append("\n".join(lines[first - 1 : node.end_lineno]))
    body = "\n\n\n".join(bodies)
    used = {node.id for node in ast.walk(ast.parse(body)) if isinstance(node, ast.Name)}
    needed: dict[str, None] = {}  # each name once, however many of our files import it
    for node in imports:
        for alias in node.names:
            if (alias.asname or alias.name.split(".")[0]) in used:
                kept = (
                    ast.ImportFrom(node.module, [alias], 0) if isinstance(node, ast.ImportFrom) else ast.Import([alias])
                )
                needed[ast.unparse(kept)] = None
    return HEAD + "\n" + "\n".join(sorted(needed)) + "\n\n\n" + body + "\n" + TAIL


def defined(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines, or changes an item of."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def read_labels(path: str | Path, count: int) -> list[str]:
    """Names of ``count`` classes: a line for each, or JSON with id2label, as DiTPipeline's model_index.json has it."""
    lines = read_lines("--labels", path)
    names = [line.strip() for line in lines]
    if str(path).endswith(".json"):
        try:
            given = json.loads("\n".join(lines))
            given = given.get("id2label", given)
            names = [str(given[str(i)]) for i in range(len(given))]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f"--labels {path}: has no id2label with a name for each of 0, 1, ...") from None
    if len(names) != count or not all(names):
        raise UserError(
            f"--labels {path}: has {len([name for name in names if name])} names, the model {count} classes"
        )
    return names
