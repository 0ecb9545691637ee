"""Families of transformers that no table knows: found by structure, or refused by name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.moe.conftest import (
    DEEPSEEK,
    LOCAL,
    MIXTURES,
    OLMOE,
    ROUTED,
    SMALL,
    as_released,
    zeroed,
)
from tests.worlds import TinyText
from torch import Tensor, nn

from sluiceway.errors import InputError
from sluiceway.experiment.heads import TextClassifier
from sluiceway.experiment.models import load_pretrained
from sluiceway.moe import (
    Block,
    MoELayout,
    NoExpertsError,
    Observer,
    add_lora,
    find_layout,
    moe_layout,
    received_logits,
    upcycle,
)
from sluiceway.moe.search import unrecognised
from sluiceway.transport.local import federate

DOCS = Path(__file__).parents[2] / "docs" / "models.md"
HEAD = {"head_dim": 8}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
MLA = {k: v for k, v in DEEPSEEK.items() if k not in ("n_routed_experts", "first_k_dense_replace")}
GROUPS = DEEPSEEK | HEAD | {"n_group": 1}
SPARSE = {"q_lora_rank": 8, "index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
SHARED = {"shared_intermediate_size": 12}
LINEAR = {f"linear_{n}": 2 for n in ("num_key_heads", "num_value_heads")}
LINEAR |= {f"linear_{n}_head_dim": 8 for n in ("key", "value")}
#: Model class and settings; each with 4 experts.
FOUND: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeModel", ROUTED | HEAD | {"num_dense_layers": 0, "num_local_experts": 4}),
    "bailing_hybrid": (
        "BailingHybridModel",
        MLA
        | LOCAL
        | HEAD
        | {"n_group": 1, "first_k_dense_replace": 0, "num_mtp_layers": 0}
        | {"layer_types": ["linear_attention", "full_attention"]}
        | {"pad_token_id": 0, "eos_token_id": 1},
    ),
    "cohere2_moe": ("Cohere2MoeModel", ROUTED | HEAD | {"eos_token_id": 1}),
    "deepseek_v32": ("DeepseekV32Model", DEEPSEEK | {"n_group": 1} | SPARSE),
    "dots1": ("Dots1Model", GROUPS),
    "ernie4_5_moe": (
        "Ernie4_5_MoeModel",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 12}
        | {"moe_layer_start_index": 0, "moe_layer_interval": 1},
    ),
    "ernie4_5_vl_moe_text": (
        "Ernie4_5_VLMoeTextModel",
        {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
        | {"moe_intermediate_size": [12, 12], "mlp_layer_types": ["sparse"] * 2}
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    ),
    "exaone_moe": (
        "ExaoneMoeModel",
        ROUTED | HEAD | {"num_shared_experts": 1, "first_k_dense_replace": 0, "eos_token_id": 1},
    ),
    "flex_olmo": ("FlexOlmoModel", OLMOE),
    "glm4_moe": ("Glm4MoeModel", GROUPS | {"partial_rotary_factor": 0.5}),
    "glm4_moe_lite": ("Glm4MoeLiteModel", DEEPSEEK | {"n_group": 1, "q_lora_rank": 8}),
    "glm4v_moe_text": (
        "Glm4vMoeTextModel",
        GROUPS
        | {"first_k_dense_replace": 0}
        | {
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [1, 1, 2],
                "partial_rotary_factor": 1.0,
            }
        },
    ),
    "glm5_next_text": (
        "Glm5NextTextModel",
        MLA
        | SPARSE
        | {"n_routed_experts": 4, "n_group": 1, "qk_rope_head_dim": 0, "index_kpool": 2}
        | {"linear_head_dim": 8, "linear_num_heads": 2, "mlp_layer_types": ["sparse"] * 2}
        | {"layer_types": ["linear_attention", "indexed_attention"], "pad_token_id": 0}
        | {"indexer_types": ["full"] * 2},
    ),
    "glm_moe_dsa": ("GlmMoeDsaModel", DEEPSEEK | {"n_group": 1} | SPARSE),
    "granitemoehybrid": (
        "GraniteMoeHybridModel",
        LOCAL | SHARED | {"layer_types": ["attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 8},
    ),
    "granitemoeshared": ("GraniteMoeSharedModel", LOCAL | SHARED),
    "hunyuan_v1_moe": (
        "HunYuanMoEV1Model",
        HEAD | {"num_experts": 4, "moe_topk": 2},
    ),
    "hy_v3": ("HYV3Model", ROUTED | HEAD | {"first_k_dense_replace": 0}),
    "hy_v4": (
        "HYV4Model",
        DEEPSEEK | SPARSE | {"n_group": 1, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1},
    ),
    "inkling2_text": (
        "Inkling2TextModel",
        ROUTED
        | HEAD
        | {f"swa_{name}": value for name, value in HEADS.items()}
        | {"d_rel": 4, "rel_extent": 8, "n_routed_experts": 4, "unpadded_vocab_size": 50}
        | {"layer_types": ["sliding_attention", "full_attention"]}
        | {"max_position_embeddings": 64, "eos_token_id": 1},
    ),
    "jamba": (
        "JambaModel",
        {"num_experts": 4, "num_experts_per_tok": 2, "expert_layer_period": 1}
        | {"expert_layer_offset": 0, "attn_layer_period": 1, "attn_layer_offset": 0},
    ),
    "kimi_linear": (
        "KimiLinearModel",
        MLA
        | LOCAL
        | {"n_group": 1, "linear_head_dim": 8, "linear_num_heads": 2}
        | {"layer_types": ["linear_attention", "full_attention"]}
        | {"mlp_layer_types": ["sparse"] * 2}
        | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
    ),
    "laguna": ("LagunaModel", ROUTED | HEAD),
    "lfm2_moe": (
        "Lfm2MoeModel",
        ROUTED | {"num_dense_layers": 0, "layer_types": ["full_attention", "conv"]},
    ),
    "llama4_text": (
        "Llama4TextModel",
        HEAD
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 24}
        | {"interleave_moe_layer_step": 1},
    ),
    "mellum": ("MellumModel", ROUTED | HEAD),
    "mimo_v2_flash": (
        "MiMoV2FlashModel",
        HEAD
        | {"v_head_dim": 8, "moe_intermediate_size": 12}
        | {"n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["sparse"] * 2},
    ),
    "minimax": ("MiniMaxModel", LOCAL | HEAD),
    "minimax_m2": ("MiniMaxM2Model", LOCAL | HEAD | {"bos_token_id": 0, "eos_token_id": 1}),
    "mistral4": ("Mistral4Model", DEEPSEEK | {"n_group": 1, "q_lora_rank": 8}),
    "nemotron_h": (
        "NemotronHModel",
        HEAD
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12}
        | {"layers_block_type": ["moe", "attention"]},
    ),
    "openai_privacy_filter": (
        "OpenAIPrivacyFilterModel",
        HEAD | LOCAL | {"pad_token_id": 0, "eos_token_id": 1},
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeTextModel",
        ROUTED
        | HEAD
        | {"shared_expert_intermediate_size": 12, "layer_types": ["full_attention"] * 2},
    ),
    "qwen3_next": (
        "Qwen3NextModel",
        ROUTED
        | HEAD
        | LINEAR
        | {"shared_expert_intermediate_size": 12}
        | {"layer_types": ["linear_attention", "full_attention"]},
    ),
    "qwen3_omni_moe_text": (
        "Qwen3OmniMoeThinkerTextModel",
        ROUTED | HEAD | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    ),
    "qwen3_vl_moe_text": (
        "Qwen3VLMoeTextModel",
        ROUTED | HEAD | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]}},
    ),
    "solar_open": ("SolarOpenModel", GROUPS),
    "aria_text": (
        "AriaTextModel",
        HEAD | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    "axk1": (
        "AXK1Model",
        DEEPSEEK | {"n_group": 1, "q_lora_rank": 8, "bos_token_id": 2, "eos_token_id": 1},
    ),
    "axk2": ("AXK2Model", DEEPSEEK | {"n_group": 1, "q_lora_rank": 8}),
    "beam": (
        "BeamModel",
        ROUTED | HEAD | {"n_group": 1, "topk_group": 1, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "deepseek_ocr2_text": (
        "DeepseekOcr2TextModel",
        DEEPSEEK | {"mlp_layer_types": ["dense", "sparse"]},
    ),
    "deepseek_v4": (  # its hash layers choose by a table of token ids, which is zero in a new model
        "DeepseekV4Model",
        ROUTED | HEAD | {"n_routed_experts": 4, "mlp_layer_types": ["hash_moe", "moe"]},
    ),
    "dots3_note_text": (
        "Dots3NoteTextModel",
        GROUPS | SPARSE | {"pad_token_id": 0},
    ),
    "flint": (
        "FlintModel",
        ROUTED | HEAD | {"mlp_only_layers": [], "shared_expert_intermediate_size": 12},
    ),
    "granitemoe_swa": ("GraniteMoeSWAModel", LOCAL | HEAD),
    "kolibri1": ("Kolibri1Model", ROUTED | HEAD),
    "minimax_m3_vl_text": (
        "MiniMaxM3VLTextModel",
        LOCAL | HEAD | {"bos_token_id": 2, "eos_token_id": 1},
    ),
    "mistral_large4_text": (
        "MistralLarge4TextModel",
        DEEPSEEK | {"n_group": 1, "q_lora_rank": 8},
    ),
    "qwen4_exp_text": (
        "Qwen4ExpTextModel",
        ROUTED | HEAD | LINEAR | {"shared_expert_intermediate_size": 12},
    ),
    "step3p7_text": (
        "Step3p7TextModel",
        HEAD
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
        | {"share_expert_dim": 12, "sliding_window": 4}
        | {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["sparse"] * 2},
    ),
    "unlimited_ocr_text": ("UnlimitedOcrTextModel", DEEPSEEK),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "dbrx": (
        "DbrxModel",
        {"vocab_size": 50, "d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
        | {
            "ffn_config": {
                "hidden_size": 16,
                "ffn_hidden_size": 12,
                "moe_num_experts": 4,
                "moe_top_k": 2,
            }
        },
    ),
    "diffusion_gemma_text": (
        "DiffusionGemmaEncoderTextModel",
        HEAD
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 12, "layer_types": ["full_attention"] * 2},
    ),
    "doge": ("DogeModel", {"is_moe": True, "num_experts": 4, "num_experts_per_tok": 2}),
    "gemma4_text": (
        "Gemma4TextModel",
        HEAD
        | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 12, "vocab_size_per_layer_input": 50}
        | {"hidden_size_per_layer_input": 0, "layer_types": ["full_attention"] * 2}
        | {"global_head_dim": 8},
    ),
    "inkling_text": (
        "InklingTextModel",
        HEAD
        | {f"swa_{name}": value for name, value in HEADS.items()}
        | {"d_rel": 4, "rel_extent": 8, "moe_intermediate_size": 12, "n_routed_experts": 4}
        | {"num_experts_per_tok": 2, "n_shared_experts": 1, "mlp_layer_types": ["sparse"] * 2}
        | {"layer_types": ["full_attention"] * 2, "unpadded_vocab_size": 50}
        | {"max_position_embeddings": 64, "eos_token_id": 1},
    ),
    "longcat_flash": (
        "LongcatFlashModel",
        {k: v for k, v in SMALL.items() if k != "num_hidden_layers"}
        | {"num_layers": 1, "ffn_hidden_size": 24, "expert_ffn_hidden_size": 12, "moe_topk": 2}
        | {"n_routed_experts": 4, "zero_expert_num": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
        | {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8},
    ),
    "muse_spark_text": (
        "MuseSparkTextModel",
        HEAD
        | LOCAL
        | {"moe_intermediate_size": 12, "moe_hidden_size": 8, "mlp_layer_types": ["sparse"] * 2}
        | {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1},
    ),
    "vitpose_backbone": (
        "VitPoseBackbone",
        {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"num_experts": 4, "part_features": 4, "image_size": [32, 32], "patch_size": [16, 16]},
    ),
    "zaya": (
        "ZayaModel",
        HEAD
        | {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 12}
        | {"router_hidden_size": 8, "bos_token_id": 2, "eos_token_id": 1}
        | {"layer_types": ["hybrid"] * 2},
    ),
}
#: Of the table in docs/models.md, by their first words.
COLUMNS = ["found", "LoRA", "loads", "fedavg", "fedalign-moe"]
#: What each error says was seen.
SEEN = {
    "dbrx": "config.ffn_config.moe_num_experts = 4, blocks.0.ffn.router is a DbrxRouter",
    "diffusion_gemma_text": (
        "config.num_experts = 4, layers.0.router is a DiffusionGemmaTextRouter"
    ),
    "doge": "config.num_experts = 4, layers.0.mlp is a DogeCDMoE",
    "gemma4_text": "config.num_experts = 4, layers.0.router is a Gemma4TextRouter",
    "inkling_text": "config.n_routed_experts = 4, layers.0.mlp is a InklingMoE",
    "longcat_flash": "config.n_routed_experts = 4, layers.0.mlp is a LongcatFlashMoE",
    "muse_spark_text": "config.num_local_experts = 4, layers.0.mlp is a MuseSparkMoE",
    "vitpose_backbone": "config.num_experts = 4, encoder.layer.0.mlp is a VitPoseBackboneMoeMLP",
    "zaya": "config.num_experts = 4, layers.0.mlp is a ZayaSparseMoeBlock",
}


def built(kind: str, settings: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    whole = settings if "vocab_size" in settings else SMALL | settings
    model: nn.Module = cls(cls.config_class(**whole))
    return model.eval()


def observed(model: nn.Module, layout: MoELayout) -> tuple[Observer, dict[str, Any]]:
    """An observer of one forward, and what each block was called with and returned."""
    calls: dict[str, Any] = {}

    def keep(name: str) -> Any:
        return lambda _, args, kwargs, out: calls.__setitem__(name, (args, kwargs, out))

    hooks = [
        model.get_submodule(block.name).register_forward_hook(keep(block.name), with_kwargs=True)
        for block in layout.blocks
    ]
    with Observer(model, layout) as observer, observer.observing():
        model(input_ids=torch.arange(12).view(2, 6), use_cache=False)
    for hook in hooks:
        hook.remove()
    return observer, calls


def away_from_zero(model: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters, some of which began with zeros."""
    params = dict(model.named_parameters())
    for param in params.values():
        param.add_(torch.randn_like(param) * 0.05)
    return params


