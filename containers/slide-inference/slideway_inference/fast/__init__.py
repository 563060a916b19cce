"""The fast reader: tiles of TIFF and DICOM slides at the speed of the decoder, from a file or straight from S3.

`open_fast(source, name=…)` opens a slide from its bytes:

- `FileSource(path)`, or for files that belong together `sources_of(path)`; `S3Source(client, bucket, key, size,
  version_id=…, etag=…)`. Of a slide of many files (DICOM) a mapping of file names to sources; `name` is the one to
  open. `requests` and `bytes_read` of a source count.
- It raises `NotFast(reason)` for what is left to OpenSlide, `SlideUnopenable` (`TiffDamaged`, `DicomDamaged`,
  `PlanesNotSupported`) for what is damaged or no brightfield slide, `SlideFetchFailed` (`SlideChanged`) for the
  storage.

The `FastReader` is a `SlideReader` (levels, mpp, vendor, overview, read_region, read_tiles) with `properties`, and

    buffers: queue.Queue                                # of (64, px, px, 3) uint8
    for batch in reader.read_batches(geometry, positions, 64, buffers):
        batch.tiles, batch.indices, batch.unread        # unread: {place: Unread(reason, retry)}
        buffers.put(batch.buffer)

It decodes in `threads` threads of its own, ahead of the caller while there are free buffers. A tile in `unread`
with `retry` is worth one try with OpenSlide; without, the data is bad, and what another reader shows would be a
guess."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from slideway_inference.fast.codecs import available
from slideway_inference.fast.dicom import DicomDamaged, NotDicom, dicom_pyramid
from slideway_inference.fast.pyramid import NotFast, PlanesNotSupported, tiff_pyramid
from slideway_inference.fast.reader import Batch, FastReader, Form, Unread
from slideway_inference.fast.source import ByteSource, FileSource, S3Source, SlideChanged
from slideway_inference.fast.tiff import NotTiff, TiffDamaged

__all__ = [
    "Batch",
    "ByteSource",
    "DicomDamaged",
    "FastReader",
    "FileSource",
    "Form",
    "NotFast",
    "PlanesNotSupported",
    "S3Source",
    "SlideChanged",
    "TiffDamaged",
    "Unread",
    "open_fast",
    "sources_of",
]


def open_fast(
    source: ByteSource | Mapping[str, ByteSource], *, name: str, threads: int | None = None
) -> FastReader:
    """`name` is the file's name, of which only the suffix matters unless there are many files. The reader closes
    the sources; where this raises, they are still open."""
    if not available():
        raise NotFast("simplejpeg and imagecodecs are not installed")
    sources = source if isinstance(source, Mapping) else {name: source}
    try:
        pyramid = tiff_pyramid(sources[name], name)
    except NotTiff:
        try:
            pyramid = dicom_pyramid(sources, name)
        except NotDicom:
            raise NotFast("neither TIFF nor DICOM") from None

    def close() -> None:
        for each in sources.values():
            each.close()

    return FastReader(pyramid, threads=threads or _processors(), close=close)


def sources_of(path: Path) -> dict[str, ByteSource]:
    """The file, and for DICOM its neighbours in the folder, as OpenSlide looks for a series."""
    with path.open("rb") as file:
        many = file.read(132)[128:] == b"DICM"
    files = sorted(other for other in path.parent.iterdir() if other.is_file()) if many else [path]
    return {file.name: FileSource(file) for file in files}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
