"""Pretrain SIGMA, from a laptop to a cluster, and evaluate what it learned.

    torchrun train.py                                            # the demo: synthetic videos, minutes on two CPU cores
    torchrun train.py --data kinetics/train --size base          # one GPU (plain `python train.py` works too)
    torchrun --nproc_per_node 8 train.py --data train.csv --size base --target dino --out runs/k400
    torchrun train.py --probe runs/demo/checkpoint.pt            # k-NN and linear probe; so with --finetune and --segment
    torchrun train.py --finetune authors.pth --data train.csv --val val.csv
    torchrun train.py --bench --size base                        # what a step costs on this machine, and its parts
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --data train.csv ...

Started again with the same --out a run resumes, and its loss curve is the one it would have had uninterrupted.
The file reads in this order: flags, processes, files that survive, the training loop, pretraining, evaluation, bench, main.
"""
import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

# Before PyTorch starts its threads: on a CPU they share the cores with the loader's, and a thread that spins while it
# waits for another keeps that one from running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
from sigma import SIZES, SIGMA, TEACHERS, TUBELET, Attention, Encoder, all_reduce, load_checkpoint, patchify, sinkhorn, sinkhorn_argmax, split_mask, take_tubes, tube_mask

# ============ flags ============

# Defaults, where a flag is not given. The paper's for videos on disk, and for the demo what suits minutes on a laptop.
DISK = dict(size="base", prototypes=3000, epochs=800, warmup_epochs=40, batch_size=32, lr=1.5e-4, min_lr=1e-5, frames=16, stride=4, image_size=224, mask_ratio=0.9)
DEMO = dict(size="tiny", prototypes=64, epochs=25, warmup_epochs=3, batch_size=32, lr=4e-3, min_lr=4e-4, frames=8, stride=2, image_size=48, mask_ratio=0.75)
# Fine-tuning's own, over the above. For Kinetics; with --stride 0 (Something-Something) 40 epochs.
FINETUNE = dict(epochs=100, warmup_epochs=5, batch_size=16, lr=1e-3, min_lr=1e-6)
FINETUNE_DEMO = dict(epochs=15, warmup_epochs=1.875, batch_size=16, lr=1e-2, min_lr=1e-6)
# What decides the loss curve: a run resumes only where these are as they were.
CURVE = ("size", "target", "teacher", "loss", "assignment", "prototypes", "eps", "epochs", "warmup_epochs", "global_batch", "accumulate",
         "repeats", "lr", "min_lr", "frames", "stride", "image_size", "mask_ratio", "seed", "videos", "finetune", "flip")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter,
                                     epilog="Defaults in brackets; where two are given, the second is the demo's.")
    show = lambda name: f"[{DISK[name]}, demo {DEMO[name]}]"
    add, parser.error = parser.add_argument, stop_with           # one line, without the usage
    add("--data", nargs="?", default="demo", const="demo", help="demo; a folder of videos (class folders become labels); or a list file: path and optional label a line [demo]")
    add("--val", help="labelled videos for k-NN before the first step and after the last, and for what --probe and --finetune test; same forms as --data [none, the demo has its own]")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--probe", metavar="CHECKPOINT", help="instead of pretraining: k-NN and a linear probe of its frozen features, from --data (labelled) to --val")
    mode.add_argument("--finetune", metavar="CHECKPOINT", help="instead: train all of it with the labels of --data, from this (ours, the authors', VideoMAE's) or `none`; test on --val")
    mode.add_argument("--segment", metavar="CHECKPOINT", help="instead: cluster the tubes of every clip of --data; mIoU where there are masks (DAVIS's folders, or VIDEOS beside VIDEOS-masks)")
    mode.add_argument("--bench", action="store_const", const=True, help="instead: time pretraining steps of these flags on random clips, and their parts; needs no --data, writes nothing [--steps 5; defaults as for videos on disk]")
    add("--out", help="folder for log.jsonl, checkpoint.pt, preview.png; a run found there is resumed [runs/<name of the data>, and -probe, -finetune, -segment]")
    add("--size", choices=list(SIZES), help=f"model {show('size')}")
    add("--target", choices=["mlp", "dino", "pixel"], default="mlp", help="what φ is: a trained MLP, frozen DINO, or plain pixels (VideoMAE) [mlp]")
    add("--teacher", choices=list(TEACHERS), default="vitb16", help="DINO network of --target dino [vitb16, as the release at every size]")
    add("--dino-weights", help="file with DINO's weights [downloaded at first use]")
    add("--loss", choices=["sigma", "l2"], help="sigma; or l2: VideoMAE with pixel, the collapse experiment with mlp [sigma, with pixel l2]")
    add("--assignment", choices=["hard", "soft"], default="hard", help="Sinkhorn targets: argmax of q (release) or q itself (text) [hard]")
    add("--prototypes", type=int, help=f"K {show('prototypes')}")
    add("--eps", type=float, default=0.05, help="Sinkhorn's ε [0.05; the release uses 0.03 for SSv2 with ViT-B]")
    add("--mask-ratio", type=float, help=f"share of tubes hidden {show('mask_ratio')}")
    add("--frames", type=int, help=f"frames in a clip {show('frames')}")
    add("--stride", type=int, help=f"every so many frames of the video; 2 for SSv2; 0 spreads the frames over the video, as SSv2's fine-tuning does {show('stride')}; --probe: the checkpoint's; --segment: 1")
    add("--image-size", type=int, help=f"pixels a side {show('image_size')}")
    add("--repeats", type=int, default=1, help="crops from one decoding, where decoding limits [1]")
    add("--epochs", type=int, help=f"length of the schedule {show('epochs')}")
    add("--warmup-epochs", type=float, help=f"of them with a rising learning rate {show('warmup_epochs')}, and where not given at most an eighth of --epochs")
    add("--steps", type=int, help="stop after so many optimiser steps; the schedule stays that of --epochs [none]")
    add("--batch-size", type=int, help=f"clips a step, per process {show('batch_size')}")
    add("--accumulate", type=int, default=1, help="micro-batches a step; Sinkhorn balances each micro-batch by itself, so this is not the same as a larger batch [1]")
    add("--lr", type=float, help=f"base learning rate, per 256 clips {show('lr')}")
    add("--min-lr", type=float, help=f"where the cosine ends, per 256 clips {show('min_lr')}")
    add("--precision", choices=["auto", "bf16", "fp16", "fp32"], default="auto", help="auto: bf16 where the hardware has it (GPUs from Ampere, CPUs with AMX or AVX512-BF16), else fp16 on a GPU, fp32 on a CPU; fp32 multiplies matrices in TF32 on GPUs")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--workers", type=int, help="decoding processes per training process [on GPUs cores / processes, at most 16; on a CPU 1]")
    add("--seed", type=int, default=0, help="of weights, order, clips, crops and masks [0]")
    add("--save-minutes", type=float, default=10, help="checkpoint at least this often; also at the end of an epoch that took over 30 s [10]")
    add("--keep-every", type=int, default=100, help="keep a numbered checkpoint every so many epochs [100]")
    add("--log-every", type=int, help="steps between lines of log.jsonl [so that a run has 500 to 1000, at most 50]")
    add("--flip", action=argparse.BooleanOptionalAction, help="fine-tuning: mirror half of the clips [where --stride is not 0, but not the demo, whose classes have a left and right]")
    add("--test-clips", type=int, help="fine-tuning: clips of a test video, each with 3 crops [5, with --stride 0: 2]")
    args = parser.parse_args(argv)

    args.mode = next((name for name in ("probe", "finetune", "segment", "bench") if getattr(args, name) is not None), "pretrain")
    args.demo = args.data == "demo" and args.mode != "bench"
    defaults, args.weights, args.step = dict(DEMO if args.demo else DISK), None, 0
    if args.mode not in ("pretrain", "bench") and args.finetune != "none":
        with mistakes():
            args.weights, facts = read_weights(getattr(args, args.mode))
        if args.size not in (None, facts["size"]):
            parser.error(f"--size is {args.size}, but {getattr(args, args.mode)} is {facts['size']}")
        for name in ("size", "target", "teacher", "loss", "prototypes", "step"):         # the checkpoint's, whatever the flags say
            setattr(args, name, facts.pop(name))
        defaults = {**defaults, **facts, "stride": {"probe": facts.get("stride", defaults["stride"]), "finetune": defaults["stride"], "segment": 1}[args.mode]}
    if args.mode == "finetune":
        defaults.update(FINETUNE_DEMO if args.demo else FINETUNE, **({"epochs": 40} if args.stride == 0 and not args.demo else {}))
        args.flip = args.flip if args.flip is not None else args.stride != 0 and not args.demo
    defaults["warmup_epochs"] = min(defaults["warmup_epochs"], (args.epochs or defaults["epochs"]) / 8)   # for short schedules
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.loss = args.loss or ("l2" if args.target == "pixel" else "sigma")
    args.test_clips = args.test_clips if args.test_clips is not None else 5 if args.stride else 2
    args.out = Path(args.out or f"runs/{Path(args.data).stem or 'run'}{'' if args.mode == 'pretrain' else f'-{args.mode}'}")
    for name in ("prototypes", "frames", "image_size", "repeats", "epochs", "batch_size", "accumulate", "keep_every", "test_clips", "lr", "eps", "save_minutes"):
        if not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be positive and finite")
    for name in ("steps", "log_every", "workers", "stride", "min_lr", "warmup_epochs"):
        least = 1 if name in ("steps", "log_every") else 0
        if getattr(args, name) is not None and not getattr(args, name) >= least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}")
    if args.stride == 0 and args.mode in ("pretrain", "bench"):
        parser.error("--stride 0 is for --finetune: clips of pretraining are consecutive")
    if args.mode == "bench" and args.accumulate > 1:
        parser.error("--bench times micro-batches: leave --accumulate out")
    if args.batch_size % args.repeats:
        parser.error(f"--repeats {args.repeats} must divide --batch-size {args.batch_size}: so many clips come from one video")
    patch = SIZES[args.size][0]
    patches = (args.image_size // patch) ** 2
    if args.frames % TUBELET or args.image_size % patch:
        parser.error(f"--frames must be a multiple of {TUBELET} and --image-size one of {patch} for size {args.size}: tubes are {TUBELET}x{patch}x{patch}")
    if not 0 < args.mask_ratio < 1 or not 0 < int(args.mask_ratio * patches) < patches:
        parser.error(f"--mask-ratio {args.mask_ratio} of {patches} patches: between 1 and {patches - 1} must be hidden")
    if (args.target == "pixel") and args.loss != "l2":
        parser.error("--target pixel goes with --loss l2 (that is VideoMAE): pixels are not clustered")
    return args


# ============ processes and devices ============

# Peak of dense bf16/fp16 matrix products in FLOP/s, from the makers' data sheets, for MFU. Unknown cards show none.
PEAK_FLOPS = {"B200": 2.25e15, "H200 NVL": 835e12, "GH200": 989e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "RTX 4090": 165e12, "A10G": 70e12,
              "A10": 125e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}


@contextlib.contextmanager
def mistakes():
    """Turns what a user can cause (ValueError, OSError, an unreadable video) into one line and exit code 2."""
    try:
        yield
    except (ValueError, OSError, data.VideoError) as error:
        stop_with(f"{error}")


def stop_with(message, code=2):
    """Ends this process with one line. Ranks above 0 wait first: torchrun ends all at the first exit, so that what goes
    wrong on every rank is said once, and what goes wrong on one is said."""
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        time.sleep(3)
    print(f"train.py: error{f' of rank {rank}' if rank else ''}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(code)


def say(env, message):
    if env.rank == 0:
        tqdm.write(message)
        sys.stdout.flush()


def start_processes(args):
    """Joins the process group torchrun describes (NCCL on GPUs, gloo on CPUs), picks device and precision."""
    rank, world, local = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    cuda = torch.cuda.is_available()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if cuda and here > torch.cuda.device_count():
        stop_with(f"{here} processes but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    host_group = None
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    else:   # glibc gives every large tensor fresh pages and zeroes them again each step: keeping the memory is 1.2 (ViT-S) to 4 times (tiny) faster
        with contextlib.suppress(OSError, AttributeError):
            for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):    # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
                ctypes.CDLL(None).mallopt(option, value)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
        host_group = dist.new_group(backend="gloo")              # for flags and file names: never waits for a GPU
    precision = args.precision
    if precision == "auto":
        if cuda:
            precision = "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "fp16"
        else:
            flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
            precision = "bf16" if "amx_bf16" in flags or "avx512_bf16" in flags else "fp32"
    # In pretraining only the decoder sees all N tubes: its N x N matrices fit. Those of an encoder that is fine-tuned would not.
    Attention.plain = not cuda and args.mode in ("pretrain", "bench")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    name = torch.cuda.get_device_name(device) if cuda else ""
    peak = next((peak for card, peak in PEAK_FLOPS.items() if re.search(rf"\b{card}\b", name)), 0) if precision != "fp32" else 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = args.workers if args.workers is not None else min(16, max(1, cores // here)) if cuda else 1
    env = SimpleNamespace(rank=rank, world=world, local=local, device=device, host_group=host_group, precision=precision, peak=peak, workers=workers, stop=None, in_loop=False,
                          autocast=functools.partial(torch.autocast, device.type, dtype, enabled=dtype != torch.float32))

    def ask_to_stop(signum, frame):                              # torchrun repeats a signal, so repeating must be harmless
        env.stop = signum
        if not env.in_loop:                                      # the loop finishes its step and saves; elsewhere nothing is lost
            raise SystemExit(128 + signum)
    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    return env


def over_ranks(env, value, op="MAX"):
    """A number every rank has its own of -> one for all; on the hosts, so that no GPU is waited for."""
    if env.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group=env.host_group)
    return tensor.item()


# ============ files that survive ============

def replace_file(path, write):
    """Atomic: whoever reads `path`, also after a kill or on a full disk, finds the old content or the new, whole. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                     # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]})") from None


def save_checkpoint(path, content):
    """True when written. On failure the old file stays, the run goes on and tries again later."""
    try:
        replace_file(path, functools.partial(torch.save, content))
    except OSError as error:
        tqdm.write(f"warning: {error}; the last good checkpoint stays")
        return False
    return True


class Log:
    """log.jsonl on rank 0: whole lines only, none twice. A full disk delays lines, it does not lose or tear them."""
    def __init__(self, env, path, step):
        """Keeps the lines up to `step`, the one the run resumes at: later ones are about to be written again."""
        self.path, self.waiting, self.rank, self.records = path, b"", env.rank, []
        if env.rank == 0 and path.exists():
            for line in path.read_bytes().split(b"\n")[:-1]:     # what follows the last line end is torn
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if record.get("step", record.get("at_step", 0)) <= step:
                        self.records.append(record)
            if not step and path.stat().st_size:                 # a log without its checkpoint: kept, under another name
                os.replace(path, path.with_name(f"log-{int(time.time())}.jsonl"))
                self.records = []
            replace_file(path, lambda file: file.write(b"".join(json.dumps(r).encode() + b"\n" for r in self.records)))

    def write(self, **record):
        if self.rank:
            return
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}   # NaN is not JSON
        self.records.append(record)
        self.waiting += json.dumps(record).encode() + b"\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(self.waiting) < len(self.waiting):
                    file.truncate(end)
                else:
                    self.waiting = b""
        except OSError as error:
            tqdm.write(f"warning: {self.path} could not be written ({error.strerror}); its lines wait in memory")


def open_run(env, args, parts):
    """Makes --out, or resumes what lies in it: loads `parts` (name -> module, optimizer, …) -> checkpoint dict or None, log."""
    path = args.out / "checkpoint.pt"
    with mistakes():
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"--out {args.out} cannot be used ({error.strerror}): name another folder") from None
        checkpoint = load_checkpoint(path) if path.exists() else None
    if checkpoint:
        try:
            theirs = checkpoint["args"]
            changed = [f"{name} was {theirs.get(name)}, is {value}" for name, value in curve(args).items() if theirs.get(name) != value]
            if changed:
                stop_with(f"{path} belongs to another run ({'; '.join(changed)}): use another --out, or the flags of then")
            for group in checkpoint["optimizer"]["param_groups"]:    # in older checkpoints of CPUs it is None
                group["fused"] = True
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            stop_with(f"{path} does not fit this run ({type(error).__name__}: {str(error).splitlines()[0]}): use another --out")
    step = checkpoint["step"] if checkpoint else 0
    if over_ranks(env, step) != -over_ranks(env, -step):
        stop_with(f"the processes found different checkpoints in {args.out}: --out must be one folder that all machines see")
    with mistakes():
        log = Log(env, args.out / "log.jsonl", step)
    return checkpoint, log


def curve(args):
    """The facts that decide a run's loss curve, as stored in its checkpoints."""
    return {name: getattr(args, name) for name in CURVE if hasattr(args, name)}


# ============ the training loop, of pretraining and of fine-tuning ============

GIVE_UP = 5   # so many steps in a row whose loss or gradients are not finite end a run


def parameter_groups(model):
    """AdamW's groups as the release: no weight decay on biases, norms and the mask token."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith("mask_token")].append(parameter)
    return [{"params": groups[True], "weight_decay": 0.05}, {"params": groups[False], "weight_decay": 0.0}]


def loss_scaler(env):
    """The scaler leaves out a step whose gradients are not finite, without asking the GPU: hence also for bf16 and fp32,
    where its scale stays 1."""
    return torch.amp.GradScaler(env.device.type, init_scale=2.0 ** 16 if env.precision == "fp16" else 1.0)


def wrapped(env, args, model):
    """The model as it is called in training: compiled and over all ranks, where asked."""
    if env.world > 1:   # no device_ids: DDP would move the mask to the GPU, and counting it there means waiting
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")           # the only name before torch 2.15
        model = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    return torch.compile(model) if args.compile else model       # around DDP: inside, all gradients would be reduced at the end


def fit(env, args, model, groups, betas, train_set, objective, evaluate, at_epoch, clip_flops=0):
    """Trains until --epochs or --steps are done, resuming what lies in --out.

    groups: AdamW's, `lr_scale` beside their params where the learning rate differs by layer. objective(model, batch,
    step) -> loss, statistics. evaluate(log, step) on every rank before the first step and after the last; at_epoch(log) on
    rank 0. clip_flops: floating-point operations a clip costs, forward and backward.
    """
    # ---- schedule, optimizer, and where we are ----
    global_batch = args.batch_size * env.world
    sampler = data.EpochSampler(len(train_set.videos), args.batch_size, env.rank, env.world, args.seed, args.repeats, args.accumulate)
    steps_per_epoch = sampler.steps_per_epoch // args.accumulate
    total = args.epochs * steps_per_epoch
    last = min(total, args.steps or total)
    warmup = args.warmup_epochs * steps_per_epoch
    log_every = args.log_every or max(1, min(50, last // 500))
    peak = args.lr * global_batch * args.accumulate / 256                             # the rates are per 256 clips
    floor = args.min_lr / args.lr

    def share_of_peak(step):                                                          # linear from 0, then half a cosine
        if step < warmup:
            return step / warmup
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1, (step - warmup) / max(1, total - warmup))))

    for group in groups:
        group["lr"] = peak * group.pop("lr_scale", 1.0)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas, fused=True)      # fused: leaves a step out, and does not count it, without asking the GPU
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    scaler = loss_scaler(env)
    checkpoint, log = open_run(env, args, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler})
    if env.precision == "fp16" and scaler.get_scale() == 1:                           # resumed from another precision: at 1 small gradients would be 0
        scaler = loss_scaler(env)
    step, unreadable = (checkpoint["step"], checkpoint["unreadable"]) if checkpoint else (0, {})
    del checkpoint                                                                    # or it would stay in memory for the run
    evaluated = {record["step"] for record in log.records if "eval" in record}
    if step == 0:
        evaluate(log, step)
    else:
        say(env, f"resuming {args.out} at step {step} of {last}")

    trained = wrapped(env, args, model)
    model.train()
    sampler.start, sampler.stop = step * args.accumulate, last * args.accumulate
    stream = on_device(data.load(train_set, sampler, env.workers, pin_memory=env.device.type == "cuda"), env.device)
    bar = tqdm(total=last, initial=step, disable=env.rank > 0 or not sys.stderr.isatty(), desc="train", unit="step", smoothing=0.05)
    pending, in_a_row, moved, drawn, failed, met = [], 0, step, 0, 0, {}

    def left_out():     # AdamW counts the steps that it took, for every parameter with a gradient, as its first always has
        return step - int(optimizer.state[groups[0]["params"][0]]["step"]) if optimizer.state else 0
    skipped = left_out()
    logged, clock, waited, printed, saved, retry = step, time.monotonic(), 0.0, -math.inf, -math.inf, -math.inf

    def save(name):
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "scaler": scaler.state_dict(),
                   "epoch": step // steps_per_epoch, "step": step, "unreadable": unreadable, "args": curve(args)}
        return save_checkpoint(args.out / name, content)

    env.in_loop = True
    while step < last:
        # ---- data for one step, or a reason to stop that all ranks hear of before any waits for another's gradients ----
        asked, trouble = time.monotonic(), None
        try:
            micro_batches = [next(stream) for _ in range(args.accumulate)]
        except (data.VideoError, RuntimeError, OSError, EOFError) as error:
            trouble = error
        waited += time.monotonic() - asked
        if 2 * len(met) > len(train_set.videos) or drawn >= 100 and failed > drawn:
            trouble = trouble or over_half(met, args.data)
        stop = int(over_ranks(env, env.stop or (255 if trouble else 0)))
        if stop:
            written = env.rank == 0 and save("checkpoint.pt")
            over_ranks(env, 0)                                                        # torchrun kills the rest at the first exit
            if trouble and stop == 255:                                               # a signal to all also ends the loader's workers
                print(f"train.py: error: {trouble}", file=sys.stderr, flush=True)
            say(env, f"stopped after step {step}{f' by signal {stop}' if stop < 255 else ''}; {'the same command resumes there' if written else 'NOT saved'}")
            raise SystemExit(1 if stop == 255 else 128 + stop)

        # ---- one step; nothing in it waits for the GPU ----
        values = []
        for micro, batch in enumerate(micro_batches):
            together = env.world == 1 or micro == args.accumulate - 1                 # gradients are summed over ranks once
            with contextlib.nullcontext() if together else trained.no_sync():
                with env.autocast():
                    loss, stats = objective(trained, batch, step)
                scaler.scale(loss / args.accumulate).backward()
            values.append(torch.stack([loss.detach().float(), *(value.float() for value in stats.values())]))
        lr = scheduler.get_last_lr()[-1]
        scaler.step(optimizer)
        scaler.update(None if env.precision == "fp16" else 1.0)
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        pending.append(torch.stack(values).mean(dim=0))
        bar.update()

        # ---- what is due after it ----
        for batch in micro_batches:
            drawn += len(batch["index"])
            for path, reason in batch["bad"]:
                failed += 1
                met[path] = reason                                                    # since this start: files can be repaired
                if path not in unreadable:
                    unreadable[path] = reason
                    tqdm.write(f"unreadable, another draw takes its place: {path}: {reason}")
                    log.write(at_step=step, unreadable=path, reason=reason)
        epoch_ends = step % steps_per_epoch == 0
        if step % log_every == 0 or step == last or epoch_ends:
            rows = (all_reduce(torch.stack(pending)) / env.world).tolist()            # here the GPU is waited for
            pending.clear()
            for row in rows:
                in_a_row = 0 if math.isfinite(row[0]) else in_a_row + 1
            before, skipped = skipped, left_out()
            if skipped - before < step - logged:
                moved = step
            patience = 10 * GIVE_UP if env.precision == "fp16" else GIVE_UP           # fp16 first halves its scale until nothing overflows
            seconds = time.monotonic() - clock
            speed, wait = (step - logged) * global_batch * args.accumulate / seconds, waited / seconds
            record = dict(step=step, epoch=(step - 1) // steps_per_epoch, loss=rows[-1][0], lr=lr, clips_per_second=round(speed, 2), data_wait=round(wait, 4),
                          **dict(zip(stats, rows[-1][1:])), skipped=skipped, unreadable_videos=len(unreadable))
            if env.precision == "fp16":
                record["loss_scale"] = scaler.get_scale()
            if env.peak and clip_flops:
                record["mfu"] = round(speed / env.world * clip_flops / env.peak, 4)
            log.write(**record)
            if in_a_row >= GIVE_UP or step - moved >= patience:
                stop_with(f"the loss or the gradients of the last {max(in_a_row, step - moved)} steps are not finite; the last good checkpoint is {args.out / 'checkpoint.pt'}. Try a lower --lr, or --precision bf16", code=1)
            bar.set_postfix_str(f"loss {rows[-1][0]:.3f}, {speed:.1f} clips/s, {wait:.0%} waiting for data")
            if bar.disable and (time.monotonic() - printed > 10 or step == last):
                mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
                say(env, f"step {step}/{last}  loss {rows[-1][0]:.4f}  {speed:.1f} clips/s{mfu}  waiting for data {wait:.0%}  ETA {clock_time((last - step) * seconds / (step - logged))}")
                printed = time.monotonic()
            logged, clock, waited = step, time.monotonic(), 0.0
        if epoch_ends or step == last:
            for path, reason in merge(env, unreadable).items():
                if path not in unreadable:                                            # another rank met it
                    unreadable[path] = reason
                    log.write(at_step=step, unreadable=path, reason=reason)
            say(env, f"epoch {step / steps_per_epoch:.4g} of {args.epochs}: {len(unreadable)} of {len(train_set.videos)} videos unreadable so far")
        if env.rank == 0:
            keep = epoch_ends and step // steps_per_epoch % args.keep_every == 0
            # Where epochs are short, not at each: a checkpoint is three times the model and waits for the disk.
            now = time.monotonic()
            if step == last or keep or now > retry and now - saved > (30 if epoch_ends else 60 * args.save_minutes):
                if save("checkpoint.pt"):
                    saved = time.monotonic()
                else:
                    retry = time.monotonic() + 60
                if step == last and retry > now:
                    stop_with(f"training is done, but {args.out / 'checkpoint.pt'} could not be written: make room and run the same command again", code=1)
            if keep:
                save(f"checkpoint-{step // steps_per_epoch:04d}.pt")
            if epoch_ends or step == last:
                at_epoch(log)
    bar.close()
    env.in_loop = False
    met = merge(env, met)
    if 2 * len(met) > len(train_set.videos):
        stop_with(over_half(met, args.data), code=1)
    if not over_ranks(env, float(step in evaluated)):                                  # rank 0 alone has the log
        evaluate(log, step)


def on_device(loader, device):
    """Batches with their videos on the device, the next one's copy under way, on a stream of its own, while one is used."""
    if device.type != "cuda":
        yield from loader
        return
    side, ahead = torch.cuda.Stream(device), None
    for batch in loader:
        with torch.cuda.stream(side):
            batch["video"] = batch["video"].to(device, non_blocking=True)
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream(device).wait_stream(side)
        batch["video"].record_stream(torch.cuda.current_stream(device))               # not to be reused before it was read
        ahead = batch
    if ahead is not None:
        yield ahead


def merge(env, unreadable):
    """The union over ranks of path -> reason."""
    if env.world == 1:
        return unreadable
    everyone = [None] * env.world
    dist.all_gather_object(everyone, unreadable, group=env.host_group)
    return {path: reason for part in everyone for path, reason in part.items()}


def over_half(unreadable, source):
    path, reason = next(iter(unreadable.items()))
    return f"over half of the videos in {source} are unreadable, for example {path}: {reason}"


def clock_time(seconds):
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{int(seconds % 60):02d}"


# ============ pretraining ============

def pretrain(env, args):
    with mistakes():
        train_videos, val_videos = open_data(env, args)
        torch.manual_seed(args.seed)
        model = make_model(args)
        if args.target == "dino":
            if env.local != 0:
                dist.barrier(env.host_group)                     # the first process of a machine downloads, the others find it
            model.load_teacher(args.dino_weights)
            if env.local == 0 and env.world > 1:
                dist.barrier(env.host_group)
        patches = model.grid[1] * model.grid[2]
        mask = functools.partial(tube_mask, frames=model.grid[0], patches=patches, ratio=args.mask_ratio)
        train_set = data.Clips(train_videos, args.frames, args.stride, args.image_size, args.seed, True, args.repeats, mask=functools.partial(mask, args.repeats))
        preview_set = data.Clips(val_videos or train_videos, args.frames, args.stride, args.image_size, args.seed, False, mask=functools.partial(mask, 1))
    model.to(env.device)
    masked = int(args.mask_ratio * patches) * model.grid[0] * args.batch_size * env.world
    say(env, f"SIGMA {args.size}, target {args.target}, loss {args.loss}: {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.1f}M parameters, {len(train_videos)} videos, "
             f"{env.world} x {args.batch_size} clips a step, {args.clip_flops / 1e9:.1f} GFLOP a clip, {env.precision} on {env.device.type}, {env.workers} workers, results in {args.out}")
    if args.loss == "sigma" and args.prototypes > masked:
        say(env, f"warning: {args.prototypes} prototypes but only {masked} masked tubes in a batch: they cannot all be used; lower --prototypes or raise --batch-size")

    def objective(model, batch, step):
        video = data.normalize(batch["video"].to(env.device, non_blocking=True))
        return model(video, batch["mask"])                       # the mask stays on the CPU: its count is needed there

    def evaluate(log, step):
        if val_videos is not None:
            queries = features(env, args, model, val_videos)
            bank = features(env, args, model, train_videos, limit=20_000) if train_videos.labels.min() >= 0 else queries
            if not len(queries[0]) or not len(bank[0]):
                stop_with(f"none of the videos of {args.val or args.data} can be read", code=1)
            top1 = knn(*bank) if bank is queries else knn(*bank, *queries)
            log.write(eval="knn", step=step, top1=round(top1, 2))
            say(env, f"k-NN top-1 at step {step}: {top1:.1f}%")
        if env.rank == 0 and step:
            pictures(log)

    @functools.cache
    def shown():                                                 # read once, and in a worker, as any video may crash its decoder
        chosen = torch.linspace(0, len(preview_set.videos) - 1, min(3, len(preview_set.videos))).long().unique().tolist()
        return next(data.load(preview_set, data.OnceSampler(chosen, 3), min(1, env.workers)))

    def pictures(log):
        try:
            preview(env, model, shown(), args.out / "preview.png")
            plot(log.records, ("loss", "agreement", "perplexity", "spread"), args.out / "curve.png")
        except Exception as error:                               # a picture is worth no stop
            tqdm.write(f"warning: no preview.png or curve.png ({type(error).__name__}: {error})")

    fit(env, args, model, parameter_groups(model), (0.9, 0.95), train_set, objective, evaluate, pictures, args.clip_flops)


def make_model(args):
    return SIGMA(args.size, args.target, args.loss, args.prototypes, args.eps, assignment=args.assignment, teacher=args.teacher, frames=args.frames, image_size=args.image_size)


def clip_flops(args):
    """Floating-point operations of one clip's forward and backward pass, counted by PyTorch on tensors without storage."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = make_model(args)
        model.teacher_checked = True
        hidden = int(args.mask_ratio * model.grid[1] * model.grid[2]) * model.grid[0]
        visible, masked = torch.zeros(1, model.num_tubes - hidden, dtype=torch.long), torch.zeros(1, hidden, dtype=torch.long)
        tubes, video = torch.zeros(1, model.num_tubes, TUBELET * model.patch ** 2 * 3), torch.zeros(1, 3, args.frames, args.image_size, args.image_size)
        x_psi, x_phi = model.forward_video(tubes[:, hidden:], visible, masked), model.forward_target(video, tubes[:, :hidden], masked)
        model.forward_loss(x_psi.flatten(0, 1), x_phi.flatten(0, 1))[0].backward()
    return counter.get_total_flops()


def open_data(env, args):
    """--data and --val -> the videos of both; None for a missing --val. Rank 0 writes the demo's."""
    if args.demo:
        root = args.out / "videos"
        if args.mode != "pretrain" and args.finetune != "none" and (Path(getattr(args, args.mode)).parent / "videos" / "val").is_dir():
            root = Path(getattr(args, args.mode)).parent / "videos"                  # the demo's videos that the checkpoint saw
        if env.rank == 0:
            data.write_demo(root)
        over_ranks(env, 0)                                       # the others wait for the files
        train, val = data.find_videos(root / "train"), data.find_videos(args.val or root / "val")
    else:
        train = data.find_videos(args.data)
        val = data.find_videos(args.val, train.classes) if args.val else None        # class folders: the same numbers in both
    if val is not None and val.labels.min() < 0:
        raise ValueError(f"--val {args.val} has no labels: it needs class folders, or a list with a label on every line")
    args.videos = len(train)
    return train, val


@torch.no_grad()
def features(env, args, model, videos, limit=None):
    """Mean-pooled encoder tokens [n, D] and labels [n] of the videos' centre clips: over all ranks, each video once, unreadable ones left out."""
    chosen = range(len(videos)) if limit is None or len(videos) <= limit else torch.linspace(0, len(videos) - 1, limit).long().unique().tolist()
    clips = data.Clips(videos, args.frames, args.stride, args.image_size, args.seed, train=False)
    sampler = data.OnceSampler(list(chosen)[env.rank::env.world], args.batch_size)
    rows, labels = [], []
    was_training = model.training
    model.eval()
    for batch in tqdm(data.load(clips, sampler, env.workers, pin_memory=env.device.type == "cuda"), desc="features", total=len(sampler), leave=False, disable=env.rank > 0 or not sys.stderr.isatty()):
        with env.autocast():
            rows.append(model.features(data.normalize(batch["video"].to(env.device, non_blocking=True))).float().mean(dim=1))
        labels.append(batch["label"])
        for path, reason in batch["bad"]:
            tqdm.write(f"unreadable, left out: {path}: {reason}")
    model.train(was_training)
    width = model.encoder.norm.weight.numel()
    rows = torch.cat([*rows, torch.zeros(0, width, device=env.device)]).cpu()
    labels = torch.cat([*labels, torch.zeros(0, dtype=torch.long)])
    if env.world > 1:
        parts = [None] * env.world
        dist.all_gather_object(parts, (rows.numpy(), labels.numpy()), group=env.host_group)
        rows, labels = (torch.cat([torch.from_numpy(part[k]) for part in parts]) for k in (0, 1))
    return rows[labels >= 0], labels[labels >= 0]


def knn(bank, bank_labels, queries=None, labels=None, k=20, temperature=0.07):
    """Weighted k-nearest-neighbour top-1 in percent, as DINO's: cosine similarity, votes exp(similarity / temperature).

    Without queries every row of the bank is classified by all the others.
    """
    alone = queries is None
    queries, labels = (bank, bank_labels) if alone else (queries, labels)
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes, right = int(max(bank_labels.max(), labels.max())) + 1, 0
    for start in range(0, len(queries), 1024):
        similarity = queries[start:start + 1024] @ bank.T
        if alone:
            similarity[torch.arange(len(similarity)), torch.arange(start, start + len(similarity))] = -torch.inf
        best, index = similarity.topk(min(k, len(bank) - alone), dim=1)
        votes = torch.zeros(len(best), classes).scatter_add_(1, bank_labels[index], (best / temperature).exp())
        right += (votes.argmax(dim=1) == labels[start:start + 1024]).sum().item()
    return 100 * right / len(queries)


@torch.no_grad()
def preview(env, model, batch, path, columns=8):
    """preview.png: for the clips of a batch the frames, what the encoder sees of them, and every tube in the colour of its prototype.

    A model without prototypes shows its encoder's tokens instead, their three principal components as a colour.
    """
    read = batch["index"] >= 0
    if not read.any():
        return
    video = data.normalize(batch["video"][read].to(env.device))
    model.eval()
    with env.autocast():
        tokens = None if model.loss == "sigma" else model.features(video).float()
        chosen = model.assign(video) if model.loss == "sigma" else None
    model.train()
    if chosen is not None:                                       # the commonest prototypes get the first hues
        colours = hues(torch.bincount(chosen.flatten(), minlength=len(model.prototypes)).argsort(descending=True).argsort()[chosen])
    else:
        flat = tokens.flatten(0, 1) - tokens.flatten(0, 1).mean(dim=0)
        _, _, axes = torch.pca_lowrank(flat.cpu(), 3)
        colours = flat @ axes.to(flat)
        colours = ((colours / colours.std(dim=0).clamp(min=1e-6)).clamp(-2, 2) / 4 + 0.5).unflatten(0, tokens.shape[:2])
    T, H, W = model.grid
    times = torch.linspace(0, T - 1, min(columns, T)).long().tolist()
    groups = []
    for clip, mask, colour in zip(batch["video"][read], batch["mask"][read].view(-1, T, 1, H, W).float(), colours.view(-1, T, H, W, 3).float().cpu()):
        frames = [clip[:, TUBELET * t].float() / 255 for t in times]
        hidden = [F.interpolate(mask[t][None], size=clip.shape[-2:], mode="nearest")[0] for t in times]
        groups.append([("video", frames), ("what the\nencoder sees", [frame * (1 - h) + 0.85 * h for frame, h in zip(frames, hidden)]),
                       ("cluster of\nevery tube" if chosen is not None else "encoder\ntokens, PCA", [tint(frame, colour[t]) for frame, t in zip(frames, times)])])
    sheet(path, groups)


def hues(number):
    """Numbers [...] -> colours [..., 3]: golden-ratio hues, so that neighbours in number are far apart in colour."""
    hue = (number * 0.6180339887) % 1
    return (hue[..., None] * 6 + hue.new_tensor([0.0, 4.0, 2.0])).fmod(6).sub(3).abs().sub(1).clamp(0, 1)


def tint(frame, colour):
    """frame [3, H, W] in [0, 1], in grey under the colours [h, w, 3] of its parts."""
    colour = F.interpolate(colour.permute(2, 0, 1)[None], size=frame.shape[-2:], mode="nearest-exact")[0]
    return 0.35 * frame.mean(dim=0, keepdim=True) + 0.65 * colour


def sheet(path, groups, tile=96, margin=120):
    """A PNG of groups of rows: (caption, pictures [3, H, W] in [0, 1]) each. Raises OSError."""
    columns, rows = max(len(pictures) for group in groups for _, pictures in group), sum(map(len, groups))
    page, top = Image.new("RGB", (margin + columns * (tile + 4), 8 + rows * (tile + 4) + len(groups) * 14), "white"), 8
    for group in groups:
        for caption, pictures in group:
            ImageDraw.Draw(page).text((8, top + tile // 2 - 12), caption, fill="black", font_size=15)
            for column, picture in enumerate(pictures):
                picture = Image.fromarray((picture * 255).byte().permute(1, 2, 0).contiguous().numpy())
                page.paste(picture.resize((tile, tile), Image.BOX), (margin + column * (tile + 4), top))       # enlarged, BOX keeps edges
            top += tile + 4
        top += 14
    replace_file(path, lambda file: page.save(file, format="PNG"))


def plot(records, names, path, width=250, height=150):
    """curve.png: a panel for each of these numbers of log.jsonl over the steps, and below them the k-NN results."""
    curves = {name: [(r["step"], r[name]) for r in records if r.get(name) is not None] for name in names}
    curves = {name: points for name, points in curves.items() if len(points) > 1}
    page = Image.new("RGB", ((width + 20) * max(1, len(curves)), height + 90), "white")
    draw = ImageDraw.Draw(page)
    for panel, (name, points) in enumerate(curves.items()):
        left, low, high = panel * (width + 20) + 10, min(v for _, v in points), max(v for _, v in points)
        first, last = points[0][0], points[-1][0]
        place = lambda step, value: (left + (step - first) / (last - first) * width, 30 + height - (value - low) / (high - low or 1) * height)
        draw.rectangle((left, 30, left + width, 30 + height), outline="#bbbbbb")
        draw.text((left, 8), f"{name}: {low:.3g} to {high:.3g}", fill="black", font_size=14)
        draw.text((left, 34 + height), f"step {first} to {last}", fill="#666666", font_size=13)
        draw.line([place(*point) for point in points], fill="#1f5fa8", width=2)
    draw.text((10, 60 + height), "   ".join(f"{r['eval']} top-1 at step {r['step']}: {r['top1']:g}%" for r in records if "top1" in r), fill="black", font_size=14)
    replace_file(path, lambda file: page.save(file, format="PNG"))


# ============ evaluation: checkpoints of ours, the authors', VideoMAE's ============

def read_weights(path):
    """A checkpoint -> its tensors under our names, and what these and its `args` say of the model, by the flags' names.

    Read are this project's files, the authors', VideoMAE's from pretraining (the same names) and from fine-tuning (no
    "encoder."). Where a file of ours says more than tensors can (frames, image size), `args` has it. Raises ValueError.
    """
    content = load_checkpoint(path)
    state = next((content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)), content)
    state = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    for prefix in ("module.", "_orig_mod.", "backbone."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not any(name.startswith("encoder.") for name in state):
        state = {name if name.startswith(("head.", "fc_norm.")) else f"encoder.{name}": value for name, value in state.items()}
    embedding = state.get("encoder.patch_embed.proj.weight")
    if embedding is None or embedding.ndim != 5:
        raise ValueError(f"{path}: holds no video model (there is no encoder.patch_embed.proj.weight of five dimensions)")
    width, patch = embedding.shape[0], embedding.shape[-1]
    said = content["args"] if isinstance(content.get("args"), dict) else {}
    facts = {name: said[name] for name in ("frames", "image_size", "stride") if isinstance(said.get(name), (int, float))}
    facts["size"] = next((size for size, shape in SIZES.items() if (shape[0], shape[1][0]) == (patch, width)), None)
    if facts["size"] is None:
        raise ValueError(f"{path}: an encoder {width} wide with patches of {patch} pixels is none of the sizes {', '.join(SIZES)}")
    prototypes, out = (state[name].shape[0] if name in state and state[name].ndim == 2 else 0 for name in ("prototypes", "decoder.head.weight"))
    facts["loss"], facts["prototypes"] = ("sigma", prototypes) if prototypes else ("l2", 1)
    facts["teacher"] = next((name for name, (width, *_) in TEACHERS.items() if width == out), "vitb16")
    guess = "mlp" if "head.0.weight" in state else "pixel" if facts["loss"] == "l2" and out in (0, TUBELET * patch ** 2 * 3) else "dino"
    facts["target"] = said["target"] if said.get("target") in ("mlp", "dino", "pixel") else guess
    return state, {**facts, "step": content["step"] if isinstance(content.get("step"), int) else 0}


def load_weights(module, state, path, free=()):
    """Loads what `module` has. A tensor that is missing, of another shape, or of an encoder block the module lacks is a
    ValueError with its name, unless the name starts with one of `free`; returns those left as they were."""
    wanted = module.state_dict()
    wrong = {name: f"{name} is {tuple(state[name].shape)} instead of {tuple(value.shape)}" if name in state else f"{name} is missing"
             for name, value in wanted.items() if name not in state or state[name].shape != value.shape}
    left = [name for name in wrong if name.startswith(tuple(free))]
    wrong = [text for name, text in wrong.items() if name not in left] + [f"{name} is unknown" for name in state if name.startswith("encoder.blocks.") and name not in wanted]
    if wrong:
        raise ValueError(f"{path} fits only in part: {'; '.join(wrong[:4])}{f'; and {len(wrong) - 4} more' if len(wrong) > 4 else ''}")
    module.load_state_dict({name: state.get(name, value) if name not in left else value for name, value in wanted.items()})
    return left


def open_model(env, args, path):
    """The pretrained SIGMA of a checkpoint, on the device, to be used as it is."""
    with mistakes():
        model = make_model(args)
        load_weights(model, args.weights, path)
        args.out.mkdir(parents=True, exist_ok=True)
        log = Log(env, args.out / "log.jsonl", math.inf)         # a run's own lines stay
    args.weights = None
    say(env, f"{path}: SIGMA {args.size}, target {args.target}, step {args.step}; {args.frames} frames of {args.image_size}x{args.image_size}, every {args.stride or 'part of the video'}; results in {args.out}")
    return model.to(env.device).eval().requires_grad_(False), log


def labelled(env, args):
    """open_data, for what needs labels of both."""
    train, val = open_data(env, args)
    if train.labels.min() < 0:
        raise ValueError(f"--data {args.data} has no labels: it needs class folders, or a list with a label on every line")
    if val is None:
        raise ValueError("--val is missing: the labelled videos to test on")
    return train, val


# ============ evaluation: k-NN and linear probe of frozen features ============

def probe(env, args):
    model, log = open_model(env, args, args.probe)
    with mistakes():
        train, val = labelled(env, args)
        bank, queries = features(env, args, model, train), features(env, args, model, val)
        if not len(bank[0]) or not len(queries[0]):
            raise ValueError(f"none of the videos in {args.val if len(bank[0]) else args.data} can be read")
    for name, top1 in (("k-NN", knn(*bank, *queries)), ("linear", linear_probe(*bank, *queries, device=env.device, seed=args.seed))):
        log.write(eval=name.lower().replace("-", ""), step=args.step, top1=round(top1, 2))
        say(env, f"{name} top-1: {top1:.2f}% of {len(queries[0])} videos")


def linear_probe(bank, bank_labels, queries, labels, device="cpu", seed=0, epochs=30, lr=1e-3, batch_size=64):
    """Top-1 in percent of a linear layer trained on frozen features: AdamW, lr 1e-3, 30 epochs, as the paper.

    Where the paper is silent: each feature is standardised by its mean and deviation over the training set (MAE's probe
    has a BatchNorm without parameters there), or one lr would not suit every model's scale; the layer starts at zero,
    lr falls as a cosine, batches are of 64 and no weight decays. Every rank computes the same.
    """
    std, mean = torch.std_mean(bank, dim=0, correction=0)
    x, y = ((bank - mean) / (std + 1e-6)).to(device), bank_labels.to(device)
    layer = torch.nn.Linear(x.shape[1], int(max(bank_labels.max(), labels.max())) + 1).to(device)
    torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch_size))
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=data.seeded(seed, epoch)).to(device).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = layer(((queries - mean) / (std + 1e-6)).to(device)).argmax(dim=1).cpu() == labels
    return 100 * right.float().mean().item()


# ============ evaluation: fine-tuning ============

class Classifier(torch.nn.Module):
    """VideoMAE's model for fine-tuning, and its parameters' names: the encoder without its final norm, the mean of all
    tokens, LayerNorm, a linear head that starts near zero. video [B, 3, T, H, W] -> logits [B, classes]."""
    def __init__(self, size, classes, frames, image_size, drop_path=0.1):
        super().__init__()
        self.patch, (width, depth, heads), *_ = SIZES[size]
        self.num_tubes = frames // TUBELET * (image_size // self.patch) ** 2
        self.encoder = Encoder(self.num_tubes, self.patch, width, depth, heads, drop_path)
        self.encoder.norm = torch.nn.Identity()                  # its place is taken by fc_norm, after the mean
        self.fc_norm = torch.nn.LayerNorm(width, eps=1e-6)
        self.head = torch.nn.Linear(width, classes)
        torch.nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, video):
        everything = torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)
        return self.head(self.fc_norm(self.encoder(patchify(video, self.patch), everything).mean(dim=1)))


