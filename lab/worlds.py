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
    load: float = 1.0  # seconds of a training step, a sample, a trajectory: this many times those of digits

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
    optimiser="--lr 5e-4 --ema-decay 0.99 --precision bf16",
    gan="--gan-weight 0.5 --d-time 100 --d-lr 2e-3 --lr 5e-4 --clip 0.06 --d-clip 0.06 --ema-decay 0.99 "
    "--precision bf16",
    gan_warmup=150,
    iterations=4000,
    gan_iterations=1000,
    label=3,
    load=30.0,
)
WORLDS = {world.name: world for world in (DIGITS, EMOJI)}
