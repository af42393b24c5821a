"""Calibration in a process of its own: what torch and transformers take goes back to the system before the conversion begins.

The child reads its arguments as JSON from the standard input and answers in lines of JSON: progress, then what `calibrate` told or
the error it raised. It dies with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from streamconv import errors, process, streams
from streamconv.calibration.request import Progress, Sampled, silent


def calibrate_apart(
    arguments: dict[str, Any],
    progress: Progress,
    kept_out: Sequence[Path] = (),
    sampled: Sampled = silent,
) -> dict[str, Any]:
    """`run.calibrate`, or `run.find_codes` if there is a method, in a child process.

    Args:
        arguments: of the function, without `progress` and `sampled`; values that JSON has.
        kept_out: folders that the child imports nothing from, beside the model's and that of the ranges.

    Raises:
        StreamconvError: what `calibrate` raised. BudgetError: the child was killed, most likely for memory.
        Interrupted: SIGTERM ended the child.
    """
    with process.start_interpreter(__name__, [Path(arguments["model"]), Path(arguments["out"]).parent, *kept_out]) as child:
        try:
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                child.stdin.write(json.dumps(arguments))
                child.stdin.close()
            for line in child.stdout:
                answer = json.loads(line)
                if "told" in answer:
                    report: dict[str, Any] = answer["told"]
                    return report
                if "error" in answer:
                    kind: Any = getattr(errors, answer["error"], errors.CheckpointError)
                    raise kind([answer["message"]] if kind is errors.RefusedError else answer["message"], hint=answer["hint"])
                if "sampled" in answer:
                    sampled(*answer["sampled"])
                else:
                    progress(*answer["progress"])
        finally:
            if child.poll() is None and sys.exc_info()[0] is not None:
                child.kill()
                child.wait()  # Popen waits a quarter of a second only when KeyboardInterrupt passes
    if child.returncode == -signal.SIGTERM:
        raise errors.Interrupted("stopped by SIGTERM", signum=signal.SIGTERM)
    if child.returncode == -signal.SIGKILL:
        raise errors.BudgetError("the calibration was killed, most likely for memory", hint="a smaller --batch-size or --max-length")
    raise errors.CheckpointError(f"the calibration ended with status {child.returncode}", hint="its own message is above")


def main() -> None:
    """The child."""
    process.die_with_parent()
    streams.open_standard_streams()
    sys.stderr = cast(Any, streams.VisibleStream(sys.stderr))
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**content: Any) -> None:
        answers.write(json.dumps(content) + "\n")

    from streamconv.calibration.run import calibrate, find_codes

    arguments = json.load(sys.stdin)
    streams.ask_nothing()
    try:
        run: Callable[..., dict[str, Any]] = find_codes if "method" in arguments else calibrate
        report = run(**arguments, progress=lambda *values: answer(progress=values), sampled=lambda *values: answer(sampled=values))
    except errors.StreamconvError as error:
        answer(error=type(error).__name__, message=error.message, hint=error.hint)
    else:
        answer(told=report)

