"""A Ray cluster of two nodes on one machine, as a process: `python ray_cluster.py FOLDER`.

Each node has one CPU, and leases of its own in FOLDER, as a host has. Prints the address; `kill` on
stdin kills the second node, the end of stdin ends the cluster.
"""

import os
import sys
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

_OBJECTS = 80 * 2**20


def _environment(name: str) -> dict[str, str]:
    return {"OPENPI_OPT_LEASES": str(Path(sys.argv[1]) / name)}


def main() -> None:
    cluster = Cluster()
    try:
        for name in ("first", "second"):
            node = cluster.add_node(
                num_cpus=1,
                num_gpus=0,
                include_dashboard=False,
                object_store_memory=_OBJECTS,
                env_vars=_environment(name),
            )
        print(cluster.address, flush=True)
        for line in sys.stdin:
            if line.strip() == "kill":
                cluster.remove_node(node, allow_graceful=False)
                print("killed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
