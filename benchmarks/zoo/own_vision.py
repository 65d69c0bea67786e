"""Vision models as users write them: detectors whose head differs in training, generators, control flow, odd outputs."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvBlock(nn.Module):
    def __init__(self, cin: int, cout: int, k: int = 1, s: int = 1, groups: int = 1, act: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, k, s, k // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(cout)
        self.act = nn.SiLU(inplace=True) if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    def __init__(self, channels: int, n: int = 1) -> None:
        super().__init__()
        self.c = channels // 2
        self.cv1 = ConvBlock(channels, channels)
        self.cv2 = ConvBlock((2 + n) * self.c, channels)
        self.m = nn.ModuleList(nn.Sequential(ConvBlock(self.c, self.c, 3), ConvBlock(self.c, self.c, 3)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = ConvBlock(c, c // 2), ConvBlock(c * 2, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Detect(nn.Module):
    """A YOLOv5/v8-like head: raw maps in training, decoded boxes (with a cached grid) in evaluation."""

    def __init__(self, channels: tuple[int, ...], classes: int = 4) -> None:
        super().__init__()
        self.classes, self.strides = classes, (8.0, 16.0)
        self.boxes = nn.ModuleList(nn.Sequential(ConvBlock(c, 16, 3), nn.Conv2d(16, 4, 1)) for c in channels)
        self.scores = nn.ModuleList(nn.Sequential(ConvBlock(c, 16, 3), nn.Conv2d(16, classes, 1)) for c in channels)

    def forward(self, x: list[Tensor]) -> Any:
        for i in range(len(x)):
            x[i] = torch.cat((self.boxes[i](x[i]), self.scores[i](x[i])), 1)
        if self.training:
            return x
        decoded = []
        for level, stride in zip(x, self.strides):
            n, _, h, w = level.shape
            ys, xs = torch.meshgrid(torch.arange(h, device=level.device), torch.arange(w, device=level.device), indexing="ij")
            grid = torch.stack((xs, ys), -1).view(1, h * w, 2) + 0.5
            flat = level.view(n, 4 + self.classes, -1).permute(0, 2, 1)
            box, score = flat.split((4, self.classes), -1)
            decoded.append(torch.cat(((grid + box[..., :2]) * stride, box[..., 2:].exp() * stride, score.sigmoid()), -1))
        return torch.cat(decoded, 1), x


class Yolo(nn.Module):
    """A list of layers with ``from`` indices, run in a loop with saved outputs, as in YOLOv5."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            (-1, ConvBlock(3, 8, 3, 2)), (-1, ConvBlock(8, 16, 3, 2)), (-1, C2f(16)), (-1, ConvBlock(16, 32, 3, 2)),
            (-1, C2f(32, 2)),
            (-1, ConvBlock(32, 48, 3, 2)), (-1, SPPF(48)), (-1, nn.Upsample(scale_factor=2)), ([-1, 4], None),
            (-1, ConvBlock(80, 32)),
            ([9, 6], Detect((32, 48))),
        ]  # fmt: skip
        self.sources = [f for f, _ in layers]
        self.model = nn.ModuleList(m if m is not None else nn.Identity() for _, m in layers)

    def forward(self, x: Tensor, augment: bool = False, profile: bool = False) -> Any:
        if augment:
            raise NotImplementedError
        return self._forward_once(x, profile)

    def _forward_once(self, x: Any, profile: bool) -> Any:
        saved: list[Any] = []
        for source, layer in zip(self.sources, self.model):
            if source != -1:
                x = [x if j == -1 else saved[j] for j in source]
            x = torch.cat(x, 1) if isinstance(layer, nn.Identity) else layer(x)
            saved.append(x)
        return x


