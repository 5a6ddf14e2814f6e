"""Pretrain SIGMA, from a laptop to a cluster, and evaluate what it learned.

    torchrun train.py                                     the demo: synthetic videos, minutes on two CPU cores
    torchrun train.py --data kinetics/train --size base   one GPU (plain `python train.py` works too)
    torchrun --nproc_per_node 8 train.py --data train.csv --val val.csv --target dino --out runs/k400
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --data ...

    torchrun train.py --probe runs/demo/checkpoint.pt     k-NN and linear probe of frozen features
    torchrun train.py --finetune authors.pth --data train.csv --val val.csv
    torchrun train.py --segment runs/demo/checkpoint.pt   unsupervised video object segmentation
    torchrun train.py --bench --size base                 what a step costs on this machine, and its parts

Started again with the same --out a run resumes; its loss curve is the one it would have had uninterrupted.
How SIGMA is trained stands first: the loop, pretraining, book-keeping, files. Then processes, evaluation,
bench, and last the flags with their defaults.
"""
import argparse
import contextlib
import ctypes
import datetime
import functools
import itertools
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

# Before PyTorch starts its threads: on a CPU they share the cores with the loader's workers, and a thread
# that spins while it waits for another keeps that one from running.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import sigma
from sigma import SIGMA, SIZES, TEACHERS, TUBELET, Encoder, load_checkpoint, patchify

try:
    import fcntl
    import resource
except ImportError:                              # Windows: two runs in one folder go unnoticed
    fcntl = resource = None


# ============ the training loop, of pretraining and of fine-tuning ============

def fit(env, args, model, groups, betas, train_set, objective, evaluate):
    """Trains until --epochs or --steps are done, resuming what lies in --out.

    groups: AdamW's, with `lr_scale` where the learning rate differs by layer. objective(model, batch, step)
    -> loss, dict of statistics. evaluate(log, step): at the start, every --eval-every epochs, at the end.
    """
    # ---- the schedule: a linear warm-up from 0, then half a cosine; learning rates are per 256 clips ----
    sampler = data.EpochSampler(len(train_set), args.batch_size, env.rank, env.world, args.seed, args.repeats,
                                args.accumulate)
    per_epoch = sampler.steps_per_epoch // args.accumulate
    total, warmup = args.epochs * per_epoch, args.warmup_epochs * per_epoch
    last = min(total, args.steps or total)
    peak, floor = args.lr * args.clips_a_step / 256, args.min_lr / args.lr

    def share_of_peak(step):
        # AdamW divides by the gradients' size, of which it knows little at first.
        if step < warmup:
            return step / warmup
        done = min(1, (step - warmup) / max(1, total - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    def evaluation_due(step):
        return step in (0, last) or args.eval_every > 0 and step % (args.eval_every * per_epoch) == 0

    # ---- the optimizer, and what an earlier start of this run left in --out ----
    for group in groups:
        group["initial_lr"] = peak * group.pop("lr_scale", 1.0)
    # Fused, AdamW leaves a step out, and does not count it, where the scaler finds gradients not finite;
    # nobody waits for the GPU to know. Hence a scaler for bf16 and fp32 too, where its scale is 1.
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas, fused=True)
    scaler = torch.amp.GradScaler(env.device.type, init_scale=env.scale)
    run = Run(env, args, {"model": model, "optimizer": optimizer, "scaler": scaler}, per_epoch, last)
    step, trained = run.step, wrapped(env, args, model)

    # Every batch can be computed from its number: a resumed run goes on with the very next one.
    sampler.start, sampler.stop = step * args.accumulate, last * args.accumulate
    stream = on_device(data.load(train_set, sampler, env.workers, env.cuda), env)
    model.train()
    while True:
        # ---- once in a while: what was learned so far. A kill here loses nothing: all is saved ----
        if evaluation_due(step) and step != run.evaluated:
            env.in_loop = False
            if env.stop:                         # a signal that came during the step: all is saved
                raise SystemExit(128 + env.stop)
            evaluate(run.log, step)
            run.draw_curve()
        if step >= last:
            break
        env.in_loop = True                       # from here on a signal waits until the step is done

        # ---- data, or a reason to stop, which all hear before one of them waits for another's gradients ----
        micro_batches, trouble = run.fetch(stream)
        reason = over_ranks(env.stop or (TROUBLE if trouble else 0))
        if reason:
            run.stop(reason, trouble, step)

        # ---- forward and backward: nothing waits for the GPU; gradients go over ranks once a step ----
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share_of_peak(step)
        rows = []
        for micro, batch in enumerate(micro_batches, 1):
            together = env.world == 1 or micro == args.accumulate
            with contextlib.nullcontext() if together else trained.no_sync():
                with env.autocast():
                    loss, stats = objective(trained, batch, step)
                scaler.scale(loss / args.accumulate).backward()
            rows.append(torch.stack([loss.detach().float(), *(value.float() for value in stats.values())]))

        # ---- the step itself: fp16 adapts its scale, the others keep 1 ----
        scaler.step(optimizer)
        scaler.update(None if env.precision == "fp16" else 1.0)
        optimizer.zero_grad(set_to_none=True)
        step += 1

        # ---- what is due after it: a line (for which the GPU is waited for), a checkpoint ----
        if step % run.log_every == 0 or step % per_epoch == 0 or step == last:
            run.write(step, group["lr"], ["loss", *stats], torch.stack(rows).mean(dim=0))
        run.save_where_due(step, evaluation_due(step))
    env.in_loop = False
    run.bar.close()


def parameter_groups(model):
    """AdamW's groups as the release: no weight decay on biases, norms and the mask token."""
    groups = {0.05: [], 0.0: []}                 # by weight decay
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[0.05 if parameter.ndim > 1 and not name.endswith("mask_token") else 0.0].append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def wrapped(env, args, model):
    """The model as it is called in training: compiled and over all ranks, where asked."""
    if args.compile:
        # Block by block: short to compile, and DDP's overlap stays.
        for block in model.modules():
            if isinstance(block, sigma.Block):
                block.compile()
        sigma.sigma_loss = torch.compile(sigma.sigma_loss)
    if env.world == 1:
        return model
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")   # the only name before torch 2.15
    # No device_ids: DDP would move the mask to the GPU, and to count it there is to wait.
    return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)


# ============ pretraining ============

def pretrain(env, args):
    """The paper's training: tubes hidden by mask, their features predicted from what is seen."""
    train_videos, val_videos = open_data(env, args)
    torch.manual_seed(args.seed)
    with agreed():
        model = make_model(args)
    load_teacher(env, args, model)
    model.to(env.device)

    # A mask per clip, drawn with it in the loader: the same tubes are hidden in a resumed run.
    patches = model.grid[1] * model.grid[2]
    hide = functools.partial(sigma.tube_mask, frames=model.grid[0], patches=patches, ratio=args.mask_ratio)
    train_set = open_clips(args, train_videos, True, args.repeats, mask=functools.partial(hide, args.repeats))
    shown_set = open_clips(args, val_videos or train_videos, mask=functools.partial(hide, 1))
    say(env, f"SIGMA {args.size}, target {args.target}, loss {args.loss}: {args.videos} videos, "
        f"{args.clip_flops / 1e9:.1f} GFLOP a clip; {env.about}")
    hidden = int(args.mask_ratio * patches) * model.grid[0] * args.global_batch
    if args.loss == "sigma" and args.prototypes > hidden:
        say(env, f"warning: {args.prototypes} prototypes but only {hidden} masked tubes in a batch: some "
            "stay unused; lower --prototypes or raise --batch-size")

    def objective(model, batch, step):
        video = data.normalize(batch["video"].to(env.device, non_blocking=True))
        # The mask stays on the CPU, where its count is needed.
        return model(video, batch["mask"])

    def evaluate(log, step):
        # Pictures first: the line of k-NN says that this evaluation is done and not made again.
        for draw in (preview, prototype_sheet) if step else ():
            try:
                draw(env, args, model, shown_set)
            except Stop as reason:               # none of the few videos can be read: worth no stop
                say(env, f"warning: {reason.message}")
        if val_videos is not None:
            # It needs no training, and so can be watched while a run goes.
            queries = bank = features(env, args, model, val_videos)
            # Without labels in --data, each video of --val is judged by the others.
            if train_videos.labels.min() >= 0:
                bank = features(env, args, model, train_videos, limit=20_000)
            top1 = knn(*bank, *queries, env=env)
            log.write(eval="knn", step=step, top1=round(top1, 2))
            say(env, f"k-NN top-1 at step {step}: {top1:.1f}%")

    # β₂ is 0.95, as MAE's and VideoMAE's.
    fit(env, args, model, parameter_groups(model), (0.9, 0.95), train_set, objective, evaluate)


def make_model(args, **changed):
    """SIGMA as the flags say, but for what is `changed`."""
    names = "assignment", "teacher", "frames", "image_size", "recompute"
    named = {name: getattr(args, name) for name in names}
    return SIGMA(args.size, args.target, args.loss, args.prototypes, args.eps, **{**named, **changed})


def open_clips(args, videos, train=False, *more, **named):
    """Clips as the flags say: drawn anew each epoch for training, else the middle ones."""
    return data.Clips(videos, args.frames, args.stride, args.image_size, args.seed, train, *more, **named)


# ============ a run's book-keeping: what the loop can be understood without ============

