"""torchvision's builders, with inputs as small as they allow."""

import functools

import torch
import torchvision

from benchmarks.zoo.example import Case, Example

GIANTS = {"convnext_large", "regnet_y_128gf", "vit_h_14", "vit_l_16", "vit_l_32"}  # above 190 M parameters
IMAGE = {"inception_v3": 96, "maxvit_t": 224, "googlenet": 96}
SETTINGS = {
    "inception_v3": {"init_weights": False},
    "googlenet": {"init_weights": False},
    "mvit_v1_b": {},
}


def classifier(name: str) -> Example:
    settings = dict(SETTINGS.get(name, {}))
    size = IMAGE.get(name, 64)
    if name.startswith("vit"):
        settings["image_size"] = size = 28 if name.endswith("14") else 64
    model = torchvision.models.get_model(name, weights=None, num_classes=10, **settings)
    return Example(model, (torch.randn(2, 3, size, size),))


def segmentation(name: str) -> Example:
    settings = {} if name.startswith("lraspp") else {"aux_loss": True}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5, **settings)
    return Example(model, (torch.randn(2, 3, 64, 64),))


def detection(name: str) -> Example:
    settings: dict = {"num_classes": 5, "weights": None, "weights_backbone": None}
    if not name.startswith("ssd"):
        settings |= {"min_size": 96, "max_size": 128}
    model = torchvision.models.get_model(name, **settings)
    images = [torch.rand(3, 96, 96), torch.rand(3, 80, 112)]
    boxes = torch.tensor([[8.0, 8.0, 48.0, 56.0], [30.0, 20.0, 76.0, 70.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
    if name.startswith("mask"):
        target["masks"] = (torch.rand(2, 96, 96) > 0.5).to(torch.uint8)
    if name.startswith("keypoint"):
        target["keypoints"] = torch.cat([boxes[:, None, :2] + 10 + torch.rand(2, 17, 2) * 10, torch.ones(2, 17, 1)], -1)
    targets = [target, dict(target)]
    if name.startswith("mask"):
        targets[1] = target | {"masks": (torch.rand(2, 80, 112) > 0.5).to(torch.uint8)}
    return Example(model, (images, targets), evaluation=(images,))


def video(name: str) -> Example:
    settings: dict = {"weights": None, "num_classes": 10}
    clip = (2, 3, 16, 64, 64)
    if name.startswith("mvit"):
        settings |= {"spatial_size": (64, 64)}
    elif name.startswith("s3d"):
        clip = (2, 3, 16, 64, 64)
    else:
        clip = (2, 3, 8, 64, 64)
    return Example(torchvision.models.get_model(name, **settings), (torch.randn(clip),))


def flow(name: str) -> Example:
    model = torchvision.models.get_model(name, weights=None)
    images = torch.randn(2, 1, 3, 128, 128)
    return Example(model, (images[0], images[1], 3))


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
