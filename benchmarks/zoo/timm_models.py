"""timm models, one or two of a family, untrained, with inputs as small as they allow."""

import functools

import torch

from benchmarks.zoo.example import Case, Example

# name -> image size and settings
MODELS: dict[str, tuple[int, dict]] = {
    "vit_tiny_patch16_224": (32, {"img_size": 32}),
    "deit_tiny_distilled_patch16_224": (32, {"img_size": 32}),
    "beit_base_patch16_224": (32, {"img_size": 32, "depth": 2}),
    "eva02_tiny_patch14_224": (28, {"img_size": 28}),
    "cait_xxs24_224": (32, {"img_size": 32, "depth": 4}),
    "xcit_nano_12_p16_224": (32, {}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4}),
    "swinv2_tiny_window8_256": (64, {"img_size": 64}),
    "twins_svt_small": (64, {"img_size": 64}),
    "pvt_v2_b0": (64, {}),
    "mvitv2_tiny": (64, {"img_size": 64}),
    "coat_tiny": (64, {"img_size": 64}),
    "convit_tiny": (32, {"img_size": 32}),
    "levit_128s": (224, {}),
    "maxvit_nano_rw_256": (256, {}),
    "mixer_s32_224": (64, {"img_size": 64}),
    "resmlp_12_224": (64, {"img_size": 64}),
    "gmlp_s16_224": (64, {"img_size": 64}),
    "convmixer_768_32": (64, {}),
    "convnext_atto": (64, {}),
    "convnextv2_atto": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "efficientformer_l1": (224, {}),
    "fastvit_t8": (64, {}),
    "mobileone_s0": (64, {}),
    "repvit_m0_9": (64, {}),
    "mobilenetv3_small_100": (64, {}),
    "mobilenetv4_conv_small": (64, {}),
    "mobilenetv4_hybrid_medium": (64, {}),
    "efficientnet_b0": (64, {}),
    "efficientvit_b0": (64, {}),
    "mobilevit_xxs": (64, {}),
    "edgenext_xx_small": (64, {}),
    "resnet18": (64, {}),
    "resnetv2_50": (64, {}),
    "resnest14d": (64, {}),
    "res2net50_26w_4s": (64, {}),
    "ecaresnet50t": (64, {}),
    "regnety_002": (64, {}),
    "nf_regnet_b0": (64, {}),
    "densenet121": (64, {}),
    "dla34": (64, {}),
    "hrnet_w18_small": (64, {}),
    "cspdarknet53": (64, {}),
    "vovnet39a": (64, {}),
    "xception41": (96, {}),
    "inception_next_tiny": (64, {}),
    "halonet26t": (256, {}),
    "sequencer2d_s": (224, {}),
    "davit_tiny": (64, {}),
    "nextvit_small": (64, {}),
    "hiera_tiny_224": (224, {}),
    "tiny_vit_5m_224": (224, {}),
    "caformer_s18": (64, {}),
    "starnet_s1": (64, {}),
    "mambaout_femto": (64, {}),
    "vit_relpos_small_patch16_224": (32, {"img_size": 32}),
    "shvit_s1": (64, {}),
    "crossvit_tiny_240": (240, {}),
    "tnt_s_patch16_224": (224, {}),
    "pit_ti_224": (224, {}),
    "gcvit_xxtiny": (224, {}),
    "ghostnetv2_100": (64, {}),
    "rexnet_100": (64, {}),
    "lambda_resnet26t": (256, {}),
    "skresnet18": (64, {}),
    "dpn48b": (64, {}),
    "efficientformerv2_s0": (224, {}),
    "swiftformer_xs": (224, {}),
    "repvgg_a0": (64, {}),
}


def make(name: str) -> Example:
    import timm

    size, settings = MODELS[name]
    model = timm.create_model(name, pretrained=False, num_classes=10, **settings)
    return Example(model, (torch.randn(2, 3, size, size),))


def cases() -> list[Case]:
    return [Case(f"timm/{name}", "timm", functools.partial(make, name)) for name in MODELS]
