"""Seconds of `evaluate_ranking` beside the bare matrix product of its features, which is the least it can take.

    python tests/benchmarks/bench_ranking.py --queries 1500 --gallery 20000 --size 2048

Both are timed in turn in one process and their medians compared: seconds depend on the machine, the ratio less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from lda.ranking import evaluate_ranking


def seconds(work: Callable[[], object], device: str) -> float:
    """Wall-clock seconds of one call, the device's queue included."""
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--queries", type=int, default=1500, help="number of queries (default: %(default)s)")
    parser.add_argument("--gallery", type=int, default=20_000, help="number of gallery images (default: %(default)s)")
    parser.add_argument("--size", type=int, default=2048, help="feature size (default: %(default)s)")
    parser.add_argument("--pids", type=int, default=750, help="persons (default: %(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="queries at a time (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timings of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads, 0 = torch's choice (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(args.queries, args.size, generator=generator).to(args.device)
    gallery = torch.randn(args.gallery, args.size, generator=generator).to(args.device)
    ids = [torch.randint(n, (m,), generator=generator) for n in (args.pids, 6) for m in (args.queries, args.gallery)]
    query_pids, gallery_pids, query_camids, gallery_camids = ids

    def rank() -> object:
        return evaluate_ranking(
            query, gallery, query_pids, gallery_pids, query_camids, gallery_camids, chunk=args.chunk
        )

    def product() -> object:
        return query @ gallery.T

    product(), rank()  # warm up
    products, rankings = [], []
    for _ in range(args.repeats):
        products.append(seconds(product, args.device))
        rankings.append(seconds(rank, args.device))
    bare, whole = statistics.median(products), statistics.median(rankings)
    print(f"{args.queries} x {args.gallery} x {args.size}, {args.device}, {torch.get_num_threads()} threads")
    print(f"matrix product    {bare:8.3f} s (median of {args.repeats})")
    print(f"evaluate_ranking  {whole:8.3f} s, {whole / bare:.2f} x the product")


if __name__ == "__main__":
    main()
