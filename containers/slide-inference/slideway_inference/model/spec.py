"""model.json, checked against the contract: `modelSchema` of core/contracts.ts, field by field."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, cast

from slideway_inference.contracts import TileFormat
from slideway_inference.errors import ModelPackageInvalid

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
_OUTPUT = re.compile(r"[a-z][a-z0-9_]{0,62}")
_AGGREGATE = re.compile(r"mean|median|max|top_k_mean|p[1-9][0-9]?")
_HEAD_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}\.pt")
_INSTANCE = re.compile(r"ml\.[a-z0-9-]+\.[a-z0-9]+")
_ANY = re.compile(r"(?s).+")
_MAX_OUTPUTS = 8192
_MAX_HEAD_OUTPUTS = 1024
_MAX_MODEL_SECONDS = 3590
_MAX_TRANSFORM_MB = 100
_TRANSFORM_LIMITS = {
    "maxInstances": 100,
    "packsPerInstance": 100_000,
    "maxConcurrentTransforms": 100,
    "maxPayloadInMB": 100,
    "invocationTimeoutSeconds": 3600,
}
ATTENTION = "attention"


@dataclass(frozen=True)
class HeadSpec:
    """What answers for the whole slide from its tiles' features; `file` is TorchScript within the package."""

    file: str
    task: Literal["classification", "regression"]
    outputs: tuple[str, ...]
    attention: bool


@dataclass(frozen=True)
class Encoding:
    """How the model wants its tiles stored for a Transform job; None: as the stage has it."""

    format: TileFormat | None = None
    quality: int | None = None


@dataclass(frozen=True)
class ModelSpec:
    """What model.json says, as far as inference needs it. `outputs` are `f0000`, `f0001`, … of an embedding that
    gives its dimensions."""

    name: str
    version: str
    license: str
    task: Literal["classification", "regression", "embedding"]
    outputs: tuple[str, ...]
    px: int
    mpp: float
    overlap: int
    encoding: Encoding
    mean: tuple[float, ...]
    std: tuple[float, ...]
    layout: Literal["NCHW", "NHWC"]
    range: tuple[float, float]
    mode: Literal["processing", "transform"]
    batch: int
    model_seconds: int | None
    """What a batch may take; None: as the stage has it."""
    head: HeadSpec | None

    @property
    def columns(self) -> list[str]:
        """Columns of tiles.parquet."""
        prefix = "prob" if self.task == "classification" else "value"
        return [f"{prefix}_{output}" for output in self.outputs]


