"""The small worlds of the experiments: real data, a teacher of it, who judges samples, and how students are trained."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    """What one world has of its own; commands, rows, figures and tables are the same in all."""

    name: str  # --world
    data: str  # --real-data-path
    teacher: Path  # checkpoint, from the root
    features: str  # --features of the evaluator
    reference: str  # the command that writes the real images, but for its --out
    layers: int  # of the teacher: "N = L"
    optimiser: str  # options of train_ARD.py
    gan: str  # options of train_ARD_gan.py
    gan_warmup: int  # steps, or all of a run that is shorter
    iterations: int  # of the study, by R
    gan_iterations: int  # of R+D after them
    label: int  # the class that Fig. 10 turns real images into
    num_trajectories: int = 10_000  # of the study, and samples of a row of its table
    curve_samples: int = 2000  # of a point of a curve
    repeated: tuple[str, ...] = ("*",)  # students of the study with more seeds than the first, by name
    step_load: float = 1.0  # seconds of a training step: this many times those of digits
    sample_load: float = 1.0  # of a sample, or a trajectory

    def folder(self, results: str) -> str:
        """The default folder of such results: of digits by their plain name."""
        return f"results/{results}" if self.name == "digits" else f"results/{results}-{self.name}"


DIGITS = World(
    name="digits",
    data="digits",
    teacher=Path("assets/digits_teacher.pt"),
    features="digits",
    reference="evaluations.digits reference",
    layers=6,
    optimiser="--lr 2e-3 --ema-decay 0.99",
    gan="--gan-weight 0.5 --d-time 100 --d-lr 2e-3 --lr 1e-3 --clip 0.06 --d-clip 0.06 --ema-decay 0.99",
    gan_warmup=150,
    iterations=1200,
    gan_iterations=1000,
    label=8,
)
EMOJI = World(
    name="emoji",
    data="emoji",
    teacher=Path("assets/emoji_teacher.pt"),
    features="emoji",
    reference="evaluations.emoji reference",
    layers=6,
    optimiser="--global-batch-size 32 --lr 5e-4 --ema-decay 0.99 --precision bf16",
    gan="--global-batch-size 24 --gan-weight 0.5 --d-time 100 --d-lr 2e-3 --lr 5e-4 --clip 0.06 --d-clip 0.06 "
    "--ema-decay 0.99 --precision bf16",
    gan_warmup=150,
    iterations=1000,
    gan_iterations=500,
    label=3,
    num_trajectories=5000,
    curve_samples=1000,
    repeated=("s1-*", "s4-m1-*", "s4-m4-n2-*"),
    step_load=8.0,
    sample_load=30.0,
)
WORLDS = {world.name: world for world in (DIGITS, EMOJI)}
