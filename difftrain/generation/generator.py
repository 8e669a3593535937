"""Generation through diffusers' schedulers, with noise keyed by the index of the sample.

The generated set is cut into fixed blocks of consecutive indices, which are dealt out to the
processes. The size of a block does not depend on their number: a forward in batches of another size
differs in the last bits, enough to flip a uint8.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from difftrain.core.errors import InputError
from difftrain.core.processes import (
    num_processes,
    objects_from_processes,
    process_index,
    sum_over_processes,
)
from difftrain.core.registry import NonNegative, NonNegativeInt, PositiveInt
from difftrain.core.rng import Rng
from difftrain.data.items import ItemKind
from difftrain.data.transform import to_uint8
from difftrain.generation.sampler_checks import check_sampler, timestep_arguments
from difftrain.generation.samplers import SAMPLERS, Sampler
from difftrain.models.autoencoder import LatentEncoder
from difftrain.models.conditioning.base import Conditioning
from difftrain.models.model import DenoiserNetwork
from difftrain.objective.parameterization import Parameterization
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.slots import Variance
from difftrain.objective.types import Cond, Denoiser


@dataclass(frozen=True)
class Sampling:
    """How samples are generated.

    Args:
        sampler: The reverse process.
        guidance: Scale of classifier-free guidance; 1 does not guide.
        block_size: Samples that go through the network together. Another number can change the
            samples a little.
        seed: Seed of the samples' noise.
        prompts: Prompts of text-to-image models, taken in turn by the index of the sample; None
            takes captions of the data, as training sees them. Scores take other prompts, unless
            evaluation.labels is in_turn.
    """

    sampler: Annotated[Any, SAMPLERS]
    guidance: NonNegative = 1.0
    block_size: PositiveInt = 100
    seed: NonNegativeInt = 0
    prompts: list[str] | None = None


def blocks(
    num: int, size: int, index: int | None = None, of: int | None = None
) -> Iterator[list[int]]:
    """Yield this process's blocks of the indices 0 to num - 1.

    Args:
        num: Number of indices.
        size: Indices in a block; the last block may be shorter.
        index: Rank of the process; None for this one.
        of: World size; None for that of this run.
    """
    index = process_index() if index is None else index
    of = num_processes() if of is None else of
    for start in range(index * size, num, of * size):
        yield list(range(start, min(start + size, num)))


def conditioned(
    conditioning: Conditioning,
    labels: Tensor | None,
    num: int,
    guidance: float,
    device: torch.device,
) -> Cond:
    """Return the conditioning tensors that `guided` expects.

    Args:
        conditioning: What the network is conditioned on.
        labels: Labels [B] of the samples.
        num: The number of samples, B.
        guidance: Scale of the guidance.
        device: Where the tensors are wanted.

    Returns:
        Tensors [B, ...]; with guidance [2B, ...]: those of the samples, then B times those of the
        null condition.
    """
    cond: Mapping[str, Tensor] = conditioning(labels)
    if guidance != 1.0:
        null = conditioning.null(num)
        cond = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
    return {name: value.to(device) for name, value in cond.items()}


def guided(denoiser: Denoiser, x: Tensor, time: Tensor, cond: Cond, guidance: float) -> Tensor:
    """Evaluate a network with classifier-free guidance.

    output = unconditional + guidance (conditional - unconditional). Channels of a learned variance
    are those of the conditional pass.

    Args:
        denoiser: The network.
        x: Its input [B, C, ...].
        time: Its time [B].
        cond: Conditioning tensors as `conditioned` makes them.
        guidance: Scale of the guidance; 1 evaluates the conditional pass alone.

    Returns:
        The guided output, as the network returns it.

    Reference:
        Ho and Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.
    """
    if guidance == 1.0:
        return denoiser(x, time, cond)
    both = denoiser(torch.cat([x, x]), torch.cat([time, time]), cond)
    conditional, unconditional = both.chunk(2)
    channels = x.shape[1]
    difference = conditional[:, :channels] - unconditional[:, :channels]
    prediction = unconditional[:, :channels] + guidance * difference
    return torch.cat([prediction, conditional[:, channels:]], dim=1)


class SampleGenerator:
    """Generates samples by index: sample i is the same on any process and at any time.

    Args:
        sampling: The reverse process, guidance, blocks and seed.
        schedule: The noise levels.
        parameterization: What the network outputs.
        variance: The reverse variance, which may be learned.
        conditioning: What the network is conditioned on.
        shape: Shape of one x_t.
        encoder: The autoencoder of a latent model.
        spaces_sigmas_evenly: Whether a flow sampler starts from evenly spaced noise levels.
        items: What the samples are.

    Raises:
        InputError: If the sampler cannot integrate the schedule, or if guidance is asked of a
            network that cannot be guided.
    """

    def __init__(
        self,
        sampling: Sampling,
        schedule: NoiseSchedule,
        parameterization: Parameterization,
        variance: Variance,
        conditioning: Conditioning,
        shape: tuple[int, ...],
        encoder: LatentEncoder | None = None,
        spaces_sigmas_evenly: bool = False,
        items: ItemKind = "images",
    ):
        self.sampling = sampling
        self.schedule = schedule
        self.parameterization = parameterization
        self.variance = variance
        self.conditioning = conditioning
        self.shape = shape
        self.encoder = encoder
        self.spaces_sigmas_evenly = spaces_sigmas_evenly
        self.items = items
        check_sampler(sampling.sampler, schedule, parameterization, shape, spaces_sigmas_evenly)
        if sampling.guidance != 1.0 and not conditioning.can_guide:
            raise InputError(
                f"sampling.guidance: {sampling.guidance} needs a null label, and the model has "
                "none. Write label_dropout: 0.1 and a class embedding for it (num_class_embeds: "
                "the number of classes + 1), or guidance: 1."
            )

    def with_seed(self, seed: int) -> "SampleGenerator":
        """Return the same generator with another seed."""
        other = copy.copy(self)
        other.sampling = dataclasses.replace(self.sampling, seed=seed)
        return other

    @property
    def sampler(self) -> Sampler:
        """The reverse process."""
        sampler: Sampler = self.sampling.sampler
        return sampler

    @property
    def clips(self) -> bool:
        """Whether samplers clip the estimate of x0 to [-1, 1]: of pixels they do."""
        return self.encoder is None and self.items != "tensors"

    @property
    def scheduler(self) -> Any:
        """A fresh scheduler, as it is also exported."""
        return self.sampler.build(
            self.schedule, self.parameterization, self.clips, self._reads_variance
        )

    @torch.no_grad()
    def __call__(
        self,
        denoiser: Denoiser,
        indices: list[int],
        device: torch.device,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Generate the samples of these indices.

        Args:
            denoiser: The network.
            indices: Indices of the samples, a whole block for the same bits every time.
            device: Where the network is.
            labels: Labels [B]; None takes classes, or prompts, in turn.

        Returns:
            On the CPU: pixels [B, C, H, W], of clips [B, C, F, H, W], uint8; of tensors [B, ...]
            float32.
        """
        if labels is None:
            labels = self.conditioning.labels_of(indices)
        x0 = self._reverse(denoiser, indices, device, labels)
        if self.encoder is not None:
            x0 = self.encoder.decode(x0)
        return x0.float().cpu() if self.items == "tensors" else to_uint8(x0).cpu()

    @property
    def _reads_variance(self) -> bool:
        """Whether the scheduler reads a learned variance, which DDPM's alone does."""
        return self.variance.output_channels == 2 and self.sampler.class_name == "DDPMScheduler"

    def _reverse(
        self, denoiser: Denoiser, indices: list[int], device: torch.device, labels: Tensor | None
    ) -> Tensor:
        """Run the reverse process from pure noise to x0 [B, ...]."""
        # The scheduler, and the noise that belongs to these indices
        scheduler = self.scheduler
        arguments = timestep_arguments(self.sampler, self.schedule, self.spaces_sigmas_evenly)
        scheduler.set_timesteps(device=device, **arguments)
        rng = Rng(self.sampling.seed, 0, indices)
        x = rng.normal(self.shape, "initial").to(device)
        x = x * getattr(scheduler, "init_noise_sigma", 1.0)
        step_arguments = self.sampler.step_arguments(rng.generators("sampler"))
        # Conditioning, for which text is encoded once
        guidance = self.sampling.guidance
        cond = conditioned(self.conditioning, labels, len(x), guidance, device)
        if isinstance(denoiser, DenoiserNetwork):
            cond = denoiser.encoded(cond)
        # The steps
        scales_input = hasattr(scheduler, "scale_model_input")
        for place, t in enumerate(scheduler.timesteps):
            x_in = scheduler.scale_model_input(x, t) if scales_input else x
            output = guided(denoiser, x_in, t.expand(len(x)), cond, guidance)
            self.sampler.aim(scheduler, place)
            x = scheduler.step(self._for_scheduler(output, x), t, x, **step_arguments).prev_sample
        return x

    def _for_scheduler(self, output: Tensor, x: Tensor) -> Tensor:
        """Return the output in float32, without variance channels that nothing reads."""
        output = output.float()
        if self._reads_variance:
            return output
        prediction, _ = self.variance.split(output, x)
        return prediction


