"""Small hand-written models that cover the ways in which residual branches are written down in PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.entry import Entry, Inputs

DIM = 32
HEADS = 4


def conv3(cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution without bias."""
    return nn.Conv2d(cin, cout, 3, stride, 1, bias=False)


def conv_bn(cin: int, cout: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout))


def mlp(dim: int = DIM, hidden: int = 2 * DIM) -> nn.Sequential:
    """A two-layer feed-forward network."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


class Attention(nn.Module):
    """Multi-head attention of ``x`` over ``context`` (itself by default)."""

    def __init__(self, dim: int = DIM, heads: int = HEADS, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        k, v = self.kv(context).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (self.q(x), k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class PreNorm(nn.Module):
    """Pre-norm transformer layer: two branches."""

    def __init__(self, dim: int = DIM, causal: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn, self.mlp = Attention(dim, causal=causal), mlp(dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), mask=mask)
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    """A GPT with tied embeddings."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(100, DIM), nn.Embedding(64, DIM)
        self.h = nn.ModuleList(PreNorm(causal=True) for _ in range(layers))
        self.ln_f, self.lm_head = nn.LayerNorm(DIM), nn.Linear(DIM, 100, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))


class RMSNorm(nn.Module):
    """Root mean square norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding over ``[batch, heads, length, dim]``."""
    length, dim = x.shape[-2:]
    freq = 100.0 ** (-torch.arange(0, dim, 2, device=x.device) / dim)
    angle = torch.outer(torch.arange(length, device=x.device), freq).repeat(1, 2)
    left, right = x.chunk(2, -1)
    return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()


