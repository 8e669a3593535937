"""Latents and states of captions encoded once, before training, and kept in a folder that several runs may share.

shards: tensors by key in safetensors files. contents: what the images of a data set are. encoding: what is missing, on all processes.
dataset: the table that training then reads. building: from the recipe's section to that table.
"""

from difftrain.cache.building import Cache, build_cache
from difftrain.cache.dataset import CachedDataset

__all__ = ["Cache", "CachedDataset", "build_cache"]
