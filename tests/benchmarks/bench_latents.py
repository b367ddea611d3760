"""Reading latents in random order: `python tests/benchmarks/bench_latents.py [--quick]`.

50,000 latents of 4x32x32 in one run, batches of 256 in a random order that both arms share. The kit's store against
the public practice (LightningDiT's ImgLatentDataset): shards of the same size in safetensors, of which one is opened
for each item to read a slice of its latents. Both are timed in turns, from the page cache, which both have warmed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1] / "data"))
from latent_stores import write_store

from dispersive_kit.data.latents import LatentStore

BATCH = 256


def open_per_item(store: LatentStore) -> Callable[[np.ndarray], torch.Tensor]:
    """A file opened for each item, and one slice of it read."""
    size = store.spec.shards[0].rows
    files = [str(store.path / shard.file) for shard in store.spec.shards]

    def read(rows: np.ndarray) -> torch.Tensor:
        items = []
        for row in rows.tolist():
            with safe_open(files[row // size], framework="pt", device="cpu") as file:
                place = row % size
                items.append(file.get_slice("posterior")[place : place + 1, 0])
        return torch.cat(items)

    return read


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2,000 latents, two repeats")
    quick = parser.parse_args().quick
    rows, repeats, per_arm = (2_000, 2, 4) if quick else (50_000, 5, 20)
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder) / "store", rows=rows, shape=(4, 32, 32), shard_size=rows // 5, flip=False)
        store = LatentStore(path)
        arms = {"this store": store.read, "a file opened per item": open_per_item(store)}
        first = np.random.default_rng(0).permutation(rows)[:BATCH]
        assert torch.equal(*(read(first) for read in arms.values()))
        store.verify()  # warms the page cache
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for repeat in range(repeats):
            order = np.random.default_rng(repeat).integers(0, rows, BATCH * per_arm)
            for name, read in arms.items():
                start = time.perf_counter()
                for batch in np.split(order, per_arm):
                    read(batch)
                seconds[name].append(time.perf_counter() - start)
        memory = anonymous_mb()
        for batch in np.array_split(np.random.default_rng(1).permutation(rows), rows // BATCH):
            store.read(batch)
        grown = anonymous_mb() - memory
    print(f"{rows:,} latents of 4x32x32 (mean and std, float16), batches of {BATCH}, median of {repeats}")
    base = statistics.median(seconds["a file opened per item"])
    for name, times in seconds.items():
        took = statistics.median(times)
        print(f"{name:24s} {BATCH * per_arm / took:12,.0f} latents/s = {base / took:6.1f} times")
    size = sum(shard.bytes for shard in store.spec.shards) / 1e6
    print(f"RssAnon after a whole epoch of {size:,.0f} MB: {grown:+.1f} MB")


if __name__ == "__main__":
    main()
