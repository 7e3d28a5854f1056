"""transformers' own tests of a language model, which its repository has and its package does not:

git clone --depth 1 --branch v5.24.0 https://github.com/huggingface/transformers
PYTHONPATH=transformers python -m pytest tests
"""

import unittest

import pytest
from transformers.models.auto import modeling_auto

from my_model import MyModelConfig, MyModelForCausalLM, MyModelModel

NEEDED = "needs parameterized, and a clone of transformers in PYTHONPATH"
causal_lm = pytest.importorskip("tests.causal_lm_tester", reason=NEEDED)
training = pytest.importorskip("tests.test_training_mixin", reason=NEEDED)
# By these the tests know which class has a loss.
modeling_auto.MODEL_MAPPING_NAMES["my_model"] = "MyModelModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["my_model"] = "MyModelForCausalLM"


class MyModelModelTester(causal_lm.CausalLMModelTester):
    config_class = MyModelConfig
    base_model_class = MyModelModel
    causal_lm_class = MyModelForCausalLM


class MyModelModelTest(causal_lm.CausalLMModelTest, training.TrainingTesterMixin, unittest.TestCase):
    model_tester_class = MyModelModelTester
    pipeline_model_mapping = {"feature-extraction": MyModelModel, "text-generation": MyModelForCausalLM}
