"""The plugin that vLLM finds by the entry point in pyproject.toml, if this package is installed beside it.

vLLM then serves these models through its Transformers backend, without remote code.
"""


def register() -> None:
    """Tells vLLM which of its classes serve our architectures; it calls this in each of its processes."""
    from vllm import ModelRegistry

    import hf_gpt_scratch  # noqa: F401  # for the Auto classes

    backend = "vllm.model_executor.models.transformers"
    ModelRegistry.register_model("GPTScratchForCausalLM", "hf_gpt_scratch.vllm_model:GPTScratchForVLLM")
    ModelRegistry.register_model("GPTScratchModel", f"{backend}:TransformersEmbeddingModel")
    ModelRegistry.register_model(
        "GPTScratchForSequenceClassification", f"{backend}:TransformersForSequenceClassification"
    )
