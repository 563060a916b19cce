"""Tiles that come as their parts (fast/parts.py) become pixels on the device that runs the model: nvImageCodec
decodes the native tiles there (nvJPEG, and the JPEG engine of GPUs that have one), each once; tiles are cut from
them and resampled by the same area filter as on the processor. So a GPU needs few processors to keep it busy.

nvJPEG's pixels are not promised to be libjpeg-turbo's to the bit, and damage within a scan, of which libjpeg-turbo
complains, may go unnoticed; hence a stage chooses it. Without a GPU nvImageCodec decodes with libjpeg-turbo, bit
for bit the fast reader's pixels, which is how this is tested."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slideway_inference.errors import DecoderUnavailable, TilesUnreadable, TileUnreadable
from slideway_inference.fast.parts import Parts, get_parts
from slideway_inference.serving.decoding import decode

Tiles = npt.NDArray[np.uint8]

NAME = "nvimagecodec"
_HELD_BYTES = 1 << 30
"""Decoded native tiles kept on a device for tiles to come: many rows of a slide."""


class DeviceDecoder:
    """For one device, used by one thread. Raises DecoderUnavailable where nvImageCodec is not installed or does
    not decode on this device."""

    def __init__(self, device: torch.device, held_bytes: int = _HELD_BYTES) -> None:
        self._device = device
        self._held_bytes = held_bytes
        self._pools: OrderedDict[tuple[int, int], _Pool] = OrderedDict()
        self._codec = _Codec(device)
        self.seconds = 0.0
        """That decoding has taken so far; cutting is done beside it."""

    def __call__(self, tiles: Tiles, stored: npt.NDArray[np.int32]) -> torch.Tensor:
        """Tiles (n, px, px, 3), of which those with `stored` (n,) bytes are parts, to pixels (n, px, px, 3) uint8
        on the device; on a GPU on its current stream. Raises TilesUnreadable."""
        count, px = tiles.shape[:2]
        out = torch.empty(tiles.shape, dtype=torch.uint8, device=self._device)
        plain = np.flatnonzero(stored == 0)
        if len(plain):
            out[torch.from_numpy(plain).to(self._device)] = torch.from_numpy(tiles[plain]).to(self._device)
        groups: dict[tuple[int, int, bool], list[int]] = {}
        parts = {}
        for row in np.flatnonzero(stored).tolist():
            parts[row] = tile = get_parts(tiles[row])
            groups.setdefault((tile.height, tile.width, tile.copied), []).append(row)
        damaged = np.zeros(count, np.bool_)
        for (height, width, copied), rows in groups.items():
            group = [parts[row] for row in rows]
            places = self._places(height, width, group)
            damaged[rows] = [min(found) < 0 for found in places]
            if not damaged.any():
                cut = _copied if copied else _resampled
                made = cut(self._pools[height, width].pixels, _Cuts(group, places, self._device), px)
                out[torch.tensor(rows, device=self._device)] = made
        if damaged.any():
            raise TilesUnreadable(damaged)
        return out

    def _places(self, height: int, width: int, tiles: Sequence[Parts]) -> list[list[int]]:
        """Where in the pool the parts of each tile lie, decoding those that are not there yet; -1: damaged."""
        pool = self._pools.get((height, width))
        if pool is None:
            while len(self._pools) > 1:  # of a slide that is done with
                self._pools.popitem(last=False)
            pool = self._pools[height, width] = _Pool(height, width, self._held_bytes, self._device)
        self._pools.move_to_end((height, width))
        wanted = {(tile.stream, part.native): part.data for tile in tiles for part in tile.parts}
        missing = pool.missing(wanted)
        if missing:
            started = time.perf_counter()
            pool.put(missing, self._codec([wanted[key] for key in missing], height, width))
            self.seconds += time.perf_counter() - started
        return [[pool.places[tile.stream, part.native] for part in tile.parts] for tile in tiles]


class _Codec:
    """Decodes JPEG streams, each of which stands by itself."""

    def __init__(self, device: torch.device) -> None:
        try:
            library: Any = import_module("nvidia.nvimgcodec")
        except ImportError as error:
            raise DecoderUnavailable(
                "SLIDEWAY_JPEG_DECODER is device, but nvImageCodec (nvidia-nvimgcodec) is not installed."
            ) from error
        self._device = device
        kinds = ("HW_GPU_ONLY", "GPU_ONLY", "HYBRID_CPU_GPU") if device.type == "cuda" else ("CPU_ONLY",)
        self._decoder = library.Decoder(
            device_id=device.index or 0 if device.type == "cuda" else library.NVIMGCODEC_DEVICE_CPU_ONLY,
            max_num_cpu_threads=1,
            backends=[library.Backend(getattr(library.BackendKind, kind)) for kind in kinds],
            options=":fancy_upsampling=1",  # as libjpeg-turbo and OpenSlide have it
        )
        self._params = library.DecodeParams(apply_exif_orientation=False, color_spec=library.ColorSpec.SRGB)

    def __call__(self, streams: Sequence[Tiles], height: int, width: int) -> list[torch.Tensor | None]:
        """Pixels (height, width, 3) uint8 on the device of each; None where they cannot be had."""
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        images = self._decoder.decode([bytes(data) for data in streams], params=self._params, cuda_stream=stream)
        return [self._tensor(image, data, height, width) for image, data in zip(images, streams, strict=True)]

    def _tensor(self, image: Any, data: Tiles, height: int, width: int) -> torch.Tensor | None:  # noqa: ANN401
        if image is not None and tuple(image.shape) == (height, width, 3):
            if self._device.type == "cuda":
                return torch.as_tensor(image, device=self._device)
            return torch.from_numpy(np.asarray(image))
        pixels = np.empty((height, width, 3), np.uint8)
        try:  # a kind of JPEG that the device does not know, or damage
            decode(memoryview(bytes(data)), pixels)
        except TileUnreadable:
            return None
        return torch.from_numpy(pixels).to(self._device)


class _Pool:
    """Decoded native tiles of one size on a device, (places, height, width, 3). The least used give way."""

    def __init__(self, height: int, width: int, held_bytes: int, device: torch.device) -> None:
        self.places: OrderedDict[tuple[int, int], int] = OrderedDict()
        self._size = max(1, held_bytes // (height * width * 3))
        self._shape = (height, width, 3)
        self._device = device
        self._free: list[int] = []
        self.pixels = torch.empty((0, *self._shape), dtype=torch.uint8, device=device)

    def missing(self, wanted: Mapping[tuple[int, int], Tiles]) -> list[tuple[int, int]]:
        """Those that are not here; those that are will stay for now."""
        missing = [key for key in wanted if key not in self.places]
        for key in wanted:
            if key in self.places:
                self.places.move_to_end(key)
        room = max(self._size, len(wanted))
        while len(self.places) + len(missing) > room:
            _, place = self.places.popitem(last=False)
            if place >= 0:
                self._free.append(place)
        return missing

    def put(self, keys: Sequence[tuple[int, int]], images: Sequence[torch.Tensor | None]) -> None:
        good = [image for image in images if image is not None]
        self._grow(len(good))
        taken = [self._free.pop() for _ in good]
        if good:
            self.pixels[torch.tensor(taken, device=self._device)] = torch.stack(good)
        rest = iter(taken)
        for key, image in zip(keys, images, strict=True):
            self.places[key] = -1 if image is None else next(rest)

    def _grow(self, count: int) -> None:
        """Room for so many more, twice as much each time."""
        if count <= len(self._free):
            return
        held = len(self.pixels)
        size = max(2 * held, held + count - len(self._free))
        grown = torch.empty((size, *self._shape), dtype=torch.uint8, device=self._device)
        grown[:held] = self.pixels
        self.pixels = grown
        self._free += range(held, size)


class _Cuts:
    """Where tiles lie on their parts, as tensors: `places` (n, rows, columns), `box` (n, 4)."""

    def __init__(self, tiles: Sequence[Parts], places: Sequence[Sequence[int]], device: torch.device) -> None:
        self.height, self.width = tiles[0].height, tiles[0].width
        rows = max(len(tile.parts) // tile.columns for tile in tiles)
        columns = max(tile.columns for tile in tiles)
        table = np.zeros((len(tiles), rows, columns), np.int64)
        for number, (tile, found) in enumerate(zip(tiles, places, strict=True)):
            table[number, : len(found) // tile.columns, : tile.columns] = np.reshape(found, (-1, tile.columns))
        self.places = torch.from_numpy(table).to(device)
        self.box = torch.tensor([tile.box for tile in tiles], dtype=torch.float64, device=device)

    def region(self, pixels: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The pixels (n, h, w, 3) at rows `y` (n, h) and columns `x` (n, w)."""
        y = y.clamp(0, self.places.shape[1] * self.height - 1)
        x = x.clamp(0, self.places.shape[2] * self.width - 1)
        tile = torch.arange(len(y), device=y.device)[:, None, None]
        place = self.places[tile, (y // self.height)[:, :, None], (x // self.width)[:, None, :]]
        return pixels[place, (y % self.height)[:, :, None], (x % self.width)[:, None, :]]


def _copied(pixels: torch.Tensor, cuts: _Cuts, px: int) -> torch.Tensor:
    along = torch.arange(px, device=pixels.device)
    corner = cuts.box.round().long()
    return cuts.region(pixels, corner[:, 1, None] + along, corner[:, 0, None] + along)


def _resampled(pixels: torch.Tensor, cuts: _Cuts, px: int) -> torch.Tensor:
    """As resample.py: each output pixel is the mean of the source over exactly its own footprint."""
    low = (cuts.box[:, :2] + 1e-6).floor()
    x, across = _taps(low[:, 0], cuts.box[:, 0], cuts.box[:, 2], px)
    y, down = _taps(low[:, 1], cuts.box[:, 1], cuts.box[:, 3], px)
    region = cuts.region(pixels, y, x).float()
    count, high, wide, _ = region.shape
    rows = torch.bmm(down, region.reshape(count, high, wide * 3)).reshape(count, px, wide, 3)
    columns = torch.bmm(across, rows.transpose(1, 2).reshape(count, wide, px * 3)).reshape(count, px, px, 3)
    return (columns.transpose(1, 2) + 0.5).to(torch.uint8)


def _taps(low: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Along one axis, for each tile: source pixels (n, s) and each output's weights of them (n, px, s)."""
    share = torch.arange(px + 1, device=low.device) / px
    edges = ((start - low)[:, None] + (stop - start)[:, None] * share).float()
    source = torch.arange(int(edges[:, -1].max().ceil()) + 1, device=low.device)
    upper = torch.minimum(source + 1, edges[:, 1:, None])
    weights = (upper - torch.maximum(source, edges[:, :-1, None])).clamp(min=0)
    weights /= weights.sum(dim=2, keepdim=True)
    return low.long()[:, None] + source, weights
