"""What all tests need first."""

from hf_gpt_scratch.parity import warm_up

warm_up()
