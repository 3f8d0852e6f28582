"""One tiny model with random weights for each architecture, and what it is called with: for tests over all of them.

`ARCHITECTURES["bert"].model()` builds one, `.args()` gives its arguments; both are the same each time.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from models import encoder, pairs, plain_ids, sentences
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One model of the matrix.

    Attributes:
        name: as in the literature.
        build: makes the model.
        call: its arguments.
        train: the model is in training mode.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[], Arguments]
    train: bool = False

    def model(self) -> nn.Module:
        """The same model each time; no parameter is left at zero or one."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.train(self.train)

    def args(self) -> Arguments:
        """Its arguments, the same each time."""
        torch.manual_seed(1)
        return self.call()


# ---------------------------------------------------------------------- what models are called with


def pictures(size: int = 32) -> Arguments:
    return (), {"pixel_values": torch.randn(2, 3, size, size)}


def captioned() -> Arguments:
    args, kwargs = sentences()
    return args, {**kwargs, **pictures()[1]}


def sound() -> Arguments:
    return (), {"input_values": torch.randn(2, 400)}


def speech() -> Arguments:
    return (), {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": torch.randint(2, 39, (2, 5))}


def spectrogram() -> Arguments:
    return (), {"input_values": torch.randn(2, 32, 16)}


def seeing_and_reading() -> Arguments:
    ids = torch.randint(2, 38, (2, 12))
    ids[:, 1:5] = 39  # one place for each patch of a picture
    return (), {"input_ids": ids, **pictures()[1]}


# ---------------------------------------------------------------------- Hugging Face

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"vocab_size": 40, **SIZES, "max_position_embeddings": 64}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 39}
EXPERTS = {**CAUSAL, "head_dim": 8, "num_experts_per_tok": 2}
PAIR = {
    "vocab_size": 40,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 39,
    "decoder_start_token_id": 0,
}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
WAVES = {
    "vocab_size": 40,
    **SIZES,
    "conv_dim": (16, 16),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
PICTURES = {**SIZES, "image_size": 32, "patch_size": 16, "num_labels": 3}
TWO_TOWERS = {
    "text_config": {**TEXT, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 39, "pad_token_id": 0},
    "vision_config": {**SIZES, "image_size": 32, "patch_size": 16, "projection_dim": 16},
}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}


def hugging(cls: str, **options: Any) -> nn.Module:
    """A model of a class of transformers, from its own configuration class."""
    import transformers

    model = getattr(transformers, cls)
    return model(model.config_class(**options))


def causal(cls: str, **options: Any) -> tuple[str, Callable[[], Arguments], dict[str, Any]]:
    return cls, sentences, {**CAUSAL, **options}


def detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    config = DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=ResNetConfig(**STAGES, out_features=["stage2"]),
        backbone=None,
        num_queries=4,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_labels=3,
    )
    return DetrForObjectDetection(config)


def llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**TWO_TOWERS["vision_config"]),
        text_config=LlamaConfig(**CAUSAL),
        image_token_id=39,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


