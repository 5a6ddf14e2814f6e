"""Videos for SIGMA: exact frames out of real files, sampled as in the paper, and tools for a data set.

    python data.py prepare SRC DST   re-encodes a data set so that a random clip is quick to reach
    python data.py bench PATH        what a clip costs, and the cores that feed so many a second
    python data.py demo DIR          writes the demo's videos

From a file to a batch: video, clip, data set, loader. Frame n is the n-th of a full decode. Every clip, crop
and mask is a function of (seed, epoch, index), whatever the number of workers. A broken file never becomes a
wrong picture in silence: it is reported, and replaced by another draw."""
import argparse
import bisect
import collections
import colorsys
import contextlib
import gc
import glob
import hashlib
import inspect
import itertools
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial

import av
import av.filter
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

av.logging.set_level(av.logging.PANIC)  # libav writes a line per damaged frame; VideoError says it once

SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .3gp .ogv .gif".split())
# What libav may take a file for; not playlists (concat, hls, dash), which open other files
FORMATS = "mov,matroska,avi,mpeg,mpegts,asf,flv,ogg,gif,h264,hevc,m4v,mpegvideo,vc1,ivf,obu,rm,dv,mxf,nut"
MAX_PIXELS = 8192 * 8192   # of one frame: a damaged header can ask for any amount of memory
MAX_KEPT_BYTES = 64 << 20  # files up to this size are read once, larger ones a second time
READ_SECONDS = 120         # after which a worker's decoder is taken to hang
IDLE_SECONDS = 60          # without a batch while no worker reads, after which something is wrong
WATCH_SECONDS = 1          # how often the loader looks after its workers while it waits
ATTEMPTS = 20              # draws of a video, or starts of the workers, that may fail in a row
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class VideoError(Exception):
    """A video that cannot be read: what is wrong, in one line without the path, which the caller knows."""


class WorkerError(RuntimeError):
    """Loader workers that end or stand still for another reason than a video. One line."""


