"""Coverage-guided fuzzing of everything that reads a source's own description, with atheris.

    PYTHONPATH=. python tests/fuzz/coverage_guided.py CORPUS [-max_total_time=600] [any flag of libFuzzer]

Runs in an environment of its own (make fuzz). The first byte of an input chooses the reader: header, index file, config.json,
params.json, pickle, zip. Every error but a streamconv error, a second of time or 512 MB of memory ends the run, and the
input is kept as crash-*, timeout-* or oom-*.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
from pathlib import Path
from random import Random

import atheris

with atheris.instrument_imports(include=["streamconv", "json"]):
    from streamconv.checkpoint import index, meta, model_config, pickle_records, shard, torch_zip
    from streamconv.checkpoint.limits import MAX_CONFIG, MAX_PICKLE_STEPS
    from streamconv.errors import CheckpointError

from tests.fuzz import differential, hostile, mutate

_FOLDER = Path(tempfile.mkdtemp(prefix="streamconv-fuzz-"))
_STORAGES = {"a": b"abcd"}
_FLAGS = ["-timeout=2", "-rss_limit_mb=512", "-max_len=4096", "-use_value_profile=1"]


def _file(data: bytes) -> None:
    differential.judge_file(data)


def _index(data: bytes) -> None:
    differential.judge_index(data, _FOLDER / "model.safetensors.index.json")


def _config(data: bytes) -> None:
    path = _FOLDER / "config.json"
    path.write_bytes(data)
    model_config.from_hf(index.read_json(path, MAX_CONFIG))


def _params(data: bytes) -> None:
    path = _FOLDER / "params.json"
    path.write_bytes(data)
    params = index.read_json(path, MAX_CONFIG)
    model_config.from_meta(params)
    meta.assemble([{}], params)


def _pickle(data: bytes) -> None:
    pickle_records.read_pickle(data, "x", MAX_PICKLE_STEPS)


def _torch(data: bytes) -> None:
    """A zip around a pickle, so that mutations reach what is behind the zip; or any bytes as the zip itself."""
    path = _FOLDER / "x.bin"
    path.write_bytes(data[1:] if data[:1] == b"z" else hostile.torch_file(data, storages=_STORAGES))
    with shard.Shard(path) as opened:
        content = torch_zip.read_torch(opened)
    meta.assemble([{name: (0, tensor) for name, tensor in content.tensors.items()}], {})


_READERS = (_file, _index, _config, _params, _pickle, _torch)


def one(data: bytes) -> None:
    """One input."""
    if data:
        try:
            _READERS[data[0] % len(_READERS)](data[1:])
        except CheckpointError as error:
            if not str(error).isprintable() or len(str(error)) > 2000:
                raise AssertionError(str(error)) from None


def seeds(folder: Path) -> None:
    """Valid inputs of each kind, for a corpus that is empty."""
    random = Random(0)
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"intermediate_size": 8, "vocab_size": 9, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"}
    params = {"dim": 8, "n_layers": 1, "n_heads": 2, "norm_eps": 1e-5, "multiple_of": 4, "ffn_dim_multiplier": 1.3, "vocab_size": -1}
    storage = b"(X\7\0\0\0storagectorch\nByteStorage\nX\1\0\0\0aX\3\0\0\0cpuK\4tQ"
    hooks = b"\x89ccollections\nOrderedDict\n)Rt"
    tensor = b"\x80\2}X\1\0\0\0wctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\2K\2\x86K\2K\1\x86" + hooks + b"Rs."
    _torch(tensor)  # is read
    inputs = [(0, mutate.pack(*mutate.safetensors(random))) for _ in range(20)]
    inputs += [(1, mutate.weight_map(random, differential.FILES)) for _ in range(10)]
    inputs += [(2, json.dumps(config).encode()), (3, json.dumps(params).encode()), (4, tensor), (5, tensor)]
    inputs += [(4, pickle.dumps({"a": [1, 2.5, (None, True)], "b": b"c"}, protocol)) for protocol in (2, 3, 4, 5)]
    inputs += [(5, b"z" + hostile.torch_file(tensor, storages=_STORAGES))]
    for number, (reader, content) in enumerate(inputs):
        (folder / f"seed-{number}").write_bytes(bytes([reader]) + content)


def main() -> None:
    corpus = Path(next((word for word in sys.argv[1:] if not word.startswith("-")), _FOLDER / "corpus"))
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):
        seeds(corpus)
    flags = [word for word in sys.argv[1:] if word.startswith("-")]
    atheris.Setup([sys.argv[0], *_FLAGS, *flags, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
