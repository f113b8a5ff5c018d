"""Users, roles, permissions and passwords.  Source: etcd 2.3 etcdserver/auth."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple

from ..base.ids import package_logger
from ..base.text import _SURROGATE, utf8
from ..net.reactor import Reactor
from ..net.workers import PASSWORD_WORK, ThrottledLog, Timer

AUTH_LOG = package_logger("auth")
AUTH_PREFIX = "/2"                  # where users and roles lie in the store
ROOT, GUEST = "root", "guest"       # the user and role that may do all; requests without a name
PASSWORD_COST = 10                  # of bcrypt: 2**10 rounds, as etcd
PASSWORD_BYTES_MAX = 4_096          # above: a bad request; bcrypt reads the first 72
AUTH_NAME_BYTES_MAX = 1_024         # of a user or role; above: a bad request, and no such user
PASSWORD_CHECKS_MAX = 1_024         # waiting to be verified; above: 503 for the worst guesser
PASSWORDS_KNOWN_MAX = 10_000        # right ones, and as many wrong ones; above: forgotten
PASSWORD_SECONDS_MAX = 30.0         # for one check; above: given up, 503
WRONG_PASSWORD_PAUSE_SECONDS = 0.1  # before the next check of a sender with wrong ones lately
WRONG_PASSWORD_SECONDS = 60.0       # without a wrong one; then a sender counts as new
GUESSERS_MAX = 10_000               # remembered; above: the oldest is forgotten


class AuthError(Exception):
    """A refused request of the auth API, with etcd's text and the status of HTTP."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"auth: {text}")
        self.status = status


Names = Optional[Tuple[str, ...]]   # roles or patterns; None: null in JSON


class Permissions(NamedTuple):
    """The keys that a role may read and write: exact keys, or prefixes that end in `*`."""

    read: Names = None
    write: Names = None

    @property
    def is_empty(self) -> bool:
        return not self.read and not self.write

    def json(self) -> Dict[str, Dict[str, Names]]:
        return {"kv": {"read": self.read, "write": self.write}}

    def allow(self, key: str, *, write: bool, recursive: bool) -> bool:
        """True if a pattern covers `key`, and with `recursive` all keys below it, too."""
        for pattern in (self.write if write else self.read) or ():
            if pattern.endswith("*"):
                if key.startswith(pattern[:-1]):
                    return True
            elif pattern == key and not recursive:
                return True
        return False

    def grant(self, more: Permissions) -> Permissions:
        """Return the union, sorted.  Raises AuthError for a duplicate."""
        return Permissions(
            _granted(self.read, more.read, "Granting duplicate read permission {}"),
            _granted(self.write, more.write, "Granting duplicate write permission {}"),
        )

    def revoke(self, less: Permissions) -> Permissions:
        """Return the rest, sorted; permissions that were never granted are ignored."""
        return Permissions(*(
            tuple(sorted(set(ours or ()) - set(theirs or ())))
            for ours, theirs in zip(self, less)
        ))


def _granted(ours: Names, more: Names, complaint: str) -> Tuple[str, ...]:
    names = set(ours or ())
    for name in more or ():
        if name in names:
            raise AuthError(409, complaint.format(name))
        names.add(name)
    return tuple(sorted(names))


EVERYTHING = Permissions(("/*",), ("/*",))


class Role(NamedTuple):
    """A named set of permissions."""

    name: str
    permissions: Permissions = Permissions()

    def json(self) -> Dict[str, object]:
        return {"role": self.name, "permissions": self.permissions.json()}

    def allow(self, key: str, *, write: bool, recursive: bool) -> bool:
        return self.name == ROOT or self.permissions.allow(key, write=write, recursive=recursive)


class User(NamedTuple):
    """A user; password is its hash, or in a request the client's text ("": keep)."""

    name: str
    password: str = ""
    roles: Names = None

    def json(self, *, hide_password: bool = False) -> Dict[str, object]:
        fields: Dict[str, object] = {"user": self.name}
        if self.password and not hide_password:
            fields["password"] = self.password
        return {**fields, "roles": self.roles}

    def with_root(self) -> User:
        if self.name != ROOT or ROOT in (self.roles or ()):
            return self
        return self._replace(roles=(*(self.roles or ()), ROOT))

    def change_roles(self, grant: Names, revoke: Names) -> User:
        """Return the user with other roles, sorted.  Raises AuthError."""
        roles = set(_granted(
            self.roles, grant, f"Granting duplicate role {{}} for user {self.name}"
        ))
        for name in revoke or ():
            if name not in roles:
                raise AuthError(409, f"Revoking ungranted role {name} for user {self.name}")
            roles.remove(name)
        return self._replace(roles=tuple(sorted(roles)))