@contextlib.contextmanager
def file_errors():
    """Whatever libav and the file system raise about a file, as VideoError."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, LookupError) as error:
        text = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise VideoError(" ".join(text.split())) from None


# ============ video: any frame of a file, exactly ============
def before(time, other):
    """Whether one time lies before another; either may be unknown (None)."""
    return None not in (time, other) and time < other


class Video(contextlib.AbstractContextManager):
    """An open video: `frames` is how many it shows, `read` decodes any of them. Raises VideoError.

    Packets hold one coded frame each, in decoding order. Where their times (pts) tell the order of
    showing (`timed`), frame n is that of packet shown[n], and only what leads to it from a keyframe
    is decoded. Elsewhere the decoder's order is the truth: frames are counted."""
    def __init__(self, path):
        with file_errors():
            self.path, size = path, os.path.getsize(path)
            if size == 0 or not os.path.isfile(path):  # a pipe would block
                raise VideoError("is empty, or no regular file")
            self.keep = size <= MAX_KEPT_BYTES  # the packets, in memory
            self._open()
            self._index()

    def __exit__(self, *_):
        self.container.close()

    def _open(self):
        # A name with a colon is no address ("file:"), and no file leads to another.
        path, limits = f"file:{self.path}", {"protocol_whitelist": "file", "format_whitelist": FORMATS}
        self.container = av.open(path, metadata_errors="ignore", container_options=limits)
        self.stream = self.container.streams.best("video")  # the first may be a cover picture
        self.codec = self.stream and self.stream.codec_context
        if self.codec is None or self.stream.disposition & av.stream.Disposition.attached_pic:
            raise VideoError("it has no video stream that FFmpeg can decode")
        self.codec.thread_count = 1  # the loader's workers are the parallelism
        # explode: complain about damage instead of painting over it with pieces of other frames
        self.codec.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}

    def _index(self):
        """Demuxes the whole file: every packet of the video, its time, kind, and whether it is shown."""
        rows, last, self.cut, mine, vp8 = [], None, None, self.stream.index, self.codec.name == "vp8"
        try:
            for packet in self.container.demux():
                last = packet if packet.size else last  # no size: the end, or AVI's "as before"
                if packet.size and packet.stream.index == mine:
                    # cut off by an edit list, or one of VP8's hidden references (RFC 6386, section 9.1)
                    hidden = packet.is_discard or vp8 and not memoryview(packet)[0] & 0x10
                    rows.append((packet if self.keep else None, packet.pts, packet.is_keyframe, hidden))
        except (av.FFmpegError, OSError) as error:  # what came before is good; its end is not the video's
            self.cut = error.strerror or str(error)
        # A file that was cut off ends in half a packet, of any stream. (Headers' numbers of frames tell
        # nothing: they count AVI's empty packets, and what an edit list hides.)
        if last is not None and last.is_corrupt:
            self.cut = self.cut or "the file ends in the middle of a frame"
            rows = rows[:-1] if last.stream.index == mine else rows
        self.packets, self.pts, keys, self.hidden = map(list, zip(*rows) if rows else ((),) * 4)
        self.keys = [i for i, key in enumerate(keys) if key] or [0]

        # What lies before the first keyframe, in either order, may lack what it refers to: not certain.
        certain = True
        for i, pts in enumerate(self.pts):
            if not self.hidden[i] and (i < self.keys[0] or before(pts, self.pts[self.keys[0]])):
                self.hidden[i], certain = True, False
        self.shown = [i for i, hidden in enumerate(self.hidden) if not hidden]
        self.frames, times = len(self.shown), [self.pts[i] for i in self.shown]
        if not times:
            raise VideoError(self.cut or "it has no frames")
        complete, container = None not in times and len(set(times)) == len(times), self.container.format.name
        # With B-frames, times in AVI or copied from there are invented; those of MPEG-4 anywhere.
        self.timed = complete and certain and not (self.codec.has_b_frames and (
            container == "avi" or self.codec.name == "mpeg4" or times == sorted(times)))
        if self.timed:
            self.shown.sort(key=self.pts.__getitem__)
        # Matroska drops half packets, but has a duration: its longest stream's, not to be taken exactly.
        duration = (self.container.duration or 0) / av.time_base  # seconds
        late = complete and max(times) * self.stream.time_base < 0.9 * duration - 1
        if late and container.startswith("matroska"):
            self.cut = self.cut or f"it is cut off before its {duration:.1f} seconds end"

    def decode(self, first=0, end=None, wanted=None):
        """Yields the frames of the packets from first to before end, as they leave the decoder.

        wanted: a set of times; other packets are decoded only as far as others depend on them. Damage
        to frames that are shown raises, not before the run begins. H.264's decoder complains where
        nothing is lost, too, at cuts and open groups: a doubt, until the packet's frame comes out."""
        self.codec.flush_buffers()  # it may hold frames of an earlier reading
        packets, self.doubts = self.packets, {}
        if not self.keep:  # a large file is demuxed again
            self.container.close()
            self._open()
            packets = (packet for packet in self.container.demux(self.stream) if packet.size)
        # None, at the end: what the decoder still holds back
        run = itertools.chain(itertools.islice(packets, first, end), [None])
        for i, packet in enumerate(run, first):
            needed, frames = packet is None or wanted is None or packet.pts in wanted, []
            self.codec.skip_frame = "DEFAULT" if needed else "NONREF"
            try:
                frames = self.codec.decode(packet)
            except av.FFmpegError as error:
                if packet is None or not (self.hidden[i] or before(packet.pts, self.pts[first])):
                    if packet is None or self.codec.name != "h264":
                        raise
                    self.doubts[packet.pts] = error
            for frame in frames:
                if frame.is_corrupt and not before(frame.pts, self.pts[first]):
                    raise VideoError("a frame is damaged")
                self.doubts.pop(frame.pts, None)
                yield frame
        for error in self.doubts.values():
            raise error

    def _decode_near(self, numbers):
        """Yields (n, frame) for ascending numbers, each reached from the last keyframe before it."""
        runs = []  # [first, end] of packets; what lies between runs is skipped
        for n in numbers:
            position = self.shown[n]
            k = bisect.bisect_right(self.keys, position) - 1
            while k > 0 and self.pts[self.keys[k]] > self.pts[position]:
                k -= 1  # shown before the keyframe that it follows: an open group of pictures
            if not runs or self.keys[k] > runs[-1][1]:
                runs.append([self.keys[k], 0])
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

        views: list of (T frame numbers in any order, crop); beyond the end is the last frame. crop:
        (x, y, width, height) in displayed pixels (rotated as the file says), a function of their
        width and height that returns it, or None: the centred square."""
        if self.cut and max(max(numbers) for numbers, _ in views) >= self.frames:
            raise VideoError(self.cut)
        views = [([min(n, self.frames - 1) for n in numbers], crop) for numbers, crop in views]
        clips = [np.empty((3, len(numbers), size, size), np.uint8) for numbers, _ in views]
        graphs = [FilterGraph(partial(crop_filters, crop=crop, size=size)) for _, crop in views]
        wanted = sorted({n for numbers, _ in views for n in numbers})
        # From the beginning if need be: a keyframe may not be as good a place to start as it says.
        for decode in (self._decode_near, self._decode_counting) if self.timed else (self._decode_counting,):
            missing, failure = set(wanted), "it does not come out of the decoder"
            try:
                with file_errors():
                    for n, frame in decode(wanted):
                        missing.discard(n)
                        for graph, clip, (numbers, _) in zip(graphs, clips, views):
                            places = [t for t, number in enumerate(numbers) if number == n]
                            if places:
                                clip[:, places] = graph.rgb(frame)[:, None]
                if not missing:
                    return clips
            except VideoError as error:
                failure = error
        raise VideoError(f"frames {wanted[0]} to {wanted[-1]} of {self.frames} cannot be decoded: {failure}")


class FilterGraph:
    """Turns frames as displayed, and filters them: one libavfilter graph for every geometry met.
    filters: a function of the displayed width and height that returns [(filter, arguments), ...]."""
    def __init__(self, filters):
        self.filters, self.graphs = filters, {}

    def __call__(self, frame):
        key = frame.width, frame.height, frame.format.name
        if key not in self.graphs:
            self.graphs[key] = self._build(frame, *key)
        self.graphs[key].push(frame)
        return self.graphs[key].pull()

    def rgb(self, frame):
        """uint8 [3, height, width], where the filters end in planar RGB (libavfilter's gbrp)."""
        frame = self(frame)
        g, b, r = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in frame.planes]
        return np.stack([r, g, b])[:, :, :frame.width]  # lines are padded

    def _build(self, frame, width, height, pixels):
        turn, graph = [], av.filter.Graph()
        if hasattr(graph, "threads"):  # PyAV before 16 starts idle threads instead
            graph.threads = 1
        source = graph.add_buffer(width=width, height=height, format=pixels, time_base=Fraction(1, 25))
        if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
            # x' = a x + c y, y' = b x + d y
            a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).tolist()
            if abs(b) + abs(c) > abs(a) + abs(d):  # "cclock_flip" swaps the axes, and nothing else
                width, height, turn, a, d = height, width, [("transpose", "cclock_flip")], c, b
            turn += [("hflip",)] * (a < 0) + [("vflip",)] * (d < 0)
        if frame.format.components[0].bits > 8:  # at an odd x libavfilter's crop would tear their chroma
            turn = [("format", "yuv444p16le"), *turn]
        chain = [graph.add(*step) for step in [*turn, *self.filters(width, height), ("buffersink",)]]
        graph.link_nodes(source, *chain).configure()
        return graph


