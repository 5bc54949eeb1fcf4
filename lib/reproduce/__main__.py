"""``python -m lib.reproduce crf``: run a chapter's experiment at full size, or all without a name.

A killed run goes on where it stopped when the same command is given again. For several devices
say ``--devices 4``; for several nodes start it on each through their launcher.
"""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

from lib.reproduce import RESULTS, environment, save_result

# stem: epochs of a full-size run
STEMS = {"crf": 4, "margin": 20}


def main() -> None:
    """Parse the command line, run, write ``results/<stem>.json``."""
    parser = argparse.ArgumentParser(prog="python -m lib.reproduce", description=__doc__)
    parser.add_argument("stems", nargs="*", metavar="stem", help=f"one of {', '.join(STEMS)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: as many as the chapter names")
    parser.add_argument("--examples", type=int, help="train on so many only, to try the command")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--devices", default="1")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    unknown = set(options.stems) - set(STEMS)
    if unknown:
        parser.error(f"no full-size experiment called {sorted(unknown)}, only {sorted(STEMS)}")
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise SystemExit("full-size runs need: pip install lightning-fabric") from error
    fabric = Fabric(
        accelerator=options.accelerator, devices=options.devices, num_nodes=options.nodes
    )
    fabric.launch()
    for stem in options.stems or STEMS:
        module, rows, started = importlib.import_module(f"lib.reproduce.{stem}"), [], time.time()
        for seed in range(options.seeds):
            protocol, more = module.reproduce(
                fabric,
                seed,
                epochs=options.epochs or STEMS[stem],
                folder=options.checkpoints,
                examples=options.examples,
            )
            rows += more
            result = {
                "stem": stem,
                "protocol": {**protocol, "seeds": seed + 1},
                "environment": environment(fabric),
                "seconds_of_last_call": round(time.time() - started, 1),
                "rows": rows,
            }
            if fabric.is_global_zero:
                fabric.print(f"wrote {save_result(stem, result, options.results)}")


if __name__ == "__main__":
    main()