ENCODERS = {
    "bert": ("BertForSequenceClassification", sentences, TEXT),
    "roberta": ("RobertaForSequenceClassification", sentences, TEXT),
    "distilbert": (
        "DistilBertForSequenceClassification",
        sentences,
        {"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    "albert": ("AlbertForSequenceClassification", sentences, {**TEXT, "embedding_size": 16}),
    "electra": ("ElectraForSequenceClassification", sentences, {**TEXT, "embedding_size": 16}),
    "deberta": (
        "DebertaForSequenceClassification",
        sentences,
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "deberta_v2": (
        "DebertaV2ForSequenceClassification",
        sentences,
        {**TEXT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "mpnet": ("MPNetForSequenceClassification", sentences, TEXT),
    "xlnet": (
        "XLNetForSequenceClassification",
        sentences,
        {"vocab_size": 40, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
    ),
    "longformer": ("LongformerForSequenceClassification", sentences, {**TEXT, "attention_window": [4, 4]}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        sentences,
        {**CAUSAL, "cls_token_id": 1, "sep_token_id": 39, "global_attn_every_n_layers": 2, "local_attention": 4},
    ),
    "funnel": (
        "FunnelForSequenceClassification",
        sentences,
        {"vocab_size": 40, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48},
    ),
}
DECODERS = {
    "gpt2": (
        "GPT2LMHeadModel",
        sentences,
        {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        sentences,
        {
            "vocab_size": 40,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    "gptj": (
        "GPTJForCausalLM",
        sentences,
        {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", sentences, TEXT),
    "opt": (
        "OPTForCausalLM",
        sentences,
        {
            "vocab_size": 40,
            "hidden_size": 32,
            "word_embed_proj_dim": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
        },
    ),
    "bloom": ("BloomForCausalLM", sentences, {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": causal("LlamaForCausalLM"),
    "mistral": causal("MistralForCausalLM", sliding_window=8),
    "mixtral": causal("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": causal("Qwen2ForCausalLM"),
    "qwen3": causal("Qwen3ForCausalLM", head_dim=8),
    "qwen3_moe": causal("Qwen3MoeForCausalLM", **EXPERTS, num_experts=4, moe_intermediate_size=16),
    "gemma2": causal("Gemma2ForCausalLM", head_dim=8, sliding_window=8),
    "gemma3": causal("Gemma3ForCausalLM", head_dim=8, sliding_window=8),
    "phi3": causal("Phi3ForCausalLM"),
    "falcon": (
        "FalconForCausalLM",
        sentences,
        {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "gpt_oss": causal("GptOssForCausalLM", **EXPERTS, num_local_experts=4, sliding_window=8),
    "olmo2": causal("Olmo2ForCausalLM"),
    "deepseek_v3": causal(
        "DeepseekV3ForCausalLM",
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        num_key_value_heads=4,
    ),
    "mamba": ("MambaForCausalLM", plain_ids, {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2}),
    "mamba2": (
        "Mamba2ForCausalLM",
        plain_ids,
        {
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 4,
        },
    ),
    "rwkv": (
        "RwkvForCausalLM",
        plain_ids,
        {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
    ),
}
PAIRS = {
    "t5": ("T5ForConditionalGeneration", pairs, {**T5, "decoder_start_token_id": 0}),
    "mt5": ("MT5ForConditionalGeneration", pairs, {**T5, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", pairs, PAIR),
    "mbart": ("MBartForConditionalGeneration", pairs, PAIR),
    "pegasus": ("PegasusForConditionalGeneration", pairs, PAIR),
    "marian": ("MarianMTModel", pairs, {**PAIR, "decoder_vocab_size": 40}),
    "whisper": (
        "WhisperForConditionalGeneration",
        speech,
        {**PAIR, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
    ),
}
SENSES = {
    "wav2vec2": ("Wav2Vec2ForCTC", sound, WAVES),
    "hubert": ("HubertForCTC", sound, WAVES),
    "audio_spectrogram": (
        "ASTForAudioClassification",
        spectrogram,
        {**SIZES, "patch_size": 8, "max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
    ),
    "vit": ("ViTForImageClassification", pictures, PICTURES),
    "deit": ("DeiTForImageClassification", pictures, PICTURES),
    "beit": ("BeitForImageClassification", pictures, {**PICTURES, "use_relative_position_bias": True}),
    "dinov2": ("Dinov2ForImageClassification", pictures, {**PICTURES, "mlp_ratio": 2}),
    "swin": (
        "SwinForImageClassification",
        pictures,
        {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4},
    ),
    "convnext": (
        "ConvNextForImageClassification",
        pictures,
        {"hidden_sizes": [8, 16], "depths": [2, 1], "num_stages": 2},
    ),
    "resnet": ("ResNetForImageClassification", pictures, {**STAGES, "num_labels": 3}),
    "segformer": (
        "SegformerForSemanticSegmentation",
        pictures,
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    "clip": ("CLIPModel", captioned, {**TWO_TOWERS, "projection_dim": 16}),
    "siglip": ("SiglipModel", captioned, TWO_TOWERS),
    "blip": ("BlipModel", captioned, {**TWO_TOWERS, "projection_dim": 16}),
    "vilt": ("ViltModel", captioned, {**TEXT, "image_size": 32, "patch_size": 16, "max_image_length": -1}),
}


# ---------------------------------------------------------------------- torch alone


class Attending(nn.Module):
    """`nn.MultiheadAttention`, which reads the weights of its own child."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.attention(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    """`nn.LSTM`, whose states are further outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        states, (last, _) = self.lstm(x)
        return self.out(states), last.mean(0)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.GroupNorm(4, 16),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )


def states(*lengths: int, width: int = 32) -> Arguments:
    return tuple(torch.randn(2, n, width) for n in lengths), {}


TABLE = {**ENCODERS, **DECODERS, **PAIRS, **SENSES}
ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        *(Architecture(n, functools.partial(hugging, c, **o), call) for n, (c, call, o) in TABLE.items()),
        Architecture("detr", detr, pictures),
        Architecture("llava", llava, seeing_and_reading),
        Architecture("nn.TransformerEncoder", encoder, lambda: states(5)),
        Architecture("nn.TransformerEncoder (train)", encoder, lambda: states(5), train=True),
        Architecture("nn.MultiheadAttention", Attending, lambda: states(5)),
        Architecture("nn.LSTM", Recurrent, lambda: states(5, width=16)),
        Architecture("nn.Transformer", lambda: nn.Transformer(32, 4, 2, 2, 48, batch_first=True), lambda: states(5, 4)),
        Architecture("convolutional", convolutional, lambda: ((torch.randn(2, 3, 8, 8),), {})),
    )
}
HUGGING = [*TABLE, "detr", "llava"]
