"""Test the comparison of finished evaluations."""

from __future__ import annotations

import json

import pytest
from benchmark_records import ROWS, load, touch, write_json

from rmsd_fast import evaluate
from rmsd_fast.data.records import Question
from rmsd_fast.settings import load_settings
from rmsd_fast.stages.answer_records import answer_record, asked_hash
from rmsd_fast.stages.evaluation_checks import EvaluationError, check_predictions
from rmsd_fast.stages.evaluation_compare import Evaluation, compare_evaluations, knowledge_gain
from rmsd_fast.stages.evaluation_files import predictions_path, write_records


def write(
    path,
    scores: dict[str, float],
    *,
    frames: int = 64,
    parse: str = "strict",
    task: str = "mcq",
    benchmark: str | None = None,
    asked: str = "What?",
    **facts,
) -> str:
    """Write an evaluation of questions about 10 videos each with its predictions, and return its path."""
    records = [
        {
            **{"id": name, "task_type": task, "cluster": f"{int(name) // 2}.mp4", "groups": {"duration": "short"}},
            "asked_hash": asked_hash(Question(name, f"{asked} {name}", task)),
            **({"benchmark": benchmark} if benchmark else {}),
            **{"score": score, "strict": score, "lenient": score, "valid": True, "readable": True},
        }
        for name, score in scores.items()
    ]
    write_records(path.with_suffix(".predictions.jsonl"), records)
    own = {"parse": parse, "protocol": {"video": {"num_frames": frames}}, "benchmark": benchmark}
    path.write_text(json.dumps(own | facts))
    return str(path)


def test_differences_are_paired_and_other_questions_are_named(tmp_path, capsys):
    half = {str(i): float(i % 2) for i in range(20)}
    base = write(tmp_path / "base.json", half, benchmark="mlvu")
    better = write(tmp_path / "better.json", dict.fromkeys(map(str, range(2, 24)), 1.0), frames=16, benchmark="mlvu")
    out = tmp_path / "comparison.json"
    assert evaluate.main(["--compare", base, better, "--output", str(out)]) == 0
    (difference,) = json.loads(out.read_text())["differences"].values()
    # Of the 18 common questions, the 9 with even numbers were wrong before.
    assert difference["closed"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 18, "clusters": 9}
    assert difference["groups"]["duration"]["short"]["mean"] == difference["lenient"]["closed"]["mean"] == 0.5
    assert (difference["common"], difference["only_before"]) == (18, ["0", "1"])
    assert difference["only_after"] == ["20", "21", "22", "23"]
    text = capsys.readouterr().out
    # Eleven videos, all right: 1 / (1 + 1.96^2 / (11 * (t[21] / t[10])^2)) = 0.714.
    assert "100.0 [ 71.4, 100.0]  n=22, videos=11  +50.0 [+50.0, +50.0]" in text
    assert "2 questions are only in" in text and "not in the difference: 20, 21, 22, 23" in text
    assert "evaluated differently: video.num_frames: 16, not 64" in text
    assert f"{base}, mlvu, strict, in percent: mean 50.0\n" in text
    assert f"{better}, mlvu, lenient, in percent: mean 100.0\n" in text
    assert text.endswith("\nno comparison with the paper: 20 of 2,174 or 502 questions\n")


def test_pass_and_majority_of_samples_are_shown(tmp_path, capsys):
    base, other = (write(tmp_path / f"{name}.json", {"1": 1.0, "3": 0.0}) for name in "ab")
    predictions = tmp_path / "b.predictions.jsonl"
    samples = {"samples": {"score": [1.0, 0.0], "answers": ["A", "A"]}, "sampled": 0.5}
    records = [json.loads(line) | samples for line in predictions.read_text().splitlines()]
    write_records(predictions, records)
    assert evaluate.main(["--compare", base, other]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "@" in line]
    # The base has no samples, so there are no differences.
    assert rows == [["majority@1", "50.0"], ["majority@2", "50.0"], ["pass@1", "50.0"], ["pass@2", "100.0"]]


def test_another_reading_is_named(tmp_path, capsys):
    names = [write(tmp_path / f"{parse}.json", {"1": 1.0, "2": 0.0}, parse=parse) for parse in ("strict", "lenient")]
    assert evaluate.main(["--compare", *names]) == 0
    assert "WARNING: the evaluations read answers differently" in capsys.readouterr().out