class LlamaBlock(nn.Module):
    """Grouped-query attention with rotary positions and a SwiGLU feed-forward network."""

    def __init__(self, kv_heads: int = 2) -> None:
        super().__init__()
        self.kv_heads, head = kv_heads, DIM // HEADS
        self.norm1, self.norm2 = RMSNorm(DIM), RMSNorm(DIM)
        self.wq, self.wo = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.wk, self.wv = (nn.Linear(DIM, kv_heads * head, bias=False) for _ in range(2))
        self.w1, self.w3 = (nn.Linear(DIM, 2 * DIM, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * DIM, DIM, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q = rotate(self.wq(h).unflatten(-1, (HEADS, -1)).transpose(1, 2))
        k = rotate(self.wk(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2))
        v = self.wv(h).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        k, v = (t.repeat_interleave(HEADS // self.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class PostNorm(nn.Module):
    """``norm(z + f(z))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp, self.drop = Attention(), mlp(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attn(x)))
        return self.norm2(x + self.drop(self.mlp(x)))


class SandwichNorm(nn.Module):
    """A norm before and after each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Sequential(nn.LayerNorm(DIM), Attention(), nn.LayerNorm(DIM))
        self.mlp = nn.Sequential(nn.LayerNorm(DIM), mlp(), nn.LayerNorm(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x) + x
        return self.mlp(x) + x


class Parallel(nn.Module):
    """Attention and feed-forward network side by side, under one norm or two."""

    def __init__(self, norms: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.norm2 = nn.LayerNorm(DIM) if norms == 2 else None
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return x + self.attn(h) + self.mlp(h if self.norm2 is None else self.norm2(x))


class LayerScale(nn.Module):
    """Branches scaled channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.mlp = Attention(), mlp()
        self.gamma1, self.gamma2 = nn.Parameter(0.1 * torch.ones(DIM)), nn.Parameter(0.1 * torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.add(x, self.gamma1 * self.attn(self.norm1(x)))
        return torch.addcmul(x, self.gamma2, self.mlp(self.norm2(x)))


class DropPath(nn.Module):
    """Stochastic depth: drops whole samples in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * keep / (1 - self.rate)


class StochasticDepth(nn.Module):
    """Pre-norm branches behind a drop path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.drop = nn.LayerNorm(DIM), nn.LayerNorm(DIM), DropPath(0.2)
        self.attn, self.mlp = Attention(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class ReZero(nn.Module):
    """One scalar gate for both branches, no norms."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.mlp, self.alpha = Attention(), mlp(), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.alpha * self.attn(x)
        return x + self.alpha * self.mlp(x)


class Gated(nn.Module):
    """``z + sigmoid(g(z)) * f(z)``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.branch = nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sigmoid(self.gate(x)) * self.branch(x)


class Highway(nn.Module):
    """``t * f(z) + (1 - t) * z`` with ``t`` computed from ``z``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.branch = nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.gate(x))
        return t * self.branch(x) + (1 - t) * x


class ScaledSkip(nn.Module):
    """A learned scale on both the skip and the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.scale = nn.Parameter(0.9 * torch.ones(DIM)), nn.Parameter(torch.tensor(0.5))
        self.branch = nn.Sequential(nn.LayerNorm(DIM), mlp())

    def forward(self, x: Tensor) -> Tensor:
        return self.skip * x + self.scale * self.branch(x)


class Stack(nn.Module):
    """An input projection, blocks, a pooled head: for sequences ``[batch, length, DIM]`` or rows ``[batch, DIM]``."""

    def __init__(self, block: Callable[[], nn.Module], layers: int, features: int = DIM) -> None:
        super().__init__()
        self.embed = nn.Linear(features, DIM)
        self.blocks = nn.ModuleList(block() for _ in range(layers))
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1) if x.ndim == 3 else x)


class MaskedEncoder(nn.Module):
    """An encoder with an optional keyword mask of valid tokens."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, DIM)
        self.layers = nn.ModuleList(PreNorm() for _ in range(layers))
        self.head = nn.Linear(DIM, 10)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        valid = None if mask is None else mask[:, None, None, :]
        for layer in self.layers:
            x = layer(x, mask=valid)
        return self.head(x[:, 0])


class TorchEncoder(nn.Module):
    """``nn.TransformerEncoder``."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 64, 0.1, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class Seq2Seq(nn.Module):
    """``nn.TransformerEncoder`` and ``nn.TransformerDecoder``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(100, DIM), nn.Linear(DIM, 100)
        encoder = nn.TransformerEncoderLayer(DIM, HEADS, 64, batch_first=True)
        decoder = nn.TransformerDecoderLayer(DIM, HEADS, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, 2)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        length = target.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=target.device).triu(1)
        memory = self.encoder(self.embed(source))
        return self.head(self.decoder(self.embed(target), memory, tgt_mask=causal))


class Images(nn.Module):
    """A stem, blocks, global average pooling and a linear head."""

    def __init__(self, blocks: list[nn.Module], width: int, channels: int = 3) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv3(channels, 16), nn.Sequential(*blocks), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class InplaceBasic(nn.Module):
    """Basic block with in-place addition and activation."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv3(cin, cout, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = conv3(cout, cout), nn.BatchNorm2d(cout)
        self.shortcut = conv_bn(cin, cout, 1, stride) if stride > 1 or cin != cout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return F.relu_(y)


class PreActivation(nn.Module):
    """Pre-activation block; a projection starts at the activated input."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(cin), nn.BatchNorm2d(cout)
        self.conv1, self.conv2 = conv3(cin, cout, stride), conv3(cout, cout)
        project = stride > 1 or cin != cout
        self.shortcut = nn.Conv2d(cin, cout, 1, stride, bias=False) if project else None

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv2(F.relu(self.bn2(self.conv1(h))))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 with a projection shortcut; ``pooled``: ResNet-D's average pool before the projection."""

    def __init__(self, cin: int, cout: int, stride: int = 1, pooled: bool = False, squeeze: bool = False) -> None:
        super().__init__()
        mid = cout // 4
        self.branch = nn.Sequential(
            conv_bn(cin, mid, 1), nn.ReLU(), conv_bn(mid, mid, 3, stride), nn.ReLU(), conv_bn(mid, cout, 1)
        )
        self.squeeze = SqueezeExcite(cout) if squeeze else nn.Identity()
        if stride == 1 and cin == cout:
            self.shortcut: nn.Module = nn.Identity()
        elif pooled:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), conv_bn(cin, cout, 1))
        else:
            self.shortcut = conv_bn(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.shortcut(x) + self.squeeze(self.branch(x)))


class SqueezeExcite(nn.Module):
    """Channel gates from the pooled feature map."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Sequential(nn.Conv2d(width, 8, 1), nn.ReLU(), nn.Conv2d(8, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gates(x.mean((2, 3), keepdim=True))


class ShortcutA(nn.Module):
    """CIFAR ResNet's shortcut without parameters: a strided slice, zeros for the new channels."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.stride, self.extra = stride, cout - cin
        self.branch = nn.Sequential(conv_bn(cin, cout, 3, stride), nn.ReLU(), conv_bn(cout, cout))

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.extra:
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(x + y)


class Fixup(nn.Module):
    """Scalar biases around the convolutions and a scalar multiplier, no norms."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.biases = nn.ParameterList(nn.Parameter(0.1 * torch.randn(1)) for _ in range(4))
        self.conv1, self.conv2, self.scale = conv3(width, width), conv3(width, width), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x + self.biases[0]) + self.biases[1])
        y = self.scale * self.conv2(y + self.biases[2]) + self.biases[3]
        return F.relu(y + x)


class ConvNeXt(nn.Module):
    """Depthwise convolution, then a channels-last feed-forward network."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.mlp, self.gamma = mlp(width), nn.Parameter(0.5 * torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.gamma * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


class InvertedResidual(nn.Module):
    """MobileNetV2 block: a skip only where the shape stays."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        mid = 2 * cin
        self.keep = stride == 1 and cin == cout
        self.branch = nn.Sequential(
            conv_bn(cin, mid, 1), nn.ReLU6(), nn.Conv2d(mid, mid, 3, stride, 1, groups=mid), conv_bn(mid, cout, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x) if self.keep else self.branch(x)


class Res2(nn.Module):
    """Res2Net's sums of channel groups inside the branch."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.ModuleList(conv_bn(width // 4, width // 4) for _ in range(3))
        self.first, self.last = conv_bn(width, width, 1), conv_bn(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *groups = self.first(x).chunk(4, 1)
        out, previous = [first], torch.zeros_like(first)
        for conv, group in zip(self.inner, groups, strict=True):
            previous = conv(group + previous)
            out.append(previous)
        return torch.relu(x + self.last(torch.cat(out, 1)))


class RepVGG(nn.Module):
    """3 x 3 and 1 x 1 convolutions side by side, and a norm of the input where the shape stays."""

    def __init__(self, cin: int, cout: int, stride: int = 1) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(cin, cout, 3, stride), conv_bn(cin, cout, 1, stride)
        self.identity = nn.BatchNorm2d(cin) if stride == 1 and cin == cout else None

    def forward(self, x: Tensor) -> Tensor:
        skip = 0 if self.identity is None else self.identity(x)
        return F.relu(self.dense(x) + self.point(x) + skip)


class Audio(nn.Module):
    """1-d ResNet on waveforms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(1, 16, 9, 4, 4), nn.Linear(16, 10)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(16, 16, 3, padding=d, dilation=d), nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv1d(16, 16, 1)
            )
            for d in (1, 2, 4)
        )

    def forward(self, waveform: Tensor) -> Tensor:
        x = self.stem(waveform)
        for branch in self.branches:
            x = x + branch(x)
        return self.head(x.mean(-1))


class Video(nn.Module):
    """3-d ResNet on clips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv3d(3, 8, 3, (1, 2, 2), 1), nn.Linear(16, 10)
        self.branch1 = nn.Sequential(nn.Conv3d(8, 8, 3, 1, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, 1, 1))
        self.branch2 = nn.Sequential(nn.Conv3d(8, 16, 3, 2, 1), nn.BatchNorm3d(16), nn.ReLU(), nn.Conv3d(16, 16, 3, 1, 1))
        self.shortcut = nn.Conv3d(8, 16, 1, 2)

    def forward(self, clip: Tensor) -> Tensor:
        x = self.stem(clip)
        x = F.relu(x + self.branch1(x))
        x = F.relu(self.shortcut(x) + self.branch2(x))
        return self.head(x.mean((2, 3, 4)))


class LSTMThenMLP(nn.Module):
    """A recurrent trunk, then residual feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(100, DIM), nn.LSTM(DIM, DIM, batch_first=True)
        self.mlps = nn.ModuleList(nn.Sequential(nn.LayerNorm(DIM), mlp()) for _ in range(2))
        self.head = nn.Linear(DIM, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.lstm(self.embed(tokens))
        for layer in self.mlps:
            x = x + layer(x)
        return self.head(x[:, -1])


class ResidualGRU(nn.Module):
    """Recurrent branches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, DIM), nn.Linear(DIM, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(2))
        self.layers = nn.ModuleList(nn.GRU(DIM, DIM, batch_first=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))[0]
        return self.head(x[:, -1])


class TabularBlock(nn.Module):
    """Norm, two linear layers, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm1d(DIM), nn.Linear(DIM, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, DIM), nn.Dropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class MixerBlock(nn.Module):
    """MLP-Mixer: tokens, then channels."""

    def __init__(self, tokens: int = 9) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.tokens, self.channels = mlp(tokens, 16), mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class UNetBlock(nn.Module):
    """Group norm, SiLU, convolution, twice; a projection where the width changes."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.GroupNorm(4, cin), nn.SiLU(), conv3(cin, cout), nn.GroupNorm(4, cout), nn.SiLU(), conv3(cout, cout)
        )
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.branch(x)


class UNet(nn.Module):
    """Residual blocks and concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv3(3, 16), conv3(16, 3)
        self.down1, self.down2, self.mid = UNetBlock(16, 16), UNetBlock(16, 32), UNetBlock(32, 32)
        self.up2, self.up1 = UNetBlock(64, 32), UNetBlock(48, 16)

    def forward(self, x: Tensor) -> Tensor:
        h1 = self.down1(self.stem(x))
        h2 = self.down2(F.avg_pool2d(h1, 2))
        x = self.up2(torch.cat([self.mid(h2), h2], 1))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        return self.head(self.up1(torch.cat([x, h1], 1)))


class AdditiveUNet(nn.Module):
    """Symmetric additive skips: the outermost is one unit around everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv3(3, 16), conv3(16, 3)
        self.down, self.mid, self.up = conv3(16, 32, 2), conv3(32, 32), nn.ConvTranspose2d(32, 16, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        high = F.relu(self.stem(x))
        low = F.relu(self.down(high))
        low = low + F.relu(self.mid(low))
        return self.head(high + self.up(low))


class DiTBlock(nn.Module):
    """Shift, scale and gate for both branches from the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(DIM, elementwise_affine=False) for _ in range(2))
        self.attn, self.mlp, self.modulation = Attention(), mlp(), nn.Linear(DIM, 6 * DIM)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(condition))[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class DiT(nn.Module):
    """A diffusion transformer on 8 x 8 images in 2 x 2 patches."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.patch, self.position = nn.Conv2d(4, DIM, 2, 2), nn.Parameter(0.1 * torch.randn(1, 16, DIM))
        self.time = nn.Sequential(nn.Linear(DIM, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.label = nn.Embedding(10, DIM)
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(layers))
        self.head = nn.Linear(DIM, 16)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        angle = t[:, None] * torch.exp(-torch.arange(DIM // 2, device=x.device) / 4)
        condition = self.time(torch.cat([angle.sin(), angle.cos()], -1)) + self.label(label)
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
        x = self.head(x).unflatten(1, (4, 4)).unflatten(-1, (4, 2, 2))
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


class Looped(nn.Module):
    """One block applied several times; ``steps_embedded``: a step embedding before each pass."""

    def __init__(self, passes: int, steps_embedded: bool = False) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(100, DIM), PreNorm(), nn.Linear(DIM, 10)
        self.passes, self.steps = passes, nn.Embedding(passes, DIM) if steps_embedded else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in range(self.passes):
            if self.steps is not None:
                x = x + self.steps.weight[i]
            x = self.block(x)
        return self.head(x.mean(1))


class DenseMoE(nn.Module):
    """Every expert on every token, weighted by a router."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.up = nn.Parameter(0.2 * torch.randn(experts, DIM, 16))
        self.down = nn.Parameter(0.2 * torch.randn(experts, 16, DIM))
        self.router = nn.Linear(DIM, experts)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        hidden = F.gelu(torch.einsum("btd,edh->bteh", x, self.up))
        return torch.einsum("bteh,ehd,bte->btd", hidden, self.down, weights)


class MoEBlock(nn.Module):
    """Attention and a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.experts = Attention(), DenseMoE()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.experts(self.norm2(x))


class LinearAttention(nn.Module):
    """Kernel attention, linear in the length."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.qkv, self.out, self.mlp = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), mlp()

    def mix(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state, total = torch.einsum("bld,ble->bde", k, v), k.sum(1)
        return self.out(torch.einsum("bld,bde->ble", q, state) / torch.einsum("bld,bd->bl", q, total)[..., None])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GatedConv(nn.Module):
    """A Mamba-like block: causal depthwise convolution with a direct term, gated."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = RMSNorm(DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)
        self.conv, self.direct = nn.Conv1d(DIM, DIM, 4, groups=DIM, padding=3), nn.Parameter(torch.ones(DIM))

    def forward(self, x: Tensor) -> Tensor:
        h, gate = self.into(self.norm(x)).chunk(2, -1)
        y = self.conv(h.transpose(1, 2))[..., : h.shape[1]].transpose(1, 2)
        y = F.silu(y) + self.direct * h
        return x + self.out(y * F.silu(gate))


class Retention(nn.Module):
    """Running means by ``cumsum`` instead of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.value, self.gate, self.out, self.mlp = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        mean = self.value(h).cumsum(1) / count
        x = x + self.out(F.silu(self.gate(h)) * mean)
        return x + self.mlp(self.norm2(x))


class TwoTowers(nn.Module):
    """Image and text encoders compared by a dot product."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.patch, self.words = nn.Conv2d(3, DIM, 4, 4), nn.Embedding(100, DIM)
        self.image = nn.Sequential(*(PreNorm() for _ in range(layers)))
        self.text = nn.Sequential(*(PreNorm() for _ in range(layers)))

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        image = F.normalize(self.image(self.patch(pixels).flatten(2).transpose(1, 2)).mean(1), dim=-1)
        text = F.normalize(self.text(self.words(tokens)).mean(1), dim=-1)
        return (image * text).sum(-1)


class Siamese(nn.Module):
    """One encoder applied to both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Stack(TabularBlock, 2, 12)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return (self.encoder(left) - self.encoder(right)).abs().sum(-1)


class GraphNet(nn.Module):
    """Residual message passing with a dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, DIM), nn.Linear(DIM, 1)
        self.layers = nn.ModuleList(mlp() for _ in range(3))

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        x = self.embed(nodes)
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        for layer in self.layers:
            x = x + layer(adjacency @ x / degree)
        return self.head(x).squeeze(-1)


class Perceiver(nn.Module):
    """Latents attend to the input once, then to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.embed = nn.Parameter(torch.randn(1, 4, DIM)), nn.Linear(8, DIM)
        self.norm, self.context_norm, self.mlp_norm = (nn.LayerNorm(DIM) for _ in range(3))
        self.cross, self.mlp = Attention(), mlp()
        self.layers = nn.ModuleList(PreNorm() for _ in range(2))
        self.head = nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context_norm(self.embed(x))
        z = self.latents.expand(x.shape[0], -1, -1)
        z = z + self.cross(self.norm(z), context)
        z = z + self.mlp(self.mlp_norm(z))
        for layer in self.layers:
            z = layer(z)
        return self.head(z.mean(1))


class TwoStreamBlock(nn.Module):
    """Joint attention over two streams, each with its own residual additions."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(DIM) for _ in range(4))
        self.attn, self.mlp_a, self.mlp_b = Attention(), mlp(), mlp()

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        joint = self.attn(torch.cat([self.norms[0](a), self.norms[1](b)], 1))
        to_a, to_b = joint.split([a.shape[1], b.shape[1]], 1)
        a, b = a + to_a, b + to_b
        return a + self.mlp_a(self.norms[2](a)), b + self.mlp_b(self.norms[3](b))


class TwoStreams(nn.Module):
    """Two blocks; both streams are returned."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(TwoStreamBlock() for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            a, b = block(a, b)
        return a, b


class Hourglass(nn.Module):
    """A residual around layers at half the length."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inner, self.after = PreNorm(), nn.Sequential(PreNorm(), PreNorm()), PreNorm()
        self.down, self.up = nn.Linear(2 * DIM, DIM), nn.Linear(DIM, 2 * DIM)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        short = self.inner(self.down(x.unflatten(1, (-1, 2)).flatten(2)))
        x = x + self.up(short).unflatten(-1, (2, DIM)).flatten(1, 2)
        return self.after(x)


class Nested(nn.Module):
    """An outer residual whose branch projects in, runs residual layers and projects out."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.inner = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), PreNorm()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.inner(self.into(x)))


class LongSkip(nn.Module):
    """An addition of the input around residual layers that start at that input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(DIM, DIM), nn.Linear(DIM, 10)
        self.layers = nn.ModuleList(PreNorm() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = start = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x + start)


class Fourier(nn.Module):
    """Fourier neural operator layer: a spectral convolution beside a pointwise one."""

    def __init__(self, width: int = 8, modes: int = 4) -> None:
        super().__init__()
        self.modes, self.point = modes, nn.Conv1d(width, width, 1)
        self.real, self.imag = (nn.Parameter(0.3 * torch.randn(width, width, modes)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        low = torch.einsum("bim,iom->bom", spectrum[..., : self.modes], torch.complex(self.real, self.imag))
        y = torch.fft.irfft(F.pad(low, (0, spectrum.shape[-1] - self.modes)), n=x.shape[-1])
        return F.gelu(self.point(x) + y)


class DenseBlock(nn.Module):
    """DenseNet: each layer's output is appended."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), conv3(c, 8)) for c in (16, 24, 32))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class Pyramid(nn.Module):
    """A feature pyramid on a ResNet: lateral sums join different features."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv3(3, 16)
        self.stages = nn.ModuleList([InplaceBasic(16, 16), InplaceBasic(16, 32, 2), InplaceBasic(32, 32, 2)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (16, 32, 32))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        maps = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        p2 = maps[2]
        p1 = maps[1] + F.interpolate(p2, scale_factor=2.0)
        p0 = maps[0] + F.interpolate(p1, scale_factor=2.0)
        return {"p0": p0, "p1": p1, "p2": p2}


class Heads(nn.Module):
    """A dictionary of outputs, one of them nested."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(TabularBlock() for _ in range(3))
        self.policy, self.value = nn.Linear(DIM, 5), nn.Linear(DIM, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, ...]]:
        states = []
        for block in self.trunk:
            x = block(x)
            states.append(x)
        return {"policy": self.policy(x), "value": self.value(x).tanh(), "states": tuple(states)}


class EarlyExit(nn.Module):
    """Stops at a block's output that grows too large."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(TabularBlock() for _ in range(3)), nn.Linear(DIM, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
            if x.norm() > 1e6:
                break
        return self.head(x)


def own(
    name: str, build: Callable[[], nn.Module], inputs: Inputs, branches: int, why: str, refused: str = ""
) -> Entry:
    """One hand-written model."""
    return Entry(f"own/{name}", lambda: build().eval(), inputs, branches, why, refused)


def tensors(**shapes: tuple[int, ...]) -> Inputs:
    """Normal tensors by name."""
    return lambda b: {name: torch.randn(b, *shape) for name, shape in shapes.items()}


def words(*names: str, length: int = 9) -> Inputs:
    """Token ids by name."""
    return lambda b: {name: torch.randint(0, 100, (b, length)) for name in names}


def stack(name: str, block: Callable[[], nn.Module], layers: int, each: int, why: str) -> Entry:
    """A sequence model of ``layers`` blocks with ``each`` branches."""
    return own(name, lambda: Stack(block, layers), tensors(x=(9, DIM)), layers * each, f"{layers} {why}")


def images(name: str, blocks: Callable[[], list[nn.Module]], width: int, branches: int, why: str) -> Entry:
    """An image classifier on 16 x 16 images."""
    return own(name, lambda: Images(blocks(), width), tensors(x=(3, 16, 16)), branches, why)


SEQUENCE = tensors(x=(9, DIM))
ROWS = tensors(x=(DIM,))

ENTRIES: tuple[Entry, ...] = (
    own("nanogpt", NanoGPT, words("idx"), 6, "3 layers x (attn, mlp), tied embeddings"),
    stack("llama", LlamaBlock, 3, 2, "layers x (attn, mlp)"),
    stack("pre_norm", PreNorm, 3, 2, "layers x (attn, mlp)"),
    stack("post_norm", PostNorm, 3, 2, "layers x (attn, mlp)"),
    stack("sandwich_norm", SandwichNorm, 3, 2, "layers x (attn, mlp)"),
    own("torch_encoder_pre", lambda: TorchEncoder(True), SEQUENCE, 6, "3 layers x (attn, ff)"),
    own("torch_encoder_post", lambda: TorchEncoder(False), SEQUENCE, 6, "3 layers x (attn, ff)"),
    own("torch_seq2seq", Seq2Seq, words("source", "target"), 10, "2 encoder layers x 2 + 2 decoder layers x 3"),
    stack("parallel_one_norm", lambda: Parallel(1), 2, 2, "layers x (attn and mlp in parallel)"),
    stack("parallel_two_norms", lambda: Parallel(2), 2, 2, "layers x (attn and mlp in parallel)"),
    stack("layer_scale", LayerScale, 2, 2, "layers x (attn, mlp), one by addcmul"),
    stack("stochastic_depth", StochasticDepth, 2, 2, "layers x (attn, mlp)"),
    stack("rezero", ReZero, 2, 2, "layers x (attn, mlp)"),
    stack("gated_residual", Gated, 3, 1, "layers: z + sigmoid(g(z)) * f(z)"),
    stack("highway", Highway, 3, 0, "layers whose skip is scaled by a gate of the input: no units (borderline)"),
    stack("scaled_skip", ScaledSkip, 3, 1, "layers: a * z + b * f(z) with learned a, b"),
    own("masked_encoder", MaskedEncoder,
        lambda b: {"tokens": torch.randint(0, 100, (b, 9)), "mask": torch.arange(9).expand(b, -1) < 7},
        4, "2 layers x (attn, mlp)"),
    images("fixup", lambda: [Fixup() for _ in range(3)], 16, 3, "3 blocks"),
    images("inplace_resnet", lambda: [InplaceBasic(16, 16), InplaceBasic(16, 32, 2), InplaceBasic(32, 32)], 32, 3,
           "3 basic blocks, one with a projection"),
    images("preact_resnet", lambda: [PreActivation(16, 16), PreActivation(16, 32, 2), PreActivation(32, 32)], 32, 3,
           "3 pre-activation blocks, one with a projection"),
    images("bottleneck_resnet", lambda: [Bottleneck(16, 32), Bottleneck(32, 32), Bottleneck(32, 64, 2)], 64, 3,
           "3 bottlenecks, two with a projection"),
    images("resnet_d", lambda: [Bottleneck(16, 32, 2, True), Bottleneck(32, 32), Bottleneck(32, 64, 2, True)], 64, 3,
           "3 bottlenecks, two with an average pool and a projection"),
    images("resnet_a", lambda: [ShortcutA(16, 16), ShortcutA(16, 32, 2), ShortcutA(32, 32)], 32, 3,
           "3 basic blocks, one with a sliced and zero-padded skip (borderline)"),
    images("se_resnet", lambda: [Bottleneck(16, 32, squeeze=True), Bottleneck(32, 32, squeeze=True)], 32, 2,
           "2 bottlenecks"),
    images("convnext", lambda: [ConvNeXt() for _ in range(3)], 16, 3, "3 blocks"),
    images("mobilenet", lambda: [InvertedResidual(16, 16), InvertedResidual(16, 32, 2), InvertedResidual(32, 32)], 32,
        2,
           "2 of 3 inverted residuals have a skip"),
    images("res2net", lambda: [Res2(), Res2()], 16, 2, "2 blocks; the inner sums lie in the branch"),
    images("repvgg", lambda: [RepVGG(16, 32, 2), RepVGG(32, 32), RepVGG(32, 32)], 32, 2,
           "2 blocks with a norm as skip, one without (borderline)"),
    own("audio_resnet", Audio, tensors(waveform=(1, 256)), 3, "3 dilated blocks"),
    own("video_resnet", Video, tensors(clip=(3, 4, 16, 16)), 2, "2 blocks, one with a projection"),
    own("lstm_mlp", LSTMThenMLP, words("tokens"), 2, "2 residual mlps after a plain LSTM"),
    own("residual_gru", ResidualGRU, tensors(x=(7, 8)), 2, "2 recurrent branches"),
    own("tabular", lambda: Stack(TabularBlock, 3, 12), tensors(x=(12,)), 3, "3 blocks"),
    stack("mixer", MixerBlock, 2, 2, "layers x (token mlp, channel mlp)"),
    own("unet", UNet, tensors(x=(3, 16, 16)), 5, "2 down, 1 middle, 2 up blocks; the skips are concatenations"),
    own("additive_unet", AdditiveUNet, tensors(x=(3, 16, 16)), 1,
        "the outermost skip; the inner unit lies in its branch"),
    own("dit", DiT,
        lambda b: {"x": torch.randn(b, 4, 8, 8), "t": torch.rand(b), "label": torch.randint(0, 10, (b,))},
        4, "2 layers x (attn, mlp)"),
    own("looped", lambda: Looped(4), words("tokens"), 8, "1 layer x (attn, mlp), applied 4 times"),
    own("universal", lambda: Looped(3, True), words("tokens"), 6, "1 layer x (attn, mlp), applied 3 times"),
    stack("dense_moe", MoEBlock, 2, 2, "layers x (attn, all experts in one einsum)"),
    stack("linear_attention", LinearAttention, 2, 2, "layers x (linear attn, mlp)"),
    stack("gated_conv", GatedConv, 3, 1, "layers; the direct term lies in the branch"),
    stack("retention", Retention, 2, 2, "layers x (cumsum mixing, mlp)"),
    own("two_towers", TwoTowers,
        lambda b: {"pixels": torch.randn(b, 3, 16, 16), "tokens": torch.randint(0, 100, (b, 7))},
        8, "2 towers x 2 layers x (attn, mlp)"),
    own("siamese", Siamese, tensors(left=(12,), right=(12,)), 4, "2 blocks, applied to both inputs"),
    own("graph_net", GraphNet,
        lambda b: {"nodes": torch.randn(b, 7, 6), "adjacency": (torch.rand(b, 7, 7) < 0.4).float()},
        3, "3 message passing layers"),
    own("perceiver", Perceiver, tensors(x=(11, 8)), 6, "cross attn, mlp + 2 layers x (attn, mlp)"),
    own("two_streams", TwoStreams, tensors(a=(6, DIM), b=(4, DIM)), 8, "2 blocks x 2 streams x (attn, mlp)"),
    own("hourglass", Hourglass, tensors(x=(8, DIM)), 5, "layer, residual around the short layers, layer: 2 + 1 + 2"),
    stack("nested", Nested, 2, 1, "outer residuals; the inner layers lie in their branches"),
    own("long_skip", LongSkip, SEQUENCE, 4, "2 layers x (attn, mlp); the long skip starts at the first unit's fork"),
    own("fourier_operator", lambda: nn.Sequential(*(Fourier() for _ in range(3))), tensors(input=(8, 16)), 3,
        "3 layers: the pointwise convolution reads as a projection shortcut (borderline)"),
    own("plain_mlp", lambda: nn.Sequential(mlp(), nn.ReLU(), mlp(), nn.Linear(DIM, 10)), tensors(input=(DIM,)), 0,
        "no skips"),
    images("plain_cnn", lambda: [conv_bn(16, 32), nn.ReLU(), nn.MaxPool2d(2), conv_bn(32, 32), nn.ReLU()], 32, 0,
        "no skips"),
    images("densenet", lambda: [DenseBlock()], 40, 0, "concatenation only"),
    own("feature_pyramid", Pyramid, tensors(x=(3, 16, 16)), 3,
        "3 basic blocks; the lateral sums join different features (borderline)"),
    own("many_outputs", Heads, ROWS, 3, "3 blocks, a dictionary of outputs"),
    own("early_exit", EarlyExit, ROWS, 3, "3 blocks", refused="data-dependent control flow"),
)  # fmt: skip
