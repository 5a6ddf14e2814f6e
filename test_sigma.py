"""Tests against independent truths: closed forms, float64, a second process, a number painted into a frame.

    pytest -q test_sigma.py                      no network, no GPU
    python test_sigma.py speed                   a step beside the release's way of computing
    python test_sigma.py evidence runs/evidence  the README's table
"""
import argparse
import ast
import doctest
import errno
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout, suppress
from fractions import Fraction
from functools import lru_cache, partial
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as train.py: the tests' processes share few cores

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.random import default_rng
from PIL import Image
from pytest import approx, raises
from torch import nn
from torch.testing import assert_close

import data
import sigma
import train
from data import EpochSampler, VideoError, find_videos, frame_numbers, read_clip, seeded, write_demo
from sigma import SIGMA, SIZES, load_checkpoint, sinkhorn, tube_mask
from train import kmeans, knn, load_weights, match_many_to_one, match_one_to_one, overlap, read_weights

HERE = Path(__file__).parent
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
parametrize = pytest.mark.parametrize
torch.set_num_threads(1)


# ============ tests that run beside the others ============
STARTED = []  # processes of tests, so that none outlives a failing one
FORKED = multiprocessing.get_context(data.START_METHOD)  # from the fork server a start takes 0.1 s


def beside(scenario):
    """Decorates a test that mostly waits: a thread starts it with the session, and pytest's test of that name
    only fetches its result. It takes tmp_path, and then fixtures of the session. Other tests patch modules
    meanwhile, so whatever it checks must happen in processes of its own."""
    def test(scenarios):
        scenarios[scenario].result()
    test.scenario = scenario
    return test


@pytest.fixture(scope="session", autouse=True)
def scenarios(request, tmp_path_factory):
    """Starts every chosen test that is `beside`, two at a time. {its function: the Future of its result}"""
    chosen = [item.obj.scenario for item in request.session.items if hasattr(item.obj, "scenario")]
    if chosen:  # the fork server imports everything once, so that its children start at once
        FORKED.set_forkserver_preload(["torchvision.transforms.v2", "torchvision.utils", "train", __name__])
    pool = ThreadPoolExecutor(2)
    futures = {}
    for scenario in chosen:
        names = list(inspect.signature(scenario).parameters)[1:]
        fixtures = [request.getfixturevalue(name) for name in names]
        futures[scenario] = pool.submit(scenario, tmp_path_factory.mktemp("beside"), *fixtures)
    yield futures
    pool.shutdown(wait=False, cancel_futures=True)
    for process in STARTED:  # what a failing test has left behind
        if process.pid:  # it has started
            process.kill()
    pool.shutdown()


# ============ sigma.py: tubes, mask and Sinkhorn ============
def test_tube_mask_hides_the_same_patches_in_every_step_and_each_equally_often():
    mask = tube_mask(5, steps=8, patches=196, ratio=0.9, generator=seeded(0))
    assert (mask.shape, mask.dtype) == ((5, 8 * 196), torch.bool)
    steps = mask.view(5, 8, 196)
    assert (steps == steps[:, :1]).all()
    assert (steps.sum(dim=2) == 176).all()
    assert len(steps[:, 0].unique(dim=0)) == 5   # each clip has a draw of its own
    share = tube_mask(20_000, steps=1, patches=10, ratio=0.3, generator=seeded(1)).float().mean(dim=0)
    assert (share - 0.3).abs().max() < 5 * math.sqrt(0.3 * 0.7 / 20_000)  # five standard deviations


def test_normalized_tubes_are_the_raw_pixels_normalised():
    raw = torch.rand(2, 5, 128, 3, dtype=torch.float64)
    raw[0, 0] = 0.5 + raw[0, 0] / 1000           # is so flat that the 1e-6 shows
    raw[0, 1] = 0.3                              # has one colour
    expected = (raw - raw.mean(dim=2, keepdim=True)) / (raw.std(dim=2, keepdim=True) + 1e-6)
    expected = expected.flatten(2).float()
    given = (raw - torch.tensor(data.IMAGENET_MEAN)) / torch.tensor(data.IMAGENET_STD)
    tubes = sigma.normalize_tubes(given.flatten(2).float())
    assert not tubes[0, 1].any()
    # In the flat tube float32's rounding of the pixels themselves is that large.
    assert_close(tubes[0, 0], expected[0, 0], atol=1e-3, rtol=1e-3)
    assert_close(tubes[0, 2:], expected[0, 2:], atol=2e-6, rtol=1e-5)


def reference_sinkhorn(scores, eps=0.05, iterations=10):
    """By definition, in float64 logarithms: columns, and then rows, are brought to the sum 1, in turn."""
    log_q = scores.double() / eps
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q.softmax(dim=1)


def unit_vectors(n, width=16, seed=0, shift=0.0):
    """Random vectors [n, width] of length 1; a shift leans all of them to the same side."""
    return F.normalize(torch.randn(n, width, generator=seeded(seed)) + shift, dim=1)


def unit_scores(n, k, width=16):
    """Scores of features and prototypes that all lean to one side, so that some prototypes are popular."""
    return unit_vectors(n, width, seed=0, shift=0.5) @ unit_vectors(k, width, seed=1, shift=0.5).T


def assert_is_plan(q, scores, *settings):
    """Checks that q is Sinkhorn's plan for these scores, to 1e-5 and with every argmax."""
    expected = reference_sinkhorn(scores, *settings)
    assert_close(q.double(), expected, atol=1e-5, rtol=1e-3)
    assert torch.equal(q.argmax(dim=1), expected.argmax(dim=1))


@parametrize("n, k, eps, iterations", [
    (300, 40, 0.05, 10), (40, 300, 0.05, 10), (64, 1, 0.05, 10), (1, 64, 0.05, 10),
    (200, 20, 0.05, 0), (400, 25, 0.3, 200)])
def test_sinkhorn_equals_float64(n, k, eps, iterations):
    scores = unit_scores(n, k)
    q = sinkhorn(scores.requires_grad_(), eps, iterations)
    assert_is_plan(q, scores.detach(), eps, iterations)
    assert not q.requires_grad
    if iterations == 200:                        # so many that the columns are even
        assert_close(q.sum(dim=0), torch.full((k,), n / k), atol=1e-2, rtol=1e-3)


@parametrize("eps", [0.01, 0.03])
def test_sinkhorn_is_exact_where_half_of_the_tubes_lie_on_prototypes(eps):
    """At a small ε the exponentials of these rows and of the others differ by more than float32 can hold."""
    prototypes = unit_vectors(50, 64)
    far = unit_vectors(300, 64, seed=1)
    near = F.normalize(prototypes.repeat(6, 1) + 0.01 * torch.randn(300, 64, generator=seeded(2)), dim=1)
    scores = torch.cat([far, near]) @ prototypes.T
    assert_is_plan(sinkhorn(scores, eps), scores, eps)


@parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sinkhorn_is_exact_for_rows_of_different_levels_also_inside_autocast(dtype):
    # Three iterations do not converge, so a shift of each row that is not made good would change the plan.
    scores = unit_scores(200, 20) + torch.linspace(0, 1, 200)[:, None]
    far = torch.tensor([0.0, 0.01, 0.02]).repeat(6, 1)
    far[3:] -= 50  # e^-1000 below the others: in float32 these rows are 0 if all get the same shift
    with torch.autocast("cpu", dtype):
        assert_is_plan(sinkhorn(scores, 0.05, 3), scores, 0.05, 3)
        # All of these rows want the same, so the plan is flat and has no argmax.
        assert_close(sinkhorn(far).double(), reference_sinkhorn(far), atol=1e-5, rtol=0)


@parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@parametrize("size", [1e-30, 1e4, 1e6])
def test_sinkhorn_is_finite_for_any_scores(dtype, size):
    size = min(size, torch.finfo(dtype).max)
    scores = ((2 * torch.rand(64, 32, generator=seeded(0), dtype=torch.float64) - 1) * size).to(dtype)
    scores[0] = -size
    scores[:, 1] = -size
    scores[2, 2] = size
    for iterations in (0, 1, 10, 1000):
        q = sinkhorn(scores, iterations=iterations)
        assert q.dtype == torch.float32
        assert q.isfinite().all()
        assert_close(q.sum(dim=1), torch.ones(64))
        # At 1e4 float32 rounds scores / eps to 0.01, 1% of its exponential; above that no digit is left.
        if size <= 1e4 and iterations <= 10:
            expected = reference_sinkhorn(scores.float(), iterations=iterations)
            assert_close(q.double(), expected, atol=1e-3, rtol=1e-2)


def test_the_examples_in_docstrings_are_true():
    found = doctest.testmod(sigma, extraglobs={"torch": torch})
    assert found.attempted >= 3
    assert found.failed == 0


# ============ sigma.py: the model ============
def named_rng(name):
    """Random numbers that depend on this name alone."""
    return default_rng(zlib.crc32(name.encode()))


@lru_cache(None)
def named_noise(name, shape):
    return torch.from_numpy(named_rng(name).standard_normal(shape, dtype=np.float32))


def fill(state_dict):
    """name -> tensor of its shape, drawn from the name alone: whoever has these names has these weights."""
    filled = {}
    for name, value in state_dict.items():
        noise = named_noise(name, value.shape)
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
    """Two clips of drifting clouds with some grain, normalised, and their masks, drawn from names, too."""
    coarse = torch.from_numpy(named_rng("video").random((2, 3, 4, 14, 14), dtype=np.float32))
    clip = F.interpolate(coarse, size=(16, 224, 224), mode="trilinear")
    clip = (clip + 0.05 * named_noise("grain", clip.shape)).clamp(0, 1)
    mask = torch.zeros(2, 8, 196, dtype=torch.bool)
    for b in range(2):
        mask[b, :, named_rng(f"mask{b}").permutation(196)[:176]] = True
    return data.normalize(255 * clip), mask.flatten(1)


# What the authors' code, in float32 with 3000 prototypes and ε = 0.05, printed for these weights, video and
# mask: the loss, and norms of some gradients.
RELEASE = {
    "mlp": (16.367634, {"prototypes": 0.337176, "head.0.weight": 0.519883, "decoder.head.weight": 0.205296,
                        "encoder.patch_embed.proj.weight": 0.0651179}),
    "pixel": (2.016308, {"mask_token": 0.117629, "decoder.head.weight": 0.576168,
                         "encoder.patch_embed.proj.weight": 0.154097}),
}


@parametrize("target", ["mlp", "pixel"])
def test_losses_and_gradients_of_the_release(target):
    model = SIGMA("small", target, "l2" if target == "pixel" else "sigma")
    model.load_state_dict(fill(model.state_dict()), strict=True)
    loss, _ = model(*parity_clip())
    expected, norms = RELEASE[target]
    assert loss.item() == approx(expected, rel=1e-4)
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in norms])  # sooner than all
    for name, gradient in zip(norms, gradients):
        assert gradient.norm().item() == approx(norms[name], rel=2e-3), name


@parametrize("size, values", [
    ("small", [27_829_952, 26_185_152, 24_029_376]), ("base", [97_765_760, 96_219_264, 94_210_944]),
    ("large", [321_172_992, 319_692_032, 317_782_016]), ("huge", [656_331_392, 654_915_968, 653_104_256])])
def test_state_dictionaries_are_the_released_ones(size, values):
    with torch.device("meta"):
        states = [SIGMA(size, *kind).state_dict() for kind in ((), ("dino",), ("pixel", "l2"))]
    assert [sum(v.numel() for v in state.values()) for state in states] == values

    def both(*parts):
        return {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}

    block = both("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
    block |= {"attn.q_bias", "attn.v_bias", "attn.qkv.weight"}
    names = both("encoder.patch_embed.proj", "encoder.norm", "decoder.norm", "decoder.head")
    names |= {"encoder_to_decoder.weight", "mask_token"}
    names |= {f"encoder.blocks.{i}.{leaf}" for i in range(SIZES[size]["depth"]) for leaf in block}
    names |= {f"decoder.blocks.{i}.{leaf}" for i in range(4) for leaf in block}
    head = both("head.0", "head.2", "head.4", "head.6")
    assert [set(state) for state in states] == [names | {"prototypes"} | head, names | {"prototypes"}, names]


def tiny(**settings):
    """A model of size "tiny" that is always the same; DINO's network in it has the weights of `fill`."""
    torch.manual_seed(0)
    model = SIGMA("tiny", **{"num_prototypes": 12, "frames": 4, "image_size": 32, **settings})
    if model.target == "dino":
        model.teacher.load_state_dict(fill(model.teacher.state_dict()))
    return model


def tiny_batch(batch=4, seed=0):
    generator = seeded(seed)
    video = torch.randn(batch, 3, 4, 32, 32, generator=generator)
    return video, tube_mask(batch, 2, 16, 0.75, generator=generator)


DINO = dict(target="dino", teacher="vits16")
VARIANTS = parametrize("settings", [
    dict(), dict(assignment="soft"), dict(loss="l2"), dict(target="pixel", loss="l2"), DINO], ids=str)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@parametrize("dtype", [torch.bfloat16, torch.float16])
@VARIANTS
def test_a_step_on_the_gpu_never_waits_for_it(settings, dtype):
    model, scaler = tiny(**settings).cuda(), torch.amp.GradScaler("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    clips = torch.randint(256, (4, 3, 4, 32, 32), dtype=torch.uint8).pin_memory()
    mask = tiny_batch()[1].pin_memory()
    for step in range(3):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step sets libraries up
        try:
            with torch.autocast("cuda", dtype):
                loss, _ = model(data.normalize(clips.cuda(non_blocking=True)), mask)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@parametrize("assignment", ["hard", "soft"])
def test_the_loss_its_statistics_and_gradients_are_the_papers(assignment):
    """The truth is the equation in float64. Prototypes come to unit length, and learn from φ's term alone."""
    model = tiny(assignment=assignment, eps=0.03, iterations=7, temperature=0.2)
    C = model.prototypes
    x_psi, x_phi = torch.randn(2, 50, 64, requires_grad=True)
    unit_psi, unit_phi, unit_C = [F.normalize(value.double(), dim=1) for value in (x_psi, x_phi, C)]
    unit_C = unit_C.detach().requires_grad_()
    scores_psi = unit_psi @ unit_C.detach().T
    scores_phi = unit_phi @ unit_C.T
    q_psi, q_phi = [reference_sinkhorn(x.detach(), 0.03, 7) for x in (scores_psi, scores_phi)]
    hard_psi, hard_phi = q_psi.argmax(dim=1), q_phi.argmax(dim=1)
    if assignment == "hard":
        q_psi, q_phi = F.one_hot(torch.stack([hard_psi, hard_phi]), 12)
    video = -(q_phi * (scores_psi / 0.2).log_softmax(dim=1)).sum() / 50
    projection = -(q_psi * (scores_phi / 0.2).log_softmax(dim=1)).sum() / 50
    used = torch.bincount(scores_phi.argmax(dim=1), minlength=12) / 50
    expected = {"loss_video": video, "loss_projection": projection,
                "agreement": (hard_psi == hard_phi).double().mean(),
                "perplexity": torch.special.entr(used).sum().exp(),
                "spread": 1 - unit_phi.mean(dim=0).norm()}

    _, parts = sigma.sigma_loss(x_psi, x_phi, C.clone())
    assert not any(value.requires_grad for value in parts.values())
    with torch.autocast("cpu", torch.bfloat16):  # in which the loss is computed in float32 all the same
        loss, stats = model.forward_loss(x_psi, x_phi)
    assert_close(C.detach(), unit_C.detach().float())
    assert loss.item() == approx((video + projection).item(), rel=1e-4)
    assert_close(stats, expected, atol=0, rtol=1e-4, check_dtype=False)
    found = torch.autograd.grad(loss, [x_psi, x_phi, C])
    wanted = torch.autograd.grad(video + projection, [x_psi, x_phi, unit_C])
    assert_close(found, [gradient.float() for gradient in wanted], atol=1e-6, rtol=1e-4)


@parametrize("assignment", ["hard", "soft"])
def test_the_loss_can_be_compiled_and_computed_twice_before_one_backward_pass(assignment):
    """PyTorch's compiler traces and differentiates it, here without generating code, for two iterations. A
    second pass sets the prototypes to unit length in place: if that spoils the first, autograd raises."""
    results = []
    for compiled in (False, True):
        model = tiny(assignment=assignment, iterations=2)
        if compiled:
            model.loss_fn = torch.compile(model.loss_fn, backend="aot_eager", dynamic=False)
        first, _ = model(*tiny_batch(seed=0))
        second, stats = model(*tiny_batch(seed=1))
        loss = first + second
        loss.backward()
        results.append([loss.detach(), *stats.values(), model.prototypes.grad, model.mask_token.grad])
    assert_close(*results)
    assert_close(model.prototypes.norm(dim=1), torch.ones(12))


def test_hidden_tubes_do_not_reach_the_video_model():
    """A loss of Ψ's features alone has a gradient at visible pixels alone: φ does see hidden tubes."""
    model, (video, mask) = tiny(), tiny_batch()
    hidden = F.interpolate(mask.view(4, 1, 2, 4, 4).float(), (4, 32, 32)).expand_as(video) > 0
    model.forward_loss = lambda x_psi, x_phi: (x_psi.sum(dim=1).square().sum(), {})
    model(video.requires_grad_(), mask)[0].backward()
    assert torch.equal(video.grad == 0, hidden)


def renamed(name, parts):
    """A tensor's name, in which the keys of `parts` give way to its values."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


@parametrize("rows, columns", [(14, 14), (2, 3)])
def test_dinos_network_equals_one_of_pytorchs_layers(rows, columns):
    """Other sizes than 14 x 14 patches get stretched positions. Blocks are like Ψ's, with every bias."""
    model = sigma.DinoViT(48, depth=2, heads=4)
    state = fill(model.state_dict())
    model.load_state_dict(state)
    images = torch.randn(2, 3, 16 * rows, 16 * columns, generator=seeded(0))
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
    positions = state["pos_embed"].mT  # [1, 48, 1 + 196]
    x = x + F.interpolate(positions[:, :, 1:].view(1, 48, 14, 14), (rows, columns), mode="bicubic")
    cls = state["cls_token"].mT + positions[:, :, :1]
    x = torch.cat([cls.expand(2, -1, -1), x.flatten(2)], dim=2).mT
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj.": "self_attn.out_proj.", "mlp.fc": "linear"}
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(48, 4, 192, 0.0, F.gelu, 1e-6, True, norm_first=True)
        layer.load_state_dict({renamed(name, names): value for name, value in block.state_dict().items()})
        x = layer(x)
    x = F.layer_norm(x, (48,), state["norm.weight"], state["norm.bias"], 1e-6)
    assert_close(model(images), x[:, 1:], atol=1e-5, rtol=1e-4)


@parametrize("teacher, numbers, heads", [("vits16", 21_665_664, 6), ("vitb16", 85_798_656, 12)])
def test_dinos_networks_are_the_public_ones(teacher, numbers, heads):
    """Their names are used above."""
    with torch.device("meta"):
        model = sigma.DinoViT(**sigma.TEACHERS[teacher])
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    assert model.blocks[0].attn.heads == heads


def test_dino_features_come_from_the_first_frame_of_each_tube_normalised_over_the_clip():
    model, (video, _) = tiny(**DINO), tiny_batch()
    features = model.teacher_features(video)
    assert_close(features.mean(dim=1), torch.zeros(4, 384), atol=1e-4, rtol=0)
    assert_close(features.std(dim=1), torch.ones(4, 384), atol=1e-3, rtol=0)
    video[:, :, 1::2] = 0                        # second frames do not count
    assert_close(model.teacher_features(video), features)
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())


def test_a_teacher_without_weights_is_warned_of_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")         # as in a program, which shows the same warning once
        tiny(**DINO)(*tiny_batch())
        assert not said
        model = SIGMA("tiny", **DINO, frames=4, image_size=32, num_prototypes=12)
        model(*tiny_batch())
        model(*tiny_batch())
    warning, = said
    assert "weights are random" in str(warning.message)


@beside
def test_the_demonstration_shows_both_failures_and_the_cure(tmp_path):
    """Random weights have a spread of 0.6; a collapse leaves under half of it, and one prototype in use."""
    program = "import sigma; sigma.demonstration(steps=40)"
    printed = subprocess.check_output([sys.executable, "-c", program], text=True, cwd=HERE, env=ONE_THREAD)

    def value(step, name, word):
        return float(re.search(rf"(?m)^step +{step}  {name} .*{word} ([\d.]+)", printed)[1])
    for name in ("L2", "no Sinkhorn", "SIGMA", "soft"):
        assert value(1, name, "spread") > 0.5
    for failure in ("L2", "no Sinkhorn"):
        assert value(40, failure, "loss") < 0.05
        assert value(40, failure, "spread") < 0.25
    assert value(40, "no Sinkhorn", "perplexity") < 1.1
    assert value(40, "SIGMA", "spread") > 0.35
    assert value(40, "SIGMA", "perplexity") > 10
    assert value(40, "SIGMA", "agreement") > 0.3
    assert value(40, "soft", "agreement") < value(40, "SIGMA", "agreement") / 2


def test_features_and_assignments_are_of_all_tubes():
    model = tiny()
    video, mask = tiny_batch()
    tokens = model.features(video)
    assert tokens.shape == (4, 32, 128)
    assert (model.frames, model.image_size) == (4, 32)
    x = F.normalize(model.head(sigma.normalize_tubes(sigma.patchify(video, 8))), dim=-1)
    x = x @ F.normalize(model.prototypes, dim=1).T
    assert torch.equal(model.assign(video), x.argmax(dim=-1))
    assert torch.equal(model.prototype_scores(video), x)
    # Tubes in another order, with their own positions, have the same tokens.
    tubes, positions = sigma.patchify(video, 8).flip(1), torch.arange(31, -1, -1).expand(4, -1)
    assert_close(model.encoder(tubes, positions).flip(1), tokens, atol=1e-5, rtol=1e-4)
    with raises(ValueError, match="no prototypes"):
        tiny(loss="l2").assign(video)


def test_recomputing_keeps_less():
    """A block keeps its input alone, and not what its layers made of it: of all numbers, 14%."""
    kept = {False: [], True: []}
    for recompute, sizes in kept.items():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()), lambda x: x):
            tiny(recompute=recompute)(*tiny_batch())
    assert sum(kept[True]) < 0.25 * sum(kept[False])