def test_students_of_run_folders(tmp_path, capsys):
    for name, score in (("untrained", 0.0), ("stage1", 0.5), ("stage2", 1.0)):
        write(tmp_path / f"{name}.json", {"1": score, "3": score})
        (tmp_path / f"{name}.predictions.jsonl").rename(predictions_path(_folder(tmp_path), name))
    (tmp_path / "run" / "evaluation.json").write_text("{}")
    run = str(tmp_path / "run")
    assert evaluate.main(["--compare", f"{run}:stage1", run]) == 0
    text = capsys.readouterr().out
    assert "+50.0" in text
    # The student that was chosen is named, also where the user left it out.
    assert f"{run}:stage1\n" in text and f"{run}:stage2, and its difference from {run}:stage1\n" in text
    assert evaluate.main(["--compare", run, f"{run}:stage2"]) == 2
    assert f"expected different evaluations, got {run}:stage2, {run}:stage2;" in capsys.readouterr().err
    assert evaluate.main(["--compare", f"{run}:stage3", run]) == 2
    assert "expected predictions of stage3, got stage1, stage2, untrained" in capsys.readouterr().err


def _folder(tmp_path):
    (tmp_path / "run" / "predictions").mkdir(parents=True, exist_ok=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "damage",
    ["missing", "cut", "old", "other task", "other text", "other benchmark", "no .json", "other questions", "twice"],
)
def test_evaluations_that_cannot_be_compared(tmp_path, capsys, damage):
    first, second = (write(tmp_path / f"{name}.json", {"1": 1.0, "2": 0.0}) for name in "ab")
    predictions = tmp_path / "b.predictions.jsonl"
    lines = predictions.read_text()
    if damage == "missing":
        predictions.unlink()
    elif damage == "cut":
        predictions.write_text(lines[:-9])
    elif damage == "old":
        predictions.write_text(lines.replace('"strict"', '"points"'))
    elif damage == "other task":
        write(tmp_path / "b.json", {"1": 1.0, "2": 0.0}, task="ocr")
    elif damage == "other text":
        write(tmp_path / "b.json", {"1": 1.0, "2": 0.0}, asked="Where?")
    elif damage == "other benchmark":
        write(tmp_path / "b.json", {"1": 1.0, "2": 0.0}, benchmark="worldsense")
    elif damage == "no .json":
        second = str(predictions)
    elif damage == "other questions":
        write(tmp_path / "b.json", {"7": 1.0})
    else:
        second = first
    expected = {
        "missing": "b.predictions.jsonl: no such file; evaluate",
        "cut": "the evaluation cannot be read",
        "old": "evaluate again with this version",
        "other task": "got question '1', which is mcq and ocr (and 1 more)",
        "other text": "got question '1', which has another text, other options or answer (and 1 more)",
        "other benchmark": "got questions of worldsense instead of a question file",
        "no .json": "expected a file that ends with .json, or a run folder",
        "other questions": "got none; compare evaluations of the same questions",
        "twice": "expected different evaluations",
    }
    assert evaluate.main(["--compare", first, second]) == 2
    assert expected[damage] in capsys.readouterr().err


def test_the_hash_of_a_question_covers_all_that_is_asked():
    asked = {"question": "What is\n it?", "task_type": "mcq", "options": ("a", "b"), "answer": "A"}
    base = asked_hash(Question("1", **asked))
    same = {"videos": ("v.mp4",), "question": "What is it? ", "prompt": "Look. What is it?", "meta": {"a": 1}}
    assert asked_hash(Question("2", **asked | same)) == base and len(base) == 16
    others = [{"question": "Who is it?"}, {"task_type": "exact"}, {"options": ("a", "c")}, {"answer": "B"}]
    # The same words in other options.
    others += [{"options": ("a b",)}, {"options": None}, {"answer": None}]
    assert len({base, *(asked_hash(Question("1", **asked | other)) for other in others)}) == 8


def test_a_comparison_without_protocols_says_so(tmp_path, capsys):
    first, second = (write(tmp_path / f"{name}.json", {"1": 1.0, "2": 0.0}) for name in "ab")
    write(tmp_path / "b.json", {"1": 1.0, "2": 0.0}, protocol=None)
    assert evaluate.main(["--compare", first, second]) == 0
    said = capsys.readouterr().out
    assert f"evaluated differently: unknown, because {second} recorded no protocol" in said and "None" not in said


GOOD = {
    **{"id": "1", "asked_hash": "0", "task_type": "mcq", "cluster": "v", "score": 1, "strict": 0.5, "lenient": 1.0},
    **{"valid": True, "readable": True, "groups": {"a": "b"}, "benchmark": "mlvu", "sampled": 0.5},
    "samples": {"score": [1.0, 0.0], "answers": ["A", None]},
    **{"error": "x", "reason": "missing_media", "meaning": 0.0, "sampled_meaning": 1.0},
}


