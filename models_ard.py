"""ARD: the student that sees its whole trajectory ("Autoregressive Distillation of Diffusion Transformers", 2025).

The student is the teacher plus a diff of four things: its input is a trajectory instead of one point; each point is
conditioned on its own time; in the lower N blocks a point's queries also look at earlier points; each step has a head.

    B batch   S steps (points of the history, noisiest first)   T tokens of a point   D width
    C, H, W the latent   h heads   d head width   N = history_layers, the depth of the history

A step k = 0 .. S-1 is the paper's s = S - k: conditioned on the time 999 (S - k) / S, whatever the grid, it reads point
k and predicts point k + 1. (For other processes than ddpm times are on their scale, ``models.PROCESS_TIMES``.) Points
of one trajectory are folded into the batch (B * S, T, D), so the teacher's blocks serve unchanged, adaLN runs once per
point, and blocks above N attend within a point by themselves. In the lower N blocks only the function that computes
attention differs: ``TeacherForcedAttention`` has all steps at once, for training; ``KVCache`` has one after another,
for sampling. Neither needs a mask.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from models import PROCESS_TIMES, AttentionFn, DiT, attend

MASKS = ("M1", "M2", "M3", "M4")
STUDENTS: dict[type[DiT], type["ARD"]] = {}  # of each class of teachers; models_pixart.py adds its own


def visible_steps(mask: str, step: int) -> list[int]:
    """The steps whose points the given step may look at, itself last (paper, Fig. 3b). The one place that says so.

    M1 itself (step distillation); M2 the previous one too; M3 the first, pure noise, too; M4 all earlier ones too.
    """
    earlier = {"M1": [], "M2": [step - 1], "M3": [0], "M4": list(range(step))}[mask]
    return [k for k in earlier if 0 <= k < step] + [step]


def method_name(steps: int, mask: str, history_layers: int) -> str:
    """What the paper calls a student of this kind."""
    return "KD" if steps == 1 else "ARD" if history_layers and mask != "M1" else "step distillation"


#################################################################################
#                      Attention to history, in two ways                        #
#################################################################################


class TeacherForcedAttention:
    """Attention of all S steps at once, each to the points that it may see: block-causal without a masked pair."""

    def __init__(self, mask: str, steps: int):
        self.visible = [visible_steps(mask, k) for k in range(steps)]

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v: (B * S, h, T, d) -> (B * S, h, T, d)."""
        steps = len(self.visible)
        queries, keys, values = (x.unflatten(0, (-1, steps)).unbind(1) for x in (q, k, v))  # S views (B, h, T, d) each
        out = []
        for step, seen in enumerate(self.visible):
            own = attend(queries[step], tokens_of(keys, seen), tokens_of(values, seen))
            out.append(own.transpose(1, 2))  # (B, T, h, d)
        # In memory (B * S, T, h, d), as the output projection reads it: it needs no copy.
        return torch.stack(out, dim=1).flatten(0, 1).transpose(1, 2)


def tokens_of(x: tuple[torch.Tensor, ...], steps: list[int]) -> torch.Tensor:
    """The tokens of some steps in one sequence, x: S times (B, h, T, d) -> (B, h, len(steps) * T, d)."""
    return torch.cat([x[step] for step in steps], dim=2) if len(steps) > 1 else x[steps[0]]


def cache_slots(mask: str, steps: int) -> list[int]:
    """The cache slot of each step's keys and values. M1 needs 1 slot, M2 and M3 2, M4 S.

    A step takes over the first slot whose content neither it nor a later step sees, or else opens a new one. Raises
    ``ValueError`` for a mask under which the slots then hold a point that the step does not see.
    """
    owners: list[int] = []  # the step whose keys each slot holds
    slots = []
    for step in range(steps):
        needed = {seen for later in range(step, steps) for seen in visible_steps(mask, later)}
        free = [slot for slot, owner in enumerate(owners) if owner not in needed]
        if free:
            slot = free[0]
            owners[slot] = step
        else:
            slot = len(owners)
            owners.append(step)
        if sorted(owners) != visible_steps(mask, step):
            raise ValueError(f"mask {mask} cannot be cached: step {step} would see the points {sorted(owners)}")
        slots.append(slot)
    return slots


