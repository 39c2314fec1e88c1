"""Test the verdicts of CUDA records for each goal of bench/core/goals.py."""

from __future__ import annotations

from cuda_records import bench_cases, head_record, step_record


def verdicts_of(record: dict) -> list[tuple[str, str]]:
    from bench.core.goals import verdicts

    own = f"{record['bench']} {record['case']}"
    return [(v.status, v.what) for v in verdicts([record], "cuda") if v.where == own]


def statuses(record: dict) -> list[str]:
    return [status for status, _ in verdicts_of(record)]


def test_goals_of_the_heads():
    loss = head_record("linear_policy_loss", Liger_chunked_GRPO=220.0, **{"TRL_chunked_log-prob": 105.0})
    # The loss takes 1.1 times the GEMMs and 500 of 572 MiB, and is 10 and 4.8 times faster.
    assert statuses(loss) == ["met", "met", "met", "MISSED"]
    assert "1.100 times the bare GEMMs (6TDV), at most 1.15 (n = 9)" in verdicts_of(loss)[0][1]
    assert statuses(head_record("linear_policy_loss", ours=23.1)) == ["MISSED", "met", "NOT MEASURED", "NOT MEASURED"]
    # The comparison is with the best peer.
    assert statuses(head_record("linear_logprob", eager=60.0, Liger_scaled_CE=28.0)) == ["met", "MISSED"]
    assert statuses(head_record("linear_logprob", eager=60.0, Liger_scaled_CE=29.0)) == ["met", "met"]
    assert statuses(head_record("linear_logprob", "frozen")) == ["met"]


def test_goals_of_the_step():
    found = step_record("P8192-R512-bfloat16", k4=1.0, k1=0.9, padded=4.9)
    # The verdicts in order: gradient norms; 1.5 / 1.4 of the time at K=1; 1 / 0.9 of its passes; 0.6 / 1.5 of the peak
    # rate, and 9.6 / 16.5 of it with 16 groups; the predicted time; padded rows, which take 4.9 times as long.
    assert statuses(found) == ["met", "met", "met", "MISSED", "met", "met", "MISSED"]
    assert [text.partition(":")[2][:6] for _, text in verdicts_of(found)[3:5]] == [" 40.0%", " 58.2%"]
    slow = step_record("P8192-R512-bfloat16", k4=1.4, k1=0.9, padded=7.0)
    assert statuses(slow) == ["met", "MISSED", "MISSED", "MISSED", "MISSED", "MISSED", "met"]
    # Steps with recomputed layers are only compared with each other.
    recomputed = step_record("P8192-R512-bfloat16", k4_again=1.0, k1=0.5, k1_again=0.9, padded_again=6.0)
    assert statuses(recomputed) == ["met", "met", "met", "MISSED", "met", "met", "met"]
    assert "shared K=4 N=8, checkpointing takes 1.071 of shared K=1 N=8, checkpoint" in verdicts_of(recomputed)[1][1]
    other = step_record("P8192-R512-bfloat16", k4_again=1.0, k1=0.9, padded=6.0)
    assert statuses(other) == ["met", "NOT MEASURED", "NOT MEASURED", "MISSED", "met", "met", "NOT MEASURED"]
    wrong = step_record("P8192-R512-bfloat16", k4=1.0, k1=0.9, padded=6.0)
    wrong["remarks"]["gate"] = "gradient norms differ"
    assert verdicts_of(wrong)[0] == ("MISSED", "gradient norms differ, at most 0.05")
    wrong = step_record("P8192-R512-bfloat16", k4=1.0) | {"differences": {"padded": 0.06}}
    assert verdicts_of(wrong)[0][0] == "MISSED"
    alone = step_record("P2048-R128-bfloat16", k4=1.0)
    alone["variants"]["shared K=4 N=8"]["utilisation"]["whole"] = None
    alone["not_run"]["shared K=1 N=8"] = "no time left"
    assert verdicts_of(alone)[2:4] == [
        ("NOT MEASURED", "shared K=1 N=8: no time left"),
        ("NOT MEASURED", "shared K=4 N=8: utilisation: optimizer apart"),
    ]
    # Four groups take 0.6 / 1.9 of the peak. 16 groups are 4 of these with one optimizer step: 2.4 / 6.1.
    several = verdicts_of(step_record("P2048-R128-bfloat16", k4=1.0, several=1.4))
    assert [text.partition("groups: ")[2][:5] for _, text in several[5:7]] == ["31.6%", "39.3%"]


def test_goals_of_the_discriminator():
    record = {"bench": "discriminator", "case": "B16-L1-D2560-bfloat16-rows", "quick": False, "device": "cuda"}
    record["variants"] = {}
    counted = record | {"launches": {"ours, all prepared": {"count": 3, "device_us": 12.0}}}
    assert statuses(counted) == ["met", "MISSED"]
    assert (
        verdicts_of(record | {"launches": {}, "profiler": "no CUPTI"})
        == [("NOT MEASURED", "device time: no CUPTI")] * 2
    )


def test_every_goal_has_a_measured_case():
    from bench.core.goals import GOALS, verdicts

    measured = bench_cases("cuda")
    goals = [goal for goal in GOALS if goal.device == "cuda"]
    for goal in goals:
        if goal.bench != "media":
            assert goal.case in [case.name for case in measured[goal.bench]], goal
    # Every goal is listed without a record, and also with the record of a rehearsal.
    rehearsed = head_record("linear_logprob") | {"quick": True}
    for records in ([], [rehearsed]):
        found = list(verdicts(records, "cuda"))
        assert {verdict.status for verdict in found} == {"NOT MEASURED"} and len(found) == len(goals)
