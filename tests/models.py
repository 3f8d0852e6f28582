"""Tiny models with random weights, and what each is called with: for the tests of importing and hosting."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Case:
    """One model for the tests.

    Attributes:
        build: makes the model.
        call: its arguments.
        sites: where adapters go in papers: the output projections of attention and of the feed-forward.
        container: a whole layer, or what comes closest.
        last: the whole stack of layers, or what comes closest.
        repeated: a module that is called more than once.
        unfrozen: a host parameter to train along.
        linear: a site that is an nn.Linear of WIDTH features.
        generates: has `generate()`.
        hidden: takes `output_hidden_states=True`.
    """

    name: str
    build: Callable[[], nn.Module]
    call: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]
    sites: tuple[str, ...]
    container: str
    last: str
    unfrozen: str
    repeated: str | None = None
    linear: str | None = None
    generates: bool = False
    hidden: bool = False
    compiled: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """The same model each time, in eval mode; no parameter is left at zero or one."""
        torch.manual_seed(0)
        model = self.build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return model.eval()

    def args(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Its arguments, the same each time."""
        torch.manual_seed(1)
        return self.call()


def run(model: nn.Module, case: Case, **more: Any) -> Any:
    """One call of the model with the arguments of its case."""
    args, kwargs = case.args()
    return model(*args, **kwargs, **more)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in what a model returned, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = value.values()
    elif dataclasses.is_dataclass(value):
        value = vars(value).values()
    elif not isinstance(value, list | tuple):
        return []
    return [t for item in value for t in tensors(item)]


def loss(output: Any) -> Tensor:
    """A number that every float tensor of an output moves."""
    return torch.stack([t.float().pow(2).mean() for t in tensors(output) if t.is_floating_point()]).sum()


# ---------------------------------------------------------------------- Hugging Face

SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=40, **SIZES, max_position_embeddings=32))


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(RobertaConfig(vocab_size=40, **SIZES, max_position_embeddings=32))


def distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=40, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=32)
    )


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=39)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=40, **SIZES, num_key_value_heads=2, max_position_embeddings=32, eos_token_id=39)
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(vocab_size=40, **SIZES, num_key_value_heads=2, num_local_experts=2, max_position_embeddings=32)
    )


def mamba() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=WIDTH, state_size=4, num_hidden_layers=2, expand=2))


def whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=40,
            d_model=WIDTH,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=10,
            max_target_positions=20,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=39,
            decoder_start_token_id=2,
        )
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3, hidden_dropout_prob=0.1)
    )


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=3)
    )


def sentences() -> tuple[tuple[Any, ...], dict[str, Any]]:
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return (), {"input_ids": torch.randint(2, 39, (2, 7)), "attention_mask": mask}


def plain_ids() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_ids": torch.randint(2, 39, (2, 7))}


def pairs() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_ids": torch.randint(2, 39, (2, 7)), "decoder_input_ids": torch.randint(2, 39, (2, 5))}


def images() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"pixel_values": torch.randn(2, 3, 16, 16)}


def sounds() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": torch.randint(3, 39, (2, 5))}


# ---------------------------------------------------------------------- torch alone


@dataclasses.dataclass
class Halves:
    """What `Halving` returns."""

    left: Tensor
    right: Tensor


class Halving(nn.Module):
    """Returns a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Halves:
        y = self.fc(x)
        return Halves(y[..., : WIDTH // 2], y[..., WIDTH // 2 :])


class Picking(nn.Module):
    """Returns a tuple whose first tensor is of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return y.argmax(-1), y


