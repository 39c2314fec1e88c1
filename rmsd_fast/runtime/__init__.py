"""Process group, DeepSpeed engines, checkpoints and metrics. Importing this package loads no heavy library."""
