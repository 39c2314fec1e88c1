"""Test the layout and positions of prompts, refused tokens, and agreement with the processors of the model families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from media_files import noise_frames, write_clip

from rmsd_fast.config import ModelError, SettingsError, VideoConfig
from rmsd_fast.data.media_file import MediaError
from rmsd_fast.data.preprocess import Preprocessor
from rmsd_fast.data.prompts import (
    PromptBuilder,
    PromptError,
    ResponseError,
)
from rmsd_fast.data.question_text import ANSWER_FORMAT, question_text
from rmsd_fast.data.records import Question
from rmsd_fast.data.video import Frames, MediaRequest, read_layout, read_media
from rmsd_fast.made.student import build_tiny_student
from rmsd_fast.method.answers import TASK_TYPES
from rmsd_fast.models.families.qwen3_vl import media_text
from rmsd_fast.models.students import Student, load_student

TEXTS = ["What colour is the moving square?", "<think>A red square moves.</think><answer>B</answer>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    build_tiny_student(folder / "student", texts=TEXTS)
    write_clip(folder / "a.mp4", noise_frames(9, 64, 96, seed=1), fps=4.0)
    write_clip(folder / "b.mp4", noise_frames(6, 64, 64, seed=2), fps=3.0)
    from PIL import Image

    Image.fromarray(noise_frames(1, 64, 64)[0].permute(1, 2, 0).numpy()).save(folder / "c.png")
    return folder


@pytest.fixture(scope="module")
def student(folder: Path) -> Student:
    return load_student(folder / "student", dtype="float32")


@pytest.fixture(scope="module")
def builder(student: Student) -> PromptBuilder:
    return PromptBuilder(student, VideoConfig(num_frames=3))


def test_settings_of_too_few_frames_are_refused_before_any_question(student: Student) -> None:
    with pytest.raises(SettingsError, match=r"video\.min_frames: expected at least 2"):
        PromptBuilder(student, VideoConfig(num_frames=None, fps=2.0, min_frames=1))


def _question(folder: Path, videos: Sequence[str] = "a", images: Sequence[str] = "", **changes: object) -> Question:
    question = Question(
        id="q",
        question="What colour is the square?",
        task_type="mcq",
        videos=tuple(str(folder / f"{name}.mp4") for name in videos),
        images=tuple(str(folder / f"{name}.png") for name in images),
        options=("red", "blue"),
        answer="B",
    )
    return replace(question, **changes)


def test_question_text() -> None:
    question = Question(id="q", question=" Who? ", task_type="mcq", options=("I. Newton", "someone else"))
    assert question_text(question).split("\n") == ["Who?", "A. I. Newton", "B. someone else", ANSWER_FORMAT["mcq"]]
    labelled = replace(question, options=("A. I. Newton", "B) someone else"))
    assert question_text(labelled) == question_text(question)
    # Labels in another order belong to the text, so adding letters would mislabel the options.
    assert "A. B. x\nB. A. y" in question_text(replace(question, options=("B. x", "A. y")))
    assert question_text(replace(question, task_type="open", options=None)).split("\n") == [
        "Who?",
        ANSWER_FORMAT["open"],
    ]
    assert set(ANSWER_FORMAT) == set(TASK_TYPES)


def test_media_text_announces_the_mean_time_of_each_pair() -> None:
    pixels = torch.zeros(3, 3, 64, 64, dtype=torch.uint8)
    video = Frames(pixels, (0.0, 1.5, 2.96), (2, 4, 4), "video")
    # (0 + 1.5)/2 = 0.75. The third frame has no partner and is repeated.
    block = "<|vision_start|>" + "<|video_pad|>" * 4 + "<|vision_end|>"
    assert media_text(video, Preprocessor()) == f"<0.8 seconds>{block}<3.0 seconds>{block}"
    image = Frames(pixels[:1], (), (1, 4, 6), "image")
    assert media_text(image, Preprocessor()) == "<|image_pad|>" * 6


def test_prompt_layout_types_and_positions(folder: Path, builder: PromptBuilder, student: Student) -> None:
    prompt = builder.build(_question(folder))
    tokenizer = student.tokenizer
    block = "<|vision_start|>" + "<|video_pad|>" * 6 + "<|vision_end|>"
    # The video has 9 frames at 4 Hz, and frames 0, 4 and 8 form the pairs (0, 1) and (2, 2).
    assert tokenizer.decode(prompt.input_ids) == (
        f"<|im_start|>user\n<|vision_start|><0.5 seconds>{block}<2.0 seconds>{block}<|vision_end|>"
        f"What colour is the square?\nA. red\nB. blue\n{ANSWER_FORMAT['mcq']}<|im_end|>\n<|im_start|>assistant\n"
    )
    pad = tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert torch.equal(prompt.mm_token_type_ids == 2, prompt.input_ids == pad)
    assert set(prompt.mm_token_type_ids.tolist()) == {0, 2}

    # The expected positions are computed by hand. Text counts up on all axes. A 2x3 block of tokens stays at one time
    # and spans 2 rows and 3 columns. The text after the block continues from the longer side of the block.
    first = int((prompt.input_ids == pad).nonzero()[0])
    assert prompt.position_ids[:, :first].tolist() == [list(range(first))] * 3
    block_positions = prompt.position_ids[:, first : first + 6]
    assert (block_positions - first).tolist() == [[0] * 6, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    assert prompt.position_ids[:, first + 6].tolist() == [first + 3] * 3
    assert prompt.next_position == len(prompt.input_ids) - 2 * 3
    assert prompt.input_ids.dtype == prompt.position_ids.dtype == torch.int64


def test_prompts_name_all_vision_ids(folder: Path, builder: PromptBuilder, student: Student) -> None:
    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    # The vision ids do not depend on the media of the prompt.
    for question in (_question(folder), _question(folder, videos="")):
        assert builder.build(question).vision_ids == tuple(student.tokenizer.convert_tokens_to_ids(names))


def test_prompt_of_a_benchmark_is_shown_verbatim(folder: Path, student: Student) -> None:
    builder = PromptBuilder(student, VideoConfig(num_frames=2), prompt="benchmark")
    question = _question(folder, "a", "c", prompt="Watch this.\nA. red\nBest option: (", system="Be brief.")
    text = student.tokenizer.decode(builder.build(question).input_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|vision_start|>")
    assert text.endswith("<|vision_end|>Watch this.\nA. red\nBest option: (<|im_end|>\n<|im_start|>assistant\n")
    assert "blue" not in text and "Reply as" not in text
    # The marks in the prompt decide, and not those in the question.
    marked = replace(question, question="<video>, then <image>?", prompt="First <image>, then <video>.")
    prompt = builder.build(marked)
    assert [frames.kind for frames in prompt.media] == ["image", "video"]
    own = PromptBuilder(student, VideoConfig(num_frames=2)).build(marked)
    assert [frames.kind for frames in own.media] == ["video", "image"]
    # The length that is planned from the headers is that of this prompt.
    builder.build(marked, max_tokens=len(prompt.input_ids))
    with pytest.raises(PromptError, match=f"a prompt of {len(prompt.input_ids)} tokens exceeds"):
        builder.build(marked, max_tokens=len(prompt.input_ids) - 1)
    with pytest.raises(PromptError, match="expected a prompt of its benchmark, got none; set evaluate.benchmark"):
        builder.build(_question(folder))


def test_prompt_from_previously_decoded_media_is_the_same(folder: Path, builder: PromptBuilder) -> None:
    prompt = builder.build(_question(folder, "ab", "c"))
    again = builder.build_from_media(prompt.question, prompt.media)
    assert torch.equal(prompt.input_ids, again.input_ids) and torch.equal(prompt.position_ids, again.position_ids)
    assert [frames.kind for frames in prompt.media] == ["video", "video", "image"]


def test_unusable_media_and_texts_are_refused(folder: Path, builder: PromptBuilder) -> None:
    with pytest.raises(MediaError, match=r"nothing\.mp4"):
        builder.build(_question(folder, videos=["nothing"]))
    with pytest.raises(PromptError, match=r"question 'q'.*<\|video_pad\|>"):
        builder.build(_question(folder, question="Is <|video_pad|> here?"))
    with pytest.raises(PromptError, match=r"<\|im_end\|>"):
        builder.build(_question(folder, options=("red<|im_end|>", "blue")))


def test_answers_past_the_end_of_the_video_are_refused(folder: Path, builder: PromptBuilder) -> None:
    """The videos last 2.25 s, and the records state no duration."""
    asked = {"task_type": "temporal", "options": None}
    assert builder.build(_question(folder, answer="1 to 3", **asked)).media[0].duration_s == 2.25
    with pytest.raises(
        PromptError, match=r"q: the answer is 100 to 140; the video has a duration of 2\.25 s: write sec"
    ):
        builder.build(_question(folder, answer="100 to 140", **asked))
    # With two videos it is unknown which video the answer refers to.
    builder.build(_question(folder, "ab", answer="100 to 140", **asked))


def test_long_prompts_are_refused_without_decoding(folder: Path, student: Student) -> None:
    class Media:
        """Count the decoded media."""

        def __init__(self) -> None:
            self.decoded, self.layout = 0, read_layout

        def read(self, request: MediaRequest) -> Frames:
            self.decoded += 1
            return read_media(request)

    media = Media()
    builder = PromptBuilder(student, VideoConfig(num_frames=3), media)
    for videos, images in (("ab", "c"), ("", "cc"), ("a", "")):
        question = _question(folder, videos, images)
        length = len(builder.build(question).input_ids)
        decoded = media.decoded
        with pytest.raises(PromptError, match=rf"a prompt of {length} tokens exceeds data\.max_prompt_tokens"):
            builder.build(question, max_tokens=length - 1)
        assert media.decoded == decoded
        assert len(builder.build(question, max_tokens=length).input_ids) == length


def test_parts_of_videos_keep_the_times_of_the_file(folder: Path, builder: PromptBuilder) -> None:
    prompt = builder.build(_question(folder, "aa", spans=(None, (1.0, None))))
    # The video has 9 frames at 4 Hz. The part from 1 s has frames 4 to 8, of which frames 4, 6 and 8 are taken.
    assert [frames.timestamps_s for frames in prompt.media] == [(0.0, 1.0, 2.0), (1.0, 1.5, 2.0)]
    assert torch.equal(prompt.media[0].pixels[2], prompt.media[1].pixels[2])


WHOLE = """{%- for m in messages -%}<|im_start|>{{ m.role }}
{% for part in m.content -%}
{%- if part.type == 'text' -%}{{ part.text }}
{%- else -%}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
OPENING{%- endif -%}"""


def _with_template(folder: Path, template: str) -> Student:
    student = load_student(folder / "student", dtype="float32")
    student.tokenizer.chat_template = template
    return student


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content[-1].text }}{% endfor %}", "expected the first text once and unchanged"),
        (WHOLE.replace("OPENING", "<think>\\n\\n</think>\\n\\n"), "expected a response to begin with nothing or"),
        (WHOLE.replace("OPENING", "Sure! "), "expected a response to begin with nothing or with <think>"),
        (WHOLE.replace("<|im_end|>", "</s>").replace("OPENING", ""), "and to end it with <|im_end|>"),
        (WHOLE.replace("OPENING", "{{ strftime_now('%Y') }}"), "it writes the current date"),
        ("{{ raise_exception('text only') }}", "it cannot render a question (text only"),
        ("{{ raise_exception('') }}", "it cannot render a question (TemplateError)"),
        *(
            (WHOLE.replace("OPENING", "").replace("part.text", f"part.text{change}"), "expected the first text once")
            for change in (
                " | e", " | trim", "[:4000]", " | lower", " | striptags", " | replace('  ', ' ')", " | wordwrap(200)",
                " | replace('\"', '')", ".split('\n')[0]", ".encode('ascii', 'ignore').decode()", " | tojson",
            )
        ),
        # The fault shows only with a system turn, or only without a system turn.
        (
            WHOLE.replace("OPENING", "").replace("part.text", "part.text[:9] if m.role == 'system' else part.text"),
            "expected the system text once and unchanged in a prompt with a system turn, got it 0 times",
        ),
        (
            WHOLE.replace("OPENING", "").replace("part.text", "part.text if messages[0].role == 'system' else ''"),
            "expected the first text once and unchanged in a prompt without a system turn, got it 0 times",
        ),
        (
            WHOLE.replace("OPENING", "{{ '<think>' if messages[0].role == 'system' else '' }}"),
            "it renders a question differently if there is a system turn",
        ),
        (
            WHOLE.replace("OPENING", "").replace("m.content", "m.content | sort(attribute='type')"),
            "it changes the order of media",
        ),
    ],
)  # fmt: skip
def test_invalid_chat_templates_are_refused(folder: Path, template: str, message: str) -> None:
    with pytest.raises(ModelError) as caught:
        PromptBuilder(_with_template(folder, template), VideoConfig(num_frames=2))
    assert message in str(caught.value) and "Qwen3-VL" in str(caught.value)


def test_a_think_tag_opened_by_the_template_is_not_repeated(folder: Path, builder: PromptBuilder) -> None:
    """The prompt of Thinking models ends with <think>, so a response starts after the tag."""
    assert builder.opening == ""
    thinking = PromptBuilder(
        _with_template(folder, WHOLE.replace("OPENING", "{{ '<think>\\n' }}")), VideoConfig(num_frames=3)
    )
    assert thinking.opening == "<think>\n"
    prompt = thinking.build(_question(folder))
    assert thinking.tokenizer.decode(prompt.input_ids).endswith("<|im_start|>assistant\n<think>\n")
    text = "<think>\nIt is red.\n</think>\n<answer>A</answer>"
    ids = thinking.encode_response(text)
    assert thinking.tokenizer.decode(ids) == "It is red.\n</think>\n<answer>A</answer><|im_end|>"
    # The texts of responses stay complete, so that formats, scores and files do not depend on the template.
    assert thinking.decode_response(ids) == text
    joined = thinking.tokenizer.decode(torch.cat([prompt.input_ids, ids]))
    assert joined.count("<think>") == joined.count("Reply as <think>") + 1
    # Nothing is lost if the line break is missing.
    ids = thinking.encode_response("<think>It is red.</think><answer>A</answer>")
    assert thinking.tokenizer.decode(ids) == "It is red.</think><answer>A</answer><|im_end|>"
    with pytest.raises(ResponseError, match="does not begin with it") as caught:
        thinking.encode_response("<answer>A</answer>")
    assert caught.value.reason == "no_think"


def test_surrounding_white_space_is_stripped_from_a_response(folder: Path, builder: PromptBuilder) -> None:
    """Servers of Thinking models send a leading line break, which the student must not learn and D must not see."""
    thinking = PromptBuilder(_with_template(folder, WHOLE.replace("OPENING", "{{ '<think>\n' }}")), VideoConfig())
    text = "<think>\nWhite. \n</think>\n\n<answer>A</answer>"
    for student in (thinking, builder):
        expected = student.encode_response(text)
        for sent in (f"\n{text}", f"{text}\n \n", f" \n{text}\u00a0"):
            assert torch.equal(student.encode_response(sent), expected)
        assert student.decode_response(expected) == text


def test_media_replace_their_marks_and_the_system_text_comes_first(folder: Path, builder: PromptBuilder) -> None:
    question = _question(folder, "a", "cc", question="Is <image> in <video> or in <image>?", system="Be brief.")
    prompt = builder.build(question)
    text = builder.tokenizer.decode(prompt.input_ids)
    image = "<|vision_start|>" + "<|image_pad|>" * int((prompt.mm_token_type_ids == 1).sum() // 2) + "<|vision_end|>"
    start, middle, end = text.split(image)
    assert start == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nIs "
    assert middle.startswith(" in <|vision_start|><") and middle.endswith("<|vision_end|> or in ")
    assert end.startswith("?\nA. red\nB. blue\nReply as")
    assert [frames.kind for frames in prompt.media] == ["image", "video", "image"]
    # Marks in options count too.
    shown = _question(folder, "", "cc", question="Which?", options=("<image>", "<image>"))
    text = builder.tokenizer.decode(builder.build(shown).input_ids)
    assert text.startswith("<|im_start|>user\nWhich?\nA. <|vision_start|>") and "<|vision_end|>\nB. <|vision" in text


def test_responses_end_with_the_end_token_and_decode_to_the_text(builder: PromptBuilder) -> None:
    text = "<think>It moves 12.5 px, é 漢 \n twice.</think><answer>12.5 to 20.0</answer>"
    ids = builder.encode_response(text)
    assert ids.dtype == torch.int64 and ids[-1] == builder.eos_id and (ids == builder.eos_id).sum() == 1
    assert builder.decode_response(ids) == text
    # The end token is missing because the response was cut off, or more tokens follow it.
    assert builder.decode_response(ids[:-1]) == text
    assert builder.decode_response(torch.cat([ids, ids])) == text
    assert builder.encode_response("").tolist() == [builder.eos_id]


@pytest.mark.parametrize("token", ["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|im_end|>", "<|endoftext|>"])
def test_special_tokens_in_responses_are_refused(builder: PromptBuilder, token: str) -> None:
    with pytest.raises(ResponseError) as caught:
        builder.encode_response(f"<think>{token}</think><answer>B</answer>")
    assert token in str(caught.value) and caught.value.reason == "special_token"


def test_lone_surrogates_are_refused(builder: PromptBuilder) -> None:
    with pytest.raises(ResponseError, match="surrogate") as caught:
        builder.encode_response("a\ud800b")
    assert caught.value.reason == "not_unicode"
    question = Question(id="q", question="a\ud800b", task_type="open")
    with pytest.raises(PromptError, match="surrogate"):
        builder.build_from_media(question, ())


def test_banned_ids_are_all_special_ids_except_the_end_token(student: Student, builder: PromptBuilder) -> None:
    banned = set(builder.banned_ids.tolist())
    names = ["<|endoftext|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"]
    names += ["<|image_pad|>", "<|video_pad|>"]
    assert banned == {student.tokenizer.convert_tokens_to_ids(name) for name in names}
    assert builder.eos_id == student.tokenizer.convert_tokens_to_ids("<|im_end|>") == student.eos_id
    # The tags of the answer format are not banned.
    assert not banned & set(builder.encode_response("<think>x</think><answer>B</answer>").tolist())


def test_ids_beyond_the_tokenizer_are_banned(folder: Path) -> None:
    student = load_student(folder / "student", dtype="float32")
    rows = len(student.tokenizer)
    student.model.config.text_config.vocab_size = rows + 3
    banned = PromptBuilder(student, VideoConfig()).banned_ids.tolist()
    assert banned[-3:] == [rows, rows + 1, rows + 2]


ORACLE = """
import json, warnings; warnings.filterwarnings("ignore")
from transformers import AutoProcessor
from transformers.video_utils import VideoMetadata
job = torch.load(sys.argv[1])
processor = AutoProcessor.from_pretrained(job["folder"])
out = []
for case in job["cases"]:
    messages = case["messages"]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    metadata = [VideoMetadata(total_num_frames=total, fps=fps, frames_indices=list(indices))
                for total, fps, indices in case["metadata"]]
    got = processor(text=[text], videos=case["videos"] or None, images=case["images"] or None,
                    video_metadata=metadata or None, do_sample_frames=False, do_resize=False)
    out.append((got["input_ids"][0], got["mm_token_type_ids"][0]))
