"""Tests against independent truths: closed forms, float64, a second process, a number painted into a frame. No network, no GPU."""
import argparse
import functools
import json
import math
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sigma
from sigma import SIGMA, sinkhorn, sinkhorn_argmax, tube_mask

HERE = Path(__file__).parent


# ============ sigma.py: tubes and mask ============

def test_tube_mask_hides_the_same_patches_in_every_frame_and_exactly_so_many():
    mask = tube_mask(5, frames=8, patches=196, ratio=0.9, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (5, 8 * 196) and mask.dtype == torch.bool
    frames = mask.view(5, 8, 196)
    assert (frames == frames[:, :1]).all() and (frames.sum(dim=2) == 176).all()
    assert len({tuple(clip.tolist()) for clip in frames[:, 0]}) == 5                        # drawn per clip
    assert torch.equal(mask, tube_mask(5, 8, 196, 0.9, generator=torch.Generator().manual_seed(0)))


def test_tube_mask_is_uniform_over_patches():
    share = tube_mask(20_000, frames=1, patches=10, ratio=0.3, generator=torch.Generator().manual_seed(1)).float().mean(dim=0)
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 20_000)                    # five standard deviations


def test_split_mask_lists_both_kinds_in_ascending_order():
    mask = tube_mask(3, 4, 9, 0.5)
    visible, masked = sigma.split_mask(mask, "cpu")
    for b in range(3):
        assert visible[b].tolist() == [i for i in range(36) if not mask[b, i]]
        assert masked[b].tolist() == [i for i in range(36) if mask[b, i]]


@pytest.mark.parametrize("mask", [torch.zeros(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool), torch.tensor([[True, False], [True, True]])])
def test_split_mask_refuses_what_has_no_static_shape(mask):
    with pytest.raises(ValueError, match="same number of masked tubes"):
        sigma.split_mask(mask, "cpu")


def test_patchify_puts_every_pixel_where_the_definition_says():
    video = torch.randn(2, 3, 4, 32, 48)
    tubes = sigma.patchify(video, 16).view(2, 2, 2, 3, 2, 16, 16, 3)                        # [B, t, h, w, frame, row, column, channel]
    for t, h, w, frame, row, column, channel in ((0, 0, 0, 0, 0, 0, 0), (1, 1, 2, 1, 15, 3, 2), (0, 1, 1, 1, 7, 9, 1)):
        assert torch.equal(tubes[:, t, h, w, frame, row, column, channel], video[:, channel, 2 * t + frame, 16 * h + row, 16 * w + column])


def test_embedding_the_visible_tubes_equals_convolving_the_clip():
    model = SIGMA("tiny", frames=4, image_size=32)
    video, index = torch.randn(2, 3, 4, 32, 32), torch.tensor([[3, 7, 20], [0, 1, 31]])
    whole = model.encoder.patch_embed["proj"](video).flatten(2).transpose(1, 2) + sigma.sincos_table(32, 192)
    model.encoder.blocks, model.encoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    tokens = model.encoder(sigma.take_tubes(sigma.patchify(video, 8), index), index)
    torch.testing.assert_close(tokens, sigma.take_tubes(whole, index), atol=1e-5, rtol=1e-4)


def test_normalized_tubes_are_the_raw_pixels_normalised():
    raw = torch.rand(2, 5, 128, 3, dtype=torch.float64)
    given = (raw - torch.tensor(sigma.IMAGENET_MEAN)) / torch.tensor(sigma.IMAGENET_STD)
    expected = (raw - raw.mean(dim=2, keepdim=True)) / (raw.std(dim=2, keepdim=True) + 1e-6)
    torch.testing.assert_close(sigma.normalize_tubes(given.flatten(2).float()), expected.flatten(2).float(), atol=2e-5, rtol=1e-4)


