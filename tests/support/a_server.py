"""A server's runs in a process of their own, to be killed: python a_server.py FOLDER. Prints a line a commit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sites import World, study_of

if __name__ == "__main__":
    world = World(Path(sys.argv[1]), study_of(study={"rounds": 4}), tuple(sys.argv[2:]))
    kept = world.archive.commit

    def commit(run: str, number: int, *rest: Any) -> None:
        kept(run, number, *rest)
        print(f"committed {number}", world.runs.process(run), flush=True)

    world.archive.commit = commit  # type: ignore[method-assign, assignment]
    world.sites.join()
    world.start()
    world.until(f"{world.study.name}.1", "finished")
