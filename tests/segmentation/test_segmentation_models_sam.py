"""Segment Anything as a segmenter: its outputs, roles, prompts, sizes, and the whole way of a task."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SamConfig, SamModel
from transformers.models.sam.modeling_sam import SamVisionSdpaAttention

import fewtune
from fewtune.errors import ModelError
from fewtune.neurons import Role, describe
from fewtune.segmentation.models import Segmenter
from fewtune.segmentation.models.sam import SamSegmenter, resize
from fewtune.segmentation.models.sam_loading import sam_config
from segmenters import DEPTH, SIZE, images, masks, objective, random_sam, small_sam

HEAD = "sam.mask_decoder"


@pytest.fixture
def segmenter(tmp_path: Path) -> Segmenter:
    return small_sam(tmp_path)


def test_the_mask_is_that_of_transformers_without_a_prompt() -> None:
    """Values and gradients in float64, beside transformers' own attention with its whole matrix."""
    ours, theirs = SamSegmenter(random_sam()).double().eval(), random_sam().double()
    x = images(dtype=torch.float64)
    expected = theirs(pixel_values=x, multimask_output=False).pred_masks[:, 0]
    got = ours(x)
    assert got.shape == (2, 1, SIZE // 4, SIZE // 4)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    got.square().sum().backward()
    expected.square().sum().backward()
    reference = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in ours.sam.named_parameters():
        if (grad := reference[name].grad) is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(
                parameter.grad, grad, rtol=1e-7, atol=1e-10
            )  # keys' biases: zero, but for rounding
            compared += 1
    assert compared > 100


def largest_saved(model: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of all tensors that a forward pass keeps for the backward pass."""
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x)
    return shapes


def test_no_matrix_of_all_pairs_of_patches_is_kept() -> None:
    model, x, tokens = SamSegmenter(random_sam()).eval(), images(1), (SIZE // 16) ** 2
    assert not [s for s in largest_saved(model, x) if s[-2:] == (tokens, tokens)]
    for layer in model.sam.vision_encoder.layers:
        layer.attn.__class__ = SamVisionSdpaAttention
    assert [s for s in largest_saved(model, x) if s[-2:] == (tokens, tokens)]  # what transformers' own way keeps


def test_the_decoders_norms_are_the_originals(tmp_path: Path) -> None:
    """Beside the original package, in float64: 7e-15 with this epsilon, 1e-5 with that of transformers."""
    config = sam_config("sam:vit-b").mask_decoder_config
    assert config.layer_norm_eps == 1e-6
    transformer = small_sam(tmp_path).model.sam.mask_decoder.transformer
    norms = [m.eps for m in transformer.modules() if isinstance(m, nn.LayerNorm)]
    assert norms == [1e-5] * 9


def test_half_precision(segmenter: Segmenter) -> None:
    model = segmenter.model
    plain = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images())
        objective(model, images(), masks()).backward()
    torch.testing.assert_close(mixed.float(), plain, rtol=0.1, atol=0.1 * plain.std().item())
    assert all(p.grad.isfinite().all() for p in model.sam.vision_encoder.parameters())
    half = model.bfloat16()(images(dtype=torch.bfloat16))
    torch.testing.assert_close(half.float(), plain, rtol=0.1, atol=0.2 * plain.std().item())


def test_roles(segmenter: Segmenter) -> None:
    """Image encoder selected from, neck and patch convolution too; tables, norms and positions frozen; decoder head;
    the prompt encoder holds no parameter."""
    anatomy = describe(segmenter.model, segmenter.head)
    encoder = "sam.vision_encoder"
    blocks = [f"{encoder}.layers.{i}.{part}.weight" for i in range(DEPTH) for part in ("attn.qkv", "attn.proj")]
    blocks += [f"{encoder}.layers.{i}.mlp.lin{j}.weight" for i in range(DEPTH) for j in (1, 2)]
    others = ("patch_embed.projection", "neck.conv1", "neck.conv2")
    assert set(anatomy.views) == {*blocks, *(f"{encoder}.{name}.weight" for name in others)}
    assert len(anatomy.named(Role.RELATIVE_POSITION)) == 2 * DEPTH
    assert anatomy.named(Role.EMBEDDING) == (f"{encoder}.pos_embed",)
    assert len(anatomy.named(Role.BIAS)) == 4 * DEPTH + 1  # the neck's convolutions have none
    assert len(anatomy.named(Role.NORM)) == 4 * DEPTH + 4
    assert anatomy.named(Role.OTHER) == ()
    decoder = [name for name, _ in segmenter.model.named_parameters() if name.startswith(HEAD)]
    assert list(anatomy.named(Role.HEAD)) == decoder
    frozen = {name for name, _ in segmenter.model.named_buffers()}
    assert "sam.prompt_encoder.no_mask_embed.weight" in frozen
    assert "sam.shared_image_embedding.positional_embedding" in frozen


def test_counts_of_the_published_vit_b() -> None:
    with torch.device("meta"):
        model = SamSegmenter(SamModel(sam_config("sam:vit-b")))
    anatomy = describe(model, HEAD)
    neurons = sum(view.neurons for view in anatomy.views.values())
    biases = sum(anatomy.shapes[name][0] for name in anatomy.named(Role.BIAS))
    decoder = sum(p.numel() for p in model.sam.mask_decoder.parameters())
    # 12 blocks of 768 * (3 + 1 + 4 + 1) neurons, 768 of the patch embedding, 2 * 256 of the neck, which has no bias
    assert neurons == 12 * 9 * 768 + 768 + 512
    assert biases == 12 * 9 * 768 + 768
    assert anatomy.backbone_parameters == 89_670_912
    assert decoder == 4_058_340


def test_a_task_is_selected_trained_saved_and_reverted(segmenter: Segmenter, tmp_path: Path) -> None:
    model, batches = segmenter.model, [(images(), masks())]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = fewtune.gradient_importance(model, batches, objective, head=segmenter.head)
    selection = fewtune.select(scores, k=1)
    tuner = fewtune.attach(model, selection)
    optimizer = torch.optim.Adam(tuner.parameters(), lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = objective(model, *batches[0])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01
    tuned = model(images())
    tuner.delta(metadata={"backbone": segmenter.describe()}).save(tmp_path / "task.safetensors")
    tuner.detach(keep=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    delta = fewtune.load_delta(tmp_path / "task.safetensors")
    delta.apply(model)
    torch.testing.assert_close(model(images()), tuned)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "sam.vision_encoder.neck.conv2.weight" in moved
    assert "sam.vision_encoder.patch_embed.projection.weight" in moved
    assert f"{HEAD}.upscale_conv1.weight" in moved
    frozen = ("rel_pos", "norm", "pos_embed", "prompt_encoder", "shared_image_embedding")
    assert not [name for name in moved if HEAD not in name and any(word in name for word in frozen)]
    delta.revert(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


BOX = torch.tensor([[10.0, 20.0, 90.0, 100.0], [0.0, 0.0, 60.0, 50.0]])
POINTS = torch.tensor([[[30.0, 40.0], [100.0, 20.0]], [[64.0, 64.0], [5.0, 5.0]]])


@pytest.mark.parametrize(
    "prompt",
    [{"boxes": BOX}, {"points": POINTS}, {"points": POINTS, "point_labels": torch.tensor([[1, 0], [1, 1]])}],
    ids=["box", "points", "labels"],
)
def test_prompts_are_those_of_transformers(segmenter: Segmenter, prompt: dict[str, Tensor]) -> None:
    theirs = random_sam()
    named = {"boxes": "input_boxes", "points": "input_points", "point_labels": "input_labels"}
    expected = theirs(
        pixel_values=images(), multimask_output=False, **{named[key]: value[:, None] for key, value in prompt.items()}
    ).pred_masks[:, 0]
    got = segmenter.model(images(), **prompt)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, segmenter.model(images()), atol=1e-3)
    assert not got.isnan().any()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"boxes": BOX[:1]}, r"boxes of shape \(1, 4\); expected one box an image, \[2, 4\]"),
        ({"points": POINTS[:, 0]}, r"points of shape \(2, 2\); expected \[2, points, 2\]"),
        ({"points": POINTS, "point_labels": torch.ones(2, 3)}, r"point_labels of shape \(2, 3\); expected \[2, 2\]"),
        ({"point_labels": torch.ones(2, 2)}, "expected points with them"),
    ],
)
def test_prompts_of_another_shape_are_refused(segmenter: Segmenter, prompt: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        segmenter.model(images(), **prompt)


@pytest.mark.parametrize("training", [True, False])
def test_checkpointing_changes_no_number(training: bool) -> None:
    plain, saving = SamSegmenter(random_sam()).train(training), SamSegmenter(random_sam()).train(training)
    saving.set_grad_checkpointing()
    calls: list[str] = []
    saving.sam.vision_encoder.layers[0].attn.register_forward_hook(lambda *_: calls.append("attention"))
    outputs = []
    for model in (plain, saving):
        output = model(images())
        objective(model, images(), masks()).backward()
        outputs.append(output)
    assert torch.equal(*outputs)
    assert len(calls) == 3  # the first forward, and that of the objective with its repetition
    gradients = dict(saving.named_parameters())
    for name, parameter in plain.named_parameters():
        assert (parameter.grad is None) == (gradients[name].grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name].grad, parameter.grad, rtol=1e-5, atol=1e-7)
    kept = [len(largest_saved(model, images())) for model in (plain, saving)]
    assert kept[1] < 0.7 * kept[0]  # what is left is the decoder's


def test_attach_under_checkpointing_trains_the_same(segmenter: Segmenter) -> None:
    """Compact values get the same gradient whether activations are kept or computed again."""
    gradients = []
    for enable in (False, True):
        model = copy.deepcopy(segmenter.model)
        model.set_grad_checkpointing(enable)
        scores = fewtune.gradient_importance(model, [(images(), masks())], objective, head=segmenter.head)
        tuner = fewtune.attach(model, fewtune.select(scores, k=2))
        objective(model, images(), masks()).backward()
        gradients.append([p.grad for p in tuner.parameters()])
    for kept, again in zip(*gradients, strict=True):
        assert (kept is None) == (again is None)
        if kept is not None:
            torch.testing.assert_close(again, kept, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [96, 192])
def test_other_sizes(tmp_path: Path, size: int) -> None:
    segmenter = small_sam(tmp_path, image_size=size)
    grid, encoder, whole = size // 16, segmenter.model.sam.vision_encoder, random_sam().vision_encoder
    assert segmenter.image_size == size
    assert encoder.pos_embed.shape == (1, grid, grid, 48)
    for i, (layer, own) in enumerate(zip(encoder.layers, whole.layers, strict=True)):
        places = grid if i in (1, 3) else 3
        assert layer.attn.rel_pos_h.shape == (2 * places - 1, 16)
        torch.testing.assert_close(  # SAM's own code resamples while it runs
            own.attn.get_rel_pos(places, places, own.attn.rel_pos_w),
            layer.attn.get_rel_pos(places, places, layer.attn.rel_pos_w),
        )
    assert segmenter.model(images(size=size), boxes=BOX).shape == (2, 1, size // 4, size // 4)
    config: SamConfig = segmenter.model.sam.config
    rebuilt = SamModel(config)  # the configuration tells the size too
    rebuilt.load_state_dict(segmenter.model.sam.state_dict())
    expected = rebuilt.eval()(pixel_values=images(size=size), multimask_output=False).pred_masks[:, 0]
    torch.testing.assert_close(segmenter.model(images(size=size)), expected, rtol=1e-4, atol=1e-5)


def test_the_own_size_is_left_bit_for_bit(tmp_path: Path) -> None:
    sam = random_sam()
    before = copy.deepcopy(sam.state_dict())
    resize(sam, SIZE)
    after = sam.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)


def test_sizes_that_do_not_fit(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="takes images of 128 px, not 96 x 96"):
        segmenter.model(images(size=96))
    with pytest.raises(ModelError, match="must be a multiple of 16; the nearest is 96"):
        small_sam(tmp_path, image_size=100)