def test_position_table():
    table = sigma.sincos_table(50, 6)
    for position, j in ((0, 0), (3, 4), (49, 5), (17, 1)):
        angle = position / 10000 ** (2 * (j // 2) / 6)
        assert table[position, j].item() == pytest.approx(math.cos(angle) if j % 2 else math.sin(angle), abs=1e-6)


# ============ sigma.py: Sinkhorn ============

def reference_sinkhorn(scores, eps=0.05, iterations=10):
    """The definition in float64 logarithms: from scores / eps, columns then rows, `iterations` times, rows last."""
    log_q = scores.double() / eps
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.softmax(dim=1)


def unit_scores(n, k, width=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, c = (F.normalize(torch.randn(count, width, generator=generator) + 0.5, dim=1) for count in (n, k))
    return x @ c.T


@pytest.mark.parametrize("n, k, eps", [(300, 40, 0.05), (40, 300, 0.05), (500, 30, 0.03), (64, 1, 0.05), (1, 64, 0.05), (200, 20, 0.5)])
def test_sinkhorn_equals_float64(n, k, eps):
    scores = unit_scores(n, k)
    torch.testing.assert_close(sinkhorn(scores, eps).double(), reference_sinkhorn(scores, eps), atol=2e-5, rtol=1e-3)


def test_sinkhorn_starts_from_one_kernel_for_the_whole_matrix():
    scores = unit_scores(200, 20) + torch.linspace(0, 1, 200)[:, None]                       # rows of very different level
    q = sinkhorn(scores, 0.05, 3)
    torch.testing.assert_close(q.double(), reference_sinkhorn(scores, 0.05, 3), atol=2e-5, rtol=1e-3)
    shifted = sinkhorn(scores - scores.amax(dim=1, keepdim=True), 0.05, 3)                   # the tempting mistake is another plan
    assert (q - shifted).abs().max() > 0.01
    torch.testing.assert_close(q, sinkhorn(scores + 100, 0.05, 3), atol=1e-3, rtol=1e-2)     # one number for all changes nothing


def test_sinkhorn_marginals():
    q = sinkhorn(unit_scores(400, 25), eps=0.3, iterations=200)
    torch.testing.assert_close(q.sum(dim=1), torch.ones(400))
    torch.testing.assert_close(q.sum(dim=0), torch.full((25,), 16.0), atol=1e-2, rtol=1e-3)
    assert (sinkhorn(unit_scores(400, 25), iterations=0) - (unit_scores(400, 25) / 0.05).softmax(dim=1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1.0, 30.0, 1e4, 3e38])
def test_sinkhorn_is_finite_for_every_finite_score(dtype, size):
    if size > torch.finfo(dtype).max:
        size = torch.finfo(dtype).max
    scores = ((2 * torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) - 1).double() * size).to(dtype)
    scores[0], scores[:, 1], scores[2, 2] = -size, -size, size
    q = sinkhorn(scores)
    assert q.dtype == torch.float32 and q.isfinite().all()
    torch.testing.assert_close(q.sum(dim=1), torch.ones(64))
    if size <= 1e4:
        torch.testing.assert_close(q.double(), reference_sinkhorn(scores.float()), atol=1e-3, rtol=1e-2)


def test_sinkhorn_where_one_shift_would_underflow():
    scores = torch.zeros(6, 3)
    scores[3:] = -50                                                    # e^(-1000) below the others: all zero after a common shift
    scores += torch.tensor([0.0, 0.01, 0.02])
    torch.testing.assert_close(sinkhorn(scores).double(), reference_sinkhorn(scores), atol=1e-4, rtol=1e-3)


def test_hard_assignment_is_the_argmax_of_the_plan():
    scores = unit_scores(500, 60)
    assert torch.equal(sinkhorn_argmax(scores), reference_sinkhorn(scores).argmax(dim=1))
    assert not scores.requires_grad and not sinkhorn(scores.requires_grad_()).requires_grad


# ============ sigma.py: the model ============

def rng(name):
    return np.random.default_rng(zlib.crc32(name.encode()))


def fill(state_dict):
    """name -> tensor of that shape drawn from the name alone, so that other code with these names computes the same."""
    filled = {}
    for name, value in state_dict.items():
        noise = torch.from_numpy(rng(name).standard_normal(tuple(value.shape), dtype=np.float32))
        if name.endswith("prototypes"):
            filled[name] = noise
        elif "norm" in name and name.endswith("weight"):
            filled[name] = 1 + 0.05 * noise
        elif value.ndim <= 1 or name.endswith(("mask_token", "pos_embed", "cls_token")):
            filled[name] = 0.05 * noise
        else:
            filled[name] = noise / value[0].numel() ** 0.5
    return filled


def parity_clip():
    coarse = torch.from_numpy(rng("video").random((2, 3, 4, 14, 14), dtype=np.float32))
    clip = F.interpolate(coarse, size=(16, 224, 224), mode="trilinear")
    clip = (clip + 0.05 * torch.from_numpy(rng("grain").standard_normal(clip.shape, dtype=np.float32))).clamp(0, 1)
    mask = torch.zeros(2, 8, 196, dtype=torch.bool)
    for b in range(2):
        mask[b][:, torch.from_numpy(rng(f"mask{b}").permutation(196)[:176].copy())] = True
    return (clip - torch.tensor(sigma.IMAGENET_MEAN).view(3, 1, 1, 1)) / torch.tensor(sigma.IMAGENET_STD).view(3, 1, 1, 1), mask.flatten(1)


# What the authors' release computes from these weights, this video and this mask.
RELEASE = {
    "mlp": (16.367634, {"prototypes": 0.337176, "head.0.weight": 0.519883, "encoder.patch_embed.proj.weight": 0.0651179, "decoder.head.weight": 0.205296}),
    "pixel": (2.016308, {"mask_token": 0.117629, "encoder.patch_embed.proj.weight": 0.154097, "decoder.head.weight": 0.576168}),
}


@pytest.mark.parametrize("target", ["mlp", "pixel"])
def test_losses_and_gradients_of_the_release(target):
    model = SIGMA("small", target, "l2" if target == "pixel" else "sigma")
    model.load_state_dict(fill(model.state_dict()), strict=True)
    loss, _ = model(*parity_clip())
    loss.backward()
    expected, norms = RELEASE[target]
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    parameters = dict(model.named_parameters())
    for name, norm in norms.items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=2e-3), name


@pytest.mark.parametrize("size, mlp, dino, pixel, tensors", [
    ("small", 27_829_952, 26_185_152, 24_029_376, (227, 219, 218)), ("base", 97_765_760, 96_219_264, 94_210_944, (227, 219, 218)),
    ("large", 321_172_992, 319_692_032, 317_782_016, (383, 375, 374)), ("huge", 656_331_392, 654_915_968, 653_104_256, (487, 479, 478))])
def test_state_dictionaries_are_the_released_ones(size, mlp, dino, pixel, tensors):
    with torch.device("meta"):
        states = [SIGMA(size).state_dict(), SIGMA(size, "dino").state_dict(), SIGMA(size, "pixel", "l2").state_dict()]
    assert [sum(v.numel() for v in state.values()) for state in states] == [mlp, dino, pixel]
    assert tuple(len(state) for state in states) == tensors
    depth = {"small": 12, "base": 12, "large": 24, "huge": 32}[size]
    block = ["norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias",
             "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]
    names = {"encoder.patch_embed.proj.weight", "encoder.patch_embed.proj.bias", "encoder.norm.weight", "encoder.norm.bias", "decoder.norm.weight", "decoder.norm.bias",
             "decoder.head.weight", "decoder.head.bias", "encoder_to_decoder.weight", "mask_token"}
    names |= {f"{part}.blocks.{i}.{leaf}" for part, count in (("encoder", depth), ("decoder", 4)) for i in range(count) for leaf in block}
    assert set(states[2]) == names
    assert set(states[1]) == names | {"prototypes"}
    assert set(states[0]) == names | {"prototypes"} | {f"head.{i}.{leaf}" for i in (0, 2, 4, 6) for leaf in ("weight", "bias")}


def tiny(**kwargs):
    torch.manual_seed(0)
    return SIGMA("tiny", **{"num_prototypes": 12, "frames": 4, "image_size": 32, **kwargs})


def clip(batch=4, frames=4, size=32, seed=0):
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(seed)), \
        tube_mask(batch, frames // 2, (size // 8) ** 2, 0.75, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_papers_formula():
    """L = 1/N Σ [CE(x̃^φ/τ, q^Ψ) + CE(x̃^Ψ/τ, q^φ)], written out in float64 from features taken out of the model."""
    for assignment in ("hard", "soft"):
        model = tiny(assignment=assignment)
        x_psi, x_phi = torch.randn(50, 64, requires_grad=True), torch.randn(50, 64, requires_grad=True)
        loss, stats = model.forward_loss(x_psi, x_phi)
        C = F.normalize(model.prototypes.detach().double(), dim=1)
        total = 0
        q = {}
        for name, x in (("psi", x_psi), ("phi", x_phi)):
            q[name] = reference_sinkhorn(F.normalize(x.detach().double(), dim=1) @ C.T)
        hard = {name: F.one_hot(value.argmax(dim=1), 12).double() for name, value in q.items()}
        targets = hard if assignment == "hard" else q
        terms = {}
        for name, other, x in (("psi", "phi", x_psi), ("phi", "psi", x_phi)):
            scores = F.normalize(x.detach().double(), dim=1) @ C.T
            terms[name] = -(targets[other] * (scores / 0.1).log_softmax(dim=1)).sum(dim=1).mean().item()
        assert loss.item() == pytest.approx(terms["psi"] + terms["phi"], rel=1e-4)
        assert stats["loss_video"].item() == pytest.approx(terms["psi"], rel=1e-4)
        assert stats["loss_projection"].item() == pytest.approx(terms["phi"], rel=1e-4)
        assert stats["agreement"].item() == pytest.approx((hard["psi"] * hard["phi"]).sum().item() / 50)
        nearest = (F.normalize(x_phi.detach().double(), dim=1) @ C.T).argmax(dim=1)
        share = torch.bincount(nearest, minlength=12) / 50
        assert stats["perplexity"].item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in share.tolist() if p)), rel=1e-4)
        assert stats["spread"].item() == pytest.approx(1 - F.normalize(x_phi.detach(), dim=1).mean(dim=0).norm().item(), rel=1e-4)


