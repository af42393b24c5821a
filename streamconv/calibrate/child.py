"""Calibration in a process of its own: what torch and transformers take goes back to the system before the conversion begins.

The child reads its arguments as JSON from the standard input and answers in lines of JSON: progress, then what `calibrate` told or
the error it raised. It dies with its parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamconv import errors

_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def calibrate_apart(arguments: dict[str, Any], progress: Callable[[int, int, float], None]) -> dict[str, Any]:
    """`run.calibrate` in a child process.

    Args:
        arguments: of `calibrate`, without `progress`; values that JSON has.

    Raises:
        StreamconvError: what `calibrate` raised. BudgetError: the child was killed, most likely for memory.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "streamconv.calibrate.child"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    ) as process:
        try:
            assert process.stdin is not None and process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(arguments))
                process.stdin.close()
            for line in process.stdout:
                answer = json.loads(line)
                if "told" in answer:
                    told: dict[str, Any] = answer["told"]
                    return told
                if "error" in answer:
                    raise getattr(errors, answer["error"])(answer["message"], hint=answer["hint"])
                progress(*answer["progress"])
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
    if process.returncode == -signal.SIGKILL:
        raise errors.BudgetError("the calibration was killed, most likely for memory", hint="a smaller --batch-size or --max-length")
    raise errors.CheckpointError(f"the calibration ended with status {process.returncode}", hint="its own message is above")


def main() -> None:
    """The child."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too, and ends this process
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    from streamconv.calibrate.run import calibrate

    arguments = json.load(sys.stdin)
    try:
        told = calibrate(**arguments, progress=lambda *values: answer(progress=values))
    except errors.StreamconvError as error:
        answer(error=type(error).__name__, message=error.message, hint=error.hint)
    else:
        answer(told=told)


if __name__ == "__main__":
    main()
