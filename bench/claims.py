"""What the records say about the numbers that the losses promise on CPU: one line each, exit code 1 if one is missed.

python bench/claims.py [--results bench/results]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from measure import GEMMS, main_time
from records import ROOT, load

# Least share of the bare GEMMs' rate, by (dtype, T, D).
LEAST_SHARE = {("bfloat16", 2048, 2560): 0.93, ("float32", 512, 256): 0.88}
MOST_FROZEN, MOST_MASKED_90, MOST_MEMORY, LEAST_DISCRIMINATOR = 0.72, 0.2, 0.2, 5.0


class Verdict(NamedTuple):
    """One promise against one record."""

    where: str
    what: str
    met: bool


def verdicts(records: list[dict]) -> Iterator[Verdict]:
    """All verdicts that the records allow; those of --quick are too short to be judged."""
    for record in records:
        if record.get("quick"):
            continue
        where, variants = f"{record['bench']} {record['case']}", record["variants"]
        if record["case"].endswith("-conditions"):
            for name, most in (("frozen head", MOST_FROZEN), ("90% masked", MOST_MASKED_90)):
                times = variants[name]["times_base"]
                yield Verdict(where, f"{name}: {times:.3f} of the time without, at most {most}", times <= most)
        elif record["bench"] == "discriminator":
            times = main_time(variants["eager"]) / main_time(variants["ours"])
            what = f"{times:.1f} times faster than eager, at least {LEAST_DISCRIMINATOR:.0f}"
            yield Verdict(where, what, times >= LEAST_DISCRIMINATOR)
        elif "ours" in variants:
            yield from _head_verdicts(where, record)


def _head_verdicts(where: str, record: dict) -> Iterator[Verdict]:
    variants, ours = record["variants"], record["variants"]["ours"]
    least = LEAST_SHARE.get((record["dtype"], record["shape"]["T"], record["shape"]["D"]))
    plain = (record["mask_percent"], record["softmax"], record["head"]) == (0, "random", "trainable")
    if least is not None and plain and record["bench"] != "linear_divergence":
        share, by_round = ours["share_of_gemms"], ours["share_of_gemms_by_round"]
        what = f"{share:.1%} of the bare GEMMs' rate (by round {by_round:.1%}), at least {least:.0%}"
        yield Verdict(where, what, share >= least)
    for name, own in variants.items():
        if name not in ("ours", GEMMS):
            times = main_time(own) / main_time(ours)
            yield Verdict(where, f"{times:.2f} times faster than {name}", times >= 1)
    if least is not None and plain and "peak_mib" in ours and "peak_mib" in variants.get("eager", {}):
        keys = ("peak_beyond_gradients_mib", "peak_mib")
        beyond, whole = (ours[key] / max(variants["eager"][key], 1e-9) for key in keys)
        what = (
            f"peak memory beyond gradients {beyond:.3f} of eager's, at most {MOST_MEMORY} (with gradients {whole:.3f})"
        )
        yield Verdict(where, what, beyond <= MOST_MEMORY)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    found = list(verdicts([r for r in load(parser.parse_args().results) if r["device"] == "cpu"]))
    for verdict in found:
        print(f"{'met   ' if verdict.met else 'MISSED'} {verdict.where}: {verdict.what}")
    missed = sum(not verdict.met for verdict in found)
    print(
        f"{len(found)} checked, {missed} missed"
        if found
        else "no records: run pytest bench/ --record FOLDER first, without --quick"
    )
    return int(missed > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