def test_gradients_flow_where_they_should_and_nowhere_else():
    model = tiny()
    x_psi, x_phi = torch.randn(50, 64, requires_grad=True), torch.randn(50, 64, requires_grad=True)
    model.forward_loss(x_psi, x_phi)
    def gradients(term):
        loss, stats = model.forward_loss(x_psi, x_phi)
        total = {"video": lambda: loss - F.cross_entropy(scores_phi() / 0.1, hard_psi()), "both": lambda: loss}[term]()
        return torch.autograd.grad(total, [x_psi, x_phi, model.prototypes], allow_unused=True)
    scores_phi = lambda: F.normalize(x_phi, dim=1) @ model.prototypes.T
    hard_psi = lambda: sinkhorn_argmax((F.normalize(x_psi, dim=1) @ model.prototypes.T).detach())
    psi, phi, prototypes = gradients("both")
    assert psi.norm() > 0 and phi.norm() > 0 and prototypes.norm() > 0
    # Without the projection branch's term the video branch alone reaches neither φ nor the prototypes.
    psi, phi, prototypes = gradients("video")
    assert psi.norm() > 0 and phi.abs().max() < 1e-7 and prototypes.abs().max() < 1e-7


def test_every_parameter_learns_and_the_teacher_does_not():
    for target in ("mlp", "dino"):
        model = tiny(target=target, teacher="vits16")
        if target == "dino":
            model.teacher.load_state_dict(fill(model.teacher.state_dict()))
        loss, _ = model(*clip())
        loss.backward()
        for name, parameter in model.named_parameters():
            if name.startswith("teacher."):
                assert parameter.grad is None and not parameter.requires_grad
            else:
                assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_prototypes_are_unit_after_a_forward_pass():
    model = tiny()
    model.prototypes.data.mul_(7)
    model(*clip())
    torch.testing.assert_close(model.prototypes.norm(dim=1), torch.ones(12))


