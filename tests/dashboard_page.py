"""A visdom server whose page is complete without a CDN, and a screenshot of that page.

    python tests/dashboard_page.py                   # a server at visdom's usual port, until Ctrl-C
    python tests/dashboard_page.py screenshot.png    # the same; when it ends, what headless Chromium shows

Visdom's server fetches the JavaScript of its page from CDNs when it first starts. The npm registry
has the same files; they are put into a copy of the package. Needs npm, and Chromium for the picture.
"""

import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import requests
import visdom

ROOT = Path(__file__).parent.parent
# Where the page looks for a file, the npm package, and the file's place in it (visdom/server/build.py has the list).
PAGE = [
    ("js/jquery.min.js", "jquery@3.1.1", "dist/jquery.min.js"),
    ("js/bootstrap.min.js", "bootstrap@3.3.7", "dist/js/bootstrap.min.js"),
    ("css/bootstrap.min.css", "bootstrap@3.3.7", "dist/css/bootstrap.min.css"),
    ("js/react-react.min.js", "react@16.2.0", "umd/react.production.min.js"),
    ("js/react-dom.min.js", "react-dom@16.2.0", "umd/react-dom.production.min.js"),
    ("js/react-modal.min.js", "react-modal@3.1.10", "dist/react-modal.min.js"),
    ("js/plotly-plotly.min.js", "plotly.js-dist-min@2.11.1", "plotly.min.js"),
    ("js/sjcl.js", "sjcl@1.0.7", "sjcl.js"),
    ("js/layout_bin_packer.js", "layout-bin-packer@1.4.0", "dist/layout-bin-packer.js"),
    ("fonts/layout_bin_packer.js", "layout-bin-packer@1.4.0", "dist/layout-bin-packer.js"),
    ("js/d3.v3.min.js", "d3@3.5.17", "d3.min.js"),
    ("js/d3-selection-multi.v1.js", "d3-selection-multi@1.0.1", "build/d3-selection-multi.js"),
    ("js/saveSvgAsPng.js", "save-svg-as-png@1.4.17", "lib/saveSvgAsPng.js"),
    ("css/react-resizable-styles.css", "react-resizable@1.4.6", "css/styles.css"),
    ("css/react-grid-layout-styles.css", "react-grid-layout@0.16.3", "css/styles.css"),
    ("fonts/classnames", "classnames@2.2.5", "index.js"),
]
# As `python -m visdom.server`, which would first look for the files, and end where no CDN is reached.
SERVE = """
import os
os.environ["HOME"] = os.getcwd()
os.makedirs(".visdom", exist_ok=True)
from visdom.server.run_server import main
main()
"""


def complete_page(folder: Path) -> None:
    """Put a copy of visdom with all files of its page into `folder`, from where Python can import it."""
    static = Path(shutil.copytree(Path(visdom.__file__).parent, folder / "visdom")) / "static"
    packages = sorted({package for _, package, _ in PAGE})
    subprocess.run(["npm", "pack", "--silent", *packages], cwd=folder, check=True, capture_output=True)
    for target, package, file in PAGE:
        (static / target).parent.mkdir(exist_ok=True)
        with tarfile.open(folder / f"{package.replace('@', '-')}.tgz") as archive:
            (static / target).write_bytes(archive.extractfile(f"package/{file}").read())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def server(folder: Path, port: int, base: str = "", user: str = "", password: str = ""):
    """A visdom server on loopback that keeps its windows in `folder`, and is taken from there if it is there.

    base: the path at which it is. user, password: those that it lets in; everyone, if there is no user.
    """
    command = [sys.executable, "-c", SERVE, "-bind_local", "-port", str(port), "-base_url", base]
    command += ["-enable_login"] if user else []
    login = {"USE_ENV_CREDENTIALS": "1", "USERNAME": user, "PASSWORD": password, "COOKIE": f"key of {folder}"}
    environment = os.environ | {f"VISDOM_{name}": value for name, value in login.items()}
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(1200):
            try:
                requests.get(f"http://127.0.0.1:{port}/", timeout=1)
                break
            except requests.ConnectionError:
                time.sleep(0.1)
        else:
            raise RuntimeError((folder / "server.log").read_text())
        yield process
    finally:
        process.kill()
        process.wait()


def screenshot(url: str, path: Path, width: int = 1500, height: int = 2400) -> None:
    """What headless Chromium shows at `url`, as a PNG."""
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
        flags += [
            f"--user-data-dir={profile}",
            f"--window-size={width},{height}",
            "--virtual-time-budget=30000",
            "--run-all-compositor-stages-before-draw",
        ]
        command = ["chromium", *flags, f"--screenshot={path}", url]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(picture=None):
    with tempfile.TemporaryDirectory() as folder:
        complete_page(Path(folder))
        with server(Path(folder), 8097) as process:
            page = "http://localhost:8097/env/air"
            print(page, flush=True)
            try:
                process.wait()
            except KeyboardInterrupt:
                if picture:
                    screenshot(page, Path(picture).absolute())


if __name__ == "__main__":
    main(*sys.argv[1:])
