"""What a script does before its other imports: it runs in a fresh image of the process."""

from __future__ import annotations

import marshal
import os
import sys

if __name__ == "__main__":
    def _enter_fresh_image() -> None:
        """Run this file's byte code in a fresh image of the process; return if that cannot be.

        Compiling all of this file leaves 24 MB of unused memory behind: 28 MB instead of 52.  The
        image gets the user's command line, with a compiled script in memory for this file.
        Raises OSError, ValueError.
        """
        from importlib.util import MAGIC_NUMBER
        with open("/proc/self/cmdline", "rb") as file:
            words = file.read().split(b"\0")[:-1]
        with open("/proc/self/comm", "rb") as file:
            name = file.read().rstrip(b"\n")
        at = len(words) - len(sys.argv)             # of the script
        if at < 1 or words[at:] != list(map(os.fsencode, sys.argv)):
            return
        if "python" not in os.path.basename(os.readlink("/proc/self/exe")):
            return                                  # the system's loader, or some other program
        _show_words(words)                          # no image if this cannot be done there
        image = os.memfd_create("pyetcd", 0)        # survives exec
        try:
            code = compile("_PAST_IMAGE = 'past'; exec('code')", __file__, "exec")
            past = image, words, name, tuple(sys.path), __file__
            values = {"past": past, "code": sys._getframe(1).f_code}
            code = code.replace(co_consts=tuple(values.get(str(it), it) for it in code.co_consts))
            with open(image, "wb", closefd=False) as file:
                file.write(MAGIC_NUMBER.ljust(16, b"\0") + marshal.dumps(code))
            # As long as the user's path, by more slashes: that is then written over it.
            folder = b"/dev" if os.path.exists("/dev/fd") else b"/proc/self"
            link = (b"/fd/%d" % image).rjust(len(words[at]) - len(folder), b"/")
            os.execv("/proc/self/exe", [*words[:at], folder + link, *words[at + 1:]])
        finally:
            os.close(image)

    def _leave_past_image(
        image: int, words: list[bytes], name: bytes, path: tuple[str, ...], script: str
    ) -> None:
        """Restore argv, path and file name of the user's script, and free the file in memory."""
        os.close(image)
        at = len(words) - len(sys.argv)
        sys.argv[0] = os.fsdecode(words[at])
        if hasattr(sys, "orig_argv"):
            sys.orig_argv[at] = sys.argv[0]
        sys.path[:] = path
        globals()["__file__"] = script
        _show_words(words)
        with open("/proc/self/comm", "wb") as file:
            file.write(name)                # exec has made it `exe`

    def _show_words(words: list[bytes]) -> None:
        """Write over the memory in which `ps` looks for the command line.  Raises OSError."""
        with open("/proc/self/stat", "rb") as file:
            start, end = map(int, file.read().rpartition(b")")[2].split()[45:47])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            memory.write(b"".join(word + b"\0" for word in words).ljust(end - start, b"\0"))

    try:
        if "_PAST_IMAGE" in globals():
            _leave_past_image(*globals()["_PAST_IMAGE"])
        # Not in a debugger, a profiler or a module that runs this file: they have frames below.
        # Not from byte code either, which left nothing behind.
        elif (hasattr(os, "memfd_create") and not sys.gettrace()
              and globals().get("__file__", ".pyc")[-4:] != ".pyc"
              and sys._getframe().f_back is None):
            _enter_fresh_image()            # before the other imports, made again there: 25 ms
    except (OSError, ValueError):
        pass                                # the system forbids something: then without it