def test_hidden_tubes_do_not_reach_the_video_model():
    model = tiny()
    video, mask = clip()
    visible, masked = sigma.split_mask(mask, "cpu")
    hidden_changed = sigma.patchify(video, 8)
    hidden_changed = torch.where(mask[..., None], torch.randn_like(hidden_changed), hidden_changed)
    for tubes in (sigma.patchify(video, 8), hidden_changed):
        out = model.forward_video(sigma.take_tubes(tubes, visible), visible, masked)
        reference = out if tubes is not hidden_changed else reference
    torch.testing.assert_close(out, reference)
    assert out.shape == (4, masked.shape[1], 64)


def test_dino_teacher_is_not_in_the_state_and_loads_strictly():
    model = tiny(target="dino", teacher="vits16")
    assert not any("teacher" in name for name in model.state_dict())
    model.load_state_dict(model.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="mask_token"):
        model.load_state_dict({k: v for k, v in model.state_dict().items() if k != "mask_token"}, strict=True)
    names = set(model.teacher.state_dict())
    assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias", "blocks.11.mlp.fc2.weight", "norm.weight"} <= names and len(names) == 150
    with pytest.warns(UserWarning, match="never loaded"):
        model(*clip())


def test_a_dino_block_equals_pytorchs_transformer_layer():
    """The shared block, with every bias, against torch.nn.TransformerEncoderLayer with the same weights."""
    torch.manual_seed(0)
    ours, theirs = sigma.Block(48, 4, key_bias=True), torch.nn.TransformerEncoderLayer(48, 4, 192, 0.0, F.gelu, 1e-6, batch_first=True, norm_first=True)
    theirs.load_state_dict({"self_attn.in_proj_weight": ours.attn.qkv.weight, "self_attn.in_proj_bias": ours.attn.qkv.bias, "self_attn.out_proj.weight": ours.attn.proj.weight,
                            "self_attn.out_proj.bias": ours.attn.proj.bias, "linear1.weight": ours.mlp.fc1.weight, "linear1.bias": ours.mlp.fc1.bias, "linear2.weight": ours.mlp.fc2.weight,
                            "linear2.bias": ours.mlp.fc2.bias, **{f"norm{i}.{leaf}": getattr(getattr(ours, f"norm{i}"), leaf) for i in (1, 2) for leaf in ("weight", "bias")}})
    x = torch.randn(2, 10, 48)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=1e-4)