def enters(block: Block) -> bool:
    """Whether texts enter the block; in ERNIE 4.5 VL some are of images alone."""
    return "vision_moe" not in block.name


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_found_by_structure(name: str) -> None:
    model = built(*FOUND[name])
    layout = moe_layout(model)
    params = away_from_zero(model)
    observer, _ = observed(model, layout)
    for block, step in zip(layout.blocks, observer.last, strict=True):
        assert block.num_experts == 4
        assert block.top_k == (1 if name == "llama4_text" else 3 if name == "flex_olmo" else 2)
        assert (step is not None) == enters(block)
        if step is not None:
            router = model.get_submodule(block.router)
            again = received_logits(block, router, params, step.hidden, step.call)
            assert torch.equal(again, step.logits)


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_loads_equal_brute_force(name: str) -> None:
    """The load of an expert: tokens for which the block gives something else without it."""
    model = built(*FOUND[name])
    layout = moe_layout(model)
    params = away_from_zero(model)
    observer, calls = observed(model, layout)
    for block, seen in zip(layout.blocks, observer.routing(), strict=True):
        if not enters(block):
            assert seen.load.tolist() == [0] * 4
            continue
        args, kwargs, out = calls[block.name]
        for e in range(4):
            with zeroed(block.expert(e), params):
                without = model.get_submodule(block.name)(*args, **kwargs)
            changed = (first(out) != first(without)).reshape(12, -1).any(1)
            assert int(changed.sum()) == int(seen.load[e])


