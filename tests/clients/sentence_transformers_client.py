# /// script
# dependencies = ["torch==2.13.0", "sentence-transformers==6.2.0", "transformers==5.24.0"]
# ///
"""sentence-transformers: embeddings with each pooling, saved and loaded again."""

import tempfile
from pathlib import Path

import torch
from checkpoints import checkpoints, row
from sentence_transformers import SentenceTransformer, models

import hf_gpt_scratch  # noqa: F401  # for the Auto classes

TEXTS = ["Every effort moves you", "a", "The cat sat on the mat, and then it went to sleep because it was tired."]


def embedder(directory: Path, pooling: str) -> SentenceTransformer:
    transformer = models.Transformer(str(directory), max_seq_length=64)
    transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    size = transformer.get_embedding_dimension()
    return SentenceTransformer(modules=[transformer, models.Pooling(size, pooling_mode=pooling)], device="cpu")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        official, ours = checkpoints(Path(folder))
        for pooling in ("mean", "lasttoken", "max"):
            expected = embedder(official, pooling).encode(TEXTS, convert_to_tensor=True)
            model = embedder(ours, pooling)
            model.save(f"{folder}/{pooling}")
            again = SentenceTransformer(f"{folder}/{pooling}", device="cpu")
            found = [one.encode(TEXTS, convert_to_tensor=True) for one in (model, again)]
            row(
                f"embeddings, {pooling}, also saved and loaded",
                all(torch.allclose(f, expected, atol=1e-4) for f in found),
            )


if __name__ == "__main__":
    main()