def layer_groups(model, decay=0.75):
    """parameter_groups, layer by layer: the head learns at the full rate, block i of n at decay^(n - i), the embedding at decay^(n + 1)."""
    depth = len(model.encoder.blocks)
    layers = [model.encoder.patch_embed, *model.encoder.blocks, torch.nn.ModuleList([model.fc_norm, model.head])]
    return [{**group, "lr_scale": decay ** (depth + 1 - i)} for i, layer in enumerate(layers) for group in parameter_groups(layer)]


def augmentation(flip):
    """RandAugment m7-n4, horizontal flip, random erasing: one draw for all frames of a clip, uint8 [T, 3, H, W] -> the same.

    As timm's "rand-m7-n4": each of the four is applied half of the time, and magnitude 7 is of 10. Without its noise on
    the magnitude; erased is to ImageNet's mean, not to noise, as the clip is still uint8.
    """
    from torchvision.transforms import v2                        # here, for it takes two seconds that only fine-tuning needs
    mean = [round(255 * m) for m in data.IMAGENET_MEAN]
    one = v2.RandomApply([v2.RandAugment(1, 7, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=mean)], p=0.5)
    return v2.Compose([one] * 4 + [v2.RandomHorizontalFlip(0.5 if flip else 0.0), v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=mean)])


