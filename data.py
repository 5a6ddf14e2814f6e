"""Videos for SIGMA: exact frames out of real files, the paper's sampling, and tools for a data set.

    python data.py prepare SRC DST   re-encodes a data set so that any clip is quick to reach
    python data.py bench PATH        says what reading a clip costs
    python data.py demo DIR          writes the demo's videos

From files to batches, which is also the order of this file:

    clips = Clips(find_videos(PATH))
    batches = load(clips, EpochSampler(len(clips), 8), workers=8)       # without end
    for batch in batches_to_device(batches, torch.device("cuda")):
        video = normalize(batch["video"])                               # [8, 3, 16, 224, 224]

Below a line of === come `prepare`, the demo and the command line. A clip is a function of (seed, epoch,
index) and of the files. A file that cannot be read is named in batch["bad"] (nothing is printed), in training
also replaced. One whose end is missing is used as far as it goes, and named if less than a clip is left."""
import argparse
import bisect
import colorsys
import errno
import gc
import hashlib
import io
import math
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import uuid
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import accumulate, chain, islice, product, tee
from multiprocessing.pool import ThreadPool
from os.path import abspath, commonpath, dirname, exists, getsize, isdir, isfile, join, relpath, splitext
from pathlib import Path
from time import monotonic

import av
import av.filter
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

av.logging.set_level(av.logging.PANIC)  # FFmpeg complains frame by frame; a VideoError says it once

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .3gp .ogv .gif".split())
# Formats that hold a video themselves. Playlists (concat, hls, dash) are left out: they open other files.
FORMATS = "mov,matroska,avi,mpeg,mpegts,asf,flv,ogg,gif,h264,hevc,m4v,mpegvideo,vc1,ivf,obu,rm,dv,mxf,nut"
# Needed before PyAV 19: titles in an old encoding are no error. (Strings will do: versions have two digits.)
LENIENT = {"metadata_errors": "ignore"} if av.__version__ < "19" else {}
COVER = av.stream.Disposition.attached_pic  # marks a stream that is only a still picture
MAX_PIXELS = 8192 * 8192  # of a frame: a damaged header can ask for any amount of memory
MAX_KEPT_BYTES = 64 << 20  # the packets of larger files are not kept in memory
ATTEMPTS = 20  # draws of a video, or starts of the workers, that may fail in a row

# How many cores this process may use: those it is bound to, and no more than Docker or Slurm grants it.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
with suppress(OSError, ValueError):
    # Linux writes what is granted as "quota period"; the quota is "max" where there is no limit.
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    CORES = min(CORES, math.ceil(int(quota) / int(period)))


class VideoError(Exception):
    """What is wrong with a video file, in one line without its path."""


class WorkerError(RuntimeError):
    """The loader cannot go on: its workers fail, or too many videos crash or hang them."""


@contextmanager
def file_errors():
    """Turns what FFmpeg, PyAV, Pillow (SyntaxError) and the system raise about a file into VideoError.

    A lost disk or a full memory becomes one, too. We use it only around code that touches files and frames:
    errors that wrong arguments or bugs raise elsewhere stay what they are."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, LookupError,
            SyntaxError) as error:
        raise VideoError(one_line(error)) from None


def one_line(error):
    """The text of an exception on one line. The path that an OSError would add is left out."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


# ============ what a file holds ============
# FFmpeg, called through PyAV, does the work. Its words, each explained once:
#
#   container          an open file, and the format that holds it together: mp4, AVI, Matroska
#   stream             one track of a file: the video, the sound, subtitles
#   codec              a way to compress video (H.264, AV1), and here the decoder for it
#   packet             a compressed piece of a stream; of a video, as a rule, one frame
#   demuxing           taking packets out of a file, which is quick; to decode them to frames is slow
#   presentation time  when the frame of a packet is to be shown, in ticks of the stream's clock (`pts`)
#   keyframe           a frame that needs no other one, so that decoding can start there
#   B-frame            a frame made from an earlier and a later one. The file has the later one first, so
#                      packets come in the order of decoding, and their times tell the order of showing
#   open group         B-frames that follow a keyframe in the file but are shown before it, and need frames
#                      from before the keyframe, too
#   edit list          a note in an mp4 that some frames are decoded but not shown; the decoder drops them
#
# The truth is a decode of the whole file: frame n is the n-th to come out, from 0. That takes seconds. To
# start at a keyframe shortly before the wanted frames takes milliseconds, but needs times that are right. So
# each opening demuxes (that is, reads) the whole file, and the functions of `Index` say how far its times can
# be trusted.

class Index:
    """What demuxing says about a video. Packets are numbered in the order of the file.

    packets      the packets themselves; an empty list unless `keep`
    times        their presentation times, None where the file has none
    keys         numbers of those that the file calls keyframes
    shown        numbers of those that are shown, so not hidden by an edit list
    shown_times  their times
    smallest     bytes of the smallest packet
    cut          why the end of the video is missing; None if nothing is missing"""
    def __init__(self, container, stream, keep):
        self.codec = stream.codec_context
        self.packets = []
        self.cut = None
        rows = []
        newest = None  # the last packet in the file
        ends = {}  # the last packet of every stream
        try:
            for packet in container.demux():
                if packet.size == 0:  # the end of a stream, or in AVI "the last frame again"
                    continue
                ends[packet.stream.index] = newest = packet
                if packet.stream.index == stream.index:
                    rows.append((packet.pts, packet.is_keyframe, packet.is_discard, packet.size))
                    if keep:
                        self.packets.append(packet)
        except (av.FFmpegError, OSError) as error:  # the video counts as cut here
            self.cut = one_line(error)
        if newest and newest.is_corrupt:
            self.cut = self.cut or "it ends in the middle of a frame"
            if newest.stream.index == stream.index:
                rows.pop()
        if stops_early(container, ends.values()):
            self.cut = self.cut or "it is cut off"
        if not rows:
            raise VideoError(self.cut or "it has no frames")
        self.times, keys, hidden, sizes = zip(*rows)
        self.keys = [number for number, key in enumerate(keys) if key]
        self.shown = [number for number, hide in enumerate(hidden) if not hide]
        self.shown_times = [self.times[number] for number in self.shown]
        self.smallest = min(sizes)

    def times_tell_frames_apart(self):
        """Whether every frame has a time, and no other frame has the same."""
        return None not in self.times and len(set(self.shown_times)) == len(self.shown)

    def times_are_of_decoding(self):
        """Whether the times may say when to decode, as in AVI and in files copied from AVI: they ascend, and
        yet frames may be reordered (has_b_frames). With B-frames the codec mpeg4 (XviD, DivX; not the format
        mp4) is never trusted, as most of its files were AVI once."""
        ascend = self.shown_times == sorted(self.shown_times)
        return self.codec.has_b_frames and (ascend or self.codec.name == "mpeg4")

    def packets_may_not_be_frames(self):
        """Whether only a decode can tell how many frames come out."""
        if self.codec.name == "mpeg4" and self.smallest < 20:
            return True  # so small a packet may say "not coded", and shows nothing
        if self.codec.name == "vp8":
            return True  # some of its packets are never shown, other frames only refer to them
        return self.shows_before_keyframe()

    def shows_before_keyframe(self):
        """Whether packets come, or frames are shown, before the first keyframe, as in an excerpt: what they
        are made from may be missing. Or whether a keyframe is shown before an earlier packet, as where
        recordings with overlapping clocks were joined. To be asked only where every packet has a time."""
        if not self.keys or self.shown[0] < self.keys[0]:
            return True
        latest = list(accumulate(self.times, max))  # up to each packet
        # Where an edit list hides packets, their times may lie anywhere, and nothing was joined.
        if len(self.shown) == len(latest) and any(self.times[key] < latest[key] for key in self.keys):
            return True
        return min(self.shown_times) < self.times[self.keys[0]]


