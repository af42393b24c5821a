"""A tiny model, its right output, and what every crash test asks of what is left on the disk."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from streamconv import api
from streamconv.errors import OutputError
from streamconv.options import Resources
from streamconv.run import recorder
from streamconv.run.fs import Disk, hidden
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash.disks import Counting, Tapped

HIDDEN = ".streamconv-old."
State = dict[str, bytes | None]
"""Relative path -> bytes of a file, None for a folder."""


def write_model(folder: Path, seed: int = 1, hidden: int = 64, layers: int = 1, vocab: int = 64) -> Path:
    """A Llama of random float16 weights; about 130 kB unless told otherwise."""
    random, inter, heads, size = np.random.default_rng(seed), hidden, 4, hidden // 4
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {at + name: (hidden,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        shapes |= {at + f"self_attn.{n}_proj.weight": (heads * size, hidden) for n in "qo"}
        shapes |= {at + f"self_attn.{n}_proj.weight": (2 * size, hidden) for n in "kv"}
        shapes |= {at + f"mlp.{n}_proj.weight": (inter, hidden) for n in ("gate", "up")}
        shapes[at + "mlp.down_proj.weight"] = (hidden, inter)
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    folder.mkdir(parents=True)
    weights = {name: (random.standard_normal(shape, np.float32) * 0.05).astype(np.float16) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "vocab_size": vocab,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fast_folder() -> Path:
    """A new folder, in memory where the system has such a place."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="crash-", dir=shared if os.access(shared, os.W_OK) else None))


@contextlib.contextmanager
def no_thread(batch: int) -> Iterator[None]:
    """No journal thread: after `batch` bytes files are synced by a worker, so that runs repeat exactly."""
    before = recorder.BATCH_BYTES, recorder.THREADED
    recorder.BATCH_BYTES, recorder.THREADED = batch, False
    try:
        yield
    finally:
        recorder.BATCH_BYTES, recorder.THREADED = before


def snapshot(folder: Path) -> State:
    """Everything below a folder."""
    state: State = {}
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            state[entry.name] = None
            state |= {f"{entry.name}/{name}": data for name, data in snapshot(Path(entry.path)).items()}
        else:
            with open(entry.path, "rb") as file:
                state[entry.name] = file.read()
    return state


def restore(folder: Path, state: State) -> None:
    """Make a folder hold exactly a state."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in sorted(state):
        data = state[name]
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)


def digest(state: State) -> bytes:
    hashed = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        data = state[name]
        hashed.update(f"{name}\0{-1 if data is None else len(data)}\0".encode())
        hashed.update(data or b"")
    return hashed.digest()


class World:
    """One conversion of one tiny model.

    Args:
        root: a folder of its own.
        replaced: an older output of other weights is in the way, and --force is given.
        mounted: the output is taken for a mount point.
    """

    def __init__(
        self, root: Path, quant: str = "none", tp: int = 1, replaced: bool = False, tile_rows: int = 32, mounted: bool = False
    ) -> None:
        self.mounted = mounted
        self.root, self.options, self.tile_rows = root, TensorRTLLM(quant=quant, tp_size=tp, target_sm=80), tile_rows
        self.place, self.force, self.batch = root / "place", replaced, 0
        self.out = self.place / "out"
        self.model = write_model(root / "model", hidden=64 * tp)
        self.start: State = {"out": None} if mounted else {}
        restore(self.place, self.start)
        if replaced:
            self.model, model = write_model(root / "older", seed=2, hidden=64 * tp), self.model
            self.run()
            self.start = snapshot(self.place)
            self.model = model
            restore(self.place, {"out": None} if mounted else {})
        self.run()
        self.right = snapshot(self.out)
        self.reset(self.start)

    def reset(self, state: State | None = None) -> None:
        restore(self.place, self.start if state is None else state)

    def run(self, disk: Disk | None = None, **resources: int | None) -> api.Report:
        asked = Resources(memory_budget=4 << 30, workers=1, device="cpu", tile_rows=self.tile_rows)
        if resources:
            asked = Resources(**({"memory_budget": 4 << 30, "workers": 1, "device": "cpu"} | resources))  # type: ignore[arg-type]
        disk = disk or Counting()
        if isinstance(disk, Tapped):
            disk.mounted = self.mounted
        with no_thread(self.batch):
            return api.convert(self.model, self.out, self.options, asked, force=self.force, disk=disk)

    def wrong_now(self) -> str:
        """What must not be at any moment: something that looks like a checkpoint and is none, or the old output lost."""
        everything = snapshot(self.out) if self.out.exists() else {}
        here = {name: data for name, data in everything.items() if not name.startswith(".streamconv-")}
        old = {name[4:]: data for name, data in self.start.items() if name.startswith("out/")}
        if here == self.right:
            return ""
        if "config.json" in here and here != old:
            return f"a folder that looks finished is not: {sorted(here)}"
        aside = hidden(self.out, "old")
        kept = snapshot(aside) if aside.exists() else {}
        if self.mounted:
            kept = here | {name[len(HIDDEN) :]: data for name, data in everything.items() if name.startswith(HIDDEN)}
        # (a run after one that was through replaces the right output by itself)
        if old and here != old and not any({name: kept.get(name) for name in wanted} == wanted for wanted in (old, self.right)):
            return "the old output is lost, and the new one is not there"
        return ""

    def finish(self, **resources: int | None) -> str:
        """Run the same command again; gives what is wrong with the end of it."""
        try:
            self.run(**resources)
        except OutputError as error:
            if "exists and is not empty" not in str(error):
                raise
        return self.wrong_end()

    def wrong_end(self) -> str:
        """What is wrong after a success."""
        left = set(os.listdir(self.place)) - {"out"}
        if left:
            return f"left behind: {sorted(left)}"
        return "" if snapshot(self.out) == self.right else "other bytes"


_HELD = """
import itertools, signal, sys, threading
from streamconv.run import output_folder, pool, recorder
from streamconv.cli import ending, main
for number, means in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
    signal.signal(number, means)  # whoever runs the tests may ignore them: a shell's background job does
ending.GRACE = pool._PATIENCE = 250  # on a busy machine, too
push, fail, count, stopped = output_folder.OutputFolder.write, pool.Pool.fail, itertools.count(1), threading.Event()
def held(self, *args):
    push(self, *args)
    if next(count) >= 20:
        stopped.wait()
def stop(self, error):
    stopped.set()
    fail(self, error)
output_folder.OutputFolder.write, pool.Pool.fail = held, stop
recorder.BATCH_SECONDS = 0.05
main.run()
"""


def held(arguments: list[str], journal: Path, tile_rows: int | None = None) -> subprocess.Popen[str]:
    """A command with some tiles in its journal and many to come: its 20th write ends when the run is stopped, however late that is."""
    environment = os.environ | ({"STREAMCONV_TILE_ROWS": str(tile_rows)} if tile_rows else {})
    command = [sys.executable, "-c", _HELD, *arguments]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert child.poll() is None, child.communicate()
        time.sleep(0.02)
    return child
