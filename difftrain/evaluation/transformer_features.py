"""Features of DINOv2 and CLIP, read by transformers from a local folder or the hub.

Images are prepared here in torch from the numbers in the processor's file: the processors of transformers change with what is installed
beside them (torchvision or not), and the protocol must say what was done.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor

from difftrain.evaluation.extractor import check_images
from difftrain.registry import FEATURES, GIVEN, InputError, PositiveInt
from difftrain.storage import digest

Fit = Literal["processor", "square", "square_plain"]
FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, which the processors' files use
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
FIXED_POINT = 22  # bits after the point of Pillow's weights for 8-bit images
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PROCESSORS = ("preprocessor_config.json", "processor_config.json")


class Preparation(NamedTuple):
    """uint8 images to a network's input. short: the shorter side after the resize, or None where size is given as it is."""

    short: int | None
    size: tuple[int, int]  # of the input, after the crop
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: Fit

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, H, W] -> float32 [N, 3, *size]."""
        images = images.expand(-1, 3, -1, -1)
        if self.fit == "square_plain":
            x = F.interpolate(images.float(), self.size, mode=self.mode, align_corners=False)
        else:
            x = crop(as_pillow(images, self.resized(*images.shape[2:]), self.mode), self.size)
        mean, std = (torch.tensor(values, device=x.device)[:, None, None] for values in (self.mean, self.std))
        return (x * self.scale - mean) / std

    def resized(self, height: int, width: int) -> tuple[int, int]:
        if self.short is None or self.fit == "square":
            return self.size
        long = int(self.short * max(height, width) / min(height, width))
        return (self.short, long) if height <= width else (long, self.short)

    def protocol(self) -> dict[str, Any]:
        rounded = "no" if self.fit == "square_plain" else "after each pass of the resize, as Pillow"
        lists = {key: list(value) for key, value in self._asdict().items() if isinstance(value, tuple)}
        return {**self._asdict(), **lists, "rounded": rounded, "grey": "repeated"}


def as_pillow(images: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """Pillow's resize of uint8 images to (height, width), to the last bit: two passes in fixed point, each rounded to 0 .. 255.

    Across first, whatever the shape: Pillow 13 goes down first for some images taller than wide, earlier versions do not.
    """
    across, down = (pillow_weights(n, m, mode).to(images.device) for n, m in ((images.shape[3], size[1]), (images.shape[2], size[0])))
    x = images.double()  # holds the products and sums of the integers exactly
    x = rounded(x @ across.T) if images.shape[3] != size[1] else x
    x = rounded(down @ x) if images.shape[2] != size[0] else x
    return x.float()


def rounded(x: Tensor) -> Tensor:
    return ((x + 2 ** (FIXED_POINT - 1)) / 2**FIXED_POINT).floor().clamp(0, 255)


def pillow_weights(num_in: int, num_out: int, mode: str) -> Tensor:
    """[num_out, num_in] float64 integers: weights times 2^22, of a filter that is as wide as the pixels of the smaller side."""
    support, kernel = (1, triangle) if mode == "bilinear" else (2, cubic)
    width = max(num_in / num_out, 1.0)
    centre = (torch.arange(num_out, dtype=torch.float64)[:, None] + 0.5) * (num_in / num_out)
    pixels = torch.arange(num_in, dtype=torch.float64)
    inside = (pixels >= (centre - support * width + 0.5).floor()) & (pixels < (centre + support * width + 0.5).floor())
    weights = torch.where(inside, kernel((pixels - centre + 0.5) / width), 0.0)
    scaled = weights / weights.sum(dim=1, keepdim=True) * 2**FIXED_POINT
    return (scaled.abs() + 0.5).floor() * scaled.sign()


def triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def cubic(x: Tensor) -> Tensor:
    """Keys' kernel with a = -1/2."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def crop(x: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((x.shape[axis + 2] - size[axis]) // 2 for axis in (0, 1))
    return x[:, :, top : top + size[0], left : left + size[1]]


