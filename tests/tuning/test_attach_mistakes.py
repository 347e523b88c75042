"""What other libraries, or their users, do to an attached model: one clear line, or it works."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.testing._internal.two_tensor import TwoTensor

import fewtune
from attaching import batch, choose, cross_entropy_step, small_convnet, small_vit
from fewtune.errors import SelectionError, TuningError
from fewtune.tuning import Tuner, attach

CLASSES = 5


class Net(nn.Module):
    """A backbone and a head that can be replaced, as timm's models have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.norm = nn.BatchNorm1d(16)
        self.second = nn.Linear(16, 8)
        self.reset_classifier(CLASSES)

    def reset_classifier(self, classes: int) -> None:
        self.head = nn.Linear(8, classes)

    def get_classifier(self) -> nn.Module:
        return self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(F.relu(self.norm(self.first(x)))))


def attached() -> tuple[Net, Tuner, Tensor]:
    torch.manual_seed(0)
    model = Net()
    return model, attach(model, fewtune.select(fewtune.random_importance(model), k=2)), torch.randn(4, 12)


# ---- modules and parameters that are others than at attach ------------------------------------------------------


def stepped(model: Net, tuner: Tuner, x: Tensor) -> None:
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    model(x).sum().backward()
    optimizer.step()


def optimizer_step(model: Net, tuner: Tuner, x: Tensor) -> None:
    torch.optim.SGD(tuner.parameters(), lr=0.1).step()


SEEN = {
    "step": stepped,
    "sync": lambda model, tuner, x: tuner.sync(),
    "delta": lambda model, tuner, x: tuner.delta(),
    "plain state": lambda model, tuner, x: tuner.plain_state_dict(),
}


@pytest.mark.parametrize("where", SEEN)
def test_a_head_that_is_replaced_after_attach_is_noticed(where: str) -> None:
    """With as many classes as before, every shape fits, and the new head would be saved untrained."""
    model, tuner, x = attached()
    model.reset_classifier(CLASSES)
    with pytest.raises(TuningError, match=r"module of 'head.weight' was replaced .* detach, replace it first"):
        SEEN[where](model, tuner, x)
    tuner.detach()  # the way out
    attach(model, fewtune.select(fewtune.random_importance(model), k=2)).delta()


def test_a_head_that_is_replaced_while_training_is_noticed() -> None:
    model, tuner, _ = attached()
    optimizer = torch.optim.SGD(tuner.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.step()
    model.reset_classifier(CLASSES)
    optimizer.step()
    optimizer.step()
    with pytest.raises(TuningError, match=r"head\.weight"):
        optimizer.step()  # the eighth: it is looked for ever more rarely


@pytest.mark.parametrize("where", SEEN)
def test_synchronised_batch_normalisation_after_attach_is_noticed(where: str) -> None:
    """The conversion makes new modules, whose running statistics training would move."""
    model, tuner, x = attached()
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(model.norm) is nn.SyncBatchNorm
    see = optimizer_step if where == "step" else SEEN[where]  # its forward pass runs on GPUs only
    with pytest.raises(TuningError, match=r"norm was replaced .* convert_sync_batchnorm .* convert the model first"):
        see(model, tuner, x)


def test_synchronised_batch_normalisation_before_attach_stays_frozen() -> None:
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    tuner = attach(model, fewtune.select(fewtune.random_importance(model), k=2))
    model.train()
    assert not model.norm.training
    tuner.delta()


def test_a_wrapper_around_a_module_changes_nothing() -> None:
    """Compiled blocks have other names for the same parameters."""
    model, tuner, x = attached()
    before = tuner.delta()
    model.second = torch.compile(model.second, backend="eager")
    stepped(model, tuner, x)
    assert tuner.delta().positions.keys() == before.positions.keys()
    assert tuner.delta() != before


@pytest.mark.parametrize("where", ["delta", "plain state"])
def test_lora_on_an_attached_model_is_noticed(where: str) -> None:
    peft = pytest.importorskip("peft")
    model, tuner, x = attached()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["second"]))
    adapted(x).sum().backward()
    with pytest.raises(TuningError, match=r"parameter 'second\.lora_A\..*' that it did not have .* take it out"):
        SEEN[where](model, tuner, x)
    adapted.unload()
    tuner.delta()


# ---- weights that are replaced by something else ----------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


REPARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight norm": parametrizations.weight_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    "random pruning": lambda layer: prune.random_unstructured(layer, "weight", amount=2),
}


@pytest.mark.parametrize("how", REPARAMETRISED)
def test_a_tuned_weight_cannot_be_reparametrised(how: str) -> None:
    model, tuner, x = attached()
    before = model(x)
    with pytest.raises(TuningError, match=r"Linear\.weight was to be reparametrised .* detach the selection first"):
        REPARAMETRISED[how](model.second)
    assert torch.equal(model(x), before)
    tuner.delta()
    tuner.detach()
    REPARAMETRISED[how](model.second)


