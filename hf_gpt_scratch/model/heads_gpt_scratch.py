# SPDX-License-Identifier: Apache-2.0  # trf-ignore: TRF028 as this line says it
"""The model with another head than the language model's: for choices, sequences, tokens and questions.

Shapes: B batch, C choices, T tokens, E emb_dim, V vocabulary.
"""

from functools import wraps
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    Cache,
    GenerationMixin,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    PreTrainedModel,
)
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.models.gpt2.modeling_gpt2 import GPT2DoubleHeadsModelOutput, GPT2SequenceSummary
from transformers.utils import can_return_tuple

from .compat import CACHE
from .configuration_gpt_scratch import GPTScratchConfig
from .layers import GPTModel as GPTModel  # unused: older versions of transformers fetch only what this file imports
from .modeling_gpt_scratch import (
    AUTO_CLASSES,
    GPTScratchForCausalLM,
    GPTScratchModel,
    GPTScratchPreTrainedModel,
    decoding,
    enter,
)


# trf-ignore: TRF057 docstrings written by hand give shapes and errors, on every version of transformers
class GPTScratchDoubleHeadsModel(GPTScratchForCausalLM, GenerationMixin):
    """`GPTScratchForCausalLM` with a second head that scores several continuations, one of which is right."""

    gpt2_class = GPT2DoubleHeadsModel  # type: ignore[assignment]  # like its parent's

    def __init__(self, config: GPTScratchConfig):
        config.num_labels = 1
        super().__init__(config)
        self.multiple_choice_head = GPT2SequenceSummary(cast(Any, config))  # it has all options that are read here
        self.loss_type = "ForCausalLM"
        self.post_init()

    # trf-ignore: TRF057 as above
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        token_type_ids: torch.LongTensor | None = None,
        mc_token_ids: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        mc_labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> GPT2DoubleHeadsModelOutput:
        """The logits of the next tokens, and a score for each choice; C is the number of choices.

        Args:
            input_ids: (B, C, T) or (B, T), like the masks, positions, types and labels.
            mc_token_ids: (B, C), the token that represents each choice; default: the last.
            mc_labels: (B,), the right choice.

        Returns:
            `logits` (B, C, T, V), `mc_logits` (B, C), and `loss` and `mc_loss` if their labels are given.
        """

        def flat(tensor, last_dims=1):
            return None if tensor is None else tensor.reshape(-1, *tensor.shape[-last_dims:])

        outputs = self.model(
            input_ids=flat(input_ids),
            attention_mask=flat(attention_mask),
            position_ids=flat(position_ids),
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=flat(inputs_embeds, last_dims=2),
            token_type_ids=flat(token_type_ids),
            use_cache=use_cache,
            **kwargs,
        )
        given = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
        shape = given.shape  # type: ignore[union-attr]  # the base model has checked that one of them is given
        x = outputs.last_hidden_state.view(*shape, -1)  # (B, C, T, E)
        logits = decoding.product(self.out_head, x)  # (B, C, T, V)
        mc_logits = self.multiple_choice_head(x, mc_token_ids).squeeze(-1)  # (B, C)
        loss, mc_loss = None, None
        if labels is not None:
            loss = self.loss_function(flat(logits, last_dims=2), flat(labels), self.config.vocab_size)
        if mc_labels is not None:
            mc_loss = nn.functional.cross_entropy(mc_logits.view(-1, mc_logits.shape[-1]), mc_labels.view(-1))
        return GPT2DoubleHeadsModelOutput(
            loss=loss,
            mc_loss=mc_loss,
            logits=logits,
            mc_logits=mc_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


# The forward passes of the three below are transformers' own, but for the book's classifier. Their constructors are
# not: those find the base model through AutoModel, which does not know a copy of this module that came along with saved
# weights.


class GPTScratchForSequenceClassification(GenericForSequenceClassification, GPTScratchPreTrainedModel):
    """One label for each sequence, from its last token that is not padding.

    With `book_classifier` it is chapter 6's: the head has a bias, and reads the last token, padding or not.
    """

    gpt2_class = GPT2ForSequenceClassification

    def __init__(self, config: GPTScratchConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GPTScratchModel(config, self.block_class)
        self.score = nn.Linear(config.emb_dim, self.num_labels, bias=config.book_classifier)
        self.post_init()

    # trf-ignore: TRF057 as above
    @wraps(GenericForSequenceClassification.forward)
    def forward(self, *args, **kwargs):  # type: ignore[override]  # of the same signature
        # CODEPATH: official checkpoints read the last token that is not padding; classifiers of the book's, the last
        if not self.config.book_classifier:
            return super().forward(*args, **kwargs)
        names = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "labels", "use_cache")
        return self._score_last(**dict(zip(names, args, strict=False)), **kwargs)

    @can_return_tuple
    def _score_last(self, attention_mask=None, labels=None, **kwargs):
        is_given = attention_mask is not None and not attention_mask.is_meta
        if is_given and (attention_mask.ndim != 2 or not attention_mask.all()):
            raise ValueError(
                "got an attention_mask that hides tokens, but the book's classifier reads its padding, too; pad as in "
                "training and leave attention_mask out, or give one text at a time without padding"
            )
        outputs = self.model(attention_mask=attention_mask, **kwargs)
        logits = self.score(outputs.last_hidden_state)[:, -1]  # (B, labels)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


class GPTScratchForTokenClassification(GenericForTokenClassification, GPTScratchPreTrainedModel):
    """One label per token."""

    gpt2_class = GPT2ForTokenClassification

    def __init__(self, config: GPTScratchConfig):
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = GPTScratchModel(config, self.block_class)
        rates = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        self.classifier = nn.Linear(config.emb_dim, self.num_labels)
        self.post_init()

    @property
    def score(self) -> nn.Module:  # type: ignore[override]  # an attribute in transformers
        """The head's name in the generic forward pass; in files, `score` is a sequence classifier's."""
        return self.classifier


class GPTScratchForQuestionAnswering(GenericForQuestionAnswering, GPTScratchPreTrainedModel):
    """Scores of each token as the start and as the end of the answer."""

    gpt2_class = GPT2ForQuestionAnswering
    get_input_embeddings = GPTScratchPreTrainedModel.get_input_embeddings
    set_input_embeddings = GPTScratchPreTrainedModel.set_input_embeddings

    def __init__(self, config: GPTScratchConfig):
        PreTrainedModel.__init__(self, config)
        self.model = GPTScratchModel(config, self.block_class)
        self.qa_outputs = nn.Linear(config.emb_dim, 2)
        self.post_init()


enter("AutoModelForPreTraining", modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES, GPTScratchDoubleHeadsModel)
enter(
    "AutoModelForSequenceClassification",
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    GPTScratchForSequenceClassification,
)
enter(
    "AutoModelForTokenClassification",
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    GPTScratchForTokenClassification,
)
enter(
    "AutoModelForQuestionAnswering",
    modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    GPTScratchForQuestionAnswering,
)
MODELS = tuple(AUTO_CLASSES.values())
