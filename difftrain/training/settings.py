"""How long a run trains, in what batches, and what it writes on the way."""

from dataclasses import dataclass, field
from typing import Annotated

from difftrain.core.errors import InputError
from difftrain.core.registry import BESIDE_TRAINING, NonNegativeInt, Positive, PositiveInt


@dataclass(frozen=True)
class Training:
    """How long a run trains, and in what batches.

    Args:
        steps: Optimizer updates.
        batch_size: Samples of one update, over all processes.
        micro_batch_size: Samples of one backward on one process; None takes all of them at once.
        clip_norm: Largest norm of the gradient; None does not clip.
        log_every: Steps between two lines of the log.
        checkpoint_every: Steps between two checkpoints.
        keep_checkpoints: Newest checkpoints that are kept; the best one is kept too.
        sample_every: Steps between two sample grids; None makes none before the end.
        num_sampled: Samples in a grid.
        trackers: Trackers of accelerate that get the log too, such as tensorboard.
    """

    steps: PositiveInt
    batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = None
    clip_norm: Positive | None = 1.0
    log_every: Annotated[PositiveInt, BESIDE_TRAINING] = 10
    checkpoint_every: Annotated[PositiveInt, BESIDE_TRAINING] = 1000
    keep_checkpoints: Annotated[PositiveInt, BESIDE_TRAINING] = 2
    sample_every: Annotated[PositiveInt | None, BESIDE_TRAINING] = None
    num_sampled: Annotated[NonNegativeInt, BESIDE_TRAINING] = 64
    trackers: Annotated[list[str], BESIDE_TRAINING] = field(default_factory=list)

    def micro_batch_of(self, num_processes: int) -> int:
        """Return the samples of one backward on one process.

        Args:
            num_processes: World size.

        Raises:
            InputError: If micro-batches of that size do not divide the batch; it lists those that
                do.
        """
        micro = self.micro_batch_size or max(1, self.batch_size // num_processes)
        if self.batch_size % (micro * num_processes):
            most = self.batch_size // num_processes
            fitting = [
                size for size in range(1, most + 1) if self.batch_size % (size * num_processes) == 0
            ]
            if not fitting:
                raise InputError(
                    f"training.batch_size: {self.batch_size} cannot be divided over "
                    f"{num_processes} processes. Write a multiple of {num_processes}, or change "
                    "the number of processes."
                )
            raise InputError(
                f"training.micro_batch_size: {micro} samples on each of {num_processes} "
                f"process(es) do not divide batch_size {self.batch_size}. Write one of "
                f"{', '.join(map(str, fitting))}."
            )
        return micro
