"""What fine-tuning costs beside a bare loop: python scripts/bench/fine_tuning.py cpu [--pairs 60] | gpu [--size sd15] [--steps 20] [--tiny]

The bare loop is diffusers' UNet with peft's LoRA on its attention, AdamW, add_noise, the mean squared error, backward, clipping, step and
zero_grad, on latents and text states that lie in tensors. The trainer runs a recipe on the same pipeline (random weights), from a cache.

cpu: the two take turns, a step each, in one process; the trainer's time is the whole of its loop, loader and log included. The ratio is
taken pair by pair. Then the trainer's own variants take turns: time, and the bytes that one step saves for its backward (distinct
storages, without weights). Last, gradients beside a bfloat16 base are compared with those beside float32.
gpu: images/s and the allocator's peak, batch 4, under bf16 autocast, of a UNet of the size of SD 1.5 (512 pixels) or SDXL (1024);
--tiny runs the same lines on small networks, --device cpu without a GPU.
"""

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from difftrain.core.console import hush_libraries
from difftrain.core.rng import Rng
from difftrain.recipe.reading import parse
from difftrain.run.session import TrainingRun

BATCH, RANK, FACTOR, LR = 4, 8, 8, 1e-4
SIZES: dict[str, dict[str, Any]] = {  # the side in pixels, text widths and the UNet
    "small": {"side": 128, "widths": [64], "unet": {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16}},
    "tiny_sd15": {"side": 64, "widths": [16], "unet": {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8}},
    "sd15": {"side": 512, "widths": [768], "unet": {"block_out_channels": (320, 640, 1280, 1280)}},
    "tiny_sdxl": {
        "side": 64, "widths": [16, 24],
        "unet": {"block_out_channels": (16, 16, 32), "norm_num_groups": 8, "attention_head_dim": (1, 2, 2), "addition_time_embed_dim": 8},
    },
    "sdxl": {
        "side": 1024, "widths": [768, 1280],
        "unet": {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20), "addition_time_embed_dim": 256},
    },
}  # fmt: skip
OF_SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
}  # fmt: skip
NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}


# A pipeline with random weights, and pictures


def pipeline(
    size: str, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Path:
    """A pipeline folder: the UNet of that size; autoencoder and text encoders, which train nothing, are small."""
    torch.manual_seed(0)
    widths, side = SIZES[size]["widths"], SIZES[size]["side"]
    with torch.device(device):
        unet = UNet2DConditionModel(**unet_config(size)).to(dtype)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
        sample_size=side,
        scaling_factor=0.18215,
    )
    parts = {
        "vae": vae,
        "unet": unet,
        "scheduler": DDPMScheduler(**NOISE),
        "tokenizer": tokenizer(),
    }
    if len(widths) == 1:
        made: Any = StableDiffusionPipeline(
            **parts,
            text_encoder=clip(widths[0]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        second = clip(widths[1], CLIPTextModelWithProjection)
        made = StableDiffusionXLPipeline(
            **parts, text_encoder=clip(widths[0]), text_encoder_2=second, tokenizer_2=tokenizer()
        )
    made.save_pretrained(folder)
    return folder


def unet_config(size: str) -> dict[str, Any]:
    widths, side, own = (SIZES[size][name] for name in ("widths", "side", "unet"))
    config = {
        "sample_size": side // FACTOR,
        "cross_attention_dim": sum(widths),
        "attention_head_dim": 8,
        **own,
    }
    if len(widths) == 2:
        config |= {
            **OF_SDXL,
            "projection_class_embeddings_input_dim": 6 * own["addition_time_embed_dim"] + widths[1],
        }
    return config


def clip(width: int, kind: type = CLIPTextModel) -> Any:
    words = vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=width,
        bos_token_id=words["<|startoftext|>"],
        eos_token_id=words["<|endoftext|>"],
        pad_token_id=words["<|endoftext|>"],
    )
    return kind(config).eval()


def vocabulary() -> dict[str, int]:
    symbols = sorted(ByteLevel.alphabet())
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=vocabulary(), merges=[], model_max_length=77)


def photos(folder: Path, side: int, num: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"a photo of thing {i}")
    return folder


