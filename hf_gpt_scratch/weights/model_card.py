"""The README.md of a saved model: what it is, its measured parity with the official one, how to load it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..model.modeling_gpt_scratch import GPTScratchPreTrainedModel

# What OpenAI published on the hub, all under one licence.
OPENAI_GPT2 = {f"openai-community/gpt2{size}": "mit" for size in ("", "-medium", "-large", "-xl")}

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForPreTraining": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModel": "feature-extraction",
}

ARCHITECTURE = {
    "vocab_size": "token ids",
    "context_length": "longest sequence, in tokens",
    "emb_dim": "width",
    "n_layers": "transformer blocks",
    "n_heads": "attention heads per block",
    "qkv_bias": "biases on W_query, W_key and W_value",
    "activation_function": "activation",
    "tie_word_embeddings": "one matrix for tok_emb and out_head",
}

TEXT = """\
# {title}

GPT-2 with the layers of the book *Build a Large Language Model (From Scratch)*, as a Transformers model,
{made_of}.

{parameters:,} parameters ({dtype}).

## How to load it

`here` is this repository's id, or the directory that you downloaded it to. With Transformers alone, through the code
beside the weights:

```python
from transformers import {auto_class}

model = {auto_class}.from_pretrained(here, trust_remote_code=True)
```

{with_package}## Architecture

| | | |
| --- | --- | --- |
{architecture}
{parity}
## Licence

{licence}
"""

WITH_PACKAGE = """\
With the package `hf_gpt_scratch`, from which this code comes:

```python
from hf_gpt_scratch import {model_class}

model = {model_class}.from_pretrained(here)
model.save_as_gpt2("official")  # an official checkpoint again
```

"""

PARITY = """
## Parity with {official}

Measured {how}when the checkpoint was converted{versions}:

| | |
| --- | --- |
{rows}
"""


def is_hub_id(source: str) -> bool:
    """Whether it can be the id of a model on the hub, and is no file here."""
    try:
        validate_repo_id(source)
    except HFValidationError:
        return False
    return not Path(source).is_file() and not source.endswith((".pth", ".pt", ".bin", ".safetensors", ".gguf", ".onnx"))


def model_card(
    model: GPTScratchPreTrainedModel,
    receipt: Mapping[str, Any] | None = None,
    source: str | None = None,
    license: str | None = None,
) -> ModelCard:
    """The card of a model; `save(path)` writes it, `push_to_hub(repo_id)` uploads it.

    Args:
        model: with or without its weights: one on the meta device will do.
        receipt: of the conversion it came from; its parity figures are shown, if they were measured and passed.
        source: hub id of the checkpoint that the weights come from.
        license: of the weights, by the hub's names; default: "mit" for OpenAI's own, else the card does not state it.

    Raises:
        TypeError: it is another model.
        ValueError: `source` is no hub id.
    """
    if source is not None and not is_hub_id(source):
        raise ValueError(
            f"got source={source!r}, which is no id of a model on the hub, such as openai-community/gpt2; leave it out "
            "for weights of your own"
        )
    if not hasattr(type(model), "kinds"):
        raise TypeError(
            f"model_card got a {type(model).__name__}; give it a model of this package, such as its .module"
        )
    license = license or OPENAI_GPT2.get(source or "")
    auto_class = type(model)._auto_class or "AutoModel"
    own = None if type(model) in model.kinds() else type(model).__name__  # a class of somebody's own
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(auto_class),
        base_model=source,
        tags=["gpt2", model.config.model_type, "custom_code", "pytorch"],
    )
    if source:
        made_of = f"with the weights of `{source}`"
        weights = f"those of `{source}`, `{license}`" if license else f"see `{source}`"
    else:
        made_of = f"with the weights of {_origin(receipt)}" if receipt else "with weights of its own"
        weights = f"`{license}`" if license else "not stated"
    text = TEXT.format(
        title=f"{own or (source or 'GPT-2').rpartition('/')[2]} with the layers of the book",
        made_of=made_of,
        parameters=model.num_parameters(),
        dtype=str(model.config.dtype or model.dtype).removeprefix("torch."),
        auto_class=auto_class,
        with_package=WITH_PACKAGE.format(model_class=type(model).__name__) if own is None else "",
        architecture="\n".join(
            f"| `{name}` | {getattr(model.config, name)} | {meaning} |" for name, meaning in ARCHITECTURE.items()
        ),
        parity=_parity(receipt, f"`{type(model).gpt2_class.__name__}`"),
        licence=f"The code: `apache-2.0`. The weights: {weights}.",
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")


def _origin(receipt: Mapping[str, Any]) -> str:
    format = receipt.get("source", {}).get("format")
    return f"a `{format}` checkpoint" if format not in (None, "gpt2") else "an official checkpoint"


def _parity(receipt: Mapping[str, Any] | None, official: str) -> str:
    figures = (receipt or {}).get("parity")
    if not figures or not figures["passed"]:
        return ""
    rows = [f"weights | {figures['tensors']} of {figures['tensors']} tensors equal bit for bit"]
    if logits := figures.get("logits"):  # the models were run; otherwise only the weights were compared
        rows = [
            "logits, max \\|error\\| of max \\|logit\\| | "
            f"{logits['max_abs_error']:.1e} of {logits['max_abs_logit']:.4g}",
            f"relative error, and its bound | {logits['relative_error']:.1e}, {figures['logit_bound']:.0e}",
            f"top-1 agreement on {logits['tokens']} random tokens | {logits['top1_agreement']:.2%}",
            *rows,
        ]
    if tokens := figures.get("greedy_tokens"):
        rows.append(f"greedy continuation | {tokens} of {tokens} token ids equal")
    versions = ", ".join(f"{name} {version}" for name, version in (receipt or {}).get("versions", {}).items())
    return PARITY.format(
        official=official if logits else _origin(receipt or {}),
        how="in float32 " if logits else "",
        versions=f" ({versions})" if versions else "",
        rows="\n".join(f"| {row} |" for row in rows),
    )