TROUBLE = 0.5    # a reason to stop, beside the numbers of signals, which outrank it
GIVE_UP = 5      # so many steps in a row not finite end a run; in fp16, which first halves its scale, 50

# What an epoch's line tells, beside speed: means over the epoch, with so many digits.
NEWS = {"loss": ".3f", "agreement": ".2f", "perplexity": ".1f", "spread": ".2f"}


class Run:
    """Where a run has come to (`step`, `evaluated`: that of the last evaluation), its log and checkpoints."""
    def __init__(self, env, args, parts, per_epoch, last):
        self.env, self.args, self.parts, self.per_epoch, self.last = env, args, parts, per_epoch, last
        self.step, self.log = resume(env, args, parts)
        if self.step:
            say(env, f"resuming {args.out} at step {self.step} of {last}")
        evaluated = [record["step"] for record in self.log.records if "eval" in record]
        self.evaluated = over_ranks(max(evaluated, default=-1))             # rank 0 alone has the log
        self.log_every = max(1, min(50, last // 500))
        self.bar = tqdm(total=last, initial=self.step, desc="train", unit="step", disable=env.silent)
        # Of this start: videos read, reads that failed, path -> reason; the last step that was not left out.
        self.read, self.failed, self.bad, self.warned = 0, 0, {}, False
        self.moved, self.taken = self.step, self.steps_taken()
        self.saved, self.told = -math.inf, time.monotonic()
        self.restart_clock(self.step)

    def restart_clock(self, step):
        """Speed and waiting are of the time since the last line, without evaluations and pictures."""
        self.logged, self.began, self.waited = step, time.monotonic(), 0.0

    def draw_curve(self):
        plot(self.log.records, self.args.out / "curve.png")
        self.restart_clock(self.logged)

    def steps_taken(self):
        """AdamW counts the steps that were not left out, for its first parameter as for all."""
        states = self.parts["optimizer"].state.values()
        return int(next(iter(states))["step"]) if states else 0

    def fetch(self, stream):
        """A step's micro-batches and None, or a reason to stop; counts waiting, and unreadable files."""
        asked = time.monotonic()
        try:
            micro_batches = [next(stream) for _ in range(self.args.accumulate)]
        except (data.VideoError, data.WorkerError) as error:
            return [], str(error)
        self.waited += time.monotonic() - asked
        for batch in micro_batches:
            # A draw that fails is followed by another, so a batch is always full.
            self.read += len(batch["index"]) // self.args.repeats
            self.failed += len(batch["bad"])
            self.bad.update(batch["bad"])
        if self.failed <= max(100, self.read):
            return micro_batches, None
        path, reason = self.bad.popitem()
        return [], f"over half of the videos are unreadable, for example {path}: {reason}"

    def stop(self, reason, trouble, step):
        """Ends the run at a signal or at trouble, after a checkpoint."""
        written = self.env.rank == 0 and self.save(step)
        over_ranks(0)                            # torchrun kills all at the first exit
        say(self.env, f"stopped after step {step}{f' by signal {int(reason)}' if reason > TROUBLE else ''}; "
            f"{'the same command resumes there' if written else 'NOT saved'}")
        raise SystemExit(128 + int(reason)) if reason > TROUBLE else Stop(trouble, code=1)

    def write(self, step, lr, names, row):
        """A line of log.jsonl: this step's statistics over all ranks. Raises Stop where nothing is finite."""
        # One wait for the GPU, and one sum over ranks, for all of them.
        stats = dict(zip(names, (sigma.all_reduce(row) / self.env.world).tolist()))
        before, self.taken = self.taken, self.steps_taken()
        self.moved = step if self.taken > before else self.moved
        unreadable, seconds = self.name_unreadable(step), time.monotonic() - self.began
        speed = (step - self.logged) * self.args.clips_a_step / seconds
        if self.env.precision == "fp16":
            stats["loss_scale"] = self.parts["scaler"].get_scale()
        self.log.write(step=step, epoch=(step - 1) // self.per_epoch, loss=stats.pop("loss"), lr=lr,
                       clips_per_second=round(speed, 2), data_wait=round(self.waited / seconds, 4), **stats,
                       skipped=step - self.taken, unreadable_videos=unreadable)
        if step - self.moved >= GIVE_UP * (10 if self.env.precision == "fp16" else 1):
            raise Stop(f"loss or gradients of the last {step - self.moved} steps are not finite; the last "
                       f"good checkpoint is {self.args.out}/checkpoint.pt: try a lower --lr, or bf16", code=1)
        self.bar.update(step - self.logged)
        self.tell(step, unreadable)
        self.restart_clock(step)

    def name_unreadable(self, step):
        """Logs the files that no rank could read and that are not in the log; returns how many there are."""
        # Each rank reads its own part of the videos, and only rank 0 has a log.
        everyone = [self.bad] * self.env.world
        if self.env.world > 1:
            dist.all_gather_object(everyone, self.bad)
        known = {record["unreadable"] for record in self.log.records if "unreadable" in record}
        for path, reason in itertools.chain(*(bad.items() for bad in everyone)):
            if path not in known:
                known.add(path)
                say(self.env, f"unreadable, another draw takes its place: {path}: {reason}")
                self.log.write(at_step=step, unreadable=path, reason=reason)
        return len(known)

    def tell(self, step, unreadable):
        """An epoch's news in one line; of one that takes long also in between, where no bar is seen."""
        ends = step % self.per_epoch == 0 or step == self.last
        if self.env.rank or not (ends or self.bar.disable and time.monotonic() > self.told + 60):
            return
        records = [r for r in self.log.records if r.get("epoch") == (step - 1) // self.per_epoch]

        def mean(name):
            values = [record[name] for record in records if record.get(name) is not None]
            return sum(values) / len(values) if values else math.nan

        news = [f"{name} {mean(name):{digits}}" for name, digits in NEWS.items() if name in records[-1]]
        left = (self.last - step) * self.args.clips_a_step / max(0.01, mean("clips_per_second"))
        news += [f"{mean('clips_per_second'):.1f} clips/s", f"waiting for data {mean('data_wait'):.0%}",
                 f"ETA {datetime.timedelta(seconds=int(left))}"]
        if unreadable:
            news.append(f"{unreadable} of {self.args.videos} videos unreadable")
        say(self.env, f"epoch {step / self.per_epoch:.4g}/{self.args.epochs}  {'  '.join(news)}")
        # While the learning rate still rises, features may well be alike.
        warm = step > self.args.warmup_epochs * self.per_epoch
        if warm and mean("spread") < 0.05 and not self.warned:
            self.warned = True
            say(self.env, "warning: the spread is under 0.05: φ's features are nearly alike. If it stays so, "
                "the run has collapsed, whatever its loss (as --target mlp --loss l2 always does): try a "
                "lower --lr, a larger --batch-size or fewer --prototypes")
        self.told = time.monotonic()
        self.draw_curve()

    def save_where_due(self, step, evaluation_next):
        """Not after every epoch, however short: a checkpoint is thrice the model and waits for the disk."""
        epoch, past = divmod(step, self.per_epoch)               # past: steps into the next epoch
        keep = past == 0 and epoch % self.args.keep_every == 0
        overdue = time.monotonic() - self.saved > 60 * self.args.save_minutes
        if self.env.rank or not (overdue or keep or evaluation_next):
            return
        if not self.save(step) and step == self.last:
            raise Stop("training is done, but its checkpoint could not be written: make room and run the "
                       "same command again", code=1)
        if keep:
            self.save(step, f"checkpoint-{epoch:04d}.pt")

    def save(self, step, name="checkpoint.pt"):
        """True when written. On failure the old file stays, the run goes on and tries again later."""
        self.saved = time.monotonic()            # also on failure: a full disk is not tried at every step
        content = {"step": step, "epoch": step // self.per_epoch, "args": self.args.curve,
                   **{name: part.state_dict() for name, part in self.parts.items()}}
        try:
            replace_file(self.args.out / name, functools.partial(torch.save, content))
        except OSError as error:
            tqdm.write(f"warning: {error}; the last good checkpoint stays")
            return False
        return True


# ============ a run's files, which survive ============

# What decides the loss curve: a run resumes only where these are as they were.
CURVE = ("size", "target", "teacher", "loss", "assignment", "prototypes", "eps", "epochs", "warmup_epochs",
         "global_batch", "accumulate", "repeats", "lr", "min_lr", "frames", "stride", "image_size",
         "mask_ratio", "seed", "videos", "finetune", "flip")


def take_folder(env, args):
    """Makes --out and locks it against a second run: the kernel's lock, which ends with this process."""
    with agreed():
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            env.lock = open(args.out / ".lock", "a")
            if fcntl and env.rank == 0:
                fcntl.lockf(env.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing to --out {args.out}: name another folder") from None
        except OSError as error:
            # With it: a network's file system that has no locks.
            if not hasattr(env, "lock"):
                raise OSError(f"--out {args.out} cannot be used ({error.strerror}): name another") from None


def resume(env, args, parts):
    """Takes --out, loads what lies in it into `parts` (name -> model, optimizer, …). Returns step and log."""
    take_folder(env, args)
    path, step, args.curve = args.out / "checkpoint.pt", 0, {name: getattr(args, name) for name in CURVE}
    with agreed():
        try:
            if path.exists():
                checkpoint = load_checkpoint(path)
                theirs, step = checkpoint["args"], checkpoint["step"]
                changed = [f"{name} was {theirs.get(name)}, is {value}" for name, value in args.curve.items()
                           if theirs.get(name) != value]
                if changed:
                    raise ValueError(f"{path} belongs to another run ({'; '.join(changed)}): use another "
                                     "--out, or the flags of then")
                for name, part in parts.items():
                    # A scale of 1 comes from another precision: in fp16 it would make small gradients 0.
                    if name != "scaler" or env.precision == "fp16" and checkpoint[name].get("scale", 1) > 1:
                        part.load_state_dict(checkpoint[name])
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            raise ValueError(f"{path} does not fit this run ({reason}): use another --out") from None
        log = Log(env, args.out / "log.jsonl", step)
    # Ranks that resume at different steps would wait for each other for ever.
    if over_ranks(step) != -over_ranks(-step):
        raise Stop(f"different checkpoints in {args.out}: the machines must all see one folder")
    return step, log


def replace_file(path, write):
    """Atomic: whoever reads `path`, also after a kill or on a full disk, finds old or new content, whole."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            write(file)
            # On the disk before the name is: else a power cut could leave the name with nothing behind it.
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:     # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]})") from None


# ============ processes and devices ============

class Stop(Exception):
    """Ends the program in one line: a user's mistake (code 2), or a run that cannot go on (1). Without a
    message it ends silently, for another process says why."""
    def __init__(self, message, code=2):
        super().__init__(message)
        self.message, self.code = message, code


ALONE = SimpleNamespace(rank=0, world=1)         # as long as there are no processes

def start_processes(args):
    """Joins the process group torchrun describes (NCCL on GPUs, gloo on CPUs), picks device and precision."""
    rank, world, local, here = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if here > torch.cuda.device_count():
            raise Stop(f"{here} processes but {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")               # TF32, where precision is fp32
        bf16 = torch.cuda.get_device_capability()[0] >= 8        # Ampere
    else:
        keep_memory()
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        bf16 = re.search("amx_bf16|avx512_bf16", flags)
    precision = args.precision
    if precision == "auto":
        precision = "bf16" if bf16 else "fp16" if cuda else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    if world > 1:
        # Gloo for flags and names, which stay on the hosts: nobody waits for a GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    workers = args.workers if args.workers is not None else min(16, max(1, data.CORES // here)) if cuda else 1
    env = SimpleNamespace(
        rank=rank, world=world, local=local, device=device, cuda=cuda, workers=workers,
        precision=precision, scale=2.0 ** 16 if precision == "fp16" else 1.0, stop=0, in_loop=False,
        silent=rank > 0 or None,                 # None: where there is no terminal
        autocast=functools.partial(torch.autocast, device.type, dtype, enabled=precision != "fp32"),
        about=f"{world} x {args.batch_size} clips a step, {precision} on {device.type}, {workers} workers, "
              f"results in {args.out}")

    def ask_to_stop(signum, frame):
        env.stop = signum                        # torchrun repeats a signal, so repeating must be harmless
        if not env.in_loop:                      # the loop finishes its step and saves; else nothing is lost
            raise SystemExit(128 + signum)
    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    return env


def keep_memory():
    """glibc gives every large tensor fresh pages, which the kernel has to fill with zeros, each step anew. To
    keep them is 1.2 (ViT-S) to 4 times (tiny) as fast: M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError, TypeError):    # where there is no such library
            for option, value in ((-4, 0), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):
                ctypes.CDLL(None).mallopt(option, value)


def over_ranks(value, op="MAX"):
    """A number of every rank's own -> one for all; on the hosts: no GPU is waited for. Also a barrier."""
    return sigma.all_reduce(torch.tensor(value, dtype=torch.float64), op).item()


@contextlib.contextmanager
def agreed():
    """Around what reads a user's words and files: trouble in one process ends all, and none waits for it."""
    trouble = None
    try:
        yield
    except (ValueError, OSError) as error:
        trouble = Stop(str(error))
    # Whoever had none leaves too, in silence.
    if over_ranks(float(trouble is not None)):
        raise trouble or Stop(None)


def say(env, message):
    """Prints above the bar, once for all ranks, and at once where the output is a file."""
    if env.rank == 0:
        tqdm.write(message)
        sys.stdout.flush()


def on_device(loader, env):
    """Batches with their videos on the device; a GPU copies the next on a stream of its own meanwhile."""
    if not env.cuda:
        yield from loader
        return
    side, ahead = torch.cuda.Stream(env.device), None
    for batch in loader:
        with torch.cuda.stream(side):
            batch["video"] = batch["video"].to(env.device, non_blocking=True)
        # The step on the last batch is under way while this one is copied.
        if ahead is not None:
            yield ahead
        torch.cuda.current_stream().wait_stream(side)
        batch["video"].record_stream(torch.cuda.current_stream())  # not to be reused before it was read
        ahead = batch
    if ahead is not None:
        yield ahead


# ============ the log ============

class Log:
    """log.jsonl on rank 0: whole lines, none twice. A full disk delays lines; it loses and tears none."""
    def __init__(self, env, path, step):
        """Keeps the lines up to `step`, where the run resumes: later ones are about to be written again."""
        self.path, self.waiting, self.rank, self.records = path, b"", env.rank, []
        if env.rank or not path.exists():
            return
        # A log without its checkpoint is kept, under another name.
        if not step and path.stat().st_size:
            return os.replace(path, path.with_name(f"log-{int(time.time())}.jsonl"))
        # What follows the last line end is torn.
        records = map(json.loads, path.read_bytes().split(b"\n")[:-1])
        self.records = [r for r in records if r.get("step", r.get("at_step")) <= step]
        lines = b"".join(json.dumps(record).encode() + b"\n" for record in self.records)
        replace_file(path, lambda file: file.write(lines))

    def write(self, **record):
        if self.rank:
            return
        # NaN is not JSON.
        record = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                  for name, value in record.items()}
        self.records.append(record)
        self.waiting += json.dumps(record).encode() + b"\n"
        # One write for a line, and what a full disk leaves of it is cut off again.
        try:
            with open(self.path, "ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                if file.write(self.waiting) < len(self.waiting):
                    file.truncate(end)
                else:
                    self.waiting = b""
        except OSError as error:
            tqdm.write(f"warning: {self.path} could not be written ({error.strerror}); its lines wait")


# ============ data, and each video once over all ranks ============

def open_data(env, args, labels=False):
    """--data and --val -> the videos of both; None for a missing --val, unless both are to have labels."""
    demo = demo_folder(env, args) if args.demo else None
    with agreed():
        train = data.find_videos(demo / "train" if demo else args.data)
        source = args.val or demo and demo / "val"
        # A class has one number in both.
        val = data.find_videos(source, train.classes) if source else None
        if labels and val is None:
            raise ValueError("--val is missing: the labelled videos to test on")
        for flag, videos in (("--data", train if labels else None), ("--val", val)):
            if videos is not None and videos.labels.min() < 0:
                raise ValueError(f"{flag} has no labels: it needs class folders, or a list with labels")
    args.videos = len(train)
    return train, val


def demo_folder(env, args):
    """The demo's videos: those beside the checkpoint, or the same written anew in --out."""
    beside = Path(args.checkpoint or "").parent / "videos"
    root = beside if args.checkpoint and beside.is_dir() else args.out / "videos"
    with agreed():
        if env.rank == 0:
            data.write_demo(root)
    return root


DINO_URL = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
DINO_FILE = {"vits16": "dino_deitsmall16_pretrain", "vitb16": "dino_vitbase16_pretrain"}


def load_teacher(env, args, model):
    """DINO's weights: the first process of a machine downloads them, the others find them in the cache."""
    if args.target != "dino":
        return
    url, path = DINO_URL.format(DINO_FILE[args.teacher]), args.dino_weights
    for later in (False, True):
        with agreed():
            if (env.local > 0) == later:
                try:
                    model.teacher.load_state_dict(
                        load_checkpoint(path) if path else torch.hub.load_state_dict_from_url(
                            url, map_location="cpu", weights_only=True))
                except (OSError, RuntimeError) as error:
                    reason = str(error).splitlines()[0]
                    raise ValueError(f"{path or url}: no weights of DINO's {args.teacher} ({reason}); fetch "
                                     f"{url} and name it with --dino-weights") from None


@torch.no_grad()
def each_once(env, model, dataset, compute, batch_size, chosen=None, quiet=False):
    """Runs compute(normalised video [B, …], batch) -> tensors [videos, …] over a data set, over all ranks.

    Returns these tensors for all videos that can be read, in their order whatever the number of processes,
    and last their numbers. chosen: the numbers wanted, if not all. Raises Stop where none can be read.
    """
    chosen = list(range(len(dataset))) if chosen is None else chosen
    # Rank r reads the videos r, r + world, …: equally many each, so some are read twice at the end.
    rounds = len(chosen) + -len(chosen) % env.world
    mine = [chosen[i % len(chosen)] for i in range(env.rank, rounds, env.world)]
    # Training, which this interrupts, goes on as it was: a classifier has drop path there.
    sampler, parts, was_training = data.OnceSampler(mine, batch_size), [], model.training
    loader = data.load(dataset, sampler, min(env.workers, len(sampler)), env.cuda, with_truth)
    model.eval()
    for batch in tqdm(on_device(loader, env), "evaluating", len(sampler), leave=False, disable=env.silent):
        with env.autocast():
            found = compute(data.normalize(batch["video"].to(env.device)), batch)
        # A video has one number for all its views.
        index = batch["index"][::len(batch["index"]) // len(found[0])]
        parts.append([part.to(env.device) for part in (*found, index)])
        for path, reason in () if quiet else batch["bad"]:
            tqdm.write(f"unreadable, left out: {path}: {reason}")
    model.train(was_training)

    gathered = []
    for own in map(torch.cat, zip(*parts)):
        everyone = [own]
        if env.world > 1:
            everyone = [torch.empty_like(own) for _ in range(env.world)]
            dist.all_gather(everyone, own)
        # Side by side the ranks' videos are in order.
        gathered.append(torch.stack(everyone, dim=1).flatten(0, 1)[:len(chosen)])
    read = gathered[-1] >= 0
    if not read.any():
        raise Stop(f"none of the {len(read)} videos to evaluate can be read", code=1)
    if not read.all() and not quiet:
        say(env, f"warning: {int((~read).sum())} of {len(read)} videos are unreadable and left out")
    return [part[read] for part in gathered]


def with_truth(items):
    """data.collate's batch, and the masks of its first clip: of clips with masks it is the only one, for they
    differ in objects and in size."""
    return {**data.collate(items), "truth": items[0].get("truth", torch.zeros(0))}


def evenly(total, count):
    """At most `count` numbers below `total`, evenly spread."""
    return torch.linspace(0, total - 1, min(count, total)).long().unique().tolist()


def features(env, args, model, videos, limit=None):
    """Mean-pooled encoder tokens [n, D] and labels [n] of the centre clips of all videos that can be read."""
    def pool(video, batch):
        return (model.features(video).float().mean(dim=1),)
    chosen = evenly(len(videos), limit or len(videos))
    rows, index = each_once(env, model, open_clips(args, videos), pool, args.batch_size, chosen)
    return rows, videos.labels.to(index.device)[index]


def knn(bank, bank_labels, queries, labels, k=20, temperature=0.07, env=ALONE):
    """Top-1 in percent of DINO's k-nearest-neighbour vote: cosine similarity, weights exp(similarity / 0.07).

    If the queries are the bank itself, each is classified by the others. Every rank takes its share of them.
    """
    alone, right, classes = queries is bank, 0, int(max(bank_labels.max(), labels.max())) + 1
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    own = torch.arange(env.rank, len(queries), env.world, device=bank.device)
    # Half a gigabyte of similarities at a time.
    for rows in own.split(max(1, 2 ** 27 // len(bank))):
        similarity = queries[rows] @ bank.T      # [rows, n]
        if alone:
            similarity.scatter_(1, rows[:, None], -torch.inf)
        best, index = similarity.topk(min(k, len(bank) - alone), dim=1)
        votes = best.new_zeros(len(best), classes)               # [rows, classes]
        votes.scatter_add_(1, bank_labels[index], (best / temperature).exp())
        right += (votes.argmax(dim=1) == labels[rows]).sum().item()
    return 100 * over_ranks(right, "SUM") / len(queries)


# ============ pictures ============

def hues(number):
    """Numbers [...] -> colours [..., 3]: golden-ratio hues, so that neighbours in number differ in colour."""
    hue = (number * 0.6180339887) % 1            # of HSV, at full saturation and value
    return (hue[..., None] * 6 + hue.new_tensor([0.0, 4.0, 2.0])).fmod(6).sub(3).abs().sub(1).clamp(0, 1)


def tint(video, colours):
    """uint8 [3, T, S, S] in grey under the colours [t, h, w, 3] of its tubes or pixels -> [T, 3, S, S]."""
    colours = F.interpolate(colours.permute(3, 0, 1, 2)[None], size=video.shape[1:], mode="nearest-exact")[0]
    return (0.35 * video.float().mean(dim=0) + 0.65 * 255 * colours).byte().transpose(0, 1)


def page(rows, tile=96, margin=120):
    """Rows of a caption and as many uint8 pictures [n, 3, h, w] each -> one picture of all."""
    from torchvision.utils import make_grid  # here, for it takes a second
    rows = list(rows)
    # Nearest: a tube's edges stay sharp.
    tiles = [F.interpolate(pictures, (tile, tile), mode="nearest-exact") for _, pictures in rows]
    grid = make_grid(torch.cat(tiles), nrow=len(tiles[0]), padding=4, pad_value=255)
    sheet = Image.fromarray(F.pad(grid, (margin, 0, 0, 0), value=255).permute(1, 2, 0).numpy())
    for row, (caption, _) in enumerate(rows):
        top = row * (tile + 4) + tile // 2 - 12
        ImageDraw.Draw(sheet).text((8, top), caption, fill="black", font_size=15)
    return sheet


def save_picture(path, first, *more):
    """A PNG, or of several pictures a moving GIF. One that cannot be written is worth no stop."""
    try:
        options = {"save_all": True, "append_images": more, "duration": 160, "loop": 0} if more else {}
        replace_file(path, lambda file: first.save(file, path.suffix[1:], **options))
    except OSError as error:
        tqdm.write(f"warning: {error}")


def preview(env, args, model, clips):
    """preview.png and preview.gif: of three clips the frames, what the encoder sees, and where there are
    prototypes, every tube in the colour of its own."""
    def look(video, batch):
        tubes = batch["mask"].long() if args.loss == "l2" else model.assign(video)
        return batch["video"], batch["mask"], tubes
    found = each_once(env, model, clips, look, 1, evenly(len(clips), 3), quiet=True)
    if env.rank:
        return
    videos, masks, tubes, _ = (part.cpu() for part in found)
    # The commonest prototypes get the first hues.
    order = torch.bincount(tubes.flatten(), minlength=args.prototypes).argsort(descending=True).argsort()
    captions, sheets = ["video", "what the\nencoder sees", "cluster of\nevery tube"], []
    for video, mask, colours in zip(videos, masks, hues(order[tubes])):
        hidden = F.interpolate(mask.view(1, 1, *model.grid).float(), size=video.shape[1:])[0] > 0
        seen = video.masked_fill(hidden, 217).transpose(0, 1)    # hidden tubes are grey: [T, 3, S, S]
        rows = [video.transpose(0, 1), seen, tint(video, colours.view(*model.grid, 3))]
        sheets.append(list(zip(captions, rows))[:2 if args.loss == "l2" else 3])
    still = [(text, row[evenly(args.frames, 8)]) for text, row in itertools.chain(*sheets)]
    save_picture(args.out / "preview.png", page(still))
    # In the moving picture the clips stand side by side.
    moving = [(rows[0][0], torch.stack([row for _, row in rows], dim=1)) for rows in zip(*sheets)]
    pages = [page([(text, row[t]) for text, row in moving]) for t in range(args.frames)]
    save_picture(args.out / "preview.gif", *pages)


def prototype_sheet(env, args, model, clips, rows=8, columns=8, context=5):
    """prototypes.png: for the prototypes that win most tubes of up to 64 clips, the tubes of different clips
    that score highest, framed, with their surroundings: `context` patches a side."""
    if args.loss != "sigma":
        return
    from torchvision.utils import draw_bounding_boxes
    everything = torch.arange(model.num_tubes, device=env.device)[None]

    def score(video, batch):
        x_phi = model.forward_target(video, patchify(video, model.patch), everything).float()
        scores = F.normalize(x_phi, dim=-1) @ F.normalize(model.prototypes, dim=-1).T            # [1, N, K]
        used = torch.bincount(scores[0].argmax(dim=1), minlength=args.prototypes)[None]
        # Of each clip only its best tube for a prototype: else one still clip could fill a row.
        return batch["video"][:, :, ::TUBELET], *scores.max(dim=1), used
    found = each_once(env, model, clips, score, 1, evenly(len(clips), 64), quiet=True)
    if env.rank:
        return
    videos, best, tubes, used, _ = (part.cpu() for part in found)
    used, p, sheet, side = used.sum(dim=0), model.patch, [], min(context, model.grid[1]) * model.patch
    for k in used.argsort(descending=True)[:min(rows, int((used > 0).sum()))].tolist():
        pictures = []
        for n in best[:, k].argsort(descending=True)[:columns].tolist():
            t, y, x = (int(i) for i in torch.unravel_index(tubes[n, k], model.grid))
            box = torch.tensor([[x, y, x + 1, y + 1]]) * p - torch.tensor([0, 0, 1, 1])
            # The tube in a red frame, in the middle of the cut-out where the edge of the picture allows it.
            picture = draw_bounding_boxes(videos[n, :, t], box, colors="red")
            top, left = (min(max(i * p + p // 2 - side // 2, 0), args.image_size - side) for i in (y, x))
            pictures.append(picture[:, top:top + side, left:left + side])
        sheet.append((f"prototype {k}\n{100 * used[k] / used.sum():.2g}% of tubes", torch.stack(pictures)))
    save_picture(args.out / "prototypes.png", page(sheet))


def plot(records, path, width=250, height=150):
    """curve.png: a panel for each of these numbers of log.jsonl over the steps."""
    sheet = Image.new("RGB", (5 * (width + 20) + 10, height + 60), "white")
    draw, left = ImageDraw.Draw(sheet), 10
    for name in ("loss", "agreement", "perplexity", "spread", "top1"):
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        if len(points) < 2:
            continue
        steps, values = zip(*points)
        first, low, high = steps[0], min(values), max(values)
        line = [(left + (step - first) / (steps[-1] - first or 1) * width,
                 30 + height - (value - low) / (high - low or 1) * height) for step, value in points]
        draw.rectangle((left, 30, left + width, 30 + height), outline="#bbbbbb")
        draw.text((left, 8), f"{name}: {low:.3g} to {high:.3g}", fill="black", font_size=14)
        draw.text((left, 34 + height), f"step {first} to {steps[-1]}", fill="#666666", font_size=13)
        draw.line(line, fill="#1f5fa8", width=2)
        left += width + 20
    if left > 10:
        save_picture(path, sheet.crop((0, 0, left, sheet.height)))


# ============ weights: ours, the authors', VideoMAE's, and Hugging Face's VideoMAE ============

# Parts of Hugging Face's names -> ours, replaced in this order. There query, key and value are apart.
HUGGING_FACE = {
    "videomae.embeddings.patch_embeddings.projection.": "encoder.patch_embed.proj.", "classifier.": "head.",
    "videomae.encoder.layer.": "encoder.blocks.", "decoder.decoder_layers.": "decoder.blocks.",
    "videomae.layernorm.": "encoder.norm.", "layernorm_before.": "norm1.", "layernorm_after.": "norm2.",
    "attention.attention.query.": "attn.qkv.", "attention.attention.": "attn.",
    "attention.output.dense.": "attn.proj.", "intermediate.dense.": "mlp.fc1.", "output.dense.": "mlp.fc2."}


def read_weights(path):
    """A checkpoint -> its tensors under our names, and what they and its `args` say of the model.

    Read are this project's files, the authors', VideoMAE's from pretraining (the same names) and fine-tuning
    (no "encoder."), and Hugging Face's of either kind. Raises ValueError.
    """
    if os.path.isdir(path) or str(path).endswith(".safetensors"):
        raise ValueError(f"{path} is a folder or of safetensors: name a checkpoint.pt or pytorch_model.bin")
    content = load_checkpoint(path)

    # ---- the tensors, wherever they lie, under our names ----
    # Written under DDP, torch.compile or as part of a larger model, names have a prefix.
    inside = [content[key] for key in ("model", "module", "state_dict") if isinstance(content.get(key), dict)]
    state = {re.sub(r"^(module\.|_orig_mod\.|backbone\.)+", "", name): value
             for name, value in (*inside, content)[0].items() if isinstance(value, torch.Tensor)}
    for name in [name for name in state if "attention.attention.query" in name]:
        state[name] = torch.cat([state[name.replace("query", part)] for part in ("query", "key", "value")])
    # Hugging Face's, of either kind; then fine-tuned ones, whose encoder is the whole model.
    if any(name.startswith("videomae.") for name in state):
        for theirs, ours in HUGGING_FACE.items():
            state = {name.replace(theirs, ours): value for name, value in state.items()}
    if not any(name.startswith("encoder.") for name in state):
        state = {re.sub(r"^(?!head\.|fc_norm\.)", "encoder.", name): value for name, value in state.items()}

    # ---- what they are of: their shapes tell size and target, `args` the clips ----
    embedding = state.get("encoder.patch_embed.proj.weight", torch.zeros(0))     # [D, 3, 2, patch, patch]
    shape = embedding.shape[-1], embedding.shape[0]
    size = next((name for name, (patch, (width, *_), *_) in SIZES.items() if (patch, width) == shape), None)
    if size is None or embedding.ndim != 5:
        raise ValueError(f"{path} holds no video model of size {', '.join(SIZES)}")
    out, clustered = len(state.get("decoder.head.weight", ())), "prototypes" in state
    pixels = out in (0, TUBELET * shape[0] ** 2 * 3) and not clustered
    facts = {"size": size, "loss": "sigma" if clustered else "l2", "step": content.get("step", 0),
             "prototypes": len(state.get("prototypes", "1")), "teacher": "vits16" if out == 384 else "vitb16",
             "target": "mlp" if "head.2.weight" in state else "pixel" if pixels else "dino"}
    said = content.get("args") or {}
    said = getattr(said, "__dict__", said)       # the authors' is a Namespace
    for ours, theirs in (("frames", "num_frames"), ("stride", "sampling_rate"), ("image_size", "input_size")):
        if isinstance(value := said.get(ours, said.get(theirs)), int):
            facts[ours] = value
    return state, facts


def load_weights(module, state, path, free=()):
    """Loads what `module` has; returns the names left as they were, which all start with one of `free`.

    Raises ValueError, naming them, for tensors missing, of another shape, or of blocks the module lacks.
    """
    wanted, left, wrong = module.state_dict(), [], []
    for name, value in wanted.items():
        if name not in state or state[name].shape != value.shape:
            left.append(name)
            found = f"{tuple(state[name].shape)} instead of" if name in state else "missing:"
            wrong += [] if name.startswith(tuple(free)) else [f"{name} is {found} {tuple(value.shape)}"]
    wrong += [f"{name} is unknown" for name in state if "encoder.blocks." in name and ".norm" in name
              and name not in wanted]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{path} fits only in part: {'; '.join(wrong[:4])}{more}")
    fitting = {name: state[name] for name in wanted if name not in left}
    module.load_state_dict(fitting, strict=False)
    return left


def open_model(env, args):
    """The pretrained SIGMA of a checkpoint, on the device, to be used as it is, and the log."""
    take_folder(env, args)
    with agreed():
        model = make_model(args)
        # A fine-tuned VideoMAE has no decoder, and its norm comes after the mean: features need neither.
        tuned = "fc_norm.weight" in args.weights
        free = ("decoder.", "encoder_to_decoder.", "mask_token", "encoder.norm.") if tuned else ()
        load_weights(model, args.weights, args.checkpoint, free)
        log = Log(env, args.out / "log.jsonl", math.inf)         # a run's own lines stay
    args.weights = None
    say(env, f"{args.checkpoint}: SIGMA {args.size}, target {args.target}, step {args.step}; {args.frames} "
        f"frames of {args.image_size} pixels, stride {args.stride}; results in {args.out}")
    return model.to(env.device).requires_grad_(False), log


# ============ k-NN and linear probe of frozen features ============

def probe(env, args):
    """k-NN and a linear layer from the features of --data to those of --val: what is in them already."""
    train, val = open_data(env, args, labels=True)
    model, log = open_model(env, args)
    bank, queries = features(env, args, model, train), features(env, args, model, val)
    results = {"k-NN": knn(*bank, *queries, env=env), "linear": linear_probe(*bank, *queries, seed=args.seed)}
    for name, top1 in results.items():
        log.write(eval=name.lower().replace("-", ""), step=args.step, top1=round(top1, 2))
        say(env, f"{name} top-1: {top1:.2f}% of {len(queries[0])} videos")


def linear_probe(bank, bank_labels, queries, labels, seed=0, epochs=30, lr=1e-3):
    """Top-1 in percent of a linear layer trained on frozen features: AdamW, lr 1e-3, 30 epochs, as the paper.

    Where the paper is silent: each feature is standardised by its mean and deviation over the training set
    (MAE's probe has a BatchNorm without parameters there), or one lr would not suit every model's scale; the
    layer starts at zero, lr falls as a cosine, no weight decays; batches are of 64, and of up to 1024 where
    there are many videos, for a probe of Kinetics in minutes. All ranks do the same.
    """
    batch_size = min(max(64, len(bank) // 200), 1024)
    std, mean = torch.std_mean(bank, dim=0, correction=0)        # [D]
    x, classes = (bank - mean) / (std + 1e-6), int(max(bank_labels.max(), labels.max())) + 1
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    # Minibatches by seed and epoch, of features in the videos' order: the same for any number of processes.
    optimizer = torch.optim.AdamW(layer.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // batch_size))
    for epoch in range(epochs):
        for rows in torch.randperm(len(x), generator=data.seeded(seed, epoch)).to(x.device).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), bank_labels[rows]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        right = layer((queries - mean) / (std + 1e-6)).argmax(dim=1) == labels
    return 100 * right.float().mean().item()


# ============ fine-tuning ============

class Classifier(nn.Module):
    """VideoMAE's model for fine-tuning, and its names: the encoder without its final norm, the mean of all
    tokens, LayerNorm, a linear head that starts near zero. video [B, 3, T, H, W] -> logits [B, classes]."""
    def __init__(self, size, classes, frames, image_size, drop_path=0.1, recompute=False):
        super().__init__()
        self.patch, (width, depth, heads), *_ = SIZES[size]
        self.num_tubes = frames // TUBELET * (image_size // self.patch) ** 2
        self.encoder = Encoder(self.num_tubes, self.patch, width, depth, heads, drop_path, recompute)
        self.encoder.norm = nn.Identity()        # its place is taken by fc_norm, after the mean
        self.fc_norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * 0.001)
        nn.init.zeros_(self.head.bias)

    def forward(self, video):
        everything = torch.arange(self.num_tubes, device=video.device).expand(len(video), -1)
        tokens = self.encoder(patchify(video, self.patch), everything)           # [B, N, D]
        return self.head(self.fc_norm(tokens.mean(dim=1)))


def layer_groups(model, decay=0.75):
    """parameter_groups by layer: the head learns at the full rate, each layer at `decay` of the one above."""
    # What lies near the pixels is general already, and changes least.
    layers = [model.encoder.patch_embed, *model.encoder.blocks, nn.ModuleList([model.fc_norm, model.head])]
    return [{**group, "lr_scale": decay ** (len(layers) - i)} for i, layer in enumerate(layers, 1)
            for group in parameter_groups(layer)]


def augmentation(flip):
    """RandAugment m7-n4, flip, random erasing: one draw for all frames, uint8 [T, 3, H, W] -> the same.

    As timm's "rand-m7-n4": each of the four is applied half of the time, and magnitude 7 is of 10. Without
    its noise on the magnitude; erased is to ImageNet's mean, not to noise, as the clip is still uint8.
    """
    from torchvision.transforms import v2  # here, for it takes two seconds that only this needs
    mean = [round(255 * m) for m in data.IMAGENET_MEAN]
    one = v2.RandAugment(1, 7, num_magnitude_bins=11, interpolation=v2.InterpolationMode.BILINEAR, fill=mean)
    erase = v2.RandomErasing(0.25, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value=mean)
    mirror = v2.RandomHorizontalFlip(0.5 if flip else 0.0)
    return v2.Compose([v2.RandomApply([one], p=0.5)] * 4 + [mirror, erase])


def finetune(env, args):
    """Trains the encoder and a new head on labels: VideoMAE's recipe, as the paper's."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    train, val = open_data(env, args, labels=True)
    # Classes without a training video count too: --val may have them.
    classes, new = max(int(train.labels.max()) + 1, len(train.classes or ())), ["all"]
    with agreed():
        if val.labels.max() >= classes:
            raise ValueError(f"--val has label {int(val.labels.max())}, those of --data end at {classes - 1}")
        torch.manual_seed(args.seed)
        model = Classifier(args.size, classes, args.frames, args.image_size, recompute=args.recompute)
        if args.weights:
            new = load_weights(model, args.weights, args.checkpoint, free=("fc_norm.", "head."))
    args.weights = None                          # a second copy of the model in memory
    model.to(env.device)
    train_set = open_clips(args, train, True, args.repeats, draw_crop=data.draw_resized,
                           transform=augmentation(args.flip))
    # Three crops along the longer side see all of the picture, clips spread over the video all of its time.
    test_set = open_clips(args, val, views=(args.test_clips, 3))
    mixes = [v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)]
    mix = v2.RandomChoice(mixes)
    say(env, f"fine-tuning {args.size} from {args.finetune} (new: {', '.join(new) or 'nothing'}): {classes} "
        f"classes, {args.videos} videos, {'flipped' if args.flip else 'not flipped'}; {env.about}")

    def objective(model, batch, step):
        # Mixing and drop path draw the same in a resumed run.
        torch.manual_seed(data.seeded(args.seed, step, env.rank, int(batch["index"][0])).initial_seed())
        video = data.normalize(batch["video"].to(env.device, non_blocking=True))
        video, target = mix(tv_tensors.Video(video), batch["label"].to(env.device, non_blocking=True))
        logits = model(video.as_subclass(torch.Tensor)).float()
        return F.cross_entropy(logits, target, label_smoothing=0.1), {}

    def evaluate(log, step):
        if step:                                 # before the first it would be chance
            top1, top5, videos = multi_view(env, args, model, test_set)
            log.write(eval="finetune", step=step, top1=round(top1, 2), top5=round(top5, 2), videos=videos)
            say(env, f"fine-tuned top-1: {top1:.2f}%, top-5: {top5:.2f}% of {videos} videos, "
                f"{args.test_clips} clips x 3 crops each")

    fit(env, args, model, layer_groups(model), (0.9, 0.999), train_set, objective, evaluate)


def multi_view(env, args, model, clips):
    """Top-1 and top-5 in percent and the number of videos: each by the softmax averaged over its views."""
    views = clips.views[0] * clips.views[1]

    def best(video, batch):
        share = model(video).float().softmax(dim=1).unflatten(0, (-1, views)).mean(dim=1)      # [B, classes]
        return share.topk(min(5, share.shape[1])).indices, batch["label"][::views]
    top, label, _ = each_once(env, model, clips, best, max(1, args.batch_size // views))
    hits = (top == label[:, None]).float()       # [videos, 5]
    return 100 * hits[:, 0].mean().item(), 100 * hits.amax(dim=1).mean().item(), len(hits)


# ============ unsupervised video object segmentation ============

IGNORED = 255   # the mask value that counts for nothing, as DAVIS


def segment(env, args):
    """K-means of every clip's tube features; where there are masks, mIoU by the paper's two protocols.

    The paper leaves open what exactly is compared. Here a clip is the middle `frames` frames of a video, its
    whole picture squeezed to the model's square, so that no object is cut off; the background is one of the
    objects, in their number K as in the mean; mIoU is the mean over a clip's objects, then over clips.
    """
    source = demo_folder(env, args) / "davis" if args.demo else Path(args.data)
    with agreed():
        masked = (source / "JPEGImages").is_dir()
        clips = Scenes(source, args.frames, args.stride, args.image_size, args.seed) if masked else \
            open_clips(args, data.find_videos(source))
    model, log = open_model(env, args)
    torch.set_float32_matmul_precision("highest")                # K-means lives on small differences

    def cluster(video, batch):
        tokens, truth = model.features(video)[0].float(), batch["truth"]     # [N, D]
        objects = len(truth[truth != IGNORED].unique())
        # A background alone is no segmentation.
        k, scores = objects if objects > 1 else 4, [math.nan, math.nan]
        with torch.autocast(env.device.type, enabled=False):     # its small differences need float32
            few, many = (kmeans(tokens, n, args.seed).cpu().view(model.grid) for n in (k, 10))
        if objects > 1:
            matched, column = match_one_to_one(overlap(truth, few, k))
            few = torch.tensor(column).argsort()[few]            # a cluster gets its object's number
            scores = [100 * matched, 100 * match_many_to_one(overlap(truth, many, 10))]
        return torch.tensor([scores]), few[None], many[None]

    scores, few, many, index = (part.cpu() for part in each_once(env, model, clips, cluster, 1))
    if env.rank == 0:
        sheets = [segment_rows(clips[0, int(index[n])], scores[n], few[n], many[n])
                  for n in evenly(len(index), 3)]
        save_picture(args.out / "segments.png", page(itertools.chain(*sheets)))
    say(env, f"pictures in {args.out}/segments.png")
    scores = scores[scores.isfinite().all(dim=1)]
    if len(scores):
        few, many = (round(score, 2) for score in scores.mean(dim=0).tolist())
        log.write(eval="segment", step=args.step, miou=few, miou_overclustering=many, clips=len(scores))
        say(env, f"segmentation of {len(scores)} clips: mIoU {few:.2f}% by clustering, {many:.2f}% by "
            "over-clustering")
    else:
        say(env, f"{source} has no masks to compare with: only pictures")
    # Last, for it needs φ: where DINO cannot be had, all else is done.
    if args.loss == "sigma":
        load_teacher(env, args, model)
        prototype_sheet(env, args, model, clips)


def segment_rows(item, scores, few, many):
    """Rows of segments.png: eight frames of a clip, its masks if any, and the clusters of its tubes."""
    video, truth, colours = item["video"][0], item.get("truth"), hues(few)
    first, second = (f"clusters\nmIoU {score:.0f}%" if score.isfinite() else "clusters" for score in scores)
    rows = [("video", video.transpose(0, 1))]
    if truth is not None:
        # Every object in the hue of its cluster, the background in black.
        place = (truth[..., None] > truth[truth != IGNORED].unique()).sum(dim=-1)
        rows.append(("ground truth", tint(video, hues(place) * (place[..., None] > 0))))
        colours = colours * (few[..., None] > 0)
    rows += [(first, tint(video, colours)), (f"10 {second}", tint(video, hues(many)))]
    return [(caption, pictures[evenly(len(pictures), 8)]) for caption, pictures in rows]


class Scenes(torch.utils.data.Dataset):
    """The middle clips of DAVIS's folders, whole pictures squeezed to a square: items as those of Clips, one
    view each, and `truth`: the masks, int64 [T, H, W] at their own size.

    root: every folder of pictures below JPEGImages is a video, masks of the same names lie below Annotations,
    frames without one are skipped. Of a full DAVIS the validation videos, as the paper. Raises ValueError.
    """
    def __init__(self, root, frames, stride, size, seed):
        self.frames, self.stride, self.size, self.bad, self.board = frames, stride, size, {}, None
        listed, videos = root / "ImageSets/2017/val.txt", {}
        chosen = listed.read_text().split() if listed.is_file() else None
        for frame in sorted((root / "JPEGImages").rglob("*.jpg")):
            mask = root / "Annotations" / frame.relative_to(root / "JPEGImages").with_suffix(".png")
            if mask.exists() and (chosen is None or frame.parent.name in chosen):
                videos.setdefault(frame.parent, []).append((frame, mask))
        self.videos = list(videos.values())
        if not videos:
            raise ValueError(f"{root}: no .jpg below JPEGImages has its .png below Annotations")

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        pairs, square = self.videos[key[1]], (self.size, self.size)
        # The last frame again where the video is too short.
        numbers = data.frame_numbers(len(pairs), self.frames, self.stride)
        pairs = [pairs[min(n, len(pairs) - 1)] for n in numbers]
        with data.announced(self, key[1]), data.file_errors():
            pictures = [Image.open(frame).convert("RGB").resize(square, Image.BILINEAR) for frame, _ in pairs]
            video = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
            truth = torch.from_numpy(np.stack([np.asarray(Image.open(mask)) for _, mask in pairs])).long()
            if truth.ndim != 3:
                raise ValueError(f"{pairs[0][1]} has colours: masks must be indexed or grey pictures")
        video = video.permute(3, 0, 1, 2)[None]
        return {"video": video, "truth": truth, "index": key[1], "label": -1, "bad": []}


def kmeans(x, k, seed=0, restarts=5, iterations=50):
    """x [N, D] -> cluster numbers [N]: the best of R k-means++ starts, side by side; the same for a seed."""
    x, k, generator = x - x.mean(dim=0), min(k, len(x)), data.seeded(seed)
    length = x.square().sum(dim=1)[:, None, None]

    def distance(centres):                       # squared, [R, k, D] -> [N, R, k]
        product = (x @ centres.flatten(0, 1).T).unflatten(1, centres.shape[:2])
        return (length - 2 * product + centres.square().sum(dim=2)).clamp(min=0)

    # The next centre is drawn by squared distance to the nearest so far.
    centres = x[torch.randint(len(x), (restarts, 1), generator=generator)]
    while centres.shape[1] < k:
        weight = distance(centres).amin(dim=2).T.cpu() + 1e-12
        centres = torch.cat([centres, x[torch.multinomial(weight, 1, generator=generator)]], dim=1)
    for _ in range(iterations):
        cost, cluster = distance(centres).min(dim=2)             # [N, R]
        # Means by a product, which repeats exactly; index_add on a GPU does not.
        member = F.one_hot(cluster, k).to(x.dtype).flatten(1)    # [N, R * k]
        size = member.sum(dim=0).view(restarts, k, 1)
        centres = torch.where(size > 0, (member.T @ x).view(restarts, k, -1) / size, centres)
    return cluster[:, cost.sum(dim=0).argmin()]


def overlap(truth, clusters, k):
    """truth [T, H, W], clusters of tubes [t, h, w] -> pixels an object and a cluster share, [objects, k]."""
    # Clusters are brought to the masks' size, not masks to the tubes': no pixel of truth is lost.
    pixels = F.interpolate(clusters[None, None].float(), truth.shape, mode="nearest-exact")[0, 0].long()
    counted = truth != IGNORED
    # Objects by place, 0, 1, …: their numbers may have gaps.
    _, place = truth[counted].unique(return_inverse=True)
    return torch.bincount(place * k + pixels[counted], minlength=int(place.max() + 1) * k).view(-1, k)


def iou(table):
    """Shared pixels [objects, k] -> intersection over union of every pair, float64."""
    table = table.double()
    return table / (table.sum(dim=1, keepdim=True) + table.sum(dim=0) - table).clamp(min=1)


def match_one_to_one(table):
    """Clustering protocol: every object gets a cluster of its own so that the sum of IoUs is largest.

    Returns the mean IoU and each object's cluster. All ways are tried: videos have few objects (DAVIS at most
    six with the background). Raises Stop above eight.
    """
    if len(table) > 8:
        raise Stop(f"a clip has {len(table)} objects: they are matched by trying all ways, for at most 8")
    ways = torch.tensor(list(itertools.permutations(range(table.shape[1]), len(table))))  # [ways, objects]
    mean, way = iou(table)[torch.arange(len(table)), ways].mean(dim=1).max(dim=0)
    return mean.item(), ways[way].tolist()


def match_many_to_one(table):
    """Over-clustering protocol: a cluster goes to the object it overlaps most; mean IoU of these objects."""
    merged = table @ F.one_hot(table.argmax(dim=0), len(table))              # [objects, objects]
    return iou(merged).diagonal().mean().item()


# ============ what a step costs ============

# Peak of dense bf16 or fp16 products in TFLOP/s, from the makers' data sheets, for MFU; others have none.
PEAK = {"B200": 2250, "H200 NVL|H100 NVL": 835, "GH200|H200": 989, "H100 PCIe": 756, "H100": 989,
        "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165, "A10G": 70, "A10": 125, "V100": 125, "T4": 65}


def clip_flops(args):
    """Floating-point operations of a clip's forward and backward pass, counted on tensors without storage."""
    # One clip stands for all: the work is proportional to their number.
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = make_model(args, recompute=False)                # repeated work is no work
        hidden = int(args.mask_ratio * model.grid[1] * model.grid[2]) * model.grid[0]
        visible, masked = (torch.zeros(1, n, dtype=torch.long) for n in (model.num_tubes - hidden, hidden))
        video = torch.zeros(1, 3, args.frames, args.image_size, args.image_size)
        tubes = patchify(video, model.patch)
        x_psi = model.forward_decoder(model.encoder(tubes[:, hidden:], visible), visible, masked)
        x_phi = model.forward_target(video, tubes[:, :hidden], masked)
        model.forward_loss(x_psi.flatten(0, 1), x_phi.flatten(0, 1))[0].backward()
    return counter.get_total_flops()


def bench(env, args):
    """Times --steps (5) training steps on random clips that lie on the device, and the parts they are made
    of. Medians on a CPU; means on a GPU, which is waited for at the end alone."""
    torch.manual_seed(args.seed)
    model, together = make_model(args).to(env.device), (args.steps or 5) if env.cuda else 1
    trained = wrapped(env, args, model)
    scaler = torch.amp.GradScaler(env.device.type, init_scale=env.scale)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-5, fused=True)
    clips = torch.randint(256, (args.batch_size, 3, args.frames, args.image_size, args.image_size)).byte()
    mask = sigma.tube_mask(args.batch_size, model.grid[0], model.grid[1] * model.grid[2], args.mask_ratio)
    clips, (visible, masked) = clips.to(env.device), sigma.split_mask(mask, env.device)

    def lap(work):
        began = time.perf_counter()
        for _ in range(together):
            work()
        if env.cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / together

    def seconds_of(*works):
        # Taking turns, so that a busy machine is busy for all of them; two rounds to warm up.
        laps = [[lap(work) for work in works] for _ in range(2 + (args.steps or 5) // together)]
        return [sorted(column)[len(column) // 2] for column in zip(*laps[2:])]

    def there_and_back(forward):
        with env.autocast():
            out = forward()
        scaler.scale(out).backward(torch.ones_like(out))         # any gradient is as dear as any other

    def encode():
        tubes = patchify(data.normalize(clips), model.patch)
        return model.encoder(sigma.take_tubes(tubes, visible), visible)

    def step():
        optimizer.zero_grad(set_to_none=True)
        there_and_back(lambda: trained(data.normalize(clips), mask)[0])
        scaler.step(optimizer)
        scaler.update(None if env.precision == "fp16" else 1.0)

    # ---- whole steps, and what the device reaches for products alone ----
    seconds, = seconds_of(step)
    memory = torch.cuda.max_memory_allocated() if env.cuda else 0
    if resource and not env.cuda:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    flops, n = args.clip_flops * args.batch_size / seconds, 8192 if env.cuda else 2048
    with env.autocast():
        square = torch.eye(n, device=env.device) @ torch.eye(n, device=env.device)     # in autocast's type
        product = 2 * n ** 3 / seconds_of(lambda: square @ square)[0]
    where = torch.cuda.get_device_name() if env.cuda else f"{torch.get_num_threads()} CPU threads"
    peak = next((peak for card, peak in PEAK.items() if re.search(rf"\b({card})\b", where)), 0)
    mfu = f", MFU {flops / peak / 1e12:.1%}" if peak and env.precision != "fp32" else ""
    say(env, f"SIGMA {args.size}, target {args.target}, loss {args.loss}, {args.prototypes} prototypes; "
        f"{env.world} x {args.batch_size} clips of {args.frames} frames of {args.image_size} pixels; "
        f"{env.precision} on {where}{', compiled' * args.compile}{', recomputed' * args.recompute}")
    say(env, f"{args.global_batch / seconds:.2f} clips/s, {1000 * seconds:.1f} ms a step; "
        f"{args.clip_flops / 1e9:.1f} GFLOP a clip, {flops / 1e12:.3f} TFLOP/s a process{mfu}, "
        f"{flops / product:.0%} of a large matrix product's {product / 1e12:.3f} TFLOP/s; "
        f"{memory / 2 ** 30:.2f} GiB a process at most")

    # ---- the step up to each of its parts: what it takes longer than up to the one before is the part's ----
    scores = torch.randn(masked.numel(), args.prototypes, device=env.device) / 8
    prefixes = {
        "encoder": lambda: there_and_back(encode),
        "decoder": lambda: there_and_back(lambda: model.forward_decoder(encode(), visible, masked)),
        "target and loss": lambda: there_and_back(lambda: model(data.normalize(clips), mask)[0]),
        "optimizer, gradients over ranks": step,
        "(Sinkhorn, part of the loss)": lambda: [sigma.sinkhorn(scores, args.eps) for _ in range(2)]}
    *until, alone = seconds_of(*prefixes.values())
    for name, part in zip(prefixes, [*(b - a for a, b in zip([0.0, *until], until)), alone]):
        say(env, f"{1000 * part / args.batch_size:9.3f} ms a clip  {name}")


# ============ flags and main ============

def at_least(least, kind=int):
    """An argparse type: a finite number with a lower bound."""
    def parse(text):
        value = kind(text)
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} must be at least {least}, and finite")
        return value
    parse.__name__ = kind.__name__               # argparse's own message, for what is no number, names it
    return parse


count, whole, switch = at_least(1), at_least(0), argparse.BooleanOptionalAction
positive, not_negative = at_least(1e-9, float), at_least(0, float)

# Flag: type or choices; the paper's default for videos on disk, or that and the demo's; what it is. Where the
# default is None, the text says what happens.
FLAGS = {
    "val": (str, None, "labelled videos: k-NN while pretraining, tests of --probe and --finetune; as --data"),
    "out": (str, None, "folder for log, checkpoint, pictures; a run in it is resumed [runs/<data>[-<mode>]]"),
    "size": (list(SIZES), ("base", "tiny"), "of the model"),
    "target": (["mlp", "dino", "pixel"], "mlp", "what φ is: a trained MLP, frozen DINO, pixels (VideoMAE)"),
    "teacher": (list(TEACHERS), "vitb16", "DINO network of --target dino"),
    "dino-weights": (str, None, "file with DINO's weights [downloaded at first use]"),
    "loss": (["sigma", "l2"], None, "l2: VideoMAE with pixel, the collapse with mlp [sigma; with pixel l2]"),
    "assignment": (["hard", "soft"], "hard", "Sinkhorn's targets: argmax of q (release) or q itself (text)"),
    "prototypes": (count, (3000, 64), "K"),
    "eps": (positive, 0.05, "Sinkhorn's ε; the release uses 0.03 for SSv2 with ViT-B"),
    "mask-ratio": (positive, (0.9, 0.75), "share of tubes hidden"),
    "frames": (count, (16, 8), "in a clip"),
    "stride": (whole, (4, 2), "frames from one to the next; SSv2: 2, fine-tuned there 0, over all the video; "
               "--segment: 1"),
    "image-size": (count, (224, 48), "pixels a side"),
    "repeats": (count, 1, "crops from one decoding, where decoding limits"),
    "epochs": (count, (800, 25), "length of the schedule"),
    "warmup-epochs": (not_negative, (40, 3), "of them with rising learning rate; else an eighth at most"),
    "steps": (count, None, "stop after so many optimiser steps; the schedule stays that of --epochs"),
    "batch-size": (count, 32, "clips a step, per process"),
    "accumulate": (count, 1, "micro-batches a step; Sinkhorn balances each by itself, unlike a larger batch"),
    "lr": (positive, (1.5e-4, 4e-3), "peak learning rate, per 256 clips"),
    "min-lr": (not_negative, (1e-5, 4e-4), "where the cosine ends, per 256 clips"),
    "eval-every": (whole, (50, 5), "epochs between evaluations (k-NN with --val; pictures); 0: none between"),
    "precision": (["auto", "bf16", "fp16", "fp32"], "auto", "auto: bf16, else fp16 on a GPU, fp32 on a CPU"),
    "compile": (switch, False, "torch.compile the blocks and the loss"),
    "recompute": (switch, False, "activation checkpointing: less memory for a second forward pass"),
    "workers": (whole, None, "decoding processes a rank [on GPUs cores / ranks, at most 16; on a CPU 1]"),
    "seed": (whole, 0, "of weights, order, clips, crops and masks"),
    "save-minutes": (positive, 10, "checkpoint at least this often"),
    "keep-every": (count, 100, "keep a numbered checkpoint every so many epochs"),
    "flip": (switch, None, "fine-tuning: mirror half of the clips [unless --stride is 0; not the demo's]"),
    "test-clips": (count, None, "fine-tuning: clips of a test video, each in 3 crops [5; --stride 0: 2]")}
# Fine-tuning's own, over the above. For Kinetics; with --stride 0 (Something-Something) 40 epochs.
FINETUNE = dict(epochs=100, warmup_epochs=5, batch_size=16, lr=1e-3, min_lr=1e-6, eval_every=0)
FINETUNE_DEMO = {**FINETUNE, "epochs": 15, "lr": 1e-2}
MODES = {"probe": "k-NN and a linear probe of its frozen features, from --data to --val, both labelled",
         "finetune": "train all of it, or of `none`, with the labels of --data; test on --val",
         "segment": "cluster the tubes of every clip of --data; mIoU where it has DAVIS's layout"}


def parse_args(argv=None):
    """Flags, and after them what follows from the mode, the demo and the checkpoint. Raises Stop."""
    def refuse(message, when=True):
        if when:
            raise Stop(message)

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults in brackets; where two are given, the second is the demo's.")
    parser.error = refuse                        # one line, without the usage
    parser.add_argument("--data", nargs="?", default="demo", const="demo", help="demo; a folder of videos "
                        "(class folders: labels); or a list file: path and optional label a line [demo]")
    modes = parser.add_mutually_exclusive_group()
    for name, text in MODES.items():
        modes.add_argument(f"--{name}", metavar="CHECKPOINT", help=f"instead of pretraining: {text}")
    modes.add_argument("--bench", action="store_true", help="instead: time steps of these flags on random "
                       "clips, and their parts; writes nothing [--steps 5; defaults as on disk]")
    both = {}
    for name, (kind, default, text) in FLAGS.items():
        both[name.replace("-", "_")] = default = default if isinstance(default, tuple) else (default,)
        text += "" if default == (None,) else f" [{', '.join(map(str, default))}]"
        key = "choices" if isinstance(kind, list) else "action" if kind is switch else "type"
        parser.add_argument(f"--{name}", help=text, **{key: kind})
    args = parser.parse_args(argv)

    # ---- what was not said: by the data set, over it the checkpoint, over it the mode ----
    said = (name for name in (*MODES, "bench") if getattr(args, name) not in (None, False))
    args.mode = next(said, "pretrain")
    args.demo = args.data == "demo" and not args.bench
    defaults = {name: default[-1 if args.demo else 0] for name, default in both.items()}
    args.checkpoint = getattr(args, args.mode) if args.mode in MODES and args.finetune != "none" else None
    args.weights, args.step = None, 0
    if args.checkpoint is not None:
        with agreed():
            args.weights, facts = read_weights(args.checkpoint)
        refuse(f"{args.checkpoint} is of --size {facts['size']}", args.size not in (None, facts["size"]))
        for name in ("size", "target", "teacher", "loss", "prototypes", "step"):     # whatever the flags say
            setattr(args, name, facts.pop(name))
        if args.mode != "probe":
            facts["stride"] = 1 if args.mode == "segment" else defaults["stride"]
        defaults.update(facts)
    if args.mode == "finetune":
        defaults.update(FINETUNE_DEMO if args.demo else FINETUNE, flip=args.stride != 0 and not args.demo)
        defaults["epochs"] = 40 if args.stride == 0 and not args.demo else defaults["epochs"]
    defaults["warmup_epochs"] = min(defaults["warmup_epochs"], (args.epochs or defaults["epochs"]) / 8)
    defaults["loss"] = "l2" if args.target == "pixel" else "sigma"
    defaults["test_clips"] = 2 if args.stride == 0 else 5
    defaults["out"] = f"runs/{Path(args.data).stem or 'run'}-{args.mode}".removesuffix("-pretrain")
    # What was said wins.
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = Path(args.out)

    # ---- what does not go together; SIGMA itself says the rest ----
    refuse("--stride 0 is for --finetune: clips of pretraining are consecutive",
           args.stride == 0 and args.mode in ("pretrain", "bench"))
    refuse("--bench times micro-batches: leave --accumulate out", args.bench and args.accumulate > 1)
    refuse("--repeats must divide --batch-size: a video gives so many clips", args.batch_size % args.repeats)
    patch = SIZES[args.size][0]
    refuse(f"--frames must be a multiple of {TUBELET}, --image-size one of {patch}: tubes are of that size",
           args.frames % TUBELET or args.image_size % patch)
    patches = (args.image_size // patch) ** 2
    hidden = int(args.mask_ratio * patches)
    refuse(f"--mask-ratio hides {hidden} of {patches} patches: not all, not none", not 0 < hidden < patches)
    return args


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):       # files' names can hold what no terminal can show
            stream.reconfigure(errors="backslashreplace")
    try:
        args = parse_args(argv)
        if args.workers != 0 and args.mode != "bench":
            data.preload_workers()               # they take seconds, which pass beside what comes next
        with agreed():                      # before there are ranks, over which no tensor on meta can go
            args.clip_flops = clip_flops(args) if args.mode in ("pretrain", "bench") else 0
        env = start_processes(args)
        # Of a micro-batch over all ranks, which Sinkhorn balances; of a step, which sets the learning rate.
        args.global_batch = args.batch_size * env.world
        args.clips_a_step = args.global_batch * args.accumulate
        globals()[args.mode](env, args)          # pretrain, probe, finetune, segment or bench
    except Stop as stop:
        leave(stop.message, stop.code)
    except (data.VideoError, data.WorkerError) as error:
        leave(str(error), 1)
    except torch.OutOfMemoryError as error:
        leave(f"too little GPU memory: lower --batch-size or --recompute ({str(error).splitlines()[0]})", 1)
    if env.world > 1:
        dist.destroy_process_group()


def leave(message, code):
    """Ends this process with one line. torchrun ends all processes at the first exit: what goes wrong in all
    of them is said by the first alone, what goes wrong in one is said before the others leave."""
    rank = int(os.environ.get("RANK", 0))
    time.sleep(0 if message and rank == 0 else 3 if message else 6)
    if message:
        line = f"train.py: error{f' of rank {rank}' if rank else ''}: {message}"
        print(line, file=sys.stderr, flush=True)
        # torchrun prints a report of its own below it, which ends with what stands in this file.
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with contextlib.suppress(OSError), open(report, "w") as file:
                now = str(int(time.time()))
                json.dump({"message": {"message": line, "extraInfo": {"timestamp": now}}}, file)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