def stops_early(container, last_packets):
    """Whether every stream, so not the video alone, stops well before the length in the header. That is the
    sign of a cut Matroska file, whose last half packet FFmpeg drops silently."""
    early = 0.9 * (container.duration or 0) / 1e6 - 1  # seconds, from microseconds
    return "matroska" in container.format.name and all(
        packet.pts is None or (packet.pts + packet.duration) * packet.time_base < early
        for packet in last_packets)


# ============ reading its frames ============
# `Video` decides, by the index, from where it decodes; `read` makes clips. If you want frames alone, call
# `read_clip` below. To copy that, take VideoError, everything from file_errors to read_clip, frame_numbers,
# square_crop, the constants FORMATS to MAX_KEPT_BYTES, and the imports. PyAV must be 15 or newer.

class Video(AbstractContextManager):
    """An open video, to be closed by `with`. `frames` is how many frames it shows (at most, unless `exact`),
    `read` gives any of them. A video whose end is missing (index.cut) is as long as what is left; only a clip
    that reaches beyond that is an error.

    `times` says when frame 0, 1, ... is shown, if decoding can start at keyframes. None: the file's times
    cannot be trusted, and frames are counted from the beginning. Raises VideoError."""
    def __init__(self, path):
        self.path = path
        self.opened = ExitStack()
        try:
            with file_errors():
                size = getsize(path)
                if size == 0 or not isfile(path):  # a pipe would block
                    raise VideoError("it is empty, or no file: folders of frames, for one, cannot be read")
                self.open()
                self.keep = size <= MAX_KEPT_BYTES
                self.index = Index(self.container, self.stream, self.keep)
            # fresh: the decoder is unused, and packet 0 comes next. Indexing leaves the file at its end: then
            # only packets that were kept begin at 0 again.
            self.fresh = self.keep
            self.decide()
        except BaseException:
            self.opened.close()  # a long run meets many broken files, and must not run out of descriptors
            raise

    def __exit__(self, *_):
        self.opened.close()

    @file_errors()
    def open(self):
        """Opens the file (again), with an unused decoder. What was open stays open: packets refer to it."""
        limits = {"protocol_whitelist": "file", "format_whitelist": FORMATS}  # no file leads to another one
        try:  # "file:": a name with a colon is no address
            container = av.open(f"file:{self.path}", container_options=limits, **LENIENT)
        except ValueError as error:  # among them "Invalid argument", for a format that is not allowed
            raise VideoError(f"{one_line(error)}: it is damaged, or no video but a picture or playlist")
        self.container = self.opened.enter_context(container)
        self.stream = stream = container.streams.best("video")  # the first may be a cover picture
        if stream is None or stream.codec_context is None or stream.disposition & COVER:
            raise VideoError("it has no video that FFmpeg can decode")
        self.codec = stream.codec_context
        self.codec.thread_count = 1  # the loader's workers are the parallelism
        self.codec.options = {"max_pixels": str(MAX_PIXELS)}
        self.fresh = True

    def decide(self):
        """Finds `frames`, and `times` where they can be trusted."""
        index = self.index
        if not index.shown:
            raise VideoError(index.cut or "it has no frames")
        self.times = None
        self.frames = len(index.shown)
        self.exact = True  # whether `frames` is sure
        if not index.times_tell_frames_apart():
            self.count()
        elif index.times_are_of_decoding():
            if index.shows_before_keyframe():
                self.count()
            else:  # one frame a packet is assumed (to count costs as much again); if fewer, the last repeats
                self.exact = False
        else:
            self.times = sorted(index.shown_times)
            if index.packets_may_not_be_frames() or self.is_interlaced():
                if self.count() != self.times:  # a full decode, each time such a file is opened
                    self.times = None

    def is_interlaced(self):
        """Whether this may be H.264 of camcorders and broadcast, which can put the two fields of a frame (its
        even and its odd lines) into two packets. A wrong yes is safe, but costs a full decode."""
        if self.codec.name != "h264":
            return False
        if hasattr(self.codec, "field_order"):
            return self.codec.field_order != 1  # 1: known to be progressive
        return any(frame.interlaced_frame for frame in islice(self.decode(), 2))  # PyAV before 18

    def count(self):
        """Decodes the whole file, sets `frames`, returns their times. If that fails, so does Video()."""
        times = [frame.pts for frame in self.decode()]
        self.frames = len(times)
        return times

    # ---- packets and decoder ----
    def packets_from(self, first):
        """The video's packets from number `first` on."""
        if self.keep:
            return self.index.packets[first:]
        if first > 0:  # of a large file: we jump to the keyframe
            time = self.index.times[first]
            packets = self.demux(time)
            for packet in packets:
                if packet.pts == time:
                    return chain([packet], packets)
            self.open()  # in some ts and mpg the jump lands too late
        return islice(self.demux(), first, None)

    def demux(self, time=None):
        """Yields the video's packets from the start, or from about this time on."""
        with file_errors():
            if time is not None:
                self.container.seek(time, stream=self.stream)
            for packet in self.container.demux(self.stream):
                if packet.size > 0:
                    yield packet

    def decode(self, first=0, end=None, wanted=None):
        """Yields what the decoder makes of the packets from `first` to before `end`, in the order of showing.

        wanted: times of the frames that matter. Of H.264 and HEVC we then skip frames that are neither wanted
        nor needed to decode others (NONREF), a quarter to half of the work."""
        if first == 0 and not self.fresh:
            self.open()  # goes back to the start; and a used decoder may remember an old palette, say
        if end is None:
            end = len(self.index.times)
        packets = islice(self.packets_from(first), end - first)
        if not self.fresh:
            self.codec.flush_buffers()
        self.fresh = False
        for packet in chain(packets, [None]):  # None asks for the frames that the decoder still holds back
            if self.codec.name in ("h264", "hevc"):  # AV1's decoder reads this setting only when it opens
                needed = wanted is None or packet is None or packet.pts in wanted
                self.codec.skip_frame = "DEFAULT" if needed else "NONREF"
            with file_errors():
                frames = self.codec.decode(packet)
            yield from frames

    def decode_all(self):
        """Yields every frame from the beginning. Raises VideoError where the decoder reports damage (of some
        it says nothing), and where frames are missing, extra or late, if `times` or `exact` can tell."""
        count = 0
        for frame in self.decode():
            if frame.is_corrupt:
                raise VideoError(f"frame {count} is damaged")
            if self.times and self.times[count:count + 1] != [frame.pts]:
                raise VideoError(f"frame {count} is missing, or its time is wrong")
            yield frame
            count += 1
        if count == 0 or self.exact and count < self.frames:
            raise VideoError(self.index.cut or f"frame {count} is missing")

    # ---- frames by number: both yield (n, frame) for these ascending numbers n ----
    def from_beginning(self, numbers):
        for n, frame in enumerate(self.decode_all()):
            if n in numbers:
                yield n, frame
            if n == numbers[-1]:
                return
        if self.index.cut:
            raise VideoError(self.index.cut)
        for number in numbers:  # there were fewer frames than packets: the last frame is repeated
            if number > n:
                yield number, frame

    def from_keyframes(self, numbers):
        """Starts at the last keyframe before each wanted frame. Raises VideoError if decoding cannot start
        there, if a frame is marked as damaged, or if a wanted one does not come out."""
        for first, end, number_at in self.runs(numbers):
            start = self.index.times[first]
            newest = start - 1  # no frame yet
            for frame in self.decode(first, end, number_at):
                if frame.pts is not None and frame.pts < start:
                    continue  # an open group's: it needs frames from before the keyframe
                if first > 0 and newest < start:  # the first frame of this run
                    self.check_entry(frame)
                if frame.pts is None or frame.pts <= newest or frame.is_corrupt:
                    raise VideoError("a frame is damaged, or its time is")
                newest = frame.pts
                if newest in number_at:
                    yield number_at.pop(newest), frame  # decode reads number_at too, but is past this packet
            if number_at:
                raise VideoError(f"frame {min(number_at.values())} is missing")

    def check_entry(self, frame):
        """Raises VideoError if decoding cannot start at this frame. Some files call every packet a keyframe
        (mp4 or AVI without a table of keyframes, H.263). Frames of the format pal8 need a palette, the table
        of their colours, that only packet 0 brings."""
        if not frame.key_frame or frame.format.name == "pal8":
            raise VideoError("its keyframes are no good places to start")

    def runs(self, numbers):
        """Runs of packets that hold these frames, as from_keyframes unpacks them: [first packet, the packet
        after the last, {time of a frame: its number}]. Each starts at the last keyframe that comes before its
        first frame both in the file and in time."""
        times, keys = self.index.times, self.index.keys
        packet_of = {times[packet]: packet for packet in self.index.shown}
        runs = []
        for n in numbers:
            time = self.times[n]
            packet = packet_of[time]
            before = keys[:bisect.bisect_right(keys, packet)]
            first = next((key for key in reversed(before) if times[key] <= time), 0)
            if not runs or first > runs[-1][1]:  # the packets from the last run's end to here are skipped
                runs.append([first, 0, {}])
            run = runs[-1]
            run[1] = max(run[1], packet + 1)
            run[2][time] = n
        return runs

    def read(self, views, size=224):
        """A list of one uint8 NumPy array [3, T, size, size] (RGB) for every view, by one decode for all (a
        second one, from the beginning, if keyframes fail). read_clip and Clips' transform have T before 3.

        views: list of (T frame numbers in any order, crop); below 0 stands frame 0, beyond the end the last.
        crop: (x, y, width, height) of the picture after rotation, or a function of its width and height,
        or None: the centred square. Raises VideoError, and ValueError for a crop that is not inside."""
        end = max(max(numbers) for numbers, _ in views)
        if self.index.cut and end >= self.frames:
            raise VideoError(self.index.cut)
        limit = self.frames - 1 if self.exact else end
        clips = [ClipMaker([max(0, min(n, limit)) for n in numbers], crop, size) for numbers, crop in views]
        wanted = sorted({n for clip in clips for n in clip.numbers})
        ways = [self.from_keyframes, self.from_beginning] if self.times else [self.from_beginning]
        for way in ways:
            try:
                for n, frame in way(wanted):
                    for clip in clips:
                        clip.take(n, frame)
                return [clip.pictures for clip in clips]
            except VideoError as error:
                failure = error
        raise VideoError(f"of its {self.frames} frames some cannot be decoded: {failure}")


