"""Neurons and heads: every weight as [neurons, fan_in], told by the class of its module."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fewtune.errors import ModelError, SelectionError
from fewtune.neurons import Anatomy, Places, Role, View, describe, find_head, owners


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A layer that has neurons, and the shape of one input."""
    kind = draw(st.sampled_from(["linear", "Conv1D", "conv", "transposed"]))
    torch.manual_seed(draw(st.integers(0, 99)))
    if kind == "linear":
        width = draw(st.integers(1, 7))
        return nn.Linear(width, draw(st.integers(1, 7))), (width,)
    if kind == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        width = draw(st.integers(1, 7))
        layer = Conv1D(draw(st.integers(1, 7)), width)
        nn.init.normal_(layer.weight)
        return layer, (width,)
    dimensions, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    inputs, outputs = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
    kernel = tuple(draw(st.integers(1, 3 if dimensions < 3 else 2)) for _ in range(dimensions))
    dilation = draw(st.integers(1, 2))
    name = ("Conv" if kind == "conv" else "ConvTranspose") + f"{dimensions}d"
    layer = getattr(nn, name)(inputs, outputs, kernel, groups=groups, dilation=dilation)
    return layer, (inputs, *(dilation * (k - 1) + 2 for k in kernel))


def only_view(module: nn.Module) -> View:
    """The view of the module's weight, of which there is one."""
    (view,) = describe(module, head=None).views.values()
    return view


@given(layers())
@settings(max_examples=60, deadline=None)
def test_a_neurons_output_depends_on_exactly_its_row(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    layer.double()
    view = only_view(layer)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, dtype=torch.float64, generator=generator)
    outputs = layer(x)
    channel = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    weight: Any = layer.weight
    for neuron, output in enumerate(outputs.movedim(channel, 0)):
        mix = torch.randn(output.shape, dtype=torch.float64, generator=generator)
        (grad,) = torch.autograd.grad((output * mix).sum(), weight, retain_graph=True)
        reached = view.matrix(grad) != 0
        assert reached[neuron].all()
        assert int(reached.sum()) == view.fan_in


@given(layers())
@settings(max_examples=60, deadline=None)
def test_matrix_stored_and_stored_index_are_inverses(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    view = only_view(case[0])
    weight = torch.arange(view.neurons * view.fan_in).view(view.shape)
    matrix = view.matrix(weight)
    assert matrix.shape == (view.neurons, view.fan_in)
    assert torch.equal(view.stored(matrix), weight)
    assert torch.equal(view.matrix(view.stored(matrix)), matrix)
    flat = torch.arange(weight.numel())
    assert torch.equal(weight.reshape(-1)[view.stored_index(flat)], matrix.reshape(-1))


def test_bilinear_has_a_neuron_for_each_output() -> None:
    view = only_view(nn.Bilinear(3, 4, 5))
    assert (view.neurons, view.fan_in) == (5, 12)


def test_an_empty_weight_has_no_fan_in() -> None:
    assert View((0, 4)).fan_in == 0


@pytest.mark.parametrize("packed", [True, False])
def test_multihead_attention(packed: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, **({} if packed else {"kdim": 4, "vdim": 6}))
    anatomy = describe(attention, head=None)
    sizes = {name: (view.neurons, view.fan_in) for name, view in anatomy.views.items()}
    projections = (
        {"in_proj_weight": (24, 8)}
        if packed
        else {"q_proj_weight": (8, 8), "k_proj_weight": (8, 4), "v_proj_weight": (8, 6)}
    )
    assert sizes == projections | {"out_proj.weight": (8, 8)}
    assert anatomy.named(Role.BIAS) == ("in_proj_bias", "out_proj.bias")
    assert anatomy.named(Role.EMBEDDING) == ("bias_k", "bias_v")


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_places_and_masks_are_inverses(neurons: int, fan_in: int, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.booleans(), min_size=neurons * fan_in, max_size=neurons * fan_in))
    mask = torch.tensor(chosen).view(neurons, fan_in)
    places = Places.from_mask(mask)
    assert torch.equal(places.mask(), mask)
    assert len(places) == int(mask.sum())
    assert mask[places.rows, places.columns].all()
    assert bool((places.flat[1:] > places.flat[:-1]).all())
    counts = mask.sum(1)
    assert places.k == (int(counts[0]) if len(set(counts.tolist())) == 1 else None)
    again = Places.from_mask(mask)
    assert places == again
    assert hash(places) == hash(again)


def test_places_of_other_matrices_differ() -> None:
    flat = torch.tensor([1, 3])
    assert Places(2, 3, flat) != Places(3, 2, flat)
    assert Places(2, 3, flat) != Places(2, 3, torch.tensor([1, 4]))
    assert Places(2, 3, flat) != "places"


