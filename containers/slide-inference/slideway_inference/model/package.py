"""A model package: model.tar.gz as the run pinned it, or the folder into which SageMaker unpacked one."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from slideway_inference.contracts import ModelRef
from slideway_inference.errors import ModelDigestMismatch, ModelFormatNotSupported, ModelPackageInvalid
from slideway_inference.model.spec import ModelSpec, parse_model

if TYPE_CHECKING:
    from slideway_inference.model.head import Head

_JSON_LIMIT = 1 << 20
Format = Literal["torchscript", "onnx", "code"]
WEIGHTS: dict[Format, str] = {"code": "code/inference.py", "torchscript": "model.pt", "onnx": "model.onnx"}
"""What makes a package one of a format; code goes first, because it may load the others itself."""


@dataclass(frozen=True)
class Package:
    """An unpacked package: what model.json says, and the folder where its files are."""

    spec: ModelSpec
    format: Format
    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS[self.format]

    def head(self) -> Head | None:
        """The slide-level head, loaded; None where the package brings none. Raises ModelPackageInvalid."""
        if self.spec.head is None:
            return None
        from slideway_inference.model.head import Head  # it imports PyTorch, which is slow

        return Head(self.spec.head, self.folder / self.spec.head.file)


def open_package(archive: Path, ref: ModelRef, folder: Path) -> Package:
    """Checks a package against its pin and unpacks it into `folder`. Raises ModelDigestMismatch,
    ModelPackageInvalid, ModelFormatNotSupported."""
    if not archive.is_file():
        raise ModelPackageInvalid("The job has no model.tar.gz.")
    digest = file_digest(archive)
    if digest != ref.digest:
        raise ModelDigestMismatch(f"model.tar.gz is {digest}; the run pinned {ref.digest}.")
    package = unpack(archive, folder)
    spec = package.spec
    if (spec.name, spec.version) != (ref.name, ref.version):
        raise ModelPackageInvalid(
            f"model.json is {spec.name} {spec.version}; the run asked for {ref.name} {ref.version}."
        )
    return package


def unpack(archive: Path, folder: Path) -> Package:
    """Any package, pinned or not. Raises as `open_package`."""
    _unpack(archive, folder)
    return open_folder(folder, "model.tar.gz")


def open_folder(folder: Path, name: str = "The model's folder") -> Package:
    """A package that is unpacked already. Raises ModelPackageInvalid, ModelFormatNotSupported."""
    description = folder / "model.json"
    try:
        if description.stat().st_size > _JSON_LIMIT:
            raise ModelPackageInvalid("model.json is larger than 1 MB.")
        spec = parse_model(description.read_bytes())
    except OSError as error:
        raise ModelPackageInvalid(f"{name} holds no model.json.") from error
    format = _format(folder, name)
    if spec.head and not (folder / spec.head.file).is_file():
        raise ModelPackageInvalid(f"{name} lacks {spec.head.file}, which head.file names.")
    return Package(spec, format, folder)


def _format(folder: Path, name: str) -> Format:
    found = [format for format, file in WEIGHTS.items() if (folder / file).is_file()]
    if not found:
        raise ModelPackageInvalid(f"{name} holds none of {', '.join(WEIGHTS.values())}.")
    if found == ["torchscript", "onnx"]:
        raise ModelPackageInvalid(f"{name} holds both model.pt and model.onnx: leave one out.")
    if found[0] == "code" and os.environ.get("SLIDEWAY_ALLOW_MODEL_CODE", "true").lower() in ("false", "0", "no"):
        raise ModelFormatNotSupported(
            "The stage does not run code of model packages (inference.allowModelCode): export the model as "
            "TorchScript or ONNX."
        )
    return found[0]


def _unpack(archive: Path, folder: Path) -> None:
    """Only plain files below the package's root are accepted."""
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if member.isdir():
                    continue
                if path.is_absolute() or ".." in path.parts or not member.isreg():
                    raise ModelPackageInvalid("model.tar.gz holds a link, a device or a path outside of it.")
                source = tar.extractfile(member)
                assert source is not None
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ModelPackageInvalid(f"model.tar.gz cannot be unpacked: {error}") from error


def packed(files: Mapping[str, bytes | Path]) -> bytes:
    """model.tar.gz of these, in order; without times and owners, so that equal content gives an equal digest."""
    raw = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, content in files.items():
            data = content.read_bytes() if isinstance(content, Path) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return raw.getvalue()


def file_digest(file: Path) -> str:
    """`sha256:<hex>`."""
    with file.open("rb") as opened:
        return f"sha256:{hashlib.file_digest(opened, 'sha256').hexdigest()}"
