"""How something that was started ended: an exit code, and one line if it failed."""

from __future__ import annotations

from collections.abc import Callable

#: Exit codes beside 0: a run that could not go on, bad input, and stopped by Ctrl-C or SIGTERM.
FAILED, BAD_INPUT, STOPPED = 1, 2, 130


def outcome_of(action: Callable[[], None]) -> tuple[int, str]:
    """Do it; returns the exit code and the line that says why, "" if it went well.

    Errors that are no one's input and no known failure of a run are raised as they are.
    """
    from sluiceway.data import DataError
    from sluiceway.experiment.errors import InputError
    from sluiceway.federated.checkpoints import CheckpointError, StorageError
    from sluiceway.federated.guards import RunFailed
    from sluiceway.federated.joining import JoinError
    from sluiceway.moe import NoExpertsError

    try:
        action()
    except (InputError, DataError, NoExpertsError, CheckpointError, JoinError) as error:
        return BAD_INPUT, f"{error}"
    except (StorageError, RunFailed) as error:
        return FAILED, f"{error}"
    except KeyboardInterrupt as stop:
        return STOPPED, f"stopped{stop}"
    return 0, ""
