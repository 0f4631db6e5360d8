"""The rows of the paper's Table 1: its published numbers, and the options that reproduce each with these scripts.

DiT-XL/2 on ImageNet 256, 50k samples, ADM's protocol. ``preset(script)`` gives the choices of ``--preset``; --dry-run
shows the options that a preset sets. Table 6 and section 4.1 of the paper have the settings.

The rows "sit-..." and "repa-..." are four of Table 1's with a flow teacher in DiT's place: what is trained is the same.
The rows "t2i-..." are those of Table 4 with a public teacher: PixArt-Sigma stands in for the paper's private model.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A line of Table 1. The teacher's lines have no mask and no history."""

    model: str
    loss: str
    mask: str | None
    history_layers: int | None
    steps: int
    gflops: float
    latency_ms: float
    fid: float
    inception_score: float
    precision: float
    recall: float


TABLE_1 = {
    "teacher-250": Row("DiT-XL/2", "-", None, None, 250, 59300, 4935, 2.27, 278.24, 0.830, 0.570),
    "teacher-25": Row("DiT-XL/2 (teacher)", "-", None, None, 25, 5930, 493.5, 2.89, 230.22, 0.797, 0.572),
    "kd": Row("KD", "R", "M1", 0, 1, 118.6, 17.01, 11.88, 148.61, 0.665, 0.565),
    "step-s2": Row("Step distillation", "R", "M1", 0, 2, 237.2, 33.05, 10.92, 167.08, 0.681, 0.518),
    "ard-n6-m4-s2": Row("ARD", "R", "M4", 6, 2, 238.1, 34.05, 6.29, 188.05, 0.737, 0.564),
    "ard-n28-m4-s2": Row("ARD", "R", "M4", 28, 2, 241.5, 34.90, 6.54, 186.18, 0.734, 0.569),
    "step-s4": Row("Step distillation", "R", "M1", 0, 4, 474.4, 64.80, 10.25, 181.58, 0.704, 0.474),
    "ard-n6-m2-s4": Row("ARD", "R", "M2", 6, 4, 477.1, 65.57, 4.75, 203.58, 0.768, 0.572),
    "ard-n6-m3-s4": Row("ARD", "R", "M3", 6, 4, 477.1, 65.57, 4.45, 206.93, 0.773, 0.572),
    "ard-n6-m4-s4": Row("ARD", "R", "M4", 6, 4, 479.9, 66.34, 4.32, 209.03, 0.770, 0.574),
    "ard-n28-m4-s4": Row("ARD", "R", "M4", 28, 4, 500.2, 67.85, 4.80, 201.15, 0.761, 0.566),
    "step-s4-gan": Row("Step distillation", "R+D", "M1", 0, 4, 474.4, 64.80, 3.84, 221.16, 0.785, 0.557),
    "ard-n6-m4-s4-gan": Row("ARD", "R+D", "M4", 6, 4, 479.9, 66.34, 1.84, 235.84, 0.797, 0.615),
}

TEACHER = "DiT-XL-2-256x256.pt"
ODE = {"teacher": TEACHER, "solver_steps": 25, "cfg_scale": 1.5, "cfg_channels": 3}
DUMP = ODE | {"num_trajectories": 2_560_000, "steps": 4, "grid": "even", "label_policy": "balanced"}
TRAIN = {"model": "DiT-XL/2", "target": "x0", "grid": "even", "lr": 1e-4, "clip": 1.0, "ema_decay": 0.9999}
BATCH = {1: 256, 2: 128, 4: 64}  # by student steps
GAN = {"model": "DiT-XL/2", "lr": 1e-4, "d_lr": 1e-3, "clip": 1.0, "ema_decay": 0.9999, "global_batch_size": 48}
# 50k balanced labels flatter FID a little against the uniform draws of DiT's own sampling: --label-policy random.
SAMPLE = {"num_samples": 50_000, "label_policy": "balanced", "weights": "ema"}

