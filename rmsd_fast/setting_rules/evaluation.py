"""Check combinations of settings that evaluations read."""

from __future__ import annotations

from rmsd_fast.config import (
    JUDGED,
    OF_IMAGES,
    REQUEST_FIELDS,
    SUBTITLED,
    JudgeConfig,
    MadeConfig,
    RunConfig,
    SettingsError,
)
from rmsd_fast.method.answers import TASK_TYPES

# vLLM replaces lower temperatures by this one.
LEAST_TEMPERATURE = 0.01


def check_evaluated(settings: RunConfig) -> None:
    """Check settings of evaluations. The messages name settings that rmsd_fast.evaluate reads.

    Raises:
        SettingsError: two settings conflict; the message says which one to change.
    """
    if settings.evaluate.prompt == "benchmark" and not settings.evaluate.benchmark:
        raise SettingsError(
            "evaluate.prompt=benchmark: expected evaluate.benchmark, since only questions of a benchmark have its "
            "prompt, got none; set evaluate.benchmark, or evaluate.prompt=rmsd"
        )
    _check_reranker(settings)
    _check_judge(settings)
    _check_subtitles(settings)
    evaluate = settings.evaluate
    if evaluate.engine == "vllm" and evaluate.rollouts:
        check_temperature(settings.rollout.temperature, "evaluate.engine", evaluate.engine)
    if evaluate.engine != "hf" and settings.model.quantize != "none":
        raise SettingsError(
            "evaluate.engine: expected hf with model.quantize, since vLLM would answer with weights that are not "
            f"quantized, got {evaluate.engine} with model.quantize={settings.model.quantize}; set evaluate.engine=hf, "
            "or model.quantize=none to use the merged weights of a quantized run"
        )
    if evaluate.without_video and (not evaluate.benchmark or evaluate.benchmark in OF_IMAGES):
        raise SettingsError(
            "evaluate.without_video: expected a benchmark about videos, got "
            f"evaluate.benchmark={evaluate.benchmark or 'empty'}; set evaluate.without_video=false"
        )
    video = settings.video
    if (video.num_frames is None) == (video.fps is None):
        raise SettingsError(
            "video.num_frames and video.fps cannot both be set: use video.num_frames=null with video.fps=2, "
            f"or video.fps=null with video.num_frames=16 (got {video.num_frames} and {video.fps})"
        )
    for low, high in (
        ("min_frames", "max_frames"),
        ("min_video_pixels", "max_video_pixels"),
        ("min_image_pixels", "max_image_pixels"),
    ):
        least, most = getattr(video, low), getattr(video, high)
        if least > most:
            raise SettingsError(f"video.{low}={least}: expected at most video.{high}={most}; change one of the two")
    _check_made(settings.made)


def check_temperature(temperature: float, setting: str, engine: str) -> None:
    """Raise SettingsError for a temperature that vLLM would replace. `engine`, a value of `setting`, uses vLLM."""
    if temperature < LEAST_TEMPERATURE:
        raise SettingsError(
            f"rollout.temperature: expected {LEAST_TEMPERATURE:g} or more with {setting}={engine}, since vLLM "
            f"samples at no lower one, got {temperature:g}; raise it, or set {setting}=hf"
        )


def refuse_evaluation_only(settings: RunConfig) -> None:
    """Raise SettingsError for what only rmsd_fast.evaluate does: rank or judge, ask without videos, or use vLLM."""
    if settings.evaluate.engine != "hf":
        raise SettingsError(
            "evaluate.engine: expected hf in training, whose evaluations use the model on its device, got "
            f"{settings.evaluate.engine}; leave it out, and evaluate the run's export/ with it"
        )
    if settings.evaluate.without_video:
        raise SettingsError(
            "evaluate.without_video: expected false in training, whose report would show the scores as those with "
            "videos, got true; leave it out, and evaluate the run's export/ with it"
        )
    if settings.evaluate.judge.endpoint:
        raise SettingsError(
            "evaluate.judge.endpoint: expected none in training, since only rmsd_fast.evaluate asks a judge, got "
            f"{settings.evaluate.judge.endpoint}; leave it out, and evaluate the run's export/ with it"
        )
    if settings.evaluate.reranker:
        raise SettingsError(
            "evaluate.reranker: expected none in training, since only rmsd_fast.evaluate ranks responses, got "
            f"{settings.evaluate.reranker}; leave it out, and evaluate the run's export/ with it"
        )


