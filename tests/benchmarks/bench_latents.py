"""Reading latents in random order: `python tests/benchmarks/bench_latents.py [--quick]`.

50,000 latents of 4x32x32, batches of 256 in a random order that both arms share. The kit's store against
the public practice (LightningDiT's ImgLatentDataset): shards of the same size in safetensors, of which one is opened
for each item to read a slice of its latents. Both are timed in turns, from the page cache, which both have warmed.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from timing import in_turns, is_quick, row

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
        for i in rows.tolist():
            with safe_open(files[i // size], framework="pt", device="cpu") as file:
                place = i % size
                items.append(file.get_slice("posterior")[place : place + 1, 0])
        return torch.cat(items)

    return read


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("RssAnon:") + 1]) / 1000


def main() -> None:
    rows, rounds, batches = (2_000, 2, 4) if is_quick(__doc__) else (50_000, 5, 20)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = write_store(Path(folder) / "store", rows=rows, shape=(4, 32, 32), shard_size=rows // 5, flip=False)
        store = LatentStore(path)
        arms = {"this store": store.read, "a file opened per item": open_per_item(store)}
        order = rng.integers(0, rows, (batches, BATCH))
        assert torch.equal(*(read(order[0]) for read in arms.values()))
        store.verify()  # warms the page cache
        took = in_turns({name: lambda read=read: [read(b) for b in order] for name, read in arms.items()}, rounds)
        memory = anonymous_mb()
        for batch in np.array_split(rng.permutation(rows), rows // BATCH):
            store.read(batch)
        grown = anonymous_mb() - memory
    print(f"{rows:,} latents of 4x32x32 (mean and std, float16), batches of {BATCH}, median of {rounds}")
    for name, seconds in took.items():
        times = took["a file opened per item"] / seconds
        row(name, f"{batches * BATCH / seconds:,.0f} latents/s = {times:.1f} x")
    size = sum(shard.bytes for shard in store.spec.shards) / 1e6
    row(f"RssAnon after a whole epoch of {size:,.0f} MB", f"{grown:+.1f} MB")


if __name__ == "__main__":
    main()
