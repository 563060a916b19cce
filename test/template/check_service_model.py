"""Hold requests against AWS's own service model, as botocore carries it.

Reads from stdin a JSON array of `{"service": …, "operation": …, "request": …}`, the operation as a state
machine's resource names it (`createProcessingJob`); writes to stdout a JSON array of findings, each a line
of text. No findings: the service's front door would let the requests in.

botocore's own validator looks at types, required and unknown members and lower bounds; upper bounds,
patterns and values, which it leaves to the service, are walked here from the same model.
"""

import json
import re
import sys
from collections.abc import Iterator

import botocore.session
from botocore.exceptions import UnknownServiceError
from botocore.model import (
    ListShape,
    MapShape,
    OperationNotFoundError,
    Shape,
    StringShape,
    StructureShape,
)
from botocore.validate import ParamValidator

# Unicode properties, which `re` does not know, by classes that are a little wider.
UNICODE_CLASSES = {r"\p{L}": r"\w", r"\p{N}": r"\d", r"\p{Z}": r"\s"}


def bounds(shape: Shape, size: float, what: str) -> Iterator[str]:
    """Findings where `size` lies outside the shape's bounds."""
    if "max" in shape.metadata and size > shape.metadata["max"]:
        yield f"{what} {size} is above {shape.metadata['max']}"
    if "min" in shape.metadata and size < shape.metadata["min"]:
        yield f"{what} {size} is below {shape.metadata['min']}"


def walk(shape: Shape, value: object, path: str) -> Iterator[str]:
    """Findings on `value` and all within it; values of a wrong type are left to botocore to report."""
    if isinstance(shape, StructureShape):
        if isinstance(value, dict):
            for name, member in shape.members.items():
                if name in value:
                    yield from walk(member, value[name], f"{path}.{name}")
    elif isinstance(shape, ListShape):
        if isinstance(value, list):
            yield from (f"{path}: {finding}" for finding in bounds(shape, len(value), "length"))
            for index, item in enumerate(value):
                yield from walk(shape.member, item, f"{path}[{index}]")
    elif isinstance(shape, MapShape):
        if isinstance(value, dict):
            yield from (f"{path}: {finding}" for finding in bounds(shape, len(value), "length"))
            for key, item in value.items():
                yield from walk(shape.key, key, f"{path} (key)")
                yield from walk(shape.value, item, f"{path}.{key}")
    elif isinstance(shape, StringShape):
        if isinstance(value, str):
            yield from (f"{path}: {finding}" for finding in text(shape, value))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield from (f"{path}: {finding}" for finding in bounds(shape, value, "value"))


def text(shape: StringShape, value: str) -> Iterator[str]:
    """Findings on one string."""
    yield from bounds(shape, len(value), "length")
    if shape.enum and value not in shape.enum:
        yield f"{value!r} is not one of the {len(shape.enum)} values"
    pattern = shape.metadata.get("pattern")
    if pattern is not None:
        for java, python in UNICODE_CLASSES.items():
            pattern = pattern.replace(java, python)
        if not re.fullmatch(pattern, value):
            yield f"{value!r} does not match {shape.metadata['pattern']}"


def check(service: str, operation: str, request: object) -> list[str]:
    """Findings on one request."""
    name = operation[:1].upper() + operation[1:]
    try:
        shape = botocore.session.get_session().get_service_model(service).operation_model(name).input_shape
    except (UnknownServiceError, OperationNotFoundError):
        return [f"{service}:{name}: there is no such operation"]
    report = ParamValidator().validate(request, shape).generate_report()
    findings = [line for line in report.splitlines() if line]
    findings.extend(walk(shape, request, ""))
    return [f"{name}: {finding}" for finding in findings]


def main() -> None:
    """Check what stdin holds."""
    findings = [
        finding
        for item in json.load(sys.stdin)
        for finding in check(item["service"], item["operation"], item["request"])
    ]
    json.dump(findings, sys.stdout)


if __name__ == "__main__":
    main()