def test_dino_features_come_from_the_first_frame_of_each_tube_normalised_over_the_clip():
    model = tiny(target="dino", teacher="vits16")
    model.teacher.load_state_dict(fill(model.teacher.state_dict()))
    video, _ = clip()
    features = model.teacher_features(video)
    assert features.shape == (4, 2 * 16, 384)
    torch.testing.assert_close(features.mean(dim=1), torch.zeros(4, 384), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(dim=1), torch.ones(4, 384), atol=1e-3, rtol=0)
    other = video.clone()
    other[:, :, 1::2] = 0                                                                   # second frames do not count
    torch.testing.assert_close(model.teacher_features(other), features)


def train_tiny(model, steps=150, noise=0.5):
    """On clips that show one of six patterns each, under noise that no network can predict."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    patterns = torch.randn(6, 3, 1, 8, 8, generator=generator).tile(1, 1, 4, 4, 4)
    for step in range(steps):
        clips = patterns[torch.randint(6, (8,), generator=generator)] + noise * torch.randn(8, 3, 4, 32, 32, generator=generator)
        loss, stats = model(clips, tube_mask(8, 2, 16, 0.75, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 0:
            first = stats
    return first, stats


def test_l2_on_learned_features_collapses_and_sigma_does_not():
    first, last = train_tiny(tiny(loss="l2"))
    assert last["spread"] < 0.01 and last["spread"] < first["spread"] / 4
    first, last = train_tiny(tiny())
    assert last["spread"] > 0.2 > first["spread"] and last["perplexity"] > 3 and last["agreement"] > 2 / 12


def test_assign_and_features():
    model = tiny()
    video, mask = clip()
    chosen, tokens = model.assign(video), model.features(video)
    assert chosen.shape == (4, 32) and chosen.dtype == torch.int64 and tokens.shape == (4, 32, 192)
    x = F.normalize(model.head(sigma.normalize_tubes(sigma.patchify(video, 8))), dim=-1)
    assert torch.equal(chosen, (x @ F.normalize(model.prototypes, dim=1).T).argmax(dim=-1))
    assert (model.frames, model.image_size) == (4, 32)
    with pytest.raises(ValueError, match="no prototypes"):
        tiny(loss="l2").assign(video)


@pytest.mark.parametrize("kwargs, message", [
    (dict(size="giant"), "size 'giant' is not one of"), (dict(target="pixel"), "goes with loss l2"), (dict(frames=5), "multiple of 2"),
    (dict(image_size=30), "multiple of 8"), (dict(num_prototypes=0), "must be positive"), (dict(eps=0.0), "must be positive"), (dict(teacher="vitl14"), "not one of")])
def test_models_that_make_no_sense_are_refused_in_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        SIGMA(**{"size": "tiny", **kwargs})
    assert "\n" not in str(caught.value)


def test_inputs_of_another_shape_are_refused():
    model = tiny()
    video, mask = clip()
    with pytest.raises(ValueError, match="the model was built for"):
        model(video[:, :, :2], mask)
    with pytest.raises(ValueError, match="these clips need"):
        model(video, mask[:, :16])


def test_everything_in_sigma_can_be_copied_out():
    """The file runs with torch and the standard library alone."""
    code = "import sys; sys.modules.update(dict.fromkeys(('av', 'torchvision', 'tqdm', 'data', 'train'))); import sigma; sigma.SIGMA('tiny', frames=4, image_size=32)"
    subprocess.run([sys.executable, "-c", code], cwd=HERE, check=True)


# ============ sigma.py: checkpoints ============

class Malice:
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_load_checkpoint_reads_the_authors_files_and_refuses_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny()
    torch.save({"model": model.state_dict(), "optimizer": {"state": {}}, "epoch": 799, "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-4, data_path="x")}, "authors.pth")
    content = sigma.load_checkpoint("authors.pth")
    assert content["epoch"] == 799 and content["args"].lr == 1e-4
    tiny().load_state_dict(content["model"], strict=True)
    torch.save({"model": {}, "args": Malice()}, "evil.pth")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"model": Malice()}))
    (tmp_path / "torn.pth").write_bytes((tmp_path / "authors.pth").read_bytes()[:5000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_bytes(b"not a checkpoint at all")
    torch.save([1, 2], "list.pth")
    for name in ("evil.pth", "evil.pkl", "torn.pth", "empty.pth", "text.pth", "list.pth"):
        with pytest.raises(ValueError, match=name) as caught:
            sigma.load_checkpoint(name)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