class FilterGraph:
    """Rotates frames as they are to be displayed, and filters them, by libavfilter, a part of FFmpeg. Frames
    of one size and pixel format share a graph: a chain of filters, made once.

    filters: a function of the displayed width and height -> [(name of a filter, its arguments), ...]."""
    def __init__(self, filters):
        self.filters = filters
        self.graphs = {}

    def __call__(self, frame):
        key = (frame.width, frame.height, frame.format.name)
        if key not in self.graphs:
            turns, width, height = upright(frame)
            self.graphs[key] = build_graph(frame, turns + self.filters(width, height))
        with file_errors():
            self.graphs[key].push(frame)
            return self.graphs[key].pull()


class ClipMaker(FilterGraph):
    """One clip in the making: `pictures`, uint8 [3, T, size, size], of the frames with these T numbers."""
    def __init__(self, numbers, crop, size):
        super().__init__(partial(crop_filters, crop=crop, size=size))
        self.numbers = numbers
        self.pictures = np.empty((3, len(numbers), size, size), np.uint8)

    def take(self, n, frame):
        """Puts frame n wherever the clip shows it, perhaps several times or never."""
        positions = [t for t, number in enumerate(self.numbers) if number == n]
        if positions:
            frame = self(frame)  # it is rotated, cropped and scaled now
            for channel, plane in zip((1, 2, 0), frame.planes):  # gbrp's planes are green, blue, red
                lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
                self.pictures[channel, positions] = lines[:, :frame.width]  # lines are padded


@file_errors()
def build_graph(frame, steps):
    graph = av.filter.Graph()
    if hasattr(graph, "threads"):  # PyAV before 16 starts idle threads instead
        graph.threads = 1
    if frame.format.components[0].bits > 8:  # libavfilter's crop at an odd x would shift their colours
        steps = [("format", "yuv444p16le"), *steps]
    links = [graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name,
                              time_base=Fraction(1, 25))]  # any will do: nobody reads times from the graph
    for step in [*steps, ("buffersink",)]:
        links.append(graph.add(*step))
    graph.link_nodes(*links).configure()
    return graph


def upright(frame):
    """Filters that rotate or mirror a frame as its file asks, and its width and height after that."""
    turns = []
    width = frame.width
    height = frame.height
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        # A pixel at (x, y) is displayed at (ax + cy, bx + dy).
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            turns.append(("transpose", "cclock_flip"))  # swaps the axes, and nothing else
            width, height = height, width
            a, d = c, b
        if a < 0:
            turns.append(("hflip",))
        if d < 0:
            turns.append(("vflip",))
    return turns, width, height


def crop_filters(width, height, crop, size):
    """Filters that take a crop (see Video.read) of a picture and scale it to size x size, in RGB."""
    if crop is None:
        crop = square_crop
    if callable(crop):
        crop = crop(width, height)
    x, y, w, h = crop
    if w < 1 or h < 1 or not (0 <= x <= width - w and 0 <= y <= height - h):
        raise ValueError(f"the crop {x, y, w, h} is not inside of the picture, {width}x{height}")
    return [("crop", f"{w}:{h}:{x}:{y}:exact=1"),
            ("scale", f"{size}:{size}:flags=bilinear"),
            ("format", "gbrp")]  # a plane for each colour takes half the time of interleaved RGB


def read_clip(path, frames=16, stride=4, start=None, crop=None, size=224, generator=None):
    """uint8 RGB tensor [frames, 3, size, size]: frames start, start + stride, ... in the order of showing,
    rotated as the file asks; stride is at least 1. Each call reads the whole file.

    Beyond the end the last frame is repeated, or VideoError if the file is cut off there. start: None draws
    one (from `generator`, else PyTorch's own). crop: as in Video.read, scaled bilinearly to a square. Raises
    VideoError, without the path, if the file cannot be read, ValueError for arguments out of range."""
    if min(frames, stride, size) < 1 or start is not None and start < 0:
        raise ValueError("frames, stride or size below 1, or start below 0")
    with Video(path) as video:
        if start is None:
            place = torch.rand((), generator=generator).item()
            start = frame_numbers(video.frames, frames, stride, place)[0]
        numbers = range(start, start + frames * stride, stride)
        [clip] = video.read([(numbers, crop)], size)
    return torch.from_numpy(clip).transpose(0, 1).contiguous()


# ============ clip: which frames, which part of the picture ============
def frame_numbers(total, frames, stride, place=0.5):
    """A list of `frames` frame numbers out of `total`; with a stride they may run beyond a short video.

    stride >= 1: every stride-th frame (Kinetics); place, 0 to 1, says where in the video the clip lies.
    stride 0: one frame out of each of `frames` equal parts of the video (Something-Something); place, a
    number or a tensor [frames], says where in its part."""
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


