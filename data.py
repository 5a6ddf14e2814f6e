"""Videos for SIGMA: exact frames out of real files, the paper's sampling, and tools for a data set.

    python data.py prepare SRC DST   re-encodes a data set so that any clip is quick to reach
    python data.py bench PATH        says what reading a clip costs
    python data.py demo DIR          writes the demo's videos

The file reads from a video to a batch: what a file holds, reading its frames, which frames and which part of
the picture a clip takes, the data set, the loader. After a rule come `prepare`, the demo and the command line.
Every clip, crop and mask is a function of (seed, epoch, index). A file that cannot be read is reported, and
another video is drawn in its place.
"""
import argparse
import bisect
import colorsys
import contextlib
import errno
import gc
import hashlib
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
import uuid
from collections import deque
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

av.logging.set_level(av.logging.PANIC)  # FFmpeg complains frame by frame; a VideoError says it once

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SUFFIXES = tuple(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .m2ts .mts .wmv .flv .3gp .ogv .gif".split())
# Formats that hold a video themselves. Playlists (concat, hls, dash) are missing: they open other files.
FORMATS = "mov,matroska,avi,mpeg,mpegts,asf,flv,ogg,gif,h264,hevc,m4v,mpegvideo,vc1,ivf,obu,rm,dv,mxf,nut"
MAX_PIXELS = 8192 * 8192  # of a frame: a damaged header can ask for any amount of memory
MAX_KEPT_BYTES = 64 << 20  # the packets of larger files are not kept in memory
ATTEMPTS = 20  # draws of a video, or starts of the workers, that may fail in a row


def usable_cores():
    """How many cores this process may use: those it is bound to, and no more than its container grants."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    # Linux writes a container's share of time as "quota period", with "max" for no limit.
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    with contextlib.suppress(OSError, ValueError):  # the same of older kernels, with -1 for no limit
        quota = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text())
        period = int(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text())
        if quota > 0:
            cores = min(cores, math.ceil(quota / period))
    return max(1, cores)


CORES = usable_cores()


class VideoError(Exception):
    """What is wrong with a video file, in one line without its path."""


class WorkerError(RuntimeError):
    """Loader workers that end or stand still through no video's fault."""


@contextlib.contextmanager
def file_errors():
    """Turns what FFmpeg, PyAV and the system raise about a file into VideoError.

    It stands around opening, demuxing and decoding alone, so that a wrong argument or a bug stays itself."""
    try:
        yield
    except (av.FFmpegError, OSError, ValueError, ArithmeticError, MemoryError, LookupError) as error:
        raise VideoError(one_line(error)) from None


def one_line(error):
    """The text of an exception on one line; of a system's error without the path."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


# ============ what a file holds ============
# FFmpeg, called through PyAV, does the work. Its words, each explained once:
#
#   stream             one track of a file: the video, the sound, subtitles
#   packet             a compressed piece of a stream; of a video, as a rule, one frame
#   demuxing           taking the packets out of a file, which is quick; decoding makes frames of them and is slow
#   presentation time  when the frame of a packet is to be shown, in ticks of the stream's clock (`pts`)
#   keyframe           a frame that needs no other one, so that decoding can start there
#   B-frame            a frame made from an earlier and a later one. The file has the later one first, so packets
#                      come in the order of decoding, and their times tell the order of showing
#   open group         B-frames that follow a keyframe in the file but are shown before it, and need frames from
#                      before the keyframe, too
#   edit list          a note in an mp4 that some frames must be decoded but not shown
#
# The truth is a decode of the whole file: frame n is the n-th that comes out of it. It takes seconds. To enter
# at a keyframe shortly before the wanted frames takes milliseconds, but asks for their times. So the whole file
# is demuxed first, and the functions of `Index` say how far its times can be trusted. Behind each rule stands a
# kind of file that needs it.

def open_video(path):
    """Opens a file -> (container, video stream), the file and one of its tracks. Raises VideoError."""
    limits = {"protocol_whitelist": "file", "format_whitelist": FORMATS}  # no file leads to another one
    options = {"container_options": limits}
    if int(av.__version__.split(".")[0]) < 19:
        options["metadata_errors"] = "ignore"  # a title in an old encoding; newer versions never mind
    try:
        container = av.open(f"file:{path}", **options)  # "file:": a name with a colon is no address
    except av.ArgumentError:
        raise VideoError("it is not a video: a picture, a playlist or an unknown format") from None
    try:
        stream = container.streams.best("video")  # the first may be a cover picture
        if stream is None or stream.codec_context is None or is_cover(stream):
            raise VideoError("it has no video that FFmpeg can decode")
        stream.codec_context.thread_count = 1  # the loader's workers are the parallelism
        stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
    except BaseException:
        container.close()
        raise
    return container, stream


def is_cover(stream):
    return bool(stream.disposition & av.stream.Disposition.attached_pic)


class Index:
    """What demuxing says about a video: one entry a packet in each list, in the order of the file.

    packets     the packets themselves; an empty list unless `keep`
    times       presentation times, None where the file has none
    sizes       bytes
    keys        numbers of those packets that the file calls keyframes
    hidden      whether an edit list hides the packet's frame
    shown       numbers of the packets that are not hidden
    cut         why the end of the video is missing, None if it is not"""
    def __init__(self, container, stream, keep=True):
        self.codec = stream.codec_context
        self.packets = []
        self.times = []
        self.sizes = []
        self.keys = []
        self.hidden = []
        self.cut = None
        newest = None  # the last packet in the file
        ends = {}  # the last packet of every stream
        try:
            for packet in container.demux():
                if packet.size == 0:  # the end of a stream, or AVI's "as before"
                    continue
                newest = packet
                ends[packet.stream.index] = packet
                if packet.stream.index == stream.index:
                    self.add(packet, keep)
        except (av.FFmpegError, OSError) as error:  # what came before is good
            self.cut = one_line(error)
        if newest is not None and newest.is_corrupt:
            self.cut = self.cut or "it ends in the middle of a frame"
            if newest.stream.index == stream.index:
                self.drop_last()
        self.shown = [number for number, hidden in enumerate(self.hidden) if not hidden]
        if stops_early(container, ends.values()):
            self.cut = self.cut or "it is cut off"

    def add(self, packet, keep):
        if packet.is_keyframe:
            self.keys.append(len(self.times))
        self.times.append(packet.pts)
        self.sizes.append(packet.size)
        self.hidden.append(packet.is_discard)
        if keep:
            self.packets.append(packet)

    def drop_last(self):
        """Takes back the last packet, of which the file holds a part."""
        for column in (self.times, self.sizes, self.hidden):
            column.pop()
        if self.packets:
            self.packets.pop()
        if self.keys and self.keys[-1] == len(self.times):
            self.keys.pop()

    def shown_times(self):
        return [self.times[number] for number in self.shown]

    def times_tell_frames_apart(self):
        """Every frame has a time of its own. Raw H.264 has no times at all."""
        times = self.shown_times()
        return None not in times and len(set(times)) == len(times)

    def times_are_of_decoding(self):
        """Where packets are reordered but their times ascend through the file, the times say when to decode.

        So it is in AVI, which knows no others, and in files copied from it. MPEG-4's, which mostly come from
        AVI (two frames in one packet, an empty packet after it), are never trusted."""
        if not self.codec.has_b_frames:
            return False
        times = self.shown_times()
        return self.codec.name == "mpeg4" or times == sorted(times)

    def packets_may_not_be_frames(self, interlaced):
        """Only a decode can tell how many frames come out of these."""
        if self.codec.name == "mpeg4" and min(self.sizes) < 20:
            return True  # a packet that says "not coded" shows nothing
        if self.codec.name == "h264" and interlaced:
            return True  # camcorders and broadcast put a frame's two fields into two packets
        if self.codec.name == "vp8":
            return True  # it has packets that are only referred to
        return self.shows_before_keyframe()

    def shows_before_keyframe(self):
        """Frames before the first keyframe, in a copy that was cut out of a video, may lack what they need."""
        if not self.keys:
            return True
        first = self.keys[0]
        for number in self.shown:
            if number < first or self.times[number] < self.times[first]:
                return True
        return False


def stops_early(container, last_packets):
    """Whether no stream reaches the end that the header tells: how a cut Matroska file is known, in which half
    a packet is dropped silently. Where only the sound goes on, the file is whole."""
    if "matroska" not in container.format.name or not container.duration:
        return False
    end = 0.0
    for packet in last_packets:
        if packet.pts is not None:
            end = max(end, float(packet.pts * packet.time_base))
    seconds = container.duration / av.time_base
    return end < 0.9 * seconds - 1


# ============ reading its frames ============
# `Video` decides, by the index, from where it decodes; `read` makes clips. Whoever wants frames alone may use
# `read_clip` and skip this section.

class Video:
    """An open video: `frames` is how many it shows, `read` gives any of them. To be used in a `with` statement.

    `times` are the presentation times of the frames in the order of showing if they are good enough to enter
    at a keyframe, else None: then frames are counted from the beginning. Raises VideoError."""
    def __init__(self, path):
        self.path = path
        self.containers = []
        try:
            with file_errors():
                check_is_file(path)
                keep = os.path.getsize(path) <= MAX_KEPT_BYTES
                self.open()
                self.index = Index(self.container, self.stream, keep)
            self.fresh = keep  # else the file has to be demuxed again
            self.times = None
            self.frames = len(self.index.shown)
            self.counted = False  # whether `frames` was found by decoding
            if self.frames > 0:
                self.decide()
            if self.frames == 0:
                raise VideoError(self.cut or "it has no frames")
        except BaseException:
            self.close()  # a long run meets many broken files, and would be out of descriptors
            raise

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        for container in self.containers:
            container.close()

    def open(self):
        """Opens the file (again), with a fresh decoder. What was opened before is kept: packets refer to it."""
        self.container, self.stream = open_video(self.path)
        self.containers.append(self.container)
        self.codec = self.stream.codec_context
        self.fresh = True

    @property
    def cut(self):
        return self.index.cut

    def decide(self):
        """Finds `frames`, and `times` if they can be trusted."""
        index = self.index
        if not index.times_tell_frames_apart():
            self.count()
        elif index.times_are_of_decoding():
            pass  # one frame a packet: to verify it would double what XviD costs
        elif index.packets_may_not_be_frames(self.is_interlaced()):
            foretold = sorted(index.shown_times())
            if self.count() == foretold:
                self.times = foretold
        else:
            self.times = sorted(index.shown_times())

    def is_interlaced(self):
        """Whether H.264 may be interlaced. A wrong yes costs a decode of the file."""
        if self.codec.name != "h264":
            return False
        if hasattr(self.codec, "field_order"):
            return self.codec.field_order != 1  # 1: known to be progressive
        try:
            two = list(itertools.islice(self.decode(), 2))  # before PyAV 18
        except VideoError:
            return True
        return any(frame.interlaced_frame for frame in two)

    def count(self):
        """Decodes the whole file, sets `frames` and returns the times of all frames."""
        times = []
        try:
            for frame in self.decode():
                times.append(frame.pts)
        except VideoError as error:
            self.index.cut = self.cut or str(error)  # what came before is good
        self.frames = len(times)
        self.counted = True
        return times

    # ---- packets and decoder ----
    def packets_from(self, first):
        """The video's packets from number `first` on."""
        if self.index.packets:
            return iter(self.index.packets[first:])
        if first > 0:
            # A large file: as a rule we can jump to the keyframe.
            with file_errors():
                self.container.seek(self.index.times[first], stream=self.stream)
                packets = self.demux()
                packet = next(packets, None)
            landed = first + 1
            if packet is not None and packet.pts in self.index.times:
                landed = self.index.times.index(packet.pts)
            if landed <= first:
                return itertools.islice(itertools.chain([packet], packets), first - landed, None)
            self.open()  # in some ts and mpg we land too late
        return itertools.islice(self.demux(), first, None)

    def demux(self):
        for packet in self.container.demux(self.stream):
            if packet.size > 0:
                yield packet

    def decode(self, first=0, end=None, wanted=None):
        """Yields what the decoder makes of the packets from `first` to before `end`, in the order of showing.

        wanted: times of the frames that matter. H.264 and HEVC then leave out the frames that are neither
        wanted nor needed by others, a quarter to half of the work."""
        if first == 0 and not self.fresh:
            self.open()  # a decoder that was used before may remember, a palette for instance
        packets = self.packets_from(first)
        if not self.fresh:
            self.codec.flush_buffers()
        self.fresh = False
        if end is not None:
            packets = itertools.islice(packets, end - first)
        may_skip = wanted is not None and self.codec.name in ("h264", "hevc")
        skips = False
        for packet in itertools.chain(packets, [None]):  # None: what the decoder still holds back
            skip = may_skip and packet is not None and packet.pts not in wanted
            if skip != skips:
                # AV1's decoder must never see this: it reads it once, when it opens.
                self.codec.skip_frame = "NONREF" if skip else "DEFAULT"
                skips = skip
            with file_errors():
                frames = self.codec.decode(packet)
            yield from frames

    def decode_all(self):
        """Yields every frame from the beginning. Raises VideoError where one is damaged or missing."""
        count = 0
        for frame in self.decode():
            if frame.is_corrupt:
                raise VideoError(f"frame {count} is damaged")
            if self.times is not None and self.times[count:count + 1] != [frame.pts]:
                raise VideoError(f"frame {count} is missing")
            yield frame
            count += 1
        exact = self.counted or self.times is not None
        if count == 0 or exact and count < self.frames:
            raise VideoError(self.cut or f"frame {count} is missing")

    # ---- frames by number: (n, frame) for ascending numbers n ----
    def from_beginning(self, numbers):
        wanted = set(numbers)
        for n, frame in enumerate(self.decode_all()):
            if n in wanted:
                yield n, frame
            if n == numbers[-1]:
                return
        if self.cut:
            raise VideoError(self.cut)
        self.frames = n + 1  # there were more packets than frames; the last frame is repeated
        for number in numbers:
            if number > n:
                yield number, frame

    def from_keyframes(self, numbers):
        """Enters at the last keyframe before each wanted frame. What comes out has to prove that the keyframe
        is one and that nothing is missing, else VideoError."""
        for first, end, wanted in self.runs(numbers):
            newest = None
            for frame in self.decode(first, end, wanted):
                if frame.pts is None:
                    raise VideoError("a frame has no time")
                if frame.pts < self.index.times[first]:
                    continue  # of an open group, whose other frames were not decoded
                if newest is None and first > 0:
                    self.check_entry(frame)
                if newest is not None and frame.pts <= newest:
                    raise VideoError("its times are not in order")
                if frame.is_corrupt:
                    raise VideoError("a frame is damaged")
                newest = frame.pts
                if newest in wanted:
                    yield wanted.pop(newest), frame
            if wanted:
                raise VideoError(f"frame {min(wanted.values())} is missing")

    def check_entry(self, frame):
        """Some files call every packet a keyframe (mp4 without a table of them, H.263 of phones, AVI without
        an index). A picture of 8 bits needs the palette, which comes with the first packet alone."""
        if not frame.key_frame or frame.format.name == "pal8":
            raise VideoError("its keyframes are no good places to start")

    def runs(self, numbers):
        """Stretches of packets that hold these frames: (first, end, {time of a frame: its number})."""
        packet_of = {self.index.times[number]: number for number in self.index.shown}
        runs = []
        for n in numbers:
            time = self.times[n]
            position = packet_of[time]
            first = self.entry(position)
            if not runs or first > runs[-1][1]:  # what lies between two runs is skipped
                runs.append([first, position + 1, {}])
            run = runs[-1]
            run[1] = max(run[1], position + 1)
            run[2][time] = n
        return runs

    def entry(self, position):
        """The last keyframe that comes before a packet both in the file and in time."""
        before = bisect.bisect_right(self.index.keys, position)
        for key in reversed(self.index.keys[:before]):
            time = self.index.times[key]
            if time is not None and time <= self.index.times[position]:
                return key
        return 0

    def read(self, views, size=224):
        """Decodes once and returns one uint8 array [3, T, size, size] (RGB) for every view.

        views: list of (T frame numbers in any order, crop); beyond the end stands the last frame. crop: (x, y,
        width, height) of the displayed picture, or a function of its width and height, or None: the centred
        square. Raises VideoError, and ValueError for a crop that is not inside of the picture."""
        views = [View(numbers, crop, size) for numbers, crop in views]
        last = max(view.last() for view in views)
        if self.cut and last >= self.frames:
            raise VideoError(self.cut)
        for view in views:
            view.stop_at(self.frames - 1)
        wanted = sorted(set().union(*(view.numbers for view in views)))
        ways = [self.from_beginning]
        if self.times is not None:
            ways.insert(0, self.from_keyframes)
        for way in ways:
            try:
                for n, frame in way(wanted):
                    for view in views:
                        view.take(n, frame)
                return [view.clip for view in views]
            except VideoError as error:
                failure = error
        raise VideoError(f"frames {wanted[0]} to {wanted[-1]} of {self.frames} cannot be decoded: {failure}")


def check_is_file(path):
    """A pipe would block, a folder of frames is a common mistake in lists. Raises VideoError."""
    if os.path.isdir(path):
        raise VideoError("it is a folder: only video files can be read, no folders of frames")
    if os.path.exists(path) and not os.path.isfile(path):
        raise VideoError("it is no regular file")
    if os.path.getsize(path) == 0:
        raise VideoError("it is empty")


class View:
    """One clip in the making: the numbers of its frames, and the filters that make its pictures."""
    def __init__(self, numbers, crop, size):
        self.numbers = list(numbers)
        self.clip = np.empty((3, len(self.numbers), size, size), np.uint8)
        self.graph = FilterGraph(partial(crop_filters, crop=crop, size=size))

    def last(self):
        return max(self.numbers)

    def stop_at(self, last):
        self.numbers = [min(n, last) for n in self.numbers]

    def take(self, n, frame):
        """Puts frame n wherever the clip shows it."""
        if n not in self.numbers:
            return
        picture = self.graph.rgb(frame)
        for t, number in enumerate(self.numbers):
            if number == n:
                self.clip[:, t] = picture


class FilterGraph:
    """Turns frames the way they are displayed, and filters them, in libavfilter: one graph for every geometry.

    filters: a function of the displayed width and height -> [(name of a filter, its arguments), ...]."""
    def __init__(self, filters):
        self.filters = filters
        self.graphs = {}

    def __call__(self, frame):
        key = (frame.width, frame.height, frame.format.name)
        if key not in self.graphs:
            turns, width, height = upright(frame)
            steps = turns + self.filters(width, height)
            with file_errors():
                self.graphs[key] = self.build(frame, steps)
        graph = self.graphs[key]
        with file_errors():
            graph.push(frame)
            return graph.pull()

    def build(self, frame, steps):
        graph = av.filter.Graph()
        if hasattr(graph, "threads"):  # PyAV before 16 starts idle threads instead
            graph.threads = 1
        source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format.name,
                                  time_base=Fraction(1, 25))
        chain = [source]
        if frame.format.components[0].bits > 8:
            # At an odd x libavfilter's crop would tear the chroma of these formats.
            chain.append(graph.add("format", "yuv444p16le"))
        for step in steps:
            chain.append(graph.add(*step))
        chain.append(graph.add("buffersink"))
        graph.link_nodes(*chain)
        graph.configure()
        return graph

    def rgb(self, frame):
        """uint8 [3, height, width], where the filters end in planar RGB."""
        frame = self(frame)
        planes = []
        for plane in frame.planes:  # green, blue, red
            lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
            planes.append(lines[:, :frame.width])  # lines are padded
        green, blue, red = planes
        return np.stack([red, green, blue])


