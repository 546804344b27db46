"""Predicted time of one layer's decode attention, from what a device can read, multiply and unpack in a second.

A step over a packed cache reads bytes; multiplies every token's components with the rows of its head group, `2 * rows * components`
operations a stream, rows padded to the matrix unit's tile; and turns codes into numbers: up to two integer operations each on a CPU,
on a GPU all that its warps issue, fitted to what was compiled (benchmarks/instructions.py). On a GPU the three overlap, so the tightest
one is the limit; a CPU core does one after the other. Relative keys add queries rotated and projected anew for every block of slots.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from apack_compile.kernels.format import Bands
from apack_compile.plan.bits import TILE_BYTES
from apack_compile.plan.plan import Plan, StreamPlan
from apack_compile.plan.rotation import BLOCK

LATENT_BYTES = 2
MODEL_BASIS_BYTES, OWN_BASIS_BYTES = 4, 2
# Seconds of a call before any arithmetic (docs/notes/performance.md).
CPU_CALL = 13e-6
POSITION_BYTES, TOKEN_SCALE_BYTES = 4, 2


@dataclass(frozen=True)
class Device:
    """What a device does in a second, and what each launch costs.

    bytes_per_second: of a copy, read and written. matrix_operations: multiplications and additions of wide products. unpack_operations:
    on integers; where warps_issue, instructions of warps, which is what a step is counted in there. row_tiles: rows that the matrix
    unit takes at once, () for any number. narrow_rows: rows that give a product its full rate; n rows give `2 n / (n + narrow_rows)`
    of it, because both operands are fetched. 0 where rows do not matter. packed_launches, dense_launches: kernels of a step, one after
    the other, each of `launch_seconds`. dense_bytes_per_second: at which dense attention reads its cache; None for that of a copy.
    min_tokens: of a row from which `generate` packs by default. planned_tokens, planned_batch: of the step that head groups are chosen
    for. dense_bytes: of a number of the dense cache there; None for those of the model's dtype. overlaps: reading, multiplying and
    unpacking happen at the same time. widest_basis: channels of the widest basis that kernels multiply at these rates; None for any.
    aligned: tokens of plans are aligned for it. key_blocks: slots that may share an anchor, by rising harm.
    """

    name: str
    bytes_per_second: float
    matrix_operations: float
    unpack_operations: float
    row_tiles: tuple[int, ...] = ()
    narrow_rows: int = 0
    launch_seconds: float = 0.0
    packed_launches: int = 1
    dense_launches: int = 1
    dense_bytes_per_second: float | None = None
    min_tokens: int = 0
    planned_tokens: int = 8_192
    planned_batch: int = 1
    dense_bytes: int | None = None
    overlaps: bool = True
    widest_basis: int | None = None
    warps_issue: bool = False
    aligned: bool = False
    key_blocks: tuple[int, ...] = (BLOCK,)

    def seconds(self, limits: "Limits") -> float:
        """The least time of a step with these limits."""
        return limits.seconds if self.overlaps else limits.in_turn

    def padded(self, rows: int) -> int:
        """Rows that the matrix unit works on for so many."""
        if not self.row_tiles:
            return rows
        largest = self.row_tiles[-1]
        return next((tile for tile in self.row_tiles if rows <= tile), -(-rows // largest) * largest)

    def row_tile(self, rows: int) -> int:
        """Rows of a tile of so many, where there are tiles."""
        return min(self.padded(rows), self.row_tiles[-1])

    def unpackings(self, rows: int) -> int:
        """How often a token's codes are unpacked: once for every tile of rows."""
        return -(-rows // self.row_tiles[-1]) if self.row_tiles else 1

    def matrix_seconds(self, rows: int, columns: float) -> float:
        """Seconds of products that give `columns` sums of one term each to every one of `rows` rows."""
        tile = self.padded(rows)
        in_a_tile = min(tile, self.row_tiles[-1]) if self.row_tiles else tile
        rate = self.matrix_operations * (min(1.0, 2 * in_a_tile / (in_a_tile + self.narrow_rows)))
        return 2 * tile * columns / rate


# Copy: measured on an H200. Matrix rate: 60 % of the full one that was measured there, 790e12, for products of a warp. Instructions: 132
# processors, four of them a cycle, 1.8 GHz. Launches are assumed, as in a CUDA graph.
# widest_basis: wider ones have so many components that a pass takes their values in turns.
# min_tokens: the shortest of the lengths from which ratio 8 is predicted to pay, LLaVA and Gemma at batch 16 (docs/notes/performance.md).
H200 = Device(
    "H200",
    4.3e12,
    474e12,
    132 * 4 * 1.8e9,
    (8, 16),
    launch_seconds=3e-6,
    packed_launches=4,
    dense_launches=2,
    min_tokens=1_024,
    planned_tokens=32_768,
    planned_batch=16,
    widest_basis=2_048,
    warps_issue=True,
    aligned=True,
    key_blocks=(64, 128, 256, 0),
)
# Measured (`measured_cpu` of benchmarks/choices.py): 2 threads of an AMD EPYC (Zen 5, AVX-512), float32, torch 2.13.
# min_tokens: where a step loses 5 %, about 300 tokens, as a power of two (benchmarks/crossover.py, docs/notes/performance.md).
# dense_bytes: attention over a bfloat16 cache is slower there than over one in float32, not faster.
CPU = Device(
    "CPU",
    75e9,
    205e9,
    52e9,
    launch_seconds=CPU_CALL,
    dense_launches=0,
    dense_bytes_per_second=26e9,
    min_tokens=256,
    dense_bytes=4,
    overlaps=False,
)
OF_TYPE = {"cpu": CPU, "cuda": H200}
# What a user may prefer: in a choice between plans of one byte budget.
PREFERENCES = ("quality", "balanced", "speed")


def is_aligned(device_type: str | None) -> bool:
    """Whether tokens of plans for a type of device are aligned."""
    return device_type in OF_TYPE and OF_TYPE[device_type].aligned


def default_min_tokens(device_type: str) -> int:
    """Tokens of a row from which a packed cache is about as fast as a dense one, or faster; 0 for a type of device without figures."""
    return OF_TYPE[device_type].min_tokens if device_type in OF_TYPE else 0


@dataclass(frozen=True)
class Load:
    """What one decode step of a layer attends with, and to: heads, tokens of each of `batch` sequences, query tokens.

    element_bytes: of the model's dtype. vision_share: share of the tokens that are vision.
    """

    query_heads: int
    heads: int
    head_dim: int
    tokens: int
    batch: int = 1
    query_tokens: int = 1
    element_bytes: int = 2
    vision_share: float = 0.0

    @property
    def width(self) -> int:
        """Width of a stream over all KV heads."""
        return self.heads * self.head_dim

    def rows(self, groups: int) -> int:
        """Query rows that share a head group's latents."""
        return self.query_heads // groups * self.query_tokens


@dataclass(frozen=True)
class Limits:
    """Seconds of one step: of its bytes, its matrix work, its unpacking, and of rotating queries, which comes before."""

    bytes: float
    matrix: float
    unpack: float
    rotating: float = 0.0

    @property
    def seconds(self) -> float:
        """The time of a step where the three overlap: rotating, then the tightest of them."""
        return self.rotating + max(self.bytes, self.matrix, self.unpack)

    @property
    def in_turn(self) -> float:
        """The time of a step where nothing overlaps."""
        return self.rotating + self.bytes + self.matrix + self.unpack

    @property
    def tightest(self) -> str:
        """Name of the largest of all four."""
        return max(("bytes", "matrix", "unpack", "rotating"), key=partial(getattr, self))


def basis_bytes(stream: StreamPlan, load: Load, groups: int) -> int:
    """Bytes of one basis of a stream for all head groups: of all requests, or of one sequence."""
    size, components = MODEL_BASIS_BYTES if stream.scope == "model" else OWN_BASIS_BYTES, stream.bands.components
    return groups * (load.width // groups * (components + 1) + components) * size


@dataclass(frozen=True)
class Issue:
    """Instructions of the pass over codes that all warps together issue, for a token and head group.

    Of itself, of every 8 rows; of each field of each 16 words, in a stream, and of every 8 rows; of each band. rows: as many at least.
    """

    token: float
    token_rows: float
    field: float
    field_rows: float
    band: float
    rows: int = 0


# Least squares over plans of 2 to 24 fields and 8 to 32 rows, within 14 % (benchmarks/instructions.py; docs/notes/performance.md).
ONE_WARP, SEVERAL_WARPS = Issue(2.0, 2.0, 0.43, 0.22, 0.0, rows=16), Issue(7.0, 3.2, 0.25, 0.225, 1.0)
# Sums of values of a tile of rows that one warp has registers for (kernels/attend/triton_launch.py).
ONE_WARP_SUMS = 4_096
# Of all that, where a tile of rows has more sums of values than two warps have registers for, and four of them repeat each other's work.
WIDE_ISSUE, MOST_SUMS = 1.4, 7_168
# Of an anchor's latents. Of a query row that is rotated: of itself, of each channel; of each component, and of each channel of it.
ANCHOR_ISSUE = 3.3
ROW_ISSUE, CHANNEL_ISSUE, COMPONENT_ISSUE, PRODUCT_ISSUE = 30.0, 0.6, 0.1, 0.0035
WORD_BITS = 16


def fields_of(bands: Bands, tile_bytes: int) -> float:
    """Fields of 16 words of a token's codes, which are read in tiles of so many bytes."""
    words = 8 * TILE_BYTES
    return sum(
        -(-count * band.bits // (8 * tile_bytes)) * 8 * tile_bytes / words * WORD_BITS / band.bits
        for count, band in bands.parts
    )


def issue_of(values: Iterable[Bands], rows: int) -> Issue:
    """What a pass issues over values of these bands, for so many padded rows: of one warp where the sums of each fit."""
    most = max((fields_of(bands, TILE_BYTES // 2) for bands in values), default=0.0)
    sums = 8 * TILE_BYTES // WORD_BITS * most * max(rows, ONE_WARP.rows)
    return ONE_WARP if sums <= ONE_WARP_SUMS else SEVERAL_WARPS


def stream_issue(bands: Bands, rows: int, issue: Issue, narrowest: int) -> float:
    """Instructions of a token's codes of one stream, for so many padded rows, with half of those of the token itself.

    narrowest: bytes of the narrowest tile, where one warp does it all.
    """
    rows = max(rows, issue.rows)
    fields = fields_of(bands, narrowest if issue is ONE_WARP else TILE_BYTES)
    found = (issue.token + issue.token_rows * rows / 8) / 2 + issue.band * sum(count > 0 for count in bands.counts)
    found += fields * (issue.field + issue.field_rows * rows / 8)
    is_wide = issue is SEVERAL_WARPS and 8 * TILE_BYTES // WORD_BITS * fields * rows > MOST_SUMS
    return found * (WIDE_ISSUE if is_wide else 1.0)


@dataclass
class _Work:
    """Running sums of a step: bytes, seconds of the matrix unit, operations of unpacking. issue: of a pass on a GPU."""

    device: Device
    issue: Issue = SEVERAL_WARPS
    bytes: float = 0.0
    matrix: float = 0.0
    unpack: float = 0.0

    def dense(self, load: Load, tokens: float, element_bytes: int) -> None:
        """Keys and values of so many tokens, each head attended by its own rows."""
        self.bytes += 2 * tokens * load.width * element_bytes
        self.matrix += 2 * self.device.matrix_seconds(load.rows(load.heads), load.width * tokens)

    def packed(
        self, load: Load, groups: int, stream: StreamPlan, read: float, part: float, tokens: float, narrowest: int
    ) -> None:
        """Codes of one stream: `read` of the tokens whole, `part` of the components of the others. narrowest: as `stream_issue`."""
        rows = load.rows(groups)
        leading = stream.bands.at_most(round(part * stream.bands.components))
        for bands, share in ((stream.bands, read), (leading, 1 - read)):
            self.bytes += tokens * share * groups * bands.token_bytes
            self.matrix += self.device.matrix_seconds(rows, groups * bands.components * tokens * share)
            self.unpack += (
                self._unpacking(bands, rows, narrowest) * groups * tokens * share * self.device.unpackings(rows)
            )
        self.bytes += tokens * groups * TOKEN_SCALE_BYTES if stream.token_scale else 0

    def _unpacking(self, bands: Bands, rows: int, narrowest: int) -> float:
        """Operations of a token's codes of one stream, for a tile of so many rows."""
        if not self.device.warps_issue:
            return sum(count * band.unpack_operations for count, band in bands.parts)
        tile = self.device.row_tile(rows)
        return stream_issue(bands, tile, self.issue, narrowest)

    def basis(self, load: Load, groups: int, stream: StreamPlan) -> None:
        """A stream's basis, read once or once a sequence, and the product of all query rows with it."""
        components = stream.bands.components
        own = stream.scope == "sequence"
        self.bytes += (load.batch if own else 1) * basis_bytes(stream, load, groups)
        rows = load.rows(load.heads) * (1 if own else load.batch)
        products = load.head_dim * components * load.heads * (load.batch if own else 1)
        self.matrix += self.device.matrix_seconds(rows, products)


def dense_limits(load: Load, device: Device) -> Limits:
    """Limits of attention over a dense cache in the model's dtype."""
    work = _Work(device)
    work.dense(load, load.batch * load.tokens, load.element_bytes)
    return Limits(work.bytes / (device.dense_bytes_per_second or device.bytes_per_second), work.matrix, 0.0)


def packed_limits(plan: Plan, layer: int, load: Load, device: Device) -> Limits:
    """Limits of attention over one layer of a packed cache; rotated queries' latents are products of their own, written and read once."""
    shares, pairs = plan.shares(load.vision_share), plan.layers[layer].pair
    issue = SEVERAL_WARPS
    if device.warps_issue:
        issue = issue_of((pairs(segment)[1].bands for segment in shares), device.row_tile(load.rows(plan.groups)))
    work = _Work(device, issue)
    stored = max(load.tokens - plan.first_tokens - plan.tail_slots, 0)
    tiers, rotating = plan.tiers, 0.0
    for segment, share in shares.items():
        tokens, vision = load.batch * stored * share, segment == "vision"
        if not tokens:
            continue
        if tiers is not None:
            tokens *= tiers.read_share(segment)
        work.bytes += tokens * POSITION_BYTES
        for name, stream in zip(("key", "value"), pairs(segment), strict=True):
            if stream.scope in ("as_is", "half"):
                half = _Work(device)
                half.dense(load, tokens, load.element_bytes if stream.scope == "as_is" else 2)
                work.bytes, work.matrix = work.bytes + half.bytes / 2, work.matrix + half.matrix / 2
                continue
            tiered = tiers is not None and vision and name == "value"
            read, part = (tiers.full, tiers.partial) if tiered else (1.0, 1.0)
            work.packed(
                load, plan.groups, stream, read, part, tokens, TILE_BYTES // 2 if name == "value" else TILE_BYTES
            )
            work.basis(load, plan.groups, stream)
            if name == "key" and plan.rotation is not None:
                rotating += _rotation(work, plan, load, stream.bands.components, tokens)
                if device.warps_issue:
                    work.unpack += ANCHOR_ISSUE * plan.groups * tokens * device.unpackings(load.rows(plan.groups))
    work.dense(load, load.batch * (load.tokens - stored), load.element_bytes)
    seconds = work.bytes / device.bytes_per_second, work.matrix, work.unpack / device.unpack_operations
    return Limits(*seconds, rotating)


def _rotation(work: _Work, plan: Plan, load: Load, components: int, tokens: float) -> float:
    """Add what a segment's relative keys cost to the pass over it; seconds of the products before the pass."""
    device, blocks = work.device, tokens / plan.rotation.block
    work.bytes += 8 * blocks * len(plan.rotation.frequencies)
    rows, products = load.rows(load.heads), blocks * load.heads * load.head_dim * components
    latents = LATENT_BYTES * blocks * load.query_heads * load.query_tokens * components
    work.bytes += latents
    # the rows of all blocks are one product, so that no tile is padded
    full = 2 * rows * products / device.matrix_operations
    issuing = 0.0
    if device.warps_issue:
        each = (
            ROW_ISSUE + CHANNEL_ISSUE * load.head_dim + (COMPONENT_ISSUE + PRODUCT_ISSUE * load.head_dim) * components
        )
        issuing = blocks * load.query_heads * load.query_tokens * each / device.unpack_operations
    launch = 0.0 if device.warps_issue else device.launch_seconds
    return max(full, latents / device.bytes_per_second, issuing) + launch


def dense_seconds(load: Load, device: Device) -> float:
    """Predicted time of attention over a dense cache."""
    return device.seconds(dense_limits(load, device)) + device.dense_launches * device.launch_seconds


def packed_seconds(plan: Plan, layer: int, load: Load, device: Device) -> float:
    """Predicted time of attention over one layer of a packed cache."""
    limits = packed_limits(plan, layer, load, device)
    return device.seconds(limits) + device.packed_launches * device.launch_seconds


def share_of_bytes(plan: Plan, load: Load, device: Device) -> float:
    """Time of reading its bytes over the least time of a step over a packed cache, without launches, all layers together."""
    limits = [packed_limits(plan, layer, load, device) for layer in plan.layers]
    return sum(one.bytes for one in limits) / sum(map(device.seconds, limits))


def predicted_speedup(plan: Plan, load: Load, device: Device) -> float:
    """Time over a dense cache, divided by the time over a packed one, all layers of the plan together."""
    packed = sum(packed_seconds(plan, layer, load, device) for layer in plan.layers)
    return len(plan.layers) * dense_seconds(load, device) / packed