class UNet(nn.Module):
    def __init__(self, widths: tuple[int, ...] = (8, 16, 32)) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        cin = 3
        for width in widths:
            self.down.append(self._double(cin, width))
            cin = width
        self.bottom = self._double(widths[-1], widths[-1] * 2)
        for width in reversed(widths):
            self.up.append(nn.ConvTranspose2d(width * 2, width, 2, 2))
            self.up.append(self._double(width * 2, width))
        self.final = nn.Conv2d(widths[0], 2, 1)

    @staticmethod
    def _double(cin: int, cout: int) -> nn.Sequential:
        def part(a: int) -> list[nn.Module]:
            return [nn.Conv2d(a, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU(inplace=True)]

        return nn.Sequential(*part(cin), *part(cout))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        skips = skips[::-1]
        for i in range(0, len(self.up), 2):
            x, skip = self.up[i](x), skips[i // 2]
            if x.shape != skip.shape:
                x = F.interpolate(x, size=skip.shape[2:])
            x = self.up[i + 1](torch.cat((skip, x), dim=1))
        return self.final(x)


class Generator(nn.Module):
    """DCGAN."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for a, b, s, p in ((20, 32, 1, 0), (32, 16, 2, 1), (16, 8, 2, 1)):
            layers += [nn.ConvTranspose2d(a, b, 4, s, p, bias=False), nn.BatchNorm2d(b), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(8, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class Critic(nn.Module):
    """Spectral norm, as old and new PyTorch write it, and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        spectral = torch.nn.utils.parametrizations.spectral_norm
        self.body = nn.Sequential(
            spectral(nn.Conv2d(3, 8, 4, 2, 1)), nn.LeakyReLU(0.2), spectral(nn.Conv2d(8, 16, 4, 2, 1)), nn.InstanceNorm2d(16),
            nn.LeakyReLU(0.2), nn.Flatten(), spectral(nn.Linear(16 * 64, 1)),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@dataclass
class Prediction:
    logits: Tensor
    features: list[Tensor]
    loss: Tensor | None = None


class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 4)

    def forward(self, image: Tensor, labels: Tensor | None = None, *, scale: float = 1.0) -> Prediction:
        x = F.relu(self.stem(image))
        logits = self.head(x.mean((2, 3))) * scale
        return Prediction(logits, [x], None if labels is None else F.cross_entropy(logits, labels))


class Codes(NamedTuple):
    quantized: Tensor
    loss: Tensor


class VectorQuantizer(nn.Module):
    """VQ-VAE: nearest code by distances, straight-through."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.codebook = nn.Embedding(16, d)
        self.encode, self.decode = nn.Conv2d(3, d, 4, 2, 1), nn.ConvTranspose2d(d, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Codes]:
        z = self.encode(x)
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        w = self.codebook.weight
        distances = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ w.t() + w.pow(2).sum(1)
        chosen = self.codebook(distances.argmin(1)).view(z.shape[0], *z.shape[2:], -1).permute(0, 3, 1, 2)
        loss = F.mse_loss(chosen, z.detach()) + 0.25 * F.mse_loss(z, chosen.detach())
        return self.decode(z + (chosen - z).detach()), Codes(chosen, loss)


class EarlyExit(nn.Module):
    """Stops when confident: control flow on values inside, plain convolutions around."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.more = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        early = self.first(x.mean((2, 3)))
        if not self.training and early.softmax(-1).max() > 0.999:
            return early
        return early + self.last(F.relu(self.more(x)).mean((2, 3)))


class Siamese(nn.Module):
    """One backbone called twice; outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 8)
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        a, b = self.backbone(batch["left"]), self.backbone(batch["right"])
        return {"distance": F.pairwise_distance(a, b), "similarity": F.cosine_similarity(a, b)}


class DiffusionUNet(nn.Module):
    """Time embedding, group norm, attention with einsum over pixels."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.d = d
        self.time = nn.Sequential(nn.Linear(d, d * 2), nn.SiLU(), nn.Linear(d * 2, d))
        self.start, self.down, self.up = nn.Conv2d(3, d, 3, 1, 1), nn.Conv2d(d, d, 4, 2, 1), nn.ConvTranspose2d(d, d, 4, 2, 1)
        self.norm, self.qkv, self.proj = nn.GroupNorm(4, d), nn.Conv2d(d, 3 * d, 1, bias=False), nn.Conv2d(d, d, 1)
        self.end = nn.Conv2d(2 * d, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.d // 2
        freqs = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angles = t.float()[:, None] * freqs[None]
        emb = self.time(torch.cat((angles.sin(), angles.cos()), -1))
        skip = self.start(x) + emb[:, :, None, None]
        h = self.down(F.silu(skip))
        b, c, height, width = h.shape
        q, k, v = (part.reshape(b, 2, c // 2, height * width) for part in self.qkv(self.norm(h)).chunk(3, 1))
        weights = torch.einsum("bhdi,bhdj->bhij", q * (c // 2) ** -0.5, k).softmax(-1)
        out = torch.einsum("bhij,bhdj->bhdi", weights, v).reshape(b, c, height, width)
        return self.end(torch.cat((self.up(h + self.proj(out)), skip), 1))


class PointNet(nn.Module):
    """A predicted transform multiplies the points."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU())
        self.matrix = nn.Linear(16, 9)
        self.features = nn.Sequential(
            nn.Conv1d(3, 32, 1), nn.BatchNorm1d(32), nn.ReLU(), nn.Conv1d(32, 32, 1), nn.BatchNorm1d(32)
        )
        self.head = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 4))

    def forward(self, points: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix(self.transform(points).max(2)[0]).view(-1, 3, 3) + torch.eye(3, device=points.device)
        x = torch.bmm(points.transpose(1, 2), matrix).transpose(1, 2)
        return F.log_softmax(self.head(torch.max(self.features(x), 2)[0]), 1), matrix


class Checkpointed(nn.Module):
    """Activation checkpointing and autocast inside of forward."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if self.training else block(x)
        with torch.no_grad():
            center = x.mean((2, 3), keepdim=True)
        return self.head((x - center).abs().amax((2, 3)))


class SuperResolution(nn.Module):
    """Depthwise separable blocks and PixelShuffle, on top of an interpolated image."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale
        blocks = [
            nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1), nn.Hardswish()) for _ in range(2)
        ]
        self.body = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.PReLU(16), *blocks)
        self.up = nn.Sequential(nn.Conv2d(16, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.4))

    def forward(self, x: Tensor) -> Tensor:
        base = F.interpolate(x, scale_factor=self.scale, mode="bicubic", align_corners=False)
        return torch.clamp(self.up(self.body(x - self.mean)) + base, 0, 1)


class MultiTask(nn.Module):
    """A dictionary in and one out, heads and scales by name, optional parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, 2), nn.ParameterDict({"w": nn.Parameter(torch.randn(8, 8) * 0.3)})
        self.heads = nn.ModuleDict({"classes": nn.Linear(8, 4), "boxes": nn.Linear(8, 2)})
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in range(2))

    def forward(self, batch: dict[str, Tensor], return_features: bool = False, **more: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.stem(batch["image"])).mean((2, 3)) @ self.mix["w"]
        out = {name: head(x) * scale for (name, head), scale in zip(self.heads.items(), self.scales)}
        if return_features:
            out["features"] = x
        if "target" in batch:
            out["loss"] = F.cross_entropy(out["classes"], batch["target"])
        return out | {name: value + 1 for name, value in more.items()}


class AveragedCodes(nn.Module):
    """A codebook that moves by itself in training: buffers written in place, straight through."""

    def __init__(self, codes: int = 8, d: int = 6) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(4, d), nn.Linear(d, 4)
        self.register_buffer("codes", torch.randn(codes, d))
        self.register_buffer("size", torch.zeros(codes))
        self.register_buffer("sums", self.codes.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encoder(x)
        chosen = torch.cdist(z, self.codes).argmin(-1)
        q = F.embedding(chosen, self.codes)
        if self.training:
            hot = F.one_hot(chosen, len(self.codes)).type(z.dtype)
            self.size.data.mul_(0.9).add_(hot.sum(0), alpha=0.1)
            self.sums.data.mul_(0.9).add_(hot.t() @ z.detach(), alpha=0.1)
            self.codes.data.copy_(self.sums / (self.size.unsqueeze(1) + 1e-5))
        return self.decoder(z + (q - z).detach()), F.mse_loss(q.detach(), z)
