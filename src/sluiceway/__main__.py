"""The command's first lines: Ctrl-C while its modules are still being imported is one line too."""

import sys

from sluiceway.errors import STOPPED


def main() -> int:
    """Import the command and run it; returns its exit code."""
    try:
        from sluiceway.cli import main as run

        return run()
    except BaseException as error:
        if not was_interrupted(error):
            raise
        print("sluiceway: stopped", file=sys.stderr)
        return STOPPED


def was_interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is an error's cause: inside the body of a class it comes out as another."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


if __name__ == "__main__":
    sys.exit(main())
