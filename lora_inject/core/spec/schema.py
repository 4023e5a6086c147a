"""The JSON Schema of a config file, for editors."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from lora_inject.core.spec.config import Config


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft-07) of a config file, for editors, as plain data.

    It says less than `Config` checks: patterns are only strings.

    Examples:
        >>> sorted(json_schema()["$defs"])
        ['Active', 'Axes', 'Expect', 'Normal', 'Rule']
    """
    schema = Config.model_json_schema(schema_generator=_FileSchema)
    targets = schema["properties"]["targets"]
    pattern = {"type": "string", "minLength": 1, "description": "The rule that only matches."}
    targets["items"] = {"anyOf": [pattern, targets["items"]]}
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": schema.pop("title")}
    description = "Which parts of a model get which low-rank adapters (see the README)."
    return {**head, "description": description, **schema}


class _FileSchema(GenerateJsonSchema):
    """A schema for files, where a key without a value is left out instead of being null."""

    def model_schema(self, schema: core_schema.ModelSchema) -> JsonSchemaValue:
        """Drop the docstring of a model, and the line breaks of its fields'."""
        made = super().model_schema(schema)
        made.pop("description", None)
        for entry in made["properties"].values():
            entry["description"] = " ".join(entry["description"].split())
        return made

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        made = super().default_schema(schema)
        if made.get("default", "") is None:
            del made["default"]
        return made

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  (pydantic's)
        return False
