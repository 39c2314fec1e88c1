"""Process group, DeepSpeed engines, checkpoints and metrics. Importing it loads none of the heavy libraries."""