# Pretraining's crops, as in the authors' release: width and height are shares of the short side, at most one
# step of CROP_SCALES apart. A crop's place counts quarters of the room beside it: even numbers are
# corners, middles of edges and the centre, odd ones lie between centre and corners.
CROP_SCALES = (1, 0.875, 0.75, 0.66)
CROP_SHAPES = [(w, h) for w in CROP_SCALES for h in CROP_SCALES if abs(w - h) < 0.2]
CROP_PLACES = [(x, y) for x in range(5) for y in range(5) if x % 2 == y % 2]


def draw_multi_scale(generator):
    """Pretraining's crop: a function (displayed width, height) -> (x, y, w, h)."""
    scale_w, scale_h = CROP_SHAPES[torch.randint(len(CROP_SHAPES), (), generator=generator)]
    x, y = CROP_PLACES[torch.randint(len(CROP_PLACES), (), generator=generator)]

    def crop(width, height):
        short = min(width, height)
        w = max(1, int(short * scale_w))
        h = max(1, int(short * scale_h))
        return x * ((width - w) // 4), y * ((height - h) // 4), w, h
    return crop


def draw_resized(generator):
    """Fine-tuning's crop (Inception's, as in VideoMAE): 8 to 100% of the area, aspect 3/4 to 4/3."""
    draws = torch.rand(10, 4, generator=generator).tolist()

    def crop(width, height):
        for area, aspect, x, y in draws:  # the first that fits counts
            pixels = (0.08 + 0.92 * area) * width * height
            ratio = (4 / 3) ** (2 * aspect - 1)
            w = max(1, round((pixels * ratio) ** 0.5))
            h = max(1, round((pixels / ratio) ** 0.5))
            if w <= width and h <= height:
                return int(x * (width - w + 1)), int(y * (height - h + 1)), w, h
        return square_crop(width, height)
    return crop


def seeded(*key):
    """A torch.Generator that is a function of these integers, Python's or NumPy's."""
    digest = hashlib.blake2b(repr(tuple(map(int, key))).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)  # 63 bits fit an int64


# ============ data set: folders and lists ============
class Videos:
    """Paths, labels (int64 [n], -1: none) and class names (a list, or None) of a data set.

    `names` is the bytes of all names in one tensor, which workers share: each would copy strings."""
    def __init__(self, root, names, labels=None, classes=None):
        encoded = list(map(os.fsencode, names))
        self.root = root
        self.names = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self.ends = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        if labels is None:
            labels = [-1] * len(names)
        self.labels = torch.tensor(labels)
        self.classes = classes

    def __len__(self):
        return len(self.labels)

    def name(self, i):
        """A video's path as the list has it, or relative to the folder."""
        return os.fsdecode(self.names[self.ends[i]:self.ends[i + 1]].numpy().tobytes())

    def path(self, i):
        return join(self.root, self.name(i))


def find_videos(source, classes=None):
    """The Videos of a folder or of a list file. Raises ValueError where there are none.

    A folder is searched to any depth for files with a video's suffix; hidden ones are skipped. Its class
    folders become labels 0, 1, ... by name, or those of `classes` (another split's); without class folders,
    or with videos beside them, there are no labels. A list has a path on each line, then perhaps a space,
    comma or tab and an integer, the label. Relative paths start at the list's folder. A line that repeats is
    one more video. Lines that start with `# `, or with # and no existing path, are comments."""
    source = os.fspath(source)
    if isdir(source):
        return find_in_folder(source, classes)
    if not exists(source) or source.lower().endswith(SUFFIXES):
        raise ValueError(f"{source}: is no folder or list of videos")
    return find_in_list(source)


LIST_LINE = re.compile(r"(.+?)(?:(?<![,\s])[,\s]+([+-]?\d{1,6}))?")  # a path, and perhaps a label


def find_in_list(source):
    folder = dirname(source)
    names = []
    labels = []
    label_of = {}
    first_line = {}  # whether it has a label -> the first such line
    with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:  # names can be any bytes
        for number, line in enumerate(map(str.strip, file), 1):
            if "\0" in line:
                raise ValueError(f"{source}, line {number}: this is no text")
            if not line:
                continue
            name, label = LIST_LINE.fullmatch(line).groups("-1")  # the label is "-1" where there is none
            label = int(label)
            # HMDB51 has videos whose names begin with #.
            if line[0] == "#" and not (line[1:2].strip() and exists(join(folder, name))):
                continue
            names.append(name)
            labels.append(label)
            if label_of.setdefault(name, label) != label:
                raise ValueError(f"{source}, line {number}: a second label for {name}")
            first_line.setdefault(label >= 0, f"line {number} ({line:.60})")
    if not names:
        raise ValueError(f"{source}: has no videos")
    if len(first_line) == 2:
        raise ValueError(f"{source}, {first_line[False]}: has no number as its label, unlike "
                         f"{first_line[True]}. Is it a header?")
    return Videos(folder, names, labels)


def find_in_folder(source, classes):
    names = []
    errors = []
    folders = None  # those directly in `source`
    for folder, inside, files in os.walk(source, followlinks=True, onerror=errors.append):
        inside[:] = sorted(name for name in inside if name[0] != "." and not is_circle(Path(folder, name)))
        folders = folders or list(inside)
        for name in sorted(files):
            if name[0] != "." and name.lower().endswith(SUFFIXES):
                names.append(relpath(join(folder, name), source))
    if errors or not names:
        raise ValueError(f"{source}: {errors[0] if errors else f'holds no videos {SUFFIXES}'}")
    tops = [name.partition(os.sep)[0] for name in names]  # classes, or the videos themselves
    if {"train"} < set(tops) <= {"train", "val", "valid", "validation", "test"}:
        raise ValueError(f"{source}: its folders are splits, no classes: name one of them, as {source}/train")
    if not all(os.sep in name for name in names):
        return Videos(source, names)
    numbers = {name: number for number, name in enumerate(classes or folders)}
    unknown = set(tops) - set(numbers)
    if unknown:
        raise ValueError(f"{source}: {min(unknown)} is no known class ({len(numbers)})")
    return Videos(source, names, [numbers[top] for top in tops], list(numbers))


def is_circle(path):
    """Whether this folder is a link to one that it lies in."""
    return path.is_symlink() and path.resolve() in map(Path.resolve, path.parents)


# ============ data set: clips ============
WHICH, WHERE, MASK, AUGMENT = range(4)  # a part of each seed, so that no two uses share random numbers


@dataclass
class Clips(Dataset):
    """Clips of videos, each a function of (seed, epoch, index) and of the files. `clips[epoch, index]` is one
    item:

        video  uint8 [R, 3, T, size, size], RGB, for `normalize`
        mask   bool [R, N], N tokens: what mask(generator=...) returns, a picklable callable that knows both
        label  int, -1 for none
        index  int, number of the video read; -1: none (evaluation only)
        bad    list of (path, reason): files that could not be read; tried again, unless in `self.bad`

    Training: R = repeats views from one decoding, each with its own random start and `draw_crop`, then
    `transform`, a picklable uint8 [T, 3, size, size] -> the same, by torch's global generator. An unreadable
    file is replaced by another draw; where ATTEMPTS in a row fail there is a VideoError.
    Evaluation: R = clips x crops views, evenly spread in time and place (1 x 1: the centre). An unreadable
    file gives zeros with label and index -1: leave it out of the score.
    An index beyond the videos is another draw of index % len."""
    videos: Videos
    frames: int = 16
    stride: int = 4
    size: int = 224
    seed: int = 0
    train: bool = True
    repeats: int = 1
    views: tuple = (1, 1)  # numbers of clips and of crops, for evaluation
    mask: object = None
    draw_crop: object = draw_multi_scale
    transform: object = None

    def __post_init__(self):
        # Filled by `load`, and no item's list: {number: why} of videos that hung or crashed a worker twice.
        self.bad = {}  # these are not opened again

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        generator_for = partial(seeded, self.seed, *key)
        item = self.read(int(key[1]) % len(self), generator_for)
        if self.train and self.transform:
            with torch.random.fork_rng(devices=[]):  # the seed holds in this block alone, and for no GPU
                torch.default_generator.manual_seed(generator_for(AUGMENT).initial_seed())
                views = [self.transform(view) for view in item["video"].transpose(1, 2)]
            item["video"] = torch.stack(views).transpose(1, 2)
        if self.mask:
            item["mask"] = self.mask(generator=generator_for(MASK))
        return item

    def read(self, number, generator_for):
        """The item of this video, or of another one where it cannot be read."""
        bad = []
        for attempt in range(ATTEMPTS if self.train else 1):
            if attempt:  # the draw is a function of the key alone: a resumed run draws the same
                number = int(torch.randint(len(self), (), generator=generator_for(attempt, WHICH)))
            path = self.videos.path(number)
            try:
                with announced(self, number), Video(path) as video:
                    views = self.choose(video.frames, generator_for(attempt, WHERE))
                    clips = np.stack(video.read(views, self.size))
                return {"video": torch.from_numpy(clips), "label": int(self.videos.labels[number]),
                        "index": number, "bad": bad}
            except VideoError as error:
                bad.append((path, str(error)))
        if self.train:
            raise VideoError(f"{ATTEMPTS} draws in a row failed; the last: {path}: {bad[-1][1]}")
        shape = (math.prod(self.views), 3, self.frames, self.size, self.size)
        return {"video": torch.zeros(shape, dtype=torch.uint8), "label": -1, "index": -1, "bad": bad}

    def choose(self, total, generator):
        """R views, a list of (frame numbers, crop), of a video of `total` frames."""
        if not self.train:
            return self.spread(total)
        views = []
        for _ in range(self.repeats):
            place = torch.rand(() if self.stride else self.frames, generator=generator)
            numbers = frame_numbers(total, self.frames, self.stride, place)
            views.append((numbers, self.draw_crop(generator)))
        return views

    def spread(self, total):
        """Evaluation's views: every crop of every clip. With a stride, the first clip starts with the video
        and the last one ends with it, as in VideoMAE; with stride 0 the frames of the clips interleave."""
        clips, crops = self.views
        views = []
        for clip, crop in product(range(clips), range(crops)):
            place = (clip + 0.5) / clips
            if self.stride and clips > 1:
                place = clip / (clips - 1)
            numbers = frame_numbers(total, self.frames, self.stride, place)
            side = crop / (crops - 1) if crops > 1 else 0.5
            views.append((numbers, partial(square_crop, place=side)))
        return views


@dataclass
class Scenes(Dataset):
    """Clips of DAVIS's folders, squeezed to a square. Items are those of Clips, with one view, and hold

        truth  int64 [T, H, W], the masks at their own size: objects 0, 1, ..., and -1: does not count

    A folder below JPEGImages is a video, its masks lie below Annotations, frames without a mask are skipped.
    Of two resolutions 480p is taken, of a full DAVIS the validation videos, as in the paper. A video that
    cannot be read is named in `bad`, and its index is -1."""
    root: str
    frames: int = 16
    stride: int = 1
    size: int = 224

    def __post_init__(self):
        self.bad = {}  # as in Clips
        root = Path(self.root)
        lists = map(Path.read_text, root.glob("ImageSets/*/val.txt"))
        chosen = " ".join(lists).replace("/", " ").split()  # 2017 lists videos, 2016 paths of their frames
        size = "480p" if (root / "JPEGImages/480p").is_dir() else ""
        videos = {}
        for frame in sorted((root / "JPEGImages" / size).rglob("*.jpg")):
            mask = root / "Annotations" / frame.relative_to(root / "JPEGImages").with_suffix(".png")
            if mask.exists() and (not chosen or frame.parent.name in chosen):
                videos.setdefault(frame.parent, []).append((frame, mask))
        if not videos:
            raise ValueError(f"{root}: no .jpg below JPEGImages has its .png below Annotations")
        self.videos = list(videos.values())  # for each video its pairs of paths (frame, mask) in order

    def __len__(self):
        return len(self.videos)

    def __getitem__(self, key):
        number = int(key[1])
        bad = []
        pairs = self.videos[number]
        try:
            with announced(self, number), file_errors():
                video, truth = self.read(pairs)
        except VideoError as error:
            bad.append((str(pairs[0][0].parent), str(error)))
            number = -1
            shape = (self.frames, self.size, self.size)
            video = torch.zeros(1, 3, *shape, dtype=torch.uint8)
            truth = torch.full(shape, -1)
        return {"video": video, "truth": truth, "label": -1, "index": number, "bad": bad}

    def read(self, pairs):
        """The middle of a video, uint8 [1, 3, T, size, size], and its masks. The last frame may repeat."""
        numbers = frame_numbers(len(pairs), self.frames, self.stride)
        chosen = [pairs[min(n, len(pairs) - 1)] for n in numbers]
        pictures = [Image.open(frame).convert("RGB").resize((self.size, self.size), Image.BILINEAR)
                    for frame, _ in chosen]
        video = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None]
        truth = torch.from_numpy(np.stack([open_mask(mask) for _, mask in chosen]))
        objects = truth.unique(return_inverse=True)[1]  # the masks' numbers may have gaps
        # DAVIS-2016 paints its one object with 255, which in 2017 is the border that does not count. In 2016
        # all masks of a video have 0 and 255 alone.
        if all(np.isin(open_mask(mask), (0, 255)).all() for _, mask in pairs):
            return video, objects
        return video, objects.where(truth != 255, -1)


