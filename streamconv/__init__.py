"""streamconv: turn an LLM checkpoint into what an inference engine loads, in less memory than the model takes.

    import streamconv

    streamconv.convert("Llama-3.1-8B", "out", streamconv.TensorRTLLM(tp_size=2, quant="int8", target_sm=90), watch="bar")

What is public stands in `__all__`; every module behind it may change. A name is imported when it is first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # type checkers take the name for true; importing typing would take most of the time

if TYPE_CHECKING:
    from streamconv.errors import (
        BudgetError as BudgetError,
    )
    from streamconv.errors import (
        CheckpointError as CheckpointError,
    )
    from streamconv.errors import (
        DataError as DataError,
    )
    from streamconv.errors import (
        HeaderError as HeaderError,
    )
    from streamconv.errors import (
        HubError as HubError,
    )
    from streamconv.errors import (
        Interrupted as Interrupted,
    )
    from streamconv.errors import (
        LockedError as LockedError,
    )
    from streamconv.errors import (
        OutputError as OutputError,
    )
    from streamconv.errors import (
        RefusedError as RefusedError,
    )
    from streamconv.errors import (
        ResumeError as ResumeError,
    )
    from streamconv.errors import (
        SourceChangedError as SourceChangedError,
    )
    from streamconv.errors import (
        StreamconvError as StreamconvError,
    )
    from streamconv.errors import (
        TensorError as TensorError,
    )
    from streamconv.errors import (
        UnreadableError as UnreadableError,
    )
    from streamconv.errors import (
        UsageError as UsageError,
    )
    from streamconv.errors import (
        VerifyError as VerifyError,
    )
    from streamconv.opening import Checkpoint as Checkpoint
    from streamconv.opening import LazyTensor as LazyTensor
    from streamconv.opening import open as open
    from streamconv.options import Resources as Resources
    from streamconv.planning.plan import Plan as Plan
    from streamconv.progress import Progress as Progress
    from streamconv.reports import Report as Report
    from streamconv.targets.base import Output as Output
    from streamconv.targets.hf.target import HuggingFace as HuggingFace
    from streamconv.targets.trtllm.options import TensorRTLLM as TensorRTLLM
    from streamconv.verbs import (
        CalibrationReport as CalibrationReport,
    )
    from streamconv.verbs import (
        calibrate as calibrate,
    )
    from streamconv.verbs import (
        convert as convert,
    )
    from streamconv.verbs import (
        diff as diff,
    )
    from streamconv.verbs import (
        plan as plan,
    )
    from streamconv.verbs import (
        verify as verify,
    )
    from streamconv.verification.difference import Comparison as Comparison
    from streamconv.verification.verdict import Verdict as Verdict

__version__ = "0.1.0"

_MODULES = {
    "open": "streamconv.opening",
    "plan": "streamconv.verbs",
    "convert": "streamconv.verbs",
    "verify": "streamconv.verbs",
    "diff": "streamconv.verbs",
    "calibrate": "streamconv.verbs",
    "TensorRTLLM": "streamconv.targets.trtllm.options",
    "HuggingFace": "streamconv.targets.hf.target",
    "Output": "streamconv.targets.base",
    "Resources": "streamconv.options",
    "Checkpoint": "streamconv.opening",
    "LazyTensor": "streamconv.opening",
    "Plan": "streamconv.planning.plan",
    "Report": "streamconv.reports",
    "Verdict": "streamconv.verification.verdict",
    "Comparison": "streamconv.verification.difference",
    "CalibrationReport": "streamconv.verbs",
    "Progress": "streamconv.progress",
} | dict.fromkeys(
    (
        "StreamconvError", "UsageError", "CheckpointError", "HeaderError", "SourceChangedError", "UnreadableError", "TensorError",
        "RefusedError", "BudgetError", "OutputError", "LockedError", "ResumeError", "VerifyError", "DataError", "HubError", "Interrupted",
    ),
    "streamconv.errors",
)
"""Public name -> the module that has it."""

__all__ = [*_MODULES]

if not TYPE_CHECKING:  # a type checker would take every name for public

    def __getattr__(name: str) -> object:
        import importlib

        if name not in _MODULES:
            raise AttributeError(f"module 'streamconv' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
