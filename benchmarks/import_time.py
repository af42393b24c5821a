"""What `import streamconv` costs: median of alternating runs against an interpreter that imports nothing.

    python -m benchmarks.import_time [--runs 21] [--limit-ms 50]

Ends with 1 if the import takes longer than the limit.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def spent(code: str) -> float:
    """Wall-clock milliseconds of an interpreter that runs `code`."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return 1000 * (time.perf_counter() - began)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--limit-ms", type=float, default=50)
    asked = parser.parse_args()
    pairs = [(spent("pass"), spent("import streamconv")) for _ in range(asked.runs)]
    bare, with_import = (statistics.median(column) for column in zip(*pairs, strict=True))
    cost = statistics.median(after - before for before, after in pairs)
    print(f"interpreter {bare:.1f} ms, with import streamconv {with_import:.1f} ms; the import {cost:.1f} ms (limit {asked.limit_ms:g} ms)")
    return int(cost > asked.limit_ms)


if __name__ == "__main__":
    sys.exit(main())