# The two sides


class Ours:
    """The library's run of a recipe on the pipeline in `folder`, a step at a time. changes: blocks of the recipe; None leaves one out."""

    def __init__(
        self,
        folder: Path,
        size: str,
        name: str,
        steps: int = 10_000,
        checkpointing: bool = False,
        dtype: str = "float32",
        **changes: Any,
    ):
        side, family = (
            SIZES[size]["side"],
            "stable_diffusion" if len(SIZES[size]["widths"]) == 1 else "stable_diffusion_xl",
        )
        model = {
            "type": family,
            "path": str(folder / "pipeline"),
            "dtype": dtype,
            "gradient_checkpointing": checkpointing,
        }
        blocks = {
            "output": str(folder / name), "model": model, "adapter": {"type": "lora", "rank": RANK},
            "data": {"type": "image_folder", "path": str(folder / "photos"), "captions": "sidecar"}, "transform": {"resolution": side},
            "cache": {"folder": str(folder / "cache")}, "training": {"steps": steps, "batch_size": BATCH, "log_every": 10},
            "optimizer": {"lr": LR}, "sampling": {"sampler": {"type": "ddim", "steps": 2}, "guidance": 1.0, "prompts": ["a photo"]},
        } | changes  # fmt: skip
        self.run = TrainingRun(
            parse({key: value for key, value in blocks.items() if value is not None})
        )
        self.trainer = self.run.trainer()
        self.trainer.loader = self.loader = TimedLoader(self.trainer.loader)
        self.model = self.trainer.bare
        self.batches = self.loader.batches(0)

    def step(self) -> None:
        self.trainer.step(self.batches)
        self.trainer.progress.step += 1

    def gradient(self) -> torch.Tensor:
        """Of one step on the first batch, of everything that trains."""
        trainer, micro = self.trainer, next(self.loader.batches(0))
        rng = Rng(0, 0, micro.samples, BATCH)
        batch = trainer.prepare(micro, rng, trainer.accelerator.device, torch.float32)
        trainer.objective(trainer.model, batch, rng).total.backward()
        return torch.cat(
            [p.grad.flatten().double() for p in self.model.parameters() if p.grad is not None]
        )


class TimedLoader:
    """A loader whose own time is told, and that calls `between` before each of its batches: from one of them to the next the trainer
    goes once around its loop."""

    def __init__(self, loader: Any):
        self.loader, self.seconds = loader, 0.0
        self.between: Callable[[], None] = lambda: None

    def batches(self, start_step: int) -> Iterator[Any]:
        with contextlib.closing(self.loader.batches(start_step)) as batches:
            while True:
                self.between()
                started = time.perf_counter()
                batch = next(batches)
                self.seconds += time.perf_counter() - started
                yield batch