print(json.dumps(out))
"""


def _messages(question: Question) -> list[dict]:
    text = question_text(question)
    if question.system:
        before, after = text.split("<image> in <video>")
        content = [before, "image", " in ", "video", after]
        parts = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in content]
        return [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": parts},
        ]
    kinds = [{"type": "video"}] * len(question.videos) + [{"type": "image"}] * len(question.images)
    return [{"role": "user", "content": [*kinds, {"type": "text", "text": text}]}]


def test_equal_to_the_processor_of_transformers(
    folder: Path, builder: PromptBuilder, tmp_path: Path, run_with_torchvision
) -> None:
    questions = [
        _question(folder),
        _question(folder, "", "c", task_type="spatial", options=None),
        _question(folder, "ab", "cc", task_type="temporal", options=None),
        _question(folder, "b", "c", question="Is <image> in <video>?", system="Be brief."),
    ]
    sources = {"a": (9, 4.0, (0, 4, 8)), "b": (6, 3.0, (0, 2, 5))}
    prompts, cases = [], []
    for question in questions:
        prompt = builder.build(question)
        prompts.append(prompt)
        cases.append(
            {
                "messages": _messages(question),
                "videos": [frames.pixels for frames in prompt.media if frames.kind == "video"],
                "images": [frames.pixels[0] for frames in prompt.media if frames.kind == "image"],
                "metadata": [sources[Path(path).stem] for path in question.videos],
            }
        )
    torch.save({"folder": str(folder / "student"), "cases": cases}, tmp_path / "job.pt")
    theirs = json.loads(run_with_torchvision(ORACLE, str(tmp_path / "job.pt")))
    for prompt, (ids, types) in zip(prompts, theirs, strict=True):
        assert prompt.input_ids.tolist() == ids
        assert prompt.mm_token_type_ids.tolist() == types


def test_pieces_of_a_response(builder) -> None:
    text = "<think>Ein roter Würfel 漢字 🎬</think>"
    ids = builder.encode_response(text)
    pieces = builder.pieces(ids)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(tokens for _, tokens in pieces) == len(ids) and pieces[-1] == ("", 1)
    assert all("\ufffd" not in piece for piece, _ in pieces) and len(pieces) > 10
    # A response that was cut in a character keeps its tokens.
    cut = builder.pieces(builder._encode("漢")[:1])
    assert sum(tokens for _, tokens in cut) == 1
