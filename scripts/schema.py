"""Write the JSON Schema (draft-07) of a config, by which editors complete and check a file.

    python scripts/schema.py

It says less than `Config` checks: patterns are only strings. `lora-inject schema` prints the file.
"""

from __future__ import annotations

import ast
import inspect
import json
from itertools import pairwise
from pathlib import Path

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

import lora_inject as li

FILE = Path(__file__).parents[1] / "lora_inject" / "configs" / "schema.json"


def schema() -> str:
    """Return the text of the file."""
    schema = li.Config.model_json_schema(schema_generator=_FileSchema)
    targets = schema["properties"]["targets"]
    pattern = {"type": "string", "minLength": 1, "description": "The rule that only matches."}
    targets["items"] = {"anyOf": [pattern, targets["items"]]}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": schema.pop("title")}
    description = "Which parts of a model get which low-rank adapters (see the README)."
    return json.dumps({**head, "description": description, **schema}, indent=2) + "\n"


class _FileSchema(GenerateJsonSchema):
    """A schema for files, where a key without a value is left out instead of being null."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Say of each field what stands below it in the source, and nothing of the model."""
        made = super().model_schema(schema)
        made.pop("description", None)
        [definition] = ast.parse(inspect.getsource(schema["cls"])).body
        for field, below in pairwise(getattr(definition, "body", ())):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(ast.Constant(str(text))):
                    key = schema["cls"].model_fields[name].alias or name
                    made["properties"][key]["description"] = " ".join(text.split())
        return made

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        if made.get("default", "") is None:
            del made["default"]
        return made

    def field_title_should_be_set(self, schema: object) -> bool:  # noqa: ARG002 - pydantic's
        return False


if __name__ == "__main__":
    FILE.write_text(schema(), encoding="utf-8")
