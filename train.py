"""Pretrain SIGMA, from a laptop to a cluster, and evaluate what it learned.

    torchrun train.py                                     the demo: synthetic videos, minutes on two CPU cores
    torchrun --nproc_per_node 8 train.py --data train.csv --val val.csv --target dino --out runs/k400
    torchrun train.py --probe runs/demo/checkpoint.pt     k-NN and linear probe of frozen features
    torchrun train.py --finetune authors.pth --data train.csv --val val.csv
    torchrun train.py --segment runs/demo/checkpoint.pt   unsupervised video object segmentation

Started again with the same --out a run resumes;
its loss curve is that of an uninterrupted run."""
import argparse
import atexit
import ctypes
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

# Before PyTorch's threads start: they would spin while they wait, on the loader's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, DistributedSampler
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import sigma
from sigma import SIGMA, SIZES, TEACHERS, TUBELET, load_checkpoint, patchify


# ============ the training loop ============
def fit(args, model, groups, betas, train_set, objective, evaluate):
    """Trains until --epochs or --steps are done, from where --out left off.

    groups: AdamW's, with `lr_scale` where layers learn at different rates.
    objective(model, normalised video, batch, step) -> loss, dict of statistics.
    evaluate(log, step): before the first step, every --eval-every epochs, at the end."""
    sampler = data.EpochSampler(len(train_set), args.batch_size, rank(), world(), args.seed, args.repeats,
                                args.accumulate)
    per_epoch = sampler.steps_per_epoch // args.accumulate  # optimiser steps
    last = min(args.epochs * per_epoch, args.steps or math.inf)  # the run's last step
    for group in groups:  # learning rates are per 256 clips
        group["initial_lr"] = args.lr * args.clips_a_step / 256 * group.pop("lr_scale", 1.0)
    # Fused, AdamW neither takes nor counts a step where the scaler finds gradients not finite, and nobody
    # waits for the GPU to know. Hence a scaler for bf16 and fp32 too, of scale 1.
    optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
    scaler = torch.amp.GradScaler(args.device.type, init_scale=2.0 ** 16 if args.precision == "fp16" else 1.0)
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}  # what a checkpoint holds
    start, log = resume(args, parts)
    step, trained = start, wrapped(args, model)
    save = partial(save_checkpoint, args, log, parts, per_epoch)

    # Micro-batches; each follows from its number, so a resumed run goes on with the very next one.
    sampler.start, sampler.stop = step * args.accumulate, last * args.accumulate
    stream = data.batches_to_device(data.load(train_set, sampler, args.workers, args.cuda), args.device)
    bar = tqdm(total=last, initial=step, desc="train", disable=rank() > 0 or None)
    evaluated = over_ranks(max((r["step"] for r in log.records if "eval" in r), default=-1))  # its step
    bad, trouble, saved = {}, None, -math.inf  # path -> reason; why to stop; time of the last checkpoint
    logged, since, waited = step, None, 0.0  # the last line, and the time from there on
    # AdamW's count of steps, the same for all parameters, and the last not left out
    taken, moved = int(next(iter(optimizer.state.values()), {"step": 0})["step"]), step
    for number in (signal.SIGTERM, signal.SIGINT):  # heard after the step, or an evaluation's batch
        signal.signal(number, lambda signum, frame: setattr(args, "stop", signum))
    model.train()
    while True:
        # ---- once in a while: a checkpoint (three times the model), an evaluation ----
        due = step in (0, last) or args.eval_every > 0 and step % (args.eval_every * per_epoch) == 0
        keep = step % (args.keep_every * per_epoch) == 0
        if step > start and (due or keep or time.monotonic() > saved + 60 * args.save_minutes):
            saved = time.monotonic()  # also on failure: a full disk is not tried at every step
            if keep:  # first, as a resumed run does not come back to it
                save(step, f"checkpoint-{step // per_epoch:04d}.pt")
            if not save(step) and step == last and rank() == 0:
                raise Stop("training is done, but not saved: make room and run it again", code=1)
        if due and step > evaluated:
            evaluate(log, step)
            plot(log.records, args.out / "curve.png")
        if step >= last:
            return bar.close()

        # ---- data, or a reason to stop, which all hear before they wait for each other ----
        began = time.monotonic()
        since = since or began  # evaluations take no part
        try:
            micro_batches = [next(stream) for _ in range(args.accumulate)]
        except (data.VideoError, data.WorkerError) as error:
            trouble = str(error)
        waited += time.monotonic() - began
        reason = over_ranks(args.stop or (0.5 if trouble else 0))  # a signal outranks trouble
        if reason:
            kept = over_ranks(float(save(step)))  # all wait: torchrun kills them at the first exit
            say(f"stopped after step {step}; {'the same command goes on' if kept else 'NOT saved'}")
            raise SystemExit(128 + int(reason)) if reason >= 1 else Stop(trouble, code=1)

        # ---- forward and backward: nothing waits for the GPU; gradients go over ranks once a step ----
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share_of_peak(args, step, per_epoch)
        rows = []
        for micro, batch in enumerate(micro_batches, 1):
            together = world() == 1 or micro == args.accumulate
            with nullcontext() if together else trained.no_sync():
                with args.autocast():
                    loss, stats = objective(trained, data.normalize(batch["video"]), batch, step)
                scaler.scale(loss / args.accumulate).backward()  # their mean
            rows.append(torch.stack([loss.detach(), *stats.values()]))
            bad.update(batch["bad"])  # unreadable

        # ---- the step itself: fp16 adapts its scale, the others keep 1 ----
        scaler.step(optimizer)  # none where gradients are not finite
        scaler.update(None if args.precision == "fp16" else 1.0)
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # ---- a line of log.jsonl, over all ranks: for it the GPU is waited for ----
        if step % max(1, min(50, last // 500)) == 0 or step % per_epoch == 0 or step == last:
            row = (sigma.all_reduce(torch.stack(rows).mean(dim=0)) / world()).tolist()  # the one wait
            before, taken = taken, int(next(iter(optimizer.state.values()))["step"])
            moved, seconds = step if taken > before else moved, time.monotonic() - since
            log.line(step, per_epoch, last, bad, lr=group["lr"], **dict(zip(["loss", *stats], row)),
                     clips_per_second=(step - logged) * args.clips_a_step / seconds,
                     data_wait=waited / seconds, skipped=step - taken, loss_scale=scaler.get_scale())
            if step - moved >= (50 if args.precision == "fp16" else 5):  # fp16 first halves its scale
                raise Stop(f"{step - moved} steps in a row are not finite; checkpoint.pt is good: go on with "
                           "another --precision, or anew with a lower --lr in another --out", code=1)
            bar.update(step - logged)
            logged, since, waited = step, None, 0.0


def share_of_peak(args, step, per_epoch):
    """The learning rate's share of its peak: linear warm-up, then half a cosine to --min-lr."""
    total, warmup, floor = args.epochs * per_epoch, args.warmup_epochs * per_epoch, args.min_lr / args.lr
    if step < warmup:  # while AdamW's averages are young
        return step / warmup
    done = min(1, (step - warmup) / max(1, total - warmup))  # 0 to 1
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))