def crop_filters(width, height, crop, size):
    """The filters that make size x size planar RGB of a crop (as Video.read takes it) of such a picture."""
    crop = crop or square_crop
    x, y, w, h = crop(width, height) if callable(crop) else crop
    if not (w >= 1 and h >= 1 and 0 <= x <= width - w and 0 <= y <= height - h):
        raise ValueError(f"the crop {x, y, w, h} is not inside its picture, {width}x{height}")
    # Planar RGB: half the time of interleaved, full chroma resolution, the model's layout
    scale = f"{size}:{size}:flags=bilinear"
    return [("crop", f"{w}:{h}:{x}:{y}:exact=1"), ("scale", scale), ("format", "gbrp")]


def read_clip(path, frames=16, stride=4, start=None, crop=None, size=224, generator=None):
    """uint8 RGB [frames, 3, size, size]: frames start, start + stride, ... of the video as it is shown.

    The last frame is repeated where the video is too short. start: None draws one (from `generator`).
    crop: (x, y, width, height) in pixels of the displayed picture, scaled bilinearly; None: the centred
    square. Raises VideoError if the file cannot be read, ValueError for senseless arguments."""
    if min(frames, stride, size) < 1 or (start or 0) < 0:
        raise ValueError(f"frames {frames}, stride {stride} or size {size} below 1, or start {start} below 0")
    with Video(path) as video:
        if start is None:
            place = torch.rand((), generator=generator).item()
            start = frame_numbers(video.frames, frames, stride, place)[0]
        clip, = video.read([(range(start, start + frames * stride, stride), crop)], size)
    return torch.from_numpy(clip).transpose(0, 1).contiguous()


# ============ clip: which frames, which part of the picture ============
def frame_numbers(total, frames, stride, place=0.5):
    """Numbers of `frames` frames out of `total`, a list; beyond its end where the video is too short.

    stride >= 1: every stride-th (Kinetics); place, 0 to 1, is where the clip lies. stride 0: one from
    each of `frames` equal parts (Something-Something); place is where in its part, or a tensor."""
    if stride == 0:
        numbers = (torch.arange(frames) + torch.as_tensor(place)) * total / frames
        return numbers.long().clamp(max=total - 1).tolist()
    slack = max(0, total - 1 - (frames - 1) * stride)
    start = min(int(place * (slack + 1)), slack)
    return list(range(start, start + frames * stride, stride))


def square_crop(width, height, place=0.5):
    """The square of the short side, (x, y, w, h), at `place` (0 to 1) along the long side."""
    side = min(width, height)
    return int(place * (width - side)), int(place * (height - side)), side, side


# Pretraining's crops, as the release: sides of these shares of the short side, width and height at most
# one step apart (10 shapes), at one of 9 + 4 places, in quarters of what is free.
CROP_SCALES = (1, 0.875, 0.75, 0.66)
CROP_SHAPES = [(CROP_SCALES[i], CROP_SCALES[j]) for i in range(4) for j in range(4) if abs(i - j) <= 1]
CROP_PLACES = [(x, y) for x in range(5) for y in range(5) if x % 2 == y % 2]


