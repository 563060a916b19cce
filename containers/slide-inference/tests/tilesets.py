"""Tilesets for tests: a job's slides are tiled, looked at as other tools would, and answered for as a Transform job
would."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from conftest import Ended, Job

from slideway_inference.contracts import ModelRef
from slideway_inference.model.package import open_package
from slideway_inference.model.predictors import load_predictors
from slideway_inference.serving.decoding import decode

U8 = npt.NDArray[np.uint8]
OUT = "transform/run-1/m/out/"


def shard_fields(px: int = 256, mpp: float = 0.5, overlap: int = 0, **tiling: Any) -> dict[str, Any]:  # noqa: ANN401
    """What a shard has more in transform mode."""
    return {
        "tile": {"px": px, "mpp": mpp, "overlap": overlap},
        "tiling": {
            "bucket": "silver",
            "prefix": "tiles/",
            "format": "jpeg",
            "quality": 90,
            "packBytes": 12_000_000,
            "objects": False,
            "keepDays": 7,
            **tiling,
        },
        "tiled": {"bucket": "silver", "prefix": "runs/run-1/jobs/m/tiled/"},
        "transformed": {"bucket": "silver", "prefix": OUT},
    }


@dataclass
class Made:
    """A slide's tileset, as it lies in S3."""

    job: Job
    told: dict[str, Any]

    @property
    def prefix(self) -> str:
        return str(self.told["tileset"]["prefix"])

    def object(self, name: str) -> bytes:
        return self.job.s3.objects["silver", self.prefix + name]

    @property
    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.object("tileset.json"))
        return document

    @property
    def index(self) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = pq.read_table(io.BytesIO(self.object("index.parquet"))).to_pydict()
        return columns

    @property
    def packs(self) -> list[bytes]:
        return [self.job.s3.objects["silver", pack["key"]] for pack in self.told["packs"]]

    def members(self) -> dict[str, bytes]:
        """The encoded tiles by their names with suffix, as tarfile reads them, over all packs in their order."""
        found: dict[str, bytes] = {}
        for pack in self.packs:
            with tarfile.open(fileobj=io.BytesIO(pack), mode="r:") as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[member.name] = file.read()
        return found

    def pixels(self, px: int = 256) -> dict[tuple[int, int], U8]:
        tiles = {}
        for name, data in self.members().items():
            out = np.empty((px, px, 3), np.uint8)
            decode(memoryview(data), out)
            x, y = name.split(".")[0].split("_")
            tiles[int(x), int(y)] = out
        return tiles


def tile(job: Job, **fields: Any) -> Ended:  # noqa: ANN401
    ended: Ended = job.run(command="tile", **(fields or shard_fields()))
    return ended


def told(job: Job, slide_id: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(job.s3.objects["silver", f"runs/run-1/jobs/m/tiled/{slide_id}.json"])
    return document


def made(job: Job, slide_id: str) -> Made:
    return Made(job, told(job, slide_id))


Answer = Callable[[Mapping[str, bytes]], list[dict[str, Any]]]


def transform(job: Job, tileset: Made, answer: Answer, attempt: int = 1) -> list[str]:
    """Leaves an output for each pack, as a Transform job does; their keys."""
    keys = []
    for pack in tileset.told["packs"]:
        with tarfile.open(fileobj=io.BytesIO(job.s3.objects["silver", pack["key"]])) as tar:
            members = {m.name: file.read() for m in tar if (file := tar.extractfile(m)) is not None}
        lines = answer(members)
        key = f"{OUT}attempt-{attempt}/{tileset.prefix}{pack['key'].rsplit('/', 1)[1]}.out"
        put(job, key, "".join(json.dumps(line) + "\n" for line in lines))
        keys.append(key)
    return keys


def put(job: Job, key: str, text: str) -> None:
    job.s3.log.append(("PUT", key))
    job.s3.objects["silver", key] = text.encode()
    job.s3.written["silver", key] = len(job.s3.log)


def of_model(job: Job, folder: Path, px: int = 256) -> Answer:
    """Answers with the job's model."""
    archive = folder / "answering.tar.gz"
    archive.write_bytes(job.package)
    digest = f"sha256:{hashlib.sha256(job.package).hexdigest()}"
    ref = ModelRef(job.model["name"], job.model["version"], digest)
    predictor = load_predictors(open_package(archive, ref, folder / "answering"), 1)[0]

    def answer(members: Mapping[str, bytes]) -> list[dict[str, Any]]:
        tiles = np.empty((len(members), px, px, 3), np.uint8)
        for place, data in enumerate(members.values()):
            decode(memoryview(data), tiles[place])
        return [
            {"tile": name.split(".")[0], "values": values.tolist()}
            for name, values in zip(members, predictor.run(tiles), strict=True)
        ]

    return answer


def join(job: Job, **fields: Any) -> Ended:  # noqa: ANN401
    ended: Ended = job.run(command="join", **(fields or shard_fields()))
    return ended
