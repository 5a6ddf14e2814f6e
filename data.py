"""Videos for SIGMA: exact frames out of real files, sampled as in the paper, and tools for a data set.

    python data.py prepare SRC DST   re-encodes a data set for quick access to any clip
    python data.py bench PATH        what a clip costs
    python data.py demo DIR          writes the demo's videos

From a file to a batch: video, clip, data set, loader. Frame n is the n-th of a full decode. Every clip, crop
and mask is a function of (seed, epoch, index). A broken file is reported, and replaced by another draw."""
import argparse
import collections
import colorsys
import contextlib
import gc
import hashlib
import inspect
import io
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from fractions import Fraction
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import av
import av.filter
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

av.logging.set_level(av.logging.PANIC)  # what libav says per frame, VideoError says once

SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .3gp .ogv .gif".split())
# No playlists (concat, hls, dash), which open other files
FORMATS = "mov,matroska,avi,mpeg,mpegts,asf,flv,ogg,gif,h264,hevc,m4v,mpegvideo,vc1,ivf,obu,rm,dv,mxf,nut"
MAX_PIXELS = 8192 * 8192  # of a frame: a damaged header can ask for any memory
MAX_KEPT_BYTES = 64 << 20  # larger files are read twice
READ_SECONDS = 120  # after which a decoder is taken to hang
IDLE_SECONDS = 60  # without a batch while no worker reads: an error
WATCH_SECONDS = 1  # how often the loader looks after its workers
ATTEMPTS = 20  # draws of a video, starts of workers, that may fail in a row
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VideoError(Exception):
    """What is wrong with a video, in one line without its path."""


class WorkerError(RuntimeError):
    """Workers that end or stand still by no video's fault."""


