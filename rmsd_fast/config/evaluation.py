"""Settings of evaluations and of a judge."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rmsd_fast.config.fields import BENCHMARKS, choice, number


@dataclass
class JudgeConfig:
    """A language model behind a server (extra `collect`).

    `evaluate.judge` judges answers that rules cannot score (docs/evaluation.md), and `self_teacher.judge` writes
    feedback about rollouts (docs/methods.md).
    """

    endpoint: str = ""
    """Base URL of a server with OpenAI's chat completions, such as http://localhost:8000/v1; empty = no judge.
    `evaluate.judge`: it judges answers to MathVista, MathVerse and `what` of V-STaR, as their authors' language models
    do, for rmsd_fast.evaluate only. `self_teacher.judge`: it writes the view `feedback` about each rollout; without it,
    `feedback` is `hints.feedback` of the question."""
    model: str = ""
    """Name of the judge's model on that server. V-STaR's authors use Qwen2.5-72B-Instruct."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the API key; empty = no key. The default is optional and sent only with https."""
    temperature: float | None = number(0.0, least=0)
    """Sampling temperature; null = the server's default, for models that accept no other value. In an evaluation, a
    reply that cannot be read is requested again with 0.5 more, and then with 1.0 more, up to 2."""
    max_tokens: int = number(1024, least=1)
    """Maximum length of a reply in tokens, with its reasoning. With a higher one, only replies that were cut off are
    requested again."""
    token_limit: str = choice("max_tokens", of=("max_tokens", "max_completion_tokens"))
    """Name under which `max_tokens` is sent; OpenAI's reasoning models accept only `max_completion_tokens`."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as {chat_template_kwargs: {enable_thinking: false}}."""
    max_concurrency: int = number(16, least=1, most=4096)
    """Maximum number of requests in flight. The number is adapted to the server, as in a collection."""
    timeout_s: float = number(600.0, above=0, most=86400)
    """Time-out of a request in seconds."""
    attempts: int = number(8, least=1)
    """Attempts of a request that fails at the server or on the way. Refusals because of rate limits do not count."""
    outage_s: float = number(900.0, above=0, most=604800)
    """Stop after this time in seconds in which requests were sent and none was answered."""


@dataclass
class EvaluateConfig:
    """Evaluation on the held-out questions."""

    benchmark: str = choice("", of=("", *BENCHMARKS))
    """Benchmark that `data.heldout` is the annotation of, a file or a folder (docs/evaluation.md): `videomme`,
    `videommmu`, `worldsense`, `longvideobench`, `mlvu`, `mathvista`, `mathverse` or `vstar`; empty = a question file of
    `data.format`."""
    prompt: str = choice("rmsd", of=("rmsd", "benchmark"))
    """`rmsd` = the held-out questions are shown as in training, with the answer format, or `benchmark` = the prompt of
    `evaluate.benchmark`, verbatim."""
    subtitles: bool = False
    """Show the subtitles that are spoken at the times of the chosen frames, for `videomme`, `longvideobench` and
    `worldsense` with `evaluate.prompt=benchmark`."""
    without_video: bool = False
    """Ask a benchmark's questions without their videos; images of questions are still shown. `--compare` with such an
    evaluation of Video-MMMU as the first one prints the knowledge gain."""
    num_frames: int | None = number(None, least=2)
    """Frames per video in evaluation instead of `video.num_frames` or `video.fps` (2603.11423: 64)."""
    max_questions: int = number(0, least=0)
    """Number of held-out questions to evaluate, from the start of the file; 0 = all."""
    every_steps: int = number(0, least=0)
    """Interval in steps of stage 2 and of its control for answering the held-out questions during training, each time
    after a checkpoint. The report compares both after equal numbers of steps; 0 = only between stages."""
    max_new_tokens: int = number(1024, least=1)
    """Maximum length of a response in tokens; decoding is greedy."""
    rollouts: int = number(0, least=0)
    """Number of responses sampled per question in addition to the greedy one, at `rollout.temperature`; their mean
    score is reported as `sampled`, with pass@k and majority@k."""
    reranker: str = ""
    """Folder `discriminator/` of a run with `discriminator.export`: the discriminator scores the sampled responses to
    closed questions, and `best@k` is the score of the response that it prefers. For rmsd_fast.evaluate only; empty =
    none."""
    parse: str = choice("strict", of=("strict", "lenient"))
    """Reading of the answers in the main score. `strict` = an answer counts only in the required format; `lenient` =
    any clear statement counts. Both scores are reported."""
    prompts_per_batch: int = number(16, least=1)
    """Number of questions per generation batch of a process."""
    samples: int = number(24, least=0)
    """Number of responses kept per student for the report's table."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
