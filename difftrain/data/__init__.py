"""Where images come from: importing this package registers the data sets `digits`, `image_folder` and `huggingface`.

items: what a data set yields. transform: one image to uint8 pixels. loader: the micro-batches of each step.
"""

from difftrain.data import digits, huggingface, image_folder

__all__ = ["digits", "huggingface", "image_folder"]
