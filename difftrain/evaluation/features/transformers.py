"""Features of DINOv2 and CLIP, which transformers reads from a local folder or from the hub."""

import json
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from difftrain.core.digests import digest
from difftrain.core.errors import InputError
from difftrain.core.registry import GIVEN, PositiveInt
from difftrain.evaluation.evidence import MAIN
from difftrain.evaluation.features.base import check_images
from difftrain.evaluation.features.preprocessing import Fit, preprocessing_of
from difftrain.evaluation.slots import FEATURES, FeatureExtractor
from difftrain.models.files import first_line

WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
CPU = torch.device("cpu")


class TransformerFeatures(FeatureExtractor):
    """Features of a network of transformers.

    Args:
        model: A local folder, or a name on the hub.
        fit: How images are fitted to the input's size, see `Preprocessing`.
        batch_size: Images that go through the network together.
        device: Where it computes.

    Attributes:
        model_types: The `model_type`s of config.json that are accepted.
        output: What the protocol calls the features.

    Raises:
        InputError: If the model is missing, broken, or of another type.
    """

    takes_any_size = True
    model_types: ClassVar[tuple[str, ...]]
    output: ClassVar[str]

    def __init__(self, model: str, fit: Fit, batch_size: int, device: torch.device):
        self.model, self.batch_size, self.device = model, batch_size, device
        where = f"features {self.name!r}: {model}"
        # Its files
        check_folder(model, where)
        processor = json.loads(self._file(PROCESSORS).read_text())
        self.prepare = preprocessing_of(processor, fit, where)
        kind = json.loads(self._file(("config.json",)).read_text()).get("model_type")
        if kind not in self.model_types:
            raise InputError(
                f"{where}: config.json says model_type {kind!r}, expected "
                f"{' or '.join(map(repr, self.model_types))}."
            )
        # Its weights
        self.network = read_network(model, where)
        parts: list[Any] = []
        for name, value in sorted(self.network.state_dict().items()):
            parts += [name, value]
        self.weights = digest(*parts)
        self.network.to(device)

    @abstractmethod
    def rows(self, pixels: Tensor) -> Tensor:
        """Return the features [N, D] of the network's input [N, 3, H, W]."""

    def protocol(self) -> dict[str, Any]:
        """Return what fixes the numbers."""
        return {
            "type": self.name,
            "weights": self.weights,
            "output": self.output,
            "prepared": self.prepare.protocol(),
        }

    @torch.no_grad()
    def extract(self, samples: Tensor, outputs: Collection[str] = (MAIN,)) -> dict[str, Tensor]:
        """Return the features of images [N, 1 or 3, H, W] uint8."""
        check_images(samples, self.name)
        self.check_outputs(outputs)
        if not outputs:
            return {}
        found = [torch.empty(0, self.widths[MAIN])]
        for start in range(0, len(samples), self.batch_size):
            batch = samples[start : start + self.batch_size].to(self.device)
            found.append(self.rows(self.prepare(batch)).cpu())
        return {MAIN: torch.cat(found)}

    def _file(self, names: Sequence[str]) -> Path:
        """Return the first of some files that the model has, fetched if it is a name on the hub."""
        from transformers.utils import cached_file

        problems: list[Exception] = []
        for name in names:
            try:
                return Path(cached_file(self.model, name))
            except (OSError, ValueError) as error:
                problems.append(error)
        raise InputError(
            f"features {self.name!r}: {self.model}: neither a folder here nor a model with "
            f"{names[-1]} that can be fetched ({first_line(problems[-1])}). On a machine with "
            f"network: hf download {self.model} --local-dir FOLDER; then features: "
            f"{{type: {self.name}, model: FOLDER}}."
        ) from problems[-1]


