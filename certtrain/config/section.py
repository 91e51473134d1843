"""What every section of a configuration has in common."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

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
