"""`ag.places` on every architecture of the matrix: it finds what the source of transformers and torch names."""

import functools
import importlib.util
import inspect
import itertools
import linecache
import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, CAUSAL, EXPERTS, TEXT, WAVES, hugging, sound
from models import pairs, sentences, tensors
from torch import nn

import adaptergraph as ag
from adaptergraph.places import PRESETS


@functools.cache
def traced(name):
    architecture = ARCHITECTURES[name]
    model = architecture.model()
    args, kwargs = architecture.args()
    return model, ag.trace(model, *args, **kwargs)


def names(*templates):
    """`h.#.{a,b}` are four names: `#` is 0 or 1."""
    found = set()
    for template in templates:
        choices = [("0", "1") if c == "#" else c[1:-1].split(",") for c in re.findall(r"#|\{[^}]*\}", template)]
        blank = re.sub(r"#|\{[^}]*\}", "\0", template)
        for choice in itertools.product(*choices):
            rest = iter(choice)
            found.add(re.sub("\0", lambda _, rest=rest: next(rest), blank))
    return found


# Written from the source: the last projections of attention, those of feed-forward layers, those of queries and values,
# and what gives the outputs of the model. None: there is no such module.
LAYER = "encoder.layer.#."


def bert_like(prefix, head, self="attention.self.", qv="{query,value}"):
    at = prefix + LAYER
    return at + "attention.output.dense", at + "output.dense", at + self + qv, head


def llama_like(ffn="mlp.down_proj"):
    at = "model.layers.#."
    return at + "self_attn.o_proj", at + ffn, at + "self_attn.{q_proj,v_proj}", "lm_head"


def vit_like(at, head, ffn="mlp.fc2"):
    return at + "attention.o_proj", at + ffn, at + "attention.{q_proj,v_proj}", head


def clip_like(at, ffn="mlp.fc2"):
    return at + "self_attn.out_proj", at + ffn, at + "self_attn.{q_proj,v_proj}"


def swin(part):
    return f"swin.encoder.layers.0.blocks.#.{part}", f"swin.encoder.layers.1.blocks.0.{part}"