def first(out: Any) -> Tensor:
    found: Tensor = out if isinstance(out, Tensor) else out[0]
    return found


def test_layers_that_choose_by_token_ids() -> None:
    """DeepSeek-V4: a hash layer's experts stand in its table, one or two for each token id."""
    model = built(*FOUND["deepseek_v4"])
    table = model.get_buffer("layers.0.mlp.gate.tid2eid")
    # Tokens 0 to 11, so of two sorts: expert 3 twice, and experts 0 and 2.
    table[:] = torch.tensor([3, 3])
    table[4:12] = torch.tensor([2, 0])
    layout = moe_layout(model)
    with Observer(model, layout) as observer, observer.observing(), torch.no_grad():
        model(input_ids=torch.arange(12).view(2, 6), use_cache=False)
    seen = observer.routing()[0]
    assert seen.load.tolist() == [8, 0, 8, 4]
    entered = observer.last[0].hidden.double()  # type: ignore[union-attr]
    torch.testing.assert_close(seen.region[3], entered[:4].mean(0))  # type: ignore[index]


@pytest.mark.parametrize("name", FOUND)
def test_lora(name: str) -> None:
    model = built(*FOUND[name])
    before = moe_layout(model)
    params = dict(model.named_parameters())
    add_lora(model, {n: params[n] for n in before.expert_params}, 2, 4)
    after = moe_layout(model)
    assert [b.name for b in after.blocks] == [b.name for b in before.blocks]
    assert len(after.adapters) >= 4 * len(before.blocks)
    owned = {after.owner(pair.b.key) for pair in after.adapters}
    assert owned == {(b.position, e) for b in after.blocks for e in range(4)}


