# /// script
# dependencies = ["torch==2.13.0", "langchain-huggingface==1.2.3", "transformers==5.24.0"]
# ///
"""LangChain: HuggingFacePipeline alone, streamed, in a batch and in a chain, with chat messages, too."""

import tempfile
from pathlib import Path

from checkpoints import checkpoints, row
from langchain_core.messages import HumanMessage
from langchain_core.prompts import PromptTemplate
from langchain_huggingface import ChatHuggingFace, HuggingFacePipeline
from transformers import AutoTokenizer

import hf_gpt_scratch  # noqa: F401  # for the Auto classes

OPTIONS = dict(max_new_tokens=12, do_sample=False, return_full_text=False)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def texts(directory: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(directory)
    model = HuggingFacePipeline.from_model_id(str(directory), task="text-generation", pipeline_kwargs=OPTIONS)
    chain = PromptTemplate.from_template("Question: {question}\nAnswer:") | model
    return {
        "invoke": model.invoke("Every effort"),
        "stream": list(model.stream("Every effort")),
        "batch": model.batch(["Every effort", "The cat sat on the mat"]),
        "in a chain": chain.invoke({"question": "Who?"}),
        "chat": ChatHuggingFace(llm=model).invoke([HumanMessage("Hello")]).content,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        expected, found = (texts(directory) for directory in checkpoints(Path(folder)))
        for what, text in expected.items():
            row(f"HuggingFacePipeline: {what}", bool(text) and found[what] == text)


if __name__ == "__main__":
    main()
