"""``--init``: a new teacher that begins with another model's weights, whatever its classes and its latent size.

The positions, a function of the shape alone, are the new model's own. Another set of classes gets a new label
table, of which the null row is the other model's. All else is taken; weights that do not fit are refused by name.
"""

from typing import Any

import torch

from models import DiT
from runtime.cli import UserError, shortened

LABELS = "y_embedder.embedding_table.weight"
SHAPE = ("hidden_size", "num_heads", "depth", "patch_size", "in_channels", "learn_sigma")  # what weights must fit


def init_shape(source: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The shape of a model that begins with weights of the config ``source``: what the user has ``given`` must agree.

    ``UserError`` names what differs.
    """
    taken = {name: value for name, value in source.items() if name not in ("num_classes", "input_size")}
    differing = [
        f"{name} {given[name]} instead of {taken[name]}"
        for name in SHAPE
        if name in given and name in taken and given[name] != taken[name]
    ]
    if differing:
        raise UserError(f"--init: its weights are for another model ({'; '.join(differing)})")
    return taken | given


@torch.no_grad()
def start_from(model: DiT, source: DiT, keep_labels: bool = False) -> dict[str, Any]:
    """Give ``model`` the weights of ``source``; returns {"taken", "new", "dropped"}, for the log and for provenance.

    "taken" counts the tensors, the others are names. ``keep_labels``: the classes are the same, so their embeddings
    are taken as well. ``UserError`` where other weights than the label table or the positions do not fit.
    """
    if type(model) is not type(source):
        names = type(source).__name__, type(model).__name__
        raise UserError(f"--init: holds a {names[0]}, which a {names[1]} cannot begin with")
    if model.process != source.process:
        raise UserError(f"--init: is of the process {source.process}, not of {model.process}")
    init_shape(source.config, model.config)
    own, theirs = model.state_dict(), source.state_dict()
    new = [name for name in own if name not in theirs]
    dropped = [name for name in theirs if name not in own]
    own_by_shape = {"pos_embed"} if model.pos_embed.shape != source.pos_embed.shape else set()
    if LABELS in own and LABELS in theirs and not keep_labels:
        own_by_shape.add(LABELS)
    unfit = [
        f"{name} {tuple(theirs[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & theirs.keys() - own_by_shape
        if own[name].shape != theirs[name].shape
    ]
    if unfit:
        hint = "; leave out --keep-labels for other classes" if any(LABELS in text for text in unfit) else ""
        raise UserError(f"--init: its weights do not fit ({shortened(sorted(unfit), 4)}){hint}")
    taken = [name for name in own if name in theirs and name not in own_by_shape]
    for name in taken:
        own[name].copy_(theirs[name])
    if LABELS in own_by_shape and _has_null_row(model) and _has_null_row(source):
        own[LABELS][-1] = theirs[LABELS][-1]
    return {"taken": len(taken), "new": sorted([*new, *own_by_shape]), "dropped": dropped}


def _has_null_row(model: DiT) -> bool:
    """Whether the last row of a model's label table is that of no class."""
    classes = model.config.get("num_classes", 1000)
    return len(model.state_dict()[LABELS]) > classes