def preparation(config: Mapping[str, Any], fit: Fit, where: str) -> Preparation:
    """From a processor's file. Raises InputError for what it leaves open and for steps that are not known here."""
    config = config.get("image_processor", config)
    needed = ("size", "image_mean", "image_std", "resample")
    if missing := [key for key in needed if key not in config]:
        raise InputError(f"{where}: the processor's file lacks {', '.join(missing)}. Use the file of the published model.")
    unusual = [key for key in ("do_resize", "do_rescale", "do_normalize") if not config.get(key, True)]
    if unusual or config["resample"] not in FILTERS:
        what = f"{unusual[0]}: false" if unusual else f"resample: {config['resample']} (known: 2 bilinear, 3 bicubic)"
        raise InputError(f"{where}: a processor with {what} is not supported.")
    short, size = sides(config["size"], where)
    if config.get("do_center_crop", False):
        size = sides(config.get("crop_size", config["size"]), where)[1]
    if short is None and config.get("do_center_crop", False) and size != sides(config["size"], where)[1]:
        raise InputError(f"{where}: a processor that resizes to {config['size']} and crops to {config['crop_size']} is not supported.")
    if short is not None and (short < max(size) or not config.get("do_center_crop", False)):
        raise InputError(f"{where}: a processor that resizes the shorter side to {short} and does not crop within it is not supported.")
    mean, std = tuple(config["image_mean"]), tuple(config["image_std"])
    return Preparation(short, size, FILTERS[config["resample"]], config.get("rescale_factor", 1 / 255), mean, std, fit)


def sides(size: Any, where: str) -> tuple[int | None, tuple[int, int]]:
    """A size of a processor's file as (shorter side or None, (height, width)); older files have one number for the shorter side."""
    if isinstance(size, int):
        return size, (size, size)
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"], (size["shortest_edge"],) * 2
    if set(size) == {"height", "width"}:
        return None, (size["height"], size["width"])
    raise InputError(f"{where}: a processor's size of {size} is not supported.")


