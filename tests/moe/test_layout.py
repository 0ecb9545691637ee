from dataclasses import replace

import pytest
import torch
from tests.moe.conftest import zeroed
from torch import nn

from sluiceway.moe import Block, NoExpertsError, families, find_layout, moe_layout

EXPECTED = {  # family name, blocks, k, parameters an expert has in a block
    "mixtral": ("mixtral", 2, 2, 2),
    "olmoe": ("olmoe", 2, 3, 2),
    "qwen3": ("qwen3_moe", 2, 2, 2),
    "qwen2": ("qwen2_moe", 2, 2, 2),
    "deepseek_v2": ("deepseek_v2", 1, 2, 2),
    "deepseek_v3": ("deepseek_v3", 1, 2, 2),
    "granite": ("granite_moe", 2, 2, 2),
    "phimoe": ("phimoe", 2, 2, 2),
    "gpt_oss": ("gpt_oss", 2, 2, 4),
    "switch_encoder": ("switch", 1, 1, 2),
    "switch": ("switch", 2, 1, 2),
    "nllb": ("nllb_moe", 2, 2, 4),
    "jetmoe": ("jetmoe", 4, 2, 2),  # two of attention, two of feed-forward
    "upcycled": ("sluiceway", 2, 2, 4),
}


def test_finds_blocks_gates_and_experts(model: nn.Module, family: str) -> None:
    name, blocks, top_k, tensors = EXPECTED[family]
    found = moe_layout(model)
    params = dict(model.named_parameters())
    assert [block.position for block in found.blocks] == list(range(blocks))
    for block in found.blocks:
        assert (block.family.name, block.num_experts, block.top_k) == (name, 4, top_k)
        assert block.hidden == 16
        shapes = [tuple(params[gate].shape) for gate in block.gate]
        assert shapes == [(4, 16), (4,)][: 2 if family == "gpt_oss" else 1]
        assert block.router.startswith(f"{block.name}.")
        assert [len(block.expert(e)) for e in range(4)] == [tensors] * 4
        with pytest.raises(IndexError):
            block.expert(4)
    assert not found.gate_params & found.expert_params


def test_pieces_are_views_and_make_up_the_model(model: nn.Module) -> None:
    found = moe_layout(model)
    params = dict(model.named_parameters())
    pieces = found.pieces(params)
    assert len({piece.key for piece in pieces}) == len(pieces)
    assert list(dict.fromkeys(piece.param for piece in pieces)) == list(params)
    for piece in pieces:
        view, whole = piece.of(params), params[piece.param]
        start = whole.untyped_storage().data_ptr()
        assert start <= view.data_ptr() < start + whole.untyped_storage().nbytes()
        assert (found.owner(piece.key) is None) == (piece.param not in found.expert_params)
        assert piece.index is not None or piece.key == piece.param
    values = {piece.key: piece.of(params).numel() for piece in pieces}
    assert sum(values.values()) == sum(p.numel() for p in params.values())
    experts = {(b.position, e): b.expert(e) for b in found.blocks for e in range(b.num_experts)}
    assert all(found.owner(p.key) == at for at, owned in experts.items() for p in owned)
    owned = sum(values[piece.key] for pieces in experts.values() for piece in pieces)
    assert owned == sum(params[name].numel() for name in found.expert_params)


def output_of(model: nn.Module, block: Block, hidden: torch.Tensor) -> torch.Tensor:
    """[T, 16]; of the attention around it where the block has no forward of its own (JetMoe)."""
    if block.name.endswith("self_attn.experts") or block.name.endswith("self_attention.experts"):
        layer = model.get_submodule(block.name.rpartition(".")[0])
        positions = torch.arange(hidden.shape[1]).expand(hidden.shape[:2])
        turned = model.rotary_emb(hidden, positions)  # type: ignore[operator]
        output = layer(hidden.clone(), None, position_embeddings=turned)
    else:
        output = model.get_submodule(block.name)(hidden.clone())
    return (output[0] if isinstance(output, tuple) else output).reshape(-1, 16)


def said_by_router(model: nn.Module, block: Block, hidden: torch.Tensor) -> families.RouterOutput:
    """What the router says when the block runs."""
    said: list[families.RouterOutput] = []
    handle = model.get_submodule(block.router).register_forward_hook(
        lambda _module, _args, output: said.append(block.family.read(output, block.top_k))
    )
    output_of(model, block, hidden)
    handle.remove()
    return said[0]


def test_zeroed_expert_changes_exactly_its_tokens(model: nn.Module) -> None:
    found = moe_layout(model)
    params = dict(model.named_parameters())
    hidden = torch.randn(3, 7, 16)
    for block in found.blocks:
        with torch.no_grad():
            output = said_by_router(model, block, hidden)
            chosen = torch.zeros(21, 4).scatter(1, output.selected, 1.0).bool()
            if output.dispatched is not None:
                assert output.dispatched.sum() < 21 * block.top_k  # some are over capacity
                chosen = output.dispatched
            before = output_of(model, block, hidden)
            for e in range(4):
                with zeroed(block.expert(e), params):
                    after = output_of(model, block, hidden)
                assert torch.equal((before != after).any(dim=1), chosen[:, e])


def test_experts_are_ordered_by_number() -> None:
    router = type("UpcycledRouter", (nn.Linear,), {"num_experts": 12, "top_k": 2})(8, 12)
    block = nn.Module()
    block.router = router
    # Sorted as text, expert_10 would come before expert_2.
    block.experts = nn.ModuleDict({f"expert_{e}": nn.Linear(8, 8) for e in reversed(range(12))})
    found = moe_layout(block)
    assert found.blocks[0].name == ""
    assert found.expert(0, 10)[0].key == "experts.expert_10.weight"
    assert set(found.blocks[0].gate) == {"router.weight", "router.bias"}
    block.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(11))
    with pytest.raises(ValueError, match="12 experts"):
        moe_layout(block)


def test_wrapped_and_on_the_meta_device(model: nn.Module) -> None:
    class Classifier(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body
            self.head = nn.Linear(16, 4)

    plain, wrapped = moe_layout(model), moe_layout(Classifier(model).to("meta"))
    assert [f"body.{block.name}" for block in plain.blocks] == [b.name for b in wrapped.blocks]
    assert {f"body.{name}" for name in plain.expert_params} == wrapped.expert_params
    first = wrapped.blocks[0]
    assert replace(first, position=0).expert(1)[0].key.startswith("body.")


def test_dense_model_is_refused(dense) -> None:
    assert find_layout(dense("bert")) is None
    with pytest.raises(NoExpertsError, match="BertModel has no mixture-of-experts block"):
        moe_layout(dense("bert"))
