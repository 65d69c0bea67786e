"""transformers models of a few small layers, untrained."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.zoo.example import Case, Example

Made = tuple[Any, dict[str, Any]]  # model, keyword arguments
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
GROUPED = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}


def tokens(rows: int = 2, length: int = 16) -> torch.Tensor:
    return torch.randint(3, 99, (rows, length))


def image(size: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


def build(config: str, model: str, **settings: Any) -> Any:
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def text(config: str, model: str, **settings: Any) -> Made:
    """A model that takes tokens and a mask."""
    return build(config, model, **settings), {"input_ids": tokens(), "attention_mask": torch.ones(2, 16, dtype=torch.long)}


def sequence_to_sequence(config: str, model: str, **settings: Any) -> Made:
    return build(config, model, **settings), {"input_ids": tokens(), "decoder_input_ids": tokens(2, 8)}


def vision(config: str, model: str, size: int = 32, **settings: Any) -> Made:
    return build(config, model, **settings), {"pixel_values": image(size)}


SIZES = {key: value for key, value in SMALL.items() if key != "vocab_size"}
VISION = SIZES | {"image_size": 32, "patch_size": 8, "num_labels": 5}
DETECTOR = {"d_model": 32} | {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
BART = DETECTOR | SPECIAL | {"vocab_size": 99, "max_position_embeddings": 64}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SPEECH = SMALL | {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}


def whisper() -> Made:
    settings = DETECTOR | SPECIAL | {"vocab_size": 99, "num_mel_bins": 16, "max_source_positions": 20}
    settings |= {"max_target_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None}
    model = build("WhisperConfig", "WhisperForConditionalGeneration", **settings)
    return model, {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": tokens(2, 8)}


def clip() -> Made:
    words = SMALL | {"max_position_embeddings": 20, "eos_token_id": 2, "bos_token_id": 1}
    pixels = SIZES | {"image_size": 32, "patch_size": 8}
    model, kwargs = text("CLIPConfig", "CLIPModel", text_config=words, vision_config=pixels, projection_dim=16)
    return model, kwargs | {"pixel_values": image()}


def speech(config: str, model: str) -> Made:
    return build(config, model, **SPEECH), {"input_values": torch.randn(2, 800)}


def detr(config: str, model: str) -> Made:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    own = {"backbone_config": backbone, "backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    return build(config, model, **DETECTOR, **own, num_queries=5, num_labels=4), {"pixel_values": image(64)}


def vit_mae() -> Made:
    decoder = {f"decoder_{name}": value for name, value in SIZES.items() if name != "num_hidden_layers"}
    settings = SIZES | decoder | {"decoder_num_hidden_layers": 1, "image_size": 32, "patch_size": 8}
    model = build("ViTMAEConfig", "ViTMAEForPreTraining", **settings)
    return model, {"pixel_values": image(), "noise": torch.rand(2, 16)}


def time_series() -> Made:
    settings = {"num_input_channels": 3, "context_length": 32, "patch_length": 8, "patch_stride": 8, "prediction_length": 8}
    settings |= {"d_model": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 64}
    return build("PatchTSTConfig", "PatchTSTForPrediction", **settings), {"past_values": torch.randn(2, 32, 3)}


def blip() -> Made:
    words = SMALL | {"encoder_hidden_size": 32, "max_position_embeddings": 32}
    pixels = SIZES | {"image_size": 32, "patch_size": 8}
    settings = {"text_config": words, "vision_config": pixels, "projection_dim": 16, "image_text_hidden_size": 16}
    model = build("BlipConfig", "BlipForImageTextRetrieval", **settings)
    return model, {"pixel_values": image(), "input_ids": tokens()}


def video() -> Made:
    settings = SIZES | {"image_size": 16, "num_frames": 4, "tubelet_size": [2, 8, 8], "num_labels": 4}
    return build("VivitConfig", "VivitForVideoClassification", **settings), {"pixel_values": torch.randn(2, 4, 3, 16, 16)}


def spectrogram() -> Made:
    settings = SIZES | {"num_mel_bins": 16, "max_length": 32, "patch_size": 8, "frequency_stride": 8, "time_stride": 8}
    return build("ASTConfig", "ASTForAudioClassification", **settings), {"input_values": torch.randn(2, 32, 16)}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": 5}
PROPHET = {"vocab_size": 99, "hidden_size": 32} | {
    f"{name.format(side)}": value
    for side in ("encoder", "decoder")
    for name, value in (("{}_ffn_dim", 64), ("num_{}_layers", 2), ("num_{}_attention_heads", 4))
}
PERCEIVER = {"vocab_size": 99, "d_model": 32, "d_latents": 32, "num_latents": 8, "num_self_attends_per_block": 2}
PERCEIVER |= {"num_self_attention_heads": 4, "num_cross_attention_heads": 4, "max_position_embeddings": 32}
PERCEIVER |= {"qk_channels": 32, "v_channels": 32}

GPT = {"vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
DISTIL = {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64}

MODELS: dict[str, Callable[[], Made]] = {
    "bert": lambda: text("BertConfig", "BertForSequenceClassification", **SMALL),
    "bert-mlm": lambda: text("BertConfig", "BertForMaskedLM", **SMALL),
    "bert-eager": lambda: text("BertConfig", "BertModel", **SMALL, attn_implementation="eager"),
    "roberta": lambda: text("RobertaConfig", "RobertaForSequenceClassification", **SMALL, max_position_embeddings=64),
    "distilbert": lambda: text("DistilBertConfig", "DistilBertForSequenceClassification", **DISTIL),
    "albert": lambda: text("AlbertConfig", "AlbertForSequenceClassification", **SMALL, embedding_size=16),
    "electra": lambda: text("ElectraConfig", "ElectraForSequenceClassification", **SMALL, embedding_size=16),
    "deberta": lambda: text("DebertaConfig", "DebertaForSequenceClassification", **SMALL),
    "deberta-v2": lambda: text(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        **SMALL,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        position_buckets=8,
    ),
    "mobilebert": lambda: text(
        "MobileBertConfig",
        "MobileBertForSequenceClassification",
        **SMALL,
        embedding_size=32,
        true_hidden_size=32,
        intra_bottleneck_size=32,
    ),
    "modernbert": lambda: text(
        "ModernBertConfig",
        "ModernBertForSequenceClassification",
        **SMALL,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=1,
        sep_token_id=2,
    ),
    "funnel": lambda: text(
        "FunnelConfig",
        "FunnelForSequenceClassification",
        vocab_size=99,
        d_model=32,
        n_head=4,
        d_head=8,
        d_inner=64,
        block_sizes=[1, 1],
    ),
    "longformer": lambda: text(
        "LongformerConfig", "LongformerForSequenceClassification", **SMALL, max_position_embeddings=64, attention_window=8
    ),
    "fnet": lambda: text("FNetConfig", "FNetForSequenceClassification", **SMALL),
    "xlnet": lambda: text(
        "XLNetConfig", "XLNetForSequenceClassification", vocab_size=99, d_model=32, n_layer=2, n_head=4, d_inner=64
    ),
    "gpt2": lambda: text("GPT2Config", "GPT2LMHeadModel", **GPT),
    "gpt-neo": lambda: text(
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        vocab_size=99,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
    ),
    "gpt-neox": lambda: text("GPTNeoXConfig", "GPTNeoXForCausalLM", **SMALL),
    "gptj": lambda: text("GPTJConfig", "GPTJForCausalLM", **GPT, rotary_dim=4),
    "opt": lambda: text(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
    ),
    "bloom": lambda: text("BloomConfig", "BloomForCausalLM", vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    "llama": lambda: text("LlamaConfig", "LlamaForCausalLM", **GROUPED),
    "llama-eager": lambda: text("LlamaConfig", "LlamaForCausalLM", **GROUPED, attn_implementation="eager"),
    "mistral": lambda: text("MistralConfig", "MistralForCausalLM", **GROUPED),
    "mixtral": lambda: text("MixtralConfig", "MixtralForCausalLM", **GROUPED, num_local_experts=4),
    "qwen2": lambda: text("Qwen2Config", "Qwen2ForCausalLM", **GROUPED),
    "qwen3": lambda: text("Qwen3Config", "Qwen3ForCausalLM", **GROUPED, head_dim=8),
    "gemma": lambda: text("GemmaConfig", "GemmaForCausalLM", **GROUPED, head_dim=8),
    "gemma2": lambda: text("Gemma2Config", "Gemma2ForCausalLM", **GROUPED, head_dim=8),
    "gemma3": lambda: text("Gemma3TextConfig", "Gemma3ForCausalLM", **GROUPED, head_dim=8),
    "phi": lambda: text("PhiConfig", "PhiForCausalLM", **SMALL),
    "phi3": lambda: text("Phi3Config", "Phi3ForCausalLM", **GROUPED, pad_token_id=0),
    "falcon": lambda: text(
        "FalconConfig", "FalconForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "stablelm": lambda: text("StableLmConfig", "StableLmForCausalLM", **GROUPED),
    "olmo2": lambda: text("Olmo2Config", "Olmo2ForCausalLM", **GROUPED),
    "smollm3": lambda: text("SmolLM3Config", "SmolLM3ForCausalLM", **GROUPED, pad_token_id=0),
    "mamba": lambda: text("MambaConfig", "MambaForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, state_size=4),
    "t5": lambda: sequence_to_sequence("T5Config", "T5ForConditionalGeneration", **T5),
    "mt5": lambda: sequence_to_sequence("MT5Config", "MT5ForConditionalGeneration", **T5),
    "bart": lambda: sequence_to_sequence("BartConfig", "BartForConditionalGeneration", **BART),
    "mbart": lambda: sequence_to_sequence("MBartConfig", "MBartForConditionalGeneration", **BART),
    "pegasus": lambda: sequence_to_sequence("PegasusConfig", "PegasusForConditionalGeneration", **BART),
    "marian": lambda: sequence_to_sequence("MarianConfig", "MarianMTModel", **BART),
    "whisper": whisper,
    "wav2vec2": lambda: speech("Wav2Vec2Config", "Wav2Vec2ForCTC"),
    "hubert": lambda: speech("HubertConfig", "HubertForCTC"),
    "clip": clip,
    "vit": lambda: vision("ViTConfig", "ViTForImageClassification", **VISION),
    "deit": lambda: vision("DeiTConfig", "DeiTForImageClassification", **VISION),
    "beit": lambda: vision("BeitConfig", "BeitForImageClassification", **VISION),
    "dinov2": lambda: vision("Dinov2Config", "Dinov2ForImageClassification", **VISION),
    "vit-mae": vit_mae,
    "swin": lambda: vision(
        "SwinConfig",
        "SwinForImageClassification",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    ),
    "swinv2": lambda: vision(
        "Swinv2Config",
        "Swinv2ForImageClassification",
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=5,
    ),
    "convnext": lambda: vision(
        "ConvNextConfig", "ConvNextForImageClassification", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_labels=5
    ),
    "convnextv2": lambda: vision(
        "ConvNextV2Config", "ConvNextV2ForImageClassification", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_labels=5
    ),
    "resnet": lambda: vision(
        "ResNetConfig",
        "ResNetForImageClassification",
        size=64,
        embedding_size=8,
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_labels=5,
    ),
    "mobilenet-v2": lambda: vision("MobileNetV2Config", "MobileNetV2ForImageClassification", size=64, num_labels=5),
    "mobilevit": lambda: vision("MobileViTConfig", "MobileViTForImageClassification", size=64, image_size=64, num_labels=5),
    "segformer": lambda: vision(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=16,
        num_labels=5,
    ),
    "dpt": lambda: vision(
        "DPTConfig",
        "DPTForDepthEstimation",
        **(VISION | {"num_hidden_layers": 4}),
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
    ),
    "levit": lambda: vision(
        "LevitConfig",
        "LevitForImageClassification",
        size=64,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        key_dim=[8, 8, 8],
        depths=[1, 1, 1],
        num_attention_heads=[2, 3, 4],
        num_labels=5,
    ),
    "poolformer": lambda: vision(
        "PoolFormerConfig",
        "PoolFormerForImageClassification",
        size=64,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        num_labels=5,
    ),
    "detr": lambda: detr("DetrConfig", "DetrForObjectDetection"),
    "conditional-detr": lambda: detr("ConditionalDetrConfig", "ConditionalDetrForObjectDetection"),
    "yolos": lambda: vision(
        "YolosConfig", "YolosForObjectDetection", **(VISION | {"image_size": [32, 32]}), num_detection_tokens=5
    ),
    "patchtst": time_series,
    "xlm-roberta-qa": lambda: text("XLMRobertaConfig", "XLMRobertaForQuestionAnswering", **SMALL),
    "nystromformer": lambda: text(
        "NystromformerConfig", "NystromformerForSequenceClassification", **SMALL, segment_means_seq_len=16, num_landmarks=4
    ),
    "squeezebert": lambda: text("SqueezeBertConfig", "SqueezeBertForSequenceClassification", **SMALL, embedding_size=32),
    "roformer": lambda: text("RoFormerConfig", "RoFormerForSequenceClassification", **SMALL),
    "convbert": lambda: text("ConvBertConfig", "ConvBertForSequenceClassification", **SMALL, embedding_size=32),
    "mpnet": lambda: text("MPNetConfig", "MPNetForSequenceClassification", **SMALL),
    "granite": lambda: text("GraniteConfig", "GraniteForCausalLM", **GROUPED, pad_token_id=0),
    "cohere": lambda: text("CohereConfig", "CohereForCausalLM", **GROUPED, pad_token_id=0),
    "starcoder2": lambda: text("Starcoder2Config", "Starcoder2ForCausalLM", **GROUPED),
    "qwen2-moe": lambda: text("Qwen2MoeConfig", "Qwen2MoeForCausalLM", **GROUPED, **EXPERTS),
    "mpt": lambda: text("MptConfig", "MptForCausalLM", vocab_size=99, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
    "rwkv": lambda: text(
        "RwkvConfig", "RwkvForCausalLM", vocab_size=99, hidden_size=32, num_hidden_layers=2, context_length=32
    ),
    "prophetnet": lambda: sequence_to_sequence("ProphetNetConfig", "ProphetNetForConditionalGeneration", **PROPHET),
    "sew": lambda: speech("SEWConfig", "SEWForCTC"),
    "wavlm": lambda: speech("WavLMConfig", "WavLMForCTC"),
    "ast": spectrogram,
    "blip": blip,
    "pvt": lambda: vision(
        "PvtConfig", "PvtForImageClassification", 64, image_size=64, num_attention_heads=[1, 2, 2, 4], **STAGES
    ),
    "regnet": lambda: vision("RegNetConfig", "RegNetForImageClassification", 64, embedding_size=8, groups_width=8, **STAGES),
    "table-transformer": lambda: detr("TableTransformerConfig", "TableTransformerForObjectDetection"),
    "vivit": video,
    "perceiver": lambda: text("PerceiverConfig", "PerceiverForSequenceClassification", **PERCEIVER),
}


def make(name: str) -> Example:
    model, kwargs = MODELS[name]()
    return Example(model, (), kwargs)


def cases() -> list[Case]:
    return [Case(f"transformers/{name}", "transformers", functools.partial(make, name)) for name in MODELS]
