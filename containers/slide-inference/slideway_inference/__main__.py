"""The container's entry point: `python -m slideway_inference process`."""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(prog="slideway_inference", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("process", help="work through this instance's shards of a SageMaker Processing job")
    parser.parse_args()

    from slideway_inference.job import process  # PyTorch is slow to import; not for --help

    return process()


if __name__ == "__main__":
    sys.exit(main())
