"""What a user may give as a setting or an example, and one line for what cannot be used."""

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, strided

from prunestudy.errors import InputError, quoted, require

# What most settings are: a number, a share with 1 and without, a number of steps or samples.
Positive = Annotated[float, Field(gt=0)]
Share, Part = Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]

_MOST_WHOLE = 2**32  # whole numbers are counts and seeds
# In float32 the square of a smaller number is 0, and a larger one leaves no room for a factor.
_LEAST, _MOST = 1e-18, 1e30


class Values(BaseModel):
    """Named settings; strict, so that a misspelt or mistyped one is refused.

    Scalars of numpy and torch count as plain numbers. Numbers that training in float32 cannot
    work with are refused.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, extra="forbid", allow_inf_nan=False, serialize_by_alias=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)

    @field_validator("*", mode="after")
    @classmethod
    def _in_range(cls, value: Any) -> Any:
        _require_in_range(value)
        return value


Kind = TypeVar("Kind", bound=Values)


def checked(kind: type[Kind], values: Any, within: str = "") -> Kind:
    """Return `values`, a dict, as a `kind`, or raise `InputError` for the first that is wrong.

    The line names it as `within` and its key, "params.ramp" for instance.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise InputError(first_wrong(error, kind, within)) from None


def inputs(example: Tensor | tuple[Tensor, ...], valued: bool = False) -> tuple[Tensor, ...]:
    """Return the arguments of a net's forward for `example`: one input batch, or a tuple of them.

    Raises `InputError` unless each is a dense tensor (n, ...) with the same n of at least 1; with
    `valued` not one on the meta device, where costs are counted.
    """
    found = tuple(example) if isinstance(example, list | tuple) else (example,)
    tensors = [x for x in found if isinstance(x, Tensor)]
    odd = [x for x in tensors if x.layout != strided or x.is_nested or (valued and x.is_meta)]
    kind = next((f"{x.layout} tensor on {x.device}" for x in odd), "")
    require(not odd, "example", kind, "dense tensors with values")
    batched = [isinstance(x, Tensor) and x.dim() > 0 and len(x) > 0 for x in found]
    right = bool(found) and all(batched) and len({len(x) for x in found}) == 1
    shown = [tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in found]
    require(right, "example", shown, "an input batch (n, ...), or a tuple of them with the same n")
    return found


def plain(value: Any) -> Any:
    """The same with plain numbers for scalars of numpy and torch."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if scalar else value


def _require_in_range(value: Any) -> None:
    """Raise `ValueError` for a number that is out of range whatever it is for."""
    if isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            _require_in_range(each)
    elif isinstance(value, int) and abs(value) >= _MOST_WHOLE:
        raise ValueError(f"a whole number below {_MOST_WHOLE}")
    elif isinstance(value, float) and value != 0 and not _LEAST <= abs(value) <= _MOST:
        raise ValueError(f"a number from {_LEAST:g} to {_MOST:g}, or 0 where that is allowed")


def first_wrong(error: ValidationError, kind: type[Values], within: str = "") -> str:
    """The line for the first value that is wrong; see `checked`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in (within, *first["loc"]) if part != "")
    own = str(first["ctx"]["error"]) if first["type"] == "value_error" else ""
    if own and not first["loc"]:  # of several values: it names them itself
        return f"{within}.{own}".lstrip(".")
    if first["type"] == "missing":
        return f"{where}: is missing"
    allowed = own or first["msg"].lower()
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        names = ", ".join(sorted(f.alias or n for n, f in kind.model_fields.items()))
        allowed = f"allowed are {names}" if names else "none is allowed here"
    return f"{where} = {quoted(first['input'])}: {allowed}"
