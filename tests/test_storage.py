"""Files: what is written, what is refused, and that a crash at any moment leaves an adapter whole."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import adaptergraph as ag


class Encoder(nn.Module):
    def __init__(self, size=16, layers=2, classes=3):
        super().__init__()
        self.embed = nn.Embedding(20, size)
        self.layer = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(size, size)}) for _ in range(layers))
        self.classifier = nn.Linear(size, classes)

    def forward(self, ids, mask=None):
        x = self.embed(ids)
        for layer in self.layer:
            x = x + layer["fc"](x).relu()
        return self.classifier(x.mean(1))


def base(**options):
    torch.manual_seed(0)
    return Encoder(**options).eval()


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
METHOD = ag.Bottleneck(4, activation="gelu")


def graph(model=None, method=METHOD):
    return ag.trace(model or base(), IDS).unfreeze("classifier").splice("layer.*.fc", method)


def randomised(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture
def saved(tmp_path):
    model = randomised(graph().compile())
    ag.save(model, tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_what_training_can_change_is_what_is_saved(saved):
    folder, model = saved
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert set(ag.adapter_state(model)) == names
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    text = json.loads((folder / "adapter.json").read_text())
    assert set(text["tensors"]) == names
    assert text["unfrozen"] == ["classifier.weight", "classifier.bias"]
    assert text["splices"][0]["at"] == "layer.*.fc"
    assert text["splices"][0]["method"] == {"method": "Bottleneck", "size": 4, "activation": "gelu"}


@pytest.mark.parametrize("kind", ["model", "graph", "spliced graph", "compiled", "in place"])
def test_loading_gives_the_same_outputs(saved, kind):
    folder, model = saved
    host = base()
    if kind == "model":
        loaded = ag.load(host, folder)
    elif kind == "graph":
        loaded = ag.load(ag.trace(host, IDS), folder)
    elif kind == "spliced graph":
        loaded = ag.load(graph(host), folder)
    elif kind == "compiled":
        loaded = graph(host).compile()
        assert ag.load(loaded, folder) is loaded
    else:
        loaded = ag.load(host, folder, inplace=True)
        assert loaded is host
    assert torch.equal(loaded.eval()(IDS), model.eval()(IDS))
    assert ag.graph_of(loaded) == ag.graph_of(model)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(ag.adapter_state(model))
    if kind != "in place":
        assert torch.equal(host(IDS), base()(IDS))


def test_a_declared_graph_is_saved_and_loaded(tmp_path):
    x = ag.input("x", shape=("batch", 8))
    declared = ag.Graph(ag.dense(ag.Adapter.wrap(ag.dense(x, 8, name="fc"), bottleneck_size=2), 3, name="head"))
    declared = declared.freeze("fc").splice("head", ag.Bottleneck(2, scale="learned"))
    model = randomised(declared.compile())
    ag.save(model, tmp_path)
    other = ag.load(declared, tmp_path)
    fixed = {n: v for n, v in model.state_dict().items() if n.startswith("fc")}
    other.load_state_dict({**other.state_dict(), **fixed})
    value = torch.randn(2, 8)
    assert torch.equal(other(value), model(value))


def test_a_parallel_linear_bottleneck_is_lora_with_biases_and_is_saved(tmp_path):
    method = ag.Bottleneck(4, parallel=True, activation="linear")
    model = randomised(ag.trace(base(), IDS).splice("layer.*.fc", method).compile())
    fc, value = model.layer[1]["fc"], torch.randn(5, 16)
    a, b = fc.adapter.down, fc.adapter.up
    by_hand = value @ fc.weight.T + fc.bias + (value @ a.weight.T + a.bias) @ b.weight.T + b.bias
    assert torch.allclose(fc(value), by_hand, rtol=1e-4, atol=1e-4)
    ag.save(model, tmp_path)
    assert torch.equal(ag.load(base(), tmp_path)(IDS), model(IDS))


def test_frozen_bodies_are_saved_and_stay_frozen(tmp_path):
    frozen = graph().freeze("**.adapter.down", bodies=True)
    model = frozen.compile()
    ag.save(model, tmp_path)
    loaded = ag.load(base(), tmp_path)
    assert ag.graph_of(loaded).trained == frozen.trained
    assert not loaded.layer[0]["fc"].adapter.down.weight.requires_grad


def test_buffers_of_what_is_trained_are_saved(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = ag.trace(net, torch.ones(2, 4)).unfreeze("1").splice("0", ag.Bottleneck(2)).compile().train()
    model(torch.randn(8, 4))
    assert "1.running_mean" in ag.adapter_state(model)
    ag.save(model, tmp_path)
    loaded = ag.load(net, tmp_path)
    assert torch.equal(loaded[1].running_mean, model[1].running_mean)
    assert not torch.equal(net[1].running_mean, model[1].running_mean)


# ---------------------------------------------------------------------- what was trained by hand


def by_hand(model):
    model.classifier.requires_grad_(True)


def another_head(model):
    model.classifier = nn.Linear(16, 3)


def a_wider_head(model):
    model.classifier = nn.Linear(16, 5)


@pytest.mark.parametrize("change", [by_hand, another_head, a_wider_head])
def test_what_is_trained_by_hand_is_not_left_out_in_silence(change, tmp_path):
    model = ag.trace(base(), IDS).splice("layer.*.fc", METHOD).compile()
    change(model)
    for left_out in (lambda: ag.save(model, tmp_path / "a"), lambda: ag.adapter_state(model)):
        with pytest.raises(ag.GraphError) as caught:
            left_out()
        first, *sides = str(caught.value).splitlines()
        assert first == "2 parameters of this Encoder would be left out: trained, but frozen in its graph"
        assert sides[0].split() == ["classifier.weight", "graph", "frozen", "model", "requires_grad=True"]
        assert "graph.unfreeze(['classifier.weight', 'classifier.bias']) before graph.compile()" in caught.value.hint
    with pytest.raises(ag.GraphError, match="would be left out"):
        ag.fit(model, {"ids": IDS, "labels": IDS[:, 0]}, loss=F.cross_entropy, folder=tmp_path / "a", progress=False)
    assert not os.path.exists(tmp_path / "a")
    model.requires_grad_(False)
    ag.save(model, tmp_path / "a")


def test_what_was_trained_by_hand_comes_along_as_the_message_says(tmp_path):
    model = ag.trace(base(), IDS).splice("layer.*.fc", METHOD).compile()
    by_hand(model)
    randomised(model)
    # what the message says
    names = ["classifier.weight", "classifier.bias"]
    model = ag.graph_of(model).unfreeze(names).compile(state=model.state_dict())
    expected = randomised(ag.trace(base(), IDS).unfreeze("classifier").splice("layer.*.fc", METHOD).compile())
    assert torch.equal(model(IDS), expected(IDS))
    again = ag.load(base(), ag.save(model, tmp_path))
    assert torch.equal(again(IDS), expected(IDS))


def test_one_of_two_tied_parameters_that_was_put_apart_and_trained(tmp_path):
    class Tied(Encoder):
        def __init__(self):
            super().__init__(classes=20)
            self.classifier.weight = self.embed.weight

    torch.manual_seed(0)
    model = ag.trace(Tied(), IDS).unfreeze("embed").splice("layer.*.fc", METHOD).compile()
    assert "embed.weight" in ag.adapter_state(model)
    model.classifier.weight = nn.Parameter(torch.randn(20, 16))
    with pytest.raises(ag.GraphError, match=r"^1 parameter of this Tied would be left out: trained, but frozen"):
        ag.save(model, tmp_path / "a")


def test_a_declared_host_trained_by_hand(tmp_path):
    x = ag.input("x", shape=("batch", 8))
    model = ag.Graph(ag.dense(x, 8, name="fc")).freeze().splice("fc", METHOD).compile()
    model.fc.bias.requires_grad_(True)
    with pytest.raises(ag.GraphError, match=r"graph\.unfreeze\(\['fc.bias'\]\)"):
        ag.save(model, tmp_path / "a")


def test_what_the_graph_does_not_know_gets_a_warning(tmp_path):
    """Such as what another library puts into the model, and saves in a way of its own."""
    model = randomised(graph().compile())
    model.layer[0].fc.lora = nn.Linear(16, 1)
    model.head = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    with pytest.warns(UserWarning, match="left out are") as caught:
        ag.save(model, tmp_path / "a")
    first, *sides = str(caught[0].message).splitlines()
    assert first == "left out are 4 parameters of this Encoder that its graph does not know"
    assert [side.split() for side in sides[:4]] == [
        ["layer.0.fc.lora.weight", "trained"],
        ["layer.0.fc.lora.bias", "trained"],
        ["head.0.weight", "frozen"],
        ["head.0.bias", "frozen"],
    ]
    assert torch.equal(ag.load(base(), tmp_path / "a")(IDS), model(IDS))


def test_lora_of_another_library_gets_a_warning(tmp_path):
    peft = pytest.importorskip("peft")
    model = ag.trace(base(), IDS).splice("layer.*.fc", METHOD).compile()
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["classifier"]))
    with pytest.warns(UserWarning, match="its graph does not know") as caught:
        ag.save(model, tmp_path / "a")
    assert "lora_A.default.weight   trained" in str(caught[0].message)


def test_half_precision_bodies_and_shared_storage_can_be_saved(tmp_path):
    model = graph(base().bfloat16()).compile(dtype=torch.bfloat16)
    ag.save(model, tmp_path)
    loaded = ag.load(ag.trace(base().bfloat16(), IDS), tmp_path)
    assert loaded.layer[0]["fc"].adapter.down.weight.dtype == torch.float32


# ---------------------------------------------------------------------- recipes


def test_a_recipe_does_the_same_to_another_graph():
    text = graph().recipe()
    plain = ag.trace(base(), IDS)
    assert ag.apply(plain, text) == graph()
    assert ag.apply(plain, json.loads(text)) == graph()


def test_a_recipe_written_by_hand(tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(
        '{"format": "adaptergraph.adapter/1", "splices": [{"at": "layer.0.fc", "method": {"method": "Bottleneck"}}]}'
    )
    assert list(ag.apply(ag.trace(base(), IDS), path).bodies) == ["layer.0.fc.adapter"]
    assert list(ag.apply(ag.trace(base(), IDS), str(path)).bodies) == ["layer.0.fc.adapter"]


def test_a_recipe_that_means_other_nodes_here():
    with pytest.raises(ag.StateMismatch, match=r"the selector 'layer\.\*\.fc' means other nodes here"):
        ag.apply(ag.trace(base(layers=3), IDS), graph().recipe())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the recipe is not readable: the file: Invalid JSON"),
        ('{"format": "peft"}', "the recipe is not readable: format: Input should be"),
        ('{"format": "adaptergraph.adapter/1", "spices": []}', "the recipe is not readable: spices: Extra inputs"),
        (
            '{"format": "adaptergraph.adapter/1", "splices": [{"at": "fc", "method": {"method": "Botleneck"}}]}',
            "'fc' is no node of this graph",
        ),
        (
            '{"format": "adaptergraph.adapter/1",'
            ' "splices": [{"at": "layer.0.fc", "method": {"method": "Botleneck"}}]}',
            "there is no method 'Botleneck'",
        ),
        (
            '{"format": "adaptergraph.adapter/1",'
            ' "splices": [{"at": "layer.0.fc", "method": {"method": "Bottleneck", "size": -1}}]}',
            r"Bottleneck\(size=-1\): Input should be greater than 0",
        ),
        (
            '{"format": "adaptergraph.adapter/1",'
            ' "splices": [{"at": "layer.0.fc", "name": "x\\");import os", "method": {"method": "Bottleneck"}}]}',
            "a node cannot be called",
        ),
    ],
)
def test_a_recipe_that_cannot_be_right(text, message):
    with pytest.raises(ag.GraphError, match=message):
        ag.apply(ag.trace(base(), IDS), text)


def test_a_method_that_is_code_is_refused_by_name(tmp_path):
    def mine(site):
        return site.output + ag.dense(site.output, 16)

    model = ag.trace(base(), IDS).splice("layer.0.fc", mine).compile()
    with pytest.raises(ag.GraphError, match=r"the method '.*mine' is code of yours"):
        ag.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


# ---------------------------------------------------------------------- files that are wrong


def unchanged(call, model):
    """Runs a load that must fail and shows that the model is as it was."""
    before = {n: (t.clone(), t.requires_grad) for n, t in (*model.named_parameters(), *model.named_buffers())}
    classes = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ag.GraphError) as caught:
        call(model)
    after = dict((*model.named_parameters(), *model.named_buffers()))
    assert list(after) == list(before)
    assert all(torch.equal(after[n], t) and after[n].requires_grad == g for n, (t, g) in before.items())
    assert {n: type(m) for n, m in model.named_modules()} == classes
    return caught.value


@pytest.fixture(params=["fresh", "in place", "compiled"])
def loading(request):
    """The three ways to load, each with the model that must not change."""
    if request.param == "fresh":
        return base(), lambda model, folder: ag.load(model, folder)
    if request.param == "in place":
        return base(), lambda model, folder: ag.load(model, folder, inplace=True)
    return graph().compile(), lambda model, folder: ag.load(model, folder)


def damage(folder, fn):
    path = folder / "adapter.safetensors"
    path.write_bytes(fn(path.read_bytes()))


def test_a_truncated_file(saved, loading):
    folder, _ = saved
    damage(folder, lambda raw: raw[:-7])
    model, load = loading
    error = unchanged(lambda m: load(m, folder), model)
    assert isinstance(error, ag.StateMismatch)
    assert "adapter.safetensors is damaged, or not the file that belongs to adapter.json" in str(error)
    assert error.hint == "copy both files again"


def test_a_flipped_bit(saved, loading):
    folder, _ = saved
    damage(folder, lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]))
    model, load = loading
    assert "is damaged" in str(unchanged(lambda m: load(m, folder), model))


def test_a_pickle_in_place_of_the_tensors(saved, loading):
    folder, _ = saved

    class Bomb:
        def __reduce__(self):
            return os.system, ("touch " + str(folder / "ran"),)

    damage(folder, lambda raw: pickle.dumps(Bomb()))
    model, load = loading
    assert "is damaged" in str(unchanged(lambda m: load(m, folder), model))
    stream = io.BytesIO()
    torch.save({"x": torch.ones(1)}, stream)
    damage(folder, lambda raw: stream.getvalue())
    assert "is damaged" in str(unchanged(lambda m: load(m, folder), model))
    assert not (folder / "ran").exists()


def rewrite(folder, **tensors):
    """Other tensors, with a checksum that is right: what a person with an editor could do."""
    import hashlib

    import safetensors.torch

    raw = safetensors.torch.save(tensors)
    (folder / "adapter.safetensors").write_bytes(raw)
    text = json.loads((folder / "adapter.json").read_text())
    text["checksum"] = "sha256:" + hashlib.sha256(raw).hexdigest()
    (folder / "adapter.json").write_text(json.dumps(text))


def test_wrong_shapes_missing_and_foreign_tensors_are_all_named(saved, loading):
    folder, trained = saved
    state = ag.adapter_state(trained)
    state["classifier.weight"] = torch.zeros(3, 17)
    del state["classifier.bias"]
    state["layer.0.fc.adaptor.down.weight"] = torch.zeros(1)
    state["layer.0.fc.weight"] = torch.zeros(16, 16)
    rewrite(folder, **state)
    model, load = loading
    text = str(unchanged(lambda m: load(m, folder), model))
    assert "the tensors of the adapter do not fit (4 differences)" in text
    assert "classifier.weight                model [3, 16]" in text.replace("  nearest", "")
    for part in (
        "file [3, 17]",
        "classifier.bias",
        "file has none",
        "layer.0.fc.adaptor.down.weight",
        "layer.0.fc.weight",
    ):
        assert part in text


def test_an_adapter_of_another_model(saved):
    folder, _ = saved
    text = str(unchanged(lambda m: ag.load(m, folder), base(size=24)))
    assert "the adapter was made for a Encoder with other parameters than this Encoder (6 differences)" in text
    assert "embed.weight" in text
    assert "adapter [20, 16]" in text
    assert "host [20, 24]" in text
    assert "adapter has none" in str(unchanged(lambda m: ag.load(m, folder), base(layers=3)))
    assert "host has none" in str(unchanged(lambda m: ag.load(m, folder), base(layers=1)))


def test_a_base_with_other_weights_gets_a_warning(saved):
    folder, _ = saved
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="trained on a Encoder with other frozen weights than these"):
        ag.load(Encoder(), folder)
    other = base()
    with torch.no_grad():
        other.layer[1]["fc"].weight *= 1.01
    with pytest.warns(UserWarning, match="other frozen weights than these, in 1 of its parameters") as caught:
        ag.load(other, folder)
    there, here = (float(m.layer[1]["fc"].weight[0, 0].detach()) for m in (base(), other))
    lines = str(caught[0].message).splitlines()
    assert lines[1].split() == ["layer.1.fc.weight", "there", f"{there:.6g}", "here", f"{here:.6g}"]
    assert lines[2].startswith("  to fix      load it onto the checkpoint that it was trained on")


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("here", DTYPES)
@pytest.mark.parametrize("there", DTYPES)
def test_the_same_base_in_another_dtype_gets_no_warning(tmp_path, there, here):
    """Also values that are too small for float16; and a base that is not the same still gets one."""

    def rounded(dtype, factor=1.0):
        model = base(size=64)
        with torch.no_grad():
            model.layer[0]["fc"].weight.mul_(1e-5)
            model.layer[1]["fc"].weight.mul_(factor)
        return model.to(dtype)

    ag.save(ag.trace(rounded(there), IDS).splice("layer.*.fc", METHOD).compile(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ag.load(rounded(here), tmp_path)
    with pytest.warns(UserWarning, match="other frozen weights than these"):
        ag.load(rounded(here, 1.03), tmp_path)


def test_values_that_are_no_numbers_are_the_same_base(tmp_path):
    def odd():
        model = base()
        with torch.no_grad():
            model.layer[0]["fc"].weight[0, 0] = float("nan")
            model.layer[1]["fc"].weight[0, 0] = float("-inf")
        return model

    ag.save(graph(odd()).compile(), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ag.load(odd(), tmp_path)
    with pytest.warns(UserWarning, match="in 2 of its parameters"):
        ag.load(base(), tmp_path)


def test_a_base_of_other_modules_gets_a_warning(saved):
    folder, _ = saved
    other = base()
    other.embed.__class__ = type("Another", (nn.Embedding,), {})
    with pytest.warns(UserWarning, match="trained on a Encoder with modules of other classes"):
        ag.load(other, folder)


def test_other_bodies_on_the_model_than_in_the_file(saved):
    folder, _ = saved
    other = graph(method=ag.Bottleneck(8)).compile()
    text = str(unchanged(lambda m: ag.load(m, folder), other))
    assert "the graph has other splices than the adapter" in text
    assert "'layer.*.fc': Bottleneck(8)" in text
    assert "'layer.*.fc': Bottleneck(4, activation='gelu')" in text


def test_a_graph_of_the_same_splices_that_trains_something_else(tmp_path):
    plain = ag.trace(base(), IDS).splice("layer.*.fc", METHOD)
    head = plain.unfreeze("classifier")
    model = randomised(head.compile())
    folder = ag.save(model, tmp_path / "head")
    with pytest.raises(ag.StateMismatch) as caught:
        ag.load(plain, folder)
    text = str(caught.value).splitlines()
    assert text[0] == "the graph does not train what the adapter trains"
    assert text[1].split() == ["classifier.weight", "graph", "frozen", "adapter", "trained"]
    # both ways out
    assert torch.equal(ag.load(plain.unfreeze("classifier"), folder)(IDS), model(IDS))
    assert torch.equal(ag.load(plain.unsplice(), folder)(IDS), model(IDS))

    model = randomised(plain.compile())
    folder = ag.save(model, tmp_path / "plain")
    with pytest.raises(ag.StateMismatch, match=r"^the graph trains more of the host than the adapter") as caught:
        ag.load(head, folder)
    assert "graph.freeze(['classifier.weight', 'classifier.bias'])" in caught.value.hint
    again = ag.load(head.freeze(["classifier.weight", "classifier.bias"]), folder)
    assert torch.equal(again(IDS), model(IDS))


def test_a_graph_with_the_same_method_elsewhere_shows_the_difference(saved):
    folder, _ = saved
    other = ag.trace(base(), IDS).unfreeze("classifier").splice("layer.*.fc", METHOD, name="other")
    with pytest.raises(ag.StateMismatch, match="the graph has other splices than the adapter") as caught:
        ag.load(other, folder)
    mine, theirs = str(caught.value).splitlines()[1:3]
    assert mine.endswith("after, name='other'")
    assert theirs.endswith("after, name='adapter'")


def test_files_that_are_not_there(tmp_path, saved):
    folder, _ = saved
    with pytest.raises(ag.GraphError, match=r"cannot read '.*nowhere/adapter.json': No such file"):
        ag.load(base(), tmp_path / "nowhere")
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(ag.GraphError, match=r"cannot read '.*adapter\.safetensors': No such file"):
        ag.load(base(), folder)


def test_a_recipe_is_no_adapter(tmp_path):
    (tmp_path / "adapter.json").write_text(graph().recipe())
    with pytest.raises(ag.GraphError, match="is a recipe, without tensors"):
        ag.load(base(), tmp_path)


def said(call):
    """The first line of an error at this line, and what it says to do."""
    with pytest.raises(ag.GraphError) as caught:
        call()
    assert caught.value.source.file == __file__
    return str(caught.value).splitlines()[0], caught.value.hint


def test_what_cannot_be_saved_says_which_step_is_missing(tmp_path):
    folder = str(tmp_path / "a")
    assert said(lambda: ag.save(base(), folder)) == (
        "this Encoder was not compiled from a graph",
        f"model = ag.trace(model, …).splice(at, method).compile(), train it, then ag.save(model, {folder!r})",
    )
    assert said(lambda: ag.save(graph(), folder)) == (
        "a graph has no values to save",
        f"model = graph.compile(), train it, then ag.save(model, {folder!r})",
    )
    assert said(lambda: ag.save(5, folder)) == ("5 is no model", "give what graph.compile() returned")
    assert said(lambda: ag.adapter_state(graph())) == (
        "this is a graph, not the model that is compiled from it",
        "model = graph.compile()",
    )
    assert not (tmp_path / "a").exists()


def test_swapped_arguments(saved):
    folder, model = str(saved[0]), saved[1]
    assert said(lambda: ag.save("x2", model)) == (
        f"the folder of save is a {type(model).__name__}, not a path",
        "ag.save(model, 'x2')",
    )
    assert said(lambda: ag.load(folder, base())) == (
        "the folder of load is a Encoder, not a path",
        f"ag.load(model, {folder!r})",
    )
    assert said(lambda: ag.load(folder, graph()))[1] == f"ag.load(model, {folder!r})"
    assert said(lambda: ag.save(model, 5)) == (
        "the folder of save is a int, not a path",
        "a path, such as 'adapter'",
    )


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.json"])
def test_a_file_of_an_adapter_where_its_folder_belongs(saved, name):
    path = str(saved[0] / name)
    assert said(lambda: ag.load(base(), path)) == (
        f"{path!r} is one of the two files of an adapter",
        f"give the folder {str(saved[0])!r}",
    )


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_of_an_adapter_is_no_state(saved, kind):
    folder = saved[0]
    with pytest.raises(ag.StateMismatch, match=r"is a folder of ag\.save, not a file of tensors") as caught:
        graph().compile(state=kind(folder))
    assert caught.value.hint == f"ag.load(model, {str(folder)!r}) makes the adapted model of a plain one"


def test_a_folder_that_is_a_file(tmp_path, saved):
    _, model = saved
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ag.GraphError, match="is a file, not a folder"):
        ag.save(model, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_nothing_to_save_on_meta(tmp_path):
    with torch.device("meta"):
        model = Encoder()
    compiled = ag.trace(model, IDS).splice("layer.0.fc", METHOD).compile()
    with pytest.raises(ag.GraphError, match=r"parameter 'layer.0.fc.adapter.down.weight' is on the meta device"):
        ag.save(compiled, tmp_path / "a")


def test_what_cannot_be_traced_again_says_so(tmp_path):
    class Odd(Encoder):
        def forward(self, ids, extra):
            return super().forward(ids)

    torch.manual_seed(0)
    model = Odd()
    ag.save(ag.trace(model, IDS, {"a": IDS}).splice("layer.0.fc", METHOD).compile(), tmp_path)
    with pytest.raises(ag.GraphError, match="the adapter does not say what the model is called with"):
        ag.load(model, tmp_path)
    ag.load(ag.trace(model, IDS, {"a": IDS}), tmp_path)


class ByNumber(nn.Module):
    """Its arguments have no keywords."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, *xs):
        return self.a(xs[0]) + self.b(xs[1])