def finetune(env, args):
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    with mistakes():
        train, val = labelled(env, args)
        classes = max(int(train.labels.max()) + 1, len(train.classes or ()))
        if val.labels.max() >= classes:
            raise ValueError(f"--val {args.val} has label {int(val.labels.max())}, but the {classes} classes of --data end at {classes - 1}")
        torch.manual_seed(args.seed)
        model = Classifier(args.size, classes, args.frames, args.image_size)
        new = load_weights(model, args.weights, args.finetune, free=("fc_norm.", "head.")) if args.weights else ["all"]
        args.weights = None
        train_set = data.Clips(train, args.frames, args.stride, args.image_size, args.seed, True, args.repeats, draw_crop=data.draw_resized, transform=augmentation(args.flip))
        test_set = data.Clips(val, args.frames, args.stride, args.image_size, args.seed, False, views=(args.test_clips, 3))
    model.to(env.device)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    say(env, f"fine-tuning {args.size} from {args.finetune} (new: {', '.join(new) or 'nothing'}): {classes} classes, {len(train)} videos, {env.world} x {args.batch_size} clips a step, "
             f"{env.precision} on {env.device.type}, {'flipped' if args.flip else 'not flipped'}, results in {args.out}")

    def objective(model, batch, step):                           # mixing and drop path draw the same in a resumed run
        torch.manual_seed(data.seeded(args.seed, step, env.rank, int(batch["index"][0])).initial_seed())
        video = data.normalize(batch["video"].to(env.device, non_blocking=True))
        video, target = mix(tv_tensors.Video(video), batch["label"].to(env.device, non_blocking=True))
        return F.cross_entropy(model(video.as_subclass(torch.Tensor)).float(), target, label_smoothing=0.1), {}

    def evaluate(log, step):
        if step == 0:                                            # chance, at the price of a test
            return
        top1, top5, count = multi_view(env, args, model, test_set)
        log.write(eval="finetune", step=step, top1=round(top1, 2), top5=round(top5, 2), videos=count)
        say(env, f"fine-tuned top-1: {top1:.2f}%, top-5: {top5:.2f}% of {count} videos, {args.test_clips} clips x 3 crops each")

    fit(env, args, model, layer_groups(model), (0.9, 0.999), train_set, objective, evaluate, lambda log: None)


