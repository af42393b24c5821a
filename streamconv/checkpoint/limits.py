"""How much of a source's own description is accepted: bounds on headers, index files and configs, never on weights.

Whatever a file says, it is read or refused in about a second and in less than 256 MiB. The bounds are far above every
checkpoint known (the largest have about 200,000 tensors, and headers and index files of 24 MB) and are checked on the raw
bytes, before anything is built from them.
"""

from __future__ import annotations

from streamconv.errors import CheckpointError, StreamconvError

STOCK_MAX_HEADER = 100_000_000
"""What the stock safetensors reader takes, bytes."""
MAX_HEADER = 32 << 20
"""Bytes of a safetensors header."""
MAX_TENSORS = 250_000
"""Tensors of one file, of an index file, and of a whole checkpoint."""
MAX_SHAPES = 20_000
"""Distinct shapes in a file; a real one has some dozens."""
MAX_ESCAPED = 10_000
"""Tensors of a header whose name holds an escape (or that stand far apart); no writer makes any."""
MAX_NAME = 65_536
"""Bytes of a tensor name."""
MAX_METADATA_KEYS = 10_000
MAX_METADATA = 4 << 20
"""Bytes of `__metadata__`."""

MAX_CONFIG = 4 << 20
"""Bytes of config.json or params.json."""
MAX_WEIGHT_MAP = 32 << 20
"""Bytes of an index file."""
MAX_FILES = 4096
"""Weight files of a checkpoint; the largest known have some hundreds."""
MAX_CONTAINERS = 50_000
"""Objects and lists of a JSON file; an index file has three."""
MAX_WIDE_JSON = 4 << 20
"""Bytes of a JSON file that is not plain ASCII: one other letter makes a text up to four times as large."""

MAX_PICKLE = 16 << 20
"""Bytes of data.pkl in a PyTorch file; about 200 for each tensor."""
MAX_PICKLE_STEPS = 700_000
"""Opcodes of data.pkl; about 36 for each tensor, so some 19,000 tensors a file."""
MAX_PICKLE_CALLS = 60_000
"""Objects that data.pkl builds; two for each tensor, four for each parameter."""
MAX_ZIP_ENTRIES = 50_000
MAX_ZIP_DIRECTORY = 16 << 20
"""Bytes of a PyTorch file's zip directory."""

MAX_OUTPUT_TENSORS = 1_000_000
"""Tensors of all rank files together; a model of 405B over 64 ranks has 73,000."""
MAX_MANIFEST = 192 << 20
"""Bytes of streamconv.json, which has a line of 190 bytes at most for each of them."""
MAX_RECIPE = 64 << 10
"""Bytes of a TOML or YAML recipe, which has some dozens of lines."""
MAX_JOURNAL = 1 << 30
"""Bytes of a journal: some 200 for each tile of 4 MiB."""
MAX_JOURNAL_LINE = 8 << 20


def check_counts(
    raw: bytes, shown: str, error: type[StreamconvError] = CheckpointError, values: int = MAX_TENSORS + MAX_CONTAINERS
) -> None:
    """Nothing is built from a JSON text that could become many times its size.

    Args:
        shown: what messages call it.
        values: how many it may hold.

    Raises:
        `error`: too many objects and lists, too many values, or a long text that is not plain ASCII.
    """
    limit = "above streamconv's own limit of"
    containers, commas = raw.count(b"{") + raw.count(b"["), raw.count(b",")
    if containers > MAX_CONTAINERS:
        raise error(f"{shown} holds {containers} objects and lists, {limit} {MAX_CONTAINERS}")
    if commas > values:
        raise error(f"{shown} holds {commas} values, {limit} {values - MAX_CONTAINERS} tensors")
    if len(raw) > MAX_WIDE_JSON and not raw.isascii():
        raise error(f"{shown} has {len(raw)} bytes, {limit} {MAX_WIDE_JSON} for a file that is not plain ASCII")