@VARIANTS
def test_no_step_reads_a_value(settings):
    """On a GPU that would mean waiting for it. Meta tensors have none: whatever reads a value raises."""
    mask = tiny_batch()[1]
    with torch.device("meta"):
        model = SIGMA("tiny", frames=4, image_size=32, **settings)
        loss, _ = model(torch.zeros(4, 3, 4, 32, 32), mask)
        loss.backward()


@parametrize("settings, message", [
    (dict(size="giant"), "size 'giant' is not one of"), (dict(teacher="clip"), "teacher 'clip' is not one"),
    (dict(target="pixel"), "goes with loss l2"), (dict(frames=5), "frames is 5.*multiple of 2"),
    (dict(image_size=30), "image_size is 30.*of 8"), (dict(eps=0.0), "eps is 0.0.*positive"),
    (dict(num_prototypes=0), "num_prototypes is 0.*positive"), (dict(iterations=-1), "iterations is -1")])
def test_impossible_settings_are_refused_in_one_line(settings, message):
    with raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
        SIGMA(**{"size": "tiny", **settings})


def test_inputs_that_the_model_was_not_built_for_are_refused():
    video, mask = tiny_batch()
    uneven = mask.clone()
    uneven[1] = False
    of_frames = tube_mask(4, steps=4, patches=16, ratio=0.75)
    for clips, hidden, message in (
            (video[:, :, :2], mask, r"frames.*\(4, 3, 2, 32, 32\).*\(4, 3, 4, 32, 32\)"),
            (video, mask[:, :16], r"mask.*\(4, 16\) instead of \(4, 32\)$"),
            (video, of_frames, "frames instead of steps"), (video, mask[0], "mask"),
            (video, uneven, "equally many masked tubes"), (video, torch.zeros_like(mask), "equally many"),
            (video, torch.ones_like(mask), "equally many")):
        with raises(ValueError, match=message):
            tiny()(clips, hidden)


def test_features_of_the_wrong_shape_are_refused():
    x, C = torch.randn(6, 64), torch.randn(12, 64)
    for given, message in (((x[None], x[None], C), r"\[N, E\]"), ((x, x[:5], C), r"\[5, 64\]"),
                           ((x, x, C[:, :32]), r"\[12, 32\]"),
                           ((x, x, C, 0.1, 3, 0.1, "Hard"), "'Hard' is not one of")):
        with raises(ValueError, match=message):
            sigma.sigma_loss(*given)


IMPORTS = ["import torch", "import torch.nn.functional as F", "from torch import nn"]


def pieces_of_sigma():
    """name -> node of sigma.py's syntax tree, for every function, class and constant."""
    pieces = {}
    for node in ast.parse((HERE / "sigma.py").read_text()).body:
        if isinstance(node, ast.Assign):
            pieces[node.targets[0].id] = node
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            pieces[node.name] = node
    return pieces


def needed(name, pieces):
    """All other pieces that this one uses, by itself or through others: what has to be copied along."""
    names = {node.id for node in ast.walk(pieces[name]) if isinstance(node, ast.Name)}
    direct = (names & pieces.keys()) - {name}
    return direct.union(*(needed(other, pieces) for other in direct))


def test_every_piece_says_what_it_pastes_with():
    """A docstring has "Pastes with: these, names." unless the piece needs nothing but the imports."""
    pieces = pieces_of_sigma()
    for name in pieces.keys() - {"SIGMA", "demonstration"}:  # these need nearly the whole file
        if not isinstance(pieces[name], ast.Assign):
            text = " ".join(ast.get_docstring(pieces[name]).split())
            said = re.findall(r"\w+", text.partition("Pastes with: ")[2].partition(".")[0])
            missing = needed(name, pieces)
            assert set(said) == missing, f"the docstring of {name} needs 'Pastes with: {missing}.'"


def test_sigma_imports_pytorch_alone_and_runs_nothing_when_imported():
    others = [ast.unparse(node) for node in ast.parse((HERE / "sigma.py").read_text()).body[1:]
              if not isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Assign))]
    assert others == [*IMPORTS, "if __name__ == '__main__':\n    demonstration()"]


# ============ the release's way of computing: the same numbers, slower ============
@torch.no_grad()
def release_sinkhorn(scores, eps=0.05, iterations=10):
    """The matrix scaled in place, from one exponential of all scores."""
    q = (scores.float() / eps).exp().t()
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(dim=1, keepdim=True) * q.shape[0]
        q /= q.sum(dim=0, keepdim=True) * q.shape[1]
    return (q * q.shape[1]).t()


def naive_attention(q, k, v):
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def release_forward(model, video, mask):
    """SIGMA.forward with naive attention, boolean masks, all tubes embedded, DINO in fp32, its Sinkhorn."""
    def take(x, which):
        return x[which].reshape(len(x), -1, x.shape[-1])

    mask = mask.to(video.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", naive_attention)
        patch.setattr(sigma, "sinkhorn", release_sinkhorn)
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
                x_phi = take(model.teacher_features(video), mask)  # the features themselves are the model's
        else:
            x_phi = take(sigma.normalize_tubes(sigma.patchify(video, model.patch)), mask)
            if model.target == "mlp":
                x_phi = model.head(x_phi)
        return model.forward_loss(x_psi.flatten(0, 1), x_phi.flatten(0, 1))


def loss_and_gradients(model, forward=SIGMA.forward):
    loss, _ = forward(model, *tiny_batch())
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@VARIANTS
def test_every_parameter_learns_and_other_ways_of_computing_change_no_number(settings):
    expected = loss_and_gradients(tiny(**settings))
    assert all(value.norm() > 0 for value in expected)
    assert_close(loss_and_gradients(tiny(recompute=True, **settings)), expected)
    assert_close(loss_and_gradients(tiny(**settings), release_forward), expected, atol=1e-5, rtol=1e-3)


# ============ sigma.py: reading a checkpoint, several processes ============
def test_load_checkpoint_reads_the_authors_files_also_in_threads(tmp_path):
    authors = {"model": tiny().state_dict(), "optimizer": {"state": {}}, "epoch": 799,
               "scaler": {"scale": 1.0}, "args": argparse.Namespace(lr=1e-4, data_path="x")}
    torch.save(authors, tmp_path / "authors.pth")
    content = load_checkpoint(tmp_path / "authors.pth")
    assert content["epoch"] == 799
    assert content["args"].lr == 1e-4
    tiny().load_state_dict(content["model"], strict=True)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(load_checkpoint, [tmp_path / "authors.pth"] * 50))


class Malice:  # who unpickles this makes a folder
    def __reduce__(self):
        return (os.mkdir, ("ran",))


def test_load_checkpoint_refuses_code_and_what_is_no_checkpoint_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}, "args": Malice()}, "evil.pth")
    torch.save([1, 2], "list.pth")
    # A bare pickle lacks the frame of PyTorch's files, so it is refused before its code is looked at.
    contents = {"evil.pkl": pickle.dumps({"model": Malice()}), "empty.pth": b"", "text.pth": b"no checkpoint",
                "torn.pth": Path("evil.pth").read_bytes()[:-100]}
    for name, written in contents.items():
        Path(name).write_bytes(written)
    for name in ("evil.pth", "list.pth", *contents):
        with raises(ValueError, match=rf"^{name}[^\n]*$"):
            load_checkpoint(name)
    with raises(ValueError, match=r"evil\.pth.*wants to run \S*mkdir"):
        load_checkpoint("evil.pth")
    assert not Path("ran").exists()


def run_rank(rank, folder, scores):
    """What each of two processes does: Sinkhorn of its rows, and the gradients of half a batch."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    plan = sinkhorn(scores[:30] if rank == 0 else scores[30:])
    model = tiny(assignment="soft")
    if rank == 1:
        nn.init.normal_(model.mask_token)  # DDP must hand out rank 0's weights
    model = nn.parallel.DistributedDataParallel(model)
    video, mask = tiny_batch()
    loss, stats = model(video.chunk(2)[rank], mask.chunk(2)[rank])
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.module.named_parameters()}
    torch.save((plan, loss.detach(), stats, gradients), f"{folder}/result{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_with_half_the_clips_equal_one_with_all(tmp_path):
    """Sinkhorn's halves differ in size. With soft assignments every error of the plan shows in the loss."""
    scores = unit_scores(90, 12)
    torch.multiprocessing.start_processes(run_rank, (tmp_path, scores), 2, start_method=data.START_METHOD)
    results = [torch.load(tmp_path / f"result{rank}") for rank in range(2)]
    plans, losses, statistics, gradients = zip(*results)
    assert_is_plan(torch.cat(plans), scores)
    model = tiny(assignment="soft")
    loss, stats = model(*tiny_batch())
    loss.backward()
    assert_close(sum(losses) / 2, loss.detach(), atol=0, rtol=1e-5)
    for rank in range(2):
        for name in ("perplexity", "spread"):    # these are over all ranks already
            assert_close(statistics[rank][name], stats[name], atol=0, rtol=1e-4)
        for name, parameter in model.named_parameters():
            assert_close(gradients[rank][name], parameter.grad, atol=1e-6, rtol=1e-4)


# ============ data.py: making videos ============
# Frame n of a video shows the number n as a bar code, so that a clip tells which frames it holds. Fixtures of
# the whole session, which tests may read but not change: video_file(name), a file in each of VIDEO_FORMATS;
# video_set, a small data set with a broken file; below, world and videos, what train.py's tests learn from.

W, H, N = 128, 96, 50  # of most videos: width, height, frames


