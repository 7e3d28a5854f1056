from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_my_model import MyModelConfig
from .modeling_my_model import MyModelForCausalLM, MyModelModel, MyModelPreTrainedModel

__all__ = ["MyModelConfig", "MyModelForCausalLM", "MyModelModel", "MyModelPreTrainedModel"]

AutoConfig.register("my_model", MyModelConfig)
MyModelConfig.register_for_auto_class()
for auto, model in ((AutoModel, MyModelModel), (AutoModelForCausalLM, MyModelForCausalLM)):
    auto.register(MyModelConfig, model)
    model.register_for_auto_class(auto.__name__)  # saved models bring this code along
