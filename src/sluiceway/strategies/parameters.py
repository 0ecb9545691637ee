"""How the parameters of strategies, server optimisers and split methods are checked."""

from pydantic import ConfigDict

#: How every strategy's parameters are checked: unknown names, values out of range, and numbers
#: that are infinite or NaN are errors.
PARAMETERS = ConfigDict(
    extra="forbid", validate_by_name=True, validate_by_alias=True, allow_inf_nan=False
)


def is_statistic(name: str) -> bool:
    """Whether a tensor of that name is a running statistic of BatchNorm.

    Clients' statistics are averaged. They are no parameters: no optimiser steps along their change,
    and no norm of an update counts them  [ours].
    """
    return name.rpartition(".")[2] in ("running_mean", "running_var")