@contextlib.contextmanager
def file_errors():
    """Whatever libav and the system raise about a file, as VideoError."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, LookupError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(" ".join(text.split())) from None


# ============ video: any frame of a file, exactly ============
class Video(contextlib.AbstractContextManager):
    """An open video: `frames` is how many it shows, `read` decodes any of them. Raises VideoError.

    Packets hold one coded frame each, in decoding order. Where their times (pts) tell the order of showing
    (`timed`), frame n is that of packet shown[n], decoded from a keyframe on; else frames are counted."""
    @file_errors()
    def __init__(self, path):
        self.path, size = path, os.path.getsize(path)
        if size == 0 or not os.path.isfile(path):  # a pipe would block
            raise VideoError("is empty, or no regular file")
        self.keep, self.cut = size <= MAX_KEPT_BYTES, None  # the packets; why the video's end is missing
        self._open()
        self._index()

    def __exit__(self, *_):
        self.container.close()

    def _open(self):
        limits = {"protocol_whitelist": "file", "format_whitelist": FORMATS}  # no file leads to another
        # "file:": a name with a colon is no address
        self.container = av.open(f"file:{self.path}", metadata_errors="ignore", container_options=limits)
        self.stream = self.container.streams.best("video")  # the first may be a cover picture
        self.codec = self.stream and self.stream.codec_context
        if self.codec is None or self.stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError("it has no video that FFmpeg can decode")
        self.codec.thread_count = 1  # workers are the parallelism
        # explode: damage is an error, not painted over
        self.codec.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}

    def _index(self):
        """Demuxes the whole file: the video's packets, their times, which are keyframes or hidden."""
        rows, last, mine, vp8 = [], None, self.stream.index, self.codec.name == "vp8"
        try:
            for packet in self.container.demux():
                last = packet if packet.size else last  # no size: the end, or AVI's "as before"
                if packet.size and packet.stream.index == mine:
                    # cut off by an edit list, or VP8's hidden references (RFC 6386, 9.1)
                    hidden = packet.is_discard or vp8 and not memoryview(packet)[0] & 0x10
                    pts = math.nan if packet.pts is None else packet.pts  # NaN: before nothing
                    rows.append((packet if self.keep else None, pts, packet.is_keyframe, hidden))
        except (av.FFmpegError, OSError) as error:  # what came before is good
            self.cut = error.strerror or str(error)
        # A file that was cut off ends in half a packet, of any stream. Headers count frames wrongly.
        if last is not None and last.is_corrupt:
            self.cut = self.cut or "it ends in the middle of a frame"
            rows = rows[:-1] if last.stream.index == mine else rows
        self.packets, self.pts, keys, self.hidden = map(list, zip(*rows) if rows else ((),) * 4)
        self.keys = [i for i, key in enumerate(keys) if key] or [0]

        # What lies before the first keyframe, in either order, may lack what it refers to.
        certain = True
        for i, pts in enumerate(self.pts):
            if not self.hidden[i] and (i < self.keys[0] or pts < self.pts[self.keys[0]]):
                self.hidden[i], certain = True, False
        self.shown = [i for i, hidden in enumerate(self.hidden) if not hidden]
        self.frames, times = len(self.shown), [self.pts[i] for i in self.shown]
        if not times:
            raise VideoError(self.cut or "it has no frames")
        # With B-frames, times in AVI or copied from there are invented; those of MPEG-4 anywhere.
        complete = not any(map(math.isnan, times)) and len(set(times)) == len(times)
        self.timed = certain and complete and not (self.codec.has_b_frames and (
            {self.container.format.name, self.codec.name} & {"avi", "mpeg4"} or times == sorted(times)))
        if self.timed:
            self.shown.sort(key=self.pts.__getitem__)
        seconds = (self.container.duration or 0) / av.time_base  # Matroska drops half packets
        if complete and "matroska" in self.container.format.name and (
                max(times) * self.stream.time_base < 0.9 * seconds - 1):
            self.cut = self.cut or "it is cut off"

    def decode(self, first=0, end=None, wanted=None):
        """Yields the frames of packets first to before end, in the decoder's order. wanted: times; packets
        without are decoded only as far as others depend on them. Damage to what is shown raises."""
        self.codec.flush_buffers()  # of an earlier reading
        packets, start, self.doubts = self.packets, self.pts[first], {}
        if not self.keep:  # a large file is demuxed again
            self.container.close()
            self._open()
            packets = (packet for packet in self.container.demux(self.stream) if packet.size)
        run = itertools.chain(itertools.islice(packets, first, end), [None])  # None: what it holds back
        for i, packet in enumerate(run, first):
            needed, frames = packet is None or wanted is None or packet.pts in wanted, []
            self.codec.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                frames = self.codec.decode(packet)
            except av.FFmpegError as error:
                if packet is None or not (self.hidden[i] or self.pts[i] < start):
                    # H.264's complains at cuts and open groups, too: a doubt, until the frame comes out
                    if packet is None or self.codec.name != "h264":
                        raise
                    self.doubts[packet.pts] = error
            for frame in frames:
                if frame.is_corrupt and (frame.pts is None or not frame.pts < start):
                    raise VideoError("a frame is damaged")
                self.doubts.pop(frame.pts, None)
                yield frame
        for error in self.doubts.values():
            raise error

    def _decode_near(self, numbers):
        """Yields (n, frame) for ascending numbers, each from the last keyframe before it."""
        runs = []  # [first, end] of packets; what lies between runs is skipped
        for n in numbers:
            position = self.shown[n]  # in an open group it is shown before the keyframe that it follows
            first = max((key for key in self.keys if key <= position and self.pts[key] <= self.pts[position]),
                        default=self.keys[0])
            if not runs or first > runs[-1][1]:
                runs.append([first, 0])
            runs[-1][1] = max(runs[-1][1], position + 1)
        wanted = {self.pts[self.shown[n]]: n for n in numbers}  # a frame carries the time of its packet
        for first, end in runs:
            newest = -math.inf
            for frame in self.decode(first, end, wanted):
                if frame.pts is None or frame.pts < newest:
                    self.timed = False  # from now on frames are counted
                    raise VideoError("its times are not in order")
                newest = frame.pts
                if newest in wanted:
                    yield wanted[newest], frame

    def _decode_counting(self, numbers):
        """Yields (n, frame) for ascending numbers, counting from the beginning."""
        count, frame = 0, None
        for count, frame in enumerate(self.decode(), 1):
            if self.timed and frame.pts != self.pts[self.shown[count - 1]]:
                raise VideoError(f"frame {count - 1} is missing")
            if count - 1 in numbers:
                yield count - 1, frame
            if count > numbers[-1] and not self.doubts:
                return
        if frame is None or self.cut:
            raise VideoError(self.cut or "it has no frames")
        self.frames = count  # more packets than frames: the last frame is repeated
        yield from ((n, frame) for n in numbers if n >= count)

    def read(self, views, size=224):
        """Decodes once and returns one uint8 array [3, T, size, size] (RGB) for every view.
        views: list of (T frame numbers in any order, crop); beyond the end is the last frame. crop: (x, y,
        width, height) of the displayed picture, or a function of its width and height, or None: centred."""
        last = self.frames - 1  # repeated beyond
        if self.cut and max(max(numbers) for numbers, _ in views) > last:
            raise VideoError(self.cut)
        views = [([min(n, last) for n in numbers], np.empty((3, len(numbers), size, size), np.uint8),
                  FilterGraph(partial(crop_filters, crop=crop, size=size))) for numbers, crop in views]
        wanted = sorted({n for numbers, *_ in views for n in numbers})
        # From the beginning if need be: a keyframe may be no good place to start.
        for decode in (self._decode_near, self._decode_counting)[0 if self.timed else 1:]:
            missing = set(wanted)
            try:
                with file_errors():
                    for n, frame in decode(wanted):
                        missing.discard(n)
                        for numbers, clip, graph in views:
                            if places := [t for t, number in enumerate(numbers) if number == n]:
                                clip[:, places] = graph.rgb(frame)[:, None]
                if not missing:
                    return [clip for _, clip, _ in views]
                failure = "it does not come out"
            except VideoError as error:
                failure = error
        raise VideoError(f"frames {wanted[0]} to {wanted[-1]} of {self.frames} cannot be decoded: {failure}")


class FilterGraph:
    """Turns frames as displayed, and filters them: one libavfilter graph for every geometry.
    filters: displayed width and height -> [(filter, arguments), ...]."""
    def __init__(self, filters):
        self.filters, self.graphs = filters, {}

    def __call__(self, frame):
        key = width, height, pixels = frame.width, frame.height, frame.format.name
        if key not in self.graphs:
            turn, graph = [], av.filter.Graph()
            if hasattr(graph, "threads"):  # PyAV before 16 starts idle threads instead
                graph.threads = 1
            source = graph.add_buffer(width=width, height=height, format=pixels, time_base=Fraction(1, 25))
            if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
                a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()  # x' = ax + cy, ...
                if abs(b) + abs(c) > abs(a) + abs(d):  # "cclock_flip" swaps the axes, and nothing else
                    width, height, turn, a, d = height, width, [("transpose", "cclock_flip")], c, b
                turn += [("hflip",)] * (a < 0) + [("vflip",)] * (d < 0)
            if frame.format.components[0].bits > 8:  # at an odd x libavfilter's crop would tear their chroma
                turn = [("format", "yuv444p16le"), *turn]
            chain = [graph.add(*step) for step in [*turn, *self.filters(width, height), ("buffersink",)]]
            graph.link_nodes(source, *chain).configure()
            self.graphs[key] = graph
        self.graphs[key].push(frame)
        return self.graphs[key].pull()

    def rgb(self, frame):
        """uint8 [3, height, width], where the filters end in planar RGB."""
        frame = self(frame)
        g, b, r = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
        return np.stack([r, g, b])[:, :, :frame.width]  # lines are padded


