"""Time and memory of each training method, as multiples of a plain step.

python scripts/bench/methods.py [--rounds 20] [--threads 1] [--only NAME]

A step is the random draws, the forward, the backward, clipping and AdamW. All methods take turns in
one process, on networks with equal initial weights. The time of each step is divided by the time of
the plain step of the same round. The table shows medians and quartiles over the rounds.

The length of an error-propagation roll-out is random. The rounds go through the lengths 1 to 5
equally often, and the table shows the mean of the medians by length, which is the average cost.

Memory is the most that one step allocates beside weights, gradients and optimizer, for the longest
roll-out. Videos have their own network and their own plain step. The last lines compare the
gradients of the two ways to compute step_variation.

On a GPU: --device cuda, with --precision bf16, --compile, or --size sd15 (a UNet of the size of
Stable Diffusion's with random weights, on 64 x 64 latents).
"""

import argparse
import contextlib
import os
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel, UNet3DConditionModel
from torch import Tensor

from difftrain.core.rng import Rng
from difftrain.objective.noise import InputPerturbation
from difftrain.objective.objective import Objective
from difftrain.objective.regularizers import (
    ErrorPropagation,
    NoiseConstraint,
    StepVariation,
)
from difftrain.objective.schedule import NoiseSchedule
from difftrain.objective.types import Batch
from difftrain.objective.weightings import P2, Debiased, MinSNR

SCHEDULE = NoiseSchedule.linear()
LENGTH = 5  # the longest roll-out of error propagation
Methods = dict[str, Callable[[], dict[str, Any]]]
"""Arguments of the objective by the name of the method. Each call makes new parts."""

METHODS: Methods = {
    "plain": dict,
    "p2": lambda: {"weighting": P2()},
    "debiased": lambda: {"weighting": Debiased()},
    "min_snr": lambda: {"weighting": MinSNR()},
    "input_perturbation": lambda: {"perturbation": InputPerturbation()},
    "step_variation, finite difference": lambda: {"regularizers": [StepVariation()]},
    "step_variation, every 4th step": lambda: {"regularizers": [StepVariation(every=4)]},
    "step_variation, central difference": lambda: {"regularizers": [StepVariation(central=True)]},
    "step_variation, double backward": lambda: {
        "regularizers": [StepVariation(method="double_backward")]
    },
    "error_propagation": lambda: {"regularizers": [ErrorPropagation(length=LENGTH)]},
    "error_propagation, checkpointing": lambda: {
        "regularizers": [ErrorPropagation(length=LENGTH, checkpointing=True)]
    },
    "error_propagation, truncate 1": lambda: {
        "regularizers": [ErrorPropagation(length=LENGTH, truncate=1)]
    },
}
VIDEO_METHODS: Methods = {
    "plain, videos": dict,
    "noise_constraint": lambda: {"regularizers": [NoiseConstraint()]},
}
SMALL = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}
VIDEO = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}


