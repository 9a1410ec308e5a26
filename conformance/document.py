"""The exchange's OpenAPI document: what it says that an endpoint answers, and whether a body is that."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator, FormatChecker

from conformance.answers import KINDS, Form

_FORMATS = FormatChecker(formats=())
# What the document says of these in words: counts have two decimals in answers, money up to six.
_KINDS = {"FixedPointCount": "count", "FixedPointDollars": "dollars"}


@_FORMATS.checks("date-time", raises=ValueError)
def _is_time(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


class Document:
    """`openapi.yaml`, read once. Fields that it does not name count as departures."""

    def __init__(self, path: Path) -> None:
        self._whole = yaml.load(path.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506  # both are safe
        self.version = str(self._whole["info"]["version"])
        self._defs = {name: _plain(each) for name, each in self._whole["components"]["schemas"].items()}
        for name, kind in _KINDS.items():
            self._defs[name]["pattern"] = f"^({KINDS[kind].pattern})$"
        self._operations = {
            (method.upper(), _bare(path)): operation
            for path, methods in self._whole["paths"].items()
            for method, operation in methods.items()
        }

    def name_of(self, endpoint: str) -> str | None:
        """The document's own name of an endpoint ("GetOrders"); None when it has none."""
        operation = self._operation(endpoint)
        return operation and str(operation["operationId"])

    def departures(self, endpoint: str, status: int, body: bytes) -> list[str]:
        """How a body departs from what the document says of this endpoint and status, in words."""
        operation = self._operation(endpoint)
        if operation is None:
            return ["the document has no such endpoint"]
        if not self.has(endpoint, status):
            return [f"the document has no {status} here"]
        schema = self._schema(endpoint, status)
        if schema is None:
            return ["the document has no body here"] if body else []
        return self._differences(schema, body)

    def has(self, endpoint: str, status: int) -> bool:
        """Whether the document has this status at this endpoint."""
        operation = self._operation(endpoint)
        return operation is not None and str(status) in operation["responses"]

    def differences_from(self, name: str, body: bytes) -> list[str]:
        """How a body departs from one of the document's schemas, by its name."""
        return self._differences(json.dumps({"$ref": f"#/$defs/{name}"}), body)

    def _differences(self, schema: str, body: bytes) -> list[str]:
        try:
            value = json.loads(body)
        except (ValueError, RecursionError):
            return ["no JSON"]
        return [
            f"{_where(error)}: {error.message[:150]}" for error in self._validator(schema).iter_errors(value)
        ]

    def form_of(self, endpoint: str, status: int) -> Form:
        """What the document says in the short form of `conformance.answers`; None = no body."""
        schema = self._schema(endpoint, status)
        return None if schema is None else self._form(json.loads(schema))

    def form_named(self, name: str) -> Form:
        """The short form of a schema by its name."""
        return self._form({"$ref": f"#/$defs/{name}"})

    def _operation(self, endpoint: str) -> dict[str, Any] | None:
        method, path = endpoint.split(" ")
        return self._operations.get((method, _bare(path)))

    @cache  # noqa: B019  # there is one document
    def _schema(self, endpoint: str, status: int) -> str | None:
        """The schema of an answer as JSON text; None when it has no body."""
        operation = self._operation(endpoint)
        assert operation is not None
        response = operation["responses"][str(status)]
        if "$ref" in response:
            response = self._whole["components"]["responses"][response["$ref"].rpartition("/")[2]]
        content = response.get("content")
        return content and json.dumps(_plain(content["application/json"]["schema"]))

    @cache  # noqa: B019  # there is one document
    def _validator(self, schema: str) -> Draft202012Validator:
        return Draft202012Validator({**json.loads(schema), "$defs": self._defs}, format_checker=_FORMATS)

    def _form(self, schema: dict[str, Any]) -> Form:
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            return _KINDS.get(name) or self._form(self._defs[name])
        if "anyOf" in schema:
            forms = [self._form(each) for each in schema["anyOf"]]
            return forms[0] if len(forms) == 1 else tuple(forms)
        if "enum" in schema:
            return set(schema["enum"])
        kind = schema.get("type")
        if kind == "null":
            return None
        if kind == "array":
            return [self._form(schema["items"])]
        if kind == "object":
            required = schema.get("required", ())
            return {
                name if name in required else f"{name}?": self._form(each)
                for name, each in schema.get("properties", {}).items()
            }
        return "time" if schema.get("format") == "date-time" else "text" if kind == "string" else kind


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema of OpenAPI 3.0 as JSON Schema: null is a type of its own, objects have no more fields.

    `nullable` beside a `$ref` is heeded, which OpenAPI 3.0 itself does not ask for: the exchange's own client
    is made that way.
    """
    if schema.get("nullable"):
        rest = {name: each for name, each in schema.items() if name != "nullable"}
        return {"anyOf": [_plain(rest), {"type": "null"}]}
    if "$ref" in schema:
        return {"$ref": "#/$defs/" + schema["$ref"].rpartition("/")[2]}
    if "allOf" in schema and len(schema["allOf"]) == 1:
        return _plain(schema["allOf"][0])
    plain = {
        name: schema[name]
        for name in ("type", "enum", "format", "required", "minimum", "maximum")
        if name in schema
    }
    for name in ("anyOf", "oneOf", "allOf"):
        if name in schema:
            plain["anyOf"] = [_plain(each) for each in schema[name]]
    if "items" in schema:
        plain["items"] = _plain(schema["items"])
    if "properties" in schema:
        plain["properties"] = {name: _plain(each) for name, each in schema["properties"].items()}
    if schema.get("type") == "object" and "additionalProperties" not in schema:
        plain["additionalProperties"] = False
    return plain


def _bare(path: str) -> str:
    """A path whose parameters have no names: the document's {order_id}, our :order_id."""
    return re.sub(r"\{\w+\}|:\w+", "*", path)


def _where(error: Any) -> str:
    return "body" + "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error.absolute_path
    )