def open_mask(path):
    """A mask's numbers, int64 [H, W]."""
    picture = Image.open(path)
    if picture.mode == "LA":
        picture = picture.convert("L")  # without alpha
    mask = np.asarray(picture).astype(np.int64)
    if mask.ndim != 2:
        raise VideoError(f"{path.name} has colours: masks must be indexed or grey")
    return mask


# ============ batches ============
def collate(items):
    """Items -> a batch: video [B*R, 3, T, H, W], mask [B*R, N], label, index [B*R], bad (a list); of a single
    item also `truth`, masks of any size."""
    batch = {"bad": sum((item["bad"] for item in items), [])}
    for key in ("video", "mask", "truth"):
        if key in items[0]:
            batch[key] = torch.cat([item[key] for item in items])
    for key in ("label", "index"):
        batch[key] = torch.tensor([item[key] for item in items]).repeat_interleave(len(items[0]["video"]))
    return batch


def normalize(video):
    """uint8 [B, 3, T, H, W] -> ImageNet-normalised, float32, on the video's device."""
    def channels(values):
        """[3, 1, 1, 1], filled on the device: to copy them would wait for the GPU."""
        return torch.stack([video.new_full((1, 1, 1), value, dtype=torch.float32) for value in values])

    mean = channels(IMAGENET_MEAN)
    std = channels(IMAGENET_STD)
    return video * (1 / (255 * std)) - mean / std  # (video / 255 - mean) / std, by two operations