def parameter_groups(model):
    """AdamW's groups as the release: no weight decay on biases, norms and the mask token."""
    groups = {0.05: [], 0.0: []}  # by weight decay
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and not name.endswith("mask_token")
        groups[0.05 if decays else 0.0] += [parameter] if parameter.requires_grad else []
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def wrapped(args, model):
    """The model as training calls it: compiled and over all ranks, where asked."""
    if args.compile:
        for block in model.modules():  # block by block: quick, and DDP's overlap stays
            if isinstance(block, sigma.Block):
                block.compile()
        model.loss_fn = torch.compile(model.loss_fn)
    if world() == 1:
        return model
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # only from torch 2.15 on
    # No device_ids: the mask is counted on the CPU, for nothing waits for the GPU.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


# ============ pretraining ============
def pretrain(args):
    """The paper's training: features of hidden tubes, predicted from the visible ones."""
    train_videos, val_videos = open_data(args)
    torch.manual_seed(args.seed)
    with agreed():
        model, hide = make_model(args)
    load_teacher(args, model)
    model.to(args.device)
    # Masks are drawn with their clips, the same in a resumed run.
    train_set = open_clips(args, train_videos, True, args.repeats, mask=partial(hide, args.repeats))
    shown_set = open_clips(args, val_videos or train_videos, mask=partial(hide, 1))  # for pictures
    say(f"SIGMA {args.size}, target {args.target}, loss {args.loss}: {args.videos} videos; {args.about}")

    def objective(model, video, batch, step):
        return model(video, batch["mask"])  # the mask stays on the CPU

    def evaluate(log, step):
        # Pictures first: k-NN's line says that this evaluation is done.
        for draw in (preview, prototype_sheet) if step else ():
            with suppress(Stop):  # none of the few videos can be read
                draw(args, model, shown_set)
        if val_videos is not None:
            queries = bank = features(args, model, val_videos)
            if train_videos.labels.min() >= 0:  # else each video of --val is judged by the others
                bank = features(args, model, train_videos, limit=20_000)
            log.report("knn", step, top1=knn(*bank, *queries))
    # betas as MAE's and VideoMAE's
    fit(args, model, parameter_groups(model), (0.9, 0.95), train_set, objective, evaluate)


def make_model(args):
    """SIGMA as flags say, and its tube_mask(batch). Raises ValueError."""
    names = "assignment", "teacher", "frames", "image_size", "recompute"
    flags = {name: getattr(args, name) for name in names}
    model = SIGMA(args.size, args.target, args.loss, args.prototypes, args.eps, **flags)
    steps, patches = model.grid[0], model.grid[1] * model.grid[2]  # in tubes
    if not 0 < int(args.mask_ratio * patches) < patches:
        raise ValueError(f"--mask-ratio {args.mask_ratio} hides none or all of {patches} tubes")
    return model, partial(sigma.tube_mask, steps=steps, patches=patches, ratio=args.mask_ratio)


def open_clips(args, videos, train=False, *more, **named):
    """Clips as the flags say: for training drawn anew each epoch, else the middle."""
    return data.Clips(videos, args.frames, args.stride, args.image_size, args.seed, train, *more, **named)


# ============ log and checkpoints ============
# What decides the loss curve, and so must stay where a run resumes.
CURVE = ("size", "target", "teacher", "loss", "assignment", "prototypes", "eps", "epochs", "warmup_epochs",
         "global_batch", "accumulate", "repeats", "lr", "min_lr", "frames", "stride", "image_size",
         "mask_ratio", "seed", "videos", "finetune")
NEWS = {"loss": "loss {:.3f}", "agreement": "agreement {:.2f}", "perplexity": "perplexity {:.1f}",
        "spread": "spread {:.2f}", "clips_per_second": "{:.1f} clips/s",
        "data_wait": "waiting for data {:.0%}"}  # of an epoch


def save_checkpoint(args, log, parts, per_epoch, step, name="checkpoint.pt"):
    """Whether rank 0 has written it; the log first, which so has every line up to there."""
    content = {"step": step, "epoch": step // per_epoch, "args": args.curve,
               **{name: part.state_dict() for name, part in parts.items()}}
    return rank() == 0 and log.save() and replace_file(args.out / name, partial(torch.save, content))


def resume(args, parts):
    """Loads what lies in --out into `parts` (model, optimizer, scaler). Returns step and log."""
    path, step, args.curve = args.out / "checkpoint.pt", 0, {name: getattr(args, name) for name in CURVE}
    with agreed():
        try:
            if path.exists():
                checkpoint = load_checkpoint(path)
                theirs, step = checkpoint["args"], checkpoint["step"]  # args: then's CURVE
                changed = [f"{name} was {theirs.get(name)}, is {value}" for name, value in args.curve.items()
                           if theirs.get(name) != value]
                if changed:
                    raise ValueError(f"{path} is another run's ({'; '.join(changed)}): use another --out")
                for name, part in parts.items():
                    # Scale 1 is another precision's: in fp16 small gradients would become 0.
                    if name != "scaler" or checkpoint[name].get("scale", 1) > 1:
                        part.load_state_dict(checkpoint[name])
                say(f"resuming {args.out} at step {step}")
            log = Log(args, step)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} does not fit this run ({error!r:.150}): use another --out") from None
    if over_ranks(step) != -over_ranks(-step):  # the highest and the lowest
        raise Stop(f"different checkpoints in {args.out}: machines must see one folder")
    return step, log


class Log:
    """log.jsonl, on rank 0. Written as a whole each time: no line is torn or doubled,
    and what a full disk kept out the next write has.
    Where a run resumes, lines after `step` are dropped: they come again."""
    def __init__(self, args, step=math.inf):
        self.args, self.path, self.records = args, args.out / "log.jsonl", []
        self.told, self.warned = time.monotonic(), False  # people, last; of a collapse
        if rank() == 0 and self.path.exists():
            with suppress(ValueError, TypeError, AttributeError):  # another program's
                records = [json.loads(line) for line in self.path.read_bytes().split(b"\n")[:-1]]
                self.records = [r for r in records if step and r.get("step", r.get("at_step")) <= step]
            if not self.records:
                say(f"{self.path} is of no use here, and kept as log-….jsonl")
                os.replace(self.path, self.path.with_name(f"log-{int(time.time())}.jsonl"))
        self.text = "".join(json.dumps(record) + "\n" for record in self.records)
        self.save = partial(replace_file, self.path, lambda file: file.write(self.text.encode()))

    def write(self, **record):
        """A line, in which NaN and infinity, no JSON, become null."""
        if rank() == 0:
            self.records.append({name: None if isinstance(value, float) and not math.isfinite(value)
                                 else value for name, value in record.items()})
            self.text += json.dumps(self.records[-1]) + "\n"
            self.save()

    def report(self, kind, step, **found):
        """An evaluation's line, also for people."""
        self.write(eval=kind, step=step, **{name: round(value, 2) for name, value in found.items()})
        say(f"{kind} at step {step}: {', '.join(f'{name} {value:.4g}' for name, value in found.items())}")

    def line(self, step, per_epoch, last, bad, **stats):
        """A step's line; for people an epoch's news (each minute's, where there is no terminal),
        and what cannot be read. `bad` becomes that of all ranks."""
        say_unreadable(bad)
        known = {record["unreadable"] for record in self.records if "unreadable" in record}
        for path in bad.keys() - known if rank() == 0 else ():
            self.write(at_step=step, unreadable=path, reason=bad[path])
        args, epoch, unreadable = self.args, (step - 1) // per_epoch, len(known | bad.keys())
        self.write(step=step, epoch=epoch, **stats, unreadable_videos=unreadable)
        late = not sys.stderr.isatty() and time.monotonic() > self.told + 60
        if rank() or not (late or step % per_epoch == 0 or step == last):
            return
        records = [record for record in self.records if record.get("epoch") == epoch]
        mean = {name: np.mean([r[name] for r in records if r[name] is not None] or [math.nan])
                for name in NEWS if name in stats}
        left = (last - step) * args.clips_a_step / max(0.01, mean["clips_per_second"])
        say("  ".join([f"epoch {step / per_epoch:.4g}/{args.epochs}",
                       *(NEWS[name].format(value) for name, value in mean.items()),
                       f"ETA {tqdm.format_interval(left)}",
                       *([f"{unreadable} of {args.videos} videos unreadable"] if unreadable else [])]))
        warm = step > args.warmup_epochs * per_epoch  # before, features may well be alike
        if warm and mean.get("spread", 1) < 0.05 and not self.warned:
            self.warned = True
            say("warning: a spread under 0.05: φ's features are nearly alike. If that stays, the run has "
                "collapsed, whatever its loss: lower --lr, raise --batch-size, try fewer --prototypes")
        self.told = time.monotonic()
        plot(self.records, args.out / "curve.png")


