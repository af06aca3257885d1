"""A rank as a field of a recipe: a number of coordinates, or a share such as 1/8."""

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from quad_modifiers.projection.rank import Rank, is_share

_NUMBER: TypeAdapter[int] = TypeAdapter(Annotated[int, Field(ge=0)])


def _checked_rank(value: Any, handler: Any) -> Rank:
    """Returns a share as it is written; else what a non-negative number makes of the value, with its messages."""
    if is_share(value):
        return str(value)
    try:
        return _NUMBER.validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise PydanticCustomError(
            "rank", "{reason}", {"reason": f"a number, or a share such as 1/8: {first['msg']}"}
        ) from error


RankField = Annotated[Rank, WrapValidator(_checked_rank)]