class BareLoop:
    """What one would write by hand with diffusers and peft: no resume, no log, no file is read."""

    def __init__(
        self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, num: int = 64
    ):
        self.model = UNet2DConditionModel.from_pretrained(
            folder, subfolder="unet", torch_dtype=dtype
        ).to(device)
        self.model.requires_grad_(False)
        self.model.add_adapter(
            LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
        )
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.data = p.data.float()
        self.trained, self.device, self.amp = trained, device, dtype != torch.float32
        self.optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        config = self.model.config
        side, told = config.sample_size, config.addition_embed_type == "text_time"
        self.latents, self.words = (
            torch.randn(num, 4, side, side),
            torch.randn(num, 77, config.cross_attention_dim),
        )
        pooled = (
            config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            if told
            else 0
        )
        self.pooled = torch.randn(num, pooled) if told else None
        self.sizes = (
            torch.tensor([side, side, 0, 0, side, side])
            .mul(FACTOR)
            .float()
            .expand(BATCH, -1)
            .to(device)
        )
        self.model.train()

    def step(self) -> None:
        rows = torch.randint(0, len(self.latents), (BATCH,))
        x0, words = self.latents[rows].to(self.device), self.words[rows].to(self.device)
        eps, t = torch.randn_like(x0), torch.randint(0, 1000, (BATCH,), device=self.device)
        added = (
            None
            if self.pooled is None
            else {"text_embeds": self.pooled[rows].to(self.device), "time_ids": self.sizes}
        )
        with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
            output = self.model(
                self.scheduler.add_noise(x0, eps, t), t, words, added_cond_kwargs=added
            ).sample
            loss = F.mse_loss(output.float(), eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TakeTurns:
    """Between two steps of the trainer the bare loop makes one. Times are [steps, 2], by the clocks below."""

    def __init__(self, bare: BareLoop):
        self.bare = bare
        self.trainer, self.plain = list[np.ndarray](), list[np.ndarray]()
        self.left: np.ndarray | None = None

    def __call__(self) -> None:
        started = clocks()
        if self.left is not None:
            self.trainer.append(started - self.left)
        self.bare.step()
        self.left = clocks()
        self.plain.append(self.left - started)


def clocks() -> np.ndarray:
    """Seconds on the wall, and those of this process's own work: the second leaves out what others do on the same cores."""
    return np.array([time.perf_counter(), time.process_time()])


# What is measured


def saved_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """Of the distinct storages that autograd saves in one step, those of the model's weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    held: dict[int, Any] = {}  # they stay: a freed one's address may come back as another's

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    return sum(storage.nbytes() for storage in held.values())


def quartiles(values: list[float], digits: int = 3) -> tuple[str, str]:
    """(median, first to third quartile)."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"


def seconds(step: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def bench_overhead(folder: Path, pairs: int) -> BareLoop:
    """The trainer's whole loop against the bare one, in turns."""
    bare = BareLoop(folder / "pipeline")
    turns, warm = TakeTurns(bare), 3
    ours = Ours(
        folder, "small", "overhead", steps=pairs + warm + 1
    )  # of the last step no batch tells the end
    assert sum(p.numel() for p in ours.model.parameters() if p.requires_grad) == sum(
        p.numel() for p in bare.trained
    )
    ours.loader.between = turns
    ours.trainer.run()
    trainer, plain = np.stack(turns.trainer[warm:]), np.stack(turns.plain[warm:-1])
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(
        f"\nbare loop {1000 * np.median(plain[:, 0]):.0f} ms a step, {torch.get_num_threads()} thread(s), {load}, {pairs} pairs\n"
    )
    print("| trainer over bare loop | median | quartiles | totals |\n|---|---|---|---|")
    for clock, name in enumerate(["time", "processor time"]):
        of_pairs = quartiles((trainer / plain)[:, clock].tolist(), digits=4)
        print(
            f"| {name} | {of_pairs[0]} | {of_pairs[1]} | {trainer[:, clock].sum() / plain[:, clock].sum():.4f} |"
        )
    share = ours.loader.seconds / np.stack(turns.trainer)[:, 0].sum()
    print(
        f"\nin the loader: {100 * share:.2f} % of the trainer's time (latents and text from the cache)\n",
        flush=True,
    )
    return bare


def bench_variants(folder: Path, bare: BareLoop, rounds: int) -> None:
    """Time and saved bytes of the trainer's variants, beside a LoRA's step."""
    smooth = {"objective": {"regularizers": [{"type": "step_variation"}]}}
    variants = {
        "LoRA": Ours(folder, "small", "lora"), "LoRA, checkpointing": Ours(folder, "small", "checkpointing", checkpointing=True),
        "LoRA, step_variation": Ours(folder, "small", "smooth", **smooth),
        "LoRA, step_variation, checkpointing": Ours(folder, "small", "smooth_checkpointing", checkpointing=True, **smooth),
        "everything trains": Ours(folder, "small", "full", adapter=None),
    }  # fmt: skip
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        took = {name: seconds(variant.step, "cpu") for name, variant in variants.items()}
        if number > 0:  # the first round warms up: the finite difference is calibrated
            for name in variants:
                ratios[name].append(took[name] / took["LoRA"])
    plain = saved_bytes(bare.model, bare.step)
    print(
        "| a step | time | quartiles | saved for backward | of the bare loop's |\n|---|---|---|---|---|"
    )
    print(f"| bare loop, LoRA | | | {plain / 2**20:.1f} MiB | 1.000 |")
    for name, variant in variants.items():
        middle, between = quartiles(ratios[name], digits=2)
        saved = saved_bytes(variant.model, variant.step)
        print(
            f"| {name} | {middle} | {between} | {saved / 2**20:.1f} MiB | {saved / plain:.3f} |",
            flush=True,
        )


def compare_precision(folder: Path) -> None:
    full, half = (Ours(folder, "small", dtype, dtype=dtype) for dtype in ("float32", "bfloat16"))
    trained = {p.dtype for p in half.model.parameters() if p.requires_grad}
    exact, near = full.gradient(), half.gradient()
    error = ((near - exact).norm() / exact.norm()).item()
    print(
        f"\nbfloat16 base: {trained} trains, its gradient differs by {error:.2g} from that beside a float32 base"
    )


def bench_cpu(given: argparse.Namespace) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pipeline("small", folder / "pipeline")
        photos(folder / "photos", SIZES["small"]["side"], 64)
        bare = bench_overhead(folder, given.pairs)
        bench_variants(folder, bare, given.rounds)
        compare_precision(folder)


def bench_gpu(given: argparse.Namespace) -> None:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    os.environ["ACCELERATE_USE_CPU"] = str(given.device == "cpu").lower()
    size = f"tiny_{given.size}" if given.tiny else given.size
    smooth = {"objective": {"regularizers": [{"type": "step_variation"}]}}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pipeline(size, folder / "pipeline", given.device, torch.bfloat16)
        photos(folder / "photos", SIZES[size]["side"], 8)
        contenders: dict[str, Callable[[], Any]] = {
            "bare loop, bf16 base": lambda: BareLoop(folder / "pipeline", given.device, torch.bfloat16),
            "LoRA, bf16 base": lambda: Ours(folder, size, "half", dtype="bfloat16"),
            "LoRA, bf16 base, checkpointing": lambda: Ours(folder, size, "half_checkpointing", checkpointing=True, dtype="bfloat16"),
            "LoRA, float32 base": lambda: Ours(folder, size, "full"),
            "LoRA, float32 base, checkpointing": lambda: Ours(folder, size, "full_checkpointing", checkpointing=True),
            "LoRA, float32 base, step_variation": lambda: Ours(folder, size, "smooth", **smooth),
            "LoRA, float32 base, step_variation, checkpointing": lambda: Ours(folder, size, "smooth_c", checkpointing=True, **smooth),
        }  # fmt: skip
        on = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        print(
            f"{size}, {SIZES[size]['side']} pixels, batch {BATCH}, rank {RANK}, bf16 autocast, {given.steps} steps, {on}\n"
        )
        print("| a step | images/s | quartiles | peak |\n|---|---|---|---|")
        for name, make in contenders.items():
            print(f"| {name} | {on_device(make, given)} |", flush=True)


def on_device(make: Callable[[], Any], given: argparse.Namespace) -> str:
    """images/s and the peak of one contender, which is alone on the device meanwhile."""
    gc.collect()
    try:
        if given.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.redirect_stdout(
            sys.stderr
        ):  # what the cache tells would stand between the table's rows
            contender = make()
        for _ in range(3):  # kernels are chosen, the finite difference is calibrated
            contender.step()
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        took = [seconds(contender.step, given.device) for _ in range(given.steps)]
    except torch.OutOfMemoryError:
        return "out of memory | | "
    peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if given.device == "cuda" else ""
    return " | ".join([*quartiles([BATCH / one for one in took], digits=2), peak])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cpu, gpu = commands.add_parser("cpu"), commands.add_parser("gpu")
    cpu.add_argument("--pairs", type=int, default=60)
    cpu.add_argument("--rounds", type=int, default=20)
    gpu.add_argument("--size", choices=["sd15", "sdxl"], default="sd15")
    gpu.add_argument("--steps", type=int, default=20)
    gpu.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    gpu.add_argument("--tiny", action="store_true", help="small networks: does it run?")
    for command in (cpu, gpu):
        command.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hush_libraries()
    {"cpu": bench_cpu, "gpu": bench_gpu}[given.command](given)


if __name__ == "__main__":
    main()