def go_text(text: str) -> str:
    """Return `text` with U+FFFD for half a surrogate pair, as Go reads JSON."""
    return _SURROGATE.sub("\ufffd", text)


def string_list(value: object) -> Names:
    """Return a JSON list of strings, or null, as Names.  Raises ValueError."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError("not a list of strings")
    return tuple(map(go_text, value))


def make_permissions(read: object, write: object) -> Permissions:
    """Return permissions from lists of JSON.  Raises ValueError.

    Differs from etcd: drops empty patterns, on which its requests crash.
    """
    lists = (string_list(read), string_list(write))
    return Permissions(*(None if names is None else tuple(filter(None, names)) for names in lists))


# A program of its own with low priority: a thread of this process would take Python's lock, or the
# processor, from the reactor (p99 of GET while guesses go on: 10 times its normal).
_BCRYPT_PROGRAM = """
import ctypes, os, sys
os.nice(10)
password, setting = sys.stdin.buffer.read().split(b"\\0")
for name in ("libcrypt.so.1", "libcrypt.so.2"):
    try:
        crypt = ctypes.CDLL(name).crypt_r
    except (OSError, AttributeError) as error:
        if "cannot open" in str(error) and "No such file" not in str(error):
            raise                       # it is there, but cannot be opened now
        continue
    crypt.restype = ctypes.c_char_p
    buffer = ctypes.create_string_buffer(1 << 18)       # larger than any struct crypt_data
    sys.stdout.buffer.write(crypt(password, setting, buffer) or b"*0")
    break
else:
    sys.stdout.buffer.write(b"*0")
