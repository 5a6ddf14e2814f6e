"""Videos for SIGMA: exact frames out of real files, sampled as the paper's recipe, and tools to make and test them.

    python data.py prepare SRC DST     re-encodes a data set so that a random clip is quick to reach
    python data.py bench PATH          clips per CPU-second, and the cores that feed a given number of clips a second
    python data.py demo DIR            writes the demo's videos

What is worth knowing before reading on:

- Frame n is the n-th by presentation time. A file is demuxed once, which gives every timestamp without decoding; then
  only what leads from a keyframe to a wanted frame is decoded, and of that only what wanted frames depend on.
- Crop, scale and conversion to RGB happen in one libavfilter graph, for wanted frames only. Clips stay uint8, as they
  leave the decoder, until `normalize` runs on the training device.
- Every clip, crop and mask is a function of (seed, epoch, index): the number of workers, a restart, a broken file met
  before or after change nothing.
- A broken file never becomes a grey or repeated picture in silence. It is reported, and replaced by another draw.
"""
import argparse
import bisect
import colorsys
import functools
import hashlib
import itertools
import math
import multiprocessing.queues
import operator
import os
import re
import shutil
import signal
import stat
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction

import av
import av.filter
import numpy as np
import torch
from av.sidedata.sidedata import Type as SideData
from tqdm import tqdm

av.logging.set_level(av.logging.PANIC)           # libav writes a line per damaged frame; VideoError says it once

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts", ".wmv", ".flv", ".3gp", ".ogv", ".gif")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PIXELS = 8192 * 8192                         # of one frame: a damaged header can ask for any amount of memory
MAX_KEPT_BYTES = 64 << 20                        # files up to this size are read once, larger ones a second time
READ_SECONDS = 120                               # after which a worker's decoder is taken to hang
START_SECONDS = 60                               # after which a worker that has not started is taken to hang
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
ATTEMPTS = 20                                    # draws of a video before a data set counts as mostly unreadable


# ============ reading ============

class WorkerError(RuntimeError):
    """A loader worker died of something other than its video. One line."""


class VideoError(Exception):
    """A video that cannot be read. One line: what is wrong, without the path, which the caller knows."""