def batches_to_device(batches, device):
    """Yields the batches. For a CUDA device it copies their videos (nothing else) there, in a CUDA stream of
    their own, while the batch before is worked on. For any other device, mps too, nothing is moved."""
    if device.type != "cuda":
        yield from batches
        return
    copying = torch.cuda.Stream(device)
    ahead = None
    for batch in batches:
        with torch.cuda.stream(copying):
            batch["video"] = batch["video"].to(device, non_blocking=True)
        if ahead is not None:
            yield ahead
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copying)
        batch["video"].record_stream(computing)  # its memory stays until this stream is done with it
        ahead = batch
    if ahead is not None:
        yield ahead


@dataclass
class EpochSampler:
    """One rank's batches, lists of (epoch, index): batch `start` to before batch `stop` (None: no end). Step
    means batch here; `accumulate` batches make one optimizer step, and steps_per_epoch is a multiple of that.

    batch_size counts clips of this rank, `repeats` of them from each video. Every epoch is a permutation by
    (seed, epoch), cut into global batches, and these into the ranks' parts. What does not fill the last batch
    is left out; videos that do not fill one batch come again, with an index >= length. Raises ValueError."""
    length: int
    batch_size: int
    rank: int = 0
    world: int = 1
    seed: int = 0
    repeats: int = 1
    accumulate: int = 1
    start: int = 0
    stop: int = None

    def __post_init__(self):
        if min(self.length, self.batch_size, self.repeats) < 1 or self.batch_size % self.repeats:
            raise ValueError(f"a batch of {self.batch_size} clips cannot hold {self.repeats} of each video")
        self.videos = self.batch_size // self.repeats  # in a batch
        self.steps_per_epoch = self.accumulate * max(
            1, self.length // (self.videos * self.world * self.accumulate))

    def __iter__(self):
        permuted = None
        step = self.start
        while self.stop is None or step < self.stop:
            epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
            if epoch != permuted:
                order = torch.randperm(self.length, generator=seeded(self.seed, epoch))
                permuted = epoch
            first = (step_in_epoch * self.world + self.rank) * self.videos  # ranks' parts lie side by side
            numbers = range(first, first + self.videos)  # positions in `order`, which repeats without end
            yield [(epoch, n - n % self.length + int(order[n % self.length])) for n in numbers]
            step += 1


# ============ loader: the workers ============
# PyTorch's DataLoader makes batches in worker processes. A broken video can crash or hang the decoder, and
# with it a worker; the functions here find out which video it was, try it once more, and go on without it.
#
# The workers come from a server process ("forkserver") that has one thread and everything imported: none
# inherits a lock that another thread holds, and a start takes 0.1 s. Windows knows only "spawn".
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# Exit codes of crashes; on Windows they start at 0xC0000000. SIGBUS is left out: it means a full /dev/shm.
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)
READ_SECONDS = 120  # after which the reading of a video is taken to hang
IDLE_SECONDS = 60  # with no batch while every worker is idle: this is an error
WATCH_SECONDS = 1  # how often the loader looks after its workers
# The board is memory that is shared with the workers. Each has a row: whether it makes an item, the number of
# the video that it reads, and the time after which that counts as hanging.
MAKES, VIDEO, DEADLINE = range(3)
NOTHING = -1


@dataclass
class Watched(Dataset):
    """A data set whose workers write on the board. strikes: numbers of videos that crashed or hung one."""
    dataset: Dataset
    board: torch.Tensor
    strikes: set

    def __getitem__(self, key):
        row = self.board[get_worker_info().id]
        row[MAKES] = 1
        try:
            return self.dataset[key]
        finally:
            row[MAKES] = 0


@contextmanager
def announced(dataset, number, limit=READ_SECONDS):
    """Stands around the reading of a video, and writes it on the board. The second try gets twice the time,
    as it may only be slow. Raises VideoError if `load` has given this video up."""
    if number in dataset.bad:
        raise VideoError(dataset.bad[number])
    worker = get_worker_info()
    if worker is None or not isinstance(worker.dataset, Watched):  # there is no board without `load`
        yield
        return
    row = worker.dataset.board[worker.id]
    patience = 2 * limit if number in worker.dataset.strikes else limit
    row[DEADLINE] = monotonic() + patience
    row[VIDEO] = number
    try:
        yield
    finally:
        row[VIDEO] = NOTHING


def preload_workers():
    """Starts the fork server and its imports in the background."""
    if START_METHOD != "forkserver":
        return
    from multiprocessing import forkserver  # Windows has none
    multiprocessing.set_forkserver_preload(["torchvision.transforms.v2", "av.filter", "tqdm"])
    with suppress(OSError):  # it comes again, and is reported, where workers start
        forkserver.ensure_running()


def start_worker(_):
    """Runs first in a worker: it ends with the training process, even a killed one (PyTorch looks only at the
    fork server), and not by Ctrl-C, which goes to all processes."""
    def leave_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    gc.freeze()  # the garbage collector would write to memory shared with the server, and so copy it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def load(dataset, batches, workers=0, pin_memory=False, collate=collate, prefetch=2):
    """Yields a batch for each of these lists of keys (an EpochSampler's), made by `workers` processes, each
    `prefetch` batches ahead.

    After a crash or a hang new workers make the batch again, first with the same video, then, noted in
    dataset.bad, without it. With workers=0 a crash or hang takes the program with it. Raises VideoError where
    draws fail too often in a row, WorkerError where no video is to blame, or too many are; an error in the
    data set's own code stays itself. dataset: Clips, or any that has a dictionary `bad` and reads videos
    inside of `with announced(self, number)`."""
    if workers == 0:
        yield from DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory, collate_fn=collate)
        return
    preload_workers()
    keys = iter(batches)
    strikes = set()
    starts = 0  # of the workers, without a batch since
    while starts < ATTEMPTS:
        board = torch.full((workers, 3), NOTHING, dtype=torch.float64).share_memory_()
        keys, asked = tee(keys)  # the workers run ahead in `asked`; `keys` follows what was yielded
        # After its timeout a DataLoader can be asked again: that is the time to look after the workers.
        loader = DataLoader(
            Watched(dataset, board, strikes), batch_sampler=asked, num_workers=workers,
            multiprocessing_context=START_METHOD, worker_init_fn=start_worker, timeout=WATCH_SECONDS,
            pin_memory=pin_memory, collate_fn=collate, prefetch_factor=prefetch)
        iterator = None
        blamed = {}
        try:
            while not blamed:
                try:
                    if iterator is None:
                        iterator = iter(loader)  # starts the workers; if it fails, judge raises
                        busy = monotonic()  # when a worker was last seen to make something, or started
                    batch = next(iterator)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError, VideoError) as error:
                    error.__traceback__ = None  # it would keep the workers alive
                    blamed = judge(error, getattr(iterator, "_workers", ()), board.tolist())
                    if 1 in board[:, MAKES]:
                        busy = monotonic()
                    if monotonic() > busy + IDLE_SECONDS:
                        raise WorkerError(f"no batch for {IDLE_SECONDS} s while all workers are idle: is "
                                          "/dev/shm full (docker's --shm-size)?")
                else:
                    starts = 0
                    next(keys)
                    yield batch
                    busy = monotonic()  # the caller's work on the batch does not count as waiting
        finally:
            del iterator  # ends the workers
        # The second time it is given up.
        dataset.bad.update({number: why for number, why in blamed.items() if number in strikes})
        strikes.update(blamed)
        starts += 1
    raise WorkerError(f"{starts} times in a row the workers were lost to videos that crash or hang decoders")


