"""Tiny random models of every family, 4 experts each, hidden width 16."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sluiceway.moe import ParamSlice, moe_layout, repair, upcycle

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "topk_group": 1,
}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
OLMOE = {"num_experts": 4, "num_experts_per_tok": 3, "pad_token_id": 0, "eos_token_id": 1}
SWITCH = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "dropout_rate": 0.0,
    "router_jitter_noise": 0.0,
    "expert_capacity": 1,
    "decoder_start_token_id": 0,
}
NLLB = {
    "vocab_size": 50,
    "d_model": 16,
    "num_experts": 4,
    "expert_capacity": 5,
    "moe_eval_capacity_token_fraction": 0.3,
} | {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {
        "layers": 2,
        "attention_heads": 2,
        "ffn_dim": 24,
        "sparse_step": 2,
        "layerdrop": 0.0,
    }.items()
}
NLLB |= dict.fromkeys(
    ("moe_token_dropout", "dropout", "attention_dropout", "activation_dropout"), 0.0
)
JETMOE = {k: v for k, v in SMALL.items() if k != "num_attention_heads"} | {
    "num_key_value_heads": 1,
    "kv_channels": 8,
}
BERT = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"} | dict.fromkeys(
    ("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0
)
# The model class in transformers, and its settings.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralModel", SMALL | LOCAL),
    "olmoe": ("OlmoeModel", SMALL | OLMOE),
    "qwen2": ("Qwen2MoeModel", SMALL | ROUTED | {"shared_expert_intermediate_size": 12}),
    "qwen3": ("Qwen3MoeModel", SMALL | ROUTED | {"head_dim": 8}),
    "deepseek_v2": ("DeepseekV2Model", SMALL | DEEPSEEK | {"n_group": 1, "topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Model", SMALL | DEEPSEEK | {"n_group": 2}),
    "granite": ("GraniteMoeModel", SMALL | LOCAL),
    "phimoe": ("PhimoeModel", SMALL | LOCAL),
    "gpt_oss": ("GptOssModel", SMALL | LOCAL | {"head_dim": 8}),
    "switch_encoder": ("SwitchTransformersEncoderModel", SWITCH),
    "switch": ("SwitchTransformersForConditionalGeneration", SWITCH),
    "nllb": ("NllbMoeModel", NLLB),
    "jetmoe": ("JetMoeModel", JETMOE | LOCAL),
    "llama": ("LlamaModel", SMALL),
    "bert": ("BertModel", BERT),
}


def as_released(name: str) -> nn.Module:
    """The model of a family, of small size, unrepaired."""
    import transformers

    model, settings = FAMILIES[name]
    kind = getattr(transformers, model)
    released: nn.Module = kind(kind.config_class(**settings))
    return released


def build(name: str) -> nn.Module:
    if name == "upcycled":
        return upcycle(as_released("bert"), layers=2, experts=4, top_k=2, noise=0.1)
    return repair(as_released(name))


MIXTURES = [name for name in (*FAMILIES, "upcycled") if name not in ("llama", "bert")]


def seeded(name: str) -> nn.Module:
    """Build, then spread the routers' weights, so that the experts share the tokens."""
    torch.manual_seed(0)
    model = build(name)
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(moe_layout(model).gate_params):
            params[name].normal_(std=0.5)
    return model


@pytest.fixture(params=MIXTURES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> nn.Module:
    return seeded(family).eval()


@pytest.fixture
def make() -> Callable[[str], nn.Module]:
    return seeded


@pytest.fixture
def dense() -> Callable[[str], nn.Module]:
    def built(name: str) -> nn.Module:
        torch.manual_seed(0)
        return build(name).eval()

    return built


@contextmanager
def zeroed(pieces: Sequence[ParamSlice], params: Mapping[str, Tensor]) -> Iterator[None]:
    """The given pieces are zero inside."""
    kept = [piece.of(params).clone() for piece in pieces]
    for piece in pieces:
        piece.of(params).zero_()
    yield
    for piece, old in zip(pieces, kept, strict=True):
        piece.of(params).copy_(old)