@pytest.mark.parametrize("name", ["id", "asked_hash", "task_type", "cluster", "score", "strict", "lenient", "valid"])
def test_predictions_without_a_field_are_refused(name):
    check_predictions([GOOD], "p.jsonl")
    with pytest.raises(EvaluationError, match=f"p.jsonl, line 2: expected .* in '{name}', got None; evaluate again"):
        check_predictions([GOOD, {key: value for key, value in GOOD.items() if key != name}], "p.jsonl")


@pytest.mark.parametrize(
    "damage",
    [
        {"id": 3},
        {"task_type": "essay"},
        {"score": 1.5},
        {"strict": "1"},
        {"lenient": True},
        {"readable": None},
        {"groups": ["a"]},
        {"groups": {"a": 1}},
        {"benchmark": "other"},
        {"meaning": None},
        {"sampled": -1},
        {"samples": {"score": [1.0]}},
        {"samples": {"score": [], "answers": []}},
        {"samples": {"score": [1.0], "answers": ["A", "B"]}},
        {"samples": {"score": [1.0], "answers": [1]}},
        {"reason": []},
    ],
)
def test_damaged_predictions_are_refused(damage):
    with pytest.raises(EvaluationError, match=f"p.jsonl, line 1: expected .* in '{next(iter(damage))}', got"):
        check_predictions([GOOD | damage], "p.jsonl")


def test_predictions_that_are_no_list_of_answers_are_refused():
    without = {name: value for name, value in GOOD.items() if name != "reason"}
    for records, words in (
        ([], "got an empty file"),
        ([[]], "line 1: expected an object, got list"),
        ([GOOD, {**GOOD, "score": 0.0}], "expected each question once, got '1' 2 times"),
        ([without], "expected both 'error' and 'reason', got one of them"),
    ):
        with pytest.raises(EvaluationError, match=words):
            check_predictions(records, "p.jsonl")


def test_arguments_that_do_not_fit(capsys):
    for arguments in (["--compare", "a.json"], ["quickstart"], ["quickstart", "--compare", "a", "b"]):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
    for output in ("eval.stage1", "eval", "eval.predictions.jsonl"):
        for arguments in (["quickstart"], ["--compare", "a.json", "b.json"]):
            with pytest.raises(SystemExit):
                evaluate.main([*arguments, "--output", output])
            assert f"--output: expected a file that ends with .json, got {output};" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(["quickstart"])
    assert "--output is missing: expected a JSON file to write" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main([])
    expected = "expected a recipe and --output or --dry-run, or --compare with two or more evaluations"
    assert expected in capsys.readouterr().err
    for arguments in (["quickstart", "--dry-run", "--output", "a.json"], ["--compare", "a", "b", "--dry-run"]):
        with pytest.raises(SystemExit):
            evaluate.main(arguments)
        assert "--dry-run" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_refused_at_the_start(tmp_path, capsys):
    folder, file = tmp_path / "folder.json", tmp_path / "file"
    folder.mkdir()
    file.write_text("x")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for output, fault in (
        (folder, "which is a folder; name a file in it"),
        (file / "a" / "b.json", f"but {file} is not a folder; check the path"),
        (link / "b.json", f"but {link} is not a folder; check the path"),
    ):
        for arguments in (["quickstart"], ["--compare", "a.json", "b.json"]):
            with pytest.raises(SystemExit) as ended:
                evaluate.main([*arguments, "--output", str(output)])
            assert ended.value.code == 2
            expected = f"--output: expected a file that can be written, got {output}, {fault}"
            assert expected in " ".join(capsys.readouterr().err.split("\n"))


def test_a_read_only_folder_is_refused_and_a_missing_one_is_not(tmp_path, monkeypatch):
    assert evaluate._why_not_writable(tmp_path / "new" / "folder" / "a.json") == ""
    # The superuser may write to every folder, so the system's answer is replaced.
    monkeypatch.setattr(evaluate.os, "access", lambda *_: False)
    assert f"{tmp_path} is read-only" in evaluate._why_not_writable(tmp_path / "new" / "a.json")


def adaptation(*scores: float, track: str = "adaptation") -> list[dict]:
    return [{"score": s, "cluster": f"{i}.mp4", "groups": {"track": track}} for i, s in enumerate(scores)]


