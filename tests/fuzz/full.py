"""The tests of test_headers.py, as many as wanted, in several processes.

    python -m tests.fuzz.full --count 1000000

Prints how many were rejected by both, accepted by both and read alike, and accepted only by the stock reader, by our
reason. Ends with 1 if anything went wrong: accepted by us alone, read otherwise, or an error that is no streamconv error.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from tests.fuzz.differential import run

_AT_ONCE = 5000


def _some(count: int, seed: int) -> tuple[Counter[str], list[str]]:
    with tempfile.TemporaryDirectory() as folder:
        return run(count, seed, Path(folder))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1_000_000, help="of the first 5000 cases; the next have the next seed")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    began, verdicts, wrong = time.monotonic(), Counter[str](), list[str]()
    sizes = [min(_AT_ONCE, args.count - at) for at in range(0, args.count, _AT_ONCE)]
    with ProcessPoolExecutor(args.processes) as pool:
        for done in as_completed([pool.submit(_some, size, args.seed + number) for number, size in enumerate(sizes)]):
            verdicts += done.result()[0]
            wrong += done.result()[1]
    for verdict, count in sorted(verdicts.items()):
        print(f"{count:9}  {verdict}")
    print(f"{args.count} cases, {len(wrong)} wrong, {time.monotonic() - began:.0f} s")
    for line in wrong[:20]:
        print(f"  {line}")
    return 1 if wrong or sum(verdicts.values()) != args.count else 0


if __name__ == "__main__":
    sys.exit(main())
