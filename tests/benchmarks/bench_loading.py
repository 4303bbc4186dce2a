"""Images per second of CPU time: per-image PIL pipeline, packed images, and a bare copy of as many packed bytes.

    python tests/benchmarks/bench_loading.py                  # the pipelines, in turn, in one run
    python tests/benchmarks/bench_loading.py --memory 200000  # resident memory of packing an index and training on it

All pipelines read JPEG files of 128 x 64 to batches of 256 x 128. Rates depend on the machine, their ratios less; CPU
time rather than the clock, since other programs may share the cores.
`--memory` makes an index of many records over a few files (hard links), divides it over four source domains, packs it
at 64 x 32, trains LDA's small network on it and prints resident memory that is not page cache after each part.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from lda.config import preset
from lda.data.options import BatchSettings
from lda.data.packed import pack
from lda.data.records import ImageRecord
from lda.data.sources import Content, EvaluationSet, SourceDomain, Task
from lda.data.transforms import MEAN, STD, Augment, normalise
from lda.trainer import Trainer

HEIGHT, WIDTH, PAD, BATCH = 256, 128, 10, 64


def write_images(folder: Path, count: int) -> list[Path]:
    """JPEG files of 128 x 64 with structure at every scale, about as large as those of Market-1501."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).resize(
            (64, 128), Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 6, (128, 64, 3))
        Image.fromarray(np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")
    return sorted(folder.glob("*.jpg"))


def pil_image(path: Path, rng: np.random.Generator) -> torch.Tensor:
    """One image as most tools load it: decode, resize, flip, pad, crop, to tensor, normalise."""
    with Image.open(path) as image:
        image = image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
    image = ImageOps.expand(image, PAD)
    left, top = rng.integers(2 * PAD + 1, size=2).tolist()
    image = image.crop((left, top, left + WIDTH, top + HEIGHT))
    tensor = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()).float().div_(255)
    return tensor.sub_(torch.tensor(MEAN)[:, None, None]).div_(torch.tensor(STD)[:, None, None])


def rate(work: Callable[[np.ndarray], object], batches: list[np.ndarray]) -> float:
    """Images per second of CPU time: median over batches, each made and dropped as training does."""
    seconds = []
    for rows in (batches[0], *batches):
        start = time.process_time()
        work(rows)
        seconds.append(time.process_time() - start)
    return BATCH / statistics.median(seconds[1:])


def speed(count: int, repeats: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        paths = write_images(Path(temporary), count)
        images = pack([ImageRecord(path, 0, 0) for path in paths], HEIGHT, WIDTH, Path(temporary) / "cache")
        rng = np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        augment = Augment(BatchSettings(pad=PAD, jitter_probability=0, auto_augment_probability=0))
        full = Augment(BatchSettings(pad=PAD, auto_augment_probability=0))
        works: dict[str, Callable[[np.ndarray], object]] = {
            "PIL pipeline": lambda rows: torch.stack([pil_image(paths[row], rng) for row in rows]),
            "packed, augmented": lambda rows: augment(images.batch(rows), generator),
            "packed, and colour jitter": lambda rows: full(images.batch(rows), generator),
            "packed, normalised": lambda rows: normalise(images.batch(rows)),
            "packed, uint8": lambda rows: images.batch(rows),
            "memory copy": lambda rows: images.array[rows[0] : rows[0] + BATCH].copy(),
        }
        batches = [rng.permutation(count - BATCH)[:BATCH] for _ in range(repeats)]
        results = {name: rate(work, batches) for name, work in works.items()}
    for name, value in results.items():
        beside = f"{value / results['PIL pipeline']:6.1f} x PIL, {value / results['memory copy']:5.2f} of the copy"
        print(f"{name:<26} {value:9,.0f} images/s   {beside}")


def memory(count: int, steps: int = 300) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        files = write_images(Path(temporary), 50)
        index = Path(temporary) / "index"
        index.mkdir()
        for number in range(count):
            os.link(files[number % len(files)], index / f"{number:06d}_c{number % 6 + 1}s1_000000_00.jpg")
        print(f"{'start':<28}{anonymous_mib():8.0f} MiB")
        records = tuple(
            ImageRecord(Path(entry), int(entry.name[:6]) // 12, int(entry.name[8]) - 1)
            for entry in sorted(index.iterdir())
        )
        print(f"{count:,} records{'':<12}{anonymous_mib():8.0f} MiB")
        os.environ["LDA_CACHE_DIR"] = str(Path(temporary) / "cache")
        task = _task([records[start::4] for start in range(4)])
        config = preset("standin", threads=1, bank_warmup_updates=1, steps_per_epoch=steps, epochs=1, milestones=())
        trainer = Trainer(config, task, torch.device("cpu"))
        print(f"{'packed':<28}{anonymous_mib():8.0f} MiB")
        for batch in trainer.loader():
            trainer.train_step(batch)
        print(
            f"{f'{steps} steps':<28}{anonymous_mib():8.0f} MiB, peak {anonymous_mib('VmHWM'):.0f} MiB with page cache"
        )


def _task(domains: list[tuple[ImageRecord, ...]]) -> Task:
    """A run's data: every list of records is a source domain of twelve images per person, nothing is tested."""
    sources = []
    for name, records in zip(("market1501", "cuhk02", "cuhk03", "cuhk_sysu"), domains, strict=True):
        labels = np.arange(len(records)) // 12
        sources.append(SourceDomain(name, records, labels, int(labels[-1]) + 1))
    test = EvaluationSet("prid", domains[0][:1], domains[0][1:2])
    return Task("protocol1", "prid", tuple(sources), (), (test,), Content({}, "", True), {})


def anonymous_mib(field: str = "RssAnon") -> float:
    """This process's resident memory without the page cache (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512, help="files to read (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=25, help="batches of each (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=0, metavar="N", help="measure memory with N records instead")
    options = parser.parse_args()
    if options.memory:
        memory(options.memory)
    else:
        speed(options.images, options.repeats)


if __name__ == "__main__":
    main()