@contextmanager
def file_errors():
    """Whatever libav and the file system raise about a file, as VideoError."""
    try:
        yield
    except (av.FFmpegError, OSError, EOFError, ValueError, ArithmeticError, MemoryError, LookupError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(" ".join(text.split())) from None


class Video:
    """An open video file: `frames` in it (those that can be demuxed), and `read` to decode any of them.

    A context manager. Raises VideoError if the file is missing, empty, no video, audio only or absurdly large.
    """
    def __init__(self, path):
        with file_errors():
            self.path, info = os.fspath(path), os.stat(path)
            if not stat.S_ISREG(info.st_mode):                        # opening a pipe would wait for ever
                raise VideoError("is a directory" if stat.S_ISDIR(info.st_mode) else "is no regular file")
            if info.st_size == 0:
                raise VideoError("the file is empty")
            self.keep = info.st_size <= MAX_KEPT_BYTES
            self._open()
            self._index()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        self.packets = []
        self.container.close()

    def _open(self):
        # "file:" and the whitelist: a name with a colon is no address, and a playlist inside cannot reach the network.
        self.container = av.open("file:" + self.path, metadata_errors="ignore", container_options={"protocol_whitelist": "file"})
        if not self.container.streams.video:
            raise VideoError("it has no video stream")
        self.stream = self.container.streams.video[0]
        self.codec = self.stream.codec_context
        if self.codec is None:
            raise VideoError("FFmpeg has no decoder for it")
        self.codec.thread_count = 1                                   # the loader's workers are the parallelism
        # explode: report damage instead of painting over it with pieces of other frames
        self.codec.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}

    def _index(self):
        """Demuxes the whole file: timestamps and keyframes of every packet, in decoding order; no decoding."""
        self.pts, self.keys, self.packets, shown, empty, self.cut = [], [], [], [], 0, None
        self.bytes, vp8 = 0, self.codec.name == "vp8"
        try:
            for packet in self.container.demux(self.stream):
                if packet.size == 0:                                  # the demuxer's last word, or "as before" in AVI
                    empty += 1
                    continue
                if packet.is_keyframe:
                    self.keys.append(len(self.pts))
                # Not shown: what comes before the first keyframe in either order and cannot be decoded, what an edit
                # list cuts off, and VP8's hidden reference frames (show_frame, RFC 6386 section 9.1).
                self.pts.append(packet.pts)
                early = not self.keys or None not in (packet.pts, self.pts[self.keys[0]]) and packet.pts < self.pts[self.keys[0]]
                shown.append(not (early or packet.is_discard or vp8 and not memoryview(packet)[0] & 0x10))
                self.bytes += packet.size
                if self.keep:
                    self.packets.append(packet)
        except (av.FFmpegError, OSError) as error:                    # what came before is good; its end is not the video's
            self.cut = error.strerror or str(error)
        if self.stream.frames > len(self.pts) + empty:                # mp4, mov and avi say how many there should be
            self.cut = f"cut off after {len(self.pts)} of {self.stream.frames} frames"
        self.shown = [i for i, ok in enumerate(shown) if ok]
        if not self.shown:
            raise VideoError(self.cut or "it has no frames")
        times = [self.pts[i] for i in self.shown]
        # Timestamps can be missing or doubled, and AVI has only decoding times: with B-frames they may stay in decoding
        # order. Then frames are counted as they come out of the decoder.
        self.timed = None not in times and len(set(times)) == len(times)
        self.reordered = self.timed and times != sorted(times)
        if self.codec.has_b_frames and not self.reordered and self.container.format.name == "avi":
            self.timed = False
        if self.timed:
            self.shown.sort(key=self.pts.__getitem__)                 # frame n is packet shown[n]
        self.frames = len(self.shown)
        # Matroska counts no frames but has the duration, which is that of the longest stream: not to be taken too exactly.
        if self.timed and not self.cut and self.container.format.name.startswith("matroska") and self.container.duration:
            end, duration = float(max(times) * self.stream.time_base), self.container.duration / av.time_base
            if end < 0.9 * duration - 1:
                self.cut = f"cut off after {end:.1f} of {duration:.1f} seconds"

    def _read_packets(self, first, last):
        """(position, packet) for positions first to last in decoding order."""
        if self.keep:
            yield from zip(range(first, last + 1), self.packets[first:last + 1])
            return
        self.container.close()
        self._open()
        packets = (packet for packet in self.container.demux(self.stream) if packet.size)
        for position, packet in zip(range(last + 1), packets):
            if position >= first:
                yield position, packet

    def decode_run(self, first=0, last=None, wanted=None):
        """Yields the frames that packets first to last (default: all) decode to; raises VideoError at the first damage.

        wanted: a set of pts; packets of other times are decoded only as far as others depend on them.
        """
        self.codec.flush_buffers()
        with file_errors():
            for position, packet in self._read_packets(first, len(self.pts) - 1 if last is None else last):
                self.codec.skip_frame = "DEFAULT" if wanted is None or self.pts[position] in wanted else "NONREF"
                yield from self.codec.decode(packet)
            self.codec.skip_frame = "DEFAULT"
            yield from self.codec.decode(None)                        # what the decoder still holds back

    def _decode_near(self, numbers, from_start=False):
        """Yields (n, frame) for numbers, each reached from the last keyframe before it, or all from the first packet."""
        runs = []                                                     # [first, last] packet; what lies between is skipped
        for n in numbers:
            position = self.shown[n]
            k = bisect.bisect_right(self.keys, position) - 1
            while k > 0 and (self.pts[self.keys[k]] is None or self.pts[self.keys[k]] > self.pts[position]):
                k -= 1                                                # shown before the keyframe that it follows: open GOP
            first = 0 if from_start else self.keys[k]
            if runs and first <= runs[-1][1] + 1:
                runs[-1][1] = max(runs[-1][1], position)
            else:
                runs.append([first, position])
        wanted = {self.pts[self.shown[n]]: n for n in numbers}
        skip = self.reordered and not from_start
        for first, last in runs:
            for frame in self.decode_run(first, last, wanted if skip else None):
                if frame.pts in wanted and not frame.is_corrupt:
                    yield wanted[frame.pts], frame

    def _decode_counting(self, numbers):
        """Yields (n, frame) for ascending numbers by counting all frames from the beginning: without timestamps, the only way."""
        frames, last, frame = -1, numbers[-1], None
        for frames, frame in enumerate(self.decode_run()):
            if frames in numbers:
                yield frames, frame
            if frames == last:
                return
        if frame is None or self.cut:
            raise VideoError(self.cut or "it has no frames")
        self.frames = frames + 1                                      # more packets than frames: repeat the last, as promised
        for n in numbers:
            if n > frames:
                yield n, frame

    def read(self, views, size=224):
        """Decodes once and returns one uint8 array [3, T, size, size] (RGB) for every view.

        views: list of (numbers, crop). numbers: T frame numbers, in any order; those beyond the end give the last
        frame. crop: (x, y, width, height) in displayed pixels (rotated as the file says; pixels are taken as square), a
        function of the displayed width and height that returns this, or None for the centred square.
        Raises VideoError if a frame cannot be decoded or a crop is not inside the picture.
        """
        if self.cut and max(max(numbers) for numbers, _ in views) >= self.frames:
            raise VideoError(self.cut)                                # what there is ends before the video does
        views = [([min(n, self.frames - 1) for n in numbers], crop) for numbers, crop in views]
        wanted = sorted({n for numbers, _ in views for n in numbers})
        clips = [np.empty((3, len(numbers), size, size), np.uint8) for numbers, _ in views]
        with file_errors():
            # From the beginning if need be: a keyframe may not be as good a place to start as its flag says.
            near = [self._decode_near, functools.partial(self._decode_near, from_start=True)]
            for decode in near if self.timed else [self._decode_counting]:
                missing, graphs, failure = set(wanted), {}, "frames are missing"
                try:
                    for n, frame in decode(wanted):
                        for view, (numbers, crop) in enumerate(views):
                            places = [t for t, number in enumerate(numbers) if number == n]
                            if places:
                                self._convert(graphs, frame, view, crop, clips[view][:, places[0]])
                                clips[view][:, places[1:]] = clips[view][:, places[:1]]
                        missing.discard(n)
                        if not missing:
                            return clips
                except VideoError as error:
                    failure = str(error)
        raise VideoError(f"frame {min(missing)} of {self.frames} cannot be decoded: {failure}")

    def _convert(self, graphs, frame, view, crop, out):
        """Crops and scales one frame into out, uint8 [3, size, size]. graphs: those built so far, by view and geometry."""
        key = (view, frame.width, frame.height, frame.format.name)
        if key not in graphs:
            graphs[key] = crop_graph(frame, crop, out.shape[-1])
        graph, (transposed, flip_x, flip_y) = graphs[key]
        graph.push(frame)
        for channel, plane in zip((1, 2, 0), graph.pull().planes):                      # green, blue, red
            picture = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, :out.shape[-1]]
            picture = picture.T if transposed else picture
            out[channel] = picture[::-1 if flip_y else 1, ::-1 if flip_x else 1]


