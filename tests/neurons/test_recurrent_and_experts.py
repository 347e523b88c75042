"""Gates of recurrent layers and the experts of a mixture are neurons, and what is still unknown is said aloud."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fewtune
from fewtune.methods import gps
from fewtune.neurons import Role, View, describe


def test_gates_of_recurrent_layers() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(5, 7, 2, proj_size=6), "gru": nn.GRU(5, 3), "cell": nn.RNNCell(4, 2)})
    anatomy = describe(model, head=None)
    assert anatomy.views["lstm.weight_ih_l0"] == View((28, 5))
    assert anatomy.views["lstm.weight_hr_l1"] == View((6, 7))
    assert anatomy.views["gru.weight_hh_l0"] == View((9, 3))
    assert anatomy.views["cell.weight_ih"] == View((2, 4))
    assert set(anatomy.roles.values()) == {Role.BIAS}
    assert anatomy.unknown_share == 0


def test_experts() -> None:
    """[experts, out, in], and stored the other way in GPT-OSS: a neuron is one output of one expert."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    sizes = {"hidden_size": 6, "intermediate_size": 5, "num_local_experts": 3}
    plain = describe(MixtralExperts(transformers.MixtralConfig(**sizes)), head=None)
    assert plain.views == {"gate_up_proj": View((3, 10, 6), "experts"), "down_proj": View((3, 6, 5), "experts")}
    other = describe(GptOssExperts(transformers.GptOssConfig(**sizes)), head=None)
    assert other.views["gate_up_proj"] == View((3, 6, 10), "experts transposed")
    assert other.named(Role.BIAS) == ("gate_up_proj_bias", "down_proj_bias")
    for view in (*plain.views.values(), *other.views.values()):
        assert View.from_json([list(view.shape), view.kind, view.groups]) == view
        weight = torch.randn(view.shape)
        matrix = view.matrix(weight)
        assert torch.equal(view.stored(matrix), weight)
        assert torch.equal(weight.view(-1)[view.stored_index(torch.arange(weight.numel()))], matrix.reshape(-1))
        expert, neuron = weight[1], 2
        row = expert[neuron] if view.kind == "experts" else expert[:, neuron]
        assert torch.equal(matrix[view.neurons // 3 + neuron], row)


def test_a_summary_and_a_run_warn_where_much_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    class Table(nn.Module):
        def __init__(self, rows: int) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(rows, 10))
            self.layer = nn.Linear(10, 10)

    def summary(rows: int) -> str:
        caplog.clear()
        return gps.choose(gps.Settings(k=1), fewtune.random_importance(Table(rows), head=None)).summary()

    assert "warning: 65 % of the backbone is of unknown role" in summary(20)
    assert "warning: 65 % of the backbone is of unknown role" in caplog.text
    assert "warning" not in summary(1)
    assert "warning" not in caplog.text
    assert "frozen, role unknown: table" in summary(1)