def crop_filters(width, height, crop, size):
    """Filters for a crop (as Video.read has it) of such a picture, scaled to size x size planar RGB."""
    crop = crop or square_crop
    x, y, w, h = crop(width, height) if callable(crop) else crop
    if min(x, y, w - 1, h - 1, width - x - w, height - y - h) < 0:
        raise ValueError(f"the crop {x, y, w, h} is not inside {width}x{height}")
    scale = f"{size}:{size}:flags=bilinear"  # planar RGB takes half the time of interleaved
    return [("crop", f"{w}:{h}:{x}:{y}:exact=1"), ("scale", scale), ("format", "gbrp")]


def read_clip(path, frames=16, stride=4, start=None, crop=None, size=224, generator=None):
    """uint8 RGB [frames, 3, size, size]: frames start, start + stride, ... of the video as it is shown.

    The last one is repeated where it is too short. start: None draws one (from `generator`). crop: (x, y,
    width, height) of the displayed picture, scaled bilinearly; None: the centred square. Raises VideoError
    if the file cannot be read, ValueError for senseless arguments."""
    if min(frames, stride, size) < 1 or (start or 0) < 0:
        raise ValueError("frames, stride or size below 1, or start below 0")
    with Video(path) as video:
        if start is None:
            place = torch.rand((), generator=generator).item()
            start = frame_numbers(video.frames, frames, stride, place)[0]
        clip, = video.read([(range(start, start + frames * stride, stride), crop)], size)
    return torch.from_numpy(clip).transpose(0, 1).contiguous()


# ============ clip: which frames, which part of the picture ============
def frame_numbers(total, frames, stride, place=0.5):
    """Numbers of `frames` frames out of `total`, a list; beyond the end where that is too short.
    stride >= 1: every stride-th (Kinetics); place, 0 to 1, is where the clip lies. stride 0: one from each
    of `frames` equal parts (Something-Something); place, a number or [frames], is where in its part."""
    if stride == 0:
        numbers = (torch.arange(frames) + place) * total / frames  # [frames]
        return numbers.long().clamp(max=total - 1).tolist()
    slack = max(0, total - 1 - (frames - 1) * stride)
    start = min(int(place * (slack + 1)), slack)
    return list(range(start, start + frames * stride, stride))


def square_crop(width, height, place=0.5):
    """The square of the short side, (x, y, w, h), at `place` (0 to 1) along the long side."""
    side = min(width, height)
    return int(place * (width - side)), int(place * (height - side)), side, side


