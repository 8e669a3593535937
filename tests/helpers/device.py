"""A device in place of a GPU: its memory is the host's, its type is another one than the CPU's.

torch refuses to mix its tensors with those of the CPU, as it does on CUDA, and its process group
(`helpers.device_group`) serves it alone, as NCCL serves GPUs. So a tensor that was left on the CPU
is an error here too. What it cannot show: kernels that GPUs lack, work that runs in the background,
the precision of bf16 kernels, and the memory of a GPU.

The extension is compiled once, into a folder beside the tests.
"""

import collections
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SOURCE = Path(__file__).with_name("pretend_device.cpp")
BUILD = Path(__file__).parents[1] / ".build"
NAME = "pretend"
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal"}


class NoCompiler(RuntimeError):
    """The extension cannot be compiled here."""


def reason_to_skip() -> str:
    """Return why the device cannot be had here; empty if it can."""
    compiler = shutil.which("g++")
    return "" if compiler else "the pretend device needs a C++ compiler (g++)"


def library() -> Path:
    """Return the compiled extension. Of several processes one compiles it, the others wait.

    Raises:
        NoCompiler: If there is no compiler, or if it fails.
    """
    reason = reason_to_skip()
    if reason:
        raise NoCompiler(reason)
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    BUILD.mkdir(exist_ok=True)
    compiled = BUILD / f"pretend-{key}.so"
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not compiled.exists():
            compile_to(compiled)
    return compiled


def compile_to(target: Path) -> None:
    """Compile the extension into a file, which is there when it is whole."""
    root = Path(torch.__file__).parent
    includes = [root / "include", root / "include/torch/csrc/api/include"]
    partial = target.with_suffix(f".{os.getpid()}")
    done = subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O0",
            "-fPIC",
            "-shared",
            *(f"-I{folder}" for folder in includes),
            str(SOURCE),
            "-o",
            str(partial),
            f"-L{root / 'lib'}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise NoCompiler(f"the pretend device does not compile here:\n{done.stderr[-2000:]}")
    partial.rename(target)


class Stream:
    """The device's one stream, on which everything is finished at once."""

    def __init__(self, *given: Any, **more: Any):
        pass

    def wait_stream(self, other: "Stream") -> None:
        """There is nothing to wait for."""

    def wait_event(self, event: "Event") -> None:
        """There is nothing to wait for."""

    def record_event(self, event: "Event | None" = None) -> "Event":
        """Return an event that has happened."""
        return event or Event()

    def synchronize(self) -> None:
        """There is nothing to wait for."""


class Event:
    """An event that has happened."""

    def __init__(self, *given: Any, **more: Any):
        pass

    def record(self, stream: Stream | None = None) -> None:
        """It happens at once."""

    def wait(self, stream: Stream | None = None) -> None:
        """There is nothing to wait for."""

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def query(self) -> bool:
        """Return that it has happened."""
        return True


def device_module() -> ModuleType:
    """Return what becomes `torch.pretend`, with the functions that torch asks a device for."""
    module: Any = ModuleType(f"torch.{NAME}")
    module.Stream, module.Event = Stream, Event
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module._is_in_bad_fork = lambda: False
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = lambda device: None
    module.device = lambda device: contextlib.nullcontext()
    module.manual_seed_all = lambda seed: None
    module.get_rng_state = lambda device=None: torch.empty(0, dtype=torch.uint8)
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16, torch.float32]
    module.synchronize = lambda device=None: None
    module.current_stream = lambda device=None: Stream()
    module.stream = lambda stream: contextlib.nullcontext()
    module.memory_allocated = lambda device=None: 0
    module.empty_cache = lambda: None
    return module


def move_in_place(to: Callable[..., Any]) -> Callable[..., Any]:
    """Return `Module.to` that keeps the parameters the same objects, as it does for CUDA.

    By itself torch would make new ones here, and an optimizer would go on with those on the CPU.
    """

    @functools.wraps(to)
    def moved(module: torch.nn.Module, *given: Any, **more: Any) -> torch.nn.Module:
        before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return to(module, *given, **more)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(before)

    return moved


