"""Runs a contract in a process of its own, which may crash, hang or run out of memory alone."""

import multiprocessing
import resource
from multiprocessing.connection import Connection

from .building import class_names
from .outcome import FAILS, Outcome

SECONDS = 120
ADDRESS_SPACE = 24 << 30
# Forked from a server that has imported the packages already: a run takes about as long as its model.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["apack_compile", "transformers.models.auto.modeling_auto", "torch._dynamo"])


def run_apart(model_type: str, compiled: bool = True) -> Outcome:
    """The outcome of one type; a crash or a timeout is a failure."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=_run, args=(model_type, compiled, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        reason = f"no result within {SECONDS} s"
    except EOFError:
        process.join()
        reason = f"the process ended with {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return Outcome(model_type, class_names()[model_type], FAILS, reason)


def _run(model_type: str, compiled: bool, sender: Connection) -> None:
    import torch

    from .contract import run

    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    torch.set_num_threads(1)
    sender.send(run(model_type, compiled))
