"""What each method costs, as a multiple of a plain step: python scripts/bench/methods.py [--rounds 20] [--threads 1]

A step is the draws, the forward, the backward, clipping and AdamW. All methods take turns in one process, on networks that start
equal, and each step is divided by the plain step of its round; medians over the rounds. The length of an error-propagation roll-out
is drawn: its rounds go through the lengths 1 to 5 alike, and the figure is the mean of the medians, which is the cost on average.
Memory is the most that one step holds beside weights, gradients and optimizer, of the longest roll-out. Videos have a network, and a
plain step, of their own. The last lines compare the gradients of the two ways to compute step_variation. On a GPU: --device cuda,
with --precision bf16, --compile, --size sd15 (a UNet of Stable Diffusion's size with random weights, 64x64 latents).
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
LENGTH = 5
METHODS: dict[str, Callable[[], dict[str, Any]]] = {
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
OF_VIDEOS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain, videos": dict,
    "noise_constraint": lambda: {"regularizers": [NoiseConstraint()]},
}
SMALL = {
    "sample_size": 32, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 64, 64), "layers_per_block": 1,
    "norm_num_groups": 16,
    "attention_head_dim": 32, "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
VIDEO = {
    "sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8,
    "attention_head_dim": 8, "cross_attention_dim": 16, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}  # fmt: skip


class Variant:
    """One method with a network and an optimizer of its own."""

    def __init__(self, parts: dict[str, Any], network: str, given: argparse.Namespace):
        torch.manual_seed(0)
        self.given, self.network = given, network
        self.model: Any
        if network == "video":
            self.model, self.shape, self.batch = (
                UNet3DConditionModel(**VIDEO),
                (3, 8, 16, 16),
                max(1, given.batch // 8),
            )
        elif network == "sd15":
            self.model = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
            self.shape, self.batch = (4, 64, 64), given.batch
        else:
            self.model, self.shape, self.batch = UNet2DModel(**SMALL), (3, 32, 32), given.batch
        self.model.to(given.device).train()
        if given.checkpointing:
            self.model.enable_gradient_checkpointing()
        self.called = torch.compile(self.model) if given.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.objective = Objective(SCHEDULE, "epsilon", **parts).to(given.device)
        self.x0 = (torch.rand(self.batch, *self.shape) * 2 - 1).to(given.device)
        self.text = (
            None
            if network == "small"
            else torch.zeros(self.batch, 8, 16 if network == "video" else 768, device=given.device)
        )

    def denoiser(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        return self.called(
            x, t, **({} if self.text is None else {"encoder_hidden_states": self.text[: len(x)]})
        ).sample

    def backward(self, step: int) -> None:
        amp = (
            torch.autocast(self.given.device, torch.bfloat16)
            if self.given.precision == "bf16"
            else contextlib.nullcontext()
        )
        with self.objective.context():
            with amp:
                losses = self.objective(
                    self.denoiser, Batch(self.x0), Rng(0, step, range(self.batch))
                )
            losses.total.backward()

    def step(self, step: int) -> None:
        self.backward(step)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradient(self, step: int) -> torch.Tensor:
        self.backward(step)
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.optimizer.zero_grad()
        return torch.cat(gradients).double()


def step_of_length(length: int, beyond: int) -> int:
    """The next step whose roll-out has this length."""
    while True:
        beyond += (
            4 if beyond % 4 == 0 else 4 - beyond % 4
        )  # multiples of four: every 4th step is one of them, whatever is timed
        p: Any = SimpleNamespace(
            rng=Rng(0, beyond).child("regularizers.error_propagation"), schedule=SCHEDULE
        )
        if ErrorPropagation(length=LENGTH).draw(p)[1] == length:
            return beyond


def seconds(variant: Variant, step: int) -> float:
    if variant.given.device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    variant.step(step)
    if variant.given.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def held(variant: Variant, step: int) -> float:
    """The most bytes that one step holds at once beyond what it finds."""
    if variant.given.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant.backward(step)
        most = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            variant.backward(step)
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
    return float(most)


def measure(
    methods: dict[str, Callable[[], dict[str, Any]]], network: str, given: argparse.Namespace
) -> None:
    variants = {
        name: Variant(parts(), network, given)
        for name, parts in methods.items()
        if wanted(name, given)
    }
    baseline = next(iter(variants))
    steps = dict.fromkeys(range(1, LENGTH + 1), 0)
    ratios: dict[str, dict[int, list[float]]] = {
        name: {length: [] for length in steps} for name in variants
    }
    plain: list[float] = []
    for number in range(given.rounds + 1):
        length = 1 + (number - 1) % LENGTH
        steps[length] = step_of_length(length, max(steps.values()))
        took = {
            name: seconds(variant, steps[length] + (number % 4 if "4th" in name else 0))
            for name, variant in variants.items()
        }
        if (
            number > 0
        ):  # the first round warms up: kernels are chosen, the finite difference is calibrated, a network compiled
            plain.append(took[baseline])
            for name in variants:
                ratios[name][length].append(took[name] / took[baseline])
    longest = step_of_length(LENGTH, max(steps.values()))
    memory = {name: held(variant, longest) for name, variant in variants.items()}
    for name in variants:
        everything = [ratio for of_length in ratios[name].values() for ratio in of_length]
        by_length = [
            statistics.median(of_length) for of_length in ratios[name].values() if of_length
        ]
        drawn = name.startswith("error_propagation")
        middle = (
            statistics.mean(everything)
            if "4th" in name
            else statistics.mean(by_length)
            if drawn
            else statistics.median(everything)
        )
        spread = (
            f"{by_length[0]:.2f} to {by_length[-1]:.2f} by length"
            if drawn
            else quartiles(everything)
        )
        print(
            f"| {name} | {middle:.2f} | {spread} | {memory[name] / memory[baseline]:.2f} |",
            flush=True,
        )
    print(
        f"<!-- {baseline}: {1000 * statistics.median(plain):.0f} ms a step, {memory[baseline] / 2**20:.0f} MiB -->",
        flush=True,
    )


def quartiles(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{low:.2f} to {high:.2f}"


def wanted(name: str, given: argparse.Namespace) -> bool:
    return given.only is None or name.startswith("plain") or given.only in name


def compare_gradients(network: str, given: argparse.Namespace) -> None:
    """Of one step on equal weights, the whole loss without its plain part."""
    plain = Variant({}, network, given).gradient(0)
    exact = (
        Variant(
            {"regularizers": [StepVariation(method="double_backward")]}, network, given
        ).gradient(0)
        - plain
    )
    for name, central in (("one-sided", False), ("central", True)):
        regularizer = StepVariation(central=central)
        near = Variant({"regularizers": [regularizer]}, network, given).gradient(0) - plain
        error = ((near - exact).norm() / exact.norm()).item()
        print(
            f"step_variation, {name} difference against double backward: gradients differ by {error:.2g}, h = {float(regularizer.h):.3g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="a multiple of 20 serves all lengths and every 4th step alike",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", help="methods whose name contains this, beside the plain step")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--size", default="small", choices=["small", "sd15"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--checkpointing", action="store_true", help="activation checkpointing within the network"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    methods = {
        name: parts
        for name, parts in METHODS.items()
        if not (given.compile and "double backward" in name)
    }
    load = (
        f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
        if given.device == "cpu"
        else torch.cuda.get_device_name()
    )
    print(
        f"{given.size}, batch {given.batch}, {given.rounds} rounds, {given.device}, precision {given.precision}, {load}\n"
    )
    print("| method | time | quartiles | memory |\n|---|---|---|---|")
    measure(methods, given.size, given)
    if given.size == "small" and wanted("noise_constraint", given):
        measure(OF_VIDEOS, "video", given)
    if wanted("step_variation", given) and not given.compile and given.precision == "no":
        print()
        compare_gradients(given.size, given)


if __name__ == "__main__":
    main()