def _check_reranker(settings: RunConfig) -> None:
    evaluate = settings.evaluate
    if not evaluate.reranker:
        return
    if evaluate.rollouts < 2:
        raise SettingsError(
            "evaluate.reranker: expected evaluate.rollouts of 2 or more, the sampled responses that it chooses from, "
            f"got {evaluate.rollouts}; set e.g. evaluate.rollouts=8"
        )
    # An end token is appended to truncated responses.
    check_room(settings, evaluate.max_new_tokens + 1, "a response of evaluate.max_new_tokens and its end token")


def _check_judge(settings: RunConfig) -> None:
    evaluate = settings.evaluate
    if not evaluate.judge.endpoint:
        return
    if evaluate.benchmark not in JUDGED:
        raise SettingsError(
            f"evaluate.judge.endpoint: expected a benchmark with judged answers ({', '.join(JUDGED)}), got "
            f"evaluate.benchmark={evaluate.benchmark or 'empty'}; leave the judge out"
        )
    check_judge_model(evaluate.judge, "evaluate.judge", "the evaluation")
    if evaluate.parse != "lenient":
        raise SettingsError(
            "evaluate.parse: expected lenient with evaluate.judge, since a judge reads answers in any form, got "
            f"{evaluate.parse}; set evaluate.parse=lenient"
        )
    if evaluate.rollouts:
        raise SettingsError(
            "evaluate.rollouts: expected 0 with evaluate.judge, since only greedy answers are judged, got "
            f"{evaluate.rollouts}; leave one of the two out"
        )


def check_judge_model(judge: JudgeConfig, section: str, program: str) -> None:
    """Raise SettingsError if a judge has no model, or if its `extra_body` has a field of each request.

    `section` and `program` name the settings and what sends the requests in the messages.
    """
    if not judge.model:
        raise SettingsError(f"{section}.model: expected the name of a model, got nothing; set it")
    for name in judge.extra_body:
        if name in REQUEST_FIELDS:
            raise SettingsError(
                f"{section}.extra_body: expected other fields, got {name!r}, which {program} sets; remove it"
            )


def _check_subtitles(settings: RunConfig) -> None:
    evaluate = settings.evaluate
    if not evaluate.subtitles:
        return
    if evaluate.benchmark not in SUBTITLED:
        raise SettingsError(
            f"evaluate.subtitles: expected a benchmark with subtitles ({', '.join(SUBTITLED)}), got "
            f"evaluate.benchmark={evaluate.benchmark or 'empty'}; set evaluate.subtitles=false"
        )
    if evaluate.without_video:
        raise SettingsError(
            "evaluate.subtitles: expected false with evaluate.without_video, since subtitles are those of the shown "
            "frames, got true; leave one of the two out"
        )
    if evaluate.prompt != "benchmark":
        raise SettingsError(
            "evaluate.subtitles: expected evaluate.prompt=benchmark, whose prompt has a place for them, got "
            f"evaluate.prompt={evaluate.prompt}; set evaluate.prompt=benchmark"
        )


def _check_made(made: MadeConfig) -> None:
    if not made.tasks or len(set(made.tasks)) < len(made.tasks) or not set(made.tasks) <= set(TASK_TYPES):
        raise SettingsError(
            f"made.tasks: expected some of {list(TASK_TYPES)}, each at most once, got {made.tasks}; "
            "set e.g. made.tasks=[temporal,open]"
        )
    if made.questions_per_clip > len(made.tasks):
        raise SettingsError(
            f"made.questions_per_clip: expected at most {len(made.tasks)}, the number of made.tasks, since the "
            f"questions about a clip have different task types, got {made.questions_per_clip}; set "
            f"made.questions_per_clip={len(made.tasks)}"
        )
    if made.teacher == "blind" and made.source != "clips":
        raise SettingsError(
            "made.teacher=blind: expected made.source=clips, since the teacher errs on contents of generated clips, "
            f"got made.source={made.source}; choose another made.teacher"
        )


def check_room(settings: RunConfig, response: int, what: str) -> None:
    """Raise SettingsError if the longest prompt and a response of `response` tokens do not fit one forward pass.

    `what` names the response in the message.
    """
    longest = settings.data.max_prompt_tokens + response
    if settings.micro_tokens < longest:
        raise SettingsError(
            f"micro_tokens: expected room for data.max_prompt_tokens={settings.data.max_prompt_tokens} and {what} "
            f"({response} tokens) together, {longest}, got {settings.micro_tokens}; raise it, or lower the other two"
        )
