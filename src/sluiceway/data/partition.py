"""Who holds which rows: four ways to deal a data set to clients.

Every partition is a list with one array of sorted row indices (int64) per client. The arrays are
disjoint and together cover every row; they depend on the arguments alone. Throughout, `labels` and
`groups` are int64 [N], `clients` is 1..N and `seed` 0 or more; other numbers raise DataError.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sluiceway.data.errors import DataError
from sluiceway.data.tables import IntArray

Parts = list[IntArray]

#: Labels or groups times clients, at most, and shards of a pathological partition: more would take
#: minutes or more memory than a machine has.
SHARES_LIMIT = 50_000_000
SHARDS_LIMIT = 1_000_000

PARTITION_KINDS = ("iid", "dirichlet", "pathological", "natural")


def partition(
    kind: str,
    labels: IntArray,
    clients: int,
    seed: int,
    *,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    groups: Mapping[str, IntArray] | None = None,
    column: str | None = None,
) -> Parts:
    """Deal rows to clients by the partition that a recipe names.

    Args:
        kind: "iid", "dirichlet", "pathological" or "natural".
        labels: the rows' labels.
        clients: their number.
        seed: of every draw.
        alpha: concentration above 0; needed by "dirichlet", optional for "natural".
        classes_per_client: 1..C; needed by "pathological".
        groups: the table's group columns; used by "natural".
        column: the group column; needed by "natural" unless there is exactly one.

    Raises:
        DataError: an unknown kind, a needed value that is missing, or one out of its range.
    """
    if kind == "iid":
        return iid(labels, clients, seed)
    if kind == "dirichlet":
        if alpha is None:
            raise DataError("a dirichlet partition needs alpha, a number above 0")
        return dirichlet(labels, clients, alpha, seed)
    if kind == "pathological":
        if classes_per_client is None:
            raise DataError("a pathological partition needs classes_per_client, 1 or more")
        return pathological(labels, clients, classes_per_client, seed)
    if kind == "natural":
        return natural(_column(groups or {}, column), clients, alpha, seed)
    raise DataError(
        f"there is no partition {kind!r}: it must be one of {', '.join(PARTITION_KINDS)}"
    )


def iid(labels: IntArray, clients: int, seed: int) -> Parts:
    """Shuffle the rows and deal them evenly: client sizes differ by at most one."""
    _check_clients(len(labels), clients)
    rows = np.random.default_rng(seed).permutation(len(labels))
    return [np.sort(part) for part in np.array_split(rows, clients)]


def dirichlet(labels: IntArray, clients: int, alpha: float, seed: int) -> Parts:
    """Skew labels: each label's rows are shared out by its own draw from Dir(alpha, ..., alpha).

    The label partition of Yurochkin et al. 2019 and Hsu et al. 2019: with alpha to 0 each label has
    one owner, with large alpha all clients look alike. Nothing is drawn again for a minimum size:
    a client may come out with few rows or with none.
    `alpha` is finite and above 0, and labels times clients are at most `SHARES_LIMIT`.
    """
    _check_clients(len(labels), clients)
    if not (alpha > 0 and math.isfinite(alpha)):
        raise DataError(f"alpha is {alpha}: it must be a finite number above 0")
    groups = _rows_by_value(labels)
    if len(groups) * clients > SHARES_LIMIT:
        raise DataError(
            f"{clients} clients for {len(groups)} labels or groups: their product must be at most "
            f"{SHARES_LIMIT}"
        )
    rng = np.random.default_rng(seed)
    pieces: list[list[IntArray]] = [[] for _ in range(clients)]
    for group in groups:
        rows = rng.permutation(group)
        shares = _dirichlet_shares(rng, clients, alpha)
        # Rounded, not floored: flooring every boundary hands the leftovers to the last client.
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        edges = np.concatenate([[0], cuts, [len(rows)]])
        for client in np.flatnonzero(np.diff(edges)):
            pieces[client].append(rows[edges[client] : edges[client + 1]])
    return _join(pieces)


def pathological(labels: IntArray, clients: int, classes_per_client: int, seed: int) -> Parts:
    """Give each client rows of at most `classes_per_client` labels.

    After McMahan et al. 2017: rows are cut into clients * classes_per_client shards, and each
    client gets `classes_per_client` of them. Here a shard never spans two labels, so the bound is
    strict; a label has shards in proportion to its rows, at least one and at most one a client.
    `classes_per_client` is 1..C with C the number of distinct labels; times `clients` it is C or
    more, for every label needs a client, and at most `SHARDS_LIMIT`.
    """
    _check_clients(len(labels), clients)
    values, counts = np.unique(labels, return_counts=True)
    if not 1 <= classes_per_client <= len(values):
        raise DataError(
            f"classes_per_client is {classes_per_client}: it must be 1..{len(values)}, "
            "the number of labels"
        )
    if clients * classes_per_client < len(values):
        raise DataError(
            f"{clients} clients with {classes_per_client} labels each cannot hold "
            f"{len(values)} labels: clients * classes_per_client must be {len(values)} or more"
        )
    if clients * classes_per_client > SHARDS_LIMIT or clients * len(values) > SHARES_LIMIT:
        raise DataError(
            f"{clients} clients with {classes_per_client} of {len(values)} labels each: "
            f"clients * classes_per_client must be at most {SHARDS_LIMIT}, and clients * labels "
            f"{SHARES_LIMIT}"
        )
    rng = np.random.default_rng(seed)
    groups = _rows_by_value(labels)
    shards = _shard_numbers(counts, clients, classes_per_client)
    free = np.full(clients, classes_per_client)
    pieces: list[list[IntArray]] = [[] for _ in range(clients)]
    for i in rng.permutation(len(values)):
        # The clients with most shards still to get: then none is left that needs one label twice.
        holders = np.lexsort((rng.random(clients), -free))[: shards[i]]
        free[holders] -= 1
        rows = rng.permutation(groups[i])
        for client, piece in zip(holders, np.array_split(rows, shards[i]), strict=True):
            pieces[client].append(piece)
    return _join(pieces)


def natural(groups: IntArray, clients: int, alpha: float | None = None, seed: int = 0) -> Parts:
    """Follow a column of the data: writers, sites, domains.

    With as many groups as clients or more, whole groups are dealt in turn, largest first. With
    fewer, clients are dealt to the groups in turn, largest first, and the clients of a group
    share its rows evenly. With `alpha`, every group's rows are shared out by a draw from
    Dir(alpha, ..., alpha) instead, as `dirichlet` does with labels.
    The seed decides the order of groups of one size and who gets which row.
    """
    if alpha is not None:
        return dirichlet(groups, clients, alpha, seed)
    _check_clients(len(groups), clients)
    rng = np.random.default_rng(seed)
    values, counts = np.unique(groups, return_counts=True)
    order = np.lexsort((rng.random(len(values)), -counts))
    members = _rows_by_value(groups)
    pieces: list[list[IntArray]] = [[] for _ in range(clients)]
    for rank, i in enumerate(order):
        holders = range(rank, clients, len(values)) or [rank % clients]
        shuffled = rng.permutation(members[i])
        for client, piece in zip(holders, np.array_split(shuffled, len(holders)), strict=True):
            pieces[client].append(piece)
    return _join(pieces)


def _check_clients(rows: int, clients: int) -> None:
    if clients < 1:
        raise DataError(f"the number of clients is {clients}: it must be 1 or more")
    if clients > rows:
        raise DataError(f"{clients} clients for {rows} examples: clients must be 1..{rows}")


def _column(groups: Mapping[str, IntArray], column: str | None) -> IntArray:
    if column is None and len(groups) == 1:
        return next(iter(groups.values()))
    if column is not None and column in groups:
        return groups[column]
    there = f"the columns are {', '.join(groups)}" if groups else "the data has no such columns"
    asked = "needs a column" if column is None else f"finds no column {column!r}"
    raise DataError(f"a natural partition {asked}: {there}")


def _dirichlet_shares(
    rng: np.random.Generator, clients: int, alpha: float
) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = rng.dirichlet(np.full(clients, alpha))
    if np.isfinite(shares).all() and shares.sum() > 0.5:
        return shares
    # The draw under- or overflowed: take the distribution's limit on that side.
    if alpha > 1:
        return np.full(clients, 1 / clients)
    shares = np.zeros(clients)
    shares[rng.integers(clients)] = 1
    return shares


def _shard_numbers(counts: IntArray, clients: int, classes_per_client: int) -> IntArray:
    """Shards of each label [C]: 1..clients each, in proportion to `counts`, all shards dealt."""
    shards = np.ones(len(counts), dtype=np.int64)
    # The largest rows per shard first, of equals the lowest label.
    loads = [(-float(count), i) for i, count in enumerate(counts)] if clients > 1 else []
    heapq.heapify(loads)
    for _ in range(clients * classes_per_client - len(counts)):
        _, i = loads[0]
        shards[i] += 1
        if shards[i] < clients:
            heapq.heapreplace(loads, (-float(counts[i] / shards[i]), i))
        else:
            heapq.heappop(loads)
    return shards


def _rows_by_value(column: IntArray) -> list[IntArray]:
    """The rows of each distinct value, values and rows in ascending order."""
    _, counts = np.unique(column, return_counts=True)
    return np.split(np.argsort(column, kind="stable"), np.cumsum(counts)[:-1])


def _join(pieces: Sequence[Sequence[IntArray]]) -> Parts:
    empty = np.zeros(0, dtype=np.int64)
    return [np.sort(np.concatenate([empty, *mine])) for mine in pieces]