class KVCache:
    """Attention of one step after another; keeps exactly the keys and values that the mask will read again."""

    def __init__(self, mask: str, steps: int):
        self.slots = cache_slots(mask, steps)
        self.step = 0
        self.kv: torch.Tensor | None = None  # (2, B, h, slots, T, d), made at the first call, which knows the sizes

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q, k, v: (B, h, T, d) of the next step -> (B, h, T, d)."""
        if self.kv is None:
            B, h, T, d = k.shape
            self.kv = k.new_empty(2, B, h, max(self.slots) + 1, T, d)
        slot, used = self.slots[self.step], max(self.slots[: self.step + 1]) + 1
        self.kv[:, :, :, slot] = torch.stack([k, v])  # one write: compiled, it is done in place, two are not
        self.step += 1
        return F.scaled_dot_product_attention(q, *self.kv[:, :, :, :used].flatten(3, 4))


#################################################################################
#                                 The student                                   #
#################################################################################


def default_history(depth: int) -> int:
    """N for a model of this depth: the paper's 6 of 28 blocks, or that share of another depth, at least one."""
    return max(1, round(6 * depth / 28))


class ARD(DiT):
    """A student of S steps. ``config`` holds the constructor's arguments: DiT's and the four of ARD."""

    def __init__(
        self,
        steps: int = 4,
        mask: str = "M4",
        history_layers: int = 6,
        level_embedding: bool = False,
        residual: str | None = None,
        **teacher_config: Any,
    ):
        """Raises ``ValueError`` for steps < 1, an unknown mask, or a history deeper than the model.

        ``level_embedding`` adds the paper's learned vector per step to the tokens, zero at the start. ``residual``, the
        target "xt" or "x0", lets each step begin as its teacher's, a flow: what the network says is a velocity, along
        which the prediction lies from the point, at the next time or at the data's.
        """
        super().__init__(**teacher_config)
        if steps < 1:
            raise ValueError(f"steps {steps} must be at least 1")
        if mask not in MASKS:
            raise ValueError(f"mask {mask!r} must be one of {', '.join(MASKS)}")
        if not 0 <= history_layers <= len(self.blocks):
            raise ValueError(
                f"history layers {history_layers} must be between 0 and the model's depth {len(self.blocks)}"
            )
        self.config |= dict(steps=steps, mask=mask, history_layers=history_layers, level_embedding=level_embedding)
        self.steps, self.mask, self.history_layers = steps, mask, history_layers
        self.y_embedder.dropout_prob = 0.0  # the teacher's guidance is distilled in: the student always knows its label
        self.heads = nn.ModuleList(copy.deepcopy(self.final_layer) for _ in range(steps))
        del self.final_layer
        noise_time, data_time = PROCESS_TIMES[self.process]
        times = [(noise_time * (steps - k) + data_time * k) / steps for k in range(steps)]
        self.register_buffer("times", torch.tensor(times, dtype=torch.float32), persistent=False)
        self.strides: list[float] | None = None  # how far each step goes along its velocity, if it predicts one
        if residual:
            if self.process == "ddpm":
                raise ValueError("a residual needs a teacher that predicts velocities, and ddpm's predicts noise")
            self.config["residual"] = residual
            ends = [*times[1:], data_time] if residual == "xt" else [data_time] * steps
            self.strides = [end - time for time, end in zip(times, ends, strict=True)]
        self.level = nn.Parameter(torch.zeros(steps, 1, self.config["hidden_size"])) if level_embedding else None

    @classmethod
    def from_teacher(
        cls,
        teacher: DiT,
        steps: int = 4,
        mask: str = "M4",
        history_layers: int | None = None,
        level_embedding: bool = False,
        residual: str | None = None,
    ) -> "ARD":
        """A student whose every weight, and every head, starts as the teacher's.

        ``history_layers``: N, without it ``default_history`` of the teacher's depth. Raises ``TypeError`` for a class
        of teachers that ``STUDENTS`` does not know: its changes would be lost.
        """
        if type(teacher) not in STUDENTS:
            name, known = type(teacher).__name__, ", ".join(kind.__name__ for kind in STUDENTS)
            raise TypeError(f"no student is known for a teacher of class {name}, only for {known}; add one to STUDENTS")
        if history_layers is None:
            history_layers = default_history(len(teacher.blocks))
        student = STUDENTS[type(teacher)](steps, mask, history_layers, level_embedding, residual, **teacher.config)
        missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
        new = {name for name in student.state_dict() if name.startswith(("heads.", "level"))}
        assert set(missing) == new and all(name.startswith("final_layer.") for name in unexpected)
        for head in student.heads:
            head.load_state_dict(teacher.final_layer.state_dict())
        return student.to(next(teacher.parameters()).device)

    def conditioning(self, e: torch.Tensor) -> torch.Tensor:
        """e: embedded y, (B, D) classes or (B, L, D) text -> (B, S, D), the time of each step plus the class."""
        return self.condition(self.t_embedder(self.times)[None], e[:, None])

    def run_blocks(
        self, x: torch.Tensor, c: Any, level: torch.Tensor | None, attention_fns: Sequence[AttentionFn]
    ) -> torch.Tensor:
        """Points x (n, C, H, W) with their ``block_condition`` -> tokens (n, T, D).

        ``attention_fns`` has the attention function of each of the lower N blocks; the others attend within points.
        """
        x = self.embed_tokens(x)
        if level is not None:
            x = x + level
        for block, attention_fn in zip(self.blocks[: self.history_layers], attention_fns, strict=True):
            x = self.run_block(block, x, c, attention_fn)
        for block in self.blocks[self.history_layers :]:
            x = self.run_block(block, x, c)
        return x

    def predict(self, x: torch.Tensor, c: torch.Tensor, step: int, point: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T, D) of one step, made of its point (B, C, H, W) -> its prediction (B, C, H, W).

        The head's sigma half has no meaning here.
        """
        out = self.unpatchify(self.heads[step](x, c))[:, : self.in_channels]
        return point + self.strides[step] * out if self.strides else out

    def forward(self, history: torch.Tensor, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """All predictions at once, each from the true points before it (teacher forcing, Eq. 6).

        history: (B, S, C, H, W) noisiest first, y: (B,) labels -> (B, S, C, H, W); entry k predicts point k + 1.
        """
        B, S = history.shape[:2]
        e = self.y_embedder(y)
        c = self.conditioning(e)  # (B, S, D)
        given = self.block_condition(c.flatten(0, 1), e)
        level = self.level.repeat(B, 1, 1) if self.level is not None else None
        attention_fns = [TeacherForcedAttention(self.mask, S)] * self.history_layers
        tokens = self.run_blocks(history.flatten(0, 1), given, level, attention_fns).unflatten(0, (B, S))
        return torch.stack([self.predict(tokens[:, k], c[:, k], k, history[:, k]) for k in range(S)], dim=1)

    def sample(
        self, noise: torch.Tensor, y: torch.Tensor, given: Mapping[int, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The student's own trajectory, one step after another with a kv-cache (paper, section 3.3).

        noise: (B, C, H, W), y: (B,) labels -> (B, S, C, H, W) predictions, the last is the sample. ``given`` replaces
        predictions: {k: (B, C, H, W)} takes the place of step k's prediction, e.g. a source image's latent (appendix
        C.2) or a teacher's point (Fig. 6b).
        """
        return torch.stack(list(self.sample_steps(noise, y, given)), dim=1)

    def sample_steps(
        self, noise: torch.Tensor, y: torch.Tensor, given: Mapping[int, torch.Tensor] | None = None
    ) -> Iterator[torch.Tensor]:
        """The predictions of ``sample`` one by one, (B, C, H, W) each, as soon as they are made."""
        x = noise
        e = self.y_embedder(y)
        c = self.conditioning(e)
        caches = [KVCache(self.mask, self.steps) for _ in range(self.history_layers)]
        for k in range(self.steps):
            level = self.level[k] if self.level is not None else None
            tokens = self.run_blocks(x, self.block_condition(c[:, k], e), level, caches)
            x = self.predict(tokens, c[:, k], k, x)
            if given and k in given:
                x = given[k]
            yield x


STUDENTS[DiT] = ARD