def test_a_tuned_weight_cannot_be_quantised() -> None:
    """As torchao's quantize_ does it: the parameter is replaced by one of a tensor subclass."""
    model, tuner, x = attached()
    weight = model.second._parameters["weight"].detach()
    with pytest.raises(TuningError, match=r"Linear\.weight was replaced by TwoTensor .* quantise the model first"):
        model.second.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    model(x).sum().backward()
    tuner.delta()


def test_torchao_on_an_attached_model_is_refused() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, _, _ = attached()
    with pytest.raises(TuningError, match="quantise the model first"):
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def test_layers_that_torch_quantises_in_place_are_noticed() -> None:
    model, tuner, _ = attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)
    with pytest.raises(TuningError, match=r"head\.weight"):
        tuner.delta()


def test_parameters_are_found_by_name_and_tied_weights_are_tied_again() -> None:
    """transformers' tie_weights asks for the parameter and sets it anew."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(6, 6, bias=False), "other": nn.Linear(6, 6, bias=False)})
    model["other"].weight = model["one"].weight
    tuner = attach(model, fewtune.select(fewtune.random_importance(model, head=None), k=2))
    assert model.get_parameter("one.weight") is dict(model.named_parameters())["one.weight"]
    model["other"].weight = model.get_parameter("one.weight")
    model["other"].weight = model["one"].weight
    x = torch.randn(3, 6)
    model["other"](x).sum().backward()
    assert next(iter(tuner.parameters())).grad is not None
    tuner.delta()


def test_transformers_ties_the_weights_of_an_attached_model() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    tuner = attach(model, fewtune.select(fewtune.random_importance(model, head=None), k=1))
    words = torch.randint(30, (2, 5))
    before = model(words).logits
    model.tie_weights()
    assert torch.equal(model(words).logits, before)
    tuner.delta()


# ---- modes and transforms ---------------------------------------------------------------------------------------


def test_attach_within_inference_mode_is_refused() -> None:
    model = Net()
    selection = fewtune.select(fewtune.random_importance(model), k=2)
    with torch.inference_mode(), pytest.raises(TuningError, match="inference_mode"):
        attach(model, selection)
    with torch.inference_mode():
        made_there = Net()
    with pytest.raises(TuningError, match="inference_mode"):
        attach(made_there, selection)
    attach(model, selection)


def test_a_delta_of_the_meta_device_is_refused() -> None:
    model, tuner, _ = attached()
    model.to("meta")
    with pytest.raises(TuningError, match="meta device"):
        tuner.delta()


def test_torchscript_of_an_attached_model() -> None:
    model, tuner, x = attached()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(TuningError, match=r"torch\.jit\.script .* detach"):
            torch.jit.script(model)
        with pytest.raises(TuningError, match=r"torch\.jit\.trace .*no_grad"):
            torch.jit.trace(model, x)
        with torch.no_grad():
            assert torch.allclose(torch.jit.trace(model.eval(), x)(x), model(x))
        tuner.detach()
        torch.jit.script(model)


def gradient_of_a_function(model: nn.Module, x: Tensor) -> object:
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(named)


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "grad": gradient_of_a_function,
    "vmap": lambda model, x: torch.func.vmap(lambda row: model(row[None]))(x),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
}


@pytest.mark.parametrize("make", [small_vit, small_convnet])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions_are_refused(transform: str, make: Callable[[], nn.Module]) -> None:
    model = make()
    tuner = attach(model, choose(model))
    images, _ = batch(0)
    with pytest.raises(TuningError, match=r"torch\.func .* detach"):
        TRANSFORMS[transform](model, images)
    cross_entropy_step(model, 0)
    tuner.delta()


def test_batches_of_gradients_are_refused() -> None:
    model, tuner, x = attached()
    y = model(x)
    gradients = torch.eye(y.numel()).view(-1, *y.shape)
    with pytest.raises(TuningError, match="is_grads_batched"):
        torch.autograd.grad(y, tuner.parameters(), gradients, is_grads_batched=True)


@pytest.mark.parametrize("how", [{"k": 10**400}, {"k": 10**5000}, {"k": -(10**400)}, {"budget": 10**400}])
@pytest.mark.parametrize("granularity", ["neuron", "network"])
def test_numbers_beyond_every_float_are_refused(how: dict[str, int], granularity: str) -> None:
    with pytest.raises(SelectionError, match="expected a number above 0"):
        fewtune.select(fewtune.random_importance(Net()), granularity=granularity, **how)


# ---- statistics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EvoNorm2dB0", "EvoNorm2dB1", "EvoNorm2dB2"])
def test_the_running_variance_of_evonorm_stays(kind: str) -> None:
    evo_norm = getattr(pytest.importorskip("timm.layers.evo_norm"), kind)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), evo_norm(8), nn.Flatten(1), nn.Linear(8 * 36, 4))
    tuner = attach(model, fewtune.select(fewtune.random_importance(model, head="3"), k=1))
    before = model[1].running_var.clone()
    model.train()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert torch.equal(model[1].running_var, before)
    tuner.detach()
    model.train()
    model(torch.randn(2, 3, 8, 8))
    assert not torch.equal(model[1].running_var, before)
