"""A case of a golden file as a graph of ours: each Axon layer as our call, kernels permuted, channels moved."""

from __future__ import annotations

import re
from typing import Any

import torch

import adaptergraph as ag

DTYPES = {"f32": torch.float32, "s64": torch.int64, "u8": torch.uint8, "s32": torch.int32}
RESIZE = {"nearest": "nearest-exact"}
# options of activations, Axon's word → torch's
OPTIONS = {"alpha": "alpha", "axis": "dim"}


def tensor(value: dict[str, Any]) -> torch.Tensor:
    """A tensor of the file."""
    return torch.tensor(value["data"], dtype=DTYPES[value["dtype"]]).reshape(value["shape"])


def flat(value: Any) -> list[torch.Tensor]:
    """The tensors of an output, in order."""
    if "data" in value:
        return [tensor(value)]
    parts = value["tuple"] if "tuple" in value else [value[k] for k in sorted(value)]
    return [t for part in parts for t in flat(part)]


def options_of(text: str) -> dict[str, Any]:
    """An Elixir keyword list as a dict."""
    text = re.sub(r"#Nx\.Tensor<\s*\S+\s+(\S+)\s*>", r"\1", text)
    text = text.strip()[1:-1].replace("{", "(").replace("}", ",)")
    text = re.sub(r"\bnil\b", "None", text)
    text = re.sub(r"\btrue\b", "True", text)
    text = re.sub(r"\bfalse\b", "False", text)
    text = re.sub(r"(?<![\w:]):(\w+)", r'"\1"', text)
    text = re.sub(r"(?<![\w\"])(\w+): ", r'"\1": ', text)
    return eval("{" + text + "}", {"__builtins__": {}})