class ByPosition(ByNumber):
    def forward(self, x, y=None, /, **more):
        return super().forward(x, more["z"] if y is None else y)


class ByAll(ByNumber):
    def forward(self, x, *more):
        return super().forward(x, *more)


@pytest.mark.parametrize("cls", [ByNumber, ByPosition, ByAll])
def test_arguments_without_a_keyword_are_given_again_by_position(cls, tmp_path):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(3, 8)
    graph = ag.trace(model, x, x.clone()).splice("a", ag.Bottleneck(2))
    assert graph.plan().flops == 2 * 3 * (2 * 8 * 8 + 2 * 8 * 2)
    compiled = graph.compile()
    for parameter in (p for n, p in compiled.named_parameters() if n in graph.body_params):
        nn.init.normal_(parameter)
    loaded = ag.load(model, ag.save(compiled, tmp_path))
    assert ag.graph_of(loaded) == graph
    assert torch.equal(loaded(x, 2 * x), compiled(x, 2 * x))


def test_arguments_by_position_and_by_keyword_together(tmp_path):
    torch.manual_seed(0)
    model, x = ByPosition().eval(), torch.randn(3, 8)
    graph = ag.trace(model, x, z=x.clone()).splice("a", ag.Bottleneck(2))
    assert ag.graph_of(ag.load(model, ag.save(graph.compile(), tmp_path))) == graph


