"""Models as users write them, with their inputs."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.zoo import own_sequences as sequences
from benchmarks.zoo import own_vision as vision
from benchmarks.zoo.example import Case, Example


def images(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def ids(high: int, *shape: int) -> Tensor:
    return torch.randint(1, high, shape)


MODELS: dict[str, Callable[[], Example]] = {
    "yolo": lambda: Example(vision.Yolo(), (images(64),)),
    "lstm tagger": lambda: Example(sequences.Tagger(), (ids(50, 3, 9), torch.tensor([9, 4, 6]))),
    "gru seq2seq": lambda: Example(sequences.GruSeq2Seq(), (ids(50, 2, 7), ids(50, 2, 5))),
    "transformer lm": lambda: Example(sequences.LanguageModel(), (ids(99, 12, 2),)),
    "nanogpt": lambda: Example(sequences.NanoGPT(), (ids(99, 2, 12), ids(99, 2, 12))),
    "unet": lambda: Example(vision.UNet(), (images(36),)),
    "dcgan generator": lambda: Example(vision.Generator(), (torch.randn(2, 20, 1, 1),)),
    "spectral norm critic": lambda: Example(vision.Critic(), (images(),)),
    "weight norm wavenet": lambda: Example(sequences.WaveNet(), (torch.randn(2, 1, 40),)),
    "dataclass output": lambda: Example(vision.DataclassOutput(), (images(16),), {"labels": torch.tensor([1, 3])}),
    "vq-vae": lambda: Example(vision.VectorQuantizer(), (images(),)),
    "mixture of experts": lambda: Example(sequences.Router(), (torch.randn(12, 16),)),
    "early exit": lambda: Example(vision.EarlyExit(), (images(),)),
    "siamese": lambda: Example(vision.Siamese(), ({"left": torch.randn(2, 1, 12, 12), "right": torch.randn(2, 1, 12, 12)},)),
    "diffusion unet": lambda: Example(vision.DiffusionUNet(), (images(), torch.tensor([3, 500]))),
    "pointnet": lambda: Example(vision.PointNet(), (torch.randn(4, 3, 20),)),
    "graph convolution": lambda: Example(sequences.GraphConvolution(), (torch.randn(9, 12), torch.rand(9, 9))),
    "recommender": lambda: Example(sequences.Recommender(), (torch.randn(4, 5), [ids(20, 4, 3) for _ in range(3)])),
    "teacher forcing": lambda: Example(sequences.TeacherForcing(), (ids(30, 2, 5), ids(30, 2, 6))),
    "message passing": lambda: Example(
        sequences.MessagePassing(), (torch.randn(7, 12), torch.randint(0, 7, (2, 15)), torch.tensor([0, 0, 0, 1, 1, 1, 1]))
    ),
    "super resolution": lambda: Example(vision.SuperResolution(), (torch.rand(2, 3, 8, 8),)),
    "multi-task dictionary": lambda: Example(
        vision.MultiTask(), ({"image": images(9), "target": torch.tensor([1, 2])}, True), {"extra": torch.randn(2)}
    ),
    "averaged codes": lambda: Example(vision.AveragedCodes(), (torch.randn(9, 4),)),
    "checkpointed": lambda: Example(vision.Checkpointed(), (images(12),)),
}


def make(name: str) -> Example:
    return MODELS[name]()


def cases() -> list[Case]:
    return [Case(f"own/{name}", "own", functools.partial(make, name)) for name in MODELS]