"""


def _python() -> str:
    """Return the path of our Python; sys.executable can be a name from `exec -a`."""
    program = os.path.realpath("/proc/self/exe")
    return program if "python" in os.path.basename(program) else sys.executable or "python3"


class Passwords:
    """Hashes by bcrypt where libcrypt has it, else by PBKDF2; takes tens of ms.  Thread: any."""

    _ALPHABET = "./ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
    _ROUNDS = 200_000                   # of PBKDF2: about the time of bcrypt's 2**10
    _BCRYPT = re.compile(r"\$2[aby]\$(?:0[4-9]|[12]\d|3[01])\$[./A-Za-z0-9]{53}")

    def __init__(self, now: Callable[[], float]) -> None:
        self._log = ThrottledLog("auth", now)

    def hash(self, password: str) -> str:
        """Return a salted hash for the store.  Raises AuthError if it cannot be made now."""
        number = int.from_bytes(os.urandom(16), "big") << 4
        salt = "".join(self._ALPHABET[number >> shift & 63] for shift in range(126, -1, -6))
        made = self.bcrypt(password, f"$2a${PASSWORD_COST:02d}${salt}")
        if made is None:
            raise AuthError(503, f"passwords cannot be hashed now{_TRY_AGAIN}")
        if made:
            return made
        self._log.error(
            "passwords are hashed with PBKDF2, which etcd cannot verify: this system's libcrypt"
            " has no bcrypt; install libxcrypt (Debian: libcrypt1), and set the passwords again"
        )
        salt = os.urandom(16).hex()
        return f"$pbkdf2-sha256${self._ROUNDS}${salt}${self._pbkdf2(password, salt, self._ROUNDS)}"

    def verify(self, password: str, stored: str) -> Optional[bool]:
        """True if `stored` is a hash of `password`; None: it cannot be computed now."""
        try:
            if b"\0" in utf8(password):  # bcrypt would read only the part before it
                return False
        except UnicodeEncodeError:
            return False                # half a surrogate pair: no client can send it
        if stored.startswith("$pbkdf2-sha256$"):
            parts = stored.split("$")
            if len(parts) != 5 or re.fullmatch("[0-9]{1,8}", parts[2]) is None:
                return False
            made = self._pbkdf2(password, parts[3], int(parts[2]))
            return secrets.compare_digest(made.encode(), utf8(parts[4]))
        if self._BCRYPT.fullmatch(stored) is None:
            return False
        found = self.bcrypt(password, stored)
        if found == "":
            self._log.error(
                "a password hash made by etcd cannot be verified: this system's libcrypt has no"
                " bcrypt; install libxcrypt (Debian: libcrypt1), or set the password again here"
            )
        return secrets.compare_digest(found, stored) if found else None

    @staticmethod
    def decoy(stored: str) -> str:
        """Return a hash as slow as `stored` that no password has, for users that do not exist."""
        if stored.startswith("$pbkdf2-sha256$"):
            return stored.rpartition("$")[0] + "$" + 64 * "0"
        return (stored if stored.startswith("$2") else _DECOY)[:29] + 31 * "."

    @staticmethod
    def _pbkdf2(password: str, salt: str, rounds: int) -> str:
        return hashlib.pbkdf2_hmac("sha256", utf8(password), utf8(salt), max(rounds, 1)).hex()

    def bcrypt(self, password: str, setting: str) -> Optional[str]:
        """Hash with the algorithm, cost and salt of `setting`; "": no bcrypt here; None: failed."""
        try:
            import subprocess
            python = _python()
            done = subprocess.run(
                [python, "-I", "-S", "-c", _BCRYPT_PROGRAM],
                input=utf8(password) + b"\0" + setting.encode(),
                capture_output=True, timeout=PASSWORD_SECONDS_MAX, check=True,
            )
            made = done.stdout.decode("latin-1")
            if not made.startswith((setting[:4], "*")):
                raise ValueError(f"{python} is no Python")
        except (OSError, ImportError, ValueError, MemoryError, subprocess.SubprocessError) as error:
            self._log.error(
                f"passwords cannot be verified now, as the program for it has failed: {error}"
            )
            return None
        return made if len(made) == 60 and made.startswith(setting[:4]) else ""


_TRY_AGAIN = "; see the log of this member, and try again"
_DECOY = "$2a$10$" + 53 * "."       # where root has no hash to imitate


class Sender(NamedTuple):
    """The sender of a password: a user's name, and the address that it comes from."""

    user: str
    host: str


class PasswordCheck:
    """One password to verify, and the requests that wait for it.  Level 0 goes first."""

    __slots__ = ("stored", "password", "level", "askers")

    def __init__(self, stored: str, password: str, level: int) -> None:
        self.stored = stored
        self.password = password
        self.level = level
        self.askers: List[Tuple[Tuple[bytes, bytes], Callable[[bool], None]]] = []  # from; done


