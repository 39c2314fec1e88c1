"""Evaluate with a sign of life at each look for a signal; the process that waits prints how many it got."""

import sys

from rmsd_fast import evaluate, evaluate_judge
from rmsd_fast.runtime.process_group import World, exit_process

signs = 0
broadcast_object = evaluate_judge.broadcast_object


def counted(value: object, world: World) -> object:
    global signs
    result = broadcast_object(value, world)
    signs += result is None and not world.is_main
    return result


evaluate_judge.HEARTBEAT_S = 0.1
evaluate_judge.broadcast_object = counted
code = evaluate.main()
if signs:
    print(f"signs of life: {signs}", file=sys.stderr, flush=True)
exit_process(code)
