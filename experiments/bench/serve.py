"""What the processes of the step benchmark have in common: a job, facts, then a step at a time."""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any


def serve(prepare: Callable[[dict[str, Any]], tuple[dict[str, Any], Callable[[str], float]]]) -> None:
    """Reads a job from standard input, answers with facts, then runs steps as asked until told to stop.

    Args:
        prepare: Job to facts, and to the function that runs a step of a kind and returns its seconds.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not end up among the answers

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    job = json.loads(sys.stdin.readline())
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: job["threads"]])
    facts, run = prepare(job)
    answer(facts)
    for line in sys.stdin:
        message = json.loads(line)
        if "stop" in message:
            answer({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10})
            return
        answer({"seconds": run(message["kind"])})
