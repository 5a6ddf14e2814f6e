"""Pretrain SIGMA, from a laptop to a cluster, and evaluate what it learned.

    torchrun train.py                                     the demo: synthetic videos, minutes on two CPU cores
    torchrun --nproc_per_node 8 train.py --data train.csv --val val.csv --target dino --out runs/k400
    torchrun train.py --data train.csv --init authors.pth      start from released weights
    torchrun train.py --probe runs/demo/checkpoint.pt     k-NN and linear probe of frozen features
    torchrun train.py --finetune authors.pth --data train.csv --val val.csv
    torchrun train.py --segment runs/demo/checkpoint.pt   unsupervised video object segmentation

Plain `python train.py` runs one process. For several machines give torchrun --nnodes and --rdzv_endpoint,
and put --out on a disk that they share. SIGTERM or Ctrl-C lets a training step end and saves. The same
command again resumes from the last checkpoint, on the same loss curve.

The models and the loss are in sigma.py. The first half of this file pretrains: flags, this process, the loop,
what is trained, checkpoints, log, k-NN, pictures. Below the rule, the second half evaluates.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# OpenMP's threads would otherwise spin while they wait, on the cores that decode videos. The variable is read
# when PyTorch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import sigma
from sigma import SIGMA, SIZES, TEACHERS, TUBELET, load_checkpoint

# ============ flags ============
# Each flag is one line with the authors' default. The demo and fine-tuning have other defaults, which follow.
# What is typed always wins. After parse_args nothing changes `args` any more.

DEMO = dict(size="tiny", prototypes=64, mask_ratio=0.75, frames=8, stride=2, image_size=48, epochs=25,
            warmup_epochs=3, lr=4e-3, min_lr=4e-4, eval_every=5)
FINETUNE = dict(epochs=100, warmup_epochs=5, batch_size=16, lr=1e-3, min_lr=1e-6, eval_every=0)
FINETUNE_DEMO = dict(epochs=15, warmup_epochs=1.875, lr=1e-2)
EPILOG = f"""In brackets are the defaults: the authors', but for batch size and precision. The demo's:
{DEMO}
Fine-tuning's: {FINETUNE}; on the demo {FINETUNE_DEMO}.
If --epochs is typed and --warmup-epochs is not, warm-up is at most an eighth of the epochs.
Evaluations take size, target and clips from their checkpoint, but the stride only --probe."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line, without the usage of forty flags."""
    def error(self, message):
        raise Stop(message)


def at_least(least, kind):
    """An argparse type: a finite number of this kind with a lower bound."""
    def parse(text):
        value = kind(text)  # argparse itself tells of a ValueError
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}, and finite")
        return value
    parse.__name__ = kind.__name__  # the name that argparse's message uses
    return parse


def make_parser():
    """The parser of all flags, with the authors' defaults."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EPILOG)
    count = at_least(1, int)
    whole = at_least(0, int)
    positive = at_least(1e-9, float)
    not_negative = at_least(0, float)

    def add(name, kind, default, text):
        """A flag. kind: a type, or the list of its values. default None: it follows from other flags."""
        if default is not None:
            text += f" [{default}]"
        key = "choices" if isinstance(kind, list) else "type"
        parser.add_argument(name, default=default, help=text, **{key: kind})

    # What to do, and the checkpoint to do it with. Without these flags: pretraining, from random weights.
    add_task = parser.add_mutually_exclusive_group().add_argument
    add_task("--init", help="pretraining that starts from the weights of this checkpoint")
    add_task("--probe", help="k-NN and linear probe of this checkpoint, from --data to --val")
    add_task("--finetune", help="train this checkpoint, or `none`, on the labels of --data, test on --val")
    add_task("--segment", help="cluster tubes by this checkpoint's features; mIoU on DAVIS's folders")
    add_task("--bench", action="store_true", help="time training steps of these flags; writes nothing")

    parser.add_argument("--data", nargs="?", const="demo", default="demo",
                        help="demo; a folder of videos (class folders: labels); a list, path[ label] a line")
    add("--val", str, None, "labelled videos, for k-NN in pretraining, and to test --probe and --finetune")
    add("--out", Path, None, "folder for log, checkpoints, pictures; a run in it is resumed [runs/…]")
    add("--dino-weights", str, None, "the public file of --teacher; without it, it is downloaded")

    # The method
    add("--size", list(SIZES), "base", "of the model")
    add("--target", ["mlp", "dino", "pixel"], "mlp", "φ: a trained MLP, frozen DINO, or pixels (VideoMAE)")
    add("--teacher", list(TEACHERS), "vitb16", "DINO network of --target dino")
    add("--loss", ["sigma", "l2"], "sigma", "l2 with mlp collapses; l2 with pixel is VideoMAE [pixel: l2]")
    add("--assignment", ["hard", "soft"], "hard", "Sinkhorn targets: argmax (authors' code) or soft (paper)")
    add("--prototypes", count, 3000, "number of prototypes, K")
    add("--eps", positive, 0.05, "Sinkhorn's ε; the release's 0.03 for SSv2 with ViT-B")
    add("--mask-ratio", positive, 0.9, "share of hidden tubes (a tube: 2 frames x one patch)")

    # Clips
    add("--frames", count, 16, "frames in a clip")
    add("--stride", whole, 4, "from one frame to the next; 0: spread over the video. SSv2: 2, fine-tuned 0")
    add("--image-size", count, 224, "pixels a side")
    add("--repeats", count, 1, "clips from each decoding of a video, in pretraining")
    add("--workers", whole, None, "decoding processes of each rank [its share of cores, to 16; on a CPU 1]")

    # Schedule
    add("--epochs", count, 800, "length of the schedule; fine-tuning on SSv2: 40")
    add("--warmup-epochs", not_negative, 40, "epochs of linear warm-up; an eighth of typed --epochs at most")
    add("--steps", count, None, "stop after so many optimiser steps; --bench: time so many [5]")
    add("--batch-size", count, 32, "clips of a micro-batch, in each process")
    add("--accumulate", count, 1, "micro-batches a step; Sinkhorn balances each by itself")
    add("--lr", positive, 1.5e-4, "peak learning rate, for 256 clips a step")
    add("--min-lr", not_negative, 1e-5, "last learning rate, for 256 clips a step")
    add("--seed", whole, 0, "seed of all random draws")

    # Machine
    add("--precision", ["auto", "bf16", "fp16", "fp32"], "auto", "auto: bf16, old GPUs fp16, CPU fp32")
    parser.add_argument("--compile", action="store_true", help="torch.compile blocks and loss")
    parser.add_argument("--recompute", action="store_true", help="less memory, a third more time")

    # Once in a while
    add("--eval-every", whole, 50, "epochs between k-NN readings and pictures; 0: first and last")
    add("--save-minutes", positive, 10, "between checkpoints, at most")
    add("--keep-every", count, 100, "epochs between checkpoints that stay")
    return parser


def parse_args(argv=None):
    """The flags, and the Weights of their checkpoint, None without. Raises Stop, ValueError, OSError.

    They are parsed twice: to learn what kind of run it is, and with the defaults of that kind."""
    parser = make_parser()
    first = parser.parse_args(argv)
    mode = "pretrain"
    checkpoint = first.init
    for name in ("probe", "finetune", "segment"):
        if getattr(first, name) is not None:
            mode = name
            checkpoint = getattr(first, name)
    if first.bench:
        mode = "bench"
    if first.finetune == "none":  # from random weights
        checkpoint = None
    on_demo = first.data == "demo" and mode != "bench"
    out = first.out
    if out is None:
        name = Path(first.data).absolute().stem  # also of --data .
        out = Path("runs", f"{name}-{mode}".removesuffix("-pretrain"))

    if on_demo:
        parser.set_defaults(**DEMO)
    if mode == "finetune":
        parser.set_defaults(**FINETUNE)
        if on_demo:
            parser.set_defaults(**FINETUNE_DEMO)
    if mode == "segment":
        parser.set_defaults(stride=1)
    if first.target == "pixel":
        parser.set_defaults(loss="l2")
    weights = None
    if checkpoint is not None:
        weights = read_weights(checkpoint, out)
        if mode != "probe":  # only a probe keeps the checkpoint's stride
            weights.settings.pop("stride", None)
        if mode != "pretrain":
            parser.set_defaults(**weights.settings)
    # Untyped, first.epochs is 800: an eighth of that is above every default of the warm-up.
    parser.set_defaults(warmup_epochs=min(parser.get_default("warmup_epochs"), first.epochs / 8))
    args = parser.parse_args(argv)

    args.mode = mode
    args.out = out
    args.demo = None
    if on_demo:
        args.demo = out / "videos"  # the folder of its videos, or that of the run that made the checkpoint
        if checkpoint is not None and Path(checkpoint).with_name("videos").is_dir():
            args.demo = Path(checkpoint).with_name("videos")
        args.data = args.demo / ("davis" if mode == "segment" else "train")
        args.val = args.val or args.demo / "val"
    if weights is not None and args.size != weights.settings["size"]:
        raise Stop(f"{checkpoint} is of --size {weights.settings['size']}")
    if mode == "bench" and args.accumulate > 1:
        raise Stop("--bench times micro-batches: leave --accumulate out")
    if args.batch_size % args.repeats:
        raise Stop("--repeats must divide --batch-size")
    if mode == "finetune" and args.repeats > 1:
        raise Stop("--finetune takes no --repeats: it would mix a clip with another one of the same video")
    return args, weights


# ============ this process ============
# torchrun starts one process for each GPU and numbers them: a process's number is its rank, their number is
# the world's size. All ranks must call a collective operation (a sum or a vote over the ranks) in the same
# order, or they wait for each other for ever. So wrong input, unreadable data and signals are voted on by
# all. Any other error ends one rank, and torchrun then ends the others.

def rank(kind="RANK"):
    """This process's number; LOCAL_RANK: its number on this machine."""
    return int(os.environ.get(kind, 0))