def video_paint(n):
    """A picture [H, W, 3] of n: eight bars, light where a bit of n is 1, else dark, and the other way round
    in the lower half. Moving noise lies over them, so that every pixel matters."""
    row = (55 + 140 * (n >> np.arange(8) & 1)).repeat(W // 8)
    bars = np.where(np.arange(H)[:, None] < H // 2, row, 250 - row)
    noise = default_rng(0).integers(-30, 30, (H // 4, W // 4, 3)).repeat(4, 0).repeat(4, 1)
    return (bars[:, :, None] + np.roll(noise, (n, -2 * n), (0, 1))).astype(np.uint8)


def video_numbers(clip):
    """Reads the painted numbers off a clip [T, 3, S, S] of whole pictures; fails where they are not clear."""
    size = clip.shape[-1]
    x = torch.arange(8) * size // 8 + size // 16
    upper, lower = clip.float().mean(1)[:, size // 4][:, x], clip.float().mean(1)[:, 3 * size // 4][:, x]
    assert ((upper - lower).abs() > 50).all(), "the bar code is damaged"
    return ((upper > lower).long() << torch.arange(8)).sum(1).tolist()


def video_write(path, codec="libx264", pictures=None, pix_fmt="yuv420p", times=None, options=None,
                colour_range=None):
    """Writes pictures (None: N painted numbers) -> path. times in milliseconds. colour_range: 2 is JPEG's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if pictures is None:
        pictures = [video_paint(n) for n in range(N)]
    with av.open(path, "w", options={"movflags": "faststart"}) as file:
        height, width = pictures[0].shape[:2]
        stream = file.add_stream(codec, 25, options or {}, width=width, height=height, pix_fmt=pix_fmt)
        stream.codec_context.thread_count = 1
        if times:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for n, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if colour_range:
                stream.codec_context.color_range = colour_range
                frame = frame.reformat(format=pix_fmt, dst_color_range=colour_range)
            if times:
                frame.pts, frame.time_base = times[n], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def packets_of(path):
    with av.open(path) as file:
        return [packet for packet in file.demux(video=0) if packet.size]


def video_copy(source, target, edit, all_keys=False, **options):
    """Copies a video's packets -> target. edit(i, content) may alter packet i's bytes in place; it returns
    its (pts, dts) in 1/25 s, or None to drop it. all_keys: all packets call themselves keyframes."""
    with av.open(source) as file, av.open(target, "w", options=options) as output:
        stream = output.add_stream_from_template(file.streams.video[0])
        for i, packet in enumerate(packet for packet in file.demux(video=0) if packet.size):
            content = bytearray(bytes(packet))
            times = edit(i, content)
            if times is not None:
                copy = av.Packet(bytes(content))
                copy.time_base, copy.stream = Fraction(1, 25), stream
                copy.is_keyframe = all_keys or packet.is_keyframe
                copy.pts, copy.dts = times
                output.mux(copy)
    return target


FINE = {"crf": "1"}  # nearly without loss
X264 = {"x264-params": "keyint=16:bframes=3:b-pyramid=normal:scenecut=0:b-adapt=0:log-level=-1"}
# Open groups (see data.py). Where such a video is cut, H.264's decoder complains, though nothing is lost.
OPEN = {"x264-params": X264["x264-params"].replace("normal", "strict") + ":open-gop=1:ref=6"}
X265 = {"preset": "ultrafast", "x265-params": "keyint=16:bframes=3:log-level=none"}
LIVE = {"deadline": "realtime", "cpu-used": "8", "g": "16", "auto-alt-ref": "1", "lag-in-frames": "10"}
FLAT = {"x264-params": "keyint=16:bframes=0:scenecut=0:log-level=-1"}
VIDEO_FORMATS = {
    "flat.mp4": dict(options=FLAT),
    "bframes.mp4": dict(options=X264),
    "opengop.ts": dict(options=OPEN),
    "vfr.mkv": dict(options=X264, times=[100 * n + 40 * (n % 3) for n in range(N)]),
    "h264.avi": dict(options=X264),              # decoding times only
    "raw.h264": dict(options=X264),              # no times at all
    "mpeg4.mp4": dict(codec="mpeg4", options={"bf": "2", "g": "12"}),
    "vp9.webm": dict(codec="libvpx-vp9", options=LIVE),
    "vp8.webm": dict(codec="libvpx", options=LIVE),
    "hevc.mov": dict(codec="libx265", options=X265),
    "tenbit.mkv": dict(pix_fmt="yuv420p10le"),
    "mjpeg.avi": dict(codec="mjpeg", pix_fmt="yuvj420p"),
    "av1.mp4": dict(codec="libsvtav1", options={"preset": "12", "g": "16"}),
    "plain.mp4": dict(codec="mpeg4", options={"g": "12"}),  # without B-frames
    "h263.3gp": dict(codec="h263", options={"g": "12"}),
}


@pytest.fixture(scope="session")
def video_file(tmp_path_factory):
    """video_file(name) -> path of a video of this format, written when first asked for."""
    folder = tmp_path_factory.mktemp("videos")
    return lru_cache(None)(lambda name: video_write(folder / name, **VIDEO_FORMATS[name]))


def silence(second):
    """One second of silence, which starts at this second."""
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
    frame.rate, frame.pts = 8000, 8000 * second
    return frame


def read_numbers(path, frames, stride, start, **kwargs):
    """The numbers that the frames of this clip show."""
    return video_numbers(read_clip(path, frames, stride, start, (0, 0, W, H), 64, **kwargs))


def numbers_of(file, lists):
    """The numbers that an open Video shows in the frames of these lists, read at once."""
    clips = file.read([(numbers, (0, 0, W, H)) for numbers in lists], 64)
    return [video_numbers(torch.from_numpy(clip).transpose(0, 1)) for clip in clips]


def video_decode(path):
    """All frames of a video, decoded by nothing but PyAV's loop."""
    with av.open(path) as container:
        return list(container.decode(container.streams.best("video")))


def video_check(path, starts=None, stride=1):
    """Checks clips of three frames from starts (None: all even ones), and the number of frames, against a
    plain decode -> that number."""
    frames = video_decode(path)
    width, height, kind = frames[0].width, frames[0].height, frames[0].format
    filters = [("scale", "32:32:flags=bilinear"), ("format", "gbrp"), ("buffersink",)]
    if kind.components[0].bits > 8:
        filters.insert(0, ("format", "yuv444p16le"))
    graph = av.filter.Graph()
    source = graph.add_buffer(time_base=Fraction(1, 25), width=width, height=height, format=kind.name)
    graph.link_nodes(source, *(graph.add(*step) for step in filters)).configure()
    pictures = []
    for frame in frames:
        graph.push(frame)
        pictures.append(graph.pull().to_ndarray())
    truth = np.stack(pictures)
    for start in starts or range(0, len(truth), 2):
        numbers = [min(start + i * stride, len(truth) - 1) for i in range(3)]
        got = read_clip(path, 3, stride, start, (0, 0, width, height), size=32).permute(0, 2, 3, 1)
        assert np.array_equal(got, truth[numbers]), start
    with data.Video(path) as file:
        assert file.frames == len(truth) or not file.exact
    return len(truth)


# ============ data.py: exact frames ============
def check_seeking(path):
    """Checks that frames are reached from the keyframes before them, in formats whose times are trusted."""
    with data.Video(path) as file:
        assert bool(file.times) == (path.name not in ("h264.avi", "raw.h264", "mpeg4.mp4"))
        if file.times:
            for n in range(0, N, 3):
                assert [number for number, _ in file.from_keyframes([n])] == [n]


@parametrize("name", VIDEO_FORMATS)
def test_frames_are_the_ones_asked_for(video_file, name, monkeypatch):
    path = video_file(name)
    assert video_check(path, range(0, N, 5), stride=7) == N
    check_seeking(path)
    with data.Video(path) as file:
        lists = [[41, 3, 3, 28], [0, 17, 49, 49], list(range(N))]
        assert numbers_of(file, lists) == lists
        assert numbers_of(file, lists) == lists  # an open file can be read again
        assert numbers_of(file, [[-3, 0, 2, N]]) == [[0, 0, 2, N - 1]]  # nothing lies beyond the ends
    assert np.diff(read_numbers(path, 4, 4, None, generator=seeded(3))).tolist() == [4, 4, 4]
    monkeypatch.setattr(data, "MAX_KEPT_BYTES", 10)  # as with a large file, whose packets are not kept
    check_seeking(path)
    assert read_numbers(path, 4, 5, 30) == [30, 35, 40, 45]


def in_order(i, content):
    """An edit for video_copy that changes nothing. This and the next two suit videos without B-frames."""
    return i, i


def not_coded(i, content, more=b""):
    """Puts packets of 6 bytes (or more), which show nothing, in the place of some frames of MPEG-4."""
    if i in (5, 6, 20):
        # After a start code: P frame, 0 full seconds, marker, time in 1/25 s, marker, not coded, padding.
        bits = f"01 0 1 {i % 25:05b} 1 0 01111".replace(" ", "")
        content[:] = b"\0\0\1\xb6" + int(bits, 2).to_bytes(2, "big") + more
    return i, i


def complaining(i, content):
    """Adds messages (SEI) that are shorter than they say: H.264's decoder complains, but loses no picture."""
    if i % 3 == 1:
        message = b"\x06\x05\x64abc\x80"
        content[:0] = len(message).to_bytes(4, "big") + message
    return i, i


@parametrize("source, target, change, all_keys, frames", [
    ("plain.mp4", "no_table.mp4", in_order, True, N), ("h263.3gp", "phone.3gp", in_order, True, N),
    ("plain.mp4", "not_coded.mp4", not_coded, True, N - 3), ("flat.mp4", "sei.mp4", complaining, False, N),
])
def test_what_packets_say_is_not_believed(video_file, tmp_path, source, target, change, all_keys, frames):
    """All call themselves keyframes, some show nothing, or a message in them is an error but no damage."""
    path = video_copy(video_file(source), tmp_path / target, change, all_keys)
    assert frames - 1 <= video_check(path) <= frames  # FFmpeg 7 loses one


def test_a_palette_that_comes_once_and_an_avi_without_an_index(tmp_path):
    # Grey from light to dark, red, green, blue and alpha: the picture is decoded right only with the palette.
    shades = np.stack([np.arange(256)[::-1]] * 3 + [np.full(256, 255)], 1).astype(np.uint8)
    with av.open(tmp_path / "pal8.avi", "w") as file:
        stream = file.add_stream("rawvideo", rate=25, width=W, height=H, pix_fmt="pal8")
        for n in range(9):
            picture = np.ascontiguousarray(video_paint(n)[:, :, 0])
            file.mux(stream.encode(av.VideoFrame.from_ndarray((picture, shades), format="pal8")))
        file.mux(stream.encode())
    pictures = [video_paint(n) for n in range(20)]
    path = video_write(tmp_path / "cinepak.avi", "cinepak", pictures, "rgb24", options={"g": "10"})
    path.write_bytes(path.read_bytes().replace(b"idx1", b"JUNK"))  # the index
    assert video_check(path) == 20
    assert video_check(tmp_path / "pal8.avi") == 9


def video_fields(path, frames):
    """Writes raw H.264, 16 x 32 pixels, as camcorders do: a frame is two fields, each a packet of its own. No
    encoder at hand does, so the bytes stand here: a field is one block of 16 x 16, without compression."""
    stream = bytes.fromhex("00000001 674d001eda6480 00000001 68ce3c80")  # sizes and settings
    tops = ("00000001 6588852834", "00000001 6588848a0d00")  # headers of neighbours have to differ
    for n in range(frames):
        for field in (tops[n % 2], "00000001 618886a0d0"):
            stream += bytes.fromhex(field) + bytes([20 + 4 * n]) * 384 + b"\x80"
    path.write_bytes(stream)
    return path


def test_two_fields_are_one_frame(tmp_path):
    path = video_copy(video_fields(tmp_path / "fields.h264", 30), tmp_path / "fields.ts", in_order)
    assert video_check(path) == 30
    assert len(packets_of(path)) == 60


@parametrize("longer", ["sound", "last frame"])
def test_where_only_the_sound_or_the_last_frame_goes_on_the_video_is_whole(tmp_path, longer):
    """Matroska tells its length in the header; a cut file is known by no stream reaching it."""
    path = tmp_path / "longer.mkv"
    with av.open(path, "w") as file:
        video = file.add_stream("mjpeg", rate=25, width=W, height=H, pix_fmt="yuvj420p")
        sound = file.add_stream("pcm_s16le", rate=8000, layout="mono")
        for n in range(N):
            packet, = video.encode(av.VideoFrame.from_ndarray(video_paint(n), format="rgb24"))
            if longer == "last frame" and n == N - 1:
                packet.duration = 500            # twenty seconds
            file.mux(packet)
        if longer == "sound":
            for second in range(20):
                file.mux(sound.encode(silence(second)))
    assert read_numbers(path, 3, 1, N - 2) == [N - 2, N - 1, N - 1]


def test_joined_recordings_whose_clocks_overlap_are_one_video(tmp_path):
    """Camcorders leave such files: here frame 25 has a time between those of frames 10 and 11."""
    content = b""
    for first, later in ((0, 0), (25, 420)):
        pictures = [video_paint(n) for n in range(first, first + 25)]
        times = [40 * n + later for n in range(25)]
        content += video_write(tmp_path / "a.ts", pictures=pictures, times=times, options=FLAT).read_bytes()
    (tmp_path / "joined.ts").write_bytes(content)
    assert video_check(tmp_path / "joined.ts") == N


def test_frames_that_nobody_wants_or_needs_are_not_decoded(video_file, tmp_path):
    """Damage in such a frame does no harm; where the frame is wanted, it is an error."""
    def damage(i, content):
        if content[4] == 1:                      # H.264's mark of a frame that no other one needs
            content[20:] = b"\xff" * (len(content) - 20)
            lost.append(times[i])
        return times[i], i - 3                   # with B-frames, decoding is up to 3 frames ahead

    lost = []                                    # numbers of the damaged frames
    source = video_file("bframes.mp4")
    times = [packet.pts // 512 for packet in packets_of(source)]              # a frame has 512 ticks
    path = video_copy(source, tmp_path / "skipped.mp4", damage)
    kept = [n for n in range(20, 40) if n not in lost]
    assert len(lost) > 20
    with data.Video(path) as file:
        assert numbers_of(file, [kept]) == [kept]
        with raises(VideoError):
            file.read([(lost[6:8], None)])


def test_a_frame_that_the_decoder_drops_is_an_error(video_file, tmp_path):
    change = partial(not_coded, more=bytes(30))  # data.py suspects only packets under 20 bytes
    path = video_copy(video_file("plain.mp4"), tmp_path / "missing.mp4", change)
    assert read_numbers(path, 3, 1, 13) == [13, 14, 15]
    with raises(VideoError, match="missing"):
        read_clip(path, 3, 1, 4)


@parametrize("source, target, steps, hidden", [
    ("h264.avi", "dts.mp4", [0], ()), ("mpeg4.mp4", "dts.mkv", [0], ()),
    ("mpeg4.mp4", "permuted.mp4", [1, 2, 0], ()), ("vp8.webm", "hidden.webm", [0], (5, 6, 13)),
])
def test_the_decoders_order_is_the_truth(video_file, tmp_path, source, target, steps, hidden):
    """AVI's copies have decoding times, or these permuted by FFmpeg: 1, 3, 2, 4, 6, 5. VP8 hides packets."""
    def change(i, content):
        if i in hidden:
            content[0] &= 0xEF                   # clears VP8's bit show_frame
        return i + steps[i % len(steps)], i
    path = video_copy(video_file(source), tmp_path / target, change)
    assert N - len(hidden) - 1 <= video_check(path) <= N - len(hidden)  # FFmpeg 7 loses one
    assert read_numbers(path, 20, 1, 0) == [n for n in range(N) if n not in hidden][:20]


@parametrize("suffix", ["mp4", "ts"])
def test_a_copy_that_begins_in_an_open_group_is_read(tmp_path, suffix):
    """Its first pictures lack what they refer to. In mp4 an edit list hides them, in ts nothing does."""
    source = video_write(tmp_path / f"whole.{suffix}", options=OPEN)
    packets = packets_of(source)
    times = [round((packet.pts - packets[0].pts) * packet.time_base * 25) for packet in packets]
    start = [i for i, packet in enumerate(packets) if packet.is_keyframe][1]
    assert min(times[start:]) < times[start]
    zero = 0
    if suffix == "mp4":                          # for what is shown before 0 the copy gets an edit list
        zero = times[start] + 1

    def cut(i, content):
        if i >= start:
            return times[i] - zero, i - zero - 5  # decoding is up to 5 frames ahead
    path = video_copy(source, tmp_path / f"cut.{suffix}", cut, avoid_negative_ts="disabled")
    # FFmpeg's versions differ in what they show of an edit list.
    assert N - times[start] - 3 < video_check(path) < N
    assert video_check(source) == N              # where nothing is cut, open groups are whole


def test_beyond_the_end_is_the_last_frame(tmp_path):
    """AVI of variable rate counts ticks without a picture: a clip that reaches the end is no cut-off file."""
    path = video_write(tmp_path / "ticks.avi", "mjpeg", [video_paint(n) for n in range(12)], "yuvj420p",
                       times=[40 * t for t in (0, 1, 2, 5, 6, 9, 10, 11, 12, 15, 16, 17)])
    assert read_numbers(path, 8, 2, 0) == [0, 2, 4, 6, 8, 10, 11, 11]
    path = video_write(tmp_path / "short.mp4", pictures=[video_paint(n) for n in range(5)])
    assert read_numbers(path, 6, 2, None) == [0, 2, 4, 4, 4, 4]
    assert read_numbers(path, 2, 2, 9) == [4, 4]


@parametrize("name", ["cover.mkv", "cover.mp4"])
def test_a_still_picture_first_is_not_the_video(tmp_path, name):
    with av.open(tmp_path / name, "w") as file:
        still = file.add_stream("mjpeg", rate=25, width=W, height=H, pix_fmt="yuvj420p")
        moving = file.add_stream("libx264", rate=25, width=W, height=H, pix_fmt="yuv420p")
        still.disposition = av.stream.Disposition.attached_pic.value
        for stream, numbers in ((still, [99]), (moving, range(20))):
            for n in numbers:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(video_paint(n), format="rgb24")))
            file.mux(stream.encode())
    assert read_numbers(tmp_path / name, 4, 5, 3) == [3, 8, 13, 18]


# Red grows with x, green with y, blue is flat: every pixel tells where it lies.
RAMP = np.broadcast_arrays(np.linspace(20, 235, 160), np.linspace(20, 235, 112)[:, None], 128)
RAMP = np.stack(RAMP, -1).round().astype(np.uint8)
MATRICES = {  # a, b, c, d, as a file's header (tkhd) stores them, and what undoes this turn of the picture
    "90": (0, 1, -1, 0, np.rot90),
    "180": (-1, 0, 0, -1, lambda picture: np.rot90(picture, 2)),
    "mirrored": (-1, 0, 0, 1, lambda picture: picture[:, ::-1]),
    "transposed": (0, 1, 1, 0, lambda picture: picture.swapaxes(0, 1)),
}


def video_turned(path, turn):
    """Writes three frames that are shown as the ramp, 160x112, with a matrix in the header."""
    a, b, c, d, undo = MATRICES[turn]
    content = bytearray(video_write(path, pictures=[undo(RAMP)] * 3, options=FINE).read_bytes())
    at = content.index(b"tkhd") + 4 + 40
    struct.pack_into(">9i", content, at, a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    return path


# Black is 0 and white 255, as in JPEG, and not 16 and 235.
FULL_RANGE = dict(codec="libvpx-vp9", options={"crf": "4", "b": "0"}, colour_range=2)


@parametrize("name", [*MATRICES, "mjpeg.avi", "tenbit.mkv", "fullrange.webm"])
def test_crops_are_in_displayed_pixels_and_colours_are_right(tmp_path, name):
    if name in MATRICES:
        path = video_turned(tmp_path / "turned.mp4", name)
    else:
        settings = {"options": FINE, **VIDEO_FORMATS.get(name, FULL_RANGE)}
        path = video_write(tmp_path / name, **settings, pictures=[RAMP] * 3)
    for crop in [(0, 0, 160, 112), (101, 7, 40, 90), (17, 33, 64, 64), (159, 111, 1, 1), None]:
        clip = read_clip(path, 2, 1, 0, crop=crop, size=48)[1].float().numpy()
        x, y, w, h = crop or (24, 0, 112, 112)
        red = 20 + 215 * (x + (np.arange(48) + 0.5) * w / 48 - 0.5) / 159
        green = 20 + 215 * (y + (np.arange(48) + 0.5) * h / 48 - 0.5) / 111
        for channel, line in zip(clip, (red[None], green[:, None], 128)):
            assert np.abs(channel - line)[1:-1, 1:-1].max() < 9, crop
            assert w == 1 or abs((channel - line).mean()) < 1.5, crop    # a pixel is 1.35 levels
    for crop in [(100, 0, 61, 10), (-1, 0, 10, 10), (0, 100, 10, 13), (0, 0, 0, 5)]:
        with raises(ValueError, match="crop"):
            read_clip(path, 1, 1, 0, crop=crop)


# ============ data.py: files that are wrong ============
def test_unreadable_files_give_one_line(tmp_path):
    good = video_write(tmp_path / "good.mp4", options=X264).read_bytes()
    contents = {"empty.mp4": b"", "garbage.mp4": default_rng(0).bytes(20_000),
                "headless.mp4": good[len(good) // 2:],
                "list.mp4": b"ffconcat version 1.0\nfile good.mp4\n",
                "stream.mp4": b"#EXTM3U\n#EXTINF:3,\ngood.mp4\n#EXT-X-ENDLIST\n"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dir.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        container.mux(stream.encode(silence(0)) + stream.encode())
    Image.fromarray(RAMP).save(tmp_path / "picture.mp4", format="png")
    for name in [*contents, "dir.mp4", "pipe.mp4", "sound.mp4", "picture.mp4", "absent.mp4"]:
        with raises(VideoError) as error:
            read_clip(tmp_path / name)
        text = str(error.value)
        assert "\n" not in text
        assert str(tmp_path) not in text
        assert len(text) > 5


def test_a_header_that_asks_for_too_much_memory_is_refused(video_file, monkeypatch):
    monkeypatch.setattr(data, "MAX_PIXELS", W * H - 1)
    with raises(VideoError):
        read_clip(video_file("flat.mp4"))


def test_a_wrong_argument_is_no_fault_of_the_file(video_file):
    """Stride 0, which spreads the frames over the video, is for data sets only: such a clip has no start."""
    for argument in (dict(frames=0), dict(stride=0), dict(size=0), dict(start=-1)):
        with raises(ValueError, match="below"):
            read_clip(video_file("flat.mp4"), **argument)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks in Linux's way")
def test_broken_files_leave_nothing_open(video_file, tmp_path):
    good = video_file("flat.mp4").read_bytes()
    unknown = good.replace(b"avc1", b"zzzz")     # a codec that does not exist
    empty = good[:good.index(b"mdat") + 4]       # a header without frames
    kept = []                                    # errors, as a debugger or a log keeps them
    for content in (unknown, empty, b"no video at all"):
        (tmp_path / "bad.mp4").write_bytes(content)
        with raises(VideoError) as error:
            read_clip(tmp_path / "bad.mp4")
        kept.append(error)
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert str(tmp_path / "bad.mp4") not in opened


@parametrize("name", ["bframes.mp4", "vfr.mkv", "opengop.ts", "h264.avi", "mjpeg.avi"])
def test_a_file_that_was_cut_off_gives_what_it_holds(video_file, tmp_path, name):
    """Frames after the cut raise VideoError, so that another clip is drawn, and repeat no earlier frame."""
    content = video_file(name).read_bytes()
    header = max(0, content.find(b"mdat"))
    path = tmp_path / name
    path.write_bytes(content[:header + (len(content) - header) * 6 // 10])
    got = []                                     # the numbers read off all frames that can be read
    for n in range(N):
        with suppress(VideoError):
            got += read_numbers(path, 1, 1, n)
    assert got[:20] == list(range(20))
    assert got == sorted(set(got))
    assert len(got) < 40


def test_damage_in_the_middle_is_not_silent(tmp_path):
    """Each clip is right or an error. One file in eight may be wrong, since garbage can be decoded, too."""
    path = video_write(tmp_path / "damaged.mp4")  # only the first frame is a keyframe
    truth = [read_clip(path, 3, 1, start, size=32) for start in range(0, N - 3, 6)]
    content, found = path.read_bytes(), []
    for trial in range(8):
        noise = default_rng(trial)
        at = int(noise.integers(len(content) * 0.3, len(content) * 0.8))
        path.write_bytes(content[:at] + noise.bytes(1000) + content[at + 1000:])
        right = {}                               # number of a clip -> whether it is right, if it is read
        for i, clip in enumerate(truth):
            with suppress(VideoError):
                right[i] = torch.equal(read_clip(path, 3, 1, 6 * i, size=32), clip)
        assert right[0] and right[1]             # these lie before the damage
        found.append(len(right) < len(truth) and all(right.values()))
    assert sum(found) >= 7


def test_damage_before_the_nearest_keyframe_does_no_harm(video_file, tmp_path):
    """Decoding starts at the last keyframe before the clip, which is also what makes it quick."""
    content = bytearray(video_file("flat.mp4").read_bytes())
    content[8000:8400] = b"\xff" * 400           # in the first fifth of the file
    path = tmp_path / "damaged.mp4"
    path.write_bytes(content)
    assert read_numbers(path, 3, 1, 30) == [30, 31, 32]
    with raises(VideoError):
        read_clip(path, 16, 1, 0)


def test_noise_in_a_file_raises_only_video_errors(video_file, tmp_path):
    good = 0
    for i, name in enumerate(10 * list(VIDEO_FORMATS)):
        content = bytearray(video_file(name).read_bytes())
        noise = default_rng(i)
        at = noise.integers(len(content) if i % 3 else 4000)         # every third time near the start
        length = noise.choice([1, 4, 200])
        content[at:at + length] = noise.bytes(length + i % 2)  # every second time it is a byte longer
        (tmp_path / name).write_bytes(content)
        with suppress(VideoError):
            read_clip(tmp_path / name, 4, 4, 20, size=32)
            good += 1
    assert 20 < good < 100                       # of 150: some noise does harm, some does not


# ============ data.py: folders, lists, clips ============
def video_found(source, **kwargs):
    """What find_videos says of a folder or list: names, labels and classes."""
    videos = find_videos(source, **kwargs)
    return [videos.name(i) for i in range(len(videos))], videos.labels.tolist(), videos.classes


def make_empty_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_become_classes(tmp_path):
    make_empty_files(tmp_path, "dog/b.mp4", "cat/deep/a.MKV", "cat/ä ö.webm", "cat/a.txt", "cat/.a.mp4",
                     ".x/x.mp4")
    for name in ("empty", "dog/dir.mp4", "nothing"):
        (tmp_path / name).mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "cat/deep")
    for link, target in (("cat/up", "."), ("empty/across", "nothing"), ("nothing/across", "empty")):
        (tmp_path / link).symlink_to(tmp_path / target)
    names = ["cat/ä ö.webm", "cat/deep/a.MKV", "dog/b.mp4", "linked/a.MKV"]
    assert video_found(tmp_path) == (names, [0, 0, 1, 3], ["cat", "dog", "empty", "linked", "nothing"])
    (tmp_path / "linked").unlink()
    assert video_found(tmp_path, classes=["dog", "cat"])[1] == [1, 1, 0]
    with raises(ValueError, match="dog"):
        video_found(tmp_path, classes=["cat"])
    make_empty_files(tmp_path, "top.mp4")
    assert video_found(tmp_path)[1:] == ([-1] * 4, None)
    for source in ("nothing", "absent", "top.mp4"):
        with raises(ValueError, match=source):
            video_found(tmp_path / source)
    make_empty_files(tmp_path, "set/train/a/1.mp4", "set/val/a/2.mp4")
    with raises(ValueError, match="splits.*set/train"):
        video_found(tmp_path / "set")


@parametrize("content, expected", [              # -1: no label
    ("a.mp4 0\nb.mp4,1\nc.mp4\t12", {"a.mp4": 0, "b.mp4": 1, "c.mp4": 12}),
    ("my dog, 1.mp4\nb.webm", {"my dog, 1.mp4": -1, "b.webm": -1}),
    # A mark of UTF-8 at the start and lines that end as in Windows.
    ("\ufeff# comment\r\na.mp4 3\r\n\r\n  b.mp4   4  \r\n#\r\n#b.mp4 4", {"a.mp4": 3, "b.mp4": 4}),
    ("my dog, 1.mp4 7\nä/ö 2.mp4, 8", {"my dog, 1.mp4": 7, "ä/ö 2.mp4": 8}),
    ("a.mp4 +1\nb.mp4 2", {"a.mp4": 1, "b.mp4": 2}), ("b.mp4\nc.mp4 -1", {"b.mp4": -1, "c.mp4": -1}),
    ("it's.mp4 1\n12 5", {"it's.mp4": 1, "12": 5}),  # quotes mean nothing, and a name can be a number
    ("/abs/a.mp4 1\ncaf\udce9.mp4 2", {"/abs/a.mp4": 1, "caf\udce9.mp4": 2}),  # Latin-1, no UTF-8
])
def test_a_list_gives_names_and_labels(tmp_path, content, expected):
    path = tmp_path / "list.txt"
    path.write_bytes(os.fsencode(content))
    assert video_found(path) == (list(expected), list(expected.values()), None)
    assert find_videos(path).path(0) == os.path.join(tmp_path, list(expected)[0])


@parametrize("content, message", [
    ("# x\npath,label\na.mp4,1", "line 2 .*label.*line 3.*header"), ("a.mp4 1\nb.mp4 2.0", "line 2 .*line 1"),
    ("a.mp4 1\n\na.mp4 2", "line 3: .*label"), ("\0\1\2 binary", "line 1: .*no text"),
    ("# a\n\n", "no videos"),
])
def test_a_wrong_list_is_refused_by_its_line(tmp_path, content, message):
    (tmp_path / "list.txt").write_text(content)
    with raises(ValueError, match=rf"list\.txt.*{message}[^\n]*$"):
        find_videos(tmp_path / "list.txt")


def test_a_list_keeps_its_lines(tmp_path):
    """Repeated lines are kept; a # line is a video if such a file exists (HMDB51 has some)."""
    (tmp_path / "#20_clap.avi").touch()
    (tmp_path / "list.txt").write_text("#20_clap.avi 1\n#21_clap.avi 1\na.mp4 0\na.mp4 0\n# a.mp4 0\n")
    assert video_found(tmp_path / "list.txt")[:2] == (["#20_clap.avi", "a.mp4", "a.mp4"], [1, 0, 0])


@pytest.fixture(scope="session")
def video_set(tmp_path_factory):
    """A folder with two classes of three videos; the fifth of the six is unreadable."""
    root = tmp_path_factory.mktemp("dataset")
    pictures = [video_paint(n) for n in range(30)]
    for name in ("left/0", "left/1", "left/2", "right/3", "right/5"):
        video_write(root / f"{name} ü.mp4", "mpeg4", pictures)
    (root / "right/4 ü.mp4").write_bytes(b"no video at all")
    return root


def small_clips(source, **settings):
    """Clips of 4 frames, every second one, and 32 x 32 pixels."""
    return data.Clips(find_videos(source), 4, 2, 32, **settings)


def video_take(source, workers=0, seed=1, start=0, stop=4):
    """Batches `start` to before `stop`, each of two videos and two clips of each."""
    clips = small_clips(source, seed=seed, repeats=2, mask=partial(torch.rand, 2, 6))
    sampler = EpochSampler(len(clips), 4, seed=seed, repeats=2, start=start, stop=stop)
    return list(data.load(clips, sampler, workers=workers))


def video_same(a, b):
    return a["bad"] == b["bad"] and all(torch.equal(a[key], b[key]) for key in a if key != "bad")


def test_clips_are_a_function_of_seed_epoch_and_index(video_set):
    reference = video_take(video_set, stop=12)
    assert reference[0]["video"].shape == (4, 3, 4, 32, 32)
    assert not torch.equal(reference[0]["video"][0], reference[0]["video"][1])       # views differ
    for first, others in ((0, video_take(video_set, workers=2)), (3, video_take(video_set, start=3, stop=7))):
        assert list(map(video_same, reference[first:], others)) == [True] * 4
    assert not any(map(video_same, reference, video_take(video_set, seed=2)))
    clips = torch.cat([batch["video"].flatten(1) for batch in reference])
    assert len(clips.unique(dim=0)) > 40         # of 48 in four epochs; few agree by chance


def test_unreadable_videos_are_named_and_replaced(video_set):
    videos, batches = find_videos(video_set), video_take(video_set, stop=12)
    bad = [entry for batch in batches for entry in batch["bad"]]
    assert {path for path, _ in bad} == {videos.path(4)}
    for batch in batches:
        assert 4 not in batch["index"]
        assert torch.equal(batch["label"], videos.labels[batch["index"]])
        assert batch["video"].float().flatten(1).std(1).min() > 1    # no clip is blank
    # A resumed run, which knows the bad file, draws the same clips.
    fresh, resumed = small_clips(video_set), small_clips(video_set)
    resumed.bad = {4: bad[0][1]}
    for key in product(range(4), range(6)):
        assert video_same(data.collate([fresh[key]]), data.collate([resumed[key]]))


def test_an_index_beyond_the_videos_is_another_clip_of_one(video_set):
    clips = small_clips(video_set)
    first, second = clips[0, 1], clips[0, np.int64(7)]               # of 6 videos
    assert first["index"] == second["index"] == 1
    assert not torch.equal(first["video"], second["video"])
    assert torch.equal(second["video"], clips[0, 7]["video"])        # whose integer it is plays no part


def test_evaluation_is_fixed_and_keeps_shapes(video_set):
    clips, other = [small_clips(video_set, seed=seed, train=False) for seed in (1, 2)]
    for index in (1, 4):
        assert torch.equal(clips[0, index]["video"], other[7, index]["video"])
    broken = clips[0, 4]
    assert broken["video"].shape == (1, 3, 4, 32, 32)
    assert not broken["video"].any()
    assert broken["index"] == broken["label"] == -1
    assert len(broken["bad"]) == 1
    assert (clips[0, 5]["index"], clips[0, 5]["label"]) == (5, 1)


def test_views_of_an_evaluation_are_spread_over_time_and_place(video_set):
    several = small_clips(video_set, train=False, views=(3, 3))[0, 1]["video"]
    alone = small_clips(video_set, train=False)[0, 1]["video"]
    # First, middle and last: of 30 frames a clip takes 7, of a width of 128 a crop takes 96.
    for view, (start, x) in zip(several, product((0, 12, 23), (0, 16, 32)), strict=True):
        clip = read_clip(video_set / "left/1 ü.mp4", 4, 2, start, (x, 0, H, H), 32)
        assert torch.equal(view.transpose(0, 1), clip)
    assert torch.equal(alone[0], several[4])


def test_the_sampler_covers_each_epoch_once_over_the_ranks():
    batches = [list(EpochSampler(23, 2, rank=rank, world=2, seed=3, stop=10)) for rank in range(2)]
    one = list(EpochSampler(23, 4, seed=3, stop=10))
    orders = []
    for epoch in range(2):                       # of five steps
        epochs, order = zip(*sum(one[epoch * 5:(epoch + 1) * 5], []))
        assert set(epochs) == {epoch}
        assert len(set(order)) == 20
        orders.append(order)
    assert orders[0] != orders[1]
    assert [a + b for a, b in zip(*batches)] == one
    assert list(EpochSampler(23, 4, seed=3, start=7, stop=10)) == one[7:]
    assert list(EpochSampler(23, 8, repeats=2, seed=3, stop=2))[1] == one[1]
    assert EpochSampler(23, 4, accumulate=2).steps_per_epoch == 4
    for batch in EpochSampler(3, 8, seed=0, stop=2):            # more clips of each fill the batch
        assert len(set(batch)) == 8
        assert {i % 3 for _, i in batch} == {0, 1, 2}


def test_frame_numbers_at_a_stride_start_anywhere_in_the_video():
    assert frame_numbers(100, 4, 10, 0.5) == [35, 45, 55, 65]
    places = torch.rand(4000, generator=seeded(0))
    drawn = [frame_numbers(100, 4, 10, place)[0] for place in [0, 1, *places.tolist()]]
    assert drawn[:2] == [0, 69]
    assert set(drawn) == set(range(70))
    assert abs(np.mean(drawn) - 34.5) < 1.5
    assert frame_numbers(10, 4, 10, 0.9)[0] == 0  # a short video starts at 0


def test_frame_numbers_at_stride_0_are_one_of_each_part():
    assert frame_numbers(160, 16, 0) == list(range(5, 160, 10))  # the middles of sixteen parts
    jitter = frame_numbers(160, 16, 0, torch.rand(16, generator=seeded(0)))
    assert [n // 10 for n in jitter] == list(range(16))
    assert len({n % 10 for n in jitter}) > 4
    assert frame_numbers(4, 8, 0) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_crops_are_the_recipes():
    crops = {data.draw_multi_scale(seeded(i))(340, 256) for i in range(2000)}
    sides = (256, 224, 192, 168)                 # shares of the short side: 1, 0.875, 0.75, 0.66
    shapes = {(a, b) for a in sides for b in sides if abs(a - b) <= 32}                # equal, or neighbours
    places = {(29 * a, 8 * b) for a in range(5) for b in range(5) if a % 2 == b % 2}  # of 224 x 224
    assert {(w, h) for _, _, w, h in crops} == shapes
    assert {(x, y) for x, y, w, h in crops if w == h == 224} == places
    # 8 to 100% of the area, aspect 3/4 to 4/3, anywhere.
    x, y, w, h = np.array([data.draw_resized(seeded(i))(340, 256) for i in range(1000)]).T
    area, aspect = w * h / (340 * 256), np.log(w / h) / np.log(4 / 3)
    assert 0.07 < area.min() < 0.1 < 0.4 < area.mean() < 0.56 < 0.85 < area.max()
    assert -1.05 < aspect.min() < -0.9 < 0.9 < aspect.max() < 1.05
    assert x.min() == y.min() == 0
    assert (x + w).max() > 335
    assert (y + h).max() > 250


@parametrize("draw", [data.draw_multi_scale, data.draw_resized])
@parametrize("width, height", [(340, 256), (16, 1), (1, 16), (3, 3), (4000, 31), (31, 4000)])
def test_crops_of_odd_pictures_lie_inside(draw, width, height):
    for i in range(60):
        x, y, w, h = draw(seeded(i))(width, height)
        assert 0 <= x < x + w <= width
        assert 0 <= y < y + h <= height


def davis_frame(root, name, t, picture, mask):
    """Writes frame t of a video and its mask into folders like DAVIS's -> the path of the frame."""
    paths = root / "JPEGImages/480p" / name / f"{t:05}.jpg", root / "Annotations/480p" / name / f"{t:05}.png"
    for path, image in zip(paths, (picture, mask)):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return paths[0]


def test_masks_of_both_davis_and_what_cannot_be_read(tmp_path):
    """DAVIS 2017 numbers its objects, 255 is ignored; in DAVIS 2016 255 is the object."""
    # "border" is "binary" with a row of 1 in a frame outside of the clip: so it is 2017. The last two fail.
    expected = {"alpha": [0, 1], "binary": [0, 1], "border": [-1, 0], "coloured": [-1], "torn": [-1]}
    for name, t in product(expected, range(3)):
        numbers = np.zeros((20, 30), np.uint8)
        numbers[5:10] = 255
        if name == "border" and t == 0:
            numbers[12] = 1                      # the clip has frames 1 and 2
        image = Image.fromarray(RAMP if name == "coloured" else numbers)
        if name == "alpha":
            image = image.convert("LA")
        picture = davis_frame(tmp_path, name, t, Image.fromarray(RAMP), image)
        if name == "torn":
            picture.write_bytes(picture.read_bytes()[:500])
    for kind in ("JPEGImages", "Annotations"):
        shutil.copytree(tmp_path / kind / "480p", tmp_path / kind / "Full-Resolution")
    scenes = data.Scenes(tmp_path, frames=2, size=32)
    items = list(data.load(scenes, [[(0, i)] for i in range(len(scenes))]))
    assert [item["truth"].unique().tolist() for item in items] == list(expected.values())   # 480p is taken
    assert [item["index"].item() for item in items] == [0, 1, 2, -1, -1]
    assert [Path(path).name for item in items for path, _ in item["bad"]] == ["coloured", "torn"]


def test_normalize():
    video = torch.randint(0, 256, (2, 3, 4, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1, 1)
    expected = (video.double() / 255 - mean) / std
    assert_close(data.normalize(video), expected.float(), atol=1e-5, rtol=0)


# ============ data.py: workers ============
class Misbehaving(torch.utils.data.Dataset):
    """Data set of the numbers 0, 1, ...; {number: deed} says how reading one of them misbehaves. Reading may
    take 0.5 s, and twice that when it is tried again; in these tests the loader looks every 0.25 s."""
    def __init__(self, deeds):
        self.deeds = deeds
        self.bad = {}

    def __getitem__(self, key):
        number = key[1]
        deed = self.deeds.get(number)
        try:
            with data.announced(self, number, limit=0.5):  # in here it counts as reading
                self.read(deed)
        except VideoError as error:
            return f"{number}: {error}"
        if deed == "bug":
            raise OSError("a bug of\nthe user's")
        if deed == "think":                      # slow, but not at reading
            time.sleep(1)
        if deed == "unsendable":
            return lambda: None
        return number

    def read(self, deed):
        if deed == "hang":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
            time.sleep(1000)
        elif deed == "slow":
            time.sleep(0.75)
        elif deed == "exit":                     # as a worker that cannot even start
            os._exit(1)
        elif deed in ("SIGSEGV", "SIGKILL"):
            os.kill(os.getpid(), getattr(signal, deed))


@pytest.fixture
def watchful(monkeypatch):
    """The loader looks after its workers more often."""
    monkeypatch.setattr(data, "WATCH_SECONDS", 0.25)


def test_videos_that_take_their_workers_along_are_left_out(watchful):
    dataset, sampler = Misbehaving({2: "SIGSEGV", 5: "hang"}), EpochSampler(8, 2, stop=4)
    order = [[number for _, number in batch] for batch in sampler]
    batches = list(data.load(dataset, sampler, workers=2, collate=list, prefetch=1))
    assert len(dataset.bad) == 2
    assert "crashed" in dataset.bad[2]
    assert "hung" in dataset.bad[5]
    bad = {number: f"{number}: {reason}" for number, reason in dataset.bad.items()}
    assert batches == [[bad.get(n, n) for n in batch] for batch in order]


def load_three(deeds):
    """The items of a data set of three, which a worker makes one by one, and its unreadable numbers."""
    dataset = Misbehaving(deeds)
    return list(data.load(dataset, [[(0, n)] for n in range(3)], 1, collate=list)), dataset.bad


def test_slow_is_not_hung(watchful, monkeypatch):
    assert load_three({1: "slow"}) == ([[0], [1], [2]], {})
    batches = data.load(Misbehaving({2: "think"}), [[(0, 1)], [(0, 2)]], 1, collate=list)
    assert next(batches) == [1]                  # its worker has started
    monkeypatch.setattr(data, "IDLE_SECONDS", 0.75)
    assert next(batches) == [2]


@parametrize("deeds, idle, message", [
    ({2: "SIGKILL"}, 60, "code -9.*memory"), ({2: "exit"}, 60, "code 1.*__main__"),
    ({2: "unsendable"}, 1, "no batch"), ({0: "SIGSEGV", 1: "SIGSEGV"}, 60, "2 times in a row"),
])
def test_worker_errors_that_no_video_causes_are_one_line(deeds, idle, message, watchful, monkeypatch):
    monkeypatch.setattr(data, "IDLE_SECONDS", idle)
    monkeypatch.setattr(data, "ATTEMPTS", 2)
    with raises(data.WorkerError, match=rf"^[^\n]*{message}[^\n]*$"):
        list(data.load(Misbehaving(deeds), [[(0, 0), (0, 1), (0, 2)]], 1, collate=list))


def test_a_lost_fork_server_is_one_line(watchful, monkeypatch):
    """A signal to all processes may have ended it. The DataLoader then raises this when it starts workers."""
    ended = mock.MagicMock(**{"return_value.__iter__.side_effect": EOFError("Caught\nwhy\n")})
    monkeypatch.setattr(data, "DataLoader", ended)
    with raises(data.WorkerError, match="^workers are lost: try again, .*: Caught why$"):
        load_three({})


def test_an_error_of_the_users_own_stays_itself():
    with raises(OSError, match="line .*in __getitem__(.|\n)*a bug of"):
        load_three({1: "bug"})


def train_on(source, pipe):
    """Reads batches until it is killed, and sends its workers' numbers at each."""
    multiprocessing.set_forkserver_preload(["data"])  # without torchvision, whose import takes long
    clips = small_clips(source)
    with mock.patch.object(data, "preload_workers"):
        for _ in data.load(clips, EpochSampler(len(clips), 2), workers=2):
            pipe.send([worker.pid for worker in multiprocessing.active_children()])


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_workers_end_with_the_training_process(video_set):
    """Workers ignore a Ctrl-C, which reaches them, too: the training process decides what it means."""
    here, there = multiprocessing.Pipe()
    process = FORKED.Process(target=train_on, args=(video_set, there))
    process.start()
    try:
        for _ in range(2):  # a batch of each worker, so that both are at work
            assert here.poll(60)
            workers = here.recv()
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker, signal.SIGINT)
        time.sleep(0.5)
        assert all(map(alive, workers))
    finally:
        process.kill()
    deadline = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))


# A program for test_it_works_where_only_spawn_starts_processes, below. It takes away what only Unix has.
SPAWN_ONLY = """
import ctypes
import multiprocessing
import os
import signal
import sys

import torch.optim  # whatever PyTorch itself wants of a Unix it finds before that is gone


def library(name, *more, real=ctypes.CDLL, **options):
    return real(name, *more, **options) if name else len(name)  # len(None) is a TypeError, as on Windows


for name in "fork forkpty sched_getaffinity mkfifo setsid killpg".split():
    delattr(os, name)
for name in "SIGALRM SIGBUS SIGKILL SIGHUP SIGUSR1 alarm setitimer".split():
    delattr(signal, name)
sys.modules["resource"] = sys.modules["fcntl"] = None
multiprocessing.get_all_start_methods = lambda: ["spawn"]
ctypes.CDLL = library
import data
import train

if __name__ == "__main__":
    print(data.START_METHOD)
    train.main(sys.argv[1:])
"""


# ============ data.py: prepare, demo, command line ============
@pytest.fixture
def data_main(monkeypatch, capfd):
    """data_main("prepare", ...) -> exit code (or a text, which is code 1), standard output, and error."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
        code = 0
        try:
            data.main()
        except SystemExit as stop:
            code = stop.code
        output, errors = capfd.readouterr()
        assert "Traceback" not in errors
        return code, output, errors
    return run


def test_prepare_keeps_a_folder_and_names_what_it_leaves_out(video_set, video_file, tmp_path, data_main):
    """Left out are an unreadable, a cut and a too long named video. Run again, it makes what is missing."""
    source, target = tmp_path / "old", tmp_path / "new"
    shutil.copytree(video_set, source)
    (source / "empty").mkdir()                   # is a class all the same
    shutil.copy(video_file("opengop.ts"), source / "left" / ("a" * 252 + ".ts"))
    content = video_file("flat.mp4").read_bytes()
    (source / "right/cut.mp4").write_bytes(content[:len(content) * 2 // 3])
    part = target / "left/0 ü.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"another machine is at it")
    code, _, errors = data_main("prepare", source, target, "--gop", 8, "--workers", 2)
    assert "3 unreadable" in code
    assert "%" not in errors                     # where there is no terminal, there is no progress bar
    lost = (target / "unreadable.txt").read_text().splitlines()
    for line, words in zip(lost, ("File name too long", "4 ü.mp4: ", "cut.mp4: "), strict=True):
        assert words in line
    assert list(target.rglob("*.part")) == [part]
    names = ["left/0 ü.mp4", "left/1 ü.mp4", "left/2 ü.mp4", "right/3 ü.mp4", "right/5 ü.mp4"]
    assert video_found(target) == (names, [1, 1, 1, 2, 2], ["empty", "left", "right"])
    assert read_numbers(target / names[3], 10, 3, 0) == list(range(0, 30, 3))
    keys = [packet.is_keyframe for packet in packets_of(target / names[3])]
    assert np.diff(np.flatnonzero(keys)).max() == 8
    made = {name: os.stat(target / name).st_mtime_ns for name in names}
    os.remove(target / names[0])
    data_main("prepare", source, target, "--workers", 1)
    assert [name for name in names if os.stat(target / name).st_mtime_ns != made[name]] == names[:1]


def test_a_full_disk_ends_prepare_and_blames_no_video(video_set, tmp_path):
    with mock.patch.object(data, "reencode", side_effect=OSError(errno.EDQUOT, "x")), raises(OSError):
        data.prepare(video_set, tmp_path / "new", workers=0)


def test_prepare_refuses_what_makes_no_sense(tmp_path, data_main):
    old, new = tmp_path / "old", tmp_path / "new"
    make_empty_files(tmp_path, "old/a.mp4")
    for arguments in ((old, old / "inside"), (tmp_path / "absent", new), (old, new, "--gop", 0)):
        code, _, errors = data_main("prepare", *arguments)
        assert code == 2
        assert "data.py: error: " in errors


def test_prepare_keeps_a_lists_labels_and_times_and_leaves_damage_out(video_file, tmp_path, data_main):
    content = bytearray(video_file("hevc.mov").read_bytes())
    at = content.index(b"mdat") + 15000
    content[at:at + 500] = b"\xff" * 500
    (tmp_path / "damaged.mov").write_bytes(content)
    video_turned(tmp_path / "vfr.mp4", "90")     # vfr.mkv would become an .mp4 of the same name
    for name in ("vfr.mkv", "h264.avi"):
        (tmp_path / name).symlink_to(video_file(name))
    sources = [tmp_path / name for name in ("vfr.mkv", "h264.avi", "vfr.mp4", "damaged.mov")]
    path, target = tmp_path / "lists/train.csv", tmp_path / "new"
    path.parent.mkdir()
    path.write_text("".join(f"../{source.name},{i}\n" for i, source in enumerate(sources)) + "../vfr.mkv 0\n")
    assert "1 unreadable" in data_main("prepare", path, target, "--short-side", 64, "--workers", 1)[0]
    videos = find_videos(target / "train.csv")
    assert videos.labels.tolist() == [0, 1, 2, 0]  # a line that repeats is kept
    assert len(list(target.rglob("*.m*"))) == 3
    for i, source in enumerate(sources[:3]):
        old, new = video_decode(source), video_decode(videos.path(i))
        assert len(old) == len(new)
        assert min(new[0].width, new[0].height) == 64
        a, b = [read_clip(path, 3, 1, 1, size=64).float() for path in (source, videos.path(i))]
        assert (a - b).abs().mean() < 12
        if source.suffix == ".mkv":              # its frames come at uneven times
            assert np.allclose([frame.time for frame in old], [frame.time for frame in new], atol=1e-3)
        if source.suffix == ".mp4":              # it is turned: as decoded it is higher than wide
            assert new[0].width > new[0].height
    assert "must lie outside" in data_main("prepare", path, tmp_path)[2]  # it would write over vfr.mp4


def test_the_demo_is_the_same_for_a_seed(tmp_path, monkeypatch):
    """Two at once fill folder a, in which an earlier one was stopped at its first mask."""
    monkeypatch.setattr(data, "DEMO_TRAIN", 1)
    monkeypatch.setattr(data, "DEMO_VAL", 1)
    monkeypatch.setattr(data, "DEMO_TEXTURES", ("dots",))  # four classes stand for all
    with mock.patch.object(Image, "fromarray", side_effect=OSError("stopped")), raises(OSError):
        write_demo(tmp_path / "a", 0)
    with ThreadPoolExecutor() as pool:
        list(pool.map(write_demo, map(tmp_path.joinpath, "aabc"), [0, 0, 0, 1]))
    a, b, c = [{path.relative_to(root): path.read_bytes() for path in root.rglob("*.[jmp]*")}
               for root in map(tmp_path.joinpath, "abc")]
    assert len(a) == 2 * 4 + 4 * 24 * 2          # train and val; frames and masks
    assert a == b
    assert not any(a[path] == c[path] for path in a if path.suffix == ".mp4")
    with raises(ValueError, match="not the demo of seed 1"):
        write_demo(tmp_path / "a", 1)
    # The object has a texture; the background is smoother.
    picture = np.array(Image.open(tmp_path / "a/davis/JPEGImages/dots-back-00/00002.jpg")).mean(-1)
    mask = np.array(Image.open(tmp_path / "a/davis/Annotations/dots-back-00/00002.png"))
    steps = np.abs(np.gradient(picture, axis=1))
    assert steps[mask == 1].mean() > 2 * steps[mask == 0].mean()


# ============ train.py: pretraining ============
# Most runs are made by run_here, in this process. Where signals, several processes or an exit code matter, a
# run is Apart: in processes that are forked, so that they import nothing anew.

RUN = ("--size tiny --frames 4 --image-size 32 --batch-size 4 --prototypes 8 --mask-ratio 0.75 --stride 1 "
       "--epochs 6 --warmup-epochs 1 --lr 0.05 --eval-every 2 --workers 0 --precision fp32").split()
SAVING = ["--save-minutes", "0.00001"]           # a checkpoint after every step
COLOURS = {"blue": (20, 20, 240), "red": (240, 20, 20)}


def disc(colour, seed):
    """A disc of a colour on grey, moving: frames [6, 40, 72, 3] and masks [6, 40, 72]."""
    random = default_rng(seed)
    y, x = np.mgrid[:40, :72]
    masks = np.stack([np.hypot(x - 14 - 3 * t, y - 18 - random.integers(3)) < 11 for t in range(6)])
    grey = random.integers(80, 120, (6, 40, 72, 1), np.uint8)
    return np.where(masks[..., None], np.uint8(COLOURS[colour]), grey), masks.astype(np.uint8)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Two classes of four videos, also in DAVIS's layout, and a tiny checkpoint."""
    root = tmp_path_factory.mktemp("world")
    for seed, (name, n) in enumerate(product(COLOURS, range(4))):
        frames, masks = disc(name, seed)
        video_write(root / "videos" / name / f"{n}.mp4", pictures=frames)
        numbers = 5 * masks                      # the disc is object 5, though there is no object 1 to 4
        numbers[:, 0] = 255                      # the first row does not count
        for t in range(6):
            mask = Image.fromarray(numbers[t]).convert("P")
            if name == "blue":
                mask = Image.fromarray(numbers[t].astype(np.uint16))
            davis_frame(root / "davis", f"{name}{n}", t, Image.fromarray(frames[t]), mask)
    (root / "davis/Annotations/480p/blue0/00000.png").unlink()                       # its frame is skipped
    # DAVIS-2017 lists videos, and 2016 the paths of frames and masks.
    for folder, words in (("2017", "blue0"), ("480p", "/JPEGImages/480p/red1/00000.jpg /x/red1/00000.png")):
        (root / "davis/ImageSets" / folder).mkdir(parents=True)
        (root / "davis/ImageSets" / folder / "val.txt").write_text(words)
    (root / "third.txt").write_text("videos/red/0.mp4 2\n")
    args = dict(size="tiny", target="mlp", loss="sigma", frames=4, image_size=32, stride=1, prototypes=12)
    torch.save({"model": tiny().state_dict(), "step": 7, "args": args}, root / "ours.pt")
    return root


@pytest.fixture(scope="session")
def videos(world):
    return world / "videos"


def eval_flags(videos):
    return ["--data", videos, "--val", videos, "--frames", 4, "--image-size", 32, "--stride", 1]


def main_here(*arguments, pictures=False):
    """train.main in this process: on the CPU also where there is a GPU; gives back the signals it takes.

    To make its pictures takes longer than most runs here: few tests ask for them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "stream", None)    # not even asked for: without CUDA it fails on a Mac
        if not pictures:
            for name in ("preview", "prototype_sheet", "save_segments"):
                patch.setattr(train, name, mock.Mock())
        try:
            train.main(["--workers", "0", "--precision", "fp32", *map(str, arguments)])
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def run_flags(videos, out, *flags):
    return ["--data", videos, "--out", out, *RUN, *flags]


def run_here(videos, out, *flags, **named):
    """A pretraining run by main_here -> its log."""
    main_here(*run_flags(videos, out, *flags), **named)
    return read_log(out)


class Apart:
    """train.main in processes of its own, which share a process group as torchrun would describe it.

    They run while the test goes on: it can wait for lines of their log, send them signals, and at last `end`
    them. world: how many. start: what they call instead of train.main. environ: more variables for them.
    All but the first fail where they would write a checkpoint or curve.png."""
    def __init__(self, *arguments, world=1, start=main_here, environ=()):
        with socket.create_server(("127.0.0.1", 0)) as server:                     # finds a port that is free
            port = str(server.getsockname()[1])
        with tempfile.NamedTemporaryFile(delete=False) as file:
            self.said = Path(file.name)  # what they print, together
        self.ranks = []  # their processes
        for rank in range(world):
            variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank),
                         "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                         "CUDA_VISIBLE_DEVICES": "", **dict(environ)}
            process = FORKED.Process(target=self.work, args=(self.said, variables, start, arguments))
            STARTED.append(process)  # before it starts, or a test could take it for a worker of its own run
            process.start()
            self.ranks.append(process)

    @staticmethod
    def work(said, variables, start, arguments):
        """Runs in each of these processes."""
        output = os.open(said, os.O_WRONLY | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(variables)
        if train.rank():
            train.replace_file = None
        start(*map(str, arguments))

    def send(self, signum):
        for rank in self.ranks:
            os.kill(rank.pid, signum)

    def wait(self, out, lines):
        """Returns when the log in `out` has so many lines."""
        path = out / "log.jsonl"
        deadline = time.monotonic() + 60
        while not path.exists() or path.read_bytes().count(b"\n") < lines:
            assert all(rank.is_alive() for rank in self.ranks), self.said.read_text()
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.01)

    def end(self, code=0):
        """Waits until they have ended, all with this exit code -> what they printed."""
        for rank in self.ranks:
            rank.join(120)
        output = self.said.read_text()
        assert {rank.exitcode for rank in self.ranks} == {code}, output
        self.said.unlink()
        return output


def torchrun(*arguments):
    """What the command torchrun calls, for two processes."""
    from torch.distributed import run
    run.main(["--standalone", "--nproc-per-node=2", *arguments])


def refused(capsys, code, start, *arguments):
    """start(…) must end with this exit code and one line of error -> the line."""
    capsys.readouterr()
    with raises(SystemExit) as stopped:
        start(*arguments)
    line, = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == code, line
    assert line.startswith("train.py: error: ")
    return line


def saved_step(out):
    return load_checkpoint(out / "checkpoint.pt")["step"]


def read_log(out, runs=False):
    """The objects of log.jsonl: with `runs` those that describe a run, otherwise all others."""
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record["run"] if runs else record for record in records if ("run" in record) == runs]


def losses(log):
    """{step: loss} of a log. Fails where a step stands twice."""
    found = {record["step"]: record["loss"] for record in log if "loss" in record}
    assert len(found) == sum("loss" in record for record in log), "a step is logged twice"
    return found


def same_run(out, other):
    """Two runs have the same weights and the same log, bit for bit.

    The log's times are left out, and fine-tuning's tests: a run in two parts has one more, between them."""
    times = {"clips_per_second", "data_wait"}
    logs = [[{name: record[name] for name in record.keys() - times} for record in read_log(folder)
             if record.get("eval") != "finetune"] for folder in (out, other)]
    assert logs[0] == logs[1]
    weights = [load_checkpoint(folder / "checkpoint.pt")["model"] for folder in (out, other)]
    assert_close(*weights, rtol=0, atol=0)


@pytest.fixture(scope="session")
def whole(videos, tmp_path_factory):
    """An uninterrupted run of 6 epochs of 2 steps, for tests to read: folder, what it printed, log."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with redirect_stdout(io.StringIO()) as said:
        log = run_here(videos, out, "--val", videos, "--keep-every", 4, pictures=True)
    return SimpleNamespace(out=out, said=said.getvalue(), log=log)


@beside
def test_it_works_where_only_spawn_starts_processes(tmp_path, video_set):
    (tmp_path / "script.py").write_text(SPAWN_ONLY)
    flags = run_flags(video_set, tmp_path / "run", "--steps", "2", "--workers", "1")
    done = subprocess.run([sys.executable, tmp_path / "script.py", *map(str, flags)], capture_output=True,
                          text=True, timeout=300, env={**ONE_THREAD, "PYTHONPATH": str(HERE)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("spawn")
    assert not done.stderr
    assert (tmp_path / "run/checkpoint.pt").exists()


@beside
def test_a_mistake_under_torchrun_is_its_last_word(tmp_path, videos):
    """Without a network DINO cannot be had: one line says so, and again where torchrun's report ends."""
    environ = {"TORCH_HOME": str(tmp_path / "hub"), "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    flags = run_flags(videos, tmp_path, "--target", "dino", "--teacher", "vits16")
    output = Apart(HERE / "train.py", *flags, start=torchrun, environ=environ).end(1)
    lines = output.strip().splitlines()
    line, = (line for line in lines if line.startswith("train.py: error: "))
    assert "--dino-weights" in line
    assert lines[-2].endswith(line)
    assert "train.py\", line" not in output


def unlike(*flags):
    main_here(*flags, "--steps", 2 + train.rank())


@beside
def test_processes_that_differ_in_their_flags_are_told_so(tmp_path, videos):
    assert "processes differ in flags" in Apart(*run_flags(videos, tmp_path), world=2, start=unlike).end(2)


@beside
def test_killed_twice_it_goes_on_from_the_last_checkpoint(tmp_path, whole, videos):
    """Meanwhile a second run in the folder is refused; that a killed run held it is no obstacle."""
    flags = run_flags(videos, tmp_path, "--val", videos, *SAVING)
    for lines in (4, 9):
        run = Apart(*flags)
        run.wait(tmp_path, lines)
        run.send(signal.SIGSTOP)
        last = Apart(*flags).end(2).splitlines()[-1]
        assert last.startswith("train.py: error: another run is writing to --out")
        run.send(signal.SIGKILL)                 # nothing can be tidied up
        run.end(-signal.SIGKILL)
        saved_step(tmp_path)                     # the checkpoint can be read: it is never torn
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 1.')    # as a kill inside a write leaves it
    Apart(*flags).end()
    same_run(tmp_path, whole.out)


STILL_AT_WORK = """
import runpy
import train

def close(bar):  # replaces tqdm.close, which is called at the run's end: leaves work for gloo's threads
    for _ in range(1000):
        train.dist.all_reduce(train.torch.zeros(10_000), async_op=True)


if __name__ == "__main__":
    train.tqdm.close = close
    runpy.run_path(train.__file__, run_name="__main__")
"""


@beside
def test_two_processes_stop_and_resume_together(tmp_path, whole, videos):
    """Their run is that of one process with the whole batch, up to rounding. gloo's threads, busy until the
    exit, crash no rank."""
    straight, stopped = [run_flags(videos, tmp_path / name, "--val", videos, "--batch-size", 2)
                         for name in ("straight", "stopped")]
    stopping = Apart(*stopped, *SAVING, world=2)
    stopping.wait(tmp_path / "stopped", 3)
    stopping.send(signal.SIGINT)
    output = stopping.end(128 + signal.SIGINT)
    step = saved_step(tmp_path / "stopped")
    assert step < 12
    assert f"stopped after step {step}; the same command goes on" in output
    script = tmp_path / "script.py"
    script.write_text(STILL_AT_WORK)
    Apart(script, *stopped, start=torchrun, environ={"PYTHONPATH": str(HERE)}).end()
    Apart(*straight, world=2).end()
    same_run(tmp_path / "stopped", tmp_path / "straight")
    halves = read_log(tmp_path / "straight")     # its first five lines are k-NN's and those of steps 1 to 4
    assert losses(halves[:5]) == approx(losses(whole.log[:5]), rel=1e-3)


def on_a_full_disk(*arguments):
    """train.main, where no file grows beyond a megabyte: the checkpoint is larger, log lines are not."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    main_here(*arguments)


@beside
def test_disk_full_keeps_the_last_good_checkpoint(tmp_path, videos):
    flags = run_flags(videos, tmp_path, *SAVING, "--steps")
    steps = list(range(1, 7))
    Apart(*flags, 2).end()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    output = Apart(*flags, 6, start=on_a_full_disk).end(1)
    assert "could not be written" in output
    assert "make room" in output
    assert "Traceback" not in output
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not (tmp_path / "checkpoint.pt.part").exists()
    assert list(losses(read_log(tmp_path))) == steps                          # training went on
    Apart(*flags, 6).end()                       # room again: the same command
    assert saved_step(tmp_path) == 6
    assert list(losses(read_log(tmp_path))) == steps


def test_the_demo_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEMO_TEXTURES", ("upright", "dots"))
    monkeypatch.setattr(data, "DEMO_TRAIN", 1)
    monkeypatch.setattr(data, "DEMO_VAL", 1)
    main_here("--steps", 2, "--batch-size", 8)
    out = tmp_path / "runs/demo"
    assert [record["step"] for record in read_log(out) if record.get("eval") == "knn"] == [0, 2]
    assert saved_step(out) == 2
    assert (out / "videos").is_dir()


def test_a_run_leaves_what_the_interface_says(whole):
    log, out, steps = whole.log, whole.out, [record for record in whole.log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 13))
    peak, floor = 0.05 * 4 / 256, 1e-5 * 4 / 256
    run, = read_log(out, runs=True)
    assert (out / "log.jsonl").read_text().startswith('{"run": ')
    parameters = sum(p.numel() for p in tiny(num_prototypes=8).parameters())
    expected = {"lr": 0.05, "torch": torch.__version__, "device": "cpu", "parameters": parameters}
    assert expected.items() <= run.items()
    for i, record in enumerate(steps):
        assert {"clips_per_second", "data_wait", "agreement", "perplexity", "spread", "grad_norm",
                "peak_gpu_gib"} <= set(record)
        assert record["epoch"] == i // 2
        assert record["loss"] == approx(record["loss_video"] + record["loss_projection"], rel=1e-5)
        cosine = (1 + math.cos(math.pi * (i - 2) / 10)) / 2
        rate = peak * i / 2 if i < 2 else floor + (peak - floor) * cosine
        assert record["lr"] == approx(rate, rel=1e-6)
    assert [record["step"] for record in log if record.get("eval") == "knn"] == [0, 4, 8, 12]
    news = re.findall(r"(?m)^epoch (\d)/6  loss ([\d.]+)  agreement [\d.]+  perplexity [\d.]+  spread [\d.]+"
                      r"  [\d.]+ clips/s  waiting for data \d+%  ETA 00:\d\d$", whole.said)
    means = [(steps[i]["loss"] + steps[i + 1]["loss"]) / 2 for i in range(0, 12, 2)]
    assert news == [(f"{i}", f"{mean:.3f}") for i, mean in enumerate(means, 1)]
    for name in ("preview.png", "curve.png", "prototypes.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 200
            assert len(picture.getcolors(1_000_000)) > 20
    with Image.open(out / "preview.gif") as moving:
        assert moving.n_frames == 4
    assert saved_step(out) == 12
    assert load_checkpoint(out / "checkpoint-0004.pt")["step"] == 8


@pytest.fixture
def meddle(monkeypatch):
    """meddle(change): SIGMA.forward returns change(its n-th call, loss, stats) instead."""
    def start(change):
        forward = SIGMA.forward
        counter = count(1)

        def changed(self, video, mask):
            return change(next(counter), *forward(self, video, mask))
        monkeypatch.setattr(SIGMA, "forward", changed)
    return start


def test_the_gradient_norm_is_that_of_the_whole_step(videos, tmp_path, monkeypatch, meddle):
    """It is checked against the unscaled gradients that AdamW gets after both micro-batches, and against
    those of one batch: pixels, unlike Sinkhorn, do not ask what else is in it."""
    by_hand = []
    precisions = set()                           # in the forward passes
    step = torch.optim.AdamW.step

    def look(optimizer, *more, **named):
        norms = [p.grad.double().norm() for group in optimizer.param_groups for p in group["params"]]
        by_hand.append(math.hypot(*norms))
        return step(optimizer, *more, **named)
    def watch(call, loss, stats):
        precisions.add(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return loss, stats
    monkeypatch.setattr(torch.optim.AdamW, "step", look)
    meddle(watch)
    of_first_steps = []
    for flags, dtype in (("--batch-size 2 --accumulate 2", False), ("--precision bf16", torch.bfloat16),
                         ("--batch-size 2 --accumulate 2 --precision fp16", torch.float16)):
        by_hand.clear()
        precisions.clear()
        log = run_here(videos, tmp_path / flags, "--target", "pixel", "--steps", 3, *flags.split())
        assert [record["grad_norm"] for record in log] == approx(by_hand, rel=1e-4)
        assert precisions == {dtype}
        of_first_steps.append(by_hand[0])
    assert of_first_steps == approx(3 * [of_first_steps[0]], rel=0.05)


def test_a_signal_that_ends_the_workers_too_is_no_workers_fault(videos, tmp_path, capsys, monkeypatch):
    """It is torchrun's SIGTERM, during an evaluation."""
    def video_features(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise data.WorkerError("a worker has ended (signal 15)")
    monkeypatch.setattr(train, "video_features", video_features)
    with raises(SystemExit) as stopped:
        run_here(videos, tmp_path, "--val", videos)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "error" not in capsys.readouterr().err


def test_too_little_gpu_memory_is_one_line(videos, tmp_path, capsys, meddle):
    meddle(mock.Mock(side_effect=torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nmore")))
    assert "2.00 GiB" in refused(capsys, 1, run_here, videos, tmp_path)


def test_an_old_log_without_its_checkpoint_is_kept(videos, tmp_path, capsys):
    old = '{"step": 1, "loss": 1}\n'
    (tmp_path / "log.jsonl").write_text(old)
    assert len(run_here(videos, tmp_path, "--steps", 1)) == 1
    kept, = tmp_path.glob("log-*.jsonl")
    assert kept.read_text() == old
    assert "is of no use here" in capsys.readouterr().out


def test_lines_of_the_log_survive_a_lost_folder(videos, tmp_path, meddle):
    """In step 2, of calls 3 and 4, a file stands in the folder's place; from step 3 on the folder is back."""
    out, gone = tmp_path / "run", tmp_path / "gone"

    def move(call, loss, stats):
        if call == 3:
            out.rename(gone)
            out.touch()
        if call == 5:
            out.unlink()
            gone.rename(out)
        return loss, stats
    meddle(move)
    log = run_here(videos, out, "--batch-size", 2, "--accumulate", 2, "--steps", 3)
    assert list(losses(log)) == [1, 2, 3]
    assert [record["epoch"] for record in log] == [0, 0, 1]


def test_a_log_that_was_resumed_twice_keeps_its_lines_in_order(tmp_path, capsys):
    """Memory and file hold the lines before the first beyond the step; the file keeps damaged ones, too."""
    kept = '{"run": {}}\n{"step": 1}\n{"step": 2}\n{"run": {"from_step": 2}}\n{"eval": "knn", "step": 2}\n'
    damaged = '{"step": 2, "lo\n7\n{"step": null}\n'
    path = tmp_path / "log.jsonl"
    path.write_text(damaged + kept + '{"step": 3}\n{"run": {"from_step": 3}}\n{"step": 2}\n')
    log = train.Log(tmp_path, 2)
    assert capsys.readouterr().out.count("damaged line") == 3
    log.write(step=9)
    kept += '{"step": 9}\n'
    assert path.read_text() == damaged + kept
    assert [json.loads(line) for line in kept.splitlines()] == log.records


def spoilt(loss, how):
    """A loss that is not a number, or a finite one whose slope is not finite."""
    if how == "loss":
        return loss * math.nan
    return loss + (loss - loss.detach()).square().sqrt()


@parametrize("how, precision, good, tolerated", [("loss", "fp32", 5, 5), ("gradient", "fp16", 2, 50),
                                                 ("gradient", "fp32", 0, 5)])
def test_a_run_that_is_not_finite_ends(videos, tmp_path, capsys, meddle, how, precision, good, tolerated):
    """The good steps come first, then as many bad ones as are tolerated. Steps 1 and 8 are saved."""
    meddle(lambda call, loss, stats: (spoilt(loss, how) if call > good else loss, stats))
    flags = ["--frames", 2, "--precision", precision, "--batch-size", 2, "--epochs", 20]  # of 4 steps
    line = refused(capsys, 1, run_here, videos, tmp_path, *flags)
    assert "not finite" in line
    assert "checkpoint.pt" in line
    last = read_log(tmp_path)[-1]
    assert last["step"] == good + tolerated
    assert last["skipped"] == tolerated
    assert (last["loss"] is None) == (how == "loss")
    content = load_checkpoint(tmp_path / "checkpoint.pt")
    assert content["step"] > good
    assert all(value.isfinite().all() for value in content["model"].values())


def test_a_single_bad_step_is_left_out(videos, tmp_path, meddle):
    kinds = {2: "loss", 4: "gradient"}
    meddle(lambda call, loss, stats: (spoilt(loss, kinds[call]) if call in kinds else loss, stats))
    run_here(videos, tmp_path, "--steps", 4)
    log = run_here(videos, tmp_path, "--steps", 5)   # the count outlives the process
    assert [record["loss"] is None for record in log] == [False, True, False, False, False]
    assert [record["skipped"] for record in log] == [0, 1, 1, 2, 2]


def test_a_collapse_is_said_once(videos, tmp_path, capsys, meddle):
    """Not in the warm-up, which is the first of these three epochs, of two steps each."""
    meddle(lambda call, loss, stats: (loss, {**stats, "spread": torch.tensor(0.01)}))
    for steps, said in ((2, 0), (6, 1)):
        run_here(videos, tmp_path, "--epochs", 3, "--steps", steps)
        assert capsys.readouterr().out.count("a spread under 0.05") == said


def test_broken_videos_are_named_counted_and_replaced(videos, tmp_path, capsys):
    root = shutil.copytree(videos, tmp_path / "videos with spaces and ü")
    (root / "red/broken one.mp4").write_bytes(b"garbage")
    log = run_here(root, tmp_path / "run", "--epochs", 3, pictures=True)
    said = capsys.readouterr().out
    named, = (record["unreadable"] for record in log if "unreadable" in record)
    assert named.endswith("broken one.mp4")
    assert log[-1]["unreadable_videos"] == 1
    assert said.count("broken one.mp4") == 1
    assert "1 of 9 videos unreadable" in said


def test_a_run_with_hardly_a_good_video_ends(videos, tmp_path, capsys):
    fold = tmp_path / "list.txt"
    fold.write_text(f"{videos}/red/0.mp4\n" * 8 + "absent.mp4\n" * 200)
    assert "in a row failed" in refused(capsys, 1, run_here, fold, tmp_path, "--epochs", 30)
    assert (tmp_path / "checkpoint.pt").exists()
    fold.write_text("absent.mp4\nneither.mp4\n")
    flags = fold, tmp_path / "none", "--workers", 1
    assert "in a row failed; the last: " in refused(capsys, 1, run_here, *flags)


def test_folders_that_do_not_fit_are_refused_and_kept(whole, videos, tmp_path, capsys):
    out = shutil.copytree(whole.out, tmp_path / "run")
    for flags, word in (("--seed 1", "seed was 0, is 1"), ("--prototypes 9", "prototypes was 8, is 9"),
                        ("--batch-size 2", "global_batch was 4, is 2")):
        assert word in refused(capsys, 2, run_here, videos, out, *flags.split())
    path = out / "checkpoint.pt"
    path.write_bytes(b"torn")
    assert str(path) in refused(capsys, 2, run_here, videos, out)
    assert path.read_bytes() == b"torn"
    torch.save({"model": {}}, path)
    assert "does not fit this run" in refused(capsys, 2, run_here, videos, out)


def as_a_list(path, names, labels):
    path.write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels)))
    return path


def test_another_fold_or_corrected_labels_are_another_run(videos, tmp_path, capsys):
    """In one --out another list is refused, of the same length; moved videos or a renamed list are not."""
    names = sorted(str(path.relative_to(videos)) for path in videos.glob("*/*"))
    root = shutil.copytree(videos, tmp_path / "here")
    out, zeros = tmp_path / "run", [0] * 6
    fold = as_a_list(root / "fold.txt", names[:6], zeros)
    log = run_here(fold, out, "--steps", 1)
    for others, labels in ((names[2:], zeros), (names[:6], [0, 0, 0, 0, 0, 1])):
        as_a_list(fold, others, labels)
        line = refused(capsys, 2, run_here, fold, out, "--steps", 1)
        assert "names_and_labels" in line
        assert "another --out" in line
    as_a_list(root / "same.txt", names[:6], zeros)
    moved = root.rename(tmp_path / "there")
    assert run_here(moved / "same.txt", out, "--steps", 1) == log


def test_an_older_versions_checkpoint_that_says_less_is_resumed(whole, videos, tmp_path, capsys):
    """The run is done, so its log stays as it is."""
    out = shutil.copytree(whole.out, tmp_path / "run")
    content = load_checkpoint(out / "checkpoint.pt")
    for name in ("names_and_labels", "initial_weights"):
        del content["args"][name]
    torch.save(content, out / "checkpoint.pt")
    assert run_here(videos, out, "--steps", 3) == whole.log
    assert "does not say names_and_labels" in capsys.readouterr().out


def test_init_takes_what_fits_and_says_what_starts_anew(videos, tmp_path, capsys):
    """The first step's learning rate is 0, so the saved weights are the initial ones."""
    start, out = tmp_path / "start.pt", tmp_path / "run"
    began = {name: value + 0.01 for name, value in tiny(num_prototypes=12).state_dict().items()}
    torch.save({"model": began}, start)
    flags = ["--init", start, "--steps"]
    run_here(videos, out, *flags, 1)
    line, = re.findall(r".*anew start.*", capsys.readouterr().out)
    taken = "decoder, decoder head, encoder, encoder_to_decoder, mask_token, projection network"
    assert line.endswith(f"taken are {taken}; anew start prototypes")                 # 8, not 12
    model = load_checkpoint(out / "checkpoint.pt")["model"]
    for name in began.keys() - {"prototypes"}:
        assert torch.equal(model[name], began[name]), name
    assert "initial_weights" in refused(capsys, 2, run_here, videos, out, "--steps", 2)   # at random
    start.unlink()                               # a resumed run does not need it
    assert losses(run_here(videos, out, *flags, 2))[2]
    _, resumed = read_log(out, runs=True)
    assert resumed["from_step"] == 1

    torch.save({"model": tiny(target="pixel", loss="l2").state_dict()}, start)
    run_here(videos, tmp_path / "pixels", *flags, 1)
    assert "anew start decoder head, projection network, prototypes" in capsys.readouterr().out
    torch.save({"encoder.patch_embed.proj.weight": torch.zeros(384, 3, 2, 16, 16)}, start)
    assert "--size small" in refused(capsys, 2, run_here, videos, tmp_path / "small", *flags, 1)


def without_output(*arguments):
    """train.py as a program whose standard output the shell has closed, by >&-: Python has None for it."""
    import runpy
    os.close(1)
    sys.stdout = None
    sys.argv = ["train.py", *arguments]
    runpy.run_path(train.__file__, run_name="__main__")


@beside
def test_a_closed_standard_output_is_no_obstacle(tmp_path, videos):
    for flags, code in (("--steps 1", 0), ("--eps 0", 2)):
        said = Apart(*run_flags(videos, tmp_path, *flags.split()), start=without_output).end(code)
        assert "Traceback" not in said
    assert losses(read_log(tmp_path))


def test_colours_are_the_three_principal_components():
    """They are taken over all clips together. NumPy's covariance has the same ones, up to their signs."""
    tokens = torch.randn(2, 50, 6, generator=seeded(0)) * torch.tensor([9.0, 5, 3, 1, 1, 1])
    rows = tokens.flatten(0, 1).double().numpy()
    vectors = np.linalg.eigh(np.cov(rows.T))[1]  # in ascending order
    colours = train.principal_colours(tokens).flatten(0, 1).numpy()
    for i in range(3):
        component = (rows - rows.mean(axis=0)) @ vectors[:, -1 - i]
        expected = (63.75 * component / component.std()).clip(-127.5, 127.5)
        found = colours[:, i] - 127.5
        assert np.allclose(found, expected * np.sign(found @ expected), atol=0.5)


def test_compile_reaches_every_block_and_the_loss():
    """DINO's blocks are reached too, though the model's modules do not show them. All shapes are static."""
    model = tiny(**DINO)
    with (mock.patch.object(nn.Module, "compile", autospec=True) as block_compile,
          mock.patch.object(torch, "compile") as function_compile):
        train.over_processes(SimpleNamespace(compile=True), model)
    inside = [*model.encoder.blocks, *model.decoder.blocks, *model.teacher.blocks]
    assert block_compile.call_args_list == [mock.call(block, dynamic=False) for block in inside]
    function_compile.assert_called_once_with(sigma.sigma_loss, dynamic=False)


def handed_to_fit(*arguments):
    """What such a run would train: the model, AdamW's groups and the data set."""
    with mock.patch.object(train, "fit") as fit:
        main_here(*arguments)
    return fit.call_args.args[2:5]


def test_what_the_flags_of_pretraining_say_is_trained(videos, tmp_path):
    flags = "--assignment soft --eps 0.01 --recompute --mask-ratio 0.5 --repeats 2".split()
    model, groups, train_set = handed_to_fit(*run_flags(videos, tmp_path, *flags))
    assert (model.assignment, model.eps, model.encoder.recompute) == ("soft", 0.01, True)
    assert train_set.draw_crop is data.draw_multi_scale
    assert train_set[0, 0]["mask"].sum(dim=1).tolist() == [16, 16]            # of 32 tubes, in two clips
    for group, decay in zip(groups, (0.05, 0.0), strict=True):
        assert group["weight_decay"] == decay
        assert group["betas"] == (0.9, 0.95)
    assert {*groups[1]["params"]} == {
        p for name, p in model.named_parameters() if p.ndim == 1 or name == "mask_token"}


@parametrize("stride", [0, 1])
def test_what_fine_tuning_trains(videos, tmp_path, stride):
    flags = ["--finetune", "none", "--size", "tiny", *eval_flags(videos), "--stride", stride]
    _, groups, train_set = handed_to_fit(*flags, "--out", tmp_path)
    assert train_set.draw_crop is data.draw_resized
    assert ("RandomHorizontalFlip" in str(train_set.transform)) == (stride > 0)
    assert {group["betas"] for group in groups} == {(0.9, 0.999)}


def test_fp16_after_another_precision_starts_at_its_own_scale(videos, tmp_path):
    """At the scale of other precisions, 1, small gradients would underflow to 0."""
    run_here(videos, tmp_path, "--steps", 1)
    last = run_here(videos, tmp_path, "--precision", "fp16", "--steps", 2)[-1]
    assert last["loss_scale"] > 1000
    assert math.isfinite(last["loss"])


NONSENSE = {
    "--frames x": "invalid int", "--frames 15": "multiple of 2",
    "--mask-ratio 1": "--mask-ratio", "--mask-ratio nan": "--mask-ratio", "--size giant": "invalid choice",
    "--eps 0": "--eps", "--lr inf": "--lr", "--workers -1": "--workers", "--repeats 3": "--repeats",
    "--target pixel --loss sigma": "l2", "--out /dev/null/x": "Not a directory",
    "--data no/such/folder": "no folder or list", "--bench --accumulate 2": "--accumulate",
    "--probe nothing.pt": "No such file",
    "--probe ours.pt --data videos/red --val videos": "has no labels",
    "--probe ours.pt --data videos": "--val is missing", "--probe ours.pt --size base": "size tiny",
    "--probe ours.pt --finetune none": "not allowed with",
    "--finetune none --data videos --val videos/red": "has no labels",
    "--finetune none --data videos --val third.txt": "--val has labels that --data lacks",
    "--init nowhere.pth": "No such file", "--finetune none --stride -1": "--stride",
    "--finetune none --val videos --frames 3": "multiple of 2",
    "--segment videos/red/0.mp4 --data videos": "checkpoint",
    "--segment ours.pt --data davis/Annotations": "holds no videos"}


@parametrize("flags", NONSENSE)
def test_nonsense_gives_one_line_and_exit_code_2(world, tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(world)
    assert NONSENSE[flags] in refused(capsys, 2, run_here, "videos", tmp_path / "run", *flags.split())


@parametrize("flags, expected", [
    ("--data x --epochs 16", dict(warmup_epochs=2, lr=1.5e-4, batch_size=32, eval_every=50, size="base")),
    ("", dict(epochs=25, lr=4e-3, size="tiny", eval_every=5, prototypes=64)),
    ("--finetune none --data x", dict(epochs=100, lr=1e-3, warmup_epochs=5)),
    ("--finetune none", dict(epochs=15, size="tiny", image_size=48, lr=1e-2))])
def test_presets(flags, expected):
    """No --data is the demo. With --epochs alone, warm-up is an eighth at most. All else is the paper's."""
    args, _ = train.parse_args(flags.split())
    assert {name: getattr(args, name) for name in expected} == expected


def test_dino_weights_from_a_file_or_one_line_what_to_do(videos, tmp_path, capsys):
    flags = ["--target", "dino", "--teacher", "vits16", "--steps", 1, "--dino-weights"]
    torch.save(tiny(**DINO).teacher.state_dict(), tmp_path / "dino.pth")
    assert losses(run_here(videos, tmp_path / "run", *flags, tmp_path / "dino.pth"))
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("other.pth", "none.pth"):
        line = refused(capsys, 2, run_here, videos, tmp_path / "none", *flags, tmp_path / name)
        assert name in line
        assert "--dino-weights" in line


@parametrize("local_rank, order", [("0", ["load", "gather", "gather"]), ("1", ["gather", "load", "gather"])])
def test_each_process_of_a_machine_loads_dinos_file(monkeypatch, local_rank, order):
    """The first one downloads it, for which the others wait, in `gather`."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    state = nn.Linear(2, 2).state_dict()
    calls = mock.Mock(**{"load.return_value": state, "gather.side_effect": train.gather})
    monkeypatch.setattr(train, "gather", calls.gather)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", calls.load)
    model = SimpleNamespace(teacher=nn.Linear(2, 2))
    train.load_teacher(SimpleNamespace(target="dino", teacher="vits16", dino_weights=None), model)
    assert_close(model.teacher.state_dict(), state)
    assert [name for name, *_ in calls.mock_calls] == order


def test_bench_times_a_step(tmp_path, capsys, monkeypatch):
    """By this clock every forward pass takes half a second."""
    monkeypatch.chdir(tmp_path)
    forward = mock.create_autospec(SIGMA.forward, side_effect=SIGMA.forward)
    monkeypatch.setattr(SIGMA, "forward", forward)
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: forward.call_count / 2))
    main_here("--bench", *RUN, "--steps", 3)
    first, speed = capsys.readouterr().out.strip().splitlines()
    assert "1 x 4 clips of 4 frames" in first
    assert speed.startswith("8.00 clips/s, 500.0 ms a step; ")
    assert not list(tmp_path.iterdir())


def test_runs_without_prototypes_show_other_pictures(videos, tmp_path):
    log = run_here(videos, tmp_path, "--target", "pixel", "--steps", 1, pictures=True)
    assert "spread" not in log[-1]
    assert (tmp_path / "preview.gif").exists()
    assert not (tmp_path / "prototypes.png").exists()


# ============ train.py: weights of checkpoints ============
def classifier(classes):
    return train.Classifier(classes, "tiny", frames=4, image_size=32)


def saved(path, content):
    torch.save(content, path)
    return path


@parametrize("target, loss, teacher", [
    ("mlp", "sigma", "vitb16"), ("dino", "sigma", "vits16"),
    ("pixel", "l2", "vitb16"), ("mlp", "l2", "vitb16")])
def test_authors_files(tmp_path, target, loss, teacher):
    model = SIGMA("small", target, loss, 7, teacher=teacher, frames=2, image_size=32)
    said = argparse.Namespace(lr=1.0, num_frames=8, sampling_rate=2, input_size=112)
    path = saved(tmp_path / "a.pth", {"model": model.state_dict(), "epoch": 799, "args": said})
    args, weights = train.parse_args(["--probe", str(path), "--data", "x"])
    assert (args.size, args.target, args.loss, args.teacher) == ("small", target, loss, teacher)
    assert loss == "l2" or args.prototypes == 7
    assert (args.frames, args.stride, args.image_size) == (8, 2, 112)
    assert train.parse_args(["--segment", str(path)])[0].stride == 1
    assert load_weights(model, weights) == []


def test_videomaes_fine_tuned_files(tmp_path, videos):
    heads, state = ("fc_norm.", "head."), classifier(5).state_dict()
    theirs = {f"backbone.{name.removeprefix('encoder.')}": value for name, value in state.items()}
    path = saved(tmp_path / "mae.pth", {"module": theirs})
    weights = read_weights(path)
    assert weights.settings == {"size": "tiny", "target": "pixel", "loss": "l2"}
    same = classifier(5)
    assert load_weights(same, weights, heads) == []
    assert_close(state, same.state_dict(), rtol=0, atol=0)
    assert load_weights(classifier(6), weights, heads) == ["head.weight", "head.bias"]
    for flag in ("--probe", "--segment"):        # as a frozen encoder, too
        main_here(flag, path, *eval_flags(videos), "--out", tmp_path / flag)


HUGGING_FACE = {  # parts of the released names and of transformers' names, in this order
    "encoder.patch_embed.proj": "videomae.embeddings.patch_embeddings.projection",
    "encoder.blocks": "videomae.encoder.layer", "encoder.norm": "videomae.layernorm",
    "decoder.blocks": "decoder.decoder_layers", "norm1": "layernorm_before", "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense",
    "attn.": "attention.attention."}


def hugging_face(state, q_bias, v_bias):
    """Tensors under the names of transformers' VideoMAE; q_bias, v_bias: how those two end."""
    theirs = {}
    for name, value in state.items():
        name = re.sub("^head", "classifier", renamed(name, HUGGING_FACE))
        name = renamed(name, {"q_bias": q_bias, "v_bias": v_bias})
        if "qkv" not in name:
            theirs[name] = value
        else:
            for part, third in zip(("query", "key", "value"), value.chunk(3)):
                theirs[name.replace("qkv", part)] = third
    return theirs


@parametrize("q_bias, v_bias", [("q_bias", "v_bias"), ("query.bias", "value.bias")])
def test_hugging_faces_videomae_is_read_under_the_released_names(tmp_path, q_bias, v_bias):
    for model in (tiny(target="pixel", loss="l2"), classifier(5)):
        state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
        path = saved(tmp_path / "pytorch_model.bin", hugging_face(state, q_bias, v_bias))
        weights = read_weights(path)
        assert_close(weights.state, state, rtol=0, atol=0)
        assert weights.settings == {"size": "tiny", "target": "pixel", "loss": "l2"}
    with raises(ValueError, match="take the model's pytorch_model.bin"):
        read_weights(tmp_path / "model.safetensors")


def test_another_grid_of_tubes_than_in_training_is_said(world, capsys):
    weights = read_weights(world / "ours.pt")
    load_weights(tiny(), weights)
    assert not capsys.readouterr().out
    load_weights(tiny(frames=8), weights)
    assert "trained on 4 frames of 32 pixels: with 8 of 32" in capsys.readouterr().out


def test_partial_files_say_what_is_missing(tmp_path):
    state, model, block = tiny().state_dict(), classifier(5), "encoder.blocks.0."
    for change, text in (({f"{block}attn.q_bias": None}, "attn.q_bias is missing"),
                         ({f"{block}mlp.fc1.weight": torch.zeros(3, 4)}, "fc1.weight is (3, 4) instead of"),
                         ({"encoder.blocks.99.norm1.weight": torch.zeros(9)}, "99.norm1.weight is unknown")):
        changed = {name: value for name, value in {**state, **change}.items() if value is not None}
        weights = read_weights(saved(tmp_path / "p.pt", {"model": changed}))
        with raises(ValueError, match=re.escape(text)):
            load_weights(model, weights, ("fc_norm.", "head."))
    patches = torch.ones(9, 3, 2, 16, 16)
    with raises(ValueError, match="no video model of size tiny"):
        read_weights(saved(tmp_path / "q.pt", {"encoder.patch_embed.proj.weight": patches}))


# ============ train.py: evaluation ============
def test_knn_is_the_definition():
    right = 0
    bank, queries = torch.randn(360, 5, generator=seeded(0)).split([60, 300])
    bank_labels, labels = torch.randint(4, (360,), generator=seeded(1)).split([60, 300])
    for query, label in zip(queries, labels):
        similarity, nearest = F.cosine_similarity(query[None], bank).topk(20)
        votes = torch.zeros(4).index_add(0, bank_labels[nearest], (similarity / 0.07).exp())
        right += int(votes.argmax() == label)
    assert knn(bank, bank_labels, queries, labels) == approx(100 * right / 300)
    lonely = torch.tensor([[1.0, 0], [1, 0.1], [0, 1]])  # of itself a row would vote for its own class
    own = lonely, torch.arange(3)
    assert knn(*own, *own, k=1, leave_one_out=True) == 0
    alone = lonely[:1], torch.arange(1)
    assert math.isnan(knn(*alone, *alone, leave_one_out=True))


def test_overlap_counts_pixels_and_clusters_find_their_objects():
    truth = torch.zeros(4, 4, 4, dtype=torch.long)
    truth[:2, :2, :2] = 1                        # object 1 in a quarter of the first tube's two frames
    truth[:2, 3, 3] = -1                         # a pixel to be ignored
    truth[3] = 1
    clusters = torch.tensor([[[1, 0], [0, 2]], [[3, 3], [3, 3]]])
    assert overlap(truth, clusters, 5).tolist() == [[16, 0, 6, 16, 0], [0, 8, 0, 16, 0]]
    mean, columns = match_one_to_one(torch.tensor([[10, 0, 0, 0], [0, 0, 8, 0], [2, 6, 0, 0]]))
    assert columns == [0, 2, 1]
    assert mean == approx((10 / 12 + 8 / 8 + 6 / 8) / 3)
    assert match_one_to_one(torch.tensor([[50, 30], [40, 0]]))[1] == [1, 0]    # not greedy
    # Clusters 0 and 1 -> object 0, 2 and 3 -> object 1; an object without a cluster counts 0.
    mean = match_many_to_one(torch.tensor([[10, 9, 0, 1], [0, 2, 7, 3]]))
    assert mean == approx((19 / (20 + 21 - 19) + 10 / (12 + 11 - 10)) / 2)
    assert match_many_to_one(torch.tensor([[5, 5], [1, 0]])) == approx(10 / 11 / 2)


def test_kmeans_finds_separate_points():
    truth = torch.arange(10).repeat_interleave(18)
    x = 12 * torch.eye(10)[truth] + torch.randn(180, 10, generator=seeded(1))
    for seed in range(5):                        # of the starts about half would do: the best counts
        cluster = kmeans(x, 10, seed)
        assert len(torch.stack([truth, cluster], dim=1).unique(dim=0)) == 10
        assert len(cluster.unique()) == 10
    x = torch.randn(200, 3, generator=seeded(2))        # no clusters: a point is nearest to its own mean
    cluster = kmeans(x, 4, 3)
    means = torch.stack([x[cluster == k].mean(dim=0) for k in range(4)])
    assert torch.equal(torch.cdist(x, means).argmin(dim=1), cluster)
    assert torch.equal(cluster, kmeans(x, 4, 3))
    assert len(kmeans(x[:3], 10).unique()) == 3        # fewer points than clusters


def test_linear_probe_on_known_data():
    generator, labels = seeded(0), torch.arange(400) % 5
    x = torch.randn(5, 12, generator=generator)[labels] + 0.1 * torch.randn(400, 12, generator=generator)
    swapped = labels[300:].clone()
    swapped[:30] = (swapped[:30] + 1) % 5        # 30 of 100 are wrong
    assert train.linear_probe(x[:300], labels[:300], x[300:], swapped) == approx(70)
    # What tells the classes apart is now small and off centre, and large noise lies beside it.
    faint = torch.cat([1e-3 * x + 3, 100 * torch.randn(x.shape, generator=generator)], dim=1)
    assert train.linear_probe(faint[:300], labels[:300], faint[300:], labels[300:]) > 95


def test_multi_view_averages_softmax(videos):
    """Logits are a random linear function of the clip."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 32 * 32, 3))
    nn.init.normal_(model[1].weight, std=0.1)
    args = SimpleNamespace(batch_size=14)
    process = SimpleNamespace(workers=0, device=torch.device("cpu"), cuda=False, stop_signal=0, named=set(),
                              autocast=nullcontext)
    found = find_videos(videos)
    clips = data.Clips(found, 2, 1, 32, 0, False, views=(2, 3))
    # of shape [videos, views, classes]
    logits = torch.stack([model(data.normalize(clips[0, i]["video"])) for i in range(8)])
    truth = logits.softmax(dim=2).mean(dim=1).argmax(dim=1)
    assert (truth != logits.mean(dim=1).argmax(dim=1)).any()                      # averaged logits would err
    found.labels = torch.cat([(truth[:2] + 1) % 3, truth[2:]])                    # two of eight are wrong
    assert train.multi_view(args, process, model, clips) == (75.0, 100.0, 8)


def test_the_classifier_is_videomaes_with_layer_decay():
    full, model, depth = tiny().eval(), classifier(5).eval(), SIZES["tiny"]["depth"]
    weights = train.Weights("x", full.state_dict(), {}, 0, "")
    load_weights(model, weights, free=("fc_norm.", "head."))
    video = torch.randn(2, 3, 4, 32, 32)
    full.encoder.norm = nn.Identity()
    pooled = F.layer_norm(full.features(video).mean(1), model.fc_norm.normalized_shape, eps=1e-6)
    assert torch.allclose(model(video), pooled @ model.head.weight.T + model.head.bias, atol=1e-6)
    assert 0 < model.head.weight.abs().max() < 1e-3
    drops = torch.tensor([block.drop_path for block in model.encoder.blocks])
    assert torch.allclose(drops, torch.linspace(0, 0.1, depth))
    dropped = sigma.Block(8, 2, drop_path=0.25).drop(torch.ones(4000, 1, 1))
    assert dropped.unique().tolist() == approx([0, 4 / 3])
    assert abs(dropped.mean() - 1) < 0.05
    groups = train.layer_groups(model, (0.9, 0.999))
    of = {p: group for group in groups for p in group["params"]}
    assert len(of) == len(list(model.parameters())) == sum(len(group["params"]) for group in groups)
    for name, p in model.named_parameters():
        block = re.search(r"blocks\.(\d+)", name)
        layer = int(block[1]) + 1 if block else 0 if "patch_embed" in name else depth + 1
        assert of[p]["lr_scale"] == approx(0.75 ** (depth + 1 - layer)), name
        assert of[p]["weight_decay"] == (0.05 if p.ndim > 1 else 0.0), name


@parametrize("flip", [True, False])
def test_augmentation_is_one_draw_for_all_frames(flip):
    torch.manual_seed(0)
    still = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    augment = train.augmentation(flip)
    drawn = torch.stack([augment(still.repeat(5, 1, 1, 1)) for _ in range(60)])
    assert drawn.shape == (60, 5, 3, 24, 24)
    assert drawn.dtype == torch.uint8
    assert (drawn == drawn[:, :1]).all()
    assert len(drawn.unique(dim=0)) > 40
    mirrored = (drawn[:, 0] == still.flip(-1)).flatten(1).all(dim=1)
    assert mirrored.any() == flip


@beside
def test_evaluation_does_not_depend_on_the_number_of_processes(tmp_path, world):
    """On noise the score is chance, and so changes with the order of the features."""
    random, lines, found = default_rng(0), [], []
    for n in range(80):                          # the probe takes 64 at a time: more, or the order is nothing
        pictures = random.integers(0, 256, (4, 5, 5, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
        video_write(tmp_path / f"{n}.mp4", "mpeg4", pictures)
        lines.append(f"{n}.mp4 {random.integers(6)}\n")
    (tmp_path / "data.csv").write_text("".join(lines))
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "val.csv").write_text("".join(["bad.mp4 0\n", *lines]))
    flags = [*eval_flags(tmp_path / "data.csv"), "--val", tmp_path / "val.csv", "--probe", world / "ours.pt"]
    for processes in (1, 2):
        out = tmp_path / str(processes)
        text = Apart(*flags, "--out", out, world=processes).end()
        assert re.search(r"knn at step 7: top1 [\d.]+, videos 80\nlinear at step 7: top1 ", text)
        assert text.count("unreadable: ") == 1  # though both ranks read it
        found.append(read_log(out))
    assert found[0] == found[1]
    # Fine-tuning from scratch, with frames that are spread over the video, tests every video once as well.
    flags = ["--stride", 0, "--batch-size", 3, "--steps", 1, "--out", tmp_path / "o"]
    Apart("--finetune", "none", "--size", "tiny", *eval_flags(world / "videos"), *flags, world=2).end()
    assert read_log(tmp_path / "o")[-1]["videos"] == 8


def test_finetune_runs_and_resumes(world, videos, tmp_path, capsys):
    start = Path(shutil.copy(world / "ours.pt", tmp_path))
    flags = ["--finetune", start, *eval_flags(videos), "--batch-size", 3, "--epochs", 2, "--warmup-epochs", 1,
             "--out"]
    main_here(*flags, tmp_path / "whole")
    last = read_log(tmp_path / "whole")[-1]
    assert {"eval": "finetune", "step": 4, "videos": 8}.items() <= last.items()
    # Of another path, with the same weights; and once a run has begun it does not need the file.
    main_here(*flags, tmp_path / "parts", "--finetune", world / "ours.pt", "--steps", 2, "--recompute")
    main_here(*flags, tmp_path / "parts", "--steps", 3)
    start.unlink()
    main_here(*flags, tmp_path / "parts")
    same_run(tmp_path / "whole", tmp_path / "parts")
    content = torch.load(tmp_path / "whole/checkpoint.pt")
    before, after = (part["model"]["encoder.blocks.1.mlp.fc1.weight"]
                     for part in (torch.load(world / "ours.pt"), content))
    assert 0 < (after - before).abs().max() < 0.1
    assert content["classes"] == ["blue", "red"]
    rates = [group["lr"] for group in content["optimizer"]["param_groups"]]   # two of each layer
    assert rates == approx([rates[-1] * 0.75 ** (5 - i // 2) for i in range(12)])
    torch.save({"model": tiny(num_prototypes=5).state_dict()}, start)         # known by its weights
    assert "initial_weights" in refused(capsys, 2, main_here, *flags, tmp_path / "parts")


def test_segment_reads_masks_exactly_and_compares(world, tmp_path, monkeypatch):
    """K-means looks at small differences, so it computes in float32 also where the model is in bf16."""
    def checked(x, *more):
        assert x.dtype == torch.float32
        assert not torch.is_autocast_enabled("cpu")
        return kmeans(x, *more)
    features = mock.create_autospec(SIGMA.features, side_effect=SIGMA.features)
    counted = mock.Mock(wraps=overlap)
    monkeypatch.setattr(train, "kmeans", checked)
    monkeypatch.setattr(SIGMA, "features", features)
    monkeypatch.setattr(train, "overlap", counted)
    out = tmp_path / "davis"
    flags = "--data", world / "davis", "--out", out, "--precision", "bf16"
    main_here("--segment", world / "ours.pt", *flags, pictures=True)
    record, = read_log(out)
    assert {"eval": "segment", "step": 7, "clips": 2}.items() <= record.items()     # those of val.txt
    assert 0 < record["miou"] < record["miou_overclustering"] <= 100
    for name in ("segments", "prototypes"):
        assert Image.open(out / f"{name}.png").width > 300
    # Two protocols compare the middle 4 frames of blue0, which has 5 with a mask, then those of red1, which
    # has 6 and is the sixth video. Row 0 of the masks does not count.
    truths = [call.args[0] for call in counted.call_args_list]
    assert np.array_equal(truths[0][:, 1:], disc("blue", 0)[1][2:, 1:])
    assert (truths[0][:, 0] == -1).all()
    assert np.array_equal(truths[-1][:, 1:], disc("red", 5)[1][1:5, 1:])
    # The model sees the whole picture of red1, squeezed: it is bright in red where the disc is.
    inside = F.interpolate(truths[-1][None].float(), (32, 32), mode="nearest-exact")[0] > 0
    clip = features.call_args_list[1].args[1]
    assert ((clip[0, 0] > 1) == inside).float().mean() > 0.97


def test_the_readme_names_what_there_is():
    """Its flags, those of data.py, torchrun, Docker, uv and Slurm, its links, and the pieces in its table."""
    readme = (HERE / "README.md").read_text()
    others = ("help rate seconds short-side ipc shm-size no-project with-requirements max-restarts "
              "nnodes standalone nproc_per_node rdzv_backend rdzv_id rdzv_endpoint nodes ntasks-per-node "
              "gpus-per-node cpus-per-task time requeue open-mode signal").split()
    flags = {name[2:] for name in train.make_parser()._option_string_actions}
    named = set(re.findall(r"--([a-z][a-z_-]+)", readme))
    links = re.findall(r"\]\(([a-z_]+[./][\w./]+)\)", readme)
    assert named <= {*others, *flags}
    assert all((HERE / link).exists() for link in links)
    table = re.search(r"(?s)\| in the paper .*?\n\n", readme)[0]
    pieces = {**vars(sigma), "SIGMA": tiny()}    # a model has prototypes, the class has not
    names = re.findall(r"(?m)`([\w.]+)`(?=[^|\n]*\|$)", table)                 # in the last column
    for name in names:
        eval(name, pieces)
    assert min(len(named), len(links), len(names)) > 7


# ============ python test_sigma.py speed: a step beside the release's way of computing ============
def bench_release(*flags):
    """train.py --bench, where SIGMA computes as the release does."""
    torch.set_num_threads(data.CORES)
    SIGMA.forward = release_forward
    train.main(["--bench", *flags])


def in_turns(ways, rounds):
    """The median of what each function returns. They take turns, so that a busy machine slows all alike."""
    found = [[way() for way in ways] for _ in range(rounds)]
    return np.median(found, axis=0)


def compare_speed(size="small", target="mlp", batch="8", rounds="3", precisions="fp32,bf16"):
    """Prints medians of Sinkhorn and of steps, the release's way and ours."""
    torch.set_num_threads(data.CORES)
    scores = unit_scores(11_264, 3_000, width=256).to("cuda" if torch.cuda.is_available() else "cpu")

    def solve(function):
        began = time.monotonic()
        function(scores).argmax(dim=1).cpu()
        return 1000 * (time.monotonic() - began)

    equal = release_sinkhorn(scores).argmax(dim=1) == sinkhorn(scores).argmax(dim=1)   # a warm-up, too
    solvers = [partial(solve, function) for function in (release_sinkhorn, sinkhorn)]
    release, ours = in_turns(solvers, rounds=5)
    print(f"Sinkhorn, 11264 x 3000: the release's way {release:.0f} ms, ours {ours:.0f} ms, "
          f"{release / ours:.2f} times as fast; {100 * equal.float().mean():.3f}% of the assignments equal",
          flush=True)

    def step(precision, environ, *program):
        flags = ["--size", size, "--target", target, "--batch-size", batch, "--steps", "4"]
        printed = subprocess.check_output([sys.executable, *program, *flags, "--precision", precision],
                                          text=True, env={**os.environ, **environ})
        return float(re.search(r"([\d.]+) ms a step", printed)[1]) / int(batch)

    for precision in precisions.split(","):
        # The release gets OpenMP's default again, in spite of train.py's OMP_WAIT_POLICY.
        programs = [partial(step, precision, {"GOMP_SPINCOUNT": "300000"}, __file__, "step"),
                    partial(step, precision, {}, HERE / "train.py", "--bench")]
        medians = in_turns(programs, int(rounds))
        for way, median in zip(("release", "ours"), medians):
            print(f"a step of {size} with {target}, batch {batch}, {precision}, {way:7} {median:8.1f} ms "
                  f"a clip, {medians[0] / median:.2f} times as fast as the release's way")


# ============ python test_sigma.py evidence: what the paper's choices do on the demo ============
# Flags of train.py, over the demo's defaults. Pixels and SIGMA have the best of four learning rates each.
EVIDENCE = {
    "untrained": "--steps 1",  # the warm-up's first step has a learning rate of 0
    "pixels, L2 (VideoMAE)": "--target pixel --lr 8e-3", "MLP features, L2": "--loss l2",
    "SIGMA-MLP, hard": "", "SIGMA-MLP, soft": "--assignment soft"}


def evidence(folder="runs/evidence", seeds="3", at_once="1"):
    """Pretrains, probes and segments the rows of EVIDENCE, `at_once` side by side, and prints a table of
    means and standard deviations over seeds. Called again, it pretrains only what is not done."""
    folder = Path(folder).absolute()
    names = list(EVIDENCE)
    write_demo(folder / "videos")

    def run(name, seed):
        out = folder / f"{names.index(name):02}-{seed}"
        if not out.exists():
            out.mkdir()
            (out / "videos").symlink_to(folder / "videos")
        checkpoint, found = out / "checkpoint.pt", {}
        for part, flags in {".": ["--seed", str(seed), *EVIDENCE[name].split()],
                            "probe": ["--probe", checkpoint], "segment": ["--segment", checkpoint]}.items():
            with open(out / "output.txt", "a") as output:
                subprocess.run([sys.executable, HERE / "train.py", *flags, "--out", out / part],
                               check=True, stdout=output, stderr=output, env=ONE_THREAD)
            found.update((record.get("eval", "step"), record) for record in read_log(out / part))
        return [found["knn"]["top1"], found["linear"]["top1"], found["segment"]["miou_overclustering"],
                found["step"].get("perplexity"), found["step"].get("spread")]

    with ThreadPoolExecutor(int(at_once)) as pool:
        results = [pool.map(run, int(seeds) * [name], range(int(seeds))) for name in names]
    print("| | k-NN | linear | over-clustering mIoU | perplexity | spread |\n|---|---|---|---|---|---|")
    for name, found in zip(names, results):
        cells = []
        for column, digits in zip(zip(*found), (1, 1, 1, 1, 3)):
            if None in column:
                cells.append("–")
            else:
                deviation = np.std(column, ddof=min(1, len(column) - 1))
                cells.append(f"{np.mean(column):.{digits}f} ± {deviation:.{digits}f}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    {"step": bench_release, "speed": compare_speed, "evidence": evidence}[sys.argv[1]](*sys.argv[2:])