def draw_multi_scale(generator):
    """Pretraining's crop: a function of the displayed width and height that returns (x, y, w, h)."""
    (scale_w, scale_h), (x, y) = [choice[int(torch.randint(len(choice), (), generator=generator))]
                                  for choice in (CROP_SHAPES, CROP_PLACES)]

    def crop(width, height):
        w, h = [max(1, int(min(width, height) * scale)) for scale in (scale_w, scale_h)]
        return x * ((width - w) // 4), y * ((height - h) // 4), w, h
    return crop


def draw_resized(generator):
    """Fine-tuning's crop (Inception's, as VideoMAE): 8 to 100% of the area, aspect 3/4 to 4/3, anywhere.
    The first of ten draws that fits the picture, or else the centred square."""
    draws = torch.rand(10, 4, generator=generator).tolist()

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
    """Paths, labels (int64 [n], -1: none) and class names (a list, or None) of a data set. The names are
    one tensor of bytes, which workers share: strings would be copied into each of them."""
    def __init__(self, root, names, labels=None, classes=None):
        encoded = [os.fsencode(name) for name in names]
        self.root, self.names = root, torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self.ends = torch.tensor([0] + [len(name) for name in encoded]).cumsum(0)
        self.labels, self.classes = torch.tensor(labels or [-1] * len(encoded)), classes

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """As the list has it, or relative to the folder; a str."""
        return os.fsdecode(self.names[self.ends[i]:self.ends[i + 1]].numpy().tobytes())

    def path(self, i):
        return os.path.join(self.root, self.name(i))


def find_videos(source, classes=None):
    """The Videos of a folder or a list file. Raises ValueError, in one line, where there are none.

    A folder is searched to any depth for files with a video's suffix, by name, without hidden ones. Its
    class folders, empty ones too, become labels 0, 1, ... by name, or those of `classes` (names, from
    another split). Without class folders, or with videos beside them, there are no labels.

    A list has `path[ label]` on each line, separated by space, comma or tab; relative paths start at its
    folder. The last field is the label if it is an integer: a path may hold spaces and commas, in double
    quotes anything. Blank lines, # comments, a byte order mark and repeated lines are skipped."""
    source, labels, kinds = os.fspath(source), {}, set()
    if os.path.isdir(source):
        return find_in_folder(source, classes)
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such folder or list file")
    if source.lower().endswith(SUFFIXES):
        raise ValueError(f"{source}: is a video; give the folder it lies in, or a list file")
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:  # names can be any bytes
        lines = [line.strip() for line in file.read().split("\n")]
    for number, line in enumerate(lines, 1):
        if not line or line[0] == "#":
            continue
        match = re.fullmatch(r"(.*[^,\s])[,\s]+([+-]?\d{1,6})", line)
        path, label, kind = (match[1], int(match[2]), "a") if match else (line, -1, "no")
        kinds.add(kind)
        # Without a label, a path with spaces is clear if it ends as a video does, or in a double quote.
        clear = path.lower().endswith((*SUFFIXES, '"')) or not re.search(r"[,\s]", path) or label >= 0
        path = path[1:-1].replace('""', '"') if path[0] == path[-1] == '"' else path
        problem = ("is no text of the form 'path' or 'path label' (0 to 999999; double quotes around spaces)"
                   if not clear or match and label < 0 or "\0" in line else
                   f"has {kind} label, unlike the lines before" if len(kinds) > 1 else
                   "had another label before" if labels.setdefault(path, label) != label else None)
        if problem:
            raise ValueError(f"{source}, line {number}: {line[:200]!r} {problem}")
    if not labels:
        raise ValueError(f"{source}: lists no videos")
    return Videos(os.path.dirname(source), list(labels), list(labels.values()))


def find_in_folder(source, classes):
    def stop(error):  # else os.walk leaves out in silence what it may not read
        raise ValueError(f"{error.filename}: {error.strerror}")

    names, folders, seen = [], [], set()
    for folder, inside, files in os.walk(source, followlinks=True, onerror=stop):
        seen.add(os.path.realpath(folder))  # links are followed, but not in circles
        inside[:] = sorted(name for name in inside if name[0] != "."
                           and os.path.realpath(os.path.join(folder, name)) not in seen)
        folders = folders or list(inside)
        names += [os.path.relpath(os.path.join(folder, name), source) for name in sorted(files)
                  if name[0] != "." and name.lower().endswith(SUFFIXES)]
    if not names:
        raise ValueError(f"{source}: holds no videos ({' '.join(SUFFIXES)})")
    if not all(os.sep in name for name in names):
        return Videos(source, names)
    classes, owners = list(classes or folders), [name.split(os.sep)[0] for name in names]
    if unknown := set(owners) - set(classes):
        raise ValueError(f"{source}: folder {min(unknown)} is none of the {len(classes)} known classes")
    number = {name: i for i, name in enumerate(classes)}
    return Videos(source, names, [number[owner] for owner in owners], classes)


# ============ data set: clips ============
class Clips(Dataset):
    """Clips of videos, each a function of (seed, epoch, index). `clips[epoch, index]` is one item:

        video  uint8 [R, 3, T, size, size]   RGB; `normalize` makes the model's input of it
        mask   bool [R, N]                   mask(generator=...), any picklable callable; if there is one
        label  int                           -1 for none
        index  int                           number of the video that was read; -1: none (evaluation only)
        bad    list of (path, reason)        files that could not be read on the way

    Training: R = repeats views from one decoding, each with its own random start and crop (`draw_crop`),
    then `transform`, a picklable uint8 [T, 3, size, size] -> the same that draws from torch's global
    generator. An unreadable file is replaced by another draw; ATTEMPTS of them in a row are a VideoError.
    Evaluation: R = clips x crops views, evenly spread starts times evenly spread squares (1 x 1: the
    centre); an unreadable file gives zeros. stride 0 spreads the frames over the whole video. An index
    beyond the videos, as small data sets need to fill a batch, is another draw of index % len."""
    def __init__(self, videos, frames=16, stride=4, size=224, seed=0, train=True, repeats=1, views=(1, 1),
                 mask=None, draw_crop=draw_multi_scale, transform=None):
        self.videos, self.frames, self.stride, self.size, self.seed = videos, frames, stride, size, seed
        self.train, self.repeats, self.views = train, repeats, views
        self.mask, self.draw_crop, self.transform = mask, draw_crop, transform
        self.bad, self.board = {}, None  # see `announced`

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        epoch, index = key
        video, bad = index % len(self.videos), []
        for attempt in range(ATTEMPTS if self.train else 1):
            if attempt:  # from all videos, by nothing but the key: what failed elsewhere plays no part
                generator = seeded(self.seed, epoch, index, attempt, 0)
                video = int(torch.randint(len(self.videos), (), generator=generator))
            try:
                with announced(self, video), Video(self.videos.path(video)) as file:
                    views = self.choose(file.frames, seeded(self.seed, epoch, index, attempt, 1))
                    clips, label = file.read(list(views), self.size), int(self.videos.labels[video])
                break
            except VideoError as error:
                bad.append((self.videos.path(video), str(error)))
        else:
            if self.train:
                raise VideoError(f"over half of the videos are unreadable: {ATTEMPTS} draws in a row failed, "
                                 f"the first {': '.join(bad[0])}")
            shape, video, label = (math.prod(self.views), 3, self.frames, self.size, self.size), -1, -1
            clips = np.zeros(shape, np.uint8)
        item = {"video": torch.from_numpy(np.stack(clips)), "label": label, "index": video, "bad": bad}
        if self.train and self.transform is not None:
            # torchvision's transforms draw from the global generator: seeded here, put back afterwards
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seeded(self.seed, epoch, index, 3).initial_seed())
                transformed = [self.transform(clip.transpose(0, 1)).transpose(0, 1) for clip in item["video"]]
                item["video"] = torch.stack(transformed)
        if self.mask is not None:
            item["mask"] = self.mask(generator=seeded(self.seed, epoch, index, 2))
        return item

    def choose(self, total, generator):
        """Yields R views (frame numbers, crop) of a video of `total` frames."""
        numbers = partial(frame_numbers, total, self.frames, self.stride)
        for _ in range(self.repeats if self.train else 0):
            place = torch.rand(() if self.stride else self.frames, generator=generator)
            yield numbers(place), self.draw_crop(generator)
        clips, crops = (0, 0) if self.train else self.views
        for clip, crop in itertools.product(range(clips), range(crops)):
            # dense clips reach from the first to the last frame, as VideoMAE's; spread ones interleave
            place = clip / (clips - 1) if self.stride and clips > 1 else (clip + 0.5) / clips
            side = crop / (crops - 1) if crops > 1 else 0.5
            yield numbers(place), partial(square_crop, place=side)


