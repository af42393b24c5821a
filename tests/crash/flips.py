"""Flipped bits in a finished output, and the matrix of resources and interruptions."""

from __future__ import annotations

import itertools
import random

from streamconv.errors import StreamconvError
from streamconv.verification.check import verify
from tests.crash.kills import Count, raised
from tests.crash.world import World


def flips(world: World, wanted: int, seed: int = 1) -> Count:
    """One random bit of one random file of the output at a time: `verify` must find it, and name the tensor."""
    rng, count = random.Random(seed), Count(facts={"in tensors": 0})
    world.reset()
    world.run()
    if problems := verify(world.out).problems:
        count.wrong.append(f"the good output: {problems}")
    files = sorted(world.out.iterdir())
    weights = [path.stat().st_size for path in files]
    for number in range(wanted):
        path = rng.choice(files) if number % 4 == 0 else rng.choices(files, weights)[0]
        data = bytearray(path.read_bytes())
        at, bit = rng.randrange(len(data)), rng.randrange(8)
        data[at] ^= 1 << bit
        path.write_bytes(data)
        try:
            problems = verify(world.out).problems
        except StreamconvError as error:
            problems = [str(error)]
        data[at] ^= 1 << bit
        problem = "" if problems else "missed"
        if path.suffix == ".safetensors" and at >= 8 + int.from_bytes(data[:8], "little"):
            count.facts["in tensors"] += 1
            if "transformer." not in " ".join(problems) and "lm_head" not in " ".join(problems):
                problem = problem or f"no tensor named: {problems}"
        path.write_bytes(data)
        count.note(f"{path.name} byte {at} bit {bit}", problem)
    return count


def matrix(world: World, interruptions: tuple[int, ...] = (0, 1, 3)) -> Count:
    """The same bytes for any workers x budget x tile size x interruptions, each changing at every resume."""
    count = Count()
    resources = list(itertools.product((1, 2, 5), (512 << 20, 3 << 30), (4, 24, 1000)))
    rng = random.Random(1)
    for (workers, budget, rows), stops in itertools.product(resources, interruptions):
        world.reset()
        before = world.tile_rows
        for _ in range(stops):
            world.tile_rows = rng.choice((4, 16, 40))
            raised(world, rng.randrange(20, 100))
        world.tile_rows = before
        end = world.finish(workers=workers, memory_budget=budget, tile_rows=rows)
        count.note(f"{workers} workers, {budget >> 20} MiB, {rows} rows, {stops} stops", end)
    return count
