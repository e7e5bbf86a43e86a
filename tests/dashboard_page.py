"""A visdom server whose page is complete without a CDN: `python tests/dashboard_page.py` runs one, until Ctrl-C.

Visdom's server fetches the JavaScript of its page from CDNs when it first starts. The npm registry has the same files,
which are put into a copy of the package.
"""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import visdom

# Where the page looks for a file, the npm package, and the file's place in it (visdom/server/build.py has the list).
PAGE = [
    ("js/jquery.min.js", "jquery@3.1.1", "dist/jquery.min.js"),
    ("js/bootstrap.min.js", "bootstrap@3.3.7", "dist/js/bootstrap.min.js"),
    ("css/bootstrap.min.css", "bootstrap@3.3.7", "dist/css/bootstrap.min.css"),
    ("js/react-react.min.js", "react@16.2.0", "umd/react.production.min.js"),
    ("js/react-dom.min.js", "react-dom@16.2.0", "umd/react-dom.production.min.js"),
    ("js/plotly-plotly.min.js", "plotly.js-dist-min@2.11.1", "plotly.min.js"),
    ("js/sjcl.js", "sjcl@1.0.7", "sjcl.js"),
    ("js/layout_bin_packer.js", "layout-bin-packer@1.4.0", "dist/layout-bin-packer.js"),
    ("js/d3.v3.min.js", "d3@3.5.17", "d3.min.js"),
    ("js/d3-selection-multi.v1.js", "d3-selection-multi@1.0.1", "build/d3-selection-multi.js"),
    ("js/saveSvgAsPng.js", "save-svg-as-png@1.4.17", "lib/saveSvgAsPng.js"),
    ("css/react-resizable-styles.css", "react-resizable@1.4.6", "css/styles.css"),
    ("css/react-grid-layout-styles.css", "react-grid-layout@0.16.3", "css/styles.css"),
]
# As `python -m visdom.server`, which would first look for the files, and end where no CDN is reached.
SERVE = """
import os, sys, types
# Visdom's client would import it, which takes seconds. (What it imports itself asks whether things are tensors.)
sys.modules["torch"] = types.SimpleNamespace(Tensor=())
os.environ["HOME"] = os.getcwd()
from tornado import netutil
bind = netutil.bind_sockets
netutil.bind_sockets = lambda *args, **options: bind(*args, **options | {"reuse_port": True})  # see `reserved_port`
from visdom.server.run_server import main
main()
"""


def complete_page(folder: Path) -> None:
    """Put a copy of visdom with all files of its page into `folder`, from where Python can import it."""
    static = Path(shutil.copytree(Path(visdom.__file__).parent, folder / "visdom")) / "static"
    subprocess.run(["npm", "pack", "-s", *{name for _, name, _ in PAGE}], cwd=folder, check=True, capture_output=True)
    for target, package, file in PAGE:
        with tarfile.open(folder / f"{package.replace('@', '-')}.tgz") as archive:
            (static / target).write_bytes(archive.extractfile(f"package/{file}").read())


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port on loopback at which nobody answers, and which nobody but `server` gets meanwhile."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def server(folder: Path, port: int, base="", user="", password="") -> Iterator[subprocess.Popen]:
    """A visdom server on loopback that keeps its windows in `folder`, and is taken from there if it is there."""
    command = [sys.executable, "-u", "-c", SERVE, "-bind_local", "-port", str(port), "-base_url", base]
    command += ["-enable_login"] if user else []
    login = {"USE_ENV_CREDENTIALS": "1", "USERNAME": user, "PASSWORD": password, "COOKIE": f"key of {folder}"}
    options = {"cwd": folder, "env": os.environ | {f"VISDOM_{name}": value for name, value in login.items()}}
    options |= {"stdout": subprocess.PIPE, "text": True, "start_new_session": True}  # Ctrl-C is not for the server.
    (folder / ".visdom").mkdir(parents=True, exist_ok=True)
    with open(folder / "server.log", "w") as log, subprocess.Popen(command, stderr=log, **options) as process:
        try:
            if not any("You can navigate to" in line for line in process.stdout):  # said as soon as it listens
                raise RuntimeError((folder / "server.log").read_text())
            yield process
        finally:
            process.kill()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        complete_page(Path(folder))
        with server(Path(folder), 8097) as process, suppress(KeyboardInterrupt):
            print("http://localhost:8097/env/air", flush=True)
            process.wait()