def collate(items):
    """Items -> a batch: video [B*R, 3, T, H, W], mask [B*R, N], label, index [B*R], bad (a list); of a single
    item also its `truth`, masks of any size."""
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


# ============ loader: the order ============
class EpochSampler:
    """Batches of (epoch, index) for one rank, from step `start` to before `stop` (None: without end).

    batch_size counts clips of this rank, `repeats` of them a video. Every epoch is a permutation by
    (seed, epoch), cut into global batches, and these into ranks: any step can be computed, so a run
    continues where it stopped. What does not fill the last batch is left out; videos that do not fill
    one come again, as other draws. steps_per_epoch is a multiple of `accumulate`. Raises ValueError."""
    def __init__(self, length, batch_size, rank=0, world=1, seed=0, repeats=1, accumulate=1, start=0,
                 stop=None):
        if min(length, batch_size, repeats) < 1 or batch_size % repeats:
            raise ValueError(f"{batch_size} clips of {length} videos cannot be {repeats} clips a video")
        self.length, self.rank, self.world, self.seed = length, rank, world, seed
        self.start, self.stop, self.videos = start, stop, batch_size // repeats
        self.steps_per_epoch = max(1, length // (self.videos * world * accumulate)) * accumulate

    def __iter__(self):
        permuted = None
        for step in itertools.count(self.start) if self.stop is None else range(self.start, self.stop):
            epoch, step = divmod(step, self.steps_per_epoch)
            if epoch != permuted:
                order, permuted = torch.randperm(self.length, generator=seeded(self.seed, epoch)), epoch
            # the ranks' parts of a global batch lie side by side; after the last video comes the first
            first = (step * self.world + self.rank) * self.videos
            rounds = [divmod(i, self.length) for i in range(first, first + self.videos)]
            yield [(epoch, again * self.length + int(order[i])) for again, i in rounds]


# ============ loader: the workers ============
# They come from a server process that has one thread and everything imported (forkserver): none inherits a
# lock that a thread of the training process held, and a start takes a tenth of a second. Where there is no
# such server (Windows) they start from nothing (spawn). Either way what they are given must be picklable.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PRELOADED = ["torch.utils.data", "torchvision.transforms.v2", "av.filter", "numpy", "tqdm", "PIL.Image"]
# Exit codes; on Windows from 0xC0000000 on. SIGBUS is none: that is a full /dev/shm.
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)
IDLE = -1.0  # on the board: no video is read


def preload_workers():
    """Starts the fork server and its imports in the background: seconds ahead of the first worker."""
    if START_METHOD == "forkserver":
        from multiprocessing import forkserver  # not to be had everywhere
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def start_worker(_):
    """Runs first in a worker: it ends with the training process, even a killed one (torch looks only at
    the fork server), and not by Ctrl-C, which goes to all: the training process ends its workers."""
    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    gc.freeze()  # the collector would write to all that was imported before, and so copy it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


@contextlib.contextmanager
def announced(dataset, number, limit=READ_SECONDS):
    """Around the reading of a video: it stands on the board meanwhile, in the worker's row, with the
    time.monotonic() from which it counts as hanging. Raises VideoError if dataset.bad knows it."""
    if number in dataset.bad:
        raise VideoError(dataset.bad[number])
    worker = get_worker_info()
    row = torch.zeros(2) if worker is None or dataset.board is None else dataset.board[worker.id]
    row[1], row[0] = time.monotonic() + limit, number
    try:
        yield
    finally:
        row[0] = IDLE


def load(dataset, batches, workers=0, pin_memory=False, collate=collate):
    """Yields the batches of these lists of keys (an EpochSampler's, say), made by `workers` processes.

    A video that hangs or crashes its worker is noted in dataset.bad, the workers are started afresh, and
    the same batch is made again with another draw; with workers=0 it takes the program down. Raises
    VideoError if most videos are unreadable, WorkerError if a worker is killed from outside (by lack of
    memory, say), a batch cannot be handed over, or ATTEMPTS starts in a row gave no batch.

    dataset: Clips, or any with bad = {} and board = None that reads inside of announced(self, number)."""
    if workers:
        preload_workers()
    failed, keys, pending = 0, iter(batches), collections.deque()
    while failed < ATTEMPTS:
        # First again what was handed to workers that are gone.
        keys, pending = itertools.chain(pending, keys), collections.deque()
        dataset.board = torch.full((max(1, workers), 2), IDLE, dtype=torch.float64).share_memory_()
        # A timeout leaves the iterator whole: it lets the loader look after its workers now and then.
        made = iter(DataLoader(
            dataset, batch_sampler=(pending.append(k) or k for k in keys), num_workers=workers,
            multiprocessing_context=START_METHOD if workers else None, worker_init_fn=start_worker,
            timeout=WATCH_SECONDS if workers else 0, pin_memory=pin_memory, collate_fn=collate))
        since, blamed = time.monotonic(), {}
        try:
            while not blamed:
                try:
                    batch = next(made)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError, VideoError) as error:
                    if not workers:
                        raise
                    error.__traceback__ = None  # it would keep the workers alive for as long as the error
                    blamed = judge(error, getattr(made, "_workers", []), dataset.board.tolist(), since)
                else:
                    failed = 0
                    pending.popleft()
                    yield batch
                    since = time.monotonic()  # what was done with the batch is no waiting
        finally:
            del made  # ends the workers
        dataset.bad.update(blamed)
        failed += 1
    raise WorkerError(f"{failed} videos in a row crashed or hung their decoders")


