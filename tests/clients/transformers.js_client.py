# /// script
# dependencies = ["transformers<6", "onnx>=1.23", "onnxscript>=0.7", "onnxruntime>=1.31"]
# [tool.client]
# npm = ["@huggingface/transformers@4.3.2"]
# ///
"""transformers.js, in Node and in a page of headless Chromium: our ONNX exports beside the official model.

Needs node, npm and chromium.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from checkpoints import CONTEXT, PROMPTS, official_ids, row
from onnx_exports import MORE, TEXTS, exported, int8_ids, left_padded, official_batch, official_texts

MODULES = Path("node_modules").resolve()
LIBRARY = MODULES / "@huggingface" / "transformers" / "dist"
GENERATE = Path(__file__).with_name("generate.mjs")
NODE = """
import * as library from {library};
import {{ run }} from {generate};
library.env.allowRemoteModels = false;
library.env.localModelPath = {models};
console.log("result: " + JSON.stringify(await run(library, {jobs})));
"""
PAGE = """<!doctype html><script type="module">
const answer = (value) => fetch("/answer", {{ method: "POST", body: JSON.stringify(value) }});
try {{
  const library = await import("/library/transformers.min.js");
  const {{ run }} = await import("/generate.mjs");
  library.env.allowRemoteModels = false;
  library.env.allowLocalModels = true;
  library.env.localModelPath = "/models/";
  library.env.backends.onnx.wasm.wasmPaths = "/ort/";
  await answer(await run(library, {jobs}));
}} catch (error) {{
  await answer(String(error.stack ?? error));
}}
</script>"""


def in_node(models: Path, jobs: list[dict]) -> list:
    files = {"library": (LIBRARY / "transformers.node.mjs").as_uri(), "generate": GENERATE.as_uri()}
    values = {name: json.dumps(value) for name, value in {**files, "models": f"{models}/", "jobs": jobs}.items()}
    command = ["node", "--input-type=module", "--eval", NODE.format(**values)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.split("result: ")[1])


def in_a_page(models: Path, jobs: list[dict]) -> list:
    places = {"library": LIBRARY, "ort": MODULES / "onnxruntime-web" / "dist", "models": models}
    answered, answers = threading.Event(), []

    class Handler(SimpleHTTPRequestHandler):
        extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

        def translate_path(self, path):
            if path == "/generate.mjs":
                return str(GENERATE)
            first, _, rest = path.lstrip("/").partition("?")[0].partition("/")
            return str(places[first] / rest) if first in places else "/nowhere"

        def do_GET(self):
            if self.path != "/":
                return super().do_GET()
            page = PAGE.format(jobs=json.dumps(jobs)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def do_POST(self):
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            answered.set()

        def log_message(self, format, *arguments):
            print(format % arguments, file=sys.stderr)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ]
        url = f"http://127.0.0.1:{server.server_port}/"
        browser = subprocess.Popen([shutil.which("chromium"), *options, url], stdout=sys.stderr)
        try:
            assert answered.wait(600), "the page has not answered within 10 minutes"
        finally:
            browser.terminate()
            browser.wait(60)
            server.shutdown()
    assert isinstance(answers[0], list), answers[0]
    return answers[0]


def main() -> None:
    assert (LIBRARY / "transformers.node.mjs").exists(), "run .ci/clients transformers.js, which installs it"
    assert shutil.which("node") and shutil.which("chromium"), "node and chromium must be installed"
    with tempfile.TemporaryDirectory() as folder:
        for tied in (True, False):
            kind = "tied" if tied else "untied"
            official, ours = exported(Path(folder), tied)
            expected, batch = official_ids(official), left_padded()
            common = {"directory": ours.name, "dtype": "fp32", "length": CONTEXT}
            prompts = [{**common, "ids": [prompt], "mask": [[1] * len(prompt)]} for prompt in PROMPTS]
            padded = {**common, "ids": batch[0], "mask": batch[1]}
            texts = {**common, "texts": TEXTS, "more": MORE}
            int8 = [{**job, "dtype": "q8"} for job in prompts]
            every = [*prompts, padded, texts]
            for where, run in (("Node", in_node), ("a page in Chromium", in_a_page)):
                *ids, in_batch, written = run(Path(folder), every)
                row(f"greedy ids in {where}, {kind} head", [one for [one] in ids] == expected)
                row(f"a left-padded batch in {where}, {kind}", in_batch == official_batch(official))
                row(f"texts of its pipeline in {where}, {kind}", written == official_texts(official))
            ids = in_node(Path(folder), int8)
            row(f"int8 in Node, {kind}: ids as in onnxruntime", [one for [one] in ids] == int8_ids(ours))


if __name__ == "__main__":
    main()
