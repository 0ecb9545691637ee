"""The handshake: what a client and its server must agree on before the first round.

Parameter names and the layout of adapters differ between releases of transformers and PEFT, so a
client that joins sends its model signature, and a difference is reported by its first tensor and by
the versions on both sides, not by an error deep in a round.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from sluiceway.errors import BAD_INPUT, SluicewayError

#: What decides names and shapes.
PACKAGES = ("sluiceway", "torch", "transformers", "peft")


class HandshakeError(SluicewayError, ValueError):
    """A client whose tensors are not the server's; the message is one line."""

    exit_code = BAD_INPUT


@dataclass(frozen=True)
class ModelSignature:
    """The tensors that one side exchanges, and what it runs.

    Attributes:
        tensors: by name, type and shape, such as "float32 [4, 16]".
        versions: of `PACKAGES`; "none" for one that is not installed.
    """

    tensors: Mapping[str, str]
    versions: Mapping[str, str]

    @staticmethod
    def of(
        tensors: Mapping[str, Tensor], still: Mapping[str, Tensor] | None = None
    ) -> ModelSignature:
        """The card of this process.

        Args:
            tensors: that are exchanged.
            still: that are not, and must be equal on both sides; a digest of each is in the card.
        """
        kinds = {
            name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            for name, tensor in tensors.items()
        }
        for name, tensor in (still or {}).items():
            values = (
                tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
            kinds[name] = f"frozen values {hashlib.sha256(values).hexdigest()[:16]}"
        return ModelSignature(kinds, {package: installed(package) for package in PACKAGES})

    def to_json(self) -> str:
        """Plain text, to be sent."""
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> ModelSignature:
        """The inverse of `to_json`. Raises HandshakeError."""
        try:
            found = json.loads(text)
            return ModelSignature(
                *({str(k): str(v) for k, v in found[f].items()} for f in ("tensors", "versions"))
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise HandshakeError(f"not a card of a client or server ({error})") from None


def check_joining(server: ModelSignature, client: ModelSignature) -> None:
    """Refuse a client that does not exchange the server's tensors.

    Raises:
        HandshakeError: names the first difference, how many there are, and both sides' versions.
    """
    names = [*server.tensors, *(name for name in client.tensors if name not in server.tensors)]
    wrong = [name for name in names if server.tensors.get(name) != client.tensors.get(name)]
    if not wrong:
        return
    first = wrong[0]
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    raise HandshakeError(
        f"client and server differ in {first}{more}: the server has "
        f"{server.tensors.get(first, 'no such tensor')}, the client "
        f"{client.tensors.get(first, 'no such tensor')}; {described('server', server)}, "
        f"{described('client', client)}"
    )


def described(side: str, card: ModelSignature) -> str:
    """One side's versions in a few words."""
    return f"{side}: " + " ".join(f"{name} {number}" for name, number in card.versions.items())


def installed(package: str) -> str:
    """The version of a package, "none" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
