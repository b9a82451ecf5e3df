"""Files from the network: whole or absent, verified, and fetched by one process alone.

    with only_one(target):
        problem = fetch("https://server/file", target, sha256)
"""
import contextlib
import hashlib
import os
import re
import sys
import urllib.request


def fetch(url, target, sha256=""):
    """Fetch a file -> "" when it is there, or what went wrong. It gets its name when it has all of
    its bytes and the right sha256, where one is given or the server tells it. A broken transfer
    goes on where it stopped, now or in a later run."""
    partial, problem = target.with_name(target.name + ".partial"), ""
    for _ in range(3):
        try:
            expected = transfer(url, partial, sha256)
            found = expected and hash_files(partial)
            if found == expected:
                os.replace(partial, target)
                return ""
            problem = f"its sha256 is {found}, expected {expected}"
            partial.unlink()
        except Exception as error:  # networks fail in many ways
            problem = " ".join(str(error).split()) or type(error).__name__
            code = getattr(error, "code", 0)
            if code == 416:  # nothing is missing, and whether it is right is not known
                partial.unlink()
            if code in (401, 403, 404):  # will not get better
                break
    return problem


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the checksum that huggingface.co tells with one."""
    etag = ""
    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302  # not in Python 3.10

    def redirect_request(self, request, file, code, message, headers, address):
        # The next server's own ETag is no sha256, even where it looks like one.
        self.etag = headers.get("X-Linked-Etag") or self.etag or "unknown"
        code = 307 if code == 308 else code
        return super().redirect_request(request, file, code, message, headers, address)


def transfer(url, partial, sha256=""):
    """Append to `partial` what is missing of `url` -> `sha256`, or that which the server tells, or
    "". OSError when the transfer stops early."""
    have, redirects = partial.stat().st_size if partial.exists() else 0, Redirects()
    headers = {"User-Agent": "clip"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.build_opener(redirects).open(request, timeout=30) as response:
        told = [response.headers.get("X-Linked-Etag"), redirects.etag, response.headers.get("ETag")]
        etag = next(filter(None, told), "")
        sha256 = sha256 or "".join(re.findall(r'^"?([0-9a-f]{64})"?$', etag))
        have = have if response.status == 206 else 0
        if have and not sha256:  # the two parts could be of different files
            partial.unlink()
            return transfer(url, partial)
        total = have + int(response.headers.get("Content-Length") or 0)
        if total > 10 << 20:
            print(f"fetching {response.url.partition('?')[0]} ({total >> 20:,} MB) into "
                  f"{partial.parent}", file=sys.stderr, flush=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 20):
                have += file.write(chunk)
                if total > 10 << 20 and sys.stderr.isatty():
                    print(f"\r{have >> 20:,} of {total >> 20:,} MB", end="", file=sys.stderr)
    if have < total:
        raise OSError(f"the connection ended at {have:,} of {total:,} bytes")
    return sha256


@contextlib.contextmanager
def only_one(target):
    """Processes that fetch the same thing wait for each other, where the system can lock files."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, ImportError):  # a read-only folder can be used
            target.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(target.with_name(target.name + ".lock"), "w"))
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def hash_files(*paths):
    """The sha256 of the bytes of files, one behind the other."""
    found = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                found.update(chunk)
    return found.hexdigest()
