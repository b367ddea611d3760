"""Data: generated 2-D sets and small image sets as plain tensors, and stores of latents.

Sets     toy, images (the named sets, or a folder held in memory)
Encode   image_folder (list, read, crop), autoencoders, encoder (one process at work), encode (several, and progress),
         store_plan (size and hours beforehand), sample_photographs (a folder to practise on)
Read     latents (the store and its spec), selection (classes, balance, order), permutation, store_check
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
