"""How LoRA files of one kind of network are read and named.

diffusers reads files through a loader mixin; kohya's scripts and ComfyUI have names of their own.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from difftrain.core.errors import InputError
from difftrain.models.lora.kohya import Layers


class LoraFile(NamedTuple):
    """What a LoRA file holds.

    Args:
        state: Weights by diffusers' keys.
        alphas: Alphas by layer, where the file has them.
        config: The configuration of the adapter, where the file states it.
    """

    state: dict[str, Tensor]
    alphas: dict[str, Any] | None
    config: dict[str, Any] | None


class LoraFormat:
    """LoRA files of one kind of network. The base class knows a network without such files."""

    def read(self, model: nn.Module, path: str) -> LoraFile:
        """Read a LoRA file.

        Args:
            model: The network that it is for.
            path: A local file, or a hub id.

        Raises:
            InputError: If no program writes LoRA files for such a network.
        """
        raise InputError(
            f"lora: {path!r} cannot be loaded into a {type(model).__name__}; LoRA files are read "
            "for networks of diffusers. Leave the LoRA out."
        )

    def kohya_state(self, model: nn.Module, layers: Mapping[str, Layers]) -> dict[str, Tensor]:
        """Return a LoRA under the names that kohya's scripts and ComfyUI read.

        Args:
            model: The network.
            layers: LoRA by folder in the pipeline ("unet", "text_encoder"), then by layer.

        Raises:
            InputError: If these programs have no names for such a network, or for a layer.
        """
        raise InputError(
            "neither kohya's scripts nor ComfyUI have names for the layers of a "
            f"{type(model).__name__}. Use the diffusers file in lora/."
        )

    def kohya_metadata(self, model: nn.Module) -> dict[str, str]:
        """Return what kohya's scripts write into the header about this kind of network."""
        return {}


class DiffusersLora(LoraFormat):
    """LoRA files that a loader mixin of diffusers reads.

    Attributes:
        loader: The mixin's name in diffusers.loaders.
    """

    loader: ClassVar[str]

    def options(self, model: nn.Module) -> dict[str, Any]:
        """Return what the mixin is given besides the path."""
        return {}

    def read(self, model: nn.Module, path: str) -> LoraFile:
        """Read a LoRA file with diffusers' mixin.

        Args:
            model: The network that it is for.
            path: A local file, or a hub id.
        """
        from diffusers import loaders

        mixin = getattr(loaders, self.loader)
        found = mixin.lora_state_dict(path, return_lora_metadata=True, **self.options(model))
        alphas = found[1] if len(found) == 3 else None
        return LoraFile(found[0], alphas, found[-1])


class UNetLora(DiffusersLora):
    """LoRA files of UNets: Stable Diffusion's, and those that this library writes."""

    loader = "StableDiffusionLoraLoaderMixin"

    def options(self, model: Any) -> dict[str, Any]:
        """Return the UNet's config, by which diffusers numbers the blocks of SDXL."""
        return {"unet_config": model.config}


class TransformerLora(DiffusersLora):
    """LoRA files of transformers in diffusers' keys."""

    loader = "SD3LoraLoaderMixin"
