"""Serve rollouts to a training run with rollout.engine=vllm_server: vLLM on other GPUs, or on another machine.

CUDA_VISIBLE_DEVICES=1 python -m rmsd_fast.serve_rollouts my.yaml --port 8400
CUDA_VISIBLE_DEVICES=0 python -m rmsd_fast.train my.yaml rollout.engine=vllm_server \\
    rollout.server_urls=[http://127.0.0.1:8400]
"""

from __future__ import annotations

import argparse
import logging
import sys

from rmsd_fast import environment
from rmsd_fast.command_line import Parser
from rmsd_fast.process import run_main, tell


def main(argv: list[str] | None = None) -> int:
    """Parse the arguments and serve until a signal. Heavy imports are delayed so that `--help` is fast."""
    arguments = _parse(argv)
    if reason := environment.why_not():
        tell(f"rmsd_fast.serve_rollouts: {reason}")
        return 2
    from rmsd_fast.config import UserError
    from rmsd_fast.settings import load_settings

    # The recipe may name another engine, which the run overrides too.
    address = f"http://[{arguments.host}]" if ":" in arguments.host else f"http://{arguments.host}"
    engine = ["rollout.engine=vllm_server", f"rollout.server_urls=['{address}:{arguments.port}']"]
    try:
        settings = load_settings(arguments.recipe, [*arguments.overrides, *engine])
    except UserError as error:
        tell(f"rmsd_fast.serve_rollouts: {error}")
        return 2
    import torch

    from rmsd_fast.program import run_program
    from rmsd_fast.rollout.base import RolloutError
    from rmsd_fast.rollout.service import out_of_memory
    from rmsd_fast.stages.rollout_servers import start_server

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("rmsd_fast").setLevel(logging.INFO)

    def work(world, stop) -> None:
        stop.otherwise = "the server has ended; a run that used it can be continued with --resume"
        server, loop = start_server(settings, world, arguments.host, arguments.port, arguments.sequences)
        print(f"serving rollouts at {server.url}", flush=True)
        try:
            loop.run(stop.check)
        except torch.OutOfMemoryError as error:
            raise RolloutError(out_of_memory(error)) from error

    return run_program("rmsd_fast.serve_rollouts", settings, work, trains=False)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="rmsd_fast.serve_rollouts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="If the environment variable RMSD_ROLLOUT_TOKEN is set, every call must have this secret, and the run "
        "needs the same variable. Addresses other than 127.0.0.1 require it.",
    )
    parser.add_argument("recipe", help="YAML file or name of the recipe of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="settings of the run")
    parser.add_argument(
        "--host", type=_host, default="127.0.0.1", help="address to listen on (default: this machine only)"
    )
    parser.add_argument("--port", type=_port, default=8400, help="port to listen on (default: 8400)")
    parser.add_argument(
        "--sequences",
        type=_sequences,
        default=0,
        help="responses that are decoded together, of all processes of the run that send to this server (default: "
        "rollout.prompts_per_batch x rollout.n, those of one process)",
    )
    return parser.parse_intermixed_args(argv)


def _host(text: str) -> str:
    if text.strip() == text != "":
        return text
    raise argparse.ArgumentTypeError(f"expected an address of this machine, got {text!r}")


def _sequences(text: str) -> int:
    if text.isdecimal() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")


def _port(text: str) -> int:
    if text.isdecimal() and 0 < int(text) < 2**16:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r}")


if __name__ == "__main__":
    code = run_main(main)
    if "torch" not in sys.modules:
        sys.exit(code)
    from rmsd_fast.runtime.process_group import exit_process

    exit_process(code)