def test_load_takes_models_and_graphs(saved):
    with pytest.raises(ag.GraphError, match="load takes a model or a graph, not str"):
        ag.load("model", saved[0])


# ---------------------------------------------------------------------- crashes

WRITER = """
import sys, torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import adaptergraph as ag
from test_storage import graph, randomised
model = graph(method=ag.Bottleneck(512)).compile()
print("ready", flush=True)
for i in range(10_000):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.fill_(i)
    ag.save(model, sys.argv[1])
"""


def test_a_killed_writer_leaves_a_whole_adapter(tmp_path):
    """A real process saves over an adapter again and again and is killed at many moments; each time one is whole."""
    folder = tmp_path / "adapter"
    model = graph(method=ag.Bottleneck(512)).compile()
    script = WRITER.format(tests=str(Path(__file__).parent))
    seen = set()
    for moment in range(8):
        writer = subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        writer.stdout.readline()
        time.sleep(0.05 + 0.013 * moment)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        ag.load(model, folder)
        values = {float(v) for p in ag.adapter_state(model).values() for v in p.unique()}
        assert len(values) == 1, "tensors of two saves are mixed"
        seen |= values
    assert seen


@pytest.mark.parametrize("step", range(1, 12))
def test_a_crash_at_every_system_call_leaves_a_whole_adapter(tmp_path, saved, monkeypatch, step):
    folder, old = saved
    new = randomised(graph().compile(), seed=2)
    calls = []

    def dies(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) == step:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "replace", "open"):
            patch.setattr(os, name, dies(name, getattr(os, name)))
        try:
            ag.save(new, folder)
            done = True
        except KeyboardInterrupt:
            done = False
    loaded = ag.load(base(), folder)
    found = [m for m in (old, new) if torch.equal(loaded(IDS), m.eval()(IDS))]
    assert found, "neither the old nor the new adapter"
    if done:
        assert found == [new]
    ag.save(new, folder)
    assert sorted(os.listdir(folder)) == ["adapter.json", "adapter.safetensors"]
    assert torch.equal(ag.load(base(), folder)(IDS), new.eval()(IDS))


def test_equal_predictions_in_a_new_process(saved):
    folder, model = saved
    script = textwrap.dedent(
        f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import adaptergraph as ag
        from test_storage import IDS, base
        print(ag.load(base(), {str(folder)!r}).eval()(IDS).tolist())
        """
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == model.eval()(IDS).tolist()
