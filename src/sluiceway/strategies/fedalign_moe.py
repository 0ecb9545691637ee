"""FedAlign-MoE: aligning gates and experts across non-IID clients (arXiv 2603.21276).

The mathematics is in `sluiceway.fedalign`; docs/methods.md says what is the paper's and what is
our reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs
from torch import Tensor

from sluiceway import fedalign
from sluiceway.errors import InputError
from sluiceway.moe import (
    Adapter,
    Block,
    BlockRouting,
    BlockStep,
    LinearMap,
    MoELayout,
    ParamSlice,
    TokenSample,
    inner_activation,
    linear_maps,
    received_logits,
)
from sluiceway.strategies.base import LocalContext, Update, unprefixed
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.matching import reordered
from sluiceway.strategies.parameters import PARAMETERS
from sluiceway.strategies.region import RegionSums, usage

#: `method.preset`: what is set where the recipe says nothing else.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "experts": "semantic",
        "weights": "select",
        "align": True,
        "reference": "marginal",
        "gate": "consistency",
        "match": "index",
        "least_tokens": 0,
    }
}

#: Tokens of each block of which a client's moments are taken, at most.
SAMPLE = 1024


@dataclass(config=PARAMETERS, kw_only=True)
class FedAlignMoE(FedAvg):
    """Consistency-weighted gates, a routing regulariser, and experts averaged by region.

    As it stands it averages experts by region and everything else as FedAvg does: what the paper
    adds to that did not help in our trials, and stays by name. The five steps of the paper's
    ablation are four switches: all off is parameter averaging (FedAvg, bit for bit), then `align`,
    `consistency` (with `gate = "consistency"`), `adaptive` and `semantic` are added in turn.

    preset: "paper": the paper's form as reconstructed, whatever the defaults are; keys that are
        given besides win.
    align: clients pull their routing toward the reference, weighted by `lambda`.
    consistency: client weights w_i(e) by routing overlap times margin; without it they are
        uniform where `align` is on and by examples where it is off.
    adaptive: the pull is strong for globally consistent experts and weak for the others.
    semantic: true is `experts = "semantic"`, and false, where `experts` is not given, "mean".
    experts: how experts are combined: "region", in least squares over the tokens that enter them
        [ours], which goes with `match = "index"` and `lora = "frozen-a"` and is then the default;
        "semantic", over clients whose updates and regions agree; "mean", by examples.
    moments: what crosses of the second moment of the hidden states that enter an expert or gate:
        "update", nothing: the server estimates it from the update; "full", the matrix; "low-rank",
        its `rank` leading eigenvectors and its diagonal; "diagonal" [ours].
    rank: of each expert's moment with `moments` "update" or "low-rank", >= 0; 0 is the whole
        estimate with "update" and the diagonal with "low-rank" [ours].
    down: the form of the inner activation's moment, which the projection down reads: "diagonal";
        "moments", as `moments` says; "mean", none: clients count by their tokens [ours].
    lambda: weight of the regulariser in the client's loss, >= 0 (`lambda_` in Python).
    reference: what routing is pulled to: "marginal" is the global routing distribution [paper],
        "conditional" the received gate's choice for the same token [ours].
    gate: how routers are combined: "consistency" rows by w_i(e) [ours], "average" by examples,
        "region" in least squares over all tokens [ours], "frozen" never trained, "local" kept by
        each client.
    match: which experts are averaged with each other: those of the same "index" [paper], or those
        of the same "meaning", whose regions match best, gate rows with them [ours].
    weights: "select": like-minded clients outweigh the others, by the square of their share;
        "smooth": each client's update is averaged with those it agrees with, and keeps its share
        [both ours].
    beta: selection threshold tau = mean - beta * std of the pairwise values, >= 0 [ours].
    sample: values of each expert on which update directions are compared, 0 for all; a cosine
        then has a standard error of about 1 / sqrt(sample) [ours].
    least_tokens: of an expert that fewer of a client's tokens enter, in one pass over its
        examples, the client tells neither region nor moments, which would tell of those tokens;
        0 for always, as the preset has it. The server then goes by the tokens alone [ours].
    """

    name: ClassVar[str] = "fedalign-moe"
    needs_experts: ClassVar[bool] = True
    reads_routing: ClassVar[bool] = True
    preset: Literal["paper"] | None = None
    align: bool = False
    consistency: bool = True
    adaptive: bool = True
    semantic: bool | None = None
    experts: Literal["region", "semantic", "mean"] | None = None
    moments: Literal["full", "low-rank", "diagonal", "update"] = "update"
    rank: int = Field(default=16, ge=0, le=100_000)
    down: Literal["diagonal", "moments", "mean"] = "diagonal"
    lambda_: float = Field(
        default=0.1, ge=0, validation_alias="lambda", serialization_alias="lambda"
    )
    reference: Literal["marginal", "conditional"] = "conditional"
    gate: Literal["consistency", "average", "region", "frozen", "local"] = "average"
    match: Literal["index", "meaning"] = "index"
    weights: Literal["select", "smooth"] = "smooth"
    beta: float = Field(default=1.0, ge=0)
    sample: int = Field(default=32768, ge=0, le=1 << 40)
    least_tokens: int = Field(default=8192, ge=0, le=1 << 40)

    @model_validator(mode="before")
    @classmethod
    def with_preset(cls, given: Any) -> Any:
        """The preset's values below those that are given."""
        values = given.kwargs if isinstance(given, ArgsKwargs) else given
        if not isinstance(values, Mapping) or not isinstance(values.get("preset"), str):
            return given
        preset = dict(PRESETS.get(values["preset"], {}))
        if "semantic" in values:
            preset.pop("experts", None)
        return {**preset, **values}

    def __post_init__(self) -> None:
        if self.experts is None:
            if self.semantic is None:
                fits = self.match == "index" and self.lora == "frozen-a"
                self.experts = "region" if fits else "semantic"
            else:
                self.experts = "semantic" if self.semantic else "mean"
        if self.semantic and self.experts != "semantic":
            raise ValueError(f"semantic = true, but experts = {self.experts!r}")
        self.semantic = self.experts == "semantic"
        if self.match == "meaning" and "region" in (self.experts, self.gate):
            raise ValueError('match = "meaning" does not go with experts or gate = "region"')

    def setup(self, tensors: Mapping[str, Tensor], layout: MoELayout, clients: int) -> None:
        super().setup(tensors, layout, clients)
        self.routing: list[Tensor] = []
        maps = [one for one in linear_maps(layout, tensors) if self.form(one)]
        if self.lora != "frozen-a" and any(one.pair for one in maps):
            raise InputError(
                f'method.lora = {self.lora!r}: experts or gate = "region" combine LoRA adapters '
                'whose A is not trained; set lora = "frozen-a", or experts = "mean"'
            )
        #: Maps by least squares, and those by a weight for each column, by the keys of pieces.
        self.maps = tuple(one for one in maps if self.form(one) != "diagonal")
        self.columns = {
            piece.key: one for one in maps if self.form(one) == "diagonal" for piece in one.pieces
        }
        self.sources: dict[str, tuple[LinearMap, int]] = {}
        for one in maps:
            if self.moments == "update":
                continue
            _, inputs = self.sources.get(one.source, (one, 0))
            self.sources[one.source] = one, max(inputs, one.inputs)

    def form(self, one: LinearMap) -> str | None:
        """What crosses of the moment of a map's input; None for nothing."""
        if (self.gate if one.expert is None else self.experts) != "region":
            return None
        if one.reads == "inner" and self.down == "mean":
            return None
        if one.pair is not None and self.moments in ("full", "low-rank"):
            return "full"  # of B A with A as received, the moment of A x: a small matrix
        diagonal = one.reads == "inner" and self.down == "diagonal"
        return "diagonal" if diagonal else self.moments

    def trains(self, param: str, layout: MoELayout) -> bool:
        frozen = self.gate == "frozen" and param in layout.gate_params
        return not frozen and super().trains(param, layout)

    def private(self, param: str) -> bool:
        return self.gate == "local" and param in self.layout.gate_params

    def wants_regions(self) -> bool:
        return bool(self.semantic) or self.match == "meaning"

    def reports(self, routing: list[BlockRouting], passes: float) -> list[BlockRouting]:
        return [
            report
            if report.region is None
            else replace(
                report,
                region=report.region.masked_fill(self.few(report, passes).unsqueeze(1), 0.0),
            )
            for report in routing
        ]

    def few(self, report: BlockRouting, passes: float) -> Tensor:
        """Experts of which too few tokens are known to tell of them, [E] bool."""
        return report.load < self.least_tokens * passes

    def wants_samples(self) -> int:
        return SAMPLE if self.sources else 0

    # -- the server's half ---------------------------------------------------------------------

    def server_extra(self) -> Mapping[str, Tensor]:
        return {f"routing/{block}": r_g.float() for block, r_g in enumerate(self.routing)}

    def client_extra(self) -> Mapping[str, Tensor]:
        return {
            f"moment/{source}": torch.empty(
                self.packed_shape(one, inputs), dtype=torch.bfloat16, device="meta"
            )
            for source, (one, inputs) in self.sources.items()
        }

    def packed_shape(self, one: LinearMap, inputs: int) -> tuple[int, ...]:
        """Of the moment of a map's input, as it crosses."""
        form = self.form(one)
        if form == "full":
            return (inputs * (inputs + 1) // 2,)
        return (min(self.rank, inputs) + 1 if form == "low-rank" else 1, inputs)

    def fault(self, update: Update) -> str | None:
        for source, (one, _) in self.sources.items():
            packed, why = update.extra.get(f"moment/{source}"), None
            if packed is not None:
                why = fedalign.moment_fault(packed.cpu())
            elif (
                not self.least_tokens
                and one.reads == "hidden"
                and usage(update.routing[one.block], one.expert)
            ):
                why = "it is missing"  # of an inner activation that is not known there is none
            if why is not None:
                return f"moment/{source}: {why}"
        return None

    def streams(self) -> bool:
        # Regions' likeness and update directions are of pairs of clients.
        return not (self.semantic or self.match == "meaning")

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        super().begin(number, updates)
        self.regions = RegionSums(
            self.tensors, self.maps, self.rank if self.moments == "update" else None
        )
        blocks = self.layout.blocks if self.align else ()
        self.shares = [torch.zeros(2, b.num_experts).double() for b in blocks]
        self.ordered: dict[int, Update] = {}
        if not updates:
            return
        held = list(updates)
        if self.match == "meaning":
            for block in self.layout.blocks:
                held = self.matched(held, block)
            self.ordered = {update.client: update for update in held}
        self.rows = {update.client: row for row, update in enumerate(held)}
        if self.semantic:
            self.expert_weights = [self.semantic_weights(held, b) for b in self.layout.blocks]

    def accumulate(self, update: Update) -> None:
        update = self.ordered.get(update.client, update)
        super().accumulate(update)
        self.regions.add(update)
        for block, shares in enumerate(self.shares):
            weight = self.gate_weight(update, block)
            shares += torch.stack((weight * update.routing[block].routing, weight))

    def finish(self) -> None:
        if self.mean.total and self.align:
            self.routing = [
                fedalign.global_routing((weighted / total)[None], torch.ones_like(total)[None])
                for weighted, total in self.shares
            ]
        self.ordered = {}
        super().finish()
        del self.regions

    def step(self, mean: dict[str, Tensor]) -> dict[str, Tensor]:
        self.regions.fold(mean)
        return mean

    def gate_weight(self, update: Update, block: int) -> Tensor:
        """How much a client's routing counts for each expert, [E]; need not be normalised."""
        report = update.routing[block]
        if self.consistency:
            return fedalign.consistency_score(report.routing, report.margin)
        examples = 1.0 if self.align else float(update.examples)
        return torch.full_like(report.routing, examples)

    def matched(self, held: Sequence[Update], block: Block) -> list[Update]:
        """The updates with the experts of one block in the common order."""
        orders = fedalign.match_experts(
            stacked(held, block.position, "region"), stacked(held, block.position, "load")
        )
        kept = torch.arange(block.num_experts)
        return [
            update if torch.equal(order, kept) else reordered(update, block, order)
            for update, order in zip(held, orders, strict=True)
        ]

    def semantic_weights(self, held: Sequence[Update], block: Block) -> Tensor:
        """Weight of each client for each expert, [N, E]; an unused expert's column is zero."""
        directions = [self.directions(held, block.expert(e)) for e in range(block.num_experts)]
        return fedalign.semantic_weights(
            stacked(held, block.position, "region"),
            stacked(held, block.position, "load"),
            torch.stack(directions),
            self.beta,
            self.weights,
        )

    def directions(self, held: Sequence[Update], pieces: Sequence[ParamSlice]) -> Tensor:
        """D(e), [N, N]: cosines between the clients' updates of one expert.

        Taken over evenly spread values of the expert, `sample` of them: all N updates are read
        twice, the first time in part, and memory is N * sample numbers whatever the model's size.
        Of LoRA adapters the products B A are compared, exactly and without forming them.
        """
        gram = fedalign.DirectionGram(len(held))
        keys = {piece.key for piece in pieces}
        for pair in self.pairs:
            if pair.b.key in keys:
                self.add_low_rank(gram, held, pair)
        low_rank = {piece.key for pair in self.pairs for piece in (pair.a, pair.b, pair.base)}
        pieces = [p for p in pieces if p.param in self.tensors and p.key not in low_rank]
        size = sum(piece.of(self.tensors).numel() for piece in pieces)
        for piece in pieces:
            old = piece.of(self.tensors)
            part = slice(None, None, self.stride(size, old.shape))
            base = old.reshape(-1)[part].float()
            rows = base.new_zeros(len(held), len(base))
            for row, update in zip(rows, held, strict=True):
                if (new := update.tensors.get(piece.key)) is not None:
                    torch.sub(new.reshape(-1)[part], base, out=row)
            gram.add(rows)
        return gram.cosine()

    def add_low_rank(
        self, gram: fedalign.DirectionGram, held: Sequence[Update], pair: Adapter
    ) -> None:
        """Add the changes of scale * B A to the products of updates."""
        old_a, old_b = (piece.of(self.tensors).double() for piece in (pair.a, pair.b))
        changes = [
            fedalign.product_change(
                *(old_a, old_b), *(u.tensors.get(piece.key) for piece in (pair.a, pair.b))
            )
            for u in held
        ]
        left, right = (torch.stack(factors) for factors in zip(*changes, strict=True))
        gram.add_products(pair.scale * left, right)

    def stride(self, size: int, shape: Sequence[int]) -> int:
        """Distance of the values compared, out of an expert of `size` values.

        It shares no factor with a row's length, so that every column is met.
        """
        stride = max(1, size // self.sample) if self.sample else 1
        while math.gcd(stride, shape[-1] if shape else 1) > 1:
            stride += 1
        return stride

    def weight(self, update: Update, piece: ParamSlice) -> float | Tensor:
        owner = self.layout.owner(piece.key)
        if owner is not None and self.experts != "mean":
            block, expert = owner
            if self.semantic:
                return float(self.expert_weights[block][self.rows[update.client], expert])
            share = usage(update.routing[block], expert)
            return self.column_weight(update, piece, update.examples * share)
        block_of_gate = self.layout.gate_block(piece.param)
        if block_of_gate is not None:
            if self.gate == "consistency" and (self.align or self.consistency):
                return self.gate_weight(update, block_of_gate)
            return self.column_weight(update, piece, float(update.examples))
        return float(update.examples)

    def column_weight(self, update: Update, piece: ParamSlice, usage: float) -> float | Tensor:
        """The weight of each column of a map by its input's mean square; else `usage`.

        With `moments = "update"` by the square of the column's change instead.
        """
        one = self.columns.get(piece.key)
        packed = None if one is None else update.extra.get(f"moment/{one.source}")
        is_bias = one is not None and one.bias is not None and piece.key == one.bias.key
        if one is not None and self.moments == "update" and not is_bias:
            new = update.tensors.get(piece.key)
            if new is None:
                return usage
            change = new - piece.of(self.tensors)
            squares = fedalign.column_squares((change.T if one.transposed else change).float())
            squares = squares * (usage / squares.sum().clamp_min(1e-30))
        elif one is None or packed is None:
            return usage
        else:
            squares = update.examples * packed[-1].cpu().double()
        # An input that is zero for every client's tokens is left to the plain mean.
        squares = squares.double() + 1e-9 * usage
        if is_bias:
            return float(squares[-1])
        squares = squares[: one.width]
        return squares.unsqueeze(1) if one.transposed else squares.unsqueeze(0)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | dict(self.server_extra())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        routing = unprefixed(state, "routing/")
        self.routing = [routing[str(block)] for block in range(len(routing))]

    # -- the client's half ---------------------------------------------------------------------

    def finish_training(self, client: LocalContext) -> Mapping[str, Tensor]:
        if client.observer is None or not self.sources:
            return {}
        samples = client.observer.samples()
        report = client.observer.routing()
        sent: dict[str, Tensor] = {}
        for source, (one, inputs) in self.sources.items():
            sample = samples[one.block]
            if sample is None or not usage(report[one.block], one.expert):
                continue
            few = self.few(report[one.block], client.passes)
            # A gate is entered by every token.
            if bool(few.all() if one.expert is None else few[one.expert]):
                continue
            rows = self.inputs_of(client, one, sample)
            if rows is not None:
                packed = self.packed_moment(one, inputs, *rows)
                sent[f"moment/{source}"] = packed.to("cpu", torch.bfloat16)
        return sent

    def inputs_of(
        self, client: LocalContext, one: LinearMap, sample: TokenSample
    ) -> tuple[Tensor, Tensor, float] | None:
        """What a map reads, [T, n], the tokens' weights, [T], and the number of all tokens.

        None where the inner activation is not known; see `inner_activation`.
        """
        weights = sample.counted.float()
        tokens = max(float(weights.sum()), 1.0)
        rows = sample.hidden
        if one.expert is not None:
            weights = sample.weights[:, one.expert].clamp_min(0)
        some = weights.nonzero().flatten()
        rows, weights = rows[some], weights[some]
        if one.reads == "inner":
            inner = inner_activation(client.model, client.layout.blocks[one.block], one, rows)
            if inner is None:
                return None
            rows = inner
        rows = rows.detach().float()
        if one.pair is not None:
            a = one.pair.a.of({one.pair.a.param: client.model.get_parameter(one.pair.a.param)})
            rows = rows @ a.detach().float().T
        return rows, weights, tokens

    def packed_moment(
        self, one: LinearMap, inputs: int, rows: Tensor, weights: Tensor, tokens: float
    ) -> Tensor:
        """The moment of a map's input as it crosses, float32."""
        if inputs > rows.shape[1]:
            rows = fedalign.with_one(rows)
        if self.form(one) == "full":
            return fedalign.packed_triangle(fedalign.second_moment(rows, weights, tokens))
        rank = self.packed_shape(one, inputs)[0] - 1
        return fedalign.low_rank_moment(rows, weights, tokens, rank)

    def penalty(self, client: LocalContext) -> Tensor | None:
        if not self.align or self.lambda_ == 0 or client.observer is None:
            return None
        terms = [
            term
            for block, step in zip(client.layout.blocks, client.observer.last, strict=True)
            if step is not None and step.logits.requires_grad
            if (term := self.block_penalty(client, block, step)) is not None
        ]
        return self.lambda_ * torch.stack(terms).mean() if terms else None

    def block_penalty(self, client: LocalContext, block: Block, step: BlockStep) -> Tensor | None:
        """L_reg of one MoE block in this step, scalar; None while there is nothing to align to."""
        r_g = client.broadcast.extra.get(f"routing/{block.position}")
        alpha = None
        if r_g is not None:
            r_g = r_g.to(step.logits.device, non_blocking=True)
            if self.adaptive:
                alpha = fedalign.adaptive_strength(self.own_routing(client, block, step), r_g)
        if self.reference == "marginal":
            if r_g is None:  # the first round has no global routing yet
                return None
            return fedalign.marginal_penalty(step.logits, step.selected, r_g, alpha, step.mask)
        router = client.model.get_submodule(block.router)
        with torch.no_grad():
            received = received_logits(block, router, client.received, step.hidden, step.call)
        return fedalign.conditional_penalty(step.logits, received, alpha, step.mask)

    def own_routing(self, client: LocalContext, block: Block, step: BlockStep) -> Tensor:
        """r_i so far in this round, this step included, [E]."""
        p = step.logits.detach().float().softmax(-1)
        # Autocast would make this product a half-precision one.
        with torch.autocast(p.device.type, enabled=False):
            total = p.sum(0) if step.mask is None else step.mask.to(p.dtype) @ p
        sums: dict[int, Tensor] = client.scratch.setdefault("routing", {})
        sums[block.position] = sums.get(block.position, 0) + total
        return sums[block.position] / sums[block.position].sum().clamp_min(1e-12)


def stacked(held: Sequence[Update], block: int, field: str) -> Tensor:
    """One field of every client's report on a block, [N, E] or [N, E, d], float64."""
    return torch.stack([getattr(u.routing[block], field) for u in held]).to(torch.float64)