def test_the_knowledge_gain_by_hand():
    before, after = adaptation(*[1, 0, 0, 0, 0] * 20), adaptation(*[1, 1, 1, 0, 0] * 20)
    gain = knowledge_gain(list(zip(before, after, strict=True)))
    # (60 - 20) / (100 - 20) = 50%.
    assert (gain["mean"], gain["before"], gain["after"]) == pytest.approx((0.5, 0.2, 0.6))
    assert (gain["n"], gain["clusters"]) == (100, 100)
    # Of the 80 questions that were wrong before, half are right after, and no other question has changed. The gain is
    # then a share of these 80, whose standard error is sqrt(0.5 * 0.5 / 80) = 0.0559, and 1.984 of them are 0.111.
    # One question is 1 / 80 of it.
    assert (gain["low"], gain["high"]) == pytest.approx((0.389, 0.611), abs=1 / 80)
    # What was forgotten counts against it: (20 - 40) / (100 - 40).
    lost = knowledge_gain(list(zip(adaptation(1, 1, 0, 0, 0), adaptation(1, 0, 0, 0, 0), strict=True)))
    assert lost["mean"] == pytest.approx(-1 / 3)
    # Other tracks do not count, and nothing can be gained if all was known.
    others = list(zip(adaptation(0, 0, track="perception"), adaptation(1, 1, track="perception"), strict=True))
    assert knowledge_gain(others) is None and knowledge_gain([]) is None
    assert knowledge_gain(list(zip(adaptation(0, 0), adaptation(1, 0), strict=True)) + others)["mean"] == 0.5
    assert knowledge_gain(list(zip(adaptation(1, 1), adaptation(1, 0), strict=True))) is None


def test_the_gain_is_printed_if_the_base_has_no_video(tmp_path, capsys):
    blind, seen = {"evaluate": {"without_video": True}}, {"evaluate": {"without_video": False}}

    def written(name, scores, protocol, benchmark="videommmu"):
        path = write(tmp_path / f"{name}.json", scores, benchmark=benchmark, protocol=protocol)
        records = [json.loads(line) for line in (tmp_path / f"{name}.predictions.jsonl").read_text().splitlines()]
        write_records(
            tmp_path / f"{name}.predictions.jsonl", [r | {"groups": {"track": "adaptation"}} for r in records]
        )
        return path

    half, right = ({str(i): float(i % 2 < most) for i in range(20)} for most in (1, 2))
    base, other = written("base", half, blind), written("other", right, seen)
    out = tmp_path / "c.json"
    assert evaluate.main(["--compare", base, other, "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "knowledge gain of Video-MMMU: +100.0 [+100.0, +100.0] percent (adaptation 50.0 without the video, " in text
    assert f"WITHOUT VIDEO: {base} was evaluated with evaluate.without_video=true" in text
    assert "evaluated differently: evaluate.without_video: False, not True" in text
    assert json.loads(out.read_text())["differences"][other]["knowledge_gain"]["mean"] == 1.0
    # The other way round it is not a gain, nor is it between two evaluations without videos, or on other benchmarks.
    assert evaluate.main(["--compare", other, base]) == 0
    assert "knowledge gain" not in capsys.readouterr().out
    again = written("again", right, blind)
    assert evaluate.main(["--compare", base, again]) == 0
    text = capsys.readouterr().out
    assert "knowledge gain" not in text and "the paper" not in text and text.count("WITHOUT VIDEO") == 2
    pair = [written("b2", half, blind, "mlvu"), written("o2", right, seen, "mlvu")]
    assert evaluate.main(["--compare", *pair]) == 0
    assert "knowledge gain" not in capsys.readouterr().out


def test_a_question_with_a_mark_is_the_same_one_without_its_video(tmp_path):
    """From the annotation to the gain: the video is between the words of the question."""
    touch(tmp_path / "a.mp4")
    row = ROWS["videommmu"] | {"category": "Adaptation", "question": "Watch <video> and say which."}
    file = write_json(tmp_path / "videommmu.json", [row])
    settings = load_settings("", ["data.heldout=x", "evaluate.benchmark=videommmu", "evaluate.parse=lenient"])
    evaluations = []
    for blind, response in ((True, "A"), (False, "B")):
        (question,) = load("videommmu", file, videos=not blind)
        assert ("<video>" in question.question) is not blind
        records = [answer_record(question, "c", response, settings)]
        facts = {"benchmark": "videommmu", "protocol": {"evaluate": {"without_video": blind}}}
        evaluations.append(Evaluation(str(blind), records, facts))
    gain = compare_evaluations(evaluations)["differences"]["False"]["knowledge_gain"]
    assert (gain["mean"], gain["before"], gain["after"]) == (1.0, 0.0, 1.0)