class Naming(nn.Module):
    """Returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, *, states: Tensor) -> dict[str, Tensor]:
        return {"count": torch.tensor(states.shape[1]), "states": torch.tanh(self.fc(states))}


class Plain(nn.Module):
    """In-place operations, views, structures, a keyword-only tensor, a tied weight, a module called twice, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.act = nn.ReLU(inplace=True)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.halving = Halving()
        self.picking = Picking()
        self.naming = Naming()
        self.norm = nn.LayerNorm(WIDTH)
        self.out = nn.Linear(WIDTH, 20, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("shift", torch.randn(WIDTH))

    def forward(self, ids: Tensor, *, scale: Tensor) -> dict[str, Any]:
        h = self.embed(ids)
        h = self.act(self.first(h))
        h = h + self.shared(h)
        h = h + self.shared(h)
        h += self.shift
        h[:, 0] = 0.5
        halves = self.halving(h)
        h = h + torch.cat([halves.right, halves.left * scale], -1)
        best, picked = self.picking(h)
        h = h + picked.view(ids.shape[0], -1, WIDTH // 2).reshape(h.shape)
        named = self.naming(states=h)
        h = self.norm(h + named["states"])
        return {"logits": self.out(h), "best": best, "more": (h.mean(1), halves)}


class Block(nn.Module):
    """A layer of `stack`."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 48)
        self.down = nn.Linear(48, WIDTH)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.down(F.gelu(self.up(x))))


def stack() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), Block(), nn.Linear(WIDTH, 4)
    )


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


class Tagger(nn.Module):
    """A recurrent layer with three outputs, two of which are read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        states, (last, cell) = self.lstm(self.embed(ids))
        return {"tags": self.head(self.norm(states) + last[-1][:, None]), "cell": cell}


class Residual(nn.Module):
    """A layer of `ConvNet`: its sum is read by a norm and by the next sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(2, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv1(torch.relu(self.norm1(x)))
        return x + self.conv2(torch.relu(self.norm2(x)))


class ConvNet(nn.Module):
    """Convolutions in plain torch, with sums inside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList([Residual(8), Residual(8)])
        self.norm = nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.stem(pixel_values)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean((2, 3)))


def plain_call() -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (torch.randint(0, 20, (2, 4)),), {"scale": torch.rand(1)}


CASES = {
    case.name: case
    for case in (
        Case(
            "bert",
            bert,
            sentences,
            ("bert.encoder.layer.*.attention.output.dense", "bert.encoder.layer.*.output.dense"),
            "bert.encoder.layer.0",
            "bert.encoder",
            "classifier.weight",
            linear="bert.encoder.layer.*.attention.self.{query,value}",
            hidden=True,
        ),
        Case(
            "roberta",
            roberta,
            sentences,
            ("roberta.encoder.layer.*.attention.output.dense", "roberta.encoder.layer.*.output.dense"),
            "roberta.encoder.layer.1",
            "roberta",
            "classifier.dense.bias",
            repeated="classifier.dropout",
            linear="roberta.encoder.layer.*.attention.self.query",
            hidden=True,
        ),
        Case(
            "distilbert",
            distilbert,
            sentences,
            ("distilbert.transformer.layer.*.attention.out_lin", "distilbert.transformer.layer.*.ffn.lin2"),
            "distilbert.transformer.layer.0",
            "distilbert.transformer",
            "pre_classifier.weight",
            linear="distilbert.transformer.layer.*.attention.v_lin",
            hidden=True,
        ),
        Case(
            "gpt2",
            gpt2,
            plain_ids,
            ("transformer.h.*.attn.c_proj", "transformer.h.*.mlp.c_proj"),
            "transformer.h.0",
            "transformer",
            "transformer.ln_f.weight",
            generates=True,
            hidden=True,
        ),
        Case(
            "llama",
            llama,
            sentences,
            ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"),
            "model.layers.0",
            "model",
            "model.norm.weight",
            linear="model.layers.*.self_attn.q_proj",
            generates=True,
            hidden=True,
        ),
        Case(
            "t5",
            t5,
            pairs,
            ("**.{SelfAttention,EncDecAttention}.o", "**.DenseReluDense.wo"),
            "decoder.block.0",
            "encoder",
            "decoder.final_layer_norm.weight",
            repeated="encoder.dropout",
            linear="decoder.block.*.layer.1.EncDecAttention.q",
            generates=True,
            hidden=True,
        ),
        Case(
            "vit",
            vit,
            images,
            ("vit.layers.*.attention.o_proj", "vit.layers.*.mlp.fc2"),
            "vit.layers.0",
            "vit",
            "classifier.weight",
            repeated="vit.layers.*.dropout",
            linear="vit.layers.*.attention.v_proj",
            hidden=True,
        ),
        Case(
            "resnet",
            resnet,
            images,
            ("resnet.encoder.stages.*.layers.*.layer.1.convolution", "resnet.encoder.stages.*.layers.*.shortcut"),
            "resnet.encoder.stages.0.layers.1",
            "resnet.encoder",
            "resnet.encoder.stages.1.layers.0.layer.0.normalization.weight",
            hidden=True,
        ),
        Case(
            "sequential",
            stack,
            lambda: ((torch.randn(3, 8),), {}),
            ("1.0", "2.down"),
            "1",
            "2",
            "3.bias",
            linear="1.0",
        ),
        Case(
            "encoder",
            encoder,
            lambda: ((torch.randn(2, 5, WIDTH),), {}),
            ("layers.*.self_attn", "layers.*.linear2"),
            "layers.0",
            "layers.1",
            "layers.0.norm1.weight",
            linear=None,
        ),
        Case(
            "plain",
            Plain,
            plain_call,
            ("first", "halving", "picking", "naming"),
            "halving",
            "naming",
            "norm.weight",
            repeated="shared",
            linear="{first,shared,picking.fc}",
        ),
    )
}


# for the matrix of kinds only
MORE = {
    case.name: case
    for case in (
        Case(
            "mixtral",
            mixtral,
            plain_ids,
            ("model.layers.*.self_attn.o_proj", "model.layers.*.mlp"),
            "model.layers.0",
            "model",
            "model.norm.weight",
            generates=True,
            hidden=True,
        ),
        Case(
            "mamba",
            mamba,
            plain_ids,
            ("backbone.layers.*.mixer.out_proj",),
            "backbone.layers.0",
            "backbone",
            "backbone.norm_f.weight",
            hidden=True,
        ),
        Case(
            "whisper",
            whisper,
            sounds,
            ("**.{self_attn,encoder_attn}.out_proj", "**.fc2"),
            "model.decoder.layers.0",
            "model.encoder",
            "model.decoder.layer_norm.weight",
            generates=True,
            hidden=True,
        ),
        Case(
            "tagger",
            Tagger,
            lambda: ((torch.randint(0, 20, (2, 6)),), {}),
            ("lstm", "norm"),
            "norm",
            "lstm",
            "head.bias",
        ),
        Case("convnet", ConvNet, images, ("layers.*.conv2",), "layers.0", "layers.1", "head.bias"),
    )
}

# ---------------------------------------------------------------------- what a model is, to the last bit


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that importing and compiling must leave alone: bytes, places in memory, classes, modes, attributes."""
    state = {}
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        bytes_ = b"" if tensor.is_meta else tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        state[name] = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad, bytes_)
    for name, module in model.named_modules():
        hooks = {k: len(v) for k, v in vars(module).items() if k.endswith("hooks")}
        state["module " + name] = (id(module), type(module), module.training, list(vars(module)), hooks)
    return state


def keys(model: nn.Module) -> list[str]:
    """The keys of its state dict."""
    return list(model.state_dict())


def on_path(output: Any, path: tuple[Any, ...]) -> Any:
    """What stands at the end of a path of indices, keys and `.attributes`."""
    for key in path:
        output = getattr(output, key[1:]) if isinstance(key, str) and key.startswith(".") else output[key]
    return output
