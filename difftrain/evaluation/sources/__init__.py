"""Where the samples of an evaluation come from: a network, or a data set."""

from difftrain.evaluation.sources.base import Block, Source
from difftrain.evaluation.sources.generated import GeneratedSamples
from difftrain.evaluation.sources.images import DatasetImages
from difftrain.evaluation.sources.tensors import DatasetTensors

__all__ = ["Block", "DatasetImages", "DatasetTensors", "GeneratedSamples", "Source"]
