"""ldm/files.py: a file is there whole, or as it was before."""

import errno
import os
from pathlib import Path

import pytest

from ldm import files


def test_text_is_utf_8_bytes_are_as_they_are_and_folders_are_made(tmp_path):
    files.write(tmp_path / "new" / "folder" / "a.txt", "größer\n")
    files.write(tmp_path / "b.bin", b"\x00\xff\r\n")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\x00\xff\r\n"


def test_a_path_may_be_a_string_and_an_old_file_is_replaced(tmp_path):
    for data in ("a long first text", "short"):
        files.write(str(tmp_path / "a.txt"), data)
    assert (tmp_path / "a.txt").read_text() == "short"


def test_the_writer_gets_another_name_in_the_same_folder_that_ends_alike(tmp_path):
    """Renaming is one step within a file system only, and Keras and NumPy choose the format by the ending."""
    seen = []

    def writer(temporary):
        seen.append(temporary)
        assert not (tmp_path / "weights.keras").exists()  # nobody sees half a file under its own name
        temporary.write_text("all of it")

    files.write_by(tmp_path / "weights.keras", writer)
    (temporary,) = seen
    assert temporary.parent == tmp_path and temporary.suffix == ".keras" and temporary.name != "weights.keras"
    assert str(os.getpid()) in temporary.name  # two processes may write the same file
    assert os.listdir(tmp_path) == ["weights.keras"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_who_is_interrupted_keeps_the_file_of_before_and_leaves_no_litter(tmp_path, error):
    files.write(tmp_path / "a.txt", "before")

    def writer(temporary):
        temporary.write_text("half of")
        raise error

    with pytest.raises(type(error)):
        files.write_by(tmp_path / "a.txt", writer)
    assert (tmp_path / "a.txt").read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_writer_that_writes_nothing_is_an_error_and_not_an_empty_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.write_by(tmp_path / "a.txt", lambda temporary: None)
    assert os.listdir(tmp_path) == []


def test_an_error_names_the_file_that_was_to_be_written_and_not_its_temporary_one(tmp_path):
    def full(temporary):
        raise OSError(errno.ENOSPC, "No space left on device")  # as a write says it: without a name

    with pytest.raises(OSError) as found:
        files.write_by(tmp_path / "a.txt", full)
    assert found.value.filename == str(tmp_path / "a.txt") and found.value.errno == errno.ENOSPC
    (tmp_path / "folder" / "in it").mkdir(parents=True)
    with pytest.raises(IsADirectoryError) as found:
        files.write(tmp_path / "folder", "text")
    assert (found.value.filename, found.value.filename2) == (str(tmp_path / "folder"), None)

    def of_another_file(temporary):
        (tmp_path / "nowhere").read_text()

    with pytest.raises(FileNotFoundError) as found:
        files.write_by(tmp_path / "a.txt", of_another_file)
    assert Path(found.value.filename) == tmp_path / "nowhere"


def test_a_folder_that_cannot_be_is_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    files.check_folder(tmp_path)
    files.check_folder(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path) == ["file"]
    for path in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(NotADirectoryError) as found:
            files.check_folder(path)
        assert found.value.filename == str(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    files.check_folder("relative")
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # nothing is forbidden to root
    with pytest.raises(PermissionError) as found:
        files.check_folder(tmp_path / "new" / "folder")
    assert found.value.filename == str(tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="elsewhere there are no such folders and devices")
def test_a_folder_that_takes_no_files_is_found_although_all_is_allowed_there():
    """To root everything is allowed, and yet nobody makes a file in /proc."""
    with pytest.raises(OSError) as found:
        files.check_folder("/proc/a/b")
    assert found.value.filename == "/proc" and found.value.errno in (errno.EROFS, errno.EACCES)


def test_a_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    def full(dir):
        raise OSError(errno.ENOSPC, "No space left on device", f"{dir}/tmp123")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError) as found:
        files.check_folder(tmp_path / "new")
    assert (found.value.errno, found.value.filename) == (errno.ENOSPC, str(tmp_path))


@pytest.mark.skipif(os.name != "posix", reason="elsewhere there are no pipes in folders")
def test_what_is_no_file_gets_the_bytes_and_stays(tmp_path):
    """A pipe or a device, such as /dev/full, whose place a file would take for good where everything is allowed."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write(pipe, "all of it")
    assert os.read(reader, 99) == b"all of it" and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)
    if Path("/dev/full").is_char_device() and not os.access("/dev", os.W_OK):
        with pytest.raises(OSError) as found:
            files.write("/dev/full", "text")
        assert (found.value.errno, found.value.filename) == (errno.ENOSPC, "/dev/full")