@pytest.mark.parametrize("name", ["flex_olmo", "minimax_m2"])
def test_lora_on_attention_alone(name: str) -> None:
    model = built(*FOUND[name])
    before = moe_layout(model)
    attention = {n: p for n, p in model.named_parameters() if "q_proj.weight" in n}
    add_lora(model, attention, 2, 4)
    assert [b.pieces for b in moe_layout(model).blocks] == [b.pieces for b in before.blocks]


@pytest.mark.parametrize("name", REFUSED)
def test_unrecognised_experts_are_not_upcycled(name: str) -> None:
    model = built(*REFUSED[name])
    assert find_layout(model) is None
    seen = re.escape(SEEN[name])
    with pytest.raises(NoExpertsError, match=f"it has experts that are not recognised: {seen}$"):
        moe_layout(model)
    with pytest.raises(ValueError, match=rf"has experts that are not recognised \({seen}\)"):
        upcycle(model, 1, 4)


def test_dense_models_have_none_to_recognise() -> None:
    assert find_layout(upcycle(as_released("llama"), 1, 4)) is not None


def test_a_router_of_one_value_is_of_no_experts() -> None:
    """Granite Docling's tells how finely an image is read; its texts' layers are dense."""
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    small |= {"intermediate_size": 32}
    texts = {"vocab_size": 50, "num_key_value_heads": 2, "pad_token_id": 0}
    images = {"image_size": 32, "patch_size": 4, "out_hidden_size": 16, "scale_factor": 4}
    config = transformers.GraniteDoclingConfig(
        text_config=small | texts,
        vision_config=small | images | {"deepstack_visual_indexes": [0]},
        density_router_hidden_size=8,
    )
    torch.manual_seed(0)
    model = transformers.GraniteDoclingModel(config).eval()
    assert unrecognised(model) is None
    with pytest.raises(NoExpertsError) as caught:
        moe_layout(model)
    assert "not recognised" not in str(caught.value)
    ids = {"input_ids": torch.arange(1, 13).view(2, 6)}
    with torch.no_grad():
        before = model(**ids).last_hidden_state
        upcycle(model, 1, 4)
        after = model(**ids).last_hidden_state
    assert [block.name for block in moe_layout(model).blocks] == ["text_model.layers.1.mlp"]
    torch.testing.assert_close(after, before)