def judge(error, workers, board, since):
    """What DataLoader's error means: {video: reason} to leave out (none: wait on), or an error to raise.
    board: a row (video, end of its time) for each of the workers; since: when the waiting began."""
    if isinstance(error, VideoError):  # a worker's comes with its traceback in the text
        raise VideoError(re.sub(r"(?s)^Caught .*Error: ", "", str(error)).strip()) from None
    if not isinstance(error, RuntimeError):  # a connection breaks some time before its worker has ended
        time.sleep(WATCH_SECONDS)
    # A crash or a hang is blamed on the video that stands on the board; other ends came from outside.
    now, blamed, ended = time.monotonic(), {}, []
    for worker, (video, limit) in zip(workers, board):
        code = worker.exitcode
        crashed = code is not None and (code in CRASHES or code >= 0xC0000000)
        if video != IDLE and (crashed or code is None and now > limit):
            blamed[int(video)] = f"its decoder {'crashed' if crashed else 'hung'}"
            worker.kill()  # one that hangs hears nothing else
        elif code is not None:
            ended.append(f"signal {-code}" if code < 0 else f"exit code {code}")
    full = "/dev/shm full (docker's --shm-size)?"
    if ended:
        raise WorkerError(f"a worker has ended ({', '.join(ended)}): out of memory, or is {full}") from None
    if not blamed and "timed out" not in str(error):
        raise error
    if not blamed and now > since + IDLE_SECONDS and all(video == IDLE for video, _ in board):
        raise WorkerError(f"no batch for {IDLE_SECONDS} s, though no worker is reading: is {full}") from None
    return blamed


# ============ prepare: re-encoding for quick random access ============
# What makes H.264 quick to enter anywhere: short groups; B-frames in a fixed pattern, which nothing depends
# on, so that unwanted ones are dropped undecoded; no arithmetic coding, no deblocking. It costs about 2 dB.
X264 = {"crf": "22", "x264-params": "scenecut=0:bframes=3:b-pyramid=none:b-adapt=0:ref=1:weightp=0:cabac=0:"
        "no-deblock=1:log-level=-1"}


