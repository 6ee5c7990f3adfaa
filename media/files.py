"""Files: what may be opened, how they are written without ever leaving half of one, and lists of JSON lines.

Whatever is wrong with a user's file ends in InputError: one sentence that names the file, what is wrong and
what would be right.
"""
import functools
import json
import os
import sys
from contextlib import contextmanager, suppress
from glob import escape, glob
from pathlib import Path

import av

MAX_GAP = 60.0             # seconds without a frame; a longer jump of timestamps is damage, not a pause
# Containers that libav may open. Playlists (which name other files), pictures and text are not among them.
MEDIA_FORMATS = ("wav,w64,aiff,caf,au,flac,ogg,mp3,aac,ac3,eac3,amr,wv,ape,tta,mov,mp4,m4a,3gp,matroska,webm,"
                 "avi,asf,flv,mpeg,mpegts,mxf,gif")
SOUND_WANTED = "a wav, flac, ogg, mp3 or m4a file, or a video with sound"
VIDEO_WANTED = "a video file such as mp4, mov, webm or mkv"


class InputError(ValueError):
    """Something is wrong with what the user gave; the message is the one sentence to print."""


class OutputError(InputError):
    """A result cannot be written: the disk is full, the folder protected."""


def command(name):
    """Decorate a main(argv): it returns its exit status; an InputError is told on stderr and is status 2."""
    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            try:
                return main(argv) or 0
            except InputError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 2
        return run
    return decorate


def check_file(path, wanted):
    """Refuse what is not a readable, non-empty regular file; `wanted` ends the sentence."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; give {wanted}")
    if not os.path.exists(path):
        raise InputError(f"{path} does not exist; give {wanted}")
    if not os.path.isfile(path):
        raise InputError(f"{path} is not a regular file; give {wanted}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path} may not be read; change its permissions or give {wanted}")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path} is empty (0 bytes); give {wanted}")


# ---- sound and video ---------------------------------------------------------------------------------------

@contextmanager
def open_media(path, wanted):
    """Open a local file by libav, which may open nothing but MEDIA_FORMATS in files. Raises InputError."""
    check_file(path, wanted)
    try:
        options = {"format_whitelist": MEDIA_FORMATS, "protocol_whitelist": "file"}
        container = av.open("file:" + os.fspath(path), container_options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError):
        raise InputError(f"{path} is not a sound or video that can be read; give {wanted}") from None
    with container:
        yield container


def picture_stream(container):
    """The first real video stream that can be decoded, or None; the cover picture of a song is no video."""
    cover = av.stream.Disposition.attached_pic
    streams = (stream for stream in container.streams.video if not stream.disposition & cover)
    return next((stream for stream in streams if stream.codec_context), None)


def sound_stream(container):
    """The first stream of sound that can be decoded, or None."""
    return next((stream for stream in container.streams.audio if stream.codec_context), None)


@contextmanager
def open_clip(path):
    """Open a prepared clip by libav -> (container, its pictures). Raises InputError, also where they are
    damaged."""
    with open_media(path, VIDEO_WANTED) as container:
        stream = picture_stream(container)
        if stream is None:
            raise InputError(f"{path} holds no pictures; prepare the set again")
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise InputError(f"{path} is damaged ({error.strerror}); prepare the set again") from None


def decode_stream(container, stream):
    """Yield the frames of a stream in order. Damaged ones are left out; see check_not_truncated."""
    while True:
        try:
            for packet in container.demux(stream):
                with suppress(av.error.InvalidDataError):
                    yield from packet.decode()
            return
        except IndexError:                                        # a packet of a stream that begins only here
            continue
        except (av.FFmpegError, OSError):                         # the file breaks off here
            return


def check_not_truncated(path, container, stream, seconds):
    """Refuse a file of which clearly less than its header promises could be read."""
    name, promised = container.format.name, float((stream.duration or 0) * stream.time_base)
    if name == "wav":                                      # libav looks at the file's size, not at its header
        with open(path, "rb") as file:
            head = file.read(8)
        size = int.from_bytes(head[4:], "little") if head[:4] == b"RIFF" else 0
        promised *= size / os.path.getsize(path) if size < 0x7FFF0000 else 0         # endless streams: more
    if name.startswith(("wav", "flac", "mov")) and seconds < 0.9 * promised - 0.1:
        part = f"only {seconds:.1f} s of {promised:.1f} s can be read"
        raise InputError(f"{path} is cut off: {part}; copy it again")


# ---- writing -----------------------------------------------------------------------------------------------

def disk_fault(path):
    """Try to add a megabyte to a file -> the OSError of that, or None."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def printable(path):
    """A path as text for stdout, whatever bytes are in it."""
    return os.fsencode(path).decode(errors="backslashreplace")


@contextmanager
def atomic_write(path, suffix="", make_folder=False):
    """Give a temporary file beside `path`, moved to it at the end of `with`.

    After an exception it is removed and `path` keeps what it held. An output that cannot be written is
    refused before any work: OutputError. suffix: how the name must end. make_folder: make its folder.
    """
    path = os.fspath(path)
    folder, name = os.path.split(os.path.abspath(path))

    def refusal(error):
        return OutputError(f"{path} cannot be written: {error.strerror or error}; choose another place")

    if not name.lower().endswith(suffix):
        raise OutputError(f"{path} cannot be written: give a name that ends in {suffix}")
    if make_folder:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise refusal(error) from None
    if not os.path.isdir(folder):
        raise OutputError(f"{path} cannot be written: there is no folder {folder}; make it first")
    if os.path.exists(path) and not (os.path.isfile(path) and os.access(path, os.W_OK)):
        raise OutputError(f"{path} cannot be written: it is a folder or protected; choose another name")
    temporary = os.path.join(folder, f".{name}.{os.getpid()}.part")
    try:
        open(temporary, "wb").close()                   # a killed process of this number may have left one
        mode = os.stat(temporary).st_mode
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, mode)                       # safetensors writes files that only their owner reads
        os.replace(temporary, path)
    except OSError as error:
        raise refusal(error) from None
    except InputError:
        raise
    except Exception as error:              # torch, safetensors and libsndfile tell a full disk in their ways
        if fault := disk_fault(temporary):
            raise refusal(fault) from error
        raise
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def remove_unfinished(path):
    """Remove what atomic_write left beside `path` (or, of a folder, in it) when its process was killed; only
    where /proc tells whether a process lives."""
    folder, name = (path, "*") if os.path.isdir(path) else os.path.split(os.path.abspath(path))
    for left in glob(os.path.join(escape(folder), f".{name if name == '*' else escape(name)}.*.part")):
        process = left.split(".")[-2]
        dead = os.path.exists("/proc/self") and not os.path.exists(f"/proc/{process}")
        if dead or process == str(os.getpid()):
            with suppress(OSError):
                os.remove(left)


def read_lines(path):
    """A .jsonl file -> list of dicts. Raises InputError."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as lines of JSON: {error}") from None
    if not all(isinstance(record, dict) for record in rows):
        raise InputError(f"{path} holds lines that are not JSON objects")
    return rows


def write_lines(path, rows):
    """dicts -> a .jsonl file, complete or absent. Bytes of names that are not UTF-8 become JSON's escapes."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in rows)
    with atomic_write(path, ".jsonl") as temporary:
        Path(temporary).write_text(text, encoding="utf-8", errors="backslashreplace")