def upright(frame):
    """Filters that turn a frame as its file asks for, a phone's for instance, and its width and height then."""
    width = frame.width
    height = frame.height
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return [], width, height
    # A pixel at (x, y) is displayed at (ax + cy, bx + dy).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    turns = []
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
    """Filters that cut a crop (see Video.read) out of a picture of that size, scaled to size x size planar RGB."""
    if crop is None:
        crop = square_crop
    if callable(crop):
        crop = crop(width, height)
    x, y, w, h = crop
    inside = x >= 0 and y >= 0 and w >= 1 and h >= 1 and x + w <= width and y + h <= height
    if not inside:
        raise ValueError(f"the crop {x, y, w, h} is not inside of the picture, {width}x{height}")
    return [("crop", f"{w}:{h}:{x}:{y}:exact=1"),
            ("scale", f"{size}:{size}:flags=bilinear"),
            ("format", "gbrp")]  # takes half the time of interleaved RGB


def read_clip(path, frames=16, stride=4, start=None, crop=None, size=224, generator=None):
    """uint8 RGB [frames, 3, size, size]: frames start, start + stride, ... of the video in the order of showing.

    The last one is repeated where the video is too short. start: None draws one (from `generator`). crop: (x,
    y, width, height) of the displayed picture, scaled bilinearly; None: the centred square. Raises VideoError
    if the file cannot be read, ValueError for senseless arguments."""
    if min(frames, stride, size) < 1:
        raise ValueError("frames, stride and size must be 1 at least")
    if start is not None and start < 0:
        raise ValueError("start must be 0 at least")
    with Video(path) as video:
        if start is None:
            place = torch.rand((), generator=generator).item()
            numbers = frame_numbers(video.frames, frames, stride, place)
        else:
            numbers = range(start, start + frames * stride, stride)
        [clip] = video.read([(numbers, crop)], size)
    return torch.from_numpy(clip).transpose(0, 1).contiguous()


READ_SECONDS = 120
IDLE_SECONDS = 60
WATCH_SECONDS = 1
import collections, inspect
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


def load(dataset, batches, workers=0, pin_memory=False, collate=collate):
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
            pin_memory=pin_memory, collate_fn=collate)
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