T5 = (
    ("{encoder,decoder}.block.#.layer.0.SelfAttention.o", "decoder.block.#.layer.1.EncDecAttention.o"),
    ("encoder.block.#.layer.1.DenseReluDense.wo", "decoder.block.#.layer.2.DenseReluDense.wo"),
    ("{encoder,decoder}.block.#.layer.0.SelfAttention.{q,v}", "decoder.block.#.layer.1.EncDecAttention.{q,v}"),
    "lm_head",
)
BART = (
    ("model.{encoder,decoder}.layers.#.self_attn.out_proj", "model.decoder.layers.#.encoder_attn.out_proj"),
    "model.{encoder,decoder}.layers.#.fc2",
    (
        "model.{encoder,decoder}.layers.#.self_attn.{q_proj,v_proj}",
        "model.decoder.layers.#.encoder_attn.{q_proj,v_proj}",
    ),
    "lm_head",
)
TOWERS = clip_like("{vision_model,text_model}.encoder.layers.#.")
KNOWN = {
    "bert": bert_like("bert.", "classifier"),
    "roberta": bert_like("roberta.", "classifier.out_proj"),
    "distilbert": (
        "distilbert.transformer.layer.#.attention.out_lin",
        "distilbert.transformer.layer.#.ffn.lin2",
        "distilbert.transformer.layer.#.attention.{q_lin,v_lin}",
        "classifier",
    ),
    # one layer, called twice
    "albert": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
        "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{query,value}",
        "classifier",
    ),
    "electra": bert_like("electra.", "classifier.out_proj"),
    "deberta": bert_like("deberta.", "classifier", qv="in_proj"),
    "deberta_v2": bert_like("deberta.", "classifier", qv="{query_proj,value_proj}"),
    "mpnet": (
        "mpnet.encoder.layer.#.attention.attn.o",
        "mpnet.encoder.layer.#.output.dense",
        "mpnet.encoder.layer.#.attention.attn.{q,v}",
        "classifier.out_proj",
    ),
    # its attention multiplies by parameters of its own, in a forward that also adds and normalises
    "xlnet": (None, "transformer.layer.#.ff.layer_2", None, "logits_proj"),
    # attention of all, and of the few positions that see everything
    "longformer": bert_like("longformer.", "classifier.out_proj", qv="{query,value,query_global,value_global}"),
    "modernbert": ("model.layers.#.attn.Wo", "model.layers.#.mlp.Wo", "model.layers.#.attn.Wqkv", "classifier"),
    "funnel": (
        "funnel.encoder.blocks.#.0.attention.post_proj",
        "funnel.encoder.blocks.#.0.ffn.linear_2",
        "funnel.encoder.blocks.#.0.attention.{q_head,v_head}",
        "classifier.linear_out",
    ),
    "gpt2": ("transformer.h.#.attn.c_proj", "transformer.h.#.mlp.c_proj", "transformer.h.#.attn.c_attn", "lm_head"),
    "gpt_neo": (
        "transformer.h.#.attn.attention.out_proj",
        "transformer.h.#.mlp.c_proj",
        "transformer.h.#.attn.attention.{q_proj,v_proj}",
        "lm_head",
    ),
    "gptj": (
        "transformer.h.#.attn.out_proj",
        "transformer.h.#.mlp.fc_out",
        "transformer.h.#.attn.{q_proj,v_proj}",
        "lm_head",
    ),
    "gpt_neox": (
        "gpt_neox.layers.#.attention.dense",
        "gpt_neox.layers.#.mlp.dense_4h_to_h",
        "gpt_neox.layers.#.attention.query_key_value",
        "lm_head",
    ),
    "opt": (*clip_like("model.decoder.layers.#.", ffn="fc2"), "lm_head"),
    "bloom": (
        "transformer.h.#.self_attention.dense",
        "transformer.h.#.mlp.dense_4h_to_h",
        "transformer.h.#.self_attention.query_key_value",
        "lm_head",
    ),
    "falcon": (
        "transformer.h.#.self_attention.dense",
        "transformer.h.#.mlp.dense_4h_to_h",
        "transformer.h.#.self_attention.query_key_value",
        "lm_head",
    ),
    **{name: llama_like() for name in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "olmo2")},
    "phi3": (
        "model.layers.#.self_attn.o_proj",
        "model.layers.#.mlp.down_proj",
        "model.layers.#.self_attn.qkv_proj",
        "lm_head",
    ),
    # all experts are one module
    **{name: llama_like("mlp.experts") for name in ("mixtral", "qwen3_moe", "gpt_oss")},
    # the first layer has no experts; queries, and keys with values, go through a narrow projection first
    "deepseek_v3": (
        "model.layers.#.self_attn.o_proj",
        ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.{experts,shared_experts.down_proj}"),
        "model.layers.#.self_attn.{q_b_proj,kv_b_proj}",
        "lm_head",
    ),
    "mamba": (None, None, None, "lm_head"),
    "mamba2": (None, None, None, "lm_head"),
    "rwkv": (None, "rwkv.blocks.#.feed_forward.value", None, "head"),
    "t5": T5,
    "mt5": T5,
    **dict.fromkeys(("bart", "mbart", "pegasus", "marian"), BART),
    "whisper": (*BART[:3], "proj_out"),
    "wav2vec2": (
        "wav2vec2.encoder.layers.#.attention.out_proj",
        "wav2vec2.encoder.layers.#.feed_forward.output_dense",
        "wav2vec2.encoder.layers.#.attention.{q_proj,v_proj}",
        "lm_head",
    ),
    "hubert": (
        "hubert.encoder.layers.#.attention.out_proj",
        "hubert.encoder.layers.#.feed_forward.output_dense",
        "hubert.encoder.layers.#.attention.{q_proj,v_proj}",
        "lm_head",
    ),
    "audio_spectrogram": vit_like("audio_spectrogram_transformer.layers.#.", "classifier.dense"),
    "vit": vit_like("vit.layers.#.", "classifier"),
    "deit": vit_like("deit.layers.#.", "classifier"),
    "beit": vit_like("beit.layers.#.", "classifier"),
    "dinov2": vit_like("dinov2.encoder.layer.#.", "classifier"),
    "swin": (
        swin("attention.o_proj"),
        swin("mlp.fc2"),
        swin("attention.{q_proj,v_proj}"),
        "classifier",
    ),
    "convnext": (
        None,
        ("convnext.encoder.stages.0.layers.#.pwconv2", "convnext.encoder.stages.1.layers.0.pwconv2"),
        None,
        "classifier",
    ),
    "resnet": (None, None, None, "classifier.1"),
    "segformer": vit_like("segformer.stages.#.blocks.0.", "decode_head.classifier"),
    "clip": (*TOWERS, "{visual_projection,text_projection}"),
    # its vision tower ends in attention by torch, whose projections are inside one module
    "siglip": (
        (TOWERS[0], "vision_model.head.attention"),
        (TOWERS[1], "vision_model.head.mlp.fc2"),
        TOWERS[2],
        "text_model.head",
    ),
    "blip": (
        ("vision_model.encoder.layers.#.self_attn.projection", "text_model.encoder.layer.#.attention.output.dense"),
        ("vision_model.encoder.layers.#.mlp.fc2", "text_model.encoder.layer.#.output.dense"),
        ("vision_model.encoder.layers.#.self_attn.qkv", "text_model.encoder.layer.#.attention.self.{query,value}"),
        "{visual_projection,text_projection}",
    ),
    "vilt": bert_like("", "pooler.dense", self="attention.attention."),
    "detr": (
        ("model.{encoder,decoder}.layers.#.self_attn.o_proj", "model.decoder.layers.#.encoder_attn.o_proj"),
        "model.{encoder,decoder}.layers.#.mlp.fc2",
        (
            "model.{encoder,decoder}.layers.#.self_attn.{q_proj,v_proj}",
            "model.decoder.layers.#.encoder_attn.{q_proj,v_proj}",
        ),
        "{class_labels_classifier,bbox_predictor.layers.2}",
    ),
    "llava": (
        (
            "model.vision_tower.encoder.layers.#.self_attn.out_proj",
            "model.language_model.layers.#.self_attn.o_proj",
        ),
        ("model.vision_tower.encoder.layers.#.mlp.fc2", "model.language_model.layers.#.mlp.down_proj"),
        "model.{vision_tower.encoder,language_model}.layers.#.self_attn.{q_proj,v_proj}",
        "lm_head",
    ),
    "nn.TransformerEncoder": ("layers.#.self_attn", "layers.#.linear2", None, None),
    "nn.TransformerEncoder (train)": ("layers.#.self_attn", "layers.#.linear2", None, None),
    "nn.MultiheadAttention": ("attention", None, None, None),
    "nn.Transformer": (
        ("{encoder,decoder}.layers.#.self_attn", "decoder.layers.#.multihead_attn"),
        "{encoder,decoder}.layers.#.linear2",
        None,
        None,
    ),
    "nn.LSTM": (None, None, None, "out"),
    "convolutional": (None, None, None, "9"),
}
# modules that the forward never calls: their weights are read by another module, or not at all
NEVER_CALLED = re.compile(r"\.?out_proj$|\.mixer\.dt_proj$|\.crossattention\.")