def reencode(source, target, gop=16, short_side=256):
    """Writes a video anew as H.264 in mp4 without sound: a keyframe every `gop` frames, the short side at
    most `short_side`, rotation applied, times kept. Raises VideoError if the video is damaged, OSError if
    the target cannot be written; it appears whole."""
    def filters(width, height):
        shrink = min(1, short_side / min(width, height))  # nothing is enlarged
        width, height = [max(2, round(side * shrink / 2) * 2) for side in (width, height)]
        # One colour description for all files: the one that is assumed where none is given
        colour = "flags=bicubic:out_range=tv:out_color_matrix=bt601"
        return [("scale", f"{width}:{height}:{colour}"), ("format", "yuv420p")]

    def pictures(video):
        graph = FilterGraph(filters)
        with file_errors():
            for frame in video.decode():
                yield frame.pts if video.timed else None, graph(frame)

    part, stream, last = target + ".part", None, -2**62
    try:
        with Video(source) as video, av.open(part, "w", format="mp4") as output:
            rate = video.stream.average_rate or Fraction(25)  # raw streams have none
            for count, (pts, frame) in enumerate(pictures(video)):
                if stream is None:
                    shape = {"width": frame.width, "height": frame.height, "pix_fmt": "yuv420p"}
                    stream = output.add_stream("libx264", rate, {**X264, "g": str(gop)}, **shape)
                    stream.codec_context.thread_count = 1
                    stream.codec_context.time_base = video.stream.time_base if video.timed else 1 / rate
                frame.pts = last = max(last + 1, count if pts is None else pts)
                frame.time_base, frame.pict_type = stream.codec_context.time_base, 0  # the encoder chooses
                output.mux(stream.encode(frame))
            if stream is None:
                raise VideoError("it has no frames")
            output.mux(stream.encode(None))
        os.replace(part, target)
    except (av.FFmpegError, OSError) as error:  # the target's: the source's are VideoErrors by now
        raise OSError(f"{target}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


class Reencoder(Dataset):
    """Re-encodes video by video; items (number, None or why not). What is finished stays as it is."""
    def __init__(self, videos, targets, *options):
        self.videos, self.targets, self.options, self.bad, self.board = videos, targets, options, {}, None

    def __getitem__(self, key):
        number, target = key[1], self.targets.path(key[1])
        os.makedirs(os.path.dirname(target), exist_ok=True)
        try:
            with announced(self, number, limit=3600):
                if not os.path.exists(target):
                    reencode(self.videos.path(number), target, *self.options)
        except VideoError as error:
            return number, str(error)
        return number, None


def new_names(videos):
    """Names for the re-encoded videos, relative to their new folder: .mp4, none twice."""
    paths, top = [os.path.abspath(videos.path(i)) for i in range(len(videos))], os.path.abspath(videos.root)
    if not all(path.startswith(os.path.join(top, "")) for path in paths):  # a list of videos elsewhere
        top = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [os.path.relpath(path, top) for path in paths]
    bare = [os.path.splitext(name)[0] for name in names]  # but a.avi may lie beside a.mkv
    return [name + ".mp4" for name in (bare if len(set(bare)) == len(bare) else names)]


def prepare(source, directory, gop=16, short_side=256, workers=CORES):
    """Re-encodes a folder or list of videos into `directory`: same layout, labels and list name; restartable.

    Every file becomes .mp4. Unreadable and damaged ones are left out (of the new list too), and listed with
    their reasons in directory/unreadable.txt; their number is returned. Run again, it goes on with what is
    missing, and tries again what was unreadable. Raises ValueError."""
    videos, folder = find_videos(source), os.path.isdir(source)
    old, new = map(os.path.realpath, (source if folder else os.path.dirname(source), directory))
    if new == old or folder and new.startswith(os.path.join(old, "")):
        raise ValueError(f"{directory} must be outside of {source}, or both would be searched next time")
    if min(gop, short_side, workers) < 1:
        raise ValueError("--gop, --short-side and --workers must be at least 1")
    targets, kept, lost = Videos(str(directory), new_names(videos)), [], []
    for name in videos.classes or [""]:
        os.makedirs(os.path.join(directory, name), exist_ok=True)  # a class without videos keeps its number
    # As a data set, so that the loader deals with decoders that crash.
    work, jobs = Reencoder(videos, targets, gop, short_side), ([(0, number)] for number in range(len(videos)))
    for (number, reason), in tqdm(load(work, jobs, workers, collate=list), total=len(videos)):
        label = videos.labels[number].item()
        if reason:
            lost.append(f"{videos.path(number)}: {reason}\n")
        else:
            kept.append(targets.name(number) + (f" {label}\n" if label >= 0 else "\n"))
    for name, lines in (("unreadable.txt", lost), ("" if folder else os.path.basename(source), kept)):
        path = os.path.join(directory, name)
        if name:  # names can be any bytes
            with open(path + ".part", "w", encoding="utf-8", errors="surrogateescape") as file:
                file.writelines(lines)
            os.replace(path + ".part", path)
    return len(lost)


# ============ demo: videos that need no download ============
# Sixteen classes, appearance x motion: who knows only one of the two is right for one clip in four.
DEMO_TEXTURES, DEMO_MOTIONS = ("upright", "level", "checks", "dots"), ("still", "forth", "back", "shake")
DEMO_SIZE, DEMO_FRAMES = 80, 24                # pixels a side, frames a video
DEMO_TRAIN, DEMO_VAL, DEMO_MASKED = 40, 12, 4  # videos a class; validation videos of these that have masks
# mbtree would differ from run to run
DEMO_X264 = {"preset": "veryfast", "crf": "18", "bf": "2", "g": "24", "x264-params": "mbtree=0"}


def demo_clip(rng, texture, motion):
    """One video, uint8 RGB [T, H, W, 3], and its masks [T, H, W]: 0 background, 1 object, 2 distractor.

    A textured object rests, drifts down the diagonal or up it, or shakes, over a background that a camera
    pans across. Its class is texture and motion; colours, light, grain, size, place, speed are nuisance."""
    shape = DEMO_FRAMES, DEMO_SIZE, DEMO_SIZE
    number, y, x = (axis.astype(np.float32) for axis in np.ogrid[tuple(map(slice, shape))])
    t, y, x = number - (DEMO_FRAMES - 1) / 2, y - (DEMO_SIZE - 1) / 2, x - (DEMO_SIZE - 1) / 2

    def draw(low, high):
        return float(rng.uniform(low, high))  # Python's floats leave float32 arrays float32

    def over(picture, alpha, rgb):
        return picture + alpha * (rgb - picture)  # [3, T, H, W]

    def shades(dark, light):
        """A dark and a light shade of one hue, their values drawn from these ranges."""
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
    alpha = np.clip(draw(6, 10) - distance + 0.5, 0, 1)
    picture = over(picture, alpha, shades((0.3, 1), (0, 0))[0])
    mask = np.where(alpha > 0.5, np.uint8(2), np.uint8(0))

    # Object: anything from a disc to a rounded square. Within one tube it moves by about a quarter of its
    # texture's period when it drifts, and by half of it when it shakes.
    period, speed = draw(9.2, 10.8), draw(1.1, 1.45)
    shakes = 2.5 - 5 * (number // 2 % 2)
    shift = {"still": 0 * t, "forth": speed * t, "back": -speed * t, "shake": shakes}[motion]
    u, v = x - draw(-8, 8) - shift, y - draw(-8, 8) - shift
    square = draw(0, 0.6)
    distance = (1 - square) * np.hypot(u, v) + square * np.maximum(np.abs(u), np.abs(v))
    alpha = np.clip(draw(26, 36) - distance + 0.5, 0, 1)
    tilt, wave = draw(-0.1, 0.1), 2 * math.pi / period
    a = wave * (u * math.cos(tilt) + v * math.sin(tilt)) + draw(0, 6.3)
    b = wave * (v * math.cos(tilt) - u * math.sin(tilt)) + draw(0, 6.3)
    field = {"upright": lambda: np.sin(a), "level": lambda: np.sin(b),
             "checks": lambda: 2 * np.sin(a) * np.sin(b),
             "dots": lambda: np.cos(a) + np.cos(b) - 0.8}[texture]()
    dark, light = shades((0.1, 0.4), (0.75, 1))
    picture = over(picture, alpha, over(dark, np.clip(1.2 * field + 0.5, 0, 1), light))
    mask[alpha > 0.5] = 1

    # Light that changes, and grain.
    light = draw(0.75, 1.1) * (1 + draw(0, 0.12) * np.sin(draw(0.1, 0.5) * t + draw(0, 6.3)))
    picture *= 255 * light
    picture += draw(2, 6) * rng.standard_normal(shape, dtype=np.float32)
    return np.ascontiguousarray(picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)), mask


def write_demo_clip(directory, seed, split, texture, motion, number):
    """Writes directory/split/<class>/NN.mp4, and for some of val's its frames and masks as DAVIS does."""
    key = [seed, split == "val", DEMO_TEXTURES.index(texture), DEMO_MOTIONS.index(motion), number]
    frames, masks = demo_clip(np.random.default_rng(key), texture, motion)
    path = os.path.join(directory, split, f"{texture}-{motion}", f"{number:02}.mp4")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open(path, "w", options={"fflags": "bitexact"}) as file:  # no dates in the header
        shape = {"width": DEMO_SIZE, "height": DEMO_SIZE, "pix_fmt": "yuv420p", "thread_count": 1}
        stream = file.add_stream("libx264", 12, DEMO_X264, **shape)
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    for kind, pictures, suffix in (("JPEGImages", frames, "jpg"), ("Annotations", masks, "png")):
        folder = os.path.join(directory, "davis", kind, f"{texture}-{motion}-{number:02}")
        for i, picture in enumerate(pictures if split == "val" and number < DEMO_MASKED else ()):
            os.makedirs(folder, exist_ok=True)
            Image.fromarray(picture).save(os.path.join(folder, f"{i:05}.{suffix}"), quality=95)


def write_demo(directory, seed=0):
    """Writes the demo's videos, the same for a seed: DIR/{train,val}/<texture>-<motion>/NN.mp4.

    DIR/davis has the first DEMO_MASKED validation clips of each class once more, with exact masks (values
    as demo_clip's), in DAVIS's layout: JPEGImages/<class>-NN/00000.jpg, Annotations/<class>-NN/00000.png.
    A finished DIR of the same seed is reused; a folder with anything else in it is a ValueError."""
    parent, name = os.path.split(os.path.abspath(directory))
    # an empty file that says what was written
    done = os.path.join(directory, f"seed-{seed}-{DEMO_TRAIN}+{DEMO_VAL}-davis-{DEMO_MASKED}.txt")
    # All is written beside its place and moved there at once. What a killed process left goes after an hour.
    for left in glob.glob(os.path.join(glob.escape(parent), name + ".unfinished-*")):
        if time.time() - os.stat(left).st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    if os.path.exists(done):
        return
    if os.path.isdir(directory) and os.listdir(directory):
        raise ValueError(f"{directory} is not empty and not the demo of seed {seed}: name another")
    jobs = [(split, *job) for split, count in (("train", DEMO_TRAIN), ("val", DEMO_VAL))
            for job in itertools.product(DEMO_TEXTURES, DEMO_MOTIONS, range(count))]
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=name + ".unfinished-", dir=parent) as unfinished:
        with ThreadPoolExecutor(CORES) as pool:  # NumPy and the encoder leave Python's lock
            list(pool.map(lambda job: write_demo_clip(unfinished, seed, *job), jobs))
        open(os.path.join(unfinished, os.path.basename(done)), "w").close()
        os.chmod(unfinished, 0o755)  # a temporary folder is its owner's only
        try:
            os.rename(unfinished, directory)
        except OSError:
            if not os.path.exists(done):  # another process was quicker, and has written the same
                raise


