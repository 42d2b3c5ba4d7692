"""Two processes that want the same folder or the same download."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import pickle
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torchvision

import pyro_lottery as pl
from pyro_lottery import imp
from tests.soak.child import RUN, Child, Figures


def together(root: Path) -> Figures:
    """Two processes started together: on one empty folder, and on one missing download."""
    folder = root / "shared"
    pair = [Child(root / name, imp.main, [*RUN, "--run-dir", str(folder)], 0, "count") for name in ("one", "two")]
    codes = sorted(str(child.wait(600)) for child in pair)
    told = [line for child in pair for line in child.complaints()]
    assert len(told) == 1, told
    return {
        "exit codes on one empty folder": codes,
        "the other is told of": told[0].partition(" another process ")[2].partition(" is using ")[0],
        **_downloads(root),
    }


def _downloads(root: Path) -> Figures:
    """Two processes that want one data set: a server of this process counts what they fetch."""
    archive, sums = _tiny_cifar(root), dict[str, str]()
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member)
            assert content is not None
            sums[Path(member.name).name] = hashlib.md5(content.read()).hexdigest()
    fetched: list[str] = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.headers.get("Method") != "HEAD":  # with which torchvision asks for redirections first
                fetched.append(self.path)
            time.sleep(0.5)  # both shall want it while it is on its way
            self.send_response(200)
            self.end_headers()
            self.wfile.write(archive.read_bytes())

        def log_message(self, *_: Any) -> None:
            pass

    def load(_: list[str]) -> int:
        cifar = torchvision.datasets.CIFAR10
        cifar.url = f"http://127.0.0.1:{server.server_port}/{archive.name}"
        cifar.filename, cifar.tgz_md5 = archive.name, hashlib.md5(archive.read_bytes()).hexdigest()
        cifar.train_list, cifar.test_list = ([[n, sums[n]]] for n in ("data_batch_1", "test_batch"))
        cifar.meta = {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
        os.environ["no_proxy"] = "*"
        return 0 if len(pl.data.load("cifar10", root / "data").train) == 10 else 1

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        pair = [Child(root / name, load, [], 0, "count") for name in ("first", "second")]
        codes = [child.wait(60) for child in pair]
        server.shutdown()
    return {"exit codes on one missing download": codes, "downloads": len(fetched)}


def _tiny_cifar(root: Path) -> Path:
    rows = np.zeros((10, 3072), dtype=np.uint8)
    batch = {"data": rows, "labels": list(range(10))}
    path = root / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, value in (
            ("data_batch_1", batch),
            ("test_batch", batch),
            ("batches.meta", {"label_names": ["a"] * 10}),
        ):
            data = pickle.dumps(value)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
