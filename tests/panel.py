"""Real architectures with random weights and reduced sizes: structure to compile, not accuracy to measure.

Depth and width are cut through each model's own configuration, so that every kind of block stays and a whole
compile takes seconds. Weights have a fixed seed, and parameters that libraries start at zero or one
(normalisation, biases, running statistics) are made random, so that folding one away wrongly shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Example = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

BATCH = 2


class Tagger(nn.Module):
    """Token tagging with a recurrent layer: embedding, LSTM or GRU, linear."""

    def __init__(self, recurrent: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, 24, padding_idx=0)
        self.recurrent = recurrent(24, 32, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(64, 9)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, _ = self.recurrent(self.embedding(tokens))
        return self.head(hidden)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Gives vectors (biases, scales) and running statistics random values that keep activations in range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            for name, tensor in [*child.named_parameters(recurse=False), *child.named_buffers(recurse=False)]:
                if name == "running_var" or (name == "weight" and tensor.dim() == 1):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name == "running_mean" or (name == "bias" and tensor.dim() == 1):
                    tensor.normal_(0.0, 0.1, generator=generator)
    return module.eval()


def _images(channels: int, size: int, axes: int = 2) -> torch.Tensor:
    return torch.randn(BATCH, channels, *[size] * axes, generator=torch.Generator().manual_seed(1))


def _tokens(length: int = 12, vocabulary: int = 96) -> torch.Tensor:
    return torch.randint(1, vocabulary, (BATCH, length), generator=torch.Generator().manual_seed(1))


def _padding(length: int = 12) -> torch.Tensor:
    """An attention mask whose second row ends early."""
    mask = torch.ones(BATCH, length, dtype=torch.int64)
    mask[1, length - 4 :] = 0
    return mask


def _build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomise(make(), seed)


def _pretrained_class(name: str, config: str, **options: Any) -> nn.Module:
    import transformers

    settings = getattr(transformers, config)(**options)
    return _build(lambda: getattr(transformers, name)(settings))


def _vision(name: str, config: str, size: int = 64, **options: Any) -> Example:
    return _pretrained_class(name, config, **options), (_images(3, size),), {}


def resnet50() -> Example:
    return _vision(
        "ResNetForImageClassification", "ResNetConfig", embedding_size=16, hidden_sizes=[32, 64, 128, 256],
        depths=[3, 4, 6, 3], num_labels=10,
    )  # fmt: skip


def resnet50_full() -> Example:
    return _vision("ResNetForImageClassification", "ResNetConfig", size=224, num_labels=1000)


def convnext() -> Example:
    return _vision(
        "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[16, 32, 48, 64], depths=[2, 2, 3, 2],
        num_labels=10,
    )  # fmt: skip


def vit() -> Example:
    return _vision(
        "ViTForImageClassification", "ViTConfig", hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, image_size=64, patch_size=16, num_labels=10,
    )  # fmt: skip


def swin() -> Example:
    return _vision(
        "SwinForImageClassification", "SwinConfig", image_size=64, patch_size=4, embed_dim=16, depths=[2, 2],
        num_heads=[2, 4], window_size=4, num_labels=10,
    )  # fmt: skip


def mobilenet_v2() -> Example:
    return _vision("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35, num_labels=10)


def regnet() -> Example:
    return _vision(
        "RegNetForImageClassification", "RegNetConfig", embedding_size=16, hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 2, 1], groups_width=8, layer_type="y", num_labels=10,
    )  # fmt: skip


def clip_vision() -> Example:
    return _vision(
        "CLIPVisionModel", "CLIPVisionConfig", hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=96, image_size=64, patch_size=16, projection_dim=32,
    )  # fmt: skip


def bert(layers: int = 3) -> Example:
    model = _pretrained_class(
        "BertForSequenceClassification", "BertConfig", vocab_size=96, hidden_size=48, num_hidden_layers=layers,
        num_attention_heads=4, intermediate_size=96, max_position_embeddings=32, num_labels=3,
    )  # fmt: skip
    return model, (), {"input_ids": _tokens(), "attention_mask": _padding()}


def distilbert() -> Example:
    model = _pretrained_class(
        "DistilBertModel", "DistilBertConfig", vocab_size=96, dim=48, n_layers=3, n_heads=4, hidden_dim=96,
        max_position_embeddings=32,
    )  # fmt: skip
    return model, (_tokens(), _padding()), {}


def gpt2() -> Example:
    model = _pretrained_class(
        "GPT2LMHeadModel", "GPT2Config", vocab_size=96, n_embd=48, n_layer=3, n_head=4, n_positions=32,
        use_cache=False, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return model, (_tokens(),), {}


def _llama(kv_heads: int, layers: int = 3) -> Example:
    model = _pretrained_class(
        "LlamaForCausalLM", "LlamaConfig", vocab_size=96, hidden_size=48, intermediate_size=112,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=32,
        use_cache=False,
    )  # fmt: skip
    return model, (_tokens(),), {}


def llama() -> Example:
    return _llama(kv_heads=4)


def llama_grouped(layers: int = 3) -> Example:
    return _llama(kv_heads=2, layers=layers)


def t5_encoder() -> Example:
    model = _pretrained_class(
        "T5EncoderModel", "T5Config", vocab_size=96, d_model=48, d_kv=12, d_ff=96, num_layers=3, num_heads=4,
        feed_forward_proj="gated-gelu", use_cache=False,
    )  # fmt: skip
    return model, (), {"input_ids": _tokens(), "attention_mask": _padding()}


def whisper_encoder() -> Example:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        vocab_size=96, num_mel_bins=16, d_model=48, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=96,
        max_source_positions=32, use_cache=False,
    )  # fmt: skip
    mel = torch.randn(BATCH, 16, 64, generator=torch.Generator().manual_seed(1))
    return _build(lambda: WhisperEncoder(config)), (mel,), {}


def volumes(name: str, size: int, **options: Any) -> Example:
    """A network of MONAI for volumes of one channel."""
    import monai.networks.nets as nets

    return _build(lambda: getattr(nets, name)(**options)), (_images(1, size, axes=3),), {}


def resnet_3d() -> Example:
    return volumes(
        "ResNet", 32, block="bottleneck", layers=[1, 2, 1, 1], block_inplanes=[8, 16, 24, 32], spatial_dims=3,
        n_input_channels=1, num_classes=3,
    )  # fmt: skip


def unet_3d() -> Example:
    return volumes(
        "UNet", 32, spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 24, 32), strides=(2, 2, 2),
        num_res_units=2, norm="batch",
    )  # fmt: skip


def densenet_3d() -> Example:
    return volumes(
        "DenseNet", 32, spatial_dims=3, in_channels=1, out_channels=3, init_features=16, growth_rate=8,
        block_config=(2, 2, 3, 2),
    )  # fmt: skip


def segresnet() -> Example:
    return volumes("SegResNet", 32, spatial_dims=3, in_channels=1, out_channels=2, init_filters=8)


def efficientnet() -> Example:
    from monai.networks.nets import EfficientNet

    blocks = [
        "r1_k3_s11_e1_i32_o16_se0.25", "r2_k3_s22_e6_i16_o24_se0.25", "r2_k5_s22_e6_i24_o40_se0.25",
        "r1_k3_s22_e6_i40_o80_se0.25",
    ]  # fmt: skip
    return _build(lambda: EfficientNet(blocks, spatial_dims=2, in_channels=3, num_classes=10)), (_images(3, 64),), {}


def transformer_encoder() -> Example:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(48, 4, 96, batch_first=True, norm_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    return _build(make), (torch.randn(BATCH, 10, 48, generator=torch.Generator().manual_seed(1)),), {}


def lstm_tagger() -> Example:
    return _build(lambda: Tagger(nn.LSTM)), (_tokens(),), {}


def gru_tagger() -> Example:
    return _build(lambda: Tagger(nn.GRU)), (_tokens(),), {}


PANEL: dict[str, Callable[[], Example]] = {
    make.__name__: make
    for make in (
        resnet50, convnext, vit, swin, mobilenet_v2, regnet, clip_vision, bert, distilbert, gpt2, llama, llama_grouped,
        t5_encoder, whisper_encoder, resnet_3d, unet_3d, densenet_3d, segresnet, efficientnet, transformer_encoder,
        lstm_tagger, gru_tagger,
    )
}  # fmt: skip
"""Every quick model by name; a call builds it and returns (model in eval mode, args, kwargs)."""
