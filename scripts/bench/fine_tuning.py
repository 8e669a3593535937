"""Time and memory of fine-tuning against a bare loop of diffusers and peft.

python scripts/bench/fine_tuning.py cpu [--pairs 60] [--rounds 20] [--threads 1]
python scripts/bench/fine_tuning.py gpu [--size sd15] [--steps 20] [--tiny] [--device cpu]

The bare loop is diffusers' UNet with peft's LoRA on its attention. A step is add_noise, the mean
squared error, backward, clipping, AdamW and zero_grad, on latents and text states in tensors. The
trainer runs a recipe on the same pipeline with a cache. The pipeline has random weights.

cpu: The two loops take turns in one process, a step each. The trainer's time is the time of its
whole loop, with data loading and logging. The ratio is taken pair by pair. Then several variants of
the trainer take turns. The table shows their time and the bytes that one step saves for its
backward (distinct storages, without weights). Last, gradients beside a bfloat16 base are compared
with those beside a float32 base.

gpu: Images per second and the peak of the allocator at batch size 4 under bf16 autocast. The UNet
has the size of SD 1.5 (512 pixels) or SDXL (1024 pixels). --tiny runs the same on small networks,
and --device cpu runs it without a GPU.
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
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from difftrain.core.console import hush_libraries
from difftrain.core.rng import Rng
from difftrain.recipe.reading import parse
from difftrain.run.session import TrainingRun

BATCH, RANK, LR = 4, 8, 1e-4
FACTOR = 8  # pixels of one latent along one side
WARM_UP = 3  # pairs that are not counted
# Pixels of one side, widths of the text encoders, and what the UNet's config states itself.
SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "side": 128,
        "widths": [64],
        "unet": {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 16},
    },
    "tiny_sd15": {
        "side": 64,
        "widths": [16],
        "unet": {"block_out_channels": (16, 16, 32, 32), "norm_num_groups": 8},
    },
    "sd15": {
        "side": 512,
        "widths": [768],
        "unet": {"block_out_channels": (320, 640, 1280, 1280)},
    },
    "tiny_sdxl": {
        "side": 64,
        "widths": [16, 24],
        "unet": {
            "block_out_channels": (16, 16, 32),
            "norm_num_groups": 8,
            "attention_head_dim": (1, 2, 2),
            "addition_time_embed_dim": 8,
        },
    },
    "sdxl": {
        "side": 1024,
        "widths": [768, 1280],
        "unet": {
            "block_out_channels": (320, 640, 1280),
            "attention_head_dim": (5, 10, 20),
            "addition_time_embed_dim": 256,
        },
    },
}
SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "use_linear_projection": True,
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
}
NOISE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "steps_offset": 1,
}
STEP_VARIATION = {"objective": {"regularizers": [{"type": "step_variation"}]}}


# A pipeline with random weights, and pictures


def save_pipeline(
    size: str, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> None:
    """Write a pipeline with random weights.

    The UNet has the given size. The autoencoder and the text encoders are not trained, so they are
    small.

    Args:
        size: A key of SIZES.
        folder: Where it goes.
        device: Where the weights of the UNet are made.
        dtype: Their precision.
    """
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
        "tokenizer": make_tokenizer(),
    }
    pipeline: Any
    if len(widths) == 1:
        pipeline = StableDiffusionPipeline(
            **parts,
            text_encoder=make_text_encoder(widths[0], CLIPTextModel),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    else:
        second = make_text_encoder(widths[1], CLIPTextModelWithProjection)
        pipeline = StableDiffusionXLPipeline(
            **parts,
            text_encoder=make_text_encoder(widths[0], CLIPTextModel),
            text_encoder_2=second,
            tokenizer_2=make_tokenizer(),
        )
    pipeline.save_pretrained(folder)


def unet_config(size: str) -> dict[str, Any]:
    """Return the config of the UNet of a size."""
    widths, side, stated = SIZES[size]["widths"], SIZES[size]["side"], SIZES[size]["unet"]
    config = {
        "sample_size": side // FACTOR,
        "cross_attention_dim": sum(widths),
        "attention_head_dim": 8,
        **stated,
    }
    if len(widths) == 2:
        config |= SDXL_BLOCKS
        # Six numbers of the size conditioning, and the pooled states of the second text encoder
        size_width = 6 * stated["addition_time_embed_dim"]
        config["projection_class_embeddings_input_dim"] = size_width + widths[1]
    return config


def make_text_encoder(width: int, kind: type) -> Any:
    """Return a CLIP text model of two layers with random weights."""
    words = make_vocabulary()
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


def make_vocabulary() -> dict[str, int]:
    """Return a vocabulary in which each byte is a token."""
    symbols = sorted(ByteLevel.alphabet())
    last_symbols = [f"{symbol}</w>" for symbol in symbols]
    words = [*symbols, *last_symbols, "<|startoftext|>", "<|endoftext|>"]
    return {word: number for number, word in enumerate(words)}


def make_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer that spells every word."""
    return CLIPTokenizer(vocab=make_vocabulary(), merges=[], model_max_length=77)