def orientation(frame):
    """(transposed, flip_x, flip_y): how the decoded picture becomes the displayed one, axes swapped first, then mirrored."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))            # x' = a x + c y, y' = b x + d y
    if abs(b) + abs(c) > abs(a) + abs(d):
        return True, c < 0, b < 0
    return False, a < 0, d < 0


def filter_graph(frame, *filters):
    """A configured libavfilter graph for frames like this one. filters: (name, arguments) in their order."""
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):                                     # PyAV before 16 starts idle threads instead
        graph.threads = 1
    chain = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1, 25))]
    chain += [graph.add(*step) for step in filters] + [graph.add("buffersink")]
    for one, next_one in zip(chain, chain[1:]):
        one.link_to(next_one)
    graph.configure()
    return graph


def crop_graph(frame, crop, size):
    """The graph that makes size x size RGB of a crop, given in displayed pixels, and the orientation to apply after it."""
    transposed, flip_x, flip_y = orientation(frame)
    width, height = (frame.height, frame.width) if transposed else (frame.width, frame.height)
    x, y, w, h = square_crop(width, height) if crop is None else crop(width, height) if callable(crop) else crop
    if not (w >= 1 and h >= 1 and 0 <= x <= width - w and 0 <= y <= height - h):
        raise ValueError(f"the crop {x, y, w, h} is not inside its picture, {width}x{height}")
    if flip_x:
        x = width - x - w
    if flip_y:
        y = height - y - h
    if transposed:
        x, y, w, h = y, x, h, w
    # Planar RGB: half the time of interleaved rgb24 in swscale, with full chroma resolution, and the layout of the model.
    graph = filter_graph(frame, ("crop", f"{w}:{h}:{x}:{y}:exact=1"), ("scale", f"{size}:{size}:flags=bilinear"), ("format", "gbrp"))
    return graph, (transposed, flip_x, flip_y)


def read_clip(path, frames=16, stride=4, start=None, crop=None, size=224, generator=None):
    """uint8 RGB [frames, 3, size, size]: frames start, start + stride, ... of the video in presentation order.

    The last frame is repeated where the video is too short. start: None draws one (from `generator`, if given). crop:
    (x, y, width, height) in pixels of the displayed picture, scaled bilinearly; None is the centred square. Raises
    VideoError if the file cannot be read, ValueError for arguments that no video can satisfy.
    """
    if frames < 1 or stride < 1 or size < 1 or (start is not None and start < 0):
        raise ValueError(f"frames ({frames}), stride ({stride}) and size ({size}) must be at least 1, start ({start}) at least 0")
    with Video(path) as video:
        if start is None:
            numbers = frame_numbers(video.frames, frames, stride, torch.rand((), generator=generator).item())
        else:
            numbers = list(range(start, start + frames * stride, stride))
        clip, = video.read([(numbers, crop)], size)
    return torch.from_numpy(clip).transpose(0, 1).contiguous()


# ============ sampling: which frames, which part of the picture ============

def frame_numbers(total, frames, stride, place=0.5):
    """Numbers of `frames` frames out of `total`, a list; where the video is too short they run beyond its end.

    stride >= 1: every stride-th frame (Kinetics); place in [0, 1] is where the clip lies, 0.5 the middle. stride 0: one
    frame from each of `frames` equal parts of the video (Something-Something); place is where in its part, a number or
    a tensor [frames].
    """
    if stride == 0:
        return ((torch.arange(frames) + torch.as_tensor(place)) * total / frames).long().clamp(max=total - 1).tolist()
    slack = max(0, total - 1 - (frames - 1) * stride)
    start = min(int(place * (slack + 1)), slack)
    return list(range(start, start + frames * stride, stride))


def square_crop(width, height, place=0.5):
    """The square of the short side, (x, y, w, h), at `place` (0 to 1) along the long side."""
    side = min(width, height)
    return int(place * (width - side)), int(place * (height - side)), side, side


CROP_SCALES = (1, 0.875, 0.75, 0.66)             # of the short side, as the release; width and height at most one step apart
CROP_SHAPES = [(w, h) for i, w in enumerate(CROP_SCALES) for j, h in enumerate(CROP_SCALES) if abs(i - j) <= 1]
CROP_PLACES = [(x, y) for x in range(5) for y in range(5) if x % 2 == y % 2]     # quarters of what is free: 9 + 4 places


def multi_scale_crop(width, height, shape, place):
    """One of the recipe's crops, (x, y, w, h): shape indexes CROP_SHAPES (10), place CROP_PLACES (13)."""
    short, (scale_w, scale_h), (x, y) = min(width, height), CROP_SHAPES[shape], CROP_PLACES[place]
    w, h = max(1, int(short * scale_w)), max(1, int(short * scale_h))
    return x * ((width - w) // 4), y * ((height - h) // 4), w, h


def draw_multi_scale(generator):
    """Pretraining's crop, a function of the displayed width and height."""
    shape, place = [int(torch.randint(len(choice), (), generator=generator)) for choice in (CROP_SHAPES, CROP_PLACES)]
    return functools.partial(multi_scale_crop, shape=shape, place=place)


def draw_resized(generator):
    """Fine-tuning's crop (Inception's, as VideoMAE): 8 to 100% of the area, aspect 3/4 to 4/3, anywhere."""
    return functools.partial(resized_crop, draws=torch.rand(10, 4, generator=generator).tolist())


def resized_crop(width, height, draws):
    """The first of the draws (area, aspect, x, y; each in [0, 1)) that lies inside the picture, or else the centred square."""
    for area, aspect, x, y in draws:
        area, aspect = (0.08 + 0.92 * area) * width * height, (4 / 3) ** (2 * aspect - 1)
        w, h = max(1, round((area * aspect) ** 0.5)), max(1, round((area / aspect) ** 0.5))
        if w <= width and h <= height:
            return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
    return square_crop(width, height)


def seeded(*key):
    """A torch.Generator that is a function of these integers."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


# ============ finding videos ============

class Videos:
    """Paths, labels (int64 [n], -1 for none) and class names (a list, or None) of a data set.

    The paths are one block of bytes: a list of strings would be copied into every worker, page by page, as reference
    counts change. `videos.path(i)` is a str.
    """
    def __init__(self, root, names, labels=None, classes=None):
        encoded = [os.fsencode(name) for name in names]
        self.root, self.names = root, b"".join(encoded)
        self.ends = torch.tensor([len(name) for name in encoded]).cumsum(0)
        self.labels = torch.full((len(encoded),), -1) if labels is None else torch.tensor(labels)
        self.classes = classes

    def __len__(self):
        return len(self.ends)

    def name(self, i):
        """As the list has it, or relative to the folder."""
        return os.fsdecode(self.names[self.ends[i - 1] if i else 0:self.ends[i]])

    def path(self, i):
        return os.path.join(self.root, self.name(i))


def find_videos(source, classes=None):
    """The Videos of a folder or a list file.

    A folder is searched to any depth for files with a video's suffix, in order of their names; hidden ones are left
    out. Its class folders become labels 0, 1, ... by name, empty ones included; `classes` (names, from another split)
    fixes the numbers instead. Where videos lie beside the class folders, or there are none, there are no labels.

    A list file has `path[ label]` on each line; the separator is a space, comma or tab, relative paths start at the
    list's folder. The last field is the label if it is an integer, so a path may hold spaces and commas; a path in
    double quotes may hold anything. Between path and label a frame count may stand (MMAction): it is ignored. Blank
    lines, # comments, a byte order mark and Windows line ends are skipped; so is a line that repeats a path, unless
    the labels differ. Raises ValueError, in one line and with its number, for all else, and when there are no videos.
    """
    source = os.fspath(source)
    if os.path.isdir(source):
        return find_in_folder(source, classes)
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such folder or list file")
    if source.lower().endswith(SUFFIXES):
        raise ValueError(f"{source}: is a video; give the folder it lies in, or a list file")
    return read_list(source)


def find_in_folder(source, classes=None):
    def stop(error):
        raise ValueError(f"{error.filename}: {error.strerror}")

    names, folders, seen = [], [], set()
    for folder, inside, files in os.walk(source, followlinks=True, onerror=stop):
        seen.add(os.path.realpath(folder))
        inside[:] = sorted(d for d in inside if not d.startswith(".") and os.path.realpath(os.path.join(folder, d)) not in seen)
        if folder == source:
            folders = list(inside)
        found = sorted(f for f in files if f.lower().endswith(SUFFIXES) and not f.startswith("."))
        names += [os.path.relpath(os.path.join(folder, f), source) for f in found]
    if not names:
        raise ValueError(f"{source}: holds no videos ({' '.join(SUFFIXES)})")
    labels = None
    if folders and all(os.sep in name for name in names):
        classes = folders if classes is None else list(classes)
        number = {name: i for i, name in enumerate(classes)}
        for name in names:
            if name.split(os.sep)[0] not in number:
                raise ValueError(f"{source}: folder {name.split(os.sep)[0]} is none of the {len(classes)} known classes")
        labels = [number[name.split(os.sep)[0]] for name in names]
    return Videos(source, names, labels, classes if labels else None)


def read_list(source):
    suffix = "(?:" + "|".join(re.escape(suffix) for suffix in SUFFIXES) + ")"
    labelled = re.compile(r'(.*[^,\s])[,\s]+([+-]?\d+)')                                          # path, label
    counted = re.compile(rf'(.*(?:"|{suffix}))[,\s]+\d+', re.IGNORECASE)                          # path and frame count
    several = re.compile(rf'.*[,\s](?!.*{suffix}$)(.*)', re.IGNORECASE)                            # fields, the last no file
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:         # names can be any bytes
        lines = file.read().split("\n")
    labels = {}                                                       # by path; a dict keeps the order
    for number, line in enumerate(lines, 1):
        line, problem = line.strip(), None
        if not line or line.startswith("#"):
            continue
        match = labelled.fullmatch(line)
        path, label = (match[1], int(match[2][:12])) if match else (line, None)
        if label is not None and (match := counted.fullmatch(path)):
            path = match[1]
        if "\0" in line:
            problem = "is no text; a list has a path and perhaps a label on each line"
        elif len(path) > 1 and path[0] == path[-1] == '"':
            path = path[1:-1].replace('""', '"')
        elif label is None and (match := several.fullmatch(path)):
            problem = f"{match[1]!r} is no integer label (if it belongs to the path, put the path in double quotes)"
        if not path:
            problem = "there is no path"
        elif label is not None and not 0 <= label < 1_000_000:
            problem = f"label {label} is not between 0 and 999999"
        elif labels.setdefault(path, label) != label:
            problem = f"{path} has {'no label' if label is None else f'label {label}'} here and another one before"
        elif (label is None) != (next(iter(labels.values())) is None):
            problem = "has no label, unlike the lines before" if label is None else "has a label, unlike the lines before"
        if problem:
            raise ValueError(f"{source}, line {number}: {problem}")
    if not labels:
        raise ValueError(f"{source}: lists no videos")
    return Videos(os.path.dirname(source), list(labels), None if None in labels.values() else list(labels.values()))


# ============ the data set and its loader ============

class Clips(torch.utils.data.Dataset):
    """Clips of videos, each a function of (seed, epoch, index). `clips[epoch, index]` is one item:

        video  uint8 [R, 3, T, size, size]   RGB; `normalize` makes the model's input of it
        mask   bool [R, N]                   mask(generator=...), any picklable callable; absent without one
        label  int64                         -1 for none
        index  int64                         number of the video that was read; -1: none was (evaluation only)
        bad    list of (path, reason)        files that could not be read on the way

    Training: R = repeats views from one decoding, each with its own random start and crop (`draw_crop`), and then
    `transform`, any picklable uint8 [T, 3, size, size] -> the same that draws from torch's global generator. An unreadable file
    is replaced by other draws; after ATTEMPTS of them in a row VideoError is raised. Evaluation (train=False): R =
    clips x crops views, evenly spread starts times evenly spread squares (1 x 1: the centre), and nothing is replaced: an
    unreadable file gives zeros with label -1 and index -1, which keeps shapes static; drop it by index < 0.
    stride 0 spreads the frames over the whole video (Something-Something). An index beyond the number of videos, as the
    sampler gives for data sets smaller than a batch, is another draw from video index % len.
    """
    def __init__(self, videos, frames=16, stride=4, size=224, seed=0, train=True, repeats=1, views=(1, 1), mask=None, draw_crop=draw_multi_scale, transform=None):
        self.videos, self.frames, self.stride, self.size = videos, frames, stride, size
        self.seed, self.train, self.repeats, self.views, self.mask = seed, train, repeats, views, mask
        self.draw_crop, self.transform = draw_crop, transform
        self.bad = {}                            # video number -> reason: what need not be tried again
        self.board = None                        # shared int64 [workers]: the video each is reading, -1 idle, -2 not started

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        epoch, index = key
        video, bad = index % len(self.videos), []
        for attempt in range(ATTEMPTS if self.train else 1):
            if attempt:                                               # redrawn from all videos, without memory
                video = int(torch.randint(len(self.videos), (), generator=seeded(self.seed, epoch, index, attempt, 0)))
            try:
                if video in self.bad:
                    raise VideoError(self.bad[video])
                clips = self.read(video, seeded(self.seed, epoch, index, attempt, 1))
                break
            except VideoError as error:
                bad.append((self.videos.path(video), str(error)))
        else:
            if self.train:
                raise VideoError(f"over half of the videos are unreadable: {ATTEMPTS} draws in a row failed, the first {': '.join(bad[0])}")
            views = self.views[0] * self.views[1]
            video, clips = -1, [np.zeros((3, self.frames, self.size, self.size), np.uint8)] * views
        item = {"video": torch.from_numpy(np.stack(clips)), "index": video, "bad": bad,
                "label": int(self.videos.labels[video]) if video >= 0 else -1}
        if self.train and self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded(self.seed, epoch, index, 3).initial_seed())
                item["video"] = torch.stack([self.transform(clip.transpose(0, 1)).transpose(0, 1) for clip in item["video"]])
        if self.mask is not None:
            item["mask"] = self.mask(generator=seeded(self.seed, epoch, index, 2))
        return item

    def read(self, video, generator):
        """The views of one video, R arrays uint8 [3, T, size, size]. Raises VideoError."""
        with announced(self.board, video):
            try:
                file = Video(self.videos.path(video))
            except VideoError as error:
                if len(self.bad) < 100_000:
                    self.bad[video] = str(error)
                raise
        with announced(self.board, video), file:
            views = []
            if self.train:
                for _ in range(self.repeats):
                    place = torch.rand(() if self.stride else self.frames, generator=generator)
                    views.append((frame_numbers(file.frames, self.frames, self.stride, place), self.draw_crop(generator)))
            else:
                clips, crops = self.views
                for clip in range(clips):
                    # dense clips reach from the first to the last frame, as VideoMAE's; spread ones interleave
                    place = clip / (clips - 1) if self.stride and clips > 1 else (clip + 0.5) / clips
                    for crop in range(crops):
                        views.append((frame_numbers(file.frames, self.frames, self.stride, place),
                                      functools.partial(square_crop, place=crop / (crops - 1) if crops > 1 else 0.5)))
            return file.read(views, self.size)


def collate(items):
    """Items of Clips -> a batch: video [B*R, 3, T, H, W], mask [B*R, N], label and index [B*R], bad (one list)."""
    repeats = len(items[0]["video"])
    batch = {name: torch.cat([item[name] for item in items]) for name in ("video", "mask") if name in items[0]}
    for name in ("label", "index"):
        batch[name] = torch.tensor([item[name] for item in items]).repeat_interleave(repeats)
    batch["bad"] = [entry for item in items for entry in item["bad"]]
    return batch


def normalize(video, dtype=torch.float32):
    """uint8 [B, 3, T, H, W] -> ImageNet-normalised, of `dtype`, on the video's device."""
    mean, std = (torch.stack([video.new_full((), value, dtype=torch.float32) for value in values]).view(3, 1, 1, 1)    # filled, not copied:
                 for values in (IMAGENET_MEAN, IMAGENET_STD))                                                          # nothing waits for the GPU
    return (video * (1 / (255 * std)) - mean / std).to(dtype)


class EpochSampler(torch.utils.data.Sampler):
    """Batches of (epoch, index) for one rank, from step `start` to before `stop` (None: without end).

    batch_size counts clips of this rank; a batch has batch_size / repeats videos. Every epoch is a permutation by (seed,
    epoch), cut into global batches, and these into ranks: the clips of a step depend on the global batch alone, and any
    step can be computed, so a run continues where it stopped. What does not fill the epoch's last batch is left out;
    where the data set is smaller than one batch, its videos come several times, as different draws. Raises ValueError.
    steps_per_epoch is a multiple of `accumulate`, the batches an optimiser step is made of.
    """
    def __init__(self, length, batch_size, rank=0, world=1, seed=0, repeats=1, accumulate=1, start=0, stop=None):
        if length < 1 or batch_size < 1 or repeats < 1 or batch_size % repeats:
            raise ValueError(f"a batch of {batch_size} clips from {length} videos cannot be made of {repeats} clips a video")
        self.length, self.rank, self.world, self.seed, self.start, self.stop = length, rank, world, seed, start, stop
        self.videos = batch_size // repeats
        self.steps_per_epoch = max(1, length // (self.videos * world * accumulate)) * accumulate
        self.order = None, None                                       # epoch and its permutation

    def __iter__(self):
        step = self.start
        while self.stop is None or step < self.stop:
            yield self.batch(step)
            step += 1

    def batch(self, step):
        """The list of (epoch, index) of this rank at a global step."""
        epoch, step = divmod(step, self.steps_per_epoch)
        if self.order[0] != epoch:
            self.order = epoch, torch.randperm(self.length, generator=seeded(self.seed, epoch))
        first = (step * self.world + self.rank) * self.videos
        order = self.order[1]
        return [(epoch, i // self.length * self.length + int(order[i % self.length])) for i in range(first, first + self.videos)]


class OnceSampler(torch.utils.data.Sampler):
    """Batches of (0, index) over these video numbers, each once and in order; the last batch may be smaller."""
    def __init__(self, indices, batch_size):
        self.indices, self.batch_size, self.start = indices, batch_size, 0

    def __len__(self):
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self):
        for step in range(self.start, len(self)):
            yield [(0, i) for i in self.indices[step * self.batch_size:(step + 1) * self.batch_size]]


@contextmanager
def announced(board, video, seconds=None):
    """While a worker reads, its video stands on the shared board; after `seconds` (READ_SECONDS) the kernel kills it.

    An alarm with its default action needs nothing from the hanging process, which may never return to Python.
    """
    worker = torch.utils.data.get_worker_info()
    if worker is None or board is None:                               # in the main process there is nobody to survive it
        yield
        return
    board[worker.id] = video
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds or READ_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        board[worker.id] = -1


def cannot_send(error, batch):
    """Ends a worker whose batch cannot be handed over: Python would drop the batch, and the run would wait for it forever."""
    print(f"a loader worker could not hand over a batch: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def report_start(worker):
    """What a worker does first: hung_starts waits for it."""
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(cannot_send)
    torch.utils.data.get_worker_info().dataset.board[worker] = -1


def hung_starts(workers, board):
    """Waits until every worker has reported its start -> those that still have not after START_SECONDS.

    A fork copies the locks that other threads hold at that moment, and nobody in the child releases them: Python before
    3.12 can wait for one forever as it starts, and so can libraries.
    """
    deadline = time.monotonic() + START_SECONDS
    while hung := [worker for worker, state in zip(workers, board.tolist()) if state == -2]:
        if not all(worker.is_alive() for worker in workers):
            return []                                                 # the next batch says what ended them
        if time.monotonic() > deadline:
            return hung
        time.sleep(0.01)
    return []


# Without SIGBUS: that is a full /dev/shm, not the video.
CRASHES = {signal.SIGALRM: "its decoder hung"} | dict.fromkeys(
    (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL), "its decoder crashed")


def load(clips, sampler, workers=0, pin_memory=False, collate=collate):
    """Yields the batches of the sampler, from sampler.start on (which counts along), made by `workers` processes.

    A video that hangs or crashes its worker is noted as unreadable in clips.bad, the workers are started afresh, and the
    same batch is made again with another draw. With workers=0 such a video takes the program down. Raises VideoError
    if most videos are unreadable and WorkerError if a worker is killed from outside (out of memory, for instance) or if
    workers do not start, three times running.
    """
    failed = 0
    while True:
        clips.board = torch.full((max(1, workers),), -2).share_memory_()
        loader = torch.utils.data.DataLoader(clips, batch_sampler=sampler, num_workers=workers, collate_fn=collate, pin_memory=pin_memory, worker_init_fn=report_start)
        handler = signal.getsignal(signal.SIGCHLD)
        batches = iter(loader)
        # torch would raise a worker's death from a signal handler, anywhere in the caller's code, a half-done optimiser
        # step included. Without the handler it is raised below, within five seconds.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
        try:
            if hung := hung_starts(getattr(batches, "_workers", []), clips.board):
                failed += 1
                message = f"{len(hung)} of {workers} loader workers did not start within {START_SECONDS} s"
                if failed == 3:
                    raise WorkerError(f"{message}, three times running: try fewer --workers")
                tqdm.write(f"warning: {message}; they are started again")
                continue
            failed = 0
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                sampler.start += 1
                yield batch
        except VideoError as error:                                   # a worker's comes with its traceback in the text
            raise VideoError(str(error).strip().splitlines()[-1].removeprefix("data.VideoError: ")) from None
        except (RuntimeError, OSError, EOFError) as error:
            started = getattr(batches, "_workers", [])
            deadline = time.monotonic() + 5                           # a worker that ends as it hands over a batch cuts the connection first
            while started and not isinstance(error, RuntimeError) and all(worker.is_alive() for worker in started) and time.monotonic() < deadline:
                time.sleep(0.01)
            dead = [(i, -worker.exitcode) for i, worker in enumerate(started) if worker.exitcode]
            blamed = [(int(clips.board[i]), CRASHES[code]) for i, code in dead if code in CRASHES and clips.board[i] >= 0]
            if not dead:
                raise
            if len(blamed) < len(dead):
                ended = ", ".join(f"signal {code}" if code > 0 else f"exit code {-code}" for _, code in dead)
                raise WorkerError(f"a loader worker has ended ({ended}): out of memory, or of shared memory in /dev/shm (docker's --shm-size)?") from None
            clips.bad.update(blamed)
        finally:
            for worker, state in zip(getattr(batches, "_workers", []), clips.board.tolist()):
                if state == -2:                                       # a lock keeps SIGTERM from it, and the program's exit would wait for it
                    worker.kill()
            del batches, loader                                       # ends the other workers


# ============ prepare ============

# What makes H.264 quick to enter anywhere: short groups; B-frames in a fixed pattern, which nothing depends on, so that
# unwanted ones are dropped undecoded; no arithmetic coding, no deblocking. It costs about 2 dB at equal size.
X264 = "keyint={gop}:min-keyint={gop}:scenecut=0:bframes=3:b-pyramid=none:b-adapt=0:ref=1:weightp=0:cabac=0:no-deblock=1:log-level=-1"


def reencode(source, target, gop=16, short_side=256):
    """Writes a video anew as H.264 in mp4 without sound, with a keyframe every `gop` frames, the short side at most
    `short_side`, rotation applied, timestamps kept, at the same bit rate (less in proportion where it shrinks).

    Returns a reason if only the frames before some damage could be kept, else None. Raises VideoError if there is
    nothing to keep, OSError if the target cannot be written; the target appears when it is complete.
    """
    with Video(source) as video:
        frames, reason, count, graphs = video.decode_run(), video.cut, 0, {}
        first = next(frames, None)
        if first is None:
            raise VideoError("it has no frames")
        transposed, flip_x, flip_y = orientation(first)
        width, height = (first.height, first.width) if transposed else (first.width, first.height)
        shrink = min(1, short_side / min(width, height))
        width, height = [max(2, round(side * shrink / 2) * 2) for side in (width, height)]
        steps = [("transpose", "cclock_flip")] * transposed + [("hflip", "")] * flip_x + [("vflip", "")] * flip_y
        # One colour description for all files: the one that is assumed where none is given.
        steps += [("scale", f"{width}:{height}:flags=bicubic:out_range=tv:out_color_matrix=bt601"), ("format", "yuv420p")]

        rate = video.stream.average_rate or Fraction(25)
        tick = video.stream.time_base if video.timed else 1 / rate
        ticks = video.pts[video.shown[-1]] - video.pts[video.shown[0]] + 1 / rate / tick if video.timed else video.frames
        seconds, pixels = float(ticks * tick), width * height * video.frames
        bits = min(max(8 * video.bytes * shrink ** 1.5, 0.05 * pixels), 0.5 * pixels)      # within what such pictures need
        pts = first.pts - 1 if video.timed and first.pts is not None else -1
        try:
            with av.open(target + ".part", "w", format="mp4") as output:
                stream = output.add_stream("libx264", rate=rate, options={"preset": "medium", "x264-params": X264.format(gop=gop)})
                stream.width, stream.height, stream.pix_fmt, stream.bit_rate = width, height, "yuv420p", int(bits / seconds) + 1
                stream.codec_context.thread_count, stream.codec_context.time_base = 1, tick
                try:
                    for frame in itertools.chain([first], frames):
                        pts = max(pts + 1, frame.pts) if video.timed and frame.pts is not None else pts + 1
                        key = frame.width, frame.height, frame.format.name
                        if key not in graphs:
                            graphs[key] = filter_graph(frame, *steps)
                        graphs[key].push(frame)
                        frame = graphs[key].pull()
                        frame.pts, frame.time_base, frame.pict_type = pts, tick, 0         # 0: the encoder chooses the type
                        output.mux(stream.encode(frame))
                        count += 1
                except VideoError as error:
                    reason = str(error)
                output.mux(stream.encode(None))
        except (av.FFmpegError, OSError) as error:
            raise OSError(f"{target}: {error.strerror or error}") from None
    os.replace(target + ".part", target)
    return f"only {count} frames kept: {reason}" if reason else None


class Reencoder(torch.utils.data.Dataset):
    """Re-encoding as a data set, so that `load` deals with crashing and hanging decoders. Items: [(number, reason)]."""
    def __init__(self, videos, targets, gop, short_side):
        self.videos, self.targets, self.options = videos, targets, (gop, short_side)
        self.bad, self.board = {}, None

    def __getitem__(self, key):
        number = key[1]
        target, reason = self.targets.path(number), self.bad.get(number)
        if reason is None and not os.path.exists(target):             # what an earlier run has finished stays
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                with announced(self.board, number, seconds=3600):
                    reason = reencode(self.videos.path(number), target, *self.options)
            except VideoError as error:
                reason = str(error)
        return [(number, reason)] if reason else []


def prepare(source, directory, gop=16, short_side=256, workers=None):
    """Re-encodes a folder or list of videos into `directory`, with the same layout, labels and list name; restartable.

    Every file becomes .mp4. Unreadable ones are left out (of the new list too), printed, and listed in
    directory/unreadable.txt; the number of them is returned. Raises ValueError for a source that find_videos refuses.
    """
    videos = find_videos(source)
    folder = os.path.isdir(source)
    inside = os.path.relpath(os.path.realpath(directory), os.path.realpath(source if folder else os.path.dirname(source) or "."))
    if inside == "." or (folder and not inside.startswith("..")):
        raise ValueError(f"{directory} must be outside of {source}: both would be searched for videos next time")
    names = [os.path.normpath(videos.name(i)) for i in range(len(videos))]
    if any(os.path.isabs(name) or name.startswith("..") for name in names):
        paths = [os.path.abspath(videos.path(i)) for i in range(len(videos))]
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, top) for path in paths]
    taken, new_names = set(), []
    for name in names:
        new = os.path.splitext(name)[0] + ".mp4"
        while new in taken:                                           # a.avi beside a.mkv
            name, new = name + "_", name + ".mp4"
        taken.add(new)
        new_names.append(new)
    for name in videos.classes or [""]:
        os.makedirs(os.path.join(directory, name), exist_ok=True)     # a class without videos keeps its number
    targets = Videos(str(directory), new_names)

    report = os.path.join(directory, "unreadable.txt")
    reasons, workers = {}, workers or CORES
    if os.path.exists(report):                                        # an earlier run's word on files that are not done again
        with open(report, encoding="utf-8", errors="surrogateescape") as file:
            earlier = dict(line.rstrip("\n").split(": ", 1) for line in file if ": " in line)
        reasons = {i: earlier[videos.path(i)] for i in range(len(videos)) if videos.path(i) in earlier and os.path.exists(targets.path(i))}
    jobs = OnceSampler(range(len(videos)), 1)
    with tqdm(total=len(videos), unit="video") as bar:
        for items in load(Reencoder(videos, targets, gop, short_side), jobs, workers, collate=operator.itemgetter(0)):
            for number, reason in items:
                reasons[number] = reason
                bar.write(f"{videos.path(number)}: {reason}")
            bar.update()
    lost = {number for number in reasons if not os.path.exists(targets.path(number))}
    write_lines(report, [f"{videos.path(i)}: {reasons[i]}" for i in sorted(reasons)])
    if not folder:
        def quoted(name):
            return '"' + name.replace('"', '""') + '"' if re.search(r'[\s,"#]', name) else name
        write_lines(os.path.join(directory, os.path.basename(source)),
                    [quoted(new) + (f" {int(videos.labels[i])}" if videos.labels[i] >= 0 else "") for i, new in enumerate(new_names) if i not in lost])
    return len(lost)


def write_lines(path, lines):
    with open(path + ".part", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(line + "\n" for line in lines)
    os.replace(path + ".part", path)


# ============ the demo's videos ============

# Sixteen classes, appearance x motion: who knows only one of the two is right for one clip in four.
DEMO_TEXTURES = ("upright", "level", "checks", "dots")
DEMO_MOTIONS = ("still", "forth", "back", "shake")
DEMO_SIZE, DEMO_FRAMES, DEMO_TRAIN, DEMO_VAL = 80, 24, 40, 12     # pixels a side, frames a video, videos a class
DEMO_X264 = {"preset": "veryfast", "crf": "18", "bf": "2", "g": "24", "x264-params": "mbtree=0"}   # mbtree differs from run to run


def demo_clip(rng, texture, motion):
    """One video: uint8 RGB [T, H, W, 3] and its exact masks uint8 [T, H, W], 0 background, 1 the object, 2 a distractor.

    A textured object rests, drifts down the diagonal or up it, or shakes, over a wavy background that a camera pans
    across. The class is its texture and its motion; colours, light, grain, size, place and speed are nuisance.
    """
    T, S = DEMO_FRAMES, DEMO_SIZE
    number = np.arange(T, dtype=np.float32)[:, None, None]
    t = number - (T - 1) / 2
    y, x = np.meshgrid(*2 * [np.arange(S, dtype=np.float32) - (S - 1) / 2], indexing="ij")
    draw = lambda low, high: float(rng.uniform(low, high))       # Python's floats leave float32 arrays float32
    over = lambda picture, alpha, rgb: picture + alpha[..., None] * (rgb - picture)

    def shades(dark, light):
        """A dark and a light shade of one hue, their values drawn from these ranges."""
        hue, saturation = draw(0, 1), draw(0.25, 0.8)
        return [np.float32(colorsys.hsv_to_rgb(hue, saturation, draw(*value))) for value in (dark, light)]

    # Background: slow waves between two shades, panned.
    u, v = x + draw(-0.5, 0.5) * t, y + draw(-0.5, 0.5) * t
    waves = sum(np.sin(draw(-0.12, 0.12) * u + draw(-0.12, 0.12) * v + draw(0, 6.3)) for _ in range(3))
    dark, light = shades((0.3, 0.5), (0.6, 0.9))
    picture = over(dark, 0.5 + 0.3 * waves, light)

    # Distractor: a plain disc, drifting anywhere.
    distance = np.hypot(x - draw(-30, 30) - draw(-1, 1) * t, y - draw(-30, 30) - draw(-1, 1) * t)
    alpha = np.clip(draw(6, 10) - distance + 0.5, 0, 1)
    picture = over(picture, alpha, shades((0.3, 1), (0, 0))[0])
    mask = np.where(alpha > 0.5, np.uint8(2), np.uint8(0))

    # Object: anything from a disc to a rounded square. What it moves within one tube is about a quarter of its texture's
    # period when it drifts and half of it when it shakes.
    period, speed = draw(9.2, 10.8), draw(1.1, 1.45)
    shift = {"still": 0 * t, "forth": speed * t, "back": -speed * t, "shake": 2.5 - 5 * (number // 2 % 2)}[motion]
    u, v = x - draw(-8, 8) - shift, y - draw(-8, 8) - shift
    square = draw(0, 0.6)
    distance = (1 - square) * np.hypot(u, v) + square * np.maximum(np.abs(u), np.abs(v))
    alpha = np.clip(draw(26, 36) - distance + 0.5, 0, 1)
    tilt, wave = draw(-0.1, 0.1), 2 * math.pi / period
    a = wave * (u * math.cos(tilt) + v * math.sin(tilt)) + draw(0, 6.3)
    b = wave * (v * math.cos(tilt) - u * math.sin(tilt)) + draw(0, 6.3)
    field = {"upright": lambda: np.sin(a), "level": lambda: np.sin(b), "checks": lambda: 2 * np.sin(a) * np.sin(b),
             "dots": lambda: np.cos(a) + np.cos(b) - 0.8}[texture]()
    dark, light = shades((0.1, 0.4), (0.75, 1))
    picture = over(picture, alpha, over(dark, np.clip(1.2 * field + 0.5, 0, 1), light))
    mask[alpha > 0.5] = 1

    # Light that changes, and grain.
    picture *= 255 * draw(0.75, 1.1) * (1 + draw(0, 0.12) * np.sin(draw(0.1, 0.5) * t + draw(0, 6.3)))[..., None]
    picture += draw(2, 6) * rng.standard_normal((T, S, S, 1), dtype=np.float32)
    return picture.clip(0, 255).astype(np.uint8), mask


def write_video(path, frames, layout, codec, pixels, options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open(path, "w", options={"fflags": "bitexact"}) as file:           # no dates or random numbers in the header
        stream = file.add_stream(codec, rate=12, options=options)
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = frames.shape[2], frames.shape[1], pixels, 1
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=layout)))
        file.mux(stream.encode())


def write_demo(directory, seed=0):
    """Writes the demo's videos, the same for a seed: DIR/{train,val}/<texture>-<motion>/NN.mp4, 80x80, 24 frames, H.264.

    The validation split's exact masks go to DIR/val-masks/<class>/NN.mkv, lossless grey, values as demo_clip's. A
    finished DIR of the same seed is reused; anything else in its place is a ValueError.
    """
    directory = os.path.abspath(directory)
    marker = os.path.join(directory, "demo.txt")
    stamp = f"seed {seed}, {len(DEMO_TEXTURES)} textures x {len(DEMO_MOTIONS)} motions, {DEMO_TRAIN} + {DEMO_VAL} videos each\n"
    if os.path.isfile(marker) and open(marker).read() == stamp:
        return
    if os.path.exists(directory) and (not os.path.isdir(directory) or os.listdir(directory)):
        raise ValueError(f"{directory} is not empty and not the demo of seed {seed}: name another directory or remove it")
    unfinished = f"{directory}.unfinished-{os.getpid()}"

    def write(job):
        split, texture, motion, number = job
        key = [seed, split == "val", DEMO_TEXTURES.index(texture), DEMO_MOTIONS.index(motion), number]
        frames, masks = demo_clip(np.random.default_rng(key), texture, motion)
        name = os.path.join(f"{texture}-{motion}", f"{number:02}")
        write_video(os.path.join(unfinished, split, f"{name}.mp4"), frames, "rgb24", "libx264", "yuv420p", DEMO_X264)
        if split == "val":
            write_video(os.path.join(unfinished, "val-masks", f"{name}.mkv"), masks, "gray", "ffv1", "gray", {})

    jobs = [(split, texture, motion, number) for split, count in (("train", DEMO_TRAIN), ("val", DEMO_VAL))
            for texture in DEMO_TEXTURES for motion in DEMO_MOTIONS for number in range(count)]
    try:
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:                  # NumPy and the encoder leave Python's lock
            list(pool.map(write, jobs))
        with open(os.path.join(unfinished, "demo.txt"), "w") as file:
            file.write(stamp)
        os.replace(unfinished, directory)                                      # all or nothing
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


# ============ bench, command line ============

def bench(source, seconds=10, rate=100, frames=16, stride=4, size=224, repeats=1):
    """Reads training clips in this process and prints what one costs, and the cores that `rate` clips a second take."""
    videos = find_videos(source)
    clips = Clips(videos, frames, stride, size, repeats=repeats)
    sampler, count, bad = iter(EpochSampler(len(videos), 1)), 0, {}
    clips[next(sampler)[0]]                                           # libraries and disk warm up
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < seconds:
        item = clips[next(sampler)[0]]
        count += len(item["video"])
        bad.update(item["bad"])
    cpu = (time.process_time() - cpu) / count
    print(f"{len(videos)} videos, {count} clips of {frames} frames read, {len(bad)} unreadable videos met")
    print(f"{1 / cpu:.1f} clips per CPU-second ({1000 * cpu:.1f} ms a clip); {rate:g} clips a second take {rate * cpu:.1f} cores")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="prepare | bench | demo")

    def command(name, text, *arguments, **flags):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=parser.formatter_class)
        for argument in arguments:
            sub.add_argument(argument)
        for flag, (default, text) in flags.items():
            sub.add_argument("--" + flag.replace("_", "-"), default=default, type=type(default), help=text)

    command("prepare", "re-encode SRC (a folder or list file) into DST for quick random access", "source", "directory",
            gop=(16, "frames from one keyframe to the next"), short_side=(256, "pixels; smaller videos keep their size"),
            workers=(CORES, "processes"))
    command("bench", "measure how fast training clips of a folder or list file are read", "source",
            seconds=(10.0, "to measure for"), rate=(100.0, "clips a second to feed"), frames=(16, "of a clip"),
            stride=(4, "frames from one to the next; 0: spread over the video"), size=(224, "pixels"), repeats=(1, "clips from one decoding"))
    command("demo", "write the demo's videos", "directory", seed=(0, "of everything random"))
    sys.stdout.reconfigure(errors="backslashreplace"), sys.stderr.reconfigure(errors="backslashreplace")   # for file names of any bytes
    options = vars(parser.parse_args())
    name = options.pop("command")
    for flag, value in options.items():
        if not isinstance(value, str) and (value < 0 or value == 0 and flag not in ("stride", "seed")):
            parser.error(f"--{flag.replace('_', '-')} {value:g} must be above 0")
    try:
        lost = {"prepare": prepare, "bench": bench, "demo": write_demo}[name](**options)
    except ValueError as error:
        parser.error(str(error))
    except (VideoError, OSError, RuntimeError) as error:
        sys.exit(f"data.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted" + ("; the same command goes on from here" if name == "prepare" else ""))
    if lost:
        sys.exit(f"data.py: {lost} unreadable videos were left out, see {os.path.join(options['directory'], 'unreadable.txt')}")


if __name__ == "__main__":
    main()
