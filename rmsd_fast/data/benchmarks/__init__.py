"""Read local copies of public benchmarks as questions, and aggregate their scores as their authors do.

`load_benchmark` reads an annotation with the reader of its benchmark, a module of this folder. A reader turns a row
into questions with the benchmark's prompt, and names the groups of its breakdowns. `tables` reads files, `record`
accesses the fields of a row and finds media, and `aggregates` computes the benchmark's number. docs/evaluation.md
describes the annotations, the prompts, and the differences from other harnesses.
"""

from rmsd_fast.data.benchmarks.aggregates import aggregate
from rmsd_fast.data.benchmarks.load import benchmark_files, load_benchmark, published_counts

__all__ = ["aggregate", "benchmark_files", "load_benchmark", "published_counts"]
