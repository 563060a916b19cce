"""The container's entry point: `python -m slideway_inference process`, `tile`, `join`, `serve`;
and `package`, which builds and checks model packages."""

from __future__ import annotations

import argparse
import sys

from slideway_inference import package
from slideway_inference.interpreter import hand_over_quickly


def main() -> int:
    parser = argparse.ArgumentParser(prog="slideway_inference", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("process", help="run the model over the slides of this instance's shards")
    commands.add_parser("tile", help="tile the slides of this instance's shards for Batch Transform")
    commands.add_parser("join", help="put Batch Transform's predictions of those tiles together by slide")
    commands.add_parser("serve", help="answer for packs of tiles over HTTP, as Batch Transform and endpoints ask")
    package.add_arguments(commands.add_parser("package", help="build or check a model package"))
    options = parser.parse_args()
    command = options.command
    hand_over_quickly()
    if command == "serve":
        from slideway_inference.serve import serve

        return serve()
    if command == "package":
        return package.run(options)

    from slideway_inference import job  # slow to import; not for --help

    if command == "tile":
        from slideway_inference.tiler import tile

        return job.run(tile)
    if command == "join":
        from slideway_inference.join import join

        return job.run(join)
    return job.run(job.process)


if __name__ == "__main__":
    sys.exit(main())