class TransformerFeatures(ABC):
    """A network of transformers: its files, the preparation, batches. model: a local folder, or a name on the hub."""

    name: str
    kinds: tuple[str, ...]  # config.json's model_type
    output: str
    gives: ClassVar[frozenset[str]] = frozenset()
    preset: Mapping[str, Any] = {}

    def load(self, model: str, fit: Fit, batch_size: int, device: torch.device) -> None:
        self.model, self.batch_size, self.device = model, batch_size, device
        where = f"features {self.name!r}: {model}"
        check_folder(model, where)
        self.prepare = preparation(json.loads(self.file(PROCESSORS).read_text()), fit, where)
        kind = json.loads(self.file(("config.json",)).read_text()).get("model_type")
        if kind not in self.kinds:
            raise InputError(f"{where}: config.json says model_type {kind!r}, expected {' or '.join(map(repr, self.kinds))}.")
        import transformers

        try:
            network, read = transformers.AutoModel.from_pretrained(model, output_loading_info=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise InputError(f"{where}: transformers cannot load it: {first_line(error)}") from error
        if missing := sorted(read["missing_keys"]):  # transformers would fill them at random
            raise InputError(f"{where}: its weights lack {len(missing)} tensors of the network, such as {missing[0]}.")
        self.network = network.float().eval().requires_grad_(False)
        self.weights = digest(*(text for name, value in sorted(self.network.state_dict().items()) for text in (name, value)))
        self.network.to(device)

    def file(self, names: Sequence[str]) -> Path:
        """The first of these files that the model has, fetched where the model is a name on the hub."""
        from transformers.utils import cached_file

        why: Exception
        for name in names:
            try:
                return Path(cached_file(self.model, name))
            except (OSError, ValueError) as error:
                why = error
        raise InputError(
            f"features {self.name!r}: {self.model}: neither a folder here nor a model with {names[-1]} that can be fetched "
            f"({first_line(why)}). On a machine with network: hf download {self.model} --local-dir FOLDER; "
            f"then features: {{type: {self.name}, model: FOLDER}}."
        ) from why

    def protocol(self) -> dict[str, Any]:
        return {"type": self.name, "weights": self.weights, "output": self.output, "prepared": self.prepare.protocol()}

    @torch.no_grad()
    def extract(self, images: Tensor, outputs: Collection[str] = ("features",)) -> dict[str, Tensor]:
        """uint8 [N, 1 or 3, H, W] -> {"features": [N, D] float32 on the CPU}."""
        check_images(images, self.name)
        if unknown := set(outputs) - {"features"}:
            raise InputError(f"features {self.name!r} have no output {min(unknown)!r}; known: features.")
        batches = [self.rows(self.prepare(batch.to(self.device))).cpu() for batch in images.split(self.batch_size)] if len(images) else []
        return {"features": torch.cat(batches) if batches else torch.empty(0, self.widths["features"])} if outputs else {}

    widths: Mapping[str, int]

    @abstractmethod
    def rows(self, pixels: Tensor) -> Tensor:
        """The network's features [N, D] of its input [N, 3, H, W]."""


def check_folder(model: str, where: str) -> None:
    """Raise InputError unless a local folder has what is read; a name that is no folder is left to the hub."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or model.startswith(("/", "./", "../", "~")):
            raise InputError(f"{where} is no folder. Give the folder of a saved model, or a name on the hub such as facebook/dinov2-large.")
        return
    for names in (("config.json",), WEIGHTS, PROCESSORS):
        if not any((folder / name).is_file() for name in names):
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise InputError(f"{where} has no {' or '.join(names)}; it has {there}.")


def first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]


@FEATURES.register("dinov2")
class Dinov2(TransformerFeatures):
    """The class token of DINOv2 after the last layer norm.

    Oquab et al. 2023, arXiv:2304.07193. fit: "square" resizes to the input's size as a whole, as the published Frechet distances do
    (Stein et al. 2023, arXiv:2306.04675: ViT-L/14, 224 x 224); "processor" resizes the shorter side and crops, "square_plain" resizes
    as a whole without antialias.
    """

    name = "dinov2"
    kinds = ("dinov2", "dinov2_with_registers")
    output = "class token after the last layer norm"

    def __init__(
        self,
        model: str = "facebook/dinov2-large",
        fit: Fit = "square",
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = torch.device("cpu"),  # noqa: B008
    ):
        self.load(model, fit, batch_size, device)
        self.widths = {"features": self.network.config.hidden_size}

    def rows(self, pixels: Tensor) -> Tensor:
        return self.network(pixel_values=pixels).last_hidden_state[:, 0]


@FEATURES.register("clip")
class Clip(TransformerFeatures):
    """CLIP's image embedding after the projection, not normalised, and `text` in the same space.

    Radford et al. 2021, arXiv:2103.00020. fit: "processor" resizes the shorter side and crops; CMMD's code (arXiv:2401.09603,
    openai/clip-vit-large-patch14-336) resizes as a whole without antialias: "square_plain".
    """

    name = "clip"
    kinds = ("clip",)
    output = "projected image embedding, not normalised"
    gives: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        fit: Fit = "processor",
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = torch.device("cpu"),  # noqa: B008
    ):
        self.load(model, fit, batch_size, device)
        self.widths = {"features": self.network.config.projection_dim}
        self.tokenizer: Any = None

    def rows(self, pixels: Tensor) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """[N, D] float32 on the CPU, not normalised; a caption longer than the model reads is cut."""
        self.tokenizer = self.tokenizer or self.opened_tokenizer()
        longest = self.network.config.text_config.max_position_embeddings
        rows = []
        for start in range(0, len(captions), self.batch_size):
            batch = list(captions[start : start + self.batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            # No mask: the text network looks back only, and its output is read at the caption's end, before the padding.
            pooled = self.network.text_model(input_ids=tokens["input_ids"].to(self.device)).pooler_output
            rows.append(self.network.text_projection(pooled).cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.widths["features"])

    def opened_tokenizer(self) -> Any:
        import transformers

        folder = Path(self.model)
        # Without its files transformers makes a tokenizer that knows no word, and says nothing.
        if folder.is_dir() and not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
            raise InputError(
                f"features 'clip': {folder} has no tokenizer. Copy there the published tokenizer.json, or vocab.json and merges.txt."
            )
        try:
            return transformers.CLIPTokenizer.from_pretrained(self.model)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"features 'clip': the tokenizer of {self.model} cannot be read: {first_line(error)}") from error