def write_photos(folder: Path, side: int, num: int) -> None:
    """Write images of noise with captions beside them."""
    folder.mkdir(parents=True)
    for i in range(num):
        pixels = np.random.default_rng(i).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
        (folder / f"{i:04d}.txt").write_text(f"a photo of thing {i}")


# The two loops


class RecipeLoop:
    """The trainer of a recipe on a folder's pipeline and photos, a step at a time.

    Args:
        folder: Holds pipeline and photos; cache and run go there too.
        size: A key of SIZES.
        name: Name of the run's folder.
        steps: Steps of the recipe.
        checkpointing: Whether the network uses activation checkpointing.
        dtype: Precision of the base.
        changes: Blocks of the recipe; None leaves a block out.
    """

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
        is_sdxl = len(SIZES[size]["widths"]) == 2
        model = {
            "type": "stable_diffusion_xl" if is_sdxl else "stable_diffusion",
            "path": str(folder / "pipeline"),
            "dtype": dtype,
            "gradient_checkpointing": checkpointing,
        }
        data = {"type": "image_folder", "path": str(folder / "photos"), "captions": "sidecar"}
        sampling = {
            "sampler": {"type": "ddim", "steps": 2},
            "guidance": 1.0,
            "prompts": ["a photo"],
        }
        blocks = {
            "output": str(folder / name),
            "model": model,
            "adapter": {"type": "lora", "rank": RANK},
            "data": data,
            "transform": {"resolution": SIZES[size]["side"]},
            "cache": {"folder": str(folder / "cache")},
            "training": {"steps": steps, "batch_size": BATCH, "log_every": 10},
            "optimizer": {"lr": LR},
            "sampling": sampling,
        }
        blocks |= changes
        recipe = {key: value for key, value in blocks.items() if value is not None}
        self.run = TrainingRun(parse(recipe))
        self.trainer = self.run.trainer()
        self.loader = TimedLoader(self.trainer.loader)
        self.trainer.loader = self.loader
        self.model = self.trainer.bare
        self.batches = self.loader.batches(0)

    def step(self) -> None:
        """Make one update."""
        self.trainer.step(self.batches)
        self.trainer.progress.step += 1

    def gradient(self) -> Tensor:
        """Return the gradient of all trained weights [P] for the first batch, in float64."""
        trainer = self.trainer
        micro = next(self.loader.batches(0))
        rng = Rng(0, 0, micro.samples, BATCH)
        batch = trainer.prepare(micro, rng, trainer.accelerator.device, torch.float32)
        trainer.objective(trainer.model, batch, rng).total.backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.cat([gradient.flatten().double() for gradient in gradients])


