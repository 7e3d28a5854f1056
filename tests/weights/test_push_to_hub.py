"""What is pushed to the hub loads again, without this package too; the hub is a directory here."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.utils.hub
from forks import run_python
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from pairs import gpt2_config, random_gpt2, random_ids, random_pair, randomize
from remote import run_without_the_package
from transformers import AutoTokenizer

from hf_gpt_scratch import GPTScratchForCausalLM
from hf_gpt_scratch.model.heads_gpt_scratch import MODELS
from hf_gpt_scratch.weights.convert import gpt2_to_scratch
from hf_gpt_scratch.weights.model_card import PIPELINES, model_card
from hf_gpt_scratch.weights.parity import FP32_LOGITS, compare_outputs, relative_error

pytestmark = pytest.mark.slow

TRAINED = Path(__file__).parents[1] / "fixtures" / "tiny-gpt2"
EXAMPLE = Path(__file__).parents[2] / "examples" / "push_to_hub.py"
CODE = {
    f"{module}.py"
    for module in ("compat", "configuration_gpt_scratch", "heads_gpt_scratch", "layers", "modeling_gpt_scratch")
}

LOAD = """
import json
import torch
from transformers import AutoModelForCausalLM

repository, ids, logits = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(repository, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules")
with torch.no_grad():
    torch.save(model(torch.tensor(json.loads(ids))).logits, logits)
"""


class DirectoryHub:
    """The calls that transformers makes to push, on a directory for each repository and branch."""

    def __init__(self, root):
        self.root = root

    def create_repo(self, repo_id, **kwargs):
        (self.root / "main" / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_branch(self, repo_id, branch, **kwargs):
        (self.root / branch / repo_id).mkdir(parents=True, exist_ok=True)

    def create_commit(self, repo_id, operations, revision=None, **kwargs):
        repository = self.root / (revision or "main") / repo_id
        assert repository.is_dir(), "commits go to what exists"
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, repository / operation.path_in_repo)
        return SimpleNamespace(commit_url=str(repository))

    def upload_folder(self, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, self.root / "main" / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}")

    def load_card(self, repo_id, **kwargs):
        file = self.root / "main" / repo_id / "README.md"
        if not file.is_file():
            raise EntryNotFoundError.__new__(EntryNotFoundError)
        return ModelCard(file.read_text())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake, module = DirectoryHub(tmp_path / "hub"), transformers.utils.hub
    if hasattr(module, "hf_api"):
        monkeypatch.setattr(module, "hf_api", lambda: fake)
    else:  # before transformers had one client for all calls
        for name in ("create_repo", "create_branch", "create_commit"):
            monkeypatch.setattr(module, name, getattr(fake, name))
    monkeypatch.setattr(ModelCard, "load", fake.load_card)
    return fake


def loads_without_the_package(repository, model, tmp_path):
    ids = random_ids()
    run_without_the_package(LOAD, repository, json.dumps(ids.tolist()), tmp_path / "logits.pt", cwd=tmp_path)
    with torch.no_grad():
        # Two processes may add in two orders, as their memory happens to lie.
        return relative_error(model(ids).logits, torch.load(tmp_path / "logits.pt")) <= FP32_LOGITS


@torch.no_grad()
def same_logits(repository, model):
    ids = random_ids()
    loaded = GPTScratchForCausalLM.from_pretrained(repository)
    return all(map(torch.equal, loaded.parameters(), model.parameters())) and (
        relative_error(model(ids).logits, loaded(ids).logits) <= FP32_LOGITS
    )


def test_push_to_hub_uploads_weights_config_code_and_a_card(hub, tmp_path):
    model = random_pair()[1]
    model.push_to_hub("me/model", tags=["mine"])
    repository = hub.root / "main" / "me" / "model"
    files = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in repository.iterdir()} == files | CODE
    assert "mine" in ModelCard((repository / "README.md").read_text()).data.tags
    assert loads_without_the_package(repository, model, tmp_path)


def test_push_to_hub_without_the_code_would_be_noticed(hub, tmp_path):
    model = random_pair()[1]
    model.push_to_hub("me/model")
    repository = hub.root / "main" / "me" / "model"
    (repository / "layers.py").unlink()
    with pytest.raises(AssertionError, match=r"layers\.py"):
        loads_without_the_package(repository, model, tmp_path)


def test_push_to_hub_keeps_the_card_that_is_there(hub):
    model = random_pair()[1]
    hub.create_repo("me/model")
    card = model_card(model, source="openai-community/gpt2")
    card.save(hub.root / "main" / "me" / "model" / "README.md")
    model.push_to_hub("me/model")
    assert (hub.root / "main" / "me" / "model" / "README.md").read_text() == str(card)


def test_push_to_hub_of_shards_to_a_branch(hub, tmp_path):
    model = random_pair()[1]
    model.push_to_hub("me/model", revision="half", max_shard_size="60KB")
    repository = hub.root / "half" / "me" / "model"
    assert len(list(repository.glob("*.safetensors"))) > 2
    assert not any((hub.root / "main" / "me" / "model").iterdir())
    assert loads_without_the_package(repository, model, tmp_path)


def test_an_official_checkpoint_is_pushed_as_ours(hub, tmp_path):
    random_gpt2().save_pretrained(tmp_path / "official")
    model = GPTScratchForCausalLM.from_pretrained(tmp_path / "official")
    model.push_to_hub("me/model")
    repository = hub.root / "main" / "me" / "model"
    assert json.loads((repository / "config.json").read_text())["model_type"] == "gpt_scratch"
    assert {path.name for path in repository.iterdir()} >= CODE
    assert same_logits(repository, model)


def run_example(*arguments, cwd):
    return run_python(EXAMPLE, *arguments, cwd=cwd, env={**os.environ, "COLUMNS": "200"})


def test_the_example_shows_a_repository_and_pushes_nothing(tmp_path):
    done = run_example(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Nothing was pushed" in done.stdout
    assert {"README.md", "config.json", "model.safetensors"} | CODE <= {
        path.name for path in (tmp_path / "outputs" / "push" / "repository").iterdir()
    }
    assert all(name in done.stdout for name in CODE)


def test_the_example_takes_tokenizer_and_figures_of_a_conversion_along(tmp_path):
    receipt = gpt2_to_scratch(TRAINED, tmp_path / "converted")
    done = run_example(tmp_path / "converted", "--source", "me/original", "--license", "mit", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    repository = tmp_path / "outputs" / "push" / "repository"
    card = ModelCard.load(repository / "README.md")
    assert str(card) in done.stdout
    assert (card.data.base_model, card.data.license) == ("me/original", "mit")
    assert f"{receipt['parity']['tensors']} of {receipt['parity']['tensors']} tensors" in card.text
    assert "I had always" in AutoTokenizer.from_pretrained(repository).decode(
        AutoTokenizer.from_pretrained(TRAINED)("I had always").input_ids
    )
    assert same_logits(repository, GPTScratchForCausalLM.from_pretrained(TRAINED))


@pytest.fixture(scope="module")
def example():
    specification = importlib.util.spec_from_file_location("push_to_hub", EXAMPLE)
    example = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(example)
    return example


@pytest.mark.parametrize("saved", ["official", "ours"])
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_the_example_pushes_every_head_as_it_was_trained(example, hub, kind, saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "HfApi", lambda: hub)
    gpt2 = randomize(kind.gpt2_class(gpt2_config())).eval()
    trained = kind.from_gpt2(gpt2)
    (gpt2 if saved == "official" else trained).save_pretrained(tmp_path / "model")
    example.main(tmp_path / "model", repo_id="me/model", output=tmp_path / "output")
    repository = hub.root / "main" / "me" / "model"
    loaded, info = kind.from_pretrained(repository, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(map(torch.equal, loaded.parameters(), trained.parameters()))
    assert compare_outputs(gpt2, loaded, random_ids(1)).relative_error <= FP32_LOGITS
    config, card = (repository / name for name in ("config.json", "README.md"))
    config, card = json.loads(config.read_text()), ModelCard(card.read_text())
    assert config["architectures"] == [kind.__name__] and kind._auto_class in config["auto_map"]
    assert card.data.pipeline_tag == PIPELINES[kind._auto_class]
    assert f"from transformers import {kind._auto_class}\n" in card.text
    assert f"from hf_gpt_scratch import {kind.__name__}\n" in card.text


def test_the_example_pushes_no_model_that_it_does_not_know(example, tmp_path):
    model, output = tmp_path / "output" / "repository" / "model", tmp_path / "output"
    random_pair()[1].save_pretrained(model)
    with pytest.raises(SystemExit, match="choose another --output"):
        example.main(model, output=output)
    assert GPTScratchForCausalLM.from_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["MyGPT"]}))
    with pytest.raises(SystemExit, match="MyGPT"):
        example.main(model, output=tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match="there is no directory"):
        example.main(tmp_path / "nothing", output=tmp_path / "elsewhere")


def test_the_example_cannot_push_without_a_network(tmp_path):
    done = run_example("--repo-id", "me/model", cwd=tmp_path)
    assert done.returncode != 0
    assert "Pushed" not in done.stdout


def test_the_example_pushes_what_it_shows(example, hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(example, "HfApi", lambda: hub)
    example.main(TRAINED, repo_id="me/model", output=tmp_path / "output")
    assert "https://hub/me/model" in capsys.readouterr().out
    shown, pushed = (
        {path.name: path.read_bytes() for path in directory.iterdir()}
        for directory in (tmp_path / "output" / "repository", hub.root / "main" / "me" / "model")
    )
    assert shown == pushed
    assert "tokenizer.json" in pushed