@torch.no_grad()
def multi_view(env, args, model, clips):
    """Top-1 and top-5 in percent and the number of videos, over all ranks: each video once, by the softmax averaged over its views."""
    views = clips.views[0] * clips.views[1]
    sampler = data.OnceSampler(range(len(clips))[env.rank::env.world], max(1, args.batch_size // views))
    right1, right5, count, missed = 0, 0, 0, 0
    was_training = model.training
    model.eval()
    for batch in tqdm(data.load(clips, sampler, env.workers, pin_memory=env.device.type == "cuda"), desc="test", total=len(sampler), leave=False, disable=env.rank > 0 or not sys.stderr.isatty()):
        with env.autocast():
            logits = model(data.normalize(batch["video"].to(env.device, non_blocking=True)))
        best = logits.float().softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1).topk(min(5, logits.shape[1])).indices.cpu()   # [videos, 5]
        label = batch["label"][::views, None]
        hits = (best == label) & (label >= 0)                    # an unreadable video has label -1
        right1, right5 = right1 + hits[:, 0].sum().item(), right5 + hits.any(dim=1).sum().item()
        count, missed = count + (label >= 0).sum().item(), missed + (label < 0).sum().item()
        for path, reason in batch["bad"]:
            tqdm.write(f"unreadable, left out: {path}: {reason}")
    model.train(was_training)
    right1, right5, count, missed = (int(over_ranks(env, value, "SUM")) for value in (right1, right5, count, missed))
    if missed:
        say(env, f"warning: {missed} of {missed + count} test videos are unreadable and left out")
    return 100 * right1 / max(1, count), 100 * right5 / max(1, count), count


# ============ evaluation: unsupervised video object segmentation ============

def segment(env, args):
    """K-means of every clip's tube features; where there are masks, mIoU by the paper's two protocols. On rank 0 alone.

    The paper leaves open what exactly is compared. Here a clip is the middle `frames` frames of a video, its whole
    picture squeezed to the model's square, so that no object is cut off; the background is one of the objects, in their
    number K as in the mean; mIoU is the mean over a clip's objects, then over clips.
    """
    model, log = open_model(env, args, args.segment)
    torch.set_float32_matmul_precision("highest")                # TF32 would lose the small differences of K-means
    with mistakes():
        items = find_masks(env, args)
    if env.rank > 0:
        return
    shown = set(torch.linspace(0, len(items) - 1, min(3, len(items))).long().tolist())
    times = torch.linspace(0, model.grid[0] - 1, min(8, model.grid[0])).long().tolist()
    scores, groups, missed = [], [], 0
    for number, item in enumerate(tqdm(items, desc="segment", leave=False, disable=not sys.stderr.isatty())):
        try:
            clip, truth = read_masked(*item, args)
        except data.VideoError as error:
            missed += 1
            tqdm.write(f"unreadable, left out: {item[0][0] if isinstance(item[0], list) else item[0]}: {error}")
            continue
        with torch.no_grad(), env.autocast():
            tokens = model.features(data.normalize(clip[None].to(env.device)))[0].float()      # [N, D]
        objects = [] if truth is None else truth[truth != IGNORED].unique().tolist()
        scored = len(objects) > 1                                # a background alone is no segmentation
        few, many = (kmeans(tokens, k, args.seed).cpu().view(model.grid) for k in (len(objects) if scored else 4, 10))
        captions, colours = ("4 clusters", "10 clusters"), hues(few)
        if scored:
            matched, column = match_one_to_one(overlap(truth, few, len(objects)))
            merged = match_many_to_one(overlap(truth, many, 10))
            scores.append([100 * matched, 100 * merged])
            captions = (f"{len(objects)} clusters\nmIoU {100 * matched:.0f}%", f"10 clusters\nmIoU {100 * merged:.0f}%")
            colours = object_hues(torch.tensor(column).argsort()[few])                         # a cluster in its object's colour
        if number in shown:
            frames = [clip[:, TUBELET * t].float() / 255 for t in times]
            groups.append([("video", frames)])
            if scored:
                place = (truth[..., None] > torch.tensor(objects)).sum(dim=-1)                 # mask value -> which of the objects
                groups[-1].append(("ground truth", [tint(frame, object_hues(place[TUBELET * t])) for frame, t in zip(frames, times)]))
            for caption, colour in zip(captions, (colours, hues(many))):
                groups[-1].append((caption, [tint(frame, colour[t]) for frame, t in zip(frames, times)]))
    if missed == len(items):
        stop_with(f"none of the {missed} clips in {args.data} can be read", code=1)
    if missed:
        say(env, f"warning: {missed} of {len(items)} clips are unreadable and left out")
    with mistakes():
        sheet(args.out / "segments.png", groups)
        if args.loss == "sigma":
            prototype_sheet(env, args, model, items)
    if not scores:
        return say(env, f"{args.data} has no masks to compare with: only pictures, in {args.out / 'segments.png'}")
    few, many = torch.tensor(scores).mean(dim=0).tolist()
    log.write(eval="segment", step=args.step, miou=round(few, 2), miou_overclustering=round(many, 2), clips=len(scores))
    say(env, f"segmentation of {len(scores)} clips: mIoU {few:.2f}% by clustering, {many:.2f}% by over-clustering; pictures in {args.out / 'segments.png'}")


def object_hues(place):
    """Which of a clip's objects [...] -> colours [..., 3]; the first is the background, black."""
    return hues(place) * (place > 0)[..., None]


IGNORED = 255   # the mask value that counts for nothing, as DAVIS


def find_masks(env, args):
    """--data -> [(a video file, or its frames' files; its mask video, its frames' masks, or None)].

    DAVIS: every folder of pictures below JPEGImages, masks of the same names below Annotations; frames without a mask are
    skipped where others have one. Of a full DAVIS the validation clips (ImageSets/2017/val.txt), as the paper. A folder
    VIDEOS of videos has its masks in VIDEOS-masks, as grey lossless .mkv: the demo's are.
    """
    root = None if args.demo else Path(args.data)
    if root is None or not (root / "JPEGImages").is_dir():
        videos = open_data(env, args)[1 if args.demo else 0]
        paths = [Path(videos.path(i)) for i in range(len(videos))]
        masks = [Path(f"{videos.root}-masks", Path(videos.name(i)).with_suffix(".mkv")) for i in range(len(videos))]
        return [(path, mask if mask.exists() else None) for path, mask in zip(paths, masks)]
    folders, items = {}, []
    for path in sorted((root / "JPEGImages").rglob("*.jpg")):
        folders.setdefault(path.parent, []).append(path)
    names = root / "ImageSets/2017/val.txt"
    chosen = set(names.read_text().split()) if names.is_file() else {folder.name for folder in folders}
    for folder, frames in folders.items():
        masks = [root / "Annotations" / frame.relative_to(root / "JPEGImages").with_suffix(".png") for frame in frames]
        kept = [(frame, mask) for frame, mask in zip(frames, masks) if mask.exists()]
        if folder.name in chosen:
            items.append(tuple(map(list, zip(*kept))) if kept else (frames, None))
    if not items:
        raise ValueError(f"{root / 'JPEGImages'} has no .jpg files{f' of the clips in {names}' if names.is_file() else ''}")
    return items


def read_masked(video, masks, args):
    """The middle clip, uint8 [3, T, size, size], and its masks at their own size, int64 [T, H, W], or None. Raises VideoError."""
    with data.file_errors():
        if isinstance(video, list):
            numbers = [min(n, len(video) - 1) for n in data.frame_numbers(len(video), args.frames, args.stride)]
            pictures = [Image.open(video[n]).convert("RGB").resize((args.image_size, args.image_size), Image.BILINEAR) for n in numbers]
            clip = np.stack([np.asarray(picture) for picture in pictures]).transpose(3, 0, 1, 2)
        else:
            with data.Video(video) as file:
                numbers = data.frame_numbers(file.frames, args.frames, args.stride)
                clip, = file.read([(numbers, lambda width, height: (0, 0, width, height))], args.image_size)
        if masks is None:
            return torch.from_numpy(clip), None
        if isinstance(masks, list):
            truth = [np.asarray(Image.open(masks[n])) for n in numbers]
        else:
            with av.open(str(masks)) as file:
                stored = [frame.to_ndarray() for frame in file.decode(video=0)]
            truth = [stored[min(n, len(stored) - 1)] for n in numbers]
        if truth[0].ndim != 2:
            raise ValueError(f"its masks have {truth[0].ndim} dimensions: they must be indexed or grey pictures")
        return torch.from_numpy(clip), torch.from_numpy(np.stack(truth)).long()


def kmeans(x, k, seed=0, restarts=5, iterations=50):
    """x [N, D] -> cluster numbers [N], int64: the best of R k-means++ starts, run side by side; the same for the same seed."""
    x, k, generator = x - x.mean(dim=0), min(k, len(x)), data.seeded(seed)
    length = x.square().sum(dim=1)[:, None, None]

    def distance(centres):                                       # squared, [R, k, D] -> [N, R, k]
        product = (x @ centres.flatten(0, 1).T).unflatten(1, centres.shape[:2])
        return (length - 2 * product + centres.square().sum(dim=2)).clamp(min=0)

    centres = x[torch.randint(len(x), (restarts, 1), generator=generator)]
    while centres.shape[1] < k:                                  # the next centre: drawn by squared distance to the nearest so far
        weight = distance(centres).amin(dim=2).T.cpu() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(weight, 1, generator=generator)]], dim=1)
    cluster = None
    for _ in range(iterations):
        before, (cost, cluster) = cluster, distance(centres).min(dim=2)                        # [N, R]
        if before is not None and torch.equal(before, cluster):
            break
        member = F.one_hot(cluster, k).to(x.dtype).flatten(1)                                  # [N, R * k]; a product repeats exactly, index_add on a GPU does not
        size = member.sum(dim=0).view(restarts, k, 1)
        centres = torch.where(size > 0, (member.T @ x).view(restarts, k, -1) / size.clamp(min=1), centres)
    return cluster[:, cost.sum(dim=0).argmin()]


