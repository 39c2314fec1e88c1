"""R-MSD on real video: black-box distillation of a large video-language teacher into a small student.

A teacher that gives only text answers each question K times; the answers are scored per task, matched to student
rollouts by quality, and a discriminator between both turns them into a reward (R-MSD, arXiv 2603.11423).

Importing this package loads nothing else, and `rmsd_fast.losses` needs only torch, so the losses go into any other
trainer. The programs are modules: `python -m rmsd_fast.train --help`.
"""

__version__ = "0.1.0"
