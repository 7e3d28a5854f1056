"""Tells PEFT which modules its methods change by default: those that it changes in the official GPT-2.

PEFT has a table for each method, by model type. Its import adds a row where there is none, of our models and of classes
of one's own that inherit from them; see `registration.py`.
"""

from peft.utils import constants

from .model.interop import for_each_type

# Names of the official modules in PEFT's tables, and ours for the same weights.
OURS = {
    "c_attn": ["W_query", "W_key", "W_value"],
    "c_proj": ["out_proj", "ff.layers.2"],
    "mlp.c_proj": ["ff.layers.2"],
    "mlp.c_fc": ["ff.layers.0"],
    "ln_1": ["norm1"],
    "ln_2": ["norm2"],
    "ln_f": ["final_norm"],
}


def add_rows(model_type: str) -> None:
    """Adds a row to each of PEFT's tables that has one of the official GPT-2, of known names, and none of this type."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict):
            theirs = table.get("gpt2")
            if isinstance(theirs, list) and set(theirs) <= OURS.keys():
                table.setdefault(model_type, [ours for one in theirs for ours in OURS[one]])


for_each_type(add_rows)