# ============ bench, command line ============
def bench(source, seconds=10.0, rate=100.0, frames=16, stride=4, size=224):
    """Reads training clips in this process and prints what one costs, and the cores for `rate` a second."""
    videos, count, bad = find_videos(source), 0, {}
    clips, sampler = Clips(videos, frames, stride, size), iter(EpochSampler(len(videos), 1))
    clips[next(sampler)[0]]  # libraries and disk warm up
    began, cpu = time.monotonic(), time.process_time()
    while time.monotonic() - began < seconds:
        bad.update(clips[next(sampler)[0]]["bad"])
        count += 1
    cpu = (time.process_time() - cpu) / count
    print(f"{len(videos)} videos, {count} clips of {frames} frames read, {len(bad)} unreadable videos met")
    print(f"{1 / cpu:.1f} clips per CPU-second ({1000 * cpu:.1f} ms a clip); "
          f"{rate:g} clips a second take {rate * cpu:.1f} cores")


def main():
    """The command line: commands for three functions, flags for their parameters that have a default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    functions = {"prepare": prepare, "bench": bench, "demo": write_demo}
    for command, function in functions.items():
        sub = commands.add_parser(command, help=function.__doc__.split("\n")[0], description=function.__doc__)
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.default is parameter.empty:
                sub.add_argument(name)
            else:
                sub.add_argument("--" + name.replace("_", "-"), type=type(parameter.default),
                                 default=parameter.default, help=f"default: {parameter.default}")
    options = vars(parser.parse_args())
    try:
        if lost := functions[options.pop("command")](**options):
            sys.exit(f"data.py: {lost} unreadable videos were left out, see unreadable.txt in the new folder")
    except ValueError as error:
        parser.error(str(error))
    except (VideoError, OSError, RuntimeError) as error:
        sys.exit(f"data.py: {str(error).strip().splitlines()[-1]}")
    except KeyboardInterrupt:
        sys.exit("data.py: interrupted; prepare goes on from here with the same command")


if __name__ == "__main__":
    main()
