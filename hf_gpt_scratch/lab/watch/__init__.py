"""The training lab: a training script is watched for a few steps, and its mistakes are named."""
