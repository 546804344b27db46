"""What the backend tells about the graphs of a `torch.compile` that `optimize` has no part in."""

from typing import TYPE_CHECKING, Any

from apack_compile.passes import GraphRecord

if TYPE_CHECKING:
    from apack_compile.backend.own_cache import OwnCaches
    from apack_compile.plan.plan import Plan


class GraphLog:
    """Pass one as backend option `log`, and read it with `apack_compile.report(log)`.

    graphs: the record of every graph compiled with it; compilers: what each graph went to, and why; caches: the packed state of their
    static buffers, with own_cache.
    """

    def __init__(self) -> None:
        self.graphs: list[GraphRecord] = []
        self.compilers: list[str] = []
        self.caches: list[OwnCaches] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "GraphLog":
        # transformers copies the options of a CompileConfig, and the user reads this one
        return self

    @property
    def plans(self) -> list["Plan"]:
        """The plans that static buffers gave; one can be saved, and passed as option `plan` later."""
        return [plan for caches in self.caches for plan in caches.plans.values()]

    def forget(self) -> None:
        """Drop everything packed: the next calls must fill the buffers from position 0 on."""
        for caches in self.caches:
            caches.forget(list(caches.held))