class TimedLoader:
    """A loader that measures its own time.

    It calls `between` before each of its batches. Between two of these calls the trainer goes once
    around its loop.
    """

    def __init__(self, loader: Any):
        self.loader = loader
        self.seconds = 0.0
        self.between: Callable[[], None] = lambda: None

    def batches(self, start_step: int) -> Iterator[Any]:
        """Yield the loader's micro-batches."""
        with contextlib.closing(self.loader.batches(start_step)) as batches:
            while True:
                self.between()
                started = time.perf_counter()
                batch = next(batches)
                self.seconds += time.perf_counter() - started
                yield batch


class BareLoop:
    """What one would write by hand with diffusers and peft: no resume, no log, no files.

    Args:
        folder: The pipeline.
        device: Where it computes.
        dtype: Precision of the base; below float32 the step runs under bf16 autocast.
        num: Number of latents and texts.
    """

    def __init__(
        self, folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, num: int = 64
    ):
        self.device = device
        self.uses_autocast = dtype != torch.float32
        # The network and its LoRA, whose weights are float32
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype=dtype)
        self.model = unet.to(device)
        self.model.requires_grad_(False)
        modules = ["to_q", "to_k", "to_v", "to_out.0"]
        self.model.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=modules))
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in self.trained:
            p.data = p.data.float()
        self.optimizer = torch.optim.AdamW(self.trained, lr=LR, weight_decay=0.0)
        self.scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        # The data
        config = self.model.config
        side = config.sample_size
        self.latents = torch.randn(num, 4, side, side)
        self.words = torch.randn(num, 77, config.cross_attention_dim)
        self.pooled: Tensor | None = None
        if config.addition_embed_type == "text_time":
            size_width = 6 * config.addition_time_embed_dim
            pooled_width = config.projection_class_embeddings_input_dim - size_width
            self.pooled = torch.randn(num, pooled_width)
        pixels = torch.tensor([side, side, 0, 0, side, side]).mul(FACTOR).float()
        self.sizes = pixels.expand(BATCH, -1).to(device)
        self.model.train()

    def step(self) -> None:
        """Make one update."""
        rows = torch.randint(0, len(self.latents), (BATCH,))
        x0 = self.latents[rows].to(self.device)
        words = self.words[rows].to(self.device)
        eps = torch.randn_like(x0)
        t = torch.randint(0, 1000, (BATCH,), device=self.device)
        added = None
        if self.pooled is not None:
            added = {"text_embeds": self.pooled[rows].to(self.device), "time_ids": self.sizes}
        with torch.autocast(self.device, torch.bfloat16, enabled=self.uses_autocast):
            x_t = self.scheduler.add_noise(x0, eps, t)
            output = self.model(x_t, t, words, added_cond_kwargs=added).sample
            loss = F.mse_loss(output.float(), eps)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class TakeTurns:
    """Makes one step of the bare loop between two steps of the trainer.

    Attributes:
        trainer: The trainer's times, each by both clocks [2].
        plain: The bare loop's times.
        left: When the trainer's turn began; None before the first one.
    """

    def __init__(self, bare: BareLoop):
        self.bare = bare
        self.trainer: list[np.ndarray] = []
        self.plain: list[np.ndarray] = []
        self.left: np.ndarray | None = None

    def __call__(self) -> None:
        """Make the bare loop's step."""
        started = read_clocks()
        if self.left is not None:
            self.trainer.append(started - self.left)
        self.bare.step()
        self.left = read_clocks()
        self.plain.append(self.left - started)


def read_clocks() -> np.ndarray:
    """Return wall time and processor time [2] in seconds.

    Processor time leaves out what other programs do on the same cores.
    """
    return np.array([time.perf_counter(), time.process_time()])


# Measuring


def saved_bytes(model: nn.Module, step: Callable[[], None]) -> int:
    """Return the bytes that autograd saves in one step: distinct storages, without weights."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    weights |= {tensor.untyped_storage().data_ptr() for tensor in model.buffers()}
    # The storages are kept alive: a later one could get the address of a freed one.
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        step()
    return sum(storage.nbytes() for storage in saved.values())


def format_quartiles(values: list[float], digits: int) -> tuple[str, str]:
    """Return (median, first to third quartile) as text."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.{digits}f}", f"{low:.{digits}f} to {high:.{digits}f}"