def needs_every_process(denoiser: Any) -> bool:
    """Return whether each forward needs all processes, since the network's weights are sharded."""
    if num_processes() == 1 or not isinstance(denoiser, nn.Module):
        return False
    return any(isinstance(parameter, DTensor) for parameter in denoiser.parameters())


def rounds(num: int, size: int, denoiser: Any) -> Iterator[tuple[list[int], bool]]:
    """Yield this process's blocks of indices, in as many rounds as the network needs.

    Each forward of sharded weights needs all processes. A process that has no block left in the
    last round then repeats the first block; what it finds there does not count.

    Args:
        num: Number of indices.
        size: Indices in a block; the last block may be shorter.
        denoiser: The network that looks at the blocks.

    Yields:
        The indices of a block, and whether it counts.
    """
    own = list(blocks(num, size))
    for indices in own:
        yield indices, True
    if needs_every_process(denoiser):
        num_rounds = math.ceil(math.ceil(num / size) / num_processes())
        for _ in range(num_rounds - len(own)):
            yield list(range(min(size, num))), False


def generate(
    generator: SampleGenerator, denoiser: Denoiser, num: int, device: torch.device
) -> Tensor:
    """Generate samples 0 to num - 1, dealt over the processes. Collective.

    Args:
        generator: The generator.
        denoiser: The network.
        num: Number of samples.
        device: Where the network is.

    Returns:
        All samples [num, ...] on every process, as the generator returns them.
    """
    parts: dict[int, Tensor] = {}
    for indices, counts in rounds(num, generator.sampling.block_size, denoiser):
        made = generator(denoiser, indices, device)
        if counts:
            parts |= dict(zip(indices, made, strict=True))
    # Every process knows the shape of a sample, also one that generated none.
    like = next(iter(parts.values())) if parts else None
    looks = objects_from_processes(None if like is None else (like.shape, like.dtype))
    shape, dtype = next(look for look in looks if look is not None)
    samples = torch.zeros(num, *shape, dtype=dtype)
    for i, sample in parts.items():
        samples[i] = sample
    return sum_over_processes(samples)
