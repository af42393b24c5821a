"""Two outputs in parts on a local Ray cluster of three nodes, one of which is killed: the bytes of a single run. Needs streamconv[ray].

    python -m tests.ray_cluster

Ray takes 127.0.0.1 for the address of another machine: without a network, `unshare -n` with `lo` up is what it wants.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from streamconv import api
from streamconv.options import Resources
from streamconv.progress import Meter, unwatched
from streamconv.run.fs import hidden
from streamconv.run_on_ray import convert_on_ray
from streamconv.targets.base import Output
from streamconv.targets.hf.target import HuggingFace
from streamconv.targets.trtllm.options import TensorRTLLM
from tests.crash.world import snapshot, write_model

TARGETS = (TensorRTLLM(tp_size=2), HuggingFace(quant="fp8_dynamic"))


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="ray-cluster-"))
    model = write_model(root / "model", hidden=512, layers=4)
    outs, right = ([Output(str(root / f"{kind}{number}"), target) for number, target in enumerate(TARGETS)] for kind in ("out", "right"))
    api.convert_all(model, right, Resources(device="cpu", memory_budget=4 << 30))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    cluster.wait_for_nodes()

    def kill() -> None:
        while not list(hidden(Path(outs[0].out), "parts").glob("[0-9]*.journal")):
            time.sleep(0.02)
        cluster.remove_node(nodes[0], allow_graceful=False)
        print("a node was killed", flush=True)

    threading.Thread(target=kill, daemon=True).start()
    try:
        asked = Resources(device="cpu", memory_budget=1 << 30, workers=1, parts=12, tile_rows=32)
        report = convert_on_ray(cluster.address, model, outs, asked, force=False, meter=Meter(unwatched), several=True)
        same = [snapshot(Path(one.out)) for one in outs] == [snapshot(Path(one.out)) for one in right]
        done = [one.parts for one in report.outputs]
        print(f"parts {done} in {report.seconds:.1f} s, published: {report.published}, the bytes of a single run: {same}")
    finally:
        ray.shutdown()
        cluster.shutdown()
    raise SystemExit(not (same and report.published))


if __name__ == "__main__":
    main()