def time_step(step: Callable[[], None], device: str) -> float:
    """Return the seconds of one step."""
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


# On a CPU


def bench_cpu(given: argparse.Namespace) -> None:
    """Measure on a CPU and print the results."""
    os.environ["ACCELERATE_USE_CPU"] = "true"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_pipeline("small", folder / "pipeline")
        write_photos(folder / "photos", SIZES["small"]["side"], 64)
        bare = BareLoop(folder / "pipeline")
        compare_loops(folder, bare, given.pairs)
        compare_variants(folder, bare, given.rounds)
        compare_precisions(folder)


def compare_loops(folder: Path, bare: BareLoop, pairs: int) -> None:
    """Let the trainer's whole loop and the bare loop take turns, and print the ratios."""
    turns = TakeTurns(bare)
    # The end of a step is seen when the next batch is asked for, so the last step is not timed.
    own = RecipeLoop(folder, "small", "overhead", steps=pairs + WARM_UP + 1)
    num_trained = sum(p.numel() for p in own.model.parameters() if p.requires_grad)
    assert num_trained == sum(p.numel() for p in bare.trained)
    own.loader.between = turns
    own.trainer.run()
    trainer = np.stack(turns.trainer[WARM_UP:])
    plain = np.stack(turns.plain[WARM_UP:-1])
    milliseconds = 1000 * np.median(plain[:, 0])
    load = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(
        f"\nbare loop {milliseconds:.0f} ms a step, {torch.get_num_threads()} thread(s), {load}, "
        f"{pairs} pairs\n"
    )
    print("| trainer over bare loop | median | quartiles | totals |\n|---|---|---|---|")
    for clock, name in enumerate(["time", "processor time"]):
        ratios = (trainer / plain)[:, clock].tolist()
        middle, spread = format_quartiles(ratios, digits=4)
        totals = trainer[:, clock].sum() / plain[:, clock].sum()
        print(f"| {name} | {middle} | {spread} | {totals:.4f} |")
    share = own.loader.seconds / np.stack(turns.trainer)[:, 0].sum()
    print(
        f"\nin the loader: {100 * share:.2f} % of the trainer's time (latents and text from the "
        "cache)\n",
        flush=True,
    )


def compare_variants(folder: Path, bare: BareLoop, rounds: int) -> None:
    """Print time and saved bytes of variants of the trainer; a time of 1 is the LoRA's."""

    def make(name: str, **changes: Any) -> RecipeLoop:
        return RecipeLoop(folder, "small", name, **changes)

    variants = {
        "LoRA": make("lora"),
        "LoRA, checkpointing": make("checkpointing", checkpointing=True),
        "LoRA, step_variation": make("smooth", **STEP_VARIATION),
        "LoRA, step_variation, checkpointing": make(
            "smooth_checkpointing", checkpointing=True, **STEP_VARIATION
        ),
        "everything trains": make("full", adapter=None),
    }
    ratios: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        times = {name: time_step(variant.step, "cpu") for name, variant in variants.items()}
        # The first round warms up: the finite difference is calibrated.
        if number > 0:
            for name in variants:
                ratios[name].append(times[name] / times["LoRA"])
    plain = saved_bytes(bare.model, bare.step)
    print("| a step | time | quartiles | saved for backward | of the bare loop's |")
    print("|---|---|---|---|---|")
    print(f"| bare loop, LoRA | | | {plain / 2**20:.1f} MiB | 1.000 |")
    for name, variant in variants.items():
        middle, spread = format_quartiles(ratios[name], digits=2)
        saved = saved_bytes(variant.model, variant.step)
        size = f"{saved / 2**20:.1f} MiB"
        print(f"| {name} | {middle} | {spread} | {size} | {saved / plain:.3f} |", flush=True)


