"""Draw docs/method.svg, the picture of the method in README.md and docs/method.md.

    python docs/method_svg.py [FILE]

The picture has its own background, so it is readable on light and dark pages. Viewers that support color schemes show
the matching variant.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1120, 400
STYLE = """
  .back { fill: #ffffff; } .panel { fill: #f3f5f8; } .box { fill: #ffffff; stroke: #8a94a6; }
  .trained { stroke: #1f6feb; stroke-width: 2.5; } text { fill: #1c2330; font: 14px system-ui, sans-serif; }
  .head { font-weight: 600; font-size: 15px; } .title { font-weight: 600; } .note { fill: #566173; font-size: 13px; }
  .arrow { fill: none; stroke: #566173; stroke-width: 1.6; } .tip { fill: #566173; }
  @media (prefers-color-scheme: dark) {
    .back { fill: #12161d; } .panel { fill: #1b212b; } .box { fill: #232b37; stroke: #66728a; }
    .trained { stroke: #58a6ff; } text { fill: #e6eaf1; } .note { fill: #a5b0c2; }
    .arrow { stroke: #a5b0c2; } .tip { fill: #a5b0c2; }
  }
"""
# x and width of the columns of boxes, from left to right: pool, stage 1, and three for stage 2.
COLUMNS = ((30, 180), (256, 180), (482, 184), (698, 184), (914, 184))


def panel(column: int, last: int, title: str) -> str:
    """Return the background of a range of columns, with a title."""
    x, right = COLUMNS[column][0] - 14, sum(COLUMNS[last]) + 8
    return (
        f'<rect class="panel" x="{x}" y="16" width="{right - x}" height="368" rx="10"/>'
        f'<text class="head" x="{x + 14}" y="42">{escape(title)}</text>'
    )


def box(column: int, y: int, title: str, notes: tuple[str, ...], *, height: int = 84, trained: bool = False) -> str:
    """Return a box with a title and lines of text; the frame of a trained model is highlighted."""
    x, width = COLUMNS[column]
    kind = "box trained" if trained else "box"
    lines = "".join(
        f'<text class="note" x="{x + 10}" y="{y + 43 + 18 * number}">{escape(note)}</text>'
        for number, note in enumerate(notes)
    )
    return (
        f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        f'<text class="title" x="{x + 10}" y="{y + 23}">{escape(title)}</text>{lines}'
    )


def arrow(*points: tuple[int, int]) -> str:
    """Return a line through the points, with an arrowhead at the end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline class="arrow" points="{path}" marker-end="url(#tip)"/>'


def label(x: int, y: int, text: str) -> str:
    return f'<text class="note" x="{x}" y="{y}">{escape(text)}</text>'


def picture() -> str:
    """Return the whole SVG."""
    parts = [
        panel(0, 0, "Collected once"),
        box(0, 60, "Question", ("video, text, task type,", "ground truth")),
        arrow((120, 144), (120, 176)),
        box(0, 178, "Teacher", ("black box: text only",), height=64),
        arrow((120, 242), (120, 274)),
        box(0, 276, "K answers", ("quality q_k, from 0 to 1,", "by format and", "ground truth"), height=96),
        panel(1, 1, "Stage 1"),
        box(1, 60, "Student", ("imitates the answer", "of highest quality"), trained=True),
        arrow((210, 324), (233, 324), (233, 102), (254, 102)),
        arrow((346, 144), (346, 192)),
        box(1, 194, "Stage-1 student", ("copied three times:", "student, reference,", "discriminator"), height=104),
        panel(2, 4, "Warm-up (discriminator only) and stage 2: every step"),
        box(2, 60, "Student", ("samples N rollouts", "per question"), trained=True),
        arrow((666, 102), (696, 102)),
        box(3, 60, "Matching", ("rollout i with answer k,", "with probability p_k;", "0 if q_k < tau"), height=96),
        arrow((882, 102), (912, 102)),
        box(4, 60, "Discriminator D", ("loss of a pair: q_k ·", "softplus(D(S) - D(T))"), trained=True),
        arrow((1006, 144), (1006, 226)),
        label(1014, 190, "scores D(S)"),
        box(4, 228, "Reward", ("α · D(S) + δ · content", "+ β · outer format", "+ η · task format"), height=104),
        arrow((914, 280), (884, 280)),
        box(3, 228, "Advantage A", ("rewards, normalized", "within the group of N"), height=104),
        arrow((698, 280), (668, 280)),
        box(2, 228, "Policy loss", ("-A · log π", "+ γ · KL(π, reference)"), height=104),
        arrow((574, 228), (574, 146)),
        label(582, 190, "gradient"),
        arrow((436, 246), (459, 246), (459, 102), (480, 102)),
        label(482, 360, "S: a rollout. T: a teacher answer. Blue frame: a trained model."),
    ]
    tip = '<path class="tip" d="M0,0 L8,4 L0,8 z"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'aria-label="The method: a pool of K teacher answers, stage 1, warm-up and stage 2">'
        f"<style>{STYLE}</style>"
        f'<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">{tip}</marker></defs>'
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="12"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("method.svg")
    target.write_text(picture(), encoding="utf-8")
