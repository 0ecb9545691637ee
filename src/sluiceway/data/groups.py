"""Which group each label belongs to, where a data set's authors publish that by itself."""

import json
import urllib.request
from dataclasses import dataclass

from sluiceway.data.cache import cache_folder, replacing
from sluiceway.data.errors import first_line

SECONDS = 10
"""How long the file may take to come."""
MOST_BYTES = 1 << 20
"""No list of labels is longer; more is not what was asked for."""


@dataclass(frozen=True)
class LabelGroups:
    """A JSON file {group: [label, ...]} on the web.

    Attributes:
        column: name of the group column that it makes.
        url: where it is.
    """

    column: str
    url: str

    def by_label(self) -> dict[str, str]:
        """The group of each label: from the cache folder, else downloaded into it.

        Raises:
            OSError: it cannot be had.
            ValueError: it is not of that form.
        """
        cached = cache_folder() / "groups" / f"{self.column}-{self.url.rpartition('/')[2]}"
        if cached.is_file():
            return inverted(cached.read_bytes())
        with urllib.request.urlopen(self.url, timeout=SECONDS) as answer:
            content: bytes = answer.read(MOST_BYTES)
        found = inverted(content)
        with replacing(cached) as made:
            made.write(content)
        return found

    def column_of(self, labels: list[object]) -> tuple[list[object] | None, str]:
        """The group of each row by its label, or None, and why there is none (else "")."""
        try:
            groups = self.by_label()
            return [groups[str(label)] for label in labels], ""
        except (OSError, ValueError) as error:
            return None, f"without {self.column}: {first_line(error)}"
        except KeyError as error:
            return None, f"without {self.column}: no group has the label {error}"


def inverted(content: bytes) -> dict[str, str]:
    """{label: group} from the bytes of {group: [label, ...]}. Raises ValueError."""
    groups = json.loads(content)
    if not isinstance(groups, dict) or not all(isinstance(g, list) for g in groups.values()):
        raise ValueError("it must be an object of lists of labels")
    return {str(label): str(group) for group, labels in groups.items() for label in labels}
