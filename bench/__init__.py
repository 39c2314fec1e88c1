"""Benchmarks: `pytest bench/`, and `python -m bench.cuda` on a CUDA machine. Nothing imports them."""
