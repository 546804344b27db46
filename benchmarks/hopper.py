"""What Triton compiles for a Hopper GPU, seen without one: registers, shared memory, instructions.

Triton is given a driver that says there is such a GPU, looks at what it would load, and launches nothing.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LABEL = re.compile(r"^\s*(\.L\S+):")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);")
JUMP = re.compile(r"\bBRA\b.*?(\.L\w+)")
MATRIX = ("HGMMA", "HMMA")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel. registers, stack (spilled bytes): of a thread; matrix: its matrix products; instructions: all of it.

    loops: instructions of the loops that have matrix products; starts: where each begins.
    """

    name: str
    registers: int
    stack: int
    shared: int
    matrix: int
    warps: int
    constants: dict[str, Any]
    loops: list[int]
    starts: list[int]
    instructions: int


@dataclass(frozen=True)
class Launch:
    """A kernel, and how many programs of it."""

    kernel: Compiled
    programs: int


class Driver:
    """A Hopper GPU that runs nothing; `seen` is given each kernel when it would be loaded, `launched` each launch."""

    def __init__(self, seen: Callable[[Compiled], None], launched: Callable[[Launch], None]) -> None:
        self.seen, self.launched = seen, launched
        self.warps, self.constants = 0, {}
        self.loaded: list[Compiled] = []

    @property
    def utils(self) -> "Driver":
        """What loads binaries."""
        return self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """A launcher that only tells what it is given; called before the kernel is loaded."""
        names = source.fn.arg_names
        self.warps = metadata.num_warps
        self.constants = {names[path[0]]: value for path, value in source.constants.items() if len(path) == 1}
        number = len(self.loaded)

        def launch(x: int, y: int, z: int, *arguments: Any) -> None:
            self.launched(Launch(self.loaded[number], x * y * z))

        return launch

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What an H200 has."""
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Look at a binary."""
        usage, code = dumped("cuobjdump", "-res-usage", kernel), dumped("nvdisasm", "-c", kernel)
        sizes = dict(part.split(":") for part in usage.splitlines()[-1].split() if ":" in part)
        registers, stack = int(sizes["REG"]), int(sizes["STACK"])
        instructions = [found[1] for line in code.splitlines() if (found := INSTRUCTION.match(line))]
        matrix = sum(any(name in instruction for name in MATRIX) for instruction in instructions)
        found = loops(code)
        lengths, starts = [end - start for start, end in found], [start for start, _ in found]
        self.loaded.append(
            Compiled(
                name, registers, stack, shared, matrix, self.warps, self.constants, lengths, starts, len(instructions)
            )
        )
        self.seen(self.loaded[-1])
        return 0, 0, registers, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@cache
def the_driver() -> Driver:
    """One for the process: kernels that were compiled before tell it of their launches."""
    one = Driver(lambda kernel: None, lambda launch: None)
    driver.set_active(one)
    return one


def watch(seen: Callable[[Compiled], None], launched: Callable[[Launch], None] = lambda launch: None) -> None:
    """Let this process compile for Hopper, and launch nothing, from now on."""
    one = the_driver()
    one.seen, one.launched = seen, launched


def dumped(tool: str, option: str, kernel: bytes) -> str:
    """What one of Triton's CUDA tools says about a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel)
        file.flush()
        return subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def loops(disassembly: str) -> list[tuple[int, int]]:
    """First instruction of each loop that has matrix products, and the first behind it, in order."""
    code: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in disassembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[1])
            jump = JUMP.search(instruction[1])
            body = code[labels[jump[1]] :] if jump and jump[1] in labels else []
            if any(name in line for line in body for name in MATRIX):
                found.append((labels[jump[1]], len(code)))
    return found


def described(kernel: Compiled) -> dict[str, Any]:
    """A kernel as a dictionary of numbers and names."""
    return {name: value for name, value in asdict(kernel).items() if name != "constants"}
