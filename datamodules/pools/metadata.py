"""Metadata of documents: JSON objects. Their types are collected part by part, and settled once all were seen."""

import json
from collections.abc import Iterable

import pyarrow as pa


def value_kinds(metadata: Iterable[dict[str, object]]) -> dict[str, list[str]]:
    """Return the types of the values seen in each column."""
    kinds: dict[str, set[str]] = {}
    for entry in metadata:
        for name, value in entry.items():
            is_wide = isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
            kinds.setdefault(name, set()).add("wide" if is_wide else type(value).__name__)
    return {name: sorted(seen) for name, seen in sorted(kinds.items())}


def struct_type(parts: Iterable[dict[str, list[str]]]) -> pa.StructType | None:
    """Return the type of the metadata of all parts: one type per column, text where the values have several."""
    seen: dict[str, set[str]] = {}
    for part in parts:
        for name, found in part.items():
            seen.setdefault(name, set()).update(found)
    types = {"bool": pa.bool_(), "int": pa.int64(), "float": pa.float64()}
    fields = []
    for name, kinds in seen.items():
        kinds = kinds - {"NoneType"}
        kind = "float" if kinds == {"int", "float"} else kinds.pop() if len(kinds) == 1 else "str"
        fields.append(pa.field(name, types.get(kind, pa.string())))
    return pa.struct(fields) if fields else None


def metadata_array(column: pa.ChunkedArray, kind: pa.StructType) -> pa.Array:
    """Return JSON objects as values of a struct type; lists and objects inside them become JSON text."""
    text_fields = [field.name for field in kind if pa.types.is_string(field.type)]
    rows = [json.loads(value) for value in column.to_pylist()]
    for row in rows:
        for name in text_fields:
            value = row.get(name)
            if isinstance(value, str):
                row[name] = value.encode("utf-8", errors="replace").decode()  # halves of surrogate pairs
            elif value is not None:
                row[name] = json.dumps(value)
    return pa.array(rows, kind)
