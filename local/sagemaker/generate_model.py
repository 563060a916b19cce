"""Write model.json: what SageMaker demands of the requests that the local service answers.

The constraints (types, required members, lengths, patterns, values) are read from botocore's service model,
so that none is kept by hand. Run it in an environment with botocore when AWS changes them:

    python local/sagemaker/generate_model.py && npx biome check --write local/sagemaker/model.json
"""

import json
from pathlib import Path
from typing import Any

import botocore.session
from botocore.model import ListShape, MapShape, Shape, StructureShape

OPERATIONS = (
    "CreateProcessingJob",
    "DescribeProcessingJob",
    "ListProcessingJobs",
    "StopProcessingJob",
    "AddTags",
    "ListTags",
)


def collect(shape: Shape, shapes: dict[str, dict[str, Any]]) -> None:
    """Add `shape` and all that it refers to, to `shapes`."""
    if shape.name in shapes:
        return
    entry: dict[str, Any] = {"type": shape.type_name}
    shapes[shape.name] = entry
    children: list[Shape] = []
    if isinstance(shape, StructureShape):
        entry["required"] = sorted(shape.required_members)
        entry["members"] = {name: member.name for name, member in shape.members.items()}
        children = list(shape.members.values())
    elif isinstance(shape, ListShape):
        entry["member"] = shape.member.name
        children = [shape.member]
    elif isinstance(shape, MapShape):
        entry["key"], entry["value"] = shape.key.name, shape.value.name
        children = [shape.key, shape.value]
    for name in ("min", "max", "pattern", "enum"):
        if name in shape.metadata:
            entry[name] = shape.metadata[name]
    for child in children:
        collect(child, shapes)


def model() -> dict[str, Any]:
    """Operations by name, each with its input shape; shapes by name; the botocore that said so."""
    service = botocore.session.get_session().get_service_model("sagemaker")
    shapes: dict[str, dict[str, Any]] = {}
    operations: dict[str, str] = {}
    for name in OPERATIONS:
        shape = service.operation_model(name).input_shape
        operations[name] = shape.name
        collect(shape, shapes)
    return {
        "botocore": botocore.__version__,
        "operations": operations,
        "shapes": dict(sorted(shapes.items())),
    }


if __name__ == "__main__":
    Path(__file__).with_name("model.json").write_text(json.dumps(model(), indent=2) + "\n")