class Mixture(nn.Module):
    """A mixture that no table knows."""

    def __init__(self, experts: nn.ModuleList | None = None) -> None:
        super().__init__()
        self.top_k = 2
        self.router = nn.Linear(16, 4, bias=False)
        self.experts = experts or nn.ModuleList(nn.Linear(16, 16) for _ in range(4))


def test_an_unknown_mixture_beside_a_known_family() -> None:
    model = nn.ModuleDict({"first": Mixture(), "body": as_released("mixtral"), "last": Mixture()})
    found = moe_layout(model)
    assert [block.name for block in found.blocks] == [
        "first",
        "body.layers.0.mlp",
        "body.layers.1.mlp",
        "last",
    ]
    assert [block.position for block in found.blocks] == [0, 1, 2, 3]
    assert [bool(block.found) for block in found.blocks] == [True, False, False, True]


def test_shared_experts_are_refused() -> None:
    one = Mixture()
    with pytest.raises(NoExpertsError, match=r"other\.experts has the experts of another layer"):
        moe_layout(nn.ModuleDict({"one": one, "other": Mixture(one.experts)}))


class Gate(nn.Module):
    """A router whose output is a tuple, its matrix zero but for two rows."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.weight = nn.Parameter(torch.zeros(4, 16))

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = hidden @ self.weight.T
        weights, chosen = logits.softmax(-1).topk(2)
        return logits, weights, chosen


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_gate_that_began_at_zero(rows: int) -> None:
    mixture = Mixture()
    mixture.router = Gate()  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mixture.router.weight[:rows] = torch.randn(rows, 16, generator=generator)
    (block,) = moe_layout(nn.ModuleDict({"block": mixture})).blocks
    hidden = torch.randn(20, 16, generator=generator)
    output = mixture.router(hidden)
    assert torch.equal(block.family.read(output, 2).logits, output[0])


def test_composite_configurations(tmp_path: Path, model_folder: Path) -> None:
    config = transformers.Qwen3VLMoeConfig(
        text_config=SMALL | FOUND["qwen3_vl_moe_text"][1] | {"vocab_size": 64},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    )
    transformers.Qwen3VLMoeModel(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert loaded.hidden == 16
    assert len(moe_layout(loaded.backbone).blocks) == 2
    with pytest.raises(InputError, match="no such folder"):
        load_pretrained(str(tmp_path / "none"))


def test_the_table_of_families_is_what_is_tested() -> None:
    """`benchmarks/evidence/families.py` writes it from the outcomes of the tests."""
    table = DOCS.read_text(encoding="utf-8").split("<!-- families -->")[1]
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in table.strip().splitlines()
    ]
    assert [column.split(" ")[0] for column in rows[0]] == ["family", *COLUMNS]
    listed = {row[0].strip("`"): row[1:] for row in rows[2:]}
    assert list(listed) == sorted([*MIXTURES, *FOUND, *REFUSED])
    for name in REFUSED:
        assert listed[name] == ["refused", "", "", "", ""], name
    for name in [*MIXTURES, *FOUND]:
        assert listed[name] == ["by name" if name in MIXTURES else "by structure"] + ["yes"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fedavg", "fedalign-moe"])
@pytest.mark.parametrize("name", FOUND)
def test_two_rounds(name: str, method: str) -> None:
    body: Any = built(*FOUND[name])
    body.config.use_cache = False
    model = TextClassifier(body, 16, 3)
    clients = [TinyText(12, seed) for seed in range(2)]
    result = federate(model, clients, TinyText(12, 9), method, rounds=2, device="cpu")
    for record in result.records:
        assert record.failed == record.rejected == {}
    assert torch.isfinite(torch.tensor([record.loss for record in result.records])).all()
