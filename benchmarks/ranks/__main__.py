"""One rank of a benchmark: runs the task on its command line; rank 0 prints JSON."""

import os
import sys

import msgspec

from benchmarks.ranks.collectives import CollectivesTask
from benchmarks.ranks.loads import LoadsTask
from engine.parallel import RankEnvironment


def main() -> None:
    """Read the task and the rank's place, and run."""
    task = msgspec.json.decode(sys.argv[1], type=CollectivesTask | LoadsTask)
    place = RankEnvironment.read(os.environ)
    assert place is not None, "started without a rank"
    found = task.run(place)
    if place.rank == 0:
        sys.stdout.buffer.write(msgspec.json.encode(found))
        sys.stdout.flush()
    os._exit(0)  # nothing is left to tidy, and threads that wait for other ranks need not end


if __name__ == "__main__":
    main()
