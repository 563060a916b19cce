"""Runs the container's entry point in a process that is forked from one which has imported everything: importing
PyTorch takes longer than most jobs of the tests. Jobs that tests stop or kill, and those of the project's
end-to-end tests, are started by themselves, as SageMaker does it."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping
from pathlib import Path

CONTAINER = Path(__file__).resolve().parents[1]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "slideway_inference.inference",
        "slideway_inference.job",
        "slideway_inference.join",
        "slideway_inference.model.head",
        "slideway_inference.model.predictors",
        "slideway_inference.tiler",
    ]
)


def run(command: str, environment: Mapping[str, str], folder: Path, seconds: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr, which are kept in `folder`. Raises TimeoutError."""
    out, err = folder / "stdout", folder / "stderr"
    process = _context.Process(target=_main, args=(command, dict(environment), str(out), str(err)))
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{command} ran for more than {seconds:g} s: {out.read_text()}{err.read_text()}")
    return process.exitcode, out.read_text(), err.read_text()


def _main(command: str, environment: dict[str, str], out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(CONTAINER)
    sys.argv = ["slideway_inference", command]
    from slideway_inference.__main__ import main

    sys.exit(main())