def judge(error, workers, board):
    """Reads an error of the DataLoader. Returns {number of a video: why} for the videos that hung a worker
    (which is killed) or crashed it, {} after a mere timeout; raises for everything else."""
    if "in DataLoader worker process" in str(error):  # of the data set itself; the text holds its traceback
        if isinstance(error, VideoError):
            raise VideoError(str(error).rpartition("VideoError: ")[2].strip()) from None
        raise error
    lost = not isinstance(error, RuntimeError)
    if lost:
        time.sleep(WATCH_SECONDS)  # a connection breaks before its worker has ended
    blamed = {}
    for worker, (_, number, deadline) in zip(workers, board):
        code = worker.exitcode
        if code is None:  # it runs
            if number != NOTHING and monotonic() > deadline:
                blamed[int(number)] = "its decoder hung"
                worker.kill()  # one that hangs reacts to nothing else
        elif number != NOTHING and (code in CRASHES or code >= 0xC0000000):
            blamed[int(number)] = "its decoder crashed"
        else:
            reason = "is memory full, or /dev/shm (docker's --shm-size)?"
            if code == 1:  # it could not even start
                reason = 'does the program begin below `if __name__ == "__main__":`? Workers import it, too'
            raise WorkerError(f"a worker has ended (exit code {code}): {reason}")
    if lost and not blamed:
        raise WorkerError(f"workers are lost: try again, or a shorter TMPDIR: {one_line(error)}") from None
    if not blamed and "DataLoader timed out" not in str(error):
        raise error
    return blamed


# ======================================================================================================
# Training needs nothing below this line.

# ============ prepare: re-encoding for quick random access ============
# Any clip of the new files is quick to reach: there is a keyframe every few frames; no frame needs B-frames
# (b-pyramid), so that `decode` skips them; arithmetic coding and deblocking, slow to decode, are off (cabac).
X264 = {"crf": "22", "x264-params": "scenecut=0:bframes=3:b-pyramid=none:b-adapt=0:ref=1:weightp=0:"
        "cabac=0:no-deblock=1:log-level=-1"}


def smaller(width, height, short_side):
    """Filters that bring the short side to at most `short_side`, in the usual format of H.264."""
    shrink = min(1, short_side / min(width, height))
    width = max(2, round(width * shrink / 2) * 2)  # H.264 wants even numbers
    height = max(2, round(height * shrink / 2) * 2)
    # All get the same kind of colours, the one that is assumed where a file does not say which it has.
    scale = f"{width}:{height}:flags=bicubic:out_range=tv:out_color_matrix=bt601"
    return [("scale", scale), ("format", "yuv420p")]


def reencode(source, target, gop, short_side):
    """Writes a video anew, to an open file, as H.264 in mp4 without sound: a keyframe every `gop` frames, the
    short side at most `short_side`, rotation applied, times kept. Raises VideoError if the source is damaged
    or cut off."""
    graph = FilterGraph(partial(smaller, short_side=short_side))
    with Video(source) as video, av.open(target, "w", format="mp4") as output:
        if video.index.cut:
            raise VideoError(video.index.cut)
        rate = Fraction(video.stream.average_rate or 25)  # raw streams have none
        clock = Fraction(video.stream.time_base) if video.times else 1 / rate
        stream = None
        for count, frame in enumerate(video.decode_all()):
            picture = graph(frame)
            if stream is None:
                stream = output.add_stream("libx264", rate, {**X264, "g": str(gop)}, thread_count=1,
                                           width=picture.width, height=picture.height)
                stream.codec_context.time_base = clock
            picture.pts = frame.pts if video.times else count
            picture.time_base = clock
            picture.pict_type = 0  # the encoder chooses
            output.mux(stream.encode(picture))
        output.mux(stream.encode())


@dataclass
class Reencoder(Dataset):
    """Items: (number, why it failed or None). A data set for the loader."""
    videos: Videos
    targets: Videos
    options: tuple
    bad: dict = field(default_factory=dict)

    def __getitem__(self, key):
        number = key[1]
        target = Path(self.targets.path(number))
        try:
            if not target.exists():
                file = io.BytesIO()  # in memory, so that a killed process leaves nothing behind
                with announced(self, number, limit=3600):
                    reencode(self.videos.path(number), file, *self.options)
                save(target, file.getvalue())
            return number, None
        except (VideoError, av.FFmpegError, OSError) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # the disk, or one's share of it, is full: no video is to blame
            return number, one_line(error)


def save(path, content):
    """Writes bytes to a file that appears whole, even if others write the same one."""
    part = Path(path).parent / f".{uuid.uuid4().hex[:12]}.part"  # adding to a long name could be too long
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)  # where the disk is full, or the name too long


def prepare(source, directory, gop=16, short_side=256, workers=CORES):
    """Re-encodes a folder or list of videos into `directory`: same layout, labels and list name, as .mp4.

    Videos that are damaged or cut off are left out (of the new list, too) and listed with reasons in
    directory/unreadable.txt; their number is returned. Run again, it makes what is missing; several machines
    may share a directory. Raises ValueError."""
    if gop < 1 or short_side < 1:
        raise ValueError("--gop, --short-side: at least 1")
    videos = find_videos(source)
    is_folder = isdir(source)
    paths = [abspath(videos.path(i)) for i in range(len(videos))]
    top = Path(commonpath([abspath(videos.root), *paths]))  # a list's videos may lie elsewhere
    old = Path(videos.root).resolve()
    new = Path(directory).resolve()
    if new in (old, top.resolve()) or is_folder and old in new.parents:
        raise ValueError(f"{directory} must lie outside of {source}")
    names = [splitext(relpath(path, top))[0] + ".mp4" for path in paths]
    if len(set(names)) < len(set(paths)):  # a.avi lies beside a.mkv
        names = [relpath(path, top) + ".mp4" for path in paths]
    for folder in {*map(dirname, names), *(videos.classes or ())}:
        Path(directory, folder).mkdir(parents=True, exist_ok=True)  # an empty class keeps its number

    number_of = {name: i for i, name in enumerate(names)}  # a list may name a video twice
    work = Reencoder(videos, Videos(directory, names), (gop, short_side))
    batches = [[(0, i)] for i in number_of.values()]
    done = tqdm(load(work, batches, workers, collate=list), total=len(batches), disable=None)
    reasons = {names[i]: reason for [(i, reason)] in done}
    lost = set()
    kept = []
    for name, path, label in zip(names, paths, videos.labels.tolist()):
        if reasons[name]:
            lost.add(f"{path}: {reasons[name]}\n")
        else:
            kept.append(f"{name}\n" if label < 0 else f"{name} {label}\n")
    save(Path(directory, "unreadable.txt"), os.fsencode("".join(sorted(lost))))
    if not is_folder:
        save(Path(directory, Path(source).name), os.fsencode("".join(kept)))
    return len(lost)


# ============ demo: videos that need no download ============
# There are sixteen classes: four appearances times four motions.
DEMO_TEXTURES = ("upright", "level", "checks", "dots")
DEMO_MOTIONS = ("still", "forth", "back", "shake")
DEMO_SIZE = 80  # pixels a side
DEMO_FRAMES = 24  # frames a video
DEMO_TRAIN = 40  # videos a class
DEMO_VAL = 12
DEMO_MASKED = 4  # of DEMO_VAL those with masks
# x264's mbtree is off, as its results differ from run to run.
DEMO_X264 = {"preset": "veryfast", "crf": "18", "bf": "2", "g": "24", "x264-params": "mbtree=0"}