def replace_file(path, write):
    """Writes a file by write(open file), atomically: also after a kill it is the old or the new one.
    Returns True; where it cannot be written, after a warning, False."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # before the name points there
        os.replace(part, path)
        return True
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        say(f"warning: {path} could not be written ({error!r:.150}); the old one stays")
        with suppress(OSError):
            part.unlink()  # room for others
        return False


# ============ processes and devices ============
class Stop(Exception):
    """Ends the program in one line: a user's mistake (code 2), or a run that cannot go on (1).
    Without a message, where another process says why."""
    def __init__(self, message=None, code=2):
        self.message, self.code = message, code


def rank(kind="RANK"):
    """This process's number; LOCAL_RANK: on this machine."""
    return int(os.environ.get(kind, 0))


def world(kind="WORLD_SIZE"):
    """Their number; LOCAL_WORLD_SIZE: on this machine."""
    return int(os.environ.get(kind, 1))


def over_ranks(value, op="MAX"):
    """A number of every rank's own -> one for all.
    On the hosts: no GPU is waited for. Also a barrier."""
    return sigma.all_reduce(torch.tensor(value, dtype=torch.float64), op).item()


@contextmanager
def agreed():
    """Around what reads users' words and files: trouble in one ends all."""
    trouble = None
    try:
        yield
    except (ValueError, OSError) as error:
        trouble = Stop(str(error))
    if over_ranks(float(trouble is not None)):
        raise trouble or Stop()  # silent where another has the trouble


def say(message):
    """Prints above the bar, once for all ranks."""
    if rank() == 0:
        with suppress(OSError):  # full disks, closed pipes
            tqdm.write(message)


def say_unreadable(bad, said=set()):
    """Names files once.
    bad: path -> reason, of the videos that this rank has read; becomes that of all ranks."""
    everyone = [bad] * world()
    if world() > 1:
        dist.all_gather_object(everyone, bad)
    for other in everyone:
        bad.update(other)
    for path in sorted(bad.keys() - said):
        said.add(path)
        say(f"unreadable: {path}: {bad[path]}")


