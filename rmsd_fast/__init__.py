"""R-MSD on real video: black-box distillation of a large video-language teacher into a small student.

A teacher that returns only text answers each question K times. The answers are scored by task and matched to student
rollouts by quality. A discriminator between teacher answers and rollouts provides the reward (R-MSD, arXiv 2603.11423).

Importing this package loads no other modules, and `rmsd_fast.losses` needs only torch, so any other trainer can use the
losses. The programs are modules: `python -m rmsd_fast.train --help`.
"""

__version__ = "0.1.0"
