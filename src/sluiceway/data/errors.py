"""The one error of this package."""


class DataError(ValueError):
    """Bad data or a bad request for data: one line on what is wrong, where, and what is right."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name if it has none.

    Messages of other libraries run over several lines; a `DataError` has one.
    """
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
