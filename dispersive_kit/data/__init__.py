"""Data: generated 2-D sets and small image sets as plain tensors, and stores of latents.

Sets     toy, images (the named sets, or a folder held in memory), folder (list, read, crop)
Latents  autoencoders, encode (a folder into a store), latents (the store, its spec, the order of its rows)
Files    files (whole or not there, one writer at a time; those that come with the package)
"""

from dispersive_kit.data.images import ImageSet, data_folder, load_images, to_float, to_uint8
from dispersive_kit.data.toy import TOY_SETS, GaussianMixture, sample_toy

__all__ = [
    "TOY_SETS",
    "GaussianMixture",
    "ImageSet",
    "data_folder",
    "load_images",
    "sample_toy",
    "to_float",
    "to_uint8",
]