# Guidance as their authors published it, for their own samplers of 250 steps; here 25 of Euler's, as DiT's 25 of DDIM.
FLOW_ODES = {
    "sit": ODE | {"teacher": "SiT-XL-2-256x256.pt"},
    "repa": ODE
    | {"teacher": "REPA-XL-2-256x256.pt", "cfg_scale": 1.8, "cfg_channels": 4, "guidance_interval": [0.0, 0.7]},
}
# Published: teacher, sampler, guidance, FID of 50k samples.
FLOW_FIGURES = [
    ("SiT-XL/2", "ODE, dopri5", "none", "9.5"),
    ("SiT-XL/2", "SDE", "none", "8.3"),
    ("SiT-XL/2", "ODE or SDE", "1.5", "about 2.1"),
    ("REPA", "SDE, 250 steps", "1.35", "1.80"),
    ("REPA", "SDE, 250 steps", "1.8 on [0, 0.7]", "1.42"),
    ("REPA", "Euler, 12 steps (by LakonLab, its issue 15)", "3.2 on [0, 0.7]", "3.52"),
]
FLOW_ROWS = ("teacher-25", "step-s4", "ard-n6-m4-s4", "step-s4-gan", "ard-n6-m4-s4-gan")

# Section 4.2. Batch and learning rate are not stated there; the guidance is PixArt-Sigma's own, the paper's private
# teacher had 3.0 or 7.5. The prompts are given by --captions.
TEXT_TEACHERS = {
    "t2i-sigma-512": "PixArt-alpha/PixArt-Sigma-XL-2-512-MS",
    "t2i-sigma-1024": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
}
TEXT_ODE = {"vae": "sdxl", "solver_steps": 48, "cfg_scale": 4.5, "cfg_channels": 4}
TEXT_STUDENTS = {"": {"steps": 3, "mask": "M4", "stack": 1}, "-step": {"steps": 3, "mask": "M1", "stack": 0}}
TEXT_TRAIN = TRAIN | {"model": "PixArt-XL/2", "target": "xt", "online": True}
TEXT_TRAIN |= {"global_batch_size": 64, "iterations": 15_000}
TEXT_SAMPLE = SAMPLE | {"num_samples": 5000}


def text_preset(script: str) -> dict[str, dict]:
    """The same for text to image, by the names of ``TEXT_TEACHERS``; "-step" is step distillation."""
    rows = {
        name + kind: ({"teacher": teacher}, student)
        for name, teacher in TEXT_TEACHERS.items()
        for kind, student in TEXT_STUDENTS.items()
    }
    if script == "sample.py":
        return {name: TEXT_ODE | TEXT_SAMPLE | {"teacher": teacher} for name, teacher in TEXT_TEACHERS.items()}
    if script == "train_ARD.py":
        return {name: TEXT_TRAIN | TEXT_ODE | teacher | student for name, (teacher, student) in rows.items()}
    if script == "sample_ARD.py":
        return {name: TEXT_SAMPLE | {"model": "PixArt-XL/2"} | student for name, (_, student) in rows.items()}
    return {}


def _student(row: Row) -> dict:
    return {"steps": row.steps, "mask": row.mask, "stack": row.history_layers}


def preset(script: str) -> dict[str, dict]:
    """Option values by preset's name, of those rows that need the script."""
    return table_1_preset(script) | flow_preset(script) | text_preset(script)


def flow_preset(script: str) -> dict[str, dict]:
    """Rows of Table 1 with the teachers of ``FLOW_ODES``: "sit-step-s4" is "step-s4", but for the teacher's ODE."""
    rows = {name: row for name, row in table_1_preset(script).items() if name in FLOW_ROWS}
    return {
        f"{flow}-{name}": row | (ode if "solver_steps" in row else {})
        for flow, ode in FLOW_ODES.items()
        for name, row in rows.items()
    }


def table_1_preset(script: str) -> dict[str, dict]:
    """The same for the rows of Table 1."""
    students = {name: row for name, row in TABLE_1.items() if row.mask}
    regression = {name: row for name, row in students.items() if row.loss == "R"}
    if script == "sample.py":
        return {
            name: ODE | SAMPLE | {"solver_steps": row.steps} for name, row in TABLE_1.items() if name not in students
        }
    if script == "sample_trajectory.py":
        return dict.fromkeys(students, DUMP)
    if script == "train_ARD.py":
        more: dict[str, float] = {"iterations": 300_000}
        rows = {
            name: TRAIN | _student(row) | more | {"global_batch_size": BATCH[row.steps]}
            for name, row in regression.items()
        }
        # R+D starts from the regression-trained student of the same shape.
        return rows | {f"{name}-gan": rows[name] for name in rows if f"{name}-gan" in students}
    if script == "train_ARD_gan.py":
        more = {"gan_weight": 10.0, "gan_warmup": 3000, "iterations": 40_000}
        return {name: GAN | _student(row) | more for name, row in students.items() if row.loss == "R+D"}
    if script == "sample_ARD.py":
        return {name: SAMPLE | _student(row) | {"model": "DiT-XL/2"} for name, row in students.items()}
    raise ValueError(f"no presets for {script}")