def read_network(model: str, where: str) -> Any:
    """Read a network of transformers in float32, frozen.

    Args:
        model: A local folder, or a name on the hub.
        where: What a message calls it.

    Raises:
        InputError: If it cannot be read, or if tensors of it are missing.
    """
    import transformers

    try:
        network, read = transformers.AutoModel.from_pretrained(model, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{where}: transformers cannot load it: {first_line(error)}") from error
    missing = sorted(read["missing_keys"])
    if missing:  # transformers would fill them at random
        raise InputError(
            f"{where}: its weights lack {len(missing)} tensors of the network, such as "
            f"{missing[0]}."
        )
    return network.float().eval().requires_grad_(False)


def check_folder(model: str, where: str) -> None:
    """Check that a local folder has what is read; a name that is not a folder is left to the hub.

    Args:
        model: The folder, or a name on the hub.
        where: What a message calls it.

    Raises:
        InputError: If a file is missing.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists() or model.startswith(("/", "./", "../", "~")):
            raise InputError(
                f"{where} is not a folder. Give the folder of a saved model, or a name on the hub "
                "such as facebook/dinov2-large."
            )
        return
    for names in (("config.json",), WEIGHTS, PROCESSORS):
        if not any((folder / name).is_file() for name in names):
            there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
            raise InputError(f"{where} has no {' or '.join(names)}; it has {there}.")


@FEATURES.register("dinov2")
class Dinov2(TransformerFeatures):
    """The class token of DINOv2 after the last layer norm.

    Args:
        model: A local folder, or a name on the hub.
        fit: "square" resizes to the input's size as a whole, as the published Frechet distances
            do (Stein et al. 2023, arXiv:2306.04675: ViT-L/14, 224 x 224). "processor" resizes the
            shorter side and crops. "square_plain" resizes as a whole without antialias.
        batch_size: Images that go through the network together.
        device: Where it computes.

    Reference:
        Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision",
        arXiv:2304.07193.
    """

    name = "dinov2"
    model_types = ("dinov2", "dinov2_with_registers")
    output = "class token after the last layer norm"

    def __init__(
        self,
        model: str = "facebook/dinov2-large",
        fit: Fit = "square",
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        super().__init__(model, fit, batch_size, device)

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features."""
        return {MAIN: self.network.config.hidden_size}

    def rows(self, pixels: Tensor) -> Tensor:
        """Return the features [N, D] of the network's input [N, 3, H, W]."""
        states: Tensor = self.network(pixel_values=pixels).last_hidden_state
        return states[:, 0]


@FEATURES.register("clip")
class CLIP(TransformerFeatures):
    """CLIP's image embedding after the projection, not normalised, and `text` in the same space.

    Args:
        model: A local folder, or a name on the hub.
        fit: "processor" resizes the shorter side and crops. CMMD's code (arXiv:2401.09603,
            openai/clip-vit-large-patch14-336) resizes as a whole without antialias: "square_plain".
        batch_size: Images, or captions, that go through the network together.
        device: Where it computes.

    Reference:
        Radford et al. 2021, "Learning Transferable Visual Models From Natural Language
        Supervision", arXiv:2103.00020.
    """

    name = "clip"
    model_types = ("clip",)
    output = "projected image embedding, not normalised"
    gives: ClassVar[frozenset[str]] = frozenset({"text"})

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        fit: Fit = "processor",
        batch_size: PositiveInt = 64,
        device: Annotated[torch.device, GIVEN] = CPU,
    ):
        super().__init__(model, fit, batch_size, device)
        self.tokenizer: Any = None

    @property
    def widths(self) -> Mapping[str, int]:
        """The width of the features."""
        return {MAIN: self.network.config.projection_dim}

    def rows(self, pixels: Tensor) -> Tensor:
        """Return the features [N, D] of the network's input [N, 3, H, W]."""
        pooled = self.network.vision_model(pixel_values=pixels).pooler_output
        embedding: Tensor = self.network.visual_projection(pooled)
        return embedding

    @torch.no_grad()
    def text(self, captions: Sequence[str]) -> Tensor:
        """Map captions to the space of the images' features, not normalised.

        A caption longer than the model reads is cut.

        Returns:
            [N, D] float32 on the CPU.

        Raises:
            InputError: If the model has no tokenizer.
        """
        if self.tokenizer is None:
            self.tokenizer = self._read_tokenizer()
        longest = self.network.config.text_config.max_position_embeddings
        rows = [torch.empty(0, self.widths[MAIN])]
        for start in range(0, len(captions), self.batch_size):
            batch = list(captions[start : start + self.batch_size])
            tokens = self.tokenizer(
                batch, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            )
            # No mask: the text network looks back only, and its output is read at the caption's
            # end, before the padding.
            ids = tokens["input_ids"].to(self.device)
            pooled = self.network.text_model(input_ids=ids).pooler_output
            rows.append(self.network.text_projection(pooled).cpu())
        return torch.cat(rows)

    def _read_tokenizer(self) -> Any:
        import transformers

        folder = Path(self.model)
        # Without its files transformers makes a tokenizer that knows no word, and says nothing.
        if folder.is_dir() and not has_tokenizer(folder):
            raise InputError(
                f"features 'clip': {folder} has no tokenizer. Copy there the published "
                "tokenizer.json, or vocab.json and merges.txt."
            )
        try:
            return transformers.CLIPTokenizer.from_pretrained(self.model)
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"features 'clip': the tokenizer of {self.model} cannot be read: "
                f"{first_line(error)}"
            ) from error


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the files of a tokenizer."""

    def has_all(names: Sequence[str]) -> bool:
        return all((folder / name).is_file() for name in names)

    return any(has_all(names) for names in TOKENIZERS)
