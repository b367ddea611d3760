"""Data: generated 2-D sets and small image sets as plain tensors, stores of latents, atomic file writes."""

from dispersive_kit.data.images import ImageSet, data_folder, load_images, to_float, to_uint8
from dispersive_kit.data.toy import TOY_SETS, sample_toy
