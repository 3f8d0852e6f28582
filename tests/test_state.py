"""Pretrained parameters into a declared graph: from a mapping or a file, all of them or a list of what does not fit."""

import pickle

import pytest
import torch
from safetensors.torch import save_file

import adaptergraph as ag


def graph():
    x = ag.input("x", shape=("batch", 4))
    return ag.Graph(ag.dense(ag.relu(ag.dense(x, 3, name="body.fc")), 2, name="head")).freeze().unfreeze("head")


def values():
    return {"body.fc.weight": torch.randn(3, 4), "body.fc.bias": torch.randn(3)}


@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_a_file_gives_the_same_as_its_mapping(tmp_path, as_path):
    state = values()
    save_file(state, tmp_path / "pretrained.safetensors")
    from_file = graph().compile(state=as_path(tmp_path / "pretrained.safetensors")).state_dict()
    from_mapping = graph().compile(state=state).state_dict()
    assert all(torch.equal(from_file[k], from_mapping[k]) for k in from_mapping)
    assert torch.equal(from_file["body.fc.weight"], state["body.fc.weight"])


def test_what_is_trained_may_be_missing_and_keeps_its_starting_value():
    model = graph().compile(state=values())
    assert torch.equal(model.head.weight, graph().compile().head.weight)
    spliced = graph().splice("body.fc", ag.Bottleneck(2)).compile(state=values())
    assert torch.equal(spliced.body.fc.weight, spliced.state_dict()["body.fc.weight"])


def test_a_frozen_host_must_be_there():
    state = values()
    del state["body.fc.bias"]
    with pytest.raises(ag.StateMismatch, match=r"body\.fc\.bias +is missing +it is frozen"):
        graph().compile(state=state)
    graph().unfreeze("body.fc.bias").compile(state=state)


def test_every_mismatch_is_listed_by_name():
    state = {
        "body.fc.wieght": torch.zeros(3, 4),
        "body.fc.weight": torch.zeros(4, 3),
        "body.fc.bias": [0.0, 0.0, 0.0],
    }
    with pytest.raises(ag.StateMismatch) as caught:
        graph().compile(state=state)
    lines = str(caught.value).splitlines()
    assert lines[0] == "3 tensors of state do not fit the model"
    assert lines[1].split(maxsplit=1) == ["body.fc.wieght", "no such parameter   nearest: body.fc.weight"]
    assert lines[2].split(maxsplit=1) == ["body.fc.weight", "model (3, 4)        given (4, 3)"]
    assert lines[3].split(maxsplit=1) == ["body.fc.bias", "model (3,)          given no tensor but a list"]


KINDS = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]


@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_values_of_another_kind_are_cast_as_torch_does_or_refused(dtype, to):
    state = {n: (v * 50).to(dtype) for n, v in values().items()}
    if torch.can_cast(dtype, to):
        model = graph().compile(state=state, dtype=to)
        assert all(
            torch.equal(model.state_dict()[n], torch.empty(v.shape, dtype=to).copy_(v)) for n, v in state.items()
        )
        return
    with pytest.raises(ag.StateMismatch, match=rf"body\.fc\.bias +model {to} +given {dtype}\n"):
        graph().compile(state=state, dtype=to)


def test_float_values_for_a_buffer_of_whole_numbers():
    x = ag.input("x", shape=("batch", 4))
    model = ag.Graph(ag.batch_norm(x, name="norm"))
    with pytest.raises(ag.StateMismatch, match=r"norm\.num_batches_tracked +model torch\.int64 +given torch\.float32"):
        model.compile(state={"norm.num_batches_tracked": torch.tensor(2.5)})
    assert model.compile(state={"norm.num_batches_tracked": torch.tensor(2)}).norm.num_batches_tracked == 2


def test_values_that_are_kept_in_another_way_are_refused():
    state = values()
    weight = state["body.fc.weight"]
    state["body.fc.weight"] = weight.to_sparse()
    with pytest.raises(ag.StateMismatch, match=r"model torch\.float32 +given torch\.float32, torch\.sparse_coo\n"):
        graph().compile(state=state)
    state["body.fc.weight"] = torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)
    with pytest.raises(ag.StateMismatch, match=r"model torch\.float32 +given torch\.qint8, quantized\n"):
        graph().compile(state=state)


def test_a_mismatch_in_a_file_names_the_file(tmp_path):
    save_file({"nothing.like.it": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ag.StateMismatch, match=r"3 tensors of '.*other\.safetensors' do not fit the model"):
        graph().compile(state=tmp_path / "other.safetensors")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ag.StateMismatch, match=r"none\.safetensors' cannot be read as safetensors"):
        graph().compile(state=tmp_path / "none.safetensors")


def test_a_pickle_is_never_opened(tmp_path):
    class Bad:
        def __reduce__(self):
            return (tmp_path / "ran").write_text, ("ran",)

    for make in (pickle.dumps, lambda bad: b"", lambda bad: b"\x10\x00\x00\x00\x00\x00\x00\x00" + b"{" * 16):
        (tmp_path / "model.bin").write_bytes(make(Bad()))
        with pytest.raises(ag.StateMismatch, match="cannot be read as safetensors") as caught:
            graph().compile(state=tmp_path / "model.bin")
        assert "torch.save may run code" in caught.value.hint
    assert not (tmp_path / "ran").exists()
