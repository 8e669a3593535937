"""Latents and text states, encoded once before training, in a folder that several runs may share.

shards: tensors by key in safetensors files. contents: digests of a data set's images and captions.
encoding: encodes what is missing, on all processes. dataset: the data set that training then reads.
building: from the recipe's section to that data set.
"""

from difftrain.data.cache.building import Cache, build_cache
from difftrain.data.cache.dataset import CachedDataset
from difftrain.data.cache.encoding import MomentsEncoder, PromptEncoder

__all__ = ["Cache", "CachedDataset", "MomentsEncoder", "PromptEncoder", "build_cache"]
