"""The commands, from their first moment: what must stand before any import that takes time. `python -m streamconv` is `streamconv`."""

import os
import signal
import sys
from types import FrameType


def _prepare() -> None:
    """Import nothing from the current folder (`python -m` puts it first), and end in one line at a signal while the imports run."""
    try:
        here = os.path.realpath(os.curdir)
    except FileNotFoundError:  # it was removed
        here = ""
    sys.path[:] = [entry for entry in sys.path if os.path.isabs(entry) and os.path.realpath(entry) != here]
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup, a background job
            signal.signal(number, _stop)


def _stop(signum: int, _: FrameType | None) -> None:
    try:
        os.write(2, f"error: stopped by {signal.Signals(signum).name}\n".encode())
    finally:
        os._exit(128 + signum)


def run() -> None:
    """`streamconv`."""
    _prepare()
    from streamconv.cli.main import run

    run()


def run_convert_checkpoint() -> None:
    """`streamconv-convert-checkpoint`."""
    _prepare()
    from streamconv.cli.convert_checkpoint import run

    run()


if __name__ == "__main__":
    run()
