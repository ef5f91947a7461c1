"""Serve one pipeline over HTTP with the standard library. One request at a time: a transformer has one state.

python examples/serve.py --base Wan-AI/Wan2.1-T2V-1.3B-Diffusers --adapter you/your-adapter --port 8000
curl localhost:8000 -o beach.mp4 -d "{\\"prompt\\": \\"a dog runs\\", \\"references\\": [\\"$(base64 -w0 dog.png)\\"]}"

Other fields go to the pipeline as they are: height, width, num_frames, num_inference_steps, the guidance scales.
Binds to this machine only; it has no authentication.
"""

import argparse
import base64
import io
import json
import tempfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import torch
from diffusers import WanPipeline
from PIL import Image

import refalign_adapter as ra

SIZE = {"height", "width", "num_frames"}
GUIDANCE = {"guidance_scale", "image_guidance_scale", "guidance_refresh", "negative_prompt"}
ALLOWED = {*SIZE, *GUIDANCE, "num_inference_steps"}


def generate(pipe, request: dict, fps: int) -> bytes:
    """Run one request and return the mp4 file's bytes. Bad input raises ValueError or KeyError."""
    unknown = set(request) - ALLOWED - {"prompt", "references", "seed"}
    if unknown:
        raise ra.UserError(f"unknown fields {sorted(unknown)}; known are {sorted(ALLOWED)}, prompt, references, seed")
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in request.get("references", [])]
    frames = pipe(
        request["prompt"],
        reference_images=images,
        generator=torch.Generator().manual_seed(request.get("seed", 0)),
        **{name: request[name] for name in ALLOWED & set(request)},
    ).frames[0]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mp4"
        ra.write_video(path, frames, fps=fps)
        return path.read_bytes()


def make_handler(pipe, fps: int) -> type[BaseHTTPRequestHandler]:
    """The request handler of one pipeline."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                body, status, kind = generate(pipe, request, fps), 200, "video/mp4"
            except (ValueError, KeyError, OSError) as error:
                body, status, kind = f"{error}\n".encode(), 400, "text/plain"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, help="folder or Hub id; demo: the demo's small world")
    parser.add_argument("--adapter", required=True, help="likewise")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--fps", type=int, default=16)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = ra.demo_base() if options.base == "demo" else options.base
    base = WanPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    pipe = ra.load_adapter(base.to(device), ra.demo_adapter() if options.adapter == "demo" else options.adapter)
    server = HTTPServer(("127.0.0.1", options.port), make_handler(pipe, options.fps))
    print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
