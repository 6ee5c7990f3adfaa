"""Serve the page on this computer. Exports the release first, if that was not done yet.

    python -m web [--ckpt F] [--port 8000] [--build]

Before the first time: pip install -r requirements-web.txt && npm ci --prefix web. With --build nothing is
served: the folder web/page is then complete and works on any static host.
"""
import argparse
import functools
import http.server
import shutil
import sys
from pathlib import Path

from media.files import InputError, atomic_write, command
from media.weights import resolve
from sample import DEFAULT
from web.export import MODEL, export, exported

HERE = Path(__file__).resolve().parent
PAGE, ORT = HERE / "page", HERE / "node_modules" / "onnxruntime-web" / "dist"
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs",
           "ort.webgpu.bundle.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm",
           "ort-wasm-simd-threaded.asyncify.mjs")
EXAMPLE = ("portrait.png", "speech.wav")
TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".glsl": "text/plain",
         ".wasm": "application/wasm", ".json": "application/json"}


class Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the page, with the two headers that let a page use threads (COOP and COEP)."""

    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, **TYPES}

    def end_headers(self):
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, *args):
        pass


def build(ckpt):
    """Complete the folder of the page: graphs of the release, runtime, example. Raises InputError."""
    if not (ORT / RUNTIME[0]).is_file():
        raise InputError("onnxruntime-web is not there: npm ci --prefix web")
    ckpt = resolve(ckpt)
    if not Path(ckpt).is_file():
        raise InputError(f"{ckpt} does not exist; give a .safetensors file")
    copies = {PAGE / "ort" / name: ORT / name for name in RUNTIME}
    copies |= {PAGE / "example" / name: HERE.parent / "examples" / name for name in EXAMPLE}
    for target, source in copies.items():
        with atomic_write(target, make_folder=True) as temporary:
            shutil.copyfile(source, temporary)
    if not exported(ckpt, MODEL):
        print(f"exporting {ckpt} ...", flush=True)
        export(ckpt, MODEL)


def server(port, folder=PAGE):
    """A server on 127.0.0.1; port 0: any that is free. Raises InputError."""
    try:
        handler = functools.partial(Handler, directory=str(folder))
        return http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except (OSError, OverflowError) as error:
        raise InputError(f"port {port} cannot be used ({error}); give another --port") from None


@command("web")
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m web", description=__doc__.split("\n")[0],
                                     allow_abbrev=False)
    parser.add_argument("--ckpt", default=DEFAULT, help="released weights (default: the embedded ones)")
    parser.add_argument("--port", type=int, default=8000, help="0: any free one (default: %(default)s)")
    parser.add_argument("--build", action="store_true",
                        help="only complete the folder web/page, for a static host")
    args = parser.parse_args(argv)
    try:
        build(args.ckpt)
        if args.build:
            print(f"{PAGE}: {sum(f.stat().st_size for f in PAGE.rglob('*') if f.is_file()) / 1e6:.0f} MB, "
                  f"ready for a static host")
            return 0
        with server(args.port) as serving:
            print(f"http://127.0.0.1:{serving.server_address[1]}/  (Ctrl+C ends it)", flush=True)
            serving.serve_forever()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
