"""Files that are written whole or not at all: under another name first, and then put in place in one step.

Who is interrupted, or finds the disk full, keeps the file of before. And a lock, for what only one process may do.
"""

import errno
import os
import tempfile
from pathlib import Path

LONGEST_NAME = 240  # bytes: file systems take 255, of which a temporary name needs some

try:
    import fcntl
except ImportError:  # Windows has another way to lock
    fcntl = None
    import msvcrt


def write(path, data):
    """Put bytes, or text as UTF-8, into a file. Missing folders are made."""
    data = data.encode() if isinstance(data, str) else data
    write_by(path, lambda temporary: temporary.write_bytes(data))


def write_by(path, writer):
    """Let `writer(temporary path)` write a file, and put it in place. Missing folders are made.

    The temporary file is in the same folder, because renaming is one step only within a file system; it ends as the
    file does, because Keras and NumPy choose the format by the suffix; and it carries the process's number, because
    two processes may write the same file.
    """
    path = Path(path)
    device = path.exists() and not path.is_file() and not path.is_dir()  # or a pipe: it gets the bytes, and stays
    home = Path(tempfile.gettempdir()) if device else path.parent
    home.mkdir(parents=True, exist_ok=True)
    temporary = home / f"~{os.getpid()}.{path.name}"
    try:
        writer(temporary)
        path.write_bytes(temporary.read_bytes()) if device else os.replace(temporary, path)
    except OSError as error:
        if error.errno and (error.filename is None or Path(error.filename) == temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error  # the name that its user knows
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_folder(path):
    """See that files can be written into a folder, or that it can be made; nothing stays.

    Raises:
        OSError: naming the part of the path that stands in the way.
    """
    there = next(part for part in (Path(path), *Path(path).absolute().parents) if part.exists())
    wrong = errno.ENOTDIR if not there.is_dir() else 0 if os.access(there, os.W_OK | os.X_OK) else errno.EACCES
    if not wrong:
        try:  # what is allowed need not be possible: nobody can make a file in /proc, nor on a full disk
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            wrong = errno.EROFS if error.errno == errno.ENOENT else error.errno or errno.EIO
    if wrong:
        raise OSError(wrong, os.strerror(wrong), str(there))


def check_file(path):
    """See that a file can be written at a path, as far as that can be known; nothing is made.

    Raises:
        OSError: naming what stands in the way.
    """
    path = Path(path)
    check_folder(path.parent)
    wrong = errno.ENAMETOOLONG if len(os.fsencode(path.name)) > LONGEST_NAME else errno.EISDIR if path.is_dir() else 0
    if wrong:
        raise OSError(wrong, os.strerror(wrong), str(path))


def lock(file):
    """Lock an open file for as long as it is open; returns False if another one has. No process outlives its lock."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):  # the first is flock's, the second that of Windows
        return False
    except OSError:  # some network file systems have no locks: better to train without than not at all
        return True
    return True
