"""What every section of a configuration has in common."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from certtrain.errors import unknown

Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, no unknown keys, no infinities; written under the names that the YAML has.

    Strict: true is no number, and "3" no integer. Lists, which are kept as tuples, are the one exception. What a key
    means stands below it, as a docstring, which `certtrain init` and the documentation show.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        strict=True,
        validate_by_name=True,
        serialize_by_alias=True,
        use_attribute_docstrings=True,
    )


def by_name(kind: str, names: Collection[str]) -> BeforeValidator:
    """For a union of sections told apart by `name`: a bare name means the section with its defaults."""

    def named(value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and value.get("name", ...) not in (..., *names):
            raise unknown(kind, str(value["name"]), names)
        return value

    return BeforeValidator(named)
