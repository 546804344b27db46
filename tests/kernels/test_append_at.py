"""`apack::append_at` puts tokens at the positions it is given, and refuses positions that do not follow."""

import pytest
import torch
from state_lists import append_lists, state_of
from torch import Tensor

from apack_compile.kernels.format import Bands, StreamBasis
from apack_compile.kernels.rotations import rotated
from apack_compile.models.coordinates import TokenCoordinates
from apack_compile.plan.basis import fit, fit_steps, moments
from apack_compile.plan.rotation import KeyRotation, rotations_of_blocks

BATCH, HEADS, WIDTH, TOKENS = 2, 2, 16, 40
FIRST, TAIL, BLOCK = 4, 3, 8


class State:
    """An empty cache; `bands` None keeps tokens as they are."""

    def __init__(self, dtype=torch.float64, first=FIRST, tail=TAIL, bands=None, rotation=None, device="cpu") -> None:
        slots, self.device = TOKENS - tail, device
        options = {"dtype": dtype, "device": device}
        self.first = [torch.full((BATCH, HEADS, first, WIDTH), torch.nan, **options) for _ in range(2)]
        self.tail = [torch.full((BATCH, HEADS, tail, WIDTH), torch.nan, **options) for _ in range(2)]
        empty = torch.empty(0, device=device)
        if bands is None:
            codes = [x for _ in range(2) for x in (torch.zeros(BATCH, 1, slots, HEADS * WIDTH, **options), empty)]
            bases, counts = [empty] * 6, [0] * 8
        else:
            codes = []
            for _ in range(2):
                codes += [
                    torch.full((BATCH, 1, slots, bands.token_bytes), 255, dtype=torch.uint8, device=device),
                    torch.ones(BATCH, 1, slots, dtype=torch.float16, device=device),
                ]
            sample = torch.randn(1, 1, 500, HEADS * WIDTH, generator=torch.Generator().manual_seed(9))
            basis: StreamBasis = fit_steps(fit(moments(sample)), sample, token_scale=True).basis(bands)
            bases, counts = [x.to(device) for x in basis] * 2, list(bands.counts) * 2
        self.codes, self.bases, self.bands = codes, bases, counts
        self.no_codes = [x[:, :, :0] if x.dim() > 2 else x for x in codes]
        text = torch.arange(slots, dtype=torch.int32, device=device).expand(BATCH, -1).contiguous()
        places = torch.arange(first, dtype=torch.int32, device=device).expand(BATCH, -1).contiguous()
        self.positions = [places, text[:, :0], torch.where(text < first, -1, text)]
        self.cursor = torch.zeros(3, dtype=torch.int64, device=device)
        self.rotations = {}
        if rotation is not None:
            start = TokenCoordinates.starting_at(torch.zeros(BATCH, 1))
            rotations = [rotations_of_blocks(where, start, rotation) for where in (text[:, :0], text)]
            self.rotations = {"rotations": rotations, "block": rotation.block}

    def append(self, key: Tensor, value: Tensor, index: Tensor) -> None:
        by = (
            {"text_rotations": self.rotations["rotations"][1], "block": self.rotations["block"]}
            if self.rotations
            else {}
        )
        stores = [*self.tail, *self.codes]
        lists = append_lists(stores, self.bases, self.bands, self.cursor, **by)
        torch.ops.apack.append_at(key, value, index, self.first, *lists)

    def unpack(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens, those of the last append given."""
        state = ([*self.first, *self.tail], [*self.no_codes, *self.codes], self.bases * 2, self.bands * 2)
        lists = state_of(*state, self.positions, self.cursor, **self.rotations).flatten()
        return torch.ops.apack.unpack(key, value, *lists, TOKENS)


def tokens(dtype=torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    key, value = (torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    return key, value


def fill(state: State, chunks, dtype=torch.float64) -> tuple[Tensor, Tensor, int]:
    """Appends chunks from position 0 on; what unpack gives, and how many tokens."""
    key, value = tokens(dtype)
    start = 0
    for count in chunks:
        part = slice(start, start + count)
        state.append(key[:, :, part], value[:, :, part], torch.arange(start, start + count))
        start += count
    return *state.unpack(key[:, :, :0], value[:, :, :0]), start


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("first, tail", [(4, 3), (4, 0), (0, 3), (5, 8)])
@pytest.mark.parametrize("chunks", [(40,), (1,) * 40, (2, 1, 1, 1, 30), (3, 7, 1, 1), (1,)], ids=str)
def test_tokens_come_back_from_where_they_were_put(chunks, first, tail, dtype):
    found_key, found_value, held = fill(State(dtype, first, tail), chunks, dtype)
    key, value = tokens(dtype)
    for found, given in ((found_key, key), (found_value, value)):
        assert torch.equal(found[:, :, :held], given[:, :, :held])
        assert not found[:, :, held:].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    "rotation", [None, KeyRotation(torch.logspace(0, -2, 5), BLOCK)], ids=["as they come", "rotated"]
)
def test_only_tokens_between_first_and_tail_lose_anything(rotation, dtype):
    found, _, held = fill(State(dtype, bands=Bands((0, 0, 32, 0)), rotation=rotation), (9, 1, 1, 1, 12), dtype)
    key = tokens(dtype)[0]
    error = (found[:, :, :held] - key[:, :, :held]).norm(dim=-1) / key[:, :, :held].norm(dim=-1)
    exact = torch.zeros(held, dtype=torch.bool)
    exact[:FIRST] = exact[held - TAIL :] = True
    assert not error[:, :, exact].any()
    assert (error[:, :, ~exact] > 0).all() and error.mean() < 0.2


def test_keys_are_stored_rotated_back_by_their_block():
    rotation = KeyRotation(torch.logspace(0, -2, 8), BLOCK)
    state, key = State(rotation=rotation, tail=0), tokens()[0]
    fill(state, (20,))
    stored = state.codes[0].reshape(BATCH, TOKENS, HEADS, WIDTH).transpose(1, 2)
    for position in (5, 13, 19):
        angles = (position // BLOCK * BLOCK) * rotation.frequencies.double()
        by = torch.stack([angles.cos(), angles.sin()])
        torch.testing.assert_close(rotated(stored[:, :, position], by), key[:, :, position], rtol=1e-5, atol=1e-5)


def test_position_0_begins_anew():
    state = State()
    fill(state, (20, 1, 1))
    fresh = fill(State(), (2, 9))
    again = fill(state, (2, 9))
    assert torch.equal(again[0], fresh[0]) and torch.equal(again[1], fresh[1])


@pytest.mark.parametrize(
    "index, error, message",
    [
        ([6], ValueError, "index: starts at 6, must be 5, the tokens held, or 0"),
        ([1], ValueError, "index: starts at 1, must be 5"),
        ([-1], ValueError, "index: starts at -1"),
        ([5, 7], ValueError, r"index: positions \[5, 7\] must follow one another"),
        ([5, 5], ValueError, "must follow one another"),
        ([[5]], ValueError, r"index: shape \(1, 1\) must be \(1,\)"),
        (list(range(5, 41)), IndexError, "index: 36 tokens from position 5 on pass the cache's 40 slots"),
    ],
)
def test_positions_that_do_not_follow_are_refused_and_change_nothing(index, error, message):
    state, (key, value) = State(), tokens()
    before = fill(state, (5,))
    new = torch.tensor(index)
    count = new.shape[-1]
    with pytest.raises(error, match=message):
        state.append(key[:, :, :1].expand(-1, -1, count, -1), value[:, :, :1].expand(-1, -1, count, -1), new)
    after = state.unpack(key[:, :, :0], value[:, :, :0])
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_positions_of_any_integer_type_serve():
    state, (key, value) = State(), tokens()
    state.append(key[:, :, :7], value[:, :, :7], torch.arange(7, dtype=torch.int32))
    assert torch.equal(state.unpack(key[:, :, :0], value[:, :, :0])[0][:, :, :7], key[:, :, :7])


def test_append_at_declares_what_it_does():
    state, (key, value) = State(torch.float32, bands=Bands((0, 0, 32, 0))), tokens(torch.float32)
    lists = append_lists([*state.tail, *state.codes], state.bases, state.bands, state.cursor)
    arguments = (key[:, :, :6], value[:, :, :6], torch.arange(6), state.first, *lists)
    torch.library.opcheck(torch.ops.apack.append_at.default, arguments)