def start_processes(args):
    """Joins torchrun's process group, picks device and precision:
    what all modes share."""
    args.cuda, args.stop = torch.cuda.is_available(), 0  # stop: the signal that came, in training
    args.device, auto, here = torch.device("cpu"), "fp32", world("LOCAL_WORLD_SIZE")
    if args.cuda:
        if here > torch.cuda.device_count():
            raise Stop(f"{here} processes, {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        args.device = torch.device("cuda", rank("LOCAL_RANK"))
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32, where precision is fp32
        auto = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"  # from Ampere on
    else:
        # glibc takes fresh pages for every large tensor, which the kernel fills with zeros.
        # To keep them (M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD) is quicker.
        with suppress(OSError, AttributeError, TypeError):  # no glibc
            for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):
                ctypes.CDLL(None).mallopt(option, value)
    args.precision = args.precision.replace("auto", auto)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    args.autocast = partial(torch.autocast, args.device.type, dtype, enabled=dtype != torch.float32)
    if args.workers is None:
        args.workers = min(16, max(1, data.CORES // here)) if args.cuda else 1
    if world() > 1:  # gloo for what stays on the hosts
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.cuda else "gloo")
    args.global_batch = args.batch_size * world()  # clips that Sinkhorn balances
    args.clips_a_step = args.global_batch * args.accumulate  # what the learning rate follows
    where = torch.cuda.get_device_name() if args.cuda else f"{torch.get_num_threads()} CPU threads"
    args.about = f"{world()} x {args.batch_size} clips of {args.frames} frames, {args.precision} on {where}"


def take_folder(args):
    """Makes --out and locks it against a second run,
    by the kernel's lock, which ends with this process.
    Writes the demo's videos there, or finds them beside the checkpoint."""
    with agreed():
        args.out.mkdir(parents=True, exist_ok=True)
        args.lock = open(args.out / ".lock", "a")
        try:
            import fcntl
            if rank() == 0:
                fcntl.lockf(args.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to --out {args.out}: name another") from None
        except (OSError, ImportError):  # file systems without locks, Windows: a second run goes unnoticed
            pass
    say(f"results in {args.out}, {args.workers} workers")
    if args.demo:
        videos = Path(args.checkpoint or args.out / "none").parent / "videos"
        videos = videos if videos.is_dir() else args.out / "videos"
        with agreed():
            if rank() == 0:
                data.write_demo(videos)
        args.data, args.val = videos / ("davis" if args.segment else "train"), args.val or videos / "val"


# ============ each video once, over all ranks ============
def open_data(args, labels=False):
    """The videos of --data and of --val (None if not given; an error where labels are needed)."""
    with agreed():
        train = data.find_videos(args.data)
        val = data.find_videos(args.val, train.classes) if args.val else None  # one number for a class
        if labels and val is None:
            raise ValueError("--val is missing: the labelled videos to test on")
        for flag, videos in (("--data", labels and train), ("--val", val)):
            if videos and videos.labels.min() < 0:
                raise ValueError(f"{flag} has no labels: it needs class folders, or a list with labels")
    args.videos = len(train)  # of a training epoch
    return train, val


@torch.no_grad()
def each_once(args, model, dataset, compute, batch_size, chosen=None):
    """Runs compute(normalised video [B, …], batch) -> tensors [videos, …]
    over a data set, shared by all ranks.

    Returns these tensors for all videos (or the `chosen` numbers) that can be read, in their order
    whatever the number of processes, and last their numbers. Raises Stop where there are none."""
    chosen, parts, bad = chosen or range(len(dataset)), [], {}  # parts: [batch][tensor]
    mine = DistributedSampler(chosen, world(), rank(), shuffle=False)  # where it must, gives some twice
    batches = list(BatchSampler([(0, chosen[i]) for i in mine], batch_size, drop_last=False))
    loader = data.load(dataset, batches, min(args.workers, len(batches)), args.cuda)
    loader = data.batches_to_device(loader, args.device)
    model.eval()
    for batch in tqdm(loader, "evaluating", len(batches), leave=False, disable=rank() > 0 or None):
        with args.autocast():
            found = compute(data.normalize(batch["video"]), batch)
        index = batch["index"][::len(batch["index"]) // len(found[0])]  # once for all its views
        parts.append([part.to(args.device) for part in (*found, index)])
        bad.update(batch["bad"])
        if args.stop:  # while training, which has saved, waits for this
            raise SystemExit(128 + args.stop)
    model.train()
    say_unreadable(bad)
    gathered = []
    for own in map(torch.cat, zip(*parts)):
        everyone = [torch.empty_like(own) for _ in range(world())]
        dist.all_gather(everyone, own) if world() > 1 else everyone[0].copy_(own)
        gathered.append(torch.stack(everyone, dim=1).flatten(0, 1)[:len(chosen)])  # in the videos' order
    read = gathered[-1] >= 0  # a number where a file could be read
    if not read.any():
        raise Stop(f"none of the {len(read)} videos to evaluate can be read", code=1)
    return [part[read] for part in gathered]


def evenly(total, count):
    """At most `count` numbers below `total`, evenly spread."""
    return torch.linspace(0, total - 1, min(count, total)).long().unique().tolist()


def features(args, model, videos, limit=None):
    """Mean-pooled encoder tokens [n, D] and labels [n] of the readable videos' centre clips."""
    def pooled(video, batch):
        return [model.features(video).float().mean(dim=1)]  # [B, D]
    chosen = evenly(len(videos), limit or len(videos))
    rows, index = each_once(args, model, open_clips(args, videos), pooled, args.batch_size, chosen)
    return rows, videos.labels.to(index.device)[index]


def knn(bank, bank_labels, queries, labels, k=20, temperature=0.07):
    """Top-1 in percent of DINO's k-nearest-neighbour vote, weighted exp(cosine similarity / 0.07).
    Queries that are the bank itself are judged each by the others. Every rank takes its share."""
    alone, right, classes = queries is bank, 0, int(max(bank_labels.max(), labels.max())) + 1
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)  # [n, D], [q, D]
    own = torch.arange(rank(), len(queries), world(), device=bank.device)
    for rows in own.split(max(1, 2 ** 27 // len(bank))):  # half a gigabyte of similarities at a time
        similarity = queries[rows] @ bank.T  # [rows, n]
        if alone:
            similarity.scatter_(1, rows[:, None], -torch.inf)
        best, index = similarity.topk(min(k, len(bank) - alone), dim=1)  # [rows, k]
        votes = best.new_zeros(len(best), classes)  # [rows, classes]
        votes.scatter_add_(1, bank_labels[index], (best / temperature).exp())
        right += (votes.argmax(dim=1) == labels[rows]).sum().item()
    return 100 * over_ranks(right, "SUM") / len(queries)


# ============ pictures ============
def tint(video, labels):
    """uint8 [n, 3, T, S, S], as grey under the colours of the labels
    [n, t, h, w] of its tubes or pixels."""
    # Golden-ratio hues: numbers next to each other differ.
    hue = 6 * (labels[:, None] * 0.6180339887 % 1) + torch.tensor([0.0, 4.0, 2.0]).view(3, 1, 1, 1)
    rgb = F.interpolate(((hue % 6 - 3).abs() - 1).clamp(0, 1), size=video.shape[2:], mode="nearest-exact")
    return (0.35 * video.float().mean(dim=1, keepdim=True) + 0.65 * 255 * rgb).byte()


def save_pages(path, *pages, tile=96, margin=120):
    """Pages of rows, each a caption and uint8 pictures [n, 3, h, w] -> a PNG; of many pages a GIF."""
    from torchvision.utils import make_grid  # takes a second
    sheets = []
    for rows in pages:
        tiles = [F.interpolate(pictures, (tile, tile), mode="nearest-exact") for _, pictures in rows]
        grid = F.pad(make_grid(torch.cat(tiles), len(tiles[0]), 4, pad_value=255), (margin, 0), value=255)
        sheets.append(Image.fromarray(grid.permute(1, 2, 0).numpy()))
        for row, (caption, _) in enumerate(rows):
            place = 8, row * (tile + 4) + tile // 2 - 12
            ImageDraw.Draw(sheets[-1]).text(place, caption, "black", font_size=15)
    moving = {"save_all": True, "append_images": sheets[1:], "duration": 160, "loop": 0} if sheets[1:] else {}
    replace_file(path, lambda file: sheets[0].save(file, path.suffix[1:], **moving))


def preview(args, model, clips):
    """preview.png and .gif: clips, what the encoder sees of them,
    every tube in the colour of its prototype."""
    def look(video, batch):
        return batch["video"], batch["mask"], model.assign(video) if args.loss == "sigma" else batch["mask"]
    found = each_once(args, model, clips, look, 1, evenly(len(clips), 3))
    if rank():
        return
    videos, masks, tubes, _ = (part.cpu() for part in found)  # [n, 3, T, S, S], [n, N], [n, N]
    hidden = F.interpolate(masks.view(-1, 1, *model.grid).float(), videos.shape[2:]) > 0
    rows = [("video", videos), ("what the\nencoder sees", videos.masked_fill(hidden, 217))]
    if args.loss == "sigma":
        rows.append(("cluster of\nevery tube", tint(videos, tubes.view(-1, *model.grid))))
    still = [(caption, video[n, :, evenly(args.frames, 8)].transpose(0, 1))
             for n in range(len(videos)) for caption, video in rows]
    save_pages(args.out / "preview.png", still)
    moving = [[(caption, video[:, :, t]) for caption, video in rows] for t in range(args.frames)]
    save_pages(args.out / "preview.gif", *moving)


def prototype_sheet(args, model, clips, rows=8, columns=8, context=5):
    """prototypes.png: for the prototypes nearest to most tubes of up to 64 clips,
    the tubes of different clips that score highest, in full light,
    among `context` patches a side."""
    if args.loss != "sigma":
        return

    def score(video, batch):
        scores = model.prototype_scores(video).float()  # x̃ [1, N, K]
        used = torch.bincount(scores[0].argmax(dim=1), minlength=args.prototypes)
        # Of each clip its best tube alone, or a still one could fill a row.
        return batch["video"][:, :, ::TUBELET], *scores.max(dim=1), used[None]
    found = each_once(args, model, clips, score, 1, evenly(len(clips), 64))
    if rank():
        return
    videos, best, tubes, used, _ = (part.cpu() for part in found)  # all but videos: [n, K]
    used, p, side, sheet = used.sum(dim=0), model.patch, min(context, model.grid[1]), []
    for k in used.argsort(descending=True)[:min(rows, int((used > 0).sum()))].tolist():
        cut = []
        for n in best[:, k].argsort(descending=True)[:columns].tolist():
            t, y, x = map(int, np.unravel_index(tubes[n, k].item(), model.grid))
            top, left = (min(max(i - side // 2, 0), model.grid[1] - side) for i in (y, x))  # in patches
            light = torch.full((side, side), 0.5)
            light[y - top, x - left] = 1
            window = videos[n, :, t, top * p:(top + side) * p, left * p:(left + side) * p]
            cut.append((window * light.repeat_interleave(p, 0).repeat_interleave(p, 1)).byte())
        sheet.append((f"prototype {k}\n{100 * used[k] / used.sum():.2g}% of tubes", torch.stack(cut)))
    save_pages(args.out / "prototypes.png", sheet)


def plot(records, path):
    """curve.png: a panel for each of these numbers over the steps."""
    panels, width, height = [], 250, 150
    for name in ("loss", "agreement", "perplexity", "spread", "top1"):
        points = [(record["step"], record[name]) for record in records if record.get(name) is not None]
        if len(points) > 1:
            steps, values = (np.array(column, float) for column in zip(*points))
            x, y = ((axis - axis.min()) / (np.ptp(axis) or 1) for axis in (steps, values))  # 0 to 1
            panels.append(Image.new("RGB", (width + 20, height + 65), "white"))
            draw = ImageDraw.Draw(panels[-1])
            draw.rectangle((10, 45, 10 + width, 45 + height), outline="#bbbbbb")
            line = np.stack([10 + x * width, 45 + (1 - y) * height], axis=1)
            draw.line(line.flatten().tolist(), "#1f5fa8", 2)
            draw.text((10, 6), f"{name}: {values.min():.3g} to {values.max():.3g}\n"
                      f"step {steps[0]:.0f} to {steps[-1]:.0f}", "black", font_size=14)
    if panels:
        sheet = Image.fromarray(np.concatenate([np.asarray(panel) for panel in panels], axis=1))
        replace_file(path, lambda file: sheet.save(file, "png"))


# ============ weights ============
DINO_URL = "https://dl.fbaipublicfiles.com/dino/dino_{0}_pretrain/dino_{0}_pretrain.pth"
DINO_NAME = {"vits16": "deitsmall16", "vitb16": "vitbase16"}


def read_weights(path):
    """A checkpoint -> its tensors under our names, what they say of the model, its `args` of the clips.
    Ours, the authors', VideoMAE's: pretrained (the same names) or fine-tuned (no "encoder.").
    Raises ValueError."""
    content = load_checkpoint(path)
    inside = [content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)]
    # DDP, torch.compile and larger models prefix names.
    state = {re.sub(r"^(module\.|_orig_mod\.|backbone\.)+", "", str(name)): value
             for name, value in (*inside, content)[0].items() if isinstance(value, torch.Tensor)}
    if not any(name.startswith("encoder.") for name in state):  # fine-tuned
        state = {re.sub(r"^(?!head\.|fc_norm\.)", "encoder.", name): value for name, value in state.items()}

    embedding = state.get("encoder.patch_embed.proj.weight", torch.zeros(0)).shape  # [D, 3, 2, patch, patch]
    size = [name for name, s in SIZES.items()
            if embedding == (s["width"], 3, TUBELET, s["patch"], s["patch"])]
    if not size:
        raise ValueError(f"{path} holds no video model of size {', '.join(SIZES)} under its authors' names"
                         + ", but Hugging Face's: take the authors' file" * ("videomae." in " ".join(state)))
    out, clustered = len(state.get("decoder.head.weight", ())), "prototypes" in state  # out: E
    pixels = not clustered and out in (0, math.prod(embedding[1:]))  # 0: fine-tuned, without decoder
    model = {"size": size[0], "loss": "sigma" if clustered else "l2", "step": content.get("step", 0),
             "prototypes": len(state.get("prototypes", "1")), "teacher": "vits16" if out == 384 else "vitb16",
             "target": "mlp" if "head.2.weight" in state else "pixel" if pixels else "dino"}
    said = getattr(content.get("args"), "__dict__", content.get("args"))  # the authors' is a Namespace
    said = said if isinstance(said, dict) else {}  # others' can be anything
    clip = {ours: said.get(ours, said.get(theirs)) for ours, theirs in (
        ("frames", "num_frames"), ("stride", "sampling_rate"), ("image_size", "input_size"))}
    return state, model, {name: value for name, value in clip.items() if isinstance(value, int)}


def load_weights(module, state, path, free=()):
    """Loads what `module` has; returns the names left as they were, which all start with one of
    `free`. ValueError: others are missing or of another shape, or the module lacks a block."""
    wanted, found = ({name: tuple(value.shape) for name, value in tensors.items()}
                     for tensors in (module.state_dict(), state))
    left = [name for name in wanted if wanted[name] != found.get(name)]
    wrong = [f"{name} is {found.get(name, 'missing')} instead of {wanted[name]}" for name in left
             if not name.startswith(tuple(free))]
    wrong += [f"{name} is unknown" for name in found.keys() - wanted if name.startswith("encoder.blocks.")]
    if wrong:
        raise ValueError(f"{path} fits only in part: {'; '.join(wrong[:4])}; {len(wrong)} in all")
    module.load_state_dict({name: state[name] for name in wanted if name not in left}, strict=False)
    return left


def load_teacher(args, model):
    """DINO's weights: a machine's first process downloads them, then the others find them."""
    url, path = DINO_URL.format(DINO_NAME[args.teacher]), args.dino_weights
    for later in (False, True) if args.target == "dino" else ():
        with agreed():
            try:
                if later == (rank("LOCAL_RANK") > 0):
                    weights = load_checkpoint(path) if path else torch.hub.load_state_dict_from_url(
                        url, map_location="cpu", weights_only=True)
                    model.teacher.load_state_dict(weights)
            except (OSError, RuntimeError) as error:
                raise ValueError(f"{path or url}: no weights of {args.teacher} ({error!r:.150}): fetch {url} "
                                 "and name it with --dino-weights") from None


def open_model(args):
    """The SIGMA of a checkpoint, on the device and frozen, and the log."""
    with agreed():
        (model, _), log = make_model(args), Log(args)
        # A fine-tuned VideoMAE lacks these, and features do without.
        free = ("decoder.", "encoder_to_decoder.", "mask_token", "encoder.norm.")
        load_weights(model, args.weights, args.checkpoint, free if "fc_norm.weight" in args.weights else ())
    say(f"{args.checkpoint}: {args.size}, target {args.target}; {args.frames} frames of {args.image_size} "
        f"pixels, stride {args.stride}")
    return model.to(args.device).requires_grad_(False), log


# ============ linear probe ============
def probe(args):
    """k-NN and a linear layer from features of --data to those of --val."""
    train, val = open_data(args, labels=True)
    model, log = open_model(args)
    sets = *features(args, model, train), *features(args, model, val)  # features, labels; twice
    log.report("knn", args.step, top1=knn(*sets), videos=len(sets[2]))
    log.report("linear", args.step, top1=linear_probe(*sets, seed=args.seed), videos=len(sets[2]))


def linear_probe(bank, bank_labels, queries, labels, seed=0, epochs=30, lr=1e-3):
    """Top-1 in percent of a linear layer on frozen features: AdamW, lr 1e-3, 30 epochs, as the paper.

    Where that is silent: features are standardised, the layer starts at zero,
    lr falls as a cosine, no weight decays,
    batches are of 64, up to 1024 where there are many videos."""
    batch_size, classes = min(max(64, len(bank) // 200), 1024), int(max(bank_labels.max(), labels.max())) + 1
    std, mean = torch.std_mean(bank, dim=0, correction=0)  # [D]
    bank, queries = ((rows - mean) / (std + 1e-6) for rows in (bank, queries))
    weight = torch.zeros(classes, bank.shape[1], device=bank.device, requires_grad=True)
    bias = torch.zeros(classes, device=bank.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(bank) // batch_size))
    for epoch in range(epochs):
        order = torch.randperm(len(bank), generator=data.seeded(seed, epoch)).to(bank.device)
        for rows in order.split(batch_size):  # the same minibatches for any number of ranks
            optimizer.zero_grad()
            F.cross_entropy(F.linear(bank[rows], weight, bias), bank_labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return 100 * (F.linear(queries, weight, bias).argmax(dim=1) == labels).float().mean().item()


# ============ fine-tuning ============
class Classifier(SIGMA):
    """VideoMAE's model for fine-tuning, and its names: encoder, mean of all tokens, LayerNorm,
    linear head from near zero. settings: SIGMA's.
    video [B, 3, T, H, W] -> logits [B, classes]."""
    def __init__(self, classes, *settings, **named):
        super().__init__(*settings, target="pixel", loss="l2", drop_path=0.1, **named)
        del self.decoder, self.encoder_to_decoder, self.mask_token
        self.fc_norm, self.encoder.norm = self.encoder.norm, nn.Identity()  # after the mean, not before
        self.head = nn.Linear(*self.fc_norm.normalized_shape, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, video):
        return self.head(self.fc_norm(self.features(video).mean(dim=1)))  # features: [B, N, D]


def layer_groups(model, decay=0.75):
    """parameter_groups by layer: the head learns at full rate, each layer at `decay` of the one above."""
    layers = [model.encoder.patch_embed, *model.encoder.blocks, nn.ModuleList([model.fc_norm, model.head])]
    return [{**group, "lr_scale": decay ** (len(layers) - i)} for i, layer in enumerate(layers, 1)
            for group in parameter_groups(layer)]


def augmentation(flip):
    """RandAugment m7-n4, flip, random erasing: one draw for all frames, uint8 [T, 3, H, W] -> the same.

    As timm's "rand-m7-n4": each of four is applied half of the time, magnitude 7 is of 10;
    but without its noise on the magnitude,
    and erasing to ImageNet's mean."""
    from torchvision.transforms import v2  # takes two seconds
    mean = [round(255 * m) for m in data.IMAGENET_MEAN]
    one = v2.RandAugment(1, 7, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=mean)
    erase = v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=mean)
    mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
    return v2.Compose([v2.RandomApply([one], p=0.5)] * 4 + [mirror, erase])


def finetune(args):
    """Trains the encoder and a new head on labels: VideoMAE's recipe, as the paper's."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    train, val = open_data(args, labels=True)
    # --val may have classes without a training video.
    classes = max(int(train.labels.max()) + 1, len(train.classes or ()))
    with agreed():
        if val.labels.max() >= classes:
            raise ValueError(f"--val has label {int(val.labels.max())}, --data none above {classes - 1}")
        torch.manual_seed(args.seed)
        model = Classifier(classes, args.size, frames=args.frames, image_size=args.image_size,
                           recompute=args.recompute)
        if args.weights:
            load_weights(model, args.weights, args.checkpoint, free=("fc_norm.", "head."))
    model.to(args.device)
    train_set = open_clips(args, train, True, args.repeats, draw_crop=data.draw_resized,
                           transform=augmentation(flip=args.stride > 0 and not args.demo))
    test_set = open_clips(args, val, views=(5 if args.stride else 2, 3))  # clips, crops: the whole picture
    mix = v2.RandomChoice([kind(alpha=alpha, num_classes=classes)
                           for kind, alpha in ((v2.MixUp, 0.8), (v2.CutMix, 1.0))])
    say(f"{args.size} from {args.finetune}: {classes} classes, {args.videos} videos; {args.about}")

    def objective(model, video, batch, step):
        # Mixing and drop path repeat in a resumed run.
        torch.manual_seed(data.seeded(args.seed, step, rank(), int(batch["index"][0])).initial_seed())
        video, target = mix(tv_tensors.Video(video), batch["label"].to(args.device, non_blocking=True))
        logits = model(video.as_subclass(torch.Tensor)).float()  # [B, classes]
        return F.cross_entropy(logits, target, label_smoothing=0.1), {}

    def evaluate(log, step):
        if step:
            top1, top5, videos = multi_view(args, model, test_set)
            log.report("finetune", step, top1=top1, top5=top5, videos=videos)
    fit(args, model, layer_groups(model), (0.9, 0.999), train_set, objective, evaluate)


def multi_view(args, model, clips):
    """Top-1 and top-5 in percent, number of videos: by the softmax averaged over a video's views."""
    views = math.prod(clips.views)  # clips times crops

    def best(video, batch):
        share = model(video).float().softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1)  # [B, classes]
        return share.topk(min(5, share.shape[1])).indices, batch["label"][::views]
    top, label, _ = each_once(args, model, clips, best, max(1, args.batch_size // views))
    hits = (top == label[:, None]).float()  # [videos, 5]
    return 100 * hits[:, 0].mean().item(), 100 * hits.amax(dim=1).mean().item(), len(hits)


# ============ video object segmentation ============
def segment(args):
    """K-means of every clip's tube features;
    where there are masks, mIoU by the paper's two protocols.

    The paper leaves the details open. Here a clip is the middle of a video,
    squeezed to the model's square, so that no object is cut off;
    the background is one of the objects, in their number K as in the mean;
    mIoU is the mean over objects, then over clips."""
    with agreed():
        masked = (Path(args.data) / "JPEGImages").is_dir()
        clips = (data.Scenes(args.data, args.frames, args.stride, args.image_size) if masked
                 else open_clips(args, data.find_videos(args.data)))
    model, log = open_model(args)
    torch.set_float32_matmul_precision("highest")  # for K-means

    def cluster(video, batch):
        tokens, truth = model.features(video)[0].float(), batch.get("truth", torch.zeros(1))  # [N, D]
        objects, scores = len(truth[truth >= 0].unique()), [math.nan, math.nan]
        with torch.autocast(args.device.type, enabled=False):  # in float32
            few, many = (kmeans(tokens, k, args.seed).cpu().view(model.grid)
                         for k in (objects if objects > 1 else 4, 10))
        if objects > 1:  # a background alone is no segmentation
            matched, column = match_one_to_one(overlap(truth, few, objects))
            few = torch.tensor(column).argsort()[few]  # a cluster gets its object's number
            scores = [100 * matched, 100 * match_many_to_one(overlap(truth, many, 10))]
        return torch.tensor([scores]), few[None], many[None]  # [1, 2], twice [1, t, h, w]
    scores, few, many, index = (part.cpu() for part in each_once(args, model, clips, cluster, 1))
    rows, times = [], evenly(args.frames, 8)
    for n in evenly(len(index), 3):
        item = clips[0, int(index[n])]
        labels = {"ground truth": item.get("truth"), "clusters": few[n], "10 clusters": many[n]}
        rows += [("video", item["video"]), *((name, tint(item["video"], of_tubes[None]))
                                             for name, of_tubes in labels.items() if of_tubes is not None)]
    if rank() == 0:
        shown = [(name, video[0, :, times].transpose(0, 1)) for name, video in rows]
        save_pages(args.out / "segments.png", shown)
    scores = scores[scores.isfinite().all(dim=1)]  # of clips with masks
    if len(scores):
        few, many = scores.mean(dim=0).tolist()
        log.report("segment", args.step, miou=few, miou_overclustering=many, clips=len(scores))
    else:
        say(f"{args.data} has no masks to compare with: see segments.png")
    if args.loss == "sigma":  # last, as it needs φ: DINO may not be to be had
        load_teacher(args, model)
        prototype_sheet(args, model, clips)


def kmeans(x, k, seed=0, restarts=5, iterations=50):
    """x [N, D] -> cluster numbers [N]: the best of R k-means++ starts, the same for a seed."""
    x, k, generator = x - x.mean(dim=0), min(k, len(x)), data.seeded(seed)  # centred: less rounding

    def distance():
        return torch.cdist(x, centres.flatten(0, 1)).unflatten(1, (restarts, -1))  # [N, R, k]
    # The next centre is drawn by squared distance to the nearest so far.
    centres = x[torch.randint(len(x), (restarts, 1), generator=generator)]  # [R, 1, D]
    while centres.shape[1] < k:
        weight = distance().amin(dim=2).square().T.cpu() + 1e-12  # [R, N]
        centres = torch.cat([centres, x[torch.multinomial(weight, 1, generator=generator)]], dim=1)
    for _ in range(iterations):
        cost, cluster = distance().min(dim=2)  # [N, R]
        # Means by a product, which repeats exactly; index_add on a GPU does not.
        member = F.one_hot(cluster, k).to(x.dtype).flatten(1)  # [N, R * k]
        size = member.sum(dim=0).view(restarts, k, 1)  # 0: the centre stays
        centres = torch.where(size > 0, (member.T @ x).view(restarts, k, -1) / size, centres)
    return cluster[:, cost.square().sum(dim=0).argmin()]  # the start of least cost


def overlap(truth, clusters, k):
    """truth [T, H, W], clusters of tubes [t, h, w] ->
    pixels that an object and a cluster share, [objects, k]."""
    # Clusters at the masks' size, not masks at the tubes': no pixel of truth is lost.
    pixels = F.interpolate(clusters[None, None].float(), truth.shape, mode="nearest-exact")[0, 0].long()
    counted = truth >= 0
    objects = truth[counted]
    return torch.bincount(objects * k + pixels[counted], minlength=int(objects.max() + 1) * k).view(-1, k)


def iou(table):
    """Shared pixels [objects, k] -> intersection over union of every pair, float64."""
    table = table.double()
    return table / (table.sum(dim=1, keepdim=True) + table.sum(dim=0) - table).clamp(min=1)


def match_one_to_one(table):
    """Clustering protocol: every object gets a cluster of its own, for the largest mean IoU.
    Returns it and each object's cluster.
    All ways are tried: DAVIS has at most six objects."""
    if len(table) > 8:
        raise Stop(f"a clip has {len(table)} objects: all ways to match them are tried, for at most 8")
    ways = torch.tensor(list(itertools.permutations(range(table.shape[1]), len(table))))  # [ways, objects]
    mean, way = iou(table)[torch.arange(len(table)), ways].mean(dim=1).max(dim=0)
    return mean.item(), ways[way].tolist()


def match_many_to_one(table):
    """Over-clustering protocol: each cluster goes to the object it overlaps most.
    Returns the objects' mean IoU."""
    merged = table @ F.one_hot(table.argmax(dim=0), len(table))  # [objects, objects]
    return iou(merged).diagonal().mean().item()


# ============ what a step costs ============
def bench(args):
    """Times --steps (5) training steps on random clips on the device, up to the end of each part:
    what one takes longer than the one before is the part's;
    the last are whole steps."""
    torch.manual_seed(args.seed)
    with agreed():
        model, hide = make_model(args)
    model.to(args.device)
    shape = args.batch_size, 3, args.frames, args.image_size, args.image_size
    clips = torch.randint(256, shape, dtype=torch.uint8, device=args.device)
    mask = hide(args.batch_size)
    visible, masked = sigma.split_mask(mask, args.device)  # [B, V], [B, M]
    say(f"{args.size}, {args.target}, {args.about}")
    # A clip's operations: recomputing is no work, and only plain attention is counted everywhere.
    model.encoder.recompute = model.decoder.recompute = False
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(data.normalize(clips[:1]), mask[:1])[0].backward()
    model.encoder.recompute = model.decoder.recompute = args.recompute
    model.zero_grad(set_to_none=True)  # of the counting
    flops, trained = counter.get_total_flops(), wrapped(args, model)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-5, fused=True)
    wait = torch.cuda.synchronize if args.cuda else (lambda: None)
    repeat, seconds, parts = args.steps or 5, 0.0, []
    if args.cuda:
        torch.cuda.reset_peak_memory_stats()
    for part in ("encoder", "decoder", "target and loss", "optimizer, gradients over ranks"):
        for i in range(2 + repeat):
            if i == 2:  # the first two warm up
                wait()
                began = time.perf_counter()
            with args.autocast():
                video = data.normalize(clips)
                if part in ("encoder", "decoder"):
                    out = model.encoder(sigma.take_tubes(patchify(video, model.patch), visible), visible)
                    out = model.forward_decoder(out, visible, masked) if part == "decoder" else out
                else:
                    out, _ = (model if part == "target and loss" else trained)(video, mask)
            out.backward(torch.ones_like(out))  # any gradient is as dear as any other
            if part.startswith("optimizer"):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        wait()
        before, seconds = seconds, (time.perf_counter() - began) / repeat  # a step up to here
        parts.append(f"{1000 * (seconds - before) / args.batch_size:9.3f} ms a clip  {part}")

    memory = f"; {torch.cuda.max_memory_allocated() / 2 ** 30:.2f} GiB at most" if args.cuda else ""
    speed = flops * args.batch_size / seconds / 1e12
    say(f"{args.global_batch / seconds:.2f} clips/s, {1000 * seconds:.1f} ms a step; {flops / 1e9:.1f} GFLOP "
        f"a clip, {speed:.3f} TFLOP/s a process{memory}\n" + "\n".join(parts))


# ============ flags and main ============
def at_least(least, kind=int):
    """An argparse type: a finite number with a lower bound."""
    def parse(text):
        value = kind(text)  # a ValueError is argparse's to tell
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}, and finite")
        return value
    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


count, whole, switch = at_least(1), at_least(0), "store_true"
positive, not_negative = at_least(1e-9, float), at_least(0, float)
# Flag: type or choices; default, the paper's; the demo's, if another; what it is.
FLAGS = {
    "data": (str, "demo", "demo; a folder of videos (class folders: labels); a list, path[ label] a line"),
    "val": (str, "labelled videos: k-NN in pretraining, tests of --probe, --finetune"),
    "out": (str, "folder for log, checkpoint, pictures; a run in it is resumed; else runs/…"),
    "probe": (str, "instead, k-NN and linear probe of a checkpoint, from --data to --val"),
    "finetune": (str, "instead, train a checkpoint, or `none`, on labels of --data, test on --val"),
    "segment": (str, "instead, cluster tubes by a checkpoint; mIoU on DAVIS's folders"),
    "bench": (switch, "instead, time steps and their parts; writes nothing"),
    "size": (list(SIZES), "base", "tiny", "of the model"),
    "target": (["mlp", "dino", "pixel"], "mlp", "φ: a trained MLP, frozen DINO, pixels (VideoMAE)"),
    "teacher": (list(TEACHERS), "vitb16", "DINO network of --target dino"),
    "dino-weights": (str, "its file; else downloaded"),
    "loss": (["sigma", "l2"], "l2: VideoMAE with pixel, collapse with mlp; sigma, with pixel l2"),
    "assignment": (["hard", "soft"], "hard", "targets: argmax of q (release), q itself (text)"),
    "prototypes": (count, 3000, 64, "K"),
    "eps": (positive, 0.05, "Sinkhorn's ε; the release's 0.03 for SSv2 with ViT-B"),
    "mask-ratio": (positive, 0.9, 0.75, "share of tubes hidden"),
    "frames": (count, 16, 8, "in a clip"),
    "stride": (whole, 4, 2, "frames from one to the next; 0: spread over all. SSv2: 2, fine-tuned 0"),
    "image-size": (count, 224, 48, "pixels a side"),
    "repeats": (count, 1, "crops from one decoding"),
    "epochs": (count, 800, 25, "length of the schedule"),
    "warmup-epochs": (not_negative, 40, 3, "of rising learning rate; else an eighth at most"),
    "steps": (count, "optimiser steps, then stop; of --bench: 5"),
    "batch-size": (count, 32, "clips a step, per process"),
    "accumulate": (count, 1, "micro-batches a step; Sinkhorn balances each by itself"),
    "lr": (positive, 1.5e-4, 4e-3, "peak learning rate, per 256 clips"),
    "min-lr": (not_negative, 1e-5, 4e-4, "where the cosine ends, per 256 clips"),
    "eval-every": (whole, 50, 5, "epochs between k-NN (with --val) and pictures; 0: first, last"),
    "precision": (["auto", "bf16", "fp16", "fp32"], "auto", "auto: bf16 or fp16 on GPUs, else fp32"),
    "compile": (switch, False, "torch.compile blocks and loss"),
    "recompute": (switch, False, "activation checkpointing: less memory, more time"),
    "workers": (whole, "decoding processes a rank; else cores / ranks up to 16, on a CPU 1"),
    "seed": (whole, 0, "of all that is drawn"),
    "save-minutes": (positive, 10, "checkpoint at least this often"),
    "keep-every": (count, 100, "epochs between checkpoints that stay")}


def parse_args(argv=None):
    """Flags, and what follows from mode, demo and checkpoint. Raises Stop."""
    def refuse(message):
        raise Stop(message)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="[default], or [default, the demo's].")
    parser.error = refuse  # one line, without the usage
    modes, one_of = ("probe", "finetune", "segment", "bench"), parser.add_mutually_exclusive_group()
    for name, (kind, *both, text) in FLAGS.items():
        key = "choices" if isinstance(kind, list) else "action" if kind == switch else "type"
        bare = {"nargs": "?", "const": "demo"} if name == "data" else {}
        text += f" [{', '.join(map(str, both))}]" if both else ""
        (one_of if name in modes else parser).add_argument(f"--{name}", help=text, **{key: kind}, **bare)
    args = parser.parse_args(argv)  # None: not said
    args.mode = next((mode for mode in modes if getattr(args, mode) not in (None, False)), "pretrain")
    args.demo = args.data in (None, "demo") and not args.bench

    # ---- what was not said: by the data set, over it the checkpoint, over it the mode ----
    defaults = {name.replace("-", "_"): both[-1 if args.demo else 0] if both else None
                for name, (_, *both, _) in FLAGS.items()}
    args.checkpoint = None if args.bench or args.finetune == "none" else getattr(args, args.mode, None)
    args.weights, args.step = None, 0  # of the checkpoint
    if args.checkpoint is not None:
        with agreed():
            args.weights, model, clip = read_weights(args.checkpoint)
        if args.size not in (None, model["size"]):
            refuse(f"{args.checkpoint} is of --size {model['size']}")
        vars(args).update(model)  # whatever the flags say
        if args.mode != "probe":
            clip["stride"] = 1 if args.segment else defaults["stride"]
        defaults.update(clip)
    if args.mode == "finetune":  # for Kinetics; Something-Something is sampled with --stride 0
        defaults.update(epochs=15 if args.demo else 40 if args.stride == 0 else 100, warmup_epochs=5,
                        batch_size=16, lr=1e-2 if args.demo else 1e-3, min_lr=1e-6, eval_every=0)
    defaults["warmup_epochs"] = min(defaults["warmup_epochs"], (args.epochs or defaults["epochs"]) / 8)
    defaults["loss"] = "l2" if args.target == "pixel" else "sigma"
    name = Path(os.path.abspath(args.data or "demo")).stem  # also of --data .
    defaults["out"] = f"runs/{name}-{args.mode}".removesuffix("-pretrain")
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})
    args.out = Path(args.out)

    if args.bench and args.accumulate > 1:
        refuse("--bench times micro-batches: leave --accumulate out")
    if args.batch_size % args.repeats:
        refuse("--repeats must divide --batch-size")
    return args


def main(argv=None):
    try:
        for number in (signal.SIGTERM, signal.SIGINT):  # in training a flag, to end the step first
            signal.signal(number, lambda signum, frame: sys.exit(128 + signum))
        args = parse_args(argv)
        start_processes(args)
        if not args.bench:
            take_folder(args)
        globals()[args.mode](args)  # pretrain, probe, finetune, segment or bench
        over_ranks(0.0)  # none leaves while another still receives
    except Stop as stop:
        leave(stop.message, stop.code)
    except (data.VideoError, data.WorkerError) as error:
        if args.stop:  # the signal ends workers, too
            raise SystemExit(128 + args.stop) from None
        leave(str(error), 1)
    except torch.OutOfMemoryError as error:
        leave(f"too little GPU memory: lower --batch-size or --recompute ({error!r:.150})", 1)


def leave(message, code):
    """Ends this process with one line. torchrun ends all at the first exit:
    what goes wrong in all of them is said by the first alone,
    what goes wrong in one before the others leave."""
    time.sleep(0 if message and rank() == 0 else 3 if message else 6)
    if message:
        line = f"train.py: error{f' of rank {rank()}' if rank() else ''}: {message}"
        print(line, file=sys.stderr, flush=True)
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun's own report ends with it
            told = {"message": line, "extraInfo": {"timestamp": time.time()}}
            Path(report).write_text(json.dumps({"message": told}))
    raise SystemExit(code)


if __name__ == "__main__":
    # Lines appear at once, file names though no terminal may show them.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if world() == 1:
        sys.exit(main())
    # Several leave without Python's teardown:
    # a gloo thread that frees a tensor then aborts its process.
    # To end the group before can wait forever (torch 2.6).
    code = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    except Exception:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    os._exit(code or 0)
