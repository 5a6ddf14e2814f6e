"""Tests against independent truths: closed forms, float64, a second process, a number painted into a frame. No network, no GPU."""
import argparse
import ast
import builtins
import functools
import inspect
import itertools
import json
import math
import os
import pickle
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.error
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")             # as train.py: the tests' processes share few cores

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import data
import sigma
import train
from sigma import SIGMA, SIZES, sinkhorn, sinkhorn_argmax, tube_mask

HERE = Path(__file__).parent
torch.set_num_threads(1)


STARTED = []                                                                                # processes that a failing test may leave behind
ENVIRON = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}                # of other processes, whatever a test sets meanwhile


def beside(scenario):
    """Makes a test of a function that only starts processes and waits for them: it runs in a thread from the session's
    start on, beside the tests of this process, and the test waits for its end."""
    def test(scenarios):
        scenarios[scenario].result()
    test.__name__, test.__doc__, test.scenario = scenario.__name__, scenario.__doc__, scenario
    return test


@pytest.fixture(scope="session", autouse=True)
def scenarios(request, tmp_path_factory):
    """function -> Future, of every chosen test that is `beside`, two at a time."""
    pool, futures = ThreadPoolExecutor(2), {}
    for scenario in dict.fromkeys(item.obj.scenario for item in request.session.items if hasattr(item.obj, "scenario")):
        try:
            futures[scenario] = pool.submit(scenario, **{name: tmp_path_factory.mktemp("beside") if name == "tmp_path" else request.getfixturevalue(name)
                                                         for name in inspect.signature(scenario).parameters})
        except (Exception, pytest.skip.Exception, pytest.fail.Exception) as error:          # of a fixture: it fails this test, not all
            futures[scenario] = Future()
            futures[scenario].set_exception(error)
    yield futures
    pool.shutdown(wait=False, cancel_futures=True)
    for process in STARTED:
        process.terminate()
    pool.shutdown()


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
    whole = model.encoder.patch_embed["proj"](video).flatten(2).transpose(1, 2) + sigma.sincos_table(32, 128)
    model.encoder.blocks, model.encoder.norm = torch.nn.ModuleList(), torch.nn.Identity()
    tokens = model.encoder(sigma.take_tubes(sigma.patchify(video, 8), index), index)
    torch.testing.assert_close(tokens, sigma.take_tubes(whole, index), atol=1e-5, rtol=1e-4)


def test_normalized_tubes_are_the_raw_pixels_normalised():
    raw = torch.rand(2, 5, 128, 3, dtype=torch.float64)
    raw[0, 0], raw[0, 1] = 0.5 + raw[0, 0] / 1000, 0.3                                      # so flat that the 1e-6 shows, and one colour
    given = (raw - torch.tensor(data.IMAGENET_MEAN)) / torch.tensor(sigma.IMAGENET_STD)
    expected = (raw - raw.mean(dim=2, keepdim=True)) / (raw.std(dim=2, keepdim=True) + 1e-6)
    given = given.flatten(2).float().requires_grad_()
    tubes, expected = sigma.normalize_tubes(given), expected.flatten(2).float()
    assert not tubes[0, 1].any()
    torch.testing.assert_close(tubes[0, 0], expected[0, 0], atol=1e-4, rtol=1e-4)           # its pixels' own rounding
    torch.testing.assert_close(tubes[0, 2:], expected[0, 2:], atol=2e-6, rtol=1e-5)
    tubes.square().sum().backward()                                                         # pretraining needs no gradient, other projects may
    assert given.grad.isfinite().all()


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


@pytest.mark.parametrize("n, k, eps", [(300, 40, 0.05), (301, 40, 0.05), (40, 300, 0.05), (500, 30, 0.03), (64, 1, 0.05), (1, 64, 0.05), (200, 20, 0.5)])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_is_float32_inside_autocast(dtype):
    scores = torch.cat([unit_scores(480, 60), unit_scores(20, 60, seed=1) - 0.8]).clamp(-1, 1)
    with torch.autocast("cpu", dtype):
        q, hard = sinkhorn(scores), sinkhorn_argmax(scores)
    torch.testing.assert_close(q.double(), reference_sinkhorn(scores), atol=2e-5, rtol=1e-3)
    assert torch.equal(hard, reference_sinkhorn(scores).argmax(dim=1))


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
    return (clip - torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1, 1)) / torch.tensor(sigma.IMAGENET_STD).view(3, 1, 1, 1), mask.flatten(1)


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
    assert last["spread"] < 0.06 and last["spread"] < first["spread"] / 8
    first, last = train_tiny(tiny())
    assert last["spread"] > 0.3 and last["perplexity"] > 3 and last["agreement"] > 2 / 12


def test_assign_and_features():
    model = tiny()
    video, mask = clip()
    chosen, tokens = model.assign(video), model.features(video)
    assert chosen.shape == (4, 32) and chosen.dtype == torch.int64 and tokens.shape == (4, 32, 128)
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


def test_every_piece_of_sigma_stands_under_import_torch():
    """What each top-level function or class uses: torch, builtins, other pieces, and the constants the docstring names."""
    tree = ast.parse((HERE / "sigma.py").read_text())
    pieces = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    allowed = {"torch", "TUBELET", "IMAGENET_STD", "SIZES", "TEACHERS", *pieces, *dir(builtins)}
    more = {"SIGMA": {"math", "warnings"}, "load_checkpoint": {"argparse", "pickle", "re"}}
    for name, piece in pieces.items():
        names = [node for node in ast.walk(piece) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)} | {node.arg for node in ast.walk(piece) if isinstance(node, ast.arg)}
        own |= {node.name for node in ast.walk(piece) if isinstance(node, (ast.FunctionDef, ast.ExceptHandler)) and node.name}
        assert {node.id for node in names} <= allowed | own | more.get(name, set()), name
    copied = {"torch": torch}
    for name in ("tube_mask", "all_reduce", "sinkhorn_scaling", "sinkhorn", "sinkhorn_argmax", "take_tubes", "split_mask", "sincos_table", "Attention", "Block"):
        exec(compile(ast.Module([pieces[name]], []), name, "exec"), copied)
    assert torch.equal(copied["sinkhorn"](unit_scores(30, 5)), sinkhorn(unit_scores(30, 5))) and copied["Block"](8, 2)(torch.randn(1, 3, 8)).shape == (1, 3, 8)


# ============ the release's way of computing: the same numbers, slower ============

def release_sinkhorn(scores, eps=0.05, iterations=10):
    """The matrix scaled in place, from one exponential of all scores."""
    q = (scores / eps).exp().t()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True)
        q /= q.shape[0]
        q /= q.sum(dim=0, keepdim=True)
        q /= q.shape[1]
    return (q * q.shape[1]).t()


def naive_attention(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def release_forward(model, video, mask):
    """The loss by naive attention, boolean indexing, an embedding of the whole clip, Sinkhorn in place, and DINO in fp32 outside of autocast."""
    def take(x, which):
        return x[which].reshape(len(x), -1, x.shape[-1])

    mask = mask.to(video.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", naive_attention)
        x = model.encoder.patch_embed["proj"](video).flatten(2).transpose(1, 2) + model.encoder.positions
        x = take(x, ~mask)
        for block in model.encoder.blocks:
            x = block(x)
        x = model.encoder_to_decoder(model.encoder.norm(x))
        positions = model.decoder.positions.expand(len(x), -1, -1)
        x = torch.cat([x + take(positions, ~mask), model.mask_token + take(positions, mask)], dim=1)
        x_psi = model.decoder(x, int(mask[0].sum()))
        if model.target == "dino":
            with torch.autocast(video.device.type, enabled=False):
                x_phi = take(model.teacher_features(video), mask)
        else:
            x_phi = take(sigma.normalize_tubes(sigma.patchify(video, model.patch)), mask)
            x_phi = model.head(x_phi) if model.target == "mlp" else x_phi
    if model.loss == "l2":
        return F.mse_loss(x_psi, x_phi)
    with torch.no_grad():
        model.prototypes.copy_(F.normalize(model.prototypes, dim=1))
    scores = [F.normalize(x.flatten(0, 1), dim=1) @ c.T for x, c in ((x_phi, model.prototypes), (x_psi, model.prototypes.detach()))]
    with torch.no_grad():
        assigned = [release_sinkhorn(s.float(), model.eps, model.iterations).argmax(dim=1) for s in scores]
    return sum(F.cross_entropy(s / model.temperature, q) for s, q in zip(scores, reversed(assigned)))


@pytest.mark.parametrize("kwargs", [dict(), dict(target="pixel", loss="l2"), dict(target="dino", teacher="vits16")])
def test_the_releases_way_of_computing_gives_the_same_loss_and_gradients(kwargs):
    model = tiny(**kwargs)
    if "teacher" in kwargs:
        model.teacher.load_state_dict(fill(model.teacher.state_dict()))
    results = []
    for forward in (lambda *inputs: model(*inputs)[0], functools.partial(release_forward, model)):
        model.zero_grad()
        loss = forward(*clip())
        loss.backward()
        results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad)])
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kwargs", [dict(), dict(assignment="soft"), dict(loss="l2"), dict(target="pixel", loss="l2"), dict(target="dino", teacher="vits16")])
def test_no_shape_and_no_step_depends_on_values(kwargs):
    """Tensors without storage go forward and back: whatever asks for a value (.item(), boolean indexing, a branch) raises on them."""
    with torch.device("meta"):
        model, video = tiny(**kwargs), torch.zeros(4, 3, 4, 32, 32)
        model.teacher_checked = True
        loss, _ = model(video, clip()[1].cpu())
        loss.backward()
    assert model.decoder.head.weight.grad.is_meta


def test_compiled_it_is_the_same_model():
    model, results = tiny(), []
    for forward in (model, torch.compile(model, backend="aot_eager")):                      # the tracing, without a compiler's minutes
        model.zero_grad()
        loss, stats = forward(*clip())
        loss.backward()
        results.append([loss.detach(), stats["agreement"], stats["perplexity"], model.decoder.head.weight.grad.clone(), model.encoder.patch_embed["proj"].weight.grad.clone()])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-3)


