# /// script
# dependencies = ["openvino>=2026.4", "transformers<6", "onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.31"]
# ///
"""OpenVINO reads the graphs of our ONNX exports; it computes in float32 here, as on CPUs without bfloat16."""

import tempfile
from pathlib import Path

import numpy as np
import openvino
import torch
from checkpoints import CONTEXT, PROMPTS, official_ids, row
from onnx_exports import exported, left_padded, official_batch

from hf_gpt_scratch.weights.formats.onnx import FOLDER, GRAPH, positions


def continued(graph: Path, ids: list[list[int]], mask: list[list[int]]) -> list[list[int]]:
    """Greedy ids after prompts, to the end of the context."""
    run = openvino.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    past = {}
    for one in run.inputs:
        if one.any_name.startswith("past_key_values."):
            _, heads, _, dim = one.partial_shape
            past[one.any_name] = np.zeros((len(ids), heads.get_length(), 0, dim.get_length()), np.float32)
    new, seen, found = torch.tensor(ids), torch.tensor(mask), []
    while seen.shape[1] <= CONTEXT:
        inputs = {"input_ids": new, "attention_mask": seen, "position_ids": positions(seen)[:, -new.shape[1] :]}
        outputs = run({**{name: tensor.numpy() for name, tensor in inputs.items()}, **past})
        past = {name: outputs[name.replace("past_key_values", "present")].copy() for name in past}
        new = torch.from_numpy(outputs["logits"])[:, -1:].argmax(-1)
        seen = torch.cat([seen, torch.ones_like(new)], dim=1)
        found.append(new)
    return torch.cat(found, dim=1)[:, : CONTEXT - len(ids[0])].tolist()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for tied in (True, False):
            kind = "tied" if tied else "untied"
            official, ours = exported(Path(folder), tied)
            graph = ours / FOLDER / GRAPH
            ids = [continued(graph, [prompt], [[1] * len(prompt)])[0] for prompt in PROMPTS]
            row(f"greedy ids, {kind} head", ids == official_ids(official))
            row(f"a left-padded batch, {kind}", continued(graph, *left_padded()) == official_batch(official))


if __name__ == "__main__":
    main()
