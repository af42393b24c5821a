"""Every file that is read back, with something wrong in it: what comes is the result, or a typed error of one line.

    python -m tests.fuzz.read_back --count 100000 [--seed 1]

A round takes a good file of one kind (config.json of a source and of an output, index file, params.json, manifest, TOML and YAML
recipe, journal, activation ranges), spoils it and gives it to whoever reads it. A journal line is spoiled so that its hash still fits.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file

from streamconv import api
from streamconv.checkpoint import index, meta, model_config, weight_files
from streamconv.checkpoint.activation_ranges import Ranges
from streamconv.cli import recipe
from streamconv.cli.conversion import convert as convert_command
from streamconv.cli.conversion import plan as plan_command
from streamconv.cli.recipe_option import kinds
from streamconv.errors import StreamconvError
from streamconv.options import Resources
from streamconv.run import journal, manifest
from streamconv.run.fs import hidden
from streamconv.targets.trtllm.options import TensorRTLLM
from streamconv.verification.check import verify
from tests import tiny

_DEEP: Any = []
for _ in range(200):
    _DEEP = [_DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**99, 10**400, 0.0, -1.5, 1e308, float("inf"), float("nan"), "", "x", "\x1b[31m", "\ud800",
    "a" * 5000, [], [1], ["x", None], {}, {"a": 1}, {"type": "llama3"}, {"factor": None}, {"factor": 0}, _DEEP,
)  # fmt: skip
_BYTES = (b"\0", b"{", b"[" * 200, b"9" * 5000, b"\xff", b"\n", b'"', b"*a", b"&a ", b"'''", b"1e999", b"0x" + b"f" * 5000)
_WORDS = ("10" * 3000, "0x" + "f" * 5000, "nan", "inf", "1e999", "[" * 5000, "{a: &x [1], b: [*x, *x]}", "2020-01-01", "99999-01-01")
MODEL: dict[str, Any] = tiny.config(rope_scaling={"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0})
PARAMS: dict[str, Any] = {"dim": 128, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "multiple_of": 4, "vocab_size": 160}
PARAMS |= {"rope_theta": 1e4, "ffn_dim_multiplier": 1.3, "rope_scaling": {"type": "linear", "factor": 2.0}}
QUANTIZED = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "bits": 4, "group_size": 128, "desc_act": False}


def dumped(value: Any) -> bytes:
    try:
        return json.dumps(value).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer longer than Python spells
        return b'{"a": 1' + b"0" * 5000 + b"}"


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in nested objects and lists."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


def spoil(value: Any, random: Random) -> Any:
    """The value with one to three places changed, taken away or added."""
    made = copy.deepcopy(value)
    for _ in range(random.randint(1, 3)):
        spots = list(places(made))
        if not spots:
            break
        *way, last = random.choice(spots)
        holder = made
        for key in way:
            holder = holder[key]
        action = random.random()
        if action < 0.15:
            del holder[last]
        elif action < 0.2 and isinstance(holder, dict):
            holder["extra"] = copy.deepcopy(random.choice(ODD))
        else:
            holder[last] = copy.deepcopy(random.choice(ODD))
    return made


def spoil_bytes(data: bytes, random: Random) -> bytes:
    made = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(made) + 1)
        action = random.random()
        if action < 0.3:
            made[at : at + random.randint(1, 40)] = b""
        elif action < 0.6:
            made[at:at] = random.choice(_BYTES)
        elif at < len(made):
            made[at] = random.randrange(256)
    return bytes(made)


def signed(content: dict[str, Any]) -> bytes:
    """A manifest whose hash and layout are right, whatever it says."""
    plain = {key: value for key, value in content.items() if key != "check"}
    check = xxhash.xxh3_128(json.dumps(plain).encode()).hexdigest()
    return (json.dumps(plain | {"check": check}, indent=1) + "\n").encode()


class World:
    """A tiny model, its output, and an interrupted conversion of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model, self.out = folder, tiny.write(folder / "model"), folder / "out"
        api.convert(self.model, self.out, TensorRTLLM())
        self.manifest = json.loads((self.out / manifest.NAME).read_bytes())
        self.config = json.loads((self.out / "config.json").read_bytes())
        self.rank = (self.out / "rank0.safetensors").read_bytes()
        self.kinds = kinds(convert_command, plan_command)
        save_file({"a.x": np.ones(4, np.float32), "a.y": np.ones(4, np.float32)}, folder / "ranges.safetensors")
        self.ranges = (folder / "ranges.safetensors").read_bytes()
        with api.open_and_plan(self.model, TensorRTLLM())[0] as opened:
            made = api.open_and_plan(self.model, TensorRTLLM())[1]
            self.run = journal.identity(made, opened.shards)
            self.spans = [(span.start, span.stop) for span in made.spans]
        self.lines = self._lines()

    def _lines(self) -> list[dict[str, Any]]:
        lines: list[dict[str, Any]] = [{"run": self.run}]
        for number, (start, stop) in enumerate(self.spans[:6]):
            lines.append({"tile": [number, start, stop], "hash": [["0" * 32]], "found": [0, 0]})
        return lines

    def source_config(self, random: Random) -> None:
        stated = {"quantization_config": QUANTIZED} if random.random() < 0.3 else {}
        (self.model / "config.json").write_bytes(dumped(spoil(MODEL | stated, random)))
        try:
            opened, _ = api.open_and_plan(self.model, TensorRTLLM(rope_tables=random.random() < 0.5))
            opened.close()
        finally:
            (self.model / "config.json").write_text(json.dumps(tiny.config()))

    def weight_map(self, random: Random) -> None:
        path = self.folder / weight_files.WEIGHT_MAP
        good = {"metadata": {"total_size": 1}, "weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}
        path.write_bytes(dumped(spoil(good, random)))
        weight_files.read_weight_map(path, ["m-1.safetensors", "m-2.safetensors"])

    def params(self, random: Random) -> None:
        path = self.folder / "params.json"
        path.write_bytes(dumped(spoil(PARAMS, random)))
        params = index.read_json(path, index.MAX_CONFIG)
        model_config.from_meta(params)
        meta.assemble([{}], params)

    def output_config(self, random: Random) -> None:
        (self.out / "config.json").write_bytes(dumped(spoil(self.config, random)))
        try:
            verify(self.out)
        finally:
            (self.out / "config.json").write_bytes(json.dumps(self.config, indent=4).encode())

    def told(self, random: Random) -> None:
        """A manifest, with a hash that fits: for `verify --source` and for --config."""
        path = self.out / manifest.NAME
        changed = spoil(self.manifest, random)
        try:
            data = signed(changed) if isinstance(changed, dict) and random.random() < 0.7 else spoil_bytes(signed(self.manifest), random)
        except (ValueError, RecursionError):
            data = dumped(changed)
        path.write_bytes(data)
        try:
            for read in random.sample([lambda: recipe.read(path, self.kinds), lambda: verify(self.out, self.model)], 2):
                with contextlib.suppress(StreamconvError):
                    read()
        finally:
            path.write_bytes(signed(self.manifest))

    def recipe(self, random: Random) -> None:
        yaml = random.random() < 0.5
        path = self.folder / ("recipe.yaml" if yaml else "recipe.toml")
        mark = ": " if yaml else " = "
        values = {"model": '"m"', "tp-size": "2", "quant": '"int8"', "smoothquant": "0.5"}
        values[random.choice((*values, "workers", "extra", "a.b.c"))] = random.choice(_WORDS)
        text = "\n".join(f"{key}{mark}{value}" for key, value in values.items()).encode()
        path.write_bytes(spoil_bytes(text, random) if random.random() < 0.5 else text)
        recipe.read(path, self.kinds)

    def journal(self, random: Random) -> None:
        """Lines whose own hash fits, beside the data of an unfinished conversion: the output must come out right."""
        out = self.folder / "again"
        lines = [json.dumps(line, separators=(",", ":")).encode() for line in self._spoiled(random)]
        data = b"".join(xxhash.xxh3_64(line).hexdigest().encode() + b" " + line + b"\n" for line in lines)
        hidden(out, "journal").write_bytes(data if random.random() < 0.8 else spoil_bytes(data, random))
        work = hidden(out, "partial")
        work.mkdir(exist_ok=True)
        (work / "rank0.safetensors").write_bytes(bytes(len(self.rank)))
        try:
            api.convert(self.model, out, TensorRTLLM(), Resources(workers=2, tile_rows=16))
            assert (out / "rank0.safetensors").read_bytes() == self.rank
        finally:
            for path in (out, work):
                shutil.rmtree(path, ignore_errors=True)
            for name in ("journal", "lock"):
                hidden(out, name).unlink(missing_ok=True)

    def _spoiled(self, random: Random) -> list[Any]:
        lines = copy.deepcopy(self.lines)
        for line in random.sample(lines[1:], 2):
            number, start, stop = line["tile"]
            first, last = random.choice((start, start + 1, stop)), random.choice((stop, stop - 1, start, 10**9))
            line["tile"] = [random.choice((number, 0, 10**9)), first, last]
            line["hash"] = random.choice((line["hash"], [], [[]], [["0" * 32]] * 2, [[5]], "x", [[xxhash.xxh3_128(b"").hexdigest()]]))
        return lines if random.random() < 0.5 else [lines[0], *(spoil(line, random) for line in lines[1:])]

    def measured(self, random: Random) -> None:
        path = self.folder / "ranges.safetensors"
        path.write_bytes(spoil_bytes(self.ranges, random))
        Ranges(path).check({"a.x": 4, "a.y": 4})


KINDS: dict[str, Callable[[World, Random], None]] = {
    "config.json": World.source_config,
    "index": World.weight_map,
    "params.json": World.params,
    "config.json of an output": World.output_config,
    "manifest": World.told,
    "recipe": World.recipe,
    "journal": World.journal,
    "ranges": World.measured,
}


def run(count: int, seed: int, folder: Path) -> tuple[Counter[str], list[str]]:
    """`count` rounds; the same seed gives the same.

    Returns:
        how each kind ended, and what was no typed error of one line.
    """
    world, ended, wrong = World(folder), Counter[str](), []
    for number in range(count):
        kind = list(KINDS)[number % len(KINDS)]
        random = Random(f"{seed} {number}")
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                KINDS[kind](world, random)
            ended[f"{kind}: taken"] += 1
        except StreamconvError as error:
            ended[f"{kind}: refused"] += 1
            if not str(error).isprintable():
                wrong.append(f"round {number}, {kind}: not printable: {error!r}")
        except Exception as error:
            wrong.append(f"round {number}, {kind}: {type(error).__name__}: {error}"[:400])
    return ended, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ended, wrong = run(asked.count, asked.seed, Path(folder))
    for line in (*(f"{verdict}: {times}" for verdict, times in sorted(ended.items())), *wrong[:50], f"{len(wrong)} wrong"):
        print(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
