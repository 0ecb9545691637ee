"""What came from outside, put into an error of one line."""

from __future__ import annotations


def quoted(value: object, most: int = 80) -> str:
    """A value as Python writes it, on one line and cut after `most` characters."""
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes) else value)
    except (ValueError, RecursionError):  # integers of thousands of digits, tables in tables
        text = f"{type(value).__name__} too large to be shown"
    return line(text, most)


def line(text: str, most: int = 300) -> str:
    """A text on one line and cut after `most` characters; control characters are escaped."""
    short = text if len(text) <= most else f"{text[:most]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in short)