def timm_model(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    import timm

    sizes = {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return timm.create_model(name, num_classes=4, **(sizes | options))


def test_head_of_timm() -> None:
    assert find_head(timm_model()) == ("head",)
    assert find_head(timm_model("deit_tiny_distilled_patch16_224")) == ("head", "head_dist")
    headless = timm_model()
    headless.reset_classifier(0)  # type: ignore[operator]
    assert find_head(headless) == ()


def test_head_of_transformers() -> None:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    configuration = BertConfig(vocab_size=9, **sizes)
    assert find_head(BertForSequenceClassification(configuration)) == ("classifier",)
    assert find_head(BertModel(configuration)) == ()


def test_a_model_that_does_not_say_has_no_head_and_a_warning() -> None:
    from torchvision.models import resnet18

    with torch.device("meta"):
        model = resnet18()
    with pytest.warns(UserWarning, match="ResNet does not say which module is its head"):
        assert find_head(model) == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_head(model, "fc") == ("fc",)
        assert find_head(model, ["layer4", "fc"]) == ("layer4", "fc")
        assert find_head(model, None) == ()


@pytest.mark.parametrize("name", ["clasifier", ""])
def test_a_head_that_does_not_exist(name: str) -> None:
    model = nn.ModuleDict({"body": nn.Linear(2, 2), "classifier": nn.Linear(2, 2)})
    with pytest.raises(ModelError, match="the model has no module") as error:
        describe(model, name)
    assert not name or "did you mean 'classifier'" in str(error.value)


def test_the_head_is_never_selected_from() -> None:
    anatomy = describe(timm_model())
    assert not any(name.startswith("head.") for name in anatomy.views)
    assert anatomy.named(Role.HEAD) == ("head.weight", "head.bias")
    head = 24 * 4 + 4
    model = timm_model()
    assert anatomy.backbone_parameters == sum(p.numel() for p in model.parameters()) - head


def test_every_parameter_has_one_place() -> None:
    model = timm_model()
    anatomy = describe(model)
    assert list(anatomy.shapes) == [name for name, _ in model.named_parameters()]
    assert sorted([*anatomy.views, *anatomy.roles]) == sorted(anatomy.shapes)
    assert anatomy.connections == sum(model.get_parameter(name).numel() for name in anatomy.views)


class TwoHeads(nn.Module):
    """A body whose output layer shares the weight of its input layer, and a head."""

    def __init__(self, tied_to_head: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        (self.head if tied_to_head else self.second).weight = self.first.weight

    def get_classifier(self) -> nn.Module:
        return self.head


def test_tied_weights_count_once() -> None:
    model = TwoHeads()
    anatomy = describe(model)
    assert list(anatomy.views) == ["first.weight"]
    assert anatomy.connections == 16
    assert anatomy.backbone_parameters == 16 + 8
    held = [(owner.module_name, owner.attribute) for owner in owners(model)["first.weight"]]
    assert held == [("first", "weight"), ("second", "weight")]


def test_a_weight_that_the_head_shares_belongs_to_the_backbone() -> None:
    anatomy = describe(TwoHeads(tied_to_head=True))
    assert "first.weight" in anatomy.views
    assert anatomy.named(Role.HEAD) == ("head.bias",)


def test_an_embedding_tied_to_a_layer_is_that_layers_weight() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "out": nn.Linear(3, 5, bias=False)})
    model["out"].weight = model["table"].weight
    assert list(describe(model, None).views) == ["table.weight"]


def test_roles_by_hand() -> None:
    model = TwoHeads()
    anatomy = describe(model, roles={"second.*": "norm", "first.weight": Role.OTHER})
    assert not anatomy.views
    assert anatomy.named(Role.NORM) == ("second.bias",)
    assert anatomy.named(Role.OTHER) == ("first.weight",)
    assert describe(model).with_roles(None) == describe(model)


def test_roles_by_hand_that_are_mistaken() -> None:
    anatomy = describe(TwoHeads())
    with pytest.raises(SelectionError, match=r"'gain' \(for 'first.\*'\) is no role; expected one of bias, scale"):
        anatomy.with_roles({"first.*": "gain"})
    with pytest.raises(SelectionError, match=r"no parameter matches 'frist.bias' \(did you mean 'first.bias'"):
        anatomy.with_roles({"frist.bias": "norm"})


def test_anatomy_as_json_and_back() -> None:
    anatomy = describe(nn.Sequential(nn.ConvTranspose2d(4, 6, 2, groups=2), nn.LayerNorm(3)), head=None)
    assert Anatomy.from_json(anatomy.to_json()) == anatomy
