"""torchvision's builders, with inputs as small as they allow."""

import functools
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.zoo.example import Case, Example

GIANTS = {"convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}  # above 190 M parameters
LARGER = {"googlenet": 96, "inception_v3": 299, "maxvit_t": 224}  # images that are not 64 pixels wide


def classifier(name: str) -> Example:
    size = LARGER.get(name, 64)
    settings: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        settings["init_weights"] = False  # takes minutes
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **settings)
    x = torch.randn(2, 3, size, size)
    if name != "efficientnet_v2_l":
        return Example(model, (x,))
    settle(model, torch.randn(32, 3, size, size))
    return Example(model, (x,), note="its BatchNorms have seen a batch: with untrained statistics gradients explode")


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorms the statistics of a batch, as training does.

    Untrained, they normalise in training and not in evaluation, where calibration sees activations that shrink or grow from
    block to block. In training nearly all then rounds to zero, and each BatchNorm multiplies gradients by 1 / sqrt(eps).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def segmentation(name: str) -> Example:
    settings: dict[str, Any] = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **settings)
    return Example(model, (torch.randn(2, 3, 64, 64),))


def detection(name: str) -> Example:
    settings: dict[str, Any] = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 128}
    if "rcnn" in name:
        settings |= {"rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **settings)
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 112)]
    return Example(model, (images, [_target(name, image) for image in images]), evaluation=(images,))


def _target(name: str, image: Tensor) -> dict[str, Tensor]:
    """Two boxes, with what the model learns beside them."""
    boxes = torch.tensor([[8.0, 8.0, 48.0, 56.0], [30.0, 20.0, 76.0, 70.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if name.startswith("mask"):
        target["masks"] = (torch.rand(2, *image.shape[1:]) > 0.5).to(torch.uint8)
    if name.startswith("keypoint"):
        points = boxes[:, None, :2] + 10 + 10 * torch.rand(2, 17, 2)
        target["keypoints"] = torch.cat([points, torch.ones(2, 17, 1)], -1)
    return target


def video(name: str) -> Example:
    with mock.patch.object(torchvision.models.video.mvit, "MViT", _small_mvit):  # its builders fix the size
        model = torchvision.models.get_model(name, weights=None, num_classes=10)
    if name == "s3d":
        return Example(model, (torch.randn(1, 3, 14, 224, 224),))
    return Example(model, (torch.randn(2, 3, 16 if name.startswith("mvit") else 8, 64, 64),))


def _small_mvit(**settings: Any) -> nn.Module:
    return torchvision.models.video.MViT(**settings | {"spatial_size": (64, 64)})


def flow(name: str) -> Example:
    images = torch.randn(2, 1, 3, 128, 128)
    return Example(torchvision.models.get_model(name, weights=None), (images[0], images[1], 3))


MODULES = {
    "classification": (torchvision.models, classifier),
    "segmentation": (torchvision.models.segmentation, segmentation),
    "detection": (torchvision.models.detection, detection),
    "video": (torchvision.models.video, video),
    "optical flow": (torchvision.models.optical_flow, flow),
}


def cases() -> list[Case]:
    found = []
    for family, (module, make) in MODULES.items():
        for name in torchvision.models.list_models(module=module):
            if name not in GIANTS and not name.startswith("quantized"):
                found.append(Case(f"torchvision/{name}", family, functools.partial(make, name)))
    return found
