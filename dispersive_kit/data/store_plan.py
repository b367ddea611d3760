"""How large a store will be and how long it will take, by arithmetic alone."""

import math
from dataclasses import dataclass

IMAGENET_IMAGES = 1_281_167
LABEL_BYTES = 8
HEADER_BYTES = 168  # of a safetensors shard, to within a few bytes: its tensors' names, types and shapes


@dataclass(frozen=True)
class StorePlan:
    """A store of so many images; shape is of one latent (C, h, w)."""

    images: int
    shape: tuple[int, ...]
    flip: bool = True
    value_bytes: int = 2  # float16 or bfloat16
    shard_size: int = 4096

    @property
    def image_bytes(self) -> int:
        """Mean and std, of the image and of its mirror image."""
        return 2 * (1 + self.flip) * math.prod(self.shape) * self.value_bytes + LABEL_BYTES

    @property
    def shards(self) -> int:
        return math.ceil(self.images / self.shard_size)

    @property
    def bytes(self) -> int:
        return self.images * self.image_bytes + self.shards * HEADER_BYTES

    def hours(self, images_per_second: float) -> float:
        return self.images / images_per_second / 3600

    def __str__(self) -> str:
        mirrored = "with mirror images" if self.flip else "without mirror images"
        return (
            f"{self.images:,} images {mirrored}, latents {'x'.join(map(str, self.shape))}: {self.image_bytes:,} bytes "
            f"each, {size_in_words(self.bytes)} in {self.shards:,} shards of at most "
            f"{size_in_words(self.shard_size * self.image_bytes)}"
        )


def size_in_words(count: int) -> str:
    """1,234,567 -> 1.2 MB (powers of ten, as disks are sold)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