class Reader:
    """Builds the graph of one case and the state of its model."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        self.nodes: dict[str, Any] = {}
        self.state: dict[str, torch.Tensor] = {}
        self.splits: dict[str, Any] = {}
        self.items: dict[str, Any] = {}
        for layer in case["layers"]:
            self.layer = layer
            self.name = layer["name"]
            self.options = options_of(layer["opts"]) if "#Function" not in layer["opts"] else {}
            self.params = case["params"].get(self.name, {})
            self.parents = [self.nodes[p] for p in layer["parents"]]
            op = layer["op_name"] if layer["op"] == "fun" else layer["op"]
            self.nodes[self.name] = getattr(self, f"_{op}", self._other)()

    def graph(self) -> ag.Graph:
        return ag.Graph(self.nodes[self.case["layers"][-1]["name"]])

    def inputs(self) -> dict[str, torch.Tensor]:
        return {name: tensor(value) for name, value in self.case["inputs"].items()}

    # ------------------------------------------------------------------ one method for each kind of layer

    def _input(self) -> Any:
        given = self.case["inputs"].get(self.name)
        dtype = DTYPES[given["dtype"]] if given else torch.float32
        shape = ["batch" if d is None else d for d in self.options["shape"]]
        return ag.input(self.name, shape, dtype, optional=self.options["optional"])

    def _other(self) -> Any:
        """An activation: our function of the same name."""
        call = getattr(ag, self.layer["op"])
        return call(self.parents[0], name=self.name, **{OPTIONS[k]: v for k, v in self.options.items()})

    def _custom(self) -> Any:
        """The file does not hold the function: it is in the text of the case."""
        if self.params:
            w = ag.param(f"{self.name}_w", tensor(self.params["w"]).shape)
            self.state[f"{self.name}_w"] = tensor(self.params["w"])
            return ag.layer(torch.mul, [self.parents[0], w], name=self.name)
        word = re.search(r"Axon\.Activations\.(\w+)", self.case["axon"])
        return ag.activation(self.parents[0], word[1], name=self.name)

    def _container(self) -> Any:
        return tuple(self.parents)

    def _constant(self) -> Any:
        return ag.constant(float(self.options["value"]), name=self.name)

    def _recurrent_state(self) -> None:
        """Zeros, which is where our states start."""

    def _add(self) -> Any:
        return getattr(ag, self.layer["op"])(self.parents[0], name=self.name)

    _subtract = _multiply = _add

    def _concatenate(self) -> Any:
        return ag.concatenate(self.parents[0], dim=self.options["axis"], name=self.name)

    def _split(self) -> Any:
        of = self.layer["parents"][0]
        sizes = self.options.get("splits") or [t.shape[-1] for t in flat(self.case["output"])]
        parts = self.splits.setdefault(of, iter(ag.split(self.parents[0], sizes)))
        return next(parts)

    def _optional(self) -> Any:
        return self.parents[0]

    def _or_else(self) -> Any:
        return ag.or_else(*self.parents, name=self.name)

    def _flatten(self) -> Any:
        return ag.flatten(self.parents[0], name=self.name)

    def _reshape(self) -> Any:
        return ag.reshape(self.parents[0], self.options["shape"], name=self.name)

    def _dropout(self) -> Any:
        return ag.dropout(self.parents[0], rate=self.options["rate"], name=self.name)

    def _dense(self) -> Any:
        self.put(weight=tensor(self.params["kernel"]).T, bias=self.params.get("bias"))
        size = self.params["kernel"]["shape"][1]
        return ag.dense(self.parents[0], size, bias="bias" in self.params, name=self.name)

    def _bilinear(self) -> Any:
        self.put(weight=self.params["kernel"], bias=self.params.get("bias"))
        size = self.params["kernel"]["shape"][0]
        return ag.bilinear(*self._pair(), size, bias="bias" in self.params, name=self.name)

    def _pair(self) -> Any:
        return self.parents[0] if isinstance(self.parents[0], tuple) else self.parents

    def _bias(self) -> Any:
        self.put(bias=self.params["bias"])
        return ag.bias(self.parents[0], name=self.name)

    def _embedding(self) -> Any:
        self.put(weight=self.params["kernel"])
        return ag.embedding(self.parents[0], *self.params["kernel"]["shape"], name=self.name)

    def _conv(self) -> Any:
        kernel = self.kernel()
        self.put(weight=kernel, bias=self.params.get("bias"))
        options = {"groups": self.options["feature_group_size"], **self.window(kernel)}
        return self.channels(lambda x: ag.conv(x, kernel.shape[0], **options))

    def _depthwise_conv(self) -> Any:
        kernel = self.kernel()
        self.put(weight=kernel, bias=self.params.get("bias"))
        return self.channels(lambda x: ag.depthwise_conv(x, kernel.shape[0] // x.shape[1], **self.window(kernel)))

    def _conv_transpose(self) -> Any:
        """Axon does not flip the kernel, torch does."""
        kernel = self.kernel()
        spatial = tuple(range(2, kernel.dim()))
        self.put(weight=kernel.transpose(0, 1).flip(spatial), bias=self.params.get("bias"))
        return self.channels(lambda x: ag.conv_transpose(x, kernel.shape[0], **self.window(kernel)))

    def _max_pool(self) -> Any:
        given = self.options
        options = {"kernel_size": given["kernel_size"], "stride": given["strides"], "padding": given["padding"]}
        options |= {"dilation": given["window_dilations"], **({"norm": given["norm"]} if "norm" in given else {})}
        return self.channels(lambda x: getattr(ag, self.layer["op"])(x, **options, name=self.name))

    _avg_pool = _lp_pool = _max_pool

    def _adaptive_avg_pool(self) -> Any:
        size = self.options["output_size"]
        return self.channels(lambda x: getattr(ag, self.layer["op"])(x, size, name=self.name))

    _adaptive_max_pool = _adaptive_avg_pool

    def _adaptive_lp_pool(self) -> Any:
        """Axon's adaptive pools are pools whose window and stride follow from the sizes."""
        return self.channels(lambda x: ag.lp_pool(x, norm=self.options["norm"], **as_window(x, self.options)))

    def _global_avg_pool(self) -> Any:
        keep = self.options["keep_axes"]
        return self.channels(lambda x: getattr(ag, self.layer["op"])(x, keep_dims=keep, name=self.name), back=keep)

    _global_max_pool = _global_avg_pool

    def _global_lp_pool(self) -> Any:
        norm, keep = self.options["norm"], self.options["keep_axes"]

        def pool(x: ag.Node) -> ag.Node:
            full = ag.lp_pool(x, norm=norm, kernel_size=x.shape[2:])
            return full if keep else ag.flatten(full)

        return self.channels(pool, back=keep)

    def _resize(self) -> Any:
        method = RESIZE.get(self.options["method"], self.options["method"])
        smooth = self.options["antialias"] and method in ("bilinear", "bicubic")
        return self.channels(lambda x: ag.resize(x, self.options["size"], method=method, antialias=smooth))

    def _pad(self) -> Any:
        return self.channels(lambda x: ag.pad(x, self.options["padding_config"], self.options["value"]))

    def _layer_norm(self) -> Any:
        self.put(weight=self.params["gamma"], bias=self.params.get("beta"))
        return getattr(ag, self.layer["op"])(self.parents[0], eps=self.options["epsilon"], name=self.name)

    _rms_norm = _layer_norm

    def _batch_norm(self) -> Any:
        self.put(weight=self.params["gamma"], bias=self.params["beta"])
        self.put(running_mean=self.params["mean"], running_var=self.params["var"])
        return self.channels(lambda x: ag.batch_norm(x, eps=self.options["epsilon"], name=self.name))

    def _group_norm(self) -> Any:
        self.put(weight=self.params["gamma"], bias=self.params["beta"])
        groups = self.options["num_groups"]
        return self.channels(lambda x: ag.group_norm(x, groups, eps=self.options["epsilon"], name=self.name))

    def _lstm(self) -> Any:
        self._gates("i", "f", "g", "o")
        self.put(bias_hh_l0=torch.zeros_like(self.state[f"{self.name}.bias_ih_l0"]))
        cell, hidden = self.parents[1]
        state = None if hidden is None else (hidden, cell)
        size = self.params["bias"]["bi"]["shape"][0]
        sequence, (hidden, cell) = ag.lstm(self.parents[0], size, state=state, mask=self.seen(), name=self.name)
        return {"output_sequence": sequence, "c_hidden_state": cell, "h_hidden_state": hidden}

    def _gru(self) -> Any:
        self._gates("r", "z", "n")
        zeros = torch.zeros_like(tensor(self.params["bias"]["bhn"]))
        self.put(bias_hh_l0=torch.cat([zeros, zeros, tensor(self.params["bias"]["bhn"])]))
        size = len(zeros)
        sequence, hidden = ag.gru(self.parents[0], size, state=self.parents[1][0], mask=self.seen(), name=self.name)
        return {"output_sequence": sequence, "hidden_state": hidden}

    def _gates(self, *gates: str) -> None:
        inner, outer, bias = (self.params[k] for k in ("input_kernel", "hidden_kernel", "bias"))
        self.put(weight_ih_l0=torch.cat([tensor(inner[f"wi{g}"]).T for g in gates]))
        self.put(weight_hh_l0=torch.cat([tensor(outer[f"wh{g}"]).T for g in gates]))
        self.put(bias_ih_l0=torch.cat([tensor(bias.get(f"b{g}") or bias[f"bi{g}"]) for g in gates]))

    def _elem(self) -> Any:
        return next(node for part, node in self.parents[0].items() if self.name.endswith(part))

    def _mask(self) -> Any:
        return ag.mask(self.parents[0], self.options["eos_token"], name=self.name)

    # ------------------------------------------------------------------ shared by them

    def seen(self) -> Any:
        """The mask of a recurrent layer; without one, Axon reads a constant zero."""
        return self.parents[2] if self.parents[2].op == "mask" else None

    def put(self, **values: Any) -> None:
        for key, value in values.items():
            if value is not None:
                self.state[f"{self.name}.{key}"] = value if isinstance(value, torch.Tensor) else tensor(value)

    def kernel(self) -> torch.Tensor:
        """HWIO as OIHW."""
        kernel = tensor(self.params["kernel"])
        if self.options.get("channels") == "first":
            return kernel
        last = kernel.dim() - 1
        return kernel.permute(last, last - 1, *range(last - 1))

    def window(self, kernel: torch.Tensor) -> dict[str, Any]:
        given = self.options
        options = {"kernel_size": tuple(kernel.shape[2:]), "stride": given["strides"], "padding": given["padding"]}
        return options | {"dilation": given["kernel_dilation"], "bias": "bias" in self.params, "name": self.name}

    def channels(self, make: Any, back: bool = True) -> Any:
        """Channels to where torch has them, and back."""
        x = self.parents[0]
        rank = len(x.shape)
        first = self.options.get("channels") == "first" or self.options.get("channel_index") == 1
        if first or rank < 3:
            return make(x)
        made = make(ag.transpose(x, (0, rank - 1, *range(1, rank - 1))))
        return ag.transpose(made, (0, *range(2, rank), 1)) if back else made


def as_window(x: ag.Node, options: dict[str, Any]) -> dict[str, Any]:
    """Axon's adaptive pools: stride = in // out, and the window is what is left."""
    sizes = list(zip(x.shape[2:], options["output_size"], strict=True))
    return {
        "stride": tuple(i // o for i, o in sizes),
        "kernel_size": tuple(i - (o - 1) * (i // o) for i, o in sizes),
    }