def compare_precisions(folder: Path) -> None:
    """Print how far gradients beside a bfloat16 base are from those beside a float32 base."""
    full = RecipeLoop(folder, "small", "float32", dtype="float32")
    half = RecipeLoop(folder, "small", "bfloat16", dtype="bfloat16")
    trained = {p.dtype for p in half.model.parameters() if p.requires_grad}
    exact, near = full.gradient(), half.gradient()
    error = ((near - exact).norm() / exact.norm()).item()
    print(
        f"\nbfloat16 base: the trained weights are {trained}, their gradient differs by "
        f"{error:.2g} from that beside a float32 base"
    )


# On a GPU


def bench_gpu(given: argparse.Namespace) -> None:
    """Measure one contender after another and print the results."""
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    os.environ["ACCELERATE_USE_CPU"] = str(given.device == "cpu").lower()
    size = f"tiny_{given.size}" if given.tiny else given.size
    side = SIZES[size]["side"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_pipeline(size, folder / "pipeline", given.device, torch.bfloat16)
        write_photos(folder / "photos", side, 8)
        machine = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
        print(
            f"{size}, {side} pixels, batch {BATCH}, rank {RANK}, bf16 autocast, {given.steps} "
            f"steps, {machine}\n"
        )
        print("| a step | images/s | quartiles | peak |\n|---|---|---|---|")
        for name, make in contenders(folder, size, given.device).items():
            print(f"| {name} | {measure_alone(make, given)} |", flush=True)


def contenders(folder: Path, size: str, device: str) -> dict[str, Callable[[], Any]]:
    """Return what makes each contender, by name."""

    def bare() -> BareLoop:
        return BareLoop(folder / "pipeline", device, torch.bfloat16)

    def own(name: str, **changes: Any) -> Callable[[], RecipeLoop]:
        return lambda: RecipeLoop(folder, size, name, **changes)

    return {
        "bare loop, bf16 base": bare,
        "LoRA, bf16 base": own("half", dtype="bfloat16"),
        "LoRA, bf16 base, checkpointing": own(
            "half_checkpointing", checkpointing=True, dtype="bfloat16"
        ),
        "LoRA, float32 base": own("full"),
        "LoRA, float32 base, checkpointing": own("full_checkpointing", checkpointing=True),
        "LoRA, float32 base, step_variation": own("smooth", **STEP_VARIATION),
        "LoRA, float32 base, step_variation, checkpointing": own(
            "smooth_c", checkpointing=True, **STEP_VARIATION
        ),
    }


def measure_alone(make: Callable[[], Any], given: argparse.Namespace) -> str:
    """Return images/s, quartiles and peak memory of a contender that is alone on the device."""
    gc.collect()
    try:
        if given.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        # Messages of the cache would stand between the rows of the table.
        with contextlib.redirect_stdout(sys.stderr):
            contender = make()
        # Warm-up: kernels are chosen, the finite difference is calibrated.
        for _ in range(3):
            contender.step()
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = [time_step(contender.step, given.device) for _ in range(given.steps)]
    except torch.OutOfMemoryError:
        return "out of memory | | "
    middle, spread = format_quartiles([BATCH / seconds for seconds in times], digits=2)
    peak = ""
    if given.device == "cuda":
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return f"{middle} | {spread} | {peak}"


def main() -> None:
    """Run the chosen command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu", help="compare with the bare loop on a CPU")
    gpu = commands.add_parser("gpu", help="measure speed and memory on a GPU")
    cpu.add_argument("--pairs", type=int, default=60, help="steps of each of the two loops")
    cpu.add_argument("--rounds", type=int, default=20, help="steps of each variant")
    gpu.add_argument("--size", choices=["sd15", "sdxl"], default="sd15", help="size of the UNet")
    gpu.add_argument("--steps", type=int, default=20, help="steps of each contender")
    gpu.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    gpu.add_argument("--tiny", action="store_true", help="use small networks, to try the script")
    for command in (cpu, gpu):
        command.add_argument("--threads", type=int, default=1, help="threads of torch")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    hush_libraries()
    if given.command == "cpu":
        bench_cpu(given)
    else:
        bench_gpu(given)


if __name__ == "__main__":
    main()
