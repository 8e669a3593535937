"""The registries of models, adapters and encoders."""

from difftrain.core.registry import Registry

MODELS = Registry(
    "model", "the network", ["difftrain.models.denoisers", "difftrain.models.pipelines"]
)
ADAPTERS = Registry(
    "adapter", "which parameters train, and what is added to them", ["difftrain.models.adapters"]
)
ENCODERS = Registry("encoder", "pixels to latents and back", ["difftrain.models.autoencoder"])