def test_compiled_over_processes_it_is_the_same_model(tmp_path):
    """DDP cuts the compiled graph into its buckets: with buckets smaller than the prototypes, between their uses too."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        results = []
        for compiled in (False, True):
            model = torch.nn.parallel.DistributedDataParallel(tiny(num_prototypes=8192), bucket_cap_mb=1)
            for _ in range(2):
                model.zero_grad()
                loss, _ = (torch.compile(model, backend="aot_eager") if compiled else model)(*clip())
                loss.backward()
            results.append([loss.detach(), model.module.prototypes.grad.clone(), model.module.decoder.head.weight.grad.clone()])
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-3)


def test_plain_attention_gives_the_same_numbers(monkeypatch):
    """In fp32 the same output and gradients as PyTorch's fused attention, but for rounding; in bf16 about as far from them as the fused one is."""
    results = {}
    for precision in ("fp32", "bf16"):
        for plain in (False, True):
            monkeypatch.setattr(sigma.Attention, "plain", plain)
            model = tiny()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                x = model.features(clip()[0]).float()
            (x * torch.linspace(-1, 1, x.shape[-1])).sum().backward()
            results[precision, plain] = torch.cat([x.detach().flatten(), *(p.grad.flatten() for p in model.encoder.blocks.parameters())])
    truth = results["fp32", False]
    error = {key: ((result - truth).norm() / truth.norm()).item() for key, result in results.items()}
    assert 0 < error["fp32", True] < 1e-5 and 0 < error["bf16", True] < min(0.02, 1.5 * error["bf16", False]), error


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kwargs", [dict(), dict(assignment="soft"), dict(loss="l2"), dict(target="pixel", loss="l2"), dict(target="dino", teacher="vits16")])
def test_a_step_on_the_gpu_never_waits_for_it(kwargs, dtype):
    model, scaler = tiny(**kwargs).cuda(), torch.amp.GradScaler("cuda")
    model.teacher_checked = True
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clips, mask = torch.randint(256, (4, 3, 4, 32, 32), dtype=torch.uint8).pin_memory(), clip()[1].pin_memory()
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")                      # the first step sets libraries up
        try:
            with torch.autocast("cuda", dtype):
                loss, _ = model(data.normalize(clips.cuda(non_blocking=True)), mask)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def time_steps(way, precision, batch, size, target, steps=4):
    """Prints the median seconds a clip of so many training steps, the release's way or ours. In a process of its own, as train.py changes malloc."""
    torch.set_num_threads(os.cpu_count())
    args = train.parse_args(["--bench", "--size", size, "--target", target, "--batch-size", batch, "--precision", precision])
    cuda = torch.cuda.is_available()
    env = train.start_processes(args) if way == "ours" or cuda else SimpleNamespace(
        device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"))
    torch.manual_seed(0)
    model = train.make_model(args).to(env.device)
    model.teacher_checked = True
    if way == "release":
        torch.set_float32_matmul_precision("highest")                                       # PyTorch's default, which train.py changes on GPUs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True if cuda or way == "ours" else None)     # the release's: PyTorch's default, but fused on GPUs too
    scaler = torch.amp.GradScaler(env.device.type, init_scale=1.0, enabled=way == "ours")   # train.py always has one
    video, mask, seconds = torch.randn(args.batch_size, 3, 16, 224, 224, device=env.device), tube_mask(args.batch_size, 8, 196), []
    for _ in range(steps + 2):
        began = time.monotonic()
        with env.autocast():
            loss = model(video, mask)[0] if way == "ours" else release_forward(model, video, mask)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        loss.item()
        seconds.append((time.monotonic() - began) / args.batch_size)
    print(sorted(seconds[2:])[steps // 2])


def compare_speed(size="small", target="mlp", batch="8", rounds="3"):
    """Prints steps and Sinkhorn of the release's way and ours, taking turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(os.cpu_count())
    scores, times = unit_scores(11_264, 3_000, width=256).to(device), {release_sinkhorn: [], sinkhorn_argmax: []}
    for _ in range(1 + 5):
        assigned = []
        for solve, seconds in times.items():
            began = time.monotonic()
            q = solve(scores)
            assigned.append((q if q.ndim == 1 else q.argmax(dim=1)).cpu())
            seconds.append(time.monotonic() - began)
    release, ours = (sorted(seconds[1:])[2] for seconds in times.values())
    print(f"Sinkhorn with hard assignment, 11264 x 3000: the release's way {1000 * release:.0f} ms, ours {1000 * ours:.0f} ms, {release / ours:.2f} times as fast; {100 * (assigned[0] == assigned[1]).float().mean():.3f}% of the assignments equal", flush=True)
    times = {(way, precision): [] for precision in ("fp32", "bf16") for way in ("release", "ours")}
    untuned = {**os.environ, "GOMP_SPINCOUNT": "300000"}                                    # OpenMP's default again, in spite of train.py's OMP_WAIT_POLICY
    for _ in range(int(rounds)):
        for (way, precision), seconds in times.items():
            seconds.append(float(subprocess.check_output([sys.executable, __file__, "step", way, precision, batch, size, target], text=True,
                                                         env=untuned if way == "release" else None)))
    for (way, precision), seconds in times.items():
        middle, same, fp32 = (sorted(t)[len(t) // 2] for t in (seconds, times["release", precision], times["release", "fp32"]))
        print(f"a step of {size} with {target}, batch {batch}, {precision}, {way:8s}{1000 * middle:8.1f} ms a clip, {same / middle:.2f} times as fast as the release's way in {precision}, {fp32 / middle:.2f} as in fp32 "
              f"(rounds: {', '.join(f'{1000 * s:.1f}' for s in seconds)})")


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


def test_checkpoints_are_read_in_several_threads(tmp_path):
    torch.save({"args": argparse.Namespace(lr=1.0)}, tmp_path / "authors.pth")
    with ThreadPoolExecutor(4) as pool:
        assert all(content["args"].lr == 1.0 for content in pool.map(sigma.load_checkpoint, [tmp_path / "authors.pth"] * 1000))


W, H, N = 128, 96, 70                            # of most test videos: width, height, frames


# ============ making videos ============

def paint(n, width=W, height=H):
    """uint8 [height, width, 3]: eight bars, dark or light as the bits of n, on the upper half; inverted on the lower."""
    bits = (n >> np.arange(8)) & 1
    row = (40 + 170 * bits)[np.arange(width) * 8 // width]
    picture = np.where(np.arange(height)[:, None] < height // 2, row, 250 - row)
    return np.repeat(picture[:, :, None], 3, 2).astype(np.uint8)


def numbers_of(clip):
    """The painted number of every frame of uint8 [T, 3, S, S] that shows the whole picture; fails if it is not clear."""
    size = clip.shape[-1]
    x = torch.arange(8) * size // 8 + size // 16
    upper, lower = clip.float().mean(1)[:, size // 4][:, x], clip.float().mean(1)[:, 3 * size // 4][:, x]
    assert ((upper - lower).abs() > 60).all(), "the bar code is damaged"
    return ((upper > lower).long() << torch.arange(8)).sum(1).tolist()


def write(path, codec="libx264", pictures=None, pix_fmt="yuv420p", times=None, options=None, copts=None, audio=False):
    """Encodes pictures (default: N bar codes). times: pts in milliseconds."""
    pictures = [paint(n) for n in range(N)] if pictures is None else pictures
    with av.open(str(path), "w", options=copts or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
        if "bf" in (options or {}):
            stream.codec_context.max_b_frames = int(options["bf"])
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[n], Fraction(1, 1000)
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


X264 = "keyint=30:bframes=3:b-pyramid=normal:scenecut=0:b-adapt=0:log-level=-1"
VFR = np.cumsum(random.Random(0).choices([10, 33, 47, 180], k=N)).tolist()
FORMATS = {
    "bframes.mp4": dict(options={"x264-params": X264}),
    "opengop.mp4": dict(options={"x264-params": X264 + ":open-gop=1"}),
    "opengop.ts": dict(options={"x264-params": X264 + ":open-gop=1"}),
    "nocount.mkv": dict(options={"x264-params": X264}),
    "vfr.mkv": dict(options={"x264-params": X264}, times=VFR),
    "vfr.mp4": dict(options={"x264-params": X264}, times=VFR),
    "mpeg4.avi": dict(codec="mpeg4", options={"bf": "2", "g": "12"}),
    "plain.avi": dict(codec="mpeg4", options={"g": "12"}),
    "h264.avi": dict(options={"x264-params": X264}),                          # decoding times only
    "raw.h264": dict(options={"x264-params": X264}),                          # no timestamps at all
    "mpeg2.mpg": dict(codec="mpeg2video", options={"bf": "2", "g": "15"}),
    "vp9.webm": dict(codec="libvpx-vp9", options={"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10", "g": "30"}),
    "vp8.webm": dict(codec="libvpx", options={"deadline": "realtime", "g": "30"}),
    "hevc.mov": dict(codec="libx265", options={"preset": "ultrafast", "x265-params": "keyint=20:bframes=3:log-level=none"}),
    "tenbit.mp4": dict(pix_fmt="yuv420p10le", options={"x264-params": X264}),
    "grey.mkv": dict(codec="ffv1", pix_fmt="gray"),
    "alpha.mkv": dict(codec="ffv1", pix_fmt="yuva420p"),
    "alpha.mov": dict(codec="qtrle", pix_fmt="argb"),
    "odd.mkv": dict(pix_fmt="yuv444p", options={"x264-params": X264}, pictures=[paint(n, 131, 97) for n in range(N)]),
    "odd420.mkv": dict(codec="ffv1", pictures=[paint(n, 131, 97) for n in range(N)]),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session")
def video(folder):
    """video(name) -> path of the named format, written once."""
    return functools.lru_cache(None)(lambda name: str(write(folder / name, **FORMATS[name])))


def whole(path, frames, stride, start, size=64, **kwargs):
    """read_clip of the whole picture."""
    with data.Video(path) as file:
        width, height = file.stream.width, file.stream.height
    return data.read_clip(path, frames, stride, start, crop=(0, 0, width, height), size=size, **kwargs)


def plain_decode(path):
    """All frames, decoded by nothing but PyAV's loop."""
    with av.open(path) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


# ============ exact frames ============

@pytest.mark.parametrize("name", FORMATS)
def test_frames_are_the_ones_asked_for(video, name):
    path = video(name)
    for start, stride, frames in [(0, 4, 16), (0, 1, 5), (1, 3, 4), (29, 1, 4), (31, 2, 3), (34, 7, 5), (N - 4, 1, 4), (N - 1, 1, 1), (N - 5, 3, 4)]:
        expected = [min(n, N - 1) for n in range(start, start + frames * stride, stride)]
        assert numbers_of(whole(path, frames, stride, start)) == expected
    got = numbers_of(whole(path, 4, 4, None, generator=torch.Generator().manual_seed(3)))
    assert np.diff(got).tolist() == [4, 4, 4]


def test_scattered_numbers_and_several_views(video):
    with data.Video(video("opengop.mp4")) as file:
        everything = (0, 0, W, H)
        lists = [[60, 3, 3, 41], [0, 69], [28, 29, 30, 31]]
        for _ in range(2):                       # a second reading of an open file as well
            clips = file.read([(numbers, everything) for numbers in lists], 64)
            assert [numbers_of(torch.from_numpy(clip).transpose(0, 1)) for clip in clips] == lists


@pytest.mark.parametrize("name", ["bframes.mp4", "opengop.mp4", "opengop.ts", "mpeg4.avi", "mpeg2.mpg", "hevc.mov", "vp9.webm", "vp8.webm"])
def test_frames_are_bit_identical_to_a_plain_decode(folder, name):
    """Skipping what nobody wants must not change what is wanted, down to the last bit."""
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (H // 4, W // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    moving = [np.roll(texture, (n, -2 * n), (0, 1)) for n in range(50)]
    path = str(write(folder / ("texture-" + name), **{**FORMATS[name], "pictures": moving}))
    truth, seen = plain_decode(path), []

    def keep(self, graphs, frame, *_):           # the frame as decoded, before crop and scale
        seen.append(frame.to_ndarray(format="rgb24"))

    for numbers in ([5, 9, 13, 17], [20], [30, 34, 38], [31, 35, 49], [0, 24, 48]):
        seen.clear()
        with data.Video(path) as file:
            assert file.timed
            convert, data.Video._convert = data.Video._convert, keep
            try:
                file.read([(numbers, None)], 8)
            finally:
                data.Video._convert = convert
        # H.264's open groups with referenced B-frames are decoded a second time, from the start of the file
        assert len(seen) == len(numbers) or name.startswith("opengop")
        for n, picture in zip(numbers, seen[-len(numbers):]):
            assert np.array_equal(picture, truth[n]), n


def test_unwanted_frames_are_not_decoded(video, monkeypatch):
    """What makes it quick: of the 65 frames up to a late one, only a few of its own group of pictures are decoded."""
    decoded, run = [], data.Video.decode_run
    monkeypatch.setattr(data.Video, "decode_run", lambda *arguments: (decoded.append(frame) or frame for frame in run(*arguments)))
    with data.Video(video("bframes.mp4")) as file:
        assert len(list(file._decode_near([69]))) == 1
        assert len(decoded) <= 6                 # 60 is a keyframe, 69 the last; without skipping there are ten


def test_large_files_are_read_twice_instead_of_kept(video, monkeypatch):
    monkeypatch.setattr(data, "MAX_KEPT_BYTES", 10)
    for name in ("bframes.mp4", "opengop.ts", "h264.avi"):
        assert numbers_of(whole(video(name), 4, 5, 40)) == [40, 45, 50, 55]


def test_hidden_vp8_frames_are_not_counted(folder, video):
    """Clears the show_frame bit of some packets: the decoder then puts nothing out for them."""
    path = folder / "hidden.webm"
    with av.open(video("vp8.webm")) as source, av.open(str(path), "w") as target:
        template = source.streams.video[0]       # PyAV before 14 takes it as an argument
        stream = target.add_stream_from_template(template) if hasattr(target, "add_stream_from_template") else target.add_stream(template=template)
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            content = bytearray(bytes(packet))
            if i in (5, 6, 33):
                content[0] &= ~0x10
            copy = av.Packet(bytes(content))
            copy.pts, copy.dts, copy.time_base, copy.is_keyframe, copy.stream = packet.pts, packet.dts, packet.time_base, packet.is_keyframe, stream
            target.mux(copy)
    shown = [n for n in range(N) if n not in (5, 6, 33)]
    assert numbers_of(whole(str(path), 8, 5, 3)) == shown[3:43:5]


def test_stream_that_begins_in_an_open_group(folder):
    """A recording cut at a keyframe: the B-frames shown before it lack what they refer to, and are no frames."""
    whole_path = str(write(folder / "closed.ts", options={"x264-params": X264.replace("b-pyramid=normal", "b-pyramid=none") + ":open-gop=1"}))
    path = str(folder / "begins-open.ts")
    with av.open(whole_path) as source, av.open(path, "w") as target:
        template, keys = source.streams.video[0], 0
        stream = target.add_stream_from_template(template) if hasattr(target, "add_stream_from_template") else target.add_stream(template=template)
        for packet in source.demux(video=0):
            keys += packet.is_keyframe and packet.size > 0
            if keys >= 2 and packet.size:
                packet.stream = stream
                target.mux(packet)
    with data.Video(path) as file:
        first = numbers_of(data.read_clip(path, 1, 1, 0, crop=(0, 0, W, H), size=64))[0]
        assert first in (29, 30, 31) and file.frames == N - first
    assert numbers_of(whole(path, 8, 3, 0)) == list(range(first, first + 24, 3))


def test_edit_list_hides_its_frames(folder, video):
    """Moves the first edit of the file three frames on: the packets are still demuxed, the frames not shown."""
    content = bytearray(open(video("bframes.mp4"), "rb").read())
    at = content.index(b"elst") + 4 + 4 + 4      # behind version, flags and count: duration, media time
    duration, start = struct.unpack_from(">Ii", content, at)
    scale = struct.unpack_from(">I", content, content.index(b"mdhd") + 4 + 12)[0]
    struct.pack_into(">Ii", content, at, duration, start + 3 * scale // 25)
    path = folder / "edit.mp4"
    path.write_bytes(content)
    assert len(plain_decode(str(path))) == N - 3
    assert numbers_of(whole(str(path), 4, 4, 0)) == [3, 7, 11, 15]


def test_short_video_repeats_its_last_frame(folder):
    path = write(folder / "short.mp4", pictures=[paint(n) for n in range(5)])
    assert numbers_of(whole(path, 6, 2, 0)) == [0, 2, 4, 4, 4, 4]
    assert numbers_of(whole(path, 6, 2, None)) == [0, 2, 4, 4, 4, 4]
    one = write(folder / "one.mp4", pictures=[paint(9)])
    assert numbers_of(whole(one, 16, 4, None)) == [9] * 16


# ============ crops and orientation ============

def ramp(width, height):
    """Red grows with x, green with y, blue is flat: every pixel tells where it lies."""
    x, y = np.meshgrid(np.linspace(20, 235, width), np.linspace(20, 235, height))
    return np.stack([x, y, np.full_like(x, 128)], -1).round().astype(np.uint8)


def expected_ramp(width, height, crop, size):
    x, y, w, h = crop
    at_x = x + (np.arange(size) + 0.5) * w / size - 0.5
    at_y = y + (np.arange(size) + 0.5) * h / size - 0.5
    return 20 + 215 * at_x / (width - 1), 20 + 215 * at_y / (height - 1)


MATRICES = {                                     # as tkhd stores them: a b c d; what the display does to the coded picture
    "none": ((1, 0, 0, 1), lambda p: p),
    "90": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "180": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
    "270": ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(0, 1)),
}


def rotate(path, name):
    content = bytearray(open(path, "rb").read())
    a, b, c, d = MATRICES[name][0]
    struct.pack_into(">9i", content, content.index(b"tkhd") + 4 + 40, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    open(path, "wb").write(content)
    return path


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("pix_fmt", ["yuv444p", "yuv420p"])
def test_crop_is_in_displayed_pixels(folder, name, pix_fmt):
    displayed = ramp(160, 112)
    inverse = {"90": "270", "270": "90"}.get(name, name)
    coded = MATRICES[inverse][1](displayed)
    path = rotate(write(folder / f"{name}-{pix_fmt}.mp4", pictures=[coded] * 3, pix_fmt=pix_fmt, options={"qp": "2"}), name)
    for crop in [(0, 0, 160, 112), (101, 7, 40, 90), (17, 33, 64, 64), (159, 111, 1, 1), (60, 0, 100, 30), None]:
        clip = data.read_clip(path, 2, 1, 0, crop=crop, size=48)[1].float().numpy()
        red, green = expected_ramp(160, 112, crop or (24, 0, 112, 112), 48)
        for channel, line in ((clip[0], np.broadcast_to(red, (48, 48))), (clip[1], np.broadcast_to(green[:, None], (48, 48)))):
            edge = slice(1, -1) if crop is None or crop[2] > 1 else slice(None)
            assert np.abs(channel - line)[edge, edge].max() < (5 if pix_fmt == "yuv444p" else 9), crop
    for crop in [(100, 0, 61, 10), (-1, 0, 10, 10), (0, 100, 10, 13), (0, 0, 0, 5)]:
        with pytest.raises(data.VideoError, match="crop"):
            data.read_clip(path, 1, 1, 0, crop=crop)


@pytest.mark.parametrize("name", ["mjpeg.avi", "bframes.mp4", "tenbit.mp4"])
def test_colours_and_range(folder, name):
    """Full-range and 10-bit pictures come out in the colours that went in."""
    colours = [(250, 250, 250), (5, 5, 5), (200, 30, 30), (30, 200, 30), (30, 30, 200)]
    path = write(folder / ("colours-" + name), **{**FORMATS[name], "pictures": [np.full((64, 64, 3), c, np.uint8) for c in colours]})
    got = data.read_clip(path, 5, 1, 0, size=32).float().mean((2, 3))
    assert (got - torch.tensor(colours)).abs().max() < 8


# ============ files that are wrong ============

def broken_files(folder):
    good = open(write(folder / "good.mp4", options={"x264-params": X264}), "rb").read()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "garbage.mp4").write_bytes(np.random.default_rng(0).bytes(20000))
    (folder / "headless.mp4").write_bytes(good[:len(good) // 2])
    (folder / "text.mp4").write_bytes(b"ffconcat version 1.0\nfile /etc/passwd\n")
    (folder / "dir.mp4").mkdir(exist_ok=True)
    if not (folder / "pipe.mp4").exists():
        os.mkfifo(folder / "pipe.mp4")
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for n in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1024), np.int16), format="s16", layout="stereo")
            frame.rate, frame.pts = 44100, 1024 * n
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    huge = bytearray(good)
    at = huge.index(b"avc1") + 4 + 24
    struct.pack_into(">HH", huge, at, 65000, 65000)
    (folder / "huge.mp4").write_bytes(huge)
    return ["empty.mp4", "garbage.mp4", "headless.mp4", "text.mp4", "dir.mp4", "pipe.mp4", "sound.mp4", "absent.mp4"]


def test_unreadable_files_give_one_line(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(data.VideoError) as error:
            data.read_clip(tmp_path / name)
        assert name != "pipe.mp4" or "regular" in str(error.value)
        assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value) and len(str(error.value)) > 5, name
    os.chmod(tmp_path / "good.mp4", 0)
    if os.getuid():
        with pytest.raises(data.VideoError, match="ermission"):
            data.read_clip(tmp_path / "good.mp4")
    for arguments in (dict(frames=0), dict(stride=0), dict(size=0), dict(start=-1)):
        with pytest.raises(ValueError):
            data.read_clip(tmp_path / "good.mp4", **arguments)


def test_absurd_size_is_refused_without_the_memory(tmp_path):
    monster = [np.zeros((32, 16384, 3), np.uint8)]
    path = str(write(tmp_path / "wide.mkv", "ffv1", monster, "gray"))
    assert data.read_clip(path, 1, 1, 0, size=16).shape == (1, 3, 16, 16)
    limit, data.MAX_PIXELS = data.MAX_PIXELS, 100 * 100
    try:
        with pytest.raises(data.VideoError):
            data.read_clip(path, 1, 1, 0)
    finally:
        data.MAX_PIXELS = limit


@pytest.mark.parametrize("name", ["bframes.mp4", "nocount.mkv", "opengop.ts", "mpeg4.avi", "hevc.mov"])
def test_truncated_file_gives_what_lies_before_the_end(tmp_path, video, name):
    copts = {"movflags": "faststart"} if name.endswith(("mp4", "mov")) else {}
    path = write(tmp_path / name, **FORMATS[name], copts=copts)
    content = open(path, "rb").read()
    header = content.index(b"mdat") if copts else 0
    open(path, "wb").write(content[:header + (len(content) - header) * 6 // 10])
    assert numbers_of(whole(path, 4, 3, 0)) == [0, 3, 6, 9]
    if not name.endswith(".ts"):                 # a transport stream has no end that could be missing
        with pytest.raises(data.VideoError):     # would have to repeat a frame that is not the last
            whole(path, 16, 4, 20)


@pytest.mark.parametrize("name", ["plain.avi", "mjpeg.avi"])
def test_half_a_packet_is_no_frame(tmp_path, video, name):
    with data.Video(video(name)) as file:
        end = file.packets[40].pos + 8 + file.packets[40].size * 3 // 4
    (tmp_path / name).write_bytes(open(video(name), "rb").read()[:end])
    assert numbers_of(whole(tmp_path / name, 1, 1, 39)) == [39]
    with pytest.raises(data.VideoError):
        whole(tmp_path / name, 1, 1, 40)


def test_damage_in_the_middle_is_not_silent(tmp_path):
    """Overwrites a stretch of the coded pictures, in twelve places: what comes back is right, or an error.

    A decoder cannot see all damage: what parses is a picture. One file in six may get through; of files decoded with
    libav's concealment it is more than half.
    """
    rng = np.random.default_rng(0)
    texture = rng.integers(0, 255, (H // 4, W // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    moving = [np.roll(texture, (n, -2 * n), (0, 1)) for n in range(N)]
    path = write(tmp_path / "damaged.mp4", pictures=moving, options={"x264-params": X264.replace("keyint=30", "keyint=250")})
    with data.Video(path) as video:
        truth, = video.read([(list(range(N)), None)], 32)
    content, wrong, early = open(path, "rb").read(), 0, 0
    for trial in range(12):
        damaged, rng = bytearray(content), np.random.default_rng(trial)
        at = int(rng.integers(len(content) * 0.3, len(content) * 0.8))
        damaged[at:at + 100] = rng.bytes(100)
        open(path, "wb").write(damaged)
        good, bad = [], []
        for start in range(0, N - 3, 3):
            try:
                clip = data.read_clip(path, 3, 1, start, size=32).transpose(0, 1).numpy()
                good.append(np.array_equal(clip, truth[:, start:start + 3]))
            except data.VideoError:
                bad.append(start)
        wrong += not all(good)
        early += len(good) >= 4 and min(bad, default=0) >= 12        # what lies before the damage is still there
    assert wrong <= 2 and early >= 8


# ============ folders and lists ============

def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")


def found(source, **kwargs):
    videos = data.find_videos(source, **kwargs)
    return [videos.name(i) for i in range(len(videos))], videos.labels.tolist(), videos.classes


def test_folders(tmp_path):
    touch(tmp_path, "dog/b.mp4", "cat/deep/a.MKV", "cat/ä ö.webm", "cat/notes.txt", "cat/.hidden.mp4", ".cache/x.mp4")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dog" / "dir.mp4").mkdir()
    (tmp_path / "dog" / "loop").symlink_to(tmp_path)
    names, labels, classes = found(tmp_path)
    assert names == ["cat/ä ö.webm", "cat/deep/a.MKV", "dog/b.mp4"] and labels == [0, 0, 1] and classes == ["cat", "dog", "empty"]
    assert found(tmp_path, classes=["dog", "cat"])[1] == [1, 1, 0]
    with pytest.raises(ValueError, match="dog"):
        found(tmp_path, classes=["cat"])
    touch(tmp_path, "top.mp4")
    names, labels, classes = found(tmp_path)
    assert len(names) == 4 and labels == [-1] * 4 and classes is None
    (tmp_path / "nothing").mkdir()
    for source in ("nothing", "absent", "top.mp4"):
        with pytest.raises(ValueError, match=source):
            found(tmp_path / source)


def listed(tmp_path, content, **kwargs):
    path = tmp_path / "list.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return found(path, **kwargs)


@pytest.mark.parametrize("content, names, labels", [
    ("a.mp4 0\nb.mp4 1\n", ["a.mp4", "b.mp4"], [0, 1]),
    ("a.mp4,0\nb.mp4\t12", ["a.mp4", "b.mp4"], [0, 12]),
    ("a.mp4\nb.mp4", ["a.mp4", "b.mp4"], [-1, -1]),
    ("\ufeff# comment\r\na.mp4 3\r\n\r\n  b.mp4   4  \r\n", ["a.mp4", "b.mp4"], [3, 4]),
    ("my dog, 1.mp4 7\nä/ö 2.mp4, 8", ["my dog, 1.mp4", "ä/ö 2.mp4"], [7, 8]),
    ("my dog, 1.mp4\nb 2.webm", ["my dog, 1.mp4", "b 2.webm"], [-1, -1]),
    ('"a, b 3",5\n"say ""hi"".mp4",6', ["a, b 3", 'say "hi".mp4'], [5, 6]),
    ("it's.mp4 1\n12 5", ["it's.mp4", "12"], [1, 5]),
    ("a.mp4 300 1\nb c.avi 22 0", ["a.mp4", "b c.avi"], [1, 0]),
    ("a.mp4 1\na.mp4 1\nb.mp4 01", ["a.mp4", "b.mp4"], [1, 1]),
    ("/abs/a.mp4 1\n../up.mp4 2", ["/abs/a.mp4", "../up.mp4"], [1, 2]),
])
def test_list_files(tmp_path, content, names, labels):
    assert listed(tmp_path, content)[:2] == (names, labels)


def test_list_names_can_be_any_bytes(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    assert listed(tmp_path, b"caf\xe9.mp4 1\n")[0] == [name]
    videos = data.find_videos(tmp_path / "list.txt")
    assert videos.path(0) == os.path.join(tmp_path, name)


@pytest.mark.parametrize("content, line, what", [
    ("a.mp4 1\nb.mp4\n", 2, "no label"), ("a.mp4\n\nb.mp4 1", 3, "has a label"), ("a.mp4 -1", 1, "-1"),
    ("a.mp4 dog", 1, "dog"), ("a.mp4 3.5", 1, "3.5"), ("a.mp4 1\na.mp4 2", 2, "a.mp4"), ("a.mp4 99999999999999999999", 1, "label"),
    (b"\0\1\2 binary", 1, "no text"), ('"" 4', 1, "no path"),
])
def test_wrong_lists_name_the_line(tmp_path, content, line, what):
    with pytest.raises(ValueError) as error:
        listed(tmp_path, content)
    assert f"list.txt, line {line}:" in str(error.value) and what in str(error.value) and "\n" not in str(error.value)


def test_empty_list(tmp_path):
    with pytest.raises(ValueError, match="no videos"):
        listed(tmp_path, "# nothing\n\n")


def test_200_000_lines_take_seconds(tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"videos/some class/video_{i:07d}_000010.mp4 {i % 400}\n" for i in range(200_000)))
    began = time.process_time()
    videos = data.find_videos(tmp_path / "list.txt")
    assert time.process_time() - began < 4 and len(videos) == 200_000
    assert videos.name(123_456) == "videos/some class/video_0123456_000010.mp4" and videos.labels[123_456] == 123_456 % 400
    assert not any(isinstance(value, list) for value in vars(videos).values())


# ============ clips, sampler, loader ============

def mask(generator, views=1):
    return torch.rand(views, 6, generator=generator) > 0.5


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """Two classes of three videos, one of the six unreadable."""
    root = tmp_path_factory.mktemp("dataset")
    for i in range(6):
        path = root / ("left" if i < 3 else "right") / f"{i} ü.mp4"
        path.parent.mkdir(exist_ok=True)
        write(path, pictures=[paint(n) for n in range(30)], options={"preset": "ultrafast"})
    (root / "right" / "4 ü.mp4").write_bytes(b"no video at all")
    return root


def take(dataset, workers=0, seed=1, start=0, stop=4, **kwargs):
    videos = data.find_videos(dataset)
    clips = data.Clips(videos, 4, 2, 32, seed=seed, repeats=2, mask=functools.partial(mask, views=2), **kwargs)
    sampler = data.EpochSampler(len(videos), 4, seed=seed, repeats=2, start=start, stop=stop)
    return list(data.load(clips, sampler, workers=workers))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in ("video", "mask", "label", "index")) and a["bad"] == b["bad"]


def test_clips_are_a_function_of_seed_epoch_and_index(dataset):
    reference = take(dataset, stop=6)
    assert reference[0]["video"].shape == (4, 3, 4, 32, 32) and reference[0]["mask"].shape == (4, 6)
    for workers in (1, 2):
        again = take(dataset, workers=workers, stop=6)
        assert len(again) == 6 and all(same(a, b) for a, b in zip(reference, again))
    assert all(same(a, b) for a, b in zip(reference[3:], take(dataset, start=3, stop=6)))            # continued
    assert not any(same(a, b) for a, b in zip(reference, take(dataset, seed=2)))
    assert not torch.equal(reference[0]["video"][0], reference[0]["video"][1])                       # views differ
    everything = torch.cat([b["video"].flatten(1) for b in take(dataset, stop=12)])
    assert len(everything.unique(dim=0)) > 40                                                        # of 48: epochs differ


def test_unreadable_videos_are_replaced_and_named(dataset):
    batches = take(dataset, stop=12)
    videos = data.find_videos(dataset)
    bad = [entry for b in batches for entry in b["bad"]]
    assert {path for path, _ in bad} == {str(dataset / "right" / "4 ü.mp4")} and len(bad) >= 4
    index, label = torch.cat([b["index"] for b in batches]), torch.cat([b["label"] for b in batches])
    assert 4 not in index and torch.equal(label, videos.labels[index])
    for b in batches:
        assert b["video"].flatten(1).float().std(1).min() > 1                                        # no empty pictures


def test_memory_of_bad_files_changes_nothing(dataset):
    videos = data.find_videos(dataset)
    one = data.Clips(videos, 4, 2, 32)
    for epoch in range(6):
        fresh = data.Clips(videos, 4, 2, 32)
        for index in range(6):
            a, b = one[epoch, index], fresh[epoch, index]
            assert torch.equal(a["video"], b["video"]) and a["index"] == b["index"] and a["bad"] == b["bad"]
    assert set(one.bad) == {4}


def test_a_file_damaged_in_the_middle_is_not_given_up(dataset, monkeypatch):
    """Only what cannot be opened is remembered: another clip of a damaged file may be good."""
    videos = data.find_videos(dataset)
    clips = data.Clips(videos, 4, 2, 32)

    def damaged(self, views, size):
        raise data.VideoError("frame 3 cannot be decoded")
    with monkeypatch.context() as patch:
        patch.setattr(data.Video, "read", damaged)
        with pytest.raises(data.VideoError):
            clips[0, 0]
    assert set(clips.bad) <= {4} and clips[0, 0]["bad"] == []


def test_evaluation_is_fixed_and_keeps_shapes(dataset):
    videos = data.find_videos(dataset)
    clips = data.Clips(videos, 4, 2, 32, seed=1, train=False)
    other = data.Clips(videos, 4, 2, 32, seed=2, train=False)
    for index in range(6):
        a, b = clips[0, index], other[7, index]
        assert torch.equal(a["video"], b["video"]) and a["video"].shape == (1, 3, 4, 32, 32)
        if index == 4:
            assert a["index"] == a["label"] == -1 and len(a["bad"]) == 1 and not a["video"].any()
        else:
            assert a["index"] == index and a["label"] == videos.labels[index]
            path = videos.path(index)
            assert torch.equal(a["video"][0].transpose(0, 1), data.read_clip(path, 4, 2, 12, size=32))   # (30 - 7 + 1) // 2
    several = data.Clips(videos, 4, 2, 32, train=False, views=(3, 3))[0, 1]["video"]
    assert several.shape == (9, 3, 4, 32, 32)
    for view, (start, x) in enumerate((s, x) for s in (0, 12, 23) for x in (0, 16, 32)):
        assert torch.equal(several[view].transpose(0, 1), data.read_clip(videos.path(1), 4, 2, start, (x, 0, H, H), 32)), view


def test_over_half_unreadable_stops(tmp_path):
    touch(tmp_path, *[f"{i}.mp4" for i in range(5)])
    for workers in (0, 1):
        clips = data.Clips(data.find_videos(tmp_path), 4, 2, 32)
        with pytest.raises(data.VideoError, match="over half of the videos are unreadable") as error:
            next(data.load(clips, data.EpochSampler(5, 1), workers=workers))
        assert "\n" not in str(error.value) and "DataLoader" not in str(error.value)


class Crashing(data.Clips):
    """A decoder that ends its worker, or hangs, at one video."""
    deed = "crash"

    def read(self, video, generator):
        if video == 2:
            with data.announced(self.board, video):
                if self.deed == "hang":
                    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
                    while True:
                        time.sleep(1)
                os.kill(os.getpid(), signal.SIGSEGV if self.deed == "crash" else signal.SIGKILL)
        return super().read(video, generator)


@pytest.mark.parametrize("deed", ["crash", "hang", "kill"])
def test_a_video_that_takes_its_worker_along(dataset, deed, monkeypatch):
    monkeypatch.setattr(data, "READ_SECONDS", 2)
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter         # looks after its workers every 5 seconds
    monkeypatch.setattr(loader._try_get_data, "__defaults__", (0.3,))
    videos = data.find_videos(dataset)
    clips = Crashing(videos, 4, 2, 32, seed=1)
    clips.deed = deed
    sampler = data.EpochSampler(6, 3, seed=1, stop=4)
    if deed == "kill":
        with pytest.raises(RuntimeError, match="signal 9"):
            list(data.load(clips, sampler, workers=2))
        return
    batches = list(data.load(clips, sampler, workers=2))
    assert len(batches) == 4 and sampler.start == 4 and 2 in clips.bad and 2 not in torch.cat([b["index"] for b in batches])
    reason = dict(entry for b in batches for entry in b["bad"])[videos.path(2)]
    assert ("hung" if deed == "hang" else "crashed") in reason
    known = data.Clips(videos, 4, 2, 32, seed=1)                       # as if it had been known from the start
    known.bad = {2: reason}
    assert all(torch.equal(a["video"], b["video"]) for a, b in zip(batches, data.load(known, data.EpochSampler(6, 3, seed=1, stop=4))))


@pytest.mark.parametrize("hanging, seconds", [(1, 4), (3, 0.2), (1, math.inf)])
def test_a_worker_that_hangs_in_its_fork(dataset, hanging, seconds, monkeypatch, capsys):
    """As one does that inherits a locked lock: started again, and an end with one line where that does not help."""
    fork, forks = os.fork, []

    def hang():
        forks.append(None)
        pid = fork()
        while pid == 0 and len(forks) <= hanging:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            time.sleep(1)
        return pid
    monkeypatch.setattr(os, "fork", hang)
    monkeypatch.setattr(data, "START_SECONDS", seconds)
    clips = data.Clips(data.find_videos(dataset), 4, 2, 32, seed=1)
    batches = data.load(clips, data.EpochSampler(6, 3, seed=1, stop=2), workers=1)
    if seconds == math.inf:                                                                 # a signal ends the waiting, and the child
        before = set(torch.multiprocessing.active_children())
        signal.signal(signal.SIGALRM, lambda *_: sys.exit(0))
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(SystemExit):
            next(batches)
        assert not {child for child in torch.multiprocessing.active_children() if child.is_alive()} - before
        return
    if hanging == 3:
        with pytest.raises(data.WorkerError, match="did not start"):
            next(batches)
    else:
        assert all(torch.equal(a["video"], b["video"]) for a, b in zip(batches, data.load(clips, data.EpochSampler(6, 3, seed=1, stop=2)), strict=True))
    assert len(forks) == max(2, hanging) and "they are started again" in capsys.readouterr().out


def test_a_worker_that_ends_while_it_hands_over_a_batch(dataset, monkeypatch):
    """Then the connection breaks before torch notices that the worker is gone."""
    def broken(self, timeout=5.0):
        os.kill(self._workers[0].pid, signal.SIGKILL)
        raise ConnectionResetError(104, "Connection reset by peer")
    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_try_get_data", broken)
    with pytest.raises(data.WorkerError, match="signal 9"):
        next(data.load(data.Clips(data.find_videos(dataset), 4, 2, 32), data.EpochSampler(6, 3), workers=2))


def test_a_batch_that_cannot_be_sent_ends_the_worker(dataset, monkeypatch, capfd):
    """As where /dev/shm is full: Python drops it with a message, and would let the run wait forever."""
    loader = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(loader._try_get_data, "__defaults__", (0.3,))
    clips = data.Clips(data.find_videos(dataset), 4, 2, 32)
    with pytest.raises(data.WorkerError, match="exit code 1.*/dev/shm"):
        next(data.load(clips, data.EpochSampler(6, 3), workers=1, collate=lambda items: lambda: None))
    assert "could not hand over a batch: " in capfd.readouterr().err


def test_sampler_covers_each_epoch_once_over_the_ranks():
    length, steps = 23, 5
    ranks = [data.EpochSampler(length, 2, rank, 2, seed=3, stop=10) for rank in range(2)]
    assert ranks[0].steps_per_epoch == steps
    batches = [list(rank) for rank in ranks]
    for epoch in range(2):
        seen = [key for rank in batches for batch in rank[epoch * steps:(epoch + 1) * steps] for key in batch]
        assert {e for e, _ in seen} == {epoch} and len({i for _, i in seen}) == 20
    one = list(data.EpochSampler(length, 4, seed=3, stop=10))
    assert [a + b for a, b in zip(*batches)] == one
    assert list(data.EpochSampler(length, 4, seed=3, start=7, stop=10)) == one[7:]
    assert [i for _, i in one[0]] != [i for _, i in one[steps]]
    assert list(data.EpochSampler(length, 8, repeats=2, seed=3, stop=2))[1] == one[1]


def test_sampler_fills_batches_from_few_videos():
    sampler = data.EpochSampler(3, 8, seed=0, stop=2)
    assert sampler.steps_per_epoch == 1
    for epoch, batch in enumerate(sampler):
        assert len(batch) == len(set(batch)) == 8 and all(e == epoch for e, _ in batch)
        assert sorted(i % 3 for _, i in batch) [:2] == [0, 0]
    with pytest.raises(ValueError):
        data.EpochSampler(3, 8, repeats=3)
    with pytest.raises(ValueError):
        data.EpochSampler(0, 8)


def test_copies_of_a_video_in_a_batch_are_different_draws(dataset):
    clips = data.Clips(data.find_videos(dataset), 4, 2, 32)
    a, b = clips[0, 1], clips[0, 1 + 6]
    assert a["index"] == b["index"] == 1 and not torch.equal(a["video"], b["video"])


def test_frame_numbers():
    assert data.frame_numbers(100, 4, 10, 0.5) == [35, 45, 55, 65] and data.frame_numbers(100, 4, 10, 0)[0] == 0
    assert data.frame_numbers(100, 4, 10, 1)[-1] == 99
    drawn = [data.frame_numbers(100, 4, 10, p)[0] for p in torch.rand(4000, generator=torch.Generator().manual_seed(0)).tolist()]
    assert set(drawn) == set(range(70)) and abs(np.mean(drawn) - 34.5) < 1.5
    assert data.frame_numbers(10, 4, 10, 0.9)[0] == 0                                # too short: from the first frame
    assert data.frame_numbers(160, 16, 0) == list(range(5, 160, 10))                 # middles of sixteen parts
    jitter = data.frame_numbers(160, 16, 0, torch.rand(16, generator=torch.Generator().manual_seed(0)))
    assert [n // 10 for n in jitter] == list(range(16)) and len({n % 10 for n in jitter}) > 4
    assert data.frame_numbers(4, 8, 0) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_multi_scale_crops_are_the_recipes():
    crops = {data.multi_scale_crop(340, 256, shape, place) for shape in range(10) for place in range(13)}
    assert len(data.CROP_SHAPES) == 10 and len(data.CROP_PLACES) == 13
    assert {(w, h) for *_, w, h in crops} == {(a, b) for i, a in enumerate((256, 224, 192, 168)) for j, b in enumerate((256, 224, 192, 168)) if abs(i - j) < 2}
    assert all(x >= 0 and y >= 0 and x + w <= 340 and y + h <= 256 for x, y, w, h in crops)
    places = {(x, y) for x, y, w, h in crops if w == h == 224}                       # steps of 29 and 8
    assert places == {(29 * a, 8 * b) for a, b in [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2), (0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]}
    for width, height in ((16, 1), (1, 16), (3, 3), (4000, 31)):
        for shape in range(10):
            x, y, w, h = data.multi_scale_crop(width, height, shape, 12)
            assert w >= 1 and h >= 1 and x + w <= width and y + h <= height


# ============ prepare ============

@pytest.fixture
def command(monkeypatch, capfd):
    """command("prepare", ...) -> exit code, standard output, standard error of data.py, run in this process."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        code = 0
        try:
            data.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) or stop.code is None else 1
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        return code, *capfd.readouterr()
    return run


def test_prepare_keeps_layout_labels_pictures_and_continues(dataset, tmp_path, command):
    target = tmp_path / "new"
    (dataset / "empty").mkdir()                  # a class all the same
    code, _, errors = command("prepare", dataset, target, "--gop", 8, "--workers", 2)
    assert code == 1 and "1 unreadable" in errors and "Traceback" not in errors
    assert "4 ü.mp4" in (target / "unreadable.txt").read_text()
    names, labels, classes = found(target)
    assert names == ["left/0 ü.mp4", "left/1 ü.mp4", "left/2 ü.mp4", "right/3 ü.mp4", "right/5 ü.mp4"]
    (dataset / "empty").rmdir()
    assert labels == [1, 1, 1, 2, 2] and classes == ["empty", "left", "right"]
    path = target / names[3]
    assert numbers_of(whole(path, 10, 3, 0)) == list(range(0, 30, 3))
    with data.Video(path) as video:
        assert np.diff(video.keys).max() == 8 and video.frames == 30
    before = {name: os.stat(target / name).st_mtime_ns for name in names}
    os.remove(target / names[0])
    command("prepare", dataset, target)
    after = {name: os.stat(target / name).st_mtime_ns for name in names}
    assert [name for name in names if after[name] != before[name]] == names[:1]
    for wrong in ((dataset, dataset / "inside"), (tmp_path / "absent", tmp_path / "y"), (dataset, tmp_path / "z", "--gop", 0)):
        code, _, errors = command("prepare", *wrong)
        assert code == 2 and "data.py: error: " in errors and "Traceback" not in errors


def test_prepare_list(dataset, tmp_path, command):
    source = tmp_path / "lists" / "train.csv"
    source.parent.mkdir()
    source.write_text("".join(f"{dataset}/{name},{label}\n" for name, label in
                              (("left/0 ü.mp4", 7), ("right/4 ü.mp4", 3), ("right/5 ü.mp4", 2))))
    assert command("prepare", source, tmp_path / "new")[0] == 1
    assert found(tmp_path / "new" / "train.csv") == (["left/0 ü.mp4", "right/5 ü.mp4"], [7, 2], None)
    assert numbers_of(whole(tmp_path / "new" / "right" / "5 ü.mp4", 2, 20, 3)) == [3, 23]


@pytest.mark.parametrize("name", ["vfr.mkv", "h264.avi", "mjpeg.avi", "tenbit.mp4", "odd.mkv", "alpha.mov", "90", "transposed"])
def test_reencoded_pictures(video, folder, tmp_path, name):
    if name in MATRICES:
        source = str(rotate(write(folder / f"re{name}.mp4", pictures=[ramp(160, 112)] * 4, pix_fmt="yuv444p", options={"qp": "2"}), name))
    else:
        source = video(name)
    target = str(tmp_path / "new.mp4")
    assert data.reencode(source, target, short_side=64) is None
    with data.Video(source) as old, data.Video(target) as new:
        assert old.frames == new.frames and min(new.stream.width, new.stream.height) == 64
        if name == "vfr.mkv":
            times = [[float(v.pts[i] * v.stream.time_base) for i in v.shown] for v in (old, new)]
            assert np.allclose(*times, atol=1e-3)
        if name == "tenbit.mp4":                 # about the same bits for a pixel
            assert 0.3 < new.bytes / old.bytes * 96 * 128 / 64 / 85 < 3
    a, b = [data.read_clip(path, 3, 1, 1, size=64).float() for path in (source, target)]
    assert (a - b).abs().mean() < 8
    assert not os.path.exists(target + ".part")


def test_reencode_keeps_what_lies_before_damage(tmp_path, video):
    path = write(tmp_path / "cut.mp4", **FORMATS["bframes.mp4"], copts={"movflags": "faststart"})
    content = bytearray(open(path, "rb").read())
    content[-1500:-1000] = b"\xff" * 500
    open(path, "wb").write(content)
    reason = data.reencode(str(path), str(tmp_path / "new.mp4"))
    assert "frames kept" in reason
    assert numbers_of(whole(tmp_path / "new.mp4", 4, 1, 0)) == [0, 1, 2, 3]
    with pytest.raises(OSError, match="new.mp4: No such"):
        data.reencode(str(path), str(tmp_path / "no folder" / "new.mp4"))


def test_bench_prints_what_a_clip_costs(dataset, command):
    code, text, _ = command("bench", dataset, "--seconds", "0.3")
    assert code == 0 and "clips per CPU-second" in text and "cores" in text and "1 unreadable" in text


def test_normalize():
    video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)
    truth = (video.double() / 255 - mean) / std
    got = data.normalize(video)
    assert got.shape == (2, 3, 4, 8, 8) and got.is_contiguous() and (got - truth).abs().max() < 1e-5
    assert data.normalize(video, torch.bfloat16).dtype == torch.bfloat16


# ============ several processes ============

def run_rank(rank, folder, scores):
    """What two gloo processes compute for the tests below: Sinkhorn of split rows, and gradients of half a batch each."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plans = [sinkhorn(scores[:rows] if rank == 0 else scores[rows:]) for rows in (30, 90)]  # 90: the other rank has none
    steps = {assignment: gradients_on_rank(rank, assignment) for assignment in ("hard", "soft")}
    torch.save((plans, steps), f"{folder}/result{rank}")
    torch.distributed.destroy_process_group()


def gradients_on_rank(rank, assignment):
    torch.manual_seed(rank)                                                                 # DDP must hand out rank 0's weights
    model = SIGMA("tiny", num_prototypes=12, frames=4, image_size=32, assignment=assignment)
    if rank == 0:
        model.load_state_dict(tiny().state_dict())
    video, mask = clip(batch=4)
    model = torch.nn.parallel.DistributedDataParallel(model)
    loss, stats = model(video[2 * rank:2 * rank + 2], mask[2 * rank:2 * rank + 2])
    loss.backward()
    return loss.detach(), stats, {name: p.grad for name, p in model.module.named_parameters()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(run_rank, (str(folder), unit_scores(90, 12)), nprocs=2)
    return [torch.load(folder / f"result{rank}") for rank in range(2)]


def test_sinkhorn_is_global_over_ranks_of_different_size(two_ranks):
    scores = unit_scores(90, 12)
    for parts in zip(*(plans for plans, _ in two_ranks)):
        q = torch.cat(parts)
        torch.testing.assert_close(q.double(), reference_sinkhorn(scores), atol=2e-5, rtol=1e-3)
    halves = torch.cat([sinkhorn(scores[:30]), sinkhorn(scores[30:])])
    assert (halves - q).abs().max() > 0.01                                                  # balancing by halves is another plan


@pytest.mark.parametrize("assignment", ["hard", "soft"])
def test_two_processes_with_half_the_clips_equal_one_with_all(two_ranks, assignment):
    results = [steps[assignment] for _, steps in two_ranks]
    model = tiny(assignment=assignment)
    loss, stats = model(*clip(batch=4))
    loss.backward()
    assert (results[0][0] + results[1][0]).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
    for name in ("perplexity", "spread"):                                                   # over all ranks already
        assert results[0][1][name].item() == pytest.approx(stats[name].item(), rel=1e-4) == results[1][1][name].item()
    for name, parameter in model.named_parameters():
        for rank in range(2):
            torch.testing.assert_close(results[rank][2][name], parameter.grad, atol=1e-6, rtol=1e-4)


# ============ train.py: runs ============

RUN = ["--size", "tiny", "--frames", "4", "--image-size", "32", "--batch-size", "4", "--prototypes", "8", "--mask-ratio", "0.75", "--stride", "1", "--epochs", "6",
       "--warmup-epochs", "1", "--lr", "0.05", "--precision", "fp32", "--log-every", "1"]


def write_clip(path, seed, frames=8, size=40):
    """A video of smooth noise, another for every seed."""
    noise = torch.randn(1, 3, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    pictures = (F.interpolate(noise, size=(frames, size, size), mode="trilinear")[0].permute(1, 2, 3, 0) * 60 + 128).clamp(0, 255).byte().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width = stream.height = size
        for picture in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.fixture(scope="session")
def two_classes(tmp_path_factory):
    """Eight videos in two class folders."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(8):
        write_clip(root / "ab"[i % 2] / f"{i}.mp4", i)
    return root


@pytest.fixture(autouse=True)
def on_the_cpu(request, monkeypatch):
    """Also where there is a GPU: what these tests expect, bit for bit in some, is a CPU's."""
    if "on_the_gpu" not in request.node.name:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(autouse=True)
def own_signals():
    """train.main takes over the signals; a test gives them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train_here(two_classes, out, *flags, workers=0):
    """train.main in this process -> its log."""
    train.main(["--data", str(two_classes), "--out", str(out), "--workers", str(workers), *RUN, *flags])
    return read_log(out)


def train_apart(two_classes, out, *flags, nproc=0, restarts=0, launcher=()):
    """train.py in processes of its own."""
    if nproc:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), "--max-restarts", str(restarts)]
    STARTED.append(subprocess.Popen([sys.executable, *launcher, str(HERE / "train.py"), "--data", str(two_classes), "--out", str(out), "--workers", "1", *RUN, *flags], cwd=out.parent,
                                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRON))
    return STARTED[-1]


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(log):
    """step -> loss; fails on a step that stands twice."""
    steps = [record["step"] for record in log if "loss" in record]
    assert len(steps) == len(set(steps)), "a step is logged twice"
    return {record["step"]: record["loss"] for record in log if "loss" in record}


def weights(out):
    return sigma.load_checkpoint(out / "checkpoint.pt")["model"]


def same_run(out, other):
    assert losses(read_log(out)) == losses(read_log(other))                                 # bit for bit
    a, b = weights(out), weights(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="session")
def uninterrupted(two_classes, tmp_path_factory):
    """Waits for the run that every interrupted one is compared with, and says where it is: 6 epochs of 2 steps, with one thread as theirs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    process = train_apart(two_classes, out)

    def folder():
        assert process.wait(timeout=120) == 0, process.stdout.read()
        return out
    return folder


def test_a_run_leaves_what_the_interface_says(uninterrupted):
    log = read_log(uninterrupted())
    assert list(losses(log)) == list(range(1, 13)) and [r["epoch"] for r in log] == [i // 2 for i in range(12)]
    assert {"step", "epoch", "loss", "lr", "clips_per_second", "data_wait", "loss_video", "loss_projection", "agreement", "perplexity", "spread"} <= set(log[0])
    for record in log:
        assert record["loss"] == pytest.approx(record["loss_video"] + record["loss_projection"], rel=1e-5)
    with train.Image.open(uninterrupted() / "preview.png") as picture:
        assert picture.width > 200 and len(picture.getcolors(10 ** 6)) > 50
    content = sigma.load_checkpoint(uninterrupted() / "checkpoint.pt")
    assert content["step"] == 12 and content["epoch"] == 6
    model = SIGMA("tiny", num_prototypes=8, frames=4, image_size=32)
    model.load_state_dict(content["model"], strict=True)


def test_learning_rate_is_the_recipes(uninterrupted):
    peak, floor = 0.05 * 4 / 256, 1e-5 * 4 / 256
    for record in read_log(uninterrupted()):
        step = record["step"] - 1
        expected = peak * step / 2 if step < 2 else floor + (peak - floor) * (1 + math.cos(math.pi * (step - 2) / 10)) / 2
        assert record["lr"] == pytest.approx(expected, rel=1e-6)


@beside
def test_a_signal_saves_and_the_same_command_goes_on(uninterrupted, two_classes, tmp_path):
    process = train_apart(two_classes, tmp_path / "run", "--save-minutes", "0.00001")       # it saves at every step, which makes them longer
    wait_for(lambda: read_lines(tmp_path / "run"), process)
    process.send_signal(signal.SIGINT)                                                      # SIGTERM: below
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 128 + signal.SIGINT, output
    stopped = sigma.load_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"]
    assert 1 <= stopped < 12 and f"stopped after step {stopped} by signal 2" in output and "Traceback" not in output
    assert train_apart(two_classes, tmp_path / "run").wait(timeout=120) == 0
    same_run(tmp_path / "run", uninterrupted())


@beside
def test_killed_at_any_moment_it_goes_on_from_the_last_checkpoint(uninterrupted, two_classes, tmp_path):
    out = tmp_path / "run"
    for lines in (2, 6):                                                                 # SIGKILL: nothing can be tidied up
        process = train_apart(two_classes, out, "--save-minutes", "0.00001")                           # writing nearly all the time
        wait_for(lambda: out.exists() and len(read_lines(out)) >= lines, process)
        process.kill()
        process.communicate(timeout=120)
        if (out / "checkpoint.pt").exists():
            sigma.load_checkpoint(out / "checkpoint.pt")                                    # never torn
    (out / "log.jsonl").open("a").write('{"step": 11, "loss": 1.2')                         # as a kill inside a write leaves it
    process = train_apart(two_classes, out)
    assert process.wait(timeout=120) == 0, process.stdout.read()
    same_run(out, uninterrupted())
    assert not (out / "checkpoint.pt.part").exists()


@beside
def test_two_processes_stop_and_resume_together(uninterrupted, two_classes, tmp_path):
    """And two processes with half the batch each are the run of one process, up to rounding."""
    whole, process = (train_apart(two_classes, tmp_path / name, "--batch-size", "2", "--save-minutes", "0.00001", nproc=2) for name in ("whole", "run"))    # side by side, to save time
    wait_for(lambda: read_lines(tmp_path / "run"), process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "stopped after step" in output and "by signal 15" in output, output
    process = train_apart(two_classes, tmp_path / "run", "--batch-size", "2", "--val", str(two_classes), nproc=2)
    for process, evaluated in ((whole, False), (process, True)):
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0 and ("k-NN top-1 at step 12" in output) == evaluated, output
    same_run(tmp_path / "run", tmp_path / "whole")
    two, one = losses(read_log(tmp_path / "whole")), losses(read_log(uninterrupted()))
    assert [two[s] for s in range(1, 5)] == pytest.approx([one[s] for s in range(1, 5)], rel=1e-3)
    process = train_apart(two_classes, tmp_path / "run", "--batch-size", "2", "--val", str(two_classes), nproc=2)     # nothing is left to do
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "k-NN" not in output, output


@beside
def test_restarted_by_torchrun_after_a_crash(uninterrupted, two_classes, tmp_path):
    process = train_apart(two_classes, tmp_path / "run", nproc=1, restarts=3)
    wait_for(lambda: (tmp_path / "run" / "checkpoint.pt").exists(), process)
    worker = next(int(p) for p in os.listdir("/proc") if p.isdigit() and is_child(int(p), process.pid) and b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    assert process.wait(timeout=120) == 0, process.stdout.read()
    same_run(tmp_path / "run", uninterrupted())


def is_child(pid, parent):
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1]) == parent
    except OSError:
        return False


def read_lines(out):
    return (out / "log.jsonl").read_bytes().split(b"\n")[:-1] if (out / "log.jsonl").exists() else []


def wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def test_accumulation_takes_the_micro_batches_of_the_order(two_classes, tmp_path):
    log = train_here(two_classes, tmp_path / "run", "--batch-size", "2", "--accumulate", "2", "--steps", "4")
    assert list(losses(log)) == [1, 2, 3, 4] and [r["epoch"] for r in log] == [0, 0, 1, 1]


def test_disk_full_keeps_the_last_good_checkpoint(two_classes, tmp_path):
    """A file-size limit stands for the full disk: the checkpoint is larger, log lines are not."""
    out = tmp_path / "run"
    train_here(two_classes, out, "--steps", "2")
    before = (out / "checkpoint.pt").read_bytes()
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    process = train_apart(two_classes, out, "--steps", "6", "--save-minutes", "0.00001", launcher=["-c", limit])
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1 and "could not be written" in output and "make room" in output and "Traceback" not in output, output
    assert (out / "checkpoint.pt").read_bytes() == before and not (out / "checkpoint.pt.part").exists()
    assert list(losses(read_log(out))) == [1, 2, 3, 4, 5, 6]                                # training went on
    train_here(two_classes, out, "--steps", "6")                                            # room again: the same command
    assert sigma.load_checkpoint(out / "checkpoint.pt")["step"] == 6 and list(losses(read_log(out))) == [1, 2, 3, 4, 5, 6]


def test_log_lines_wait_for_room(tmp_path):
    env = argparse.Namespace(rank=0)
    (tmp_path / "log").mkdir()
    log = train.Log(env, tmp_path / "log" / "log.jsonl", 0)
    log.write(step=1, loss=1.0)
    (tmp_path / "log").rename(tmp_path / "gone")                                            # the two_classes vanishes,
    log.write(step=2, loss=2.0)
    log.write(step=3, loss=float("nan"))
    (tmp_path / "gone").rename(tmp_path / "log")                                            # and is back
    log.write(step=4, loss=4.0)
    assert [json.loads(line)["step"] for line in (tmp_path / "log" / "log.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    assert json.loads((tmp_path / "log" / "log.jsonl").read_text().splitlines()[2])["loss"] is None


def test_a_loss_that_is_not_finite_ends_the_run_and_is_counted(two_classes, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_here(two_classes, tmp_path / "run", "--lr", "1e30", "--min-lr", "1e30", "--warmup-epochs", "0")
    assert stopped.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()
    assert len(message) == 1 and "not finite" in message[0] and "checkpoint.pt" in message[0]
    log = read_log(tmp_path / "run")
    assert log[-1]["skipped"] == train.GIVE_UP and log[-1]["loss"] is None
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("precision, steps", [("fp32", 1), ("fp16", 10)])
def test_gradients_that_are_never_finite_end_the_run(two_classes, tmp_path, monkeypatch, capsys, precision, steps):
    forward = SIGMA.forward
    monkeypatch.setattr(train, "GIVE_UP", 1)

    def steep(self, video, mask):                                # a root of 0: its value is 0, its slope is not finite
        loss, stats = forward(self, video, mask)
        return loss + (loss - loss.detach()).square().sqrt(), stats
    monkeypatch.setattr(SIGMA, "forward", steep)
    with pytest.raises(SystemExit) as stopped:
        train_here(two_classes, tmp_path / "run", "--precision", precision)
    log = read_log(tmp_path / "run")
    assert stopped.value.code == 1 and "gradients" in capsys.readouterr().err
    assert log[-1]["skipped"] == log[-1]["step"] == steps and log[-1]["loss"] is not None


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_single_bad_step_is_left_out(two_classes, tmp_path, monkeypatch, bad):
    forward, calls = SIGMA.forward, []

    def sometimes(self, video, mask):
        calls.append(1)
        loss, stats = forward(self, video, mask)
        if len(calls) == 3:                                      # NaN, or a root of 0, whose slope is not finite
            loss = loss * float("nan") if bad == "loss" else loss + (loss - loss.detach()).square().sqrt()
        return loss, stats
    monkeypatch.setattr(SIGMA, "forward", sometimes)
    train_here(two_classes, tmp_path / "run", "--steps", "4")
    log = train_here(two_classes, tmp_path / "run", "--steps", "5")                         # the count outlives the process
    assert [r["loss"] is None for r in log if "loss" in r] == [False, False, bad == "loss", False, False]
    assert [r["skipped"] for r in log if "loss" in r] == [0, 0, 1, 1, 1]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())


def test_broken_videos_are_named_counted_and_replaced(two_classes, tmp_path, capsys):
    root = tmp_path / "videos with spaces and ü"
    for path in two_classes.rglob("*.mp4"):
        (root / path.parent.name).mkdir(parents=True, exist_ok=True)
        (root / path.parent.name / path.name).write_bytes(path.read_bytes())
    (root / "a" / "broken one.mp4").write_bytes(b"garbage")
    log = train_here(root, tmp_path / "run", "--epochs", "3")
    named = [r for r in log if "unreadable" in r]
    assert len(named) == 1 and named[0]["unreadable"].endswith("broken one.mp4") and log[-1]["unreadable_videos"] == 1
    assert capsys.readouterr().out.count("broken one.mp4") == 1
    for i in range(12):
        (root / "a" / f"bad{i}.mp4").write_bytes(b"garbage")
    with pytest.raises(SystemExit) as stopped:
        train_here(root, tmp_path / "bad", "--epochs", "30")
    assert stopped.value.code == 1 and "over half" in capsys.readouterr().err
    for i in range(12):
        (root / "a" / f"bad{i}.mp4").write_bytes((two_classes / "b" / "1.mp4").read_bytes())
    assert losses(train_here(root, tmp_path / "bad", "--epochs", "30", "--steps", "12"))[12]   # repaired: the same run goes on


def test_an_old_log_without_its_checkpoint_is_kept(two_classes, tmp_path):
    train_here(two_classes, tmp_path / "run", "--steps", "2")
    (tmp_path / "run" / "checkpoint.pt").unlink()
    train_here(two_classes, tmp_path / "run", "--steps", "1")
    kept, = (tmp_path / "run").glob("log-*.jsonl")
    assert len(kept.read_text().splitlines()) == 2 and len(read_log(tmp_path / "run")) == 1


@beside
def test_a_killed_loader_worker_ends_in_an_error_and_a_checkpoint(two_classes, tmp_path):
    out = tmp_path / "run"
    process = train_apart(two_classes, out, "--epochs", "100000")
    wait_for(lambda: len(read_lines(out)) >= 5, process)
    worker = next(int(p) for p in os.listdir("/proc") if p.isdigit() and is_child(int(p), process.pid) and b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes())
    os.kill(worker, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "worker" in output and "Traceback" not in output, output
    assert sigma.load_checkpoint(out / "checkpoint.pt")["step"] >= 5


def test_another_runs_folder_is_refused(uninterrupted, two_classes, capsys):
    for flags, word in ((["--seed", "1"], "seed was 0, is 1"), (["--prototypes", "9"], "prototypes was 8, is 9"), (["--batch-size", "2"], "global_batch was 4, is 2")):
        with pytest.raises(SystemExit) as stopped:
            train_here(two_classes, uninterrupted(), *flags)
        assert stopped.value.code == 2 and word in capsys.readouterr().err


def test_foreign_and_torn_checkpoints_are_refused_in_one_line(two_classes, tmp_path, capsys):
    for content in (b"torn", pickle.dumps(Malice())):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "checkpoint.pt").write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            train_here(two_classes, tmp_path / "run")
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(error) == 1 and "checkpoint.pt" in error[0] and (tmp_path / "run" / "checkpoint.pt").read_bytes() == content
    torch.save({"model": tiny().state_dict()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(SystemExit):
        train_here(two_classes, tmp_path / "run")
    assert "does not fit this run" in capsys.readouterr().err


def test_a_checkpoint_of_an_optimizer_that_was_not_fused_resumes(two_classes, tmp_path):
    for name in ("old", "new"):
        train_here(two_classes, tmp_path / name, "--steps", "2")
    content = sigma.load_checkpoint(tmp_path / "old" / "checkpoint.pt")
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = None
    torch.save(content, tmp_path / "old" / "checkpoint.pt")
    for name in ("old", "new"):
        train_here(two_classes, tmp_path / name, "--steps", "4")
    same_run(tmp_path / "old", tmp_path / "new")


@pytest.mark.parametrize("flags, word", [
    (["--frames", "0"], "--frames"), (["--frames", "15"], "multiple of 2"), (["--image-size", "100"], "--image-size"), (["--mask-ratio", "1"], "--mask-ratio"), (["--mask-ratio", "0"], "--mask-ratio"),
    (["--mask-ratio", "nan"], "--mask-ratio"), (["--prototypes", "0"], "--prototypes"), (["--size", "giant"], "invalid choice"), (["--eps", "0"], "--eps"), (["--eps", "nan"], "--eps"),
    (["--batch-size", "0"], "--batch-size"), (["--workers", "-1"], "--workers"), (["--steps", "0"], "--steps"), (["--epochs", "-3"], "--epochs"), (["--lr", "-1"], "--lr"), (["--accumulate", "0"], "--accumulate"),
    (["--repeats", "3"], "--repeats"), (["--target", "pixel", "--loss", "sigma"], "goes with --loss l2"), (["--stride", "0"], "--stride"), (["--save-minutes", "0"], "--save-minutes"), (["--frames", "x"], "invalid int"),
    (["--lr", "inf"], "--lr"), (["--probe", ""], "No such file"), (["--bench", "--accumulate", "2"], "--accumulate"), (["--data", "no/such/folder"], "no such folder")])
def test_nonsense_gives_one_line_and_exit_code_2(tmp_path, capsys, flags, word):
    with pytest.raises(SystemExit) as stopped:
        train.main(["--data", str(tmp_path / "x"), "--out", str(tmp_path / "run"), *flags])
    error = [line for line in capsys.readouterr().err.strip().splitlines() if not line.startswith(("usage:", " "))]
    assert stopped.value.code == 2 and len(error) == 1 and word in error[0], error


def test_dino_weights_from_a_file_or_one_line_what_to_do(two_classes, tmp_path, capsys, monkeypatch):
    flags = ["--target", "dino", "--teacher", "vits16", "--steps", "1"]
    torch.save(fill(SIGMA("tiny", "dino", teacher="vits16", frames=4, image_size=32).teacher.state_dict()), tmp_path / "dino.pth")
    assert losses(train_here(two_classes, tmp_path / "run", *flags, "--dino-weights", str(tmp_path / "dino.pth")))
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "other.pth")

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    capsys.readouterr()
    for more, words in ((["--dino-weights", str(tmp_path / "other.pth")], "not the weights of this DINO"), (["--dino-weights", "none.pth"], "none.pth"), ([], "--dino-weights")):
        with pytest.raises(SystemExit) as stopped:
            train_here(two_classes, tmp_path / "none", *flags, *more)
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(error) == 1 and words in error[0]


def test_fp16_shows_its_loss_scale(two_classes, tmp_path):
    """A run that goes on in fp16 too starts at the scale of one: at that of the others, which is 1, small gradients are 0."""
    train_here(two_classes, tmp_path / "run", "--precision", "fp32", "--steps", "1")
    log = train_here(two_classes, tmp_path / "run", "--precision", "fp16", "--steps", "2")
    assert log[-1]["loss_scale"] > 1000 and math.isfinite(log[-1]["loss"])


@beside
def test_a_rank_that_dies_brings_the_others_down(two_classes, tmp_path):
    process = train_apart(two_classes, tmp_path / "run", "--batch-size", "2", "--epochs", "100000", nproc=2)
    wait_for(lambda: len(read_lines(tmp_path / "run")) >= 2, process)
    ranks = [int(p) for p in os.listdir("/proc") if p.isdigit() and is_child(int(p), process.pid) and b"train.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    assert len(ranks) == 2
    os.kill(max(ranks), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize("flags", [[], ["--target", "dino", "--teacher", "vits16"], ["--target", "pixel"], ["--assignment", "soft"]])
def test_bench_times_a_step_and_its_parts(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    train.main(["--bench", *RUN, "--steps", "1", *flags])
    first, speed, *parts = capsys.readouterr().out.strip().splitlines()
    rate, milliseconds = (float(re.search(pattern, speed)[1]) for pattern in (r"([\d.]+) clips/s", r"([\d.]+) ms a step"))
    assert "1 x 4 clips of 4 frames" in first and rate * milliseconds / 1000 == pytest.approx(4, rel=0.01)
    ours, share, product = map(float, re.search(r"([\d.]+) TFLOP/s a process, ([\d.]+)% of a large matrix product's ([\d.]+) TFLOP/s", speed).groups())
    assert ours / product == pytest.approx(share / 100, abs=0.03) and sigma.Attention.plain
    phi = "φ, the DINO teacher" if "dino" in flags else "pixel target" if "pixel" in flags else "φ, an MLP"
    names = ["copy, normalise, cut into tubes", "encoder", "decoder", phi, "loss, of which", *([] if "pixel" in flags else ["scores", "Sinkhorn"]), "optimizer"]
    assert [line.split("ms a clip")[1].strip() for line in parts] == names and all(float(line.split()[0]) > 0 for line in parts)
    assert not list(tmp_path.iterdir())


def test_too_little_gpu_memory_is_one_line(monkeypatch, capsys):
    def full(env, args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    monkeypatch.setattr(train, "bench", full)
    with pytest.raises(SystemExit) as stopped:
        train.main(["--bench", *RUN])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 1 and len(error) == 1 and "--batch-size" in error[0] and "2.00 GiB" in error[0]


def test_more_prototypes_than_tubes_warns(two_classes, tmp_path, capsys):
    train_here(two_classes, tmp_path / "run", "--prototypes", "1000", "--steps", "1")
    assert "1000 prototypes but only 96 masked tubes" in capsys.readouterr().out


def test_l2_and_pixel_runs_show_pictures_without_prototypes(two_classes, tmp_path):
    for target in ("pixel", "mlp"):
        log = train_here(two_classes, tmp_path / target, "--target", target, "--loss", "l2", "--steps", "2")
        assert ("spread" in log[-1]) == (target == "mlp") and (tmp_path / target / "preview.png").exists()


def test_knn_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(60, 5, generator=generator), torch.randn(30, 5, generator=generator)
    bank_labels, labels = torch.randint(4, (60,), generator=generator), torch.randint(4, (30,), generator=generator)
    right = 0
    for query, label in zip(queries, labels):
        similarity = [float(F.cosine_similarity(query, row, dim=0)) for row in bank]
        nearest = sorted(range(60), key=lambda i: -similarity[i])[:20]
        votes = [sum(math.exp(similarity[i] / 0.07) for i in nearest if bank_labels[i] == c) for c in range(4)]
        right += votes.index(max(votes)) == label
    assert train.knn(bank, bank_labels, queries, labels) == pytest.approx(100 * right / 30)
    points = torch.eye(3).repeat_interleave(30, dim=0) + 0.01 * torch.randn(90, 3, generator=generator)
    assert train.knn(points, torch.arange(3).repeat_interleave(30)) == 100                   # each by the others


def test_flops_are_counted_as_by_hand():
    args = train.parse_args(["--data", "x", "--size", "tiny", "--frames", "4", "--image-size", "32", "--prototypes", "10", "--mask-ratio", "0.75"])
    n, N, M, D, d = 8, 32, 24, 128, 64
    layer = lambda tokens, width: 2 * tokens * 12 * width ** 2 + 4 * tokens ** 2 * width
    psi = 2 * n * 384 * D + 4 * layer(n, D) + 2 * n * D * d + 2 * layer(N, d) + 2 * M * d * 64
    phi = 2 * M * (384 * 256 + 256 * 64)
    backward = 2 * psi - 2 * n * 384 * D + 2 * phi - 2 * M * 384 * 256                      # pixels need no gradient
    scores = 2 * M * 64 * 10 * (3 + 2)                                                      # the video branch's stop at the prototypes
    assert train.clip_flops(args) == pytest.approx(psi + phi + backward + scores, rel=0.02)


def test_the_demo_is_the_same_for_a_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEMO_TRAIN", 1), monkeypatch.setattr(data, "DEMO_VAL", 1)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        data.write_demo(tmp_path / name, seed)
    a, b, c = ({path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.m*")} for name in "abc")
    assert len(a) == 48 and a == b and a.keys() == c.keys() and not any(a[path] == c[path] for path in a)
    assert len(data.find_videos(tmp_path / "a" / "train").classes) == 16
    with pytest.raises(ValueError, match="not the demo of seed 1"):
        data.write_demo(tmp_path / "a", 1)


def test_the_demos_masks_are_the_objects():
    """Where the mask says object, the picture shows the object's texture: shifted by the motion, it stays the same there."""
    for motion, (dy, dx) in (("still", (0, 0)), ("shake", (5, 5))):
        frames, masks = data.demo_clip(np.random.default_rng(3), "dots", motion)
        assert frames.shape == (24, 80, 80, 3) and masks.shape == (24, 80, 80) and set(np.unique(masks)) <= {0, 1, 2}
        first, later = frames[1].astype(float).mean(-1), frames[2].astype(float).mean(-1)        # the shake jumps between these
        moved = np.roll(np.roll(first, -dy, 0), -dx, 1)
        inside = (masks[2] == 1) & (np.roll(np.roll(masks[1], -dy, 0), -dx, 1) == 1)
        inside[:8], inside[-8:], inside[:, :8], inside[:, -8:] = False, False, False, False
        assert inside.sum() > 500 and np.corrcoef(moved[inside], later[inside])[0, 1] > 0.9


@beside
def test_the_demo_from_the_command_line(tmp_path):
    """A bare `train.py` with a few steps: writes the videos, evaluates before and after, leaves everything in runs/demo."""
    done = subprocess.run([sys.executable, str(HERE / "train.py"), "--steps", "2"], cwd=tmp_path, capture_output=True, text=True, timeout=300, env=ENVIRON)
    assert done.returncode == 0, done.stdout + done.stderr
    log = read_log(tmp_path / "runs" / "demo")
    assert [(r["eval"], r["step"]) for r in log if "eval" in r] == [("knn", 0), ("knn", 2)] and all(0 <= r["top1"] <= 100 for r in log if "eval" in r)
    assert {"checkpoint.pt", "preview.png"} <= {path.name for path in (tmp_path / "runs" / "demo").iterdir()}


WIDTH, DEPTH = SIZES["tiny"][1][:2]

ENV = SimpleNamespace(rank=0, world=1, workers=0, device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False))


# ============ README.md ============

def test_the_readme_names_every_flag_and_points_at_the_right_lines():
    readme = (HERE / "README.md").read_text()
    flags = set(re.findall(r'add(?:_argument)?\("(--[a-z-]+)"', (HERE / "train.py").read_text()))
    rows = {flag: len(re.findall(rf"^\| `{flag}`", readme[readme.index("## Every flag"):], re.MULTILINE)) for flag in flags}
    assert len(flags) > 25 and set(rows.values()) == {1}, rows
    links = re.findall(r"\[`([\w.]+)`[^\]]*\]\(([a-z_]+\.py)#L(\d+)\)", readme)
    assert len(links) > 10
    for name, file, line in links:
        assert name in (HERE / file).read_text().split("\n")[int(line) - 1], f"{name} is not in line {line} of {file}"
    assert all(name in Path(__file__).read_text() for name in re.findall(r"`(test_\w+)`", readme) if name != "test_sigma")
    assert not re.findall(r"@@", readme)


# ============ evaluation: a tiny data set and a tiny checkpoint ============

def write_video(path, frames, codec="libx264", pixels="yuv420p", format="rgb24"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=format)))
        file.mux(stream.encode())


def disc(colour, seed):
    """A disc of a colour on grey, moving: frames [6, 40, 72, 3] and masks [6, 40, 72]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :72]
    masks = np.stack([(np.hypot(x - 14 - 3 * t, y - 18 - rng.integers(3)) < 11) for t in range(6)]).astype(np.uint8)
    return np.where(masks[..., None] > 0, np.uint8(colour), rng.integers(80, 120, (6, 40, 72, 1), np.uint8)), masks


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two classes of three videos, masks beside them, the same as a DAVIS tree, and a checkpoint of a tiny SIGMA."""
    root = tmp_path_factory.mktemp("world")
    for c, (name, colour) in enumerate({"blue": (20, 20, 240), "red": (240, 20, 20)}.items()):
        for n in range(3):
            frames, masks = disc(colour, 3 * c + n)
            write_video(root / "videos" / name / f"{n}.mp4", frames)
            write_video(root / "videos-masks" / name / f"{n}.mkv", masks, "ffv1", "gray", "gray")
            for t in range(6):
                for folder, picture in ((f"davis/JPEGImages/480p/{name}{n}/{t:05}.jpg", Image.fromarray(frames[t])), (f"davis/Annotations/480p/{name}{n}/{t:05}.png", Image.fromarray(masks[t]))):
                    (root / folder).parent.mkdir(parents=True, exist_ok=True)
                    if folder.endswith("png"):
                        picture = picture.convert("P")           # as DAVIS: an index into a palette
                    picture.save(root / folder)
    (root / "davis/ImageSets/2017").mkdir(parents=True)
    (root / "davis/ImageSets/2017/val.txt").write_text("blue0\nred1\n")
    (root / "plain").mkdir()
    for n in range(2):
        write_video(root / "plain" / f"{n}.mp4", disc((20, 240, 20), n)[0])
    torch.manual_seed(0)
    model = SIGMA("tiny", num_prototypes=16, frames=4, image_size=32)
    args = dict(size="tiny", target="mlp", loss="sigma", frames=4, image_size=32, stride=1, prototypes=16)
    torch.save({"model": model.state_dict(), "step": 7, "args": args}, root / "ours.pt")
    return root


def mode(*flags, code=0, processes=1):
    command = [sys.executable, str(HERE / "train.py")]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), command[1]]
    done = subprocess.run([*command, *map(str, flags), "--workers", "0", "--precision", "fp32"], capture_output=True, text=True, timeout=300, env=ENVIRON)
    assert done.returncode == code, done.stdout + done.stderr
    assert code != 2 or processes > 1 or len(done.stderr.strip().splitlines()) == 1 or done.stderr.startswith("usage"), done.stderr
    return done.stdout + done.stderr


def inside(*flags):
    """The same without a process of its own."""
    args = train.parse_args([*map(str, flags)])
    getattr(train, args.mode)(ENV, args)


# ============ matching ============

def brute_iou(table, owner):
    """Mean IoU when cluster j belongs to object owner[j] (None: to nobody), pixel sets counted by hand."""
    result = []
    for i, row in enumerate(table):
        mine = [j for j, o in enumerate(owner) if o == i]
        shared, cluster = sum(row[j] for j in mine), sum(sum(r[j] for r in table) for j in mine)
        result.append(shared / max(1, sum(row) + cluster - shared))
    return sum(result) / len(result)


def test_one_to_one_by_hand():
    table = torch.tensor([[10, 0, 0], [0, 0, 8], [2, 6, 0]])                 # objects x clusters
    mean, columns = train.match_one_to_one(table)
    assert columns == [0, 2, 1]
    assert mean == pytest.approx((10 / 12 + 8 / 8 + 6 / 8) / 3)


def test_one_to_one_is_not_greedy():
    # IoU: object 0 is best with cluster 0, but then object 1 gets nothing
    table = torch.tensor([[50, 30], [40, 0]])
    assert train.match_one_to_one(table)[1] == [1, 0]


def test_one_to_one_against_all_permutations():
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((1, 1), (2, 2), (3, 3), (5, 5), (3, 6), (2, 7)):
        for _ in range(15):
            table = torch.randint(0, 30, (rows, columns), generator=generator) * torch.randint(0, 2, (rows, columns), generator=generator)
            best = -1
            for chosen in itertools.permutations(range(columns), rows):
                owner = [chosen.index(j) if j in chosen else None for j in range(columns)]
                best = max(best, brute_iou(table.tolist(), owner))
            mean, chosen = train.match_one_to_one(table)
            assert mean == pytest.approx(best) and len(set(chosen)) == rows


def test_many_to_one():
    table = torch.tensor([[10, 9, 0, 1], [0, 2, 7, 3]])                      # clusters 0 and 1 -> object 0, 2 and 3 -> object 1
    assert train.match_many_to_one(table) == pytest.approx((19 / (20 + 21 - 19) + 10 / (12 + 11 - 10)) / 2)
    assert train.match_many_to_one(table) == pytest.approx(brute_iou(table.tolist(), [0, 0, 1, 1]))
    assert train.match_many_to_one(torch.tensor([[5, 5], [1, 0]])) == pytest.approx(10 / 11 / 2)       # an object without cluster counts 0


def test_overlap_counts_pixels():
    truth = torch.zeros(2, 4, 4, dtype=torch.long)
    truth[:, :2, :2], truth[:, 3, 3] = 5, 255                                # object 5 in a quarter; a pixel to be ignored
    clusters = torch.tensor([[[1, 0], [0, 2]]])                              # one tube in time, 2 x 2
    assert train.overlap(truth, clusters, 4).tolist() == [[16, 0, 6, 0], [0, 8, 0, 0]]
    assert train.match_one_to_one(train.overlap(truth, clusters, 4))[1] == [0, 1]
    tubes_in_time = torch.tensor([[[0]], [[1]], [[2]]])                      # tube t lasts frames 2t and 2t + 1
    truth = torch.tensor([0, 0, 1, 1, 0, 1])[:, None, None].expand(6, 2, 2)
    assert train.overlap(truth, tubes_in_time, 3).tolist() == [[8, 0, 4], [0, 8, 4]]


def test_kmeans_finds_separate_points():
    generator = torch.Generator().manual_seed(1)
    centres = 20 * torch.eye(6)
    truth = torch.arange(6).repeat_interleave(30)
    x = centres[truth] + torch.randn(180, 6, generator=generator)
    for seed in range(5):
        cluster = train.kmeans(x, 6, seed, restarts=1)
        assert len({(int(a), int(b)) for a, b in zip(truth, cluster)}) == 6 and len(cluster.unique()) == 6
    assert torch.equal(train.kmeans(x, 4, 3), train.kmeans(x, 4, 3))
    assert len(train.kmeans(x[:3], 10).unique()) == 3                        # fewer points than clusters
    assert train.kmeans(torch.ones(20, 2), 3).shape == (20,)                 # all the same


# ============ probes with a known answer ============

def test_probes_on_known_data():
    generator = torch.Generator().manual_seed(0)
    labels, test_labels = torch.arange(300) % 5, torch.arange(100) % 5
    means = torch.randn(5, 12, generator=generator)
    draw = lambda labels: means[labels] + 0.1 * torch.randn(len(labels), 12, generator=generator)
    bank, queries = draw(labels), draw(test_labels)
    assert train.knn(bank, labels, queries, test_labels) == 100
    assert train.linear_probe(bank, labels, queries, test_labels) == 100
    faint = lambda x, seed: torch.cat([1e-3 * x + 3, 100 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))], dim=1)
    assert train.linear_probe(faint(bank, 0), labels, faint(queries, 1), test_labels) > 95            # small, off centre, beside large noise
    swapped = (test_labels + (torch.arange(100) < 30).long()) % 5            # 30 of 100 labels are wrong
    assert train.linear_probe(bank, labels, queries, swapped) == pytest.approx(70)
    assert train.knn(bank, labels, queries, swapped) == pytest.approx(70)
    noise = torch.randn(400, 12, generator=generator)
    assert train.linear_probe(noise[:300], labels, noise[300:], test_labels) < 45
    assert train.linear_probe(bank, labels, queries, test_labels, seed=1) == 100


def test_each_feature_once(world):
    videos = data.find_videos(world / "videos")
    args = SimpleNamespace(frames=4, stride=1, image_size=32, seed=0, batch_size=4)
    model = SIGMA("tiny", num_prototypes=16, frames=4, image_size=32)
    rows, labels = train.features(ENV, args, model, videos)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and rows.shape == (6, WIDTH) and len(rows.unique(dim=0)) == 6


# ============ fine-tuning ============

class Reader(torch.nn.Module):
    """Logits that are a known function of the clip: its mean brightness and that of its left edge."""
    def forward(self, video):
        return torch.stack([video.mean(dim=(1, 2, 3, 4)), video[..., 0].mean(dim=(1, 2, 3)), video[:, :, 0].mean(dim=(1, 2, 3))], dim=1) * 3


def test_multi_view_averages_softmax(world):
    videos = data.find_videos(world / "videos")
    clips = data.Clips(videos, 2, 1, 32, 0, False, views=(2, 3))
    args = SimpleNamespace(batch_size=7)
    right, models = 0, Reader()
    truth = []
    for i in range(len(videos)):
        views = [models(data.normalize(torch.from_numpy(v)[None])).softmax(1)[0] for v in clips[0, i]["video"].numpy()]
        assert len(views) == 6
        truth.append(int(sum(views).argmax()))
    videos.labels = torch.tensor(truth)
    assert train.multi_view(ENV, args, models, clips) == (100.0, 100.0, 6)
    videos.labels[:2] = (videos.labels[:2] + 1) % 3
    assert train.multi_view(ENV, args, models, clips) == (pytest.approx(100 * 4 / 6), 100.0, 6)


def test_softmax_is_averaged_not_logits():
    # one sure view against two mildly different ones: the mean of logits says class 0, the mean of softmax class 1
    logits = torch.tensor([[9.0, 0.0], [0.0, 1.5], [0.0, 1.5]])
    assert logits.mean(0).argmax() == 0 and logits.softmax(1).mean(0).argmax() == 1

    class Fixed(torch.nn.Module):
        def forward(self, video):
            return logits[:len(video)]

    class Three(data.Clips):
        def __getitem__(self, key):
            return {"video": torch.zeros(3, 3, 2, 8, 8, dtype=torch.uint8), "index": 0, "bad": [], "label": 1}
    clips = Three([0], views=(1, 3), train=False)
    assert train.multi_view(ENV, SimpleNamespace(batch_size=1), Fixed(), clips)[0] == 100


def test_unreadable_test_video_is_left_out_and_named(world, tmp_path, capfd):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    (tmp_path / "a/0.mp4").write_bytes((world / "videos/blue/0.mp4").read_bytes())
    (tmp_path / "b/0.mp4").write_bytes(b"no video")
    clips = data.Clips(data.find_videos(tmp_path), 2, 1, 32, 0, False, views=(1, 3))
    assert train.multi_view(ENV, SimpleNamespace(batch_size=6), Reader(), clips)[2] == 1
    out = capfd.readouterr().out
    assert out.count("b/0.mp4") == 1 and "1 of 2 test videos" in out


def test_layer_decay_groups():
    model = train.Classifier("tiny", 5, 4, 32)
    groups = train.layer_groups(model)
    of = {id(p): group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    for name, p in model.named_parameters():
        layer = 0 if "patch_embed" in name else int(name.split(".")[2]) + 1 if ".blocks." in name else DEPTH + 1
        assert of[id(p)]["lr_scale"] == pytest.approx(0.75 ** (DEPTH + 1 - layer)), name
        assert of[id(p)]["weight_decay"] == (0.05 if p.ndim > 1 else 0.0), name
    assert groups[-1]["lr_scale"] == 1.0


def test_classifier_is_videomaes():
    torch.manual_seed(0)
    model = train.Classifier("tiny", 5, 4, 32).eval()
    full = SIGMA("tiny", frames=4, image_size=32, num_prototypes=4).eval()
    train.load_weights(model, full.state_dict(), "x", free=("fc_norm.", "head."))
    video = torch.randn(2, 3, 4, 32, 32)
    full.encoder.norm = torch.nn.Identity()
    expected = torch.nn.functional.layer_norm(full.features(video).mean(1), (WIDTH,), eps=1e-6) @ model.head.weight.T + model.head.bias
    assert torch.allclose(model(video), expected, atol=1e-6)
    assert 0 < model.head.weight.abs().max() < 1e-3 and model(video).abs().max() < 1e-2
    assert torch.allclose(torch.tensor([b.drop_path for b in model.encoder.blocks]), torch.linspace(0, 0.1, DEPTH))


def test_augmentation_is_the_same_for_all_frames():
    still = torch.randint(0, 256, (3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = flipped = 0
    for flip in (True, False):
        transform = train.augmentation(flip)
        for seed in range(60):
            torch.manual_seed(seed)
            out = transform(still.repeat(5, 1, 1, 1))
            assert out.shape == (5, 3, 24, 24) and out.dtype == torch.uint8
            assert (out == out[:1]).all(), seed
            changed += not torch.equal(out[0], still)
            flipped += torch.equal(out[0], still.flip(-1)) and (1 if flip else 100)
    assert changed > 80 and 0 < flipped < 100
    *four, flip, erase = transform.transforms
    assert [(t.p, t.transforms[0].num_ops, t.transforms[0].magnitude, t.transforms[0].num_magnitude_bins) for t in four] == [(0.5, 1, 7, 11)] * 4
    share = []
    for seed in range(200):
        torch.manual_seed(seed)
        gone = (erase(torch.zeros(5, 3, 24, 24, dtype=torch.uint8)) == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None]).all(1)
        assert (gone == gone[:1]).all()
        share.append(gone.float().mean().item())
    hit = [s for s in share if s]
    assert 30 < len(hit) < 75 and min(hit) > 0.01 and max(hit) < 0.37


def test_augmentation_is_a_function_of_seed_epoch_index(world):
    videos = data.find_videos(world / "videos")
    clips = lambda seed: data.Clips(videos, 4, 1, 32, seed, True, 2, draw_crop=data.draw_resized, transform=train.augmentation(True))
    torch.manual_seed(1)
    first = clips(0)[3, 1]["video"]
    torch.manual_seed(2)
    after = torch.get_rng_state()
    assert torch.equal(clips(0)[3, 1]["video"], first) and torch.equal(torch.get_rng_state(), after)
    assert not torch.equal(clips(0)[4, 1]["video"], first) and not torch.equal(clips(1)[3, 1]["video"], first)
    assert not torch.equal(first[0], first[1])


def test_resized_crops_lie_inside():
    seen = []
    for seed in range(300):
        x, y, w, h = data.draw_resized(torch.Generator().manual_seed(seed))(64, 48)
        assert 0 <= x <= 64 - w and 0 <= y <= 48 - h and w >= 1 and h >= 1
        seen.append((w * h / (64 * 48), w / h))
    areas, aspects = zip(*seen)
    assert min(areas) < 0.12 and max(areas) > 0.85 and 0.7 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.4


def objective_of(monkeypatch, world, **changes):
    """finetune's objective, groups and model, caught where it hands them to fit."""
    caught = {}
    monkeypatch.setattr(train, "fit", lambda env, args, model, groups, betas, train_set, objective, evaluate, at_epoch: caught.update(locals()))
    args = train.parse_args(["--finetune", "none", "--size", "tiny", "--data", str(world / "videos"), "--val", str(world / "videos"), "--frames", "4",
                             "--image-size", "32", "--stride", "1", "--out", str(world / "caught"), *changes.get("flags", [])])
    train.finetune(SimpleNamespace(**vars(ENV), precision="fp32"), args)
    return caught


def test_mixing(monkeypatch, world):
    caught = objective_of(monkeypatch, world)
    targets, videos = [], []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(train.F, "cross_entropy", lambda logits, target, label_smoothing: targets.append((target, label_smoothing)) or real(logits, target, label_smoothing=label_smoothing))
    batch = {"video": torch.randint(0, 256, (4, 3, 4, 32, 32), dtype=torch.uint8), "label": torch.tensor([0, 1, 0, 1]), "index": torch.tensor([3, 1, 2, 0])}
    model = caught["model"].train()
    losses = [caught["objective"](model, batch, step)[0].item() for step in (0, 1, 2, 3, 4, 5, 1)]
    for target, smoothing in targets:
        assert target.shape == (4, 2) and torch.allclose(target.sum(1), torch.ones(4)) and (target >= 0).all() and smoothing == 0.1
    assert losses[1] == losses[6] and torch.equal(targets[1][0], targets[6][0]) and len(set(losses)) == 6      # a function of the step
    assert any(0 < float(t.min()) < 1 for t, _ in targets)


def test_presets(world):
    base = ["--finetune", "none", "--data", str(world / "videos"), "--val", str(world / "videos")]
    kinetics, ssv2, demo = train.parse_args(base), train.parse_args([*base, "--stride", "0"]), train.parse_args(["--finetune", "none"])
    assert (kinetics.epochs, kinetics.stride, kinetics.flip, kinetics.test_clips, kinetics.lr, kinetics.warmup_epochs, kinetics.size) == (100, 4, True, 5, 1e-3, 5, "base")
    assert (ssv2.epochs, ssv2.flip, ssv2.test_clips) == (40, False, 2)
    assert (demo.flip, demo.size, demo.stride, demo.image_size) == (False, "tiny", train.DEMO["stride"], train.DEMO["image_size"])
    assert train.parse_args([*base, "--no-flip", "--epochs", "3", "--stride", "0"]).epochs == 3
    assert not train.parse_args([*base, "--no-flip"]).flip and train.parse_args([*base, "--stride", "0", "--flip"]).flip


# ============ checkpoints ============

def save(path, content):
    torch.save(content, path)
    return path


def shapes(size, **kwargs):
    return {name: torch.zeros_like(value) for name, value in SIGMA(size, frames=2, image_size=32, **kwargs).state_dict().items()}


@pytest.mark.parametrize("flags, expected", [
    (dict(target="mlp", num_prototypes=7), dict(target="mlp", loss="sigma", prototypes=7)),
    (dict(target="dino", num_prototypes=9), dict(target="dino", loss="sigma", prototypes=9, teacher="vitb16")),
    (dict(target="dino", num_prototypes=9, teacher="vits16"), dict(target="dino", loss="sigma", teacher="vits16")),
    (dict(target="pixel", loss="l2"), dict(target="pixel", loss="l2")),
    (dict(target="mlp", loss="l2"), dict(target="mlp", loss="l2")),
])
def test_authors_files(tmp_path, flags, expected):
    state = shapes("small", **flags)
    path = save(tmp_path / "a.pth", {"model": state, "optimizer": {}, "epoch": 799, "scaler": {}, "args": argparse.Namespace(model="pretrain_videomae_small_patch16_224", lr=1.0)})
    state, facts = train.read_weights(path)
    assert {name: facts[name] for name in expected} == expected and facts["size"] == "small"
    model = SIGMA(facts["size"], facts["target"], facts["loss"], facts["prototypes"], teacher=facts["teacher"], frames=2, image_size=32)
    assert train.load_weights(model, state, path) == []


def test_videomae_fine_tuned_files(tmp_path):
    torch.manual_seed(0)
    source = train.Classifier("tiny", 5, 4, 32)
    theirs = {"backbone." + name.removeprefix("encoder."): value for name, value in source.state_dict().items()}
    state, facts = train.read_weights(save(tmp_path / "v.pth", {"module": theirs}))
    same, other = train.Classifier("tiny", 5, 4, 32), train.Classifier("tiny", 6, 4, 32)
    assert facts["size"] == "tiny" and train.load_weights(same, state, "v", ("fc_norm.", "head.")) == []
    assert all(torch.equal(a, b) for a, b in zip(source.state_dict().values(), same.state_dict().values()))
    head = other.head.weight.clone()
    assert train.load_weights(other, state, "v", ("fc_norm.", "head.")) == ["head.weight", "head.bias"]
    assert torch.equal(other.head.weight, head) and torch.equal(other.fc_norm.weight, source.fc_norm.weight)
    assert torch.equal(other.encoder.blocks[1].mlp.fc2.weight, source.encoder.blocks[1].mlp.fc2.weight)


def test_partial_files_say_what_is_missing(tmp_path):
    state = shapes("tiny", num_prototypes=4)
    model = train.Classifier("tiny", 5, 2, 32)
    for change, text in (({"encoder.blocks.0.attn.q_bias": None}, "encoder.blocks.0.attn.q_bias is missing"),
                         ({"encoder.blocks.1.mlp.fc1.weight": torch.zeros(3, 4)}, rf"encoder.blocks.1.mlp.fc1.weight is \(3, 4\) instead of \({4 * WIDTH}, {WIDTH}\)"),
                         ({f"encoder.blocks.{DEPTH}.norm1.weight": torch.zeros(WIDTH)}, f"encoder.blocks.{DEPTH}.norm1.weight is unknown"),
                         ({"encoder.blocks.0." + n: None for n in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "attn.q_bias", "attn.v_bias")}, "; and 2 more")):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        read, _ = train.read_weights(save(tmp_path / "p.pt", {"model": changed}))
        with pytest.raises(ValueError, match=text):
            train.load_weights(model, read, "p.pt", ("fc_norm.", "head."))
    read, _ = train.read_weights(save(tmp_path / "p.pt", {"model": {n: v for n, v in state.items() if not n.startswith("head")}}))
    assert set(train.load_weights(model, read, "p.pt", ("fc_norm.", "head."))) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    with pytest.raises(ValueError, match="no video model"):
        train.read_weights(save(tmp_path / "q.pt", {"model": {"a": torch.zeros(3)}}))
    with pytest.raises(ValueError, match="none of the sizes"):
        train.read_weights(save(tmp_path / "q.pt", {"encoder.patch_embed.proj.weight": torch.zeros(100, 3, 2, 16, 16)}))


# ============ every mode, from the command line ============

@beside
def test_probe_runs(world, tmp_path):
    """And two processes find what one finds."""
    for name, processes in (("one", 1), ("two", 2)):
        text = mode("--probe", world / "ours.pt", "--data", world / "videos", "--val", world / "videos", "--out", tmp_path / name, processes=processes)
        assert "k-NN top-1" in text and "linear top-1" in text and "% of 6 videos" in text
    log, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert [(r["eval"], r["step"]) for r in log] == [("knn", 7), ("linear", 7)] and all(0 <= r["top1"] <= 100 for r in log) and log[1]["top1"] == 100
    assert [(r["eval"], r["top1"]) for r in two] == [(r["eval"], r["top1"]) for r in log]


@beside
def test_finetune_runs_and_resumes(world, tmp_path):
    flags = ("--finetune", world / "ours.pt", "--data", world / "videos", "--val", world / "videos", "--frames", 4, "--image-size", 32, "--stride", 1,
             "--batch-size", 3, "--epochs", 2, "--warmup-epochs", 1, "--test-clips", 2, "--log-every", 1)
    text = mode(*flags, "--out", tmp_path / "whole")
    log = read_log(tmp_path / "whole")
    assert log[-1]["eval"] == "finetune" and log[-1]["step"] == 4 and log[-1]["videos"] == 6 and 0 <= log[-1]["top1"] <= log[-1]["top5"] == 100
    assert "new: fc_norm.weight, fc_norm.bias, head.weight, head.bias" in text
    mode(*flags, "--out", tmp_path / "parts", "--steps", 3)
    mode(*flags, "--out", tmp_path / "parts")
    losses = [[(r["step"], r["loss"]) for r in read_log(tmp_path / name) if "loss" in r] for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    start = torch.load(world / "ours.pt")["model"]["encoder.blocks.1.mlp.fc1.weight"]
    assert 0 < (whole["encoder.blocks.1.mlp.fc1.weight"] - start).abs().max() < 0.1


@beside
def test_finetune_from_scratch_and_uniform(world, tmp_path):
    mode("--finetune", "none", "--size", "tiny", "--data", world / "videos", "--val", world / "videos", "--frames", 4, "--image-size", 32, "--stride", 0,
        "--batch-size", 3, "--steps", 1, "--out", tmp_path / "o", processes=2)
    assert read_log(tmp_path / "o")[-1]["videos"] == 6


def test_segment_runs(world, tmp_path, capsys):
    mode("--segment", world / "ours.pt", "--data", world / "videos", "--out", tmp_path / "masked")
    record, = read_log(tmp_path / "masked")
    assert record["eval"] == "segment" and record["step"] == 7 and record["clips"] == 6 and 0 < record["miou"] < record["miou_overclustering"] <= 100
    for name in ("segments", "prototypes"):
        assert Image.open(tmp_path / "masked" / f"{name}.png").size[0] > 300
    inside("--segment", world / "ours.pt", "--data", world / "davis", "--out", tmp_path / "davis")
    record, = read_log(tmp_path / "davis")
    assert record["clips"] == 2 and 0 < record["miou"] < record["miou_overclustering"]
    capsys.readouterr()
    inside("--segment", world / "ours.pt", "--data", world / "plain", "--out", tmp_path / "plain")
    assert "no masks" in capsys.readouterr().out and not (tmp_path / "plain/log.jsonl").exists() and (tmp_path / "plain/segments.png").exists()


def test_masks_are_read_exactly(world):
    args = SimpleNamespace(frames=4, stride=1, image_size=32, data=str(world / "davis"), demo=False)
    _, masks = disc((20, 20, 240), 0)
    davis = train.find_masks(ENV, args)
    assert [len(item[0]) for item in davis] == [6, 6]                        # the two of val.txt
    clip, truth = train.read_masked(*davis[0], args)
    assert clip.shape == (3, 4, 32, 32) and clip.dtype == torch.uint8 and np.array_equal(truth.numpy(), masks[1:5])
    args.data = str(world / "videos")
    args.mode, args.val = "segment", None
    clip, truth = train.read_masked(*train.find_masks(ENV, args)[0], args)
    assert clip.shape == (3, 4, 32, 32) and np.array_equal(truth.numpy(), masks[1:5])
    inside = torch.nn.functional.interpolate(truth[:, None].float(), (32, 32), mode="nearest-exact")[:, 0] > 0   # the whole picture is squeezed
    assert ((clip[2] > 175) == inside).float().mean() > 0.97


@pytest.mark.parametrize("flags, text", [
    (["--probe", "ours.pt", "--data", "plain", "--val", "videos"], "has no labels"),
    (["--probe", "ours.pt", "--data", "videos"], "--val is missing"),
    (["--finetune", "none", "--data", "videos", "--val", "plain"], "has no labels"),
    (["--probe", "nothing.pt", "--data", "videos"], "nothing.pt"),
    (["--probe", "ours.pt", "--finetune", "none"], "not allowed with"),
    (["--probe", "ours.pt", "--size", "base"], "--size is base"),
    (["--segment", "videos/red/0.mp4", "--data", "plain"], "not a readable checkpoint|refused"),
    (["--finetune", "none", "--test-clips", "0"], "--test-clips"),
    (["--segment", "ours.pt", "--data", "davis/Annotations"], "holds no videos"),
    (["--finetune", "none", "--stride", "-1"], "--stride"),
])
def test_mistakes_give_one_line(world, tmp_path, flags, text, capsys):
    flags = [str(world / f) if (world / f).exists() or f == "nothing.pt" else f for f in flags]
    os.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        args = train.parse_args([*flags, "--out", str(tmp_path / "o"), "--workers", "0"])
        {"probe": train.probe, "finetune": train.finetune, "segment": train.segment}[args.mode](ENV, args)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    import re
    assert stopped.value.code == 2 and re.search(text, message), message


# ============ fuzzing, also by hand: python test_sigma.py SECONDS SEED ============

def damage(content, r):
    """A file's bytes as disks, networks and bugs leave them: bits flipped, stretches zeroed, cut or doubled, sizes made absurd."""
    b = bytearray(content)
    for _ in range(r.choice([1, 1, 3, 20])):
        at, length = r.choice([r.randrange(len(b)), r.randrange(min(len(b), 4000))]), r.randrange(1, 1500)
        kind = r.choice(["flip", "zero", "cut", "double", "noise", "end", "size"])
        if kind == "flip":
            b[at] ^= 1 << r.randrange(8)
        elif kind == "end":
            del b[at:]
        else:
            stop = at + {"double": 0, "size": 4}.get(kind, length)
            b[at:stop] = {"zero": bytes(length), "cut": b"", "double": b[at:at + length], "noise": r.randbytes(length),
                          "size": r.choice([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(4)])}[kind]
        b = b or bytearray(b"x")
    return bytes(b)


def fuzz(folder, seconds, seed=0):
    """Reads damaged videos and lists until the time is over -> (tried, readable). Fails on a crash, a hang, or an error that is not one clear line."""
    sources = []
    for name, how in FORMATS.items():
        write(folder / name, **how)
        sources.append((Path(name).suffix, (folder / name).read_bytes()))
    deadline, tried, readable = time.monotonic() + seconds, 0, 0
    while time.monotonic() < deadline:
        r = random.Random(seed * 1_000_003 + tried)
        suffix, content = r.choice(sources)
        mutant, tried = folder / f"mutant{suffix}", tried + 1
        mutant.write_bytes(damage(content, r))
        (folder / "list.txt").write_bytes(damage(b'a b.mp4 3\n"c, d.avi", 4\r\n# no video\n\ne.mkv\t5\n', r))
        child = os.fork()                                                                   # a crash must not end the fuzzing
        if child == 0:
            signal.alarm(40)
            torch.set_num_threads(1)                                                        # threads do not survive a fork
            code = 9
            try:
                try:
                    data.read_clip(mutant, r.choice([4, 16]), r.choice([1, 4]), r.choice([None, 0, 30]), size=32)
                    code = 0
                except data.VideoError as error:
                    code = 9 if "\n" in str(error) else 2
                try:
                    data.find_videos(folder / "list.txt")
                except ValueError as error:
                    code = 9 if "\n" in str(error) else code
            except BaseException:
                code = 9
            os._exit(code)
        ended, status, began = 0, 0, time.monotonic()
        while not ended:
            ended, status = os.waitpid(child, os.WNOHANG)
            if time.monotonic() > began + 60:                                               # it hung before its alarm was set
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) in (0, 2), f"seed {seed}, file {tried} ({suffix}): status {status}; it lies in {folder}"
        readable += os.WEXITSTATUS(status) == 0
    return tried, readable


def test_damaged_files_never_crash_hang_or_raise_anything_else(tmp_path):
    tried, readable = fuzz(tmp_path, seconds=4)
    assert tried > 10 and 0 < readable < tried


# ============ the README's evidence: what the paper's choices do on the demo ============

EVIDENCE = {   # flags of train.py, over the demo's defaults
    "untrained": "--steps 1",                                                               # the warm-up's first step has a learning rate of 0
    "pixels, L2 (VideoMAE)": "--target pixel --lr 8e-3", "MLP features, L2": "--loss l2", "SIGMA-MLP, hard": "",   # pixels and SIGMA: their best lr of four
    "soft assignment": "--assignment soft", "soft, ε 0.01": "--assignment soft --eps 0.01", "ε 0.02": "--eps 0.02", "ε 0.1": "--eps 0.1",
    "16 prototypes": "--prototypes 16", "256 prototypes": "--prototypes 256", "1024 prototypes": "--prototypes 1024", "mask ratio 0.5": "--mask-ratio 0.5", "mask ratio 0.9": "--mask-ratio 0.9"}


def evidence(folder="runs/evidence", seeds="3", at_once="1"):
    """Pretrains, probes and segments every row of EVIDENCE with so many seeds, `at_once` runs side by side on one thread each; what is done stays done.

    Prints a table of means and standard deviations over the seeds, and draws folder/evidence.png.
    """
    folder, seeds = Path(folder).absolute(), range(int(seeds))
    data.write_demo(folder / "videos")

    def run(job):
        seed, name = job
        out = folder / f"{re.sub('[^a-z0-9.]+', '-', name.lower().replace('ε', 'eps'))}-{seed}"
        out.mkdir(exist_ok=True)
        if not (out / "videos").exists():
            (out / "videos").symlink_to(folder / "videos")
        began = time.monotonic()
        for part, flags in (("pretrain", ["--out", out, "--seed", str(seed), *EVIDENCE[name].split()]),
                            *((part, [f"--{part}", out / "checkpoint.pt", "--out", out / part]) for part in ("probe", "segment"))):
            done = out / f"{part}.done"
            if not done.exists():
                with open(out / "output.txt", "a") as output:
                    subprocess.run([sys.executable, HERE / "train.py", *flags], env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output, check=True)
                done.write_text(str((time.monotonic() - began) / 60))
        last = [record for record in read_log(out) if "loss" in record][-1]
        found = {record["eval"]: record for part in ("probe", "segment") for record in read_log(out / part)}
        return name, [found["knn"]["top1"], found["linear"]["top1"], found["segment"]["miou_overclustering"], last.get("perplexity"), last.get("spread"), float((out / "pretrain.done").read_text())]

    rows = {name: [] for name in EVIDENCE}
    with ThreadPoolExecutor(int(at_once)) as pool:
        for name, values in pool.map(run, itertools.product(seeds, EVIDENCE)):
            rows[name].append(values)
    print("| | k-NN | linear | over-clustering mIoU | perplexity | spread | minutes |\n|---|---|---|---|---|---|---|")
    for name, values in rows.items():
        cells = []
        for column, digits in zip(zip(*values), (1, 1, 1, 1, 3, 1)):
            cells.append("–" if None in column else f"{np.mean(column):.{digits}f}" + (f" ± {np.std(column, ddof=1):.{digits}f}" if len(column) > 1 else ""))
        print(f"| {name} | {' | '.join(cells)} |")
    draw_evidence(rows, folder / "evidence.png")


def draw_evidence(rows, path, left=210, width=300, line=26):
    """Every seed a dot, the mean a bar, a line for each row: k-NN, linear and mIoU."""
    titles = ("k-NN top-1 (%)", "linear top-1 (%)", "over-clustering mIoU (%)")
    page = Image.new("RGB", (left + len(titles) * (width + 30), 60 + line * len(rows)), "white")
    draw = ImageDraw.Draw(page)
    for panel, title in enumerate(titles):
        values = [seed[panel] for row in rows.values() for seed in row]
        low, high = math.floor(min(values) / 10) * 10, math.ceil(max(values) / 10) * 10
        start = left + panel * (width + 30)
        place = lambda value: start + (value - low) / (high - low) * width
        draw.text((start, 6), title, fill="black", font_size=14)
        for tick in range(low, high + 1, 10 if high - low > 20 else 2):
            draw.line((place(tick), 30, place(tick), 34 + line * len(rows)), fill="#e4e4e4")
            draw.text((place(tick), 38 + line * len(rows)), str(tick), fill="#555555", font_size=12, anchor="ma")
        for number, (name, row) in enumerate(rows.items()):
            y = 34 + line * number + line // 2
            colour = "#c23b22" if name.startswith("SIGMA") else "#33558b"
            if panel == 0:
                draw.text((left - 10, y), name.replace("ε", "eps"), fill="black", font_size=14, anchor="rm")
            mean = place(np.mean([seed[panel] for seed in row]))
            draw.line((mean, y - 9, mean, y + 9), fill=colour, width=3)
            for seed in row:
                draw.ellipse((place(seed[panel]) - 4, y - 4, place(seed[panel]) + 4, y + 4), outline=colour)
    page.save(path)


if __name__ == "__main__":
    commands = {"step": time_steps, "speed": compare_speed, "evidence": evidence}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        commands[sys.argv[1]](*sys.argv[2:])
    else:
        print("%d damaged files, %d of them readable; no crash, no hang, no traceback" % fuzz(Path(tempfile.mkdtemp()), *map(int, sys.argv[1:])))