def world(kind="WORLD_SIZE"):
    """The number of processes; LOCAL_WORLD_SIZE: that on this machine."""
    return int(os.environ.get(kind, 1))


class Stop(Exception):
    """Ends the program with one line: a user's mistake (exit code 2), or a run that cannot go on (1).

    All ranks raise it together, so rank 0 alone prints the line."""
    def __init__(self, message, code=2):
        super().__init__(message)
        self.code = code


class Process:
    """What this process computes on: device, precision, workers; and the signal that asked it to stop."""
    def __init__(self, args):
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cpu")
        self.precision = "fp32"
        self.workers = 1
        where = f"{torch.get_num_threads()} CPU threads"
        if self.cuda:
            where = torch.cuda.get_device_name()
            self.device = torch.device("cuda", rank("LOCAL_RANK"))
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")  # TF32 in what autocast leaves in fp32
            self.precision = "bf16"
            if max_over_ranks(torch.cuda.get_device_capability() < (8,)):  # one GPU is older than Ampere
                self.precision = "fp16"
            self.workers = min(16, max(1, data.CORES // world("LOCAL_WORLD_SIZE")))
        if args.precision != "auto":
            self.precision = args.precision
        if args.workers is not None:
            self.workers = args.workers
        self.about = (f"{args.mode}: size {args.size}, target {args.target}; {world()} x {args.batch_size} "
                      f"clips of {args.frames} frames of {args.image_size} pixels, stride {args.stride}; "
                      f"{self.precision} on {where}, {self.workers} workers")

        self.named = set()  # unreadable files that people were told of
        self.finishes_step = False  # whether a signal waits for the end of the training step
        self.stop_signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.hear)

    def hear(self, number, frame):
        """SIGTERM or Ctrl-C: training ends its step and saves; anything else ends at once."""
        if not self.finishes_step:
            sys.exit(128 + number)
        self.stop_signal = number

    def autocast(self):
        """The context in which models run: matrix products in bf16 or fp16."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)


def join_processes():
    """Joins torchrun's process group. Gloo carries what stays on the hosts, so no GPU is waited for there."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if world("LOCAL_WORLD_SIZE") > torch.cuda.device_count():
            raise Stop(f"{world('LOCAL_WORLD_SIZE')} processes, {torch.cuda.device_count()} GPUs: lower "
                       "--nproc_per_node")
    if world() > 1:
        dist.init_process_group(backend)


def max_over_ranks(value):
    """The largest of the ranks' integers. Here the ranks wait for each other, but for no GPU."""
    return sigma.all_reduce(torch.tensor(value, dtype=torch.int64), "MAX").item()


def gather(thing):
    """Anything that pickles, of each rank's own -> the list of all ranks' things, on every rank."""
    everyone = [thing] * world()
    if world() > 1:
        dist.all_gather_object(everyone, thing)
    return everyone


def stop_together(trouble, code=2):
    """Raises Stop in all ranks if any has trouble, a text; those without have None."""
    for said in gather(trouble):
        if said is not None:
            raise Stop(said, code)


@contextmanager
def agreed():
    """Around what reads users' words and files: trouble in one process ends all of them."""
    trouble = None
    try:
        yield
    except (Stop, ValueError, OSError) as error:
        trouble = str(error)
    stop_together(trouble)


def say(message):
    """Prints a line above the progress bar, once for all ranks."""
    if rank() == 0:
        with suppress(OSError):  # a full disk or a closed pipe is no reason to stop
            tqdm.write(message)


def take_folder(args):
    """Makes --out and the demo's videos, locks out a second run while this one lives. -> the lock's file."""
    args.out.mkdir(parents=True, exist_ok=True)
    lock = open(args.out / ".lock", "a")
    try:
        import fcntl
        if rank() == 0:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to --out {args.out}: name another")
    except (OSError, ImportError):  # file systems without locks, Windows: a second run goes unnoticed
        pass
    if args.demo and rank() == 0:
        data.write_demo(args.demo)
    return lock


# ============ the training loop ============
# One loop for pretraining and fine-tuning, which differ in `objective` and `evaluate`.

def fit(args, process, model, groups, train_set, notes, objective, evaluate):
    """Trains until --epochs or --steps are done, from where the run in --out left off.

    groups: AdamW's parameter groups; `lr_scale` in a group scales its learning rate.
    notes: saved with each checkpoint. notes["args"], by curve_of, must be the same in a resumed run.
    objective(model, video [B, 3, T, H, W], batch, step) -> loss, {name: detached 0-dim tensor on the device},
    with the same names on all ranks. `step` seeds what it draws.
    evaluate(log, step): called before the first step, every --eval-every epochs and after the last one."""
    sampler = data.EpochSampler(len(train_set), args.batch_size, rank(), world(), args.seed, args.repeats,
                                args.accumulate)
    steps_per_epoch = sampler.steps_per_epoch // args.accumulate  # the sampler's steps are micro-batches
    last_step = min(args.epochs * steps_per_epoch, args.steps or math.inf)
    clips_per_step = args.batch_size * args.accumulate * world()

    peak_lr = args.lr * clips_per_step / 256  # learning rates are given for 256 clips, as in the paper
    for group in groups:
        group["initial_lr"] = peak_lr * group.pop("lr_scale", 1.0)
    optimizer = torch.optim.AdamW(groups, fused=True)
    # fp16 needs a scaler, or small gradients become 0. bf16 and fp32 get one of scale 1 for another use: the
    # fused AdamW then leaves out steps with NaN or infinite gradients, without a wait for the GPU. DDP has
    # averaged the gradients by then, so all ranks leave out the same steps. Gradients are not clipped.
    fp16 = process.precision == "fp16"
    scaler = torch.amp.GradScaler(process.device.type, init_scale=2.0 ** 16 if fp16 else 1.0)

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    start, log = resume(args, parts, notes["args"])
    step = start
    if step < last_step:
        log.write(run={**vars(args), "from_step": step, "about": process.about, "device": process.device,
                       "torch": torch.__version__, "parameters": sum(p.numel() for p in model.parameters())})
    save = partial(save_checkpoint, args.out, log, parts, notes)
    wrapped = over_processes(args, model)

    # The sampler's batches follow from their number, so that a resumed run goes on with the very next one.
    sampler.start = step * args.accumulate
    sampler.stop = last_step * args.accumulate
    batches = data.load(train_set, sampler, process.workers, process.cuda)
    batches = data.batches_to_device(batches, process.device)

    bar = tqdm(total=last_step, initial=step, disable=rank() > 0 or None)  # None: a bar only on terminals
    line_every = max(1, min(50, last_step // 500))
    evaluations = [record["step"] for record in log.records if "eval" in record]
    evaluated_step = max_over_ranks(max(evaluations, default=-1))  # rank 0 alone has records
    next_save = time.monotonic()  # after the first step, so that a full disk is noticed early
    began = time.monotonic()  # this and the next two start anew at each line of the log
    waited = 0.0
    logged_step = step
    unreadable = {}  # path -> reason, since they were last exchanged with the other ranks
    trouble = None  # why this rank cannot go on
    not_finite = torch.tensor(0, device=process.device)  # steps in a row; stays on the GPU
    process.finishes_step = True
    model.train()
    while True:
        # once in a while: save a checkpoint (it is three times as large as the model), evaluate
        evaluation_due = step in (0, last_step)
        if args.eval_every > 0:
            evaluation_due |= step % (args.eval_every * steps_per_epoch) == 0
        keep_due = step % (args.keep_every * steps_per_epoch) == 0
        if step > start and (evaluation_due or keep_due or time.monotonic() > next_save):
            next_save = time.monotonic() + 60 * args.save_minutes  # after a failure, too: a disk stays full
            epoch = step // steps_per_epoch
            if keep_due:  # before checkpoint.pt, as a run resumed from that does not come back to this step
                save(step, epoch, f"checkpoint-{epoch:04d}.pt")
            saved = save(step, epoch)
            if step == last_step and not max_over_ranks(saved):
                raise Stop("training is done, but not saved: make room and run it again", code=1)
        if evaluation_due and step > evaluated_step:
            evaluate(log, step)
            if log.records:  # of rank 0
                plot_curves(args.out, log.records)
            began = time.monotonic()  # an evaluation is not training time
        if step >= last_step:
            break

        # get the data, or learn that it is time to stop
        asked = time.monotonic()
        try:
            micro_batches = [next(batches) for _ in range(args.accumulate)]
        except (data.VideoError, data.WorkerError) as error:
            trouble = str(error)
        waited += time.monotonic() - asked
        exit_code = 0
        if trouble is not None:
            exit_code = 1
        if process.stop_signal:  # a signal also kills the workers: it is reported, not their trouble
            exit_code = 128 + process.stop_signal
        # All ranks agree before the forward pass: one without a batch must not leave the others waiting in
        # Sinkhorn's sums. This vote is on the hosts, mostly while the GPU still computes the previous step.
        exit_code = max_over_ranks(exit_code)
        if exit_code > 0:
            tell_unreadable(process, unreadable, log, step)
            saved = max_over_ranks(save(step, step // steps_per_epoch))
            say(f"stopped after step {step}; {'the same command goes on' if saved else 'NOT saved'}")
            if exit_code == 1:
                stop_together(trouble, code=1)
            raise SystemExit(exit_code)

        # ----------------------------------------------------------------------------------------------------
        # the training step: whatever must run at every step stands here, and nothing waits for the GPU
        share = share_of_peak(args, step, steps_per_epoch)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        rows = []  # loss and statistics of each micro-batch
        for number, batch in enumerate(micro_batches, start=1):
            # DDP averages the gradients over the ranks in the backward pass of the last micro-batch alone.
            wrapped.require_backward_grad_sync = number == args.accumulate
            with process.autocast():
                loss, stats = objective(wrapped, data.normalize(batch["video"]), batch, step)
            # Gradients of the micro-batches add up, so each is divided by their number.
            scaler.scale(loss / args.accumulate).backward()
            stats["loss"] = loss.detach()
            rows.append(torch.stack(list(stats.values())))
            unreadable.update(batch["bad"])  # other videos took their places
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
        not_finite = (not_finite + 1) * ~grad_norm.isfinite()  # torch.where with a number would wait
        scaler.step(optimizer)
        scaler.update(None if fp16 else 1.0)  # None adapts it
        optimizer.zero_grad()
        step += 1
        # ----------------------------------------------------------------------------------------------------

        # log a line: statistics of this step, the speed since the last line with saving (data_wait: rank 0's)
        epoch_done = step % steps_per_epoch == 0 or step == last_step
        if not epoch_done and step % line_every:
            continue
        means = sigma.all_reduce(torch.stack(rows).mean(0)) / world()
        means = dict(zip(stats, means.tolist()))
        # AdamW's own count of steps, in which those left out are missing, is the same for all parameters.
        steps_taken = int(next(iter(optimizer.state.values()))["step"])
        if epoch_done:
            tell_unreadable(process, unreadable, log, step)
        seconds = time.monotonic() - began
        log.write(step=step, epoch=(step - 1) // steps_per_epoch, **means, lr=peak_lr * share,
                  grad_norm=grad_norm.item(), skipped=step - steps_taken, loss_scale=scaler.get_scale(),
                  data_wait=waited / seconds,
                  clips_per_second=(step - logged_step) * clips_per_step / seconds,
                  peak_gpu_gib=torch.cuda.max_memory_allocated() / 2 ** 30,
                  unreadable_videos=len(log.unreadable))
        if epoch_done and rank() == 0:
            tell_news(args, log, step, steps_per_epoch, last_step - step, clips_per_step, len(train_set))
        in_a_row = not_finite.item()
        if in_a_row >= (50 if fp16 else 5):  # fp16 first has to halve its scale
            raise Stop(f"{in_a_row} steps in a row are not finite. checkpoint.pt is finite: go on with "
                       "another --precision, copy an older one over it, or lower --lr (new --out)", code=1)
        bar.update(step - logged_step)
        began = time.monotonic()
        waited = 0.0
        logged_step = step
    bar.close()


def share_of_peak(args, step, steps_per_epoch):
    """The learning rate's share of its peak: linear warm-up, then half a cosine down to --min-lr."""
    warmup = args.warmup_epochs * steps_per_epoch
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (args.epochs * steps_per_epoch - warmup)  # 0 to 1
    floor = args.min_lr / args.lr
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def over_processes(args, model):
    """The model as training calls it: with --compile compiled, its gradients averaged over processes."""
    if args.compile:
        # Block by block: that compiles fast, and DDP can average gradients during the backward pass. The
        # teacher's blocks, over half of the work, are not in model.modules().
        torch._dynamo.config.cache_size_limit = 64  # in fine-tuning each block has its own drop-path rate
        teacher = getattr(model, "teacher", nn.Module())
        for module in (*model.modules(), *teacher.modules()):
            if isinstance(module, sigma.Block):
                module.compile(dynamic=False)
        model.loss_fn = torch.compile(model.loss_fn, dynamic=False)
    if world() == 1:
        return model
    # No device_ids: DDP would move the mask to the GPU, where to index by it would wait for the GPU.
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False  # they never change
    return wrapped


# ============ pretraining ============
# What the paper trains. The encoder sees the visible tubes. For each hidden tube the decoder predicts the
# prototype that Sinkhorn assigned to its features by φ, and φ the one assigned to the decoder's output.

def pretrain(args, process, weights):
    """Trains SIGMA on --data, from random weights or those of --init."""
    train_videos, val_videos = open_data(args)
    torch.manual_seed(args.seed)
    with agreed():
        model = make_model(args)
        if weights is not None:
            start_from(model, weights)
    load_teacher(args, model)
    model.to(process.device)
    # Masks are drawn with their clips, by the workers, and so are the same in a resumed run.
    train_set = open_clips(args, train_videos, train=True, repeats=args.repeats,
                           mask=mask_drawer(args, model, args.repeats))
    shown_set = open_clips(args, val_videos or train_videos, mask=mask_drawer(args, model, 1))

    def objective(wrapped, video, batch, step):
        return wrapped(video, batch["mask"])  # the mask stays on the CPU

    def evaluate(log, step):
        # Pictures come first: k-NN's line in the log says that this evaluation is done.
        if step > 0:
            with suppress(Stop):  # no pictures if none of their few videos can be read
                preview(args.out, process, model, shown_set)
                prototype_sheet(args.out, process, model, shown_set)
        if val_videos is not None:
            queries = video_features(args, process, model, val_videos)
            # Without labels in --data each video of --val is judged by the others.
            alone = train_videos.labels.min() < 0
            bank = queries if alone else video_features(args, process, model, train_videos, limit=20_000)
            log.report("knn", step, top1=knn(*bank, *queries, leave_one_out=alone))

    fit(args, process, model, parameter_groups(model, betas=(0.9, 0.95)), train_set,
        {"args": curve_of(args, train_videos, weights, RECIPE + METHOD)}, objective, evaluate)


def make_model(args):
    """The SIGMA of the flags. Raises ValueError."""
    names = "target loss eps assignment teacher frames image_size recompute".split()
    model = SIGMA(args.size, num_prototypes=args.prototypes, **{name: getattr(args, name) for name in names})
    patches = model.num_tubes // model.grid[0]  # of one pair of frames
    if not 0 < int(args.mask_ratio * patches) < patches:
        raise ValueError(f"--mask-ratio {args.mask_ratio} hides none or all of {patches} patches")
    return model


def mask_drawer(args, model, clips):
    """A function that draws masks for so many clips: bool [clips, tubes], True where hidden."""
    pairs = model.grid[0]  # of frames
    return partial(sigma.tube_mask, clips, pairs, model.num_tubes // pairs, args.mask_ratio)


def open_clips(args, videos, train=False, **named):
    """Clips as the flags say: for training drawn anew in each epoch, else from the middle of each video."""
    return data.Clips(videos, args.frames, args.stride, args.image_size, args.seed, train, **named)


def open_data(args, labels=False):
    """The videos of --data and of --val, None where it is not given. labels: both must have them."""
    with agreed():
        train = data.find_videos(args.data)
        val = None
        if args.val is not None:
            val = data.find_videos(args.val, train.classes)  # a class has one number in both
            if val.labels.min() < 0:
                raise ValueError("--val has no labels: it needs class folders, or a list with labels")
        if labels:
            if val is None:
                raise ValueError("--val is missing: the labelled videos to test on")
            if train.labels.min() < 0:
                raise ValueError("--data has no labels: it needs class folders, or a list with labels")
    say(f"{args.data}: {len(train)} videos")
    return train, val


def parameter_groups(model, betas):
    """AdamW's groups as in the release: weight decay 0.05, but none on biases, norms and the mask token."""
    decayed = []
    plain = []
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and not name.endswith("mask_token"):
            decayed.append(parameter)
        else:
            plain.append(parameter)
    return [{"params": decayed, "weight_decay": 0.05, "betas": betas},
            {"params": plain, "weight_decay": 0.0, "betas": betas}]


DINO_URLS = {
    "vits16": "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "vitb16": "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"}


def load_teacher(args, model):
    """Fills DINO's network from --dino-weights, or from its public file, which is downloaded."""
    if args.target != "dino":
        return
    url = DINO_URLS[args.teacher]
    for first in (True, False):  # a machine's first process downloads and keeps it, then the others read it
        with agreed():
            if first == (rank("LOCAL_RANK") == 0):
                try:
                    if args.dino_weights is None:
                        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
                    else:
                        state = load_checkpoint(args.dino_weights)
                    model.teacher.load_state_dict(state)
                except Exception as error:  # a file that holds something else can raise anything
                    raise ValueError(f"{args.dino_weights or url}: no weights of {args.teacher} "
                                     f"({error!r:.150}): fetch {url} for --dino-weights")


def start_from(model, weights):
    """--init: loads whatever has a name and shape that fits, and says what starts anew.

    Raises ValueError where the encoder does not fit."""
    left = load_weights(model, weights, ("decoder", "encoder_to_decoder", "mask_token", "head", "prototypes"))
    words = {"head": "projection network", "decoder.head": "decoder head"}
    taken = set()
    anew = set()
    for name in model.state_dict():
        part = re.match(r"decoder\.head|\w+", name)[0]
        parts = anew if name in left else taken
        parts.add(words.get(part, part))
    say(f"{weights.path}: taken are {', '.join(sorted(taken))}; "
        f"anew start {', '.join(sorted(anew)) or 'none'}")


# ============ checkpoints ============
# checkpoint.pt is the newest state of a run and what a resumed run starts from. It appears whole or not at
# all, and says what decided the loss curve, so that no other run goes on in its folder.

RECIPE = "size epochs warmup_epochs accumulate repeats lr min_lr frames stride image_size seed".split()
METHOD = "target teacher loss assignment prototypes eps mask_ratio".split()  # of pretraining alone


def curve_of(args, videos, weights, names):
    """What decides the loss curve, but for --precision and DINO's file: flags, videos, labels, first weights.

    Videos are known by their names in the folder or list, weights by their numbers: both can be moved."""
    curve = {name: getattr(args, name) for name in names}
    curve["global_batch"] = args.batch_size * world()  # clips that Sinkhorn balances
    curve["names_and_labels"] = digest_of(videos.names, videos.ends, videos.labels)
    curve["initial_weights"] = getattr(weights, "digest", None)
    return curve


def digest_of(*tensors):
    """A short text that differs where any of the tensors does."""
    known = hashlib.sha256()
    for tensor in tensors:
        known.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return known.hexdigest()[:16]


def check_curve(path, saved, curve):
    """ValueError where the run of a checkpoint had another loss curve than this one would have."""
    changed = [f"{name} was {saved[name]}, is {value}" for name, value in curve.items()
               if saved.get(name, value) != value]
    if changed:
        raise ValueError(f"{path} is another run's ({'; '.join(changed)}): use another --out")
    for name in curve.keys() - saved:
        say(f"{path} is older and does not say {name}: taken to be the same")


def save_checkpoint(out, log, parts, notes, step, epoch, name="checkpoint.pt"):
    """Whether rank 0 has written it. The log goes first, so that it has all of a checkpoint's steps."""
    if rank() > 0 or not log.flush(to_disk=True):
        return False
    content = {"step": step, "epoch": epoch, **notes}
    for part_name, part in parts.items():
        content[part_name] = part.state_dict()
    return replace_file(out / name, partial(torch.save, content))


def replace_file(path, write):
    """Writes a file by write(open file) so that, also after a kill, it is the old one or the new one.

    Returns whether it could be written; where not, it says why."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # on the disk before the name points there
        os.replace(part, path)
        return True
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        say(f"warning: {path} could not be written ({error!r:.150}); the old one stays")
        with suppress(OSError):
            part.unlink()  # room for others
        return False


def resume(args, parts, curve):
    """Loads the checkpoint in --out, if there is one, into the parts. -> its step, the log."""
    path = args.out / "checkpoint.pt"
    step = 0
    with agreed():
        try:
            if path.exists():
                checkpoint = load_checkpoint(path)
                check_curve(path, checkpoint["args"], curve)
                for name, part in parts.items():
                    # A scale of 1, of bf16 or fp32, is not loaded: with it small fp16 gradients become 0.
                    if name != "scaler" or checkpoint[name].get("scale", 1) > 1:
                        part.load_state_dict(checkpoint[name])
                step = checkpoint["step"]
                say(f"resuming {args.out} at step {step}")
            log = Log(args.out, step or -1)  # -1: at step 0 the log starts anew
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit this run ({error!r:.150}): use another --out")
    if len(set(gather(f"{step} {curve} {args.steps} {args.eval_every} {not args.val} {args.precision}"))) > 1:
        raise Stop(f"processes differ in flags, in --data or in what {args.out} holds: all need the same")
    return step, log


# ============ log ============
# log.jsonl holds a JSON object a line, and rank 0 writes it: what the run is, a line for logged steps,
# evaluations, files that cannot be read. Lines are appended. Those that a full disk refuses wait in memory.

class Log:
    """The lines of log.jsonl, up to a step: where a run resumes, later ones are cut off, as they come again.

    On other ranks than 0 it has no records."""
    def __init__(self, out, step=math.inf):
        self.path = out / "log.jsonl"
        self.records = []
        self.waiting = b""  # lines that are not in the file yet
        self.length = 0  # bytes of the file that are whole lines
        if rank() == 0 and self.path.exists():
            self.read(step)
        self.unreadable = {record["unreadable"] for record in self.records if "unreadable" in record}
        self.warned = False  # of a collapse

    def read(self, step):
        """Takes the lines before the first one beyond a step. Without any the file gets another name."""
        lines = self.path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is half a line
        for line in lines:
            try:
                record = json.loads(line)
                if record.get("step", record.get("at_step", 0)) > step:  # the line of a run has neither
                    break
                self.records.append(record)
            except (ValueError, TypeError, AttributeError):
                say(f"warning: {self.path} has a damaged line, which stays in it: {line!r:.70}")
            self.length += len(line) + 1
        if not self.records:
            self.length = 0
            kept = self.path.with_name(f"log-{int(time.time())}.jsonl")
            say(f"{self.path} is of no use here, and kept as {kept.name}")
            os.replace(self.path, kept)

    def write(self, **record):
        """Appends a line, in which NaN and infinity, which JSON lacks, are null."""
        if rank() > 0:
            return
        text = json.dumps(record, default=str)
        self.records.append(json.loads(text, parse_constant=lambda constant: None))
        self.waiting += (json.dumps(self.records[-1]) + "\n").encode()
        self.flush()

    def flush(self, to_disk=False):
        """Appends the waiting lines to the file. Returns whether it has them all; to_disk: safely."""
        try:
            with open(self.path, "ab") as file:
                if file.tell() > self.length:
                    file.truncate(self.length)  # half a line, or lines that come again
                file.write(self.waiting)
                file.flush()
                if to_disk:
                    os.fsync(file.fileno())
                self.length = file.tell()
        except OSError as error:
            say(f"warning: {self.path} could not be written ({error}); its lines wait for room")
            return False
        self.waiting = b""
        return True

    def report(self, kind, step, **found):
        """The line of an evaluation, also for people."""
        self.write(eval=kind, step=step, **found)
        said = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        say(f"{kind} at step {step}: {said}")


def tell_unreadable(process, reasons, log=None, step=None):
    """Exchanges {path: reason} of unreadable files between the ranks, names new ones, and empties it."""
    everyone = {}
    for others in gather(reasons):
        everyone.update(others)
    reasons.clear()
    for path, reason in sorted(everyone.items()):
        if path not in process.named:
            say(f"unreadable: {path}: {reason}")
        if log is not None and path not in log.unreadable:
            log.write(at_step=step, unreadable=path, reason=reason)
            log.unreadable.add(path)
    process.named.update(everyone)


# What the console says of an epoch. The README's "What a healthy run looks like" explains these numbers.
NEWS = {"loss": "loss {:.3f}", "agreement": "agreement {:.2f}", "perplexity": "perplexity {:.1f}",
        "spread": "spread {:.2f}", "clips_per_second": "{:.1f} clips/s",
        "data_wait": "waiting for data {:.0%}"}


def tell_news(args, log, step, steps_per_epoch, steps_left, clips_per_step, videos):
    """Prints the averages of an epoch's log lines, and draws the curves."""
    words = [f"epoch {step / steps_per_epoch:.4g}/{args.epochs}"]
    means = {}
    for name, wording in NEWS.items():
        numbers = [record[name] for record in log.records if record.get(name) is not None
                   and record.get("epoch") == (step - 1) // steps_per_epoch]
        if numbers:
            means[name] = np.mean(numbers)
            words.append(wording.format(means[name]))
    words.append(f"ETA {tqdm.format_interval(steps_left * clips_per_step / means['clips_per_second'])}")
    if log.unreadable:
        words.append(f"{len(log.unreadable)} of {videos} videos unreadable")
    say("  ".join(words))
    warmed_up = step > args.warmup_epochs * steps_per_epoch  # before that features may well be alike
    if warmed_up and means.get("spread", 1) < 0.05 and not log.warned:
        log.warned = True
        say("warning: a spread under 0.05: φ's features are nearly alike. If that stays, the run has "
            "collapsed, whatever its loss: lower --lr, raise --batch-size, try fewer --prototypes")
    plot_curves(args.out, log.records)


# ============ every video once, over all ranks ============
def each_once(process, model, dataset, compute, batch_size, limit=math.inf):
    """Runs compute(normalised video [B, …], batch) -> list of tensors [videos, …] over a data set.

    Returns these tensors on the CPU, for all videos that can be read (or of `limit` evenly spread ones), in
    their order, and last the videos' numbers. Raises Stop where none can be read."""
    # (epoch, video) for each video of this rank's share, which may be empty
    keys = [(0, number) for number in evenly(len(dataset), limit)[rank()::world()]]
    key_batches = list(BatchSampler(keys, batch_size, drop_last=False))
    # In training this is a second pool of workers beside the first, so it holds fewer batches in /dev/shm.
    loader = data.load(dataset, key_batches, min(process.workers, len(key_batches)), process.cuda, prefetch=1)
    loader = data.batches_to_device(loader, process.device)
    results = []
    unreadable = {}
    model.eval()
    # Without compiled code: the shapes here are not those of training, and each would be compiled anew.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for batch in tqdm(loader, "evaluating", len(key_batches), leave=False, disable=rank() > 0 or None):
            with process.autocast():
                found = compute(data.normalize(batch["video"]), batch)
            views = len(batch["index"]) // len(found[0])  # clips of one video, of which compute made one
            found.append(batch["index"][::views])
            results.append([tensor.cpu() for tensor in found])
            unreadable.update(batch["bad"])
            if process.stop_signal:
                break
    model.train()
    stop_signal = max_over_ranks(process.stop_signal)
    if stop_signal > 0:  # the training loop has saved before it evaluates
        raise SystemExit(128 + stop_signal)
    tell_unreadable(process, unreadable)
    everyone = itertools.chain(*gather(results))
    gathered = [torch.cat(parts) for parts in zip(*everyone)]
    numbers = gathered[-1]
    order = numbers.argsort()[(numbers < 0).sum():]  # those of unreadable videos are -1
    if len(order) == 0:
        raise Stop(f"none of the {len(numbers)} videos to evaluate can be read", code=1)
    return [tensor[order] for tensor in gathered]


def evenly(total, count):
    """At most `count` numbers below `total`, evenly spread."""
    return torch.linspace(0, total - 1, min(count, total)).long().unique().tolist()


# ============ k-NN ============
# The measure of progress in pretraining: a video gets the class of the videos whose features are most like
# its own.

def video_features(args, process, model, videos, limit=math.inf):
    """Mean-pooled encoder tokens [n, D] and labels [n] of the middle clips of the videos that can be read."""
    def pooled(video, batch):
        return [model.features(video).float().mean(1)]  # [B, D]
    rows, index = each_once(process, model, open_clips(args, videos), pooled, args.batch_size, limit)
    return rows.to(process.device), videos.labels[index].to(process.device)


def knn(bank, bank_labels, queries, labels, k=20, temperature=0.07, leave_one_out=False):
    """Top-1 in percent of DINO's k-nearest-neighbour vote: neighbours weigh exp(cosine similarity / 0.07).

    bank [n, D], queries [q, D]. leave_one_out (bank = queries): judged by the others; NaN for a lone one."""
    others = len(bank) - int(leave_one_out)
    if others == 0:
        return math.nan
    classes = 1 + int(bank_labels.max())
    bank = F.normalize(bank)
    queries = F.normalize(queries)
    right = 0
    everyone = torch.arange(len(queries), device=bank.device)
    for rows in everyone.split(max(1, 2 ** 27 // len(bank))):  # half a gigabyte of similarities at a time
        similarity = queries[rows] @ bank.T  # [rows, n]
        if leave_one_out:
            similarity.scatter_(1, rows[:, None], -torch.inf)
        nearest, index = similarity.topk(min(k, others))  # [rows, k]
        votes = nearest.new_zeros(len(rows), classes)
        votes.scatter_add_(1, bank_labels[index], (nearest / temperature).exp())
        right += (votes.argmax(1) == labels[rows]).sum().item()
    return 100 * right / len(queries)


# ============ pictures ============
# preview.png and .gif show what the model sees and what it makes of it, prototypes.png what the prototypes
# stand for, curve.png how the numbers of the log move. Nothing else depends on this section.

def preview(out, process, model, clips):
    """preview.png and .gif: clips; what the encoder sees of them; every tube in the colour of its prototype;
    the encoder's features as colours, which are alike where the features are."""
    def look(video, batch):
        found = [batch["video"], batch["mask"], model.features(video).float()]
        if model.loss == "sigma":
            found.append(model.assign(video))
        return found
    # clusters: one tensor, or none where the model has no prototypes
    videos, masks, tokens, *clusters, _ = each_once(process, model, clips, look, 1, limit=3)
    if rank() > 0:
        return

    def enlarge(tubes):
        """A number or colour for every tube, [n, 1 or 3, N] -> for every pixel."""
        return F.interpolate(tubes.unflatten(2, model.grid).float(), videos.shape[2:], mode="nearest-exact")
    hidden = enlarge(masks[:, None]) > 0
    rows = {"video": videos, "what the\nencoder sees": videos.masked_fill(hidden, 217)}
    for tubes in clusters:
        rows["cluster of\nevery tube"] = tint(videos, tubes.unflatten(1, model.grid))
    rows["features\nas colours"] = enlarge(principal_colours(tokens).transpose(1, 2)).byte()
    save_still(out / "preview.png", rows)
    moving = []
    for t in range(model.frames):
        moving.append({caption: shown[:, :, t] for caption, shown in rows.items()})
    save_pages(out / "preview.gif", moving)


def principal_colours(tokens):
    """Features [n, N, D] -> their three principal components over all clips, 0 to 255: [n, N, 3]."""
    x = tokens.flatten(0, 1)
    components = torch.linalg.svd(x - x.mean(0), full_matrices=False).U[:, :3]  # columns of length 1
    deviations = components * len(x) ** 0.5  # of standard deviation 1; two to each side span the colours
    return (127.5 + 63.75 * deviations).clamp(0, 255).unflatten(0, tokens.shape[:2])


def tint(videos, labels):
    """uint8 [n, 3, T, S, S] as grey under the colours of the labels [n, t, h, w] of its tubes or pixels."""
    # Whole numbers next to each other get colours far from each other; -1 is black.
    rgb = (labels[:, None] + 1) * torch.tensor([67, 151, 211]).view(3, 1, 1, 1) % 256
    rgb = F.interpolate(rgb.float(), videos.shape[2:], mode="nearest-exact")
    grey = videos.float().mean(1, keepdim=True)
    return (0.35 * grey + 0.65 * rgb).byte()


def save_still(path, rows):
    """Writes a PNG with a row for each caption: every third frame of its clips, uint8 [n, 3, T, S, S]."""
    page = {}
    for caption, clips in rows.items():
        page[caption] = clips[:, :, ::3].transpose(1, 2).flatten(0, 1)
    save_pages(path, [page])


def save_pages(path, pages):
    """Writes a PNG of one page, or a GIF of many. A page is {caption: pictures, uint8 [n, 3, h, w]}."""
    from torchvision.utils import make_grid  # its import takes a second
    sheets = []
    for page in pages:
        pictures = F.interpolate(torch.cat(list(page.values())), (96, 96))
        grid = make_grid(pictures, len(pictures) // len(page), padding=4, pad_value=255)
        grid = F.pad(grid, [120, 0, 0, 0], value=255)  # room for the captions
        sheet = Image.fromarray(grid.permute(1, 2, 0).numpy())
        for row, caption in enumerate(page):
            ImageDraw.Draw(sheet).text((8, 36 + 100 * row), caption, "black", font_size=15)
        sheets.append(sheet)
    replace_file(path, partial(sheets[0].save, format=path.suffix[1:], save_all=True,
                               append_images=sheets[1:], duration=160, loop=0))


def prototype_sheet(out, process, model, clips):
    """prototypes.png: a row for each of the eight most used prototypes. It shows the middle of those eight
    of 64 clips that use the prototype most, and lights its tubes."""
    if model.loss != "sigma":
        return
    middle = model.grid[0] // 2

    def look(video, batch):
        clusters = model.assign(video).unflatten(1, model.grid)
        return [batch["video"][:, :, TUBELET * middle], clusters[:, middle]]
    pictures, clusters, _ = each_once(process, model, clips, look, 1, limit=64)  # [n, 3, S, S], [n, h, w]
    used = clusters.flatten().bincount()
    page = {}
    for k in used.argsort(descending=True)[:8].tolist():
        own = clusters == k
        shown = own.sum((1, 2)).argsort(descending=True)[:8]
        light = F.interpolate(0.3 + 0.7 * own[shown, None], pictures.shape[2:])
        page[f"prototype {k}\n{100 * used[k] / used.sum():.2g}% of tubes"] = (light * pictures[shown]).byte()
    if rank() == 0:
        save_pages(out / "prototypes.png", [page])


def plot_curves(out, records):
    """curve.png: each of these numbers over the steps, with its range."""
    sheet = Image.new("RGB", (1350, 205), "white")
    draw = ImageDraw.Draw(sheet)
    left = 10
    for name in ("loss", "agreement", "perplexity", "spread", "top1"):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if len(points) < 2:
            continue
        steps, values = np.array(points, float).T
        x = np.interp(steps, (steps[0], steps[-1]), (left, left + 250))
        y = np.interp(values, (values.min(), values.max()), (195, 45))
        draw.line(list(zip(x, y)), "#1f5fa8", 2)
        text = f"{name}: {values.min():.3g} to {values.max():.3g}\nstep {steps[0]:.0f} to {steps[-1]:.0f}"
        draw.text((left, 6), text, "black", font_size=14)
        left += 270
    replace_file(out / "curve.png", partial(sheet.save, format="png"))


# ============================================================================================================
# ============ pretraining ends here; below, what it has learned is read from checkpoints and tested =========
# ============================================================================================================

# ============ weights: this project's files, the authors', VideoMAE's, Hugging Face's ============
# Every mode below, and --init, reads its checkpoint here. All four kinds end up under the released names.

@dataclass
class Weights:
    """A checkpoint's tensors, and what it says of itself."""
    path: str
    state: dict  # released name -> tensor
    settings: dict  # flags that are known of it, at least its size
    step: int  # trained so far
    digest: str


def read_weights(path, out=Path("nowhere")):
    """The Weights of a file, pretrained or fine-tuned. Raises ValueError, OSError.

    A run in `out` that goes on does not need the file that it began with: where that is gone, its own
    checkpoint takes the place."""
    digest = None
    own = out / "checkpoint.pt"
    if not os.path.exists(path) and own.exists():
        digest = load_checkpoint(own).get("args", {}).get("initial_weights", "unknown")
        if digest is not None:  # else the run began with random weights
            path = own
    if str(path).endswith(".safetensors"):
        raise ValueError(f"{path}: safetensors are not read: take the model's pytorch_model.bin")
    content = load_checkpoint(path)
    state = released_names(content)
    embedding = state.get("encoder.patch_embed.proj.weight", torch.zeros(0)).shape  # [D, 3, 2, patch, patch]
    sizes = [name for name, size in SIZES.items()
             if embedding == (size["width"], 3, TUBELET, size["patch"], size["patch"])]
    if not sizes:
        raise ValueError(f"{path} holds no video model of size {', '.join(SIZES)} under a known name")
    said = content.get("args", {})
    if isinstance(said, argparse.Namespace):  # the authors'
        said = vars(said)
    settings = guess_method(state)
    if "target" in said and "fc_norm.weight" not in state:  # ours, which says so
        settings = {name: said[name] for name in METHOD if name in said}
    settings["size"] = sizes[0]
    for ours, theirs in (("frames", "num_frames"), ("stride", "sampling_rate"), ("image_size", "input_size")):
        value = said.get(ours, said.get(theirs))
        if isinstance(value, int):
            settings[ours] = value
    return Weights(path, state, settings, content.get("step", 0), digest or digest_of(*state.values()))


def guess_method(state):
    """The flags of the method that others' tensors were trained with, from their names and shapes."""
    settings = {"loss": "l2", "target": "pixel"}  # also of what is fine-tuned
    if "prototypes" in state:
        settings = {"loss": "sigma", "target": "dino", "prototypes": len(state["prototypes"])}
    width = len(state.get("decoder.head.weight", ()))  # E
    pixels = state["encoder.patch_embed.proj.weight"][0].numel()  # of a tube
    if "head.2.weight" in state:
        settings["target"] = "mlp"
    elif width != pixels:
        for teacher, sizes in TEACHERS.items():
            if width == sizes["width"]:
                settings.update(target="dino", teacher=teacher)
    return settings


def released_names(content):
    """A checkpoint's content -> its tensors {released name: tensor}."""
    tensors = content.get("model", content.get("module", content.get("state_dict", content)))
    state = {}
    for name, value in tensors.items():
        if isinstance(value, torch.Tensor):
            # DDP, torch.compile and models that contain this one put a prefix before the names.
            state[re.sub(r"^(module\.|_orig_mod\.|backbone\.)+", "", str(name))] = value
    if any(".attention.attention." in name for name in state):
        state = from_hugging_face(state)
    if not any(name.startswith("encoder.") for name in state):  # VideoMAE's authors' fine-tuned files
        state = {re.sub(r"^(?!head\.|fc_norm\.)", "encoder.", name): value for name, value in state.items()}
    return state


HUGGING_FACE = {  # parts of the names of transformers' VideoMAE -> parts of the released names
    r"^videomae\.": "", r"^embeddings\.patch_embeddings\.projection\.": "encoder.patch_embed.proj.",
    r"^layernorm\.": "encoder.norm.", r"^classifier\.": "head.",
    r"^encoder\.layer\.": "encoder.blocks.", r"^decoder\.decoder_layers\.": "decoder.blocks.",
    r"\.layernorm_before\.": ".norm1.", r"\.layernorm_after\.": ".norm2.",
    r"\.attention\.output\.dense\.": ".attn.proj.", r"\.attention\.attention\.": ".attn.",
    r"\.intermediate\.dense\.": ".mlp.fc1.", r"\.output\.dense\.": ".mlp.fc2.",
    # Published files and transformers 4 say q_bias; files that transformers 5 has saved say query.bias.
    r"\.query\.bias$": ".q_bias", r"\.value\.bias$": ".v_bias"}


def from_hugging_face(state):
    """transformers' VideoMAE, pretrained or fine-tuned -> the same tensors under the released names."""
    renamed = {}
    for name, value in state.items():
        for theirs, ours in HUGGING_FACE.items():
            name = re.sub(theirs, ours, name)
        renamed[name] = value
    for name in [name for name in renamed if name.endswith(".query.weight")]:
        attention = name.removesuffix("query.weight")
        three = [renamed.pop(f"{attention}{part}.weight") for part in ("query", "key", "value")]
        renamed[f"{attention}qkv.weight"] = torch.cat(three)
        renamed.pop(f"{attention}key.bias", None)  # always 0: softmax would ignore it
    if len(renamed.get("encoder.patch_embed.proj.weight", ())) == SIZES["small"]["width"]:
        say("warning: Hugging Face's VideoMAE-small is configured with 16 heads, ours with the authors' 6; "
            "the file does not say which it was trained with")
    return renamed


def load_weights(module, weights, free=()):
    """Loads what `module` has. Returns the names that are left as they were.

    ValueError: some of them neither begin with one of `free` nor are missing by nature in such a file, or
    the file's encoder has a block more."""
    may_lack = list(free)
    if not any(name.startswith("decoder.") for name in weights.state):  # an encoder alone
        may_lack += ["decoder.", "encoder_to_decoder.", "mask_token"]
    if "fc_norm.weight" in weights.state:  # fine-tuned: the norm comes after the mean
        may_lack.append("encoder.norm.")
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.state.items()}
    left = [name for name in wanted if wanted[name] != found.get(name)]
    wrong = [f"{name} is {found.get(name, 'missing')} instead of {wanted[name]}" for name in left
             if not name.startswith(tuple(may_lack))]
    wrong += [f"{name} is unknown" for name in found.keys() - wanted if name.startswith("encoder.blocks.")]
    if wrong:
        raise ValueError(f"{weights.path} fits only in part: {'; '.join(wrong[:4])}; {len(wrong)} in all")
    module.load_state_dict({name: weights.state[name] for name in wanted.keys() - left}, strict=False)
    frames = weights.settings.get("frames", module.frames)
    image_size = weights.settings.get("image_size", module.image_size)
    if (frames, image_size) != (module.frames, module.image_size):
        say(f"warning: {weights.path} was trained on {frames} frames of {image_size} pixels: with "
            f"{module.frames} of {module.image_size} its tubes get other rows of the position table")
    return left


def open_model(args, process, weights):
    """The SIGMA of a checkpoint, on the device, and the log."""
    with agreed():
        model = make_model(args)
        load_weights(model, weights)
        log = Log(args.out)
    return model.to(process.device), log


# ============ linear probe ============
# How much of what is in a video can be read off frozen features: k-NN again, and one linear layer.

def probe(args, process, weights):
    """k-NN and a linear layer from features of --data to those of --val."""
    train, val = open_data(args, labels=True)
    model, log = open_model(args, process, weights)
    bank, bank_labels = video_features(args, process, model, train)
    queries, labels = video_features(args, process, model, val)
    log.report("knn", weights.step, top1=knn(bank, bank_labels, queries, labels), videos=len(queries))
    log.report("linear", weights.step, top1=linear_probe(bank, bank_labels, queries, labels, args.seed))


def linear_probe(bank, bank_labels, queries, labels, seed=0, epochs=30):
    """Top-1 in percent of a linear layer on frozen features: AdamW, lr 1e-3, 30 epochs, as the paper.

    Where that is silent: features are standardised, the layer starts at zero, lr falls as a cosine, no weight
    decays, batches are of 64, and of up to 1024 where there are many videos."""
    classes = 1 + int(bank_labels.max())
    batch_size = min(max(64, len(bank) // 200), 1024)
    std, mean = torch.std_mean(bank, dim=0, correction=0)  # [D]
    bank = (bank - mean) / (std + 1e-6)
    queries = (queries - mean) / (std + 1e-6)
    layer = nn.Linear(bank.shape[1], classes, device=bank.device)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    steps = epochs * math.ceil(len(bank) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        order = torch.randperm(len(bank), generator=data.seeded(seed, epoch)).to(bank.device)
        for rows in order.split(batch_size):  # every rank does the same
            optimizer.zero_grad()
            F.cross_entropy(layer(bank[rows]), bank_labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return 100 * (layer(queries).argmax(1) == labels).float().mean().item()


# ============ fine-tuning ============
# The whole encoder is trained on labels, by VideoMAE's recipe, which is the paper's.

class Classifier(SIGMA):
    """VideoMAE's model for fine-tuning, under its names: encoder, mean of all tokens, LayerNorm, linear head.

    video [B, 3, T, H, W] -> logits [B, classes]. named: SIGMA's settings."""
    def __init__(self, classes, size, **named):
        super().__init__(size, target="pixel", loss="l2", drop_path=0.1, **named)
        del self.decoder, self.encoder_to_decoder, self.mask_token
        self.fc_norm = self.encoder.norm  # after the mean instead of before it
        self.encoder.norm = nn.Identity()
        self.head = nn.Linear(SIZES[size]["width"], classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)  # near zero
        nn.init.zeros_(self.head.bias)

    def forward(self, video):
        tokens = self.features(video)  # [B, N, D]
        return self.head(self.fc_norm(tokens.mean(1)))


def layer_groups(model, betas, decay=0.75):
    """parameter_groups of each layer: the head learns at full rate, a layer at `decay` of the next one."""
    layers = [model.encoder.patch_embed, *model.encoder.blocks, nn.ModuleList([model.fc_norm, model.head])]
    groups = []
    for depth, layer in enumerate(layers, start=1):
        for group in parameter_groups(layer, betas):
            group["lr_scale"] = decay ** (len(layers) - depth)
            groups.append(group)
    return groups


def augmentation(flip):
    """RandAugment m7-n4, flip, random erasing: one draw for all frames, uint8 [T, 3, H, W] -> the same.

    As timm's "rand-m7-n4": each of four is applied half of the time, magnitude 7 is of 10. Unlike it: no
    noise on the magnitude, and what is erased becomes ImageNet's mean."""
    from torchvision.transforms import v2  # its import takes two seconds
    mean = [round(255 * m) for m in data.IMAGENET_MEAN]
    one = v2.RandAugment(1, 7, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=mean)
    steps = [v2.RandomApply([one], p=0.5)] * 4
    if flip:
        steps.append(v2.RandomHorizontalFlip(0.5))
    steps.append(v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=mean))
    return v2.Compose(steps)


def finetune(args, process, weights):
    """Trains the encoder and a new head on the labels of --data, and tests on --val with several views."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    train, val = open_data(args, labels=True)
    names = train.classes
    if names is None:  # of a list, which has numbers alone
        names = [str(number) for number in range(1 + int(train.labels.max()))]
    with agreed():
        if val.labels.max() >= len(names):
            raise ValueError("--val has labels that --data lacks")
        torch.manual_seed(args.seed)
        model = Classifier(len(names), args.size, frames=args.frames, image_size=args.image_size,
                           recompute=args.recompute)
        if weights is not None:
            load_weights(model, weights, free=("fc_norm.", "head."))
    model.to(process.device)
    # Classes of Something-Something (stride 0) tell left from right: no flip there, nor on the demo.
    transform = augmentation(flip=args.stride > 0 and args.demo is None)
    train_set = open_clips(args, train, train=True, draw_crop=data.draw_resized, transform=transform)
    test_set = open_clips(args, val, views=(5 if args.stride > 0 else 2, 3))  # clips in time, crops in place
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=len(names)),
                           v2.CutMix(alpha=1.0, num_classes=len(names))])

    def objective(wrapped, video, batch, step):
        # Mixing and drop path draw from the global generator: seeded here, they repeat in a resumed run.
        torch.manual_seed(data.seeded(args.seed, step, rank(), int(batch["index"][0])).initial_seed())
        labels = batch["label"].to(process.device, non_blocking=True)
        video, target = mix(tv_tensors.Video(video), labels)
        logits = wrapped(video.as_subclass(torch.Tensor)).float()  # [B, classes]
        return F.cross_entropy(logits, target, label_smoothing=0.1), {}

    def evaluate(log, step):
        if step > 0:
            top1, top5, videos = multi_view(args, process, model, test_set)
            log.report("finetune", step, top1=top1, top5=top5, videos=videos)

    notes = {"args": curve_of(args, train, weights, RECIPE), "classes": names}
    fit(args, process, model, layer_groups(model, betas=(0.9, 0.999)), train_set, notes, objective, evaluate)


def multi_view(args, process, model, clips):
    """Top-1 and top-5 in percent, and the number of videos: by the softmax averaged over a video's views."""
    views = math.prod(clips.views)  # clips times crops

    def best(video, batch):
        shares = model(video).float().softmax(1).unflatten(0, (-1, views)).mean(1)  # [B, classes]
        top = shares.topk(min(5, shares.shape[1])).indices
        return [top, batch["label"][::views]]
    top, labels, _ = each_once(process, model, clips, best, max(1, args.batch_size // views))
    hits = 100 * (top == labels[:, None]).float()  # [videos, 5]
    return hits[:, 0].mean().item(), hits.amax(1).mean().item(), len(hits)


# ============ video object segmentation ============
# The tubes of one clip at a time are clustered by K-means, without labels. Where there are masks, the
# clusters are compared with them by the paper's two protocols.

def segment(args, process, weights):
    """K-means of every clip's tube features; where there are masks, mIoU by the paper's two protocols.

    The paper leaves the details open. Here a clip is the middle of a video, squeezed to the model's square,
    so that no object is cut off; the background is one of the objects, in their number K as in the mean;
    mIoU is the mean over objects, then over clips."""
    with agreed():
        if (Path(args.data) / "JPEGImages").is_dir():
            clips = data.Scenes(args.data, args.frames, args.stride, args.image_size)
        else:
            clips = open_clips(args, data.find_videos(args.data))
    model, log = open_model(args, process, weights)
    torch.set_float32_matmul_precision("highest")  # for K-means

    def cluster(video, batch):
        tokens = model.features(video)[0].float()  # [N, D]
        truth = batch.get("truth", torch.zeros(1))
        objects = len(truth[truth >= 0].unique())
        compared = objects > 1  # a background alone is no segmentation
        with torch.autocast(process.device.type, enabled=False):  # in float32
            few = kmeans(tokens, objects if compared else 4, args.seed).cpu().view(model.grid)
            many = kmeans(tokens, 10, args.seed).cpu().view(model.grid)
        scores = torch.full((2,), math.nan)
        if compared:
            scores[0], columns = match_one_to_one(overlap(truth, few, objects))
            scores[1] = match_many_to_one(overlap(truth, many, 10))
            few = torch.tensor(columns).argsort()[few]  # a cluster gets the number of its object
        return [100 * scores[None], few[None], many[None]]  # [1, 2], [1, t, h, w], [1, t, h, w]
    scores, few, many, index = each_once(process, model, clips, cluster, batch_size=1)
    if rank() == 0:
        save_segments(args, clips, index, few, many)
    scores = scores[scores.isfinite().all(1)]  # of clips with masks
    if len(scores) > 0:
        one_to_one, merged = scores.mean(0).tolist()
        log.report("segment", weights.step, miou=one_to_one, miou_overclustering=merged, clips=len(scores))
    else:
        say(f"{args.data} has no masks to compare with: see segments.png")
    if args.loss == "sigma":  # last, as it needs φ, and DINO may not be to be had
        load_teacher(args, model)
        prototype_sheet(args.out, process, model, clips)


def save_segments(args, clips, index, few, many):
    """segments.png: three clips, their masks where they have some, and both clusterings [n, t, h, w]."""
    shown = evenly(len(index), 3)
    items = [clips[0, int(index[n])] for n in shown]
    video = torch.cat([item["video"] for item in items])  # [3, 3, T, S, S]
    rows = {"video": video}
    if "truth" in items[0]:
        rows["ground truth"] = torch.cat([tint(item["video"], item["truth"][None]) for item in items])
    rows["clusters"] = tint(video, few[shown])
    rows["10 clusters"] = tint(video, many[shown])
    save_still(args.out / "segments.png", rows)


def kmeans(x, k, seed=0, restarts=5, iterations=50):
    """x [N, D] -> cluster numbers [N]: the best of R k-means++ starts, the same for a seed."""
    x = x - x.mean(0)  # centred, sums round less
    k = min(k, len(x))
    generator = data.seeded(seed)

    def distance():
        return torch.cdist(x, centres.flatten(0, 1)).unflatten(1, (restarts, -1))  # [N, R, k]
    # k-means++: the next centre is drawn by the squared distance to the nearest so far.
    centres = x[torch.randint(len(x), (restarts, 1), generator=generator)]  # [R, 1, D]
    while centres.shape[1] < k:
        weight = distance().amin(2).square().T.cpu() + 1e-12  # [R, N]
        drawn = torch.multinomial(weight, 1, generator=generator)
        centres = torch.cat([centres, x[drawn]], 1)
    for _ in range(iterations):
        cost, cluster = distance().min(2)  # [N, R]
        # Means by a product, which repeats exactly; index_add on a GPU does not.
        member = F.one_hot(cluster, k).to(x.dtype).flatten(1)  # [N, R * k]
        size = member.sum(0).view(restarts, k, 1)
        means = (member.T @ x).view(restarts, k, -1) / size
        centres = torch.where(size > 0, means, centres)  # an empty cluster stays where it is
    return cluster[:, cost.square().sum(0).argmin()]  # the start of least cost


def overlap(truth, clusters, k):
    """truth [T, H, W], clusters of tubes [t, h, w] -> pixels that they share, [objects, k]."""
    # Clusters at the masks' size, not masks at the tubes': no pixel of the truth is lost.
    pixels = F.interpolate(clusters[None, None].float(), truth.shape, mode="nearest-exact")[0, 0].long()
    counted = truth >= 0
    objects = truth[counted]
    count = int(objects.max()) + 1
    return torch.bincount(objects * k + pixels[counted], minlength=count * k).view(-1, k)


def iou(table):
    """Shared pixels [objects, k] -> intersection over union of every pair, float64."""
    table = table.double()
    union = table.sum(1, keepdim=True) + table.sum(0) - table
    return table / union.clamp(min=1)


def match_one_to_one(table):
    """Clustering protocol: every object gets a cluster of its own, for the largest mean IoU.

    Returns it and each object's cluster. All ways are tried: DAVIS has at most six objects."""
    if len(table) > 8:
        raise data.VideoError(f"a clip has {len(table)} objects: all ways to match are tried, for at most 8")
    ways = torch.tensor(list(itertools.permutations(range(table.shape[1]), len(table))))  # [ways, objects]
    means = iou(table)[torch.arange(len(table)), ways].mean(1)
    best = means.argmax()
    return means[best].item(), ways[best].tolist()


def match_many_to_one(table):
    """Over-clustering protocol: the mean IoU when each cluster goes to the object it overlaps most."""
    merged = table @ F.one_hot(table.argmax(0), len(table))  # [objects, objects]
    return iou(merged).diagonal().mean().item()


# ============ what a step costs ============
def bench(args, process, weights):
    """Times --steps (5) training steps on random clips that lie on the device, after two that warm up.

    A clip's operations are counted forward and back, with --recompute those that are done again, too."""
    with agreed():
        model = make_model(args).to(process.device)
    if args.target == "dino":
        model.teacher.weights_loaded = True  # random ones cost the same
    shape = (args.batch_size, 3, args.frames, args.image_size, args.image_size)
    clips = torch.randint(256, shape, dtype=torch.uint8, device=process.device)
    mask = mask_drawer(args, model, args.batch_size)()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # what is counted anywhere
        model(data.normalize(clips[:1]), mask[:1])[0].backward()
    wrapped = over_processes(args, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    steps = args.steps or 5
    for step in range(2 + steps):
        optimizer.zero_grad()
        with process.autocast():
            loss, _ = wrapped(data.normalize(clips), mask)
        loss.backward()
        optimizer.step()
        if step == 1:
            loss.item()  # waits for the GPU
            began = time.perf_counter()
    loss.item()
    seconds = (time.perf_counter() - began) / steps
    operations = counter.get_total_flops()
    say(f"{args.batch_size * world() / seconds:.2f} clips/s, {1000 * seconds:.1f} ms a step; "
        f"{operations / 1e9:.1f} GFLOP a clip, {operations * args.batch_size / seconds / 1e12:.3f} TFLOP/s a "
        f"process; {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB of GPU memory at most")


# ============ main ============
MODES = {"pretrain": pretrain, "probe": probe, "finetune": finetune, "segment": segment, "bench": bench}


def main(argv=None):
    """Runs a command line. Raises SystemExit where it does not end well."""
    try:
        join_processes()
        with agreed():
            args, weights = parse_args(argv)
        process = Process(args)
        say(process.about)
        if args.mode != "bench":
            with agreed():
                process.lock = take_folder(args)
            say(f"results in {args.out}")
        MODES[args.mode](args, process, weights)
        max_over_ranks(0)  # none leaves while another still receives
    except Stop as stop:
        leave(str(stop), stop.code, alike=True)
    except (data.VideoError, data.WorkerError) as error:
        if process.stop_signal:  # in an evaluation of the training loop; the signal ended the workers, too
            raise SystemExit(128 + process.stop_signal)
        leave(str(error), 1)
    except torch.OutOfMemoryError as error:
        leave(f"too little GPU memory: lower --batch-size, or add --recompute ({error!r:.150})", 1)


def leave(message, code, alike=False):
    """Ends this process with one line. alike: all ranks end with the same one, and rank 0 alone prints it."""
    line = f"train.py: error: {message}"
    if rank() == 0 or not alike:
        print(line, file=sys.stderr, flush=True)
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report is not None:  # torchrun's own report ends with what the first rank to end has in this file
        Path(report).write_text(json.dumps({"message": {"message": line,
                                                        "extraInfo": {"timestamp": time.time()}}}))
    raise SystemExit(code)


def open_streams():
    """Lines appear at once, and file names though no terminal may show them. Closed streams lead nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")


if __name__ == "__main__":
    open_streams()
    if world() == 1:
        sys.exit(main())
    # One of several processes leaves without Python's teardown, in which gloo's threads, as they free a
    # tensor, can abort it. To end the process group before that can wait for ever (torch 2.6).
    exit_code = 1
    try:
        exit_code = main() or 0
    except SystemExit as end:
        exit_code = end.code or 0
    except Exception:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    os._exit(exit_code)
