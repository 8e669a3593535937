"""Where the samples of an evaluation come from: a network, or a data set."""

from difftrain.evaluation.sources.base import SampleBlock, Source
from difftrain.evaluation.sources.dataset_images import DatasetImages
from difftrain.evaluation.sources.dataset_tensors import DatasetTensors
from difftrain.evaluation.sources.generated_samples import GeneratedSamples

__all__ = ["DatasetImages", "DatasetTensors", "GeneratedSamples", "SampleBlock", "Source"]
