"""The one form of a message between processes and machines: a JSON object and a body of bytes.

TLS connections of split learning write both behind a fixed header; a site's worker process, NVFlare
and Flower have lengths of their own and carry the same two parts. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, Final

from sluiceway.errors import line

#: Header of a frame on a plain stream: magic, bytes of the JSON object, bytes of the body.
HEADER: Final = struct.Struct(">4sIQ")
#: Version of the frame layout; the other side rejects any other.
MAGIC: Final = b"SLW1"
#: Largest JSON object and largest body in bytes, 1 MiB and 4 GiB.
FACTS_LIMIT: Final = 1 << 20
BODY_LIMIT: Final = 4 << 30


class FrameError(ValueError):
    """Bytes that are not a frame; the message is one line."""


def encode(facts: Mapping[str, Any]) -> bytes:
    """A JSON object as bytes."""
    return json.dumps(facts).encode()


def lengths(header: bytes) -> tuple[int, int]:
    """Bytes of the JSON object and of the body, by a header. Raises FrameError."""
    magic, text, body = HEADER.unpack(header)
    if magic != MAGIC or text > FACTS_LIMIT or body > BODY_LIMIT:
        raise FrameError("not a frame of Sluiceway")
    return text, body


def parse(text: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises FrameError."""
    if len(text) > FACTS_LIMIT:
        raise FrameError(f"a JSON object of {len(text)} bytes; at most {FACTS_LIMIT}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FrameError(f"not JSON ({line(str(error), 80)})") from None
    if not isinstance(found, dict):
        raise FrameError("not a JSON object")
    return found
