"""What a step of R+D is made of: trajectories, and real images beside them."""

import numpy as np
import torch
from torch.utils.data import Dataset

from runtime.randomness import Shuffle, generator, noise
from stores.images import Source
from stores.trajectories import TrajectoryBatches


class GanBatches(Dataset):
    """Item n is this rank's share of step n: trajectories with labels, and real images with theirs, in orders apart."""

    def __init__(
        self,
        trajectories: TrajectoryBatches,
        source: Source,
        shape: tuple[int, int, int],
        *,
        hflip: bool,
        seed: int,
        d_time: int,
    ):
        self.trajectories, self.source, self.shape = trajectories, source, shape
        self.hflip, self.seed, self.d_time = hflip, seed, d_time
        self.shuffle = Shuffle(source.count, seed, "real")

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        indices = self.trajectories.context.step_indices(step, self.trajectories.global_batch_size)
        flips = [self.hflip and generator(self.seed, "augmentation", i).random() < 0.5 for i in indices]
        real = self.source.read(self.shuffle.rows(indices.start, indices.stop), np.array(flips))
        real["real_y"] = real.pop("y")
        real["posterior_noise"] = noise(self.seed, "posterior", indices, self.shape)
        if self.d_time:
            real["real_noise"] = noise(self.seed, "discriminator", [2 * i for i in indices], self.shape)
            real["fake_noise"] = noise(self.seed, "discriminator", [2 * i + 1 for i in indices], self.shape)
        return self.trajectories[step] | real