# Architectures that the matrix has not: (class, arguments, configuration), and the same four columns without the heads.
UNLISTED = {
    "parallel layers, partly rotary": (
        ("PhiForCausalLM", sentences, CAUSAL),
        ("model.layers.#.self_attn.dense", "model.layers.#.mlp.fc2", "model.layers.#.self_attn.{q_proj,v_proj}"),
    ),
    "parallel layers, added in turn": (
        ("CohereForCausalLM", sentences, CAUSAL),
        ("model.layers.#.self_attn.o_proj", "model.layers.#.mlp.down_proj", "model.layers.#.self_attn.{q_proj,v_proj}"),
    ),
    "scaled residuals": (
        ("GraniteForCausalLM", sentences, {**CAUSAL, "residual_multiplier": 0.3}),
        ("model.layers.#.self_attn.o_proj", "model.layers.#.mlp.down_proj", "model.layers.#.self_attn.{q_proj,v_proj}"),
    ),
    "norms after each branch": (
        ("Exaone4ForCausalLM", sentences, {**CAUSAL, "head_dim": 8}),
        ("model.layers.#.self_attn.o_proj", "model.layers.#.mlp.down_proj", "model.layers.#.self_attn.{q_proj,v_proj}"),
    ),
    "linear biases": (
        (
            "MptForCausalLM",
            sentences,
            {"vocab_size": 40, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        ),
        ("transformer.blocks.#.attn.out_proj", "transformer.blocks.#.ffn.down_proj", "transformer.blocks.#.attn.Wqkv"),
    ),
    "one state-space layer, one of gated attention, experts": (
        (
            "Qwen3NextForCausalLM",
            sentences,
            {
                **EXPERTS,
                "num_experts": 4,
                "moe_intermediate_size": 16,
                "shared_expert_intermediate_size": 16,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "layer_types": ["linear_attention", "full_attention"],
            },
        ),
        (
            "model.layers.1.self_attn.o_proj",
            "model.layers.#.mlp.{experts,shared_expert.down_proj}",
            "model.layers.1.self_attn.{q_proj,v_proj}",
        ),
    ),
    "attention in one call of torch, projections in modules": (
        ("WavLMModel", sound, WAVES),
        ("encoder.layers.#.attention", "encoder.layers.#.feed_forward.output_dense", None),
    ),
    "products in modules, grouped convolutions as projections": (
        ("SqueezeBertModel", sentences, {**TEXT, "embedding_size": 32}),
        (
            "encoder.layers.#.post_attention.conv1d",
            "encoder.layers.#.output.conv1d",
            "encoder.layers.#.attention.{query,value}",
        ),
    ),
    "landmarks, and a convolution of the values added to attention": (
        ("NystromformerModel", sentences, TEXT),
        (
            "encoder.layer.#.attention.output.dense",
            "encoder.layer.#.output.dense",
            "encoder.layer.#.attention.self.{query,value}",
        ),
    ),
    "three streams in the decoder": (
        (
            "ProphetNetForConditionalGeneration",
            pairs,
            {
                "vocab_size": 40,
                "hidden_size": 32,
                **{f"num_{part}_layers": 2 for part in ("encoder", "decoder")},
                **{f"num_{part}_attention_heads": 4 for part in ("encoder", "decoder")},
                **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
                "max_position_embeddings": 64,
            },
        ),
        (
            (
                "prophetnet.{encoder,decoder}.layers.#.self_attn.out_proj",
                "prophetnet.decoder.layers.#.cross_attn.out_proj",
            ),
            "prophetnet.{encoder,decoder}.layers.#.feed_forward.output",
            (
                "prophetnet.{encoder,decoder}.layers.#.self_attn.{query_proj,value_proj}",
                "prophetnet.decoder.layers.#.cross_attn.{query_proj,value_proj}",
            ),
        ),
    ),
    "adapters of its own in every layer": (
        ("XmodModel", sentences, {**TEXT, "languages": ["en"], "default_language": "en"}),
        (
            "encoder.layer.#.attention.output.dense",
            ("encoder.layer.#.output.dense", "encoder.layer.#.output.adapter_modules.en.dense2"),
            "encoder.layer.#.attention.self.{query,value}",
        ),
    ),
    "mixing by a Fourier transform": (
        ("FNetModel", sentences, TEXT),
        (None, "encoder.layer.#.output.dense", None),
    ),
}


def expanded(known):
    return known if known is None else names(*([known] if isinstance(known, str) else known))


def found(graph, preset):
    """What a preset finds; None where it says that it finds nothing."""
    try:
        return set(ag.places(graph, preset))
    except ag.UnknownNode:
        return None


def test_the_matrix_is_whole():
    assert set(KNOWN) == set(ARCHITECTURES)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_known_modules_are_found(name):
    model, graph = traced(name)
    attention, ffn, query_value, _ = map(expanded, KNOWN[name])
    modules = dict(model.named_modules())
    assert {*(attention or ()), *(ffn or ()), *(query_value or ())} <= set(modules)
    assert found(graph, "attention") == attention
    assert found(graph, "pfeiffer") == found(graph, "ffn") == ffn
    assert found(graph, "lora-attention") == query_value
    assert found(graph, "houlsby") == (attention | ffn if attention and ffn else None)


@pytest.mark.parametrize("name", UNLISTED)
def test_an_architecture_that_nobody_listed(name):
    (cls, call, options), known = UNLISTED[name]
    model = hugging(cls, **options).eval()
    args, kwargs = call()
    kwargs = {k: v for k, v in kwargs.items() if k in inspect.signature(model.forward).parameters}
    graph = ag.trace(model, *args, **kwargs)
    attention, ffn, query_value = map(expanded, known)
    assert found(graph, "attention") == attention
    assert found(graph, "pfeiffer") == ffn
    assert found(graph, "lora-attention") == query_value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_linear_is_every_linear_module_but_the_heads(name):
    from transformers.pytorch_utils import Conv1D

    model, graph = traced(name)
    heads = expanded(KNOWN[name][3]) or set()
    modules = dict(model.named_modules())
    assert heads <= set(modules)
    linear = {n for n, m in modules.items() if isinstance(m, nn.Linear | Conv1D)}
    pointwise = {n for n, m in modules.items() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    called = {n for n in linear | pointwise if n in graph or not NEVER_CALLED.search(n)}
    assert (found(graph, "all-linear") or set()) == called - heads


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_place_takes_a_body(name):
    _, graph = traced(name)
    for preset in PRESETS:
        at = found(graph, preset)
        if at and preset != "all-linear":
            spliced = graph.splice(ag.places(graph, preset), ag.Bottleneck(4))
            assert {body.host for body in spliced.bodies.values()} == at
            for other in PRESETS:
                assert found(spliced, other) == found(graph, other)


@pytest.mark.parametrize(
    "name", ["albert", "gpt2", "falcon", "mixtral", "gpt_oss", "deepseek_v3", "siglip", "swin", "nn.TransformerEncoder"]
)
def test_bodies_at_places_compute_what_hooks_would(name):
    model, graph = traced(name)
    args, kwargs = ARCHITECTURES[name].args()
    places = ag.places(graph, "houlsby")
    adapted = graph.splice(places, ag.Bottleneck(8)).compile().train(model.training)
    torch.manual_seed(2)
    handles = []
    for place in places:
        body = adapted.get_submodule(f"{place}.adapter")
        for parameter in body.parameters():
            nn.init.normal_(parameter)

        def hook(module, args, output, down=body.down, up=body.up):
            first, *rest = output if isinstance(output, tuple) else (output,)
            first = first + up(down(first).relu())
            return (first, *rest) if isinstance(output, tuple) else first

        handles.append(model.get_submodule(place).register_forward_hook(hook))
    try:
        with torch.no_grad():
            by_hand, ours = (tensors(m(*args, **kwargs)) for m in (model, adapted))
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        plain = tensors(model(*args, **kwargs))
    assert len(ours) == len(by_hand)
    for a, b in zip(ours, by_hand, strict=True):
        torch.testing.assert_close(a, b)
    assert not all(torch.allclose(a, b) for a, b in zip(ours, plain, strict=True))


ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "places.md").read_text()


class BeforeTheLast(nn.Module):
    """Reads what the last layer but one gives."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return self.head(states[-2])


def test_a_layer_of_which_nothing_comes_has_no_places():
    graph = ag.trace(BeforeTheLast(), torch.ones(2, 3, 16))
    found = ag.places(graph, "ffn")
    assert list(found) == ["layers.0.linear2", "layers.1.linear2"]
    assert len(graph.splice(found, ag.Bottleneck(2)).bodies) == 2
    with pytest.raises(ag.BadSplice, match=r"'layers.2.linear2' gives a value that reaches no output"):
        graph.splice("layers.*.linear2", ag.Bottleneck(2))


def test_the_listings_of_the_page_print_what_it_shows(tmp_path, capsys):
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.M | re.S)
    names = {"__name__": "page"}
    shown = [(code, blocks[i + 1][1]) for i, (kind, code) in enumerate(blocks) if kind == "python"]
    assert len(shown) == 2
    for code, text in shown:
        file = tmp_path / "places.py"
        file.write_text(code)
        try:
            exec(compile(code, str(file), "exec"), names)
            printed = capsys.readouterr().out
        except ag.GraphError as error:
            printed = f"{type(error).__name__}: {error}"
        linecache.clearcache()
        assert printed.strip() == text.strip()


def test_the_table_of_the_page_is_what_its_script_prints():
    spec = importlib.util.spec_from_file_location("places_table", ROOT / "benchmarks" / "places.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table(script.SHOWN) in PAGE
    rows = dict(re.findall(r"^\| (`\"[^|]*`) \| ([^|]*) \|$", PAGE, re.M))
    assert {name for row in rows for name in re.findall(r'"([^"]*)"', row)} == set(PRESETS)