def parse_model(text: str | bytes) -> ModelSpec:
    """Raises ModelPackageInvalid, naming the field and what it must be."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ModelPackageInvalid(f"model.json is not JSON: {error}") from error
    top = _Fields(document, "model.json")
    tile = _Fields(top.get("tile"), "tile")
    given = _Fields(top.get("input"), "input")
    task = top.choice("task", ("classification", "regression", "embedding"))
    spec = ModelSpec(
        name=top.text("name", _NAME),
        version=top.text("version", _VERSION),
        license=top.text("license", _ANY),
        task=cast(Any, task),
        outputs=_outputs(top, task),
        px=tile.integer("px", 16, 4096),
        mpp=tile.number("mpp", above=0, most=100),
        overlap=tile.integer("overlap", 0, 4096, default=0),
        encoding=_encoding(tile),
        mean=tuple(given.numbers("mean", 3)),
        std=tuple(given.numbers("std", 3)),
        layout=cast(Any, given.choice("layout", ("NCHW", "NHWC"), default="NCHW")),
        range=cast(Any, tuple(given.numbers("range", 2, default=[0, 1]))),
        mode=cast(Any, top.choice("mode", ("processing", "transform"))),
        batch=top.integer("batch", 1, 65536, default=64),
        model_seconds=top.integer("modelSeconds", 1, _MAX_MODEL_SECONDS) if top.has("modelSeconds") else None,
        head=_head(top),
    )
    top.integer("top_k", 1, 1 << 53, default=10)
    top.texts("aggregate", _AGGREGATE, default=["mean"])
    _transform(top)
    if min(spec.std) <= 0:
        raise ModelPackageInvalid("model.json: input.std must be positive")
    if spec.overlap >= spec.px:
        raise ModelPackageInvalid("model.json: tile.overlap must be below tile.px")
    attention = spec.head is not None and spec.head.attention
    if attention and ATTENTION in spec.outputs:
        raise ModelPackageInvalid(f"model.json: no output can be called {ATTENTION} beside a head that gives one")
    heatmap = top.get("heatmap", None)
    if heatmap is not None:
        drawn = _Fields(heatmap, "heatmap").text("output", _OUTPUT)
        if drawn == ATTENTION and not attention:
            raise ModelPackageInvalid(f'model.json: heatmap.output {ATTENTION} needs a head with "attention": true')
        if drawn != ATTENTION and drawn not in spec.outputs:
            raise ModelPackageInvalid(f"model.json: heatmap.output {drawn} is not among the outputs")
    return spec


def _outputs(top: _Fields, task: str) -> tuple[str, ...]:
    """The names that are given, or those of as many dimensions as an embedding says that it has."""
    if top.get("dimensions", None) is not None:
        if task != "embedding":
            raise ModelPackageInvalid("model.json: dimensions are for an embedding only")
        if top.get("outputs", None):
            raise ModelPackageInvalid("model.json: give outputs or dimensions, not both")
        return tuple(f"f{index:04}" for index in range(top.integer("dimensions", 1, _MAX_OUTPUTS)))
    if task == "embedding" and not top.get("outputs", None):
        raise ModelPackageInvalid("model.json: an embedding needs dimensions")
    outputs = tuple(top.texts("outputs", _OUTPUT, most=_MAX_OUTPUTS))
    if len(set(outputs)) != len(outputs):
        raise ModelPackageInvalid("model.json: outputs must differ from each other")
    return outputs


def _encoding(tile: _Fields) -> Encoding:
    given = tile.get("encoding", None)
    if given is None:
        return Encoding()
    fields = _Fields(given, "tile.encoding")
    format = fields.choice("format", ("jpeg", "png", "raw")) if fields.has("format") else None
    quality = fields.integer("quality", 1, 100) if fields.has("quality") else None
    return Encoding(cast(Any, format), quality)


def _head(top: _Fields) -> HeadSpec | None:
    given = top.get("head", None)
    if given is None:
        return None
    fields = _Fields(given, "head")
    head = HeadSpec(
        file=fields.text("file", _HEAD_FILE, default="head.pt"),
        task=cast(Any, fields.choice("task", ("classification", "regression"))),
        outputs=tuple(fields.texts("outputs", _OUTPUT, most=_MAX_HEAD_OUTPUTS)),
        attention=fields.boolean("attention", default=False),
    )
    if head.file == "model.pt":
        raise ModelPackageInvalid("model.json: head.file must be another file than model.pt")
    if len(set(head.outputs)) != len(head.outputs):
        raise ModelPackageInvalid("model.json: head.outputs must differ from each other")
    return head


def _transform(top: _Fields) -> None:
    """Nothing here needs what the Transform job is to be; only that it is well said."""
    given = top.get("transform", None)
    if given is None:
        return
    fields = _Fields(given, "transform")
    if fields.has("instanceType"):
        fields.text("instanceType", _INSTANCE)
    for name in ("maxInstances", "packsPerInstance", "invocationTimeoutSeconds"):
        fields.integer(name, 1, _TRANSFORM_LIMITS[name], default=1)
    requests, megabytes = (
        fields.integer(name, 1, _TRANSFORM_LIMITS[name], default=1)
        for name in ("maxConcurrentTransforms", "maxPayloadInMB")
    )
    if requests * megabytes > _MAX_TRANSFORM_MB:
        raise ModelPackageInvalid(
            f"model.json: transform.maxConcurrentTransforms × maxPayloadInMB must be at most {_MAX_TRANSFORM_MB}"
        )


_REQUIRED = object()


class _Fields:
    """Typed access to a JSON object; every complaint names the field."""

    def __init__(self, document: object, where: str) -> None:
        if not isinstance(document, dict):
            raise ModelPackageInvalid(f"model.json: {where} must be an object")
        self._document = document
        self._where = "" if where == "model.json" else f"{where}."

    def has(self, field: str) -> bool:
        return field in self._document

    def get(self, field: str, default: object = _REQUIRED) -> object:
        value = self._document.get(field, default)
        if value is _REQUIRED:
            raise self._wrong(field, "given")
        return value

    def text(self, field: str, pattern: re.Pattern[str], default: object = _REQUIRED) -> str:
        value = self.get(field, default)
        if not isinstance(value, str) or not pattern.fullmatch(value):
            raise self._wrong(field, f"a string like {pattern.pattern}")
        return value

    def texts(
        self, field: str, pattern: re.Pattern[str], default: object = _REQUIRED, most: int = 1 << 20
    ) -> list[str]:
        value = self.get(field, default)
        if (
            not isinstance(value, list)
            or not value
            or not all(isinstance(item, str) and pattern.fullmatch(item) for item in value)
        ):
            raise self._wrong(field, f"a list of strings like {pattern.pattern}")
        if len(value) > most:
            raise self._wrong(field, f"a list of at most {most} strings")
        return value

    def choice(self, field: str, choices: tuple[str, ...], default: object = _REQUIRED) -> str:
        value = self.get(field, default)
        if value not in choices:
            raise self._wrong(field, f"one of {', '.join(choices)}")
        return str(value)

    def boolean(self, field: str, default: object = _REQUIRED) -> bool:
        value = self.get(field, default)
        if not isinstance(value, bool):
            raise self._wrong(field, "true or false")
        return value

    def integer(self, field: str, least: int, most: int, default: object = _REQUIRED) -> int:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise self._wrong(field, "an integer")
        if not least <= value <= most:
            raise self._wrong(field, f"from {least} to {most}")
        return int(value)

    def number(self, field: str, above: float, most: float) -> float:
        value = self.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
            raise self._wrong(field, f"a number above {above}, at most {most}")
        return float(value)

    def numbers(self, field: str, count: int, default: object = _REQUIRED) -> list[float]:
        value = self.get(field, default)
        if (
            not isinstance(value, list)
            or len(value) != count
            or not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
        ):
            raise self._wrong(field, f"a list of {count} numbers")
        return [float(item) for item in value]

    def _wrong(self, field: str, wanted: str) -> ModelPackageInvalid:
        return ModelPackageInvalid(f"model.json: {self._where}{field} must be {wanted}")
