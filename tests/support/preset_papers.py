"""Plain, slow float64 versions of the presets, one sequence at a time, after the papers' descriptions.

A Llama decoder is run by hand, so that nothing of the package takes part. Steps are counted from 1 after the prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Attend = Callable[[int, Tensor, list["Token"]], Tensor]


@dataclass
class Token:
    """One cached token of one layer: exact K and V `[H_kv, D]`, what is stored of them, and its importance."""

    position: int
    vision: bool
    key: Tensor
    value: Tensor
    stored_key: Tensor
    stored_value: Tensor
    partial_value: Tensor
    importance: float = 0.0


@dataclass
class Layer:
    """Cached tokens of one layer by group, in order of position."""

    tokens: list[Token] = field(default_factory=list)
    core: list[Token] = field(default_factory=list)
    vision_seen: int = 0
    text_seen: int = 0


CLOSE = 0.005


def rounded_up(share: float, count: int) -> int:
    return math.ceil(share * count - 1e-9)


class PlainDecoder:
    """Weights of a Llama decoder, and its forward pass with an attention of the caller's."""

    def __init__(self, model) -> None:
        self.language, self.head = model.model.language_model, model.lm_head
        config = self.language.config
        self.heads, self.kv_heads, self.head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.theta = config.rope_parameters["rope_theta"]
        self.eps = config.rms_norm_eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * weight

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        half = self.head_dim // 2
        angle = positions[:, None].double() / self.theta ** (torch.arange(half).double() / half)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], -1)

    def forward(
        self, embeddings: Tensor, start: int, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        """Logits `[n, vocabulary]` of embeddings `[n, hidden]`; attend(layer, q, k, v) gives `[n, H_q, D]`."""
        x, n = embeddings, len(embeddings)
        positions = torch.arange(start, start + n)
        for index, layer in enumerate(self.language.layers):
            a, normed = layer.self_attn, self.norm(x, layer.input_layernorm.weight)
            q, k, v = (
                (normed @ p.weight.T).view(n, heads, self.head_dim)
                for p, heads in ((a.q_proj, self.heads), (a.k_proj, self.kv_heads), (a.v_proj, self.kv_heads))
            )
            out = attend(index, self.rotate(q, positions), self.rotate(k, positions), v)
            x = x + out.reshape(n, -1) @ a.o_proj.weight.T
            normed, mlp = self.norm(x, layer.post_attention_layernorm.weight), layer.mlp
            gate = normed @ mlp.gate_proj.weight.T
            x = x + (torch.nn.functional.silu(gate) * (normed @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T
        return self.norm(x, self.language.norm.weight) @ self.head.weight.T

    def attention(self, query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Output `[H_q, D]` and weights `[H_q, T]` of one query `[H_q, D]` over `[T, H_kv, D]`."""
        repeat = self.heads // self.kv_heads
        keys, values = keys.repeat_interleave(repeat, 1), values.repeat_interleave(repeat, 1)
        weights = (torch.einsum("hd,thd->ht", query, keys) * self.head_dim**-0.5).softmax(-1)
        return torch.einsum("ht,thd->hd", weights, values), weights


class PlainMethod:
    """Exact prefill, then steps that read what a method keeps.

    undecided: a choice was so close that rounding may decide it otherwise.
    """

    undecided = False

    def __init__(self, model) -> None:
        self.decoder = PlainDecoder(model)
        self.layers = [Layer() for _ in self.decoder.language.layers]
        self.held = 0
        self.step = 0

    def prefill(self, embeddings: Tensor, vision: Tensor) -> Tensor:
        """Logits of the prompt; `vision` says which of its tokens are vision."""
        n = len(embeddings)
        self.held = n

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out, paid = [], []
            for i in range(n):
                one, weights = self.decoder.attention(q[i], k[: i + 1], v[: i + 1])
                out.append(one)
                paid.append(weights.mean(0).tolist())
            importance = self.of_prompt(paid)
            tokens = [Token(i, bool(vision[i]), k[i], v[i], k[i], v[i], v[i], importance[i]) for i in range(n)]
            self.layers[index].tokens = tokens
            self.layers[index].vision_seen = int(vision.sum())
            self.layers[index].text_seen = n - int(vision.sum())
            self.store(self.layers[index])
            return torch.stack(out)

        with torch.no_grad():
            return self.decoder.forward(embeddings, 0, attend)

    def of_prompt(self, paid: list[list[float]]) -> list[float]:
        """Importance of a prompt's tokens, from the attention that each one pays to those before it and to itself."""
        return paid[-1]

    def store(self, layer: Layer) -> None:
        """After the prompt: what is stored of its tokens."""

    def before(self, layer: Layer) -> None:
        """Before a step's token joins."""

    def newest(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What is stored of a generated token: key, value, and part of the value."""
        return key, value, value

    def read(self, layer: Layer) -> list[tuple[Token, Tensor]]:
        """Tokens that a step reads, with their values."""
        return [(t, t.stored_value) for t in layer.tokens]

    def observe(self, token: Token, attention: float) -> None:
        """A step paid so much attention to a token."""

    def most_important(self, tokens: list[Token], count: int) -> list[Token]:
        ranked = sorted(tokens, key=lambda t: -t.importance)
        if 0 < count < len(ranked):
            last, next_one = ranked[count - 1].importance, ranked[count].importance
            self.undecided |= 0 < last - next_one < CLOSE * last
        return ranked[:count]

    def decode(self, embedding: Tensor) -> Tensor:
        """Logits of one more token."""
        self.step += 1

        def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            layer = self.layers[index]
            self.before(layer)
            layer.tokens.append(Token(self.held, False, k[0], v[0], *self.newest(k[0], v[0])))
            layer.text_seen += 1
            read = self.read(layer)
            keys = torch.stack([t.stored_key for t, _ in read])
            keys[-1] = k[0]
            values = torch.stack([value for _, value in read])
            values[-1] = v[0]
            out, weights = self.decoder.attention(q[0], keys, values)
            # what the newest token pays itself says nothing yet: it is not packed
            for (token, _), a in zip(read[:-1], weights.mean(0).tolist()[:-1], strict=True):
                self.observe(token, a)
            return out[None]

        with torch.no_grad():
            logits = self.decoder.forward(embedding, self.held, attend)
        self.held += 1
        return logits


def truncate(x: Tensor, rank: int, parts: tuple[int, ...]) -> list[Tensor]:
    """`x` `[N, H, D]`, all heads side by side, mean removed, through its leading `parts` singular vectors of `rank`."""
    flat = x.flatten(1)
    mean = flat.mean(0)
    _, _, v = torch.linalg.svd(flat - mean, full_matrices=False)
    v = v[:rank]
    return [(((flat - mean) @ v[:r].T) @ v[:r] + mean).view_as(x) for r in parts]


class PlainAttentionPack(PlainMethod):
    """AttentionPack: SVD of vision K and V; the values of all but the most important vision tokens at part of the rank."""

    def __init__(self, model, rank: int, full: float, partial: float, ema: float, first: int = 4) -> None:
        super().__init__(model)
        self.rank, self.full, self.partial, self.ema, self.first = rank, full, partial, ema, first

    def store(self, layer: Layer) -> None:
        packed = [t for t in layer.tokens[self.first :] if t.vision]
        part = rounded_up(self.partial, min(self.rank, len(packed)))
        (keys,) = truncate(torch.stack([t.key for t in packed]), self.rank, (self.rank,))
        full, partial = truncate(torch.stack([t.value for t in packed]), self.rank, (self.rank, part))
        for token, key, value, less in zip(packed, keys, full, partial, strict=True):
            token.stored_key, token.stored_value, token.partial_value = key, value, less
        self.rank_tokens(layer)

    def rank_tokens(self, layer: Layer) -> None:
        packed = [t for t in layer.tokens[self.first :] if t.vision]
        layer.core = self.most_important(packed, rounded_up(self.full, len(packed)))

    def before(self, layer: Layer) -> None:
        if self.step > 1:
            self.rank_tokens(layer)

    def read(self, layer: Layer) -> list[tuple[Token, Tensor]]:
        core = {t.position for t in layer.core}
        return [(t, t.stored_value if t.position in core or not t.vision else t.partial_value) for t in layer.tokens]

    def observe(self, token: Token, attention: float) -> None:
        token.importance = self.ema * token.importance + (1 - self.ema) * attention


class PlainAVL(PlainMethod):
    """A-VL: core vision tokens at every step, all stored ones every K steps; text by first, newest and heavy hitters."""

    def __init__(
        self, model, core: float, secondary: float, every: int, kept: float, first: int, heavy: float, prune: int
    ) -> None:
        super().__init__(model)
        self.core, self.secondary, self.every = core, secondary, every
        self.kept, self.first, self.heavy, self.prune_every = kept, first, heavy, prune

    def store(self, layer: Layer) -> None:
        for token in layer.tokens:
            token.stored_key, token.stored_value = token.key.half().double(), token.value.half().double()
        vision = [t for t in layer.tokens if t.vision]
        stay = {t.position for t in self.most_important(vision, rounded_up(self.secondary, layer.vision_seen))}
        layer.tokens = [t for t in layer.tokens if not t.vision or t.position in stay]
        self.prune_text(layer)
        self.choose_core(layer)

    def choose_core(self, layer: Layer) -> None:
        vision = [t for t in layer.tokens if t.vision]
        layer.core = self.most_important(vision, rounded_up(self.core, layer.vision_seen))

    def prune_text(self, layer: Layer) -> None:
        text = [t for t in layer.tokens if not t.vision]
        budget = min(max(rounded_up(self.kept, layer.text_seen), self.first), len(text))
        first = min(budget, self.first)
        heavy = rounded_up(self.heavy, budget - first)
        recent = budget - first - heavy
        stay = text[:first] + text[len(text) - recent :]
        others = [t for t in text if t not in stay]
        stay += self.most_important(others, heavy)
        kept = {t.position for t in stay}
        layer.tokens = [t for t in layer.tokens if t.vision or t.position in kept]

    def before(self, layer: Layer) -> None:
        done = self.step - 1
        if done and done % self.every == 0:
            self.choose_core(layer)
        if done and done % self.prune_every == 0:
            self.prune_text(layer)

    def newest(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = key.half().double(), value.half().double()
        return key, value, value

    def read(self, layer: Layer) -> list[tuple[Token, Tensor]]:
        everything = self.core < self.secondary and self.step % self.every == 0
        core = {t.position for t in layer.core}
        return [(t, t.stored_value) for t in layer.tokens if not t.vision or everything or t.position in core]

    def observe(self, token: Token, attention: float) -> None:
        token.importance = attention if token.vision else token.importance + attention


class PlainSnapKV(PlainMethod):
    """SnapKV: what the newest prompt tokens attend to, and these; heads are averaged. Generated tokens stay."""

    def __init__(self, model, kept: float, window: int, kernel: int) -> None:
        super().__init__(model)
        self.kept, self.window, self.kernel = kept, window, kernel

    def of_prompt(self, paid: list[list[float]]) -> list[float]:
        n = len(paid)
        before = max(n - self.window, 0)
        votes = [sum(paid[query][i] for query in range(before, n)) for i in range(before)]
        reach = self.kernel // 2
        return [max(votes[max(i - reach, 0) : i + reach + 1]) for i in range(before)] + [0.0] * (n - before)

    def store(self, layer: Layer) -> None:
        for token in layer.tokens:
            token.stored_key, token.stored_value, _ = self.newest(token.key, token.value)
        n = len(layer.tokens)
        before, window = layer.tokens[: max(n - self.window, 0)], layer.tokens[max(n - self.window, 0) :]
        stay = {t.position for t in self.most_important(before, max(rounded_up(self.kept, n) - self.window, 0))}
        layer.tokens = [t for t in before if t.position in stay] + window

    def newest(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = key.half().double(), value.half().double()
        return key, value, value