def overlap(truth, clusters, k):
    """truth [T, H, W], clusters of tubes [T/2, h, w] -> the number of pixels each object shares with each cluster, [objects, k]."""
    pixels = F.interpolate(clusters[:, None].float(), truth.shape[1:], mode="nearest-exact")[:, 0].long().repeat_interleave(TUBELET, dim=0)
    counted = truth != IGNORED
    _, place = truth[counted].unique(return_inverse=True)
    return torch.bincount(place * k + pixels[counted], minlength=int(place.max() + 1) * k).view(-1, k)


def iou(table):
    """Shared pixels [objects, k] -> intersection over union of every pair, float64."""
    table = table.double()
    return table / (table.sum(dim=1, keepdim=True) + table.sum(dim=0) - table).clamp(min=1)


def match_one_to_one(table):
    """Clustering protocol: every object gets a cluster of its own so that the sum of IoUs is largest (k >= objects).

    Returns the mean IoU and each object's cluster. The Hungarian algorithm by shortest augmenting paths, O(objects² k).
    """
    scores = iou(table)
    (rows, columns), gain = table.shape, scores.tolist()
    u, v, owner = [0.0] * (rows + 1), [0.0] * (columns + 1), [0] * (columns + 1)               # prices; owner[column] is a row; 0 is none
    for row in range(1, rows + 1):
        owner[0], column, least, before, done = row, 0, [math.inf] * (columns + 1), [0] * (columns + 1), [False] * (columns + 1)
        while owner[column]:                                     # grow the tree of cheapest paths until it meets a free column
            done[column], here = True, column
            for j in range(1, columns + 1):
                cost = -gain[owner[here] - 1][j - 1] - u[owner[here]] - v[j]
                if not done[j] and cost < least[j]:
                    least[j], before[j] = cost, here
            column = min((j for j in range(1, columns + 1) if not done[j]), key=least.__getitem__)
            step = least[column]
            for j in range(columns + 1):
                if done[j]:
                    u[owner[j]], v[j] = u[owner[j]] + step, v[j] - step
                else:
                    least[j] -= step
        while column:                                            # flip the path
            owner[column], column = owner[before[column]], before[column]
    chosen = sorted((owner[j], j - 1) for j in range(1, columns + 1) if owner[j])
    return scores[[row - 1 for row, _ in chosen], [j for _, j in chosen]].mean().item(), [j for _, j in chosen]