def register() -> torch.device:
    """Load the extension and give the device its name. Once in a process, for all of its life.

    Returns:
        The device.

    Raises:
        NoCompiler: If the extension cannot be compiled.
    """
    if not hasattr(torch, NAME):
        compiled = library()
        torch.utils.rename_privateuse1_backend(NAME)
        torch.ops.load_library(str(compiled))
        torch._register_device_module(NAME, device_module())
        torch.utils.generate_methods_for_privateuse1_backend()
        torch.nn.Module.to = move_in_place(torch.nn.Module.to)
    return torch.device(NAME, 0)


def accelerate_uses_it() -> None:
    """Let accelerate take this device for its GPU, and its process group for NCCL."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    import helpers.device_group  # registers the process group

    device = register()

    def prepare_backend(self: Any, cpu: bool = False, *given: Any) -> tuple[str | None, Any]:
        if "LOCAL_RANK" in os.environ:
            return helpers.device_group.NAME, DistributedType.MULTI_GPU
        return None, DistributedType.NO

    def set_device(self: Any) -> None:
        if self.device is None:
            self.device = device

    PartialState._prepare_backend = prepare_backend
    PartialState.set_device = set_device
    os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"  # every process has a device 0


def is_on_device(value: Any) -> bool:
    """Return whether a value is a tensor of the device."""
    return isinstance(value, Tensor) and value.device.type == NAME


class Watch(TorchDispatchMode):
    """Counts where the host waits for the device, and what is computed there in float64.

    It sees the thread in which it is entered.

    Args:
        forbids_float64: Whether an operator that makes float64 on the device is an error, as it
            is on devices that lack it.
        package: Part of the paths of files that count as places.

    Attributes:
        waits: How often the host waited, by (file:line, why).
        float64: How often float64 was made on the device, by (file:line, operator).
    """

    def __init__(self, forbids_float64: bool = False, package: str = "/difftrain/"):
        super().__init__()
        self.forbids_float64, self.package = forbids_float64, package
        self.waits: collections.Counter[tuple[str, str]] = collections.Counter()
        self.float64: collections.Counter[tuple[str, str]] = collections.Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator, and note what it does."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        given, made = tree_leaves((args, kwargs)), tree_leaves(result)
        why = self._why_it_waits(name, args, given, made)
        if why:
            self.waits[self._place(), why] += 1
        if any(is_on_device(t) and t.dtype == torch.float64 for t in made):
            if self.forbids_float64:
                raise TypeError(f"{self._place()}: {name} makes float64 on the device")
            self.float64[self._place(), name] += 1
        return result

    def _why_it_waits(
        self, name: str, args: tuple[Any, ...], given: list[Any], made: list[Any]
    ) -> str:
        if name in WAITING:
            return name if any(is_on_device(value) for value in given) else ""
        if name in ("index", "index_put_") and any(is_on_device(value) for value in given):
            indices = tree_leaves(args[1])
            on_cpu = [i for i in indices if isinstance(i, Tensor) and not is_on_device(i)]
            return "index by a CPU tensor" if on_cpu else ""
        if name not in ("_to_copy", "copy_", "_copy_from"):
            return ""
        source, target = args[0], made[0]
        if name == "copy_":
            source, target = args[1], args[0]
        if is_on_device(source) == is_on_device(target):
            return ""
        return "copy to the device" if is_on_device(target) else "copy to the host"

    def _place(self) -> str:
        frames = [f for f in traceback.extract_stack() if self.package in f.filename]
        if not frames:
            return "elsewhere"
        last = frames[-1]
        return f"{last.filename.rpartition(self.package)[2]}:{last.lineno}"


@contextlib.contextmanager
def watched(**options: Any) -> Iterator[Watch]:
    """Watch operators within the context; see `Watch`."""
    watch = Watch(**options)
    with watch:
        yield watch
