"""Engines other than torch, in a process of their own: harness.py starts python benchmarks/workers.py.

The process must not use torch, after which CTranslate2's products through oneDNN take a third longer. So engines.py
converts in another process, and this file imports no other benchmark. Requests arrive on stdin and answers are sent to
stdout, pickled.
Shapes: B batch, T tokens, V vocabulary.
"""

import os
import pickle
import re
import sys
import time
import traceback
from pathlib import Path

import numpy as np

clock = time.process_time if "BENCHMARK_CPU_TIME" in os.environ else time.perf_counter  # as in harness.py


class CTranslate2:
    """OpenNMT's inference engine in C++; it computes the logits of all positions.

    Args:
        directory: with the converted model.
        threads: number of threads.
        width: dtype of the weights.
        mkl: use MKL for products, its default on Intel's CPUs, instead of oneDNN, which can be faster there, too.
    """

    def __init__(self, directory: Path, threads: int, width: str, mkl: bool):
        os.environ["CT2_USE_MKL"] = str(int(mkl))  # read when it is imported
        import ctranslate2

        if width not in ctranslate2.get_supported_compute_types("cpu"):
            raise ImportError(f"CTranslate2 has no {width} on this CPU")
        self.generator = ctranslate2.Generator(str(directory), compute_type=width, intra_threads=threads)

    def prefill(self, ids: np.ndarray) -> np.ndarray:  # (B, T)
        return self.logits(ids)[:, -1]  # (B, V)

    def logits(self, ids: np.ndarray) -> np.ndarray:  # (B, T)
        output = self.generator.forward_batch(tokens(ids))
        if str(output.dtype) == "DataType.bfloat16":  # which numpy lacks
            import ctranslate2

            output = output.to(ctranslate2.DataType.float32)
        return np.array(output)  # (B, T, V)

    def generate(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:  # (B, T)
        results = self.generator.generate_batch(
            tokens(ids),
            max_length=new_tokens,
            min_length=new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,  # otherwise it reads the prompt token by token
        )
        return np.concatenate((ids, [result.sequences_ids[0] for result in results]), axis=1)  # (B, T + new_tokens)


def tokens(ids: np.ndarray) -> list[list[str]]:
    return [[str(i) for i in row] for row in ids.tolist()]


class OnnxRuntime:
    """The official model as torch exports it, with a cache that grows by concatenation.

    Args:
        directory: with model.onnx.
        threads: number of threads.
    """

    def __init__(self, directory: Path, threads: int):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            directory / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        [past] = [given for given in self.session.get_inputs() if given.name == "past"]
        self.layers, _, _, self.heads, _, self.dim = past.shape

    def step(self, ids: np.ndarray, past: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        batch, length = ids.shape
        seen = past.shape[4]
        inputs = {
            "ids": ids,
            "mask": np.ones((batch, seen + length), np.int64),
            "positions": np.broadcast_to(np.arange(seen, seen + length), (batch, length)),
            "past": past,
        }
        logits, present = self.session.run(None, inputs)
        return logits, present

    def nothing(self, batch: int) -> np.ndarray:
        return np.zeros((self.layers, 2, batch, self.heads, 0, self.dim), np.float32)

    def prefill(self, ids: np.ndarray) -> np.ndarray:  # (B, T)
        return self.step(ids, self.nothing(len(ids)))[0]  # (B, V)

    def generate(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:  # (B, T)
        new, past, result = ids, self.nothing(len(ids)), [ids]
        for _ in range(new_tokens):
            logits, past = self.step(new, past)
            new = logits.argmax(-1, keepdims=True)
            result.append(new)
        return np.concatenate(result, axis=1)  # (B, T + new_tokens)


class LlamaCpp:
    """llama.cpp's server, used without a network; it returns ids but no logits.

    Args:
        directory: with model.gguf, whose tokens spell their ids.
        threads: number of threads.
    """

    SEQUENCES = 8  # at once; others wait

    def __init__(self, directory: Path, threads: int):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(directory / "model.gguf")
        params.n_parallel = self.SEQUENCES
        params.n_ctx = self.SEQUENCES * 1024
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # like all other engines
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        self.server = xllamacpp.Server(params)

    def generate(self, ids: np.ndarray, new_tokens: int) -> np.ndarray:  # (B, T)
        settings = {"max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        choices = self.server.handle_completions({"prompt": ids.tolist(), **settings})["choices"]
        texts = [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]
        new = [[int(number) for number in re.findall(r"<(\d+)>", text)] for text in texts]
        return np.concatenate((ids, new), axis=1)  # (B, T + new_tokens)


def main() -> None:
    """The first request creates an engine, the others call its methods; each answer is (seconds, output or error)."""
    # CTranslate2's converters would import them.
    sys.modules.update(dict.fromkeys(("torch", "transformers")))  # type: ignore[arg-type]
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that an engine's own messages do not mix with the answers
    engine = None
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        output: object = None
        start = clock()
        try:
            if engine is None:
                engine = globals()[name](**arguments)
            else:
                output = getattr(engine, name)(**arguments)
        except ImportError as error:
            output = ImportError(str(error))
        except Exception:
            output = RuntimeError(traceback.format_exc())  # not all errors can be pickled
        pickle.dump((clock() - start, output), answers)
        answers.flush()


if __name__ == "__main__":
    main()