def demo_clip(rng, texture, motion):
    """One video, uint8 RGB [T, H, W, 3], and its masks [T, H, W]: 0 background, 1 object, 2 distractor.

    A textured object rests, drifts down or up a diagonal, or shakes, over a panned background. Its class is
    texture and motion; all else is nuisance, and drawn anew for every video."""
    draw = rng.uniform  # gives Python's floats, so that float32 arrays stay float32
    shape = (DEMO_FRAMES, DEMO_SIZE, DEMO_SIZE)
    t, y, x = [np.float32(axis - (axis.size - 1) / 2) for axis in np.indices(shape, sparse=True)]

    # Background: slow waves between two shades, panned.
    u = x + draw(-0.5, 0.5) * t
    v = y + draw(-0.5, 0.5) * t
    waves = 0
    for _ in range(3):
        waves += np.sin(draw(-0.12, 0.12) * u + draw(-0.12, 0.12) * v + draw(0, 6.3))
    dark, light = shades(draw, (0.3, 0.5), (0.6, 0.9))
    picture = dark + (0.5 + 0.3 * waves) * (light - dark)  # [3, T, H, W]

    # Distractor: a plain disc, drifting anywhere.
    across = x - draw(-30, 30) - draw(-1, 1) * t
    down = y - draw(-30, 30) - draw(-1, 1) * t
    disc = np.clip(draw(6, 10) - np.hypot(across, down) + 0.5, 0, 1)  # soft at its edge
    colour, _ = shades(draw, (0.3, 1), (0, 0))
    picture += disc * (colour - picture)

    # Object: between a disc and a rounded square. Within a tube (at stride 2) it drifts by a quarter of its
    # texture's period, or shakes by half of it.
    wave = 2 * math.pi / draw(9.2, 10.8)
    speed = draw(1.1, 1.45)
    shifts = {"still": 0 * t, "forth": speed * t, "back": -speed * t, "shake": 2.5 - 5 * (t // 2 % 2)}
    u = x - draw(-8, 8) - shifts[motion]
    v = y - draw(-8, 8) - shifts[motion]
    square = draw(0, 0.6)
    distance = (1 - square) * np.hypot(u, v) + square * np.maximum(np.abs(u), np.abs(v))
    body = np.clip(draw(26, 36) - distance + 0.5, 0, 1)
    tilt = draw(-0.1, 0.1)
    a = wave * (u * math.cos(tilt) + v * math.sin(tilt)) + draw(0, 6.3)
    b = wave * (v * math.cos(tilt) - u * math.sin(tilt)) + draw(0, 6.3)
    textures = {"upright": np.sin(a), "level": np.sin(b), "checks": 2 * np.sin(a) * np.sin(b),
                "dots": np.cos(a) + np.cos(b) - 0.8}
    dark, light = shades(draw, (0.1, 0.4), (0.75, 1))
    painted = dark + np.clip(1.2 * textures[texture] + 0.5, 0, 1) * (light - dark)
    picture += body * (painted - picture)

    # Changing light, and grain.
    light = draw(0.75, 1.1) * (1 + draw(0, 0.12) * np.sin(draw(0.1, 0.5) * t + draw(0, 6.3)))
    picture = picture * (255 * light) + draw(2, 6) * rng.standard_normal(shape, dtype=np.float32)
    masks = np.select([body > 0.5, disc > 0.5], [1, 2]).astype(np.uint8)  # [T, H, W]
    frames = picture.clip(0, 255).astype(np.uint8).transpose(1, 2, 3, 0)
    return frames, masks


def shades(draw, dark, light):
    """A dark and a light colour of one hue, [2, 3, 1, 1, 1]. dark, light: ranges of brightness."""
    hue = draw(0, 1)
    saturation = draw(0.25, 0.8)
    colours = [colorsys.hsv_to_rgb(hue, saturation, draw(*brightness)) for brightness in (dark, light)]
    return np.float32(colours)[:, :, None, None, None]


def write_demo_clip(directory, seed, split, texture, motion, number):
    """Writes directory/split/<class>/NN.mp4; for some of val, first its frames and masks as pictures."""
    name = f"{texture}-{motion}"
    path = Path(directory, split, name, f"{number:02}.mp4")
    if path.exists():
        return
    key = [seed, split == "val", DEMO_TEXTURES.index(texture), DEMO_MOTIONS.index(motion), number]
    frames, masks = demo_clip(np.random.default_rng(key), texture, motion)
    path.parent.mkdir(parents=True, exist_ok=True)
    if split == "val" and number < DEMO_MASKED:
        for kind, pictures, suffix in (("JPEGImages", frames, "jpg"), ("Annotations", masks, "png")):
            folder = Path(directory, "davis", kind, f"{name}-{number:02}")
            folder.mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(pictures):
                Image.fromarray(picture).save(folder / f"{i:05}.{suffix}", quality=95)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as file:  # no dates
        stream = file.add_stream("libx264", 12, DEMO_X264, width=DEMO_SIZE, height=DEMO_SIZE, thread_count=1)
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    save(path, buffer.getvalue())


def write_demo(directory, seed=0):
    """Writes the demo's videos, the same for a seed: DIR/{train,val}/<texture>-<motion>/NN.mp4.

    DIR/davis has the first DEMO_MASKED of val a class again, with masks, laid out as DAVIS. What DIR has of
    the same seed already stays, and two processes can fill it at once. Other folders raise ValueError."""
    mark = Path(directory, f"seed-{seed}-{DEMO_TRAIN}+{DEMO_VAL}-davis-{DEMO_MASKED}.txt")
    os.makedirs(directory, exist_ok=True)
    if not mark.exists():
        if os.listdir(directory):
            raise ValueError(f"{directory} is not empty and not the demo of seed {seed}: name another")
        mark.touch()
    for split, count in (("train", DEMO_TRAIN), ("val", DEMO_VAL)):
        jobs = product([split], DEMO_TEXTURES, DEMO_MOTIONS, range(count))
        with ThreadPool(CORES) as pool:  # NumPy and the encoder release Python's lock
            pool.starmap(partial(write_demo_clip, directory, seed), jobs)


# ============ bench, command line ============
def bench(source, seconds=10, rate=100):
    """Reads training clips in this process; prints their cost, and the cores for `rate` clips a second."""
    clips = Clips(find_videos(source))
    began = time.process_time()
    for count, [key] in enumerate(EpochSampler(len(clips), 1), 1):
        clips[key]
        spent = time.process_time() - began
        if spent > seconds:
            break
    print(f"{count / spent:.1f} clips a CPU-second; {rate} a second take {rate * spent / count:.1f} cores")


COMMANDS = {
    "prepare": (prepare, {
        "source": "folder or list of videos", "directory": "where the new ones go",
        "--gop": "frames from one keyframe to the next [16]",
        "--short-side": "pixels at most; nothing is enlarged [256]",
        "--workers": "videos at once [one for each core]"}),
    "bench": (bench, {
        "source": "folder or list of videos", "--seconds": "CPU-seconds to read for [10]",
        "--rate": "clips a second that the GPUs take [100]"}),
    "demo": (write_demo, {"directory": "where the videos go", "--seed": "of their random numbers [0]"}),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    for name, (function, arguments) in COMMANDS.items():
        command = commands.add_parser(name, description=function.__doc__, argument_default=argparse.SUPPRESS)
        command.set_defaults(function=function)
        for argument, meaning in arguments.items():
            command.add_argument(argument, help=meaning, type=int if argument[0] == "-" else str)
    options = vars(parser.parse_args())
    try:
        lost = options.pop("function")(**options)
    except ValueError as error:
        parser.error(str(error))
    except (VideoError, OSError, RuntimeError, KeyboardInterrupt) as error:
        sys.exit(f"data.py: {(str(error).strip() or 'interrupted').splitlines()[-1]}")
    if lost:
        sys.exit(f"data.py: {lost} unreadable videos: see unreadable.txt")


if __name__ == "__main__":
    main()
