"""Collect answers from a real vLLM server, and train on the pool.

The teacher is the quickstart's tiny Qwen3-VL after 200 steps of stage 1 on generated clips. Training has shown it
videos, and the collector sends frames as pictures, which the teacher has never seen. About half of its answers are
valid, and few are right. The tests therefore check requests, pool and training, but not the quality of the answers.

The server runs with the Python of RMSD_VLLM_PYTHON, or with this one if vLLM is installed (`make test-vllm`).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from collect_runs import answers
from train_runs import MINI, SIX_TASKS, environment, metrics, only_run, run_train
from transformers import AutoTokenizer
from vllm_server import VllmServer

from rmsd_fast.data.chat_template import IMAGE_PAD
from rmsd_fast.data.question_text import question_text
from rmsd_fast.data.records import load_questions

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]

CONTEXT, MOST_PICTURES, QUESTIONS = 2048, 8, 12
TEACHER = [
    *SIX_TASKS[:3],
    *("stages=[sft]", "evaluate.rollouts=0", "evaluate.max_new_tokens=2", "evaluate.prompts_per_batch=12"),
    *("made.train_clips=24", "made.heldout_clips=4", "made.student_layers=2", "data.cache_mib=16"),
    *("sft.steps=200", "sft.batch_size=8", "sft.warmup_steps=10"),
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> SimpleNamespace:
    """Train the teacher. Return its folder, the folder of made files, and the files of questions."""
    folder = tmp_path_factory.mktemp("teacher")
    arguments = ["quickstart", *TEACHER, f"output={folder / 'runs'}", f"made.folder={folder / 'made'}"]
    done = run_train(arguments, timeout_s=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = (path.parent for path in (folder / "made").glob("*/made.json"))
    questions = folder / "questions.jsonl"
    questions.write_text("".join((made / "train.jsonl").read_text().splitlines(keepends=True)[:QUESTIONS]))
    export = only_run(folder / "runs") / "stage1"
    return SimpleNamespace(export=export, made=made, questions=questions, folder=folder)


@pytest.fixture(scope="module")
def server(teacher):
    """Serve the teacher with room for the frames of one question."""
    limits = [
        "--max-model-len",
        str(CONTEXT),
        "--limit-mm-per-prompt",
        json.dumps({"image": MOST_PICTURES, "video": 1}),
    ]
    # By default, the model's processor enlarges pictures to 65,536 pixels. The clips have 4,096 pixels per frame, and
    # the enlarged frames are so unlike training that all answers are rows of dots.
    size = ["--mm-processor-kwargs", json.dumps({"size": {"shortest_edge": 4096, "longest_edge": 16777216}})]
    # Without compilation, the start takes half of the time.
    engine = ["--dtype", "float32", "--max-num-seqs", "16", "--enforce-eager"]
    with VllmServer(teacher.export, "tiny", teacher.folder / "server.log", *limits, *size, *engine) as server:
        yield server


@pytest.fixture(scope="module")
def collect(teacher, server):
    """Run the program with this server. Return its exit code, output, and the number of requests that it sent."""

    def run(questions: Path, out: Path, *arguments: str) -> tuple[int, str, int]:
        before = server.requests()
        settings = ["collect.max_tokens=48", "video.num_frames=8", "data.cache_mib=16", "collect.timeout_s=120"]
        settings += [f"data.media_root={teacher.made}", "collect.temperature=0.8"]
        command = [sys.executable, "-m", "rmsd_fast.collect", str(questions), "--recipe", "vllm", "--out", str(out)]
        command += ["--endpoint", server.url, "--model", "tiny", "--k", "4", *settings, *arguments]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr, server.requests() - before

    return run


@pytest.fixture(scope="module")
def pool(teacher, collect) -> Path:
    """Collect 4 answers to each question."""
    out = teacher.folder / "pool.jsonl"
    code, output, requests = collect(teacher.questions, out)
    assert code == 0, output
    assert requests == QUESTIONS, output
    return out


def write_lines(path: Path, *records: dict) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def records_of(teacher) -> list[dict]:
    return [json.loads(line) for line in teacher.questions.read_text().splitlines()]


def test_each_question_has_four_answers(teacher, pool):
    questions, collected = load_questions(teacher.questions, media_root=teacher.made), answers(pool)
    assert set(collected) == {(question.id, k) for question in questions for k in range(4)}
    reasons = Counter(answer.finish_reason for answer in collected.values())
    assert set(reasons) <= {"stop", "length"} and reasons["stop"] > reasons["length"], reasons
    assert all(answer.model == "tiny" for answer in collected.values())
    # The answers of one request are different samples.
    texts = [{collected[question.id, k].text for k in range(4)} for question in questions]
    assert sum(len(row) > 1 for row in texts) >= QUESTIONS / 2, texts
    valid = sum(answer.valid for answer in collected.values())
    assert valid >= 0.3 * len(collected), Counter(answer.reason for answer in collected.values())


def test_the_server_sees_the_prompt_of_the_student_with_all_frames(teacher, pool):
    """The number of prompt tokens is exact: the text of the prompt, and 2x2 vision tokens for each of the 8 frames."""
    tokenizer, collected = AutoTokenizer.from_pretrained(teacher.export), answers(pool)
    for question in load_questions(teacher.questions, media_root=teacher.made):
        frames = [({"type": "text", "text": f"<{second:.1f} seconds>"}, {"type": "image"}) for second in range(8)]
        content = [*(part for pair in frames for part in pair), {"type": "text", "text": question_text(question)}]
        turns = [{"role": "user", "content": content}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        expected = len(tokenizer(prompt.replace(IMAGE_PAD, 4 * IMAGE_PAD))["input_ids"])
        usage = collected[question.id, 0].usage
        assert usage["prompt_tokens"] == expected
        assert 4 <= usage["completion_tokens"] <= 4 * 48
        assert [collected[question.id, k].usage for k in (1, 2, 3)] == [{"with": 0}] * 3


def test_a_second_collection_sends_nothing(teacher, collect, pool):
    before = pool.read_bytes()
    code, output, requests = collect(teacher.questions, pool)
    assert (code, requests) == (0, 0), output
    assert pool.read_bytes() == before


def test_a_larger_k_collects_the_further_answers(teacher, collect, pool, tmp_path):
    out, few = tmp_path / "pool.jsonl", write_lines(tmp_path / "few.jsonl", *records_of(teacher)[:2])
    lines = pool.read_text().splitlines(keepends=True)
    ids = {record["id"] for record in records_of(teacher)[:2]}
    out.write_text("".join(line for line in lines if json.loads(line)["id"] in ids))
    code, output, requests = collect(few, out, "collect.k=6")
    assert (code, requests) == (0, 2), output
    assert set(answers(out)) == {(name, k) for name in ids for k in range(6)}


def test_rescoring_after_a_correction(teacher, collect, pool, tmp_path):
    out, records = tmp_path / "pool.jsonl", {record["id"]: record for record in records_of(teacher)}
    out.write_bytes(pool.read_bytes())
    closed = [answer for answer in answers(pool).values() if records[answer.id]["task_type"] in ("mcq", "numeric")]
    wrong = next(answer for answer in closed if answer.valid and answer.quality == 0)
    records[wrong.id]["answer"] = re.search("<answer>(.*?)</answer>", wrong.text)[1]
    code, output, requests = collect(write_lines(tmp_path / "q.jsonl", *records.values()), out, "--rescore")
    assert (code, requests) == (0, 0), output
    assert answers(out)[wrong.id, wrong.k].quality == 1


def test_whole_videos_as_base64(teacher, collect, tmp_path):
    few, out = write_lines(tmp_path / "few.jsonl", *records_of(teacher)[:3]), tmp_path / "pool.jsonl"
    code, output, requests = collect(few, out, "collect.video_as=base64")
    assert (code, requests) == (0, 3), output
    assert len(answers(out)) == 12
    assert all(answer.sampling["frames"] == "base64" for answer in answers(out).values())


def test_a_prompt_that_is_too_long(teacher, collect, tmp_path):
    first, second = records_of(teacher)[:2]
    few = write_lines(tmp_path / "few.jsonl", first, second | {"question": "What is red? " * 2000})
    code, output, requests = collect(few, tmp_path / "pool.jsonl")
    assert (code, requests) == (1, 2), output
    assert {answer.id for answer in answers(tmp_path / "pool.jsonl").values()} == {first["id"]}
    failed = json.loads((tmp_path / "pool.failed.jsonl").read_text())
    assert (failed["id"], failed["k"], failed["reason"]) == (second["id"], [0, 1, 2, 3], "context_too_long")
    assert f"maximum context length is {CONTEXT} tokens" in failed["error"] and "serve more context" in failed["todo"]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("collect.model=[nobody]", "collect.model: .*The model `nobody` does not exist.*; set it to a name that"),
        ("collect.max_tokens=4096", "max_tokens=4096 cannot be greater.*; lower .* collect.max_tokens"),
        ("collect.video_as=file", "start the server with --allowed-local-media-path"),
        ("collect.temperature=3", "temperature must be in .*; change the setting that the server names"),
    ],
)
def test_settings_that_the_server_rejects(teacher, collect, tmp_path, override, says):
    few = write_lines(tmp_path / "few.jsonl", *records_of(teacher)[:3])
    code, output, _ = collect(few, tmp_path / "pool.jsonl", override)
    assert code == 2 and re.search(says, output), output
    assert "still missing: 12 answers" in output and not (tmp_path / "pool.failed.jsonl").exists()


def test_more_pictures_than_the_server_accepts(teacher, collect, tmp_path):
    first, *others = records_of(teacher)
    second = next(record for record in others if record["videos"] != first["videos"])
    both = {"videos": first["videos"] + second["videos"], "question": f"<video><video>{first['question']}"}
    del first["duration"]
    code, output, requests = collect(write_lines(tmp_path / "q.jsonl", first | both), tmp_path / "pool.jsonl")
    assert (code, requests) == (2, 1), output
    assert "At most 8 image(s)" in output and "lower video.num_frames, or raise" in output


def test_training_reads_the_pool(teacher, pool, tmp_path):
    """The student is the untrained model that the teacher was trained from. Nothing is generated."""
    (student,) = teacher.made.glob("student-*")
    files = [f"data.train={teacher.questions}", f"data.heldout={teacher.made / 'heldout.jsonl'}"]
    files += [f"teacher.pool={pool}", f"data.media_root={teacher.made}", f"model.path={student}", "made.enabled=false"]
    mini = [setting for setting in MINI if not setting.startswith("made.")]
    done = run_train(["quickstart", *mini, f"output={tmp_path / 'runs'}", *files, "teacher.parse=natural"])
    assert done.returncode == 0, done.stderr[-3000:]
    run = only_run(tmp_path / "runs")
    statistics, collected = json.loads((run / "teacher.json").read_text()), answers(pool).values()
    everything = statistics["all"]
    assert not statistics["teacher_simulated"]
    assert (everything["questions"], everything["responses"]) == (QUESTIONS, 4 * QUESTIONS)
    assert everything["valid_share"] == pytest.approx(sum(answer.valid for answer in collected) / len(collected))
    assert [(line["stage"], line["step"]) for line in metrics(run)][-1] == ("distill", 5)