def match_many_to_one(table):
    """Over-clustering protocol: each cluster goes to the object it overlaps most; mean IoU of the objects so composed."""
    merged = table @ F.one_hot(table.argmax(dim=0), len(table))                                # [objects, objects]
    return iou(merged).diagonal().mean().item()


@torch.no_grad()
def prototype_sheet(env, args, model, items, rows=8, columns=8, context=5):
    """prototypes.png: for the prototypes that win most tubes, the tubes of different clips that score highest, framed, with
    their surroundings: `context` patches a side."""
    if args.target == "dino":
        try:
            model.load_teacher(args.dino_weights)
        except (OSError, ValueError, RuntimeError) as error:
            return say(env, f"warning: no prototypes.png: {str(error).splitlines()[0]}")
    clips, best, used = [], [], 0
    for number in torch.linspace(0, len(items) - 1, min(64, len(items))).long().tolist():
        with contextlib.suppress(data.VideoError):
            clip, _ = read_masked(items[number][0], None, args)
            video = data.normalize(clip[None].to(env.device))
            everything = torch.arange(model.num_tubes, device=env.device)[None]
            with env.autocast():
                x_phi = model.forward_target(video, patchify(video, model.patch), everything)[0].float()
            scores = F.normalize(x_phi, dim=-1) @ F.normalize(model.prototypes, dim=-1).T      # [N, K]
            used += torch.bincount(scores.argmax(dim=1), minlength=scores.shape[1]).cpu()
            best.append([part.cpu() for part in scores.max(dim=0)])                            # of every prototype: score and tube
            clips.append(clip[:, ::TUBELET])
    if not clips:
        return
    score, tube = (torch.stack(part) for part in zip(*best))                                   # [clips, K]
    groups, side = [], min(context, model.grid[1]) * model.patch
    for k in used.argsort(descending=True)[:min(rows, int((used > 0).sum()))].tolist():
        pictures = []
        for c in score[:, k].argsort(descending=True)[:columns].tolist():
            t, y, x = (int(i) for i in torch.unravel_index(tube[c, k], model.grid))
            y, x = y * model.patch, x * model.patch
            picture = clips[c][:, t].float() / 255
            low, high = (lambda a: max(a - 1, 0)), (lambda a: min(a + model.patch, args.image_size - 1))
            for part in (picture[:, low(y), low(x):high(x) + 1], picture[:, high(y), low(x):high(x) + 1], picture[:, low(y):high(y) + 1, low(x)], picture[:, low(y):high(y) + 1, high(x)]):
                part.copy_(torch.tensor([1.0, 0.1, 0.1])[:, None])
            top, left = (min(max(a + model.patch // 2 - side // 2, 0), args.image_size - side) for a in (y, x))
            pictures.append(picture[:, top:top + side, left:left + side])
        groups.append([(f"prototype {k}\n{100 * used[k] / used.sum():.2g}% of tubes", pictures)])
    sheet(args.out / "prototypes.png", groups)
    say(env, f"the most used prototypes, each with the tubes that score highest, in {args.out / 'prototypes.png'}")


# ============ what a step costs ============

def bench(env, args):
    """Times --steps (5) training steps on random clips that lie on the device, then each part alone, forward and backward.

    Printed: clips a second over all ranks, MFU where the device's peak is known, the share of what a large matrix product
    reaches, peak memory of a process, and the parts' milliseconds a clip; medians on a CPU, means on a GPU, which is waited
    for at the end alone. The parts run one after another and uncompiled, so they need not add up to the step.
    """
    torch.manual_seed(args.seed)
    model = make_model(args).to(env.device)
    model.teacher_checked = True                                 # random weights cost as much
    trained, scaler, cuda = wrapped(env, args, model), loss_scaler(env), env.device.type == "cuda"
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-5, betas=(0.9, 0.95), fused=True)
    stored = torch.randint(256, (args.batch_size, 3, args.frames, args.image_size, args.image_size), dtype=torch.uint8)
    mask = tube_mask(args.batch_size, model.grid[0], model.grid[1] * model.grid[2], args.mask_ratio)
    if cuda:
        stored, mask = stored.pin_memory(), mask.pin_memory()
    clips = stored.to(env.device)

    steps = args.steps or 5
    group, wait = (steps, torch.cuda.synchronize) if cuda else (1, lambda: None)

    def seconds_of(work, warm_up=1):
        for _ in range(warm_up):
            work()
        laps = []
        for _ in range(steps // group):
            wait()
            began = time.monotonic()
            for _ in range(group):
                work()
            wait()
            laps.append((time.monotonic() - began) / group)
        return sorted(laps)[len(laps) // 2]

    def update():
        scaler.step(optimizer)
        scaler.update(None if env.precision == "fp16" else 1.0)

    def step():
        with env.autocast():
            loss, _ = trained(data.normalize(clips), mask)
        scaler.scale(loss).backward()
        update()
        optimizer.zero_grad(set_to_none=True)

    def there_and_back(forward, *inputs):                        # any gradient is as dear as any other
        inputs = [x.detach().requires_grad_() for x in inputs]
        with env.autocast():
            out = forward(*inputs)
        if out.requires_grad:
            out.backward(torch.randn_like(out))

    seconds = seconds_of(step, warm_up=3)
    if cuda:
        memory = torch.cuda.max_memory_allocated()
    else:
        import resource                                          # Unix alone has it
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    speed = args.batch_size * env.world / seconds
    flops = args.clip_flops * speed / env.world
    say(env, f"SIGMA {args.size}, target {args.target}, loss {args.loss}, {args.prototypes} prototypes; {env.world} x {args.batch_size} clips of {args.frames} frames of {args.image_size} pixels; "
             f"{env.precision} on {torch.cuda.get_device_name() if cuda else f'{torch.get_num_threads()} CPU threads'}{', compiled' if args.compile else ''}")
    with env.autocast():                                         # what the device reaches where nothing but products is asked of it
        n = 8192 if cuda else 2048
        square = torch.randn(n, n, device=env.device) / n ** 0.5
        square = square @ square                                 # now in autocast's type
        product = 2 * n ** 3 / seconds_of(lambda: square @ square)
    say(env, f"{speed:.2f} clips/s, {1000 * seconds:.1f} ms a step; {args.clip_flops / 1e9:.1f} GFLOP a clip, {flops / 1e12:.3f} TFLOP/s a process"
             f"{f', MFU {flops / env.peak:.1%}' if env.peak else ''}, {flops / product:.0%} of a large matrix product's {product / 1e12:.3f} TFLOP/s; {memory / 2 ** 30:.2f} GiB a process at most")

    visible, masked = split_mask(mask, env.device)
    video = data.normalize(clips)
    tubes = patchify(video, model.patch)
    shown = take_tubes(tubes, visible)
    with torch.no_grad(), env.autocast():
        encoded, x_psi, x_phi = model.encoder(shown, visible), model.forward_video(shown, visible, masked).flatten(0, 1), model.forward_target(video, tubes, masked).flatten(0, 1)
    learned = [x_phi] if args.target == "mlp" else []            # other targets get no gradient
    parts = {"copy, normalise, cut into tubes": lambda: take_tubes(patchify(data.normalize(stored.to(env.device, non_blocking=True)), model.patch), visible),
             "encoder": lambda: there_and_back(lambda: model.encoder(shown, visible)),
             "decoder": lambda: there_and_back(lambda x: model.forward_decoder(x, visible, masked), encoded),
             {"mlp": "φ, an MLP", "dino": "φ, the DINO teacher", "pixel": "pixel target"}[args.target]: lambda: there_and_back(lambda: model.forward_target(video, tubes, masked)),
             "loss, of which": lambda: there_and_back(lambda psi, phi=x_phi: model.forward_loss(psi, phi)[0], x_psi, *learned)}
    if args.loss == "sigma":
        scores, assign = x_psi.float() @ model.prototypes.detach().T / 16, sinkhorn_argmax if args.assignment == "hard" else sinkhorn
        parts["  scores"] = lambda: (there_and_back(lambda psi: psi @ model.prototypes.detach().T, x_psi), there_and_back(lambda phi=x_phi: phi @ model.prototypes.T, *learned))
        parts["  Sinkhorn"] = lambda: [assign(scores, args.eps) for _ in range(2)]
    parts["optimizer"] = update
    for name, part in parts.items():
        optimizer.zero_grad()
        if name == "optimizer":
            there_and_back(lambda: scaler.scale(model(video, mask)[0]))
        say(env, f"{1000 * seconds_of(part) / args.batch_size:9.3f} ms a clip  {name}")


# ============ main ============

def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")        # names of files can hold what a terminal cannot show
    args = parse_args(argv)
    args.clip_flops = clip_flops(args) if args.mode in ("pretrain", "bench") else 0   # before there are ranks: what has no storage cannot be reduced
    env = start_processes(args)
    args.global_batch = args.batch_size * env.world
    try:
        {"pretrain": pretrain, "probe": probe, "finetune": finetune, "segment": segment, "bench": bench}[args.mode](env, args)
    except (data.VideoError, data.WorkerError) as error:
        stop_with(error, code=1)
    except torch.OutOfMemoryError as error:
        stop_with(f"the GPU's memory is too small: lower --batch-size ({str(error).splitlines()[0]})", code=1)
    if env.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