class Variant:
    """One method, with its own network and optimizer.

    Args:
        parts: Arguments of the objective.
        network: "small", "sd15" or "video".
        given: The options of this script.
    """

    def __init__(self, parts: dict[str, Any], network: str, given: argparse.Namespace):
        torch.manual_seed(0)
        self.given = given
        self.batch = given.batch
        self.model: Any
        text_width = 0
        if network == "video":
            self.model = UNet3DConditionModel(**VIDEO)
            self.batch = max(1, given.batch // 8)
            shape, text_width = (3, 8, 16, 16), 16
        elif network == "sd15":
            self.model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
            shape, text_width = (4, 64, 64), 768
        else:
            self.model = UNet2DModel(**SMALL)
            shape = (3, 32, 32)
        self.model.to(given.device).train()
        if given.checkpointing:
            self.model.enable_gradient_checkpointing()
        self.network = torch.compile(self.model) if given.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.objective = Objective(SCHEDULE, "epsilon", **parts).to(given.device)
        self.x0 = (torch.rand(self.batch, *shape) * 2 - 1).to(given.device)
        self.text: Tensor | None = None
        if text_width:
            self.text = torch.zeros(self.batch, 8, text_width, device=given.device)

    def predict(self, x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
        """Return the output of the network, as the objective calls it."""
        if self.text is None:
            output: Tensor = self.network(x_t, t).sample
        else:
            output = self.network(x_t, t, encoder_hidden_states=self.text[: len(x_t)]).sample
        return output

    def backward(self, step: int) -> None:
        """Run the forward and the backward of one step."""
        batch = Batch(self.x0)
        rng = Rng(0, step, range(self.batch))
        with self.objective.context():
            with self.autocast():
                losses = self.objective(self.predict, batch, rng)
            losses.total.backward()

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the forward."""
        if self.given.precision == "bf16":
            return torch.autocast(self.given.device, torch.bfloat16)
        return contextlib.nullcontext()

    def step(self, step: int) -> None:
        """Make one update."""
        self.backward(step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self, step: int) -> Tensor:
        """Return the gradient of one step [P] in float64."""
        self.backward(step)
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return torch.cat(gradients).double()


# Measuring


def find_step(length: int, after: int) -> int:
    """Return the next step whose roll-out has a given length.

    Only multiples of four are tried, so that a method that acts on each 4th step acts on it.

    Args:
        length: The length of the roll-out.
        after: The step to search from.
    """
    step = after
    while True:
        step += 4 - step % 4
        rng = Rng(0, step).child("regularizers.error_propagation")
        drawn_for: Any = SimpleNamespace(rng=rng, schedule=SCHEDULE)
        _, drawn_length = ErrorPropagation(length=LENGTH).draw(drawn_for)
        if drawn_length == length:
            return step


def time_step(variant: Variant, step: int) -> float:
    """Return the seconds of one update."""
    if variant.given.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    variant.step(step)
    if variant.given.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure_memory(variant: Variant, step: int) -> float:
    """Return the most bytes that one step allocates beside those allocated before it."""
    if variant.given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.backward(step)
        return float(torch.cuda.max_memory_allocated() - before)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as profile:
        variant.backward(step)
    recorded: Any = profile.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return float(most)


def measure(methods: Methods, network: str, given: argparse.Namespace) -> None:
    """Let the methods take turns and print a line of the table for each.

    The first method is the plain step that the others are divided by.
    """
    variants: dict[str, Variant] = {}
    for name, make_parts in methods.items():
        if is_wanted(name, given):
            variants[name] = Variant(make_parts(), network, given)
    baseline = next(iter(variants))

    # Time
    last_step = 0
    ratios: dict[str, list[tuple[int, float]]] = {name: [] for name in variants}
    plain: list[float] = []
    for number in range(given.rounds + 1):
        length = 1 + (number - 1) % LENGTH
        last_step = find_step(length, last_step)
        times: dict[str, float] = {}
        for name, variant in variants.items():
            # Every fourth round is one of the 4th steps, the others are steps between them.
            offset = number % 4 if "4th" in name else 0
            times[name] = time_step(variant, last_step + offset)
        # The first round warms up: kernels are chosen, the finite difference is calibrated, and the
        # network is compiled.
        if number > 0:
            plain.append(times[baseline])
            for name in variants:
                ratios[name].append((length, times[name] / times[baseline]))

    # Memory
    longest = find_step(LENGTH, last_step)
    memory = {name: measure_memory(variant, longest) for name, variant in variants.items()}

    for name in variants:
        middle, spread = summarize(name, ratios[name])
        relative_memory = memory[name] / memory[baseline]
        print(f"| {name} | {middle:.2f} | {spread} | {relative_memory:.2f} |", flush=True)
    milliseconds = 1000 * statistics.median(plain)
    mebibytes = memory[baseline] / 2**20
    print(f"<!-- {baseline}: {milliseconds:.0f} ms a step, {mebibytes:.0f} MiB -->", flush=True)


def summarize(name: str, ratios: list[tuple[int, float]]) -> tuple[float, str]:
    """Return the average cost of a method and its spread.

    Args:
        name: Name of the method.
        ratios: (length of the roll-out, time over the plain step's) of each round.
    """
    everything = [ratio for _, ratio in ratios]
    if name.startswith("error_propagation"):
        medians: list[float] = []
        for length in range(1, LENGTH + 1):
            of_length = [ratio for drawn, ratio in ratios if drawn == length]
            if of_length:
                medians.append(statistics.median(of_length))
        return statistics.mean(medians), f"{medians[0]:.2f} to {medians[-1]:.2f} by length"
    low, _, high = statistics.quantiles(everything, n=4)
    spread = f"{low:.2f} to {high:.2f}"
    # A step in four costs more, so the median would hide it.
    average = statistics.mean if "4th" in name else statistics.median
    return average(everything), spread


def is_wanted(name: str, given: argparse.Namespace) -> bool:
    """Return whether --only selects a method. The plain step always runs."""
    return given.only is None or name.startswith("plain") or given.only in name


def compare_gradients(network: str, given: argparse.Namespace) -> None:
    """Print how far the gradients of the finite differences are from the exact ones.

    They are gradients of one step at equal weights, without the plain part of the loss.
    """
    plain = Variant({}, network, given).gradient(0)

    def gradient_of(regularizer: StepVariation) -> Tensor:
        return Variant({"regularizers": [regularizer]}, network, given).gradient(0) - plain

    exact = gradient_of(StepVariation(method="double_backward"))
    for name, central in (("one-sided", False), ("central", True)):
        regularizer = StepVariation(central=central)
        near = gradient_of(regularizer)
        error = ((near - exact).norm() / exact.norm()).item()
        print(
            f"step_variation, {name} difference against double backward: gradients differ by "
            f"{error:.2g}, h = {float(regularizer.h):.3g}"
        )


def main() -> None:
    """Print the table and the comparison of gradients."""
    given = parse_options()
    torch.set_num_threads(given.threads)
    methods = dict(METHODS)
    if given.compile:
        del methods["step_variation, double backward"]
    if given.device == "cpu":
        machine = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    else:
        machine = torch.cuda.get_device_name()
    print(
        f"{given.size}, batch {given.batch}, {given.rounds} rounds, {given.device}, "
        f"precision {given.precision}, {machine}\n"
    )
    print("| method | time | quartiles | memory |\n|---|---|---|---|")
    measure(methods, given.size, given)
    if given.size == "small" and is_wanted("noise_constraint", given):
        measure(VIDEO_METHODS, "video", given)
    if is_wanted("step_variation", given) and not given.compile and given.precision == "no":
        print()
        compare_gradients(given.size, given)


def parse_options() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="number of counted rounds; use a multiple of 20 for equal shares of all lengths and "
        "of each 4th step",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--batch", type=int, default=32, help="batch size")
    parser.add_argument(
        "--only", help="run only the plain step and the methods whose name contains this"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--size", default="small", choices=["small", "sd15"])
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument(
        "--checkpointing", action="store_true", help="use activation checkpointing in the network"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
