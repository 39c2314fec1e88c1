"""Kill the process, or fill the disk, at a chosen operation on files of a folder. Python loads this file at its start.

ATTACK_FOLDER: the folder. ATTACK_OPERATION: the number of the operation, from 1; 0 counts the operations into the file
ATTACK_COUNT. ATTACK_ERRNO: the error that replaces the kill, for the next ATTACK_LENGTH attempts to open a file for
writing or to create a folder.
"""

import os
import signal
import sys

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
_folder, _chosen = os.environ.get("ATTACK_FOLDER", ""), int(os.environ.get("ATTACK_OPERATION", "0"))
_counter = os.environ.get("ATTACK_COUNT", "")
_errno, _length = int(os.environ.get("ATTACK_ERRNO", "0")), int(os.environ.get("ATTACK_LENGTH", "1"))
_number = _failed = 0


def _watch(event, arguments):
    global _number, _failed
    if event not in _EVENTS:
        return
    path, *others = arguments
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str) or not os.path.abspath(path).startswith(_folder + os.sep):
        return
    if event == "open":
        mode, flags = others
        writes = any(letter in (mode or "") for letter in "wax+") or (
            mode is None and flags & (os.O_WRONLY | os.O_RDWR)
        )
        if not writes:
            return
    _number += 1
    if _errno and 0 < _chosen <= _number and _failed < _length and event in ("open", "os.mkdir"):
        _failed += 1
        raise OSError(_errno, os.strerror(_errno), path)
    if _number == _chosen and not _errno:
        os.kill(os.getpid(), signal.SIGKILL)
    if _counter and os.environ.get("RANK", "0") == "0":
        with open(_counter, "w") as file:
            file.write(f"{_number} {event} {path}")


if _folder:
    sys.addaudithook(_watch)
