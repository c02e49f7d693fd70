"""A network behind HTTP: a picture's bytes in, its class ids as a palette PNG out.

pip install fastapi uvicorn
python examples/serve.py --weights camvid11 --port 8000
curl --data-binary @street.jpg http://127.0.0.1:8000/segment -o labels.png
"""

import argparse
import threading

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from fastscnn_fast import fuse, load_checkpoint
from fastscnn_fast.data.pictures import LABELS
from fastscnn_fast.data.results import encode
from fastscnn_fast.runtime.segment import classify, prepare

MOST_BYTES = 1 << 25


def make_app(weights: str) -> FastAPI:
    app, fast, network = FastAPI(), fuse(load_checkpoint(weights)), threading.Lock()

    def label(content: bytes) -> Response:
        pixels, x = prepare(content, fast.config)  # in threads, beside the network,
        with network:  # which takes all processors for one picture at a time
            (found,) = classify(fast, [x])
        labels, _ = found.at(pixels.shape)
        png = encode(pixels, labels, fast, overlay_format=None)[LABELS]
        return Response(bytes(png), media_type="image/png")

    @app.post("/segment")
    async def segment(request: Request) -> Response:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > MOST_BYTES:
                raise HTTPException(413, f"a picture must have at most {MOST_BYTES} bytes")
        try:
            return await run_in_threadpool(label, bytes(content))
        except ValueError as error:
            raise HTTPException(422, str(error)) from error

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve a network over HTTP.")
    parser.add_argument("--weights", default="camvid11", help="a file, or a name (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="to listen at (%(default)s)")
    args = parser.parse_args()
    uvicorn.run(make_app(args.weights), port=args.port)
