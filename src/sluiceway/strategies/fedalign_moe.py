"""FedAlign-MoE: aligning gates and experts across non-IID clients (arXiv 2603.21276).

The mathematics is in `sluiceway.fedalign`; docs/methods.md says what is the paper's and what is
our reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from sluiceway import fedalign
from sluiceway.moe import Adapter, Block, BlockStep, MoELayout, ParamSlice, received_logits
from sluiceway.strategies.base import PARAMETERS, LocalContext, Update, unprefixed
from sluiceway.strategies.fedavg import FedAvg
from sluiceway.strategies.matching import reordered


@dataclass(config=PARAMETERS, kw_only=True)
class FedAlignMoE(FedAvg):
    """Consistency-weighted gates, a routing regulariser, and semantic averaging of experts.

    The five steps of the paper's ablation are four switches: all off is parameter averaging
    (FedAvg, bit for bit), then `align`, `consistency`, `adaptive` and `semantic` are added in turn.

    align: clients pull their routing toward the reference, weighted by `lambda`.
    consistency: client weights w_i(e) by routing overlap times margin; without it they are
        uniform where `align` is on and by examples where it is off.
    adaptive: the pull is strong for globally consistent experts and weak for the others.
    semantic: experts are averaged over clients whose updates and regions agree.
    lambda: weight of the regulariser in the client's loss, >= 0 (`lambda_` in Python).
    reference: what routing is pulled to: "marginal" is the global routing distribution [paper],
        "conditional" the received gate's choice for the same token [ours].
    gate: how routers are combined: "consistency" rows by w_i(e) [ours], "average" by examples,
        "frozen" never trained, "local" kept by each client.
    match: which experts are averaged with each other: those of the same "index" [paper], or those
        of the same "meaning", whose regions match best, gate rows with them [ours].
    weights: "select": like-minded clients outweigh the others, by the square of their share;
        "smooth": each client's update is averaged with those it agrees with, and keeps its share
        [both ours].
    beta: selection threshold tau = mean - beta * std of the pairwise values, >= 0 [ours].
    sample: values of each expert on which update directions are compared, 0 for all; a cosine
        then has a standard error of about 1 / sqrt(sample) [ours].
    """

    name: ClassVar[str] = "fedalign-moe"
    needs_experts: ClassVar[bool] = True
    align: bool = True
    consistency: bool = True
    adaptive: bool = True
    semantic: bool = True
    lambda_: float = Field(
        default=0.1, ge=0, validation_alias="lambda", serialization_alias="lambda"
    )
    reference: Literal["marginal", "conditional"] = "conditional"
    gate: Literal["consistency", "average", "frozen", "local"] = "consistency"
    match: Literal["index", "meaning"] = "index"
    weights: Literal["select", "smooth"] = "smooth"
    beta: float = Field(default=1.0, ge=0)
    sample: int = Field(default=32768, ge=0, le=1 << 40)

    def setup(self, tensors: Mapping[str, Tensor], layout: MoELayout, clients: int) -> None:
        super().setup(tensors, layout, clients)
        self.routing: list[Tensor] = []

    def trains(self, param: str, layout: MoELayout) -> bool:
        frozen = self.gate == "frozen" and param in layout.gate_params
        return not frozen and super().trains(param, layout)

    def private(self, param: str) -> bool:
        return self.gate == "local" and param in self.layout.gate_params

    def wants_regions(self) -> bool:
        return self.semantic or self.match == "meaning"

    # -- the server's half ---------------------------------------------------------------------

    def server_extra(self) -> Mapping[str, Tensor]:
        return {f"routing/{block}": r_g.float() for block, r_g in enumerate(self.routing)}

    def streams(self) -> bool:
        # Weights need every client's routing report, and directions its tensors.
        return not (self.align or self.consistency or self.semantic or self.match == "meaning")

    def begin(self, number: int, updates: Sequence[Update] = ()) -> None:
        super().begin(number, updates)
        self.ordered: dict[int, Update] = {}
        if not updates:
            return
        held = list(updates)
        if self.match == "meaning":
            for block in self.layout.blocks:
                held = self.matched(held, block)
            self.ordered = {update.client: update for update in held}
        self.rows = {update.client: row for row, update in enumerate(held)}
        self.gate_weights = [self.client_weights(held, b) for b in range(len(self.layout.blocks))]
        self.next_routing = [
            fedalign.global_routing(w, stacked(held, b, "routing"))
            for b, w in enumerate(self.gate_weights)
        ]
        if self.semantic:
            self.expert_weights = [self.semantic_weights(held, b) for b in self.layout.blocks]

    def accumulate(self, update: Update) -> None:
        super().accumulate(self.ordered.get(update.client, update))

    def finish(self) -> None:
        if self.mean.total and not self.streams():
            self.routing = self.next_routing
        self.ordered = {}
        super().finish()

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

    def client_weights(self, held: Sequence[Update], block: int) -> Tensor:
        """w_i(e), [N, E] with columns that sum to one: whose routing counts for which expert."""
        r = stacked(held, block, "routing")
        examples = torch.tensor([u.examples for u in held], dtype=r.dtype)
        if self.consistency:
            r_g = self.routing[block] if self.routing else fedalign.mean_routing(r, examples)
            return fedalign.consistency_weights(r, r_g, stacked(held, block, "margin"))
        uniform = torch.ones_like(examples) if self.align else examples
        return (uniform / uniform.sum()).unsqueeze(1).expand_as(r)

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
        if owner is not None and self.semantic:
            block, expert = owner
            return float(self.expert_weights[block][self.rows[update.client], expert])
        block_of_gate = self.layout.gate_block(piece.param)
        aligned = self.gate == "consistency" and (self.align or self.consistency)
        if block_of_gate is not None and aligned:
            return self.gate_weights[block_of_gate][self.rows[update.client]]
        return float(update.examples)

    def state_dict(self) -> dict[str, Tensor]:
        return super().state_dict() | dict(self.server_extra())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        routing = unprefixed(state, "routing/")
        self.routing = [routing[str(block)] for block in range(len(routing))]

    # -- the client's half ---------------------------------------------------------------------

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
            r_g = r_g.to(step.logits.device)
            if self.adaptive:
                alpha = fedalign.adaptive_strength(self.own_routing(client, block, step), r_g)
        if self.reference == "marginal":
            if r_g is None:  # the first round has no global routing yet
                return None
            return fedalign.marginal_penalty(step.logits, step.selected, r_g, alpha, step.mask)
        router = client.model.get_submodule(block.router)
        with torch.no_grad():
            received = received_logits(block, router, client.received, step.hidden)
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