# Pretraining's crops, as the release: shares of the short side, width and height at most one step apart,
# at one of 9 + 4 places, in quarters of what is free.
CROP_SCALES = (1, 0.875, 0.75, 0.66)
CROP_SHAPES = [(CROP_SCALES[i], CROP_SCALES[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1]
CROP_PLACES = [(x, y) for x in range(5) for y in range(5) if x % 2 == y % 2]


def draw_multi_scale(generator):
    """Pretraining's crop: a function (displayed width, height) -> (x, y, w, h)."""
    (scale_w, scale_h), (x, y) = [choice[int(torch.randint(len(choice), (), generator=generator))]
                                  for choice in (CROP_SHAPES, CROP_PLACES)]

    def crop(width, height):
        w, h = [max(1, int(min(width, height) * scale)) for scale in (scale_w, scale_h)]
        return x * ((width - w) // 4), y * ((height - h) // 4), w, h
    return crop


def draw_resized(generator):
    """Fine-tuning's crop (Inception's, as VideoMAE): 8 to 100% of the area, aspect 3/4 to 4/3, anywhere."""
    draws = torch.rand(10, 4, generator=generator).tolist()  # the first that fits counts

    def crop(width, height):
        for area, aspect, x, y in draws:
            area, aspect = (0.08 + 0.92 * area) * width * height, (4 / 3) ** (2 * aspect - 1)
            w, h = max(1, round((area * aspect) ** 0.5)), max(1, round((area / aspect) ** 0.5))
            if w <= width and h <= height:
                return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
        return square_crop(width, height)
    return crop


def seeded(*key):
    """A torch.Generator that is a function of these integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ============ data set: folders and lists ============
class Videos:
    """Paths, labels (int64 [n], -1: none) and class names (a list, or None) of a data set.
    The paths are one tensor of bytes, which workers share: strings would be copied into each."""
    def __init__(self, root, names, labels=None, classes=None):
        encoded = [os.fsencode(name) for name in names]
        self.root, self.names = root, torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self.ends = torch.tensor([0] + [len(name) for name in encoded]).cumsum(0)
        self.labels, self.classes = torch.tensor(labels or [-1] * len(encoded)), classes

    def __len__(self):
        return len(self.labels)

    def name(self, i):  # as the list has it, or relative to the folder
        return os.fsdecode(self.names[self.ends[i]:self.ends[i + 1]].numpy().tobytes())

    def path(self, i):
        return os.path.join(self.root, self.name(i))


def find_videos(source, classes=None):
    """The Videos of a folder or a list file. Raises ValueError where there are none.

    A folder is searched to any depth for files with a video's suffix; hidden ones are skipped. Its class
    folders become labels 0, 1, ... by name, or those of `classes` (another split's); without them, or with
    videos beside them, there are no labels. A list has `path[ label]` on each line, separated by space,
    comma or tab; the last field is the label if it is an integer. Relative paths start at its folder. Blank
    lines and # comments are skipped."""
    source, labels = os.fspath(source), {}
    if os.path.isdir(source):
        return find_in_folder(source, classes)
    if not os.path.exists(source) or source.lower().endswith(SUFFIXES):
        raise ValueError(f"{source}: is no folder or list of videos")
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:  # names can be any bytes
        for number, line in enumerate(map(str.strip, file), 1):
            if line and line[0] != "#":
                path, label = re.fullmatch(r"(.+?)(?:(?<![,\s])[,\s]+([+-]?\d{1,6}))?", line).groups("-1")
                if "\0" in line or labels.setdefault(path, int(label)) != int(label):
                    raise ValueError(f"{source}, line {number}: no text, or a second label")
    if len({label < 0 for label in labels.values()}) != 1:
        raise ValueError(f"{source}: no videos, or labels for some alone")
    return Videos(os.path.dirname(source), list(labels), list(labels.values()))


def find_in_folder(source, classes):
    names, folders, errors = [], [], []
    for folder, inside, files in os.walk(source, followlinks=True, onerror=errors.append):
        inside[:] = sorted(name for name in inside if name[0] != "." and not (  # nor links in circles
            (link := Path(folder, name)).is_symlink() and link.resolve() in map(Path.resolve, link.parents)))
        folders = folders or list(inside)  # those at the top
        names += [os.path.relpath(os.path.join(folder, name), source) for name in sorted(files)
                  if name[0] != "." and name.lower().endswith(SUFFIXES)]
    if errors or not names:
        raise ValueError(f"{source}: {errors[0] if errors else f'holds no videos {SUFFIXES}'}")
    if not all(os.sep in name for name in names):
        return Videos(source, names)
    numbers = {name: i for i, name in enumerate(classes or folders)}
    labels = [numbers.get(name.split(os.sep)[0]) for name in names]
    if None in labels:
        raise ValueError(f"{source}: {names[labels.index(None)]} is in no known class ({len(numbers)})")
    return Videos(source, names, labels, list(numbers))


# ============ data set: clips ============
class Clips(Dataset):
    """Clips of videos, each a function of (seed, epoch, index). `clips[epoch, index]` is one item:

        video  uint8 [R, 3, T, size, size], RGB, for `normalize`
        mask   bool [R, N], by mask(generator=...), a picklable callable
        label  int, -1 for none
        index  int, number of the video read; -1: none (evaluation only)
        bad    list of (path, reason): files that could not be read

    Training: R = repeats views from one decoding, each with its own random start and `draw_crop`, then
    `transform`, a picklable uint8 [T, 3, size, size] -> the same, by torch's global generator.
    An unreadable file is replaced by another draw; ATTEMPTS in a row are a VideoError.
    Evaluation: R = clips x crops views, evenly spread in time and place (1 x 1: the centre);
    zeros for an unreadable file.
    An index beyond the videos is another draw of index % len."""
    def __init__(self, videos, frames=16, stride=4, size=224, seed=0, train=True, repeats=1, views=(1, 1),
                 mask=None, draw_crop=draw_multi_scale, transform=None):
        self.videos, self.frames, self.stride, self.size, self.seed = videos, frames, stride, size, seed
        self.train, self.repeats, self.views = train, repeats, views
        self.mask, self.draw_crop, self.transform = mask, draw_crop, transform
        self.bad, self.board = {}, None  # see `announced`

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        video, bad, draw = key[1] % len(self.videos), [], partial(seeded, self.seed, *key)
        for attempt in range(ATTEMPTS if self.train else 1):
            if attempt:  # by the key alone: what failed elsewhere plays no part
                video = int(torch.randint(len(self.videos), (), generator=draw(attempt, 0)))
            try:
                with announced(self, video), Video(self.videos.path(video)) as file:
                    views = list(self.choose(file.frames, draw(attempt, 1)))
                    clips, label = np.stack(file.read(views, self.size)), int(self.videos.labels[video])
                break
            except VideoError as error:
                bad.append((self.videos.path(video), str(error)))
        else:
            if self.train:
                raise VideoError(f"over half of the videos are unreadable, as {': '.join(bad[0])}")
            video = label = -1
            clips = np.zeros((math.prod(self.views), 3, self.frames, self.size, self.size), np.uint8)
        item = {"video": torch.from_numpy(clips), "label": label, "index": video, "bad": bad}
        if self.train and self.transform:
            with torch.random.fork_rng(devices=[]):  # puts the global generator back
                torch.manual_seed(draw(3).initial_seed())
                views = [self.transform(view) for view in item["video"].transpose(1, 2)]
                item["video"] = torch.stack(views).transpose(1, 2)
        if self.mask:
            item["mask"] = self.mask(generator=draw(2))
        return item

    def choose(self, total, generator):
        """Yields R views (frame numbers, crop) of a video of `total` frames."""
        numbers = partial(frame_numbers, total, self.frames, self.stride)
        for _ in range(self.repeats if self.train else 0):
            place = torch.rand(() if self.stride else self.frames, generator=generator)
            yield numbers(place), self.draw_crop(generator)
        clips, crops = (0, 0) if self.train else self.views
        for clip, crop in itertools.product(range(clips), range(crops)):
            # dense clips reach from end to end, as VideoMAE's; spread ones interleave
            place = clip / (clips - 1) if self.stride and clips > 1 else (clip + 0.5) / clips
            side = crop / (crops - 1) if crops > 1 else 0.5
            yield numbers(place), partial(square_crop, place=side)


class Scenes(Dataset):
    """Clips of DAVIS's folders, squeezed to a square: items as those of Clips, one view each,
    and `truth`, the masks at their own size: int64 [T, H, W],
    objects 0, 1, …, and -1 (theirs is 255), which does not count.

    A folder below JPEGImages is a video, its masks lie below Annotations,
    frames without one are skipped. Of a full DAVIS the validation videos, as the paper."""
    def __init__(self, root, frames=16, stride=1, size=224):
        self.frames, self.stride, self.size = frames, stride, size
        self.bad, self.board, videos = {}, None, {}
        root, listed = Path(root), Path(root) / "ImageSets/2017/val.txt"
        chosen = listed.read_text().split() if listed.is_file() else None
        for frame in sorted((root / "JPEGImages").rglob("*.jpg")):
            mask = root / "Annotations" / frame.relative_to(root / "JPEGImages").with_suffix(".png")
            if mask.exists() and (chosen is None or frame.parent.name in chosen):
                videos.setdefault(frame.parent, []).append((frame, mask))
        self.videos = list(videos.values())  # of each its (frame, mask) in order
        if not videos:
            raise ValueError(f"{root}: no .jpg below JPEGImages has its .png below Annotations")

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        pairs, square = self.videos[key[1]], (self.size, self.size)
        numbers = frame_numbers(len(pairs), self.frames, self.stride)
        frames, masks = zip(*(pairs[min(n, len(pairs) - 1)] for n in numbers))  # the last again where short
        with announced(self, key[1]), file_errors():
            pictures = [Image.open(path).convert("RGB").resize(square, Image.BILINEAR) for path in frames]
            video, truth = (torch.from_numpy(np.stack([np.asarray(picture) for picture in clip]))
                            for clip in (pictures, map(Image.open, masks)))
            if truth.ndim != 3:
                raise ValueError(f"{masks[0]} has colours: masks must be indexed or grey")
        objects = truth.unique(return_inverse=True)[1]  # the masks' numbers may have gaps
        return {"video": video.permute(3, 0, 1, 2)[None], "truth": objects.where(truth != 255, -1),
                "index": key[1], "label": -1, "bad": []}


def collate(items):
    """Items -> a batch: video [B*R, 3, T, H, W], mask [B*R, N], label, index [B*R], bad (a list); of a single
    item also `truth`, masks of any size."""
    batch = {key: torch.cat([item[key] for item in items]) for key in ("video", "mask", "truth")
             if key in items[0]}
    for key in ("label", "index"):
        batch[key] = torch.tensor([item[key] for item in items]).repeat_interleave(len(items[0]["video"]))
    batch["bad"] = [entry for item in items for entry in item["bad"]]
    return batch


def normalize(video, dtype=torch.float32):
    """uint8 [B, 3, T, H, W] -> ImageNet-normalised, of `dtype`, on the video's device."""
    # filled, not copied: nothing waits for the GPU
    mean, std = [torch.stack([video.new_full((1, 1, 1), value, dtype=torch.float32) for value in values])
                 for values in (IMAGENET_MEAN, IMAGENET_STD)]
    return (video * (1 / (255 * std)) - mean / std).to(dtype)  # (video / 255 - mean) / std in two passes


def batches_to_device(batches, device):
    """Batches with their videos on the device, one ahead: a GPU copies the next on a stream of its own."""
    cuda, ahead = device.type == "cuda", None
    side = torch.cuda.Stream(device) if cuda else None
    for batch in batches:
        with torch.cuda.stream(side) if cuda else contextlib.nullcontext():
            batch["video"] = batch["video"].to(device, non_blocking=True)
        if ahead is not None:
            yield ahead
        if cuda:
            torch.cuda.current_stream().wait_stream(side)
            batch["video"].record_stream(torch.cuda.current_stream())  # in use there
        ahead = batch
    if ahead is not None:
        yield ahead


# ============ loader: the order ============
class EpochSampler:
    """Batches of (epoch, index) of a rank, steps `start` to before `stop` (None: no end). Raises ValueError.

    batch_size counts clips of this rank, `repeats` of them a video. Every epoch is a permutation by (seed,
    epoch), cut into global batches, these into ranks. What does not fill the last batch is left out; videos
    that do not fill one come again, as other draws. steps_per_epoch is a multiple of `accumulate`."""
    def __init__(self, length, batch_size, rank=0, world=1, seed=0, repeats=1, accumulate=1, start=0,
                 stop=None):
        if min(length, batch_size, repeats) < 1 or batch_size % repeats:
            raise ValueError(f"{batch_size} clips of {length} videos cannot be {repeats} clips a video")
        self.length, self.rank, self.world, self.seed = length, rank, world, seed
        self.start, self.stop, self.videos = start, stop, batch_size // repeats
        self.steps_per_epoch = max(1, length // (self.videos * world * accumulate)) * accumulate

    def __iter__(self):
        permuted = None
        for step in itertools.islice(itertools.count(), self.start, self.stop):
            epoch, step = divmod(step, self.steps_per_epoch)
            if epoch != permuted:
                order, permuted = torch.randperm(self.length, generator=seeded(self.seed, epoch)), epoch
            # ranks' parts lie side by side; after the last video comes the first
            first = (step * self.world + self.rank) * self.videos
            numbers = range(first, first + self.videos)
            yield [(epoch, i - i % self.length + int(order[i % self.length])) for i in numbers]


# ============ loader: the workers ============
# They come from a server process with one thread and everything imported: none inherits a held lock,
# and a start takes 0.1 s. (Windows: spawn.)
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# Exit codes; on Windows from 0xC0000000 on. SIGBUS is none: that is a full /dev/shm.
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)
IDLE = -1.0  # on the board: no video is read


def preload_workers():
    """Starts the fork server and its imports in the background."""
    if START_METHOD == "forkserver":
        from multiprocessing import forkserver  # not everywhere
        multiprocessing.set_forkserver_preload(["torchvision.transforms.v2", "av.filter", "tqdm"])
        forkserver.ensure_running()


def start_worker(_):
    """Runs first in a worker: it ends with the training process, even a killed one (torch looks only at
    the fork server), not by Ctrl-C, which goes to all."""
    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    gc.freeze()  # the collector would write to all that was imported, and so copy it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def announced(dataset, number, limit=READ_SECONDS):
    """Around the reading of a video: its number stands on the board, in the worker's row, with the time
    from which it counts as hanging. Raises VideoError if dataset.bad knows it."""
    if number in dataset.bad:
        raise VideoError(dataset.bad[number])
    worker = get_worker_info()
    row = torch.zeros(2) if worker is None or dataset.board is None else dataset.board[worker.id]
    row[1], row[0] = time.monotonic() + limit, number
    try:
        yield
    finally:
        row[0] = IDLE


def load(dataset, batches, workers=0, pin_memory=False, collate=collate, prefetch=2):
    """Yields the batches of these lists of keys (an EpochSampler's), made by `workers` processes.

    A video that hangs or crashes its worker is noted in dataset.bad, and its batch made again by fresh
    workers, with another draw; with workers=0 it takes the program down. Raises VideoError if most videos
    are unreadable, WorkerError where no video is to blame or too many are.
    dataset: Clips, or any with bad = {} and board = None that reads inside announced(self, number)."""
    if not workers:
        yield from DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory, collate_fn=collate)
        return
    preload_workers()
    failed, keys, pending = 0, iter(batches), collections.deque()
    while failed < ATTEMPTS:
        keys, pending = itertools.chain(pending, keys), collections.deque()  # first what the lost ones had
        dataset.board = torch.full((workers, 2), IDLE, dtype=torch.float64).share_memory_()
        # A timeout leaves the iterator whole: the time to look after the workers.
        loader = DataLoader(
            dataset, batch_sampler=(pending.append(k) or k for k in keys), num_workers=workers,
            multiprocessing_context=START_METHOD, worker_init_fn=start_worker, timeout=WATCH_SECONDS,
            pin_memory=pin_memory, collate_fn=collate, prefetch_factor=prefetch)
        made, since, blamed = None, time.monotonic(), {}
        try:
            while not blamed:
                try:
                    if made is None:
                        made, since = iter(loader), time.monotonic()
                    batch = next(made)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError, VideoError) as error:
                    error.__traceback__ = None  # it would keep the workers alive
                    blamed = judge(error, getattr(made, "_workers", ()), dataset.board.tolist(), since)
                else:
                    failed = 0
                    pending.popleft()
                    yield batch
                    since = time.monotonic()  # work on the batch is no waiting
        finally:
            del made  # ends the workers
        dataset.bad.update(blamed)
        failed += 1
    raise WorkerError(f"{failed} videos in a row crashed or hung their decoders")


def judge(error, workers, board, since):
    """What DataLoader's error means: {video: reason} to leave out (none: wait on), or an error to raise.
    board: (video, end of its time) of each worker; since: when the waiting began."""
    if isinstance(error, VideoError):  # a worker's comes with its traceback in the text
        raise VideoError(str(error).rpartition("VideoError: ")[2].strip()) from None
    if not isinstance(error, RuntimeError):  # a connection breaks before its worker has ended
        time.sleep(WATCH_SECONDS)
        error = WorkerError(f"workers are lost, try again: {(str(error) or repr(error)).splitlines()[-1]}")
    now, blamed, full = time.monotonic(), {}, "/dev/shm full (docker's --shm-size)?"
    # A crash or a hang is blamed on the video on the board; other ends came from outside.
    for worker, (video, limit) in zip(workers, board):
        code = worker.exitcode
        crashed = code in CRASHES or (code or 0) >= 0xC0000000
        if video != IDLE and (crashed or code is None and now > limit):
            blamed[int(video)] = f"its decoder {'crashed' if crashed else 'hung'}"
            worker.kill()  # one that hangs hears nothing else
        elif code is not None:
            raise WorkerError(f"a worker has ended (exit code {code}): out of memory, or is {full}") from None
    if not blamed and "DataLoader timed out" not in str(error):
        raise error
    if not blamed and now > since + IDLE_SECONDS and all(video == IDLE for video, _ in board):
        raise WorkerError(f"no batch for {IDLE_SECONDS} s, though no worker reads: is {full}") from None
    return blamed


# ============ prepare: re-encoding for quick random access ============
# Quick to enter anywhere: short groups; B-frames that nothing depends on, so dropped undecoded; no
# arithmetic coding, no deblocking.
X264 = {"crf": "22", "x264-params": "scenecut=0:bframes=3:b-pyramid=none:b-adapt=0:ref=1:weightp=0:cabac=0:"
        "no-deblock=1:log-level=-1"}


def reencode(source, target, gop, short_side):
    """Writes a video anew as H.264 in mp4 without sound: a keyframe every `gop` frames, the short side at
    most `short_side`, rotation applied, times kept. Raises VideoError if the source is damaged."""
    def filters(width, height):
        shrink = min(1, short_side / min(width, height))  # nothing is enlarged
        width, height = [max(2, round(side * shrink / 2) * 2) for side in (width, height)]
        colour = "out_range=tv:out_color_matrix=bt601"  # for all, as is assumed where none is given
        return [("scale", f"{width}:{height}:flags=bicubic:{colour}"), ("format", "yuv420p")]

    def pictures(video):
        graph = FilterGraph(filters)
        with file_errors():
            for count, frame in enumerate(video.decode()):
                yield (frame.pts or 0) if video.timed else count, graph(frame)

    stream, last = None, -2**62
    with Video(source) as video, av.open(target, "w", format="mp4") as output:
        rate = video.stream.average_rate or Fraction(25)  # raw streams have none
        for pts, frame in pictures(video):
            if stream is None:
                stream = output.add_stream("libx264", rate, {**X264, "g": str(gop)}, thread_count=1,
                                           width=frame.width, height=frame.height, pix_fmt="yuv420p")
                stream.codec_context.time_base = video.stream.time_base if video.timed else 1 / rate
            frame.pts = last = max(last + 1, pts)
            frame.time_base, frame.pict_type = stream.codec_context.time_base, 0  # the encoder chooses
            output.mux(stream.encode(frame))
        if stream is None:
            raise VideoError("it has no frames")
        output.mux(stream.encode(None))


class Reencoder(Dataset):
    """Items: (number, why it failed or None). A data set for the loader."""
    def __init__(self, videos, targets, *options):
        self.videos, self.targets, self.options, self.bad, self.board = videos, targets, options, {}, None

    def __getitem__(self, key):
        number, target = key[1], Path(self.targets.path(key[1]))
        part = target.with_suffix(".part")  # files appear whole
        try:
            with announced(self, number, limit=3600):
                if not target.exists():
                    reencode(self.videos.path(number), part, *self.options)
                    part.replace(target)
            return number, None
        except VideoError as error:
            return number, str(error)
        finally:
            part.unlink(missing_ok=True)


def save(path, content):
    """Writes bytes to a file that appears whole, even if others write the same one."""
    part = Path(f"{path}.{os.getpid()}.part")
    part.write_bytes(content)
    with contextlib.suppress(FileNotFoundError):  # another has finished, and tidied up
        part.replace(path)


def prepare(source, directory, gop=16, short_side=256, workers=CORES):
    """Re-encodes a folder or list of videos into `directory`: same layout, labels and list name, as .mp4.

    Damaged ones are left out (of the new list, too) and listed with reasons in directory/unreadable.txt;
    their number is returned. Run again, it makes what is missing. Raises ValueError."""
    videos, folder = find_videos(source), os.path.isdir(source)
    paths = [os.path.abspath(videos.path(i)) for i in range(len(videos))]
    top = os.path.commonpath([os.path.abspath(videos.root), *paths])  # a list's may lie elsewhere
    old, new = Path(videos.root).resolve(), Path(directory).resolve()
    if new in (old, Path(top).resolve()) or folder and old in new.parents:
        raise ValueError(f"{directory} must lie outside of {source}")
    if min(gop, short_side, workers) < 1:
        raise ValueError("--gop, --short-side, --workers: at least 1")
    names = [os.path.relpath(path, top) for path in paths]
    bare = [os.path.splitext(name)[0] for name in names]  # but a.avi may lie beside a.mkv
    names = [name + ".mp4" for name in (bare if len(set(bare)) == len(bare) else names)]
    for name in {*(videos.classes or ()), *map(os.path.dirname, names)}:
        Path(directory, name).mkdir(parents=True, exist_ok=True)  # an empty class keeps its number
    work = Reencoder(videos, Videos(directory, names), gop, short_side)
    items = load(work, ([(0, i)] for i in range(len(videos))), workers, collate=list)
    reasons = dict(item for item, in tqdm(items, total=len(videos)))
    lost = [f"{paths[i]}: {reason}\n" for i, reason in reasons.items() if reason]
    kept = [names[i] + f" {label}" * (label >= 0) + "\n" for i, label in enumerate(videos.labels.tolist())
            if not reasons[i]]
    save(Path(directory, "unreadable.txt"), os.fsencode("".join(lost)))
    if not folder:
        save(Path(directory, Path(source).name), os.fsencode("".join(kept)))
    return len(lost)


# ============ demo: videos that need no download ============
# Sixteen classes, appearance x motion:
# who knows one is right one time in four.
DEMO_TEXTURES, DEMO_MOTIONS = ("upright", "level", "checks", "dots"), ("still", "forth", "back", "shake")
DEMO_SIZE, DEMO_FRAMES = 80, 24  # pixels a side, frames a video
DEMO_TRAIN, DEMO_VAL, DEMO_MASKED = 40, 12, 4  # videos a class; those of val with masks
# mbtree would differ from run to run
DEMO_X264 = {"preset": "veryfast", "crf": "18", "bf": "2", "g": "24", "x264-params": "mbtree=0"}


def demo_clip(rng, texture, motion):
    """One video, uint8 RGB [T, H, W, 3], and its masks [T, H, W]: 0 background, 1 object, 2 distractor.
    A textured object rests, drifts down or up a diagonal, or shakes, over a panned background.
    Its class is texture and motion; all else is nuisance."""
    shape = DEMO_FRAMES, DEMO_SIZE, DEMO_SIZE
    t, y, x = [np.float32(axis - (axis.size - 1) / 2) for axis in np.ogrid[tuple(map(slice, shape))]]
    draw = rng.uniform  # Python's floats: float32 arrays stay float32

    def over(picture, alpha, rgb):
        return picture + alpha * (rgb - picture)  # [3, T, H, W]

    def shades(dark, light):
        """A dark and a light shade of one hue, [2, 3, 1, 1, 1]."""
        hue, saturation = draw(0, 1), draw(0.25, 0.8)
        rgb = np.float32([colorsys.hsv_to_rgb(hue, saturation, draw(*value)) for value in (dark, light)])
        return rgb[:, :, None, None, None]

    # Background: slow waves between two shades, panned.
    u, v = x + draw(-0.5, 0.5) * t, y + draw(-0.5, 0.5) * t
    waves = sum(np.sin(draw(-0.12, 0.12) * u + draw(-0.12, 0.12) * v + draw(0, 6.3)) for _ in range(3))
    dark, light = shades((0.3, 0.5), (0.6, 0.9))
    picture = over(dark, 0.5 + 0.3 * waves, light)

    # Distractor: a plain disc, drifting anywhere.
    distance = np.hypot(x - draw(-30, 30) - draw(-1, 1) * t, y - draw(-30, 30) - draw(-1, 1) * t)
    disc = np.clip(draw(6, 10) - distance + 0.5, 0, 1)
    picture = over(picture, disc, shades((0.3, 1), (0, 0))[0])

    # Object: a disc to a rounded square. In a tube it drifts by a quarter of its texture's period,
    # or shakes by half of it.
    period, speed = draw(9.2, 10.8), draw(1.1, 1.45)
    shift = {"still": 0 * t, "forth": speed * t, "back": -speed * t, "shake": 2.5 - 5 * (t // 2 % 2)}[motion]
    u, v = x - draw(-8, 8) - shift, y - draw(-8, 8) - shift
    square = draw(0, 0.6)
    distance = (1 - square) * np.hypot(u, v) + square * np.maximum(np.abs(u), np.abs(v))
    body = np.clip(draw(26, 36) - distance + 0.5, 0, 1)
    tilt, wave = draw(-0.1, 0.1), 2 * math.pi / period
    a = wave * (u * math.cos(tilt) + v * math.sin(tilt)) + draw(0, 6.3)
    b = wave * (v * math.cos(tilt) - u * math.sin(tilt)) + draw(0, 6.3)
    field = {"upright": np.sin(a), "level": np.sin(b), "checks": 2 * np.sin(a) * np.sin(b),
             "dots": np.cos(a) + np.cos(b) - 0.8}[texture]
    dark, light = shades((0.1, 0.4), (0.75, 1))
    picture = over(picture, body, over(dark, np.clip(1.2 * field + 0.5, 0, 1), light))

    # Changing light, and grain.
    light = draw(0.75, 1.1) * (1 + draw(0, 0.12) * np.sin(draw(0.1, 0.5) * t + draw(0, 6.3)))
    picture = picture * (255 * light) + draw(2, 6) * rng.standard_normal(shape, dtype=np.float32)
    masks = np.select([body > 0.5, disc > 0.5], [1, 2]).astype(np.uint8)  # [T, H, W]
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)), masks


def write_demo_clip(directory, seed, split, texture, motion, number):
    """Writes directory/split/<class>/NN.mp4, for some of val before it their frames and masks."""
    name = f"{texture}-{motion}"
    path = Path(directory, split, name, f"{number:02}.mp4")
    if path.exists():
        return
    key = [seed, split == "val", DEMO_TEXTURES.index(texture), DEMO_MOTIONS.index(motion), number]
    frames, masks = demo_clip(np.random.default_rng(key), texture, motion)
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind, pictures, suffix in (("JPEGImages", frames, "jpg"), ("Annotations", masks, "png")):
        folder = Path(directory, "davis", kind, f"{name}-{number:02}")
        for i, picture in enumerate(pictures if split == "val" and number < DEMO_MASKED else ()):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(folder / f"{i:05}.{suffix}", quality=95)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as file:  # no dates
        stream = file.add_stream("libx264", 12, DEMO_X264, width=DEMO_SIZE, height=DEMO_SIZE,
                                 pix_fmt="yuv420p", thread_count=1)
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    save(path, buffer.getvalue())


def write_demo(directory, seed=0):
    """Writes the demo's videos, the same for a seed: DIR/{train,val}/<texture>-<motion>/NN.mp4.

    DIR/davis has the first DEMO_MASKED of val a class again, with masks, laid out as DAVIS.
    What DIR has of the same seed already stays; another folder is a ValueError."""
    # Whose folder it is. Two can fill it.
    mark = Path(directory, f"seed-{seed}-{DEMO_TRAIN}+{DEMO_VAL}-davis-{DEMO_MASKED}.txt")
    os.makedirs(directory, exist_ok=True)
    if os.listdir(directory) and not mark.exists():
        raise ValueError(f"{directory} is not empty and not the demo of seed {seed}: name another")
    if not mark.exists():
        mark.touch()
    jobs = [(split, *job) for split, count in (("train", DEMO_TRAIN), ("val", DEMO_VAL))
            for job in itertools.product(DEMO_TEXTURES, DEMO_MOTIONS, range(count))]
    with ThreadPool(CORES) as pool:  # NumPy and the encoder release the GIL
        pool.starmap(partial(write_demo_clip, directory, seed), jobs)
    for part in Path(directory).rglob("*.part"):
        part.unlink(missing_ok=True)  # of a killed process


# ============ bench, command line ============
def bench(source, seconds=10.0, rate=100.0, frames=16, stride=4, size=224):
    """Reads training clips in this process; prints their cost, and the cores for `rate` a second."""
    clips = Clips(find_videos(source), frames, stride, size)
    items = (clips[key] for key, in EpochSampler(len(clips), 1))
    next(items)  # warms up
    end, cpu = time.monotonic() + seconds, time.process_time()
    for count, _ in enumerate(items, 1):
        if time.monotonic() > end:
            break
    cpu = (time.process_time() - cpu) / count
    print(f"{count} clips, {1 / cpu:.1f} a CPU-second; "
          f"{rate:g} a second take {rate * cpu:.1f} cores")


def main():
    """A command for each function, a flag for each parameter with a default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    for command, function in {"prepare": prepare, "bench": bench, "demo": write_demo}.items():
        sub = commands.add_parser(command, description=function.__doc__)
        sub.set_defaults(function=function)
        for name, parameter in inspect.signature(function).parameters.items():
            default = parameter.default
            if default is parameter.empty:
                sub.add_argument(name)
            else:
                name = "--" + name.replace("_", "-")
                sub.add_argument(name, type=type(default), default=default, help="[%(default)s]")
    options = vars(parser.parse_args())
    try:
        if lost := options.pop("function")(**options):
            sys.exit(f"data.py: {lost} unreadable videos: see unreadable.txt")
    except ValueError as error:
        parser.error(str(error))
    except (VideoError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(f"data.py: {(str(error).strip() or 'interrupted').splitlines()[-1]}")


if __name__ == "__main__":
    main()
