"""How the parameters of strategies, server optimisers and split methods are checked."""

from pydantic import ConfigDict

#: How every strategy's parameters are checked: unknown names, values out of range, and numbers
#: that are infinite or NaN are errors.
PARAMETERS = ConfigDict(
    extra="forbid", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
)
