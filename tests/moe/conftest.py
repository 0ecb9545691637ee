"""Tiny random models of every family, 4 experts each, hidden width 16."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sluiceway.moe import moe_layout, repair, upcycle

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralModel

    return MixtralModel(MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def olmoe() -> nn.Module:
    from transformers import OlmoeConfig, OlmoeModel

    return OlmoeModel(
        OlmoeConfig(**SMALL, num_experts=4, num_experts_per_tok=3, pad_token_id=0, eos_token_id=1)
    )


def qwen3() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeModel

    config = Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12
    )
    return Qwen3MoeModel(config)


def qwen2() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeModel

    config = Qwen2MoeConfig(
        **SMALL,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
    )
    return Qwen2MoeModel(config)


def deepseek_v2() -> nn.Module:
    from transformers import DeepseekV2Config, DeepseekV2Model

    config = DeepseekV2Config(
        **SMALL,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
    )
    return DeepseekV2Model(config)


def deepseek_v3() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3Model

    config = DeepseekV3Config(
        **SMALL,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=12,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_group=2,
        topk_group=1,
    )
    return DeepseekV3Model(config)


def granite() -> nn.Module:
    from transformers import GraniteMoeConfig, GraniteMoeModel

    return GraniteMoeModel(GraniteMoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def phimoe() -> nn.Module:
    from transformers import PhimoeConfig, PhimoeModel

    return PhimoeModel(PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssModel

    config = GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2)
    return GptOssModel(config)


def switch_config(**more: object) -> object:
    from transformers import SwitchTransformersConfig

    return SwitchTransformersConfig(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        dropout_rate=0.0,
        router_jitter_noise=0.0,
        expert_capacity=1,
        decoder_start_token_id=0,
        **more,
    )


def switch_encoder() -> nn.Module:
    from transformers import SwitchTransformersEncoderModel

    return SwitchTransformersEncoderModel(switch_config())


def switch() -> nn.Module:
    from transformers import SwitchTransformersForConditionalGeneration

    return SwitchTransformersForConditionalGeneration(switch_config())


def nllb_unmended() -> nn.Module:
    from transformers import NllbMoeConfig, NllbMoeModel

    config = NllbMoeConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        num_experts=4,
        expert_capacity=5,
        moe_eval_capacity_token_fraction=0.3,
        moe_token_dropout=0.0,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
    )
    return NllbMoeModel(config)


def nllb() -> nn.Module:
    return repair(nllb_unmended())


def jetmoe() -> nn.Module:
    from transformers import JetMoeConfig, JetMoeModel

    config = JetMoeConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_key_value_heads=1,
        kv_channels=8,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return JetMoeModel(config)


def bert(layers: int = 2) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=24,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(**SMALL))


def upcycled() -> nn.Module:
    return upcycle(bert(), layers=2, experts=4, top_k=2, noise=0.1)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    function.__name__: function
    for function in (
        mixtral,
        olmoe,
        qwen2,
        qwen3,
        deepseek_v2,
        deepseek_v3,
        granite,
        phimoe,
        gpt_oss,
        switch_encoder,
        switch,
        nllb,
        jetmoe,
        upcycled,
    )
}
DENSE: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama}


def seeded(builder: Callable[[], nn.Module]) -> nn.Module:
    """Build, then spread the routers' weights, so that the experts share the tokens."""
    torch.manual_seed(0)
    model = builder()
    params = dict(model.named_parameters())
    with torch.no_grad():
        for name in sorted(moe_layout(model).gate_params):
            params[name].normal_(std=0.5)
    return model


@pytest.fixture(params=list(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> nn.Module:
    return seeded(BUILDERS[family]).eval()


@pytest.fixture
def make() -> Callable[[str], nn.Module]:
    return lambda name: seeded(BUILDERS[name])


@pytest.fixture
def dense() -> Callable[[str], nn.Module]:
    def build(name: str) -> nn.Module:
        torch.manual_seed(0)
        return DENSE[name]().eval()

    return build