class PasswordChecks:
    """Verifies passwords one at a time, and remembers the results.

    The level of a check is the logarithm of its sender's recent wrong passwords and waiting
    checks.  Low levels go first, and a pause precedes each check above level 0: guessing is slow,
    and no other sender waits for it.  Known passwords never wait.

    The wrong passwords of a host count as well, less strictly, as users may share it.  Once a host
    has guessed under many names, all its checks wait for the pause, so that answers take as long
    for users that do not exist.  Existing users without a wrong password go before the others.
    Thread: reactor.
    """

    LEVELS = 9
    HOST_LEVELS_FREE = 3            # of a host's levels that do not count: 7 wrong or waiting

    def __init__(self, reactor: Reactor) -> None:
        self.passwords = Passwords(reactor.now)
        self._reactor = reactor
        self._key = os.urandom(32)
        self._known: Dict[bool, Dict[bytes, None]] = {True: {}, False: {}}
        self._waiting: Dict[bytes, PasswordCheck] = {}      # by digest; also the one under way
        self._levels: List[Dict[bytes, None]] = [{} for _ in range(self.LEVELS)]    # digests
        self._under_way = b""           # the digest of the running check
        self._wrong: Dict[bytes, Tuple[int, float]] = {}    # sender or host -> number; last
        self._pending: Dict[bytes, int] = {}                # sender or host -> its checks
        self._guess_at = 0.0            # no check above level 0 starts before
        self._timer: Optional[Timer] = None

    def known(self, user: str, stored: str, password: str) -> Optional[bool]:
        """True: right; False: wrong; None: check() must find out."""
        if len(password) > PASSWORD_BYTES_MAX:
            return False
        digest = self._digest(user, stored, password)
        if digest in self._known[True]:
            return True
        return False if digest in self._known[False] else None

    def check(
        self, sender: Sender, stored: str, password: str, done: Callable[[bool], None]
    ) -> None:
        """Verify, then call done(True); done(False) if that fails now, or too many wait."""
        digest = self._digest(sender.user, stored, password)
        origin, host = self._digest(*sender), self._digest(sender.host)
        level = self._level(origin, host, exists=stored != self.passwords.decoy(stored))
        check = self._waiting.get(digest)
        if check is None:
            check = self._waiting[digest] = PasswordCheck(stored, password, level)
            self._levels[level][digest] = None
        elif level < check.level and digest != self._under_way:
            del self._levels[check.level][digest]
            check.level = level
            self._levels[level][digest] = None
        check.askers.append(((origin, host), done))
        for place in (origin, host):
            self._pending[place] = self._pending.get(place, 0) + 1
        if len(self._waiting) > PASSWORD_CHECKS_MAX:        # drop the last of the worst level
            worst = next(level for level in reversed(self._levels) if level)
            self._finish(worst.popitem()[0], known=False)
        self._start_next()

    def _digest(self, *texts: str) -> bytes:
        text = " ".join((*(str(len(text)) for text in texts), *texts))
        return hashlib.blake2b(
            text.encode("utf-8", "surrogatepass"), key=self._key, digest_size=16
        ).digest()

    def _level(self, origin: bytes, host: bytes, *, exists: bool) -> int:
        own = self._guesses(origin)
        shared = max(self._guesses(host) - self.HOST_LEVELS_FREE, 0)
        if own or shared and not exists:
            return min(max(own, shared) + 1, self.LEVELS - 1)
        return min(shared, 1)

    def _guesses(self, place: bytes) -> int:
        """Return the logarithm of the wrong and the waiting passwords of a sender or host."""
        count, last = self._wrong.get(place, (0, 0.0))
        if last < self._reactor.now() - WRONG_PASSWORD_SECONDS:
            count = 0
        return (count + self._pending.get(place, 0)).bit_length()

    def _start_next(self) -> None:
        best = next((number for number, level in enumerate(self._levels) if level), None)
        if self._under_way or best is None:
            return
        wait_s = self._guess_at - self._reactor.now()
        if best and wait_s > 0:
            if self._timer is None:
                self._timer = self._reactor.call_later(wait_s, self._pause_over)
            return
        digest = self._under_way = next(iter(self._levels[best]))
        del self._levels[best][digest]
        check = self._waiting[digest]
        self._reactor.run_blocking(
            self.passwords.verify, check.password, check.stored, kind=PASSWORD_WORK,
            done=self._checked,
        )

    def _pause_over(self) -> None:
        self._timer = None
        self._start_next()

    def _checked(self, error: Optional[BaseException], right: Any) -> None:
        digest, self._under_way = self._under_way, b""
        is_known = error is None and right is not None
        if is_known:
            self._remember(digest, right=right)
        self._finish(digest, known=is_known)
        self._start_next()

    def _remember(self, digest: bytes, *, right: bool) -> None:
        known = self._known[right]
        if len(known) >= PASSWORDS_KNOWN_MAX:
            known.clear()
        known[digest] = None
        now = self._reactor.now()
        places = [places for places, _ in self._waiting[digest].askers]
        if right:
            for origin, _ in places:        # its host may guess other users' passwords
                self._wrong.pop(origin, None)
            return
        self._guess_at = now + WRONG_PASSWORD_PAUSE_SECONDS
        for place in {place for pair in places for place in pair}:
            count, _ = self._wrong.pop(place, (0, 0.0))
            if len(self._wrong) >= GUESSERS_MAX:
                del self._wrong[next(iter(self._wrong))]
            self._wrong[place] = count + 1, now

    def _finish(self, digest: bytes, *, known: bool) -> None:
        for places, done in self._waiting.pop(digest).askers:
            for place in places:
                self._pending[place] -= 1
                if not self._pending[place]:
                    del self._pending[place]
            done(known)
